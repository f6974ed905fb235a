"""Whether a model that computes a prompt once for all its responses says what it says of whole rows: tried on the model itself.

Compared are log-probs, gradients and buffers, with the model's own attention as it was before anything was switched, in two
ways: in float32 without TF32, where a difference is a difference; and as the run computes, with its dtype and its kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from preference_training.batching.packing import PackedBatch, examples_of, pack_examples
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.logprobs import padded_logps, tree_logps
from preference_training.modeling.state import compute_device, free_memory
from preference_training.modeling.tree_attention import RESPONSE_TREES, NotSharedError

# By how much a log-prob may differ between the two ways to compute it, per token; unit: nats.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
# A window that every tree of the proof is longer than, and one that none is. Unit: tokens.
SHORT, ENDLESS = 16, 2**30
# Rows of the proof are made as long as this at most, where a window cannot be made short.
LONGEST_ROW = 2048
# Numbers of a configuration whose names are like those of windows, and which no attention ends at.
NO_WINDOWS = ("feed_forward", "mamba", "pattern", "layers", "conv", "audio", "vision", "speech")


# ---- the batch ------------------------------------------------------------------------------------------------------------


def random_trees(vocabulary: int, longest: int = 0) -> PackedBatch:
    """Trees whose later responses lie far from their prompt, so that whoever counts packed positions errs by much.

    longest: tokens that a row has at least, if given.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = lambda count: torch.randint(0, vocabulary, (count,), generator=draw).tolist()  # noqa: E731
    shapes = [(12, (5, 24, 1, 30)), (1, (3, 2)), (20, (7,))]
    if longest:
        shapes.append((longest, (9, 20)))
    prompts = [TokenizedPrompt(tokens(p), [tokens(r) for r in rs], [(0, k) for k in range(1, len(rs))]) for p, rs in shapes]
    return pack_examples(list(examples_of(prompts)))


