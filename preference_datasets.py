"""The registry of data sets, and its loaders: a name becomes prompts, responses, pairs and SFT targets, all text.

A loader is a function `(split, silent=False, cache_dir=None)` registered under a name. It returns a dict from prompt to

    {"responses": list[str], "pairs": list[tuple[int, int]], "sft_target": str}

where a pair holds the indices of the preferred and of the dispreferred response (and `sft_targets`, a list, may name several
responses for SFT to learn in place of sft_target), or yields `(prompt, record)` one by one
when the data does not fit in memory. To add one, write the function, here or in a file of your own:

    @register("my_data")
    def get_my_data(split, silent=False, cache_dir=None): ...

Further keyword parameters of a loader are keys that its entry may have: `datasets=[{name: my_data, language: en}]`; one called
`report` is given the `DataReport` that counts what is left out, one called `text_of` a function from a prompt to the text that
the model reads of it, for a split by a hash. Heavy libraries are imported where they are used, so that
names can be checked before anything is loaded.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Real
from pathlib import Path

from data_files import DATA_SUFFIXES
from html_text import html_to_text
from prompt_templates import ASSISTANT, HUMAN, parse_dialogue
from records import (
    EMPTY_TEXT,
    SAME_TEXT,
    DataReport,
    Items,
    Prompt,
    Records,
    Row,
    Turn,
    add_responses,
    group_rows,
    kind_of,
    new_record,
    prompt_text,
    scored_record,
    split_by_hash,
)
from row_mapping import FieldMap, NumberedRows, RowError, value_of
from toy_preferences import toy_records
from utils import UserError, first_line, in_workers, nearest, run_file


@dataclass(frozen=True)
class Dataset:
    """A loader, and what its data needs.

    truncation_mode is the end of a prompt that matters; skip_bad_rows is for public sets, whose rows are not the user's to
    mend; fingerprint says in advance, as a short text, what the loader will give for a split: None where only loading tells.
    about_sft is said where loss=sft learns less than all preferred answers, and one might expect them all.
    held_out_by_share: a share of its prompts is held out by their hash, and no test split of its own. of_user: the loader is
    code of the user's, which may change without its data.
    """

    load: Callable[..., Records | Items]
    truncation_mode: str = "keep_start"
    skip_bad_rows: bool = False
    fingerprint: Callable[..., str] | None = None
    about_sft: str | None = None
    held_out_by_share: bool = False
    of_user: bool = False


DATASETS: dict[str, Dataset] = {}

# Files of token ids, which have no texts.
TOKENISED_SUFFIX = ".pt"


def register(name: str, truncation_mode: str = "keep_start"):
    """Make a loader known as `name`. Dialogues want `truncation_mode="keep_end"`: their last turn is what is answered."""

    def decorator(load):
        DATASETS[name] = Dataset(load, truncation_mode)
        return load

    return decorator


# ---- rows of the hub ----------------------------------------------------------------------------------------------------


@cache
def load_hub(path: str, subset: str | None, data_dir: str | None, split: str, cache_dir: str | None):
    """One split of a set of the hub, or of a local directory in the same layout.

    Raises UserError where it cannot be loaded: no network and nothing cached, no such split, damaged files.
    """
    import datasets

    try:
        return datasets.load_dataset(path, subset, data_dir=data_dir, split=split, cache_dir=cache_dir)
    except Exception as error:  # a dozen types: of networks, damaged files, scripts, YAML
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"datasets: {path} (split {split}) could not be loaded: {reason}. Expected a data set of the hub, and a network "
            "or a copy in the hub library's cache; or the path of a local directory with its files ({name: hh, data_dir: ...})."
        ) from error


def hub_rows(dataset, place: str) -> NumberedRows:
    """(row number, row) of a loaded hub set, numbered from 1. Raises UserError naming `place` for damaged values."""
    number = 0
    try:
        for batch in dataset.with_format("arrow").iter(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except Exception as error:  # half a dozen types: of texts that are not UTF-8, of dates that are none
        raise UserError(f"datasets: {place}, after row {number}: cannot be read, or damaged: {error}.") from error


KINDS = {str: "a text", Real: "a number", list: "a list"}


def sound_rows(rows: NumberedRows, place: str, report: DataReport, kinds: dict[str, type]) -> Iterator[dict]:
    """The rows whose fields have values of these kinds; others go to the report. A name with dots leads into each list item."""
    for number, row in rows:
        report.rows_read += 1
        try:
            for name, kind in kinds.items():
                value = value_of(row, name)
                wrong = [item for item in (value if "." in name else [value]) if not isinstance(item, kind)]
                if wrong:
                    raise RowError(f"field {name!r} is {kind_of(wrong[0])}, expected {KINDS[kind]}.")
        except RowError as fault:
            report.bad_row(UserError(f"datasets: {place}, row {number}: {fault}"))
        else:
            yield row


@dataclass(frozen=True)
class HubSet:
    """Where a named data set lies on the hub, the fields that are read, and which of its splits are ours.

    Without a test split of its own, `held_out_share` of the prompts are held out, and at least one.
    """

    path: str
    fields: tuple[str, ...]
    train: str = "train"
    test: str | None = None
    held_out_share: float = 0.01

    def load(self, split: str, cache_dir: str | None, data_dir: str | None, subset: str | None = None):
        """The hub's split that `split` ("train" or "test") is taken from. `subset` is a folder of the set."""
        hub_split = self.test if split == "test" and self.test else self.train
        folder = str(Path(data_dir) / (subset or "")) if data_dir else self.path
        loaded = load_hub(folder, None, None if data_dir else subset, hub_split, cache_dir)
        missing = [name for name in self.fields if name not in loaded.column_names]
        if missing:
            raise UserError(
                f"datasets: {folder}, split {hub_split}: no field {', '.join(missing)}; it has "
                f"{', '.join(loaded.column_names)}. Expected the fields of {self.path}: {', '.join(self.fields)}."
            )
        return loaded


