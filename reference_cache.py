"""The reference's log-probs of a run's data: computed in one pass, kept on disk, and found again by what they depend on.

A file's name is a hash of the reference's weights, of its dtype and way of computing, and of the tokenised data. Runs that
agree in all of these share it: later runs, and the jobs of a sweep. A file that is damaged is computed anew.
"""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from batches import TokenizedPrompt, examples_of, pack_within
from logprobs import response_logps
from models import token_budget


def cache_key(model: nn.Module, prompts: Sequence[TokenizedPrompt]) -> str:
    """Hash of all that the log-probs of `prompts` under `model` depend on; 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    how = (type(model).__name__, model.config._attn_implementation, str(model.dtype), torch.__version__, model.device.type)
    digest.update(repr(how).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    for prompt in prompts:
        shape = [prompt.first_row, len(prompt.prompt_ids), *map(len, prompt.responses)]
        digest.update(array("q", shape + prompt.prompt_ids + [token for ids in prompt.responses for token in ids]))
    return digest.hexdigest()


def cache_path(directory: Path, model: nn.Module, prompts: Sequence[TokenizedPrompt]) -> Path:
    """Where in `directory` the log-probs of `prompts` under `model` lie, or would lie."""
    return directory / f"{cache_key(model, prompts)}.safetensors"


def reference_logps_of(model: nn.Module, prompts: Sequence[TokenizedPrompt], path: Path) -> Tensor:
    """The log-prob of every response of `prompts` under `model`: [rows] float32, NaN in rows that no prompt has.

    Read from `path`, which `cache_path` gave, where they have been computed before, else computed and written there; says
    which.
    """
    count = sum(len(prompt.responses) for prompt in prompts)
    if path.exists():
        logps = _read(path)
        if logps is not None:
            print(f"reference: log-probs of {count} responses read from {path}", flush=True)
            return logps
        print(f"reference: {path} is damaged and computed anew", flush=True)
    logps = compute_logps(model, prompts)
    _write(path, logps)
    print(f"reference: log-probs of {count} responses computed once, kept in {path}", flush=True)
    return logps


@torch.no_grad()
def compute_logps(model: nn.Module, prompts: Sequence[TokenizedPrompt]) -> Tensor:
    """One pass over `prompts`, long ones together with long ones: [rows] float32 on the CPU."""
    rows = max(prompt.first_row + len(prompt.responses) for prompt in prompts)
    logps = torch.full((rows,), torch.nan)
    order = sorted(prompts, key=lambda prompt: len(prompt.prompt_ids) + sum(map(len, prompt.responses)))
    training = model.training
    model.eval()
    for batch in pack_within(examples_of(order), token_budget(model)):
        logps[batch.response_rows] = response_logps(model, batch.to(model.device)).cpu()
    model.train(training)
    return logps


def _read(path: Path) -> Tensor | None:
    """The log-probs of a file, or None if it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            logps = file.get_tensor("logps")
            return logps if (file.metadata() or {}).get("checksum") == _checksum(logps) else None
    except (SafetensorError, OSError):
        return None


def _write(path: Path, logps: Tensor) -> None:
    """Write beside the place and rename: whoever looks finds a whole file or none."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"logps": logps}, partial, metadata={"checksum": _checksum(logps)})
    os.replace(partial, path)


def _checksum(logps: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(logps.contiguous().view(torch.uint8).numpy())
