"""The registry of data sets: a name becomes a loader.

A loader is a function `(split, silent=False, cache_dir=None)`; what it returns is described in `preference_datasets.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from preference_training.core.errors import UserError, nearest
from preference_training.core.files import run_file
from preference_training.data.files import EXPECTED
from preference_training.data.records.record import Items, Records

Prompts = Literal["dialogues", "conversations"]


@dataclass(frozen=True)
class Dataset:
    """A loader, and the properties of its data.

    truncation_mode: which end of a prompt to keep. prompts: "dialogues" (texts with HH markers, which get no system prompt) or
    "conversations" (lists of turns), so that an export knows what template=null rendered; None if undeclared. skip_bad_rows:
    for public sets, whose rows the user cannot fix. fingerprint: returns a short text that identifies the records of a split
    without loading them; None if that is impossible. sft_note: shown with loss=sft where it learns fewer than all preferred
    responses. held_out_by_share: prompts are held out by their hash, without a test split. is_user_code: the loader is the
    user's code, which may change although its data does not. hub_id: of the set on the Hugging Face hub.
    """

    load: Callable[..., Records | Items]
    truncation_mode: str = "keep_start"
    prompts: Prompts | None = None
    skip_bad_rows: bool = False
    fingerprint: Callable[..., str] | None = None
    sft_note: str | None = None
    held_out_by_share: bool = False
    is_user_code: bool = False
    hub_id: str | None = None


DATASETS: dict[str, Dataset] = {}


# Files of token ids, which have no texts.
TOKENIZED_SUFFIX = ".pt"


def register(name: str, truncation_mode: str = "keep_start", prompts: Prompts | None = None):
    """Register a loader as `name`. Dialogues need `truncation_mode="keep_end"`: the response is to their last turn."""

    def decorator(load):
        DATASETS[name] = Dataset(load, truncation_mode, prompts)
        return load

    return decorator


def find_dataset(name: str) -> Dataset:
    """The data set of a registered name or of `FILE.py:NAME`. Raises UserError if there is none."""
    if name in DATASETS:
        return DATASETS[name]
    if ".py:" in name:
        return _find_user_dataset(*name.rsplit(":", 1))
    raise UserError(
        f"datasets: unknown data set {name!r}; {nearest(name, DATASETS)} "
        f"A file must end in {EXPECTED}, or {TOKENIZED_SUFFIX}; a set of the hub is ORGANIZATION/NAME; "
        "a loader of your own is FILE.py:NAME."
    )


def dataset_entries(config: dict | None) -> list[dict]:
    """The entries of `datasets` in a configuration of plain values, each as a dict."""
    given = [] if config is None else config["datasets"]
    return [entry if isinstance(entry, dict) else {"name": entry} for entry in (given if isinstance(given, list) else [given])]


@cache
def _run_user_file(path: Path) -> dict[str, Dataset]:
    """Run a Python file once. Returns what it registers, outside the registry: two files may use the same name."""
    known = dict(DATASETS)
    try:
        run_file(path, "data")
        return {name: dataset for name, dataset in DATASETS.items() if known.get(name) is not dataset}
    finally:
        DATASETS.clear()
        DATASETS.update(known)


def _find_user_dataset(file: str, name: str) -> Dataset:
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"datasets: {file}: no such file. Expected a Python file that registers {name!r}.")
    registered = _run_user_file(path)
    if name not in registered:
        hint = nearest(name, registered) if registered else "it registers none."
        raise UserError(f"datasets: {file} registers no data set {name!r}; {hint}")
    return replace(registered[name], is_user_code=True)
