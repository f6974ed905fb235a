"""Runs of loss=reward: what they learn, what they save, how others load it, and how it judges."""

import json
import re
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import train
from preference_training.batching.micro_batches import evaluation_prompts
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.core.errors import UserError
from preference_training.distributed.launching import launch
from preference_training.evaluation.judges import RewardModelJudge
from preference_training.evaluation.runs import load_run_config
from preference_training.export.checkpoint import export
from preference_training.export.options import ExportOptions
from preference_training.modeling.loading import saved_head
from preference_training.training.preparation import prepare_run
from tests.faults.processes import assert_same_weights, rows_of
from tests.integration import reward_work
from tests.support.files import GOLDEN

SHORT = (
    "loss=reward", "n_examples=96", "eval_every=48", "n_eval_examples=32", "wandb.enabled=false", "save_policy_pt=false",
    "model.from_config.num_hidden_layers=2", "warmup_steps=2", "minimum_log_interval_secs=0", "prefix_sharing=on",
)  # fmt: skip
POLITE, RUDE = " Gladly! Read the label first.", " Ugh, not again. Nobody cares."
QUESTION = "\n\nHuman: How do I clean a bike?\n\nAssistant:"


@pytest.fixture(scope="module")
def run_here(compose, tmp_path_factory):
    """Run the command line in this process: `run_here("name", "lr=1e-3")` returns the run's directory."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str) -> Path:
        config = compose(*SHORT, f"local_dirs=[{folder}]", f"local_run_dir={folder / name}", *overrides)
        train.run(config, folder / name)
        return folder / name

    return run


@pytest.fixture(scope="module")
def trained(run_here) -> Path:
    """A run of six steps, with an evaluation and a checkpoint in the middle."""
    return run_here("trained")


@pytest.fixture(scope="module")
def adapted(run_here) -> Path:
    """The same with an adapter, on a model that lies elsewhere."""
    overrides = "model=blank_model", f"model.name_or_path={GOLDEN / 'llama'}", "model.lora.r=4", "lr=1e-3", "batch_size=16"
    return run_here("adapted", *overrides, "max_length=200", "max_prompt_length=100", "optimizer=AdamW")


def held_out_rewards(run_dir: Path, model) -> dict[str, float]:
    """The mean rewards of a run's held-out pairs under a model as transformers computes it, rows padded by the tokenizer."""
    config = load_run_config(run_dir, [])
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "LATEST")
    table = prepare_run(config, run_dir).data[-1].table
    prompts = evaluation_prompts(table, config.n_eval_examples, config.seed)
    pairs = [(prompt, pair) for prompt in prompts for pair in prompt.pairs][: config.n_eval_examples]
    rows = [[prompt.prompt_ids + prompt.responses[pair[side]] for prompt, pair in pairs] for side in (0, 1)]
    means = []
    for side in rows:
        with torch.no_grad():
            means.append(model(**tokenizer.pad({"input_ids": side}, return_tensors="pt")).logits.mean().item())
    return {"rewards_eval/chosen": means[0], "rewards_eval/rejected": means[1], "rewards_eval/margins": means[0] - means[1]}


def test_a_reward_model_learns_a_rule_and_logs_rewards(trained, capsys):
    before, *_, after = [row for row in rows_of(trained) if "loss/eval" in row]
    assert before["loss/eval"] == pytest.approx(0.693, abs=0.05)
    assert after["rewards_eval/accuracies"] > 0.95 and after["loss/eval"] < 0.3
    assert after["rewards_eval/margins"] == pytest.approx(
        after["rewards_eval/chosen"] - after["rewards_eval/rejected"], abs=1e-5
    )
    assert not any("logps" in name for row in rows_of(trained) for name in row)
    assert not (trained / "samples.jsonl").exists() and list((trained / "ledger").iterdir())
    assert "reward accuracy" in (trained / "report.html").read_text()


def test_others_load_a_sequence_classifier_that_gives_the_logged_rewards(trained):
    model, info = AutoModelForSequenceClassification.from_pretrained(trained / "LATEST", output_loading_info=True)
    assert not any(info.values()) and model.config.num_labels == 1
    logged = [row for row in rows_of(trained) if "loss/eval" in row][-1]
    for name, value in held_out_rewards(trained, model.eval()).items():
        assert logged[name] == pytest.approx(value, abs=1e-5), name


def test_a_resumed_run_ends_with_the_same_bits(trained, run_here):
    half = run_here("half", "n_examples=48")
    again = run_here("half", f"resume={half}")
    assert_same_weights(again / "LATEST", trained / "LATEST")
    assert rows_of(again)[-1] == rows_of(trained)[-1]
    assert Checkpoint.read((again / "LATEST").resolve()).examples == 96