def logps_and_gradients(compute, model: nn.Module, batch: PackedBatch, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The log-probs [R] of a batch under `compute(model, batch)`, and the gradients of their sum in some weights."""
    with torch.set_grad_enabled(bool(weights)):
        logps = compute(model, batch)
        gradients = torch.autograd.grad(logps.sum(), weights) if weights else ()
    return logps.detach(), [gradient.float() for gradient in gradients]


def disagreement(found, expected, lengths: Tensor, rounding: float) -> str | None:
    """What is wrong with log-probs [R] of responses of so many tokens [R], and gradients: two pairs of `logps_and_gradients`.

    None where they agree, to `rounding` a token.
    """
    (logps, gradients), (expected_logps, expected_gradients) = found, expected
    error = ((logps - expected_logps).abs() / lengths).max().item()
    if not error <= rounding:
        return f"its log-probs would be wrong by {error:.1g} a token"
    for one, other in zip(gradients, expected_gradients, strict=True):
        if not (one - other).norm() <= 10 * rounding * other.norm():
            return f"its gradient would be wrong by {((one - other).norm() / other.norm()).item():.1g} of its size"
    return None


# ---- the proof ------------------------------------------------------------------------------------------------------------


def fault_of_sharing(model: nn.Module) -> str | None:
    """Why a model cannot compute prompts once for all their responses; None where it can. It is left as it was."""
    if getattr(model, "_is_stateful", False):
        return "it keeps a state that goes from token to token, which one response would hand on to the next"
    training = model.training
    model.eval()
    try:
        with exact_arithmetic():
            if (how := _reach(model)).fault:
                return how.fault
            if widened := _in_float32(model):
                with widened:
                    fault = _fault(model, how, torch.float32, by_branches=True)
                # On a CPU float32 is computed so in the run too.
                if fault or (model.dtype == torch.float32 and compute_device(model).type != "cuda"):
                    return fault
            return _fault(model, how, model.dtype, by_branches=False)
    finally:
        model.train(training)


class _Reach(NamedTuple):
    """How the proof gets beyond a model's windows: which it makes short, and how long its rows are. fault: why it cannot."""

    short: dict[str, int]
    longest: int = 0
    fault: str | None = None


def _fault(model: nn.Module, how: _Reach, dtype: torch.dtype, by_branches: bool) -> str | None:
    """Compare once, in the dtype that the weights have now; where that fails, find whether a window is the reason."""
    fault = _difference(model, how.short, how.longest, dtype, by_branches)
    if fault is None or fault.is_reason:
        return fault and fault.text
    for name, length in windows_of(model).items():
        if _difference(model, how.short | {name: ENDLESS}, how.longest, dtype, by_branches) is None:
            kind = "chunks" if "chunk" in name else "a window"
            return f"attention within {kind} of {length} tokens ({name}) is not part of it"
    return fault.text


class _Fault(NamedTuple):
    """What is wrong, and whether that is the reason, or only what is seen of it."""

    text: str
    is_reason: bool


def _difference(
    model: nn.Module, windows: dict[str, int], longest: int, dtype: torch.dtype, by_branches: bool
) -> _Fault | None:
    """What differs between a batch of trees and the same on whole rows, with some windows changed; None where nothing does."""
    device = compute_device(model)
    batch = random_trees(model.config.get_text_config().vocab_size, longest).to(device)
    batch.layout.by_branches = by_branches or batch.layout.by_branches
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # The first and the last: of a fresh LoRA adapter, one of them has no gradient yet.
    weights = [*trained[:1], *trained[1:][-1:]]
    usual = model.config._attn_implementation
    with _windows(model, windows), _attention(model, _in_own_way(usual, dtype)), _buffers_put_back(model) as changed:
        expected = logps_and_gradients(padded_logps, model, batch, weights)
        buffers = changed()
    try:
        with _windows(model, windows), _attention(model, RESPONSE_TREES), _buffers_put_back(model) as changed:
            found = logps_and_gradients(tree_logps, model, batch, weights)
            if other := _differing(changed(), buffers):
                return _Fault(f"what it keeps in {other} while it computes would be wrong", True)
    except NotSharedError as error:
        return _Fault(str(error), True)
    except Exception as error:  # whatever an architecture makes of what it does not know
        raised = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
        if not batch.layout.seen:
            return _Fault(f"its forward needs rows, and ended before its attention was asked ({raised})", True)
        return _Fault(f"its forward raised {raised}", False)
    if not batch.layout.seen:
        return _Fault("it does not hand the layout of the responses on to its attention", True)
    text = disagreement(found, expected, batch.response_lengths, ROUNDING[dtype])
    return text and _Fault(text, False)


def _in_own_way(attention: str, dtype: torch.dtype) -> str:
    """A model's own attention; the one that its code spells out, where the kernels of the other have no float32."""
    return "eager" if dtype == torch.float32 and "flash" in attention else attention


def _differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The first buffer that two forwards have not left the same, of those that either changed."""
    names = sorted(found.keys() | expected.keys())
    same = lambda one, other: one is not None and other is not None and torch.equal(one, other)  # noqa: E731
    return next((name for name in names if not same(found.get(name), expected.get(name))), None)


# ---- what is changed for it -----------------------------------------------------------------------------------------------


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, float32 products are float32 products: no TF32, no shorter sums, no autocast."""
    matmul, cudnn, onednn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn.matmul
    precision = torch.get_float32_matmul_precision()
    flags = [
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (cudnn, "allow_tf32"),
        # What the whole precision sets too, and a run that only allows TF32 on CUDA does not.
        (onednn, "fp32_precision"),
    ]
    before = [getattr(place, name) for place, name in flags]
    torch.set_float32_matmul_precision("highest")
    for place, name in flags[:-1]:
        setattr(place, name, False)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for (place, name), value in zip(flags, before, strict=True):
            setattr(place, name, value)


@contextmanager
def _attention(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, a model has the attention of a name."""
    usual = model.config._attn_implementation
    try:
        if name != usual:
            model.set_attn_implementation(name)
        yield
    finally:
        if name != usual:
            model.set_attn_implementation(usual)


@contextmanager
def _buffers_put_back(model: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Inside, a model's buffers may change; gives a function that says which have, and to what."""
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
    """A context in which a model's weights are float32; None where that cannot be had."""
    weights = list(model.parameters())
    shorter = [weight for weight in weights if weight.is_floating_point() and weight.dtype != torch.float32]
    if any(not weight.is_floating_point() for weight in weights):
        # Layers of few bits compute in a dtype of their own.
        return None
    needed: dict[torch.device, int] = {}
    for weight in shorter:
        needed[weight.device] = needed.get(weight.device, 0) + 4 * weight.numel()
    if any(2 * size > free_memory(device) for device, size in needed.items()):
        return None
    return _widened(shorter)


@contextmanager
def _widened(weights: list[Tensor]) -> Iterator[None]:
    usual = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.float()
    try:
        yield
    finally:
        for weight, data in zip(weights, usual, strict=True):
            weight.data = data


# ---- windows --------------------------------------------------------------------------------------------------------------


def windows_of(model: nn.Module) -> dict[str, int]:
    """The windows and chunks within which a model's configuration says that it attends: name → tokens, of a list the most."""
    found = {}
    for config in _configurations(model):
        for name, value in vars(config).items():
            lengths = [length for length in (value if isinstance(value, list | tuple) else [value]) if _is_length(length)]
            if _is_window(name) and lengths:
                found[name] = max(lengths)
    return found


def _configurations(model: nn.Module) -> list:
    """The configurations that a model's modules read, each once."""
    owned = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
    return list({id(config): config for config in (model.config.get_text_config(), *owned)}.values())


def _is_window(name: str) -> bool:
    return ("window" in name or "chunk" in name) and not any(part in name for part in NO_WINDOWS)


def _is_length(value) -> bool:
    return type(value) is int and value > 0


@contextmanager
def _windows(model: nn.Module, lengths: dict[str, int]) -> Iterator[None]:
    """Inside, windows of these names have other lengths: in the configuration, and where modules have copied them from it."""
    places = [(vars(config), name) for config in _configurations(model) for name in lengths if name in vars(config)]
    usual = {name: _all_lengths(values[name]) for values, name in places}
    copied = [
        (vars(module), attribute, name)
        for name, known in usual.items()
        for module in model.modules()
        for attribute, value in vars(module).items()
        if _is_window(attribute) and _is_length(value) and value in known
    ]
    changes = [*((values, name, lengths[name]) for values, name in places)]
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
    """A window, or a list of some, of another length; what is none stays."""
    if isinstance(value, list | tuple):
        return type(value)(_changed(item, length) for item in value)
    return length if _is_length(value) else value


@torch.no_grad()
def _reach(model: nn.Module) -> _Reach:
    """How the proof gets beyond every window that is longer than its rows need be."""
    short, longest = {}, 0
    batch = random_trees(model.config.get_text_config().vocab_size).to(compute_device(model))
    long = {name: length for name, length in windows_of(model).items() if length > SHORT}
    with _buffers_put_back(model):
        usual = padded_logps(model, batch) if long else None
        for name, length in long.items():
            with _windows(model, {name: SHORT}):
                is_read = not torch.equal(padded_logps(model, batch), usual)
            if is_read:
                short[name] = SHORT
            else:
                longest = max(longest, length)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_ROW
    room = min(LONGEST_ROW, most) - 32
    if longest <= room or _attends_fully(model):
        return _Reach(short, longest if longest <= room else 0)
    name = max((name for name in long if name not in short), key=lambda name: long[name])
    return _Reach(short, 0, f"it may attend within {long[name]} tokens ({name}), which is further than a proof can look")


def _attends_fully(model: nn.Module) -> bool:
    """Whether a configuration says of every layer that it attends to all that is before."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return bool(kinds) and set(kinds) == {"full_attention"}
