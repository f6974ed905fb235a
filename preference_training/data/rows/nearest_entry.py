"""The entry of `datasets` that probably reads rows which no known format fits."""

import json
import re
from itertools import product

from preference_training.data.rows.column_names import VERDICTS, Columns
from preference_training.data.rows.formats import Keys, find, two_answers
from preference_training.data.rows.values import parse_text_list

IDENTIFIERS = re.compile(r"(^|_)(id|idx|index|uuid|hash|date|url|language|lang)$", re.IGNORECASE)
LIKE = {
    "rejected": ("reject", "bad", "worse", "los", "dispref", "neg"),
    "chosen": ("chos", "good", "better", "best", "prefer", "win", "accept", "pos"),
    "response": ("respon", "answer", "complet", "output", "reply", "target", "assist"),
    "prompt": ("prompt", "instruct", "quest", "quer", "input", "user", "ask"),
}


TREES = (
    "Rows are single messages of trees, which parent_id joins. Expected one conversation a row: the messages from a root to an "
    "answer, {messages: [{role, content}, ...]}."
)
# A text of several turns, with who speaks.
WRITTEN_TURNS = re.compile(r"(?:^|\n)\W*(user|human|assistant|gpt|bot)\b\W{0,3}:", re.IGNORECASE)


def with_nearest(message: str, row: dict, *parts: str) -> str:
    """A message, with the entry that probably reads rows like this one, if that has all of some parts."""
    if {"parent_id", "role"} <= row.keys():
        return f"{message} {TREES}"
    written = next((name for name, value in row.items() if isinstance(value, str) and _is_dialogue(value)), None)
    if written is not None and not parts:
        return (
            f"{message} Field {written!r} is a text of several turns, which would be learned like the answers. Expected a "
            "conversation, {messages: [{role, content}, ...]}, or a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns."
        )
    nearest = _nearest_entry(row) or ""
    fits = nearest and all(part in nearest for part in parts)
    return f"{message} No known format fits; the nearest is read by datasets=[{nearest}]." if fits else message


def _is_dialogue(text: str) -> bool:
    return len({speaker.lower() for speaker in WRITTEN_TURNS.findall(text)}) > 1


def _nested_entry(row: dict) -> str | None:
    """The entry for rows whose one object holds all that is read."""
    objects = {name: parse_text_list(value, "[{") for name, value in row.items()}
    objects = {name: value for name, value in objects.items() if isinstance(value, dict)}
    if len(objects) != 1:
        return None
    ((name, inner),) = objects.items()
    pair = {key: key for key in ("chosen", "rejected") if key in inner}
    keys = find([inner], {}).keys or (pair if len(pair) == 2 else {})
    if not keys or not all(isinstance(key, str) for key in keys.values()):
        return None
    usual = {"prompt": "prompt"} if "prompt" in inner and not keys.keys() & {"prompt", "messages", "text"} else {}
    return _entry({key: f"{name}.{value}" for key, value in (usual | keys).items()})


def _nearest_entry(row: dict) -> str | None:
    columns = Columns([row])
    answers = next((two for two, _ in two_answers(columns)), None)
    if answers:
        better = columns.get(*VERDICTS) or "COLUMN"
        return (
            f"{{path: ..., answers: [{', '.join(answers)}], better: {{{better}: [VALUE OF THE FIRST, VALUE OF THE SECOND]}}}}"
        )
    if nested := _nested_entry(row):
        return nested
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    texts = [name for name in texts if not IDENTIFIERS.search(str(name))] or texts
    if listed := _nearest_lists(row):
        return _entry({"prompt": texts[0]} | listed if texts else listed)
    if len(texts) < 2:
        return _entry({"text": texts[0]}) if texts else None
    wanted = ("prompt", "chosen", "rejected") if len(texts) > 2 else ("prompt", "response")
    likeness = {key: [n for n in texts if any(part in str(n).lower() for part in LIKE[key])] for key in wanted}
    if len(texts) > 2 and not (likeness["chosen"] or likeness["rejected"]):
        wanted = ("prompt", "response")
        likeness = {key: [n for n in texts if any(part in str(n).lower() for part in LIKE[key])] for key in wanted}
    keys: dict[str, str] = {}
    for key in sorted(wanted, key=lambda key: not likeness[key]):
        left = [name for name in texts if name not in keys.values()]
        keys[key] = next((name for name in likeness[key] if name in left), left[0])
    return _entry({key: keys[key] for key in wanted})


def _nearest_lists(row: dict) -> Keys:
    """The column that lists several answers, and that of as many numbers; none where there are not both."""
    lists = [(name, set(map(type, value)), len(value)) for name, value in row.items() if isinstance(value, list) and value]
    texts, numbers = ([one for one in lists if one[1] <= types] for types in ({str}, {int, float}))
    both = ((one, other) for (one, _, n), (other, _, m) in product(texts, numbers) if n == m)
    return next(({"responses": answers, "scores": scores} for answers, scores in both), {})


def _entry(keys: dict[str, str]) -> str:
    def quoted(name) -> str:
        return str(name) if str(name).replace("_", "").replace("-", "").isalnum() else json.dumps(str(name), ensure_ascii=False)

    return "{path: ..., " + ", ".join(f"{key}: {quoted(name)}" for key, name in keys.items()) + "}"
