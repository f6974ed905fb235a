"""The YAML files of config/: which keys there are, and what to say of an override that does not compose."""

import re
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preference_training.core.errors import nearest

CONFIG_DIR = Path(__file__).parents[2] / "config"


GROUPS = ("model", "loss", "trainer")


# Sections whose keys are another library's or the user's, and so not listed in our files.
OPEN_SECTIONS = ("model.from_config", "optimizer_kwargs", "loss.options", "pruner_kwargs")


def force_open_sections(arguments: list[str]) -> list[str]:
    """Command-line arguments in which overrides inside open sections may name new keys without Hydra's leading +."""
    return [f"++{text}" if text.startswith(tuple(f"{name}." for name in OPEN_SECTIONS)) else text for text in arguments]


def defer_keys_of_swept_groups(arguments: list[str]) -> list[str]:
    """Command-line arguments in which a key of a group that is swept over is set in each job, and not before.

    Hydra composes once without what is swept over: with loss=dpo,ipo that is under the default loss, which may not have a key
    that all of the jobs have. A sweep over the key's one value is the same for the jobs, each of which is checked.
    """
    swept = {override.key_or_group for text in arguments if (override := _parsed(text)) and override.is_sweep_override()}
    swept |= {key for text in arguments for key in _swept_by_experiment(text)}
    groups = tuple(f"{group}." for group in swept & set(GROUPS))
    return [_as_sweep(text) if text.startswith(groups) else text for text in arguments] if groups else arguments


def _parsed(text: str):
    """Hydra's override of a command-line argument; None for one that is none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return None if text.startswith("-") else OverridesParser.create().parse_overrides([text])[0]
    except HydraException:
        return None


def _swept_by_experiment(text: str) -> set[str]:
    """The keys over which the file of an argument such as +experiment=NAME sweeps."""
    name = text.removeprefix("+experiment=")
    file = CONFIG_DIR / "experiment" / f"{name}.yaml"
    if name == text or not file.is_file():
        return set()
    return set(OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") or ())


def _as_sweep(text: str) -> str:
    """An override with one value as a sweep over just this; others as they are."""
    override, (key, _, value) = _parsed(text), text.partition("=")
    # Hydra's choice() does not know null.
    if override is None or override.is_sweep_override() or override.value() is None:
        return text
    deferred = _parsed(f"{key}=choice({value})")
    if deferred is None or not deferred.is_sweep_override() or deferred.value().list != [override.value()]:
        # It may mean something else in there.
        value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{key}=choice({value})"


@cache
def known_keys() -> frozenset[str]:
    """Dotted names of all keys and groups of the YAML files."""
    keys = set(GROUPS) | _leaves(OmegaConf.load(CONFIG_DIR / "config.yaml"))
    for group in GROUPS:
        for file in (CONFIG_DIR / group).glob("*.yaml"):
            if "@package _global_" not in file.read_text():
                keys |= {f"{group}.{key}" for key in _leaves(OmegaConf.load(file))}
    return frozenset(key for key in keys if not key.startswith(("hydra", "defaults")) and ".defaults" not in key)


def _leaves(config, prefix: str = "") -> set[str]:
    """Dotted names of the leaves of a configuration; an empty section is a leaf."""
    leaves: set[str] = set()
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and len(node):
            leaves |= _leaves(node, f"{prefix}{key}.")
        else:
            leaves.add(f"{prefix}{key}")
    return leaves


def explain_composition_error(error: Exception) -> str:
    """One message for what Hydra or OmegaConf found wrong with an override, with the nearest name that exists."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, choice = match.groups()
        return f"{group}={choice}: there is no such {group}; {nearest(choice, choices_of(group))}"
    if "does not support sweep type" in text and "INTERVAL" in text:
        return (
            "interval(...): Hydra's own sweeper goes through values one by one. List them, or search with hydra/sweeper=optuna."
        )
    if match := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return f"{match[1]}: not given. Expected a value on the command line: {match[1]}=..."
    return "\n".join(part for part in (text, str(error.__cause__ or "")) if part)


def _unknown_key(key: str) -> str:
    if key in known_keys():
        group, name = key.split(".", 1)
        owners = [choice for choice in choices_of(group) if name in _keys_of_choice(group, choice)]
        return f"{key}: this {group} has no such key. It belongs to {group}={', '.join(owners)}."
    return f"{key}: no such key; {nearest(key, known_keys())}"


def _keys_of_choice(group: str, choice: str) -> set[str]:
    """The keys that group=CHOICE has, those of the files that it builds on among them."""
    file = OmegaConf.load(CONFIG_DIR / group / f"{choice}.yaml")
    bases = [base for base in file.get("defaults", ()) if isinstance(base, str) and base != "_self_"]
    return set(file).union(*(_keys_of_choice(group, base) for base in bases))


def choices_of(group: str) -> list[str]:
    """The names that `group=NAME` may take."""
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml") if file.stem != "base_model")
