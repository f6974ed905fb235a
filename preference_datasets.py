"""The registry of data sets, and its loaders: a name becomes prompts, responses, pairs and SFT targets, all text.

A loader is a function `(split, silent=False, cache_dir=None)` registered under a name. It returns a dict from prompt to

    {"responses": list[str], "pairs": list[tuple[int, int]], "sft_target": str}

where a pair holds the indices of the preferred and of the dispreferred response, or yields `(prompt, record)` one by one
when the data does not fit in memory. To add one, write the function, here or in a file of your own:

    @register("my_data")
    def get_my_data(split, silent=False, cache_dir=None): ...

Heavy libraries are imported where they are used, so that the names can be checked before anything is loaded.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from numbers import Integral
from pathlib import Path

from data_files import DATA_SUFFIXES, is_data_file, read_rows
from toy_preferences import toy_records
from utils import UserError, nearest

Records = dict[str, dict]


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt with all that is known about it, and where it came from.

    `pairs[k]` holds the indices into `responses` of the preferred and the dispreferred response. `truncation_mode` is the
    data set's own wish (keep_start or keep_end), `source` names it in messages.
    """

    prompt: str
    responses: list[str]
    pairs: list[tuple[int, int]]
    sft_target: str
    truncation_mode: str
    source: str


@dataclass(frozen=True)
class Dataset:
    """A loader and which end of a prompt matters to it."""

    load: Callable[..., Records | Iterable[tuple[str, dict]]]
    truncation_mode: str


DATASETS: dict[str, Dataset] = {}


def register(name: str, truncation_mode: str = "keep_start"):
    """Make a loader known as `name`. Dialogues want `truncation_mode="keep_end"`: their last turn is what is answered."""

    def decorator(load):
        DATASETS[name] = Dataset(load, truncation_mode)
        return load

    return decorator


def find_dataset(name: str, held_out_share: float = 0.05) -> Dataset:
    """The data set of a registered name, of a path, or of `FILE.py:NAME`.

    Raises UserError for a name that is none of these, and for files that are not there.
    """
    if name in DATASETS:
        return DATASETS[name]
    if ".py:" in name:
        return _dataset_of_user_file(*name.rsplit(":", 1))
    if is_data_file(name):
        if not Path(name).is_file():
            found = "a directory" if Path(name).is_dir() else "no such file"
            raise UserError(f"datasets: {name}: {found}. Expected a readable file; paths are relative to {Path.cwd()}.")
        return Dataset(partial(get_file, Path(name), held_out_share), "keep_end")
    raise UserError(
        f"datasets: unknown data set {name!r}; {nearest(name, DATASETS)} "
        f"A file must end in one of {', '.join(DATA_SUFFIXES)}; a loader of your own is FILE.py:NAME."
    )


@cache
def _run_user_file(path: Path) -> dict[str, Dataset]:
    """Run a Python file, once. Returns what it registers, apart from the registry: two files may use the same name."""
    known = dict(DATASETS)
    # A name of its own, so that a file called utils.py hides no module; dataclasses look their module up in sys.modules.
    spec = importlib.util.spec_from_file_location(f"user_data_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
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
    return registered[name]


def load_records(name: str, split: str, held_out_share: float = 0.05, silent: bool = False, cache_dir: str | None = None):
    """Yield every checked `PreferenceRecord` of one split ("train" or "test") of a data set.

    Raises UserError, naming data set and record, for a record that is not in the form of the module's docstring.
    """
    dataset = find_dataset(name, held_out_share)
    records = dataset.load(split, silent=silent, cache_dir=cache_dir)
    if not isinstance(records, Iterable):
        raise UserError(f"datasets: {name}: the loader gave {_kind(records)}, expected a dict or (prompt, record) one by one.")
    for number, item in enumerate(records.items() if isinstance(records, dict) else records, start=1):
        source = f"{name}, {split} prompt {number}"
        fault = _fault_of(item)
        if fault:
            raise UserError(
                f"datasets: {source}: {fault}. Expected {{responses, pairs, sft_target}} as in preference_datasets.py."
            )
        prompt, record = item
        pairs = [(int(chosen), int(rejected)) for chosen, rejected in record["pairs"]]
        yield PreferenceRecord(prompt, list(record["responses"]), pairs, record["sft_target"], dataset.truncation_mode, source)


def _fault_of(item) -> str | None:
    """What is wrong with one (prompt, record) a loader gave, or None."""
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], dict):
        found = " and ".join(map(_kind, item)) if isinstance(item, tuple) else _kind(item)
        return f"found {found}, expected a prompt and a dict"
    prompt, record = item
    missing = {"responses", "pairs", "sft_target"} - record.keys()
    if missing:
        return f"the record has no {', '.join(sorted(missing))}"
    for key in ("responses", "pairs"):
        if not isinstance(record[key], list | tuple):
            return f"{key} is {_kind(record[key])}, expected a list"
    responses = {f"response {index}": text for index, text in enumerate(record["responses"])}
    for what, text in {"the prompt": prompt, **responses, "sft_target": record["sft_target"]}.items():
        if fault := fault_of_text(text):
            return f"{what} {fault}"
    return next((fault for pair in record["pairs"] if (fault := _fault_of_pair(pair, len(responses)))), None)


