"""Each data set tokenised once: streamed from its loader into an Arrow file, found again by what it depends on.

A file's name is a hash of the data's content, of the tokenizer, of the settings that shape token ids, and of the code that
does. Processes that prepare the same data at once (the ranks of a run, the jobs of a sweep) wait for the first of them, however
long it takes. A file appears under its name when it is whole, never before.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import xxhash

from dataset_entries import Entry, load_records
from prompt_table import PromptTable, TablePart, write_columns
from records import DataReport, PreferenceRecord
from tokenization import TokenizedPrompt, TokenSettings, read_tokenised, tokenize_records
from utils import UserError, locked, rare_garbage_collection

# The code that decides what token ids come of a text; another version of it is another file.
SHAPING_MODULES = (
    "records", "data_files", "prompt_templates", "conversations", "unread_columns", "repeated_prompts",
    "row_mapping", "html_text", "preference_datasets", "dataset_entries",
    "tokenization", "prompt_table", "data_preparation",
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """The prompts of one split over all entries, and one report for each entry."""

    table: PromptTable
    reports: list[DataReport]


def prepare(
    entries: Sequence[Entry],
    split: str,
    tokenizer,
    settings: Callable[[Entry], TokenSettings],
    directory: Path,
    cache_dir: str | None = None,
    first_row: int = 0,
) -> Prepared:
    """The tokenised prompts of one split ("train" or "test"), from `directory` where they have been prepared before.

    settings gives what each entry's token ids depend on; cache_dir is the hub library's. Responses are numbered from
    `first_row` on. Raises UserError for data that cannot be used, and where the disk does not take what is written.
    """
    parts, reports = [], []
    vocabulary = tokenizer_hash(tokenizer)
    for entry in entries:
        work = _Preparation(entry, split, tokenizer, vocabulary, settings(entry), directory, cache_dir)
        with rare_garbage_collection():
            part, report = work.result()
        if part is not None:
            parts.append(part)
        # Not kept with the data, which does not depend on settings that have no effect.
        reports.append(replace(report, notes=[*entry.notes, *report.notes]) if split == "train" else report)
    return Prepared(PromptTable(parts, first_row), reports)


class _Preparation:
    """One entry and split: the file it is found in, or is written to."""

    def __init__(
        self,
        entry: Entry,
        split: str,
        tokenizer,
        vocabulary: str,
        settings: TokenSettings,
        directory: Path,
        cache_dir: str | None,
    ):
        self.entry, self.split, self.tokenizer, self.settings = entry, split, tokenizer, settings
        self.directory, self.cache_dir = directory, cache_dir
        known = entry.fingerprint(split, cache_dir)
        # Where only loading tells what the data is, the name ends with a hash of the records.
        self.content_is_known = known is not None
        depends_on = [entry.name, known, entry.report().skip_bad_rows, split, vocabulary, asdict(settings)]
        self.key = xxhash.xxh3_128_hexdigest(json.dumps([*depends_on, _code_hash()], sort_keys=True).encode())

    def result(self) -> tuple[TablePart | None, DataReport]:
        """The whole file, mapped, None where it has no prompt, and the report. Prepares it if need be."""
        waiting = f"{self.entry.name}: waiting for the process that prepares it"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with locked(self.directory / f"{self.key}.lock", waiting):
                return self._find() or self._make()
        except OSError as error:
            raise UserError(
                f"local_dirs: prepared data cannot be kept in {self.directory}: {error.strerror or error}. Expected a folder "
                "that can be written to, with room for the token ids. Make room, or name another one with local_dirs."
            ) from error

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
        """What lies under a name; None where it is not there, or damaged."""
        path = self.directory / f"{name}.arrow"
        try:
            report = DataReport(**json.loads(path.with_suffix(".json").read_text()))
            if path.exists():
                part = self._map(path)
                if sum(len(columns.numbers) for columns in part.batches) != report.num_prompts:
                    raise ValueError("its report counts other prompts")
                return part, report
            return (None, report) if report.num_prompts == 0 else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            print(f"{self.entry.name}: {path} is damaged and prepared anew: {error}", flush=True)
            return None

    def _map(self, path: Path) -> TablePart:
        """A whole file as a part of the run's table."""
        what = "row" if self.entry.tokenised_file else f"{self.split} prompt"
        return TablePart.of_file(path, f"{self.entry.name}, {what}", self.entry.weight if self.split == "train" else 1.0)

    def _make(self) -> tuple[TablePart | None, DataReport]:
        """Write the file beside its place, then rename it."""
        self._sweep()
        report = self.entry.report()
        digest = None if self.content_is_known else xxhash.xxh3_128()
        partial = self.directory / f"{self.key}.partial"
        side = partial.with_suffix(".json.partial")
        try:
            with partial.open("wb") as file:
                report.num_prompts = write_columns(file, _with_progress(self._prompts(report, digest), self.entry.name))
                file.flush()
                os.fsync(file.fileno())
            name = self.key if digest is None else f"{self.key}-{digest.hexdigest()}"
            path = self.directory / f"{name}.arrow"
            # The report first: the data's presence says that both are there.
            side.write_text(json.dumps(report.as_dict()))
            side.replace(path.with_suffix(".json"))
            if report.num_prompts == 0:
                return None, report
            partial.replace(path)
            return self._map(path), report
        finally:
            partial.unlink(missing_ok=True)
            side.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what killed preparations have left, whatever they were preparing."""
        from filelock import FileLock, Timeout

        for partial in self.directory.glob("*.partial"):
            lock = FileLock(self.directory / f"{partial.name.split('.')[0]}.lock")
            try:
                # This process holds its own key's lock; another's that cannot be had is being prepared.
                with lock.acquire(timeout=0):
                    partial.unlink(missing_ok=True)
            except Timeout:
                continue

    def _prompts(self, report: DataReport, digest) -> Iterator[TokenizedPrompt]:
        if file := self.entry.tokenised_file:
            share = self.entry.held_out_share
            vocabulary, eos = len(self.tokenizer), self.tokenizer.eos_token_id
            return read_tokenised(file, self.split, share, vocabulary, eos, self.settings, report)
        return tokenize_records(self._records(report, digest), self.tokenizer, self.settings, report)

    def _records(self, report: DataReport, digest) -> Iterator[PreferenceRecord]:
        """The entry's records; where there is a digest, their content is added to it as they pass."""
        try:
            for record in load_records(self.entry, self.split, report, self.cache_dir):
                if digest is not None:
                    several = (record.sft_targets,) if record.sft_targets else ()
                    content = (record.prompt, record.responses, record.pairs, record.sft_target, *several)
                    digest.update(repr(content).encode())
                yield record
        except OSError as error:
            # Of the loader's own files: nothing that another folder for prepared data would mend.
            raise UserError(f"datasets: {self.entry.name}: its loader cannot read its data: {error}.") from error


def _with_progress(prompts: Iterator[TokenizedPrompt], name: str) -> Iterator[TokenizedPrompt]:
    """The same prompts, with a bar on a terminal where it takes longer than a few seconds."""
    from tqdm import tqdm

    return tqdm(prompts, desc=f"preparing {name}", unit=" prompts", delay=5, leave=False, disable=None, mininterval=1.0)


def tokenizer_hash(tokenizer) -> str:
    """Hash of all that a tokenizer's ids depend on, its chat template included."""
    if tokenizer.is_fast:
        description = tokenizer.backend_tokenizer.to_str()
        # What stands before that is padding and truncation, which change with every call and are not used here.
        vocabulary = description[description.index('"added_tokens"') :]
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    rest = (type(tokenizer).__name__, tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template)
    return xxhash.xxh3_128_hexdigest(f"{rest} {vocabulary}".encode())


@cache
def _code_hash() -> str:
    digest = xxhash.xxh3_128()
    for module in SHAPING_MODULES:
        digest.update((Path(__file__).parent / f"{module}.py").read_bytes())
    return digest.hexdigest()
