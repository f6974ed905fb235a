// The labeling page: keys, judging without loading a page, undo, badges of running tests, panels. No dependencies.
"use strict";

const work = document.getElementById("work");
const said = document.getElementById("said");
const bar = document.getElementById("bar");
const labeler = document.body.dataset.labeler;
const KEPT = `judgments of ${labeler}`;  // in localStorage: those that the server has not confirmed
const DRAFT = `draft of ${labeler}: `;   // in localStorage: a better answer to a comparison that is not judged yet
const GUARD = 400;   // a key within this time of a new comparison was meant for the one before; milliseconds
const SLOW = 400;    // a request that takes longer is shown to be on its way; milliseconds
const LOOK = 2000;   // between looks for a comparison where nothing is left; milliseconds
const POLL = 300;    // between looks at running tests and replies; milliseconds
const WAITS = [500, 1000, 2000, 4000, 8000];  // before sending again; milliseconds

let held = false;      // a request that changes the comparison is out
let shownAt = 0;       // when the comparison was shown
let seenFor = 0;       // how long it was visible before the tab was last hidden; milliseconds
let visibleSince = 0;  // null while the tab is hidden
let ranks = [];        // numbers of answers, best first, while several are ranked

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
  if (main()) restore();
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
    ...written(),
  };
  keep(judgment.id, { judgment, what });
  return change(() => send(judgment, what));
}

// crypto.randomUUID would do, but exists in secure contexts only, and a page served to other machines by HTTP is none.
function random_id() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The name of an answer as the page shows it: left, upper, answer 3; and words in which two answers have these names.
const two = () => main() && main().dataset.count === "2";
const named = (words) => (two() ? words.replace(/answer ([12])/g, (_, number) => name(number)) : words);
const name = (number) => one(`[data-does=pick][data-number="${number}"] .name`).innerText.trim();

function said_of(choice, best) {
  const names = { tie: "a tie", bad: two() ? "both are bad" : "all are bad", skip: "skipped" };
  if (choice !== "ranked") return names[choice];
  return best.length === 1 && two() ? `${name(best[0])} is better` : best.map(name).join(" > ");
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
      localStorage.removeItem(DRAFT + judgment.comparison);
      const here = main() && main().dataset.comparison === judgment.comparison;
      const verdicts = (answer.verdicts || []).map((each) => verdict_line(each, here));
      show(answer.next);
      say(`Saved: ${what}. ${answer.replaced ? "You judged this before; your new judgment replaces it. " : ""}u undoes.`);
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
  const words = `${verdict.words}. ${verdict.reason}`;
  line.textContent = `${verdict.judge}, a model: ${here ? named(words) : words}`;
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

const leave = () => one("h1", work).focus({ preventScroll: true });

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
    if (!answer.undone) {
      say(`There is nothing to undo.${answer.settled ? " What you settled is undone on the Agreement page." : ""}`);
      return;
    }
    const again = answer.again ? ` Your earlier judgment (${named(answer.again)}) stands again.` : "";
    say(`Undone: ${named(answer.what)}, of “${answer.title}”.${again} Judge it again, or press n.`);
  }),
  next: () => change(async () => {
    const left = main() ? main().dataset.comparison : "";
    const { next } = await ask("/api/next", { labeler, comparison: left });
    show(next);
    say(next.id && next.id === left ? "It is the only one left." : left ? "Not judged; it comes again later." : "");
  }),
  // Pressed with the mouse, a reason does not keep the focus: the next digit judges.
  reason: (button, event) => { toggled(button); if (event.detail) leave(); },
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
  edit: () => { open(one("dialog.edit")); box().focus(); },
  // What was written stays: the answer comes in where the cursor is.
  begin: async (button) => {
    const field = box();
    field.focus();
    const address = `/text/${main().dataset.comparison}/${order()[button.dataset.number - 1]}`;
    const answer = await fetch(address).catch(() => null);
    if (!answer || !answer.ok) { say("The server does not answer."); return; }
    if (field.value.trim() === "") field.dataset.number = button.dataset.number;
    field.setRangeText(await answer.text(), field.selectionStart, field.selectionStart, "start");
    draft();
  },
  "drop-edit": (button) => { box().value = ""; draft(); does.close(button); },
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
      const answer = await ask("/api/export", { agreed: document.getElementById("agreed").checked });
      const command = document.createElement("pre");
      command.textContent = answer.command;
      box.replaceChildren(`${answer.said} Train on it:`, command);
    } catch (error) { box.textContent = error.message; }
    button.disabled = false;
  },
  // On other pages: post the object in data-body to data-post, then load the page again.
  post: async (button) => {
    try {
      const answer = await ask(button.dataset.post, JSON.parse(button.dataset.body));
      sessionStorage.setItem("told", answer.said || "");
      location.reload();
    } catch (error) { alert(error.message); }
  },
};

