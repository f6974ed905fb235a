"""Numbers of a model's configuration that positions are compared with: attention windows, chunks, scales of long rows.

Results depend on them only in rows that are longer. The proof shortens them, in the configuration and in the attributes that
modules copied from it, so that its short rows are long ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from preference_training.modeling.prefix_sharing.longest_row import frequency_limits

# A length that the longest row of the proof exceeds twice, and one longer than any. Unit: tokens.
SHORT, ENDLESS = 16, 2**30
# The longest rows of the proof, where a window cannot be shortened. Unit: tokens.
LONGEST_ROW = 2048
# Parts of names of configuration values that look like attention windows but are none.
NO_WINDOWS = ("feed_forward", "mamba", "pattern", "layers", "conv", "audio", "vision", "speech")
# Beginnings and parts of names of numbers that shape weights, or name tokens.
SHAPES = ("n_", "num_", "d_")
SHAPE_PARTS = (
    "size",
    "dim",
    "rank",
    "_id",
    "heads",
    "layers",
    "experts",
    "embd",
    "theta",
    "label",
    "width",
    "conv",
    "top_k",
    "group",
)
# Parts of names of attributes in which modules keep a length under another name.
COPIES = ("max_seq_len", "max_position")


class LengthPlan(NamedTuple):
    """How the proof makes rows longer than a model's lengths.

    changes: the new values of lengths. longest: length of the longest row (0: the default). failure: why not.
    """

    changes: dict[str, int]
    longest: int = 0
    failure: str | None = None


def attention_windows(model: nn.Module) -> dict[str, int]:
    """The attention windows and chunks that a model's configuration names: name → tokens, the longest of a list."""
    return {name: length for name, length in _numbers(model).items() if is_window(name)}


def other_lengths(model: nn.Module) -> dict[str, int]:
    """The other numbers of a model's configuration that may be lengths, and are not below SHORT: name → number."""
    found = {name: value for name, value in _numbers(model).items() if not is_window(name) and value > SHORT}
    limits = rotary_limits(model)
    return {name: value for name, value in found.items() if not _shapes(name) and name not in limits}


def rotary_limits(model: nn.Module) -> set[str]:
    """The names of lengths beyond which rotary embeddings depend on the longest row of a batch."""
    names = _numbers(model) if frequency_limits(model) else ()
    return {name for name in names if any(part in name for part in COPIES)}


def is_window(name: str) -> bool:
    """Whether a configuration value or an attribute of this name is an attention window or chunk."""
    return ("window" in name or "chunk" in name) and not any(part in name for part in NO_WINDOWS)


