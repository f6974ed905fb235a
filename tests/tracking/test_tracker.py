"""Metrics and events reach the run directory whatever happens to the console and to the disk."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
import torch

from preference_training.tracking.run_files import json_lines
from preference_training.tracking.tracker import Tracker


def step(examples: int) -> dict:
    return {
        "loss/train": torch.tensor(0.5),
        "rewards_train/accuracies": torch.tensor(0.75),
        "rewards_train/margins": torch.tensor(1.5),
        "examples_per_second": 8.0,
        "counters/examples": examples,
        "counters/updates": examples // 4,
    }


def rows(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_no_step_is_lost_between_two_lines_of_the_console(tmp_path, capsys):
    with Tracker(tmp_path, total=40, min_interval=3600) as tracker:
        for examples in range(4, 44, 4):
            tracker.log_step(step(examples))
    assert [row["counters/examples"] for row in rows(tmp_path)] == list(range(4, 44, 4))
    assert rows(tmp_path)[0]["loss/train"] == 0.5
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["4/40", "40/40"], "the first step, and the last one at the end"


def test_a_plain_line_shows_loss_accuracy_margin_speed_and_time_left(tmp_path, capsys):
    with Tracker(tmp_path, total=40) as tracker:
        tracker.log_step(step(8))
    assert capsys.readouterr().out == "8/40 loss 0.5 accuracy 0.75 margin 1.5 examples/s 8 left 4 s\n"


def test_a_terminal_gets_one_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Tracker(tmp_path, total=40) as tracker:
        tracker.log_step(step(8))
        tracker.log_message("a checkpoint")
    out = capsys.readouterr().out
    assert "8/40" in out and "loss=0.5" in out and "accuracy=0.75" in out and "margin=1.5" in out
    assert "a checkpoint\n" in out


def test_an_evaluation_is_written_behind_the_steps_before_it(tmp_path):
    with Tracker(tmp_path, total=8, min_interval=3600) as tracker:
        tracker.log_step(step(4))
        tracker.log_step(step(8))
        tracker.log_evaluation({"loss/eval": 0.25, "counters/examples": 8, "counters/updates": 2})
    assert ["loss/eval" in row for row in rows(tmp_path)] == [False, False, True]


def test_rows_for_which_the_disk_has_no_room_are_written_when_it_has(tmp_path, capsys):
    bad = {"counters/examples": 8, "counters/updates": 2, "not_finite": "loss", "pairs": ["row 3"]}
    with Tracker(tmp_path, total=16, min_interval=0) as tracker:
        for name in ("metrics.jsonl", "bad_batches.jsonl"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to("/dev/full")
        tracker.log_step(step(4))
        tracker.log_step(step(8))
        tracker.log_bad_step(bad)
        for name in ("metrics.jsonl", "bad_batches.jsonl"):
            (tmp_path / name).unlink()
        tracker.log_step(step(12))
        tracker.log_bad_step(bad)
    assert [row["counters/examples"] for row in rows(tmp_path)] == [4, 8, 12]
    assert (tmp_path / "bad_batches.jsonl").read_text() == 2 * (json.dumps(bad) + "\n")
    out = capsys.readouterr().out
    for name in ("metrics.jsonl", "bad_batches.jsonl"):
        assert out.count(f"warning: {name} cannot be written to, its rows are kept for later: No space left on device") == 1


def events(run_dir) -> list[tuple[int, str]]:
    return [(row["examples"], row["text"]) for row in json_lines(run_dir / "events.jsonl")]


def test_what_happens_beside_steps_is_kept_with_its_moment_from_beginning_to_end(tmp_path):
    with Tracker(tmp_path, total=8, min_interval=3600) as tracker:
        tracker.log_step(step(4))
        tracker.log_evaluation({"loss/eval": 0.25, "counters/examples": 4, "counters/updates": 1})
        tracker.log_step(step(8))
        tracker.log_message("checkpoint: step-8")
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, total=16, examples=8):
        raise ZeroDivisionError("a bug")
    held_out = "held out, after 4 examples: loss/eval 0.25"
    expected = [(0, "begins"), (4, held_out), (8, "checkpoint: step-8"), (8, "ends"), (8, "goes on"), (8, "ends: a bug")]
    assert events(tmp_path) == expected
    moments = [datetime.fromisoformat(row["time"]) for row in json_lines(tmp_path / "events.jsonl")]
    assert moments == sorted(moments) and all(moment.tzinfo for moment in moments)


def test_a_resumed_run_records_no_finding_twice_but_one_that_has_changed(tmp_path, capsys):
    with Tracker(tmp_path, total=8) as tracker:
        tracker.log_finding("collapse", "warning: after 4 examples it fell")
        tracker.record_finding("collapse", "warning: said at the end in other words")
        tracker.log_finding("best checkpoint", "best: step-4")
    with Tracker(tmp_path, total=16, examples=8) as tracker:
        tracker.record_finding("collapse", "warning: after 4 examples it fell")
        tracker.log_finding("best checkpoint", "best: step-12")
    found = [(row["finding"], row["text"]) for row in json_lines(tmp_path / "events.jsonl") if "finding" in row]
    assert found == [
        ("collapse", "warning: after 4 examples it fell"),
        ("best checkpoint", "best: step-4"),
        ("best checkpoint", "best: step-12"),
    ]


def test_events_for_which_the_disk_has_no_room_are_kept_for_later_like_all_rows(tmp_path, capsys):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with Tracker(tmp_path, total=8) as tracker:
        tracker.log_message("one")
        (tmp_path / "events.jsonl").unlink()
        tracker.log_message("other")
    assert [text for _, text in events(tmp_path) if not text.startswith("warning")] == ["begins", "one", "other", "ends"]
    assert capsys.readouterr().out.count("warning: events.jsonl cannot be written to") == 1


def test_lines_from_several_threads_are_all_kept_whole(tmp_path):
    with Tracker(tmp_path, total=8) as tracker, ThreadPoolExecutor(8) as threads:
        list(threads.map(tracker.log_message, map(str, range(200))))
    assert sorted(text for _, text in events(tmp_path)) == sorted([*map(str, range(200)), "begins", "ends"])
