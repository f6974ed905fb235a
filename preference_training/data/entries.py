"""The entries of `datasets`: a registered name, a file, a hub set or a file of token ids, with options.

An entry is a name or a path, or a dict with either and further keys. It is validated completely before anything is loaded;
`load_records` then streams its validated records.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args, get_origin

from preference_training.configuration.composition import default_values
from preference_training.configuration.keys import listed
from preference_training.configuration.schema import GENERAL_CHOICES, GENERAL_KEYS, RunConfig
from preference_training.core.errors import UserError, nearest
from preference_training.data.records.record import PreferenceRecord, Prompt, prompt_text
from preference_training.data.records.report import DataReport
from preference_training.data.records.validation import LISTS_OF_VALUES, ROLES, item_error, type_name
from preference_training.data.registry import DATASETS, TOKENIZED_SUFFIX, Dataset, find_dataset
from preference_training.data.rows.field_maps import FieldMap
from preference_training.data.rows.nearest_entry import with_nearest
from preference_training.data.rows.values import has_field, listed_names
from preference_training.data.sources.filters import Where, where_error
from preference_training.data.sources.locations import check_location, is_location, options_without_effect
from preference_training.data.sources.storage import expanded
from preference_training.data.sources.user_data import UserData
from preference_training.losses.base import Loss
from preference_training.losses.registry import example_kind


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
    def user_data(self) -> UserData | None:
        """The user's rows; None for named sets and loaders."""
        own = getattr(self.dataset.load, "__self__", None)
        return own if isinstance(own, UserData) else None

    @property
    def uses_held_out_share(self) -> bool:
        """Whether `held_out_share` decides what is held out."""
        return self.user_data is not None and self.user_data.by_hash

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
        known = self.dataset.fingerprint(split, cache_dir, **self.options)
        return known and f"{known} {self.on_bad_row}"


# Parameters of a loader that are injected, and are not keys of an entry.
INJECTED = ("report", "text_of")


def read_entry(entry, defaults: dict | None = None) -> Entry:
    """Parse one entry of `datasets`: a name or path, or a dict with `name` or `path` and further keys.

    defaults: the configuration's values of `held_out_share` and of the keys that an entry may override. Raises UserError for
    unknown names and keys, invalid values, and missing files.
    """
    defaults = defaults or {}
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or len({"name", "path"} & given.keys()) != 1:
        raise UserError(f"datasets: found {entry!r}, expected a name, a path, or a dict with either name or path.")
    if is_path(str(given.get("name", ""))):
        given = {("path" if key == "name" else key): value for key, value in given.items()}
    general = {key: defaults.get(key) for key in GENERAL_KEYS if defaults.get(key) is not None}
    general |= {key: given[key] for key in GENERAL_KEYS if given.get(key) is not None}
    rest = {key: value for key, value in given.items() if key not in (*GENERAL_KEYS, "name", "path")}
    if "path" in given:
        name = expanded(str(given["path"]))
        # As with the general keys, null means not set.
        rest = {key: value for key, value in rest.items() if value is not None}
        rest = {"held_out_share": defaults.get("held_out_share", 0.05)} | rest
        dataset = _build_dataset(name, rest)
        notes = (*_unused_token_keys(name, general), *_unused_path_keys(name, given))
        parsed = Entry(name, dataset, held_out_share=rest["held_out_share"], notes=notes, **general)
    else:
        name = str(given["name"])
        rest |= {"data_dir": expanded(rest["data_dir"])} if isinstance(rest.get("data_dir"), str) else {}
        parsed = Entry(name, find_dataset(name), rest, **general)
        _check_options(parsed)
    _check_general(parsed)
    return parsed


def is_path(text: str) -> bool:
    """Whether an entry is a path, not a name."""
    return text not in DATASETS and ".py:" not in text and (text.endswith(TOKENIZED_SUFFIX) or is_location(text))


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
    own = replace(own, test_path=own.test_path and expanded(own.test_path))
    for location in filter(None, (own.path, own.test_path)):
        check_location(location)
    if "test_split" in options_without_effect(path, own.test_path, options):
        own = replace(own, test_split=None)
    return Dataset(own.load, "keep_end", fingerprint=own.fingerprint, held_out_by_share=own.by_hash and own.held_out_share > 0)


