// The labeling page: keys, judging without loading a page, undo, badges of running tests, panels. No dependencies.
"use strict";

const work = document.getElementById("work");
const said = document.getElementById("said");
const bar = document.getElementById("bar");
const labeler = document.body.dataset.labeler;
const KEPT = `judgments of ${labeler}`;  // in localStorage: those that the server has not confirmed
const GUARD = 200;   // a key within this time of a new comparison was meant for the one before; milliseconds
const SLOW = 400;    // a request that takes longer is shown to be on its way; milliseconds
const LOOK = 2000;   // between looks for a comparison where nothing is left; milliseconds
const POLL = 300;    // between looks at running tests and replies; milliseconds
const WAITS = [500, 1000, 2000, 4000, 8000];  // before sending again; milliseconds

let held = false;      // a request that changes the comparison is out
let shownAt = 0;       // when the comparison was shown
let seenFor = 0;       // how long it was visible before the tab was last hidden; milliseconds
let visibleSince = 0;  // null while the tab is hidden
let ranks = [];        // numbers of answers, best first, while several are ranked
let edited = null;     // {text, number}: a better answer and the one that it began as

const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const main = () => one("main.comparison");
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const say = (text) => { said.textContent = text; };

// ---- asking the server ------------------------------------------------------------------------------------------------------

// The server answered, and the answer is no; `later`: not for now, since somebody else is signed in, or nobody.
class Refused extends Error {
  constructor(message, later = false) { super(message); this.later = later; }
}

class Away extends Error {}  // no answer, or one that may be better later

async function ask(address, body) {
  const options = { credentials: "same-origin", signal: AbortSignal.timeout(20000) };
  if (body) {
    Object.assign(options, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  }
  let answer, data;
  try {
    answer = await fetch(address, options);
    data = await answer.json();
  } catch (error) {
    throw new Away("The server does not answer.");
  }
  if (answer.status === 401) throw new Refused("You are signed out. Load the page again; what you judged is kept.", true);
  if (answer.status >= 500) throw new Away(data.error || "The server failed.");
  if (!answer.ok) throw new Refused(data.error || `The server answers ${answer.status}.`, answer.status === 409);
  return data;
}

// Run one change at a time; keys wait until it is over.
async function change(action) {
  if (held) return;
  held = true;
  document.body.dataset.state = "waiting";
  const slow = setTimeout(() => document.body.classList.add("slow"), SLOW);
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Away)) throw error;
    say(error.message);
  } finally {
    held = false;
    clearTimeout(slow);
    document.body.classList.remove("slow");
    setTimeout(ready, Math.max(0, shownAt + GUARD - performance.now()));
  }
}

const ready = () => { if (!held) document.body.dataset.state = "ready"; };

// ---- showing a comparison ---------------------------------------------------------------------------------------------------

function show(next) {
  all("dialog[open]").forEach((dialog) => dialog.close());
  work.innerHTML = next.html;
  if (next.progress) document.getElementById("progress").textContent = next.progress;
  if (next.address) history.replaceState(null, "", next.address);
  mount();
  const heading = one("h1", work);
  if (heading) heading.focus({ preventScroll: true });
}

function mount() {
  const template = one("template.bar", work);
  bar.replaceChildren(...(template ? [template.content] : []));
  ranks = [];
  edited = null;
  seenFor = 0;
  visibleSince = document.hidden ? null : performance.now();
  shownAt = performance.now();
  view(localStorage.getItem("view") === "stacked");
  if (main()) pollTests(main());
  const waits = one("[data-waits]", work);
  if (waits) setTimeout(() => look(waits), LOOK);
  // The last turn of a conversation is what the answers answer.
  const turns = one(".turns", work);
  if (turns) turns.lastElementChild.scrollIntoView({ block: "nearest", behavior: "instant" });
}

// Nothing is left, but a model is making more: look for it while this is shown and nothing else happens.
async function look(waits) {
  if (!waits.isConnected) return;
  const answer = held ? null : await ask("/api/next", { labeler, comparison: "" }).catch(() => null);
  if (!waits.isConnected || held) return;
  if (answer && answer.next.id) show(answer.next); else setTimeout(() => look(waits), LOOK);
}

function seconds() {
  const now = visibleSince === null ? 0 : performance.now() - visibleSince;
  return Math.round((seenFor + now) / 10) / 100;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && visibleSince !== null) {
    seenFor += performance.now() - visibleSince;
    visibleSince = null;
  } else if (!document.hidden && visibleSince === null) visibleSince = performance.now();
});

