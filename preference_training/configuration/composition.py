"""The YAML files of config/: which keys exist, and how to explain an override that does not compose."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from preference_training.configuration.keys import NEWER, OPEN, key_names
from preference_training.configuration.model_names import BASES, CONFIG_DIR, as_override, name_models
from preference_training.configuration.other_tools.lookup import answer, near_name
from preference_training.configuration.schema import RunConfig, keys_with
from preference_training.core.errors import UserError, nearest
from preference_training.core.values import dotted

GROUPS = ("model", "loss", "trainer")
# Groups of which config.yaml chooses nothing.
OPTIONAL_GROUPS = ("adapter", "experiment", "rounds")
ALL_KEYS = "`python train.py --help` lists the usual keys, docs/key-reference.md all."


def in_open_section(name: str) -> bool:
    """Whether a key, or an override of it, is in a section that may have any keys."""
    return name.startswith(tuple(f"{section}." for section in keys_with(OPEN)))


def force_open_sections(arguments: list[str]) -> list[str]:
    """Command-line arguments in which overrides inside open sections may name new keys without Hydra's leading +."""
    # With keys in braces; {} sets a section to nothing.
    sections = tuple(f"{section}={{" for section in keys_with(OPEN))
    forced = [in_open_section(text) or (text.startswith(sections) and not text.endswith("={}")) for text in arguments]
    return [f"++{text}" if is_forced else text for text, is_forced in zip(arguments, forced, strict=True)]


def resolve_groups(overrides: Sequence[str], folder: Path | None = None) -> list[str]:
    """Overrides in which `model` may be any model, and a group with no default needs no leading +.

    folder: one with presets of the user's own, beside those of config/. Raises UserError where a model does not exist.
    """
    choices = tuple(f"{group}=" for group in OPTIONAL_GROUPS)
    return name_models([f"+{text}" if text.startswith(choices) else text for text in overrides], folder)


def defer_keys_of_swept_groups(arguments: list[str]) -> list[str]:
    """Command-line arguments in which a key of a group that is swept over is set in each job, and not before.

    Hydra composes once without what is swept over: with loss=dpo,ipo that is under the default loss, which may not have a key
    that all of the jobs have. A sweep over the key's one value is the same for the jobs, each of which is checked.
    """
    given = [override for text in arguments if (override := parsed_override(text))]
    swept = {override.key_or_group for override in given if override.is_sweep_override()}
    swept |= {key for text in arguments for key in _swept_by_experiment(text)}
    groups = tuple(f"{group}." for group in swept & set(GROUPS))
    return [_as_sweep(text) if text.startswith(groups) else text for text in arguments] if groups else arguments


def parsed_override(text: str) -> Any:
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
    override, (key, _, value) = parsed_override(text), text.partition("=")
    # Hydra's choice() does not know null.
    if override is None or override.is_sweep_override() or override.value() is None:
        return text
    deferred = parsed_override(f"{key}=choice({value})")
    if deferred is None or not deferred.is_sweep_override() or deferred.value().list != [override.value()]:
        # It may mean something else in there.
        value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{key}=choice({value})"


def compose_overrides(*overrides: str, folder: Path | None = None) -> tuple[DictConfig, dict[str, str]]:
    """What overrides compose to, and the file that each group was composed from. folder: presets of the user's own.

    Raises UserError where one names what does not exist.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    given = force_open_sections(resolve_groups(overrides, folder))
    if folder is not None:
        given.insert(0, f"hydra.searchpath=[{as_override(f'file://{folder.absolute()}')}]")
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = compose("config", overrides=given, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain_composition_error(error, overrides)) from error
    choices = dict(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return config, choices


def own_folder(sources: Iterable[Any]) -> Path | None:
    """The folder of --config-dir among the places that Hydra has composed from (hydra.runtime.config_sources)."""
    return next((Path(source.path) for source in sources if source.provider == "command-line"), None)


@cache
def known_keys() -> frozenset[str]:
    """Dotted names of all keys, those that only one loss has included, and the groups."""
    names = {*key_names(RunConfig), *(f"loss.{name}" for name in loss_keys())}
    return frozenset(GROUPS) | {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


@cache
def default_values(**groups: str) -> dict[str, Any]:
    """The plain values of config.yaml, with the groups' files of these names; an unknown name is an empty section."""
    values = OmegaConf.load(CONFIG_DIR / "config.yaml")
    for group, name in groups.items():
        # A name in data forms no path.
        known = name in (*BASES, *group_choices(group))
        values[group] = {}
        values = OmegaConf.merge(values, *(_choice_files(group, name) if known else ()))
    return {key: value for key, value in OmegaConf.to_container(values).items() if key not in ("hydra", "defaults")}


def preset_of(choice: str) -> str:
    """The preset that a choice of the group `model` is, or builds on where it is the name of a model."""
    return choice if choice in (*BASES, *group_choices("model")) else "pretrained"


def _choice_files(group: str, name: str) -> list[DictConfig]:
    """The files of a choice of a group, each after those that it overrides, as parts of the whole configuration."""
    path = CONFIG_DIR / group / f"{name}.yaml"
    file = OmegaConf.load(path)
    bases = [base.partition("@")[0] for base in file.pop("defaults", ()) if isinstance(base, str) and base != "_self_"]
    is_global = path.read_text().startswith("# @package _global_")
    return [part for base in bases for part in _choice_files(group, base)] + [
        file if is_global else OmegaConf.create({group: file})
    ]


