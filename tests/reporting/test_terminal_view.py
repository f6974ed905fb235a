"""The view of a growing run in a terminal."""

import io
import json
import os
import pty
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from preference_training.core.errors import UserError
from preference_training.reporting.terminal_view import GrowingFile, LiveRun, screen, watch
from tests.support.forked import ROOT, Program


def step(examples: int, **more) -> dict:
    return {"loss/train": 1 / examples, "examples_per_second": 8.0, "counters/examples": examples} | more


def add(file: Path, *rows: dict) -> None:
    with file.open("a") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)


def event(examples: int, text: str) -> dict:
    return {"time": "2026-11-21T15:33:36+00:00", "examples": examples, "text": text}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    add(tmp_path / "metrics.jsonl", *(step(4 * n, grad_norm=2.0) for n in range(1, 50)))
    add(tmp_path / "metrics.jsonl", {"loss/eval": 0.25, "rewards_eval/accuracies": 0.75, "counters/examples": 196})
    add(tmp_path / "events.jsonl", event(0, "begins"), event(196, "warning: something is odd"))
    (tmp_path / "about.json").write_text('{"examples": 400}')
    (tmp_path / "config.yaml").write_text("exp_name: the name\n")
    return tmp_path


def shown(run_dir: Path, width: int = 120, height: int = 40) -> str:
    live = LiveRun(run_dir)
    live.poll()
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(screen(live, width, height))
    return console.file.getvalue()


def test_a_run_is_shown_with_its_progress_curves_and_events(run_dir):
    text = shown(run_dir)
    assert "the name" in text
    assert "196 of 400 examples" in text and "8 examples/s | 26 s left" in text
    for part in (
        "Loss",
        "training",
        "held out",
        "Reward accuracy",
        "Gradient norm",
        "begins",
        "196  warning: something is odd",
    ):
        assert part in text, part
    assert "Reward margin" not in text, "there is no number of it"


def test_too_few_held_out_prompts_are_reported(run_dir):
    assert "too few" not in shown(run_dir)
    add(run_dir / "metrics.jsonl", {"loss/eval": 0.2, "counters/examples": 196, "counters/held_out_prompts": 3})
    assert "held out: 3 prompts, too few" in shown(run_dir)


def test_axis_labels_are_at_the_right_rows(tmp_path):
    add(tmp_path / "metrics.jsonl", *(step(n, **{"loss/train": n / 100}) for n in range(30, 70)))
    rows = shown(tmp_path, 60, 20).splitlines()
    plot = [row for row in rows if row.startswith("│")]
    labels = {k: float(row.rpartition("│")[2]) for k, row in enumerate(plot) if row.rpartition("│")[2].strip()}
    assert len(labels) >= 3
    for k, value in labels.items():
        # From 0.69 in the upper edge of the first row to 0.3 in the lower edge of the last.
        assert abs(0.69 - (k + 0.5) * 0.39 / len(plot) - value) <= 0.39 / len(plot)
    assert rows[rows.index(plot[-1]) + 2].split() == ["30", "69"]


def test_a_run_that_has_logged_nothing_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert "no step yet" in shown(tmp_path) and "No step has been logged yet." in shown(tmp_path)


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (200, 60)])
def test_the_view_fits_the_terminal(width, height, run_dir):
    lines = shown(run_dir, width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 20), "one chart is always shown"


def test_a_growing_file_yields_each_complete_row_once(tmp_path):
    file = tmp_path / "rows.jsonl"
    growing = GrowingFile(file)
    assert growing.read_new() == ([], False), "it is not there yet"
    file.write_bytes(b'{"a": 1}\nno row\n{"a": ')
    assert growing.read_new() == ([{"a": 1}], False)
    with file.open("ab") as opened:
        opened.write('2, "b": "\u2028é"}\n[3]\n'.encode())
    assert growing.read_new() == ([{"a": 2, "b": "\u2028é"}], False)
    assert growing.read_new() == ([], False)


def test_a_resumed_run_is_read_from_the_start(run_dir):
    live = LiveRun(run_dir)
    assert live.poll() and not live.poll()
    rows = [step(4), step(8)]
    (run_dir / "new").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "new").replace(run_dir / "metrics.jsonl")
    assert live.poll() and live.rows["metrics.jsonl"] == rows


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["loss/train", "loss/eval", "counters/examples", "examples_per_second", "time", "examples", "text"])


@settings(max_examples=60, deadline=None)
@example(metrics=[{"counters/examples": 2.0**53 + 4, "loss/train": 1}], events=[], about={})
@example(
    metrics=[{"counters/examples": n, "loss/train": value} for n, value in enumerate((1.7e308, -1.7e308, 1e-320))],
    events=[],
    about={},
)
@given(
    metrics=st.lists(st.dictionaries(names, json_values, max_size=5), max_size=5),
    events=st.lists(st.dictionaries(names, json_values, max_size=3), max_size=3),
    about=st.dictionaries(names, json_values, max_size=2),
)
def test_malformed_rows_are_skipped(metrics, events, about, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "metrics.jsonl").touch()
    add(run_dir / "metrics.jsonl", *metrics)
    add(run_dir / "events.jsonl", *events)
    (run_dir / "about.json").write_text(json.dumps(about))
    assert shown(run_dir, 60, 20)


def test_another_directory_is_refused_with_one_message(tmp_path):
    with pytest.raises(UserError, match="Expected a run directory"):
        watch(tmp_path, 1.0)


def test_without_a_terminal_the_view_is_printed_once(run_dir):
    console = Console(file=io.StringIO(), width=100)
    watch(run_dir, 1.0, console=console)
    assert "196 of 400 examples" in console.file.getvalue() and "\x1b" not in console.file.getvalue()


def test_in_a_terminal_the_view_follows_the_run_to_its_end(run_dir):
    mine, theirs = pty.openpty()
    command = [ROOT / "scripts" / "watch.py", run_dir, "--every", "0.1"]
    program = Program(command, run_dir, theirs, theirs, dict(os.environ, TERM="xterm", COLUMNS="100", LINES="40"))
    seen = read_until(mine, b"196 of 400")
    add(run_dir / "metrics.jsonl", step(400))
    seen += read_until(mine, b"400 of 400")
    add(run_dir / "events.jsonl", event(400, "ends"))
    assert program.wait(60) == 0
    assert b"\x1b[?1049h" in seen, "on a screen of its own"
    os.close(mine)
    os.close(theirs)


def read_until(descriptor: int, wanted: bytes, seconds: float = 60) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < end, seen[-500:]
        seen += os.read(descriptor, 2**16)
    return seen
