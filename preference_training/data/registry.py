"""The registry of data sets: a name becomes a loader.

A loader is a function `(split, silent=False, cache_dir=None)`; what it returns is described in `preference_datasets.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from preference_training.core.errors import UserError, nearest
from preference_training.core.files import run_file
from preference_training.data.files import DATA_SUFFIXES
from preference_training.data.rows.records import Items, Records

Prompts = Literal["dialogues", "conversations"]


@dataclass(frozen=True)
class Dataset:
    """A loader, and everything that is said of its data.

    truncation_mode is the end of a prompt that matters. prompts: whether they are "dialogues" (texts with HH markers, which
    get no system prompt) or "conversations" of turns, so that an export knows what template=null has written; None where
    that is not said. skip_bad_rows is for public sets, whose rows are not the user's to fix. fingerprint says in advance, as a
    short text, what the loader will give for a split: None where only loading tells. about_sft is said where loss=sft learns
    less than all preferred answers, and one might expect them all. held_out_by_share: a share of its prompts is held out by
    their hash, and no test split of its own. of_user: the loader is code of the user's, which may change without its data.
    hub_id: where the set lies on the Hugging Face hub.
    """

    load: Callable[..., Records | Items]
    truncation_mode: str = "keep_start"
    prompts: Prompts | None = None
    skip_bad_rows: bool = False
    fingerprint: Callable[..., str] | None = None
    about_sft: str | None = None
    held_out_by_share: bool = False
    of_user: bool = False
    hub_id: str | None = None


DATASETS: dict[str, Dataset] = {}


# Files of token ids, which have no texts.
TOKENIZED_SUFFIX = ".pt"


def register(name: str, truncation_mode: str = "keep_start", prompts: Prompts | None = None):
    """Make a loader known as `name`. Dialogues want `truncation_mode="keep_end"`: their last turn is what is answered."""

    def decorator(load):
        DATASETS[name] = Dataset(load, truncation_mode, prompts)
        return load

    return decorator


def find_dataset(name: str) -> Dataset:
    """The data set of a registered name or of `FILE.py:NAME`. Raises UserError for a name that is neither."""
    if name in DATASETS:
        return DATASETS[name]
    if ".py:" in name:
        return _dataset_of_user_file(*name.rsplit(":", 1))
    raise UserError(
        f"datasets: unknown data set {name!r}; {nearest(name, DATASETS)} "
        f"A file must end in one of {', '.join(DATA_SUFFIXES)} or {TOKENIZED_SUFFIX}; a set of the hub is ORGANISATION/NAME; "
        "a loader of your own is FILE.py:NAME."
    )


def dataset_entries(config: dict | None) -> list[dict]:
    """The entries of `datasets` in a configuration of plain values, each as a dict."""
    given = [] if config is None else config["datasets"]
    return [entry if isinstance(entry, dict) else {"name": entry} for entry in (given if isinstance(given, list) else [given])]


@cache
def _run_user_file(path: Path) -> dict[str, Dataset]:
    """Run a Python file, once. Returns what it registers, outside the registry: two files may use the same name."""
    known = dict(DATASETS)
    try:
        run_file(path, "data")
        return {name: dataset for name, dataset in DATASETS.items() if known.get(name) is not dataset}
    finally:
        DATASETS.clear()
        DATASETS.update(known)


def _dataset_of_user_file(file: str, name: str) -> Dataset:
    path = Path(file).absolute()
    if not path.is_file():
        raise UserError(f"datasets: {file}: no such file. Expected a Python file that registers {name!r}.")
    registered = _run_user_file(path)
    if name not in registered:
        hint = nearest(name, registered) if registered else "it registers none at all."
        raise UserError(f"datasets: {file} registers no data set {name!r}; {hint}")
    return replace(registered[name], of_user=True)