def hub_set(name: str, hub: HubSet, truncation_mode: str = "keep_start", about_sft: str | None = None):
    """Register a function `(rows, report, *, options)` → items as the loader of a set of the hub."""

    def decorator(items_of):
        def load(
            split,
            silent=False,
            cache_dir=None,
            data_dir=None,
            report=None,
            text_of=prompt_text,
            subset: str | None = None,
            **options,
        ):
            counts = report if report is not None else DataReport(skip_bad_rows=True)
            loaded = hub.load(split, cache_dir, data_dir, subset)
            items = items_of(hub_rows(loaded, f"{name} ({split})"), counts, **options)
            items = items.items() if isinstance(items, dict) else items
            yield from items if hub.test else split_by_hash(items, split, hub.held_out_share, text_of)
            if report is None and not silent:
                for line in counts.lines():
                    print(f"{name} {split}: {line}", flush=True)

        def fingerprint(split, cache_dir, data_dir=None, subset=None, **options):
            return f"{hub.load(split, cache_dir, data_dir, subset)._fingerprint} {sorted(options.items())}"

        load.__doc__ = f"{items_of.__doc__} Hub: {hub.path}; `data_dir` is a local copy, `subset` a folder of the set."
        # What an entry may say: the parameters of both.
        own = list(inspect.signature(load).parameters.values())[:-1]
        extra = [p for p in inspect.signature(items_of).parameters.values() if p.kind is p.KEYWORD_ONLY]
        load.__signature__ = inspect.Signature([*own, *extra])
        DATASETS[name] = Dataset(load, truncation_mode, True, fingerprint, about_sft, held_out_by_share=not hub.test)
        return items_of

    return decorator


# The set is small enough that all rows of a prompt are brought together, however far apart they are.
WHOLE_SET = sys.maxsize


# ---- named sets ---------------------------------------------------------------------------------------------------------

HH = HubSet("Anthropic/hh-rlhf", ("chosen", "rejected"), test="test")


LAST_ROW = "loss=sft learns one answer to each prompt, its last row's, as the original code (a file of the same rows gives all)"


@hub_set("hh", HH, truncation_mode="keep_end", about_sft=LAST_ROW)
def hh_records(rows: NumberedRows, report: DataReport) -> Items:
    """Anthropic's helpful and harmless dialogues. Subsets: harmless-base, helpful-base, helpful-online, ...

    SFT learns one answer to a prompt, its last row's, as in the original code, so that runs compare with it.
    """
    for prompt, record in group_rows(FieldMap().rows_of(rows, "hh", report, known=True), report, WHOLE_SET):
        record.pop("sft_targets", None)
        yield prompt, record


