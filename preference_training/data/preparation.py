"""Tokenize each data set once: stream it from its loader into an Arrow file, named by everything that it depends on.

A file's name is a hash of the data's content, the tokenizer, the settings that affect token ids, and the version of the rules
(`rendering.settings.VERSION`), but not of our code. Processes that prepare the same data at once (ranks of a run, jobs of a
sweep) wait for the first of them, however long it takes. A file gets its name when it is complete.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy
import xxhash

from preference_training.core.errors import UserError
from preference_training.core.files import PARTIAL, atomic_file, locked, partial_path, sync
from preference_training.core.machine import infrequent_garbage_collection
from preference_training.core.values import hash_values
from preference_training.data.columns import ContentHash
from preference_training.data.entries import Entry, load_records
from preference_training.data.mismatched import with_mismatched
from preference_training.data.prompt_table import OtherColumnsError, PromptTable, TablePart, write_columns, write_selected
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.records.report import DataReport
from preference_training.data.records.validation import LISTS_OF_VALUES
from preference_training.data.rendering.settings import VERSION, TokenSettings
from preference_training.data.token_files import Vocabulary, read_tokenized
from preference_training.data.tokenization import TokenizedPrompt, text_reader, tokenize_records
from preference_training.losses.base import MarginUse


@dataclass(frozen=True)
class Prepared:
    """The prompts of one split of all entries, a report for each entry, and the version of the rules they follow."""

    table: PromptTable
    reports: list[DataReport]
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """A hash of all token ids, pairs and response numbers; in the first version, of the names of files instead."""
        if self.version > 1:
            return self.table.fingerprint
        names = [part.name for part in self.table.parts]
        return xxhash.xxh3_128_hexdigest(repr((names, self.table.first_row)).encode())

    def numbered_from(self, first_row: int) -> "Prepared":
        """The same, with responses numbered from `first_row` on."""
        return replace(self, table=PromptTable(self.table.parts, first_row))


def prepare(
    entries: Sequence[Entry],
    split: str,
    tokenizer,
    settings: Callable[[Entry], TokenSettings],
    directory: Path,
    cache_dir: str | None = None,
    first_row: int = 0,
) -> Prepared:
    """The tokenized prompts of one split ("train" or "test"), read from `directory` if they have been prepared before.

    settings: returns the settings for each entry's token ids. cache_dir: the hub library's. Responses are numbered from
    `first_row` on. Raises UserError for data that cannot be used, and where it cannot be written.
    """
    parts, reports, version = [], [], VERSION
    vocabulary = tokenizer_hash(tokenizer)
    for entry in entries:
        version = settings(entry).version
        work = _Preparation(entry, split, tokenizer, vocabulary, settings(entry), Folders(directory, cache_dir))
        with infrequent_garbage_collection():
            part, report = work.result()
        if part is not None:
            parts.append(part)
        # Not stored with the data, which these settings do not affect.
        reports.append(replace(report, notes=[*entry.notes, *report.notes]) if split == "train" else report)
    return Prepared(PromptTable(parts, first_row), reports, version)


@contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """Context for writing to a directory, which is created. Raises UserError where that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"local_dirs: cannot write prepared data to {directory}: {error.strerror or error}. Expected a "
            "writable directory with space for the token ids. Free some space, or set local_dirs."
        ) from error


class Folders(NamedTuple):
    """The directory of prepared data, and the hub library's cache."""

    prepared: Path
    hub: str | None


