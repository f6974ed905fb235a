"""Dashboards get what metrics.jsonl gets, under the same names, and end nothing when they fail."""

import json
import struct
import sys
import time
import types
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest

from preference_training.configuration.checks.run import TRACKING
from preference_training.core.errors import UserError
from preference_training.core.signals import STOPPED, StoppedError
from preference_training.tracking.dashboards.base import RunStart
from preference_training.tracking.dashboards.starting import DASHBOARDS, Guarded, start_dashboards
from preference_training.tracking.run_files import json_lines
from preference_training.tracking.tracker import Tracker

CONFIG = {"wandb": {"project": "test", "entity": None}, "exp_name": "run", "lr": 0.5}
ID = "0123456789abcdef" * 2


def step(examples: int) -> dict:
    return {"loss/train": 0.5, "examples_per_second": 8.0, "counters/examples": examples, "counters/updates": examples // 4}


SAMPLES = [{"prompt": "a\n# b", "policy": "c", "reference": "d"}]
EVALUATION = {"loss/eval": 0.25, "loss/eval/low": 0.125, "loss/eval/high": 0.5, "counters/examples": 8, "counters/updates": 2}


def tracked(run_dir: Path, names: list[str]) -> None:
    """A short run with a page, under some dashboards."""

    def write_page() -> Path:
        (run_dir / "report.html").write_text("<p>what happened</p>")
        return run_dir / "report.html"

    with Tracker(run_dir, 8, 0, start_dashboards(names, RunStart(CONFIG, run_dir, ID)), write_page) as tracker:
        tracker.log_step(step(4))
        tracker.log_samples(SAMPLES, 4)
        tracker.log_step(step(8))
        tracker.log_evaluation(EVALUATION)


class Failing:
    """A dashboard whose server is gone."""

    def log(self, row):
        raise OSError("no route to host")

    finish = log


# What a run may end with, and how dashboards are to show it.
ENDS = [
    (None, "FINISHED", 0),
    (RuntimeError("out of memory"), "FAILED", 1),
    (UserError("max_bad_steps: too many"), "FAILED", 1),
    (StoppedError("stopped after 8 examples: SIGTERM"), "KILLED", STOPPED),
]


def ended(run_dir: Path, name: str, error: Exception | None) -> None:
    """A run that has ended with an error, or None, under a dashboard."""
    dashboards = start_dashboards([name], RunStart(CONFIG, run_dir, ID))
    with suppress(type(error) if error else ()), Tracker(run_dir, 8, dashboards=dashboards) as tracker:
        tracker.log_step(step(8))
        if error is not None:
            raise error


def test_a_dashboard_that_fails_is_left_alone_after_one_line(tmp_path, capsys):
    with Tracker(tmp_path, total=8, min_interval=0, dashboards=[Guarded("wandb", Failing())]) as tracker:
        tracker.log_step(step(4))
        tracker.log_step(step(8))
        tracker.log_samples(SAMPLES, 8)
    assert len(list(json_lines(tmp_path / "metrics.jsonl"))) == 2
    assert capsys.readouterr().out.count("wandb: switched off for the rest of this run: no route to host") == 1


def test_every_dashboard_is_a_name_that_tracking_may_have():
    assert {"jsonl", *DASHBOARDS} == set(TRACKING)


# ---- wandb --------------------------------------------------------------------------------------------------------------


def wandb_records(run_dir: Path) -> list:
    """What an offline run has left for `wandb sync`: records in LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    data, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def test_an_offline_wandb_run_has_configuration_metrics_tables_summary_and_report(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    tracked(tmp_path, ["wandb"])
    # wandb's own process writes, and may be behind.
    deadline, records = time.monotonic() + 60, []
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline
        records = wandb_records(tmp_path)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == (ID, "test", "run")
    assert {item.key: item.value_json for item in run.config.update}["lr"] == "0.5"
    logged = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    for row in (step(4), step(8), EVALUATION):
        assert any(row.items() <= found.items() for found in logged), row
    summary = {}
    for record in records:
        summary |= {"/".join(item.nested_key) or item.key: item.value_json for item in record.summary.update}
    assert {name: json.loads(summary[name]) for name in EVALUATION} == EVALUATION
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    assert json.loads(table.read_text())["data"] == [list(SAMPLES[0].values())]
    artifacts = {record.artifact.type: record.artifact for record in records if record.HasField("artifact")}
    (entry,) = artifacts["report"].manifest.contents
    (tmp_path / "report.html").write_text("<p>made anew</p>")
    assert entry.path == "report.html" and Path(entry.local_path).read_text() == "<p>what happened</p>"


@pytest.fixture
def wandb_calls(monkeypatch):
    """Stand in for wandb: the modes in which runs were started, and the statuses with which they were finished."""
    modes, statuses = [], []

    def init(mode, **_):
        modes.append(mode)
        ignore = lambda *_, **__: None  # noqa: E731
        return types.SimpleNamespace(define_metric=ignore, log=ignore, finish=lambda exit_code=None: statuses.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **_: None))
    return modes, statuses


@pytest.mark.parametrize(("error", "_", "status"), ENDS)
def test_wandb_is_told_how_a_run_has_ended(error, _, status, tmp_path, wandb_calls):
    ended(tmp_path, "wandb", error)
    assert wandb_calls[1] == [status]


@pytest.mark.parametrize("key", ["", "k" * 40])
def test_wandb_that_was_asked_to_be_offline_says_so_with_a_key_or_without(key, tmp_path, wandb_calls, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    ended(tmp_path, "wandb", None)
    out = capsys.readouterr().out
    assert wandb_calls[0] == ["offline"] and "wandb: offline, as WANDB_MODE says; files in" in out and "no key" not in out


def test_without_a_key_wandb_writes_offline_and_says_so(tmp_path, capsys, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with Tracker(tmp_path, total=4, dashboards=start_dashboards(["wandb"], RunStart(CONFIG, tmp_path, ID))) as tracker:
        tracker.log_step(step(4))
        tracker.log_samples(SAMPLES, 4)
    assert capsys.readouterr().out.count("wandb: offline, as there is no key; files in") == 1
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_falls_back_to_offline_where_its_server_does_not_answer(tmp_path, capsys, monkeypatch):
    modes = []

    def init(mode, **_):
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("no answer")
        return types.SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **_: None))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert len(start_dashboards(["wandb"], RunStart(CONFIG, tmp_path, ID))) == 1
    assert modes == ["online", "offline"]
    assert "wandb: offline, as its server could not be used: no answer" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_what_wandb_says_of_a_key_is_printed_without_it(mode, tmp_path, capsys, monkeypatch):
    def init(**_):
        raise ValueError("\x1b[31mkey verysecret is malformed")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **_: None))
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    monkeypatch.setenv("WANDB_MODE", mode)
    assert start_dashboards(["wandb"], RunStart(CONFIG, tmp_path, ID)) == []
    out = capsys.readouterr().out
    assert "wandb: not used: key (the key) is malformed" in out and "verysecret" not in out and "\x1b" not in out


def test_wandb_without_a_place_for_its_files_ends_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb").symlink_to("/dev/full")
    with Tracker(tmp_path, total=4, dashboards=start_dashboards(["wandb"], RunStart(CONFIG, tmp_path, ID))) as tracker:
        tracker.log_step(step(4))
    assert len(list(json_lines(tmp_path / "metrics.jsonl"))) == 1
    assert capsys.readouterr().out.count("4/4 loss") == 1


@pytest.mark.parametrize("fault", [ImportError("no wandb"), RuntimeError("broken")])
def test_a_broken_wandb_is_not_used_and_ends_nothing(tmp_path, capsys, monkeypatch, fault):
    def init(**_):
        raise fault

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **_: None))
    assert start_dashboards(["wandb"], RunStart(CONFIG, tmp_path, ID)) == []
    assert "wandb: not used" in capsys.readouterr().out


# ---- TensorBoard --------------------------------------------------------------------------------------------------------


def read_tensorboard(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_has_every_metric_under_its_name_at_its_examples_and_the_samples_as_they_are(tmp_path):
    tracked(tmp_path, ["tensorboard"])
    found = read_tensorboard(tmp_path)
    names = {*step(4), *EVALUATION} - {"counters/examples"}
    assert set(found.Tags()["scalars"]) == names
    assert [(event.step, event.value) for event in found.Scalars("loss/train")] == [(4, 0.5), (8, 0.5)]
    assert [(event.step, event.value) for event in found.Scalars("loss/eval/high")] == [(8, 0.5)]
    (sample,) = found.Tensors("samples/0/text_summary")
    text = sample.tensor_proto.string_val[0].decode()
    assert sample.step == 4 and "**prompt**\n\n    a\n    # b\n\n**policy**\n\n    c" in text
    (config,) = found.Tensors("config/text_summary")
    assert "    lr: 0.5\n" in config.tensor_proto.string_val[0].decode()


def test_tensorboard_forgets_what_came_behind_the_checkpoint_that_a_run_goes_on_from(tmp_path):
    tracked(tmp_path, ["tensorboard"])
    (dashboard,) = start_dashboards(["tensorboard"], RunStart(CONFIG, tmp_path, ID, 4))
    with Tracker(tmp_path, 8, 0, [dashboard], examples=4) as tracker:
        tracker.log_step(step(12))
    assert [event.step for event in read_tensorboard(tmp_path).Scalars("loss/train")] == [4, 12]


def test_tensorboard_without_a_place_for_its_files_ends_nothing(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    with Tracker(tmp_path, 4, dashboards=start_dashboards(["tensorboard"], RunStart(CONFIG, tmp_path, ID))) as tracker:
        tracker.log_step(step(4))
    assert capsys.readouterr().out.count("tensorboard: not used") == 1


# ---- Trackio and MLflow ---------------------------------------------------------------------------------------------------
# Neither is installed here: these are stand-ins with the signatures of the real ones, which tests_apart/trackers/ runs with.


class TrackioStandIn(types.ModuleType):
    """What the dashboard uses of Trackio, and what it is told."""

    def __init__(self):
        super().__init__("trackio")
        self.started, self.logged, self.artifacts, self.finished = [], [], [], 0

    def init(self, project, name=None, config=None, resume="never", embed=True, auto_log_gpu=None, auto_log_cpu=None):
        print("* Trackio project initialized")
        self.started.append((project, name, config, resume))
        return types.SimpleNamespace(name=name, log=self.log, log_artifact=self.log_artifact, finish=self.finish)

    def log(self, metrics, step=None):
        self.logged.append((metrics, step))

    def log_artifact(self, artifact_or_path, name=None, type=None):
        self.artifacts.append((artifact_or_path, name, type))

    def finish(self):
        print("* Run finished")
        self.finished += 1

    class Table:
        def __init__(self, columns=None, data=None):
            self.columns, self.data = columns, data


def test_trackio_gets_metrics_tables_and_the_report_and_prints_one_line(tmp_path, monkeypatch, capsys):
    trackio = TrackioStandIn()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    tracked(tmp_path, ["trackio"])
    assert trackio.started == [("test", f"run-{ID[:8]}", CONFIG, "allow")] and trackio.finished == 1
    assert [(row, examples) for row, examples in trackio.logged if "samples" not in row] == [
        (step(4), 4), (step(8), 8), (EVALUATION, 8),
    ]  # fmt: skip
    [(row, examples)] = [logged for logged in trackio.logged if "samples" in logged[0]]
    assert (row["samples"].columns, row["samples"].data, examples) == (list(SAMPLES[0]), [list(SAMPLES[0].values())], 4)
    assert trackio.artifacts == [(str(tmp_path / "report.html"), f"report-run-{ID[:8]}", "report")]
    out = capsys.readouterr().out
    assert out.count("trackio") == 2 and "* " not in out and "`trackio show --project test` shows it" in out


class MlflowStandIn:
    """What the dashboard uses of MLflow's client, and what it is told."""

    runs: ClassVar[dict[str, dict]] = {}

    def __init__(self, tracking_uri=None):
        self.uri, self.experiments = tracking_uri, {}

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, artifact_location=None):
        self.experiments[name] = types.SimpleNamespace(experiment_id=name)
        return name

    def search_runs(self, experiment_ids, filter_string="", max_results=1000):
        found = [id for id, run in self.runs.items() if filter_string == f"tags.`{run['tag']}` = '{run['value']}'"]
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=id)) for id in found]

    def create_run(self, experiment_id, run_name=None, tags=None):
        ((tag, value),) = tags.items()
        run_id = str(len(self.runs))
        self.runs[run_id] = {"tag": tag, "value": value, "params": {}, "metrics": [], "files": {}, "status": "RUNNING"}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status=None):
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id, metrics=(), params=()):
        self.runs[run_id]["params"] |= dict(params)
        self.runs[run_id]["metrics"] += metrics

    def log_dict(self, run_id, dictionary, artifact_file):
        self.runs[run_id]["files"][artifact_file] = dictionary

    def log_artifact(self, run_id, local_path):
        self.runs[run_id]["files"][Path(local_path).name] = Path(local_path).read_text()

    def set_terminated(self, run_id, status=None):
        self.runs[run_id]["status"] = status or "FINISHED"


