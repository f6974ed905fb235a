"""The proof that a model gives the same results with shared prefixes as without, run on the model itself when it is loaded.

It compares log-probs, gradients and buffers of tree attention with those of the model's own attention on padded rows, twice: in
float32 without TF32, where only rounding may differ, and with the dtype and the kernels of the run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from preference_training.batching.packing import PackedBatch, iterate_examples, pack_examples
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.logprobs import padded_logps, trie_logps
from preference_training.modeling.prefix_sharing.tree_attention import TREE_ATTENTION, UnsupportedAttentionError
from preference_training.modeling.state import compute_device, free_memory
from preference_training.modeling.value_head import has_value_head, is_head_weight

# The largest difference of a log-prob between the two computations. Unit: nats per token.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
# A window shorter than the trees of the proof, and one longer than any. Unit: tokens.
SHORT, ENDLESS = 16, 2**30
# The longest rows of the proof, where a window cannot be shortened. Unit: tokens.
LONGEST_ROW = 2048
# Parts of names of configuration values that look like attention windows but are none.
NO_WINDOWS = ("feed_forward", "mamba", "pattern", "layers", "conv", "audio", "vision", "speech")


# ---- the batch ------------------------------------------------------------------------------------------------------------


def random_trees(vocabulary: int, longest: int = 0) -> PackedBatch:
    """A batch of random trees whose later responses lie far from their prompt, so that packed positions would be far off.

    longest: the prompt length of one more tree, if given.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = lambda count: torch.randint(0, vocabulary, (count,), generator=draw).tolist()  # noqa: E731
    shapes = [(12, (5, 24, 1, 30)), (1, (3, 2)), (20, (7,))]
    if longest:
        shapes.append((longest, (9, 20)))
    prompts = [TokenizedPrompt(tokens(p), [tokens(r) for r in rs], [(0, k) for k in range(1, len(rs))]) for p, rs in shapes]
    return pack_examples(list(iterate_examples(prompts)))


def logps_and_gradients(compute, model: nn.Module, batch: PackedBatch, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The log-probs [R] of a batch under `compute(model, batch)`, and the float32 gradients of their sum for some weights."""
    with torch.set_grad_enabled(bool(weights)):
        logps = compute(model, batch)
        gradients = torch.autograd.grad(logps.sum(), weights) if weights else ()
    return logps.detach(), [gradient.float() for gradient in gradients]


class ErrorScale(NamedTuple):
    """How differences between two results of `response_logps` are measured.

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
    training = model.training
    model.eval()
    try:
        with exact_arithmetic():
            if (plan := _plan_windows(model)).failure:
                return plan.failure
            if float32_weights := _in_float32(model):
                with float32_weights:
                    failure = _prove(model, plan, torch.float32, by_branches=True)
                # A float32 run on a CPU computes exactly this.
                if failure or (model.dtype == torch.float32 and compute_device(model).type != "cuda"):
                    return failure
            return _prove(model, plan, model.dtype, by_branches=False)
    finally:
        model.train(training)


class _WindowPlan(NamedTuple):
    """How the proof makes rows longer than a model's windows.

    short: the new lengths of the windows to shorten. longest: length of the longest row (0: the default). failure: why not.
    """

    short: dict[str, int]
    longest: int = 0
    failure: str | None = None


def _prove(model: nn.Module, plan: _WindowPlan, dtype: torch.dtype, by_branches: bool) -> str | None:
    """Compare once, with weights in `dtype`; after a failure, find out whether a window is the cause."""
    failure = _compare(model, plan.short, plan.longest, dtype, by_branches)
    if failure is None or failure.is_cause:
        return failure and failure.text
    for name, length in attention_windows(model).items():
        if _compare(model, plan.short | {name: ENDLESS}, plan.longest, dtype, by_branches) is None:
            kind = "chunks" if "chunk" in name else "a window"
            return f"attention within {kind} of {length} tokens ({name}) is not supported"
    return failure.text


class _Failure(NamedTuple):
    """What is wrong, and whether that is the cause or only a symptom."""

    text: str
    is_cause: bool


def _compare(model: nn.Module, windows: dict[str, int], longest: int, dtype: torch.dtype, by_branches: bool) -> _Failure | None:
    """Compare tree attention with padded rows on a random batch, with some windows changed; None where they agree."""
    device = compute_device(model)
    batch = random_trees(model.config.get_text_config().vocab_size, longest).to(device)
    batch.layout.by_branches = by_branches or batch.layout.by_branches
    trained = [weight for name, weight in model.named_parameters() if weight.requires_grad and not is_head_weight(name)]
    # The first and the last: one of them is the B matrix of a new LoRA adapter, whose A matrices have zero gradients.
    weights = [*trained[:1], *trained[1:][-1:]]
    usual = model.config._attn_implementation
    with _windows(model, windows), _attention(model, _own_attention(usual, dtype)), _restored_buffers(model) as changed:
        expected = logps_and_gradients(padded_logps, model, batch, weights)
        buffers = changed()
    try:
        with _windows(model, windows), _attention(model, TREE_ATTENTION), _restored_buffers(model) as changed:
            found = logps_and_gradients(trie_logps, model, batch, weights)
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
        return _Failure("it does not pass the layout of the responses on to its attention", True)
    text = disagreement(found, expected, ErrorScale.of(model, batch, expected[0]), TOLERANCES[dtype])
    return text and _Failure(text, False)


def _own_attention(attention: str, dtype: torch.dtype) -> str:
    """The model's own attention implementation, or eager where that one does not support float32."""
    return "eager" if dtype == torch.float32 and "flash" in attention else attention


def _differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The first buffer, of those that either forward changed, whose values differ after the two."""
    names = sorted(found.keys() | expected.keys())
    same = lambda one, other: one is not None and other is not None and torch.equal(one, other)  # noqa: E731
    return next((name for name in names if not same(found.get(name), expected.get(name))), None)


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
    """Context in which a model uses another attention implementation."""
    usual = model.config._attn_implementation
    try:
        if name != usual:
            model.set_attn_implementation(name)
        yield
    finally:
        if name != usual:
            model.set_attn_implementation(usual)


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Context after which a model's buffers are restored; yields a function that returns those that have changed."""
    before = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in before.items()}

    def changed() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in model.named_buffers() if not _same(buffer, values.get(name))}

    try:
        yield changed
    finally:
        for name, buffer in before.items():
            path, _, leaf = name.rpartition(".")
            if not _same(buffer, values[name]):
                buffer.copy_(values[name])
            model.get_submodule(path)._buffers[leaf] = buffer


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and torch.equal(one, other)


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