def test_padded_rows_give_the_same_run(trained, run_here):
    padded = run_here("padded", "prefix_sharing=off")
    for found, expected in zip(rows_of(padded), rows_of(trained), strict=True):
        for name in expected.keys() & {"loss/train", "loss/eval", "rewards_eval/margins", "grad_norm"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_samples_judges_and_tasks_need_a_model_that_writes(trained, compose, run_here, capsys):
    run_here("debug", "debug=true", "n_examples=16", "sample_during_eval=true")
    assert capsys.readouterr().out.count("sample_during_eval: off, since a reward model writes no responses") == 1
    for key, value in (("judge", "toy"), ("tasks", "[gsm8k]")):
        with pytest.raises(UserError, match=rf"evaluation.{key}: found .*loss=reward trains a reward model, which writes no"):
            prepare_run(load_run_config(trained, [], {key: value if key == "judge" else ["gsm8k"]}), trained)


# ---- adapters, exports ------------------------------------------------------------------------------------------------------


def shown_code(readme: Path) -> str:
    return re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)[1]


def printed_by(readme: Path, folder: Path, capsys) -> float:
    """What the code of a model card prints, beside the exported directory."""
    capsys.readouterr()
    with chdir(folder):
        exec(shown_code(readme), {})
    return float(capsys.readouterr().out.splitlines()[-1])


def test_an_adapter_has_a_trained_head_and_gives_the_logged_rewards_where_peft_loads_it(adapted):
    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(GOLDEN / "llama", num_labels=1)
    drawn = base.score.weight.detach().clone()
    base.config.pad_token_id = AutoTokenizer.from_pretrained(adapted / "LATEST").pad_token_id
    model = PeftModel.from_pretrained(base, adapted / "LATEST").eval()
    assert not torch.equal(model.base_model.model.score.modules_to_save["default"].weight, drawn)
    logged = [row for row in rows_of(adapted) if "loss/eval" in row][-1]
    for name, value in held_out_rewards(adapted, model).items():
        assert logged[name] == pytest.approx(value, abs=1e-5), name


def test_a_resumed_adapter_and_one_that_starts_from_it_go_on_from_its_head(adapted, run_here):
    from safetensors.torch import load_file

    overrides = "model=blank_model", f"model.name_or_path={GOLDEN / 'llama'}", "model.lora.r=4", "lr=1e-3", "batch_size=16"
    overrides = (*overrides, "max_length=200", "max_prompt_length=100", "optimizer=AdamW")
    half = run_here("adapted_half", *overrides, "n_examples=48")
    again = run_here("adapted_half", *overrides, f"resume={half}")
    found, expected = (load_file(run / "LATEST" / "adapter_model.safetensors") for run in (again, adapted))
    assert found.keys() == expected.keys() and "base_model.model.score.weight" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Another seed draws another head, which the adapter replaces.
    further = run_here("further", *overrides, "n_examples=16", f"model.archive={adapted / 'LATEST'}", "seed=3")
    logged = [[row for row in rows_of(run) if "loss/eval" in row] for run in (adapted, further)]
    assert logged[1][0]["rewards_eval/accuracies"] == pytest.approx(logged[0][-1]["rewards_eval/accuracies"], abs=0.1)
    assert logged[1][0]["loss/eval"] == pytest.approx(logged[0][-1]["loss/eval"], rel=0.3)


@pytest.mark.parametrize("overrides", [["+adapter=lora", "lr=1e-3"], []], ids=["adapter", "whole"])
def test_bfloat16_weights_have_rewards_in_float32_and_their_checkpoint_is_the_runs_model(overrides, run_here):
    # A run's first checkpoint is compared with the run's model.
    run = run_here(
        "adapter in bfloat16" if overrides else "in bfloat16",
        *overrides,
        "model.policy_dtype=bfloat16",
        "n_examples=32",
        "do_first_eval=false",
    )
    row = [row for row in rows_of(run) if "loss/eval" in row][-1]
    assert row["rewards_eval/chosen"] != torch.tensor(row["rewards_eval/chosen"]).bfloat16().item()


def test_a_loss_of_your_own_may_read_values(run_here, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from preference_training.losses.base import Loss, LossOutput\n\n\n"
        "class Hinge(Loss):\n"
        "    needs_reference = False\n"
        '    model_head = "value"\n\n'
        "    def __call__(self, policy, reference, examples, batch_statistics=None):\n"
        "        chosen, rejected = policy[examples.first], policy[examples.last]\n"
        "        losses = (1 - chosen + rejected).relu()\n"
        "        return LossOutput(losses, chosen.detach(), rejected.detach())\n"
    )
    run = run_here("own", "loss=own", f"loss.function={tmp_path}/mine.py:Hinge")
    assert saved_head(run / "LATEST") == "value"
    assert [row for row in rows_of(run) if "loss/eval" in row][-1]["rewards_eval/accuracies"] > 0.95


