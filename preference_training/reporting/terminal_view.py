"""A run in a terminal: how far it is, its curves, and what happened last; the run may be going on, on another machine.

metrics.jsonl, events.jsonl, as they grow -> Watched -> a screen, drawn again when something has come
"""

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import uniplot
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from preference_training.core.errors import UserError
from preference_training.core.metric_names import EXAMPLES, EXAMPLES_PER_SECOND, HELD_OUT_PROMPTS
from preference_training.evaluation.phrasing import too_few
from preference_training.reporting.charts import bucketed, tick_label, ticks
from preference_training.reporting.run_report import CHARTS, metric_line
from preference_training.tracking.run_files import (
    ABOUT,
    EVENTS,
    METRICS,
    config_in,
    counted,
    json_object,
    progress,
    rows_in,
    split_rows,
)

# Charts shown, as far as there are numbers and room: those of the report, in this order.
SHOWN = ("Loss", "Reward accuracy", "Reward margin", "Log-prob of responses", "Beta in force", "Gradient norm")
# Columns and lines of a chart at the least, the frame and its labels beside it, and events shown.
LEAST_WIDTH, LEAST_HEIGHT, FRAME_WIDTH, FRAME_HEIGHT, EVENTS_SHOWN = 27, 5, 12, 5, 6


class GrowingFile:
    """A file of JSON objects, a line each, of which each call gives what has been added since the call before."""

    def __init__(self, path: Path):
        self.path, self.read_to = path, 0
        self.identity: int | None = None

    def added(self) -> tuple[list[dict], bool]:
        """New rows, and whether the file was begun anew, so that earlier ones no longer hold."""
        try:
            facts = self.path.stat()
        except OSError:
            return [], False
        # A run that goes on from a checkpoint writes its files anew, without what came behind it.
        begun_anew = facts.st_size < self.read_to or self.identity not in (None, facts.st_ino)
        if begun_anew:
            self.read_to = 0
        self.identity = facts.st_ino
        with self.path.open("rb") as file:
            file.seek(self.read_to)
            # The last line may be half written.
            whole = file.read().rpartition(b"\n")[0]
        self.read_to += len(whole) + 1 if whole else 0
        return list(rows_in(whole)), begun_anew


class Watched:
    """A run as it grows. Raises UserError for a directory that is no run's."""

    def __init__(self, run_dir: Path):
        if not (run_dir / METRICS).is_file():
            raise UserError(f"{run_dir}: no {METRICS} in it. Expected the directory of a run.")
        self.run_dir = run_dir
        self.rows: dict[str, list[dict]] = {METRICS: [], EVENTS: []}
        self.files = {name: GrowingFile(run_dir / name) for name in self.rows}

    def look(self) -> bool:
        """Read what has come; whether anything has."""
        changed = False
        for name, file in self.files.items():
            rows, begun_anew = file.added()
            if begun_anew:
                self.rows[name] = []
            self.rows[name] += counted(rows) if name == METRICS else rows
            changed |= bool(rows) or begun_anew
        return changed

    @property
    def has_ended(self) -> bool:
        """Whether the run has said that it ends, and not gone on since. One that was killed has not said so."""
        events = self.rows[EVENTS]
        return bool(events) and str(events[-1].get("text")).startswith("ends")


def screen(watched: Watched, width: int, height: int) -> Group:
    """What there is to see of a run, for a terminal of so many columns and lines."""
    about = json_object(watched.run_dir / ABOUT)
    rows, events = watched.rows[METRICS], watched.rows[EVENTS][-EVENTS_SHOWN:]
    name = config_in(watched.run_dir).get("exp_name", watched.run_dir.name)
    head = Text.assemble((str(name), "bold"), f"  {watched.run_dir}", no_wrap=True, overflow="ellipsis")
    facts = progress(rows, about), *facts_of_newest(rows, about.get("examples")), *few_prompts(rows)
    said = Text(" | ".join(facts), no_wrap=True, overflow="ellipsis")
    lines = [line_of_event(event, width) for event in events]
    charts = charts_of(rows, width, height - 4 - len(lines))
    return Group(head, said, charts, *lines)


def facts_of_newest(rows: list[dict], total) -> Iterator[str]:
    """Speed and time left, in words, by the newest step."""
    speeds = [row[EXAMPLES_PER_SECOND] for row in rows[-20:] if isinstance(row.get(EXAMPLES_PER_SECOND), int | float)]
    if not speeds or sum(speeds) <= 0:
        return
    speed = sum(speeds) / len(speeds)
    yield f"{speed:.4g} examples/s"
    left = (total if isinstance(total, int) else 0) - rows[-1][EXAMPLES]
    if left > 0:
        yield f"{left / speed / 60:.0f} min left" if left > 120 * speed else f"{left / speed:.0f} s left"


