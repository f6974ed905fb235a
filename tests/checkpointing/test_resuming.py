"""Which checkpoint a run goes on from, whether it is the same run, and what becomes of what came after the checkpoint."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import evaluation_batches
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing import resume as resuming
from preference_training.checkpointing.checkpoint import Checkpoint, DamagedError, find_damage
from preference_training.checkpointing.resume import (
    check_same_run,
    checkpoint_to_resume,
    find_run,
    resumable,
    roll_back,
)
from preference_training.checkpointing.state import NEWER_STATE_SHAPE, STATE_SHAPE
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.configuration.keys import MAY_CHANGE_ON_RESUME, is_within
from preference_training.configuration.schema import keys_with
from preference_training.core.errors import UserError
from preference_training.core.values import find_mismatch
from preference_training.data.prompt_table import PromptTable
from preference_training.data.rendering.settings import VERSION
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference
from preference_training.sweeps.jobs import job_identity
from preference_training.tracking.tracker import Tracker
from tests.support.building import build_trainer
from tests.support.files import GOLDEN

LENGTHS = ("max_length=32", "max_prompt_length=16")
MOMENT = "2026-01-02_03-04-05-000006"
ABOUT = {"config": {"seed": 0}, "data": ["a", "b"], "began_with": "c", "wandb_id": "0123456789abcdef" * 2, "versions": {}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compose, tokenizer) -> Path:
    """The run directory of a beta-DPO run of three steps, each with a checkpoint: step-4, step-8 and step-12."""
    run_dir = tmp_path_factory.mktemp("runs") / f"run_{MOMENT}"
    run_dir.mkdir()
    config = compose(
        "batch_size=4",
        "eval_every=4",
        "warmup_steps=1",
        "n_examples=12",
        *LENGTHS,
        "optimizer=AdamW",
    )
    prompts = PromptTable.of(TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0], [12 + n, 0]], [(0, 1)]) for n in range(12))
    policy = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32)
    reference = LiveReference(copy.deepcopy(policy))
    loss = build_loss("dpo", mode_loss="beta_DPO", mode_weight=0.2, a=0.6)
    with (
        Tracker(run_dir, 12) as tracker,
        CheckpointWriter(run_dir, policy, tokenizer, options=SaveOptions(run=ABOUT)) as writer,
    ):
        batches = (
            BatchIterator(Schedule(prompts, 4, length=RunLength(n_examples=12))),
            evaluation_batches(prompts, 4, 4, seed=0),
        )
        parts = {"train": batches[0], "held_out": batches[1], "sample_prompts": [[5, 6, 7]]}
        build_trainer(config, policy, loss, reference, tokenizer=tokenizer, tracker=tracker, writer=writer, **parts).train()
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name, symlinks=True))


def fault_of_state(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a checkpoint; None where it can."""
    try:
        resumable(checkpoint)
    except DamagedError as fault:
        return str(fault)


def forge(checkpoint: Path, content: str) -> None:
    """Write another state.json, and checksums that agree with it."""
    (checkpoint / "state.json").write_text(content)
    listed = json.loads((checkpoint / "checksums.json").read_text())
    listed["state.json"] = {"bytes": len(content.encode()), "xxh3_128": xxhash.xxh3_128_hexdigest(content.encode())}
    (checkpoint / "checksums.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "state",
    [
        {"shift": 0.5},
        {"shift": None},
        {},
        {"own": {"mean": 0.5, "seen": 3}},
        {"mean": None, "deviation": 0.5, "draws": torch.zeros(1)},
    ],
)
def test_what_a_loss_remembers_is_of_the_shape_that_a_checkpoint_may_have(state):
    assert find_mismatch(state, STATE_SHAPE["loss"], "loss") is None


@pytest.mark.parametrize("state", [{"shift": "0.5"}, {"shift": [0.5]}, {"own": 3}, {"mean": 0.5}, [], None])
def test_what_no_loss_remembers_is_damage(state):
    assert find_mismatch(state, STATE_SHAPE["loss"], "loss") == "loss"


# ---- the checkpoint that `resume` means -----------------------------------------------------------------------------------


def test_without_resume_a_new_run_begins(run_dir):
    assert checkpoint_to_resume(None, run_dir, "run") is None


def test_auto_takes_the_newest_checkpoint_of_the_experiment(run_dir, capsys):
    new = run_dir.with_name("run_2026-02-02_03-04-05-000006")
    new.mkdir()
    assert checkpoint_to_resume("auto", new, "run").path == run_dir / "step-12"
    assert f"resume: continuing from {run_dir / 'step-12'}" in capsys.readouterr().out


