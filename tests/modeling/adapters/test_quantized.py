"""Adapters on quantized weights of each kind of layer: what is quantized is said; merges have the architecture's shapes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.core.errors import UserError
from preference_training.modeling.loading import check_model, save_model
from preference_training.modeling.quantization import quantize
from tests.modeling.test_adapters import (
    answers,
    checkpoint_of,
    configured,
    load_merged,
    model_of,
    small,
    with_trained_adapter,
)

__all__ = ["configured", "small"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kind", [[], ["model.lora.use_dora=true"], ["model.lora.init=pissa"]], ids=["lora", "dora", "pissa"])
def test_transposed_layers_are_quantized_and_merge_into_what_they_were(
    kind, quantization, small, configured, tokenizer, tmp_path
):
    name = f"model.name_or_path={small('gpt2')}"
    config = configured(name, "+adapter=lora", f"model.quantization={quantization}", *kind)
    plain = AutoModelForCausalLM.from_pretrained(small("gpt2"), dtype=torch.float32)
    model = with_trained_adapter(model_of(config, tokenizer))
    assert sum(not weight.is_floating_point() for weight in model.parameters()) == 2 * 4
    expected = answers(model)
    checkpoint = checkpoint_of(model, tokenizer, tmp_path)
    merged = load_merged(checkpoint, config.model, tokenizer, torch.float32)
    shapes = {name: weight.shape for name, weight in plain.named_parameters()}
    assert {name: weight.shape for name, weight in merged.named_parameters()} == shapes
    save_model(merged, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(answers(again), answers(merged), rtol=0, atol=0)
    if quantization == "nf4":
        torch.testing.assert_close(answers(merged), expected, rtol=1e-5, atol=1e-4)


def test_how_much_is_quantized_is_said_and_that_stacked_experts_are_not(small, configured, tokenizer):
    for name, share, more in (("gpt2", "24,576 of", []), ("mixtral", "6,144 of", ["model.layers.*.mlp.experts"])):
        config = configured(f"model.name_or_path={small(name)}", "+adapter=qlora")
        first, *others = [line for line in check_model(config.model, tokenizer) if line.startswith("model.quantization")]
        assert share in first and "are quantized to nf4" in first
        assert len(others) == len(more) and all(part in line for part, line in zip(more, others, strict=True))


def test_a_model_without_a_layer_to_quantize_is_refused(configured):
    config = configured("+adapter=qlora")
    sizes = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 2, "vocab_size": 16, "intermediate_size": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    with pytest.raises(UserError, match=r"model\.quantization: found nf4, and LlamaForCausalLM has no linear layer"):
        quantize(model, config.model)
