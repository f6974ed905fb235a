"""A run as one YAML file of the user's own: python train.py --config-name my_run [KEY=VALUE ...]

my_run.yaml lies in the working directory, or in --config-dir. It has the keys of overrides, flat or nested, and sets what it
names; a group is set by name. Everything else keeps its default, and the command line overrides the file.

    model: Qwen/Qwen3-0.6B
    adapter: lora
    datasets: [mine.jsonl]
    loss: dpo
    loss.beta: 0.2
    evaluation:
      n_prompts: 64

The section of a loss or trainer may have its name inside: loss: {name: dpo, beta: 0.2}. A file with a list of `defaults` is
Hydra's business, and composed by it.
"""

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from preference_training.configuration.composition import (
    GROUPS,
    OPTIONAL_GROUPS,
    in_open_section,
    known_keys,
    unknown_key,
)
from preference_training.configuration.keys import OPEN, key_names
from preference_training.configuration.model_names import CONFIG_DIR, as_override
from preference_training.configuration.schema import RunConfig, keys_with
from preference_training.core.errors import UserError, first_line

SUFFIXES = (".yaml", ".yml")
# --config is what other tools call it.
NAME_FLAGS, FOLDER_FLAGS = ("--config-name", "-cn", "--config"), ("--config-dir", "-cd")
# The file that a key of this process's command line comes from.
_FILE_OF: dict[str, Path] = {}


def insert_config_file(arguments: list[str]) -> list[str]:
    """Command-line arguments in which --config-name FILE has become the overrides that the file stands for.

    Those of the command line replace them. Raises UserError where the file does not exist or has an unknown key.
    """
    name, others = take_flag(arguments, NAME_FLAGS)
    if name is None:
        # python train.py my_run.yaml
        name = next((text for text in arguments if text.endswith(SUFFIXES) and Path(text).is_file()), None)
        others = [text for text in arguments if text != name]
    folder, rest = take_flag(others, FOLDER_FLAGS)
    file = None if name is None else _find(name, Path(folder or ".").expanduser())
    if file is None:
        return arguments
    values = _read(file)
    if "defaults" in values:
        return [f"--config-dir={file.parent.absolute()}", f"--config-name={file.stem}", *rest]
    given = {key_of(text) for text in rest}
    own = [text for text in _overrides(values, file) if key_of(text) not in given]
    _FILE_OF.update({key_of(text): file for text in own})
    # The folder may have presets too, which Hydra looks for there.
    options = [f"--config-dir={folder}"] if folder else []
    # Overrides stand together: argparse takes none that follow an option behind others.
    first = next((number for number, text in enumerate(rest) if "=" in text and not text.startswith("-")), len(rest))
    return [*options, *rest[:first], *own, *rest[first:]]


def name_file(message: str) -> str:
    """A message that begins with a key, as the user's file that sets it would have it, if one does: preceded by its name."""
    key = re.match(r"[\w.]*", message)
    file = _FILE_OF.get(key[0]) if key else None
    return f"{file}: {as_in_file(message)}" if file else message


# An override in a message, with or without quotes; several may follow each other.
_OVERRIDE = re.compile(r"(?<![\w.+/=-])(?:'\+*([a-z][\w.]*)=([^']*)'|\+*([a-z][\w.]*)=(?=[^\s.,;=]))")


def as_in_file(message: str) -> str:
    """A message in which overrides are lines of a file: lr=1e-5 becomes lr: 1e-5. Commands stay as they are."""

    def line(found: re.Match[str]) -> str:
        name = found[1] or found[3]
        if name not in (*GROUPS, *OPTIONAL_GROUPS) and name not in known_keys() and not in_open_section(name):
            return found[0]
        return f"{name}: {found[2] or ''}"

    def rewritten(text: str) -> str:
        # What an option of another tool is here may be several overrides.
        text = re.sub(r"(?<=\w|\]|\})( )(?=\+*[a-z][\w.]*=)", _between_overrides, text)
        return _OVERRIDE.sub(line, text)

    return "\n".join(text if "python " in text else rewritten(text) for text in message.splitlines())


