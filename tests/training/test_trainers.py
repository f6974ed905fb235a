"""The trainer's own step against golden trajectories, and the equivalences that its numbers must keep."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import MicroBatch, evaluation_batches
from preference_training.batching.packing import UNLIMITED, PackedBatch, TokenBudget, cut, iterate_examples
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint, best_first, find_damage, newest_usable
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.configuration.composition import group_choices
from preference_training.core.errors import UserError
from preference_training.core.metric_names import LOSS_AT_BETA_USED, MEASURED, TOKENS_SAVED
from preference_training.core.process_group import SINGLE_PROCESS
from preference_training.core.signals import StoppedError
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import TokenizedPrompt, tokenize_records
from preference_training.evaluation.held_out import evaluate_held_out
from preference_training.evaluation.intervals import mean_interval
from preference_training.losses.base import SharedStatistics
from preference_training.losses.rankings import PlackettLuceLoss
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import CachedReference, LiveReference
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.reference_cache import ReferencePlan, cached_reference
from preference_training.tracking.tracker import Tracker
from preference_training.training.parts import RunState
from tests.support.building import build_trainer, take_steps
from tests.support.files import GOLDEN
from tests.support.losses import of_every_kind
from tests.support.shown import write_files
from trainers import Trainer
from utils import train

LENGTHS = ("max_length=40", "max_prompt_length=20")
TRAJECTORIES = json.loads((GOLDEN / "trajectories.json").read_text())


@pytest.fixture(scope="module")
def models():
    """The golden models by directory name; tests copy what they train."""
    return {
        name: AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
        for name in ("gpt_neox", "gpt_neox_policy", "llama", "llama_policy")
    }


@pytest.fixture
def build(models, compose, tokenizer, tmp_path):
    """Build a trainer on golden models: `build(loss, "llama", "lr=1e-3")`, with any of its parts replaced by name."""

    def built(loss, architecture: str = "llama", *overrides: str, policy: str = "_policy", **parts) -> Trainer:
        config = compose("wandb.enabled=false", "warmup_steps=2", "max_grad_norm=10.0", *overrides)
        new_policy = copy.deepcopy(models[architecture + policy])
        assert share_prefixes(new_policy, config.prefix_sharing) is (config.prefix_sharing != "off")
        reference = None
        if loss.needs_reference:
            reference_model = copy.deepcopy(models[architecture])
            share_prefixes(reference_model, config.prefix_sharing)
            reference = LiveReference(reference_model)
        defaults = {"reference": reference, "tokenizer": tokenizer, "tracker": Tracker(tmp_path, None)}
        return build_trainer(config, new_policy, loss, **(defaults | parts))

    return built


@pytest.fixture(scope="module")
def tokenized(golden, tokenizer):
    """The golden pairs as tokenized prompts, by what the examples of a loss are."""
    records = [
        PreferenceRecord(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], row["chosen"], number, f"row {number}")
        for number, row in enumerate(golden("pairs.json"))
    ]
    targets, pairs = (list(tokenize_records(records, tokenizer, TokenSettings(kind, 64, 32))) for kind in ("targets", "pairs"))
    return {"targets": targets} | of_every_kind(pairs)


def micro_batches(prompts, size):
    """Micro-batches of `size` examples, each in one pack."""
    return [MicroBatch.of(part) for part in cut(list(iterate_examples(prompts)), size)]


@pytest.mark.parametrize(
    "trajectory",
    TRAJECTORIES,
    ids=[
        f"{t['architecture']} {' '.join(map(str, t['loss'].values()))} {t['optimizer']} {t['gradient_accumulation_steps']}"
        for t in TRAJECTORIES
    ],
)
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_eight_steps_follow_the_golden_trajectory(trajectory, sharing, build, tokenized):
    loss = build_loss(**trajectory["loss"])
    settings = [f"{key}={trajectory[key]}" for key in ("optimizer", "lr", "warmup_steps", "max_grad_norm")]
    trainer = build(loss, trajectory["architecture"], f"prefix_sharing={sharing}", *settings)
    size = trajectory["batch_size"] // trajectory["gradient_accumulation_steps"]
    for step in trajectory["steps"]:
        metrics = trainer.train_step(micro_batches([tokenized[loss.examples][row] for row in step["rows"]], size))
        assert metrics["loss/train"] == pytest.approx(step["loss"], rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
        for name, value in step["metrics"].items():
            assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    norm = math.sqrt(sum(weight.double().square().sum().item() for weight in trainer.models.policy.parameters()))
    assert norm == pytest.approx(trajectory["final_param_norm"], rel=1e-4)


def gradient_after_one_step(trainer, batch) -> tuple[torch.Tensor, dict]:
    """What a step with plain SGD at learning rate 1 adds to the weights, and its metrics."""
    before = torch.cat([weight.detach().flatten() for weight in trainer.models.policy.parameters()])
    metrics = trainer.train_step(batch)
    return before - torch.cat([weight.detach().flatten() for weight in trainer.models.policy.parameters()]), metrics


SGD = ("optimizer=SGD", "lr=1.0", "warmup_steps=0", "max_grad_norm=1e9")


@pytest.mark.parametrize(
    "loss",
    [
        *({"name": "sft"}, {"name": "dpo"}, {"name": "ipo"}),
        *({"name": "rpo", "beta": 0.1, "alpha": 1.0}, {"name": "simpo", "beta": 2.0, "gamma": 1.0}),
        *({"name": "sft", "average": "tokens"}, {"name": "rpo", "beta": 0.1, "alpha": 1.0, "average": "tokens"}),
        *({"name": "ld_dpo", "beta": 0.1, "alpha": 0.5}, {"name": "wpo", "beta": 0.1}, {"name": "plackett_luce", "beta": 0.1}),
    ],
    ids=lambda loss: " ".join([loss["name"], loss.get("average", "")]).strip(),
)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(loss, size, build, tokenized):
    built = build_loss(**loss)
    prompts = tokenized[built.examples][:7]
    whole, whole_metrics = gradient_after_one_step(build(built, "llama", *SGD), micro_batches(prompts, 7))
    packs, pack_metrics = gradient_after_one_step(build(built, "llama", *SGD), micro_batches(prompts, size))
    torch.testing.assert_close(packs, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    for name, value in whole_metrics.items():
        torch.testing.assert_close(pack_metrics[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [{"name": "dpo"}, {"name": "sft"}], ids=lambda loss: loss["name"])
def test_the_weight_of_an_example_multiplies_its_gradient_and_its_loss(loss, build, tokenized):
    built = build_loss(**loss)
    prompts = tokenized[built.examples][:3]

    def step(*weights: float):
        weighted = [replace(prompt, weights=[weight]) for prompt, weight in zip(prompts, weights, strict=True)]
        return gradient_after_one_step(build(built, "llama", *SGD), micro_batches(weighted, 2))

    (plain, metrics), (found, found_metrics) = step(1, 1, 1), step(0.5, 3, 0)
    alone = [step(*(float(k == number) for k in range(3))) for number in range(3)]
    torch.testing.assert_close(plain, sum(gradient for gradient, _ in alone), rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    expected = 0.5 * alone[0][0] + 3 * alone[1][0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert found_metrics["loss/train"] == pytest.approx(
        0.5 * alone[0][1]["loss/train"] + 3 * alone[1][1]["loss/train"], rel=1e-5
    )
    assert found_metrics["logps_train/chosen"] == pytest.approx(metrics["logps_train/chosen"])


def test_sft_over_tokens_has_the_loss_and_the_gradient_of_transformers_own_loss_function(build, models, tokenized):
    """Transformers' trainer accumulates micro-batches by the number of scored tokens of the batch, `num_items_in_batch`."""
    prompts, trainer = tokenized["targets"][:5], build(build_loss("sft", average="tokens"), "llama", *SGD)
    model, total = copy.deepcopy(models["llama_policy"]), sum(len(prompt.responses[0]) for prompt in prompts)
    expected = 0.0
    for part in (prompts[:2], prompts[2:]):
        rows = [torch.tensor(prompt.prompt_ids + prompt.responses[0]) for prompt in part]
        labels = [torch.tensor([-100] * len(prompt.prompt_ids) + prompt.responses[0]) for prompt in part]
        ids, masks = (torch.nn.utils.rnn.pad_sequence(each, True) for each in (rows, [torch.ones_like(row) for row in rows]))
        padded = torch.nn.utils.rnn.pad_sequence(labels, True, -100)
        loss = model(input_ids=ids, attention_mask=masks, labels=padded, num_items_in_batch=total).loss
        loss.backward()
        expected += loss.item()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    found, metrics = gradient_after_one_step(trainer, micro_batches(prompts, 2))
    assert metrics["loss/train"] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_metrics_of_labeled_responses_are_means_over_those_that_have_them(build, tokenized):
    loss = build_loss("kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    prompts = tokenized["labels"][:3]
    metrics = build(loss, "llama", *SGD).train_step(micro_batches(prompts, 4))
    # One of them alone: the same responses, each other's label left out.
    good, bad = (
        [replace(prompt, examples=prompt.examples[k : k + 1], labels=prompt.labels[k : k + 1]) for prompt in prompts]
        for k in (0, 1)
    )
    of_good, of_bad = (build(loss, "llama", *SGD).train_step(micro_batches(part, 3)) for part in (good, bad))
    for name, part, other in (("chosen", of_good, of_bad), ("rejected", of_bad, of_good)):
        for kind in ("rewards_train", "logps_train"):
            assert metrics[f"{kind}/{name}"] == pytest.approx(part[f"{kind}/{name}"], rel=1e-4)
            assert f"{kind}/{name}" not in other
    margin = metrics["rewards_train/chosen"] - metrics["rewards_train/rejected"]
    assert metrics["rewards_train/margins"] == pytest.approx(margin) and "rewards_train/margins" not in of_good


def test_a_step_on_equal_policy_and_reference_has_margin_0_and_loss_ln_2(build, tokenized):
    trainer = build(build_loss("dpo", beta=0.1), "gpt_neox", policy="")
    metrics = trainer.train_step(micro_batches(tokenized["pairs"][:6], 6))
    assert metrics["rewards_train/margins"] == 0
    assert metrics["loss/train"] == pytest.approx(math.log(2), abs=1e-6)


def test_beta_dpo_logs_the_beta_in_force_and_its_statistics(build, tokenized):
    loss = build_loss("dpo", beta=0.1, mode_loss="beta_DPO", mode_weight=0.5, a=0.6)
    metrics = build(loss).train_step(micro_batches(tokenized["pairs"][:8], 8))
    assert metrics["beta_DPO/kept_fraction"] == 0.5
    assert metrics["beta_DPO/gap_mean"] == loss.statistics.mean
    assert metrics["beta_DPO/beta_used"] > 0


def test_a_run_trains_and_evaluates_every_example_and_the_last_partial_batches(build, tokenized, tmp_path):
    prompts = tokenized["pairs"]
    train_batches = BatchIterator(Schedule(PromptTable.of(prompts[:13]), 4, length=RunLength(n_epochs=2)))
    trainer = build(
        build_loss("dpo"),
        "llama",
        "batch_size=4",
        "eval_every=8",
        "debug=true",
        train=train_batches,
        held_out=evaluation_batches(PromptTable.of(prompts[13:20]), 4, None, seed=0),
    )
    with trainer.tracker:
        trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [row["counters/examples"] for row in rows if "loss/train" in row]
    assert trained == [4, 8, 12, 13, 17, 21, 25, 26]
    # before the first step, at the first step behind every 8 examples, and at the end
    assert [row["counters/examples"] for row in rows if "loss/eval" in row] == [0, 8, 17, 25, 26]
    assert len(trainer.evaluator.held_out.examples["loss/eval"]) == 7
    assert not list(tmp_path.glob("step-*")), "debug writes no checkpoint"


class StopsAfter:
    """What asks a run to stop in an evaluation, behind so many of its batches; `reason` says so from then on."""

    def __init__(self, batches: int | None):
        self.batches, self.seen, self.reason = batches, 0, None

    @property
    def signal(self) -> str | None:
        if self.batches is not None and self.seen >= self.batches:
            self.reason = "SIGINT"
        self.seen += 1
        return self.reason


def evaluated_run(build, tokenized, stops_after: int | None = None, **parts):
    """A trainer of three steps on 12 examples, evaluated before them and after each, in three batches."""
    prompts = tokenized["pairs"]
    return build(
        build_loss("dpo"),
        *("llama", "lr=1e-3", "optimizer=AdamW", "warmup_steps=0", "batch_size=4", "eval_every=4"),
        policy="",
        train=BatchIterator(Schedule(PromptTable.of(prompts[:12]), 4, length=RunLength(n_epochs=1))),
        held_out=evaluation_batches(PromptTable.of(prompts[12:24]), 4, None, seed=0),
        stop=StopsAfter(stops_after),
        **parts,
    )


def new_folder(path):
    path.mkdir()
    return path


def rows_of(tmp_path) -> list[dict]:
    """The rows of metrics, without what the clock measures."""
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def test_a_run_that_is_stopped_in_its_first_evaluation_ends_at_the_next_batch_and_says_that_nothing_was_trained(
    build, tokenized, tmp_path
):
    trainer = evaluated_run(build, tokenized, stops_after=1)
    with pytest.raises(StoppedError, match="stopped before the first step: SIGINT; nothing was trained") as stopped:
        trainer.train()
    assert not stopped.value.resumable and trainer.observers.stop.seen == 2
    assert rows_of(tmp_path) == [] and trainer.state.updates == 0 and trainer.state.held_out is None


def test_a_run_that_is_stopped_in_a_later_evaluation_makes_it_first_when_it_is_resumed_and_is_as_if_never_stopped(
    build, tokenized, tmp_path
):
    whole = evaluated_run(build, tokenized, tracker=Tracker(new_folder(tmp_path / "whole"), None))
    whole.train()
    folder = new_folder(tmp_path / "stopped")

    def part(stops_after: int | None = None):
        made = evaluated_run(build, tokenized, stops_after, tracker=Tracker(folder, None))
        made.observers.writer = CheckpointWriter(folder, made.models.policy, made.placement.tokenizer)
        return made

    # Behind the three batches before training, and one of the next evaluation.
    with pytest.raises(StoppedError, match="stopped after 4 examples: SIGINT") as stopped:
        part(stops_after=4).train()
    assert stopped.value.resumable and Checkpoint.read(folder / "LATEST").state["evaluation_due"]
    second = part()
    second.continue_from(Checkpoint.read(folder / "LATEST"))
    second.train()
    assert rows_of(folder) == rows_of(tmp_path / "whole")
    assert not Checkpoint.read(folder / "step-4").state["evaluation_due"]
    assert Checkpoint.read(folder / "step-4").state["evaluated_at"] == 4
    for name, weight in whole.models.policy.state_dict().items():
        assert torch.equal(second.models.policy.state_dict()[name], weight), name


def test_a_reference_that_stays_scores_the_held_out_examples_once_with_the_same_bits(build, tokenized):
    trainer = evaluated_run(build, tokenized)
    scored, usual = [], trainer.models.reference

    class Counted(LiveReference):
        def __call__(self, batch):
            scored.append(batch)
            return usual(batch)

    trainer.evaluator.reference.reference = Counted(usual.model)
    trainer.evaluator.evaluate()
    assert len(scored) == 3
    trainer.train_step(micro_batches(tokenized["pairs"][:4], 4))
    trainer.state.evaluated_at = None
    trainer.evaluator.evaluate()
    assert len(scored) == 3
    fresh = evaluate_held_out(trainer.models.policy, usual, trainer.models.loss, trainer.batches.held_out)
    for name, values in fresh.examples.items():
        assert torch.equal(trainer.evaluator.held_out.examples[name], values), name


def test_a_reference_that_moves_is_asked_at_each_evaluation(build, loss_of, tokenized):
    trainer = build(loss_of("tr_dpo"), held_out=evaluation_batches(PromptTable.of(tokenized["pairs"][:4]), 4, None, seed=0))
    assert trainer.evaluator.reference is trainer.models.reference


def test_what_takes_long_before_the_first_step_is_announced_once(build, tokenized, capsys):
    trainer = evaluated_run(build, tokenized, sample_prompts=[tokenized["pairs"][0].prompt_ids])
    capsys.readouterr()
    trainer.before_first_step()
    trainer.state.evaluated_at = None
    trainer.evaluator.evaluate()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sampling: responses to 1 held-out prompt, up to ")
    assert lines[1] == "evaluating: 12 held-out prompts"
    assert sum(line.startswith(("sampling: ", "evaluating: ")) for line in lines) == 2


def test_a_signal_ends_sampling_before_the_first_step_and_nothing_was_trained(build, tokenized):
    trainer = evaluated_run(build, tokenized, sample_prompts=[tokenized["pairs"][0].prompt_ids])
    trainer.observers.stop.reason = "SIGINT"
    with pytest.raises(StoppedError, match="before the first step: SIGINT; nothing was trained") as stopped:
        trainer.before_first_step()
    assert not stopped.value.resumable and trainer.state.reference_answers is None


def test_a_signal_during_later_samples_leaves_the_evaluation_and_stops_the_run(build, tokenized, monkeypatch, capsys):
    trainer = evaluated_run(build, tokenized, sample_prompts=[tokenized["pairs"][0].prompt_ids])
    trainer.before_first_step()
    trainer.train_step(micro_batches(tokenized["pairs"][:4], 4))
    usual = trainer.evaluator._log_samples

    def with_signal():
        trainer.observers.stop.reason = "SIGINT"
        usual()

    monkeypatch.setattr(trainer.evaluator, "_log_samples", with_signal)
    trainer.evaluator.evaluate()
    assert trainer.evaluator.stopped and not trainer.state.evaluation_due
    assert trainer.state.evaluated_at == trainer.state.examples
    assert "sampling was stopped: this evaluation has no samples" in capsys.readouterr().out


def test_samples_that_repeat_are_a_finding_said_once_and_never_before_the_first_step(build, tokenized, tmp_path, monkeypatch):
    trainer = evaluated_run(build, tokenized, sample_prompts=[tokenized["pairs"][0].prompt_ids])
    evaluator = trainer.evaluator
    monkeypatch.setattr(
        evaluator, "responses", lambda model=None: [" ".join(["again and" if trainer.state.updates else "a b c"] * 60)]
    )
    trainer.state.reference_answers = ["Some words that are all different, so that none of them returns " * 2]
    for updates in (0, 1, 2):
        trainer.state.updates, trainer.state.evaluated_at, trainer.state.examples = updates, None, 4 * updates
        evaluator.evaluate()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    [found] = [event for event in events if event.get("finding") == "samples repeat"]
    assert found["text"].startswith("warning: after 4 examples 9") and "the model may be broken" in found["text"]
    assert RunState().findings == [] and trainer.state.state_dict()["findings"] == ["samples repeat"]
    # A run that is resumed knows, unless its checkpoint is of a version that did not.
    resumed, state = RunState(), trainer.state.state_dict()
    resumed.load_state_dict(state)
    assert resumed.findings == ["samples repeat"]
    resumed.load_state_dict({name: value for name, value in state.items() if name != "findings"})


def test_samples_that_the_reference_finds_improbable_are_a_finding_said_once(build, tokenized, tmp_path, monkeypatch):
    trainer = evaluated_run(build, tokenized, sample_prompts=[tokenized["pairs"][0].prompt_ids] * 3)
    monkeypatch.setattr(trainer.evaluator, "responses", lambda model=None: ["some words that are all different"] * 3)
    trainer.state.reference_answers = ["other words"] * 3
    asked = []

    def found(score, prompts, policy, reference, batching):
        asked.append((len(prompts), len(policy), len(reference)))
        return "the reference finds them improbable"

    monkeypatch.setattr("preference_training.training.evaluator.improbability", found)
    for updates in (0, 1, 2):
        trainer.state.updates, trainer.state.evaluated_at, trainer.state.examples = updates, None, 4 * updates
        trainer.evaluator.evaluate()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["text"].split(":")[1] for event in events if event.get("finding") == "samples improbable"] == [
        " after 4 examples the reference finds them improbable"
    ]
    assert asked == [(3, 3, 3)] * 2, "never before the first step"


