// Every scored row with all answers: filtered by text, task, score, disagreement and strongest expert; shown in pages.
const PAGE_ROWS = 10;
const RIGHT = 50; // points of 100
const matching = { rows: [], page: 0 };

// Each kind says of the scores of a row, by column, whether it is shown; a score that is missing is null.
const isRouter = (name) => name !== "base" && name !== "oracle" && !name.endsWith(": oracle");
const baseOf = (scores) => scores[data.rows.columns.indexOf("base")] ?? null;
const isWrong = (score) => score !== null && score < RIGHT;
const isRight = (score) => score !== null && score >= RIGHT;
const ROW_KINDS = [
  ["all", () => true],
  ["wrong", (scores, column) => isWrong(scores[column])],
  ["right", (scores, column) => isRight(scores[column])],
  ["wrong where the base is right", (scores, column) => isWrong(scores[column]) && isRight(baseOf(scores))],
  ["right where the base is wrong", (scores, column) => isRight(scores[column]) && isWrong(baseOf(scores))],
  ["routers disagree", (scores) => {
    const routers = scores.filter((_, column) => isRouter(data.rows.columns[column]));
    return routers.some(isRight) && routers.some(isWrong);
  }],
];

const scoresOf = (task, i) => task.values.map((values) => values?.[i] ?? null);
const answerOf = (task, column, i) => task.texts[task.answers[column]?.[i]];
const expertOf = (task, column, i) => task.experts[column]?.[i];

const choiceOf = (id) => Number(byId(id).value);

function isShown(task, i, words) {
  const column = choiceOf("row-column");
  const expert = choiceOf("row-expert") - 2;
  if (expert > -2 && expertOf(task, column, i) !== expert) return false;
  if (!ROW_KINDS[choiceOf("row-kind")][1](scoresOf(task, i), column)) return false;
  const texts = [task.prompts[i], ...task.references[i], ...data.rows.columns.map((_, c) => answerOf(task, c, i) ?? "")];
  return !words || texts.some((text) => text.toLowerCase().includes(words));
}

function answerLine(task, column, i) {
  const [score, answer, expert] = [scoresOf(task, i)[column], answerOf(task, column, i), expertOf(task, column, i)];
  const name = expert === undefined ? "" : expert < 0 ? "the base" : data.rows.experts[expert];
  const cells = html("tr", { className: column === choiceOf("row-column") ? "chosen" : "" },
    html("th", { scope: "row" }, ...data.rows.columns[column].split(/(?=\[)|(?<=: )/).flatMap((part, k) => (k ? [html("wbr"), part] : [part]))),
    html("td", { className: "text" }, answer === undefined ? html("small", { textContent: "not recorded" }) : answer.trim() || html("small", { textContent: "nothing" })),
    html("td", { className: score === null ? "score" : `score ${score >= RIGHT ? "good" : "bad"}`, textContent: score === null ? "–" : String(score) }));
  if (data.rows.experts.length) cells.append(html("td", { className: "expert", textContent: name }));
  return cells;
}

function rowCard([task, i]) {
  const head = html("tr", {}, ...["", "answer", "score", ...(data.rows.experts.length ? ["strongest expert"] : [])].map((name) => html("th", { scope: "col", textContent: name })));
  const lines = data.rows.columns.flatMap((_, column) => (task.values[column] ? [answerLine(task, column, i)] : []));
  return html("article", { className: "row" },
    html("p", { className: "note", textContent: `${task.task} · ${task.family} · ${task.split} · row ${i + 1}` }),
    html("div", {},
      html("div", { className: "tokens", textContent: task.prompts[i] }),
      html("p", { className: "reference" }, html("small", { textContent: task.references[i].length > 1 ? "right answers " : "right answer " }), task.references[i].join(" · "))),
    html("div", { className: "scroll" }, html("table", {}, html("thead", {}, head), html("tbody", {}, ...lines))));
}

function showPage() {
  const pages = Math.max(1, Math.ceil(matching.rows.length / PAGE_ROWS));
  matching.page = Math.max(0, Math.min(pages - 1, matching.page));
  const start = matching.page * PAGE_ROWS;
  byId("row-count").textContent = matching.rows.length ? `${start + 1} to ${Math.min(start + PAGE_ROWS, matching.rows.length)} of ${matching.rows.length} rows` : "no rows";
  byId("row-back").disabled = matching.page === 0;
  byId("row-next").disabled = matching.page === pages - 1;
  byId("row-list").replaceChildren(...matching.rows.slice(start, start + PAGE_ROWS).map(rowCard));
}

function filterRows() {
  const words = byId("row-search").value.trim().toLowerCase();
  const task = choiceOf("row-task") - 1;
  const tasks = task < 0 ? data.rows.tasks : [data.rows.tasks[task]];
  matching.rows = tasks.flatMap((each) => each.prompts.map((_, i) => [each, i]).filter(([, i]) => isShown(each, i, words)));
  matching.page = 0;
  showPage();
}

function turnPage(step) {
  matching.page += step;
  showPage();
  byId("rows").scrollIntoView();
}

function startRows() {
  const { columns, experts, tasks } = data.rows;
  fillSelect("row-task", ["all tasks", ...tasks.map(({ task, split }) => `${task} (${split})`)]);
  fillSelect("row-column", columns, Math.max(0, columns.indexOf(data.means?.main)));
  fillSelect("row-kind", ROW_KINDS.map(([name]) => name));
  fillSelect("row-expert", ["any", "the base", ...experts]);
  byId("row-expert").parentElement.hidden = experts.length === 0;
  byId("row-controls").addEventListener("input", filterRows);
  byId("row-back").addEventListener("click", () => turnPage(-1));
  byId("row-next").addEventListener("click", () => turnPage(1));
  filterRows();
}