def _fault_of_pair(pair, count: int) -> str | None:
    if not isinstance(pair, list | tuple) or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in pair):
        return f"pair {pair!r} is not two whole numbers"
    if len(pair) != 2 or not all(0 <= index < count for index in pair) or pair[0] == pair[1]:
        return f"pair {tuple(pair)} does not name two of the {count} responses"
    return None


def fault_of_text(value) -> str | None:
    """What is wrong with a value that should be a text, as the end of a sentence, or None."""
    if not isinstance(value, str):
        return f"is {_kind(value)}, expected a text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair ({value[error.start]!a} at character {error.start}), which is not text"
    return None


def _kind(value) -> str:
    return "None" if value is None else type(value).__name__


# ---- building records -------------------------------------------------------------------------------------------------


def add_pair(records: Records, prompt: str, responses: tuple[str, str], preferred: int) -> bool:
    """Add two responses to a prompt's record, and the pair in which `responses[preferred]` wins.

    A response the prompt already has is not stored twice. Returns False, and adds nothing, where both are the same text.
    The SFT target is left to the caller.
    """
    if responses[0] == responses[1]:
        return False
    record = records.setdefault(prompt, {"responses": [], "pairs": [], "sft_target": None})
    indices = []
    for response in responses:
        if response not in record["responses"]:
            record["responses"].append(response)
        indices.append(record["responses"].index(response))
    record["pairs"].append((indices[preferred], indices[1 - preferred]))
    return True


def say_left_out(silent: bool, source: str, reasons: dict[str, int]) -> None:
    """One line that counts the rows a loader could not use, by reason."""
    if not silent and any(reasons.values()):
        listed = "; ".join(f"{count} because {reason}" for reason, count in reasons.items() if count)
        print(f"{source}: rows left out: {listed}.", flush=True)


# ---- dialogues: chosen and rejected share a prompt that ends in "\n\nAssistant:" ------------------------------------------

ASSISTANT = "\n\nAssistant:"
SAME_TEXT = "chosen and rejected are the same"
OTHER_PROMPT = "chosen and rejected answer different prompts"


def split_dialogue(dialogue: str) -> tuple[str, str]:
    """Cut an HH dialogue behind its last "\\n\\nAssistant:": (prompt with that marker, last answer).

    Raises ValueError where there is no such turn.
    """
    at = dialogue.rindex(ASSISTANT) + len(ASSISTANT)
    return dialogue[:at], dialogue[at:]


def records_from_dialogues(rows: Iterable[dict], source: str = "hh", silent: bool = True) -> Records:
    """Records of rows with `chosen` and `rejected` dialogues, whose prompts are all but the last answer."""
    records: Records = {}
    left_out = {OTHER_PROMPT: 0, SAME_TEXT: 0}
    for row in rows:
        prompt, chosen = split_dialogue(row["chosen"])
        if not row["rejected"].startswith(prompt):
            left_out[OTHER_PROMPT] += 1
        elif add_pair(records, prompt, (chosen, row["rejected"][len(prompt) :]), preferred=0):
            records[prompt]["sft_target"] = chosen
        else:
            left_out[SAME_TEXT] += 1
    say_left_out(silent, source, left_out)
    return records


@register("hh", truncation_mode="keep_end")
def get_hh(split: str, silent: bool = False, cache_dir: str | None = None) -> Records:
    """Anthropic's helpful and harmless dialogues (hub: Anthropic/hh-rlhf; fields chosen, rejected)."""
    return records_from_dialogues(_load_hub("Anthropic/hh-rlhf", split, cache_dir), f"hh {split}", silent)


def _load_hub(path: str, split: str, cache_dir: str | None):
    """One split of a hub data set. Raises UserError where the hub cannot be reached and nothing is cached."""
    import datasets

    try:
        return datasets.load_dataset(path, split=split, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"datasets: the hub's {path} could not be loaded: {str(error).strip().splitlines()[0]} "
            "Without a network, pass the path of a local copy, for example 'datasets=[hh.jsonl.gz]'."
        ) from error