def test_held_out_loss_and_accuracy_are_compared_with_those_before_training_example_by_example(build, tokenized, tmp_path):
    table = PromptTable.of(tokenized["pairs"][:12])

    def make(**parts):
        loss = build_loss("dpo")
        batches = evaluation_batches(table, 4, None, seed=0)
        return build(loss, "llama", "lr=1e-3", "optimizer=AdamW", "warmup_steps=0", policy="", held_out=batches, **parts)

    trainer, rows = make(), []
    trainer.tracker.log_evaluation = rows.append
    trainer.evaluator.evaluate()
    assert not [name for name in rows[0] if "change" in name]
    before = trainer.evaluator.held_out.examples["loss/eval"]
    trainer.train_step(micro_batches(tokenized["pairs"][:8], 8))
    with CheckpointWriter(tmp_path, trainer.models.policy, trainer.placement.tokenizer) as writer:
        writer.write(trainer.snapshot())
    trainer.evaluator.evaluate()
    differences = (trainer.evaluator.held_out.examples["loss/eval"] - before).numpy()
    assert rows[1]["loss/eval/change"] == pytest.approx(differences.mean())
    interval = rows[1]["loss/eval/change/low"], rows[1]["loss/eval/change/high"]
    assert interval == pytest.approx(mean_interval(differences))
    assert rows[1]["rewards_eval/accuracies/change"] == pytest.approx(rows[1]["rewards_eval/accuracies"] - 0.5)
    # A resumed run remembers them.
    resumed = make()
    resumed.continue_from(Checkpoint.read(tmp_path / "LATEST"))
    resumed.tracker.log_evaluation = rows.append
    resumed.evaluator.evaluate()
    assert {name: rows[2][name] for name in rows[1]} == rows[1]