def test_auto_takes_a_run_directory_that_was_named_before_any_other(run_dir):
    own = Path(shutil.copytree(run_dir, run_dir.with_name("own"), symlinks=True))
    assert checkpoint_to_resume("auto", own, "run").path == own / "step-12"


def test_auto_takes_the_newest_run_that_has_a_checkpoint(run_dir):
    newer = Path(shutil.copytree(run_dir, run_dir.with_name("run_2026-01-03_00-00-00-000000"), symlinks=True))
    # The newest run of all was killed before its first checkpoint.
    newest = run_dir.with_name("run_2026-01-04_00-00-00-000000")
    newest.mkdir()
    run_dir.with_name("run_2026-01-05_00-00-00-000000").write_text("a file")
    assert checkpoint_to_resume("auto", newest, "run").path == newer / "step-12"


@pytest.mark.parametrize("name", ["ru", "run_", "run_2", "run_2026", "r*", "ru?", "[r]un", "*", "", "RUN", "run\\"])
def test_auto_never_takes_the_run_of_an_experiment_whose_name_is_alike(name, run_dir, capsys):
    assert checkpoint_to_resume("auto", run_dir.with_name("new"), name) is None
    assert f"resume: no checkpoint of {name} yet, starting a new run" in capsys.readouterr().out


NAMES = st.text("ab_*?[]!.-2 ", max_size=4) | st.sampled_from(["run", f"run_{MOMENT}", "run_2"])


@given(own=NAMES, others=st.lists(NAMES, max_size=3))
@example(own="run", others=[f"run_{MOMENT}", "run_2"])
@example(own="[a]", others=["a", "b"])
def test_auto_finds_an_experiments_own_run_among_any_others(own, others):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(resuming, "newest_usable", lambda run, **_: Checkpoint(run, {}) if (run / "step-1").is_dir() else None)
        for name in {*others} - {own}:
            (Path(folder) / f"{name}_2027-01-02_03-04-05-000006" / "step-1").mkdir(parents=True)
        new = Path(folder) / "new"
        assert checkpoint_to_resume("auto", new, own) is None
        (Path(folder) / f"{own}_{MOMENT}" / "step-1").mkdir(parents=True)
        assert checkpoint_to_resume("auto", new, own).path == Path(folder) / f"{own}_{MOMENT}"


@pytest.mark.parametrize(("given", "found"), [(".", "step-12"), ("LATEST", "step-12"), ("step-4", "step-4")])
def test_a_path_names_a_run_directory_or_a_checkpoint(given, found, run_dir, tmp_path):
    assert checkpoint_to_resume(str(run_dir / given), tmp_path / "new", "other").path == run_dir / found


def test_a_damaged_checkpoint_is_passed_over_by_its_run_and_refused_by_its_name(run_dir, tmp_path, capsys):
    (run_dir / "step-12" / "model.safetensors").write_bytes(b"damaged")
    assert checkpoint_to_resume(str(run_dir), tmp_path / "new", "run").path == run_dir / "step-8"
    assert checkpoint_to_resume("auto", tmp_path / "runs" / "new", "run").path == run_dir / "step-8"
    assert capsys.readouterr().out.count("step-12 is skipped: model.safetensors is not what was written") == 2
    with pytest.raises(UserError, match=r"resume: .*step-12: model.safetensors is not what was written. Expected a run dir"):
        checkpoint_to_resume(str(run_dir / "step-12"), tmp_path / "new", "run")


def test_a_path_without_a_usable_checkpoint_is_refused_with_the_reason(run_dir, tmp_path):
    def told(path: Path) -> str:
        with pytest.raises(UserError) as refused:
            checkpoint_to_resume(str(path), tmp_path / "new", "run")
        return str(refused.value)

    run_dir.joinpath("step-4").rename(run_dir / "my-best")
    assert "my-best: its name is no longer step-N." in told(run_dir / "my-best")
    for checkpoint in run_dir.glob("step-*"):
        (checkpoint / "state.json").unlink()
    assert told(run_dir).startswith(f"resume: {run_dir}: none of its checkpoints is intact. Expected")
    assert "absent: no such directory. Expected a run directory or a checkpoint (step-N), or auto." in told(tmp_path / "absent")
    assert "checksums.json is missing or damaged" in told(tmp_path)


