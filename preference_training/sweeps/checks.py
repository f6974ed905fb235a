"""Checking the values of a sweep before its first job, which may take hours until the last is reached."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from preference_training.configuration.composition import explain_composition_error, own_folder, parsed_override
from preference_training.configuration.validation import validate
from preference_training.core.errors import UserError
from preference_training.data.checks import check_run


def mistakes(config: DictConfig, arguments: Sequence[str]) -> list[str]:
    """What is wrong with jobs of a sweep, each once. Empty where a search chooses the values.

    config: Hydra's for the sweep, inside `hydra.main`; arguments: its overrides. Each value of a key is tried with the first
    values of the others: what is wrong with others together is seen in the job itself.
    """
    if not config.hydra.sweeper.get("_target_", "").endswith(".BasicSweeper"):
        return []
    with _hydra_as_it_is():
        found = [_mistake(config, overrides) for overrides in _one_changed(arguments)]
    return list(dict.fromkeys(each for each in found if each))


@contextmanager
def _hydra_as_it_is() -> Iterator[None]:
    """Inside, references to Hydra's own values may be those of a job; afterwards they are what they were."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    try:
        yield
    finally:
        hydra.cfg = before


def _one_changed(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The command line of a sweep's first job, and those of the jobs that differ from it in one value."""
    parsed = [(text, parsed_override(text)) for text in arguments]
    values = [list(each.sweep_string_iterator()) if each and each.is_sweep_override() else [] for _, each in parsed]
    of_key = [
        [f"{each.get_key_element()}={value}" for value in own] if own else [text]
        for (text, each), own in zip(parsed, values, strict=True)
    ]
    first = [texts[0] for texts in of_key]
    yield first
    for place, texts in enumerate(of_key):
        yield from ([*first[:place], text, *first[place + 1 :]] for text in texts[1:])


def _mistake(config: DictConfig, overrides: list[str]) -> str | None:
    """What is wrong with the job of a command line; None if nothing is seen."""
    try:
        job = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
        runtime = job.hydra.runtime
        OmegaConf.set_readonly(job, False)
        OmegaConf.set_struct(job, False)
        # Any job will do: what depends on its number is a number.
        job.hydra.job.num, job.hydra.job.id = 0, "0"
        HydraConfig.instance().set_config(job)
        del job["hydra"]
        check_run(validate(job, overrides, dict(runtime.choices), own_folder(runtime.config_sources)))
    except UserError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return explain_composition_error(error, overrides)
    return None
