"""benchmarks/learning_rates.py: its rows, its sweeps on the tiny model, and its picture."""

import json
import sys

import pytest

from tests.support.files import ROOT

# Of a tiny model in seconds, in place of SmolLM2 in minutes.
TINY = (
    "model=tiny", "n_examples=8", "batch_size=4", "max_length=128", "max_prompt_length=64", "sample_during_eval=false",
    "do_first_eval=false", "eval_every=1000", "save_strategy=no", "wandb.enabled=false",
)  # fmt: skip


@pytest.fixture
def learning_rates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import learning_rates

    return learning_rates


@pytest.fixture
def file(tmp_path):
    begun = "\n\nHuman: question {}\n\nAssistant:"
    rows = [(begun.format(k), "a long answer", "short") for k in range(24)] + [(begun.format("x"), "word " * 90, "short")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"chosen": f"{q} {a}", "rejected": f"{q} {b}"}) + "\n" for q, a, b in rows))
    return path


def test_short_dialogues_are_split_by_their_prompts(learning_rates, file, tmp_path):
    counts = learning_rates.write_data(tmp_path, file, "shorter")
    train, held_out = ((tmp_path / f"{name}.jsonl").read_text() for name in ("train", "held_out"))
    assert counts["train"] + counts["held out"] == 24 and min(counts.values()) > 0 and "question x" not in train + held_out
    assert all(json.loads(row)["chosen"].endswith(" short") for row in train.splitlines())


def test_usual_learning_rates_are_those_of_the_defaults_and_are_swept(learning_rates):
    from science_parts.learning_rates_pictures import USUAL

    from preference_training.training.defaults import usual_lr

    for sweep, lr in USUAL.items():
        learns = "responses" if sweep.startswith("SFT") else "log-ratios"
        assert lr == usual_lr(learns, 135_000_000, "LoRA" in sweep, "AdamW"), sweep
        [rates] = [text for text in learning_rates.SWEEPS[sweep] if text.startswith("lr=")]
        assert lr in map(float, rates.removeprefix("lr=").split(","))


@pytest.mark.long
def test_a_sweep_is_run_and_drawn(learning_rates, file, tmp_path, monkeypatch):
    from science_parts.learning_rates_pictures import pictures

    monkeypatch.setattr(learning_rates, "COMMON", TINY)
    monkeypatch.setattr(learning_rates, "SWEEPS", {"DPO, all weights": ("loss=dpo", "lr=5e-6,1e-4")})
    results = tmp_path / "found.json"
    given = [str(tmp_path / "runs"), "--data", str(file), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["learning_rates.py", *given])
    learning_rates.main()
    found = json.loads(results.read_text())
    runs = found["sweeps"]["DPO, all weights"]["runs"]
    assert [run["lr"] for run in runs] == [5e-6, 1e-4]
    assert all(low <= mean <= high for run in runs for mean, low, high in [run["loss"], run["accuracy"]])
    assert (tmp_path / "runs" / "learning-rates.svg").read_text() == pictures(found)["learning-rates.svg"]


def test_the_picture_is_that_of_the_newest_numbers(learning_rates):
    from science_parts.learning_rates_pictures import pictures

    newest = max((ROOT / "benchmarks" / "results").glob("*_learning_rates_cpu.json"))
    for name, drawn in pictures(json.loads(newest.read_text())).items():
        assert (ROOT / "docs" / name).read_text() == drawn
