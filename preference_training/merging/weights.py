"""Weights in safetensors files, read and written one tensor at a time.

A model's files may be larger than memory: the header of a file says where each tensor lies, and that of a new one is known
before any of its tensors is.
"""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from preference_training.core.errors import UserError, first_line
from preference_training.modeling.archives import SAFETENSORS_INDEX, WHOLE_WEIGHTS, safetensors_files

# Most bytes of a written file.
SHARD_SIZE = 5 * 10**9
# The dtypes of safetensors that can be merged or copied.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """What the header of a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class StoredWeights:
    """The tensors of a model in a directory, by name. Raises UserError where it has no safetensors files, or damaged ones."""

    def __init__(self, directory: Path, name: str):
        self.directory, self.name = directory, name
        self.opened: dict[Path, safe_open] = {}
        self.closing = ExitStack()

    def __enter__(self) -> "StoredWeights":
        return self

    def __exit__(self, *_) -> None:
        self.closing.close()

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor, in the order of the files."""
        return {name: info for name, (info, _) in self._headers.items()}

    @cached_property
    def _headers(self) -> dict[str, tuple[TensorInfo, Path]]:
        """What the headers say of each tensor, and its file."""
        found: dict[str, tuple[TensorInfo, Path]] = {}
        for file in self._files():
            opened = self._open(file)
            for name in opened.keys():  # noqa: SIM118  not a dict
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{self.name}: {name} is stored as {part.get_dtype()}. Expected unquantized weights: float32, bfloat16 "
                        "or float16."
                    )
                found[name] = TensorInfo(tuple(part.get_shape()), DTYPES[part.get_dtype()]), file
        return found

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._open(self._headers[name][1]).get_tensor(name)

    def _files(self) -> list[Path]:
        try:
            files = safetensors_files(self.directory)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}.") from error
        for file in files:
            if not file.is_file():
                others = sorted(path.name for path in self.directory.glob("*.bin"))
                found = (
                    f" It has {others[0]}, which is not read: load it with transformers, and save it again." if others else ""
                )
                raise UserError(f"{self.name}: no {file.name} in {self.directory}. Expected weights as safetensors.{found}")
        return files

    def _open(self, file: Path) -> safe_open:
        if file not in self.opened:
            try:
                self.opened[file] = self.closing.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.name}: {file} cannot be read: {first_line(error)}.") from error
        return self.opened[file]


def write_weights(directory: Path, infos: Mapping[str, TensorInfo], tensor: Callable[[str], Tensor]) -> int:
    """Write tensors as safetensors, in files of at most SHARD_SIZE with an index; returns the number of elements.

    tensor: computes the tensor of a name, of the shape and the dtype that `infos` says. One of them is in memory at a time.
    """
    files = _in_files(infos)
    names = [WHOLE_WEIGHTS] if len(files) == 1 else [f"model-{k:05}-of-{len(files):05}.safetensors" for k in _from_one(files)]
    for file, part in zip(names, files, strict=True):
        _write_file(directory / file, {name: infos[name] for name in part}, tensor)
    if len(files) > 1:
        total = sum(info.bytes for info in infos.values())
        places = {name: file for file, part in zip(names, files, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (directory / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return sum(math.prod(info.shape) for info in infos.values())


def _from_one(files: list) -> range:
    return range(1, len(files) + 1)


def _in_files(infos: Mapping[str, TensorInfo]) -> list[list[str]]:
    """The names of the tensors of each file, in the order of `infos`."""
    files: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if files[-1] and size + info.bytes > SHARD_SIZE:
            files.append([])
            size = 0
        files[-1].append(name)
        size += info.bytes
    return files


def _write_file(path: Path, infos: Mapping[str, TensorInfo], tensor: Callable[[str], Tensor]) -> None:
    # Wider elements first: then each tensor begins at a multiple of its elements' size.
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = infos[name]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + infos[name].bytes]}
        end += infos[name].bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            found = tensor(name).contiguous()
            assert (tuple(found.shape), found.dtype) == infos[name]
            file.write(found.reshape(-1).view(torch.uint8).numpy() if found.numel() else b"")
