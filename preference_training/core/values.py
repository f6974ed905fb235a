"""Plain nested values: dotted names, hashes, and whether a value has the expected shape."""

import json
from collections.abc import Callable, Sequence

import xxhash


def dotted(values: dict, prefix: str = "") -> dict:
    """A nested dict as a flat one, under names such as loss.beta."""
    flat: dict = {}
    for key, value in values.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def size_of_model(parameters: int) -> str:
    """A number of parameters as models are named by it: 7B, 1.2B, 135M, 0.82M; of less than 100,000 the number itself."""
    if parameters < 1e5:
        return f"{parameters:,}"
    size, unit = (parameters / 1e9, "B") if parameters >= 1e9 else (parameters / 1e6, "M")
    return f"{size:.{3 if size >= 100 else 2}g}{unit}"


# What reading damaged JSON, and looking something up in it, may raise.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


def find_mismatch(value, shape, name: str) -> str | None:
    """The name of the first part of a value that is not of a shape; None where all of it is.

    Shapes: a type, None, or a function that decides; a tuple of shapes, any of which will do; {name: shape}, at least these
    names, and with {...: shape} all others; [shape], a list of such; [shape, shape], a list of just these.
    """
    if isinstance(shape, tuple):
        return None if any(find_mismatch(value, each, name) is None for each in shape) else name
    if isinstance(shape, dict | list) and type(value) is not type(shape):
        return name
    if isinstance(shape, dict):
        others = dict.fromkeys(value, shape[...]) if ... in shape else {}
        expected = others | {key: each for key, each in shape.items() if key is not ...}
        parts = [(value[key], expected[key], f"{name}.{key}") for key in expected if key in value]
        missing = [f"{name}.{key}" for key in expected if key not in value]
    elif isinstance(shape, list):
        shapes = shape * len(value) if len(shape) == 1 else shape
        parts = [(item, each, name) for item, each in zip(value, shapes, strict=False)]
        missing = [] if len(shapes) == len(value) else [name]
    else:
        fits = value is None if shape is None else type(value) is shape if isinstance(shape, type) else shape(value)
        return None if fits else name
    return next((found for found in (*missing, *(find_mismatch(*part) for part in parts)) if found is not None), None)


def hash_values(values, default: Callable | None = None) -> str:
    """Hash of plain values, whatever the order of their keys: 32 hexadecimal digits. default: as in `json.dumps`."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=default).encode())


def counted(number: int, noun: str) -> str:
    """A number of things: 1 prompt, 2 prompts."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_number(value: float) -> str:
    """A number for labels and tables: 12,800, 0.693, 1.2e-07."""
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, with columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
