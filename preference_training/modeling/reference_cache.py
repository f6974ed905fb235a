"""The reference's log-probs of a run's data: computed in one pass, kept on disk, and found again by what they depend on.

Of a log-prob the last bits depend on what is computed beside it. The pass therefore scores the responses in the very pieces in
which the run does so itself while its weights are those of the reference: of its first epoch, and of its evaluations.

A file's name is a hash of the model (weights, buffers, configuration, ways of computing), of the machine, of the tokenised data
and of what these pieces follow from. Runs that agree in all of these share it: later runs, and the jobs of a sweep, of which
one computes it while the others wait. A file that is damaged is computed anew.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

import torch
import transformers
import xxhash
from filelock import FileLock, Timeout
from torch import Tensor, nn

from preference_training.batching.batches import (
    UNLIMITED,
    BatchIterator,
    PackedBatch,
    TokenBudget,
    evaluation_batches,
    evaluation_prompts,
    examples_of,
    pieces_of,
)
from preference_training.core.files import write_atomically
from preference_training.core.hashing import hash_of_values
from preference_training.core.ranks import ALONE, Ranks, bytes_of
from preference_training.data.prompt_table import PromptTable, Selection
from preference_training.modeling.adapters import STARTING
from preference_training.modeling.loading import weights_hash
from preference_training.modeling.logprobs import CachedReference, LiveReference
from preference_training.modeling.state import compute_device

# Examples that are divided among the ranks together.
EXAMPLES_AT_ONCE = 1024
# What a file holds.
TENSORS = ("logps", "piece_lengths", "piece_rows", "piece_logps")
# Entries of a model's configuration that say where it came from or how it is called, and nothing of what it computes.
NOT_COMPUTED = {
    "_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "id2label", "label2id",
}  # fmt: skip


# ---- what is read ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """What a run reads of its reference: the responses of `prompts`.

    pieces gives this rank's pieces that the run computes with the reference's weights, and recipe is what they follow from.
    rest are the prompts that are in none of them; they are computed long ones together with long ones, within the budget.
    """

    prompts: Selection
    rest: Selection
    budget: TokenBudget = UNLIMITED
    pieces: Callable[[], Iterator[PackedBatch]] = lambda: iter(())
    recipe: tuple = ()

    @classmethod
    def of_run(
        cls,
        train: BatchIterator,
        eval_prompts: PromptTable,
        batch_size: int,
        n_examples: int | None,
        seed: int,
        budget: TokenBudget,
        ranks: Ranks,
    ) -> "Reads":
        """Of a run with these steps and evaluations: `evaluation_batches` are called as here."""
        held_out = evaluation_prompts(eval_prompts, n_examples, seed)
        prompts = train.prompts_seen.joined(held_out)

        def pieces() -> Iterator[PackedBatch]:
            yield from train.first_epoch()
            yield from evaluation_batches(eval_prompts, batch_size, n_examples, seed, budget, ranks)

        first = min(train.total_examples, train.examples_of_epoch(0))
        weights = [part.weight for part in train.prompts.parts]
        steps = train.seed, train.batch_size, train.micro_batch_size, first, weights
        evaluations = seed, batch_size, n_examples
        rest = train.prompts_seen_later
        cut = _effective(budget, prompts, max(train.micro_batch_size, batch_size, EXAMPLES_AT_ONCE if len(rest) else 0))
        return cls(prompts, rest, budget, pieces, (steps, evaluations, cut, ranks.size))


def _effective(budget: TokenBudget, prompts: Selection, examples: int) -> tuple[int, int]:
    """A budget without what is never used of it, so that runs with more memory than they need cut alike.

    A piece holds at most so many examples, and is longer than is comfortable by no more than one prompt with its responses.
    """
    longest = int(prompts.table.num_tokens[prompts.indices].max(initial=0))
    comfortable = min(budget.comfortable, longest * examples)
    return min(budget.limit, comfortable + longest), comfortable


def model_facts(model: nn.Module) -> dict:
    """What the log-probs of a model depend on beside its weights: plain values. Nothing of the adapter that is trained."""
    base = [(name, module) for name, module in model.named_modules() if not _is_of_adapter(name, module)]
    weights = [(name, weight) for name, weight in model.named_parameters() if ".lora_" not in name]
    starting = getattr(model, "peft_config", {}).get(STARTING)
    return {
        "configuration": _computed(model.config.to_dict()),
        "attention": [getattr(module.config, "_attn_implementation", None) for _, module in base if _has_config(module)],
        # A head that scores, layers of few bits, shards: each is a class.
        "classes": sorted({f"{type(module).__module__}.{type(module).__qualname__}" for _, module in base}),
        "dtypes": sorted({str(weight.dtype) for _, weight in weights}),
        "autocast": str(getattr(model, "autocast_dtype", None)),
        "buffers": [[name, *_facts_of_tensor(buffer)] for name, buffer in model.named_buffers() if ".lora_" not in name],
        "adapter": None if starting is None else [starting.lora_alpha, starting.r, starting.use_rslora],
    }


def _is_of_adapter(name: str, module: nn.Module) -> bool:
    return ".lora_" in name or type(module).__module__.startswith("peft.")


def _has_config(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module.config, "_attn_implementation")


def _computed(configuration):
    """A configuration without the entries that change no number, in all of its parts."""
    if isinstance(configuration, dict):
        return {str(key): _computed(value) for key, value in configuration.items() if key not in NOT_COMPUTED}
    return [_computed(value) for value in configuration] if isinstance(configuration, list | tuple) else configuration


def _facts_of_tensor(tensor: Tensor) -> tuple:
    return str(tensor.dtype), list(tensor.shape), xxhash.xxh3_128_hexdigest(bytes_of(tensor))


def machine_facts(device: torch.device) -> list:
    """What computes: sums come in another order on other devices, and in other versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    threads = None if device.type == "cuda" else torch.get_num_threads()
    versions = torch.__version__, torch.version.cuda, transformers.__version__
    return [device.type, name, threads, *versions, torch.get_float32_matmul_precision()]