// Badges of tests that still run.
async function pollTests(shown) {
  while (shown.dataset.polled && shown === main()) {
    await pause(POLL);
    const state = await ask(`/api/tests/${shown.dataset.comparison}`).catch(() => null);
    if (!state || shown !== main()) continue;
    state.tests.forEach((html, at) => { document.getElementById(`tests-${at + 1}`).innerHTML = html; });
    if (state.over) shown.dataset.polled = "";
  }
}

// ---- judging ----------------------------------------------------------------------------------------------------------------

const order = () => main().dataset.order.split(",").map(Number);

// The ranks of the answers in the comparison's own order, from the numbers on the page, best first; what is left out is last.
function ranksOf(best) {
  const places = order().map(() => best.length + 1);
  best.forEach((number, at) => { places[order()[number - 1]] = at + 1; });
  return places;
}

function judge(choice, best = []) {
  const what = said_of(choice, best);
  const judgment = {
    id: random_id(), labeler, comparison: main().dataset.comparison,
    choice, order: order(), ranks: choice === "ranked" ? ranksOf(best) : [], seconds: seconds(),
    reasons: all("[data-reason][aria-pressed=true]").map((button) => button.dataset.reason),
    comment: document.getElementById("comment").value.trim(),
    edited: edited ? edited.text : "", edited_from: edited && edited.number ? order()[edited.number - 1] : null,
  };
  keep(judgment.id, { judgment, what });
  return change(() => send(judgment, what));
}

// crypto.randomUUID would do, but exists in secure contexts only, and a page served to other machines by HTTP is none.
function random_id() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The name of an answer as the page shows it: left, upper, answer 3.
const name = (number) => one(`[data-does=pick][data-number="${number}"] .name`).innerText.trim();

function said_of(choice, best) {
  const names = { tie: "a tie", bad: main().dataset.count === "2" ? "both are bad" : "all are bad", skip: "skipped" };
  if (choice !== "ranked") return names[choice];
  return best.length === 1 && main().dataset.count === "2" ? `${name(best[0])} is better` : best.map(name).join(" > ");
}

// What was judged stays in the browser until the server has confirmed it.
function kept() {
  try { return JSON.parse(localStorage.getItem(KEPT)) || []; } catch (error) { return []; }
}

function keep(id, entry) {
  const others = kept().filter((each) => each.judgment.id !== id);
  try {
    localStorage.setItem(KEPT, JSON.stringify(entry ? [...others, entry] : others));
  } catch (error) { /* no storage: kept in the page alone */ }
}

// Send a judgment until the server has it; its id makes it count once.
async function send(judgment, what) {
  for (let tries = 0; ; tries++) {
    try {
      const answer = await ask("/api/judge", judgment);
      keep(judgment.id);
      const here = main() && main().dataset.comparison === judgment.comparison;
      const verdicts = (answer.verdicts || []).map((each) => verdict_line(each, here));
      show(answer.next);
      say(`Saved: ${what}. u undoes.`);
      said.append(...verdicts);
      return;
    } catch (error) {
      if (error instanceof Refused) {
        if (!error.later) keep(judgment.id);
        throw error;
      }
      if (!(error instanceof Away)) throw error;
      const wait = WAITS[Math.min(tries, WAITS.length - 1)];
      say(`${error.message} Your judgment (${what}) is kept here and sent again: try ${tries + 2}.`);
      await pause(wait);
    }
  }
}

// What a model judged of the comparison; the server tells it with the answer to a judgment only.
function verdict_line(verdict, here) {
  const line = document.createElement("span");
  line.className = "verdict";
  const words = verdict.number && here ? `${name(verdict.number)} is better` : verdict.words;
  const two = here && main().dataset.count === "2";
  const reason = two ? verdict.reason.replace(/answer ([12])/g, (_, number) => name(number)) : verdict.reason;
  line.textContent = `${verdict.judge}, a model: ${words}. ${reason}`;
  return line;
}

function pick(number) {
  if (order().length === 2) return judge("ranked", [number]);
  if (!ranks.includes(number)) ranks.push(number);
  show_ranks();
  if (ranks.length === order().length) return judge("ranked", ranks);
}

function show_ranks() {
  for (const answer of all(".answer")) {
    const place = ranks.indexOf(Number(answer.dataset.number)) + 1;
    const mark = one(".rank", answer);
    mark.hidden = !place;
    mark.textContent = place ? ["1st", "2nd", "3rd", "4th", "5th"][place - 1] : "";
  }
  say(ranks.length ? `Best first: ${ranks.join(", ")}.` : "");
}

// ---- what the buttons do ----------------------------------------------------------------------------------------------------

const toggled = (button) => {
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(on));
  return on;
};

