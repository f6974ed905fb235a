// The panel that asks a model for answers. Loaded before app.js, whose names it uses when something happens.
"use strict";

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
