// The table of adapters: it follows the search, sorts, and chooses.
const table = byId("adapter-table");
const tableRows = table ? [...table.tBodies[0].rows] : [];

let order = adapters.map((_, i) => i);
let numLines = data.num_lines;

function showMatches() {
  let shown = 0;
  for (const i of order) {
    tableRows[i].hidden = !matches[i] || shown >= numLines;
    if (!tableRows[i].hidden) shown += 1;
  }
  const [all, found] = [adapters.length, numMatches].map((number) => number.toLocaleString("en"));
  byId("matches").textContent = numMatches === adapters.length ? `${all} adapters` : `${found} of ${all} adapters`;
  if (!byId("more-lines")) return;
  byId("more-lines").hidden = shown === numMatches;
  byId("lines-note").textContent = shown < numMatches ? `The first ${shown} of ${found} stand here.` : "";
}

const sortKey = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent;

function sortBy(column, heading) {
  const isDown = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", isDown ? "descending" : "ascending");
  const keys = tableRows.map((row) => sortKey(row, column));
  const isNumber = keys.every((key) => key !== "" && !Number.isNaN(Number(key)));
  const compare = isNumber ? (a, b) => Number(keys[a]) - Number(keys[b]) : (a, b) => keys[a].localeCompare(keys[b], "en");
  order = keys.map((_, i) => i).sort((a, b) => (isDown ? -1 : 1) * compare(a, b) || a - b);
  table.tBodies[0].append(...order.map((i) => tableRows[i]));
  showMatches();
}

// A card may be out of sight from here: it is shown, and the focus goes there.
function chooseFromAfar(i) {
  choose(i);
  byId("card").focus({ preventScroll: true });
  byId("card").scrollIntoView({ block: "nearest" });
}

function startTable() {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = html("button", { type: "button", textContent: heading.textContent });
    button.addEventListener("click", () => sortBy(column, heading));
    heading.replaceChildren(button);
  });
  table.addEventListener("click", (event) => {
    const row = event.target.closest("button.name")?.closest("tr");
    if (row) chooseFromAfar(tableRows.indexOf(row));
  });
  watchers.chosen.push(() => {
    table.querySelector("[aria-current=true]")?.removeAttribute("aria-current");
    if (explored.chosen !== null) tableRows[explored.chosen].setAttribute("aria-current", "true");
  });
  watchers.matches.push(() => { numLines = data.num_lines; showMatches(); });
  byId("more-lines")?.addEventListener("click", () => { numLines += data.num_lines; showMatches(); });
}
