"""Find the columns that a map of fields does not read, so that they can be named."""

from collections.abc import Iterable, Iterator

from preference_training.data.rows.conversations import TURN_KEYS, RowError, keys_of_turn, read_written_turns

# The role needs no mention where only the text is named, as in chosen.content.
ROLE_BESIDE = dict(TURN_KEYS)

# A row that has one of these is about more than its texts.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class ColumnsRead:
    """The names that a map reads; those with dots lead into nested values, as in `value_of`."""

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)
        # Name → what of its value is read: {} is all of it.
        self.tree: dict[str, dict] = {}
        for name in self.names:
            branch = self.tree
            for part in name.split("."):
                branch = branch.setdefault(part, {})

    def unread(self, row: dict) -> list[str]:
        """The columns of a row that hold something and are not read, each once; dots lead into nested ones."""
        found: list[str] = []
        for column, value in row.items():
            if _is_empty(value):
                continue
            if column in self.names:
                found += _beside_turns(value, column)
            elif column in self.tree:
                found += _unread_parts(value, self.tree[column], column)
            else:
                found.append(str(column))
        return list(dict.fromkeys(found))

    def media(self, row: dict) -> str | None:
        """A column of pictures, films or sounds that the map does not read, if the row has one."""
        return next((name for name in MEDIA if name not in self.tree and not _is_empty(row.get(name))), None)


def _is_empty(value) -> bool:
    """Whether a value says nothing: what tables hold where a row has no such column."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _unread_parts(value, branch: dict[str, dict], name: str) -> Iterator[str]:
    """Names of what is not read of a nested value, or of a list's nested values."""
    for item in value if isinstance(value, list) else [value]:
        for key, inner in item.items() if isinstance(item, dict) else ():
            if _is_empty(inner) or ROLE_BESIDE.get(key) in branch:
                continue
            if key not in branch:
                yield f"{name}.{key}"
            elif branch[key]:
                yield from _unread_parts(inner, branch[key], f"{name}.{key}")
            else:
                yield from _beside_turns(inner, f"{name}.{key}")


def _beside_turns(value, name: str) -> Iterator[str]:
    """Names of what the turns of a conversation, which may be written into a text, hold beside role and text."""
    try:
        value = read_written_turns(value, name)
    except RowError:
        # A column that is only compared, as `where` does: nobody reads turns in it.
        return
    for item in value if isinstance(value, list) else ():
        keys = keys_of_turn(item)
        if keys and len(item) > 2:
            yield from (f"{name}.{key}" for key, inner in item.items() if key not in keys and not _is_empty(inner))
