"""Modules that are trained whole beside an adapter: what starts, what is trained and saved, what plain peft loads."""

import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.modeling.adapters.weights import reference_mode
from preference_training.modeling.loading import check_model, load_model
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import scores_in_head, share_prefixes
from preference_training.modeling.state import weights_hash
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.rounds.served.choice import check_sampler
from preference_training.training.optimizers.groups import hidden_matrices
from tests.modeling.test_adapters import (
    BATCH,
    answers,
    checkpoint_of,
    configured,
    finished,
    load_merged,
    model_of,
    small,
    trainer_of,
)
from tests.support.building import weights_of

__all__ = ["configured", "small"]
ENDS = "model.lora.modules_to_save=[embed_tokens,lm_head]"
KINDS = {
    "ends": [ENDS],
    "norms": ["model.lora.modules_to_save='.*norm'"],
    "a block's MLP": ["model.lora.modules_to_save=[layers.1.mlp]", "model.lora.dropout=0.1"],
    "head, on four bits": ["model.lora.modules_to_save=[lm_head]", "model.quantization=nf4"],
    "bfloat16": [ENDS, "model.policy_dtype=bfloat16"],
    "pissa": [ENDS, "model.lora.init=pissa"],
}


def with_trained_parts(model):
    """A model whose adapter, and what is trained beside it, are no longer as at the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_the_original_model_which_stays_the_reference(kind, configured, tokenizer):
    base = [text for text in KINDS[kind] if "dtype" in text]
    if "model.quantization=nf4" not in KINDS[kind]:
        whole = model_of(configured(*base), tokenizer)
        share_prefixes(whole, "on")
        with torch.no_grad():
            began = response_scores(whole, BATCH)
    trainer = trainer_of(configured("+adapter=lora", *KINDS[kind]), tokenizer)
    policy = trainer.models.policy
    assert scores_in_head(policy)
    if "model.quantization=nf4" in KINDS[kind]:
        with torch.no_grad():
            began = response_scores(policy, BATCH)
    metrics = trainer.train_step(next(iter(trainer.batches.train)))
    assert metrics["rewards_train/margins"] == 0.0
    assert metrics["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    with torch.no_grad():
        assert torch.equal(trainer.models.reference(BATCH), began)
        assert not torch.equal(response_scores(policy, BATCH), began)


def test_only_the_adapter_and_the_named_modules_are_trained(configured, tokenizer):
    trainer = trainer_of(configured("+adapter=lora", ENDS), tokenizer)
    before = {name: weight.detach().clone() for name, weight in trainer.models.policy.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.models.policy.named_parameters() if not torch.equal(weight, before[name])}
    added = {"model.embed_tokens.modules_to_save.default.weight", "lm_head.modules_to_save.default.weight"}
    assert changed == {name for name in before if ".lora_" in name} | added
    # The embedding and the head are no hidden matrices, for Muon.
    assert {id(weight) for weight in hidden_matrices(trainer.models.policy)} == {
        id(weight)
        for name, weight in trainer.models.policy.named_parameters()
        if ".lora_" in name and ".subtracted" not in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit_and_plain_peft_and_a_merge_give_its_log_probs(kind, configured, tokenizer, tmp_path):
    config = configured("+adapter=lora", *KINDS[kind])
    checkpoint = finished(config, tokenizer, tmp_path / "run")
    trained, resumed = (trainer_of(config, tokenizer) for _ in range(2))
    trained.continue_from(Checkpoint.read(checkpoint))
    resumed.continue_from(Checkpoint.read(tmp_path / "run" / "step-4"))
    resumed.train()
    for name, weight in weights_of(trained).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    if config.model.quantization or config.model.policy_dtype != "float32":
        return
    expected = answers(trained.models.policy)
    plain = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(checkpoint)).get_base_model()
    torch.testing.assert_close(answers(plain), expected, rtol=1e-5, atol=1e-4)
    read = RunConfig.of(Checkpoint.read(checkpoint).config).model
    torch.testing.assert_close(answers(load_merged(checkpoint, read, tokenizer)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("modules", ["[lm_head]", "[embed_tokens]", "[embed_tokens,lm_head]"])
def test_embedding_and_head_that_were_tied_are_trained_apart_which_is_said(modules, small, configured, tokenizer, tmp_path):
    config = configured("+adapter=lora", f"model.name_or_path={small('tied llama')}", f"model.lora.modules_to_save={modules}")
    said = "\n".join(check_model(config.model, tokenizer))
    alone = {"[lm_head]": "the head alone is", "[embed_tokens]": "the embedding alone is"}.get(modules, "each is")
    assert f"embedding and head of LlamaForCausalLM share their weights; {alone} trained" in said
    began = AutoModelForCausalLM.from_pretrained(small("tied llama"), dtype=torch.float32)
    trained = with_trained_parts(load_model(config.model, tokenizer))
    with reference_mode(trained):
        assert torch.equal(answers(trained), answers(began))
    checkpoint = checkpoint_of(trained, tokenizer, tmp_path)
    expected = answers(trained)
    plain = PeftModel.from_pretrained(began, str(checkpoint)).get_base_model()
    torch.testing.assert_close(answers(plain), expected, rtol=1e-5, atol=1e-4)
    merged = load_merged(checkpoint, config.model, tokenizer)
    torch.testing.assert_close(answers(merged), expected, rtol=1e-5, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(answers(again), expected, rtol=1e-5, atol=1e-4)


def test_added_tokens_are_learned_by_a_whole_embedding_and_head(configured, tmp_path):
    config = configured("+adapter=lora", ENDS, "model.add_tokens=[wonderful]")
    larger = load_tokenizer(config.model)
    trained = with_trained_parts(load_model(config.model, larger, base_dir=tmp_path / "base"))
    checkpoint = checkpoint_of(trained, larger, tmp_path).resolve()
    weights = load_file(checkpoint / "adapter_model.safetensors")
    assert not [name for name in weights if "embed" in name and "lora" in name]
    assert len(weights["base_model.model.lm_head.weight"]) == len(larger)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for found in (plain, load_merged(checkpoint, config.model, larger)):
        torch.testing.assert_close(answers(found), answers(trained), rtol=1e-5, atol=1e-4)


def test_training_goes_on_from_a_checkpoint_with_its_modules_as_the_reference(configured, tokenizer, tmp_path):
    first = finished(configured("+adapter=lora", ENDS), tokenizer, tmp_path / "first")
    trained = trainer_of(configured("+adapter=lora", ENDS), tokenizer)
    trained.continue_from(Checkpoint.read(first))
    expected = answers(trained.models.policy)
    on = trainer_of(configured("+adapter=lora", ENDS, f"model.archive={first}"), tokenizer)
    on.train()
    with torch.no_grad():
        assert torch.equal(on.models.reference(BATCH), expected)
        assert not torch.equal(response_scores(on.models.policy, BATCH), expected)
    base = trainer_of(configured("+adapter=lora", ENDS, f"model.archive={first}", "model.reference_archive=base"), tokenizer)
    with torch.no_grad():
        assert torch.equal(base.models.reference(BATCH), answers(model_of(configured(), tokenizer)))
    with pytest.raises(UserError, match="modules_to_save: found None, expected .*lm_head.*: the adapter .* was trained with"):
        check_model(configured("+adapter=lora", f"model.archive={first}").model, tokenizer)


def test_the_weights_that_training_began_with_are_those_of_the_model_without_an_adapter(configured, tokenizer):
    assert weights_hash(model_of(configured("+adapter=lora", ENDS), tokenizer)) == weights_hash(
        model_of(configured(), tokenizer)
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.lora.modules_to_save=[wte]"],
            "found wte, and no module of LlamaForCausalLM .*: embed_tokens, q_proj, .*lm_head",
        ),
        (["model.lora.modules_to_save=[lm_hed]"], "found lm_hed, .*; did you mean lm_head"),
        (["model.lora.modules_to_save=[layers]"], r"found model.layers: it is a list of modules. .*model\.layers\.0"),
        (["model.lora.modules_to_save=[act_fn]"], r"found model.layers.0.mlp.act_fn: it has no weights"),
        (["model.lora.modules_to_save=[up_proj]", "model.quantization=nf4"], "its weights are quantized"),
        (["loss=reward", "model.lora.modules_to_save=[score]"], "the value head is trained whole without being named"),
        (
            ["model.lora.target_parameters=[q_proj.weight]", "model.lora.modules_to_save=[self_attn]"],
            "in which model.lora.target_parameters adapts weights too",
        ),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_refused(overrides, message, configured, tokenizer):
    with pytest.raises(UserError, match=f"model.lora.modules_to_save: .*{message}"):
        config = configured("+adapter=lora", *overrides).model
        check_model(replace(config, head="value") if "loss=reward" in overrides else config, tokenizer)


def test_a_server_of_rounds_does_not_take_them_and_a_pattern_has_to_be_one(configured):
    rounds = ("+rounds=default", "rounds.prompts=prompts.jsonl", "rounds.judge=toy", "rounds.sampler=http://localhost:1")
    with pytest.raises(UserError, match="model.lora.modules_to_save: found .*, and vLLM serves adapters without modules"):
        check_sampler(configured("+adapter=lora", ENDS, *rounds))
    with pytest.raises(UserError, match="model.lora.modules_to_save: found '.norm', expected a list of names, or a regular"):
        configured("+adapter=lora", "model.lora.modules_to_save='(norm'")


def test_without_an_adapter_they_are_refused(configured):
    with pytest.raises(UserError, match="model.lora.modules_to_save: found .* and there is no adapter"):
        configured(ENDS)
