"""Hashes of content: 32 hexadecimal digits, the same for the same content wherever it lies."""

import json
from collections.abc import Callable
from pathlib import Path

import xxhash


def hash_file(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def hash_values(values, default: Callable | None = None) -> str:
    """Hash of plain values, whatever the order of their keys; `default` makes plain what is not, as in `json.dumps`."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=default).encode())
