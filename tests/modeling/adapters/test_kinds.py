"""Kinds of adapters: DoRA, rsLoRA, LoRA+, PiSSA, OLoRA, chosen blocks. What they start as, learn, and save."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.modeling.loading import check_model, load_with_adapter, merge_and_cast
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.modeling.test_adapters import (
    BATCH,
    PROMPTS,
    answers,
    checkpoint_of,
    configured,
    finished,
    load_merged,
    model_of,
    small,
    trainer_of,
    with_trained_adapter,
)
from tests.support.building import weights_of
from tests.support.files import GOLDEN

__all__ = ["configured", "small"]

KINDS = {
    "dora": ["model.lora.use_dora=true"],
    "dora with dropout": ["model.lora.use_dora=true", "model.lora.dropout=0.1"],
    "rslora": ["model.lora.use_rslora=true"],
    "gaussian": ["model.lora.init=gaussian"],
    "orthogonal": ["model.lora.init=orthogonal"],
    "pissa": ["model.lora.init=pissa", "model.lora.dropout=0.1"],
    "pissa, approximate": ["model.lora.init=pissa_niter_4", "model.lora.use_rslora=true"],
    "olora": ["model.lora.init=olora"],
    "plus": ["model.lora.loraplus_lr_ratio=4"],
    "blocks": ["model.lora.layers=[1]"],
}
LORA = ("model.lora.r=4", "model.lora.alpha=8")


def steps_of(config, tokenizer, count=2):
    """A trainer after some steps, and the metrics of each."""
    trainer = trainer_of(config, tokenizer)
    batches = iter(trainer.batches.train)
    return trainer, [trainer.train_step(next(batches)) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_as_the_original_model_bit_for_bit_and_keeps_it_as_the_reference(kind, configured, tokenizer):
    whole = model_of(configured(), tokenizer)
    share_prefixes(whole, "on")
    trainer = trainer_of(configured(*LORA, *KINDS[kind]), tokenizer)
    with torch.no_grad():
        began = response_scores(whole, BATCH)
        assert torch.equal(response_scores(trainer.models.policy, BATCH), began)
    first = trainer.train_step(next(iter(trainer.batches.train)))
    assert first["rewards_train/margins"] == 0.0
    assert first["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    with torch.no_grad():
        assert torch.equal(trainer.models.reference(BATCH), began)
        assert not torch.equal(response_scores(trainer.models.policy, BATCH), began)


@pytest.mark.parametrize(
    "dtypes", [["model.policy_dtype=bfloat16"], ["model.autocast_dtype=bfloat16"]], ids=["bf16", "autocast"]
)
@pytest.mark.parametrize("kind", ["dora", "pissa", "olora"])
def test_a_margin_of_0_holds_in_low_precision_and_on_few_bits(kind, dtypes, configured, tokenizer):
    for overrides in (dtypes, [*dtypes, "model.quantization=nf4"]):
        _, [first] = steps_of(configured(*LORA, *KINDS[kind], *overrides), tokenizer, 1)
        assert first["rewards_train/margins"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit_and_plain_peft_and_a_merge_give_its_log_probs_on_the_original_model(
    kind, configured, tokenizer, tmp_path
):
    config = configured(*LORA, *KINDS[kind])
    checkpoint = finished(config, tokenizer, tmp_path / "run")
    trained, resumed = (trainer_of(config, tokenizer) for _ in range(2))
    trained.continue_from(Checkpoint.read(checkpoint))
    resumed.continue_from(Checkpoint.read(tmp_path / "run" / "step-4"))
    resumed.train()
    for name, weight in weights_of(trained).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    saved = json.loads((checkpoint / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(GOLDEN / "llama")
    assert saved["r"] == (8 if config.model.lora.subtracts_start else 4)
    ids = torch.arange(5, 25)[None]
    policy = trained.models.policy.eval()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        torch.testing.assert_close(plain(ids).logits, policy(ids).logits, rtol=1e-5, atol=1e-4)
        read = RunConfig.of(Checkpoint.read(checkpoint).config).model
        merged = merge_and_cast(load_with_adapter(checkpoint, read, tokenizer), torch.float32).eval()
        torch.testing.assert_close(response_scores(merged, BATCH), response_scores(policy, BATCH), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_gradients_are_those_of_the_usual_form_with_another_base_model(init, configured, tokenizer):
    """peft itself takes the adapter's start out of the base weights."""
    torch.manual_seed(0)
    usual = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32)
    usual = get_peft_model(usual, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=init))
    ours = model_of(configured(*LORA, f"model.lora.init={init}", "model.lora.target_modules=[q_proj,up_proj]"), tokenizer)
    ids = torch.arange(5, 25)[None]
    for model in (usual, ours):
        model(ids, labels=ids).loss.backward()
    theirs = {name.removeprefix("base_model.model."): weight for name, weight in usual.named_parameters()}
    trained = {name: weight for name, weight in ours.named_parameters() if weight.requires_grad}
    assert len(trained) == 8
    for name, weight in trained.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