def cache_key(model: nn.Module, reads: Reads, settings: Mapping | None = None, ranks: Ranks = ALONE) -> str:
    """Hash of all that the log-probs of what is read under `model`, as it began, depend on: 32 hexadecimal digits.

    settings are those of the run that the model does not show. The key is the same on all ranks.
    """
    computing = model_facts(model), machine_facts(compute_device(model)), dict(settings or {})
    how = [*computing, reads.recipe, reads.prompts.fingerprint, weights_hash(model)]
    parts = ranks.gather(hash_of_values(how, default=str))
    return parts[0] if len(parts) == 1 else xxhash.xxh3_128_hexdigest("".join(parts).encode())


def cache_path(directory: Path, model: nn.Module, reads: Reads, settings: Mapping | None = None, ranks: Ranks = ALONE) -> Path:
    """Where in `directory` the log-probs of what is read under `model` lie, or would lie."""
    return directory / f"{cache_key(model, reads, settings, ranks)}.safetensors"


# ---- found, or computed ---------------------------------------------------------------------------------------------------


def cached_reference(reference: LiveReference, reads: Reads, path: Path, ranks: Ranks = ALONE) -> CachedReference:
    """The log-prob of every response that a run reads; NaN where no prompt of those has the row.

    Read from `path`, which `cache_path` gave, where they have been computed before, else computed and written there; says
    which.
    """
    found = _found(path, ranks)
    if found is None:
        with _alone(path, ranks):
            # Jobs of a sweep come here at the same time: the first one computes, and the others find what it has left.
            found = _found(path, ranks)
            if found is None:
                return _made(reference, reads, path, ranks)
    print(f"reference: log-probs of {_count(found)} responses read from {path}", flush=True)
    return found


def _found(path: Path, ranks: Ranks) -> CachedReference | None:
    """What was computed before, on all ranks; None where it was not, or the file is damaged."""
    # The main rank alone looks: another machine may not see the same file yet, or at all, and all have to do the same.
    tensors = ranks.from_main(_read(path) if ranks.is_main and path.exists() else None)
    return None if tensors is None else _from_tensors(tensors)


