"""Schedules, learning rates of some weights, averages of weights, and the best checkpoint."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from preference_training.checkpointing.checkpoint import Checkpoint, find_damage
from preference_training.core.errors import UserError
from preference_training.training.defaults import usual_lr
from preference_training.training.optimizers.averages import averages_in_place
from preference_training.training.optimizers.building import build_optimizer
from preference_training.training.optimizers.groups import lr_factor, lr_group_lines
from preference_training.training.optimizers.notices import averages_notice
from preference_training.training.optimizers.schedules import schedule
from tests.support.building import weights_of
from tests.training.test_optimization import BF16, trainer_of

# ---- schedules --------------------------------------------------------------------------------------------------------------


def test_wsd_is_constant_and_falls_in_equal_steps_over_its_last_share(compose):
    factor = schedule(compose("warmup_steps=2", "lr_schedule=wsd", "decay_share=0.4", "final_lr_share=0.1"), 10)
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, *(1 - 0.9 * k / 3 for k in range(4))]
    assert [factor(step) for step in range(10)] == pytest.approx(expected)


def test_cosine_starts_again_after_parts_of_equal_length(compose):
    overrides = "warmup_steps=0", "lr_schedule=cosine", "final_lr_share=0.5"
    again, once = schedule(compose(*overrides, "lr_restarts=1"), 12), schedule(compose(*overrides), 6)
    assert [again(step) for step in range(12)] == [once(step) for step in range(6)] * 2
    # To 0 it falls one step behind each part.
    zero = schedule(compose("warmup_steps=0", "lr_schedule=cosine", "lr_restarts=2"), 9)
    assert [zero(step) for step in range(9)] == pytest.approx([(1 + math.cos(math.pi * k / 3)) / 2 for k in range(3)] * 3)


# ---- learning rates of some weights -----------------------------------------------------------------------------------------


def test_the_last_pattern_that_is_found_in_a_name_counts(compose):
    config = compose("lr_groups={layers: 2}").changed({"lr_groups": {"layers": 2, r"layers\.0\.": 0.5}})
    names = ["embed.weight", "layers.0.q", "layers.1.q", "layers.01.q"]
    assert [lr_factor(config, name) for name in names] == [1, 0.5, 2, 2]


def test_weights_move_at_their_own_learning_rates_and_decay_as_the_others(compose):
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = [weight.detach().clone() for weight in layers.parameters()]
    config = compose("optimizer=SGD", "lr=0.1", "weight_decay=0.2").changed({"lr_groups": {"1.": 0.5}})
    optimizer = build_optimizer(layers, config)
    for weight in layers.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    # SGD adds decay * weight to the gradient of matrices.
    for weight, start, lr, decay in zip(layers.parameters(), before, (0.1, 0.1, 0.05, 0.05), (0.2, 0, 0.2, 0), strict=True):
        torch.testing.assert_close(weight.detach(), start - lr * (1 + decay * start))


def test_a_runs_learning_rate_is_that_of_weights_without_a_factor(compose, tokenizer):
    trainer = trainer_of(compose, tokenizer, "lr_groups={embed: 0.1}", "lr_schedule=linear", "lr=1e-3", "n_epochs=2")
    used = []
    for batch in trainer.batches.train:
        used.append((trainer.step.updater.lr, sorted(group["lr"] for group in trainer.step.updater.optimizer.param_groups)))
        trainer.train_step(batch)
    for step, (lr, of_groups) in enumerate(used):
        assert lr == pytest.approx(1e-3 * (1 - step / 6)) and of_groups == pytest.approx([lr * 0.1, lr])


def test_patterns_are_explained_and_one_that_nothing_has_is_refused(compose):
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    lines = lr_group_lines(compose("lr=1e-4", "lr_groups={mlp: 0.5}"), names)
    assert lines == ["lr_groups: mlp: 0.5 times lr for 2 weights, such as model.layers.0.mlp.up_proj.weight, lr 5e-05"]
    with pytest.raises(UserError, match=r"no trained weight has 'embed_token\$' in its name; did you mean embed_tokens"):
        lr_group_lines(compose("lr_groups={embed_token$: 0.1}"), names)


def test_adafactors_usual_learning_rate_is_of_the_weights_size():
    assert usual_lr("log-ratios", 135_000_000, False, "Adafactor") == 1.5e-4
    assert usual_lr("log-ratios", 135_000_000, False, "Muon") == 5e-6


# ---- averages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_average_is_of_the_weights_after_each_update_the_newest_the_heaviest(compose, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=getattr(torch, dtype))
    config = compose("optimizer=AdamW", "lr=1e-3", "ema_decay=0.5", f"model.policy_dtype={dtype}")
    optimizer = build_optimizer(layer, config)
    seen = []
    for _ in range(3):
        for weight in layer.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        seen.append([getattr(optimizer, "masters", {}).get(each, each).detach().clone() for each in layer.parameters()])
    trained = [weight.detach().clone() for weight in layer.parameters()]
    with averages_in_place(optimizer, layer):
        for weight, first, second, third in zip(layer.parameters(), *seen, strict=True):
            expected = (0.25 * first + 0.5 * second + third) / 1.75
            torch.testing.assert_close(weight.detach().float(), expected.to(weight.dtype).float(), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(weight, before) for weight, before in zip(layer.parameters(), trained, strict=True))


def test_the_average_is_what_is_evaluated_and_saved_while_training_is_as_without_it(compose, tokenizer, tmp_path):
    overrides = "optimizer=AdamW", "lr=1e-3", "n_epochs=2", "n_eval_model_samples=0"
    averaged = trainer_of(compose, tokenizer, *overrides, "ema_decay=0.9", run_dir=tmp_path)
    averaged.train()
    plain = trainer_of(compose, tokenizer, *overrides)
    plain.train()
    assert all(
        torch.equal(one, two) for one, two in zip(weights_of(averaged).values(), weights_of(plain).values(), strict=True)
    )
    assert averaged.state.held_out["loss/eval"] != plain.state.held_out["loss/eval"]
    # What the checkpoint holds gives what the run logged.
    plain.models.policy.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST").state_dict())
    plain.state.evaluated_at = None
    plain.evaluator.evaluate()
    assert plain.state.held_out["loss/eval"] == averaged.state.held_out["loss/eval"]


def test_what_is_averaged_is_said_and_kept_in_float32(compose):
    config = compose(BF16, "lr=1", "ema_decay=0.99")
    assert config.keeps_master_weights
    assert averages_notice(config).startswith("ema_decay: an average of the weights over about the last 100 updates is what is")
    assert averages_notice(compose("lr=1")) is None


# ---- the best checkpoint ----------------------------------------------------------------------------------------------------


def test_at_the_end_latest_and_policy_pt_are_the_best_checkpoint(compose, tokenizer, tmp_path):
    # The model begins well, and a large learning rate makes each evaluation but the first worse.
    overrides = "optimizer=SGD", "lr=20", "n_epochs=2", "load_best=true", "n_eval_model_samples=0", "do_first_eval=false"
    trainer = trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path)
    trainer.train()
    losses = {path.name: Checkpoint.read(path).held_out("loss/eval") for path in tmp_path.glob("step-*")}
    best = min((name for name, loss in losses.items() if loss is not None), key=losses.get)
    assert (tmp_path / "LATEST").resolve().name == best != "step-20"
    assert trainer.tracker.lines[-1].startswith(f"load_best: LATEST has the weights of {best}, not of the last one, step-20")
    assert [path.parent.name for path in tmp_path.glob("step-*/policy.pt")] == [best]
    assert find_damage(tmp_path / best) is None
    saved = torch.load(tmp_path / best / "policy.pt", weights_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST").state_dict()
    assert saved["step_idx"] == int(best.removeprefix("step-"))
    assert all(torch.equal(weight, saved["state"][name]) for name, weight in loaded.items())
    # A complete run that is started again points there again.
    again = trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path)
    again.continue_from(Checkpoint.read(tmp_path / "step-20"))
    assert again.finished
    again.observers.load_best(again.config, again.placement.ranks)
    assert (tmp_path / "LATEST").resolve().name == best