class _Preparation:
    """The prepared file of one entry and split, found or written."""

    def __init__(self, entry: Entry, split: str, tokenizer, vocabulary: str, settings: TokenSettings, folders: Folders):
        self.entry, self.split, self.tokenizer, self.settings = entry, split, tokenizer, settings
        self.directory, self.cache_dir = folders
        known = entry.fingerprint(split, self.cache_dir, trust_user_code=settings.version == 1)
        # Where the content is known only after loading, the name ends with a hash of the records.
        self.content_is_known = known is not None
        depends_on = [entry.name, known, entry.report().skip_bad_rows, split, vocabulary, *_settings_key(settings)]
        self.key = hash_values(depends_on)
        # Whether the numbers of prompts are those of rows, as far as they are read.
        self.by_row = True

    def result(self) -> tuple[TablePart | None, DataReport]:
        """The memory-mapped file (None without any prompt) and the report. Prepares it if needed."""
        waiting = f"{self.entry.name}: waiting for the process that prepares it"
        with _writable(self.directory), locked(self.directory / f"{self.key}.lock", waiting):
            return self._find() or self._make()

    def _find(self) -> tuple[TablePart | None, DataReport] | None:
        names = [self.key] if self.content_is_known else sorted(p.stem for p in self.directory.glob(f"{self.key}-*.json"))
        if not self.content_is_known and names:
            digest = xxhash.xxh3_128()
            for _ in self._records(self.entry.report(), digest):
                pass
            names = [name for name in names if name == f"{self.key}-{digest.hexdigest()}"]
        for name in names:
            found = self._read(name)
            if found is not None:
                return found
        return None

    def _read(self, name: str) -> tuple[TablePart | None, DataReport] | None:
        """The file of a name and its report; None if missing or damaged."""
        path = self.directory / f"{name}.arrow"
        try:
            stored = json.loads(path.with_suffix(".json").read_text())
            # The first version had none.
            fingerprint, self.by_row = stored.pop("fingerprint", None), stored.pop("by_row", False)
            report = DataReport(**stored)
            if path.exists():
                part = self._map(path, fingerprint)
                if part.num_prompts != report.num_prompts:
                    raise ValueError("its report has another number of prompts")
                return part, report
            return (None, report) if report.num_prompts == 0 else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            print(f"{self.entry.name}: {_prepared_again(path, error)}", flush=True)
            return None

    def _map(self, path: Path, fingerprint: str | None) -> TablePart:
        """A complete file as a part of the run's table."""
        own, name = self.entry.user_data, self.entry.name
        if self.entry.tokenized_file or (own and self.by_row):
            name, what = own.path_of(self.split) if self.by_row and own else name, "row"
        else:
            what = f"{self.split} prompt"
        weight = self.entry.weight if self.split == "train" else 1.0
        return TablePart.of_file(path, f"{name}, {what}", weight, fingerprint)

    def _make(self) -> tuple[TablePart | None, DataReport]:
        """Write the file under a temporary name, then rename it."""
        self._sweep()
        report = self.entry.report()
        digest, content = None if self.content_is_known else xxhash.xxh3_128(), ContentHash()
        # The name may depend on the hash of the content.
        with partial_path(self.directory / self.key) as partial, partial_path(self.directory / f"{self.key}.json") as side:
            with partial.open("wb") as file:
                prompts = _with_progress(self._prompts(report, digest), self.entry.name)
                report.num_prompts = write_columns(file, prompts, content)
                sync(file)
            name = self.key if digest is None else f"{self.key}-{digest.hexdigest()}"
            path = self.directory / f"{name}.arrow"
            # The report first: if the data exists, so does its report.
            side.write_text(json.dumps(report.as_dict() | {"fingerprint": content.hexdigest(), "by_row": self.by_row}))
            side.replace(path.with_suffix(".json"))
            if report.num_prompts == 0:
                return None, report
            partial.replace(path)
        return self._map(path, content.hexdigest()), report

    def _sweep(self) -> None:
        """Remove the partial files of killed processes."""
        from filelock import FileLock, Timeout

        for partial in self.directory.glob(f"*{PARTIAL}"):
            lock = FileLock(self.directory / f"{partial.name.split('.')[0]}.lock")
            try:
                # This process holds its own lock; any other that is held belongs to a preparation in progress.
                with lock.acquire(timeout=0):
                    partial.unlink(missing_ok=True)
            except Timeout:
                continue

    def _prompts(self, report: DataReport, digest) -> Iterator[TokenizedPrompt]:
        if file := self.entry.tokenized_file:
            share, vocabulary = self.entry.held_out_share, Vocabulary.of(self.tokenizer)
            prompts = read_tokenized(file, self.split, share, vocabulary, self.settings, report)
        else:
            prompts = tokenize_records(self._records(report, digest), self.tokenizer, self.settings, report)
        return with_mismatched(prompts, self.settings.max_length, report) if self.settings.examples == "labels" else prompts

    def _records(self, report: DataReport, digest) -> Iterator[PreferenceRecord]:
        """The entry's records; their content is added to the digest, if any."""
        try:
            text_of = text_reader(self.tokenizer, self.settings)
            for record in load_records(self.entry, self.split, report, self.cache_dir, text_of):
                if digest is not None:
                    # What only some records have is hashed only where they have it.
                    several = [record.sft_targets] if record.sft_targets else []
                    lists = {key: values for key in (*LISTS_OF_VALUES, "tools") if (values := getattr(record, key))}
                    content = (record.prompt, record.responses, record.pairs, record.sft_target, *several)
                    digest.update(repr((*content, lists) if lists else content).encode())
                self.by_row &= record.row > 0
                yield record
        except OSError as error:
            # The loader's own files, not those of prepared data.
            raise UserError(f"datasets: {self.entry.name}: its loader cannot read its data: {error}.") from error