@pytest.mark.parametrize(
    ("loss", "prompts", "told"),
    [
        ({"name": "dpo"}, 10, []),
        # That they are few was said when the data was prepared.
        ({"name": "dpo"}, 9, []),
        ({"name": "bco", "beta": 0.1}, 10, ["loss/eval depends on a running mean of training's rewards: it is not comparable"]),
    ],
)
def test_what_speaks_against_held_out_numbers_is_said_once(loss, prompts, told, build, tokenized, capsys):
    table = PromptTable.of(tokenized["pairs"][:prompts])
    trainer = build(build_loss(**loss), held_out=evaluation_batches(table, 4, None, seed=0))
    trainer.evaluator.evaluate()
    trainer.train_step(micro_batches(tokenized["pairs"][:4], 4))
    trainer.evaluator.evaluate()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == len(told) and all(text in line for text, line in zip(told, lines, strict=True))


def test_a_run_of_an_earlier_version_forgets_its_best_held_out_loss_which_was_at_another_beta(
    build, tokenized, tmp_path, capsys
):
    def make(**parts):
        batches = evaluation_batches(PromptTable.of(tokenized["pairs"][:12]), 4, None, seed=0)
        return build(build_loss(**BETA_DPO), "llama", "lr=1e-3", held_out=batches, **parts)

    first = make()
    first.train_step(micro_batches(tokenized["pairs"][:4], 4))
    first.evaluator.evaluate()
    with CheckpointWriter(tmp_path, first.models.policy, first.placement.tokenizer) as writer:
        writer.write(first.snapshot())
    state = tmp_path / "LATEST" / "state.json"
    now = make()
    now.continue_from(Checkpoint.read(tmp_path / "LATEST"))
    assert now.state.best == first.state.held_out["loss/eval"] and best_first([tmp_path / "LATEST"], "loss/eval")
    written = json.loads(state.read_text())
    del written["held_out"][LOSS_AT_BETA_USED]
    state.write_text(json.dumps(written))
    capsys.readouterr()
    then = make()
    then.continue_from(Checkpoint.read(tmp_path / "LATEST"))
    assert then.state.best is None and not best_first([tmp_path / "LATEST"], "loss/eval")
    assert "the best value so far is discarded" in capsys.readouterr().out


