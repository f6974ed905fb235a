"""Metrics reach metrics.jsonl whatever happens to the console and to wandb."""

import json
import sys
import types

import pytest
import torch

from tracking import Tracker, WandbRun, start_wandb


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
        tracker.say("a checkpoint")
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


class FailingRun:
    """A wandb run whose server is gone."""

    def log(self, row):
        raise OSError("no route to host")

    finish = log


def test_wandb_that_fails_is_left_alone_after_one_line(tmp_path, capsys):
    with Tracker(tmp_path, total=8, min_interval=0, wandb_run=WandbRun(types.SimpleNamespace(), FailingRun())) as tracker:
        tracker.log_step(step(4))
        tracker.log_step(step(8))
        tracker.log_samples([{"prompt": "a", "policy": "b"}], 8)
    assert len(rows(tmp_path)) == 2
    assert capsys.readouterr().out.count("wandb: switched off") == 1


CONFIG = {"wandb": {"project": "test", "entity": None}, "exp_name": "run"}


def test_without_a_key_wandb_writes_offline_and_says_so(tmp_path, capsys, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with Tracker(tmp_path, total=4, wandb_run=start_wandb(CONFIG, tmp_path)) as tracker:
        tracker.log_step(step(4))
        tracker.log_samples([{"prompt": "a", "policy": "b"}], 4)
    assert capsys.readouterr().out.count("wandb: offline") == 1
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_falls_back_to_offline_where_its_server_does_not_answer(tmp_path, capsys, monkeypatch):
    modes = []

    def init(mode, **_):
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("no answer")
        return types.SimpleNamespace(log=lambda row: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **_: None))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert start_wandb(CONFIG, tmp_path) is not None
    assert modes == ["online", "offline"]
    assert "wandb: offline, as its server could not be used: no answer" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_what_wandb_says_of_a_key_is_printed_without_it(mode, tmp_path, capsys, monkeypatch):
    def init(**_):
        raise ValueError("\x1b[31mkey verysecret is malformed")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **_: None))
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    monkeypatch.setenv("WANDB_MODE", mode)
    assert start_wandb(CONFIG, tmp_path) is None
    out = capsys.readouterr().out
    assert "wandb: not used: key (the key) is malformed" in out and "verysecret" not in out and "\x1b" not in out


def test_wandb_without_a_place_for_its_files_ends_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb").symlink_to("/dev/full")
    with Tracker(tmp_path, total=4, wandb_run=start_wandb(CONFIG, tmp_path)) as tracker:
        tracker.log_step(step(4))
    assert len(rows(tmp_path)) == 1
    assert capsys.readouterr().out.count("4/4 loss") == 1


@pytest.mark.parametrize("fault", [ImportError("no wandb"), RuntimeError("broken")])
def test_a_broken_wandb_is_not_used_and_ends_nothing(tmp_path, capsys, monkeypatch, fault):
    def init(**_):
        raise fault

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **_: None))
    assert start_wandb(CONFIG, tmp_path) is None
    assert "wandb: not used" in capsys.readouterr().out