def _unused_token_keys(path: str, general: dict) -> list[str]:
    """Notes on text settings, for a file of token ids."""
    if not path.endswith(TOKENIZED_SUFFIX):
        return []
    keys = [key for key in ("template", "system_prompt") if key in general]
    keys += ["train_on"] if general.get("train_on") == "last_turn" else []
    return [f"{key} has no effect: the file holds token ids" for key in keys]


def _unused_path_keys(path: str, given: dict) -> list[str]:
    """Notes on keys of an entry that have no effect beside its others."""
    keys = {key for key, value in given.items() if value is not None and value is not False}
    notes = []
    pointless = options_without_effect(path, given.get("test_path") and expanded(given["test_path"]), keys)
    notes += [f"{key} has no effect: {reason}" for key, reason in pointless.items()]
    if "held_out_share" in keys and (owner := keys & {"test_path", "test_split"} - pointless.keys()):
        defined = f"{' and '.join(sorted(owner))} define{'s' * (len(owner) == 1)}"
        notes.append(f"held_out_share has no effect: {defined} the held-out split")
    kind = next((key for key in ANSWER_KEYS if key in keys), None)
    if kind:
        others = {"chosen", "rejected", "implicit_prompt", *ANSWER_KEYS[ANSWER_KEYS.index(kind) + 1 :]}
        others |= set() if kind == "response" else {"score"}
        others |= {"prompt", "history"} if kind in ("text", "messages") else set()
        notes += [f"{key} has no effect: responses are in {kind}" for key in sorted(keys & others)]
    return notes


# The keys of a field map that say where responses are, besides chosen and rejected; of several the first counts.
ANSWER_KEYS = ("text", "messages", "responses", "answers", "response")
# Of a field map, what names no columns, or is looked at elsewhere.
NO_COLUMNS = ("implicit_prompt", "where", "top_k", "roles")


def _are_names(value) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(name, str) for name in value)


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
        value, is_switch = options.get(key), key == "streaming"
        is_valid = value is None or isinstance(value, bool if is_switch else str)
        require(is_valid, f"{key}: found {value!r}, expected {'true or false' if is_switch else 'a text'}.")
    if options.get("responses"):
        numbers = bool(options.get("scores")) + bool(options.get("ranks"))
        require(numbers == 1, "responses needs either scores (higher is better) or ranks (lower is better).")
    for key in ("responses", "scores", "ranks", "answers"):
        value = options.get(key)
        is_valid = value is None or isinstance(value, str) or _are_names(value)
        require(is_valid, f"{key}: found {value!r}, expected the name of a field, or names of fields.")
    require(not _are_names(options.get("answers")) or len(options["answers"]) == 2, "answers: expected two fields, or a list.")
    require(bool(options.get("answers")) == bool(options.get("better")), "answers and better go together.")
    better = options.get("better")
    is_valid = isinstance(better, str | None) or (
        isinstance(better, dict) and len(better) == 1 and all(isinstance(v, list) and len(v) == 2 for v in better.values())
    )
    require(is_valid, f"better: found {better!r}, expected COLUMN, or {{COLUMN: [VALUE OF THE FIRST, VALUE OF THE SECOND]}}.")
    needs = {"scores": ["responses"], "ranks": ["responses"], "score": ["response"], "label": ["response", "messages"]}
    for numbers, texts in needs.items():
        require(not options.get(numbers) or any(map(options.get, texts)), f"{numbers} needs {' or '.join(texts)}.")
    require(not (options.get("score") and options.get("label")), "found score and label, expected one of them.")
    for key in ("margin", "example_weight"):
        lists = next((name for name in ANSWER_KEYS if options.get(name)), None)
        require(not options.get(key) or not lists, f"{key} is of pairs of chosen and rejected, and responses are in {lists}.")
    roles = options.get("roles")
    is_valid = isinstance(roles, dict) and roles and all(isinstance(name, str) and of in ROLES for name, of in roles.items())
    require(roles is None or is_valid, f"roles: found {roles!r}, expected {{NAME: ROLE}}, with the roles {', '.join(ROLES)}.")
    top_k, where = options.get("top_k"), options.get("where", {})
    is_valid = top_k is None or (isinstance(top_k, dict) and top_k.keys() == {"column", "k"} and type(top_k["k"]) is int)
    is_valid = is_valid and (top_k is None or (top_k["k"] > 0 and isinstance(top_k["column"], str)))
    require(is_valid, f"top_k: found {top_k!r}, expected {{column: NAME, k: NUMBER}}.")
    problem = where_error(where)
    require(problem is None, f"where: {problem}")
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
        _check_option(entry, key, known[key])
    directory = entry.options.get("data_dir")
    if directory is not None and not Path(str(directory)).is_dir():
        raise UserError(f"datasets: {entry.name}: data_dir: {directory}: no such directory; relative to {Path.cwd()}.")