@pytest.mark.parametrize("kind", ["whole", "adapter", "merged"])
def test_an_export_is_the_runs_reward_model_and_its_card_says_how_to_ask_it(kind, trained, adapted, tmp_path, capsys):
    run = trained if kind == "whole" else adapted
    export(run, ExportOptions(to=tmp_path / kind, merge=kind == "merged"))
    readme = tmp_path / kind / "README.md"
    assert "pipeline_tag: text-classification" in readme.read_text() and "Bradley-Terry reward modeling" in readme.read_text()
    value = printed_by(readme, tmp_path, capsys)
    if kind != "adapter":
        judge = RewardModelJudge(str(tmp_path / kind), None, "cpu")
        asked = "\n\nHuman: What is the capital of France?\n\nAssistant:"
        assert judge.model.rewards([(asked, " Paris.")]) == pytest.approx([value], abs=1e-5)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / kind).eval()
        logged = [row for row in rows_of(run) if "loss/eval" in row][-1]
        for name, mean in held_out_rewards(run, model).items():
            assert logged[name] == pytest.approx(mean, abs=1e-4), name


@pytest.mark.parametrize("values", [{"ollama": "x"}, {"quantize": "int8"}])
def test_what_is_for_models_that_write_text_is_refused(values, trained, tmp_path):
    with pytest.raises(UserError, match="this checkpoint holds a reward model, and .* is for models that write text"):
        export(trained, ExportOptions(to=tmp_path / "out", **values))


# ---- as a judge -------------------------------------------------------------------------------------------------------------


def test_a_trained_model_judges_rows_as_it_was_trained_on_them(trained):
    judge = RewardModelJudge(str(trained / "LATEST"), None, "cpu")
    assert judge.better(QUESTION, POLITE, RUDE) == "first" and judge.better(QUESTION, RUDE, POLITE) == "second"
    assert judge.better(QUESTION, POLITE, POLITE) == "tie"
    prompts = prepare_run(load_run_config(trained, []), trained).data[-1].table
    tokenizer = judge.model.tokenizer
    for prompt in (prompts[0], prompts[5]):
        text = tokenizer.decode(prompt.prompt_ids)
        responses = [tokenizer.decode(response, skip_special_tokens=True) for response in prompt.responses]
        rows = [tuple(prompt.prompt_ids + response) for response in prompt.responses]
        assert judge.model.rows([(text, response) for response in responses]) == rows


def test_a_judge_computes_in_batches_what_it_computes_alone(trained):
    together, alone = (RewardModelJudge(str(trained / "LATEST"), None, "cpu") for _ in range(2))
    questions = [(QUESTION, POLITE * n, RUDE * (20 - n)) for n in range(1, 20)]
    together.prepare(questions)
    known = dict(together.model.known)
    assert [together.better(*question) for question in questions] == [alone.better(*question) for question in questions]
    assert together.model.known == known, "all were known"
    rows = [(QUESTION, text) for _, *texts in questions for text in texts]
    assert together.model.rewards(rows) == pytest.approx(alone.model.rewards(rows), abs=1e-5)


def test_an_adapter_is_to_be_merged_before_it_judges(adapted):
    with pytest.raises(UserError, match=r"is an adapter. Merge it: python scripts/export.py .* --merge --to FOLDER"):
        RewardModelJudge(str(adapted / "LATEST"), None, "cpu")


def test_the_win_rate_of_a_language_model_is_a_reward_models(trained, run_here, capsys):
    policy = run_here("policy", "loss=sft", "n_examples=96", "n_eval_model_samples=0", "eval_every=96", "do_first_eval=false")
    values = {"judge": f"reward_model:{trained / 'LATEST'}", "n_prompts": 8}
    train.run(load_run_config(policy, [], values), policy)
    found = json.loads((policy / "results.json").read_text())["win_rate"]
    assert found["wins"] + found["ties"] + found["losses"] == found["comparisons"] == 8 and not found["unanswered"]
    # After a hundred examples it has learned to be polite, and an untrained model writes anything.
    assert found["rate"]["mean"] > 0.5


# ---- dry runs, several processes --------------------------------------------------------------------------------------------


def test_a_dry_run_counts_no_logits(run_here, capsys):
    run_here("dry", "dry_run=true")
    out = capsys.readouterr().out
    memory = out[out.index("\nmemory") :]
    assert "parameters" in memory and "optimizer" in memory and "logits" not in memory


@pytest.mark.usefixtures("forked_workers")
def test_two_ranks_compute_and_save_the_same_reward_model(compose, tmp_path):
    settings = compose("trainer=FSDPTrainer", "model=blank_model", "model.name_or_path=x", "loss=reward").as_dict()
    results = launch(reward_work.follow, (settings, str(tmp_path)), 2, None)
    assert results.keys() == {"full", "none", "tensor", "adapter", "context"}
    for name, worst in results.items():
        assert worst["numbers"] < 1e-4 and worst["weights"] < 1e-5 and worst["saved"] < 1e-5, (name, worst)
