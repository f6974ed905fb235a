"""Find the columns that a field map does not read, to report them."""

import re
from collections.abc import Iterable, Iterator

from preference_training.data.records.report import DataReport
from preference_training.data.rows.column_names import MARK_OF_JUDGMENTS, OF_JUDGMENTS
from preference_training.data.rows.conversations import (
    LEGACY_CALL,
    MESSAGE_FIELDS,
    TURN_KEYS,
    WEIGHT_KEYS,
    RowError,
    parse_serialized_turns,
    round_keys,
    turn_keys,
)
from preference_training.data.rows.values import LABELS, is_empty, is_finite_number, is_plain_text, label_word

# Where only the text is named, as in chosen.content, the role is not reported.
ROLE_BESIDE = {role: [text for other, text in TURN_KEYS if other == role] for role, _ in TURN_KEYS}

# A row that has one of these depends on more than its texts.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


# Columns that may say that an answer is good, and those that may say that it is bad.
OF_GOOD = re.compile(r"safe|correct|good|helpful|thumbs.?up|upvote|approved|accepted|passed|valid|feedback|verdict|quality")
OF_BAD = re.compile(r"unsafe|incorrect|invalid|toxic|harm|bad|flag|nsfw|spam|hallucin|offensive|thumbs.?down|rejected")


def note_verdict(row: dict, name: str, report: DataReport) -> None:
    """Note a column that is not read where it seems to say that the answer of a row, its only one, is bad."""
    value, lowered = row.get(name), name.lower()
    label = LABELS.get(label_word(value)) if isinstance(value, bool | str) and not is_finite_number(value) else None
    if label is not None and (label if OF_BAD.search(lowered) else not label and OF_GOOD.search(lowered)):
        report.note(
            f"{name} is {label_word(value)} of some rows, which are learned like the others; where: {{{name}: '!= {value}'}} "
            "leaves them out"
        )


class ReadColumns:
    """The field names that a map reads; dotted names select nested values, as in `field_value`."""

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)
        # Name → the part of its value that is read; {} is all of it.
        self.tree: dict[str, dict] = {}
        for name in self.names:
            branch = self.tree
            for part in name.split("."):
                branch = branch.setdefault(part, {})
        self.unread_media = frozenset(name for name in MEDIA if name not in self.tree)

    def unread(self, row: dict) -> list[str]:
        """The non-empty columns of a row that are not read, each once, with dotted names for nested ones.

        Those by which the labeling app describes a judgment are known, and not among them.
        """
        found: list[str] = []
        of_app = OF_JUDGMENTS if MARK_OF_JUDGMENTS in row else ()
        for column, value in row.items():
            if column in of_app or is_empty(value) or (column in self.names and is_plain_text(value)):
                continue
            if column in self.names:
                found += _beside_turns(value, column)
            elif column in self.tree:
                found += _unread_parts(value, self.tree[column], column)
            else:
                found.append(str(column))
        return list(dict.fromkeys(found)) if found else found

    def media(self, row: dict) -> str | None:
        """A column of images, video or audio that the map does not read, if the row has one."""
        if self.unread_media.isdisjoint(row):
            return None
        return next((name for name in MEDIA if name in self.unread_media and not is_empty(row.get(name))), None)


def _unread_parts(value, branch: dict[str, dict], name: str) -> Iterator[str]:
    """The names of the unread parts of a nested value, or of a list of them."""
    for item in value if isinstance(value, list) else [value]:
        for key, inner in item.items() if isinstance(item, dict) else ():
            if is_empty(inner) or any(text in branch for text in ROLE_BESIDE.get(key, ())):
                continue
            if key not in branch:
                yield f"{name}.{key}"
            elif branch[key]:
                yield from _unread_parts(inner, branch[key], f"{name}.{key}")
            else:
                yield from _beside_turns(inner, f"{name}.{key}")


def _beside_turns(value, name: str) -> Iterator[str]:
    """The names of the keys in the turns of a conversation, which may be serialized, that chat templates do not read."""
    try:
        value = parse_serialized_turns(value, name)
    except RowError:
        # Columns that are only compared, as by `where`, need not contain turns.
        return
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict) and len(item) > 2 and (keys := turn_keys(item) or round_keys(item)):
            read = (*keys, *MESSAGE_FIELDS, *WEIGHT_KEYS, LEGACY_CALL)
            yield from (f"{name}.{key}" for key, inner in item.items() if key not in read and not is_empty(inner))