def test_metrics_names_are_the_documented_ones(build, tokenized):
    trainer = build(build_loss("dpo"), held_out=evaluation_batches(PromptTable.of(tokenized["pairs"][:4]), 4, None, seed=0))
    names = set(trainer.train_step(micro_batches(tokenized["pairs"][:4], 4)))
    rewards = {"chosen", "rejected", "accuracies", "margins"}
    for split in ("train", "eval"):
        expected = {f"rewards_{split}/{kind}" for kind in rewards} | {
            f"logps_{split}/chosen",
            f"logps_{split}/rejected",
            f"loss/{split}",
        }
        if split == "eval":
            trainer.evaluator.evaluate()
            names = set(trainer.evaluator.held_out.means())
        assert expected <= names
        assert names <= expected | {"grad_norm", "tokens_saved"}


def test_the_learning_rate_rises_linearly_over_the_warm_up(build, tokenized):
    trainer = build(build_loss("sft"), "llama", "lr=1.0", "warmup_steps=3", "optimizer=SGD")
    rates = []
    for _ in range(5):
        rates.append(trainer.step.updater.scheduler.get_last_lr()[0])
        trainer.train_step(micro_batches(tokenized["targets"][:1], 1))
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_optimizer_arguments_reach_the_optimizer(build):
    trainer = build(build_loss("sft"), "llama", "optimizer=AdamW", "++optimizer_kwargs.weight_decay=0.25")
    assert trainer.step.updater.optimizer.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize("kind", ["true", "selective"])
