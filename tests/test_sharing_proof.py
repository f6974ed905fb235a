"""The proof that a model may share prefixes: against its own attention, exact, beyond its windows; and why one is refused."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.batching.trees import TreeLayout
from preference_training.core.devices import allow_tf32
from preference_training.core.errors import UserError
from preference_training.modeling.prefix_sharing import share_prefixes
from preference_training.modeling.sharing_proof import exact_arithmetic, fault_of_sharing, windows_of
from preference_training.modeling.tree_attention import NotSharedError, refuse_what_is_not_computed, register

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
    register()
    return model.to(dtype)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gpt_oss", EXPERTS | LAYERS | {"sliding_window": 8}, r"attention sinks \(s_aux\) are not part of it"),
        ("llama4_text", EXPERTS | {"attention_chunk_size": 32, "intermediate_size_mlp": 64}, "chunks of 32 tokens"),
        # Further away than any row of the proof.
        ("llama4_text", EXPERTS | {"attention_chunk_size": 8192, "intermediate_size_mlp": 64}, "chunks of 8192 tokens"),
        ("lfm2", HYBRID, "its log-probs would be wrong by"),
        # Alike as long as what its mask is made of is 0, as in a new model; its gradient is not.
        ("doge", {}, "a mask of its own is not part of it"),
        ("bloom", {"n_head": 4}, "its forward needs rows, and ended before its attention was asked"),
        ("mamba", {"state_size": 8}, "it keeps a state that goes from token to token"),
        ("falcon_h1", STATES, "it keeps a state that goes from token to token"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_part_of_sharing_is_the_reason_of_the_refusal(model_type, changes, reason, dtype, capsys):
    model = make(model_type, dtype, **changes)
    usual, configured = model.config._attn_implementation, model.config.to_dict()
    with pytest.raises(UserError, match=f"prefix_sharing: found on, but .* cannot: .*{reason}"):
        share_prefixes(model, "on")
    assert not share_prefixes(model, "auto")
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert model.config._attn_implementation == usual and model.config.to_dict() == configured


@pytest.mark.parametrize("window", [8, 4096, 262144])
@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_windows_that_are_part_of_it_are_shared_within_however_long_they_are(model_type, window):
    model = make(model_type, sliding_window=window)
    assert windows_of(model)["sliding_window"] == window
    assert share_prefixes(model, "on") and model.config.sliding_window == window


def test_a_window_that_sharing_loses_is_found_though_no_row_is_as_long():
    model = make("mistral", sliding_window=4096)
    for layer in model.model.layers:
        # As in a model whose window is in its mask alone.
        layer.self_attn.forward = without_window(layer.self_attn.forward)
    assert fault_of_sharing(model) == "attention within a window of 4096 tokens (sliding_window) is not part of it"
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


def test_weights_are_left_to_the_bit_as_they_were():
    model = make("lfm2", torch.bfloat16, **HYBRID)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.named_parameters()}
    fault_of_sharing(model)
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


def test_buffers_that_would_become_others_are_a_reason_and_are_put_back():
    model = make("llama")
    model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    assert fault_of_sharing(model) == "what it keeps in model.layers.0.mlp.count while it computes would be wrong"
    assert model.model.layers[0].mlp.count == 0


@pytest.fixture
def switches():
    """Reads the switches of float32 products; they are put back afterwards."""
    matmul, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = onednn.fp32_precision
    yield lambda: (matmul.allow_tf32, torch.backends.cudnn.allow_tf32, onednn.fp32_precision, torch.is_autocast_enabled("cpu"))
    torch.set_float32_matmul_precision("highest")
    onednn.fp32_precision = before


@pytest.mark.parametrize("precision", ["medium", "high", "highest", None])
def test_the_proof_is_in_float32_products_and_leaves_the_runs_own(precision, switches, monkeypatch):
    seen, usual = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (seen.append(switches()), usual(self, x))[1])
    if precision is None:
        # As a run does.
        allow_tf32(True)
    else:
        torch.set_float32_matmul_precision(precision)
    before = switches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fault_of_sharing(make("llama")) is None
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
        ({"position_bias": torch.zeros(2)}, "biases of positions"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "what comes later"),
        ({"indices": torch.zeros(2)}, "chosen tokens"),
        ({"of_tomorrow": torch.zeros(2)}, "given of_tomorrow, which is not known here"),
    ],
)
def test_what_attention_is_given_and_does_not_compute_is_refused(given, reason):
    with pytest.raises(NotSharedError, match=reason):
        refuse_what_is_not_computed(nn.Module(), None, given)


def test_what_changes_nothing_is_passed_over():
    nothing = {"dropout": 0.0, "is_causal": None, "s_aux": None, "position_ids": torch.zeros(2), "use_cache": False}
    refuse_what_is_not_computed(nn.Module(), torch.zeros(1, 1, 1, 1), nothing)
    with pytest.raises(NotSharedError, match="a mask of its own"):
        refuse_what_is_not_computed(nn.Module(), torch.zeros(1, 1, 33, 33), {})


def test_a_layout_goes_on_by_branches_on_other_devices_too():
    layout = TreeLayout((), torch.device("cpu"))
    assert layout.by_branches and layout.on(torch.device("meta")).by_branches
