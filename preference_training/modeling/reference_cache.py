"""The cache of reference log-probs: computed in one pass over a run's data, and kept on disk under a content hash.

The last bits of a log-prob depend on the other responses of its pack. The pass therefore scores the very packs that the run
computes while its weights are still those of the reference: the packs of its first epoch and of its evaluations.

The name of a file is a hash of the model (weights, buffers, configuration, kernels), the machine, the tokenized data and
everything that determines the packs. Runs that agree in all of these share a file. Of several jobs of a sweep one computes it
while the others wait. A damaged file is recomputed. Where there is no room for one, a run continues without.
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

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import evaluation_batches, evaluation_prompts
from preference_training.batching.packing import (
    PACKING_VERSION,
    UNLIMITED,
    PackedBatch,
    TokenBudget,
    build_packs,
    iterate_examples,
)
from preference_training.batching.tries import MIN_SHARED
from preference_training.core.files import write_atomically
from preference_training.core.process_group import SINGLE_PROCESS, Ranks, local_bytes
from preference_training.core.values import hash_values
from preference_training.data.prompt_table import PromptTable, Selection
from preference_training.modeling.adapters.weights import INITIAL_ADAPTER, is_added
from preference_training.modeling.loading import CONFIG_METADATA
from preference_training.modeling.logprobs import CachedReference, LiveReference
from preference_training.modeling.prefix_sharing.attention_choice import MEASURED, VARLEN, asked_for, in_use
from preference_training.modeling.prefix_sharing.scoring_head import ScoringHead
from preference_training.modeling.state import compute_device, weights_hash

# Examples that are split over the ranks at once.
EXAMPLES_AT_ONCE = 1024
# The tensors of a cache file; their names are those of its format.
TENSORS = ("logps", "piece_lengths", "piece_rows", "piece_logps")


# ---- the key --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferencePlan:
    """Which responses a run needs reference log-probs of, and in which packs it computes them.

    prompts: all prompts of the run. packs: gives this rank's packs that the run computes with the reference's weights. recipe:
    plain values that determine these packs. rest: the prompts in none of them, which are packed by length within the budget.
    """

    prompts: Selection
    rest: Selection
    budget: TokenBudget = UNLIMITED
    packs: Callable[[], Iterator[PackedBatch]] = lambda: iter(())
    recipe: tuple = ()

    @classmethod
    def for_run(
        cls,
        train: BatchIterator,
        eval_prompts: PromptTable,
        batch_size: int,
        n_examples: int | None,
        seed: int,
        budget: TokenBudget,
        ranks: Ranks,
    ) -> "ReferencePlan":
        """The plan of a run with these training batches, whose evaluations call `evaluation_batches` with these arguments."""
        held_out = evaluation_prompts(eval_prompts, n_examples, seed)
        prompts = train.schedule.prompts_seen.joined(held_out)

        def packs() -> Iterator[PackedBatch]:
            yield from train.first_epoch()
            yield from evaluation_batches(eval_prompts, batch_size, n_examples, seed, budget, ranks)

        first = min(train.schedule.total_examples, train.schedule.epoch_size(0))
        weights = [part.weight for part in train.schedule.prompts.parts]
        steps = train.schedule.seed, train.schedule.batch_size, train.micro_batch_size, first, weights
        evaluations = seed, batch_size, n_examples
        rest = train.schedule.prompts_seen_later
        cut = _effective_budget(budget, prompts, max(train.micro_batch_size, batch_size, EXAMPLES_AT_ONCE if len(rest) else 0))
        packing = PACKING_VERSION, MIN_SHARED
        return cls(prompts, rest, budget, packs, (steps, evaluations, cut, ranks.size, packing))


def _effective_budget(budget: TokenBudget, prompts: Selection, examples: int) -> tuple[int, int]:
    """The part of a budget that can matter, so that runs with more memory than they need get the same packs.

    A pack has at most `examples` examples, and no prompt shares more than all tokens of the longest one.
    """
    longest = int(prompts.table.num_tokens[prompts.indices].max(initial=0))
    soft_limit = min(budget.soft_limit, longest * examples)
    return TokenBudget(budget.limit, soft_limit).largest_pack(longest), soft_limit


def model_facts(model: nn.Module) -> dict:
    """What the log-probs of a model depend on besides its weights, as plain values; excludes the trained adapter."""
    base = [(name, module) for name, module in model.named_modules() if not _belongs_to_adapter(name, module)]
    weights = [(name, weight) for name, weight in model.named_parameters() if not is_added(name)]
    starting = getattr(model, "peft_config", {}).get(INITIAL_ADAPTER)
    return {
        "configuration": _without_metadata(model.config.to_dict()),
        "attention": [getattr(module.config, "_attn_implementation", None) for _, module in base if _has_config(module)],
        # Scoring heads, quantized layers and sharded modules are all told by their classes.
        "classes": sorted({_class_name(module) for _, module in base}),
        "dtypes": sorted({str(weight.dtype) for _, weight in weights}),
        "autocast": str(getattr(model, "autocast_dtype", None)),
        "buffers": [[name, *_tensor_facts(buffer)] for name, buffer in model.named_buffers() if not is_added(name)],
        "adapter": None if starting is None else _adapter_facts(starting),
        # Only where it may differ from what it was before there was a choice, so that older caches are found.
        **({"prefix_attention": [asked_for(), MEASURED]} if VARLEN in in_use(compute_device(model)) else {}),
    }


def _adapter_facts(config) -> list:
    """What the scale of an adapter depends on; patterns only where there are any, so that older caches are found."""
    patterns = [pattern for pattern in (config.alpha_pattern, config.rank_pattern) if pattern]
    return [config.lora_alpha, config.r, config.use_rslora, *patterns]


def _class_name(module: nn.Module) -> str:
    # A fixed name for our own class, so that moving it does not invalidate every cache.
    return "logprobs.ScoringHead" if type(module) is ScoringHead else f"{type(module).__module__}.{type(module).__qualname__}"


def _belongs_to_adapter(name: str, module: nn.Module) -> bool:
    return is_added(name) or type(module).__module__.startswith("peft.")


def _has_config(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module.config, "_attn_implementation")


def _without_metadata(configuration):
    """A configuration without the keys of CONFIG_METADATA, at any depth."""
    if isinstance(configuration, dict):
        return {str(key): _without_metadata(value) for key, value in configuration.items() if key not in CONFIG_METADATA}
    return [_without_metadata(value) for value in configuration] if isinstance(configuration, list | tuple) else configuration


def _tensor_facts(tensor: Tensor) -> tuple:
    return str(tensor.dtype), list(tensor.shape), xxhash.xxh3_128_hexdigest(local_bytes(tensor))


def machine_facts(device: torch.device) -> list:
    """Device, threads and versions: the order of float additions depends on them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    threads = None if device.type == "cuda" else torch.get_num_threads()
    versions = torch.__version__, torch.version.cuda, transformers.__version__
    return [device.type, name, threads, *versions, torch.get_float32_matmul_precision()]


