"""Evaluations without training: of the configured model, and of a run's checkpoint, compared with that run's metrics."""

import importlib.util
import json
import re
import socket
import sys
from pathlib import Path

import pytest

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.core.errors import UserError
from preference_training.core.files import run_file
from preference_training.evaluation.runs import EvaluationRun, check_reference, load_run_config, write_text
from preference_training.generation.sampling import Sampler
from preference_training.modeling.state import weights_hash
from preference_training.modeling.tuning import chosen_weights
from tests.evaluation.test_task_suites import own_task
from tests.support import forked, shown
from tests.support.files import ROOT
from train import start

COMMON = (
    "n_examples=16", "n_eval_examples=24", "n_eval_model_samples=2", "wandb.enabled=false", "max_length=64",
    "max_prompt_length=32", "evaluation.n_prompts=4", "save_policy_pt=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def train_run(compose, tmp_path_factory):
    """Run the command line here: `train_run("name", "loss=sft")` returns the run's directory."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str) -> Path:
        config = compose(*COMMON, f"local_dirs=[{folder}]", f"local_run_dir={folder / name}", *overrides)
        start(config, folder / name, in_sweep=False)
        return folder / name

    return run


@pytest.fixture(scope="module")
def sft(train_run) -> Path:
    """A run of a few SFT steps."""
    return train_run("sft", "loss=sft", "do_first_eval=false")


@pytest.fixture(scope="module")
def beta_dpo(train_run, sft) -> Path:
    """A run of a few beta-DPO steps from there; its held-out loss depends on the statistics that it remembers."""
    return train_run("beta_dpo", "loss=beta_DPO", f"model.archive={sft / 'LATEST'}", "lr=1e-2", "warmup_steps=0")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(path: Path, *overrides: str) -> dict:
    """What scripts/evaluate.py does behind its command line; the results."""
    config = load_run_config(path, list(overrides))
    start(config, path, in_sweep=False)
    return json.loads(Path(config.evaluation.to or path / "results.json").read_text())


def test_an_evaluation_reproduces_the_last_metrics_of_the_run(beta_dpo, capsys):
    before = {path.name: path.read_bytes() for path in beta_dpo.iterdir() if path.is_file()}
    results = evaluate(beta_dpo, "evaluation.n_prompts=4")
    last = rows(beta_dpo / "metrics.jsonl")[-1]
    for name, value in results["metrics"].items():
        assert value == pytest.approx(last[name], rel=1e-4, abs=1e-6), name
    assert results["metrics"]["rewards_eval/margins"] != pytest.approx(0, abs=1e-3)
    assert results["held_out"]["all"]["loss/eval"]["mean"] == pytest.approx(last["loss/eval"], rel=1e-4)
    assert results["held_out"]["data set"]["toy"]["examples"] == 24
    assert results["kl"]["answers"] == 4 and results["kl"]["per_answer"]["mean"] != 0
    # At loss.beta: -log sigmoid of each margin, whatever beta training has come to.
    assert results["metrics"]["beta_DPO/loss_eval_at_beta_used"] != pytest.approx(results["metrics"]["loss/eval"], rel=1e-3)
    few = "warning: KL to the reference: 4 prompts, too few to decide anything by; expected at least 10"
    assert few in results["warnings"] and few in capsys.readouterr().out
    assert results["examples_trained"] == 16 and results["checkpoint"].endswith("step-16")
    # Of the run's own files none has changed.
    assert {path.name: path.read_bytes() for path in beta_dpo.iterdir() if path.name in before} == before
    new = {"results.json", "held_out_examples.jsonl", "answers.jsonl", "step-16", "LATEST", "ledger"}
    assert {path.name for path in beta_dpo.iterdir()} - before.keys() == new


def test_sampled_responses_are_as_long_as_is_set_and_an_evaluation_says_what_it_does(beta_dpo, tmp_path, monkeypatch, capsys):
    sampled, real = [], Sampler.responses

    def responses(*arguments):
        sampled.extend(found := real(*arguments))
        return found

    monkeypatch.setattr(Sampler, "responses", responses)
    options = ["evaluation.n_prompts=4", "evaluation.max_sample_length=3", f"evaluation.to={tmp_path / 'results.json'}"]
    evaluate(beta_dpo, *options)
    assert max(map(len, sampled)) == 3
    said = capsys.readouterr().out
    assert f"evaluating {beta_dpo / 'step-16'}\n" in said and "resume: " not in said
    assert re.search(r"^sampling responses to 4 prompts, of up to 3 tokens$", said, re.MULTILINE)


def test_the_model_as_configured_is_scored_and_sampled_and_no_checkpoint_is_written(train_run, beta_dpo):
    found = train_run("alone", "eval_only=true", "loss=dpo", f"model.archive={beta_dpo / 'LATEST'}")
    names = {path.name for path in found.iterdir()}
    written = {"config.yaml", "rerun.yaml", "metrics.jsonl", "samples.jsonl", "events.jsonl"}
    assert names == {*written, "results.json", "held_out_examples.jsonl", "answers.jsonl"}
    [row] = rows(found / "metrics.jsonl")
    # Policy and reference are the same weights.
    assert row["loss/eval"] == pytest.approx(0.6931472, abs=1e-6) and row["counters/updates"] == 0
    assert row["logps_eval/chosen"] == pytest.approx(rows(beta_dpo / "metrics.jsonl")[-1]["logps_eval/chosen"], rel=1e-5)
    assert len(rows(found / "samples.jsonl")) == 2
    results = json.loads((found / "results.json").read_text())
    assert results["kl"]["per_answer"]["mean"] == 0 and results["checkpoint"] is None


def test_sft_is_scored_without_a_reference(train_run, sft):
    found = train_run("sft_alone", "eval_only=true", "loss=sft", f"model.archive={sft / 'LATEST'}")
    results = json.loads((found / "results.json").read_text())
    assert "kl" not in results and "length_bias" not in results["held_out"]
    assert results["metrics"]["loss/eval"] == pytest.approx(rows(sft / "metrics.jsonl")[-1]["loss/eval"], rel=1e-5)


def test_responses_are_compared_with_the_references_or_another_checkpoints(beta_dpo, sft, tmp_path, capsys):
    judged = ["evaluation.judge=toy", "evaluation.n_prompts=6", "n_eval_examples=8"]
    first = evaluate(beta_dpo, *judged, f"evaluation.to={tmp_path / 'first.json'}")["win_rate"]
    assert first["comparisons"] == 6 and first["against"] == "reference" and first["unanswered"] == 0
    answers = [row["other"] for row in rows(tmp_path / "answers.jsonl")]
    # Six comparisons of two grades: an interval of some width, whatever they say.
    assert first["rate"]["high"] - first["rate"]["low"] > 0.2
    assert f"win rate against reference, judged by toy: {first['rate']['mean']:.3g}" in capsys.readouterr().out
    # The reference is the SFT checkpoint, and says the same when it is named.
    evaluate(beta_dpo, *judged, f"evaluation.against={sft / 'LATEST'}", f"evaluation.to={tmp_path / 'second.json'}")
    assert [row["other"] for row in rows(tmp_path / "answers.jsonl")] == answers
    assert [row["policy"] for row in rows(tmp_path / "answers.jsonl")] != answers


def test_they_are_compared_with_those_of_a_reference_of_its_own_and_no_weights_are_chosen(
    compose, sft, beta_dpo, tmp_path, monkeypatch
):
    models, usual = [], EvaluationRun.sample
    hashed = lambda run, model, *stream: models.append(weights_hash(model)) or usual(run, model, *stream)  # noqa: E731
    monkeypatch.setattr(EvaluationRun, "sample", hashed)
    apart = f"model.archive={beta_dpo / 'LATEST'}", f"model.reference_archive={sft / 'LATEST'}"
    judged = "evaluation.judge=toy", f"evaluation.to={tmp_path / 'results.json'}", "evaluation.n_prompts=2"
    here = f"local_dirs=[{tmp_path}]", f"local_run_dir={tmp_path / 'run'}", "eval_only=true", "loss=dpo"
    monkeypatch.setattr(chosen_weights, "signal_to_noise", lambda weight: pytest.fail("nothing is trained"))
    start(compose(*COMMON, *here, *apart, *judged, "model.spectrum_share=0.5"), tmp_path / "run", in_sweep=False)
    # That of beta_dpo began with the weights of the other.
    assert models[0] == Checkpoint.read(beta_dpo / "LATEST").run["began_with"] != models[1]


def test_a_judge_that_does_not_answer_is_said_before_responses_are_sampled(sft, tmp_path, capsys):
    with socket.socket() as taken:
        # Bound, and not listening: connections are refused.
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        asked = ("evaluation.judge=ollama:m", f"evaluation.judge_url={url}", "evaluation.judge_attempts=1")
        evaluate(sft, *asked, "evaluation.n_prompts=2", f"evaluation.to={tmp_path / 'r.json'}")
    printed = capsys.readouterr().out
    assert 0 < printed.index(f"warning: judge: {url} does not answer (unreachable)") < printed.index("sampling responses to 2")


def test_a_checkpoint_can_be_evaluated_on_other_data_and_under_another_loss(sft, tmp_path):
    data = tmp_path / "own.jsonl"
    lines = [{"prompt": f"\n\nHuman: {n}?\n\nAssistant:", "chosen": " Yes.", "rejected": f" No, {n}."} for n in range(9)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = (
        f"datasets=[{{path: {data}, test_path: {data}}}]",
        "loss=dpo",
        "loss.beta=0.3",
        f"evaluation.to={tmp_path / 'r.json'}",
    )
    results = evaluate(sft / "LATEST", *changes)
    assert list(results["held_out"]["data set"]) == [str(data)]
    assert results["config"]["loss"]["beta"] == 0.3
    # What SFT has learnt moves it away from its beginning.
    assert results["kl"]["per_answer"]["mean"] != 0


def test_tasks_are_run_on_the_checkpoints_weights(sft, tmp_path, capsys):
    wanted = "evaluation.tasks=opposites", f"evaluation.task_path={own_task(tmp_path)}", "n_eval_examples=2"
    found = evaluate(sft, *wanted, f"evaluation.to={tmp_path / 'results.json'}")["tasks"]["opposites"]
    assert found["acc"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert f"opposites: acc {found['acc']:.4g}" in capsys.readouterr().out


def test_the_script_evaluates_under_another_trainer_with_the_same_results(beta_dpo, tmp_path):
    alone = evaluate(beta_dpo, f"evaluation.to={tmp_path / 'alone.json'}", "evaluation.n_prompts=4")
    command = [ROOT / "scripts" / "evaluate.py", beta_dpo, "trainer=FSDPTrainer", "--judge", "toy"]
    options = ["evaluation.n_prompts=4", "--to", tmp_path / "sharded.json"]
    done = forked.run([*command, *options], tmp_path, first=forked.fork_workers)
    assert done.returncode == 0, done.stderr
    sharded = json.loads((tmp_path / "sharded.json").read_text())
    assert sharded["config"]["trainer"]["name"] == "FSDPTrainer" and sharded["win_rate"]["comparisons"] == 4
    for name, value in alone["metrics"].items():
        assert sharded["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert sharded["kl"]["per_answer"] == pytest.approx(alone["kl"]["per_answer"], rel=1e-3)
    assert done.stdout.count("win rate against reference, judged by toy") == 1


def test_the_command_lines_of_its_page_are_understood(sft, monkeypatch):
    script = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    lines = [words[2:] for _, words in shown.commands(r"python scripts/evaluate\.py", ["docs/evaluation.md"])]
    assert len(lines) == 4
    parsed = []
    for line in lines:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *line])
        parsed.append(module.arguments())
        load_run_config(sft, parsed[-1].overrides)
    assert [options.judge for options in parsed] == [None, "ollama:llama3.1", None, "my_judge.py:brief"]
    assert parsed[2].tasks == ["open_llm"] and len(parsed[2].overrides) == 2


def test_the_rule_of_its_page_judges(sft, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown.write_files("docs/evaluation.md", tmp_path)
    results = evaluate(sft, "evaluation.judge=my_judge.py:brief", f"evaluation.to={tmp_path}/results.json")
    assert results["win_rate"]["judge"] == "my_judge.py:brief" and results["win_rate"]["unanswered"] == 0
    texts = rows(tmp_path / "answers.jsonl")
    rule = run_file(tmp_path / "my_judge.py", "test").brief
    values = [(rule(row["prompt"], row["policy"]), rule(row["prompt"], row["other"])) for row in texts]
    assert results["win_rate"]["wins"] == sum(ours > theirs for ours, theirs in values)
    assert rule("Why?", "It rains. Often.") and not rule("Why?", "It rains. Often. Here.") and not rule("Why?", "It rains and")


@pytest.mark.parametrize(
    ("changed", "told", "trusted"),
    [
        ({"datasets": ["toy", {"name": "evil.py:x"}]}, "datasets: ", "datasets=toy"),
        ({"loss": {"name": "own", "function": "evil.py:x", "options": {}}}, "loss.function: ", "loss=sft"),
        ({"loss": {"name": "own", "function": "evil.py:x", "options": {}}}, "loss.function: ", "loss.function=evil.py:x"),
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code: ", "model.trust_remote_code=true"),
    ],
)
def test_code_in_a_runs_configuration_is_executed_only_if_confirmed(changed, told, trusted, sft, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").touch()
    checkpoint = tmp_path / "step-16"
    checkpoint.mkdir()
    state = json.loads((sft / "LATEST" / "state.json").read_text())
    config = state["run"]["config"]
    state["run"]["config"] = config | {key: config[key] | value if key == "model" else value for key, value in changed.items()}
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="which would execute code. If you trust it, confirm") as refused:
        load_run_config(checkpoint, ["n_eval_examples=3"])
    assert str(refused.value).startswith(told)
    load_run_config(checkpoint, [trusted])


# ---- mistakes -------------------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_message_and_status_2(tmp_path):
    done = forked.run([ROOT / "scripts" / "evaluate.py", tmp_path], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{tmp_path}: no checkpoint with a state.json that can be read")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("n_eval_exampels=3", "n_eval_exampels: no such key; did you mean n_eval_examples?"),
        ("loss=dppo", "loss=dppo: there is no such loss; did you mean dpo?"),
        ("n_eval_examples", "n_eval_examples: "),
        ("lr=1,2", "lr=1,2: expected key=value, with one value."),
        ("~lr", "~lr: expected key=value"),
        ("datasets=[hh", "datasets=[hh: "),
    ],
)
def test_an_invalid_override_is_refused(override, told, sft):
    with pytest.raises(UserError) as refused:
        load_run_config(sft, [override])
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


def test_a_key_that_is_newer_than_the_run_has_its_default(sft, tmp_path):
    state = json.loads((sft / "LATEST" / "state.json").read_text())
    for key in ("evaluation", "eval_only", "tf32"):
        del state["run"]["config"][key]
    del state["run"]["config"]["model"]["autocast_dtype"]
    (tmp_path / "step-16").mkdir()
    (tmp_path / "step-16" / "state.json").write_text(json.dumps(state))
    config = load_run_config(tmp_path, [])
    assert config.tf32 is True and config.model.autocast_dtype is None and config.evaluation.n_prompts == 128
    then = load_run_config(sft, []).as_dict()
    assert config.as_dict()["model"] == then["model"]
    assert config.n_examples == 16 and config.eval_only


def test_a_reference_other_than_the_runs_initial_model_is_refused(sft):
    config = load_run_config(sft, [])
    began_with = json.loads((sft / "LATEST" / "state.json").read_text())["run"]["began_with"]
    check_reference(config, Checkpoint.read(sft / "LATEST"), began_with)
    with pytest.raises(UserError, match="model: the weights are not the initial weights of the run of"):
        check_reference(config, Checkpoint.read(sft / "LATEST"), "0" * 32)
    # Another model that is asked for is another reference.
    check_reference(load_run_config(sft, [f"model.archive={sft / 'LATEST'}"]), Checkpoint.read(sft / "LATEST"), "0" * 32)


def test_resume_auto_without_a_checkpoint_is_refused(train_run):
    with pytest.raises(UserError, match="resume: auto has found no checkpoint of absent"):
        train_run("absent", "eval_only=true", "resume=auto", "exp_name=absent")


def test_results_that_cannot_be_written_are_one_message(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match="evaluation.to: cannot write .*results.json: Is a directory"):
        write_text(tmp_path / "results.json", "{}")


def test_a_held_out_split_without_an_example_is_one_message(train_run, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="expected at least one held-out example, and none is left"):
        train_run("none", "eval_only=true", "loss=dpo", f"datasets=[{tmp_path / 'own.jsonl'}]", "held_out_share=0")