function open(dialog) {
  if (dialog && !dialog.open) dialog.showModal();
}

// ---- a better answer --------------------------------------------------------------------------------------------------------

const box = () => document.getElementById("edited");

// A better answer as it is judged with: its text, and the index of the answer that it began as.
function written() {
  const { value, dataset } = box();
  const text = value.trim() ? value : "";
  return { edited: text, edited_from: text && dataset.number ? order()[dataset.number - 1] : null };
}

function draft() {
  const text = written().edited;
  const key = DRAFT + main().dataset.comparison;
  one("[data-does=edit]").setAttribute("aria-pressed", String(Boolean(text)));
  try {
    if (text) localStorage.setItem(key, JSON.stringify({ text, number: box().dataset.number }));
    else localStorage.removeItem(key);
  } catch (error) { /* no storage: kept in the page alone */ }
}

function restore() {
  let found = null;
  try { found = JSON.parse(localStorage.getItem(DRAFT + main().dataset.comparison)); } catch (error) { /* none */ }
  if (found) { box().value = found.text; box().dataset.number = found.number || ""; }
  draft();
}

document.addEventListener("input", (event) => { if (event.target === box()) draft(); });

document.addEventListener("close", (event) => {
  if (event.target.matches(".edit") && event.target.isConnected && written().edited) {
    say("Your answer is kept with your judgment. Judge the answers now.");
  }
  // The time spent on the guidelines is none of the comparison's.
  if (event.target.matches("[data-first]")) { seenFor = 0; visibleSince = performance.now(); event.target.removeAttribute("data-first"); }
}, true);

// ---- panels and views -------------------------------------------------------------------------------------------------------

function comment(on) {
  const field = one(".bar .field");
  field.hidden = !on;
  const written = document.getElementById("comment").value.trim() !== "";
  one("[data-does=comment]").setAttribute("aria-pressed", String(on || written));
  if (on) document.getElementById("comment").focus(); else leave();
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
  // Where nothing can be marked, the answers stay in sight.
  if (!one(".difference", panel)) {
    button.setAttribute("aria-pressed", "false");
    say([...new Set(all(".summary", panel).map((each) => each.textContent))].join(" "));
    return;
  }
  const on = button.getAttribute("aria-pressed") === "true";
  panel.hidden = !on;
  one(".answers", work).classList.toggle("compared", on);
}

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
    if (at.id === "comment") comment(false); else does.close(at);
    return;
  }
  if (writes(at) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (at.closest(".reasons") && chosen(event)) { event.preventDefault(); return; }
  if (scrolled(event)) { event.preventDefault(); return; }
  // Enter and the space bar press the button that has the focus.
  if (event.key === "Enter" && at.closest("button, summary, a")) return;
  if (event.repeat) return;
  const scope = one("dialog[open]") || document;
  const buttons = all("[data-key]", scope).filter((each) => !each.disabled);
  // With Caps Lock, letters are capital.
  const pressed = (key) => buttons.find((each) => each.dataset.key === key);
  const button = pressed(event.key) || pressed(event.key.toLowerCase());
  if (button) { event.preventDefault(); button.click(); }
});

// While the reasons have the focus, digits choose them and judge nothing, and Enter, Escape or r leaves.
function chosen(event) {
  if (["Enter", "Escape", "r", "R"].includes(event.key)) { if (!event.repeat) leave(); return true; }
  if (!/^[0-9]$/.test(event.key)) return false;
  const reason = all(".reason")[event.key - 1];
  if (reason && !reason.disabled && !event.repeat && !held) { reason.focus(); toggled(reason); }
  return true;
}

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

const told = document.getElementById("told");
if (told) {
  told.textContent = sessionStorage.getItem("told");
  sessionStorage.removeItem("told");
}
if (work) {
  mount();
  setTimeout(ready, GUARD);
  if (kept().length) change(async () => { for (const { judgment, what } of kept()) await send(judgment, what); });
  if (one("[data-open=generate]", work)) generate();
  open(one("dialog[data-first]"));
}
