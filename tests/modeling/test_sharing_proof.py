"""The proof that a model may share prefixes: against its own attention, exact, beyond its windows; and why one is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.batching.packing import pack_examples
from preference_training.batching.tries import Trie, TrieLayout
from preference_training.core.errors import UserError
from preference_training.core.machine import allow_tf32
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.kernels import choose_attention
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing import proof, tree_attention
from preference_training.modeling.prefix_sharing.lengths import SHORT, attention_windows, other_lengths
from preference_training.modeling.prefix_sharing.proof import exact_arithmetic, find_sharing_failure, random_tries
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.prefix_sharing.tree_attention import (
    TREE_ATTENTION,
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
    choose_attention(model, "auto")
    return model.to(dtype)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("lfm2", HYBRID, "its conv layers pass a state on from token to token"),
        # Alike as long as what its mask is made of is 0, as in a new model; its gradient is not.
        ("doge", {}, "an attention mask of its own is not supported"),
        ("bloom", {"n_head": 4}, "it does not compute its attention through transformers' attention interface"),
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


# ---- what it compares -----------------------------------------------------------------------------------------------------


def test_the_batch_has_what_tries_have():
    batch = random_tries(97)
    trie = batch.trie

    def depth(number: int) -> int:
        branch = trie.branches[number]
        return 1 if branch.parent < 0 else 1 + depth(branch.parent)

    assert max(map(depth, range(len(trie.branches)))) == 3
    # Responses 0 to 2 are of the first prompt, 3 and 4 of the second: they begin with the same 17 tokens.
    assert trie.path(0)[:17].tolist() == trie.path(3)[:17].tolist() and trie.path(0)[17] != trie.path(3)[17]
    # Five scored tokens count for two responses each.
    assert len(batch.scored) == len(batch.scored_ids) + 5
    spans = batch.scored_positions[batch.scored_responses == 3].tolist()
    assert spans == [22, 23, 24, 38, 39, 40, 41] and trie.ends[3][1] == 42
    # Longer than two of the shortened windows and chunks.
    assert max(length for _, length in trie.ends) > 2 * SHORT


CAPPED = LAYERS | {"sliding_window": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
CHUNKS = EXPERTS | {"intermediate_size_mlp": 64}
SCALED = CHUNKS | {"no_rope_layers": [1, 0], "attn_scale": 0.5}


@pytest.mark.parametrize(
    ("model_type", "changes", "ignored"),
    [
        ("gpt_oss", EXPERTS | LAYERS | {"sliding_window": 8}, "sinks"),
        ("gpt_oss", EXPERTS | LAYERS | {"sliding_window": 8}, "window"),
        ("mistral", {"sliding_window": 4096}, "window"),
        # Changes its logits after its head, so that the first attempt fails in any case.
        ("gemma2", CAPPED, "softcap"),
        ("gemma2", CAPPED | {"query_pre_attn_scalar": 1}, "scaling"),
        ("llama4_text", CHUNKS | {"attention_chunk_size": 32}, "chunk"),
        # Further away than any row of the proof.
        ("llama4_text", CHUNKS | {"attention_chunk_size": 8192}, "chunk"),
    ],
)
def test_attention_that_ignores_one_of_its_rules_fails_in_every_attempt(model_type, changes, ignored, monkeypatch):
    assert share_prefixes(make(model_type, **changes), "on")
    model, whole = make(model_type, **changes), tree_attention.Rules
    monkeypatch.setattr(tree_attention, "Rules", lambda *given, **named: whole(*given, **named)._replace(**{ignored: None}))
    # Without a layout it ignores it too: compared with itself, the model would pass.
    assert not share_prefixes(model, "auto")
    # As after an attempt that has left its attention behind.
    model.set_attn_implementation(TREE_ATTENTION)
    assert find_sharing_failure(model) is not None
    assert model.config._attn_implementation == TREE_ATTENTION


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_every_attempt_compares_with_the_attention_that_the_model_was_loaded_with(model_type, monkeypatch):
    model, seen = make(model_type, **(EXPERTS if model_type == "gpt_oss" else CAPPED)), []
    own, usual = model.config._attn_implementation, proof.unpadded_scores
    see = lambda: seen.append(model.config._attn_implementation)  # noqa: E731
    monkeypatch.setattr(proof, "unpadded_scores", lambda *given: (see(), usual(*given))[1])
    assert own in ("sdpa", "eager") and share_prefixes(model, "on")
    # Gemma's second attempt follows one with a scoring head, whose cause was looked for.
    assert set(seen) == {own} and len(seen) >= (2 if model_type == "gemma2" else 1)


def test_attention_that_is_wrong_from_depth_three_on_fails(monkeypatch):
    model = make("llama")

    def flat(query, key, value, layout, rules):
        known = layout.trie.branches
        is_deep = lambda branch: branch.parent >= 0 and known[branch.parent].parent >= 0  # noqa: E731
        branches = [replace(branch, shared=1) if is_deep(branch) else branch for branch in known]
        return by_branches(query, key, value, TrieLayout(Trie(tuple(branches), layout.trie.ends), layout.device), rules)

    by_branches = tree_attention._attention_by_branches
    monkeypatch.setattr(tree_attention, "_attention_by_branches", flat)
    with pytest.raises(UserError, match="log-probs would be wrong by"):
        share_prefixes(model, "on")


# ---- lengths --------------------------------------------------------------------------------------------------------------


def test_queries_that_are_scaled_by_their_index_in_the_row_are_scaled_by_position_or_refused(monkeypatch):
    assert other_lengths(make("llama4_text", **SCALED))["floor_scale"] == 8192
    assert share_prefixes(make("llama4_text", **SCALED), "on")
    monkeypatch.setattr(tree_attention, "_scaled_by_position", lambda module, query, layout: query)
    reason = find_sharing_failure(make("llama4_text", **SCALED))
    assert reason == "beyond 8192 tokens (floor_scale) its results depend on packed positions"


@pytest.mark.parametrize("nested", [False, True])
def test_any_number_of_the_configuration_that_changes_long_rows_is_a_length(nested):
    model = make("llama")
    rotary = model.model.rotary_emb
    model.config.far = 9000
    model.config.rope_parameters["reach"] = 7000
    inner = rotary.forward

    def forward(x, position_ids):
        # Beyond a length, positions of the row in place of those given.
        limit = model.config.rope_parameters["reach"] if nested else model.config.far
        packed = torch.arange(position_ids.shape[1])[None].expand_as(position_ids)
        return inner(x, torch.where(position_ids < limit, position_ids, 2 * packed))

    rotary.forward = forward
    name, length = ("rope_parameters.reach", 7000) if nested else ("far", 9000)
    expected = f"beyond {length} tokens ({name}) its results depend on packed positions"
    assert find_sharing_failure(model) == expected
    assert model.config.far == 9000 and model.config.rope_parameters["reach"] == 7000


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 24,
    "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    ],
    ids=["LongRoPE", "dynamic NTK"],
)
@pytest.mark.parametrize("mode", ["on", "off"])
def test_sequences_longer_and_shorter_than_a_rotary_limit_have_the_log_probs_that_they_have_alone(model_type, changes, mode):
    model = make(model_type, **changes).eval()
    share_prefixes(model, mode)
    draw = torch.Generator().manual_seed(2)
    tokens = lambda count: torch.randint(3, 97, (count,), generator=draw).tolist()  # noqa: E731
    # 24 is the limit: some batches lie on one side of it, others on both.
    for lengths in [(14, 14), (4, 14), (15, 4, 30), (15, 30), (3, 5)]:
        prompt = TokenizedPrompt(tokens(10), [tokens(length) for length in lengths], [])
        found = response_scores(model, pack_examples([(prompt, number) for number in range(len(lengths))]))
        for response, logp in zip(prompt.responses, found, strict=True):
            # A new model, since dynamic frequencies stay those of the longest row so far.
            alone = make(model_type, **changes).eval()(torch.tensor([prompt.prompt_ids + response])).logits[0, 9:-1]
            expected = alone.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-4)


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
        if given.get("trie") is not None:
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
    nothing = {"dropout": 0.0, "is_causal": None, "position_bias": None, "position_ids": torch.zeros(2), "use_cache": False}
    check_supported(nn.Module(), torch.zeros(1, 1, 1, 1), nothing)
    with pytest.raises(UnsupportedAttentionError, match="an attention mask of its own"):
        check_supported(nn.Module(), torch.zeros(1, 1, 33, 33), {})


def test_a_layout_keeps_its_attention_by_branches_on_other_devices():
    layout = TrieLayout(Trie((), ()), torch.device("cpu"))
    assert layout.by_branches and layout.on(torch.device("meta")).by_branches