# ---- a state.json that is damaged -----------------------------------------------------------------------------------------


def test_what_a_run_writes_has_no_fault(finished):
    assert [fault_of_state(finished / f"step-{examples}") for examples in (4, 8, 12)] == [None] * 3


def paths_in(value, above: tuple = ()) -> list[tuple]:
    """The way to every value inside one: all of a dict's, the first of a list's."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*above, key), *paths_in(inner, (*above, key)))]


def free(path: tuple) -> bool:
    """Whether a value may be anything: what is only compared, said, or not looked at."""
    return (path[:2] in (("run", "config"), ("run", "versions")) and len(path) > 2) or path == ("run", "versions")


def test_a_value_of_another_kind_anywhere_in_state_json_is_a_fault_of_the_checkpoint(run_dir):
    checkpoint = run_dir / "step-12"
    state = json.loads((checkpoint / "state.json").read_text())
    paths = [path for path in paths_in(state) if not free(path)]
    assert len(paths) > 60 and {("loss", "draws"), ("watch", "newest", "loss/train", 0), ("random", 0, "torch")} < {*paths}
    for path in paths:
        damaged = copy.deepcopy(state)
        place = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = ["no"] if isinstance(place[path[-1]], dict) else {"no": ["such"]}
        forge(checkpoint, json.dumps(damaged))
        assert find_damage(checkpoint) is None, "its checksums agree"
        assert fault_of_state(checkpoint).startswith("state.json is damaged ("), path


def test_a_value_missing_from_state_json_is_a_fault_of_the_checkpoint(run_dir):
    checkpoint = run_dir / "step-12"
    state = json.loads((checkpoint / "state.json").read_text())
    for key in state.keys() - NEWER_STATE_SHAPE:
        forge(checkpoint, json.dumps({name: value for name, value in state.items() if name != key}))
        assert fault_of_state(checkpoint) == f"state.json is damaged (state.{key})"


def test_a_checkpoint_of_a_version_that_did_not_write_all_of_todays_values_is_sound(run_dir):
    checkpoint = run_dir / "step-12"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state.keys() >= set(NEWER_STATE_SHAPE)
    forge(checkpoint, json.dumps({name: value for name, value in state.items() if name not in NEWER_STATE_SHAPE}))
    assert fault_of_state(checkpoint) is None


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, "9" * 10_000, '{"base64": 5}', '{"base64": "?"}'])
def test_a_state_json_that_is_none_is_passed_over_for_the_next_older_checkpoint(content, run_dir, tmp_path, capsys):
    forge(run_dir / "step-12", content)
    assert checkpoint_to_resume(str(run_dir), tmp_path, "run").path == run_dir / "step-8"
    assert "step-12 is skipped: state.json is damaged (" in capsys.readouterr().out


@pytest.mark.parametrize("run_id", ["../../elsewhere", "0" * 31, "A" * 32, 5])
def test_the_name_of_a_wandb_run_is_not_taken_from_a_state_json_unchecked(run_id, run_dir):
    state = json.loads((run_dir / "step-12" / "state.json").read_text())
    state["run"]["wandb_id"] = run_id
    forge(run_dir / "step-12", json.dumps(state))
    assert fault_of_state(run_dir / "step-12") == "state.json is damaged (state.run.wandb_id)"


# ---- the same run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def same_run(tmp_path):
    """Whether a run may go on: `same_run(then, now)`, each what a run is made of; returns the refusal, or None."""

    def asked(then: dict, now: dict) -> str | None:
        try:
            check_same_run(Checkpoint(tmp_path, {"run": then}), now)
        except UserError as refused:
            return str(refused)

    return asked


def made_of(**config) -> dict:
    return ABOUT | {"config": config}


@pytest.mark.parametrize(("average", "goes_on"), [("responses", True), ("tokens", False)])
def test_a_run_of_before_a_key_goes_on_with_its_default_and_with_nothing_else(average, goes_on, same_run):
    refusal = same_run(made_of(loss={"name": "sft"}), made_of(loss={"name": "sft", "average": average}))
    assert (refusal is None) is goes_on
    assert goes_on or "loss.average: was 'responses', is 'tokens'" in refusal


def test_a_run_with_a_path_in_the_home_directory_goes_on(same_run):
    then, now = ({"chat_template": path} for path in ("~/chat.jinja", str(Path.home() / "chat.jinja")))
    assert same_run(made_of(model=then), made_of(model=now)) is None
    assert same_run(made_of(model=then), made_of(model={"chat_template": "/chat.jinja"})) is not None


def test_a_job_is_what_it_was_before_there_was_a_key_that_has_its_default():
    before, usual, other = ({"loss": {"name": "sft"} | more} for more in ({}, {"average": "responses"}, {"average": "tokens"}))
    assert job_identity(before) == job_identity(usual) != job_identity(other)


def test_a_run_that_was_configured_otherwise_is_refused_with_every_key_that_differs(same_run):
    told = same_run(made_of(lr=1.0, loss={"name": "dpo", "beta": 0.1}, old=1), made_of(lr=2.0, loss={"name": "dpo"}, new=None))
    assert "belongs to a run with another configuration: loss.beta: was 0.1, is null; lr: was 1.0, is 2.0; old: was 1" in told
    assert told.endswith("Start a new run from it with model.archive, or restore the old value.")
    assert "\n" not in told


def test_of_another_loss_its_name_alone_is_told_and_not_the_keys_that_it_has(same_run):
    then, now = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}, {"name": "simpo", "beta": 2.0, "gamma": 0.5}
    told = same_run(made_of(loss=then, seed=1), made_of(loss=now, seed=2))
    assert "another configuration: loss.name: was 'dpo', is 'simpo'; seed: was 1, is 2. Start" in told


def test_a_run_that_cannot_be_resumed_is_refused_before_its_data_is_prepared(run_dir, tmp_path, compose, monkeypatch):
    from preference_training.training import preparation

    monkeypatch.setattr(preparation, "prepare_data", lambda *_: pytest.fail("it was prepared"))
    with pytest.raises(UserError, match="belongs to a run with another configuration: .*lr: was"):
        preparation.prepare_run(compose("lr=0.5", f"resume={run_dir}"), tmp_path)
    with pytest.raises(UserError, match="^resume: .*no such directory"):
        preparation.prepare_run(compose(f"resume={tmp_path / 'missing'}"), tmp_path)


@pytest.mark.parametrize(
    ("key", "told"),
    [("data", "resume: datasets: the prepared data are not"), ("began_with", "resume: model: the weights that it began with")],
)
def test_a_run_on_other_data_or_other_weights_is_refused(key, told, same_run):
    assert same_run(ABOUT, ABOUT) is None
    assert same_run(ABOUT, ABOUT | {key: ["others"]}).startswith(told)


def test_a_run_that_says_no_version_of_its_data_began_with_the_first(finished, run_dir, tmp_path, same_run):
    new = tmp_path / "new"
    assert find_run(None, new, "run") is None
    assert find_run("auto", tmp_path / "elsewhere" / "new", "run") is None
    for resume in ("auto", str(run_dir), str(run_dir / "step-8"), str(run_dir / "LATEST")):
        assert find_run(resume, run_dir.with_name("new"), "run").data_version == 1
    assert same_run(ABOUT, ABOUT | {"data_version": 1}) is None
    assert same_run(ABOUT, ABOUT | {"data_version": 2}).startswith("resume: the data of ")


def test_the_version_of_the_data_is_that_of_the_newest_checkpoint_whose_state_is_whole(run_dir):
    for step, version in (("step-4", 7), ("step-8", 5)):
        state = json.loads((run_dir / step / "state.json").read_text())
        state["run"]["data_version"] = version
        forge(run_dir / step, json.dumps(state))
    assert find_run(str(run_dir), run_dir, "run").data_version == 1
    forge(run_dir / "step-12", "{")
    assert find_run("auto", run_dir.with_name("new"), "run").data_version == 5
    assert find_run(str(run_dir / "step-4"), run_dir, "run").data_version == 7


def test_a_version_of_the_data_that_this_code_does_not_know_is_refused_and_an_old_one_is_said(run_dir, capsys):
    from preference_training.training import preparation

    def version_of_run() -> int:
        return preparation.data_version(find_run(str(run_dir), run_dir, "run"))

    assert preparation.data_version(None) == VERSION
    assert version_of_run() == 1
    assert (
        "resume: the data stays as at the start of the run, by version 1 of the rules: a prompt is held"
        in capsys.readouterr().out
    )
    state = json.loads((run_dir / "step-12" / "state.json").read_text())
    state["run"]["data_version"] = VERSION + 1
    forge(run_dir / "step-12", json.dumps(state))
    with pytest.raises(UserError, match=f"by version {VERSION + 1} of the rules, and this code knows those up to {VERSION}"):
        version_of_run()


def test_ranks_that_have_prepared_other_data_stop_before_they_train():
    from preference_training.training import preparation

    class TwoRanks:
        def all_gather_object(self, value):
            return [value, value if self.alike else ["other"]]

    ranks, data = TwoRanks(), (SimpleNamespace(table=PromptTable([])),)
    ranks.alike = True
    preparation.check_same_data(data, ranks)
    ranks.alike = False
    with pytest.raises(UserError, match="datasets: ranks 1 have prepared other data than rank 0"):
        preparation.check_same_data(data, ranks)


@pytest.mark.parametrize("trainer", ["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"])
def test_every_key_may_differ_between_two_starts_of_a_run_or_is_refused_by_its_name(trainer, compose, same_run):
    config = compose("loss=dpo", f"trainer={trainer}")
    then = config.as_dict()
    sections = [name for name, value in then.items() if isinstance(value, dict) and value]
    keys = [name for name in then if name not in sections] + [f"{name}.{key}" for name in sections for key in then[name]]
    refused = set()
    for key in keys:
        now = copy.deepcopy(then)
        *above, last = key.split(".")
        (now[above[0]] if above else now)[last] = "another"
        told = same_run(ABOUT | {"config": then}, ABOUT | {"config": now})
        assert told is None or f"configuration: {key}: was" in told or f"; {key}: was" in told or f" {key}." in told, key
        refused |= {key} if told else set()
    assert {key for key in keys if key not in refused} == {
        key for key in keys if is_within(key, keys_with(MAY_CHANGE_ON_RESUME))
    }
    # What decides the numbers of a run.
    assert {"seed", "batch_size", "gradient_accumulation_steps", "datasets", "lr", "warmup_steps", "optimizer"} <= refused
    assert {"max_grad_norm", "max_length", "optimizer_kwargs", "loss.beta", "model.archive", "model.policy_dtype"} <= refused


# ---- what came after the checkpoint ---------------------------------------------------------------------------------------


def test_rows_and_checkpoints_behind_the_checkpoint_are_taken_away_or_set_aside(run_dir):
    aside = run_dir / "step-12.set-aside"
    aside.mkdir()
    (aside / "of an earlier time").touch()
    (run_dir / "step-16.partial").mkdir()
    (run_dir / "bad_batches.jsonl").write_text('{"counters/examples": 8}\n{"counters/examples": 9}\n')
    before = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    roll_back(run_dir, run_dir / "step-8")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [row for row in before if row["counters/examples"] <= 8] and len(rows) < len(before)
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["examples"] for row in samples] == [0, 4, 8]
    assert (run_dir / "bad_batches.jsonl").read_text() == '{"counters/examples": 8}\n'
    assert {path.name for path in run_dir.glob("step-*")} == {"step-4", "step-8", "step-12.set-aside"}
    assert (aside / "state.json").is_file() and not (aside / "of an earlier time").exists()


KEPT = {"examples": 8, "policy": "one\u2028two\x85three é 👋"}


@pytest.mark.parametrize(
    "end",
    [
        b"",
        b'{"examples": 8, "poli',
        b'{"examples": 8, "policy": "\xc3',
        b"5\n",
        b'"x"\n',
        b"null\n",
        b"\0\0\0\0",
        b'{"examples": "8"}\n',
        b"[" * 100_000,
        b"\n\n",
    ],
    ids=["whole", "half a row", "half a letter", "number", "text", "null", "zeros", "no count", "deep", "empty lines"],
)
def test_half_a_row_is_taken_away_and_whole_ones_stay_as_they_are(end, tmp_path):
    (tmp_path / "step-8").mkdir()
    row = json.dumps(KEPT, ensure_ascii=False).encode() + b"\n"
    (tmp_path / "samples.jsonl").write_bytes(row + end)
    roll_back(tmp_path, tmp_path / "step-8")
    assert (tmp_path / "samples.jsonl").read_bytes() == row
    assert {path.name for path in tmp_path.iterdir()} == {"samples.jsonl", "LATEST", "step-8"}


def test_a_whole_row_without_its_line_end_gets_one(tmp_path):
    (tmp_path / "step-8").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"counters/examples": 4}\n{"counters/examples": 8}')
    roll_back(tmp_path, tmp_path / "step-8")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"counters/examples": 4}\n{"counters/examples": 8}\n'