HH_FOLDERS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def _hh_folder(name: str) -> Dataset:
    hh = DATASETS["hh"]
    return replace(hh, load=partial(hh.load, subset=name), fingerprint=partial(hh.fingerprint, subset=name))


DATASETS |= {f"hh-{name}": _hh_folder(name) for name in HH_FOLDERS}


SHP = HubSet("stanfordnlp/SHP", ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"), test="test")
SHP_KINDS = {"history": str, "human_ref_A": str, "human_ref_B": str, "score_A": Real, "score_B": Real}


@hub_set("shp", SHP)
def shp_records(rows: NumberedRows, report: DataReport, *, min_score_ratio: float = 2.0) -> Records:
    """Stanford human preferences: pairs whose better score is at least `min_score_ratio` times the other.

    Scores below 1 count as 1, so that a comment without votes is neither a division by zero nor infinitely worse. The SFT
    target is the response with the highest score.
    """
    records: Records = {}
    best: dict[str, int] = {}
    for row in sound_rows(rows, "shp", report, SHP_KINDS):
        scores = [max(1, row["score_A"]), max(1, row["score_B"])]
        if max(scores) / min(scores) < min_score_ratio:
            report.leave_out(f"the scores' ratio is below {min_score_ratio:g}")
            continue
        if not (row["human_ref_A"].strip() and row["human_ref_B"].strip()):
            report.leave_out(EMPTY_TEXT)
            continue
        responses = (f" {row['human_ref_A']}", f" {row['human_ref_B']}")
        if responses[0] == responses[1]:
            report.leave_out(SAME_TEXT)
            continue
        prompt = f"{HUMAN} {row['history']}{ASSISTANT}"
        record = records.setdefault(prompt, new_record())
        add_responses(record, responses, [(0, 1) if row["labels"] == 1 else (1, 0)])
        for response, score in zip(responses, scores, strict=True):
            if score > best.get(prompt, 0):
                best[prompt], record["sft_target"] = score, response
    return records


STACK_EXCHANGE = HubSet("HuggingFaceH4/stack-exchange-preferences", ("question", "answers"))
STACK_EXCHANGE_KINDS = {"question": str, "answers": list, "answers.text": str, "answers.pm_score": Real}


@hub_set("se", STACK_EXCHANGE)
def stack_exchange_records(rows: NumberedRows, report: DataReport) -> Items:
    """StackExchange: every pair of answers to a question whose scores differ, as plain text. The best is the SFT target.

    Answers with equal scores form no pair, and a question without any pair is left out; both are counted. Nothing is kept
    between questions, so millions of them stream through; their HTML is read by as many processes as there are cores.
    """
    sound = sound_rows(rows, "se", report, STACK_EXCHANGE_KINDS)
    for question, texts, scores in in_workers(_texts_of_question, sound):
        kept = [(f" {text}", score) for text, score in zip(texts, scores, strict=True) if text]
        report.leave_out(EMPTY_TEXT, len(texts) - len(kept))
        record = scored_record([text for text, _ in kept], [score for _, score in kept], report)
        if record:
            yield f"{HUMAN} {question}{ASSISTANT}", record


def _texts_of_question(row: dict) -> tuple[str, list[str], list[int]]:
    """A question and its answers as plain text, and the answers' scores."""
    texts = [html_to_text(answer["text"]) for answer in row["answers"]]
    return html_to_text(row["question"]), texts, [answer["pm_score"] for answer in row["answers"]]


LEETCODE = HubSet("minfeng-ai/leetcode_preference", ("description", "version1", "version2", "preference"))


@hub_set("leetcode", LEETCODE)
@hub_set("lc", LEETCODE)
def leetcode_records(rows: NumberedRows, report: DataReport) -> Items:
    """LeetCode problems with two solutions, of which a person preferred one: `preference` 0 is version1, 1 is version2.

    Problems nobody has labelled are left out and counted.
    """

    def usable() -> Iterator[Row]:
        for _, row in rows:
            report.rows_read += 1
            # A CSV with blanks holds the labels as floats, or as text.
            label = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}.get(str(row["preference"]).strip())
            texts = [str(row[name] or "").strip() for name in ("description", "version1", "version2")]
            if label is None:
                report.leave_out("nobody has labelled the row")
            elif not all(texts):
                report.leave_out(EMPTY_TEXT)
            else:
                yield Row((Turn("user", texts[0]),), texts[1:], [(label, 1 - label)], label)

    return group_rows(usable(), report, WHOLE_SET)