def _check_option(entry: Entry, key: str, parameter: inspect.Parameter) -> None:
    """Raise UserError where the value of a named set's key is not of its parameter's type."""
    value, kind = entry.options[key], parameter.annotation
    problem = None
    if kind is float and type(value) not in (int, float):
        problem = f"found {value!r}, expected a number."
    elif kind == int | None and value is not None and (type(value) is not int or value < 1):
        problem = f"found {value!r}, expected a whole number of at least 1."
    elif kind == str | None and not isinstance(value, str | None):
        problem = f"found {value!r}, expected a text."
    elif get_origin(kind) is Literal and value not in get_args(kind):
        problem = f"found {value!r}; {nearest(str(value), get_args(kind))}"
    elif kind == Where | None and value is not None:
        problem = where_error(value)
    if problem:
        raise UserError(f"datasets: {entry.name}: {key}: {problem}")


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
RECORD_KEYS = {"responses", "pairs", "sft_target", "sft_targets", "tools", "rows", *LISTS_OF_VALUES}


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
    own = entry.user_data
    for number, item in enumerate(items.items() if isinstance(items, dict) else items, start=1):
        source = f"{entry.name}, {split} prompt {number}"
        if problem := item_error(item):
            expected = "Expected {responses, pairs, sft_target} as in preference_datasets.py."
            report.bad_row(UserError(f"datasets: {source}: {problem}. {expected}"))
            continue
        prompt, record = item
        rows = record.get("rows") if own else None
        if rows:
            source = own.source_of(rows, split)
        # Rows of several files have names instead of numbers.
        row = rows[0] if rows and type(rows[0]) is int else 0
        pairs = [(int(chosen), int(rejected)) for chosen, rejected in record["pairs"]]
        texts = list(record["responses"]), pairs, record["sft_target"]
        more = _optional(record, report) if len(record) > 3 else {}
        yield PreferenceRecord(prompt, *texts, number, source, **more, row=row)


def _optional(record: dict, report: DataReport) -> dict:
    """What a loader's record has besides what it must have."""
    for key in record.keys() - RECORD_KEYS:
        report.not_read(str(key))
    values = {key: None if record.get(key) is None else list(record[key]) for key in LISTS_OF_VALUES}
    return {"sft_targets": tuple(record.get("sft_targets", ())), "tools": record.get("tools", "")} | values


def read_entries(config: RunConfig) -> list[Entry]:
    """Parse `datasets`: a list of entries, or a single one. Raises UserError."""
    # User-defined loaders receive parts of it, and may modify them.
    entries = copy.deepcopy(listed(config.datasets))
    if not isinstance(config.datasets, list | str | dict) or not entries:
        raise UserError(f"datasets: found {config.datasets!r}, expected at least one data set, for example [hh,shp].")
    defaults = {key: getattr(config, key) for key in (*GENERAL_CHOICES, "system_prompt", "held_out_share")}
    read = [read_entry(entry, defaults) for entry in entries]
    return [replace(entry, notes=(*entry.notes, *_unused_run_settings(config, entry))) for entry in read]


def check_examples(entries: Iterable[Entry], loss: Loss, name: str, cache_dir: str | None = None) -> None:
    """Raise UserError where the rows of a file or hub set cannot give what a loss trains on."""
    for entry in entries:
        if (own := entry.user_data) is None:
            continue
        has_token_ids = entry.tokenized_file is not None
        rows = [] if has_token_ids else own.first_rows("train", cache_dir)
        of = own.field_map if has_token_ids else own.field_map.found_in(rows)
        if problem := rows and _missing_column(own.field_map, rows):
            raise UserError(f"datasets: {entry.name}: {problem}")
        if problem := _lacks(of, has_token_ids, loss) or (rows and _no_answers(of, rows, loss)):
            raise UserError(f"datasets: {entry.name}: loss={name} {problem}")


