"""Validation: turn a composed configuration into a typed one, or explain why it cannot work. Imports no heavy library."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from preference_training.configuration.checks.run import check_together
from preference_training.configuration.checks.unread import check_warmups
from preference_training.configuration.composition import (
    GROUPS,
    choice_keys,
    compose_overrides,
    default_values,
    group_choices,
    group_keys,
    loss_keys,
    preset_of,
    unknown_key,
)
from preference_training.configuration.config_files import FOLDER_FLAGS, key_of, take_flag
from preference_training.configuration.keys import PATH, Section, at_home, check_section, declared
from preference_training.configuration.schema import Origin, RunConfig, keys_with
from preference_training.configuration.sections import LossConfig
from preference_training.core.errors import UserError, nearest
from preference_training.core.values import dotted


def validate(
    config: DictConfig, overrides: Sequence[str] = (), choices: dict[str, str] | None = None, folder: Path | None = None
) -> RunConfig:
    """The configuration, typed. Raises UserError, with one message, for the first thing in it that cannot work.

    `overrides` are the command line's. `choices` name the file that each group was composed from: with them removed keys and
    keys of other files are found. `folder` has presets of the user's own.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]}: not given. Expected a value on the command line: {missing[0]}=...")
    _prefer_given_warmup(config, choices, overrides)
    _expand_home(config)
    values = OmegaConf.to_container(config, resolve=True)
    _check_keys(RunConfig, values)
    for group, choice in (choices or {}).items():
        if group in GROUPS:
            _check_keys_of_group(group, values[group], choice)
    _check_group_names(values["loss"], values["trainer"])
    check_section(RunConfig, values)
    preset = preset_of((choices or {}).get("model", "base_model"))
    origin = Origin(tuple(overrides), preset, frozenset(key for key, value in dotted(values).items() if value is None), folder)
    typed = replace(RunConfig.of(values, OmegaConf.to_container(config, resolve=False)), origin=origin)
    if typed.max_prompt_length is None:
        typed = typed.changed({"max_prompt_length": typed.max_length // 2})
    if typed.per_device_batch_size is not None and any(text.startswith("batch_size=") for text in overrides):
        raise UserError("per_device_batch_size: given together with batch_size, which follows from it. Expected one of them.")
    check_together(typed)
    return typed


def _prefer_given_warmup(config: DictConfig, choices: dict[str, str] | None, overrides: Sequence[str]) -> None:
    """Let warmup_steps replace the share that a preset or a recipe has in its place. Raises UserError where both are given."""
    check_warmups(overrides, config.get("warmup_steps"), config.get("warmup_share"))
    usual = default_values(model=preset_of((choices or {}).get("model", "base_model")))
    is_preset = usual["warmup_steps"] is None and config.get("warmup_share") == usual["warmup_share"]
    given = set(map(key_of, overrides))
    is_given = "warmup_steps" in given and "warmup_share" not in given
    if (is_preset or is_given) and config.get("warmup_steps") is not None:
        config.warmup_share = None


def _expand_home(config: DictConfig) -> None:
    """Let paths that begin with ~ begin with the home directory."""
    for key, value in dotted(OmegaConf.to_container(config, resolve=False)).items():
        if key in keys_with(PATH) and at_home(value) != value:
            OmegaConf.update(config, key, at_home(value), merge=False)


def configured(*overrides: str) -> RunConfig:
    """The configuration of a command line, which may have --config-dir. Raises UserError for what cannot work."""
    given, rest = take_flag(list(overrides), FOLDER_FLAGS)
    folder = None if given is None else Path(given).expanduser()
    config, choices = compose_overrides(*rest, folder=folder)
    return validate(config, rest, choices, folder)


# ---- keys -----------------------------------------------------------------------------------------------------------------


def _check_keys(section: type[Section], values: object, prefix: str = "") -> None:
    """Raise UserError for a key that no section has, or that one needs and lacks."""
    if not isinstance(values, dict):
        # Reported later, with its value.
        return
    keys = {each.name: each for each in declared(section)}
    own = loss_keys() if section is LossConfig else frozenset()
    for name in sorted(values.keys() - keys.keys() - own):
        raise UserError(unknown_key(f"{prefix}{name}"))
    needed = {name for name, each in keys.items() if each.default is not None}
    for name in sorted(needed - values.keys()):
        raise UserError(_removed(f"{prefix}{name}"))
    for name, each in keys.items():
        if "section" in each.metadata and name in values:
            _check_keys(each.metadata["section"], values[name], f"{prefix}{name}.")


def _check_keys_of_group(group: str, values: object, choice: str) -> None:
    """Raise UserError where a group has other keys than the file that it was composed from."""
    if not isinstance(values, dict) or group == "model":
        return
    # A preset of the user's own has the keys of what it builds on, by whose name they are checked below.
    known = choice_keys(group, choice) if choice in group_choices(group) else frozenset(values)
    for name in sorted(values.keys() ^ known):
        raise UserError(unknown_key(f"{group}.{name}", choice) if name in values else _removed(f"{group}.{name}"))


def _removed(name: str) -> str:
    return f"{name}: removed by ~, but required. Drop it from the command line, or give it a value."


def _check_group_names(loss: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Raise UserError where a name is no loss's or trainer's, or its section has the keys of another."""
    for group, found in {"loss": loss, "trainer": trainer}.items():
        known = group_keys(group)
        if found["name"] not in known:
            raise UserError(f"{group}.name: no {group} {found['name']!r}; {nearest(str(found['name']), known)}")
        if found.keys() != known[found["name"]]:
            name = found["name"]
            raise UserError(f"{group}.name: found {name!r} with the keys of another {group}. Choose it by {group}={name}.")
