"""The command line as Hydra needs it: a user's own file, models by name, and options as other tools write them."""

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from preference_training.configuration.composition import (
    GROUPS,
    OPTIONAL_GROUPS,
    choice_keys,
    compose_overrides,
    default_values,
    defer_keys_of_swept_groups,
    explain_composition_error,
    force_open_sections,
    group_choices,
    in_open_section,
    known_keys,
    resolve_groups,
    unknown_key,
)
from preference_training.configuration.config_files import FOLDER_FLAGS, insert_config_file, key_of, name_file, take_flag
from preference_training.configuration.other_tools.answers import Part, plain
from preference_training.configuration.other_tools.lookup import answer, translated
from preference_training.configuration.run_dirs import not_writable_message
from preference_training.configuration.validation import validate
from preference_training.core.errors import UserError
from preference_training.core.processes import reports_for_machine
from preference_training.core.values import dotted


def prepare_arguments(arguments: list[str]) -> list[str]:
    """Command-line arguments as Hydra needs them.

    Raises UserError for a file or a model that does not exist, and for options that are another tool's.
    """
    refuse_other_tools(arguments)
    whole = insert_config_file(arguments)
    # Presets of the user's own.
    folder, _ = take_flag(whole, FOLDER_FLAGS)
    named = resolve_groups(whole, Path(folder) if folder else None)
    ready = defer_keys_of_swept_groups(force_open_sections(named))
    # Hydra takes no overrides behind it, if it has some before.
    return sorted(ready, key=lambda text: text not in ("-m", "--multirun"))


@dataclass(frozen=True)
class _Argument:
    """An argument of the command line: `text` as it is, or an option of another tool, `name` with perhaps a `value`."""

    text: str
    name: str = ""
    value: str | None = None
    has_dashes: bool = False


def refuse_other_tools(arguments: Sequence[str]) -> None:
    """Raise UserError where options have the names or the dashes of other tools: what each is here, in a line."""
    read = list(_read(arguments))
    if not any(each.name for each in read):
        return
    given = _given(read)
    told: list[str] = []
    ours: list[Part] = []
    lost: list[str] = []
    for each in read:
        if not each.name:
            ours.append(Part(each.text))
            continue
        line, parts = _here(each, given)
        told.append(line)
        ours += parts or []
        lost += [each.name] if parts is None else []
    kept = _each_key_once(ours)
    foreign = [part for part in kept if _is_of_another_choice(part, kept)]
    told += [f"{part.text}: left out, since {_choice_of(part, kept)} has no such key" for part in foreign]
    texts, mistakes = _without_mistakes([part.text for part in kept if part not in foreign])
    told += mistakes.values()
    lost += mistakes
    command = shlex.join(texts)
    without = f", without {', '.join(lost)}" if lost else ""
    whole = f"\nTogether{without}: python train.py {command}" if len(told) > 1 and command else ""
    raise UserError("\n".join(told) + whole)