# ---- windows --------------------------------------------------------------------------------------------------------------


def attention_windows(model: nn.Module) -> dict[str, int]:
    """The attention windows and chunks that a model's configuration names: name → tokens, the longest of a list."""
    found = {}
    for config in _configurations(model):
        for name, value in vars(config).items():
            lengths = [length for length in (value if isinstance(value, list | tuple) else [value]) if _is_length(length)]
            if _is_window(name) and lengths:
                found[name] = max(lengths)
    return found


def _configurations(model: nn.Module) -> list:
    """The distinct configuration objects that a model's modules read."""
    owned = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
    return list({id(config): config for config in (model.config.get_text_config(), *owned)}.values())


def _is_window(name: str) -> bool:
    return ("window" in name or "chunk" in name) and not any(part in name for part in NO_WINDOWS)


def _is_length(value) -> bool:
    return type(value) is int and value > 0


@contextmanager
def _windows(model: nn.Module, lengths: dict[str, int]) -> Iterator[None]:
    """Context in which windows have other lengths, in the configuration and in the attributes that modules copied from it."""
    configured = [(vars(config), name) for config in _configurations(model) for name in lengths if name in vars(config)]
    usual = {name: _all_lengths(values[name]) for values, name in configured}
    copied = [
        (vars(module), attribute, name)
        for name, known in usual.items()
        for module in model.modules()
        for attribute, value in vars(module).items()
        if _is_window(attribute) and _is_length(value) and value in known
    ]
    changes = [*((values, name, lengths[name]) for values, name in configured)]
    changes += [(values, attribute, lengths[name]) for values, attribute, name in copied]
    before = [(values, name, values[name]) for values, name, _ in changes]
    for values, name, length in changes:
        values[name] = _changed(values[name], length)
    try:
        yield
    finally:
        for values, name, value in before:
            values[name] = value


def _all_lengths(value) -> set:
    return {length for length in (value if isinstance(value, list | tuple) else [value]) if _is_length(length)}


def _changed(value, length: int):
    """The length in place of a window, also within a list; anything else stays."""
    if isinstance(value, list | tuple):
        return type(value)(_changed(item, length) for item in value)
    return length if _is_length(value) else value


@torch.no_grad()
def _plan_windows(model: nn.Module) -> _WindowPlan:
    """Plan rows longer than every window: shorten the windows that the model reads when it runs, else lengthen the rows."""
    short, longest = {}, 0
    batch = random_trees(model.config.get_text_config().vocab_size).to(compute_device(model))
    long = {name: length for name, length in attention_windows(model).items() if length > SHORT}
    with _restored_buffers(model):
        usual = padded_logps(model, batch) if long else None
        for name, length in long.items():
            with _windows(model, {name: SHORT}):
                is_read = not torch.equal(padded_logps(model, batch), usual)
            if is_read:
                short[name] = SHORT
            else:
                longest = max(longest, length)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_ROW
    limit = min(LONGEST_ROW, most) - 32
    if longest <= limit or _attends_fully(model):
        return _WindowPlan(short, longest if longest <= limit else 0)
    name = max((name for name in long if name not in short), key=lambda name: long[name])
    return _WindowPlan(short, 0, f"attention within {long[name]} tokens ({name}) is more than the proof can cover")


def _attends_fully(model: nn.Module) -> bool:
    """Whether a model's configuration names full attention for every layer."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return bool(kinds) and set(kinds) == {"full_attention"}