def _made(reference: LiveReference, reads: Reads, path: Path, ranks: Ranks) -> CachedReference:
    if ranks.is_main and path.exists():
        print(f"reference: {path} is damaged and computed anew", flush=True)
    made = compute_logps(reference, reads, ranks)
    if ranks.is_main:
        _write(path, _to_tensors(made))
        print(f"reference: log-probs of {_count(made)} responses computed once, kept in {path}", flush=True)
    return made


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


def _count(reference: CachedReference) -> int:
    return int((~reference.logps.isnan()).sum())


@torch.no_grad()
def compute_logps(reference: LiveReference, reads: Reads, ranks: Ranks = ALONE) -> CachedReference:
    """One pass over what is read. Each rank computes its pieces; all get the whole."""
    table, model = reads.prompts.table, reference.model
    training = model.training
    model.eval()
    numbers, rows, values = [], [], []
    for number, batch in enumerate(_pieces(reads, ranks)):
        logps = reference(batch.to(compute_device(model))).cpu()
        if not batch.is_filler:
            numbers.append(number)
            rows.append(batch.response_rows)
            values.append(logps)
    model.train(training)
    return _joined(ranks.gather(_Computed.of(numbers, rows, values)), table.first_row + table.num_responses)


@dataclass(frozen=True)
class _Computed:
    """What one rank has computed: the numbers of its pieces, how many responses each has, and the rows and log-probs of all."""

    numbers: list[int]
    lengths: list[int]
    rows: Tensor
    logps: Tensor

    @classmethod
    def of(cls, numbers: list[int], rows: list[Tensor], logps: list[Tensor]) -> "_Computed":
        """Of lists with one entry a piece."""
        none = [torch.zeros(0)]
        return cls(numbers, list(map(len, rows)), torch.cat(rows or none).long(), torch.cat(logps or none))

    def pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, rows and log-probs of each piece."""
        return zip(self.numbers, self.rows.split(self.lengths), self.logps.split(self.lengths), strict=True)


def _joined(computed: list[_Computed], num_rows: int) -> CachedReference:
    """One value for each row, the first that was computed, and whole pieces where others are not the same bits."""
    logps = torch.full((num_rows,), torch.nan)
    of_pieces = {}
    for _, rows, values in sorted((piece for part in computed for piece in part.pieces()), key=itemgetter(0)):
        logps[rows] = torch.where(logps[rows].isnan(), values, logps[rows])
        if not torch.equal(logps[rows].nan_to_num(), values.nan_to_num()):
            of_pieces[tuple(rows.tolist())] = values
    return CachedReference(logps, of_pieces)


def _pieces(reads: Reads, ranks: Ranks) -> Iterator[PackedBatch]:
    """This rank's pieces; every rank has equally many."""
    yield from reads.pieces()
    examples = examples_of(reads.rest.by_length())
    while part := list(islice(examples, EXAMPLES_AT_ONCE)):
        yield from pieces_of(part, reads.budget, ranks)


# ---- on disk --------------------------------------------------------------------------------------------------------------


def _to_tensors(reference: CachedReference) -> dict[str, Tensor]:
    of_pieces = reference.of_pieces
    return {
        "logps": reference.logps,
        "piece_lengths": torch.tensor(list(map(len, of_pieces)), dtype=torch.int64),
        "piece_rows": torch.tensor([row for rows in of_pieces for row in rows], dtype=torch.int64),
        "piece_logps": torch.cat([torch.zeros(0), *of_pieces.values()]),
    }


def _from_tensors(tensors: dict[str, Tensor]) -> CachedReference:
    lengths = tensors["piece_lengths"].tolist()
    pieces = zip(tensors["piece_rows"].split(lengths), tensors["piece_logps"].split(lengths), strict=True)
    return CachedReference(tensors["logps"], {tuple(rows.tolist()): values for rows, values in pieces} if lengths else {})


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, or None if it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in TENSORS}
            return tensors if (file.metadata() or {}).get("checksum") == _checksum(tensors) else None
    except (SafetensorError, OSError):
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file as a whole: a reader finds all of it or none."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors would make the file its owner's alone, whatever the umask is.
    write_atomically(path, save(tensors, metadata={"checksum": _checksum(tensors)}), concurrent=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in TENSORS:
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()