def cache_key(model: nn.Module, plan: ReferencePlan, settings: Mapping | None = None, ranks: Ranks = SINGLE_PROCESS) -> str:
    """Hash of everything that the log-probs of a plan under the untrained `model` depend on: 32 hexadecimal digits.

    settings: options of the run that affect computing but are not visible in the model. All ranks get the same key.
    """
    computing = model_facts(model), machine_facts(compute_device(model)), dict(settings or {})
    how = [*computing, plan.recipe, plan.prompts.fingerprint, weights_hash(model)]
    parts = ranks.all_gather_object(hash_values(how, default=str))
    return parts[0] if len(parts) == 1 else xxhash.xxh3_128_hexdigest("".join(parts).encode())


def cache_path(
    directory: Path, model: nn.Module, plan: ReferencePlan, settings: Mapping | None = None, ranks: Ranks = SINGLE_PROCESS
) -> Path:
    """The file in `directory` for the log-probs of a plan under `model`, whether or not it exists."""
    return directory / f"{cache_key(model, plan, settings, ranks)}.safetensors"


# ---- read or compute ------------------------------------------------------------------------------------------------------


def cached_reference(
    reference: LiveReference, plan: ReferencePlan, path: Path, ranks: Ranks = SINGLE_PROCESS
) -> CachedReference:
    """The log-probs of every response of a plan; NaN for rows of other responses.

    Reads them from `path`, as `cache_path` gives it, or computes them and writes them there; prints which.
    """
    cached = _load(path, ranks)
    if cached is None:
        with _exclusive(path, ranks):
            # Jobs of a sweep arrive here together: the first one computes, the others then find its file.
            cached = _load(path, ranks)
            if cached is None:
                return _compute_and_save(reference, plan, path, ranks)
    print(f"reference: log-probs of {_count(cached)} responses read from {path}", flush=True)
    return cached


def _load(path: Path, ranks: Ranks) -> CachedReference | None:
    """The contents of a cache file, on all ranks; None where it does not exist or is damaged."""
    # Only rank 0 looks: other machines may not see the file, or not yet, and all ranks must take the same branch.
    tensors = ranks.broadcast(_read(path) if ranks.is_rank_zero and path.exists() else None)
    return None if tensors is None else _from_tensors(tensors)


def _compute_and_save(reference: LiveReference, plan: ReferencePlan, path: Path, ranks: Ranks) -> CachedReference:
    if ranks.is_rank_zero and path.exists():
        print(f"reference: {path} is damaged and will be recomputed", flush=True)
    if ranks.is_rank_zero:
        print(f"reference: computing the log-probs of the responses to {len(plan.prompts):,} prompts, once", flush=True)
    computed = compute_logps(reference, plan, ranks)
    if ranks.is_rank_zero:
        is_kept = _keep(path, _to_tensors(computed))
        print(f"reference: log-probs of {_count(computed)} responses computed{f' and saved to {path}' * is_kept}", flush=True)
    return computed


