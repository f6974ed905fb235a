"""What keys that are null become: by the loss, the model, the device and the number of steps, and never against the user."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.configuration.composition import group_choices, usual_values
from preference_training.core.errors import UserError
from preference_training.core.values import dotted
from preference_training.losses.registry import build_loss, losses
from preference_training.training.defaults import (
    RATES,
    evaluation_interval,
    fit_dtypes,
    fit_lr,
    fit_steps,
    kept_from,
    unusual_lr,
)
from preference_training.training.optimizers.schedules import schedule, warmup_steps

NEW = ("model=pretrained", "model.name_or_path=some/model")
ORIGINAL = ("gpt2-large", "gpt2-xl", "gptj", "pythia28", "pythia69", "llama7b", "codellama7b")


def fitted(config, learns="log-ratios", parameters=7e9, gpu=False, examples=285, steps=36):
    config = fit_lr(fit_dtypes(config, lambda: gpu), learns, lambda: parameters)
    return fit_steps(config, examples, steps)


# ---- the learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "adapter", "parameters", "lr"),
    [
        ("sft", None, 7e9, 2e-5),
        ("sft", None, 135e6, 1e-4),
        ("sft", "lora", 7e9, 2e-4),
        ("dpo", None, 7e9, 1e-6),
        ("dpo", "lora", 7e9, 1e-5),
        ("dpo", "qlora", 7e9, 1e-5),
        ("dpo", "lora", 135e6, 5e-5),
        ("ipo", None, 1e9, 1e-6),
        ("rpo", None, 7e9, 1e-6),
        ("simpo", None, 7e9, 5e-7),
        ("orpo", None, 7e9, 5e-6),
        ("kto", "lora", 7e9, 1e-5),
        ("reward", None, 7e9, 1e-5),
        ("plackett_luce", None, 7e9, 1e-6),
        ("mix", None, 7e9, 1e-6),
    ],
)
def test_the_learning_rate_is_that_of_the_kind_of_training(loss, adapter, parameters, lr, compose):
    config = compose(*NEW, f"loss={loss}", *[f"+adapter={adapter}"] * bool(adapter))
    learns = build_loss(**config.loss.given(), seed=0).learns
    found = fit_lr(config, learns, lambda: parameters)
    assert found.lr == lr == found.as_composed["lr"]
    assert found.chosen["lr"].startswith(f"lr: {lr:g}, usual for loss={loss} on ")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        # Usual are 5e-5 for this adapter, and 5e-6 for all weights.
        (("+adapter=lora", "lr=1e-2"), "lr=0.01 is 200 times what is usual for loss=dpo on a LoRA adapter of a model of 135M"),
        (("lr=5e-5",), "lr=5e-05 is 10 times what is usual for loss=dpo on all weights of a model of 135M parameters, 5e-06"),
        (("lr=5e-7",), "lr=5e-07 is 1/10 of what is usual"),
        (("lr=4.9e-5",), None),
        (("lr=5.1e-7",), None),
        ((), None),
        # Steps of SGD are of another size.
        (("lr=1", "optimizer=SGD"), None),
    ],
)
def test_a_learning_rate_far_from_the_usual_one_is_warned_of(overrides, told, compose):
    config = compose(*NEW, "loss=dpo", *overrides)
    said = unusual_lr(config, "log-ratios", lambda: 135e6)
    assert (said is None) if told is None else said.startswith(f"warning: {told}")


@pytest.mark.parametrize("overrides", [("model=tiny", "lr=1"), ("model=pythia28", "loss=sft")])
def test_a_model_from_scratch_and_the_learning_rates_of_presets_are_not_warned_of(overrides, compose):
    assert unusual_lr(compose(*overrides), "responses", lambda: 2.8e9) is None


def test_every_loss_has_a_learning_rate(compose):
    for name in losses():
        if name not in ("own", "beta_DPO"):
            config = compose(*NEW, f"loss={name}")
            assert build_loss(**config.loss.given(), seed=0).learns in RATES


def test_adapters_have_ten_times_the_learning_rate_of_all_weights_of_a_large_model_or_nearly_so():
    assert all(math.isclose(rates.lora, 10 * rates.full) for rates in RATES.values())
    assert all(rates.full < rates.full_small < rates.lora_small for rates in RATES.values())


# ---- dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "gpu", "policy", "reference", "products"),
    [
        # On a CPU null is float32.
        ((), False, "float32", "float32", None),
        ((), True, "bfloat16", "bfloat16", None),
        (("bf16=true",), False, "bfloat16", "bfloat16", None),
        (("bf16=false",), True, "float32", "float32", None),
        # What is given wins, and null leaves the rest to it.
        (("model.policy_dtype=float32",), True, "float32", "float32", None),
        (("model.policy_dtype=float32", "bf16=true"), True, "float32", "float32", "bfloat16"),
        (("model.policy_dtype=float16",), True, "float16", "float16", None),
        (("model.autocast_dtype=bfloat16",), True, "float32", "float32", "bfloat16"),
        (("model.autocast_dtype=bfloat16", "bf16=true"), True, "float32", "float32", "bfloat16"),
        (("model.reference_dtype=float32", "bf16=true"), True, "float32", "float32", "bfloat16"),
        (("model.reference_dtype=bfloat16", "model.policy_dtype=float32"), True, "float32", "bfloat16", None),
        (("+adapter=lora",), True, "bfloat16", "bfloat16", None),
    ],
)
def test_bf16_decides_the_dtypes_that_are_left_open(overrides, gpu, policy, reference, products, compose):
    config = fit_dtypes(compose(*NEW, *overrides), lambda: gpu)
    model = config.model
    assert (model.policy_dtype, model.reference_dtype, model.autocast_dtype) == (policy, reference, products)
    assert fit_dtypes(config, lambda: not gpu) == config
    # config.yaml of the run says so.
    assert config.as_composed["model"]["policy_dtype"] == policy and config.as_composed["bf16"] is config.bf16 is not None


@pytest.mark.parametrize(
    ("overrides", "policy", "products"),
    [
        # Shards of float32 are the master weights.
        ((), "float32", "bfloat16"),
        (("+adapter=lora",), "bfloat16", "bfloat16"),
        (("trainer.param_dtype=float16",), "float32", "float16"),
        (("model.fsdp_policy_mp=float16",), "float32", "float16"),
    ],
)
def test_sharded_weights_are_computed_in_bfloat16(overrides, policy, products, compose):
    config = fit_dtypes(compose(*NEW, "trainer=FSDPTrainer", *overrides), lambda: True)
    assert (config.model.policy_dtype, config.sharded_dtype, config.model.autocast_dtype) == (policy, products, None)


@pytest.mark.parametrize(
    "key",
    [
        "model.policy_dtype=float16",
        "model.autocast_dtype=float16",
        "model.fsdp_policy_mp=float32",
        "model.reference_dtype=float16",
    ],
)
def test_bf16_and_a_dtype_that_contradicts_it_are_refused_in_one_message(key, compose):
    with pytest.raises(UserError, match=rf"^bf16: found true, and {key}"):
        fit_dtypes(compose(*NEW, "bf16=true", key), lambda: True)


def test_low_precision_weights_with_a_small_learning_rate_have_master_weights(compose):
    assert fitted(compose(*NEW), gpu=True).keeps_master_weights
    assert not fitted(compose(*NEW), gpu=False).keeps_master_weights


# ---- steps ----------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 1_000_000), st.integers(1, 256))
def test_a_run_is_evaluated_at_least_ten_times_or_at_each_step(total, size):
    every = evaluation_interval(total, size)
    assert every % size == 0 and size <= every <= max(size, 20_000)
    assert total // every >= 10 or every == size


def test_the_evaluation_interval_is_known_once_the_data_is_and_config_yaml_keeps_the_null(compose):
    config = fitted(compose(*NEW), examples=285, steps=36)
    assert config.eval_every == 24 and config.as_composed["eval_every"] is None
    assert config.chosen["eval_every"] == "eval_every: 24 examples, 12 evaluations in the run"
    assert config.chosen["warmup_steps"] == "warmup_steps: 4 of 36, warmup_share=0.1"


def test_responses_are_sampled_four_times_in_a_run_that_chooses_its_evaluations_and_at_each_that_is_set(compose):
    assert fitted(compose(*NEW), examples=285, steps=36).sample_every == 72  # a quarter of 285 is 71.25
    assert fitted(compose(*NEW), examples=16, steps=2).sample_every == 8, "not more often than it is evaluated"
    assert fitted(compose(*NEW, "sample_every=40"), examples=285, steps=36).sample_every == 40
    assert fitted(compose(*NEW, "eval_every=24"), examples=285, steps=36).sample_every is None


@pytest.fixture(scope="module")
def new_run(compose):
    return fitted(compose(*NEW))


@given(steps=st.integers(1, 5000))
def test_warm_up_is_a_tenth_of_the_run_and_never_longer(new_run, steps):
    assert warmup_steps(new_run, steps) == round(0.1 * steps) <= steps
    factors = [schedule(new_run, steps)(step) for step in range(min(steps, 50))]
    assert all(0 <= factor <= 1 for factor in factors) and (steps < 2 or max(factors) > 0)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ((*NEW, "warmup_steps=20"), 20),
        ((*NEW, "warmup_steps=0"), 0),
        ((*NEW, "warmup_share=0.05"), 5),
        (("model=qwen3-0.6b", "warmup_steps=20"), 20),
        ((*NEW, "warmup_share=null"), 0),
        (("model=pythia28",), 150),
        (("model=pythia28", "warmup_share=0.1"), 10),
        (("model=pythia28", "warmup_steps=20"), 20),
        (("model=tiny",), 10),
    ],
)
def test_warm_up_is_what_the_user_sets(overrides, steps, compose):
    assert warmup_steps(fitted(compose(*overrides)), 100) == steps


# ---- what is set stays ----------------------------------------------------------------------------------------------------

SETTINGS = {
    "lr": ("3e-6", 3e-6),
    "warmup_steps": ("7", 7),
    "warmup_share": ("0.3", 0.3),
    "lr_schedule": ("cosine", "cosine"),
    "eval_every": ("40", 40),
    "batch_size": ("4", 4),
    "max_length": ("300", 300),
    "max_prompt_length": ("100", 100),
    "optimizer": ("SGD", "SGD"),
    "bf16": ("true", True),
    "template": ("raw", "raw"),
    "keep_last": ("null", None),
    "model.policy_dtype": ("bfloat16", "bfloat16"),
    "model.reference_dtype": ("float32", "float32"),
    "model.autocast_dtype": ("bfloat16", "bfloat16"),
}


@given(
    # One length of the warm-up at a time.
    keys=st.sets(st.sampled_from(sorted(SETTINGS))).filter(lambda keys: not {"warmup_steps", "warmup_share"} <= keys),
    gpu=st.booleans(),
    preset=st.sampled_from(["pretrained", "blank_model", "qwen3-0.6b"]),
)
@settings(max_examples=30)  # Each composes.
def test_what_the_user_sets_is_never_changed(compose, keys, gpu, preset):
    overrides = [f"{key}={SETTINGS[key][0]}" for key in sorted(keys)]
    config = fitted(compose(f"model={preset}", "model.name_or_path=some/model", *overrides), gpu=gpu)
    values = dotted(config.as_dict())
    assert {key: values[key] for key in keys} == {key: SETTINGS[key][1] for key in keys}
    # And nothing that a run needs is left open.
    assert None not in (config.lr, config.eval_every, config.model.policy_dtype, config.model.reference_dtype)


@pytest.mark.parametrize("preset", [*ORIGINAL, "blank_model", "tiny"])
@pytest.mark.parametrize("gpu", [True, False])
def test_the_original_presets_keep_their_values(preset, gpu, compose):
    config = compose(f"model={preset}", *["model.name_or_path=some/model"] * (preset == "blank_model"))
    found = fitted(config, gpu=gpu)
    assert found == config and found.as_composed == config.as_composed and not found.chosen
    if preset != "tiny":
        values = (found.lr, found.optimizer, found.lr_schedule, found.warmup_steps, found.max_grad_norm)
        assert values == (5e-7, "RMSprop", "constant", 150, 10.0)
        sizes = (found.batch_size, found.max_length, found.max_prompt_length, found.eval_every, found.keep_last)
        assert sizes == (32, 512, 256, 20_000, None)
        assert (found.model.policy_dtype, found.model.autocast_dtype, found.model.fsdp_policy_mp) == ("float32", None, None)


def test_a_resumed_run_keeps_what_it_had_for_keys_that_are_null(compose):
    then = fitted(compose(*NEW), gpu=True, parameters=135e6)
    now = kept_from(compose(*NEW), then.as_dict())
    assert (now.lr, now.bf16, now.model.policy_dtype) == (5e-6, True, "bfloat16")
    # On a machine without a GPU, and for a model that would be another size.
    again = replace(fitted(now, gpu=False), local_run_dir=then.local_run_dir)
    assert again == fitted(then)
    assert kept_from(compose(*NEW, "lr=1e-3"), then.as_dict()).lr == 1e-3
    assert kept_from(compose(*NEW), None).lr is None


def test_what_became_of_null_is_a_default_in_cards_and_what_the_user_set_is_not(compose):
    from preference_training.reporting.model_card import changed_settings

    plain = fitted(compose(*NEW, "loss=dpo"), gpu=True)
    assert changed_settings(plain.as_dict(), usual_values(plain)) == {}
    own = fitted(compose(*NEW, "loss=dpo", "lr=3e-6", "batch_size=16", "+adapter=lora"), gpu=True)
    assert changed_settings(own.as_dict(), usual_values(own)) == {
        "lr": (3e-6, None), "batch_size": (16, 8), "model.lora.r": (16, None), "model.lora.alpha": (32, 16),
    }  # fmt: skip
    # Runs of earlier versions recorded none.
    assert changed_settings(compose("loss=dpo", "lr=1e-5").as_dict())["lr"] == (1e-5, 5e-7)


def test_presets_of_new_models_build_on_pretrained(compose):
    older = {*ORIGINAL, "blank_model", "tiny"}
    newer = [name for name in group_choices("model") if name not in older]
    assert newer
    for name in newer:
        config = compose(f"model={name}", "model.name_or_path=some/model")
        assert (config.lr, config.eval_every, config.warmup_steps, config.bf16) == (None,) * 4, name


# ---- early stopping -------------------------------------------------------------------------------------------------------


def evaluator_with(patience: int):
    from preference_training.training.evaluator import Evaluator
    from preference_training.training.parts import RunState

    found = object.__new__(Evaluator)
    found.config = SimpleNamespace(objective="loss/eval", early_stopping_patience=patience)
    found.state, found.pruned = RunState(), False
    found.batches = SimpleNamespace(train=SimpleNamespace(finished=False))
    found.observers = SimpleNamespace(tracker=SimpleNamespace(log_message=lambda text: None))
    return found


@pytest.mark.parametrize(
    ("values", "ends", "best"),
    [
        ([math.nan], False, None),
        ([math.nan, 0.7, 0.6], False, 0.6),
        ([0.7, 0.8], True, 0.7),
        ([math.nan, 0.7, math.nan], True, 0.7),
        ([0.7, 0.6], False, 0.6),
    ],
)
def test_a_first_evaluation_without_a_number_ends_no_run(values, ends, best):
    evaluator = evaluator_with(patience=1)
    for value in values:
        evaluator.state.held_out = {"loss/eval": value}
        evaluator._compare_with_best()
    assert evaluator.ends_run is ends and evaluator.state.best == best


def test_the_table_of_the_page_is_that_of_the_code():
    from tests.support.files import ROOT

    page = (ROOT / "docs" / "defaults.md").read_text()
    for rates in RATES.values():
        numbers = (rates.full, rates.full_small, rates.lora, rates.lora_small)
        row = " | ".join(f"{rate:.0e}".replace("e-0", "e-") for rate in numbers)
        assert row in page, row


def test_a_fitted_configuration_is_what_it_was_when_it_is_copied(compose):
    config = fitted(compose(*NEW), gpu=True)
    assert replace(config, as_composed=config.as_dict()).as_dict() == config.as_dict()
