"""Checkpoints: what is on disk, how it gets there whole, and how a run goes on from it.

    RUN/step-<examples>/   weights, configuration and tokenizer in Hugging Face format
        optimizer/         the optimizer's state by the weights' names, each process's part in a file of its own
        reference/         the reference's weights, where it follows the policy, likewise
        state.json         counters, position in the data, random streams and the like
        policy.pt          the weights as one file, at the end of a run
        checksums.json     written last: size and hash of every file
    RUN/LATEST             a link to the newest of them

A checkpoint is written beside its place, synced, and renamed when it is complete. Every process writes the part that it has,
and reads the part that it will have: none holds the whole model. Nothing here unpickles.
"""

import base64
import copy
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from preference_training.core.errors import UserError
from preference_training.core.files import replace_symlink
from preference_training.core.process_group import SINGLE_PROCESS, Ranks, is_distributed, to_local
from preference_training.core.values import UNREADABLE
from preference_training.losses.beta_dpo import is_at_beta_used
from preference_training.modeling.adapters import WEIGHTS_FILE, has_adapter, save_adapter_config

PARTIAL = ".partial"
MARKER = "checksums.json"
# Most bytes in one file; what is written is in memory a second time while its file is.
FILE_SIZE = 2 * 2**30


# ---- what a checkpoint holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A run after `examples` training examples. Tensors may be this process's parts of sharded ones, and alive.

    tied: a weight's other name → the name under which `weights` has it. state: plain values, and uint8 tensors. reference:
    the weights of a reference that follows the policy; none of one that stays what it was.
    """

    examples: int
    weights: dict[str, Tensor]
    tied: dict[str, str]
    optimizer: dict[str, Tensor]
    state: dict
    reference: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        examples: int,
        named_weights: dict[str, Tensor],
        optimizer: dict[str, dict],
        state: dict,
        named_reference: dict[str, Tensor] | None = None,
    ) -> "Snapshot":
        """From named weights, of which some may be tied, and an optimizer's state by the weights' names."""
        reference, _ = distinct(named_reference or {})
        return cls(examples, *distinct(named_weights), distinct(tensors_of(optimizer))[0], state, reference)

    @property
    def num_bytes(self) -> int:
        """What the tensors of all processes take."""
        tensors = (*self.weights.values(), *self.optimizer.values(), *self.reference.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copied(self) -> "Snapshot":
        """The same with copies of its tensors, on the CPU: training may go on."""
        staging = StagingOptions(False, False, False, torch.cuda.is_available())
        stager = DefaultStager(staging)
        tensors = stager.stage({"weights": self.weights, "optimizer": self.optimizer, "reference": self.reference})
        stager.close()
        return replace(self, **tensors)


def distinct(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their first names, and those of which names are second names: a tied weight has several."""
    first_names: dict[int, str] = {}
    first = {name: first_names.setdefault(id(tensor), name) for name, tensor in named.items()}
    tied = {name: other for name, other in first.items() if name != other}
    return {name: tensor.detach() for name, tensor in named.items() if name not in tied}, tied


