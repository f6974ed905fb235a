"""Find the format of rows from the columns of the first of them, so that common formats need no field map.

Found are the keys of a field map: where the answers are, where the prompt is, and what else belongs to it.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from preference_training.data.rows.column_names import (
    CHOSEN_REJECTED,
    CONVERSATIONS,
    LABEL_NAMES,
    LISTED_SCORES,
    LISTED_TEXTS,
    LISTS,
    NUMBERED,
    PROMPTS,
    RANKS,
    RESPONSES,
    SCORES,
    SINGLE_SCORES,
    SUFFIXES,
    SYSTEMS,
    TOOLS,
    TRUE_IF_GOOD,
    TWO_ANSWERS,
    VERDICTS,
    Columns,
    plain,
)
from preference_training.data.rows.conversations import RowError, ends_with_answer, parse_serialized_turns, turn_keys
from preference_training.data.rows.prompt_fields import CONTEXT, INSTRUCTIONS, QUESTIONS, SECOND_PARTS, is_system, may_be_prompt
from preference_training.data.rows.templates import ASSISTANT
from preference_training.data.rows.values import (
    LABELS,
    comparable,
    is_finite_number,
    is_text_pair,
    is_tie,
    label_word,
    parse_text_list,
    verdict_values,
    verdict_word,
)

Keys = dict[str, object]


class Found(NamedTuple):
    """The keys of a field map, as found in rows, and what they say in words; no keys if nothing fits."""

    keys: Keys
    words: str


@dataclass(frozen=True)
class PublicVerdicts:
    """Columns of a public set with two answers, and how it says which one is better."""

    answers: tuple[str, str]
    better: str | None = None
    values: tuple = ()
    scores: tuple[str, str] | None = None


PUBLIC = (
    # WebGPT, LMSYS arena, SHP, PKU-SafeRLHF, HelpSteer2 and 3
    PublicVerdicts(("answer_0", "answer_1"), scores=("score_0", "score_1")),
    PublicVerdicts(("response_a", "response_b"), scores=("winner_model_a", "winner_model_b")),
    PublicVerdicts(("human_ref_A", "human_ref_B"), "labels", (1, 0)),
    PublicVerdicts(("response_0", "response_1"), "better_response_id", (0, 1)),
    PublicVerdicts(("response_1", "response_2"), "preference_strength", ("< 0", "> 0")),
    PublicVerdicts(("response1", "response2"), "overall_preference", ("< 0", "> 0")),
)


def find(rows: list[dict], given: Keys) -> Found:
    """The format of rows. given: keys that are not searched for. No keys are found where nothing fits."""
    columns = Columns(rows)
    answers = given.keys() & {"chosen", "rejected", "response", "responses", "answers", "messages", "text"}
    found = Found({}, "") if answers else _answers(columns, "prompt" in given)
    if found is None:
        return Found({}, "")
    keys = dict(found.keys)
    words = [found.words] * bool(found.words)
    together = {**keys, **given}
    if isinstance(together.get("better"), str):
        keys["better"] = _resolved_verdict(columns, together["answers"], together["better"])
    if not together.keys() & {"messages", "text"}:
        if "prompt" not in given and not given.get("implicit_prompt"):
            prompt, said = _prompt(columns, together, can_lack=not answers)
            keys |= prompt
            words += [said] * bool(said)
        together = {**keys, **given}
    for key, said in (*_beside_prompt(columns, together), *_of_pairs(columns, together)):
        if key not in given:
            keys[key] = said
            words.append(f"{WORDS[key]} in `{said}`")
    is_usual = keys == {"chosen": "chosen", "rejected": "rejected"}
    return Found(keys, "" if is_usual else ", ".join(words))


WORDS = {
    "system": "system prompts", "tools": "tools", "history": "earlier turns", "margin": "margins", "example_weight": "weights",
}  # fmt: skip


# ---- answers --------------------------------------------------------------------------------------------------------------


def _answers(columns: Columns, has_prompt: bool) -> Found | None:
    # A conversation that ends with the answer is no prompt of the text beside it, such as the number it comes to.
    whole = not has_prompt and _ends_with_answers(columns)
    last = (_conversations,) if whole else (_single, _conversations, _text)
    rules = (_records, _pairs, _public_verdicts, _lists, _verdicts, _ordered_list, *last)
    return next((found for rule in rules if (found := rule(columns))), None)


def _ends_with_answers(columns: Columns) -> bool:
    """Whether the column that would be the prompt has conversations, all of which end with the assistant's turn."""
    name = columns.get(*PROMPTS, *CONVERSATIONS)
    return name in map(columns.get, CONVERSATIONS) and columns.all(name, ends_with_answer)


