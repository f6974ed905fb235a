"""Trackio and MLflow as they are installed: what a run logs can be read back from them.

make trackers-test    installs requirements/trackio.txt and requirements/mlflow.txt, and runs these
"""

import json
import time

import pytest

from preference_training.tracking.dashboards.base import RunStart
from preference_training.tracking.dashboards.starting import start_dashboards
from preference_training.tracking.tracker import Tracker

CONFIG = {"wandb": {"project": "test", "entity": None}, "exp_name": "run", "lr": 0.5, "loss": {"name": "dpo"}}
ID = "0123456789abcdef" * 2
SAMPLES = [{"prompt": "a\n# b", "policy": "c"}]


def step(examples: int) -> dict:
    counters = {"counters/examples": examples, "counters/updates": examples // 4}
    return {"loss/train": 1 / examples, "lr": 0.5, "mfu": 0.25, "examples_per_second": 8.0} | counters


EVALUATION = {"loss/eval": 0.25, "loss/eval/low": 0.125, "counters/examples": 8, "counters/updates": 2}


def tracked(run_dir, name: str, first: int = 0) -> None:
    """Two steps and an evaluation of a run that has seen `first` examples."""
    run_dir.mkdir(exist_ok=True)

    def write_page():
        (run_dir / "report.html").write_text("<p>what happened</p>")
        return run_dir / "report.html"

    dashboards = start_dashboards([name], RunStart(CONFIG, run_dir, ID, first))
    assert len(dashboards) == 1
    with Tracker(run_dir, 8, 0, dashboards, write_page, first) as tracker:
        tracker.log_step(step(first + 4))
        tracker.log_samples(SAMPLES, first + 4)
        tracker.log_step(step(first + 8))
        tracker.log_evaluation(EVALUATION | {"counters/examples": first + 8})
    assert dashboards[0].dashboard is not None, "it was switched off on the way"


@pytest.fixture
def trackio_storage(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio.sqlite_storage

    return trackio.sqlite_storage.SQLiteStorage


def test_trackio_has_every_metric_at_its_examples_and_continues_a_run(trackio_storage, tmp_path):
    for first in (0, 8):
        tracked(tmp_path / "run", "trackio", first)
    [run] = trackio_storage.get_run_records("test")
    assert run["name"] == f"run-{ID[:8]}"
    logged = trackio_storage.get_logs("test", run["name"])
    losses = [(row["step"], row["loss/train"]) for row in logged if "loss/train" in row]
    assert losses == [(4, 1 / 4), (8, 1 / 8), (12, 1 / 12), (16, 1 / 16)]
    assert [row["loss/eval"] for row in logged if "loss/eval" in row] == [0.25, 0.25]
    assert all(row["mfu"] == 0.25 for row in logged if "lr" in row)
    [table, _] = [row["samples"] for row in logged if "samples" in row]
    assert "trackio.table" in json.dumps(table)
    assert trackio_storage.get_run_config("test", run["name"])["loss"] == {"name": "dpo"}


def test_mlflow_has_every_metric_at_its_examples_and_continues_a_run(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for first in (0, 8):
        tracked(tmp_path / "run", "mlflow", first)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["loss.name"] == "dpo"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert sorted((metric.step, metric.value) for metric in history) == [(n, 1 / n) for n in (4, 8, 12, 16)]
    assert {"mfu", "lr", "loss/eval", "loss/eval/low"} <= run.data.metrics.keys()
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"report.html", "samples"}


def test_a_server_of_mlflow_that_does_not_answer_holds_up_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:9")
    began = time.monotonic()
    assert start_dashboards(["mlflow"], RunStart(CONFIG, tmp_path, ID)) == []
    assert time.monotonic() - began < 60
    assert "mlflow: not used: API request to http://localhost:9" in capsys.readouterr().out