def test_activation_checkpointing_changes_no_bit_of_the_gradient(build, tokenized, kind):
    batch = micro_batches(tokenized["pairs"][:4], 4)
    plain, _ = gradient_after_one_step(build(build_loss("dpo"), "gpt_neox", *SGD), batch)
    saved, _ = gradient_after_one_step(build(build_loss("dpo"), "gpt_neox", *SGD, f"activation_checkpointing={kind}"), batch)
    assert torch.equal(saved, plain)


def test_samples_are_the_same_for_the_same_seed_and_leave_the_random_stream_alone(build, tokenized):
    prompts = [prompt.prompt_ids for prompt in tokenized["pairs"][:3]]
    trainer = build(build_loss("dpo"), "llama", *LENGTHS, sample_prompts=prompts)
    state = torch.get_rng_state()
    trainer.state.reference_answers = trainer.evaluator.responses()
    first, second = trainer.evaluator.sample(), trainer.evaluator.sample()
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert [set(row) for row in first] == [{"examples", "prompt", "policy", "reference"}] * 3


@pytest.mark.parametrize(("every", "sampled"), [(16, [0, 16, 40]), (None, [0, 8, 16, 24, 40, 44])])
def test_responses_are_sampled_at_the_first_evaluation_after_sample_every_more_examples(every, sampled, build, tokenized):
    prompts, found = tokenized["pairs"][:4], []
    batches = {
        "train": BatchIterator(Schedule(PromptTable.of(prompts), 4)),
        "held_out": evaluation_batches(PromptTable.of(prompts), 4, None, seed=0),
        "sample_prompts": [prompts[0].prompt_ids],
    }
    trainer = build(build_loss("dpo"), "llama", *LENGTHS, f"sample_every={'null' if every is None else every}", **batches)
    trainer.observers.tracker.log_samples = lambda rows, examples: found.append(examples)
    for examples in (0, 8, 16, 24, 40, 44):
        trainer.state.examples = examples
        trainer.evaluator.evaluate()
    assert found == sampled


def test_one_prompt_with_several_pairs_counts_each_pair(build):
    prompt = TokenizedPrompt([5, 6, 7], [[8, 9, 0], [10, 0], [11, 12, 13, 0]], [(0, 1), (0, 2), (1, 2)])
    metrics = build(build_loss("dpo")).train_step(micro_batches([prompt], 3))
    trainer = build(build_loss("dpo"))
    apart = [TokenizedPrompt(prompt.prompt_ids, [prompt.responses[i], prompt.responses[j]], [(0, 1)]) for i, j in prompt.pairs]
    expected = trainer.train_step(micro_batches(apart, 3))
    torch.testing.assert_close(metrics["loss/train"], expected["loss/train"])
    torch.testing.assert_close(metrics["grad_norm"], expected["grad_norm"])


# What the defaults would leave out of a few steps.
LOSS_CHANGES = {"beta_DPO": ["loss.mode_weight=0.25"], "tr_dpo": ["loss.reference_update_every=2"]}


@pytest.fixture
def loss_of(compose, tmp_path):
    """Build the loss of a file in config/loss/, with values that make a difference in a few steps: `loss_of("tr_dpo")`.

    `own` is the one that docs/your-own-loss.md shows.
    """
    write_files("docs/your-own-loss.md", tmp_path)
    changes = LOSS_CHANGES | {"own": [f"loss.function={tmp_path}/my_losses.py:CappedDPO"]}

    def build(name: str):
        loss = compose(f"loss={name}", *changes.get(name, [])).loss
        return build_loss(**loss.given())

    return build


@pytest.mark.parametrize("name", group_choices("loss"))
def test_every_loss_falls_and_its_margin_grows_over_steps_on_the_same_examples(name, build, loss_of, tokenized):
    trainer = build(loss_of(name), "llama", "lr=1e-3", "optimizer=AdamW", "warmup_steps=0", policy="")
    batch = micro_batches(tokenized[trainer.models.loss.examples][:8], 8)
    steps = [trainer.train_step(batch) for _ in range(6)]
    if name not in ("beta_DPO", "tr_dpo"):
        # Of these the measure changes on the way.
        assert steps[-1]["loss/train"] < steps[0]["loss/train"]
    # DiscoPOP's loss rises with the margin around 0.
    if name != "discopop" and trainer.models.loss.examples != "targets":
        assert steps[-1]["rewards_train/margins"] > steps[0]["rewards_train/margins"]


