"""Quantized layers packed into bytes: they compute what the layers of bitsandbytes compute, and can be cut anywhere."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from preference_training.modeling.loading import build_untrained, load_model
from preference_training.modeling.quantization import PackedLinear, packed_state, weight_numels
from tests.support.files import GOLDEN

# (overrides, bits of scales per weight): 8 bits or a float32 for 64 weights, the former with a float32 for 256 of its own.
KINDS = {
    "double quantization": ([], 8 / 64 + 32 / 64 / 256),
    "single quantization": (["model.double_quantization=false"], 32 / 64),
    "products in bfloat16": (["model.quantized_compute_dtype=bfloat16"], 8 / 64 + 32 / 64 / 256),
}


@pytest.fixture(params=KINDS)
def kind(request, compose):
    """A `model` configuration with quantized weights, and the bits of its scales per weight."""
    overrides, bits = KINDS[request.param]
    return compose("model=blank_model", f"model.name_or_path={GOLDEN / 'gpt_neox'}", "+adapter=qlora", *overrides).model, bits


def quantized(model_config, tokenizer) -> tuple[nn.Module, nn.Module]:
    """The first layer of a model's first MLP, of bitsandbytes, and packed."""
    model = load_model(model_config, tokenizer)
    [name, *_] = [name for name, _ in model.named_modules() if name.endswith("dense_h_to_4h.base_layer")]
    layer = model.get_submodule(name)
    packed = PackedLinear(layer, model_config)
    packed.bias, state = layer.bias, packed_state(model)
    packed.weight = nn.Parameter(state[f"{name}.weight"], requires_grad=False)
    return layer, packed


def test_a_packed_layer_gives_the_output_and_gradient_of_bitsandbytes_bit_for_bit(kind, tokenizer):
    layer, packed = quantized(kind[0], tokenizer)
    results = []
    for each in (layer, packed):
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = each(x)
        y.square().sum().backward()
        with torch.no_grad():
            results.append((y.detach(), x.grad, each(x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].abs().max() > 0 and packed.bias is not None


def test_the_layer_of_a_model_without_numbers_is_as_large_as_what_is_packed(kind, tokenizer):
    model_config, bits = kind
    layer, packed = quantized(model_config, tokenizer)
    empty = PackedLinear(layer, model_config)
    assert empty.weight.shape == packed.weight.shape and empty.weight.is_meta
    numel = layer.in_features * layer.out_features
    # Tables of 16 and 256 numbers, an offset, and each of six tensors up to 15 bytes longer.
    assert 0 <= packed.weight.numel() - math.ceil(numel * (4 + bits) / 8) <= 4 * (16 + 256 + 1) + 6 * 16


def test_the_state_of_a_model_has_packed_weights_and_nothing_more(kind, tokenizer):
    model = load_model(kind[0], tokenizer)
    state, plain = packed_state(model), model.state_dict()
    assert state.keys() == {name for name in plain if ".weight." not in name}
    for name, weight in state.items():
        assert (weight.dtype == torch.uint8) == ("base_layer.weight" in name), name
        assert weight.dtype == torch.uint8 or torch.equal(weight, plain[name])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_quantized_model_has_as_many_parameters_as_before(compose, tokenizer, quantization, device):
    plain = compose("model=blank_model", f"model.name_or_path={GOLDEN / 'llama'}", "+adapter=lora").model
    with torch.device(device):
        whole, model = (build_untrained(each, tokenizer) for each in (plain, replace(plain, quantization=quantization)))
    assert weight_numels(model) == {name: weight.numel() for name, weight in whole.named_parameters()}
    quantized_bytes = sum(weight.numel() for weight in model.parameters() if not weight.is_floating_point())
    assert 0 < quantized_bytes != sum(weight_numels(model).values())


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux lists the files in a process's memory")
def test_a_quantized_model_no_longer_holds_the_file_it_was_loaded_from(compose, tokenizer):
    for adapter in ("lora", "qlora"):
        config = compose("model=blank_model", f"model.name_or_path={GOLDEN / 'gpt_neox'}", f"+adapter={adapter}").model
        model = load_model(config, tokenizer)
        maps = Path("/proc/self/maps").read_text()
        assert (str(GOLDEN / "gpt_neox" / "model.safetensors") in maps) == (adapter == "lora")
        del model
