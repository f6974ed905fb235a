"""The files of a checkpoint that other libraries read: weights, configuration, tokenizer, policy.pt."""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.checkpointing.snapshot import Snapshot
from preference_training.core.process_group import to_local
from preference_training.modeling.adapters.weights import has_adapter
from preference_training.modeling.archives import GENERATION_CONFIG
from preference_training.tracking.run_files import POLICY_PT

# Most bytes in one file: a file's tensors are in memory a second time while it is written.
FILE_SIZE = 2 * 2**30


def save_configuration(policy: nn.Module, directory: Path, tokenizer, end_tokens: Sequence[int] = ()) -> None:
    """Write a model's config.json and generation_config.json: its responses end where those of training do.

    With an adapter config.json is left to its base.
    """
    config = copy.deepcopy(policy.config)
    generation = copy.deepcopy(policy.generation_config) if policy.can_generate() else None
    set_end_tokens(config, generation, tokenizer, end_tokens)
    if not has_adapter(policy):
        # FSDP has replaced the model's class by a subclass.
        config.architectures = [type(policy).__name__.removeprefix("FSDP")]
        config.dtype = policy.dtype
        config.save_pretrained(directory)
    if generation is not None:
        # Not save_pretrained, which refuses sampling settings that greedy decoding would not read.
        generation.to_json_file(directory / GENERATION_CONFIG)


def set_end_tokens(config, generation, tokenizer, end_tokens: Sequence[int] = ()) -> None:
    """Set the tokens that end a response in place: the tokenizer's, `end_tokens`, and those already named.

    generation is None for a reward model, which does not generate. A missing padding token is set for generation alone: in a
    model's configuration it would keep that token's embedding from being trained. A reward model is read at the last token that
    is not padding, so that its configuration must have it.
    """
    required = [tokenizer.eos_token_id, *end_tokens]
    text = config.get_text_config()
    named = _listed(text.eos_token_id if generation is None else generation.eos_token_id)
    if not set(required) <= set(named):
        named = list(dict.fromkeys([*required, *named]))
    if tokenizer.eos_token_id not in _listed(text.eos_token_id):
        text.eos_token_id = tokenizer.eos_token_id
    if generation is None:
        text.pad_token_id = tokenizer.pad_token_id
    else:
        generation.eos_token_id = named if len(named) > 1 else named[0]
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def write_scalars(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write scalar tensors into the files of a directory that have room for them.

    torch leaves them at 0 where it consolidates the shards of all processes.
    """
    scalars = {name: to_local(tensor).detach() for name, tensor in tensors.items() if tensor.dim() == 0}
    for file in sorted(directory.glob("*.safetensors")) if scalars else ():
        with file.open("rb+") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
            for name in scalars.keys() & header.keys():
                opened.seek(8 + size + header[name]["data_offsets"][0])
                opened.write(scalars[name].cpu().reshape(1).view(torch.uint8).numpy().tobytes())


def file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file in which each tensor is written, from 1; a file has about FILE_SIZE bytes."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        added = tensor.numel() * tensor.element_size()
        if size and size + added > FILE_SIZE:
            number, size = number + 1, 0
        numbers[name], size = number, size + added
    return numbers


def save_tokenizer(tokenizer, directory: Path) -> None:
    """Write a tokenizer's files. Raises OSError where they cannot be written."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers library has no class for system errors
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_policy_pt(checkpoint: Path, snapshot: Snapshot) -> None:
    """Write `policy.pt` into a checkpoint: `{"step_idx", "state", "metrics"}`, loadable with `weights_only=True`.

    `step_idx` counts training examples, as in the original code. The weights are those of the checkpoint's files.
    """
    from safetensors.torch import load_file

    weights = {name: tensor for file in sorted(checkpoint.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    weights |= {other: weights[name] for other, name in snapshot.tied.items()}
    archive = {"step_idx": snapshot.examples, "state": weights, "metrics": snapshot.state.get("held_out") or {}}
    try:
        with (checkpoint / POLICY_PT).open("wb") as file:
            torch.save(archive, file)
    except RuntimeError as error:
        # torch masks the underlying OSError by its own about a file that ends too early.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