const does = {
  pick: (button) => pick(Number(button.dataset.number)),
  back: () => { ranks.pop(); show_ranks(); },
  rest: () => ranks.length && judge("ranked", ranks),
  tie: () => judge("tie"),
  bad: () => judge("bad"),
  skip: () => judge("skip"),
  undo: () => change(async () => {
    const answer = await ask("/api/undo", { labeler });
    if (answer.next) show(answer.next);
    say(answer.undone ? "Undone. Judge it again, or press n." : "There is nothing to undo.");
  }),
  next: () => change(async () => {
    const left = main() ? main().dataset.comparison : "";
    const { next } = await ask("/api/next", { labeler, comparison: left });
    show(next);
    say(next.id && next.id === left ? "It is the only one left." : left ? "Not judged; it comes again later." : "");
  }),
  reason: (button) => toggled(button),
  reasons: () => one(".reason").focus(),
  comment: () => comment(true),
  differences,
  view: () => view(!document.body.classList.contains("stacks"), true),
  unfold: (button) => { const on = toggled(button); all(".answers details.fold").forEach((part) => { part.open = on; }); },
  larger: (button) => {
    const on = toggled(button);
    all(".answer").forEach((answer) => answer.classList.toggle("large", on && answer.contains(button)));
    all("[data-does=larger]").forEach((other) => other !== button && other.setAttribute("aria-pressed", "false"));
  },
  guidelines: () => open(document.getElementById("guidelines")),
  edit: () => { document.getElementById("edited").value = edited ? edited.text : ""; open(one("dialog.edit")); },
  begin: async (button) => {
    const number = Number(button.dataset.number);
    const box = document.getElementById("edited");
    box.dataset.number = number;
    const address = `/text/${main().dataset.comparison}/${order()[number - 1]}`;
    box.value = number ? await (await fetch(address)).text() : "";
    box.focus();
    box.setSelectionRange(0, 0);
  },
  "keep-edit": () => {
    const box = document.getElementById("edited");
    edited = box.value.trim() ? { text: box.value, number: Number(box.dataset.number || 0) } : null;
    one("[data-does=edit]").setAttribute("aria-pressed", String(Boolean(edited)));
    one("dialog.edit").close();
    if (edited) say("Your answer is kept with your judgment. Judge the answers now.");
  },
  "drop-edit": () => { document.getElementById("edited").value = ""; does["keep-edit"](); },
  close: (button) => button.closest("dialog").close(),
  generate,
  start: (button) => start(button.closest("form")),
  stop: () => steer("stop"),
  again: (button) => steer("again", button.dataset.number),
  keep: () => steer("keep"),
  discard: () => steer("discard"),
  export: async (button) => {
    const box = document.getElementById("exported");
    button.disabled = true;
    box.textContent = "Exporting …";
    try {
      const answer = await ask("/api/export", {});
      const command = document.createElement("pre");
      command.textContent = answer.command;
      box.replaceChildren(`${answer.said} Train on it:`, command);
    } catch (error) { box.textContent = error.message; }
    button.disabled = false;
  },
  // On other pages: post the object in data-body to data-post, then load the page again.
  post: async (button) => {
    try {
      await ask(button.dataset.post, JSON.parse(button.dataset.body));
      location.reload();
    } catch (error) { alert(error.message); }
  },
};

function open(dialog) {
  if (dialog && !dialog.open) dialog.showModal();
}

function comment(on) {
  const field = one(".bar .field");
  field.hidden = !on;
  const written = document.getElementById("comment").value.trim() !== "";
  one("[data-does=comment]").setAttribute("aria-pressed", String(on || written));
  if (on) document.getElementById("comment").focus(); else one("h1", work).focus({ preventScroll: true });
}

function view(stacked, kept = false) {
  document.body.classList.toggle("stacks", stacked);
  const button = one("[data-does=view]");
  if (button) button.setAttribute("aria-pressed", String(stacked));
  if (kept) localStorage.setItem("view", stacked ? "stacked" : "beside");
}

async function differences(button) {
  const panel = one(".differences", work);
  if (toggled(button) && !panel.dataset.filled) {
    const shown = main();
    const answer = await ask(`/api/differences/${shown.dataset.comparison}`).catch((error) => { say(error.message); });
    if (!answer || shown !== main()) return;
    panel.innerHTML = answer.html;
    panel.dataset.filled = "yes";
  }
  const on = button.getAttribute("aria-pressed") === "true";
  panel.hidden = !on;
  one(".answers", work).classList.toggle("compared", on);
}

// ---- generating answers -----------------------------------------------------------------------------------------------------

const task_here = () => one("[data-task]", work)?.dataset.task;