@pytest.mark.parametrize("name", group_choices("loss"))
def test_a_trainer_continues_from_its_state_bit_for_bit(name, build, loss_of, tokenized, tmp_path):
    def make(**parts):
        loss = loss_of(name)
        prompts = tokenized[loss.examples]
        prompts = prompts[: 28 // prompts[0].num_examples]
        train_batches = BatchIterator(Schedule(PromptTable.of(prompts), 4, length=RunLength(n_epochs=1)))
        return build(loss, "gpt_neox", "lr=1e-3", "optimizer=AdamW", train=train_batches, **parts)

    whole, first = make(), make()
    take_steps(whole)
    take_steps(first, until=3)
    with CheckpointWriter(tmp_path, first.models.policy, first.placement.tokenizer) as writer:
        writer.write(first.snapshot())
    second = make(policy="")
    second.continue_from(Checkpoint.read(tmp_path / "LATEST"))
    take_steps(second)
    assert (second.state.examples, second.state.updates) == (whole.state.examples, whole.state.updates) == (28, 7)
    for weight_name, weight in whole.models.policy.state_dict().items():
        assert torch.equal(second.models.policy.state_dict()[weight_name], weight), weight_name
    # Of the reference only what has moved is part of a checkpoint.
    assert (tmp_path / "LATEST" / "reference").is_dir() is (name == "tr_dpo")
    for weight_name, weight in whole.moving_reference_weights().items():
        assert torch.equal(second.moving_reference_weights()[weight_name], weight), weight_name


def test_a_reference_moves_by_its_share_of_the_way_to_the_policy_after_so_many_steps(build, tokenized):
    loss = build_loss("tr_dpo", beta=0.1, reference_update_every=2, reference_update_share=0.25)
    trainer = build(loss, "llama", "lr=1e-2", "optimizer=AdamW", "warmup_steps=0")
    before = copy.deepcopy(trainer.models.reference.model.state_dict())
    for start in (0, 4):
        assert all(torch.equal(weight, before[name]) for name, weight in trainer.moving_reference_weights().items())
        trainer.train_step(micro_batches(tokenized["pairs"][start : start + 4], 4))
    policy = trainer.models.policy.state_dict()
    for name, weight in trainer.moving_reference_weights().items():
        torch.testing.assert_close(weight.detach(), 0.75 * before[name] + 0.25 * policy[name], rtol=1e-5, atol=1e-7)


def test_a_reference_that_moves_all_the_way_is_a_copy_and_the_margin_begins_at_0_again(build, tokenized):
    loss = build_loss("tr_dpo", beta=0.1, reference_update_every=2, reference_update_share=1.0)
    trainer = build(loss, "llama", "lr=1e-2", "optimizer=AdamW", "warmup_steps=0")
    steps = [trainer.train_step(micro_batches(tokenized["pairs"][:4], 4)) for _ in range(3)]
    assert steps[1]["rewards_train/margins"] != 0 == steps[2]["rewards_train/margins"]
    assert not any(weight.grad is not None for weight in trainer.models.reference.model.parameters())


def test_a_reference_that_has_moved_answers_the_sample_prompts_anew(build, tokenized):
    loss = build_loss("tr_dpo", beta=0.1, reference_update_every=1, reference_update_share=1.0)
    prompts = [prompt.prompt_ids for prompt in tokenized["pairs"][:3]]
    trainer = build(loss, "llama", *LENGTHS, "lr=1e-2", "warmup_steps=0", sample_prompts=prompts)
    trainer.state.reference_answers = ["what it said at the beginning"] * 3
    trainer.train_step(micro_batches(tokenized["pairs"][:4], 4))
    # It is a copy of the policy now.
    assert all(row["reference"] == row["policy"] for row in trainer.evaluator.sample())


@pytest.mark.parametrize("live", [True, False])
def test_a_run_that_goes_on_may_have_another_number_of_sample_prompts(build, tokenized, live, capsys):
    prompts = [prompt.prompt_ids for prompt in tokenized["pairs"][:3]]
    trainer = build(build_loss("dpo"), "llama", *LENGTHS, "lr=1e-2", "warmup_steps=0", sample_prompts=prompts)
    answers = trainer.evaluator.responses(trainer.models.reference.model)
    trainer.train_step(micro_batches(tokenized["pairs"][:4], 4))
    if not live:
        trainer.models.reference = CachedReference(torch.zeros(8))
    trainer.state.reference_answers = [*answers, "to a fourth prompt"]
    trainer.evaluator.resume()
    assert [row["reference"] for row in trainer.evaluator.sample()] == answers
    assert "samples:" not in capsys.readouterr().out
    for kept in ([], answers[:2]):
        trainer.state.reference_answers = kept
        trainer.evaluator.resume()
        assert [row.get("reference") for row in trainer.evaluator.sample()] == (answers if live else [None] * 3)
        assert ("samples: the reference has answered" in capsys.readouterr().out) is not live


def test_a_moved_reference_lies_beside_weights_that_load_with_plain_transformers(build, loss_of, tokenized, tmp_path):
    trainer = build(loss_of("tr_dpo"), "llama", "lr=1e-2", "optimizer=AdamW", "warmup_steps=0")
    for _ in range(3):
        trainer.train_step(micro_batches(tokenized["pairs"][:4], 4))
    with CheckpointWriter(
        tmp_path, trainer.models.policy, trainer.placement.tokenizer, options=SaveOptions(background=True)
    ) as writer:
        writer.write(trainer.snapshot())
    policy, reference = trainer.models.policy.state_dict(), trainer.models.reference.model.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in policy.items())
    kept = {name: torch.empty_like(weight) for name, weight in reference.items()}
    Checkpoint.read(tmp_path / "LATEST").read_reference(kept)
    assert all(torch.equal(kept[name], weight) for name, weight in reference.items())
    assert any(not torch.equal(kept[name], weight) for name, weight in policy.items())
    assert find_damage(tmp_path / "LATEST") is None


@pytest.mark.parametrize("name", ["beta_DPO", "bco", "kto", "aot", "aot_unpaired"])
@pytest.mark.parametrize("budget", [30, 60, 100])
def test_what_a_loss_finds_in_a_micro_batch_is_the_same_when_memory_cuts_it(name, budget, build, loss_of, tokenized):
    def step(max_tokens):
        loss = loss_of(name)
        examples = list(iterate_examples(tokenized[loss.examples][:8]))
        batch = MicroBatch.of(examples, TokenBudget(max_tokens, max_tokens))
        gradient, metrics = gradient_after_one_step(build(loss, "llama", *SGD), [batch])
        return len(batch.packs), gradient, metrics

    (_, whole, expected), (count, packs, found) = step(10_000), step(budget)
    assert count > 1
    torch.testing.assert_close(packs, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    # Packs share fewer prefixes.
    for name in expected.keys() - {TOKENS_SAVED}:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-6), name