# ---- SHP: two comments on one post, with scores -------------------------------------------------------------------------


def records_from_shp(rows: Iterable[dict], source: str = "shp", silent: bool = True, min_score_ratio: float = 2.0) -> Records:
    """Records of SHP rows: pairs whose better score is at least `min_score_ratio` times the other.

    Scores below 1 count as 1, so that a comment without votes is neither a division by zero nor infinitely worse. The SFT
    target is the response with the highest score.
    """
    records: Records = {}
    best: dict[str, int] = {}
    few_votes, same = f"the scores' ratio is below {min_score_ratio:g}", SAME_TEXT
    left_out = {few_votes: 0, same: 0}
    for row in rows:
        scores = [max(1, row["score_A"]), max(1, row["score_B"])]
        if max(scores) / min(scores) < min_score_ratio:
            left_out[few_votes] += 1
            continue
        prompt = f"\n\nHuman: {row['history']}{ASSISTANT}"
        responses = (f" {row['human_ref_A']}", f" {row['human_ref_B']}")
        if not add_pair(records, prompt, responses, preferred=0 if row["labels"] == 1 else 1):
            left_out[same] += 1
            continue
        for response, score in zip(responses, scores, strict=True):
            if score > best.get(prompt, 0):
                best[prompt], records[prompt]["sft_target"] = score, response
    say_left_out(silent, source, left_out)
    return records


@register("shp")
def get_shp(split: str, silent: bool = False, cache_dir: str | None = None) -> Records:
    """Stanford human preferences (hub: stanfordnlp/SHP; history, human_ref_A/B, score_A/B, labels: 1 means A is better)."""
    return records_from_shp(_load_hub("stanfordnlp/SHP", split, cache_dir), f"shp {split}", silent)


# ---- StackExchange: several scored answers to one question, in HTML -------------------------------------------------------


EQUAL_SCORES = "two answers have equal scores"
SAME_ANSWER = "an answer has the text of another one"
NO_PAIR = "the question has no two answers with different scores"


def records_from_stack_exchange(rows: Iterable[dict], source: str = "se", silent: bool = True) -> Iterator[tuple[str, dict]]:
    """Yield a record per StackExchange question: every pair of answers whose scores differ, as plain text.

    Answers with equal scores form no pair, and a question without any pair is left out; both are counted. The SFT target is
    the answer with the highest score. Nothing is kept between questions, so millions of them stream through.
    """
    left_out = dict.fromkeys((EQUAL_SCORES, SAME_ANSWER, NO_PAIR), 0)
    for row in rows:
        answers = {f" {html_to_text(answer['text'])}": answer["pm_score"] for answer in row["answers"]}
        scores = list(answers.values())
        order = combinations(range(len(scores)), 2)
        ranked = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in order if scores[i] != scores[j]]
        left_out[EQUAL_SCORES] += len(scores) * (len(scores) - 1) // 2 - len(ranked)
        left_out[SAME_ANSWER] += len(row["answers"]) - len(answers)
        if not ranked:
            left_out[NO_PAIR] += 1
            continue
        prompt = f"\n\nHuman: {html_to_text(row['question'])}{ASSISTANT}"
        yield prompt, {"responses": list(answers), "pairs": ranked, "sft_target": max(answers, key=answers.__getitem__)}
    say_left_out(silent, source, left_out)


def html_to_text(html: str) -> str:
    """A post's HTML as text: paragraphs, headings, lists and quotes apart by an empty line, code inside <code> tags.

    Links keep their text, list items begin with "- ", quoted lines with "> ".
    """
    from bs4 import BeautifulSoup

    return "\n\n".join(_text_blocks(BeautifulSoup(html, "html.parser")))


BLOCKS = ["p", "pre", "ul", "ol", "blockquote", "div", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "table"]


def _text_blocks(element) -> list[str]:
    """The non-empty blocks of text below `element`, in order."""
    blocks, inline = [], ""
    for child in element.children:
        if child.name not in BLOCKS:
            inline += _inline_text(child)
            continue
        blocks, inline = [*blocks, inline.strip()], ""
        if child.name == "pre":
            blocks.append(f"<code>{child.get_text().rstrip()}</code>")
        elif child.name in ("ul", "ol"):
            blocks.append("\n".join(_list_items(child)))
        elif child.name == "blockquote":
            blocks.append("\n".join(f"> {line}" for line in "\n\n".join(_text_blocks(child)).splitlines()))
        else:
            blocks += _text_blocks(child)
    return [block for block in [*blocks, inline.strip()] if block]


