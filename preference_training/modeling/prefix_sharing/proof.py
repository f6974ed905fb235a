"""The proof that a model gives the same results with shared prefixes as without, run on the model itself when it is loaded.

It compares log-probs, gradients and buffers of a trie under tree attention with those of each sequence alone under the
attention that the model was loaded with, twice: in float32 without TF32, where only rounding may differ, and with the dtype and
the kernels of the run. Lengths that positions are compared with, windows among them, are shortened for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from preference_training.batching.packing import PackedBatch, iterate_examples, pack_examples
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.kernels import lacks_soft_cap
from preference_training.modeling.logprobs import response_scores, trie_scores, unpadded_scores
from preference_training.modeling.prefix_sharing.attention_choice import give_up, in_use, only
from preference_training.modeling.prefix_sharing.lengths import (
    ENDLESS,
    LengthPlan,
    attention_windows,
    lengths_changed,
    other_lengths,
    plan_lengths,
    restored_buffers,
    same_values,
)
from preference_training.modeling.prefix_sharing.tree_attention import TREE_ATTENTION, UnsupportedAttentionError
from preference_training.modeling.state import compute_device, free_memory
from preference_training.modeling.value_head import has_value_head, is_head_weight

# The largest difference of a log-prob between the two computations. Unit: nats per token.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}

# Parts of names of kinds of layers that are no attention.
STATES = ("linear", "conv", "mamba", "recurrent")


# ---- the batch ------------------------------------------------------------------------------------------------------------


def random_tries(vocabulary: int, longest: int = 0) -> PackedBatch:
    """A batch of random tries, whose packed order is far from the positions of its sequences.

    Two prompts begin alike, and two responses of the first, which is three branches on each other; responses are scored as a
    whole, in spans in their middle, or in one token. Several sequences are of one length, which are computed together where
    there is no padding. longest: the prompt length of one more tree, if given.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = lambda count: torch.randint(0, vocabulary, (count,), generator=draw).tolist()  # noqa: E731
    preamble, begun = tokens(17), tokens(5)
    prompts = [
        TokenizedPrompt(preamble + tokens(6), [begun + tokens(14), begun + tokens(14), tokens(1)], [(0, 1), (0, 2)]),
        TokenizedPrompt(preamble + tokens(3), [tokens(22), tokens(4)], [(0, 1)], spans=[[(2, 5), (18, 22)], [(1, 3)]]),
        TokenizedPrompt(tokens(1), [tokens(3), tokens(3)], [(0, 1)]),
    ]
    if longest:
        prompts.append(TokenizedPrompt(tokens(longest), [tokens(9), tokens(20)], [(0, 1)]))
    return pack_examples(list(iterate_examples(prompts)))


def longest_row(batch: PackedBatch) -> Tensor:
    """The token ids of a batch's longest sequence: [1, L]."""
    number = max(range(len(batch.trie.ends)), key=lambda number: batch.trie.ends[number][1])
    return batch.input_ids[torch.from_numpy(batch.trie.path(number)).to(batch.input_ids.device)][None]