class SurveyedRankings(PlackettLuceLoss):
    """Keeps what it sees of a micro-batch."""

    needs_batch_statistics = True

    def batch_statistics(self, policy, reference, examples):
        self.seen = policy, reference, examples
        return SharedStatistics()


@pytest.mark.parametrize("budget", [1, 10_000])
def test_rankings_of_any_length_are_surveyed_together(budget, build, tokenized):
    loss, examples = SurveyedRankings(0.1), list(iterate_examples(tokenized["rankings"][:4]))
    batch = MicroBatch.of(examples, TokenBudget(budget, budget))
    # Of two and of three responses: alone, each pack is as wide as its ranking.
    widths = {pack.members.shape[1] for pack in batch.packs}
    assert widths == ({2, 3} if budget == 1 else {3})
    trainer = build(loss, "llama")
    trainer.train_step([batch])
    policy, reference, seen = loss.seen
    assert (seen.members >= 0).sum(1).tolist() == [2, 3, 2, 3]
    for values in (policy, reference, seen.lengths.view(4, 3)):
        assert values.count_nonzero(1).tolist() == [2, 3, 2, 3] and not values[::2, 2].any()
    assert seen.mean_length == sum(len(prompt.responses[0]) for prompt, _ in examples) / 4


@pytest.mark.parametrize("name", ["kto", "plackett_luce", "sft", "dpo"])
def test_only_pairs_are_kept_for_the_ledger(name, build, loss_of, tokenized):
    loss = loss_of(name)
    result = build(loss, "llama").step.take(micro_batches(tokenized[loss.examples][:4], 4), halve=None)
    kept = [(pack.pairs, pack.margins) for pack in result.packs]
    if name == "dpo":
        assert [pairs.shape for pairs, _ in kept] == [(4, 2)] and not kept[0][1].isnan().any()
    else:
        assert kept == [(None, None)] * len(kept)


def test_a_cached_reference_gives_the_steps_of_a_live_one(build, tokenized, tmp_path):
    table = PromptTable.of(tokenized["pairs"])

    def numbers(reference):
        trainer = build(build_loss("dpo"), **({"reference": reference} if reference else {}))
        return [trainer.train_step(batch)["loss/train"] for batch in BatchIterator(Schedule(table, 8))]

    live = build(build_loss("dpo")).models.reference
    reads = ReferencePlan.for_run(
        BatchIterator(Schedule(table, 8)), PromptTable.of([], table.num_responses), 8, None, 0, UNLIMITED, SINGLE_PROCESS
    )
    cached = cached_reference(live, reads, tmp_path / "logps.safetensors")
    assert numbers(cached) == numbers(None)


def test_autocast_computes_products_in_the_shorter_format_and_sums_in_float32(build, tokenized):
    batch = micro_batches(tokenized["pairs"][:4], 4)
    exact, short = build(build_loss("dpo")), build(build_loss("dpo"))
    short.models.policy.autocast_dtype = short.models.reference.model.autocast_dtype = torch.bfloat16
    expected, found = exact.step.logps(batch[0].packs[0])[0], short.step.logps(batch[0].packs[0])[0]
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.1)
    assert next(short.models.policy.parameters()).dtype == torch.float32


def test_optimizers_use_their_fused_kernel_where_they_have_one(build):
    for name, fused in [("AdamW", True), ("Adam", True), ("SGD", True), ("RMSprop", False)]:
        trainer = build(build_loss("sft"), "llama", f"optimizer={name}")
        assert bool(trainer.step.updater.optimizer.defaults.get("fused")) is fused


# ---- what goes wrong in a step ------------------------------------------------------------------------------------------


BETA_DPO = {"name": "dpo", "beta": 0.1, "mode_loss": "beta_DPO", "mode_weight": 0.5, "a": 0.6}


def rare_token(prompts, row: int) -> int:
    """A token of one prompt that no other of them has."""
    tokens = [set(prompt.prompt_ids).union(*prompt.responses) for prompt in prompts]
    return min(tokens[row].difference(*tokens[:row], *tokens[row + 1 :]))


def not_a_number(trainer, token: int):
    """Make an embedding row of a trainer's model NaN; returns what it was."""
    weight = trainer.models.policy.get_input_embeddings().weight
    usual = weight.detach()[token].clone()
    with torch.no_grad():
        weight[token] = math.nan
    return usual


@pytest.mark.parametrize("loss", [{"name": "dpo"}, BETA_DPO], ids=["DPO", "beta-DPO"])
def test_a_step_with_a_loss_that_is_not_finite_is_as_if_it_had_never_been(loss, build, tokenized, tmp_path, capsys):
    prompts = tokenized["pairs"][:12]
    disturbed, straight = (build(build_loss(**loss), "llama", "lr=1e-2", "optimizer=AdamW", "batch_size=4") for _ in range(2))
    steps = [micro_batches(prompts[start : start + 4], 4) for start in (0, 4, 8)]
    for trainer in (disturbed, straight):
        trainer.train_step(steps[0])
    token = rare_token(prompts[4:8], 1)
    usual, others = (
        not_a_number(disturbed, token),
        torch.arange(len(disturbed.models.policy.get_input_embeddings().weight)) != token,
    )
    assert disturbed.train_step(steps[1]) == {}
    [row] = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert (row["not_finite"], row["counters/examples"], row["counters/updates"]) == ("loss", 8, 1)
    assert [name for name in row["pairs"] if "row 5" in name] and "skipped: its loss is not finite" in capsys.readouterr().out
    embedding = disturbed.models.policy.get_input_embeddings().weight
    assert torch.equal(embedding[others], straight.models.policy.get_input_embeddings().weight[others])
    with torch.no_grad():
        embedding[token] = usual
    torch.testing.assert_close(disturbed.models.loss.state_dict(), straight.models.loss.state_dict(), rtol=0, atol=0)
    found, expected = (trainer.train_step(steps[2]) for trainer in (disturbed, straight))
    assert found == expected
    for name, weight in straight.models.policy.state_dict().items():
        assert torch.equal(disturbed.models.policy.state_dict()[name], weight), name


