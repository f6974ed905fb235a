"""Whether a model is where its name says, in a second: on the hub or in its cache, or whole in a directory."""

import os
from pathlib import Path

from omegaconf import OmegaConf

from preference_training.configuration.model_names import CONFIG_DIR, presets
from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError, first_line, nearest
from preference_training.modeling.archives import (
    MODEL_CONFIG,
    SAFETENSORS_INDEX,
    TOKENIZER_CONFIG,
    TORCH_INDEX,
    TORCH_WEIGHTS,
    WHOLE_WEIGHTS,
    indexed_files,
)
from preference_training.modeling.tokenizer import BYTE_LEVEL

# Files any of which a directory's weights and tokenizer are in.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    TOKENIZER_CONFIG,
)


def check_sources(config: ModelConfig, cache_dir: str | None) -> None:
    """Raise UserError where the model or its tokenizer is not on the hub or in its cache, or a directory is not whole."""
    names = {"model.name_or_path": config.name_or_path, "model.tokenizer_name_or_path": config.tokenizer_name_or_path}
    for key, name in names.items():
        if name and name != BYTE_LEVEL and not Path(name).is_dir() and name[0] not in "/~.":
            _check_hub(key, name, cache_dir)
    name = config.name_or_path
    if name and Path(name).is_dir():
        if not config.archive:
            _check_weights(Path(name))
        if not config.tokenizer_name_or_path:
            _check_tokenizer(Path(name))


def _check_weights(directory: Path) -> None:
    try:
        files = indexed_files(directory / SAFETENSORS_INDEX) or indexed_files(directory / TORCH_INDEX)
    except ValueError as error:
        raise UserError(f"model.name_or_path: {directory}: {error}. Copy the whole model again.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"model.name_or_path: {directory}: {len(missing)} of the {len(files)} files of its weights are missing, the first "
            f"is {missing[0]}. Copy or download the whole model again."
        )
    if not files and not any((directory / name).is_file() for name in (WHOLE_WEIGHTS, TORCH_WEIGHTS)):
        inside = ", ".join(sorted(file.name for file in directory.iterdir())[:6])
        raise UserError(f"model.name_or_path: {directory}: found no weights ({inside}), expected {WHOLE_WEIGHTS}.")


def _check_tokenizer(directory: Path) -> None:
    if (directory / MODEL_CONFIG).is_file() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"model.name_or_path: {directory}: found no tokenizer, expected tokenizer.json. Copy it there, or set "
            "model.tokenizer_name_or_path to the model that it is the tokenizer of."
        )


# ---- the hub ----------------------------------------------------------------------------------------------------------------


def _check_hub(key: str, name: str, cache_dir: str | None) -> None:
    """Ask the hub once, without its library's retries; where it cannot be reached, read from its cache only, from now on."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    cached = isinstance(try_to_load_from_cache(name, MODEL_CONFIG, cache_dir=cache_dir), str)
    if constants.HF_HUB_OFFLINE:
        if not cached:
            raise _unreachable(key, name, "HF_HUB_OFFLINE is set", cache_dir)
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, MODEL_CONFIG), timeout=10)
    except GatedRepoError as error:
        if not cached:
            raise UserError(
                f"{key}: {name} is gated on the Hub. Accept its license at https://huggingface.co/{name}, then log in: "
                "`hf auth login`, or set HF_TOKEN."
            ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{key}: {name}: there is no such model on the Hub, or it is private (`hf auth login`); {_nearest_id(name)}"
        ) from error
    except EntryNotFoundError as error:
        if key == "model.name_or_path":
            raise UserError(
                f"{key}: {name} has no {MODEL_CONFIG} on the Hub. Of GGUF files name one, model={name}/FILE.gguf; download an "
                f"adapter (hf download {name} --local-dir DIRECTORY), and set model=DIRECTORY."
            ) from error
    except Exception as error:  # the network's, of several libraries
        if not cached:
            raise _unreachable(key, name, f"the Hub cannot be reached ({first_line(error, 80)})", cache_dir) from error
        print(f"{key}: the Hub cannot be reached; {name} is read from its cache", flush=True)
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


def _unreachable(key: str, name: str, why: str, cache_dir: str | None) -> UserError:
    from huggingface_hub.constants import HF_HUB_CACHE

    return UserError(
        f"{key}: {name}: {why}, and it is not in the cache, {cache_dir or HF_HUB_CACHE}. Connect; or download it elsewhere "
        f"(hf download {name} --local-dir DIRECTORY), and set model=DIRECTORY; model=smollm2-135m needs no hub."
    )


def _nearest_id(name: str) -> str:
    files = [OmegaConf.load(CONFIG_DIR / "model" / f"{preset}.yaml") for preset in presets()]
    ids = [OmegaConf.select(file, "model.name_or_path") or file.get("name_or_path") for file in files]
    known = [each for each in ids if each and "/" in each and ":" not in each]
    return nearest(name, known, "look it up at https://huggingface.co/models")