def _prepared_again(path: Path, error: Exception) -> str:
    """A message about a file that cannot be used."""
    if isinstance(error, OtherColumnsError):
        return f"{path} has the columns of an earlier version and is prepared again"
    return f"{path} is damaged and prepared again: {error}"


def _with_progress(prompts: Iterator[TokenizedPrompt], name: str) -> Iterator[TokenizedPrompt]:
    """The same prompts, with a progress bar on a terminal after a few seconds."""
    from tqdm import tqdm

    return tqdm(prompts, desc=f"preparing {name}", unit=" prompts", delay=5, leave=False, disable=None, mininterval=1.0)


# Instead of a version, file names of the first version contain a hash of the code that produced them. This is its last value;
# files by earlier code are prepared again.
VERSION_1_CODE = "79aded02dfe2b0ae476ddc72933eb4da"


# Those of losses that do not read margins, or need them, are named as before there were any that read what is there.
_MARGINS_KEY: dict[MarginUse, dict] = {
    "unread": {}, "optional": {"margins": "optional"}, "required": {"margins": True}, "positive": {"margins": "positive"},
}  # fmt: skip


def _settings_key(settings: TokenSettings) -> list:
    """The part of a file's key for the settings and the version of the rules.

    Pairs and targets are named as before there were other examples, so that their files are found.
    """
    values = asdict(settings)
    kind, version, margins, train_on = (values.pop(name) for name in ("examples", "version", "margins", "train_on"))
    key = {"paired": kind == "pairs"} if kind in ("pairs", "targets") else {"examples": kind}
    key |= values | ({"train_on": train_on} if kind == "targets" and train_on != TokenSettings.train_on else {})
    if version == 1:
        return [key, VERSION_1_CODE]
    return [key | {"version": version} | _MARGINS_KEY[margins]]


def tokenizer_hash(tokenizer) -> str:
    """A hash of everything that a tokenizer's ids depend on, including its chat template."""
    if tokenizer.is_fast:
        description = tokenizer.backend_tokenizer.to_str()
        # Before it come padding and truncation, which change with every call and are not used here.
        vocabulary = description[description.index('"added_tokens"') :]
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    rest = (type(tokenizer).__name__, tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template)
    return xxhash.xxh3_128_hexdigest(f"{rest} {vocabulary}".encode())


# ---- training and held-out prompts together ---------------------------------------------------------------------------------

HELD_OUT_ELSEWHERE = "the prompt is held out, in this data set or another"


