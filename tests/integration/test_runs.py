"""Whole runs as real processes: the default, a chain of SFT, DPO and beta-DPO on dialogues, sweeps, and their directories."""

import json
import math
import os
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preference_training.core.metric_names import MEASURED
from preference_training.reporting.comparison import find_runs
from preference_training.reporting.findings import findings
from preference_training.reporting.run_record import RunRecord
from preference_training.reporting.run_report import report_page
from preference_training.tracking.ledger import read_ledger
from tests.support import forked
from tests.support.files import GOLDEN, ROOT


def train(cwd: Path, *overrides: str, **environment: str) -> str:
    """Run the command line in `cwd` and return what it printed."""
    done = forked.run([ROOT / "train.py", *overrides], cwd, {**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


SHORT = ("n_examples=48", "n_eval_examples=16", "n_eval_model_samples=2", "wandb.enabled=false")


def test_the_default_run_leaves_what_the_readme_says(tmp_path):
    out = train(
        tmp_path, "n_examples=24", "n_eval_examples=16", "n_eval_model_samples=2", "eval_every=16", WANDB_MODE="offline"
    )
    [run_dir] = [path for path in (tmp_path / "runs").iterdir() if path.name != "prepared_data"]
    names = {path.name for path in run_dir.iterdir()}
    written = {"config.yaml", "about.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "report.html", "rerun.yaml"}
    assert names == {*written, "step-16", "step-24", "LATEST", "wandb"}
    assert (run_dir / "LATEST").resolve() == run_dir / "step-24"
    assert (run_dir / "LATEST" / "policy.pt").is_file()
    assert out.count("wandb: offline") == 1 and f"run directory: {run_dir}" in out
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["examples"] for sample in samples] == [0, 0, 16, 16, 24, 24]
    model = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST")
    ids = AutoTokenizer.from_pretrained(run_dir / "LATEST")("\n\nHuman: ", return_tensors="pt").input_ids
    archived = torch.load(run_dir / "LATEST" / "policy.pt", weights_only=True)["state"]
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in archived.items())
    assert model(ids).logits.isfinite().all()


TINY = (
    "loss=dpo", "batch_size=8", "n_eval_examples=24", "n_eval_model_samples=0", "wandb.enabled=false", "local_run_dir=run",
    "model.from_config.hidden_size=32", "model.from_config.intermediate_size=64", "save_policy_pt=false",
)  # fmt: skip


def test_a_run_that_learns_nothing_says_so_at_its_start_at_its_end_and_in_its_report(tmp_path):
    out = train(tmp_path, *TINY, "n_steps=9", "warmup_steps=150", "lr=5e-7")
    before, after = out.split("held out, after 0 examples")
    warned = "warning: warm-up takes 150 steps, and the run has 9: the learning rate rises to 3e-08, 6% of lr=5e-07"
    learned = "warning: the run has learned next to nothing: held-out loss was 0.6931 at the start and is 0.6931 at the end"
    assert warned in before and warned in after and learned in after and learned not in before
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["finding"] for event in events if "finding" in event] == ["warm-up", "nothing learned"]
    page = report_page(RunRecord.read(tmp_path / "run"))
    assert "warm-up takes 150 steps" in page and "learned next to nothing" in page


def test_a_sound_run_ends_with_its_numbers_and_without_a_warning(tmp_path):
    out = train(tmp_path, *TINY, "n_steps=40", "warmup_share=0.1", "lr=3e-3")
    assert "warning: " not in out and "note: " not in out
    last = out.split("\n\n")[-1].splitlines()
    assert re.match(r"  held-out loss: 0\.6931 -> 0\.[0-5]\d* \[0\.\d+, 0\.\d+\]", last[1]), last
    assert last[-3:] == ["talk to it: python scripts/chat.py run", "report: run/report.html", f"run directory: {tmp_path}/run"]
    rows = metrics(tmp_path / "run")
    assert findings(RunRecord.read(tmp_path / "run")) == []
    steps = [row for row in rows if "loss/train" in row]
    assert all({"lr", "epoch", "time", "tokens_per_second", "examples_per_second"} <= row.keys() for row in steps)


@pytest.fixture(scope="module")
def beta_dpo(tmp_path_factory) -> Path:
    """The directory of a run of beta-DPO."""
    run_dir = tmp_path_factory.mktemp("beta_dpo") / "run"
    train(run_dir.parent, "loss=beta_DPO", f"local_run_dir={run_dir}", *SHORT)
    return run_dir


