"use strict";
// The annotation page. It keeps nothing but a name and an answer that is not yet acknowledged; the server knows the
// rest, so a page that is reloaded, or opened again, shows the same question.

const $ = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const WORDS = ["skip", "tie"];
let name = sessionStorage.name || localStorage.name || "";
let question = null;
let chosen = new Set();
let began = 0;
let sending = false;
let board = { seen: 0, pictures: null, extent: 1, phase: "starting" };

class Refusal extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function post(call, body) {
  const response = await fetch(`/api/${call}`, {
    method: "POST",
    headers: { "X-Token": token, "Content-Type": "application/json" },
    body: JSON.stringify({ annotator: name, ...body }),
  });
  if (!response.ok) throw new Refusal(response.status, await response.text());
  return response.json();
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// Asks until the server answers: it may be starting again, or busy.
async function patiently(call, body) {
  for (let wait = 250; ; wait = Math.min(2 * wait, 4000)) {
    try {
      return await post(call, body);
    } catch (error) {
      if (error instanceof Refusal && ![429, 503].includes(error.status)) throw error;
      say(error instanceof Refusal ? "The server is busy; trying again …" : "The server is away. Your answer is kept here and sent when it is back.");
      await pause(wait);
    }
  }
}

function say(text) { $("said").textContent = text; }

// Drawing.

function ink(variable) { return getComputedStyle(document.documentElement).getPropertyValue(variable).trim(); }

function sized(canvas) {
  const scale = window.devicePixelRatio || 1;
  const { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  return canvas.getContext("2d");
}

// Draws points [-extent, extent]^2 into a square: a line through them in their order, and the points.
function curve(context, points, extent, left, top, size, color) {
  const half = size / 2;
  const place = ([x, y]) => [left + half + (x / extent) * half * 0.94, top + half - (y / extent) * half * 0.94];
  context.strokeStyle = context.fillStyle = color;
  context.globalAlpha = 0.45;
  context.lineWidth = Math.max(1, size / 160);
  context.beginPath();
  points.forEach((p, i) => (i ? context.lineTo(...place(p)) : context.moveTo(...place(p))));
  context.stroke();
  context.globalAlpha = 1;
  for (const p of points) {
    context.beginPath();
    context.arc(...place(p), Math.max(1, size / 75), 0, 2 * Math.PI);
    context.fill();
  }
}

function drawCards() {
  if (!question) return;
  document.querySelectorAll("#cards canvas").forEach((canvas, i) => {
    const context = sized(canvas);
    curve(context, question.samples[i], question.extent, 0, 0, canvas.width, ink("--ink"));
  });
}

function drawBoard() {
  for (const [id, model] of [["a", "A"], ["b", "B"]]) {
    const canvas = $(id);
    const context = sized(canvas);
    const samples = board.pictures ? board.pictures[model] : [];
    const size = canvas.width / 3;
    samples.forEach((points, i) => curve(context, points, board.extent, (i % 3) * size, Math.floor(i / 3) * size, size, ink(`--${id}`)));
    canvas.setAttribute("aria-label", `${samples.length} samples of model ${model}`);
    const rates = Object.entries(board.pictures ? board.pictures.rates[model] : {});
    if (rates.length) $(`rate-${id}`).textContent = rates.map(([kind, rate]) => `${share(rate)} ${kind}`).join(", ");
  }
}

// The question.

function show(next, note) {
  const focused = [...$("cards").children].indexOf(document.activeElement);
  if (next && question && next.id === question.id) return;
  question = next;
  chosen = new Set();
  began = performance.now();
  $("cards").replaceChildren(...(next ? next.samples.map(card) : []));
  for (const key of ["submit", "none", "tie", "skip"]) $(key).disabled = !next;
  const count = next ? next.samples.length : 0;
  $("cards").style.setProperty("--wide", String(count > 4 ? Math.ceil(count / 2) : Math.max(2, count)));
  $("cards").style.setProperty("--narrow", String(count === 1 ? 1 : 2));
  $("title").textContent = next
    ? (count === 1 ? "Do you like this one?" : `Which of these ${count} do you like?`)
    : { done: "All done. Thank you!", learning: "Learning; the next questions come in a moment …" }[board.phase] || "No question for you just now …";
  if (note) say(note);
  drawCards();
  if (focused >= 0 && next) $("cards").children[Math.min(focused, count - 1)].focus();
}

function card(points, i, all) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-label", `Sample ${i + 1} of ${all.length}`);
  button.setAttribute("aria-keyshortcuts", String(i + 1));
  const canvas = document.createElement("canvas");
  const key = document.createElement("kbd");
  key.textContent = String(i + 1);
  button.append(canvas, key);
  button.addEventListener("click", () => toggle(i));
  return button;
}

function toggle(i, focus = false) {
  if (!question || sending || i >= question.samples.length) return;
  if (!chosen.delete(i)) chosen.add(i);
  $("cards").children[i].setAttribute("aria-pressed", String(chosen.has(i)));
  if (focus) $("cards").children[i].focus(); // so that Enter submits, whichever button was used before
  const names = [...chosen].sort((a, b) => a - b).map((j) => j + 1);
  say(names.length ? `Chosen: ${names.join(", ")}. Enter submits.` : "");
}

// Answers.

function submit() {
  if (question && !chosen.size) return say("Choose one first, or press 0 for none.");
  send([...chosen].sort((a, b) => a - b));
}

function send(answer) {
  if (!question || sending) return;
  const seconds = Math.round(performance.now() - began) / 1000;
  localStorage[`pending ${name}`] = JSON.stringify({ question: question.id, answer, seconds });
  flush();
}

// Sends the answer that is not yet acknowledged, if there is one.
async function flush() {
  const drawer = `pending ${name}`;
  if (sending || !localStorage[drawer]) return;
  sending = true;
  const pending = JSON.parse(localStorage[drawer]);
  try {
    const { question: next } = await patiently("answer", { annotator: name, ...pending });
    const places = WORDS.includes(pending.answer) ? [] : pending.answer.map((i) => i + 1);
    show(next, `Kept: ${places.join(", ") || (WORDS.includes(pending.answer) ? pending.answer : "none")}.`);
  } catch (error) {
    const [note, current] = [`Not kept: ${error.message}.`, question];
    question = null;
    await load(note).catch(() => { question = current; say(note); });
  } finally {
    delete localStorage[drawer];
    sending = false;
    refresh().catch(() => {});
  }
}

async function undo() {
  if (sending || !name) return;
  sending = true;
  try {
    const { undone, question: next } = await post("undo", {});
    show(next, undone ? "Taken back. Here is the question again." : "There is nothing to take back.");
  } catch (error) { // not sent again: it would take back one answer more
    say(error instanceof Refusal ? error.message : "The server is away; undo again when it is back.");
  } finally {
    sending = false;
    refresh().catch(() => {});
  }
}

async function load(note) {
  const { question: next } = await post("next", {});
  show(next, note);
}

// The board.

const share = (x) => (x === null || x === undefined ? "–" : `${Math.round(100 * x)} %`);

async function refresh() {
  const state = await post("state", { seen: board.seen });
  board.phase = state.phase;
  board.extent = state.extent || 1;
  if (state.pictures) {
    board.pictures = state.pictures;
    board.seen = state.pictures.version;
  }
  const { alpha, shared, repeated, consistent } = state.agreement;
  const facts = [
    ["your answers", state.mine],
    ["everybody's answers", state.everybody],
    ["open questions", state.open],
    ["samples that you chose", share(state.chosen_rate)],
    ["your answers a minute", state.per_minute === null ? "–" : state.per_minute.toFixed(1)],
    ["rounds learned", state.phase === "learning" ? `${state.rounds}, learning …` : state.rounds],
  ];
  if (shared) facts.push(["agreement (Krippendorff's α)", alpha === null ? "–" : alpha.toFixed(2)]);
  if (repeated) facts.push(["same answer when asked again", share(consistent)]);
  $("facts").replaceChildren(...facts.flatMap(([term, value]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = term;
    dd.textContent = String(value);
    return [dt, dd];
  }));
  $("bar").hidden = !state.budget;
  if (state.budget) $("bar").value = state.queries / state.budget;
  if (!question) show(null);
  drawBoard();
}

async function watch() {
  for (;;) {
    try {
      if (name && !sending) {
        if (!question) await load();
        await refresh();
      }
    } catch (error) {
      if (!(error instanceof Refusal)) say("The server is away; waiting for it …");
      else if (error.status === 401) say("This link has no valid token. Open the whole link that prefenv printed.");
      else say(error.message);
    }
    await pause(question ? 2000 : 500);
  }
}

// Who, and with which keys.

function enter() {
  $("welcome").hidden = Boolean(name);
  for (const id of ["who", "ask", "board"]) $(id).hidden = !name;
  $("name").textContent = name;
  question = null;
  show(null);
  if (!name) return $("given").focus();
  sessionStorage.name = localStorage.name = name;
  flush();
}

$("welcome").addEventListener("submit", (event) => {
  event.preventDefault();
  name = $("given").value.trim();
  enter();
});
$("rename").addEventListener("click", () => {
  if (sending) return;
  post("leave", {}).catch(() => {});
  name = "";
  delete sessionStorage.name;
  $("given").value = "";
  enter();
});

const KEYS = { 0: () => send([]), t: () => send("tie"), s: () => send("skip"), u: undo };
$("submit").addEventListener("click", submit);
$("none").addEventListener("click", KEYS[0]);
for (const [id, key] of [["tie", "t"], ["skip", "s"], ["undo", "u"]]) $(id).addEventListener("click", KEYS[key]);

function move(step) {
  const cards = [...$("cards").children];
  if (!cards.length) return;
  const columns = cards.filter((c) => c.offsetTop === cards[0].offsetTop).length;
  const at = cards.indexOf(document.activeElement);
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[step];
  cards[at < 0 ? 0 : Math.max(0, Math.min(cards.length - 1, at + by))].focus();
}

document.addEventListener("keydown", (event) => {
  if (!name || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
  const button = event.target.closest("button");
  if (event.key.startsWith("Arrow")) move(event.key);
  else if (event.repeat) return;
  else if (event.key === "Enter" && !(button && !$("cards").contains(button))) submit();
  else if (/^[1-9]$/.test(event.key)) toggle(Number(event.key) - 1, true);
  else if (event.key.toLowerCase() in KEYS) KEYS[event.key.toLowerCase()]();
  else return;
  event.preventDefault();
});

window.addEventListener("resize", () => { drawCards(); drawBoard(); });
enter();
watch();