def few_prompts(rows: list[dict]) -> Iterator[str]:
    """A warning where the newest evaluation is of too few prompts."""
    prompts = next((row[HELD_OUT_PROMPTS] for row in reversed(rows) if HELD_OUT_PROMPTS in row), None)
    if isinstance(prompts, int | float) and too_few(prompts, "held out"):
        yield f"held out: {prompts:.0f} prompts, too few"


def line_of_event(event: dict, width: int) -> Text:
    """One line for something that happened: when, after how many examples, what."""
    try:
        moment = datetime.fromisoformat(event["time"]).astimezone().strftime("%H:%M:%S")
    except (LookupError, TypeError, ValueError):
        moment = "--:--:--"
    text = str(event.get("text", ""))
    style = "yellow" if text.startswith("warning") else ""
    line = Text(f"{moment} {event.get('examples', '')!s:>9}  {text}", style=style, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def charts_of(rows: list[dict], width: int, height: int) -> Columns | Text:
    """The charts that there are numbers and room for, side by side where the terminal is wide enough."""
    split = split_rows(rows)
    found = {title: names for title, _, names in CHARTS}
    lines = {title: [metric_line(*split, name, label, 0) for name, label in found[title].items()] for title in SHOWN}
    lines = {title: [line for line in of if line] for title, of in lines.items()}
    lines = {title: of for title, of in lines.items() if of}
    if not lines:
        return Text("No step has been logged yet.")
    columns = max(1, min(len(lines), width // (LEAST_WIDTH + FRAME_WIDTH)))
    room = max(1, height // (LEAST_HEIGHT + FRAME_HEIGHT))
    kept = dict(list(lines.items())[: columns * room])
    high = max(LEAST_HEIGHT, height // -(-len(kept) // columns) - FRAME_HEIGHT)
    wide = width // columns - FRAME_WIDTH
    return Columns([drawn(title, of, wide, high) for title, of in kept.items()], padding=0)


def drawn(title: str, lines: list, width: int, height: int) -> Text:
    """A chart in characters: a plot of so many columns and lines, in a frame with labels."""
    thinned = [bucketed(line, 2 * width) for line in lines]
    (left, right), (low, high) = (_limits([getattr(line, axis) for line in thinned]) for axis in "xy")
    picture = uniplot.plot_to_string(
        xs=[line.x for line in thinned],
        ys=[line.y for line in thinned],
        lines=True,
        color=True,
        title=title,
        legend_labels=[line.name for line in thinned] if len(thinned) > 1 else None,
        legend_placement="vertical" if len(thinned) > 2 else "auto",
        width=width,
        height=height,
        x_min=left,
        x_max=right,
        y_min=low,
        y_max=high,
        x_gridlines=[],
        y_gridlines=[],
        # It writes 0.5 as 0 where there is room for few.
        x_labels=False,
        y_labels=False,
    )
    rows = picture.splitlines()
    # Title and upper edge are above the plot's first row.
    for value in ticks(low, high, max(4, height // 2)):
        rows[2 + min(height - 1, int((high - value) / (high - low) * height))] += f" {tick_label(value)}"
    ends = f"{left:,.0f}", f"{right:,.0f}"
    rows.insert(3 + height, f" {ends[0]}".ljust(width + 2 - len(ends[1])) + ends[1])
    return Text.from_ansi("\n".join(rows), no_wrap=True)


def _limits(values: list) -> tuple[float, float]:
    """The least and the largest of some arrays' values; a little apart where they are the same."""
    least, largest = min(map(min, values)), max(map(max, values))
    apart = 0.1 * abs(least) or 1.0
    return (least, largest) if largest > least else (least - apart, largest + apart)


def watch(run_dir: Path, every: float, once: bool = False, console: Console | None = None) -> None:
    """Show a run until it ends, or for a moment; looks at its files every so many seconds. Raises UserError as Watched."""
    watched, console = Watched(run_dir), console or Console()
    watched.look()
    picture = lambda: screen(watched, *console.size)  # noqa: E731
    if once or not console.is_terminal:
        console.print(picture())
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        size = None
        while True:
            if watched.look() or console.size != size:
                size = console.size
                live.update(picture(), refresh=True)
            if watched.has_ended:
                break
            time.sleep(every)
    # The other screen is gone with what it showed.
    console.print(picture())
