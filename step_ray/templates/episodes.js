// The episode viewer. The index is unpacked when the page opens, an episode when it is opened.
// What models and environments wrote becomes text nodes only; nothing here makes HTML of a text.
"use strict";

const ROWS_LISTED = 200;
const KINDS = ["error", "suboptimal", "correction", "unjudged"];
const OUTCOMES = { success: "solved", failed: "failed", truncated: "truncated", error: "error" };
const MARKS = { t: "trained", m: "masked", c: "context", r: "removed" };

const byId = (id) => document.getElementById(id);
const filters = byId("filters").elements;
const views = byId("views").elements;
const chunks = new Map();

let index; // what the file holds, see index() in report/episodes.py
let vocabulary; // token -> text
let beside = new Map(); // task -> episodes of the agent that is shown beside
let found = []; // numbers of the episodes that pass the filters
let numListed = 0;
let opened = null; // number of the opened episode

// ---- data

async function unpack(id) {
  const packed = Uint8Array.from(atob(byId(id).textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

async function load(number) {
  const chunk = Math.floor(number / index.perChunk);
  if (!chunks.has(chunk)) chunks.set(chunk, unpack(`chunk-${chunk}`));
  return (await chunks.get(chunk))[number % index.perChunk];
}

// The episode beside: same task, same seed if there is one, never the episode itself.
function partnerOf(number) {
  const { task, seed } = index.episodes[number];
  const others = (beside.get(task) || []).filter((other) => other !== number);
  const same = others.find((other) => index.episodes[other].seed === seed);
  return same ?? others[0] ?? null;
}

// ---- making elements

function el(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== false && value !== "") element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

function addOptions(select, pairs) {
  for (const [value, text] of pairs) select.append(el("option", { value }, text));
}

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

// ---- filters and list

function fillFilters() {
  for (const name of ["agent", "beside"]) {
    for (const kind of new Set(index.groups.map((group) => group.kind))) {
      const options = el("optgroup", { label: kind });
      const groups = index.groups.filter((group) => group.kind === kind);
      addOptions(options, groups.map((g) => [g.folder, `${g.label} (${g.shown})`]));
      filters[name].append(options);
    }
  }
  const types = new Set(Object.values(index.tasks).map((task) => task.type));
  addOptions(filters.type, [...types].sort().map((type) => [type, type || "(none)"]));
  const stops = new Set(index.episodes.map((row) => row.stop));
  addOptions(filters.outcome, Object.entries(OUTCOMES));
  addOptions(filters.outcome, [...stops].sort().map((stop) => [`stop ${stop}`, `stop: ${stop}`]));
  addOptions(filters.has, KINDS.map((kind) => [kind, kind]));
}

function showLeftOut() {
  const partly = index.groups.filter((group) => group.shown < group.total);
  if (!partly.length) return;
  const total = index.groups.reduce((sum, group) => sum + group.total, 0);
  const number = (value) => value.toLocaleString("en");
  byId("left-out").append(
    el("summary", {}, `${number(index.episodes.length)} of ${number(total)} episodes of the run are in this file. Where is the rest?`),
    el("p", {}, "Of each agent, the tasks that come first by a hash of their id are here. ",
      el("code", {}, "step-ray report CONFIG --episodes N"), " takes in more; of the others, these print one:"),
    el("ul", {}, ...partly.map((group) => el("li", {}, `${group.label}, ${number(group.shown)} of ${number(group.total)}: `,
      el("code", {}, `step-ray show ${index.runDir}/${group.folder} --id TASK`)))));
  byId("left-out").hidden = false;
}

function passesBoth(number, wanted) {
  if (!wanted) return true;
  const other = partnerOf(number);
  if (other === null) return false;
  const solved = [number, other].map((n) => index.episodes[n].outcome === "success");
  const is = { first: [true, false], second: [false, true], solved: [true, true], unsolved: [false, false] };
  return String(is[wanted]) === String(solved);
}

function passes(number, wanted) {
  const row = index.episodes[number];
  const task = index.tasks[row.task];
  return (!wanted.agent || index.groups[row.group].folder === wanted.agent)
    && (!wanted.type || task.type === wanted.type)
    && (!wanted.outcome || row.outcome === wanted.outcome || `stop ${row.stop}` === wanted.outcome)
    && (!wanted.has || row.has.includes(wanted.has))
    && (!wanted.text || `${row.id}\n${task.goal}`.toLowerCase().includes(wanted.text))
    && passesBoth(number, wanted.both);
}

function applyFilters() {
  findBeside();
  filters.both.disabled = !filters.beside.value;
  const wanted = Object.fromEntries(["agent", "type", "outcome", "has"].map((n) => [n, filters[n].value]));
  wanted.both = filters.both.disabled ? "" : filters.both.value;
  wanted.text = filters.text.value.trim().toLowerCase();
  found = [...index.episodes.keys()].filter((number) => passes(number, wanted));
  byId("list").replaceChildren();
  numListed = 0;
  listMore();
  remember();
}

function findBeside() {
  const group = index.groups.findIndex((g) => g.folder === filters.beside.value);
  beside = new Map();
  index.episodes.forEach((row, number) => {
    if (row.group !== group) return;
    if (!beside.has(row.task)) beside.set(row.task, []);
    beside.get(row.task).push(number);
  });
}

function listMore() {
  const next = found.slice(numListed, numListed + ROWS_LISTED);
  byId("list").append(...next.map((number) => el("li", {}, rowButton(number))));
  numListed += next.length;
  const rest = found.length - numListed;
  byId("more").hidden = rest === 0;
  byId("more").textContent = `List ${Math.min(rest, ROWS_LISTED)} more of ${rest.toLocaleString("en")}`;
  const listed = rest ? `, the first ${numListed.toLocaleString("en")} are listed` : "";
  byId("status").textContent =
    `${found.length.toLocaleString("en")} of ${count(index.episodes.length, "episode")} match${listed}`;
}

function rowButton(number) {
  const row = index.episodes[number];
  const other = partnerOf(number);
  const seeds = row.seed ? `seed ${row.seed}` : "";
  const button = el("button", { type: "button", "data-number": number, "aria-current": number === opened && "true" },
    el("span", { class: "goal" }, index.tasks[row.task].goal),
    el("span", { class: "id" }, row.task),
    el("span", { class: "line" }, chip(row),
      filters.agent.value ? null : el("span", {}, index.groups[row.group].label),
      el("span", {}, `reward ${row.reward}`), el("span", {}, count(row.steps, "step")), seeds,
      ...row.has.map((kind) => el("span", { class: `kind ${kind}` }, kind)),
      filters.beside.value ? el("span", { class: "beside" }, "beside: ",
        other === null ? "none" : chip(index.episodes[other])) : null));
  button.addEventListener("click", () => open(number));
  return button;
}

function chip(row) {
  return el("span", { class: `chip ${row.outcome}` }, OUTCOMES[row.outcome]);
}

// ---- an opened episode

async function open(number) {
  opened = number;
  for (const button of byId("list").querySelectorAll("button")) {
    if (Number(button.dataset.number) === number) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  await draw();
  remember();
}

async function draw() {
  const numbers = [opened, ...(filters.beside.value ? [partnerOf(opened)] : [])];
  const drawnFor = opened;
  const episodes = await Promise.all(numbers.map((n) => (n === null ? null : load(n))));
  if (views.view.value === "tokens" && !vocabulary) vocabulary = await unpack("vocabulary");
  if (drawnFor !== opened) return; // another one was opened meanwhile
  offerArms(episodes);
  const [first, second] = episodes;
  const differsAt = second ? firstDifference(first.steps, second.steps) : -1;
  byId("views").hidden = false;
  byId("panes").replaceChildren(...episodes.map((episode, i) =>
    episode ? pane(numbers[i], episode, differsAt) : noPartner()));
  byId("panes").dataset.opened = opened;
}

function noPartner() {
  const label = filters.beside.selectedOptions[0].textContent;
  return el("article", {}, el("p", { class: "none" }, `${label} has no other episode of this task in this file.`));
}

function offerArms(episodes) {
  const arms = new Set(episodes.flatMap((episode) => (episode ? Object.keys(episode.arms) : [])));
  const offered = [...views.arm.options].map((option) => option.value);
  if (arms.size && String([...arms]) !== String(offered)) {
    const kept = views.arm.value;
    const start = ["step", ...arms].find((arm) => arms.has(arm));
    views.arm.replaceChildren();
    addOptions(views.arm, [...arms].map((arm) => [arm, arm]));
    views.arm.value = arms.has(kept) ? kept : start;
  }
  byId("views").classList.toggle("with-arm", views.view.value !== "steps");
}

function firstDifference(steps, others) {
  return steps.findIndex((step, i) => i >= others.length || step.action !== others[i].action);
}

function pane(number, episode, differsAt) {
  const row = index.episodes[number];
  const facts = episode.facts.map(([label, text]) => el("div", {}, el("dt", {}, label), el("dd", {}, text)));
  return el("article", { "aria-label": index.groups[row.group].label },
    el("h2", {}, index.groups[row.group].label, " ", chip(row)),
    el("p", { class: "goal" }, index.tasks[row.task].goal),
    el("p", { class: "id" }, row.id),
    episode.error ? el("p", { class: "error-line" }, episode.error) : null,
    el("details", { open: true }, el("summary", {}, "About the episode"), el("dl", { class: "facts" }, ...facts)),
    ...body(episode, differsAt));
}

function body(episode, differsAt) {
  const arm = views.view.value === "steps" ? null : episode.arms[views.arm.value];
  if (views.view.value !== "steps" && !arm) {
    return [el("p", { class: "none note" }, "Episodes of an evaluation are never trained on."), ...turns(episode, null, differsAt)];
  }
  if (views.view.value === "tokens") return tokens(arm);
  return [...(arm ? [maskNote(arm)] : []), ...turns(episode, arm, differsAt)];
}

function turns(episode, arm, differsAt) {
  const prompt = el("details", { open: true }, el("summary", {}, "Prompt"),
    ...episode.prompt.map(([role, content]) => context(role, content)));
  const steps = episode.steps.flatMap((step, place) => [
    ...(place === differsAt ? [el("p", { class: "differs" }, "from here on the actions differ")] : []),
    ...turn(step, place, arm),
  ]);
  return [prompt, ...steps];
}

function context(role, content) {
  return el("div", { class: "turn context" }, el("div", { class: "who" }, role), content);
}

function turn(step, place, arm) {
  const mark = arm && arm.marks ? MARKS[arm.marks[place]] : "";
  const kind = step.kind === "act" ? "step" : step.kind;
  const numbers = [
    step.verdict?.label === "good" ? "judged good" : "", step.invalid ? "invalid" : "", step.reward && `reward ${step.reward}`,
    step.tokens[0] || step.tokens[1] ? `${step.tokens[0]} + ${step.tokens[1]} tokens` : "",
    step.seconds && `${step.seconds} s`, step.observation === null ? "not executed" : "", mark,
  ].filter(Boolean);
  return [
    el("div", { class: `turn step ${step.kind} ${mark === "removed" ? "removed" : ""}` },
      el("div", { class: "who" }, `${step.index} `, el("b", {}, kind), ` by ${step.author}`,
        ...numbers.map((text) => el("span", { class: text === "invalid" ? "number invalid" : "number" }, text))),
      ...words(step, arm && arm.texts[place], mark)),
    step.verdict && step.verdict.label !== "good" ? verdictLine(step.verdict) : null,
    step.observation === null ? null : context("observation", step.observation),
  ].filter(Boolean);
}

function words(step, otherText, mark) {
  if (otherText !== undefined && otherText !== null) return [el("span", { class: mark }, otherText)];
  const [before, reflection, after] = step.parts;
  return [[before, ""], [reflection, "reflection"], [after, ""]].map(([text, style]) =>
    text ? el("span", { class: `${mark} ${style}` }, text) : "");
}

function verdictLine(verdict) {
  const details = [["reflection", verdict.reflection], ["thought", verdict.thought], ["action", verdict.action]];
  return el("div", { class: "why" },
    `teacher: ${verdict.label}`, verdict.type ? `, ${verdict.type}` : "",
    ...details.filter(([, text]) => text).map(([label, text]) =>
      el("div", {}, el("span", { class: "muted" }, `${label}: `), text)));
}

function maskNote(arm) {
  const times = arm.times > 1 ? ` ${arm.times} times` : "";
  if (!arm.reason) return el("p", { class: "note" }, `In the training set${times}.`);
  const policy = arm.marks ? " The marks are what the arm's policy says." : "";
  return el("p", { class: "note none" }, `Not in the training set: ${arm.reason}.${policy}`);
}

function tokens(arm) {
  if (!arm.ids.length) return [el("p", { class: "note none" }, `No tokens: ${arm.reason}.`)];
  const sum = (mark) => [...arm.tokens].filter((m) => m === mark).length;
  const known = Object.keys(vocabulary).length > 0;
  const spans = arm.ids.map((id, i) => {
    const text = known ? vocabulary[id] : String(id);
    return el("span", { class: `token ${MARKS[arm.tokens[i]]}`, title: `token ${i}, id ${id}` }, text);
  });
  const counts = `${count(arm.ids.length, "token")}: ${sum("t")} trained, ${sum("m")} masked error, ${sum("c")} context.`;
  const parts = known && arm.ids.some((id) => vocabulary[id].includes("\uFFFD"));
  const remark = parts ? " \uFFFD is a part of a character." : known ? "" : " Ids only: the tokenizer is not beside the model.";
  return [
    el("p", { class: "note" }, counts + remark),
    maskNote(arm),
    el("div", { class: "turn tokens" }, ...spans),
  ];
}

// ---- keys, and the state in the address, which can be sent to somebody

function move(by) {
  const at = found.indexOf(opened);
  const next = opened === null || at < 0 ? 0 : at + by;
  if (next < 0 || next >= found.length) return;
  while (next >= numListed) listMore();
  open(found[next]);
  byId("list").children[next].scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("select, input:not([type=radio])")) return;
  const inList = event.target.closest("#list li");
  const to = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  if (to && inList) inList[to]?.firstElementChild.focus();
  else if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "/") filters.text.focus();
  else if (event.key === "v" && opened !== null) nextView();
  else return;
  event.preventDefault();
}

function nextView() {
  const radios = [...views.view];
  const at = radios.findIndex((radio) => radio.checked);
  radios[(at + 1) % radios.length].checked = true;
  draw().then(remember);
}

const NAMES = ["agent", "beside", "type", "outcome", "has", "both", "text"];

function remember() {
  const state = new URLSearchParams();
  for (const name of NAMES) if (filters[name].value) state.set(name, filters[name].value);
  if (views.view.value !== "steps") {
    state.set("view", views.view.value);
    state.set("arm", views.arm.value);
  }
  if (opened !== null) {
    const row = index.episodes[opened];
    state.set("open", `${index.groups[row.group].folder}/${row.id}`);
  }
  history.replaceState(null, "", `#${state}`);
}

async function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const name of NAMES) filters[name].value = state.get(name) || "";
  views.view.value = ["mask", "tokens"].includes(state.get("view")) ? state.get("view") : "steps";
  const wanted = state.get("open");
  const number = index.episodes.findIndex((row) => `${index.groups[row.group].folder}/${row.id}` === wanted);
  opened = number < 0 ? null : number;
  const arm = state.get("arm");
  applyFilters();
  if (opened === null) {
    if (wanted) byId("panes").replaceChildren(el("p", { class: "warn" }, `${wanted} is not in this file.`));
    return;
  }
  await draw();
  if (arm && [...views.arm.options].some((option) => option.value === arm)) {
    views.arm.value = arm;
    await draw();
  }
  remember();
}

// ---- start

function redraw() {
  if (opened !== null) return draw().then(remember);
}

async function start() {
  index = await unpack("index");
  fillFilters();
  showLeftOut();
  await recall();
  byId("filters").addEventListener("input", () => { applyFilters(); redraw(); });
  byId("filters").addEventListener("reset", () => setTimeout(() => { applyFilters(); redraw(); }));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("views").addEventListener("input", redraw);
  byId("more").addEventListener("click", listMore);
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => recall().then(() => byId("filters").scrollIntoView()));
  document.body.dataset.ready = "true";
}

start().catch((error) => {
  byId("status").className = "warn";
  byId("status").textContent = `The episodes cannot be unpacked in this browser (${error.message}); it must know DecompressionStream.`;
  throw error;
});