def logps_and_gradients(compute, model: nn.Module, batch: PackedBatch, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The log-probs [R] of a batch under `compute(model, batch)`, and the float32 gradients of their sum for some weights."""
    with torch.set_grad_enabled(bool(weights)):
        return _with_gradients(compute(model, batch), weights)


def _with_gradients(logps: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    gradients = torch.autograd.grad(logps.sum(), weights) if weights else ()
    return logps.detach(), [gradient.float() for gradient in gradients]


def logps_and_ends(compute, model: nn.Module, batch: PackedBatch) -> tuple[list[str], tuple[Tensor, list[Tensor]]]:
    """The names of the first and the last trained weight with a gradient, value heads aside; `logps_and_gradients` for them.

    The first is where a backward pass ends. One of the two is the B matrix of a new LoRA adapter, whose A matrices have zero
    gradients. A model may have weights that text does not reach, or of experts that no token is sent to.
    """
    with torch.enable_grad():
        logps = compute(model, batch)
        reached = _leaves(logps)
        names = [name for name, weight in model.named_parameters() if weight in reached and not is_head_weight(name)]
        names = [*names[:1], *names[1:][-1:]]
        return names, _with_gradients(logps, weights_named(model, names))


def _leaves(result: Tensor) -> set[Tensor]:
    """The tensors that have a gradient by the backward pass of a result."""
    todo, seen, leaves = [result.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.add(getattr(node, "variable", None))
            todo += [each for each, _ in node.next_functions]
    return leaves


def weights_named(model: nn.Module, names: list[str]) -> list[Tensor]:
    """The weights of these names."""
    named = dict(model.named_parameters())
    return [named[name] for name in names]


class ErrorScale(NamedTuple):
    """How differences between two results of `response_scores` are measured.

    sizes: what each response's is divided by [R]. what, unit: for messages.
    """

    sizes: Tensor
    what: str
    unit: str

    @classmethod
    def of(cls, model: nn.Module, batch: PackedBatch, expected: Tensor) -> "ErrorScale":
        """For a model's log-probs [R] of a batch their tokens; for values the largest, at least 1."""
        if has_value_head(model):
            return cls(expected.abs().max().clamp(min=1.0).expand_as(expected), "values", "of the largest")
        return cls(batch.response_lengths.to(expected.device), "log-probs", "nats per token")

    def error(self, found: Tensor, expected: Tensor) -> float:
        """The largest difference."""
        return ((found - expected).abs() / self.sizes).max().item()


def disagreement(found, expected, scale: ErrorScale, tolerance: float) -> str | None:
    """How two results of `logps_and_gradients` differ by more than `tolerance` in units of a scale; None where they agree.

    Gradients may differ by ten times the tolerance, relative to their norm.
    """
    (logps, gradients), (expected_logps, expected_gradients) = found, expected
    error = scale.error(logps, expected_logps)
    if not error <= tolerance:
        return f"its {scale.what} would be wrong by {error:.1g} {scale.unit}"
    for one, other in zip(gradients, expected_gradients, strict=True):
        if not (one - other).norm() <= 10 * tolerance * other.norm():
            return f"its gradient would be wrong by {((one - other).norm() / other.norm()).item():.1g} of its norm"
    return None


# ---- the proof ------------------------------------------------------------------------------------------------------------


def find_sharing_failure(model: nn.Module) -> str | None:
    """Why a model cannot share prefixes; None where it can. Leaves the model as it was."""
    if getattr(model, "_is_stateful", False):
        return "it is recurrent: one response would pass its state on to the next"
    if not model._can_set_attn_implementation():
        return "it does not compute its attention through transformers' attention interface"
    training, usual = model.training, model.config._attn_implementation
    if usual == TREE_ATTENTION:
        # Compared with itself it would prove nothing: by default a model attends as its class does.
        model.set_attn_implementation(None)
        if lacks_soft_cap(model):
            model.set_attn_implementation("eager")
    own = model.config._attn_implementation
    model.eval()
    try:
        with exact_arithmetic():
            row = longest_row(random_tries(_vocabulary(model))).to(compute_device(model))
            if (plan := plan_lengths(model, row)).failure:
                return plan.failure
            if float32_weights := _in_float32(model):
                with float32_weights:
                    failure = _prove(model, _Comparison(own, torch.float32, plan.longest, by_branches=True), plan)
                # A float32 run on a CPU computes exactly this.
                if failure or (model.dtype == torch.float32 and compute_device(model).type != "cuda"):
                    return failure
            return _prove_kernels(model, _Comparison(own, model.dtype, plan.longest, by_branches=False), plan)
    finally:
        model.set_attn_implementation(usual)
        model.train(training)


def _prove_kernels(model: nn.Module, comparison: "_Comparison", plan: LengthPlan) -> str | None:
    """Compare with all kernels that the run may use, and give up those that fail; branch by branch where none is left."""
    device, proved = compute_device(model), set()
    while todo := [name for name in in_use(device) if name not in proved]:
        with only(todo[0]):
            failure = _prove(model, comparison, plan)
        if failure:
            give_up(todo[0], device, failure)
        proved.add(todo[0])
    return None if in_use(device) else _prove(model, comparison._replace(by_branches=True), plan)


def find_recomputing_failure(model: nn.Module, enable: Callable[[], None]) -> str | None:
    """Switch activation checkpointing on by `enable`; why the model's gradients are wrong with it, None where they are right.

    A model that changes kept results in place computes with the changed ones in the backward pass, and torch need not notice.
    """
    batch = random_tries(_vocabulary(model)).to(compute_device(model))
    with exact_arithmetic():
        # The whole backward pass, whose last gradients are of the first weights.
        names, expected = logps_and_ends(response_scores, model, batch)
        enable()
        try:
            found = logps_and_gradients(response_scores, model, batch, weights_named(model, names))
        except RuntimeError as error:
            if "has been mutated" not in str(error):
                raise
            return "it changes results in place that would be kept"
    scale = ErrorScale.of(model, batch, expected[0])
    return disagreement(found, expected, scale, TOLERANCES[model.autocast_dtype or model.dtype])


def _vocabulary(model: nn.Module) -> int:
    return model.config.get_text_config().vocab_size


class _Comparison(NamedTuple):
    """With what and in what a model is compared: its own attention, the dtype of its weights, one more prompt's length."""

    own_attention: str
    dtype: torch.dtype
    longest: int
    by_branches: bool


class _Failure(NamedTuple):
    """What is wrong, and whether that is the cause or only a symptom."""

    text: str
    is_cause: bool


def _prove(model: nn.Module, comparison: _Comparison, plan: LengthPlan) -> str | None:
    """Compare once; after a failure, find out whether a window or another length is the cause."""
    failure = _compare(model, plan.changes, comparison)
    if failure is None or failure.is_cause:
        return failure and failure.text
    windows = attention_windows(model)
    for name, length in (windows | other_lengths(model)).items():
        is_read = name in windows or name in plan.changes
        if is_read and _compare(model, plan.changes | {name: ENDLESS}, comparison) is None:
            if name not in windows:
                return f"beyond {length} tokens ({name}) its results depend on packed positions"
            kind = "chunks" if "chunk" in name else "a window"
            return f"attention within {kind} of {length} tokens ({name}) is not supported"
    return _kind_with_state(model) or failure.text


def _kind_with_state(model: nn.Module) -> str | None:
    """Why a model cannot share prefixes that has other layers than those of attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    found = next((kind for kind in kinds if any(part in kind for part in STATES)), None)
    return found and f"its {found} layers pass a state on from token to token, also from one response to the next"


def _compare(model: nn.Module, lengths: dict[str, int], comparison: _Comparison) -> _Failure | None:
    """Compare a random trie under tree attention with its sequences alone, with some lengths changed; None where they agree."""
    batch, device = random_tries(_vocabulary(model), comparison.longest), compute_device(model)
    # As a run prepares its batches, so that its own kernel is tried.
    batch = (batch.for_gpu() if device.type == "cuda" else batch).to(device)
    batch.layout.by_branches = comparison.by_branches or batch.layout.by_branches
    own = _for_float32(comparison.own_attention) if comparison.dtype == torch.float32 else comparison.own_attention
    with lengths_changed(model, lengths), _attention(model, own), restored_buffers(model) as changed:
        names, expected = logps_and_ends(unpadded_scores, model, batch)
        buffers = changed()
    try:
        with lengths_changed(model, lengths), _attention(model, TREE_ATTENTION), restored_buffers(model) as changed:
            found = logps_and_gradients(trie_scores, model, batch, weights_named(model, names))
            if name := _differing(changed(), buffers):
                return _Failure(f"its forward would leave wrong values in the buffer {name}", True)
    except UnsupportedAttentionError as error:
        return _Failure(str(error), True)
    except Exception as error:  # any type: architectures fail in their own ways on a packed batch
        raised = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
        if not batch.layout.seen:
            return _Failure(f"its forward does not support packed batches and failed before its attention ({raised})", True)
        return _Failure(f"its forward raised {raised}", False)
    if not batch.layout.seen:
        return _Failure("it does not pass the layout of the trie on to its attention", True)
    text = disagreement(found, expected, ErrorScale.of(model, batch, expected[0]), TOLERANCES[comparison.dtype])
    return text and _Failure(text, False)


def _for_float32(attention: str) -> str:
    """An attention implementation, or eager where that one does not support float32."""
    return "eager" if "flash" in attention else attention


def _differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The first buffer, of those that either forward changed, whose values differ after the two."""
    names = sorted(found.keys() | expected.keys())
    return next((name for name in names if not same_values(found.get(name), expected.get(name))), None)


# ---- temporary changes ----------------------------------------------------------------------------------------------------


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Context in which float32 products are computed in float32: no TF32, no reduced-precision sums, no autocast."""
    matmul, cudnn, onednn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn.matmul
    precision = torch.get_float32_matmul_precision()
    flags = [
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (cudnn, "allow_tf32"),
        # Also changed by set_float32_matmul_precision, but not by a run that only allows TF32 on CUDA.
        (onednn, "fp32_precision"),
    ]
    before = [getattr(backend, name) for backend, name in flags]
    torch.set_float32_matmul_precision("highest")
    for backend, name in flags[:-1]:
        setattr(backend, name, False)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for (backend, name), value in zip(flags, before, strict=True):
            setattr(backend, name, value)


@contextmanager
def _attention(model: nn.Module, name: str) -> Iterator[None]:
    """Context in which a model uses an attention implementation."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _in_float32(model: nn.Module):
    """A context in which a model's weights are float32; None for quantized weights, and where memory does not suffice."""
    weights = list(model.parameters())
    half = [weight for weight in weights if weight.is_floating_point() and weight.dtype != torch.float32]
    if any(not weight.is_floating_point() for weight in weights):
        # Quantized linear layers compute in a dtype of their own.
        return None
    needed: dict[torch.device, int] = {}
    for weight in half:
        needed[weight.device] = needed.get(weight.device, 0) + 4 * weight.numel()
    if any(2 * size > free_memory(device) for device, size in needed.items()):
        return None
    return _upcast(half)


@contextmanager
def _upcast(weights: list[Tensor]) -> Iterator[None]:
    usual = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.float()
    try:
        yield
    finally:
        for weight, data in zip(weights, usual, strict=True):
            weight.data = data
