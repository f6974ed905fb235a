"""A run in one line: loss, data, model, time and end, from whatever its directory says."""

import json
from pathlib import Path

import pytest
from filelock import FileLock

from preference_training.losses.registry import losses
from preference_training.reporting.run_record import RunRecord
from preference_training.reporting.summary import (
    command,
    data,
    duration_text,
    method,
    model,
    reference,
    seconds,
    short_title,
    status,
    summary,
)

DPO = {"name": "dpo", "beta": 0.1}


def record(folder: Path, config: dict | None = None, about: dict | None = None, examples: int | None = None) -> RunRecord:
    rows = [] if examples is None else [{"counters/examples": examples, "counters/updates": examples // 4}]
    return RunRecord(folder, folder.name, config or {}, about or {}, rows, {})


def write_events(folder: Path, *events: tuple[str, str]) -> None:
    rows = [{"time": f"2026-11-21T{time}+01:00", "examples": 0, "text": text} for time, text in events]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_one_line(tmp_path):
    config = {"loss": DPO, "datasets": ["/data/mine.jsonl"], "model": {"name_or_path": "Qwen/Qwen3-0.6B", "lora": {"r": 16}}}
    write_events(tmp_path, ("12:00:00", "begins"), ("12:04:10", "ends"))
    about = {"examples": 285, "train": {"examples": 285}}
    assert summary(record(tmp_path, config, about, 285)) == (
        "DPO (beta 0.1) on 285 pairs of mine.jsonl · Qwen3-0.6B + LoRA r=16 · 4 min · finished"
    )


def test_a_directory_without_anything_has_a_line_too(tmp_path):
    assert summary(record(tmp_path)) == "no step yet"


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPO, "DPO (beta 0.1)"),
        ({"name": "sft", "average": "tokens"}, "SFT"),
        ({"name": "dpo", "beta": 0.1, "mode_loss": "beta_DPO"}, "Beta-DPO (beta 0.1)"),
        ({"name": "hinge", "beta": 0.5}, "Hinge loss (SLiC) (beta 0.5)"),
        ({"name": "own", "function": "my.py:loss", "beta": 1}, "A user-defined loss my.py:loss (beta 1)"),
        ({"name": "mix", "parts": [{"name": "sft"}, {"name": "dpo", "beta": 0.2}]}, "a mix of SFT and DPO (beta 0.2)"),
        ({"name": "unheard_of"}, "unheard_of"),
    ],
)
def test_a_loss_is_called_by_its_usual_name_with_its_beta(tmp_path, loss, expected):
    assert method(record(tmp_path, {"loss": loss})) == expected


def test_no_two_losses_are_called_the_same():
    found = [short_title(name, loss.title) for name, loss in losses().items()]
    assert len(set(found)) == len(found)
    assert {"DPO", "SFT", "KTO", "TR-DPO", "SimPO", "ORPO"} <= set(found)


@pytest.mark.parametrize(
    ("datasets", "about", "expected"),
    [
        (["hh", "shp"], {}, "hh and shp"),
        (["hh", "a.jsonl", "b.jsonl", "c.csv"], {}, "hh, a.jsonl, b.jsonl and 1 more"),
        ("folder/mine.jsonl", {"examples": 12, "train": {"examples": 12}}, "12 pairs of mine.jsonl"),
        (["hh"], {"examples": 640, "train": {"examples": 160_800}}, "640 of 160,800 pairs of hh"),
        (["hh"], {"examples": 300, "train": {"examples": 100}}, "100 pairs of hh, 3 epochs"),
        (["ORG/NAME"], {"examples": 1, "train": {"examples": 1}}, "1 pair of ORG/NAME"),
        ([{"path": "rows/*.jsonl", "prompt": "q"}], {"train": {"examples": "?"}}, "*.jsonl"),
    ],
)
def test_the_data_is_named_with_its_size(tmp_path, datasets, about, expected):
    assert data(record(tmp_path, {"loss": DPO, "datasets": datasets}, about)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name_or_path": "/models/SmolLM2-135M"}, "SmolLM2-135M"),
        ({"name_or_path": "/smol/model"}, "smol/model"),
        ({"from_config": {"model_type": "llama"}}, "llama built from scratch"),
        ({"name_or_path": "gpt2", "archive": "runs/sft_1/LATEST"}, "gpt2 from sft_1"),
        ({"from_config": {"model_type": "llama"}, "archive": "runs/sft/step-64"}, "sft/step-64"),
        ({"name_or_path": "gpt2", "quantization": "nf4", "lora": {"r": 8}}, "gpt2 + QLoRA r=8 (nf4)"),
    ],
)
def test_a_model_is_named_without_its_folders(tmp_path, values, expected):
    assert model(record(tmp_path, {"model": values})) == expected


