"""A run in a terminal: its progress, curves and last events, also while it is in progress, also on another machine.

metrics.jsonl, events.jsonl as they grow -> LiveRun -> a screen, redrawn when there is something new
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

from preference_training.configuration.saved import read_config
from preference_training.core.errors import UserError
from preference_training.core.metric_names import EXAMPLES, EXAMPLES_PER_SECOND, HELD_OUT_PROMPTS
from preference_training.evaluation.phrasing import too_few
from preference_training.reporting.charts import Line, downsample, tick_labels, ticks
from preference_training.reporting.run_charts import CHARTS
from preference_training.reporting.run_record import RunRecord
from preference_training.reporting.summary import duration_text, status, summary
from preference_training.tracking.run_files import ABOUT, EVENTS, LOCK, METRICS, json_object, rows_in, rows_up_to

# The charts of the report that are shown, in this order, as far as there are values and space.
SHOWN = ("Loss", "Reward accuracy", "Reward margin", "Log-prob of responses", "Beta used", "Gradient norm")
# The smallest plot, what its frame and labels add to it, in columns and lines; and the number of events.
MIN_WIDTH, MIN_HEIGHT, FRAME_WIDTH, FRAME_HEIGHT, MAX_EVENTS = 27, 5, 12, 5, 6


class GrowingFile:
    """A JSON Lines file that is read as it grows."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0
        self.inode: int | None = None

    def read_new(self) -> tuple[list[dict], bool]:
        """The rows added since the last call, and whether the file was replaced, so that earlier rows no longer count."""
        try:
            facts = self.path.stat()
        except OSError:
            return [], False
        # A resumed run replaces its files, without the rows after the checkpoint.
        is_replaced = facts.st_size < self.offset or self.inode not in (None, facts.st_ino)
        if is_replaced:
            self.offset = 0
        self.inode = facts.st_ino
        with self.path.open("rb") as file:
            file.seek(self.offset)
            # The last line may be incomplete.
            complete = file.read().rpartition(b"\n")[0]
        self.offset += len(complete) + 1 if complete else 0
        return list(rows_in(complete)), is_replaced


class LiveRun:
    """A run whose files are followed. Raises UserError for a directory that is not a run's."""

    def __init__(self, run_dir: Path):
        if not (run_dir / METRICS).is_file():
            starting = "The run is starting: wait until its model is loaded." if (run_dir / LOCK).is_file() else None
            raise UserError(f"{run_dir}: contains no {METRICS}. {starting or 'Expected a run directory.'}")
        self.run_dir = run_dir
        self.rows: dict[str, list[dict]] = {METRICS: [], EVENTS: []}
        self.files = {name: GrowingFile(run_dir / name) for name in self.rows}

    def poll(self) -> bool:
        """Read what is new; returns whether anything is."""
        changed = False
        for name, file in self.files.items():
            rows, is_replaced = file.read_new()
            if is_replaced:
                self.rows[name] = []
            self.rows[name] += rows_up_to(rows) if name == METRICS else rows
            changed |= bool(rows) or is_replaced
        return changed

    @property
    def has_ended(self) -> bool:
        """Whether the last event is the end of the run. A run that was killed has no such event."""
        events = self.rows[EVENTS]
        return bool(events) and str(events[-1].get("text")).startswith("ends")

    @property
    def record(self) -> RunRecord:
        """The run as it is now."""
        config, about = read_config(self.run_dir), json_object(self.run_dir / ABOUT)
        return RunRecord(self.run_dir, self.run_dir.name, config, about, self.rows[METRICS], results={})


def screen(live: LiveRun, width: int, height: int) -> Group:
    """The view of a run, for a terminal of so many columns and lines."""
    run = live.record
    name = run.config.get("exp_name", run.label)
    head = Text.assemble((str(name), "bold"), f"  {summary(run)}", no_wrap=True, overflow="ellipsis")
    facts = *([status(run)] if run.rows else []), run.progress, *speed_facts(run), *prompt_warning(run), str(run.directory)
    below = Text(" | ".join(facts), no_wrap=True, overflow="ellipsis")
    events = [event_line(event, width) for event in live.rows[EVENTS][-MAX_EVENTS:]]
    return Group(head, below, charts(run, width, height - 4 - len(events)), *events)