def _shapes(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf.startswith(SHAPES) or any(part in leaf for part in SHAPE_PARTS)


def _numbers(model: nn.Module) -> dict[str, int]:
    """The positive integers of a model's configurations, and of the lists in them the largest: name → number."""
    found = {}
    for config in _configurations(model):
        for values, key, name in _entries(vars(config)):
            if lengths := _lengths(values[key]):
                found[name] = max(lengths)
    return found


def _configurations(model: nn.Module) -> list:
    """The distinct configuration objects that a model's modules read."""
    owned = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
    return list({id(config): config for config in (model.config.get_text_config(), *owned)}.values())


def _entries(values: dict, prefix: str = "") -> Iterator[tuple[dict, Any, str]]:
    """Each value of a nested dictionary: the dictionary that has it, its key, and its dotted name."""
    for key, value in list(values.items()):
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _entries(value, f"{name}.")
        elif not name.startswith("_"):
            yield values, key, name


def _lengths(value) -> set[int]:
    return {item for item in (value if isinstance(value, list | tuple) else [value]) if _is_length(item)}


def _is_length(value) -> bool:
    return type(value) is int and value > 0


# ---- changing them --------------------------------------------------------------------------------------------------------


@contextmanager
def lengths_changed(model: nn.Module, lengths: dict[str, int]) -> Iterator[None]:
    """Context in which lengths have other values, in the configuration and in the attributes that modules copied from it."""
    configured = [entry for config in _configurations(model) for entry in _entries(vars(config)) if entry[2] in lengths]
    usual = [(name, _lengths(values[key])) for values, key, name in configured]
    changes: list[tuple[dict, Any, int]] = [(values, key, lengths[name]) for values, key, name in configured]
    for module in model.modules() if usual else ():
        for attribute, value in vars(module).items():
            if _is_length(value):
                copied = (name for name, known in usual if value in known and _is_copy(attribute, name))
                changes += [(vars(module), attribute, lengths[name]) for name in list(copied)[:1]]
    before = [(values, key, values[key]) for values, key, _ in changes]
    for values, key, length in changes:
        values[key] = _changed(values[key], length)
    try:
        yield
    finally:
        for values, key, value in before:
            values[key] = value


def _is_copy(attribute: str, name: str) -> bool:
    """Whether a module's attribute may be its copy of a configuration value."""
    leaf = name.rpartition(".")[2]
    both = (is_window, lambda text: any(part in text for part in COPIES))
    return attribute == leaf or any(belongs(attribute) and belongs(leaf) for belongs in both)


def _changed(value, length: int):
    """The length in place of a number, also within a list; anything else stays."""
    if isinstance(value, list | tuple):
        return type(value)(_changed(item, length) for item in value)
    return length if _is_length(value) else value


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Context after which a model's buffers are restored; yields a function that returns those that have changed."""
    before = dict(model.named_buffers())
    values = {name: buffer.clone() for name, buffer in before.items()}

    def changed() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in model.named_buffers() if not same_values(buffer, values.get(name))}

    try:
        yield changed
    finally:
        for name, buffer in before.items():
            path, _, leaf = name.rpartition(".")
            if not same_values(buffer, values[name]):
                buffer.copy_(values[name])
            model.get_submodule(path)._buffers[leaf] = buffer


def same_values(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both tensors exist and are equal in type and values."""
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


# ---- planning -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plan_lengths(model: nn.Module, row: Tensor) -> LengthPlan:
    """Plan rows longer than every length: shorten those that the model reads when it runs, else lengthen the rows.

    row: [1, L], a row of the proof. Windows are always lengths; other numbers are if one that is shorter changes the results.
    """
    windows = {name: length for name, length in attention_windows(model).items() if length > SHORT}
    others = other_lengths(model)
    with restored_buffers(model):
        usual = _results(model, row, {}) if windows or others else None
        reads = lambda names: not same_values(_results(model, row, dict.fromkeys(names, SHORT)), usual)  # noqa: E731
        short = {name: SHORT for name in windows if reads([name])}
        if others and reads(others):
            short |= {name: SHORT for name in others if reads([name]) and _results(model, row, {name: SHORT}) is not None}
    unread = {name: length for name, length in windows.items() if name not in short}
    # Batches with longer rows are computed otherwise.
    changes = short | dict.fromkeys(rotary_limits(model), ENDLESS)
    longest = max(unread.values(), default=0)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_ROW
    limit = min(LONGEST_ROW, most) - 32
    if not unread or longest <= limit or _attends_fully(model):
        return LengthPlan(changes, longest if longest <= limit else 0)
    name = max(unread, key=unread.__getitem__)
    return LengthPlan(changes, 0, f"attention within {longest} tokens ({name}) is more than the proof can cover")


def _results(model: nn.Module, row: Tensor, lengths: dict[str, int]) -> Tensor | None:
    """The logits of a row with some lengths changed; None where the forward fails, as what shapes weights makes it do."""
    with lengths_changed(model, lengths):
        try:
            return model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
        except Exception:  # any type: architectures fail in their own ways
            if not lengths:
                raise
            return None


def _attends_fully(model: nn.Module) -> bool:
    """Whether a model's configuration names full attention for every layer."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    return bool(kinds) and set(kinds) == {"full_attention"}
