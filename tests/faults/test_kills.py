"""Runs that are killed and stopped at random moments end with the undisturbed run's weights and numbers, bit for bit."""

import os
import signal

import pytest

from tests.faults.campaign import AT_THE_END, RANK_FAULTS, Campaign, faults_of
from tests.faults.processes import RESUMED, STEP, Run, assert_undisturbed, undisturbed

BETA_DPO = ("loss=dpo", "loss.mode_loss=beta_DPO", "loss.mode_weight=0.25", "loss.a=0.6")
TWO_RANKS = ("loss=dpo", "trainer=FSDPTrainer", "trainer.nproc_per_node=2", "n_examples=160")
# name: overrides, share of the kills, share of the signals
RUNS = {
    "DPO": (("loss=dpo",), 5 / 12, 2 / 5),
    "beta-DPO": ((*BETA_DPO, "save_async=false"), 4 / 12, 2 / 5),
    "DPO on two ranks": (TWO_RANKS, 1 / 12, 1 / 5),
    "QLoRA on two ranks": ((*TWO_RANKS, "+adapter=qlora"), 1 / 12, 1 / 5),
}
# `make faults` sets more of them.
KILLS, STOPS = int(os.environ.get("FAULT_KILLS", 12)), int(os.environ.get("FAULT_STOPS", 5))
MINUTES = float(os.environ.get("FAULT_MINUTES", "inf"))


def test_a_run_that_is_killed_once_and_stopped_once_ends_as_the_undisturbed_one(tmp_path, tmp_path_factory):
    overrides, _, _ = RUNS["DPO"]
    Campaign(tmp_path, undisturbed(tmp_path_factory, "DPO", *overrides), overrides, seed=0).carry_out(faults_of(1, 1), MINUTES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.campaign if "ranks" in name else pytest.mark.long) for name in RUNS]
)
def test_a_run_that_is_killed_and_stopped_ends_as_the_undisturbed_one(name, tmp_path, tmp_path_factory, record_property):
    overrides, kills, stops = RUNS[name]
    expected = undisturbed(tmp_path_factory, name, *overrides)
    seed = sorted(RUNS).index(name)
    print(f"seed {seed}")
    campaign = Campaign(tmp_path, expected, overrides, seed, strict="save_async=false" in overrides)
    record_property(name, campaign.facts)
    faults = faults_of(round(kills * KILLS), round(stops * STOPS))
    if overrides == TWO_RANKS:
        faults += RANK_FAULTS * max(1, KILLS // 36) + [AT_THE_END] * (KILLS // 36)
    campaign.carry_out(faults, MINUTES)


@pytest.mark.long
def test_a_job_of_torchrun_picks_itself_up_when_a_rank_is_killed(tmp_path, tmp_path_factory):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    run = Run(tmp_path, *TWO_RANKS, launcher=launcher)
    assert run.until("checkpoint: ") and run.until(STEP)
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.wait() == 0, run.output
    run.see_all_gone(10)
    assert run.numbers(RESUMED), "it has gone on from a checkpoint"
    assert_undisturbed(run.dir, undisturbed(tmp_path_factory, "DPO on two ranks", *TWO_RANKS))