async function generate() {
  const task = task_here();
  const dialog = document.getElementById("writing");
  if (!task || !dialog) return;
  open(dialog);
  dialog.textContent = "Looking for models …";
  await fill(dialog, `/api/generate/${encodeURIComponent(task)}`);
}

async function fill(dialog, address, body) {
  try {
    const answer = await ask(address, body);
    if (answer.next) { show(answer.next); say(answer.said || ""); return; }
    if (answer.closed) { dialog.close(); return; }
    const begins = !one("[data-writing]", dialog);
    const focus = dialog.contains(document.activeElement) ? document.activeElement : null;
    const pressed = focus && focus.dataset.does;
    dialog.innerHTML = answer.html;
    // Replacing what had the focus must not lose it.
    const same = pressed && one(`[data-does="${pressed}"]`, dialog);
    if (same) same.focus(); else if (begins || focus) one("h2", dialog).focus();
    all(".replies .text", dialog).forEach((text) => { text.scrollTop = text.scrollHeight; });
    const at = one("[data-writing]", dialog);
    const again = () => dialog.open && fill(dialog, `/api/writing/${encodeURIComponent(task_here())}`);
    if (at && at.dataset.writing === "on") setTimeout(again, POLL);
  } catch (error) {
    dialog.textContent = error.message;
  }
}

function start(form) {
  if (!form.reportValidity()) return;
  const given = Object.fromEntries(new FormData(form));
  fill(form.closest("dialog"), "/api/generate", { task: task_here(), ...given, temperature: Number(given.temperature) });
}

function steer(action, number) {
  const body = number === undefined ? {} : { number: Number(number) };
  fill(document.getElementById("writing"), `/api/writing/${encodeURIComponent(task_here())}/${action}`, body);
}

document.addEventListener("change", (event) => {
  if (!event.target.matches("[data-fills]")) return;
  const dialog = event.target.closest("dialog");
  fill(dialog, `/api/generate/${encodeURIComponent(task_here())}?source=${encodeURIComponent(event.target.value)}`);
});

document.addEventListener("submit", (event) => {
  if (!event.target.matches("form.request")) return;
  event.preventDefault();
  start(event.target);
});

// ---- keys -------------------------------------------------------------------------------------------------------------------

const writes = (at) => at.isContentEditable || at.tagName === "TEXTAREA" || at.tagName === "SELECT" ||
  (at.tagName === "INPUT" && !["checkbox", "radio", "range"].includes(at.type));

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-does]");
  if (!button || button.disabled) return;
  if (button.form) event.preventDefault();
  if (held || performance.now() < shownAt + (event.detail ? 0 : GUARD)) return;
  does[button.dataset.does](button, event);
});

document.addEventListener("keydown", (event) => {
  const at = event.target;
  const enters = event.key === "Enter";
  const ends = { comment: enters || event.key === "Escape", edited: enters && (event.ctrlKey || event.metaKey) };
  if (ends[at.id]) {
    event.preventDefault();
    if (at.id === "comment") comment(false); else does["keep-edit"]();
    return;
  }
  if (writes(at) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && at.classList.contains("reason")) { one("h1", work).focus({ preventScroll: true }); return; }
  if (scrolled(event)) { event.preventDefault(); return; }
  // Enter and the space bar press the button that has the focus.
  if (event.key === "Enter" && at.closest("button, summary, a")) return;
  if (event.repeat) return;
  const scope = one("dialog[open]") || document;
  const button = all("[data-key]", scope).find((each) => each.dataset.key === event.key && !each.disabled);
  if (button) { event.preventDefault(); button.click(); }
});

// Arrows and page keys scroll all answers together while the focus is in none of them.
function scrolled(event) {
  const page = event.shiftKey ? -0.9 : 0.9;
  const steps = { ArrowDown: 60, ArrowUp: -60, PageDown: 0.9, PageUp: -0.9, " ": page, Home: -1e7, End: 1e7 };
  const focus = event.target;
  const free = focus === document.body || focus.tagName === "H1" || focus === main();
  if (!(event.key in steps) || !free || !main() || one("dialog[open]")) return false;
  for (const part of all(".body, .differences", work)) {
    const by = steps[event.key];
    part.scrollBy({ top: Math.abs(by) < 1 ? by * part.clientHeight : by });
  }
  return true;
}

// ---- the beginning ----------------------------------------------------------------------------------------------------------

if (work) {
  mount();
  setTimeout(ready, GUARD);
  if (kept().length) change(async () => { for (const { judgment, what } of kept()) await send(judgment, what); });
  if (one("[data-open=generate]", work)) generate();
}
