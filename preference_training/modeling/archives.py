"""Model archives: checkpoint directories with safetensors files, and `policy.pt` files."""

import copy
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.core.errors import UserError
from preference_training.core.files import load_tensors
from preference_training.modeling.value_head import auto_class, is_head_weight

# The files of a model in Hugging Face format.
MODEL_CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
WHOLE_WEIGHTS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CHAT_TEMPLATE = "chat_template.jinja"


def read_archive(path: Path) -> dict[str, Tensor]:
    """The named weights of an archive: a directory with safetensors files, or a `.pt` file with the weights under "state".

    Unpickles nothing but tensors and plain values. Raises UserError for a path that is neither, and for damaged files.
    """
    if path.is_dir():
        from safetensors.torch import load_file

        with _archive_errors(path):
            return {name: tensor for file in weight_files(path) for name, tensor in load_file(file).items()}
    try:
        archive = load_tensors(path, mapped=True)
    except ValueError as error:
        raise _archive_error(path, f"it cannot be read as tensors ({error})") from error
    if not isinstance(archive, dict) or not isinstance(archive.get("state"), dict):
        raise _archive_error(path, 'it has no dictionary under "state"')
    return archive["state"]


def archive_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of an archive by name, read from the headers of its files where they have any."""
    if not path.is_dir():
        return {name: tuple(tensor.shape) for name, tensor in read_archive(path).items()}
    from safetensors import safe_open

    shapes = {}
    for file in weight_files(path):
        with _archive_errors(path), safe_open(file, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118  not a dict
    return shapes


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory. Raises UserError where one is missing."""
    try:
        files = safetensors_files(path)
    except ValueError as error:
        raise _archive_error(path, str(error)) from error
    for file in files:
        if not file.is_file():
            raise _archive_error(path, f"the directory has no {file.name}")
    return files


def safetensors_files(directory: Path) -> list[Path]:
    """Where the weights of a model directory are: the files of its index, or else the only one; they may be missing.

    Raises ValueError as `indexed_files` does.
    """
    return indexed_files(directory / SAFETENSORS_INDEX) or [directory / WHOLE_WEIGHTS]


def indexed_files(index: Path) -> list[Path]:
    """The weight files that an index file names, all in its directory; empty where there is no index.

    Raises ValueError for an index that is damaged or names files outside its directory, since its content is not trusted.
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
            raise ValueError(f"{index.name} names {name!r}; expected *{kind} files in its own directory")
    return [index.with_name(name) for name in sorted(names)]


@contextmanager
def _archive_errors(path: Path):
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise _archive_error(path, f"its weights are damaged ({error})") from error


def _archive_error(path: Path, found: str) -> UserError:
    return UserError(
        f"model.archive: {path}: {found}. Expected a checkpoint directory (step-N, LATEST) or a policy.pt of such a run."
    )


def model_from_archive(
    config,
    state: dict[str, Tensor],
    path: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    head: str = "lm",
    **where,
) -> nn.Module:
    """A model with the weights of an archive; transformers maps names of its older versions to the current ones.

    head: lm or value; a value head is drawn where the archive is a language model. Raises UserError naming the tensors that are
    missing, unexpected or of another shape than `config` asks for.
    """
    with torch.device("meta"):
        empty = auto_class(head).from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    draws_head = head == "value" and not any(map(is_head_weight, state))
    if draws_head:
        # The head over the vocabulary is no part of it.
        state = {name: tensor for name, tensor in state.items() if name.startswith(f"{empty.base_model_prefix}.")}
    model, info = type(empty).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **where
    )
    misfits = [f"{name} is missing" for name in sorted(info["missing_keys"]) if not (draws_head and is_head_weight(name))]
    misfits += [f"{name} is not part of the model" for name in sorted(info["unexpected_keys"])]
    misfits += [
        f"{name} is {list(found)}, expected {list(expected)}" for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if misfits:
        listed = "".join(f"\n  {misfit}" for misfit in misfits[:10]) + ("\n  ..." if len(misfits) > 10 else "")
        is_reward_model = head == "lm" and any(map(is_head_weight, state))
        remedy = (
            "The archive is a reward model, and this loss trains a language model: use loss=reward, or another archive."
            if is_reward_model
            else "Choose the model preset that the archive was trained with."
        )
        count = f"{len(misfits)} tensors differ" if len(misfits) > 1 else "1 tensor differs"
        raise UserError(f"model.archive: {path} does not fit {type(model).__name__} as configured; {count}:{listed}\n" + remedy)
    return model
