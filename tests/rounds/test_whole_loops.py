"""Whole loops: sharded and by the user's own presets, with a reference that moves, from Python, and in dashboards."""

import errno
import json
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from preference_training.core.errors import UserError
from preference_training.core.signals import StoppedError
from preference_training.reporting.loops.findings import loop_findings
from preference_training.reporting.loops.record import LoopRecord
from preference_training.rounds import start, tables
from preference_training.rounds.driver import run_loop
from preference_training.rounds.loop import Loop
from preference_training.rounds.processes import StepFailedError
from preference_training.rounds.training import reference_moves
from tests.rounds import loops
from tests.support.files import ROOT
from utils import compose, train

OWN = {"loss": "defaults: [dpo, _self_]\nbeta: 0.05\n", "model": "# @package _global_\ndefaults: [tiny, _self_]\nseed: 3\n"}


@pytest.mark.campaign
def test_a_sharded_loop_under_presets_of_the_users_own_samples_and_trains_as_one_process_does(folder):
    """A round by the command line: sampling in two processes, training sharded over two, presets from a folder."""
    for group, text in OWN.items():
        (folder / "my" / group).mkdir(parents=True)
        (folder / "my" / group / "mine.yaml").write_text(text)
    given = [text.replace("model=tiny", "model=mine") for text in loops.overrides(folder, "loss=mine", "lr=1e-2")]
    sharded = ("rounds.rounds=1", "rounds.sampler_processes=2", "trainer=FSDPTrainer", "trainer.nproc_per_node=2")
    command = [sys.executable, str(ROOT / "train.py"), "--config-dir", "my", *given, *sharded]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round-1: sampling in 2 processes" in done.stdout
    loop = Loop.open(folder / "loop")
    assert (loop.config.loss.beta, loop.config.seed) == (0.05, 3)
    alone = compose("--config-dir=my", *given, f"local_run_dir={folder / 'alone'}", "rounds.rounds=1")
    alone = Loop.start(folder / "alone", alone)
    (folder / "alone" / "prompts.parquet").symlink_to(folder / "loop" / "prompts.parquet")
    loops.run(alone)
    for name in ("samples.parquet", "held_out_samples.parquet", "pairs.parquet"):
        assert (loop.round(1).directory / name).read_bytes() == (alone.round(1).directory / name).read_bytes()
    one, other = (load_file(each.round(1).policy / "model.safetensors") for each in (loop, alone))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        # Sums in another order, in steps of lr 0.01.
        torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-4)
    assert loop.round(2).is_done("summarize") and len((loop.directory / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.long
def test_a_moving_reference_follows_the_policy_within_a_round_and_begins_each_round_as_it(folder, capsys):
    """With a share of 1 it is the policy itself as of the last update that moves it; each round counts its own updates."""
    given = ("loss=tr_dpo", "rounds.reference=moving", "loss.reference_update_share=1", "lr=1e-2", "n_epochs=2")
    loop = loops.start(folder, *given, "loss.reference_update_every=2")
    loops.run(loop)
    said = capsys.readouterr().out
    for files in (loop.round(1), loop.round(2)):
        rows = [json.loads(line) for line in (files.run / "metrics.jsonl").read_text().splitlines()]
        # Each round's policy is its own reference at the beginning.
        assert rows[0]["rewards_eval/margins"] == 0
        updates = rows[-1]["counters/updates"]
        assert updates % 2 == 0
        assert f"{files.name}: its reference moved {updates // 2} times towards the policy, every 2 updates" in said
        policy = load_file(files.policy / "model.safetensors")
        reference = {k: v for file in (files.policy / "reference").glob("*") for k, v in load_file(file).items()}
        assert reference.keys() == policy.keys()
        for name, weight in reference.items():
            assert torch.equal(weight, policy[name])
    assert "compared with a reference that begins as it and follows it" in said
    assert "reference" not in [finding.kind for finding in loop_findings(LoopRecord.read(loop.directory))]


def test_a_reference_that_had_no_time_to_move_is_told(tmp_path):
    files = Loop(tmp_path, compose("+rounds=default", "rounds.prompts=x.jsonl", "rounds.judge=toy"), {}).round(1)
    files.run.mkdir(parents=True)
    (files.run / "metrics.jsonl").write_text(
        json.dumps({"counters/examples": 72, "counters/updates": 9, "loss/train": 1}) + "\n"
    )
    assert reference_moves(files, 4) == "its reference moved 2 times towards the policy, every 4 updates"
    told = "its reference never moved: the training took 9 updates, and loss.reference_update_every is 512. Lower it"
    assert reference_moves(files, 512) == told
    (tmp_path / "rounds.json").write_text('{"rounds": 1}')
    (tmp_path / "config.yaml").write_text("loss: {name: tr_dpo, reference_update_every: 512}\n")
    files.policy.mkdir()
    assert [finding.text for finding in loop_findings(LoopRecord.read(tmp_path))] == [f"round-1: {told}."]


# ---- from Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch):
    """Loops that `train` starts have their steps in this process."""
    monkeypatch.setattr(start, "run_loop", partial(run_loop, run=loops.in_this_process))


def test_a_loop_is_started_and_continued_from_python_and_returns_its_last_policy(folder, in_this_process, capsys):
    given = loops.overrides(folder, "loss=dpo", "rounds.rounds=1", "n_epochs=1")
    run = train(compose(*given), quiet=True)
    assert capsys.readouterr().out == ""
    assert (run.run_dir, run.stopped) == (folder / "loop", None)
    assert [row["counters/round"] for row in run.history()] == [0, 1]
    assert run.metrics == run.history()[-1] and "rounds/reward_held_out" in run.metrics
    assert "held out" in [finding.kind for finding in run.findings]
    assert (run.run_dir / "round-1" / "policy" / "model.safetensors").is_file()
    # The same once more: nothing is left to do.
    assert train(compose(*given, f"resume={run.run_dir}"), quiet=True).metrics == run.metrics


def test_what_a_loop_from_python_cannot_do_is_refused(folder):
    config = compose(*loops.overrides(folder, "loss=dpo"))
    with pytest.raises(UserError, match="callbacks: found some, and a loop of rounds trains in processes of its own"):
        train(config, [object()])
    with pytest.raises(UserError, match=r"loss\.beta: changed to 0\.7 after compose\(\), .* Expected compose\(\.\.\., 'loss"):
        train(config.changed({"loss.beta": 0.7}))
    assert not (folder / "loop").exists()


@pytest.mark.parametrize(("raised", "kind"), [
    (StepFailedError("judge of round-1 has ended with exit status 2", 2), UserError),
    (StepFailedError("judge of round-1 has ended with SIGKILL", -9), StepFailedError),
    (StoppedError("stopped: SIGINT"), None),
])  # fmt: skip
def test_what_becomes_of_a_step_becomes_of_train(raised, kind, folder, monkeypatch):
    def fail(_loop, report=None):
        raise raised

    monkeypatch.setattr(start, "run_loop", fail)
    config = compose(*loops.overrides(folder, "loss=dpo"))
    if kind is None:
        assert train(config, quiet=True).stopped == "stopped: SIGINT"
        return
    with pytest.raises(kind, match="judge of round-1 has ended"):
        train(config, quiet=True)


# ---- a disk without room ---------------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_one_message_and_the_loop_goes_on_when_there_is_some(folder, monkeypatch):
    """Every small file of a round in turn; the tables are written by the same means."""
    loop, told = loops.start(folder, "loss=dpo", "rounds.rounds=1", "n_epochs=1"), set()
    write = tables.write_atomically

    def full(path, data):
        if path.name not in told:
            told.add(path.name)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(tables, "write_atomically", full)
    for _ in range(30):
        try:
            loops.run(loop)
            break
        except UserError as error:
            assert re.match(
                r"local_run_dir: .* cannot be written: .*No space left .*\. Expected a folder with room; the", str(error)
            )
    assert told == {"sampling.json", "judged.json", "excluded.json", "summary.json", "metrics.jsonl", "train.yaml"}
    assert loop.round(2).is_done("summarize")
