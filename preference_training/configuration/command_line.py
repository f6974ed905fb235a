"""The command line as Hydra needs it: a user's own file, models by name, and options as other tools write them."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from preference_training.configuration.composition import (
    GROUPS,
    OPTIONAL_GROUPS,
    defer_keys_of_swept_groups,
    explain_composition_error,
    force_open_sections,
    in_open_section,
    known_keys,
    resolve_groups,
    unknown_key,
)
from preference_training.configuration.config_files import FOLDER_FLAGS, insert_config_file, key_of, name_file, take_flag
from preference_training.configuration.other_tools import answer, translated
from preference_training.configuration.run_dirs import not_writable_message
from preference_training.core.errors import UserError
from preference_training.core.processes import reports_for_machine


def prepare_arguments(arguments: list[str]) -> list[str]:
    """Command-line arguments as Hydra needs them.

    Raises UserError for a file or a model that does not exist, and for options that are another tool's.
    """
    refuse_other_tools(arguments)
    whole = insert_config_file(arguments)
    # Presets of the user's own.
    folder, _ = take_flag(whole, FOLDER_FLAGS)
    named = resolve_groups(whole, Path(folder) if folder else None)
    return defer_keys_of_swept_groups(force_open_sections(named))


def refuse_other_tools(arguments: Sequence[str]) -> None:
    """Raise UserError where options have the names or the dashes of other tools: what each is here, in a line."""
    told: list[str] = []
    ours: list[str] = []
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        line: str | None = None
        override: str | None = None
        value: str | None
        if text.startswith("--") and not _is_hydras(text):
            name, equals, value = text[2:].partition("=")
            takes_next = not equals and rest and not rest[0].startswith("--") and "=" not in rest[0]
            given = value if equals else rest.pop(0) if takes_next else None
            line, override = _without_dashes(name, given)
        elif "=" in text and not text.startswith("-") and not _is_ours(key_of(text)):
            key, value = key_of(text), text.partition("=")[2] or None
            line, override = answer(key, value), translated(key, value)
        told += [line] if line else []
        ours += shlex.split(override or "") if line else [text]
    if told:
        whole = f"\nTogether: python train.py {shlex.join(_each_key_once(ours))}" if len(told) > 1 else ""
        raise UserError("\n".join(told) + whole)


def _each_key_once(arguments: Sequence[str]) -> list[str]:
    """Overrides of which each key is set once: a later one replaces an earlier one, and qlora, which includes it, lora."""
    last: dict[str, str] = {}
    for text in arguments:
        key = key_of(text) if "=" in text and not text.startswith("-") else text
        before = last.pop(key, text)
        keeps = key == "adapter" and before.endswith("=qlora") and text.endswith("=lora")
        last[key] = before if keeps else text
    return list(last.values())


def _is_hydras(text: str) -> bool:
    """Whether an argument is an option of Hydra's, which may be shortened."""
    from hydra._internal.utils import get_args_parser

    name = text.partition("=")[0]
    return any(option.startswith(name) for action in get_args_parser()._actions for option in action.option_strings)


def _is_ours(key: str) -> bool:
    return key in known_keys() or key in (*GROUPS, *OPTIONAL_GROUPS) or in_open_section(key)


def _without_dashes(name: str, value: str | None) -> tuple[str, str | None]:
    """A line on an option that is written with dashes, and the override for it, None where there is none."""
    key = name.replace("-", "_")
    if _is_ours(key):
        override = f"{key}={'true' if value is None else value}"
        return f"--{name}: written without dashes here: {override}", override
    return answer(key, value) or unknown_key(key), translated(key, value)


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
