"""The directory that an export writes: complete or absent, with a model's weights in it."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from preference_training.checkpointing.model_files import set_end_tokens
from preference_training.core.errors import UserError
from preference_training.core.files import atomic_directory
from preference_training.modeling import loading

SHARD_SIZE = "5GB"


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory next to `path` and rename it to `path` at the end; on any failure, remove it.

    Raises UserError for an error of the operating system.
    """
    path = path.resolve()
    try:
        with atomic_directory(path) as partial:
            yield partial
            # safetensors creates files with mode 600; give them the mode of the others.
            for file in partial.rglob("*.safetensors"):
                file.chmod((partial / "README.md").stat().st_mode)
    except (OSError, SafetensorError) as error:
        # safetensors wraps errors of the operating system in its only exception class.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, SafetensorError) and number is None:
            raise
        reason = os.strerror(int(number[1])) if number else error.strerror or str(error)
        raise UserError(f"--to: cannot write {path}: {reason}. Expected a writable folder with enough space.") from error


def save_weights(model, directory: Path, tokenizer, end_tokens=()) -> int:
    """Write a model's weights and configurations; returns its number of parameters. Raises OSError where space is short.

    end_tokens: tokens that end a response, besides the tokenizer's.
    """
    parameters = list(model.parameters())
    needed = sum(weight.numel() * weight.element_size() for weight in parameters)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free")
    set_end_tokens(model.config, model.generation_config if model.can_generate() else None, tokenizer, end_tokens)
    loading.save_model(model, directory, max_shard_size=SHARD_SIZE)
    return sum(weight.numel() for weight in parameters)
