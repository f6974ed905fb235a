"""Weights on disk: checkpoint directories, safetensors and `policy.pt`."""

import json
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from preference_training.core.errors import UserError
from preference_training.core.files import load_tensors

# The files of a model in Hugging Face format.
MODEL_CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
WHOLE_WEIGHTS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"


def read_archive(path: Path) -> dict[str, Tensor]:
    """The named weights of an archive: a directory with safetensors files, or a `.pt` file with them under "state".

    Nothing is unpickled but tensors and plain values. Raises UserError for a path that holds neither.
    """
    if path.is_dir():
        from safetensors.torch import load_file

        with _damage_is_a_user_error(path):
            return {name: tensor for file in files_of_weights(path) for name, tensor in load_file(file).items()}
    try:
        archive = load_tensors(path, mapped=True)
    except ValueError as error:
        raise _no_archive(path, f"it cannot be read as tensors ({error})") from error
    if not isinstance(archive, dict) or not isinstance(archive.get("state"), dict):
        raise _no_archive(path, 'it has no dictionary under "state"')
    return archive["state"]


def archive_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of an archive, read from the files' headers."""
    if not path.is_dir():
        return {name: tuple(tensor.shape) for name, tensor in read_archive(path).items()}
    from safetensors import safe_open

    shapes = {}
    for file in files_of_weights(path):
        with _damage_is_a_user_error(path), safe_open(file, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118  not a dict
    return shapes


def files_of_weights(path: Path) -> list[Path]:
    """The files of a directory with safetensors weights. Raises UserError where one is missing."""
    try:
        files = files_of_index(path / SAFETENSORS_INDEX) or [path / WHOLE_WEIGHTS]
    except ValueError as error:
        raise _no_archive(path, str(error)) from error
    for file in files:
        if not file.is_file():
            raise _no_archive(path, f"the directory has no {file.name}")
    return files


def files_of_index(index: Path) -> list[Path]:
    """The files of weights that an index names, all of them beside it; empty where it is not there.

    Raises ValueError for an index that is damaged, or that leads out of its directory: the names in it are data.
    """
    kind = Path(index.name.removesuffix(".index.json")).suffix
    if not index.is_file():
        return []
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is damaged") from error
    for name in names:
        if name != Path(name).name or not name.endswith(kind):
            raise ValueError(f"{index.name} names {name!r}, and weights are *{kind} files beside it")
    return [index.with_name(name) for name in sorted(names)]


@contextmanager
def _damage_is_a_user_error(path: Path):
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise _no_archive(path, f"its weights are damaged ({error})") from error


def _no_archive(path: Path, found: str) -> UserError:
    return UserError(
        f"model.archive: {path}: {found}. Expected a checkpoint directory (step-N, LATEST) or a policy.pt of such a run."
    )
