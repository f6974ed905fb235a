"""Configurations that runs have left on disk: written, read, and taken as the beginning of another."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from preference_training.configuration.composition import (
    GROUPS,
    compose_overrides,
    default_values,
    in_open_section,
    known_keys,
    loss_keys,
)
from preference_training.configuration.keys import Section, declared
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import LossConfig, ModelConfig
from preference_training.configuration.validation import validate
from preference_training.core.errors import UserError, first_line, nearest
from preference_training.core.values import UNREADABLE

CONFIG = "config.yaml"


def save_config(config: RunConfig, run_dir: Path) -> None:
    """Write config.yaml, as it was composed. Raises OSError."""
    OmegaConf.save(OmegaConf.create(config.as_composed), run_dir / CONFIG)


def read_config(run_dir: Path) -> dict[str, Any]:
    """The configuration that a run has left in its directory, in plain values; empty where it cannot be read."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG), resolve=True)
    except (*UNREADABLE, OmegaConfBaseException, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def as_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(values))


def model_config(values: dict[str, Any], **changes: Any) -> ModelConfig:
    """The section `model` that a run has left, unchecked: keys that it did not know yet have their defaults."""
    defaults = OmegaConf.create(default_values(model="base_model")["model"])
    return ModelConfig.of(OmegaConf.to_container(OmegaConf.merge(defaults, values, changes), resolve=True))


def known_values(then: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without removed keys. Raises one of UNREADABLE for a malformed configuration."""
    known = _known(then, RunConfig)
    if not all(isinstance(known[group], dict) for group in GROUPS):
        raise TypeError("no configuration of a run")
    return known


def _known(values: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    # Keys that only one loss has are no fields.
    own = loss_keys() if section is LossConfig else frozenset()
    known = {name: values[name] for name in own & values.keys()}
    for each in declared(section):
        if each.name in values:
            inner, value = each.metadata.get("section"), values[each.name]
            known[each.name] = _known(value, inner) if inner and isinstance(value, dict) else value
    return known


def changed_config(
    then: dict[str, Any], run: Path, fixed: dict[str, Any], overrides: list[str], evaluation: dict[str, Any]
) -> RunConfig:
    """The configuration of a run (`known_values`), with other values; validated.

    fixed: values by sections. overrides: "key=value", as on train.py's command line. evaluation: values of that section, which
    is never the run's own. Keys that the run did not know yet have their defaults. Raises UserError, also where the run's own
    values would have code executed.
    """
    base, _ = compose_overrides("model=blank_model", f"loss={then['loss']['name']}", f"trainer={then['trainer']['name']}")
    config = OmegaConf.merge(base, then, {"evaluation": base.evaluation}, fixed)
    for text in overrides:
        config = _overridden(config, text)
    config = OmegaConf.merge(config, {"evaluation": evaluation})
    _refuse_code(OmegaConf.to_container(config), overrides, run)
    return validate(config)


def _refuse_code(values: dict[str, Any], overrides: list[str], path: Path) -> None:
    """Raise UserError where a run's configuration, which may be untrusted, would execute code."""
    named = {
        "loss.function": values["loss"].get("function"),
        "datasets": next((text for text in _texts(values["datasets"]) if ".py:" in text), None),
        "model.trust_remote_code": "true" if values["model"].get("trust_remote_code") else None,
    }
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    for key, code in named.items():
        if code is not None and not given & {key, key.partition(".")[0]}:
            raise UserError(
                f"{key}: the run of {path} has {code}, which would execute code. If you trust it, confirm: {key}={code}."
            )


def _texts(value: Any) -> list[str]:
    """All strings in nested lists and dicts."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for each in inside for text in _texts(each)]


def _overridden(config: DictConfig, text: str) -> DictConfig:
    """Apply "key=value" as on train.py's command line to a configuration. Raises UserError for other overrides."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        [override] = OverridesParser.create().parse_overrides([text])
    except HydraException as error:
        raise UserError(f"{text}: {first_line(error)}. Expected key=value, as on train.py's command line.") from error
    key = override.key_or_group
    if override.is_sweep_override() or override.is_delete():
        raise UserError(f"{text}: expected key=value, with one value.")
    if key in GROUPS:
        # Replace the whole group: another choice may have other keys.
        return OmegaConf.create({**config, key: compose_overrides(text)[0][key]})
    if key not in known_keys() and not in_open_section(key):
        raise UserError(f"{key}: no such key; {nearest(key, known_keys())}")
    OmegaConf.update(config, key, override.value(), merge=False, force_add=True)
    return config
