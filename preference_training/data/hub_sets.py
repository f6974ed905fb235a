"""Named sets of the Hugging Face hub: their rows, checked, and their splits."""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Real
from pathlib import Path

from preference_training.core.errors import UserError, first_line
from preference_training.data.records.held_out import split_by_hash
from preference_training.data.records.record import Items, NumberedRows, prompt_text
from preference_training.data.records.report import DataReport
from preference_training.data.registry import DATASETS, Dataset, Prompts
from preference_training.data.rows.conversations import RowError, json_type
from preference_training.data.rows.values import field_value
from preference_training.data.sources.filters import RowFilter, Where
from preference_training.data.sources.tables import rows_of_batch


@cache
def load_hub(path: str, subset: str | None, data_dir: str | None, split: str, cache_dir: str | None, streaming: bool = False):
    """One split of a set of the hub, or of a local directory in the same layout; streaming: read as needed, kept nowhere.

    Raises UserError where it cannot be loaded: no network and nothing cached, no such split, damaged files.
    """
    import datasets

    try:
        return datasets.load_dataset(path, subset, data_dir=data_dir, split=split, cache_dir=cache_dir, streaming=streaming)
    except Exception as error:  # a dozen types: network errors, damaged files, scripts, YAML
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"datasets: {path} (split {split}) could not be loaded: {reason}. Expected a data set of the hub, and a network "
            "or a copy in the hub library's cache; or the path of a local directory with its files ({name: hh, data_dir: ...})."
        ) from error


def hub_rows(dataset, place: str, report: DataReport | None = None) -> NumberedRows:
    """(row number, row) of a loaded hub set, numbered from 1. Raises UserError naming `place` for damaged values."""
    number, report = 0, report or DataReport()
    try:
        for batch in dataset.with_format("arrow").iter(batch_size=1000):
            for row in rows_of_batch(batch, report):
                number += 1
                yield number, row
    except Exception as error:  # half a dozen types: text that is not UTF-8, invalid dates
        raise UserError(f"datasets: {place}, after row {number}: cannot be read, or damaged: {error}.") from error


KINDS = {str: "a text", Real: "a number", list: "a list"}


def valid_rows(rows: NumberedRows, place: str, report: DataReport, kinds: dict[str, type]) -> Iterator[dict]:
    """The rows whose fields have values of these kinds; others go to the report. A name with dots leads into each list item."""
    for number, row in rows:
        report.rows_read += 1
        try:
            for name, kind in kinds.items():
                value = field_value(row, name)
                wrong = [item for item in (value if "." in name else [value]) if not isinstance(item, kind)]
                if wrong:
                    raise RowError(f"field {name!r} is {json_type(wrong[0])}, expected {KINDS[kind]}.")
        except RowError as error:
            report.bad_row(UserError(f"datasets: {place}, row {number}: {error}"))
        else:
            yield row


@dataclass(frozen=True)
class HubSet:
    """The location of a named data set on the hub, the fields that are read, and its splits.

    Without a test split, `held_out_share` of the prompts are held out, and at least one. folders: those that are also
    registered as data sets, NAME-FOLDER. subset: the folder that is read unless an entry names another.
    """

    path: str
    fields: tuple[str, ...]
    train: str = "train"
    test: str | None = None
    held_out_share: float = 0.01
    folders: tuple[str, ...] = ()
    subset: str | None = None

    def load(self, split: str, cache_dir: str | None, data_dir: str | None, subset: str | None = None):
        """The hub's split that `split` ("train" or "test") comes from. `subset` is a folder of the set."""
        hub_split = self.test if split == "test" and self.test else self.train
        subset = subset or self.subset
        folder = str(Path(data_dir) / (subset or "")) if data_dir else self.path
        loaded = load_hub(folder, None, None if data_dir else subset, hub_split, cache_dir)
        missing = [name for name in self.fields if name not in loaded.column_names]
        if missing:
            is_export = data_dir and {"responses", "pairs", "sft_target"} <= set(loaded.column_names)
            instead = f" Records are read by their path: datasets=['{folder}/']." if is_export else ""
            raise UserError(
                f"datasets: {folder}, split {hub_split}: no field {', '.join(missing)}; it has "
                f"{', '.join(loaded.column_names)}. Expected the fields of {self.path}: {', '.join(self.fields)}.{instead}"
            )
        return loaded


def hub_set(
    name: str, hub: HubSet, prompts: Prompts, truncation_mode: str = "keep_start", sft_note: str | None = None
) -> Callable[[Callable[..., Items]], Callable[..., Items]]:
    """Register a function `(rows, report, *, options)` → items as the loader of a set of the hub; the rest: `Dataset`."""

    def decorator(items_of):
        def load(
            split,
            silent=False,
            cache_dir=None,
            data_dir=None,
            report=None,
            text_of=prompt_text,
            subset: str | None = None,
            where: Where | None = None,
            **options,
        ):
            counts = report if report is not None else DataReport(skip_bad_rows=True)
            loaded = hub.load(split, cache_dir, data_dir, subset)
            rows = hub_rows(loaded, f"{name} ({split})")
            if where:
                rows = RowFilter(where, counts_all=False).apply(rows, name, counts)
            items = items_of(rows, counts, **options)
            items = items.items() if isinstance(items, dict) else items
            yield from items if hub.test else split_by_hash(items, split, hub.held_out_share, text_of)
            if report is None and not silent:
                for line in counts.lines():
                    print(f"{name} {split}: {line}", flush=True)

        def fingerprint(split, cache_dir, data_dir=None, subset=None, **options):
            return f"{hub.load(split, cache_dir, data_dir, subset)._fingerprint} {sorted(options.items())}"

        load.__doc__ = f"{items_of.__doc__} Hub: {hub.path}; `data_dir`: a local copy, `subset`: a folder, `where`: which rows."
        # The keys that an entry may have: the parameters of both.
        own = list(inspect.signature(load).parameters.values())[:-1]
        extra = [p for p in inspect.signature(items_of).parameters.values() if p.kind is p.KEYWORD_ONLY]
        load.__signature__ = inspect.Signature([*own, *extra])
        whole = DATASETS[name] = Dataset(
            load,
            truncation_mode,
            prompts,
            skip_bad_rows=True,
            fingerprint=fingerprint,
            sft_note=sft_note,
            held_out_by_share=not hub.test,
            hub_id=hub.path,
        )
        for folder in hub.folders:
            of_folder = partial(load, subset=folder), partial(fingerprint, subset=folder)
            DATASETS[f"{name}-{folder}"] = replace(whole, load=of_folder[0], fingerprint=of_folder[1])
        return items_of

    return decorator


# For small sets: all rows of a prompt are grouped, however far apart they are.
WHOLE_SET = sys.maxsize
