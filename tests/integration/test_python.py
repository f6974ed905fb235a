"""Runs that are started from Python: what they return, what they print, and callbacks in several processes."""

import pytest

from tests.support import forked

BEGIN = """
from utils import UserError, compose, train

TINY = (
    "loss=dpo", "batch_size=8", "n_eval_examples=16", "n_eval_model_samples=0", "wandb.enabled=false", "eval_every=16",
    "model.from_config.hidden_size=32", "model.from_config.intermediate_size=64", "save_policy_pt=false", "warmup_steps=0",
)
"""


@pytest.fixture
def run_script(tmp_path):
    """Run a program that begins with BEGIN; what it printed."""

    def run(text: str) -> str:
        (tmp_path / "program.py").write_text(BEGIN + text)
        done = forked.run([tmp_path / "program.py"], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_quiet_run_prints_what_callbacks_print_and_returns_what_it_has_found_and_can_be_continued(run_script, tmp_path):
    out = run_script("""
class Prints:
    def on_step(self, metrics):
        print("step", metrics["counters/examples"])
        return "enough" if metrics["counters/examples"] == 24 else None
    def on_end(self, run_dir):
        print("end", run_dir, (run_dir / "report.html").exists() or (run_dir / "LATEST").exists())

config = compose(*TINY, "n_steps=5", "local_run_dir=run")
run = train(config, [Prints()], quiet=True)
assert run.stopped == "callback: enough" and run.metrics["counters/examples"] == 24
assert run.metrics["loss/train"] and run.metrics["loss/eval"], run.metrics
assert [row["counters/examples"] for row in run.history() if "loss/train" in row] == [8, 16, 24]
more = train(compose(*TINY, "n_steps=5", f"resume={run.run_dir}"), quiet=True)
assert (more.run_dir, more.stopped, more.metrics["counters/examples"]) == (run.run_dir, None, 40)
assert more.metrics["time"] > run.metrics["time"]
assert config.changed({"lr": 0.5}).lr == 0.5 != config.lr
try:
    compose("learning_rat=1")
except UserError as error:
    print("refused", "learning_rat" in str(error))
""")
    assert out.splitlines() == ["step 8", "step 16", "step 24", f"end {tmp_path / 'run'} True", "refused True"]


def test_beside_a_run_that_is_continued_lies_no_empty_directory_that_would_be_taken_for_the_newest(run_script):
    out = run_script("""
class Looks:
    def on_step(self, metrics):
        print(metrics["counters/examples"], [path == run.run_dir for path in run.run_dir.parent.glob("again_*")])

run = train(compose(*TINY, "n_steps=1", "exp_name=again"), quiet=True)
train(compose(*TINY, "n_steps=2", "exp_name=again", "resume=auto"), [Looks()], quiet=True)
""")
    assert out.splitlines() == ["16 [True]"]


def test_the_findings_of_a_run_are_returned_and_a_callbacks_error_passes_through(run_script):
    out = run_script("""
run = train(compose(*TINY, "n_steps=9", "warmup_steps=150", "lr=5e-7"), quiet=True)
print([finding.kind for finding in run.findings])

class Fails:
    def on_evaluation(self, metrics):
        raise ZeroDivisionError("mine")

try:
    train(compose(*TINY, "n_steps=1"), [Fails()], quiet=True)
except ZeroDivisionError as error:
    print(error)
""")
    assert out.splitlines() == ["['warm-up', 'nothing learned']", "mine"]


@pytest.mark.long
def test_in_several_processes_callbacks_are_called_on_rank_0_and_end_the_run_on_all(run_script, tmp_path):
    (tmp_path / "watching.py").write_text("""
from pathlib import Path

class Watch:
    def on_step(self, metrics):
        with Path("told").open("a") as file:
            file.write(f"{metrics['counters/examples']}\\n")
        return metrics["counters/examples"] == 16
""")
    run_script("""
from watching import Watch

if __name__ == "__main__":
    run = train(compose(*TINY, "n_steps=5", "local_run_dir=run", "trainer=FSDPTrainer", "trainer.nproc_per_node=2"), [Watch()])
    assert run.stopped.startswith("callback: "), run
    assert run.metrics["counters/examples"] == 16
""")
    assert (tmp_path / "told").read_text().split() == ["8", "16"]
    assert (tmp_path / "run" / "LATEST").resolve().name == "step-16"
