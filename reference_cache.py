"""The reference's log-probs of a run's data: computed in one pass, kept on disk, and found again by what they depend on.

A file's name is a hash of the reference's weights, of its dtype and way of computing, and of the tokenised data. Runs that
agree in all of these share it: later runs, and the jobs of a sweep. A file that is damaged is computed anew.
"""

import os
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from batches import examples_of, pack_within
from logprobs import response_logps
from models import token_budget
from prompt_table import Selection


def cache_key(model: nn.Module, prompts: Selection) -> str:
    """Hash of all that the log-probs of `prompts` under `model` depend on; 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    how = (type(model).__name__, model.config._attn_implementation, str(model.dtype), torch.__version__, model.device.type)
    digest.update(repr(how).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    digest.update(prompts.fingerprint.encode())
    return digest.hexdigest()


def cache_path(directory: Path, model: nn.Module, prompts: Selection) -> Path:
    """Where in `directory` the log-probs of `prompts` under `model` lie, or would lie."""
    return directory / f"{cache_key(model, prompts)}.safetensors"


def reference_logps_of(model: nn.Module, prompts: Selection, path: Path) -> Tensor:
    """The log-prob of every response of the table under `model`: [R] float32, NaN in rows of no prompt in `prompts`.

    Read from `path`, which `cache_path` gave, where they have been computed before, else computed and written there; says
    which.
    """
    if path.exists():
        logps = _read(path)
        if logps is not None:
            print(f"reference: log-probs of {_count(logps)} responses read from {path}", flush=True)
            return logps
        print(f"reference: {path} is damaged and computed anew", flush=True)
    logps = compute_logps(model, prompts)
    _write(path, logps)
    print(f"reference: log-probs of {_count(logps)} responses computed once, kept in {path}", flush=True)
    return logps


def _count(logps: Tensor) -> int:
    return int((~logps.isnan()).sum())


@torch.no_grad()
def compute_logps(model: nn.Module, prompts: Selection) -> Tensor:
    """One pass over `prompts`, long ones together with long ones: [R] float32 on the CPU, for all rows of their table."""
    table = prompts.table
    logps = torch.full((table.first_row + table.num_responses,), torch.nan)
    training = model.training
    model.eval()
    for batch in pack_within(examples_of(prompts.by_length()), token_budget(model)):
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
