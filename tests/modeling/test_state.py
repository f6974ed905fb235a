"""A frozen copy is the model it was made from, bit for bit, whatever hangs on its modules; and batches go where it computes."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.launching import collective_backend
from preference_training.modeling.loading import disable_dropout
from preference_training.modeling.logprobs import _head_index, response_scores
from preference_training.modeling.prefix_sharing.scoring_head import ScoringHead
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.prefix_sharing.tree_attention import tree_attention_forward
from preference_training.modeling.state import compute_device, frozen_copy
from preference_training.modeling.token_budget import token_budget

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
RECURRENT = {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8}


def make(model_type: str, dtype: torch.dtype, **changes) -> nn.Module:
    """A small model in a dtype, whose buffers are as `from_pretrained` leaves them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if "bias" in name:
            # A router's, of numbers that bfloat16 does not have.
            nn.init.normal_(buffer)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    disable_dropout(model)
    return model.train()


def batch_of(*shapes: tuple[int, tuple[int, ...]]):
    """Random prompts of the given lengths with responses of the given lengths, packed."""
    draw = torch.Generator().manual_seed(1)
    tokens = lambda count: torch.randint(3, 97, (count,), generator=draw).tolist()  # noqa: E731
    return pack_examples(
        list(iterate_examples(TokenizedPrompt(tokens(p), [tokens(r) for r in rs], [(0, 1)]) for p, rs in shapes))
    )


def apart(model: nn.Module, other: nn.Module, batch) -> float:
    """The largest difference of two models' log-probs, one as it is trained and one as a reference is asked."""
    trained = response_scores(model.train(), batch)
    with torch.no_grad():
        return (trained.detach() - response_scores(other, batch)).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {"head_dim": 128}), ("gpt_neox", {}), ("gpt2", {"n_positions": 1024}), ("deepseek_v3", EXPERTS)],
)
def test_a_frozen_copy_gives_the_log_probs_of_the_model_in_training_mode(model_type, changes, dtype):
    model, batch = make(model_type, dtype, **changes), batch_of((512, (40, 9)), (7, (3, 30)))
    share_prefixes(model, "auto")
    copied = frozen_copy(model, dtype)
    assert apart(model, copied, batch) == 0.0
    assert [buffer.dtype for buffer in copied.buffers()] == [buffer.dtype for buffer in model.buffers()]
    assert not copied.training and not any(weight.requires_grad for weight in copied.parameters())
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    assert apart(model, copied, batch) > 0.0


def test_rotary_frequencies_are_not_rounded_with_the_weights():
    model = make("llama", torch.float32, head_dim=128)
    frequencies = 1 / 10000 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    copied = frozen_copy(model, torch.bfloat16)
    assert {weight.dtype for weight in copied.parameters()} == {torch.bfloat16}
    # At position 512 a bfloat16 of 8 bits would be wrong by up to 512 * 2**-9 rad.
    assert (copied.model.rotary_emb.inv_freq - frequencies).abs().max() * 512 < 1e-4


def test_tensors_that_a_model_keeps_of_its_last_forward_are_not_copied():
    model, batch = make("recurrent_gemma", torch.bfloat16, **RECURRENT), batch_of((20, (9, 4)))
    response_scores(model, batch)
    assert apart(model, frozen_copy(model), batch) == 0.0


def test_tied_weights_are_one_weight_in_the_copy():
    model = make("llama", torch.float32, tie_word_embeddings=True)
    copied = frozen_copy(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight is not model.lm_head.weight


def test_the_copy_of_a_dispatched_model_is_a_model_of_its_own():
    from accelerate import dispatch_model

    model, batch = make("llama", torch.bfloat16), batch_of((20, (9, 4)))
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    copied = frozen_copy(model, torch.bfloat16)
    assert copied is not model and apart(model, copied, batch) == 0.0
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert apart(model, copied, batch) > 0.0


# ---- where a model computes -----------------------------------------------------------------------------------------------


def test_the_compute_device_is_that_of_the_placement_and_not_of_the_weights():
    model = make("llama", torch.float32)
    assert compute_device(model) == torch.device("cpu")
    model.compute_device = torch.device("meta")
    assert compute_device(model) == torch.device("meta")
    assert compute_device(frozen_copy(model)) == torch.device("meta")


def test_offloaded_weights_take_no_device_memory():
    model, gib = make("llama", torch.float32), 2**30
    model.large = nn.Parameter(torch.empty(2**26))
    # With gradients and two moments they take three quarters of a GiB, and leave a quarter.
    there = token_budget(model, free=gib).limit
    model.compute_device = torch.device("meta")
    assert 2 * there < token_budget(model, free=gib).limit


def test_layers_on_another_device_than_the_batch_move_its_layout_to_their_own():
    # Hooks move the tensors that a layer is handed, and know nothing of a layout, or of what a head is told.
    meta, layout = torch.device("meta"), batch_of((20, (9, 4))).layout
    query = torch.empty(1, 4, 33, 8, device=meta)
    layer = nn.Module()
    output, _ = tree_attention_forward(layer, query, query, query, None, trie=layout)
    assert output.device == meta and layout.on(meta).subtree_ends.device == meta and layout.on(meta) is layout.on(meta)
    head = nn.Linear(8, 97, device=meta)
    head.__class__ = ScoringHead
    head.scored_ids = torch.arange(5)
    assert head(torch.empty(1, 5, 8, device=meta)).shape == (1, 5, 1)


def test_the_last_hidden_states_of_a_model_on_several_devices_are_indexed_from_the_cpu():
    model, places = make("llama", torch.float32), torch.empty(3, dtype=torch.int64)
    assert _head_index(model, places) is places
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert _head_index(model, places).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "offloads", "backend"),
    [("cpu", True, "gloo"), ("cuda", False, "nccl"), ("cuda", True, "cpu:gloo,cuda:nccl")],
)
def test_offloaded_ranks_can_communicate_cpu_tensors(device, offloads, backend):
    assert collective_backend(torch.device(device), offloads) == backend
