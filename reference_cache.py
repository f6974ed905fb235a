"""The reference's log-probs of a run's data: computed in one pass, kept on disk, and found again by what they depend on.

A file's name is a hash of the reference's weights, of its dtype and way of computing, and of the tokenised data. Runs that
agree in all of these share it: later runs, and the jobs of a sweep, of which one computes it while the others wait. A file that
is damaged is computed anew.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
import xxhash
from filelock import FileLock, Timeout
from torch import Tensor, nn

from batches import examples_of, pieces_of
from logprobs import LiveReference
from models import shared_budget, token_budget, weights_hash
from prompt_table import Selection
from ranks import ALONE, Ranks

# Examples that are divided among the ranks together.
EXAMPLES_AT_ONCE = 1024


def cache_key(model: nn.Module, prompts: Selection, ranks: Ranks = ALONE) -> str:
    """Hash of all that the log-probs of `prompts` under `model`, as it began, depend on: 32 hexadecimal digits.

    It is the same on all ranks.
    """
    how = (type(model).__name__, model.config._attn_implementation, str(model.dtype), torch.__version__, model.device.type)
    parts = ranks.gather(xxhash.xxh3_128_hexdigest(repr((how, weights_hash(model), prompts.fingerprint)).encode()))
    return parts[0] if len(parts) == 1 else xxhash.xxh3_128_hexdigest("".join(parts).encode())


def cache_path(directory: Path, model: nn.Module, prompts: Selection, ranks: Ranks = ALONE) -> Path:
    """Where in `directory` the log-probs of `prompts` under `model` lie, or would lie."""
    return directory / f"{cache_key(model, prompts, ranks)}.safetensors"


def reference_logps_of(reference: LiveReference, prompts: Selection, path: Path, ranks: Ranks = ALONE) -> Tensor:
    """The log-prob of every response of the table under a reference: [R] float32, NaN in rows of no prompt in `prompts`.

    Read from `path`, which `cache_path` gave, where they have been computed before, else computed and written there; says
    which.
    """
    logps = _found(path, ranks)
    if logps is None:
        with _alone(path, ranks):
            # Jobs of a sweep come here at the same time: the first one computes, and the others find what it has left.
            logps = _found(path, ranks)
            if logps is None:
                return _made(reference, prompts, path, ranks)
    print(f"reference: log-probs of {_count(logps)} responses read from {path}", flush=True)
    return logps


def _found(path: Path, ranks: Ranks) -> Tensor | None:
    """What was computed before, on all ranks; None where it was not, or the file is damaged."""
    # The main rank alone looks: another machine may not see the same file yet, or at all, and all have to do the same.
    return ranks.from_main(_read(path) if ranks.is_main and path.exists() else None)


def _made(reference: LiveReference, prompts: Selection, path: Path, ranks: Ranks) -> Tensor:
    if ranks.is_main and path.exists():
        print(f"reference: {path} is damaged and computed anew", flush=True)
    logps = compute_logps(reference, prompts, ranks)
    if ranks.is_main:
        _write(path, logps)
        print(f"reference: log-probs of {_count(logps)} responses computed once, kept in {path}", flush=True)
    return logps


@contextmanager
def _alone(path: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, no other run computes what is to lie under `path`; waits for one that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    waits = False
    # In short turns: the other ranks of this run wait for the main one's word, and not for ever.
    while not ranks.from_main(ranks.is_main and _acquired(lock, 10.0 if waits else 0.0)):
        if not waits:
            print("reference: waiting for the run that computes its log-probs", flush=True)
        waits = True
    try:
        yield
    finally:
        if ranks.is_main:
            lock.release()


def _acquired(lock: FileLock, patience: float) -> bool:
    """Whether a lock could be had in so many seconds."""
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        return False
    return True


def _count(logps: Tensor) -> int:
    return int((~logps.isnan()).sum())


@torch.no_grad()
def compute_logps(reference: LiveReference, prompts: Selection, ranks: Ranks = ALONE) -> Tensor:
    """One pass over `prompts`, long ones together with long ones: [R] float32 on the CPU, for all rows of their table.

    Each rank computes a part; all get the whole.
    """
    table = prompts.table
    logps = torch.full((table.first_row + table.num_responses,), torch.nan)
    model = reference.model
    budget = shared_budget(token_budget(model), ranks)
    training = model.training
    model.eval()
    examples = examples_of(prompts.by_length())
    while part := list(islice(examples, EXAMPLES_AT_ONCE)):
        for batch in pieces_of(part, budget, ranks):
            logps[batch.response_rows] = reference(batch.to(compute_device(model))).cpu()
    model.train(training)
    if ranks.size == 1:
        return logps
    known = ~logps.isnan()
    times = ranks.total(known.float())
    return torch.where(times > 0, ranks.total(logps.nan_to_num()) / times, torch.nan)


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
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    # Its own way to write a file would make it the owner's alone, whatever the umask is.
    partial.write_bytes(save({"logps": logps}, metadata={"checksum": _checksum(logps)}))
    os.replace(partial, path)


def _checksum(logps: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(logps.contiguous().view(torch.uint8).numpy())
