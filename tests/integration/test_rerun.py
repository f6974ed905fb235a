"""A run and its repetition from rerun.yaml have the same metrics."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from preference_training.core.metric_names import MEASURED
from tests.integration.test_runs import train


def metrics(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def test_a_run_is_repeated_from_its_file_in_another_directory(tmp_path):
    first, second, elsewhere = tmp_path / "first", tmp_path / "second", tmp_path / "elsewhere"
    elsewhere.mkdir()
    rows = ({"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": "No."} for n in range(60))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(
        tmp_path, "loss=dpo", "loss.beta=0.2", "datasets=[{path:mine.jsonl,held_out_share:0.2}]", "n_epochs=null", "n_steps=2",
        "eval_every=null", "warmup_share=0.5", "n_eval_model_samples=1", "wandb.enabled=false", f"local_run_dir={first}",
    )  # fmt: skip
    values = OmegaConf.to_container(OmegaConf.load(first / "rerun.yaml"))
    assert values["datasets"] == [{"path": str(tmp_path / "mine.jsonl"), "held_out_share": 0.2}]
    train(elsewhere, "--config-name", "rerun", "--config-dir", str(first), f"local_run_dir={second}")
    assert metrics(first) == metrics(second)
    assert (first / "rerun.yaml").read_text().splitlines()[2:] == (second / "rerun.yaml").read_text().splitlines()[2:]
    about = json.loads((first / "about.json").read_text())
    assert about["usual"]["eval_every"] == [None, 16] and about["chosen"]["eval_every"].startswith("eval_every: 16 examples")
    assert OmegaConf.load(first / "config.yaml").eval_every is None