def _records(columns: Columns) -> Found | None:
    """Rows that are records, as the labeling app exports them: also those without a pair, or without a target, are."""
    has_all = "responses" in columns.values and {"pairs", "sft_target"} <= columns.names
    if not has_all or not columns.all("responses", _holds_list):
        return None
    return Found(
        {"responses": "responses", "ranks": "ranks", "records": True}, "records of `responses`, `pairs` and `sft_target`"
    )


def _pairs(columns: Columns) -> Found | None:
    found = next((both for names in CHOSEN_REJECTED if (both := columns.both(names))), None)
    if found and any(verdict_values(columns.values[found[0]], answers) for answers, _ in two_answers(columns)):
        return None  # The names of two columns, of which the first is the better one.
    chosen, *rejected = found or [columns.get("chosen") or ""]
    if chosen and (not found or plain(rejected[0]) == "rejected"):
        rejected += sorted(
            (name for name in columns.values if NUMBERED.fullmatch(plain(name)) and not columns.all(name, is_finite_number)),
            key=lambda name: int(plain(name).removeprefix("rejected")),
        )
    if not chosen or not rejected:
        return None
    keys = {"chosen": chosen, "rejected": rejected if len(rejected) > 1 else rejected[0]}
    return Found(keys, f"pairs in `{'` and `'.join([chosen, *rejected])}`")


def _public_verdicts(columns: Columns) -> Found | None:
    for of in PUBLIC:
        answers = columns.both(of.answers)
        said = f"two answers in `{'` and `'.join(answers or ())}`"
        if not answers:
            continue
        if of.scores and (scores := columns.both(of.scores)):
            return Found({"responses": answers, "scores": scores}, f"{said}, scores in `{'` and `'.join(scores)}`")
        if of.better and (better := columns.get(of.better)):
            return Found(
                {"answers": answers, "better": {better: list(of.values)}}, _verdict_words(columns, answers, better, of.values)
            )
    if (answers := columns.get("summaries")) and (text := columns.inner(answers, LISTED_TEXTS)) and "choice" in columns.values:
        better = {"choice": [0, 1]}
        return Found({"answers": text, "better": better}, f"two answers in `{text}`, the better one's index in `choice`")
    return None


def _verdict_words(columns: Columns, answers: list[str], better: str, values: Iterable) -> str:
    """What the values of a verdict mean, as the rows write them."""
    written = {verdict_word(value): comparable(value) for value in reversed(columns.values[better])}

    def shown(value) -> str:
        if not isinstance(value, list):
            return str(value)
        return next((written[word] for word in map(verdict_word, value) if word in written), str(value[0]))

    meaning = ", ".join(f"{shown(value)} is `{name}`" for value, name in zip(values, answers, strict=True))
    return f"two answers in `{'` and `'.join(answers)}`, the better one in `{better}` ({meaning})"


def _lists(columns: Columns) -> Found | None:
    for name in filter(None, map(columns.get, LISTS)):
        if not columns.all(name, _holds_list):
            continue
        text = columns.inner(name, LISTED_TEXTS)
        inside = {"scores": LISTED_SCORES, "ranks": RANKS}
        beside = {"scores": SCORES, "ranks": RANKS}
        for key in inside:
            numbers = columns.inner(name, inside[key], some=True) if text else None
            numbers = numbers or next((n for n in map(columns.get, beside[key]) if columns.all(n, _holds_list)), None)
            if numbers:
                return Found({"responses": text or name, key: numbers}, f"answers in `{text or name}`, {key} in `{numbers}`")
    return None


def _holds_list(value) -> bool:
    """Whether a value is a list, or the text of one, as in CSV files."""
    return isinstance(parse_text_list(value), list)


def _verdicts(columns: Columns) -> Found | None:
    for answers, suffixes in two_answers(columns):
        for better in filter(None, map(columns.get, VERDICTS)):
            values = verdict_values(columns.values[better], answers) or _named_models(columns, better, suffixes)
            # Labels of 1 may mean the first answer, as SHP's do, or the second.
            if values and not (values == [[0], [1]] and plain(better) in ("label", "labels")):
                return Found({"answers": answers, "better": {better: values}}, _verdict_words(columns, answers, better, values))
        for stem in ("score", "rating", "reward"):
            scores = columns.both(f"{stem}_{suffix}" for suffix in suffixes)
            if scores and all(columns.all(name, is_finite_number) for name in scores):
                words = f"two answers in `{'` and `'.join(answers)}`, scores in `{'` and `'.join(scores)}`"
                return Found({"responses": answers, "scores": scores}, words)
    return None