def test_a_model_built_from_scratch_is_said_to_be_as_large_as_it_is(tmp_path):
    config = {"model": {"from_config": {"model_type": "llama"}}}
    assert model(record(tmp_path, config, {"parameters": 824_000})) == "llama of 0.82M parameters built from scratch"
    assert model(record(tmp_path, config, {"parameters": 7_000_000_000})) == "llama of 7B parameters built from scratch"


@pytest.mark.parametrize(
    ("loss", "lora", "expected"),
    [
        (DPO, None, "the model as before training"),
        (DPO, 16, "the same model without its adapter, as before training"),
        (DPO | {"reference_free": True}, None, "none: loss.reference_free=true"),
        (
            {"name": "tr_dpo", "reference_update_every": 64},
            None,
            "a copy of the model before training, which follows the policy",
        ),
        ({"name": "simpo"}, None, "none: this loss compares the policy with no other model"),
        ({"name": "sft"}, None, ""),
    ],
)
def test_the_reference_is_said(tmp_path, loss, lora, expected):
    assert reference(record(tmp_path, {"loss": loss, "model": {"lora": {"r": lora}}})) == expected


@pytest.mark.parametrize(("archive", "expected"), [("runs/sft/step-64", "sft/step-64"), ("base", "that without model.archive")])
def test_a_reference_of_its_own_is_not_said_to_be_the_model_before_training(tmp_path, archive, expected):
    config = {"loss": DPO, "model": {"reference_archive": archive, "lora": {"r": 16}}}
    assert reference(record(tmp_path, config)) == f"another model: {expected}"


def test_the_time_between_a_stop_and_its_resumption_does_not_count(tmp_path):
    write_events(
        tmp_path,
        *(("12:00:00", "begins"), ("12:10:00", "ends: stopped after 8 examples: SIGTERM")),
        *(("15:00:00", "goes on"), ("15:05:30", "checkpoint: step-16")),
    )
    assert seconds(record(tmp_path)) == 15.5 * 60
    assert seconds(record(tmp_path / "absent")) is None


@pytest.mark.parametrize(
    ("time", "text"),
    [(None, ""), (0.4, "0 s"), (89, "89 s"), (240, "4 min"), (7100, "118 min"), (7800, "2 h 10 min"), (187_000, "2 d 4 h")],
)
def test_a_duration_is_short(time, text):
    assert duration_text(time) == text


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (["begins"], "at 60%"),
        (["begins", "ends"], "finished"),
        (["begins", "early stopping: loss/eval was not better", "ends"], "stopped early at 60%"),
        (["begins", "ends: stopped after 6 examples: SIGTERM"], "stopped at 60%"),
        (["begins", "ends: CUDA out of memory"], "failed at 60%: CUDA out of memory"),
        (["begins", "ends: stopped after 6 examples: SIGTERM", "goes on"], "at 60%"),
    ],
)
def test_the_end_of_a_run_is_said(tmp_path, events, expected):
    write_events(tmp_path, *(("12:00:00", text) for text in events))
    assert status(record(tmp_path, about={"examples": 10}, examples=6)) == expected


def test_a_run_is_running_while_its_lock_is_held(tmp_path):
    run = record(tmp_path, about={"examples": 10}, examples=6)
    with FileLock(tmp_path / ".lock"):
        assert status(run) == "running, at 60%"
    assert (tmp_path / ".lock").touch() or status(run) == "at 60%", "a killed process leaves it behind"
    (tmp_path / "pruned.json").touch()
    assert status(run) == "pruned at 60%"


def test_the_command_to_repeat_a_run_is_its_file_or_its_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "my run"
    folder.mkdir(parents=True)
    assert command(record(folder)) == ""
    (folder / "job.json").write_text(json.dumps({"overrides": ["loss=dpo", "datasets=[a,b]"]}))
    assert command(record(folder)) == "python train.py loss=dpo 'datasets=[a,b]'"
    (folder / "rerun.yaml").touch()
    assert command(record(folder)) == "python train.py --config-name rerun --config-dir 'runs/my run'"