def speed_facts(run: RunRecord) -> Iterator[str]:
    """The speed of the last steps and the remaining time, in words."""
    rows, total = run.rows, run.about.get("examples")
    speeds = [row[EXAMPLES_PER_SECOND] for row in rows[-20:] if isinstance(row.get(EXAMPLES_PER_SECOND), int | float)]
    if not speeds or sum(speeds) <= 0:
        return
    speed = sum(speeds) / len(speeds)
    yield f"{speed:.4g} examples/s"
    left = (total if isinstance(total, int) else 0) - rows[-1][EXAMPLES]
    if left > 0:
        yield f"{duration_text(left / speed)} left"


def prompt_warning(run: RunRecord) -> Iterator[str]:
    """A warning where the last evaluation has too few prompts."""
    prompts = next((row[HELD_OUT_PROMPTS] for row in reversed(run.rows) if HELD_OUT_PROMPTS in row), None)
    if isinstance(prompts, int | float) and too_few(prompts, "held out"):
        yield f"held out: {prompts:.0f} prompts, too few"


def event_line(event: dict, width: int) -> Text:
    """An event on one line: time, examples, text."""
    try:
        moment = datetime.fromisoformat(event["time"]).astimezone().strftime("%H:%M:%S")
    except (LookupError, TypeError, ValueError):
        moment = "--:--:--"
    text = str(event.get("text", ""))
    style = "yellow" if text.startswith("warning") else ""
    line = Text(f"{moment} {event.get('examples', '')!s:>9}  {text}", style=style, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def charts(run: RunRecord, width: int, height: int) -> Columns | Text:
    """The charts for which there are values and space, side by side where the terminal is wide enough."""
    specs = {spec.title: spec for spec in CHARTS}
    found = {title: [line for line in specs[title].lines(run) if line] for title in SHOWN}
    lines = {title: of for title, of in found.items() if of}
    if not lines:
        return Text("No step has been logged yet.")
    columns = max(1, min(len(lines), width // (MIN_WIDTH + FRAME_WIDTH)))
    rows = max(1, height // (MIN_HEIGHT + FRAME_HEIGHT))
    kept = dict(list(lines.items())[: columns * rows])
    plot_height = max(MIN_HEIGHT, height // -(-len(kept) // columns) - FRAME_HEIGHT)
    plot_width = width // columns - FRAME_WIDTH
    return Columns([plot(title, of, plot_width, plot_height) for title, of in kept.items()], padding=0)


def plot(title: str, lines: list[Line], width: int, height: int) -> Text:
    """A chart in characters: a plot of so many columns and lines, with a frame and labels."""
    thinned = [downsample(line, 2 * width) for line in lines]
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
        # uniplot rounds 0.5 to 0 where space is short.
        x_labels=False,
        y_labels=False,
    )
    rows = picture.splitlines()
    # The title and the upper edge precede the first row of the plot.
    values = ticks(low, high, max(4, height // 2))
    for value, label in zip(values, tick_labels(values), strict=True):
        rows[2 + min(height - 1, int((high - value) / (high - low) * height))] += f" {label}"
    ends = f"{left:,.0f}", f"{right:,.0f}"
    rows.insert(3 + height, f" {ends[0]}".ljust(width + 2 - len(ends[1])) + ends[1])
    return Text.from_ansi("\n".join(rows), no_wrap=True)


def _limits(values: list) -> tuple[float, float]:
    """The smallest and the largest value of some arrays, widened where they are equal."""
    low, high = min(map(min, values)), max(map(max, values))
    padding = 0.1 * abs(low) or 1.0
    return (low, high) if high > low else (low - padding, high + padding)


def watch(run_dir: Path, every: float, once: bool = False, console: Console | None = None) -> None:
    """Show a run until it ends, or once; reads its files every so many seconds. Raises UserError as LiveRun."""
    run, console = LiveRun(run_dir), console or Console()
    run.poll()
    if once or not console.is_terminal:
        console.print(screen(run, *console.size))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        size = None
        while True:
            if run.poll() or console.size != size:
                size = console.size
                live.update(screen(run, *size), refresh=True)
            if run.has_ended:
                break
            time.sleep(every)
    # The alternate screen is gone; leave the final state in the scrollback.
    console.print(screen(run, *console.size))