ULTRAFEEDBACK = HubSet(
    "HuggingFaceH4/ultrafeedback_binarized", ("prompt", "chosen", "rejected"), train="train_prefs", test="test_prefs"
)


@hub_set("ultrafeedback", ULTRAFEEDBACK)
def ultrafeedback_records(rows: NumberedRows, report: DataReport) -> Items:
    """UltraFeedback, binarized: conversations, the preferred answer scored higher by GPT-4."""
    return group_rows(FieldMap().rows_of(rows, "ultrafeedback", report, known=True), report, WHOLE_SET)


ORCA = HubSet("Intel/orca_dpo_pairs", ("system", "question", "chosen", "rejected"))


@hub_set("orca", ORCA)
def orca_records(rows: NumberedRows, report: DataReport) -> Items:
    """Orca's questions with a system prompt: a larger model's answer against a smaller one's."""
    return group_rows(FieldMap(prompt="question", system="system").rows_of(rows, "orca", report, known=True), report, WHOLE_SET)


NECTAR = HubSet("berkeley-nest/Nectar", ("prompt", "answers"))


@hub_set("nectar", NECTAR, truncation_mode="keep_end")
def nectar_records(rows: NumberedRows, report: DataReport) -> Items:
    """Nectar: seven ranked answers to each dialogue, and all 21 pairs between them."""
    fields_of = FieldMap(responses="answers.answer", ranks="answers.rank")
    mapped = fields_of.rows_of(rows, "nectar", report, known=True)
    return group_rows((row._replace(prompt=_as_turns(row.prompt)) for row in mapped), report)


def _as_turns(prompt: Prompt) -> tuple[Turn, ...]:
    return (parse_dialogue(prompt) or (Turn("user", prompt),)) if isinstance(prompt, str) else prompt


@register("toy")
def get_toy(split: str, silent: bool = False, cache_dir: str | None = None) -> Records:
    """The generated preferences of `toy_preferences.py`; no prompt of the test split is in the train split."""
    return toy_records(split)


# ---- finding a data set by its name ---------------------------------------------------------------------------------------


def find_dataset(name: str) -> Dataset:
    """The data set of a registered name or of `FILE.py:NAME`. Raises UserError for a name that is neither."""
    if name in DATASETS:
        return DATASETS[name]
    if ".py:" in name:
        return _dataset_of_user_file(*name.rsplit(":", 1))
    raise UserError(
        f"datasets: unknown data set {name!r}; {nearest(name, DATASETS)} "
        f"A file must end in one of {', '.join(DATA_SUFFIXES)} or {TOKENISED_SUFFIX}; a set of the hub is ORGANISATION/NAME; "
        "a loader of your own is FILE.py:NAME."
    )


@cache
def _run_user_file(path: Path) -> dict[str, Dataset]:
    """Run a Python file, once. Returns what it registers, apart from the registry: two files may use the same name."""
    known = dict(DATASETS)
    try:
        run_file(path, "data")
        return {name: dataset for name, dataset in DATASETS.items() if known.get(name) is not dataset}
    finally:
        DATASETS.clear()
        DATASETS.update(known)


def _dataset_of_user_file(file: str, name: str) -> Dataset:
    path = Path(file).absolute()
    if not path.is_file():
        raise UserError(f"datasets: {file}: no such file. Expected a Python file that registers {name!r}.")
    registered = _run_user_file(path)
    if name not in registered:
        hint = nearest(name, registered) if registered else "it registers none at all."
        raise UserError(f"datasets: {file} registers no data set {name!r}; {hint}")
    return replace(registered[name], of_user=True)
