"use strict";
// Readout of a chart's values at the pointer, or at the position chosen with the arrow keys.
const MOST_ROWS = 8;
const words = (value) => value.toLocaleString("en", { maximumSignificantDigits: 5 });
const element = (name, className, text) => Object.assign(document.createElement(name), { className, textContent: text });
const nearest = (values, wanted) =>
  values.reduce((best, each, k) => (Math.abs(each - wanted) < Math.abs(values[best] - wanted) ? k : best), 0);

for (const figure of document.querySelectorAll("figure.chart")) {
  const { x: xName, frame: [left, right, bottom, top], lines } = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const cursor = figure.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const across = (x) => (x - left) / (right - left);
  const up = (y) => (y - bottom) / (top - bottom);
  const points = lines.some((line) => line.labels.length);
  // Readable positions: each x, for all lines there; for labeled points, each of them.
  const places = points
    ? lines.flatMap((line) => line.x.map((x, k) => ({ x, rows: [[line, k]] }))).sort((a, b) => a.x - b.x)
    : [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b).map((x) => ({ x, rows: rowsAt(x) }));
  let place = -1;

  // Skip lines that start later or have ended; a sparsely logged line shows its nearest value.
  function rowsAt(x) {
    const near = (right - left) / 100;
    return lines
      .filter((line) => x >= line.x[0] - near && x <= line.x[line.x.length - 1] + near)
      .map((line) => [line, nearest(line.x, x)]);
  }

  function row([line, k]) {
    const found = element("div", `s${line.style}`, "");
    const range = line.low && line.low[k] < line.high[k] ? ` (${words(line.low[k])} to ${words(line.high[k])})` : "";
    found.append(element("i", "", ""), `${line.name} `, element("b", "", words(line.y[k])), range);
    return found;
  }

  function mark([line, k]) {
    const found = element("i", `mark s${line.style}`, "");
    found.style.left = `${100 * across(line.x[k])}%`;
    found.style.bottom = `${100 * up(line.y[k])}%`;
    return found;
  }

  function hide() {
    readout.replaceChildren();
    cursor.style.display = "none";
    for (const each of plot.querySelectorAll(".mark")) each.remove();
  }

  // Of many lines, those that are nearest to a height of the plot, the upper ones first.
  function nearestRows(rows, height) {
    const far = ([line, k]) => Math.abs(up(line.y[k]) - height);
    const near = [...rows].sort((one, other) => far(one) - far(other)).slice(0, MOST_ROWS);
    return near.sort(([one, k], [other, n]) => other.y[n] - one.y[k]);
  }

  function show(number, height = 1) {
    hide();
    place = Math.max(0, Math.min(places.length - 1, number));
    const { x, rows: all } = places[place];
    const rows = all.length > MOST_ROWS ? nearestRows(all, height) : all;
    readout.append(element("div", "", `${xName} ${words(x)}`), ...rows.map(row));
    if (rows.length < all.length) readout.append(element("div", "", `and ${all.length - rows.length} more lines`));
    plot.append(...rows.map(mark));
    cursor.style.display = "block";
    cursor.style.left = `${100 * across(x)}%`;
    // Next to the cursor where there is space, inside the plot, and away from the values.
    const high = rows.reduce((sum, [line, k]) => sum + up(line.y[k]), 0) / rows.length > 0.5;
    readout.classList.toggle("low", high);
    const [at, wide, room] = [across(x) * plot.clientWidth, readout.offsetWidth, plot.clientWidth];
    readout.style.left = `${Math.max(0, at + wide + 12 < room ? at + 12 : Math.min(at - wide - 12, room - wide))}px`;
  }

  function follow(event) {
    const box = plot.getBoundingClientRect();
    const x = left + ((event.clientX - box.left) / box.width) * (right - left);
    const far = ({ x: each, rows: [[line, k]] }) =>
      Math.hypot((across(each) - across(x)) * box.width, box.bottom - up(line.y[k]) * box.height - event.clientY);
    const height = (box.bottom - event.clientY) / box.height;
    show(points ? nearest(places.map(far), 0) : nearest(places.map((each) => each.x), x), height);
  }

  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", (event) => {
    plot.focus();
    follow(event);
  });
  plot.addEventListener("pointerleave", () => document.activeElement === plot || hide());
  plot.addEventListener("focus", () => show(place < 0 ? places.length - 1 : place));
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: places.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}
// Details cannot be opened on paper.
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.printed")) details.open = true;
});