def test_too_many_bad_steps_in_a_row_end_the_run_with_one_message_and_the_last_checkpoint_is_good(build, tokenized, tmp_path):
    overrides = "batch_size=4", "save_every=4", "max_bad_steps=3", "eval_every=4", "lr=1e-2"
    batches = BatchIterator(Schedule(PromptTable.of(tokenized["pairs"]), 4))
    trainer = build(build_loss("dpo"), "llama", *overrides, train=batches)
    step, taken = trainer.train_step, []

    def worse_and_worse(batch):
        # Two bad steps, a good one, and then bad ones only.
        number = len(taken)
        usual = not_a_number(trainer, slice(None)) if number in (1, 2) or number > 3 else None
        before = [weight.clone() for weight in trainer.models.policy.parameters()]
        try:
            taken.append(step(batch))
        finally:
            if usual is not None:
                torch.testing.assert_close(list(trainer.models.policy.parameters()), before, rtol=0, atol=0, equal_nan=True)
                with torch.no_grad():
                    trainer.models.policy.get_input_embeddings().weight.copy_(usual)
        return taken[-1]

    trainer.train_step = worse_and_worse
    told = pytest.raises(UserError, match="max_bad_steps: 3 steps in a row .* bad_batches.jsonl names the examples")
    with CheckpointWriter(tmp_path, trainer.models.policy, trainer.placement.tokenizer) as trainer.observers.writer, told:
        trainer.train()
    assert [bool(metrics) for metrics in taken] == [True, False, False, True, False, False]
    assert len((tmp_path / "bad_batches.jsonl").read_text().splitlines()) == 5
    newest = newest_usable(tmp_path)
    assert newest.state["updates"] == 2
    saved = AutoModelForCausalLM.from_pretrained(newest.path, dtype=torch.float32).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in trainer.models.policy.state_dict().items())


@pytest.mark.parametrize("loss", [{"name": "dpo"}, BETA_DPO], ids=["DPO", "beta-DPO"])
def test_a_step_that_does_not_fit_into_memory_is_computed_in_halves_with_the_same_gradient(loss, build, tokenized, capsys):
    table = PromptTable.of(tokenized["pairs"][:8])

    def step(most_tokens: float):
        trainer = build(build_loss(**loss), "llama", *SGD, train=BatchIterator(Schedule(table, 8)))
        usual = trainer.step.logps

        def logps(pack):
            if len(pack.input_ids) > most_tokens:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return usual(pack)

        trainer.step.logps = logps
        [batch] = trainer.batches.train
        largest = max(len(piece.input_ids) for micro_batch in batch for piece in micro_batch.packs)
        return largest, *gradient_after_one_step(trainer, batch), trainer.models.loss.state_dict()

    tokens, whole, expected, state = step(math.inf)
    capsys.readouterr()
    _, packs, found, state_of_packs = step(tokens - 1)
    out = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("prefix sharing: ")]
    assert out == [f"warning: out of memory; packs are limited to {tokens // 2} tokens from now on"]
    torch.testing.assert_close(packs, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    for name in expected:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-6), name
    torch.testing.assert_close(state_of_packs, state)


def limited_trainer(build, tokenized, fits: Callable[[PackedBatch], bool]):
    """A trainer of one batch whose forward runs out of memory at the packs that do not fit, and that batch."""
    table = PromptTable.of(tokenized["pairs"][:8])
    trainer = build(build_loss("dpo"), "llama", *SGD, train=BatchIterator(Schedule(table, 8)))
    usual = trainer.step.logps

    def logps(pack):
        if not fits(pack):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(pack)

    trainer.step.logps = logps
    return trainer, next(iter(trainer.batches.train))


def test_packs_are_halved_until_they_fit_into_memory(build, tokenized, capsys):
    expected = gradient_after_one_step(*limited_trainer(build, tokenized, lambda pack: True))
    capsys.readouterr()
    trainer, batch = limited_trainer(build, tokenized, lambda pack: len(pack.places) <= 2)
    found = gradient_after_one_step(trainer, batch)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: out of memory; ")]
    assert len(said) >= 2
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5 * expected[0].abs().max().item())
    assert float(found[1]["loss/train"]) == pytest.approx(float(expected[1]["loss/train"]), rel=1e-5)


def test_a_single_example_that_does_not_fit_into_memory_is_named(build, tokenized):
    trainer, batch = limited_trainer(build, tokenized, lambda pack: False)
    with pytest.raises(
        UserError, match=r"^max_length: a single example of \d+ tokens does not fit into memory \(.*\), so smaller"
    ):
        trainer.train_step(batch)


def test_memory_that_is_too_small_outside_of_steps_is_a_mistake_that_says_where(compose, tmp_path, monkeypatch):
    def out_of_memory(policy, reference, loss, batches, *args):
        next(batches)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("preference_training.training.evaluator.evaluate_held_out", out_of_memory)
    config = compose("loss=dpo", "n_examples=16", "n_eval_examples=16", "sample_during_eval=false", f"local_run_dir={tmp_path}")
    with pytest.raises(UserError) as error:
        train(config, quiet=True)
    assert str(error.value).startswith("memory: out of memory in batch 1 of 1 of an evaluation. Set ")
    assert str(error.value).endswith(" Found: CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_tokens_are_counted_as_they_were_computed_after_packs_were_halved(build):
    # What all prompts share is computed once in each pack.
    shared = list(range(5, 45))
    prompts = [TokenizedPrompt([*shared, 50 + k], [[60, 0], [61, 62, 0]], [(0, 1)]) for k in range(4)]
    trainer = build(build_loss("dpo"), train=BatchIterator(Schedule(PromptTable.of(prompts), 4)))
    usual, whole = trainer.step.logps, 40 + 4 * (1 + 2 + 3)

    def logps(pack):
        if len(pack.input_ids) == whole:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(pack)

    trainer.step.logps = logps
    [batch] = trainer.batches.train
    metrics = trainer.train_step(batch)
    # No two of them fit into half as many tokens.
    assert trainer.state.tokens == 4 * (40 + 6)
    assert metrics[TOKENS_SAVED] == pytest.approx(1 - 4 * 46 / (4 * (41 + 2 + 41 + 3)))
