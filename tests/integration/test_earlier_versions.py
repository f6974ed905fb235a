"""A run that version 0.1 began goes on in this one: its checkpoint, its prepared data and its numbers."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import forked
from tests.support.files import GOLDEN, ROOT

BEGUN = GOLDEN / "run_of_version_0_1"
# As version 0.1 was started, on the embedded data.
COMMAND = [
    "loss=dpo", "wandb.enabled=false", "model.from_config.hidden_size=16", "model.from_config.intermediate_size=32",
    "model.from_config.num_hidden_layers=1", "model.from_config.num_attention_heads=2",
    "model.from_config.num_key_value_heads=2", "batch_size=8", "eval_batch_size=8", "n_steps=6", "n_epochs=2", "eval_every=16",
    "warmup_steps=2", "lr=1e-3", "sample_during_eval=false", "n_eval_examples=16", "save_policy_pt=false",
]  # fmt: skip


def rows(path: Path) -> dict[tuple, dict]:
    """The rows of a metrics.jsonl by the number of examples and by what they are of."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["counters/examples"], "loss/train" in row): row for row in found}


def test_a_checkpoint_of_version_0_1_resumes_to_the_numbers_of_its_own_uninterrupted_run(tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(BEGUN, run_dir)
    done = forked.run([ROOT / "train.py", *COMMAND, f"local_run_dir={run_dir}", f"resume={run_dir}"], tmp_path)
    assert done.returncode == 0, done.stderr
    expected, found = rows(BEGUN / "metrics.jsonl"), rows(run_dir / "metrics.jsonl")
    assert max(expected) == max(found) and expected.keys() == found.keys()
    for key, row in expected.items():
        # Intervals are not what they were: those of that version held the truth too seldom.
        others = ("examples_per_second", "memory_gib")
        measured = {name: value for name, value in row.items() if name not in others and not name.endswith(("/low", "/high"))}
        # Another processor's kernels round otherwise.
        assert {name: found[key][name] for name in measured} == pytest.approx(measured, rel=1e-4, abs=1e-6)
    weights, final = load_file(run_dir / "step-48" / "model.safetensors"), load_file(BEGUN / "final_weights.safetensors")
    assert weights.keys() == final.keys()
    for name, weight in final.items():
        assert (weights[name] - weight).abs().max() <= 1e-5


def test_a_sweep_that_version_0_1_began_is_continued_and_a_job_that_is_complete_is_not_run_again(tmp_path):
    sweep, begun = tmp_path / "sweep", GOLDEN / "sweep_of_version_0_1"
    shutil.copytree(begun, sweep)
    common = [
        "n_examples=32",
        "n_eval_examples=8",
        "sample_during_eval=false",
        "wandb.enabled=false",
        f"hydra.sweep.dir={sweep}",
    ]
    done = forked.run([ROOT / "train.py", "-m", "loss=dpo", "loss.beta=0.1,0.5", *common], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"sweep: {sweep / '0'} is complete already" in done.stdout
    assert not (sweep / "0" / "LATEST").exists() and (sweep / "1" / "LATEST").exists()
    kept, first = (json.loads((place / "0" / "job.json").read_text()) for place in (begun, sweep))
    assert (first["objective"], first["starts"]) == (kept["objective"], 1)
