"""Models in GGUF files: converted once to a directory in Hugging Face format, which everything else reads as any other.

transformers reads the file and undoes its quantization; the weights are kept in float32, so that nothing is rounded again.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from preference_training.configuration.model_names import GGUF, is_gguf, local_gguf
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError, first_line
from preference_training.core.files import atomic_directory, hash_file, locked
from preference_training.modeling.archives import MODEL_CONFIG
from preference_training.modeling.loading import save_model
from preference_training.modeling.sources.configurations import loading_errors

# Folder of the converted models, in `cache_dir` or beside the hub library's cache.
FOLDER = "converted_gguf"
# Of this module's rules: a change of it converts every file again.
VERSION = 3
# The keys in a file of tokens that end a text or a turn.
END_TOKENS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
# What a tokenizer calls its special tokens, and a file.
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def with_converted_model(config: RunConfig) -> RunConfig:
    """A run's configuration in which a model in a GGUF file is the directory that it was converted to; prints which.

    Raises UserError where the file is missing or cannot be converted.
    """
    name = config.model.name_or_path
    if not name or not is_gguf(name):
        return config
    return config.changed({"model.name_or_path": str(gguf_directory(name, config.cache_dir))})


def gguf_directory(name: str, cache_dir: str | None = None) -> Path:
    """The directory that a model in a GGUF file, here, in a package or on the hub, was converted to. Raises UserError."""
    return converted(local_gguf(name) or _download(name, cache_dir), name, cache_dir)


def _download(name: str, cache_dir: str | None) -> Path:
    """The file of ORGANIZATION/REPOSITORY/FILE.gguf on the hub."""
    from huggingface_hub import hf_hub_download

    organization, repository, file = name.split("/", 2)
    with loading_errors("model.name_or_path", name):
        return Path(hf_hub_download(f"{organization}/{repository}", file, cache_dir=cache_dir))


def converted(file: Path, name: str, cache_dir: str | None = None) -> Path:
    """The directory that a GGUF file was converted to, now or before: float32 safetensors, tokenizer and chat template."""
    place = _folder(cache_dir) / f"{hash_file(file)[:16]}-{VERSION}"
    directory = place / file.name.removesuffix(GGUF)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / ".lock", f"model: waiting for the process that converts {name}"):
            if (directory / MODEL_CONFIG).is_file():
                print(f"model: {name} is read from {directory}, as converted before", flush=True)
            else:
                print(f"model: {name} is converted to {directory}, once, in float32", flush=True)
                with atomic_directory(directory) as partial:
                    _convert(file, name, partial)
    except OSError as error:
        raise UserError(
            f"cache_dir: cannot write {directory}, to which {name} is converted: {first_line(error)}. Free some space, or set "
            "cache_dir to a folder of yours."
        ) from error
    return directory


def _folder(cache_dir: str | None) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(cache_dir).expanduser().absolute() / FOLDER if cache_dir else Path(HF_HUB_CACHE).with_name(FOLDER)


def _convert(file: Path, name: str, directory: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    try:
        # Alone in a folder: of an export, transformers would take the tokenizer and configuration that lie beside it.
        with TemporaryDirectory() as alone, _progress_of_large_files():
            (Path(alone) / file.name).symlink_to(file.absolute())
            where = {"pretrained_model_name_or_path": alone, "gguf_file": file.name}
            tokenizer = _read_tokenizer(file, where)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **_dequantized())
        ends = _end_tokens(file)
    except Exception as error:  # a dozen types, from two libraries
        raise UserError(
            f"model.name_or_path: {name} could not be read: {first_line(error)}. Expected a whole GGUF file of an "
            "architecture that transformers converts."
        ) from error
    # Otherwise transformers would not save it, or load it as if it were still quantized.
    for owner, left in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, left):
            delattr(owner, left)
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    needed, free = sum(weight.nbytes for weight in model.parameters()), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"it takes {needed / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB are free")
    save_model(model, directory)
    tokenizer.save_pretrained(directory)
    if license := GGUFReader(file).fields.get("general.license"):
        # As on the hub, so that the card of what is trained on it can name it.
        (directory / "README.md").write_text(f"---\nlicense: {license.contents()}\n---\n", encoding="utf-8")


def _read_tokenizer(file: Path, where: dict):
    """The tokenizer of a file, at the place that transformers reads it from."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer
    from transformers.integrations import ggml

    skeleton = getattr(ggml, "GGUFTokenizerSkeleton", None)
    if skeleton is None:
        return AutoTokenizer.from_pretrained(**where)
    # transformers 5.17 takes the token that begins a sequence for the one that ends it, and fails where a file names none.
    skeleton.bos_token_id = 0
    tokenizer, fields = AutoTokenizer.from_pretrained(**where), GGUFReader(file).fields
    for ours, theirs in SPECIAL_TOKENS.items():
        number = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        setattr(tokenizer, ours, number and tokenizer.convert_ids_to_tokens(int(number.contents())))
    return tokenizer


@contextmanager
def _progress_of_large_files() -> Iterator[None]:
    """transformers' progress bar of a conversion in terminals alone, and of files alone that take seconds."""
    from tqdm import tqdm
    from transformers import modeling_gguf_pytorch_utils as reader

    theirs = vars(reader).get("tqdm")
    if theirs is None:
        yield
        return
    reader.tqdm = partial(tqdm, delay=5, leave=False, disable=None)
    try:
        yield
    finally:
        reader.tqdm = theirs


def _dequantized() -> dict:
    """The option by which transformers undoes the quantization; older versions always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _end_tokens(file: Path) -> list[int]:
    """The token ids that end a text or a turn, by the file's own keys."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    return list(dict.fromkeys(int(fields[key].contents()) for key in END_TOKENS if key in fields))
