"""Muon, Adafactor, schedule-free optimizers and GaLore: what they compute, on which weights, and that runs resume exactly."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.resume import resumable
from preference_training.core.errors import UserError
from preference_training.training.optimizers.building import build_optimizer, check_optimizer
from preference_training.training.optimizers.groups import hidden_matrices
from tests.support.building import weights_of
from tests.support.files import GOLDEN
from tests.training import test_optimization
from tests.training.test_optimization import BF16, trainer_of

GALORE = "optimizer=GaLore", "++optimizer_kwargs.rank=4", "++optimizer_kwargs.update_proj_gap=2"
RESUMED = [
    ("optimizer=Muon",),
    (BF16, "optimizer=Muon", "ema_decay=0.9", "lr_groups={embed: 0.1}"),
    ("optimizer=Adafactor", "lr=1e-2"),
    ("optimizer=AdamWScheduleFree", "lr_schedule=constant"),
    (BF16, "optimizer=SGDScheduleFree", "lr_schedule=constant", "lr=0.1"),
    GALORE,
    (BF16, *GALORE),
    ("optimizer=AdamW", "ema_decay=0.9"),
    (BF16, "optimizer=AdamW8bit", "ema_decay=0.9"),
]


def assert_equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """The same names, and the same values bit for bit."""
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


@pytest.mark.parametrize("settings", RESUMED, ids=" ".join)
def test_a_run_resumes_bit_for_bit(compose, tokenizer, tmp_path, settings):
    require_exact_resume(compose, tokenizer, tmp_path, settings)


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=AdamW",),
        (BF16, "optimizer=AdamW", "master_weights=true"),
        ("optimizer=AdamW", "ema_decay=0.9"),
        ("optimizer=AdamWScheduleFree", "lr_schedule=constant"),
        (BF16, "optimizer=AdamWScheduleFree", "lr_schedule=constant", "master_weights=true"),
    ],
    ids=" ".join,
)
def test_a_weight_without_a_gradient_keeps_its_value_and_the_run_resumes_bit_for_bit(
    compose, tokenizer, tmp_path, settings, monkeypatch
):
    def with_an_unreached_weight(folder, **options):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        norm = model.model.norm
        norm.forward = lambda x: nn.functional.rms_norm(x, norm.weight.shape, norm.weight.detach(), norm.variance_epsilon)
        return model

    monkeypatch.setattr(test_optimization, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=with_an_unreached_weight))
    whole = require_exact_resume(compose, tokenizer, tmp_path, settings)
    before = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama").model.norm.weight
    assert torch.equal(weights_of(whole)["model.norm.weight"].float(), before)


def require_exact_resume(compose, tokenizer, tmp_path, settings):
    overrides = "lr=1e-5", "n_epochs=2", "lr_schedule=cosine", "weight_decay=0.1", "n_eval_model_samples=0", *settings
    whole = trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path)
    whole.train()
    resumed = trainer_of(compose, tokenizer, *overrides)
    resumable(tmp_path / "step-8")
    resumed.continue_from(Checkpoint.read(tmp_path / "step-8"))
    resumed.train()
    assert whole.state.held_out == resumed.state.held_out
    assert_equal(weights_of(whole), weights_of(resumed))
    for one, other in zip(*(each.step.updater.optimizer_state()["state"].values() for each in (whole, resumed)), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])) for key, value in one.items())
    return whole


# ---- Muon -------------------------------------------------------------------------------------------------------------------


def golden_llama() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "llama")


def with_gradients(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    return model


def test_muon_is_torchs_on_hidden_matrices_and_adamw_on_all_other_weights(compose):
    model, other = golden_llama(), golden_llama()
    config = compose("optimizer=Muon", "lr=1e-3", "++optimizer_kwargs.momentum=0.9", "++optimizer_kwargs.adamw.eps=1e-6")
    optimizer = build_optimizer(model, config)
    inside = [weight for name, weight in other.named_parameters() if "_proj" in name]
    outside = [weight for name, weight in other.named_parameters() if "_proj" not in name]
    plain = [
        torch.optim.Muon(inside, lr=1e-3, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=1e-3, eps=1e-6, fused=True),
    ]
    for seed in range(3):
        for each, optimizers in ((model, [optimizer]), (other, plain)):
            with_gradients(each, seed)
            for one in optimizers:
                one.step()
    for (name, weight), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_embeddings_and_heads_are_no_hidden_matrices(reward_model):
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(reward_model)
    matrices = hidden_matrices(classifier)
    outside = [name for name, weight in classifier.named_parameters() if weight.ndim == 2 and weight not in matrices]
    assert outside == ["model.embed_tokens.weight", "score.weight"]


# ---- schedule-free ----------------------------------------------------------------------------------------------------------


def test_a_schedule_free_run_evaluates_and_saves_the_average_and_trains_on(compose, tokenizer, tmp_path):
    overrides = "optimizer=AdamWScheduleFree", "lr_schedule=constant", "lr=1e-3", "n_epochs=2", "n_eval_model_samples=0"
    whole = trainer_of(compose, tokenizer, *overrides, "eval_every=4", run_dir=tmp_path)
    whole.train()
    # Evaluating less often changes nothing of what is trained.
    seldom = trainer_of(compose, tokenizer, *overrides, "eval_every=1000")
    seldom.train()
    assert all(
        torch.equal(one, other) for one, other in zip(weights_of(whole).values(), weights_of(seldom).values(), strict=True)
    )
    # The library's own average, of the weights as trained.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST")
    optimizer = whole.step.updater.optimizer
    optimizer.eval()
    for weight, expected in zip(saved.parameters(), whole.models.policy.parameters(), strict=True):
        assert torch.equal(weight, expected)
    optimizer.train()


# ---- GaLore -----------------------------------------------------------------------------------------------------------------


def test_galore_of_full_rank_and_scale_is_adamw_in_the_gradients_own_directions(compose):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    arguments = "rank=4", "scale=1", "update_proj_gap=1000", "eps=1e-6"
    galore = build_optimizer(
        layer, compose("optimizer=GaLore", "lr=0.1", *(f"++optimizer_kwargs.{each}" for each in arguments))
    )
    before, gradient = layer.weight.detach().clone(), torch.randn(4, 6)
    layer.weight.grad = gradient.clone()
    galore.step()
    # The first update of Adam is the sign of the gradient, here of its projection to the left singular vectors.
    left = torch.linalg.svd(gradient, full_matrices=False).U
    expected = before - 0.1 * left @ torch.sign(left.T @ gradient)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-3, atol=1e-3)
    assert galore.state[layer.weight]["directions"].shape == (4, 4)


# ---- at the door ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=Muon", "trainer=TensorParallelTrainer"], "optimizer: found Muon, whose updates are of whole matrices"),
        (["optimizer=Adafactor", "trainer=FSDPTrainer"], "optimizer: found Adafactor, whose kernels do not support sharded"),
        (["optimizer=GaLore", "trainer=FSDPTrainer"], "optimizer: found GaLore, whose kernels do not support sharded"),
        (["optimizer=AdamWScheduleFree", "lr_schedule=linear"], "lr_schedule: found linear, expected constant"),
        (["optimizer=AdamWScheduleFree", "ema_decay=0.9"], "ema_decay: found 0.9, expected null"),
        (["ema_decay=1"], "ema_decay: found 1, expected a number above 0 and below 1"),
        ([BF16, "ema_decay=0.9", "master_weights=false"], "master_weights: found false, and ema_decay averages weights"),
        (["lr_restarts=1"], "lr_restarts: found 1, and lr_schedule is constant"),
        (["decay_share=0"], "decay_share: found 0, expected a share above 0"),
        (["lr_groups={embed: 0}"], "lr_groups: embed: found 0, expected patterns of names with numbers above 0"),
        (["load_best=true", "save_strategy=epoch"], "load_best: found true with save_strategy=epoch"),
        (["load_best=true", "save_every=64", "eval_every=128"], "load_best: found true with save_every=64"),
        (["load_best=true", "keep_last=1"], "Set keep_best=1 too"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(compose, overrides, message):
    with pytest.raises(UserError, match=message):
        compose(*overrides)


@pytest.mark.parametrize("optimizer", ["Muon", "Adafactor", "AdamWScheduleFree", "GaLore"])
def test_arguments_that_an_optimizer_does_not_take_are_refused(compose, optimizer):
    with pytest.raises(UserError, match=f"optimizer_kwargs: {optimizer} refuses .*'nonsense'"):
        check_optimizer(compose(f"optimizer={optimizer}", "++optimizer_kwargs.nonsense=true"))


def test_a_package_that_is_missing_is_named(compose, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError, match="AdamWScheduleFree needs the package schedulefree. Run `pip install -r requirements/"):
        check_optimizer(compose("optimizer=AdamWScheduleFree"))


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        # A gradient and the states, in multiples of the weights.
        (["optimizer=AdamW"], 1 + 2),
        (["optimizer=RMSprop"], 1 + 1),
        (["optimizer=SGD", "++optimizer_kwargs.momentum=0.9"], 1 + 1),
        (["optimizer=Adafactor"], 1),
        (["optimizer=AdamW", "ema_decay=0.9"], 1 + 2 + 1),
        # Two bytes beside four.
        (["optimizer=AdamW8bit"], 1 + 2 / 4),
        # Gradient, copy and two states of four bytes, for weights of two.
        (["optimizer=AdamW", BF16], (4 + 4 + 2 * 4) / 2),
        (["optimizer=AdamW8bit", BF16], (4 + 4 + 2 * 1) / 2),
    ],
)
def test_what_gradients_and_optimizer_take_is_known_before(compose, overrides, copies):
    assert compose("lr=1e-6", *overrides).weight_copies == pytest.approx(copies)


def test_states_of_an_optimizer_are_as_large_as_is_said(compose):
    for name in ("AdamW", "RMSprop", "SGD", "Adafactor", "AdamWScheduleFree", "SGDScheduleFree"):
        layer = nn.Linear(64, 64, bias=False)
        config = compose(f"optimizer={name}", "lr=1e-6", "lr_schedule=constant")
        optimizer = build_optimizer(layer, config)
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        kept = [value for value in optimizer.state[layer.weight].values() if isinstance(value, torch.Tensor) and value.dim()]
        assert sum(value.numel() for value in kept) / layer.weight.numel() == pytest.approx(config.weight_copies - 1, abs=0.04)


def test_a_combined_optimizer_loads_its_state_for_all_of_its_parts(compose):
    model = with_gradients(golden_llama(), 0)
    optimizer = build_optimizer(model, compose("optimizer=Muon", "lr=1e-3"))
    optimizer.step()
    other = golden_llama()
    other.load_state_dict(model.state_dict())
    again = build_optimizer(other, compose("optimizer=Muon", "lr=1e-3"))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, one in ((model, optimizer), (other, again)):
        with_gradients(each, 1)
        one.step()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