@pytest.fixture
def mlflow_runs(monkeypatch):
    """Stand in for MLflow: its runs by their ids."""
    entities = types.SimpleNamespace(Metric=lambda *values: values, Param=lambda *values: values)
    monkeypatch.setattr(MlflowStandIn, "runs", {})
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=MlflowStandIn))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return MlflowStandIn.runs


@pytest.mark.parametrize(("error", "status", "_"), ENDS)
def test_mlflow_is_told_how_a_run_has_ended(error, status, _, tmp_path, mlflow_runs):
    ended(tmp_path, "mlflow", error)
    [run] = mlflow_runs.values()
    assert run["status"] == status


def test_mlflow_gets_configuration_metrics_tables_and_the_report_and_continues_a_run(tmp_path, mlflow_runs, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for _ in range(2):
        tracked(run_dir, ["mlflow"])
    [run] = mlflow_runs.values()
    assert run["params"]["wandb.project"] == "test" and run["params"]["lr"] == "0.5" and run["status"] == "FINISHED"
    logged = [(name, value, at) for name, value, _, at in run["metrics"]]
    rows = [(step(4), 4), (step(8), 8), (EVALUATION, 8)]
    assert logged == 2 * [(name, value, at) for row, at in rows for name, value in row.items()]
    assert run["files"]["samples/4.json"] == {"columns": list(SAMPLES[0]), "data": [list(SAMPLES[0].values())]}
    assert run["files"]["report.html"] == "<p>what happened</p>"
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow/mlflow.db" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["trackio", "mlflow", "tensorboard"])
def test_a_dashboard_whose_package_is_missing_says_what_installs_it(name, tmp_path, monkeypatch, capsys):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    assert start_dashboards([name], RunStart(CONFIG, tmp_path, ID)) == []
    assert capsys.readouterr().out.endswith(f". pip install -r requirements/{name}.txt\n")