def test_dora_learns_the_lengths_of_layers_that_hold_their_weights_transposed(small, configured, tokenizer, tmp_path):
    config = configured(f"model.name_or_path={small('gpt2')}", *LORA, "model.lora.use_dora=true")
    plain = AutoModelForCausalLM.from_pretrained(small("gpt2"), dtype=torch.float32)
    model = model_of(config, tokenizer)
    torch.testing.assert_close(answers(model), answers(plain), rtol=1e-5, atol=1e-5)
    checkpoint = checkpoint_of(with_trained_adapter(model), tokenizer, tmp_path)
    expected = answers(PeftModel.from_pretrained(plain, str(checkpoint)))
    torch.testing.assert_close(answers(model), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(answers(load_merged(checkpoint, config.model, tokenizer)), expected, rtol=1e-5, atol=1e-4)


def test_b_matrices_learn_faster_with_lora_plus(configured, tokenizer):
    """SGD's updates are the gradient times the learning rate; before the first step the gradient of A is 0."""
    changed = []
    for ratio in ("null", "4"):
        config = configured(*LORA, "optimizer=SGD", "max_grad_norm=1e9", f"model.lora.loraplus_lr_ratio={ratio}")
        trainer, _ = steps_of(config, tokenizer, 1)
        changed.append({name: weight for name, weight in weights_of(trainer).items() if ".lora_B." in name})
    for name, weight in changed[0].items():
        torch.testing.assert_close(changed[1][name], 4 * weight, rtol=1e-6, atol=0)


def test_only_the_named_blocks_have_adapters(configured, tokenizer):
    model = model_of(configured(*LORA, "model.lora.layers=[1]"), tokenizer)
    assert {name.split(".")[2] for name, weight in model.named_parameters() if weight.requires_grad} == {"1"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.use_dora=true"], r"model\.lora\.use_dora: found True, and there is no adapter. Add \+adapter=lora"),
        ([*LORA, "model.lora.init=loftq"], "model.lora.init: found 'loftq', which corrects weights that were quantized"),
        ([*LORA, "model.lora.init=pisa"], "model.lora.init: no initialization 'pisa'; .*pissa"),
        ([*LORA, "model.lora.init=pissa", "model.lora.use_dora=true"], "whose lengths leave no plain adapter to save"),
        (
            [*LORA, "model.lora.layers=[0]", "model.lora.target_modules='.*q_proj'"],
            "beside target_modules=.*regular expression",
        ),
        ([*LORA, "model.lora.layers=[-1]"], "model.lora.layers: found"),
        (
            [*LORA, "model.lora.use_dora=true", "trainer=FSDPTrainer", "trainer.param_dtype=bfloat16"],
            "FSDPTrainer rounds the learned lengths to bfloat16",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(overrides, message, configured):
    with pytest.raises(UserError, match=message):
        configured(*overrides)


def test_what_does_not_fit_the_model_is_refused_with_the_key(small, configured, tokenizer, tmp_path):
    mixtral = f"model.name_or_path={small('mixtral')}"
    for overrides, message in (
        ([mixtral, "model.lora.init=pissa"], "model.lora.init: found pissa, and model.layers.0.mlp.* is no linear layer"),
        ([mixtral, "model.lora.use_dora=true"], "model.lora.target_modules: found None: .*[dD]o[rR][aA]"),
        (["model.lora.layers=[7]"], "model.lora"),
    ):
        with pytest.raises(UserError, match=message):
            check_model(configured(*LORA, *overrides).model, tokenizer)
    with pytest.raises(UserError, match="model.lora.init: found pissa with model.lora.r=400, and a weight of .* directions"):
        model_of(configured("model.lora.r=400", "model.lora.init=pissa"), tokenizer)
    plain = finished(configured(*LORA), tokenizer, tmp_path / "run")
    for overrides, message in (
        (["model.lora.init=pissa"], "model.lora.init: found pissa, and training starts from the adapter"),
        (["model.lora.use_dora=true"], "model.lora.use_dora: found True, expected False: the adapter"),
        (["model.lora.target_parameters=[mlp.experts.down_proj]"], "model.lora.target_parameters: found .*, and .* has none"),
    ):
        with pytest.raises(UserError, match=message):
            check_model(configured(*LORA, f"model.archive={plain}", *overrides).model, tokenizer)


def test_training_goes_on_from_a_checkpoint_of_twice_the_rank(configured, tokenizer, tmp_path):
    first = finished(configured(*LORA, "model.lora.init=pissa"), tokenizer, tmp_path / "first")
    trainer = trainer_of(configured("model.lora.r=8", "model.lora.alpha=16", f"model.archive={first}"), tokenizer)
    metrics = trainer.train_step(next(iter(trainer.batches.train)))
    assert metrics["rewards_train/margins"] == 0.0
    assert len(PROMPTS) == 12
