"""Soups of a sweep's runs: which are chosen, and held-out numbers that are those of the runs' own evaluations."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.checkpointing.saved_run import SavedRun
from preference_training.core.errors import UserError
from preference_training.core.files import replace_symlink
from preference_training.export.source import Source
from preference_training.merging import merge as merging
from preference_training.merging import soup as soups
from preference_training.merging.held_out import HeldOutRows, Measured
from preference_training.merging.ingredients import Ingredient
from preference_training.merging.soup import Soup, best_runs, make_soup
from preference_training.modeling import loading
from preference_training.tracking.run_files import metric_rows, split_rows
from tests.merging.test_merging import LLAMA, merged, saved, state
from tests.support import shown
from train import start

COMMON = (
    "loss=dpo", "model.from_config.num_hidden_layers=1", "n_examples=32", "n_eval_examples=24", "do_first_eval=false",
    "sample_during_eval=false", "wandb.enabled=false", "warmup_steps=0", "save_policy_pt=false", "prefix_sharing=off",
    "max_length=64", "max_prompt_length=32",
)  # fmt: skip
RUNS = {"slow": ("lr=1e-4",), "fast": ("lr=3e-3",), "middle": ("lr=1e-3",)}


@pytest.fixture(scope="module")
def runs(compose, tmp_path_factory) -> Path:
    """A folder of three runs from one model, at three learning rates."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in RUNS.items():
        start(compose(*COMMON, f"local_run_dir={folder / name}", *changes), folder / name, in_sweep=False)
    return folder


def last_loss(run: Path) -> float:
    return split_rows(metric_rows(run / "metrics.jsonl"))[1][-1]["loss/eval"]


def test_a_soup_is_the_mean_of_the_best_runs_with_numbers_of_each_and_of_itself(runs, tmp_path):
    lines = make_soup(Soup(runs, top=2), tmp_path / "soup")
    fast, middle = (AutoModelForCausalLM.from_pretrained(runs / name / "LATEST").state_dict() for name in ("fast", "middle"))
    for name, weight in state(tmp_path / "soup").items():
        torch.testing.assert_close(weight, (fast[name] + middle[name]) / 2, rtol=0, atol=1e-6)
    table = {line.split("  ")[0]: line for line in lines}
    for name in ("fast", "middle"):
        assert f"{last_loss(runs / name):.3g} [" in table[str(runs / name)], "as its own evaluation found"
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "| `fast/step-32` | 0.5 | " in card and "| the merged model |  | " in card and str(runs) not in card
    assert lines[-1].startswith(f"note: loss/eval of the soup minus that of {runs / 'fast'}, the best ingredient: ")