def _without_mistakes(overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    """The overrides without those that are refused, and why these are: key → message.

    Nothing is looked at where Hydra's own options choose what is composed, or a sweep.
    """
    mistakes: dict[str, str] = {}
    while not any(text.startswith("-") for text in overrides) and (mistake := _mistake(overrides)):
        key = mistake.partition(":")[0]
        rest = [text for text in overrides if key_of(text) != key and text != key]
        if len(rest) == len(overrides):
            break
        mistakes[key], overrides = mistake, rest
    return overrides, mistakes


def _mistake(overrides: Sequence[str]) -> str | None:
    """What is wrong with a command line; None if nothing is seen."""
    try:
        config, choices = compose_overrides(*overrides)
        validate(config, overrides, choices)
    except UserError as error:
        return str(error)
    return None


def _read(arguments: Sequence[str]) -> Iterator[_Argument]:
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        if text.startswith("--") and not _is_hydras(text):
            name, equals, value = text[2:].partition("=")
            takes_next = not equals and rest and not rest[0].startswith("--") and "=" not in rest[0]
            given = value if equals else rest.pop(0) if takes_next else None
            yield _Argument(text, name, given, has_dashes=True)
        elif "=" in text and not text.startswith("-") and answer(key_of(text)) and not _is_ours(key_of(text)):
            yield _Argument(text, key_of(text), text.partition("=")[2] or None)
        else:
            yield _Argument(text)


def _given(arguments: Sequence[_Argument]) -> dict[str, str]:
    """The values of a command line, by the names that they are given with and by those that they have here."""
    given: dict[str, str] = {}
    for each in arguments:
        name = plain(each.name) or key_of(each.text)
        value = each.value if each.name else each.text.partition("=")[2]
        given[name] = value or ""
        texts = [part.text for part in translated(each.name, each.value) or ()] if each.name else []
        given |= {key_of(text): text.partition("=")[2] for text in texts}
    return given


def _here(argument: _Argument, given: Mapping[str, str]) -> tuple[str, list[Part] | None]:
    """A line on what an option is here, and the overrides for it: None where it is lost."""
    name, value = argument.name, argument.value
    key = name.replace("-", "_")
    if argument.has_dashes and _is_ours(key):
        if value is None and not isinstance(dotted(default_values(model="base_model")).get(key), bool | None):
            return f"--{name}: found no value, and written without dashes here: {key}=VALUE", None
        part = Part(f"{key}={'true' if value is None else value}")
        return f"--{name}: written without dashes here: {part.shown}", [part]
    return answer(key, value, given) or unknown_key(key), translated(key, value, given)


# What a choice includes, by which it replaces the other wherever both are given.
_INCLUDED = {
    **{f"adapter={name}": "adapter=lora" for name in ("qlora", "dora", "rslora", "pissa")},
    **{f"loss={name}": "loss=dpo" for name in ("rpo", "tr_dpo")},
}


def _each_key_once(parts: Sequence[Part]) -> list[Part]:
    """The parts of which each key is set once: by the more exact one, and of equal ones by the last."""
    kept: dict[str, Part] = {}
    for part in parts:
        key = key_of(part.text) if "=" in part.text and not part.text.startswith("-") else part.text
        before = kept.get(key)
        if before is None or not _outranks(before, part):
            kept[key] = part
    return list(kept.values())


def _outranks(before: Part, after: Part) -> bool:
    """Whether the first of two parts with the same key stays."""
    if before.text.lstrip("+") == _INCLUDED.get(after.text.lstrip("+")):
        return False
    if after.text.lstrip("+") == _INCLUDED.get(before.text.lstrip("+")):
        return True
    ranks = [(not part.is_choice, not part.is_general) for part in (before, after)]
    return ranks[0] > ranks[1]


def _choice_of(part: Part, parts: Iterable[Part]) -> str | None:
    """The choice of the group that a part sets a key of, if it is among the parts."""
    group = part.text.partition(".")[0]
    return next((each.text for each in parts if group in GROUPS and each.text.startswith(f"{group}=")), None)


def _is_of_another_choice(part: Part, parts: Iterable[Part]) -> bool:
    """Whether a part sets a key that the choice of its group does not have."""
    key, choice = key_of(part.text), _choice_of(part, parts)
    group, _, name = key.partition(".")
    chosen = choice.partition("=")[2] if choice else ""
    return bool(name) and group != "model" and chosen in group_choices(group) and name not in choice_keys(group, chosen)


def _is_hydras(text: str) -> bool:
    """Whether an argument is an option of Hydra's, which may be shortened."""
    from hydra._internal.utils import get_args_parser

    name = text.partition("=")[0]
    return any(option.startswith(name) for action in get_args_parser()._actions for option in action.option_strings)


def _is_ours(key: str) -> bool:
    return key in known_keys() or key in (*GROUPS, *OPTIONAL_GROUPS) or in_open_section(key)


def refuse(message: str) -> int:
    """Print what the user got wrong, once on each machine; the exit status for it."""
    if reports_for_machine():
        print(name_file(message), file=sys.stderr, flush=True)
    return 2


@contextmanager
def mistakes_as_messages(file: str) -> Iterator[None]:
    """Inside, a mistake of the user's ends the process with one message and exit status 2; a bug keeps its traceback.

    file: that of the function `main` which Hydra calls.
    """
    try:
        yield
    except UserError as error:
        sys.exit(refuse(str(error)))
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(refuse(explain_composition_error(error, sys.argv[1:])))
    except OSError as error:
        # Hydra makes the run directory before `main` begins.
        if any(frame.name == "main" and frame.filename == file for frame in extract_tb(error.__traceback__)):
            raise
        sys.exit(refuse(not_writable_message(error.filename, error)))
    except ValueError as error:
        # What Hydra raises for loss=5.
        if not str(error).startswith("Config group override"):
            raise
        sys.exit(refuse(str(error)))