def exclude_held_out(train: Prepared, held_out: Prepared, entries: Sequence[Entry], directory: Path) -> Prepared:
    """The training prompts without those that have the token ids of a held-out prompt; these are counted in the reports.

    This applies to prompts that an entry holds out by a hash: any other entry may contain the same prompt, truncation may make
    prompts equal, and of a few prompts one is held out whatever its hash. The prompts of a test split are kept, as whoever made
    it meant it: `overlap` reports which of them are trained on.
    """
    chosen = [part.prompt_hashes for entry, part, _ in _by_entry(held_out, entries) if part and entry.dataset.held_out_by_share]
    hashes = numpy.concatenate([numpy.zeros(0, numpy.uint64), *chosen])
    parts, reports = [], []
    for _, part, report in _by_entry(train, entries):
        if part and len(hashes):
            kept = ~numpy.isin(part.prompt_hashes, hashes)
            if not kept.all():
                reduced = replace(report, left_out=dict(report.left_out), num_prompts=int(kept.sum()))
                examples = numpy.concatenate([columns.num_examples for columns in part.batches])
                reduced.skip(HELD_OUT_ELSEWHERE, int(examples[~kept].sum()))
                part, report = kept_part(part, kept, directory), reduced
        parts += [part] if part and part.num_prompts else []
        reports.append(report)
    return replace(train, table=PromptTable(parts, train.table.first_row), reports=reports)


def _by_entry(prepared: Prepared, entries: Sequence[Entry]) -> Iterator[tuple[Entry, TablePart | None, DataReport]]:
    """Each entry with its part of the table (None without any prompt) and its report."""
    parts = iter(prepared.table.parts)
    for entry, report in zip(entries, prepared.reports, strict=True):
        yield entry, next(parts) if report.num_prompts else None, report


def kept_part(part: TablePart, kept: numpy.ndarray, directory: Path) -> TablePart:
    """The prompts of a part for which `kept` [N] is true, in a separate file, which is written if needed."""
    name = xxhash.xxh3_128_hexdigest(part.fingerprint.encode() + numpy.flatnonzero(~kept).astype(numpy.int64).tobytes())
    return derived_part(part, name, int(kept.sum()), lambda file: write_selected(file, part, kept), directory)


def derived_part(part: TablePart, name: str, num_prompts: int, write: Callable[[IO], None], directory: Path) -> TablePart:
    """What is made of a part, in a file of its own in `directory`: found there by its name, or written by `write`."""
    path = directory / f"{name}.arrow"
    with _writable(directory), locked(path.with_suffix(".lock"), f"{part.source}: waiting for the process that prepares it"):
        if path.exists():
            try:
                found = TablePart.of_file(path, part.source, part.weight)
                if found.num_prompts == num_prompts:
                    return found
            except (OSError, ValueError) as error:
                print(_prepared_again(path, error), flush=True)
        with atomic_file(path, "wb", durable=True) as file:
            write(file)
        return TablePart.of_file(path, part.source, part.weight)


@dataclass(frozen=True)
class Overlap:
    """Held-out prompts that are also trained on: how many of how many, and the names of one in both splits."""

    count: int
    held_out: int
    example: TokenizedPrompt
    trained: str

    def line(self, tokenizer) -> str:
        """The finding as a line of text."""
        text = shortened(tokenizer.decode(self.example.prompt_ids))
        names = f"{self.example.source} = {self.trained}"
        return f"held-out prompts that are also trained on: {self.count:,} of {self.held_out:,}, for example {text!r} ({names})"


def overlap(train: PromptTable, held_out: PromptTable) -> Overlap | None:
    """The held-out prompts with the token ids of a training prompt; None without any."""
    trained, hashes = train.prompt_hashes, held_out.prompt_hashes
    common = numpy.flatnonzero(numpy.isin(hashes, trained))
    if not len(common):
        return None
    place = int(numpy.flatnonzero(trained == hashes[common[0]])[0])
    return Overlap(len(common), len(hashes), held_out[int(common[0])], train[place].source)


def shortened(text: str, most: int = 60) -> str:
    """The end of a long text: many prompts share their beginning."""
    return text if len(text) <= most else f"...{text[-most:]}"


def count_identical_pairs(table: PromptTable) -> int:
    """How many pairs of a table have identical token ids: none, except in tables of the first version."""
    return sum(prompt.responses[i] == prompt.responses[j] for prompt in table for i, j in prompt.pairs)