def tensors_of(by_weight: dict[str, dict]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, as "<weight>.<name>"."""
    named = ((f"{weight}.{name}", value) for weight, values in by_weight.items() for name, value in values.items())
    return {name: value for name, value in named if isinstance(value, Tensor)}


def numbers_of(by_weight: dict[str, dict]) -> dict[str, dict]:
    """What is no tensor in an optimizer's state, such as a count of steps, by the weights' names."""
    numbers = {
        weight: {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        for weight, values in by_weight.items()
    }
    return {weight: values for weight, values in numbers.items() if values}


# ---- writing --------------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes the checkpoints of a run, if asked to in the background, one at a time.

    A failure (a full disk) costs that checkpoint and a line, which `say` prints; `failed` tells of the newest one. keep_last
    and keep_best bound how many are kept, the best by the held-out metric `metric`; None keeps all. about says what the run
    is made of; patience_minutes how long a process waits for the others, where there are several; end_tokens what training put
    behind answers beside the tokenizer's end-of-sequence token. `check`, where it is set, is called with the next directory
    that is complete, before it counts as a checkpoint, and raises what stops the run; `looked`, on the main process, says
    whether it was. All processes of a run have to make one together, and write together. Use as a context manager.
    """

    def __init__(
        self,
        run_dir: Path,
        policy: nn.Module,
        tokenizer,
        ranks: Ranks = SINGLE_PROCESS,
        background: bool = False,
        keep_last: int | None = None,
        keep_best: int | None = None,
        metric: str = "loss/eval",
        about: dict | None = None,
        say: Callable[[str], None] = print,
        patience_minutes: float | None = None,
        end_tokens: Sequence[int] = (),
    ):
        self.run_dir, self.policy, self.tokenizer, self.ranks, self.say = run_dir, policy, tokenizer, ranks, say
        self.keep_last, self.keep_best, self.metric = keep_last, keep_best, metric
        self.about, self.end_tokens = about or {}, tuple(end_tokens)
        self.check: Callable[[Path], None] | None = None
        self.looked = False
        # Writers talk to each other beside training, which uses its own group at the same time.
        patience = timedelta(minutes=patience_minutes) if patience_minutes else None
        self.group = torch.distributed.new_group(backend="gloo", timeout=patience) if is_distributed() else None
        self.thread = ThreadPoolExecutor(1) if background else None
        self.under_way: Future | None = None
        self.failed = False

    def write(self, snapshot: Snapshot, with_policy_pt: bool = False) -> None:
        """Write a checkpoint; returns, if in the background, when its tensors are copied. Waits for the one before."""
        self.wait()
        needed = snapshot.num_bytes * (1 if self.group is None else 2)
        free = self.ranks.broadcast(shutil.disk_usage(self.run_dir).free)
        if needed > free:
            self._give_up(snapshot, f"needs {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free")
        elif self.thread is None or self.check is not None:
            # What is looked at is compared with the run's model as it is now.
            self._write(snapshot, with_policy_pt)
        else:
            self.under_way = self.thread.submit(self._write, snapshot.copied(), with_policy_pt)

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises what went wrong, unless it was the disk."""
        if self.under_way is not None:
            self.under_way.result()
            self.under_way = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception) -> None:
        if self.thread is not None:
            self.thread.shutdown()

    def _write(self, snapshot: Snapshot, with_policy_pt: bool) -> None:
        place = self.run_dir / f"step-{snapshot.examples}"
        partial = place.with_name(place.name + PARTIAL)
        try:
            if self.ranks.is_rank_zero:
                shutil.rmtree(partial, ignore_errors=True)
            if self.group is not None:
                # Those who are ahead would begin in a folder that is then removed.
                torch.distributed.barrier(group=self.group)
            self._write_tensors(snapshot.weights, partial, whole=True)
            for part in ("optimizer", "reference"):
                if tensors := getattr(snapshot, part):
                    self._write_tensors(tensors, partial / part, whole=False)
            if self.ranks.is_rank_zero:
                self._complete(snapshot, partial, with_policy_pt)
                self._check(partial)
                publish(partial, place)
                self._remove_old()
                self.say(f"checkpoint: {place}")
            self.looked |= self.check is not None
            self.failed, self.check = False, None
        except (OSError, CheckpointException) as error:
            if not isinstance(reason := _cause_of(error), OSError):
                raise
            self._give_up(snapshot, str(reason))

    def _write_tensors(self, tensors: dict[str, Tensor], folder: Path, whole: bool) -> None:
        """Every process its part; if `whole`, then brought together in files that Hugging Face libraries read."""
        together = self.group is not None
        # peft reads one file.
        numbers = dict.fromkeys(tensors, 1) if has_adapter(self.policy) else file_numbers(tensors)
        form = HuggingFaceStorageWriter(
            str(folder), numbers, save_distributed=together or not whole, enable_consolidation=together and whole
        )
        dcp.save(tensors, storage_writer=form, process_group=self.group, no_dist=not together)

    def _complete(self, snapshot: Snapshot, partial: Path, with_policy_pt: bool) -> None:
        shutil.rmtree(partial / "sharded", ignore_errors=True)
        if self.group is not None:
            write_scalars(partial, snapshot.weights)
        parts = sorted(partial.glob("model-*.safetensors"))
        if len(parts) == 1:
            parts[0].rename(partial / (WEIGHTS_FILE if has_adapter(self.policy) else "model.safetensors"))
            (partial / "model.safetensors.index.json").unlink()
        if has_adapter(self.policy):
            save_adapter_config(self.policy, partial)
        save_configuration(self.policy, partial, self.tokenizer, self.end_tokens)
        save_tokenizer(self.tokenizer, partial)
        (partial / "state.json").write_text(json.dumps(snapshot.state | {"run": self.about}, default=_as_json))
        if with_policy_pt and not has_adapter(self.policy):
            write_policy_pt(partial, snapshot)

    def _check(self, partial: Path) -> None:
        if self.check is not None:
            try:
                self.check(partial)
            except UserError:
                shutil.rmtree(partial, ignore_errors=True)
                raise

    def _give_up(self, snapshot: Snapshot, reason: str) -> None:
        self.failed = True
        if self.ranks.is_rank_zero:
            shutil.rmtree(self.run_dir / f"step-{snapshot.examples}{PARTIAL}", ignore_errors=True)
            self.say(f"checkpoint: step-{snapshot.examples} could not be written, the run goes on: {reason}")

    def _remove_old(self) -> None:
        if self.keep_last is None and self.keep_best is None:
            return
        newest_first = checkpoints_of(self.run_dir)
        kept = set(newest_first[: self.keep_last or 1])
        if self.keep_best is not None:
            kept |= set(best_of(newest_first, self.metric)[: self.keep_best])
        for checkpoint in newest_first:
            if checkpoint not in kept:
                # Without its marker first: what a kill leaves of it is no checkpoint.
                (checkpoint / MARKER).unlink(missing_ok=True)
                shutil.rmtree(checkpoint, ignore_errors=True)


def save_configuration(policy: nn.Module, folder: Path, tokenizer, end_tokens: Sequence[int] = ()) -> None:
    """Write the configuration of a model, and how it generates: its answers end where those of training do.

    Of a model with an adapter the first is the base's own.
    """
    config = copy.deepcopy(policy.config)
    generation = copy.deepcopy(policy.generation_config) if policy.can_generate() else None
    end_as_trained(config, generation, tokenizer, end_tokens)
    if not has_adapter(policy):
        # FSDP has made a class of its own of the model's.
        config.architectures = [type(policy).__name__.removeprefix("FSDP")]
        config.dtype = policy.dtype
        config.save_pretrained(folder)
    if generation is not None:
        # Not save_pretrained, which refuses sampling settings that greedy decoding would not read.
        generation.to_json_file(folder / "generation_config.json")


def end_as_trained(config, generation, tokenizer, end_tokens: Sequence[int] = ()) -> None:
    """Let configurations name the tokens that end an answer: the tokenizer's, `end_tokens`, and those they name already.

    generation is None for a model that does not generate. A padding token is named where there was none, for generation alone:
    in a model's configuration it would keep that token's embedding from being trained.
    """
    wanted = [tokenizer.eos_token_id, *end_tokens]
    text = config.get_text_config()
    named = _listed(text.eos_token_id if generation is None else generation.eos_token_id)
    if not set(wanted) <= set(named):
        named = list(dict.fromkeys([*wanted, *named]))
    if tokenizer.eos_token_id not in _listed(text.eos_token_id):
        text.eos_token_id = tokenizer.eos_token_id
    if generation is not None:
        generation.eos_token_id = named if len(named) > 1 else named[0]
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def write_scalars(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors without dimensions into the files of a folder that have places for them.

    torch leaves such places at 0 where it brings the parts of all processes together.
    """
    scalars = {name: to_local(tensor).detach() for name, tensor in tensors.items() if tensor.dim() == 0}
    for file in sorted(folder.glob("*.safetensors")) if scalars else ():
        with file.open("rb+") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
            for name in scalars.keys() & header.keys():
                opened.seek(8 + size + header[name]["data_offsets"][0])
                opened.write(scalars[name].cpu().reshape(1).view(torch.uint8).numpy().tobytes())


def file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """In which of several files each tensor is written, from 1; a file has about FILE_SIZE bytes."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        added = tensor.numel() * tensor.element_size()
        if size and size + added > FILE_SIZE:
            number, size = number + 1, 0
        numbers[name], size = number, size + added
    return numbers


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer's files. Raises OSError where the system does not let it."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no other class for what the system says
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
        with (checkpoint / "policy.pt").open("wb") as file:
            torch.save(archive, file)
    except RuntimeError as error:
        # What the system said is behind what torch makes of a file that ends too early.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def publish(partial: Path, place: Path) -> None:
    """Make a complete directory a checkpoint: list its files, bring them to the disk, rename, point LATEST at it."""
    listed = {}
    for file in sorted(path for path in partial.rglob("*") if path.is_file()):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
        listed[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "xxh3_128": hash_of(file)}
    with (partial / MARKER).open("w") as marker:
        json.dump(listed, marker, indent=1)
        marker.flush()
        os.fsync(marker.fileno())
    _sync_folder(partial)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)
    replace_symlink(place.parent / "LATEST", place.name)
    _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_of(file: Path) -> str:
    """Hash of a file's bytes: 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _cause_of(error: BaseException) -> BaseException:
    """What stopped a write. The checkpoint library wraps what each process raised, and safetensors what the system said."""
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
        return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    return error


def _as_json(value):
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        return {"base64": base64.b64encode(value.cpu().numpy().tobytes()).decode()}
    raise TypeError(f"{type(value).__name__} does not go into a checkpoint's state")


def _of_json(value: dict):
    return torch.tensor(list(base64.b64decode(value["base64"])), dtype=torch.uint8) if value.keys() == {"base64"} else value


# ---- what is there ----------------------------------------------------------------------------------------------------------


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The directories of a run's checkpoints, newest first; they may be damaged."""
    found = [path for path in run_dir.glob("step-*") if path.name.removeprefix("step-").isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where each is as it was written."""
    try:
        listed = json.loads((checkpoint / MARKER).read_text())
        files = {(checkpoint / name): (facts["bytes"], facts["xxh3_128"]) for name, facts in listed.items()}
    except UNREADABLE:
        return f"{MARKER} is missing or damaged"
    # Its names are data, and may not lead out of the checkpoint.
    if "state.json" not in listed or any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed):
        return f"{MARKER} is damaged"
    for file, (size, digest) in files.items():
        if not file.is_file():
            return f"{file.relative_to(checkpoint)} is missing"
        if file.stat().st_size != size or hash_of(file) != digest:
            return f"{file.relative_to(checkpoint)} is not what was written"
    return None


def newest_usable(
    run_dir: Path, say: Callable[[str], None] = print, fault_of: Callable[[Path], str | None] = fault_of
) -> Path | None:
    """The newest checkpoint of a run in which `fault_of` finds no fault; says of newer ones what is wrong with them."""
    for checkpoint in checkpoints_of(run_dir):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        say(f"checkpoint: {checkpoint} is passed over: {fault}")
    return None


def read_state(checkpoint: Path) -> dict:
    """The `state` of a checkpoint's snapshot. Raises one of UNREADABLE where it is damaged."""
    return json.loads((checkpoint / "state.json").read_text(), object_hook=_of_json)


def _held_out(checkpoint: Path, metric: str) -> float | None:
    try:
        held_out = read_state(checkpoint)["held_out"]
        value = None if metric == "loss/eval" and is_at_beta_used(held_out) else held_out[metric]
    except UNREADABLE:
        # Not evaluated, or damaged since.
        return None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def best_of(checkpoints: list[Path], metric: str) -> list[Path]:
    """The checkpoints that were evaluated, best first: by the smallest loss, or the largest value of another metric."""
    values = {checkpoint: _held_out(checkpoint, metric) for checkpoint in checkpoints}
    known = [checkpoint for checkpoint, value in values.items() if value is not None]
    return sorted(known, key=lambda checkpoint: values[checkpoint], reverse=not smaller_is_better(metric))


def smaller_is_better(metric: str) -> bool:
    """Whether a held-out metric is to be small; all but losses are to be large."""
    return metric.startswith("loss")


# ---- reading ----------------------------------------------------------------------------------------------------------------


def read_weights(checkpoint: Path, named_weights: dict[str, Tensor]) -> None:
    """Read weights in place. Of a sharded one each process reads its own part; all call it together."""
    _read_tensors(checkpoint, distinct(named_weights)[0])


def read_optimizer(checkpoint: Path, by_weight: dict[str, dict]) -> None:
    """Read the tensors of an optimizer's state in place, by the weights' names; each process its own parts."""
    _read_tensors(checkpoint / "optimizer", distinct(tensors_of(by_weight))[0])


def read_reference(checkpoint: Path, named_weights: dict[str, Tensor]) -> None:
    """Read the weights of a reference that follows the policy in place; each process its own parts."""
    _read_tensors(checkpoint / "reference", distinct(named_weights)[0])


def _read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        # Nothing was written then: plain SGD keeps no state.
        return
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not is_distributed())
