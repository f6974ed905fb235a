"""What an option of another tool is here: the overrides that do the same, or a sentence."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Other arguments of the command line by their names, ours and those of other tools.
Given = Mapping[str, str]
NOTHING: Given = MappingProxyType({})
# Values that switch an option off.
OFF = ("false", "none", "null", "no", "off")
# Keys whose values are lists, which other tools write without brackets.
_LISTS = ("datasets=", "tracking=", "target_modules=", "modules_to_save=")


@dataclass(frozen=True)
class Part:
    """An override that does what an option of another tool does.

    is_choice: of a group or an optimizer that the option's own override needs, and that any other choice replaces. is_general:
    of a kind of training, which one of a loss replaces.
    """

    text: str
    is_choice: bool = False
    is_general: bool = False

    @property
    def shown(self) -> str:
        """The override as a word on the command line."""
        return shlex.quote(self.text) if set(self.text) & set(" \t'\"\\") else self.text


@dataclass(frozen=True)
class Answer:
    """What an option of another tool is here.

    overrides: as on the command line; the last one is the option's own, the others are what it needs. example: a value of it.
    values: those of the other tool that have another name here. off: those that are the default here. computed: the value here
    of one there, beside the other arguments, None where it does not follow from them. note: what else is to be known, or all
    there is to say where there is no override; `notes` of some values in its place. is_general: whether options for the loss
    are more exact. is_done: whether nothing is to be set, and nothing lost.
    """

    overrides: str = ""
    example: str = ""
    values: dict[str, str] = field(default_factory=dict)
    off: tuple[str, ...] = ()
    computed: Callable[[str, Given], str | None] | None = None
    note: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    is_general: bool = False
    is_done: bool = False

    def parts(self, value: str | None = None, given: Given = NOTHING) -> list[Part]:
        """The overrides with the user's value, or with the example; none where there is nothing to set."""
        if self.is_off(value):
            return []
        here = self.example if value is None else self.values.get(lower(value), value)
        if value is not None and self.computed is not None:
            computed = self.computed(here, given)
            if computed is None:
                return []
            here = computed
        if "," in here and here[0] not in "[{'\"" and any(name in self.overrides for name in _LISTS):
            here = f"[{here}]"
        words = self.overrides.split()
        texts = [text.format(here) for text in words]
        if value is not None and here in self.values.values():
            # What a value is called here may be several overrides.
            texts = " ".join(texts).split()
        return [Part(text, number < len(words) - 1, self.is_general) for number, text in enumerate(texts)]

    def text(self, value: str | None = None) -> str | None:
        """The overrides as words of a command line; None where there is nothing to set."""
        return " ".join(part.shown for part in self.parts(value)) or None

    def is_off(self, value: str | None) -> bool:
        """Whether a value of the other tool is the default here."""
        return lower(value) in (self.off if "{}" in self.overrides else OFF)


def lower(value: str | None) -> str:
    """A value of another tool as the table has it."""
    return (value or "").strip("'\"").lower()


def plain(key: str) -> str:
    """The name of an option as the table has it."""
    return key.lower().replace("-", "_")