def _named_models(columns: Columns, better: str, suffixes: tuple[str, str]) -> list[str] | None:
    """The columns of the two models' names, if a verdict is the name of one of them."""
    models = columns.both(f"model_{suffix}" for suffix in suffixes) or ()
    names = {name for model in models for name in columns.values[model] if isinstance(name, str)}
    return list(models) if names and columns.all(better, lambda value: str(value) in names or is_tie(value)) else None


def two_answers(columns: Columns) -> Iterator[tuple[list[str], tuple[str, str]]]:
    """Pairs of columns whose names differ in a last letter or number, with that."""
    for stem, suffixes in product(TWO_ANSWERS, SUFFIXES):
        if answers := columns.both(f"{stem}_{suffix}" for suffix in suffixes):
            yield answers, suffixes


def _ordered_list(columns: Columns) -> Found | None:
    """LLaMA-Factory's older format: `output` is a list, the first of which is preferred."""
    name = columns.get("output")
    if columns.get(*INSTRUCTIONS) and columns.all(name, lambda value: isinstance(value, list) and len(value) > 1):
        return Found({"chosen": name, "rejected": name}, f"answers in `{name}`, the first preferred to the others")
    return None


def _single(columns: Columns) -> Found | None:
    response = columns.get(*RESPONSES) or _chosen_alone(columns)
    if response is None:
        return None
    keys, words = {"response": response}, f"answers in `{response}`"
    helpfulness = columns.both(("helpfulness", "correctness", "coherence"))
    scores = [helpfulness[0]] if helpfulness else filter(None, map(columns.get, SINGLE_SCORES))
    if label := _label(columns) or _true_if_good(columns):
        keys["label"], words = label, f"{words}, labels in `{label}`"
    elif plain(response) != "chosen" and (
        score := next((name for name in scores if columns.all(name, is_finite_number)), None)
    ):
        keys["score"], words = score, f"{words}, scores in `{score}`"
    return Found(keys, words)


def _chosen_alone(columns: Columns) -> str | None:
    """The column of chosen answers in rows without rejected ones, which are what SFT learns."""
    name = columns.get("chosen")
    if name is None or "rejected" in columns.names or not (columns.get(*PROMPTS) or columns.all(name, ends_with_answer)):
        return None
    others = {word for column in columns.names for word in (column, *re.split("[_ -]", column)[-1:])}
    return None if any(is_finite_number(value) or str(value) in others for value in columns.values[name]) else name


def _label(columns: Columns) -> str | None:
    """The column of labels; also one of two unknown values, whose rows are then refused rather than all learned."""
    label = columns.get(*LABEL_NAMES)
    words = {label_word(value) for value in columns.values.get(label, ())}
    return label if len(words) == 2 or (words and words <= LABELS.keys() and not words >= {"-1", "0"}) else None


def _true_if_good(columns: Columns) -> str | None:
    """The column that says of each answer whether it is good, as BeaverTails' does."""
    names = filter(None, map(columns.get, TRUE_IF_GOOD))
    return next((name for name in names if columns.all(name, lambda value: label_word(value) in ("true", "false"))), None)


def _conversations(columns: Columns) -> Found | None:
    name = next((name for name in map(columns.get, CONVERSATIONS) if columns.all(name, _is_conversation)), None)
    if name is None:
        return None
    label = _label(columns)
    words = f"conversations in `{name}`" + f", labels of their last turns in `{label}`" * bool(label)
    return Found({"messages": name, **({"label": label} if label else {})}, words)


def _is_conversation(value) -> bool:
    try:
        value = parse_serialized_turns(value, "")
    except RowError:
        return True  # It is reported with its row.
    return isinstance(value, list) and all(isinstance(item, dict | str) or is_text_pair(item) for item in value)


def _text(columns: Columns) -> Found | None:
    name = columns.get("text")
    if {"parent_id", "role"} <= columns.names:
        return None  # Messages of trees, as OpenAssistant's are: see `nearest_entry`.
    return Found({"text": name}, f"plain text in `{name}`") if columns.all(name, lambda v: isinstance(v, str)) else None


def _resolved_verdict(columns: Columns, answers, better: str) -> Keys | str:
    names = answers if isinstance(answers, list) else [f"{answers}_0", f"{answers}_1"]
    values = verdict_values(columns.values.get(better, []), names)
    return {better: values} if values else better


# ---- the prompt, and what belongs to it -----------------------------------------------------------------------------------