def _missing_column(given: FieldMap, rows: Sequence[dict]) -> str | None:
    """The first key of a user's field map that names what none of the rows has, as a sentence; None where all have some."""
    usual = FieldMap()
    for item in fields(FieldMap):
        value = getattr(given, item.name)
        if value == getattr(usual, item.name) or item.name in NO_COLUMNS:
            continue
        for name in filter(None, value if isinstance(value, list | dict) else [value]):
            if not any(has_field(row, name) for row in rows):
                columns = list(dict.fromkeys(str(column) for row in rows for column in row))
                near = get_close_matches(name.lower(), columns, n=1)
                hint = f"; did you mean {near[0]}?" if near else "."
                return (
                    f"{item.name}: no row has a column {name!r}, the columns are {', '.join(columns)}{hint} Change "
                    f"{item.name} in the field map, or leave it out, so that it is looked for."
                )
    return None


def _no_answers(of: FieldMap, rows: Sequence[dict], loss: Loss) -> str | None:
    """What rows in which nothing is compared, and nothing found, lack for a loss that compares; None where that is not so."""
    answers = {name for name in listed_names(of.rejected) for name in (of.chosen, name)}
    if loss.examples not in ("pairs", "rankings") or any(getattr(of, key) for key in ANSWER_KEYS):
        return None
    nearest = with_nearest("", rows[0])
    if any(has_field(row, name) for row in rows for name in answers) or not re.search(r"\b(text|response): ", nearest):
        return None
    columns = dict.fromkeys(str(column) for row in rows for column in row)
    return (
        f"compares answers, and the rows have the columns {', '.join(columns)}, none of them known to hold chosen or rejected "
        "ones. Expected chosen and rejected, or a map of the fields: datasets=[{path: ..., chosen: COLUMN, rejected: COLUMN}]. "
        "Texts or single answers alone are what loss=sft learns."
    )


def _lacks(of: FieldMap, has_token_ids: bool, loss: Loss) -> str | None:
    """What rows lack for a loss, as a sentence after its name, or None."""
    if of.messages or of.text:
        kind = f"conversations in {of.messages}" if of.messages else f"plain text in {of.text}"
        found = "labeled conversations" if of.label else f"{kind}, which nothing is compared with"
    else:
        kind = f"labeled ({of.label})" if of.label else "without a score or label"
        found = f"single responses ({of.response}) {kind}"
    single = of.messages or of.text or of.response
    scored = of.responses or of.score
    if loss.examples == "rankings" and single and not scored:
        return (
            f"learns rankings, and the rows have {found}. Expected responses with scores or ranks, response with score, or "
            "chosen and rejected."
        )
    if loss.examples == "labels" and single and not (scored or of.label):
        return f"learns from labels, and the rows have {found}. Expected response with label: COLUMN, or pairs."
    if loss.examples == "pairs" and single == FieldMap.chosen and not scored:
        return "compares pairs, and the rows have chosen answers alone: rejected is missing. Expected chosen and rejected."
    if loss.examples == "pairs" and single and not scored:
        column = of.label if of.label and of.response else "COLUMN"
        losses = "loss=sft, or a loss of labels such as kto" if of.label else "loss=sft"
        return (
            f"compares pairs, and the rows have {found}. Expected chosen and rejected, or several responses to a prompt, each "
            f"with a score (score: {column}; true is above false). Otherwise use {losses}."
        )
    if loss.needs_margins and not (scored or of.margin):
        columns = getattr(of, "columns", ()) or (of.chosen, of.rejected)
        found = "token ids" if has_token_ids else f"the columns {', '.join(columns)}, none of them known to hold margins"
        return (
            f"reads the margin of each pair, and the rows have {found}. Expected a column of margins, margin: COLUMN, or "
            "responses with scores."
        )
    return None


def _unused_run_settings(config: RunConfig, entry: Entry) -> list[str]:
    """Notes on changed settings of the run without effect on an entry, and on data that its loss does not read."""
    notes, usual, kind = [], default_values(model=config.origin.preset), example_kind(config.loss.name)
    if entry.dataset.sft_note and kind == "targets":
        notes.append(entry.dataset.sft_note)
    if (entry.train_on or config.train_on) == "last_turn" and kind != "targets" and entry.tokenized_file is None:
        notes.append(f"train_on has no effect: loss={config.loss.name} trains on {kind}, and it is of SFT")
    drops = (entry.truncation_mode or entry.dataset.truncation_mode) == "drop"
    if config.max_prompt_length != (usual["max_prompt_length"] or config.max_length // 2) and drops:
        notes.append("max_prompt_length has no effect: truncation_mode=drop truncates nothing")
    if config.held_out_share != usual["held_out_share"] and not entry.uses_held_out_share:
        notes.append("held_out_share has no effect: the data set defines its held-out split")
    return notes