def _between_overrides(space: re.Match[str]) -> str:
    """What is between two overrides in a file: a comma where the word before the space is one."""
    before = space.string[: space.start()].rpartition(" ")[2]
    return ", " if re.fullmatch(r"\+*[a-z][\w.]*=\S+", before) else " "


def take_flag(arguments: list[str], names: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The value of an option such as --config-name, None where it is not given, and the other arguments."""
    for number, text in enumerate(arguments):
        name, equals, value = text.partition("=")
        if name in names and equals:
            return value, [*arguments[:number], *arguments[number + 1 :]]
        if text in names and number + 1 < len(arguments):
            return arguments[number + 1], [*arguments[:number], *arguments[number + 2 :]]
    return None, arguments


def key_of(text: str) -> str:
    """The key of an override."""
    return text.lstrip("+~").partition("=")[0]


def _find(name: str, folder: Path) -> Path | None:
    """The user's file of a name; None for a configuration of the project's own."""
    path = folder / Path(name).expanduser()
    tried = [path] if path.suffix in SUFFIXES else [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    for file in tried:
        if file.is_file():
            return file
    if name.removesuffix(SUFFIXES[0]) in [file.stem for file in CONFIG_DIR.glob("*.yaml")]:
        return None
    others = [file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES]
    near = get_close_matches(path.name, others, n=1)
    hint = f"did you mean {near[0]}?" if near else "expected a YAML file with the keys of overrides, such as lr: 1e-5."
    raise UserError(f"--config-name: {name}: no such file: {tried[0].absolute()}; {hint}")


def _read(file: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        where = getattr(error, "problem_mark", None)
        row = f", line {where.line + 1}" if where is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{file}{row}: {problem}. Expected YAML: a key and a value on each line.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected keys with values, such as lr: 1e-5.")
    return {str(key): value for key, value in values.items()}


def _overrides(values: dict[str, Any], file: Path) -> Iterable[str]:
    wrong: list[str] = []
    for key, value in _leaves(values):
        if key in (*GROUPS, *OPTIONAL_GROUPS):
            if value is not None:
                yield f"{key}={_text(value, file, key)}"
        elif key.startswith("hydra.") or in_open_section(key):
            yield f"++{key}={_text(value, file, key)}"
        elif key in known_keys():
            yield f"{key}={_text(value, file, key)}"
        else:
            wrong.append(f"{file}: {as_in_file(unknown_key(key, value=value))}")
    if wrong:
        raise UserError("\n".join(wrong))


def _leaves(values: dict[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted names and values; the name of a loss or trainer is the choice of its group, and comes first."""
    for name, value in sorted(values.items(), key=lambda item: item[0] != "name"):
        key = f"{above}{name}"
        if isinstance(value, dict) and _is_section(key):
            yield from _leaves(value, f"{key}.")
        elif key in ("loss.name", "trainer.name"):
            yield above.rstrip("."), value
        else:
            yield key, value


def _is_section(key: str) -> bool:
    return key == "hydra" or key.startswith("hydra.") or key in GROUPS or key in _sections() or in_open_section(key)


def _sections() -> set[str]:
    names = key_names(RunConfig)
    return {name.rpartition(".")[0] for name in names if "." in name} | keys_with(OPEN)


# ---- values as Hydra reads them ------------------------------------------------------------------------------------------


def _text(value: Any, file: Path, key: str) -> str:
    """A value as on the command line, where Hydra reads the same."""
    if isinstance(value, list):
        return f"[{','.join(_text(each, file, key) for each in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_name(name, file, key)}:{_text(each, file, key)}" for name, each in value.items()) + "}"
    if isinstance(value, str):
        return as_override(value)
    return json.dumps(value) if value is None or isinstance(value, bool | int) else str(value)


def _name(name: Any, file: Path, key: str) -> str:
    """A key of a dict as Hydra reads it, for example the name of a column."""
    escaped = re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(name))
    if not re.fullmatch(r"(?:[\w/+.$%*@?|-]|\\.)+", escaped, flags=re.ASCII):
        raise UserError(f"{file}: {key}: found the name {name!r}. Expected letters of the Latin alphabet, digits and signs.")
    return escaped