def _prompt(columns: Columns, keys: Keys, can_lack: bool) -> tuple[Keys, str]:
    """Where the prompt is, and in words. Answers may hold it: conversations, dialogues, a common beginning.

    can_lack: whether there may be none.
    """
    if "prompt" in columns.values:
        return {}, ""
    chosen, rejected = keys.get("chosen", "chosen"), keys.get("rejected", "rejected")
    of_pairs = not keys.keys() & {"responses", "response", "answers"}
    answers = keys.get("answers")
    all_rejected = rejected if isinstance(rejected, list) else [rejected]
    two = (chosen, *all_rejected) if of_pairs else answers if isinstance(answers, list) else ()
    values = [value for name in two for value in columns.values.get(name, ())]
    if any(map(_holds_prompt, values)):
        return {}, ""
    taken = {
        str(name).split(".")[0] for value in keys.values() for name in (value if isinstance(value, list | dict) else [value])
    }
    names = [name for name in map(columns.get, PROMPTS) if name and name not in taken]
    name = next((found for name in names if (found := _readable_prompt(columns, name))), None)
    if name is not None:
        parts = SECOND_PARTS if plain(name) in INSTRUCTIONS else (CONTEXT,) if plain(name) in QUESTIONS else ()
        more = [part for part in map(columns.get, parts) if part and part not in taken]
        more = [part for part in more if plain(name) in INSTRUCTIONS or columns.all(part, lambda v: isinstance(v, str))]
        return {"prompt": name}, f"prompts in `{'` and `'.join([name, *more])}`"
    if (
        not can_lack
        or "prompt" in columns.names
        or any(_may_be_prompt(columns, name) for name in columns.values if name not in taken)
    ):
        return {}, ""
    if not of_pairs:
        return {"prompt": ""}, "no prompts"
    texts = [value for value in values if isinstance(value, str)]
    if not values:
        return {}, ""
    if len(texts) < len(values):
        return {"prompt": ""}, "no prompts"
    pairs = zip(columns.values.get(chosen, ()), columns.values.get(all_rejected[0], ()), strict=False)
    if all(one.split()[:1] == other.split()[:1] for one, other in pairs):
        return {"implicit_prompt": True}, f"prompts are the common beginning of `{chosen}` and `{rejected}`"
    return {"prompt": ""}, "no prompts"


def _readable_prompt(columns: Columns, name: str) -> str | None:
    """The field of a column's prompts, which may be inside dicts; None for dicts without any."""
    is_dict = columns.all(name, lambda value: isinstance(value, dict) and not turn_keys(value))
    return columns.inner(name, ("messages", "full_text", "text", "content", "post")) if is_dict else name


def _may_be_prompt(columns: Columns, name: str) -> bool:
    """Whether an unknown column has texts of several words, or turns, as prompts, which must not be left out unasked."""
    values = columns.values[name]
    kinds = {isinstance(value, str) for value in values}
    return len(kinds) == 1 and any(map(may_be_prompt, values))


def _holds_prompt(value) -> bool:
    """Whether an answer is a dialogue or a conversation with more turns than the answer's."""
    try:
        value = parse_serialized_turns(value, "")
    except RowError:
        return True
    if isinstance(value, str):
        return ASSISTANT in value
    items = value if isinstance(value, list) else ()
    return any(str(item[keys[0]]).lower() in ("user", "human", "prompter") for item in items if (keys := turn_keys(item)))


def _beside_prompt(columns: Columns, keys: Keys) -> list[tuple[str, str]]:
    """The columns that belong to the prompt."""
    if "text" in keys:
        return []
    found = []
    system = columns.get(*SYSTEMS)
    if columns.all(system, is_system) and system not in _mapped(keys):
        found.append(("system", system))
    tools = columns.get(*TOOLS) or next((t for t in [_tools_of_input(columns)] if t), None)
    if tools and (("." in tools) or columns.all(tools, lambda value: isinstance(value, list | str | dict))):
        found.append(("tools", tools))
    history = columns.get("history")
    if columns.all(history, _is_history) and history not in _mapped(keys):
        found.append(("history", history))
    return found


def _mapped(keys: Keys) -> set:
    return {value for value in keys.values() if isinstance(value, str)}


def _tools_of_input(columns: Columns) -> str | None:
    """OpenAI's preference format has its tools beside the messages."""
    name = columns.get("input")
    has = name is not None and columns.inner(name, ("messages",)) and columns.inner(name, ("tools",))
    return f"{name}.tools" if has and any(value.get("tools") for value in columns.values[name]) else None


def _is_history(value) -> bool:
    value = parse_text_list(value)
    return isinstance(value, list) and all(isinstance(item, list) and len(item) == 2 for item in value)


def _of_pairs(columns: Columns, keys: Keys) -> list[tuple[str, str]]:
    """The numbers of pairs."""
    if keys.keys() & {"responses", "response", "answers", "messages", "text"}:
        return []
    found = []
    margin, weight = columns.get("margin"), columns.get("example_weight", "weight")
    if columns.all(margin, is_finite_number):
        found.append(("margin", margin))
    if columns.all(weight, lambda value: is_finite_number(value) and float(value) >= 0):
        found.append(("example_weight", weight))
    return found
