"""The entries of `datasets`: a registered name, a file, a hub set or a file of token ids, with options.

An entry is a name or a path, or a dict with either and further keys. It is validated completely before anything is loaded;
`load_records` then streams its validated records.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

from preference_training.configuration.composition import default_values
from preference_training.configuration.keys import listed
from preference_training.configuration.schema import GENERAL_CHOICES, GENERAL_KEYS, RunConfig
from preference_training.core.errors import UserError, nearest
from preference_training.data.files import content_hash, is_data_file, read_rows
from preference_training.data.hub_sets import hub_rows, load_hub
from preference_training.data.registry import DATASETS, TOKENIZED_SUFFIX, Dataset, find_dataset
from preference_training.data.rows.field_maps import FieldMap
from preference_training.data.rows.grouping import group_rows
from preference_training.data.rows.records import (
    LISTS_OF_VALUES,
    DataReport,
    Items,
    NumberedRows,
    PreferenceRecord,
    Prompt,
    item_error,
    prompt_text,
    split_by_hash,
    type_name,
)
from preference_training.data.rows.values import condition
from preference_training.losses.base import Loss
from preference_training.losses.registry import example_kind


@dataclass(frozen=True)
class UserData:
    """A user's file, hub set or local directory, read through a field map.

    The held-out split is `test_path`, `test_split`, or a share of the prompts, chosen by a hash of what the model reads.
    """

    path: str
    field_map: FieldMap = field(default_factory=FieldMap)
    held_out_share: float = 0.05
    split: str = "train"
    test_split: str | None = None
    test_path: str | None = None
    subset: str | None = None
    data_dir: str | None = None

    OPTIONS: ClassVar = ("split", "test_split", "test_path", "subset", "data_dir", "held_out_share")

    @property
    def by_hash(self) -> bool:
        """Whether both splits come from the same rows."""
        return not (self.test_path or self.test_split)

    def load(
        self,
        split: str,
        silent: bool = False,
        cache_dir: str | None = None,
        report: DataReport | None = None,
        text_of: Callable[[Prompt], str] = prompt_text,
    ) -> Items:
        """The loader. Raises UserError with file and row, also without any usable row."""
        report = report if report is not None else DataReport()
        # Both splits of a set that is split by hash read all rows: count what is skipped only once.
        counts = DataReport(report.skip_bad_rows) if self.by_hash and split == "test" else report
        place, rows = self._rows(split, cache_dir, counts)
        items = group_rows(self.field_map.map_rows(rows, place, counts), counts)
        items = self._at_least_one(items, place, counts)
        return split_by_hash(items, split, self.held_out_share, text_of) if self.by_hash else items

    def fingerprint(self, split: str, cache_dir: str | None) -> str:
        """A text that identifies the data of a split."""
        path, hub_split = self._source(split)
        is_file = is_data_file(path) or path.endswith(TOKENIZED_SUFFIX)
        source = content_hash(Path(path)) if is_file else self._hub(path, hub_split, cache_dir)._fingerprint
        by_hash = f"{split} {self.held_out_share}" if self.by_hash else ""
        return f"{source} {by_hash} {field_map_text(self.field_map)}"

    def _source(self, split: str) -> tuple[str, str]:
        held_out = split == "test"
        return (self.test_path if held_out and self.test_path else self.path), (
            self.test_split if held_out and self.test_split else self.split
        )

    def _hub(self, path: str, split: str, cache_dir: str | None):
        return load_hub(path, self.subset, self.data_dir, split, cache_dir)

    def _rows(self, split: str, cache_dir: str | None, report: DataReport) -> tuple[str, NumberedRows]:
        path, hub_split = self._source(split)
        if is_data_file(path):
            return path, read_rows(Path(path), report)
        place = f"{path} ({hub_split})"
        return place, hub_rows(self._hub(path, hub_split, cache_dir), place)

    def _at_least_one(self, items: Items, place: str, report: DataReport) -> Items:
        empty = True
        for item in items:
            empty = False
            yield item
        if empty:
            found = "; ".join(line.strip() for line in report.lines()) or "it has none"
            raise UserError(
                f"datasets: {place}: no usable row ({found}). Expected rows with chosen and rejected, and prompt unless both "
                "are dialogues, or a map of the fields: datasets=[{path: ..., prompt: ..., chosen: ..., rejected: ...}]."
            )


# The fields in every fingerprint; later additions are included only where they are set.
ALWAYS_NAMED = (
    "prompt", "chosen", "rejected", "system", "response", "score", "responses", "scores", "ranks", "implicit_prompt", "where",
    "top_k",
)  # fmt: skip


def field_map_text(field_map: FieldMap) -> str:
    """A field map as text, for fingerprints: unchanged when FieldMap gains fields that the map does not set."""
    usual = FieldMap()
    values = {item.name: getattr(field_map, item.name) for item in fields(FieldMap)}
    more = [name for name, value in values.items() if name not in ALWAYS_NAMED and value != getattr(usual, name)]
    return f"FieldMap({', '.join(f'{name}={values[name]!r}' for name in (*ALWAYS_NAMED, *more))})"


@dataclass(frozen=True)
class Entry:
    """One parsed entry of `datasets`: the source of its records, and their processing.

    options: further keyword arguments of the loader. weight: how often an epoch visits each prompt. notes: on settings without
    effect. Values that the entry does not set come from the configuration.
    """

    name: str
    dataset: Dataset
    options: dict = field(default_factory=dict)
    held_out_share: float = 0.05
    template: str | None = None
    system_prompt: str | None = None
    train_on: str | None = None
    truncation_mode: str | None = None
    on_bad_row: str | None = None
    weight: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def tokenized_file(self) -> Path | None:
        """The path of a file of token ids; None for all other entries."""
        return Path(self.name) if self.name.endswith(TOKENIZED_SUFFIX) else None

    @property
    def uses_held_out_share(self) -> bool:
        """Whether `held_out_share` decides what is held out."""
        own = getattr(self.dataset.load, "__self__", None)
        return isinstance(own, UserData) and not (own.test_path or own.test_split)

    def report(self) -> DataReport:
        """An empty report that knows whether to skip bad rows."""
        skip = self.dataset.skip_bad_rows if self.on_bad_row is None else self.on_bad_row == "skip"
        return DataReport(skip_bad_rows=skip)

    def fingerprint(self, split: str, cache_dir: str | None, trust_user_code: bool = False) -> str | None:
        """A text that identifies the records of a split, if it is known without reading them.

        It is not for a user's loader, whose code and rows may change independently, except in the first version of prepared
        data, which ignored the code (`trust_user_code`).
        """
        if self.dataset.fingerprint is None or (self.dataset.is_user_code and not trust_user_code):
            return None
        return f"{self.dataset.fingerprint(split, cache_dir, **self.options)} {self.on_bad_row}"


# Parameters of a loader that are injected, and are not keys of an entry.
INJECTED = ("report", "text_of")


def read_entry(entry, defaults: dict | None = None) -> Entry:
    """Parse one entry of `datasets`: a name or path, or a dict with `name` or `path` and further keys.

    defaults: the configuration's values of `held_out_share` and of the keys that an entry may override. Raises UserError for
    unknown names and keys, invalid values, and missing files.
    """
    defaults = defaults or {}
    given = {("path" if _is_path(entry) else "name"): entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or len({"name", "path"} & given.keys()) != 1:
        raise UserError(f"datasets: found {entry!r}, expected a name, a path, or a dict with either name or path.")
    general = {key: defaults.get(key) for key in GENERAL_KEYS if defaults.get(key) is not None}
    general |= {key: given[key] for key in GENERAL_KEYS if given.get(key) is not None}
    rest = {key: value for key, value in given.items() if key not in (*GENERAL_KEYS, "name", "path")}
    if "path" in given:
        name = str(given["path"])
        # As with the general keys, null means not set.
        rest = {key: value for key, value in rest.items() if value is not None}
        rest = {"held_out_share": defaults.get("held_out_share", 0.05)} | rest
        notes = (*_unused_token_keys(name, general), *_unused_path_keys(name, given))
        dataset = _build_dataset(name, rest)
        parsed = Entry(name, dataset, held_out_share=rest["held_out_share"], notes=notes, **general)
    else:
        name = str(given["name"])
        parsed = Entry(name, find_dataset(name), rest, **general)
        _check_options(parsed)
    _check_general(parsed)
    return parsed


def _is_path(text: str) -> bool:
    return (
        text not in DATASETS and ".py:" not in text and (is_data_file(text) or text.endswith(TOKENIZED_SUFFIX) or "/" in text)
    )


def _build_dataset(path: str, options: dict) -> Dataset:
    maps = {item.name for item in fields(FieldMap)}
    for key in options:
        if key not in maps and key not in UserData.OPTIONS:
            raise UserError(f"datasets: {path}: no key {key!r}; {nearest(str(key), [*maps, *UserData.OPTIONS, *GENERAL_KEYS])}")
    others = [key for key in options if key != "held_out_share"]
    if others and (path.endswith(TOKENIZED_SUFFIX) or str(options.get("test_path")).endswith(TOKENIZED_SUFFIX)):
        raise UserError(f"datasets: {path}: {others[0]} does not go with a file of token ids. Expected held_out_share alone.")
    _check_field_map(path, options)
    field_map = FieldMap(**{key: value for key, value in options.items() if key in maps})
    own = UserData(path, field_map, **{key: value for key, value in options.items() if key not in maps})
    for file in (own.path, own.test_path):
        if file and (is_data_file(file) or file.endswith(TOKENIZED_SUFFIX)) and not Path(file).is_file():
            found = "a directory" if Path(file).is_dir() else "no such file"
            raise UserError(f"datasets: {file}: {found}. Expected a readable file; paths are relative to {Path.cwd()}.")
    return Dataset(own.load, "keep_end", fingerprint=own.fingerprint, held_out_by_share=own.by_hash and own.held_out_share > 0)


def _unused_token_keys(path: str, general: dict) -> list[str]:
    """Notes on text settings, for a file of token ids."""
    if not path.endswith(TOKENIZED_SUFFIX):
        return []
    return [f"{key} has no effect: the file holds token ids" for key in ("template", "system_prompt") if key in general]


def _unused_path_keys(path: str, given: dict) -> list[str]:
    """Notes on keys of an entry that have no effect beside its others."""
    keys = {key for key, value in given.items() if value is not None and value is not False}
    notes = []
    if is_data_file(path):
        pointless = sorted(keys & {"split", "subset", "data_dir"}) + ["test_split"] * ("test_split" in keys)
        notes += [f"{key} has no effect: a file has no splits or subsets" for key in pointless]
    if "held_out_share" in keys and (owner := keys & {"test_path", "test_split"}):
        notes.append(f"held_out_share has no effect: {' and '.join(sorted(owner))} defines the held-out split")
    if is_data_file(str(given.get("test_path"))) and "test_split" in keys and not is_data_file(path):
        notes.append("test_split has no effect: test_path is a file")
    kind = next((key for key in ("responses", "response") if key in keys), None)
    if kind:
        others = {"chosen", "rejected", "implicit_prompt"} | ({"response", "score"} if kind == "responses" else set())
        notes += [f"{key} has no effect: responses are in {kind}" for key in sorted(keys & others)]
    return notes


def _check_field_map(path: str, options: dict) -> None:
    """Raise UserError for an inconsistent field map."""

    def require(is_valid: bool, problem: str) -> None:
        if not is_valid:
            raise UserError(f"datasets: {path}: {problem}")

    for item in fields(FieldMap):
        value = options.get(item.name)
        if item.type in (str, str | None):
            require(value is None or isinstance(value, str), f"{item.name}: found {value!r}, expected the name of a field.")
    implicit = options.get("implicit_prompt", False)
    require(isinstance(implicit, bool), f"implicit_prompt: found {implicit!r}, expected true or false.")
    for key in UserData.OPTIONS[:-1]:
        value = options.get(key)
        require(value is None or isinstance(value, str), f"{key}: found {value!r}, expected a text.")
    if options.get("responses"):
        numbers = bool(options.get("scores")) + bool(options.get("ranks"))
        require(numbers == 1, "responses needs either scores (higher is better) or ranks (lower is better).")
    for numbers, texts in (("scores", "responses"), ("ranks", "responses"), ("score", "response"), ("label", "response")):
        require(not options.get(numbers) or bool(options.get(texts)), f"{numbers} needs {texts}.")
    require(not (options.get("score") and options.get("label")), "found score and label, expected one of them.")
    for key in ("margin", "example_weight"):
        lists = next((name for name in ("responses", "response") if options.get(name)), None)
        require(not options.get(key) or not lists, f"{key} is of pairs of chosen and rejected, and responses are in {lists}.")
    top_k, where = options.get("top_k"), options.get("where", {})
    is_valid = top_k is None or (isinstance(top_k, dict) and top_k.keys() == {"column", "k"} and type(top_k["k"]) is int)
    is_valid = is_valid and (top_k is None or (top_k["k"] > 0 and isinstance(top_k["column"], str)))
    require(is_valid, f"top_k: found {top_k!r}, expected {{column: NAME, k: NUMBER}}.")
    require(isinstance(where, dict), f"where: found {where!r}, expected {{COLUMN: VALUE}}.")
    for column, value in where.items():
        require(isinstance(column, str), f"where: found the column {column!r}, expected the name of a field.")
        try:
            condition(value)
        except ValueError:
            require(
                False,
                f"where: {column}: found {value!r}, expected a value, a list of values, or a comparison such as '>= 0.5'.",
            )
    share = options.get("held_out_share", 0)
    require(isinstance(share, int | float) and 0 <= share < 1, f"held_out_share: found {share!r}, expected 0 to below 1.")


def _check_options(entry: Entry) -> None:
    known = inspect.signature(entry.dataset.load).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    own = [name for name in known if name not in ("split", "silent", "cache_dir", *INJECTED)]
    for key in entry.options:
        if key not in own:
            raise UserError(f"datasets: {entry.name}: no key {key!r}; {nearest(str(key), [*own, *GENERAL_KEYS])}")
        if known[key].annotation is float and type(entry.options[key]) not in (int, float):
            raise UserError(f"datasets: {entry.name}: {key}: found {entry.options[key]!r}, expected a number.")
        if known[key].annotation == str | None and not isinstance(entry.options[key], str | None):
            raise UserError(f"datasets: {entry.name}: {key}: found {entry.options[key]!r}, expected a text.")
    directory = entry.options.get("data_dir")
    if directory is not None and not Path(str(directory)).is_dir():
        raise UserError(f"datasets: {entry.name}: data_dir: {directory}: no such directory; relative to {Path.cwd()}.")


def _check_general(entry: Entry) -> None:
    for key, known in GENERAL_CHOICES.items():
        value = getattr(entry, key)
        if value is not None and value not in known:
            raise UserError(f"datasets: {entry.name}: {key}: found {value!r}; {nearest(str(value), known)}")
    if type(entry.weight) not in (int, float) or not 0 < entry.weight < float("inf"):
        raise UserError(f"datasets: {entry.name}: weight: found {entry.weight!r}, expected a number above 0.")
    if entry.system_prompt is not None and not isinstance(entry.system_prompt, str):
        raise UserError(f"datasets: {entry.name}: system_prompt: found {entry.system_prompt!r}, expected a text.")


# The keys of a loader's record; others are reported as not read.
RECORD_KEYS = {"responses", "pairs", "sft_target", "sft_targets", "tools", *LISTS_OF_VALUES}


def load_records(
    entry: Entry,
    split: str,
    report: DataReport | None = None,
    cache_dir: str | None = None,
    text_of: Callable[[Prompt], str] = prompt_text,
) -> Iterator[PreferenceRecord]:
    """Yield every validated `PreferenceRecord` of one split ("train" or "test") of an entry.

    Invalid records go to the report; without one they raise UserError with data set and record. text_of: returns the text that
    decides which prompts are held out, see `split_by_hash`.
    """
    report = report if report is not None else entry.report()
    given = dict(zip(INJECTED, (report, text_of), strict=True))
    options = entry.options | {
        key: given[key] for key in inspect.signature(entry.dataset.load).parameters.keys() & given.keys()
    }
    items = entry.dataset.load(split, silent=False, cache_dir=cache_dir, **options)
    if not isinstance(items, Iterable):
        raise UserError(
            f"datasets: {entry.name}: the loader gave {type_name(items)}, expected a dict or (prompt, record) one by one."
        )
    for number, item in enumerate(items.items() if isinstance(items, dict) else items, start=1):
        source = f"{entry.name}, {split} prompt {number}"
        if problem := item_error(item):
            expected = "Expected {responses, pairs, sft_target} as in preference_datasets.py."
            report.bad_row(UserError(f"datasets: {source}: {problem}. {expected}"))
            continue
        prompt, record = item
        pairs = [(int(chosen), int(rejected)) for chosen, rejected in record["pairs"]]
        targets = tuple(record.get("sft_targets", ()))
        values = [None if record.get(key) is None else list(record[key]) for key in LISTS_OF_VALUES]
        for key in record.keys() - RECORD_KEYS:
            report.not_read(str(key))
        texts = list(record["responses"]), pairs, record["sft_target"]
        yield PreferenceRecord(prompt, *texts, number, source, targets, *values, tools=record.get("tools", ""))


def read_entries(config: RunConfig) -> list[Entry]:
    """Parse `datasets`: a list of entries, or a single one. Raises UserError."""
    # User-defined loaders receive parts of it, and may modify them.
    entries = copy.deepcopy(listed(config.datasets))
    if not isinstance(config.datasets, list | str | dict) or not entries:
        raise UserError(f"datasets: found {config.datasets!r}, expected at least one data set, for example [hh,shp].")
    defaults = {key: getattr(config, key) for key in (*GENERAL_CHOICES, "system_prompt", "held_out_share")}
    read = [read_entry(entry, defaults) for entry in entries]
    return [replace(entry, notes=(*entry.notes, *_unused_run_settings(config, entry))) for entry in read]


def check_examples(entries: Iterable[Entry], loss: Loss, name: str) -> None:
    """Raise UserError where the fields of a file or hub set cannot give what a loss trains on."""
    for entry in entries:
        if isinstance(own := getattr(entry.dataset.load, "__self__", None), UserData) and (
            problem := _lacks(own.field_map, entry.tokenized_file is not None, loss)
        ):
            raise UserError(f"datasets: {entry.name}: loss={name} {problem}")


def _lacks(of: FieldMap, has_token_ids: bool, loss: Loss) -> str | None:
    """What the rows of a field map lack for a loss, as a sentence after its name, or None."""
    scored = of.responses or of.score
    found = "labeled responses" if of.label else "single responses without a score or label"
    if loss.examples == "rankings" and of.response and not scored:
        return (
            f"learns rankings, and the rows have {found}. Expected responses with scores or ranks, response with score, or "
            "chosen and rejected."
        )
    if loss.examples == "labels" and of.response and not (scored or of.label):
        return f"learns from labels, and the rows have {found}. Expected response with label: COLUMN, or pairs."
    if loss.examples == "pairs" and of.label:
        return f"compares pairs, and the rows have {found}. Expected chosen and rejected, or a loss of labels such as kto."
    if loss.needs_margins and not (scored or of.margin):
        found = "token ids" if has_token_ids else f"{of.chosen} and {of.rejected} alone"
        return (
            f"reads the margin of each pair, and the rows have {found}. Expected a column of margins, margin: COLUMN, or "
            "responses with scores."
        )
    return None


def _unused_run_settings(config: RunConfig, entry: Entry) -> list[str]:
    """Notes on changed settings of the run without effect on an entry, and on data that its loss does not read."""
    notes, usual = [], default_values()
    if entry.dataset.sft_note and example_kind(config.loss.name) == "targets":
        notes.append(entry.dataset.sft_note)
    drops = (entry.truncation_mode or entry.dataset.truncation_mode) == "drop"
    if config.max_prompt_length != usual["max_prompt_length"] and drops:
        notes.append("max_prompt_length has no effect: truncation_mode=drop truncates nothing")
    if config.held_out_share != usual["held_out_share"] and not entry.uses_held_out_share:
        notes.append("held_out_share has no effect: the data set defines its held-out split")
    return notes
