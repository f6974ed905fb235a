"""Log-probs and gradients: as a trie, as padded rows, and exactly (in float32 on the CPU); in all dtypes, with TF32 or not."""

import copy
import time

import torch
from torch import Tensor, nn

from gpu_parts.compiling import graphs
from gpu_parts.found import Found, Settings
from gpu_parts.making import FAMILIES, SMALL, build_config, make_model, packed, random_prompts
from preference_training.core.machine import allow_tf32
from preference_training.modeling.logprobs import response_scores, trie_scores
from preference_training.modeling.prefix_sharing.attention_choice import AUTO, VARLEN, asked_for
from preference_training.modeling.prefix_sharing.proof import TOLERANCES, logps_and_gradients
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.prefix_sharing.tree_attention import TREE_ATTENTION
from preference_training.modeling.state import reference_copy

# Architecture, dtype, TF32.
CASES = [
    ("llama", "bfloat16", True), ("llama", "float16", True), ("llama", "float32", True), ("llama", "float32", False),
    ("gpt_neox", "bfloat16", True), ("gpt_neox", "float32", False), ("gemma2", "bfloat16", True), ("gemma2", "float32", False),
    ("gemma3", "bfloat16", True), ("qwen3", "bfloat16", True), ("qwen3", "float16", True), ("gpt_oss", "bfloat16", True),
    ("head_80", "bfloat16", True), ("head_80", "float32", True), ("gpt_oss", "float32", False), ("gemma3", "float32", False),
]  # fmt: skip
CASES_ON_CPU = [("llama", "float32", False), ("gemma2", "bfloat16", False)]
# By flash attention in parts: heads in groups, of 64 and 80, sinks, windows that FlexAttention computes, and both dtypes.
VARLEN_CASES = [
    ("llama", "bfloat16"), ("llama", "float16"), ("qwen3", "bfloat16"), ("head_80", "bfloat16"), ("gpt_oss", "bfloat16"),
    ("gpt_neox", "bfloat16"), ("gemma3", "bfloat16"),
]  # fmt: skip
# The largest difference of a log-prob where float32 products are computed in TF32. Unit: nats per token.
WITH_TF32 = 5e-3


def values(found: Found, settings: Settings) -> None:
    """Compare the three in every case; a policy and its frozen copy must agree bit for bit."""
    for family, dtype, tf32 in settings.choose(CASES, CASES_ON_CPU):
        name = f"{family} {dtype}" + " TF32" * (tf32 and dtype == "float32")
        found.attempt(name, compare, family, dtype, tf32, settings, must=is_right)


def values_varlen(found: Found, settings: Settings) -> None:
    """The same by flash attention, which must not have been given up."""
    for family, dtype in settings.choose(VARLEN_CASES, []):
        must = lambda result: is_right(result) and result["attention"] == VARLEN  # noqa: E731
        found.attempt(f"{family} {dtype} varlen", compare, family, dtype, True, settings, VARLEN, must=must)
    if settings.is_cpu:
        found.put("left_out", "flash attention has no kernels for cpu")


def compare(family: str, dtype: str, tf32: bool, settings: Settings, attention: str = AUTO) -> dict:
    """One case: the largest errors against the exact values."""
    config = build_config(small(family, settings), dtype)
    model = make_model(config, settings)
    usual, before, began = model.config._attn_implementation, graphs(), time.perf_counter()
    allow_tf32(tf32)
    shares = share_prefixes(model, "auto", attention)
    result = {
        "shares": shares,
        "attention": asked_for(),
        "proof_seconds": round(time.perf_counter() - began, 1),
        "graphs_of_proof": graphs() - before,
    }
    if not shares:
        return result
    sizes = settings.choose({}, {"prompt": (5, 40), "response": (2, 20)})
    batch = packed(random_prompts(1, 6, responses=3, **sizes), settings)
    result["first_margin"] = first_margin(model, reference_copy(model, config.model), batch)
    weights = list(model.parameters())
    trie = logps_and_gradients(trie_scores, model, batch, weights)
    model.set_attn_implementation(usual)
    padded = logps_and_gradients(response_scores, model, batch, weights)
    exact_model = copy.deepcopy(model).to("cpu", torch.float32)
    if "flash" in usual:
        exact_model.set_attn_implementation("eager")
    exact = logps_and_gradients(response_scores, exact_model, batch.on_host, list(exact_model.parameters()))
    lengths = batch.on_host.response_lengths
    limit = WITH_TF32 if tf32 and dtype == "float32" else TOLERANCES[getattr(torch, dtype)]
    return result | {
        "limit": limit,
        "trie": error_per_token(trie[0], exact[0], lengths),
        "padded": error_per_token(padded[0], exact[0], lengths),
        "trie_gradient": relative_error(trie[1], exact[1]),
        "padded_gradient": relative_error(padded[1], exact[1]),
    }


def small(family: str, settings: Settings) -> dict:
    """The architecture of a family, on a CPU in two narrow layers."""
    values = FAMILIES[family]
    if not settings.is_cpu:
        return values
    layers = {"layer_types": values["layer_types"][:2]} if "layer_types" in values else {}
    return values | {"num_hidden_layers": 2, "intermediate_size": SMALL["intermediate_size"] // 4} | layers


def is_right(result: dict) -> bool:
    """Whether a case shares prefixes and is within its limits; gradients may differ by ten times as much.

    Where padded rows differ by more, as experts do that rounding chooses, a trie may differ by twice as much as they.
    """
    if not result["shares"] or result["first_margin"] != 0:
        return False
    values = result["trie"] <= max(result["limit"], 2 * result["padded"])
    return values and result["trie_gradient"] <= max(10 * result["limit"], 2 * result["padded_gradient"])


def first_margin(policy: nn.Module, reference: nn.Module, batch) -> float:
    """The largest difference of a policy, with gradients, and its frozen copy, without. Unit: nats."""
    assert reference.config._attn_implementation == TREE_ATTENTION
    with torch.no_grad():
        frozen = response_scores(reference, batch)
    return (response_scores(policy, batch).detach() - frozen).abs().max().item()


def error_per_token(found: Tensor, exact: Tensor, lengths: Tensor) -> float:
    """The largest difference of a response's log-prob, over its tokens."""
    return ((found.cpu() - exact).abs() / lengths).max().item()


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the difference of gradients over their norm."""
    difference = sum((one.cpu() - other).double().square().sum() for one, other in zip(found, exact, strict=True))
    return (difference / sum(other.double().square().sum() for other in exact)).sqrt().item()
