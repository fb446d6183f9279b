// What a reader looks for and has chosen. Parts of the page that show it are told of each change.
const adapters = data.adapters;
const explored = { words: [], cluster: null, family: null, chosen: null };
const watchers = { matches: [], chosen: [] };
const tell = (kind) => watchers[kind].forEach((watcher) => watcher());

const sought = adapters.map((adapter) => [adapter.name, ...adapter.tasks, ...adapter.families].join("\n").toLowerCase());
const isMatch = (i) =>
  (explored.cluster === null || data.labels[i] === explored.cluster) &&
  (explored.family === null || adapters[i].families.includes(explored.family)) &&
  explored.words.every((word) => sought[i].includes(word));

let matches = adapters.map(() => true);
let numMatches = adapters.length;

function look(changes) {
  Object.assign(explored, changes);
  matches = adapters.map((_, i) => isMatch(i));
  numMatches = matches.filter(Boolean).length;
  tell("matches");
}

function choose(i) {
  explored.chosen = i;
  tell("chosen");
}

// Texts that many adapters share stand once on the page.
const textOf = (value) => (typeof value === "number" ? data.texts[value] : value);
const cosineText = (value) => value.toFixed(2).replace("-", "−");
const clusterText = (label) => (label < 0 ? "no cluster" : `cluster ${label}: ${data.clusters[label]}`);
