"""The proof that a model may share prefixes: against its own attention, exact, beyond its windows; and why one is refused."""

import pytest
import torch
from preference_training.batching.trees import TreeLayout
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.core.errors import UserError
from preference_training.core.machine import allow_tf32
from preference_training.modeling.prefix_sharing.proof import attention_windows, exact_arithmetic, find_sharing_failure
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.prefix_sharing.tree_attention import (
    UnsupportedAttentionError,
    check_supported,
    register_tree_attention,
)

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["conv", "full_attention"]}
STATES = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


def make(model_type: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A small model with weights large enough that attention matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes}), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.2)
    register_tree_attention()
    return model.to(dtype)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gpt_oss", EXPERTS | LAYERS | {"sliding_window": 8}, r"attention sinks \(s_aux\) are not supported"),
        ("llama4_text", EXPERTS | {"attention_chunk_size": 32, "intermediate_size_mlp": 64}, "chunks of 32 tokens"),
        # Further away than any row of the proof.
        ("llama4_text", EXPERTS | {"attention_chunk_size": 8192, "intermediate_size_mlp": 64}, "chunks of 8192 tokens"),
        ("lfm2", HYBRID, "its log-probs would be wrong by"),
        # Alike as long as what its mask is made of is 0, as in a new model; its gradient is not.
        ("doge", {}, "an attention mask of its own is not supported"),
        ("bloom", {"n_head": 4}, "its forward does not support packed batches and failed before its attention"),
        ("mamba", {"state_size": 8}, "it is recurrent: one response would pass its state on"),
        ("falcon_h1", STATES, "it is recurrent: one response would pass its state on"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_refusal_to_share_prefixes_names_the_feature_that_is_not_supported(model_type, changes, reason, dtype, capsys):
    model = make(model_type, dtype, **changes)
    usual, configured = model.config._attn_implementation, model.config.to_dict()
    with pytest.raises(UserError, match=f"prefix_sharing: found on, but .* cannot: .*{reason}"):
        share_prefixes(model, "on")
    assert not share_prefixes(model, "auto")
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert model.config._attn_implementation == usual and model.config.to_dict() == configured


@pytest.mark.parametrize("window", [8, 4096, 262144])
@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_supported_windows_of_any_length_pass_the_proof(model_type, window):
    model = make(model_type, sliding_window=window)
    assert attention_windows(model)["sliding_window"] == window
    assert share_prefixes(model, "on") and model.config.sliding_window == window


def test_an_unsupported_window_is_found_though_it_is_longer_than_every_row():
    model = make("mistral", sliding_window=4096)
    for layer in model.model.layers:
        # As in a model whose window is in its mask alone.
        layer.self_attn.forward = without_window(layer.self_attn.forward)
    assert find_sharing_failure(model) == "attention within a window of 4096 tokens (sliding_window) is not supported"
    assert model.config.sliding_window == 4096


def without_window(forward):
    """An attention's forward that does not hand its window on."""

    def changed(*args, **given):
        self, window = forward.__self__, forward.__self__.config.sliding_window
        if given.get("response_trees") is not None:
            self.config.sliding_window = None
        try:
            return forward(*args, **given)
        finally:
            self.config.sliding_window = window

    return changed


def test_the_proof_leaves_weights_bit_for_bit_as_they_were():
    model = make("lfm2", torch.bfloat16, **HYBRID)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.named_parameters()}
    find_sharing_failure(model)
    for name, weight in model.named_parameters():
        assert weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1])


class Counting(nn.Module):
    """Counts the tokens that come by."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.register_buffer("count", torch.zeros(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the module inside gives."""
        self.count += hidden.shape[0] * hidden.shape[1]
        return self.inner(hidden)


def test_buffers_that_would_change_are_an_error_and_are_restored():
    model = make("llama")
    model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    assert find_sharing_failure(model) == "its forward would leave wrong values in the buffer model.layers.0.mlp.count"
    assert model.model.layers[0].mlp.count == 0


@pytest.fixture
def switches():
    """Reads the switches of float32 products, and restores them afterwards."""
    matmul, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = onednn.fp32_precision
    yield lambda: (matmul.allow_tf32, torch.backends.cudnn.allow_tf32, onednn.fp32_precision, torch.is_autocast_enabled("cpu"))
    torch.set_float32_matmul_precision("highest")
    onednn.fp32_precision = before


@pytest.mark.parametrize("precision", ["medium", "high", "highest", None])
def test_the_proof_computes_in_float32_and_restores_the_runs_precision(precision, switches, monkeypatch):
    seen, usual = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (seen.append(switches()), usual(self, x))[1])
    if precision is None:
        # As a run does.
        allow_tf32(True)
    else:
        torch.set_float32_matmul_precision(precision)
    before = switches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_sharing_failure(make("llama")) is None
    assert set(seen) == {(False, False, "ieee", False)} and switches() == before


def test_a_proof_that_fails_leaves_the_switches_as_they_were(switches):
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(ZeroDivisionError), exact_arithmetic():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"position_bias": torch.zeros(2)}, "position biases"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "bidirectional attention"),
        ({"indices": torch.zeros(2)}, "selected tokens"),
        ({"of_tomorrow": torch.zeros(2)}, "unknown argument, of_tomorrow"),
    ],
)
def test_arguments_that_attention_does_not_implement_are_refused(given, reason):
    with pytest.raises(UnsupportedAttentionError, match=reason):
        check_supported(nn.Module(), None, given)


def test_arguments_without_effect_are_ignored():
    nothing = {"dropout": 0.0, "is_causal": None, "s_aux": None, "position_ids": torch.zeros(2), "use_cache": False}
    check_supported(nn.Module(), torch.zeros(1, 1, 1, 1), nothing)
    with pytest.raises(UnsupportedAttentionError, match="an attention mask of its own"):
        check_supported(nn.Module(), torch.zeros(1, 1, 33, 33), {})


def test_a_layout_keeps_its_attention_by_branches_on_other_devices():
    layout = TreeLayout((), torch.device("cpu"))
    assert layout.by_branches and layout.on(torch.device("meta")).by_branches