def _keep(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Write a cache file, if there is room. Whether there was: the run has what it computed, and needs no file."""
    try:
        _write(path, tensors)
    except OSError as error:
        print(
            f"warning: reference: its log-probs cannot be kept in {path} for other runs: {error.strerror or error}", flush=True
        )
        return False
    return True


@contextmanager
def _exclusive(path: Path, ranks: Ranks) -> Iterator[None]:
    """Context in which no other run computes the file `path`, where it can be locked; waits for one that does."""
    lock = FileLock(path.with_suffix(".lock"))
    waits = False
    # Short timeouts, since the other ranks of this run wait in a collective, which has a timeout of its own.
    while not ranks.broadcast(ranks.is_rank_zero and _try_acquire(lock, 10.0 if waits else 0.0)):
        if not waits:
            print("reference: waiting for the run that computes its log-probs", flush=True)
        waits = True
    try:
        yield
    finally:
        if ranks.is_rank_zero:
            lock.release()


def _try_acquire(lock: FileLock, timeout: float) -> bool:
    """Whether the lock was acquired within `timeout` seconds, or there is no room for one: two runs may compute the same."""
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except Timeout:
        return False
    except OSError as error:
        print(f"warning: reference: {lock.lock_file} cannot be written: {error.strerror or error}", flush=True)
    return True


def _count(reference: CachedReference) -> int:
    return int((~reference.logps.isnan()).sum())


@torch.no_grad()
def compute_logps(reference: LiveReference, plan: ReferencePlan, ranks: Ranks = SINGLE_PROCESS) -> CachedReference:
    """Compute the log-probs of a plan in one pass: each rank computes its packs, and all ranks get the result."""
    table, model = plan.prompts.table, reference.model
    training = model.training
    model.eval()
    numbers, rows, values = [], [], []
    for number, batch in enumerate(_packs(plan, ranks)):
        logps = reference(batch.to(compute_device(model))).cpu()
        if not batch.is_filler:
            numbers.append(number)
            rows.append(batch.response_rows)
            values.append(logps)
    model.train(training)
    return _combine(ranks.all_gather_object(_RankResult.of(numbers, rows, values)), table.first_row + table.num_responses)


@dataclass(frozen=True)
class _RankResult:
    """What one rank has computed: for each pack its number and its count of responses; rows and log-probs of all responses."""

    numbers: list[int]
    lengths: list[int]
    rows: Tensor
    logps: Tensor

    @classmethod
    def of(cls, numbers: list[int], rows: list[Tensor], logps: list[Tensor]) -> "_RankResult":
        """From lists with one entry for each pack."""
        none = [torch.zeros(0)]
        return cls(numbers, list(map(len, rows)), torch.cat(rows or none).long(), torch.cat(logps or none))

    def packs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, rows and log-probs of each pack."""
        return zip(self.numbers, self.rows.split(self.lengths), self.logps.split(self.lengths), strict=True)


def _combine(results: list[_RankResult], num_rows: int) -> CachedReference:
    """The first value of each row, and all values of packs in which any differs from it."""
    logps = torch.full((num_rows,), torch.nan)
    of_packs = {}
    for _, rows, values in sorted((pack for result in results for pack in result.packs()), key=itemgetter(0)):
        logps[rows] = torch.where(logps[rows].isnan(), values, logps[rows])
        if not torch.equal(logps[rows].nan_to_num(), values.nan_to_num()):
            of_packs[tuple(rows.tolist())] = values
    return CachedReference(logps, of_packs)


def _packs(plan: ReferencePlan, ranks: Ranks) -> Iterator[PackedBatch]:
    """This rank's packs; all ranks have the same number."""
    yield from plan.packs()
    examples = iterate_examples(plan.rest.by_length())
    while part := list(islice(examples, EXAMPLES_AT_ONCE)):
        yield from build_packs(part, plan.budget, ranks)


# ---- on disk --------------------------------------------------------------------------------------------------------------


def _to_tensors(reference: CachedReference) -> dict[str, Tensor]:
    of_packs = reference.of_packs
    return {
        "logps": reference.logps,
        "piece_lengths": torch.tensor(list(map(len, of_packs)), dtype=torch.int64),
        "piece_rows": torch.tensor([row for rows in of_packs for row in rows], dtype=torch.int64),
        "piece_logps": torch.cat([torch.zeros(0), *of_packs.values()]),
    }


def _from_tensors(tensors: dict[str, Tensor]) -> CachedReference:
    lengths = tensors["piece_lengths"].tolist()
    packs = zip(tensors["piece_rows"].split(lengths), tensors["piece_logps"].split(lengths), strict=True)
    return CachedReference(tensors["logps"], {tuple(rows.tolist()): values for rows, values in packs} if lengths else {})


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a cache file; None where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in TENSORS}
            return tensors if (file.metadata() or {}).get("checksum") == _checksum(tensors) else None
    except (SafetensorError, OSError):
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a cache file atomically."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    # Not save_file, which makes the file readable by its owner only, whatever the umask.
    write_atomically(path, save(tensors, metadata={"checksum": _checksum(tensors)}), concurrent=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in TENSORS:
        digest.update(local_bytes(tensors[name]))
    return digest.hexdigest()