@pytest.mark.long
def test_a_greedy_soup_takes_a_run_only_where_it_helps(runs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no run improves loss/eval of the best one, .*fast.*nothing is merged. Export"):
        make_soup(Soup(runs, top=2, greedy=True), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # In order of badness: the best is the slow one, then the middle one, which helps, and the fast one, which does not.
    real = HeldOutRows.measure
    values = {"slow": 0.1, "middle": 0.2, "fast": 0.3}

    def measure(rows, directory):
        name = next((name for name in values if f"/{name}/" in f"{directory}/" and "soup" not in str(directory)), None)
        found = real(rows, directory)
        count = len(calls)
        calls.append(directory)
        found.metrics["loss/eval"]["mean"] = values[name] if name else (0.05, 0.07, 0.05)[count - 3]
        return found

    calls = []
    monkeypatch.setattr(HeldOutRows, "measure", measure)
    lines = make_soup(Soup(runs, top=3, greedy=True), tmp_path / "soup")
    slow, middle = (AutoModelForCausalLM.from_pretrained(runs / name / "LATEST").state_dict() for name in ("slow", "middle"))
    for name, weight in state(tmp_path / "soup").items():
        torch.testing.assert_close(weight, (slow[name] + middle[name]) / 2, rtol=0, atol=1e-6)
    assert f"note: {runs / 'fast'} is not in the soup: loss/eval would be 0.07 in place of 0.05" in lines


def test_runs_are_ranked_by_what_compares_them(runs):
    names = lambda **given: [run.name for run in best_runs(Soup(runs, **given))[0]]  # noqa: E731
    assert names() == ["fast", "middle", "slow"] and names(top=2) == ["fast", "middle"]
    assert names(metric="logps_eval/chosen", top=2) != [] and best_runs(Soup(runs))[1] == "loss/eval"
    with pytest.raises(UserError, match="--top: found 1, expected at least 2"):
        best_runs(Soup(runs, top=1))
    with pytest.raises(UserError, match="--metric: 0 of the runs have a held-out bleu, .* They have: .*loss/eval"):
        best_runs(Soup(runs, metric="bleu"))
    configs = [{"objective": "loss/eval", "loss": {"name": "dpo", "beta": beta}} for beta in (0.1, 0.5)]
    metric, [note] = soups._metric(configs)
    assert metric == "rewards_eval/accuracies" and "loss.beta changes what the loss measures" in note


def test_runs_are_ranked_by_the_checkpoint_that_is_merged(runs, tmp_path):
    folder = tmp_path / "runs"
    for name in ("fast", "slow"):
        shutil.copytree(runs / name, folder / name, symlinks=True)
    # The fast run was best earlier, as load_best has it: LATEST is the checkpoint before its last one, with a larger loss.
    best = shutil.copytree(folder / "fast" / "step-32", folder / "fast" / "step-16")
    values = json.loads((best / "state.json").read_text())
    values["held_out"]["loss/eval"] = 9.0
    (best / "state.json").write_text(json.dumps(values))
    replace_symlink(folder / "fast" / "LATEST", "step-16")
    assert [run.name for run in best_runs(Soup(folder))[0]] == ["slow", "fast"]


def test_a_run_that_cannot_be_measured_is_refused_before_anything_is_merged(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "write_merged", None)
    words = (runs / "slow", runs / "fast", "--held-out", runs / "slow", "--to", tmp_path / "out")
    rows = tmp_path / "own.jsonl"
    rows.write_text(json.dumps({"prompt": "Say hi.", "chosen": "hi", "rejected": "no"}) + "\n")
    with pytest.raises(UserError, match="own.jsonl: expected at least one held-out example, and none"):
        merged(monkeypatch, *words, f"datasets=[{rows}]", "held_out_share=0")
    monkeypatch.setattr(SavedRun, "load_initial_model", refuse)
    with pytest.raises(UserError, match="no longer what it was"):
        merged(monkeypatch, *words)
    assert list(tmp_path.iterdir()) == [rows]


def refuse(_):
    raise UserError("the model is no longer what it was")


def test_a_greedy_soup_writes_nothing_beside_its_runs(runs, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    folders = []
    monkeypatch.setattr(soups, "write_merged", lambda task, on_disk, directory: folders.append(directory))
    rows = SimpleNamespace(measure=lambda directory: Measured({"loss/eval": {"mean": 1.0}}, None))
    found = [replace(Ingredient.read(str(runs / name)), weights=runs / name / "LATEST") for name in RUNS]
    measured = {each.name: Measured({"loss/eval": {"mean": 0.5}}, None) for each in found}
    with pytest.raises(UserError, match="no run improves loss/eval"):
        soups._greedy(found, measured, rows, "loss/eval", tmp_path)
    assert {folder.parent for folder in folders} == {tmp_path} and list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_runs_that_started_from_other_weights_are_no_soup(runs, tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("fast", "slow"):
        (folder / name).symlink_to(runs / name)
    real = soups._newest

    def newest(run):
        found = real(run)
        found.state["run"]["began_with"] = run.name
        return found

    monkeypatch.setattr(soups, "_newest", newest)
    with pytest.raises(UserError, match="started from other weights than .*fast"):
        best_runs(Soup(folder))


def test_adapters_with_added_tokens_are_merged_where_the_vocabulary_has_no_room(compose, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(LLAMA, tie_word_embeddings=True, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    base, rows = saved(model, tmp_path / "base"), config.vocab_size
    for name in ("one", "other"):
        run = tmp_path / name
        given = ("model=blank_model", f"model.name_or_path={base}", "model.add_tokens=[zwei,drei]", "+adapter=lora")
        sizes = ("n_examples=8", "n_eval_examples=8", "batch_size=8", "eval_every=8", f"lr=1e-{len(name)}")
        start(compose(*COMMON, *given, *sizes, f"local_run_dir={run}"), run, in_sweep=False)
    merged(monkeypatch, tmp_path / "one", tmp_path / "other", "--to", tmp_path / "out")
    found = state(tmp_path / "out")
    whole = [loading.merge_and_cast(Source.read(tmp_path / name).load_model(), torch.float32) for name in ("one", "other")]
    expected = [each.state_dict() for each in whole]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(found[name]) == rows + 2
        torch.testing.assert_close(found[name], (expected[0][name] + expected[1][name]) / 2, rtol=0, atol=1e-6)
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


@pytest.mark.long
def test_an_adapters_run_is_merged_and_measured_on_the_rows_of_another(compose, runs, tmp_path, monkeypatch):
    run = tmp_path / "lora"
    base = f"model.archive={runs / 'slow' / 'LATEST'}"
    start(compose(*COMMON, f"local_run_dir={run}", "+adapter=lora", "lr=1e-3", base), run, in_sweep=False)
    out = tmp_path / "out"
    words = (run, runs / "slow", "--method", "task_arithmetic", "--base", runs / "slow", "--held-out", run, "--to", out)
    lines = merged(monkeypatch, *words)
    loss, table = last_loss(run), {line.split("  ")[0]: line for line in lines}
    assert f"{loss:.3g} [" in table[str(run)] and f"{loss:.3g} [" in table["the merged model"]
    # The base is the run's reference.
    assert "0.693 [0.693, 0.693]" in table[str(runs / "slow")]
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def test_the_commands_of_the_page_run(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, run in {"one": "slow", "other": "fast", "base": "middle"}.items():
        Path("runs").mkdir(exist_ok=True)
        (Path("runs") / f"{name}_DATE").symlink_to(runs / run)
    Path("multirun").mkdir()
    Path("multirun/lrs").symlink_to(runs)
    done = {}
    for _, words in shown.commands(r"python scripts/merge\.py", ["docs/merging.md"]):
        if not any(word.startswith("mistralai/") for word in words):
            done[words[-1]] = merged(monkeypatch, *words[2:])
    assert [*done] == ["soup", "mean", "between", "both", "measured"]
    for name, lines in done.items():
        assert AutoModelForCausalLM.from_pretrained(name) is not None and lines[0].startswith(f"{name}: LlamaForCausalLM, ")
    assert done["soup"][1].startswith("held out ") and done["measured"][1].startswith("held out ") and len(done["mean"]) == 1