@pytest.mark.parametrize(
    "spelling",
    [["loss=beta_DPO"], ["loss=dpo", "loss.mode_loss=beta_DPO", "loss.mode_weight=0.2", "loss.a=0.6", "loss.beta=0.1"]],
    ids=["the same", "as a mode of DPO"],
)
def test_two_runs_of_the_same_seed_have_the_same_numbers_and_so_have_both_spellings_of_beta_dpo(spelling, beta_dpo, tmp_path):
    train(tmp_path, *spelling, f"local_run_dir={tmp_path / 'run'}", *SHORT)
    runs = beta_dpo, tmp_path / "run"
    rows = [[{k: v for k, v in row.items() if k not in MEASURED} for row in metrics(run)] for run in runs]
    assert rows[0] == rows[1]


SMALL = (
    "loss=dpo", "n_examples=16", "n_eval_examples=16", "wandb.enabled=false", "tracking=[jsonl,tensorboard]", "eval_every=16",
    "n_eval_model_samples=1", "model.from_config.hidden_size=32", "model.from_config.intermediate_size=64",
)  # fmt: skip


def test_a_run_in_the_directory_of_another_sets_that_one_aside_whole(tmp_path):
    run_dir, line = tmp_path / "run", (*SMALL, "local_run_dir=run")
    train(tmp_path, *line)
    (run_dir / "notes.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    assert {"metrics.jsonl", "samples.jsonl", "events.jsonl", "ledger", "tensorboard", "step-16", "LATEST"} <= before.keys()
    said = train(tmp_path, *line, "dry_run=true")
    assert f"local_run_dir: {run_dir} holds an earlier run, which a new run would set aside" in said
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before

    for more, told in (
        (["eval_only=true"], "holds a run with checkpoints, and eval_only=true would evaluate the model as configured"),
        (["model.archive=run/LATEST"], "holds the run of model.archive, which a new run there would set aside"),
    ):
        refused = forked.run([ROOT / "train.py", *line, *more], tmp_path, os.environ)
        assert refused.returncode == 2 and told in refused.stderr, refused.stderr
    assert {path.name for path in run_dir.iterdir()} == set(before)

    said = train(tmp_path, *line, "n_examples=32", "lr=2e-3")
    [aside] = run_dir.glob("set_aside_*")
    assert f"local_run_dir: {run_dir} held an earlier run, which is now in {aside.name}/" in said
    assert {path.name for path in aside.iterdir()} == set(before) - {"notes.txt"}
    assert (run_dir / "notes.txt").exists() and not (run_dir / "step-16" / "notes.txt").exists()
    assert [row["counters/examples"] for row in metrics(aside) if "loss/train" in row] == [16]
    assert [row["counters/examples"] for row in metrics(run_dir) if "loss/train" in row] == [16, 32]
    assert sorted(set(read_ledger(run_dir).examples.tolist())) == [16, 32]
    assert [row["lr"] for row in metrics(run_dir) if "lr" in row] == pytest.approx([2e-4 * 10 / 11, 4e-4 * 10 / 11])
    begins = [json.loads(line)["text"] for line in (run_dir / "events.jsonl").read_text().splitlines()].count("begins")
    assert begins == 1 and len(list((run_dir / "tensorboard").iterdir())) == 1
    # Both are runs: the old one goes on where it is, and a comparison of the new one does not count it.
    assert find_runs([run_dir]) == [run_dir] and find_runs([aside]) == [aside]
    train(tmp_path, *SMALL, "n_examples=32", f"local_run_dir={aside}", f"resume={aside}")
    assert [row["counters/examples"] for row in metrics(aside) if "loss/train" in row] == [16, 32]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> Path:
    """A gzipped file of 240 HH-style dialogues: kind last answers are preferred to unkind ones."""
    import gzip

    draw = random.Random(0)
    words = ["rain", "stone", "birds", "lunch", "mat", "cat", "dawn", "bridges"]
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for _ in range(240):
            turns = "".join(
                f"\n\nHuman: {' '.join(draw.choices(words, k=4))}\n\nAssistant: {draw.choice(words)}"
                for _ in range(draw.randint(0, 2))
            )
            prompt = f"{turns}\n\nHuman: {' '.join(draw.choices(words, k=5))}\n\nAssistant:"
            kind, unkind = f" sing {draw.choice(words)}", f" nobody asked {draw.choice(words)}"
            file.write(json.dumps({"chosen": prompt + kind, "rejected": prompt + unkind}) + "\n")
    return path


@pytest.mark.long
def test_sft_dpo_and_beta_dpo_continue_from_each_other_on_dialogues(dialogues, tmp_path):
    model = [
        "model=blank_model",
        "++model.from_config={model_type: gpt_neox, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, "
        "num_attention_heads: 4, max_position_embeddings: 256}",
        f"model.tokenizer_name_or_path={GOLDEN / 'tokenizer'}",
    ]
    common = [
        *model, f"datasets={dialogues}", "wandb.enabled=false", "sample_during_eval=false", "optimizer=AdamW", "batch_size=16",
        "gradient_accumulation_steps=2", "max_length=96", "max_prompt_length=64", "warmup_steps=0",
    ]  # fmt: skip
    train(tmp_path, *common, "loss=sft", "lr=3e-3", f"local_run_dir={tmp_path / 'sft'}")
    first = ["loss=dpo", "loss.beta=0.1", f"model.archive={tmp_path}/sft/LATEST/policy.pt", f"local_run_dir={tmp_path / 'dpo'}"]
    train(tmp_path, *common, "lr=1e-3", *first)
    second = ["loss=beta_DPO", "loss.beta=0.1", f"model.archive={tmp_path}/dpo/LATEST", f"local_run_dir={tmp_path / 'beta'}"]
    train(tmp_path, *common, "lr=1e-3", *second)
    sft = [row["loss/train"] for row in metrics(tmp_path / "sft") if "loss/train" in row]
    assert sft[-1] < 0.5 * sft[0]
    for run in ("dpo", "beta"):
        evaluations = [row for row in metrics(tmp_path / run) if "loss/eval" in row]
        steps = [row for row in metrics(tmp_path / run) if "loss/train" in row]
        assert evaluations[0]["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)
        assert evaluations[0]["rewards_eval/margins"] == 0
        assert steps[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
        assert steps[-1]["rewards_train/accuracies"] > 0.9 > steps[0]["rewards_train/accuracies"]
    assert {"beta_DPO/beta_used", "beta_DPO/gap_mean", "beta_DPO/gap_std", "beta_DPO/kept_fraction"} <= steps[0].keys()


def test_a_sweep_gives_each_job_a_directory_and_the_numbers_of_a_run_of_its_own(tmp_path):
    common = ["loss=dpo", "sample_during_eval=false", *SHORT]
    out = train(tmp_path, "-m", *common, "loss.beta=0.05,0.1,0.5")
    assert (out.count("computed and saved"), out.count("responses read from")) == (1, 2), (
        "the jobs share one pass of the reference"
    )
    train(tmp_path, *common, "loss.beta=0.5", f"local_run_dir={tmp_path / 'alone'}")
    [sweep] = (tmp_path / "multirun").glob("*/*")
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1", "2"]
    losses = lambda run: [row["loss/train"] for row in metrics(run) if "loss/train" in row]  # noqa: E731
    assert losses(sweep / "2") == losses(tmp_path / "alone")
    assert losses(sweep / "0") != losses(sweep / "2")
    beside = {path.name for path in (tmp_path / "runs").iterdir()}
    assert beside == {"reference_logps", "prepared_data"}, "jobs of a sweep make no run directories beside the sweep's"


@pytest.mark.long
def test_two_sweeps_of_the_same_second_do_not_share_a_directory(tmp_path):
    command = [ROOT / "train.py", "-m", "loss=dpo", "loss.beta=0.1", "sample_during_eval=false", *SHORT]
    with (tmp_path / "said").open("w") as said:
        sweeps = [forked.Program(command, tmp_path, said.fileno(), said.fileno()) for _ in range(2)]
    assert [sweep.wait(300) for sweep in sweeps] == [0, 0], (tmp_path / "said").read_text()
    assert len(list((tmp_path / "multirun").glob("*/*/0/LATEST"))) == 2


@pytest.mark.long
def test_optuna_makes_the_held_out_loss_small(tmp_path):
    train(
        tmp_path, "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.direction=minimize", "hydra.sweeper.sampler.seed=1", "loss=dpo",
        "loss.beta=tag(log, interval(0.05, 0.5))", "sample_during_eval=false", *SHORT,
    )  # fmt: skip
    [results] = (tmp_path / "multirun").glob("*/*/optimization_results.yaml")
    from omegaconf import OmegaConf

    best = OmegaConf.load(results)
    held_out = [[row for row in metrics(run) if "loss/eval" in row][-1]["loss/eval"] for run in results.parent.glob("[0-9]")]
    assert len(held_out) == 3
    assert best.best_value == pytest.approx(min(held_out))