def _list_items(element) -> Iterator[str]:
    """The items of a list, further lines indented; a list that stands directly in a list belongs to the item before it."""
    for child in element.children:
        if child.name in ("ul", "ol"):
            yield "\n".join(f"  {line}" for item in _list_items(child) for line in item.split("\n"))
        elif child.name is not None:
            yield "- " + "\n".join(_text_blocks(child)).replace("\n", "\n  ")


def _inline_text(element) -> str:
    """The text of an element inside a paragraph, with inline code in <code> tags and line breaks kept."""
    if element.name is None:
        # A comment is not text; its class is a subclass of the text node's.
        return str(element) if type(element).__name__ == "NavigableString" else ""
    if element.name == "code":
        return f"<code>{element.get_text()}</code>"
    return "\n" if element.name == "br" else "".join(map(_inline_text, element.children))


@register("se")
def get_se(split: str, silent: bool = False, cache_dir: str | None = None) -> Iterator[tuple[str, dict]]:
    """StackExchange (hub: HuggingFaceH4/stack-exchange-preferences; question, answers: text, pm_score); 1% is held out."""
    rows = _load_hub("HuggingFaceH4/stack-exchange-preferences", "train", cache_dir)
    part = (row for row in rows if is_held_out(row["question"], 0.01) == (split == "test"))
    return records_from_stack_exchange(part, f"se {split}", silent)


# ---- files of the user's ------------------------------------------------------------------------------------------------


def prompt_hash(prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt's text alone: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out `share` of its data set."""
    return prompt_hash(prompt) < share


def get_file(path: Path, held_out_share: float, split: str, silent: bool = False, cache_dir: str | None = None) -> Records:
    """A file of dialogues (`chosen`, `rejected`) or triplets (`prompt`, `chosen`, `rejected`), told apart row by row.

    The held-out share is chosen by a hash of the prompt; where a file of two prompts or more would hold none out, the
    prompt with the smallest hash is. Raises UserError naming file and row.
    """
    records: Records = {}
    left_out = {OTHER_PROMPT: 0, SAME_TEXT: 0}
    for number, row in read_rows(path):
        prompt, chosen, rejected = _prompt_and_responses(path, number, row)
        if rejected is None:
            left_out[OTHER_PROMPT] += 1
        elif add_pair(records, prompt, (chosen, rejected), preferred=0):
            records[prompt]["sft_target"] = chosen
        else:
            left_out[SAME_TEXT] += 1
    if not records:
        raise UserError(
            f"datasets: {path}: no usable row. Expected rows with chosen and rejected, and prompt unless both are dialogues."
        )
    if split == "train":
        say_left_out(silent, str(path), left_out)
    held_out = {prompt for prompt in records if is_held_out(prompt, held_out_share)}
    if not held_out and held_out_share > 0 and len(records) > 1:
        held_out = {min(records, key=prompt_hash)}
    return {prompt: record for prompt, record in records.items() if (prompt in held_out) == (split == "test")}


def _prompt_and_responses(path: Path, number: int, row: dict) -> tuple[str, str, str | None]:
    """Prompt, chosen and rejected response of a row; rejected is None where the dialogues answer different prompts."""
    needed = [field for field in ("prompt", "chosen", "rejected") if field != "prompt" or "prompt" in row]
    for field in needed:
        if field not in row:
            fault = f"no field {field!r}, the row has {', '.join(row) or 'no fields'}"
        else:
            wrong = fault_of_text(row[field])
            fault = wrong and f"field {field!r} {wrong}"
        if fault:
            raise UserError(
                f"datasets: {path}, row {number}: {fault}. "
                "Expected texts in chosen and rejected, and in prompt unless both are dialogues."
            )
    if "prompt" in row:
        return row["prompt"], row["chosen"], row["rejected"]
    try:
        prompt, chosen = split_dialogue(row["chosen"])
    except ValueError:
        raise UserError(
            f"datasets: {path}, row {number}: chosen has no '\\n\\nAssistant:' turn. "
            "Expected a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns, or a field prompt beside chosen and rejected."
        ) from None
    return prompt, chosen, row["rejected"][len(prompt) :] if row["rejected"].startswith(prompt) else None


@register("toy")
def get_toy(split: str, silent: bool = False, cache_dir: str | None = None) -> Records:
    """The generated preferences of `toy_preferences.py`; no prompt of the test split is in the train split."""
    return toy_records(split)
