"""Products in float16: the loss is scaled, a step whose gradient overflows is not taken, and the scale is resumed."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import iterate_examples
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.writer import CheckpointWriter
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.adapters.adding import add_adapter
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.tracking.tracker import Tracker
from preference_training.training.optimizers.loss_scaling import computes_in_float16
from tests.support.building import build_trainer, weights_of
from tests.support.files import GOLDEN
from trainers import Trainer

# What torch begins with, and one at which every gradient of a float16 product overflows (the largest number is 65,504).
USUAL, TOO_LARGE = 2.0**16, 2.0**40
# A beta at which the gradients of hidden states lie below what float16 has, which ends at 6e-8.
TINY = 1e-7


@pytest.fixture
def build(compose, tokenizer):
    """Build a trainer of a golden model whose products are in float16, or as overrides say."""

    def built(*overrides: str, **parts) -> Trainer:
        options = ("model.autocast_dtype=float16", "warmup_steps=0", "lr=1e-3", "optimizer=AdamW", *overrides)
        config = compose("wandb.enabled=false", *options)
        policy = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32)
        policy.autocast_dtype = torch.float16 if config.model.autocast_dtype else None
        share_prefixes(policy, "on")
        reference = LiveReference(copy.deepcopy(policy))
        return build_trainer(config, policy, build_loss("dpo", beta=0.1), reference, tokenizer=tokenizer, **parts)

    return built


def batch(seed: int = 0) -> list[MicroBatch]:
    """One micro-batch of three pairs."""
    pairs = [TokenizedPrompt([5, 6, 7 + number + seed], [[8, 9, 1], [3, 1]], [(0, 1)]) for number in range(3)]
    return [MicroBatch.of(list(iterate_examples(pairs)))]


def set_scale(trainer: Trainer, scale: float) -> None:
    scaler = trainer.step.updater.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": scale})


def scale_of(trainer: Trainer) -> float:
    return trainer.step.updater.scaler.get_scale()


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_is_that_of_float32_to_what_float16_has_whatever_the_scale(build):
    changes = []
    for scale, overrides in ((1.0, ("model.autocast_dtype=null",)), (USUAL, ()), (2.0**10, ())):
        trainer = build(*overrides)
        before = copy.deepcopy(weights_of(trainer))
        if trainer.step.updater.scaler.is_enabled():
            set_scale(trainer, scale)
        metrics = trainer.train_step(batch())
        assert metrics["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
        changes.append((metrics["grad_norm"], same(before, weights_of(trainer))))
    (exact, _), *scaled = changes
    for norm, is_unchanged in scaled:
        assert norm == pytest.approx(exact, rel=1e-2) and not is_unchanged


def test_a_gradient_that_overflows_changes_no_weight_halves_the_scale_and_is_said(build, tmp_path, capsys):
    trainer = build(tracker=Tracker(tmp_path, None))
    set_scale(trainer, TOO_LARGE)
    before = copy.deepcopy(weights_of(trainer))
    metrics = trainer.train_step(batch())
    assert same(before, weights_of(trainer)) and scale_of(trainer) == TOO_LARGE / 2
    assert math.isfinite(metrics["loss/train"]) and "grad_norm" not in metrics
    assert "overflowed at a loss scale of 1.09951e+12: no update in this step; the scale is halved" in capsys.readouterr().out
    assert trainer.state.bad_steps == 0, "a search for the scale is no fault of the batch"
    set_scale(trainer, USUAL)
    trainer.train_step(batch())
    assert not same(before, weights_of(trainer)) and scale_of(trainer) == USUAL


def test_a_gradient_that_overflows_unscaled_is_a_step_that_is_skipped(build, monkeypatch):
    trainer = build()
    set_scale(trainer, 1.0)
    monkeypatch.setattr(trainer.placement, "clip_gradient", lambda policy: torch.tensor(math.inf))
    before = copy.deepcopy(weights_of(trainer))
    assert trainer.train_step(batch()) == {}
    assert same(before, weights_of(trainer)) and trainer.state.bad_steps == 1


def test_a_resumed_run_has_the_scale_and_takes_the_steps_of_one_that_was_never_stopped(build, tokenizer, tmp_path):
    def first(folder):
        trainer = build(tracker=Tracker(folder, None), writer=CheckpointWriter(folder, build().models.policy, tokenizer))
        set_scale(trainer, TOO_LARGE)
        trainer.train_step(batch())
        set_scale(trainer, scale_of(trainer) / 2**26)
        trainer.train_step(batch(1))
        return trainer

    (tmp_path / "run").mkdir()
    whole = first(tmp_path / "run")
    saved = copy.deepcopy(whole.step.updater.scaler.state_dict())
    whole.save()
    resumed = build()
    resumed.continue_from(Checkpoint.read(tmp_path / "run" / "LATEST"))
    assert resumed.step.updater.scaler.state_dict() == saved
    # 2^40, halved once, and a step since then that did not overflow.
    assert saved["scale"] == 2.0 ** (40 - 1 - 26) and saved["_growth_tracker"] == 1
    metrics = [trainer.train_step(batch(2)) for trainer in (whole, resumed)]
    assert metrics[0] == metrics[1] and same(weights_of(whole), weights_of(resumed))


# ---- weights in float16 -----------------------------------------------------------------------------------------------------


@pytest.fixture
def build_low(compose):
    """Build a trainer of a golden model whose weights are in `dtype`, with or without an adapter, at a beta that is TINY."""

    def built(dtype: str, *overrides: str) -> Trainer:
        options = (f"model.policy_dtype={dtype}", "model.autocast_dtype=null", "warmup_steps=0", "lr=1e-3", "optimizer=AdamW")
        config = compose("wandb.enabled=false", "prefix_sharing=off", *options, *overrides)
        policy = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=getattr(torch, dtype))
        policy.autocast_dtype = None
        reference = LiveReference(copy.deepcopy(policy))
        if config.model.lora.r is not None:
            torch.manual_seed(0)
            add_adapter(policy, config.model)
        return build_trainer(config, policy, build_loss("dpo", beta=TINY), reference)

    return built


@pytest.mark.parametrize(
    "overrides",
    [
        ["+adapter=lora"],
        ["+adapter=lora", "model.lora.modules_to_save=[lm_head]"],
        ["master_weights=true"],
    ],
    ids=["an adapter", "an adapter and a whole module", "all weights"],
)
def test_a_gradient_that_would_underflow_in_float16_weights_arrives_as_in_float32(overrides, build_low):
    exact = build_low("float32", *overrides).train_step(batch())["grad_norm"]
    trainer = build_low("float16", *overrides)
    before = copy.deepcopy(weights_of(trainer))
    assert scale_of(trainer) == USUAL
    assert trainer.train_step(batch())["grad_norm"] == pytest.approx(exact, rel=0.05)
    assert not same(before, weights_of(trainer))
    unscaled = build_low("float16", *overrides)
    set_scale(unscaled, 1.0)
    assert unscaled.train_step(batch())["grad_norm"] < 0.9 * exact, "the scale is what brings it there"


@pytest.mark.parametrize(
    ("overrides", "scales"),
    [
        (["model.policy_dtype=float16", "+adapter=lora"], True),
        (["model.policy_dtype=float16"], True),
        (["model.policy_dtype=float32", "model.autocast_dtype=float16"], True),
        (["model.policy_dtype=float32", "+adapter=qlora", "model.quantized_compute_dtype=float16"], True),
        (["model.policy_dtype=float32", "model.quantized_compute_dtype=float16"], False),
        (["trainer=FSDPTrainer", "model.fsdp_policy_mp=float16", "+adapter=lora"], True),
        (["trainer=FSDPTrainer", "model.policy_dtype=float16", "model.fsdp_policy_mp=bfloat16"], False),
        (["trainer=FSDPTrainer", "trainer.reduce_dtype=float16"], True),
        (["model.policy_dtype=float32", "model.fsdp_policy_mp=float16"], False),
        (["model.policy_dtype=bfloat16"], False),
    ],
)
def test_the_loss_is_scaled_where_anything_is_computed_in_float16(overrides, scales, compose):
    assert computes_in_float16(compose(*overrides)) == scales


def test_a_checkpoint_of_a_run_that_had_no_scaler_begins_one(build_low):
    trainer = build_low("float16", "+adapter=lora")
    trainer.step.updater.scaler.load_state_dict({})
    assert scale_of(trainer) == USUAL
