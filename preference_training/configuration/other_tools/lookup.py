"""Answers to options of other tools, by their names."""

from difflib import get_close_matches

from preference_training.configuration.other_tools.answers import NOTHING, Given, Part, lower, plain
from preference_training.configuration.other_tools.table import OTHER_NAMES


def answer(key: str, value: str | None = None, given: Given = NOTHING) -> str | None:
    """What an option of another tool is here, in one line; None for a name that none of them has.

    given: other arguments, from which some values follow.
    """
    found = OTHER_NAMES.get(plain(key))
    if found is None:
        return None
    overrides = " ".join(part.shown for part in found.parts(value, {**given, plain(key): value or ""}))
    note = found.notes.get(lower(value), found.note)
    said = f"in this project: {overrides}" if overrides else "" if note else "leave it out"
    return f"{key}: {'; '.join(part for part in (said, note) if part)}"


def near_name(key: str) -> str | None:
    """The option of another tool that a misspelled name most likely means; None where none is near."""
    return next(iter(get_close_matches(plain(key), OTHER_NAMES, n=1, cutoff=0.85)), None)


def translated(key: str, value: str | None, given: Given = NOTHING) -> list[Part] | None:
    """The overrides for an option of another tool with the user's value; None where it is lost without one."""
    found = OTHER_NAMES.get(plain(key))
    if found is None:
        return None
    parts = found.parts(value, {**given, plain(key): value or ""})
    return parts if parts or found.is_done or (not found.notes and found.is_off(value)) else None
