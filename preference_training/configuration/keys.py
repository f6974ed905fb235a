"""How a key of the configuration is declared: what its value may be, in code and in words, and what the key is for.

    batch_size: int = key(whole(1))
    n_epochs: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME)

A kind is a function from a value to what is wrong with it, None where nothing is.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

from preference_training.core.errors import UserError, nearest

Kind = Callable[[Any], str | None]

# Flags of a key. A resumed run may have another value than the run had before.
MAY_CHANGE_ON_RESUME = "may change on resume"
# Where a job of a sweep computes and what it prints: with another value it is the same job.
OUTSIDE_JOB_IDENTITY = "outside a job's identity"
# Newer than the first version: at its default a job is what it was before there was the key.
NEWER = "newer than the first version"
# Where files are stored, where a run computes, how much it prints: the model does not depend on it, so no card shows it.
NOT_SHOWN = "not shown"
# A section whose keys are another library's or the user's, and so not listed in our files.
OPEN = "open"
# A path, or a list of paths, perhaps with the name of what is in the file; a ~ at the beginning is the home directory.
PATH = "path"


def key(kind: Kind, *flags: str, default: Any = MISSING) -> Any:
    """A field of a section. default: where not every choice of a group has the key; all else has its default in config/."""
    return field(default=default, metadata={"kind": kind, "flags": frozenset(flags)})


def optional_key(kind: Kind, *flags: str) -> Any:
    """A key that some choices of its group have; None under the others."""
    return key(kind, *flags, default=None)


def section(section_class: type, *flags: str) -> Any:
    """A field that is a section of its own. Its flags are those of all its keys."""
    return field(metadata={"section": section_class, "flags": frozenset(flags)})


def optional_section(section_class: type, *flags: str) -> Any:
    """A section that only a choice of a group without a default brings; None without it."""
    return field(default=None, metadata={"section": section_class, "flags": frozenset(flags)})


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the configuration, with an attribute for each key."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The section with these values, unchecked; values without a field are ignored."""
        read = {}
        for each in fields(cls):
            if each.name in values:
                inner = each.metadata.get("section")
                read[each.name] = inner.of(values[each.name]) if inner else values[each.name]
        return cls(**read)


def declared(section_class: type) -> list[Field[Any]]:
    """The fields of a section that are keys, in their order."""
    return [each for each in fields(section_class) if "flags" in each.metadata]


def check_section(section_class: type, values: Any, name: str = "") -> None:
    """Raise UserError for the first value in a section that is not of its key's kind.

    Missing keys are skipped: which are needed depends on the choices of the groups.
    """
    refuse(plain_section(values), name)
    for each in declared(section_class):
        if each.name in values:
            inner, full = each.metadata.get("section"), f"{name}.{each.name}" if name else each.name
            if inner:
                check_section(inner, values[each.name], full)
            else:
                refuse(each.metadata["kind"](values[each.name]), full)


def refuse(problem: str | None, name: str) -> None:
    """Raise UserError if there is a problem."""
    if problem is not None:
        raise UserError(f"{name}: {problem}")


def key_names(section_class: type, prefix: str = "") -> dict[str, frozenset[str]]:
    """Dotted names of all keys and sections, each with its flags and those of the sections that it is in."""
    return dict(_key_names(section_class, prefix, frozenset()))


def _key_names(section_class: type, prefix: str, above: frozenset[str]) -> Iterable[tuple[str, frozenset[str]]]:
    for each in declared(section_class):
        flags = above | each.metadata["flags"]
        yield f"{prefix}{each.name}", flags
        if inner := each.metadata.get("section"):
            yield from _key_names(inner, f"{prefix}{each.name}.", flags)


def is_within(name: str, names: Iterable[str]) -> bool:
    """Whether a dotted name is one of the names, or in a section that is."""
    return any(name == each or name.startswith(f"{each}.") for each in names)


def at_home(value: Any) -> Any:
    """The value of a path's key with the home directory in place of ~; anything else as it is."""
    if isinstance(value, list):
        return [at_home(each) for each in value]
    try:
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value
    except RuntimeError:
        # No user of this name.
        return value


# ---- kinds --------------------------------------------------------------------------------------------------------------


def expected(words: str, fits: Callable[[Any], bool], null: bool = False) -> Kind:
    """Values that a predicate lets through, and None with `null`. words: what was expected, without "or null"."""
    return partial(_fault, fits, f"{words}{' or null' * null}", null)


def _fault(fits: Callable[[Any], bool], words: str, null: bool, value: Any) -> str | None:
    return None if (null and value is None) or fits(value) else f"found {value!r}, expected {words}."


def anything(value: Any) -> None:
    """What other parts look at."""


def switch(value: Any) -> str | None:
    """true or false."""
    return None if isinstance(value, bool) else f"found {value!r}, expected true or false."


def text(null: bool = False) -> Kind:
    """A text."""
    return expected("a text", lambda value: isinstance(value, str), null)


def whole(least: int, null: bool = False) -> Kind:
    """A whole number."""
    return expected(f"a whole number from {least}", lambda value: type(value) is int and value >= least, null)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def positive(unit: str = "", null: bool = False) -> Kind:
    """A number above 0. unit: such as " of seconds"."""
    return expected(f"a number{unit} above 0", lambda value: is_number(value) and value > 0, null)


def not_negative(unit: str = "", null: bool = False) -> Kind:
    """A number from 0. unit: such as " of seconds"."""
    return expected(f"a number{unit} from 0", lambda value: is_number(value) and value >= 0, null)


def share(below: float = 1, null: bool = False) -> Kind:
    """A number from 0 to below another."""
    return expected(f"a share from 0 to below {below}", lambda value: is_number(value) and 0 <= value < below, null)


def one_of(values: tuple[str, ...], words: str | None = None, null: bool = False) -> Kind:
    """One of a few values. words: where "a, b, c" does not describe them."""
    return expected(words or ", ".join(values), lambda value: value in values, null)


def known_name(noun: str, known: tuple[str, ...], null: bool = False) -> Kind:
    """One of many names; the error suggests the nearest."""
    return partial(_unknown_name, noun, known, null)


def _unknown_name(noun: str, known: tuple[str, ...], null: bool, value: Any) -> str | None:
    return None if (null and value is None) or value in known else f"no {noun} {value!r}; {nearest(str(value), known)}"


def plain_section(value: Any) -> str | None:
    """Keys with values."""
    return None if isinstance(value, dict) else f"found {value!r}, expected a section: keys with values, or {{}}."


def factors(value: Any) -> str | None:
    """Numbers above 0 by regular expressions, or None."""
    if value is None:
        return None
    words = "patterns of names with numbers above 0, as in {embed: 0.1}"
    if not isinstance(value, dict):
        return f"found {value!r}, expected {words}."
    for pattern, factor in value.items():
        if not is_number(factor) or factor <= 0:
            return f"{pattern}: found {factor!r}, expected {words}."
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            return f"{pattern}: no regular expression ({error}), expected {words}."
    return None


def texts(words: str, null: bool = False) -> Kind:
    """A list of texts, or one text."""
    return expected(words, lambda value: all(isinstance(each, str) for each in listed(value)), null)


def listed(value: Any) -> list[Any]:
    """A value as a list: brackets are optional for one."""
    return value if isinstance(value, list) else [value]