def usual_values(config: RunConfig) -> dict[str, list[Any]]:
    """The values, by dotted names, that are no change of a run's settings where config.yaml has others.

    Those of its preset, and what became of null.
    """
    groups = {"loss": config.loss.name, "trainer": config.trainer.name}
    general, own = (dotted(default_values(model=model, **groups)) for model in ("base_model", config.origin.preset))
    usual = {key: [value] for key, value in own.items() if value != general.get(key)}
    for key, value in dotted(config.as_dict()).items():
        if key in config.origin.nulls and value is not None:
            usual[key] = [None, value]
    return usual


def newer_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The defaults, by dotted names, of the keys that configurations of the first version with such values lack."""
    loss = values.get("loss")
    name = str(loss.get("name")) if isinstance(loss, dict) else ""
    defaults = dotted(default_values(loss=name, model="base_model"))
    return {key: value for key, value in defaults.items() if key in keys_with(NEWER)}


def explain_composition_error(error: Exception, overrides: Sequence[str] = ()) -> str:
    """One message for what Hydra or OmegaConf found wrong with one of the overrides, with the nearest name that exists."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        group, _, name = match[1].partition(".")
        if group in GROUPS and not name:
            return f"{group}: found keys in braces. Expected {group}=NAME, and its keys one by one: {group}.KEY=VALUE."
        given = [text.removeprefix(f"{group}=") for text in overrides if text.startswith(f"{group}=")]
        return unknown_key(match[1], given[-1] if given else _default_choice(group))
    if match := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, choice = match.groups()
        return f"{group}={choice}: there is no such {group}; {nearest(choice, group_choices(group))}"
    if override := getattr(error, "override", None):
        key, equals, value = override.partition("=")
        if not equals:
            group = next((group for group in (*GROUPS, *OPTIONAL_GROUPS) if key in group_choices(group)), None)
            return f"{key}: found a word by itself, expected KEY=VALUE{f'; did you mean {group}={key}?' if group else '.'}"
        return (
            f"{key}: found {value}, which Hydra cannot read as a value. Expected quotes within quotes around a text with "
            f"characters such as <, >, : or {{: '{key}=\"{value}\"'."
        )
    if match := re.search(r"Ambiguous value for argument '([^'=]+)=(.*?)'\n", text):
        return f"{match[1]}: found several values, {match[2]}. Add -m for a sweep over them."
    if "does not support sweep type" in text and "INTERVAL" in text:
        return (
            "interval(...): Hydra's own sweeper goes through values one by one. List them, or search with hydra/sweeper=optuna."
        )
    if match := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return f"{match[1]}: not given. Expected a value on the command line: {match[1]}=..."
    return "\n".join(part for part in (text, str(error.__cause__ or "")) if part)


def unknown_key(key: str, choice: str = "", value: object = None) -> str:
    """Explain a key that does not exist, or not here.

    choice: what was chosen of its group, of a sweep several. value: what the key was to be, if that is known.
    """
    if key in known_keys():
        group, name = key.split(".", 1)
        if group in OPTIONAL_GROUPS:
            return f"{key}: these keys come with +{group}=default. Add it to the command line."
        owners: list[str] = []
        others: list[str] = []
        for known in group_choices(group):
            (owners if name in choice_keys(group, known) else others).append(known)
        if len(owners) > 2 * len(others):
            lacking = next((one for one in choice.split(",") if one in others), None)
            its = sorted(choice_keys(group, lacking) - {"name"}) if lacking else []
            keys = f"{'its keys are' if len(its) > 1 else 'its key is'} {', '.join(its)}; " if its else ""
            this = f"{group}={lacking}" if lacking else f"this {group}"
            return f"{key}: {this} has no such key; {keys}every {group} has it except {', '.join(others)}."
        return f"{key}: this {group} has no such key. It belongs to {group}={', '.join(owners)}."
    given = None if value is None else str(value)
    if of_other_tool := answer(key, given):
        return of_other_tool
    hint = nearest(key, known_keys(), ALL_KEYS)
    if hint == ALL_KEYS and (other := near_name(key)):
        hint = f"did you mean {answer(other, given)}"
    return f"{key}: no such key; {hint}"


@cache
def _default_choice(group: str) -> str:
    """What config.yaml chooses of a group; "" where there is no such group."""
    defaults = OmegaConf.load(CONFIG_DIR / "config.yaml").defaults
    return next((str(each[group]) for each in defaults if not isinstance(each, str) and group in each), "")


@cache
def choice_keys(group: str, choice: str) -> frozenset[str]:
    """The keys that group=CHOICE has, those of the files that it builds on among them."""
    path = CONFIG_DIR / group / f"{choice}.yaml"
    file = OmegaConf.load(path)
    bases = [base.partition("@")[0] for base in file.get("defaults", ()) if isinstance(base, str) and base != "_self_"]
    # Of a preset that sets other keys too, those of its group.
    own = file.get(group, {}) if path.read_text().startswith("# @package _global_") else file
    return (frozenset(own) - {"defaults"}).union(*(choice_keys(group, base) for base in bases))


@cache
def group_keys(group: str) -> dict[str, frozenset[str]]:
    """The names that `loss.name` or `trainer.name` may be, each with the keys of its file."""
    files = [OmegaConf.load(CONFIG_DIR / group / f"{choice}.yaml") for choice in group_choices(group)]
    return {file.name: frozenset(file) for file in files if "name" in file}


@cache
def loss_keys() -> frozenset[str]:
    """The keys that any loss has, those without a field in `LossConfig` included."""
    return frozenset().union(*group_keys("loss").values())


def group_choices(group: str) -> list[str]:
    """The names that `group=NAME` may take."""
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml") if file.stem not in BASES)
