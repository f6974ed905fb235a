"use strict";
// The values of each chart, under the pointer or where the arrow keys have gone.
const words = (value) => value.toLocaleString("en", { maximumSignificantDigits: 5 });
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const cursor = figure.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const [left, right] = data.frame;
  const places = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  let place = -1;
  const said = (line, x) => {
    let best = 0;
    line.x.forEach((each, k) => { if (Math.abs(each - x) < Math.abs(line.x[best] - x)) best = k; });
    const range = line.low ? ` (${words(line.low[best])} to ${words(line.high[best])})` : "";
    const label = line.labels.length ? ` ${line.labels[best]}` : "";
    return `${line.name}${label} ${words(line.y[best])}${range}`;
  };
  const show = (number) => {
    place = Math.max(0, Math.min(places.length - 1, number));
    const x = places[place];
    // A line that begins later or has ended has nothing to say; one that is measured now and then says its nearest value.
    const there = data.lines.filter((line) => x >= line.x[0] && x <= line.x[line.x.length - 1]);
    readout.textContent = `${data.x} ${words(x)}: ${there.map((line) => said(line, x)).join(", ")}`;
    cursor.style.left = `${(100 * (x - left)) / (right - left)}%`;
    cursor.style.display = "block";
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = left + ((event.clientX - box.left) / box.width) * (right - left);
    let best = 0;
    places.forEach((each, k) => { if (Math.abs(each - x) < Math.abs(places[best] - x)) best = k; });
    show(best);
  });
  plot.addEventListener("pointerdown", () => plot.focus());
  plot.addEventListener("focus", () => { if (place < 0) show(places.length - 1); });
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: places.length - 1 };
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
  });
}
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.printed")) details.open = true;
});
