"""Tokens that a run adds: in the tokenizer, in the model, in checkpoints, and what training goes on from."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.core.errors import UserError
from preference_training.modeling.loading import check_model, load_model, load_with_adapter, merge_and_cast
from preference_training.modeling.tokenizer import load_tokenizer
from tests.modeling.test_adapters import checkpoint_of, configured, finished, model_of, small, trainer_of, with_trained_adapter
from tests.support.building import weights_of

__all__ = ["configured", "small"]
ADDED = ("model.add_tokens=[wonderful]", "model.add_special_tokens=['<tool>']")


def run_of(configured, *overrides):
    """The configuration of a run that adds two tokens, and its tokenizer."""
    config = configured(*ADDED, *overrides)
    return config, load_tokenizer(config.model)


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2"])
def test_new_rows_are_the_means_of_what_their_texts_were_and_all_else_stays(name, small, configured, tokenizer):
    config, larger = run_of(configured, f"model.name_or_path={small(name)}")
    before, after = model_of(configured(f"model.name_or_path={small(name)}"), tokenizer), model_of(config, larger)
    for token in ("wonderful", "<tool>"):
        [number], pieces = (
            larger(token, add_special_tokens=False).input_ids,
            tokenizer(token, add_special_tokens=False).input_ids,
        )
        assert len(pieces) > 1
        assert len(after.get_input_embeddings().weight) == len(after.get_output_embeddings().weight) == len(larger)
        for layer in ("get_input_embeddings", "get_output_embeddings"):
            rows, old = getattr(after, layer)().weight, getattr(before, layer)().weight
            torch.testing.assert_close(rows[number], old[pieces].mean(0))
            assert torch.equal(rows[: len(old)], old)
    assert larger.decode([number], skip_special_tokens=True) == ""
    tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert tied == (before.get_input_embeddings().weight is before.get_output_embeddings().weight)


def test_a_run_starts_at_its_reference_resumes_and_saves_a_model_and_tokenizer_that_fit(configured, tmp_path):
    config, larger = run_of(configured)
    checkpoint = finished(config, larger, tmp_path / "run")
    first = trainer_of(config, larger).train_step(next(iter(trainer_of(config, larger).batches.train)))
    assert first["rewards_train/margins"] == 0.0 and first["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    whole, resumed = trainer_of(config, larger), trainer_of(config, larger)
    resumed.continue_from(Checkpoint.read(tmp_path / "run" / "step-4"))
    for trainer in (whole, resumed):
        trainer.train()
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    plain, tokens = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    assert len(plain.get_input_embeddings().weight) == len(tokens) == len(larger)
    assert torch.equal(plain.get_input_embeddings().weight, whole.models.policy.get_input_embeddings().weight)
    # A run that goes on from it adds nothing again.
    for archive in (checkpoint, checkpoint / "policy.pt"):
        on = configured(*ADDED, f"model.archive={archive}")
        check_model(on.model, larger)
        assert torch.equal(load_model(on.model, larger).get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_an_adapter_learns_of_new_tokens_and_keeps_its_larger_base_model(configured, tmp_path):
    config, larger = run_of(configured, "+adapter=lora")
    trainer = trainer_of(config, larger)
    metrics = trainer.train_step(next(iter(trainer.batches.train)))
    assert metrics["rewards_train/margins"] == 0.0
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name in weights_of(trainer)}
    assert {"embed_tokens", "lm_head", "q_proj"} <= trained
    model = load_model(config.model, larger, base_dir=tmp_path / "base")
    base, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "base")
    assert len(base.get_input_embeddings().weight) == len(tokens) == len(larger)
    assert torch.equal(base.get_input_embeddings().weight, model.get_input_embeddings().get_base_layer().weight)
    checkpoint = checkpoint_of(with_trained_adapter(model), larger, tmp_path)
    merged = merge_and_cast(load_with_adapter(checkpoint, config.model, larger), torch.float32).eval()
    plain, ids = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        torch.arange(len(larger) - 9, len(larger)),
    )
    for found in (merged, plain):
        torch.testing.assert_close(found(ids[None]).logits, model(ids[None]).logits, rtol=1e-5, atol=1e-4)


def test_a_token_twice_is_refused(configured):
    with pytest.raises(UserError, match=r"model.add_special_tokens: 'a' is in model.add_tokens too"):
        configured("model.add_tokens=[a]", "model.add_special_tokens=[a]")
    with pytest.raises(UserError, match=r"model.add_tokens: found 'a' twice"):
        configured("model.add_tokens=[a,a]")
