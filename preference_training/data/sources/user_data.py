"""The user's own rows: a file, files, a directory or a set of the hub, read through a field map and split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import ClassVar

from preference_training.core.errors import UserError
from preference_training.data.records.held_out import split_by_hash
from preference_training.data.records.record import Items, Prompt, prompt_text
from preference_training.data.records.report import DataReport
from preference_training.data.registry import TOKENIZED_SUFFIX
from preference_training.data.rows.field_maps import FIRST_ROWS, FieldMap, FoundMap
from preference_training.data.rows.grouping import group_rows
from preference_training.data.sources.locations import Part, Source, find_source
from preference_training.data.sources.storage import content_hash


@dataclass(frozen=True)
class UserData:
    """A user's file, hub set or local directory, read through a field map.

    The held-out split is `test_path`, `test_split`, or a share of the prompts, chosen by a hash of what the model reads.
    """

    path: str
    field_map: FieldMap = field(default_factory=FieldMap)
    held_out_share: float = 0.05
    split: str = "train"
    test_split: str | None = None
    test_path: str | None = None
    subset: str | None = None
    data_dir: str | None = None
    streaming: bool = False

    OPTIONS: ClassVar = ("split", "test_split", "test_path", "subset", "data_dir", "streaming", "held_out_share")

    @property
    def by_hash(self) -> bool:
        """Whether both splits come from the same rows."""
        return not (self.test_path or self.test_split)

    def load(
        self,
        split: str,
        silent: bool = False,
        cache_dir: str | None = None,
        report: DataReport | None = None,
        text_of: Callable[[Prompt], str] = prompt_text,
    ) -> Items:
        """The loader. Raises UserError with file and row, also without any usable row."""
        report = report if report is not None else DataReport()
        # Both splits of a set that is split by hash read all rows: count what is skipped only once.
        counts = DataReport(report.skip_bad_rows) if self.by_hash and split == "test" else report
        source = self._source(split, cache_dir)
        found = self.found_map(split, cache_dir)
        items = group_rows(found.map_rows(source.rows(counts), source.place, counts), counts)
        items = self._at_least_one(items, source.place, counts)
        return split_by_hash(items, split, self.held_out_share, text_of) if self.by_hash else items

    def fingerprint(self, split: str, cache_dir: str | None) -> str | None:
        """A text that identifies the data of a split; None for a stream, which only reading it does."""
        path = self.path_of(split)
        # Token ids are no rows.
        is_rows = not path.endswith(TOKENIZED_SUFFIX)
        source = self._source(split, cache_dir).fingerprint() if is_rows else content_hash(Path(path))
        by_hash = f"{split} {self.held_out_share}" if self.by_hash else ""
        if not source:
            return None
        found = sorted(self.found_map(split, cache_dir).found_keys.items()) if is_rows else []
        return f"{source} {by_hash} {field_map_text(self.field_map)}" + f" found {found}" * bool(found)

    def found_map(self, split: str, cache_dir: str | None) -> FoundMap:
        """The field map, with what it does not say as found in the first rows of a split."""
        return self.field_map.found_in(self.first_rows(split, cache_dir))

    def first_rows(self, split: str, cache_dir: str | None) -> list[dict]:
        """The rows of a split from which its format is found; those that cannot be read are left out."""
        rows = self._source(split, cache_dir).rows(DataReport(skip_bad_rows=True))
        return [row for _, row in islice(rows, FIRST_ROWS)]

    def source_of(self, rows: Sequence[int], split: str) -> str:
        """The name of the record of some rows, for messages."""
        numbers = [*map(str, rows[:3]), *["..."] * (len(rows) > 3)]
        return f"{self.path_of(split)}, row{'s' * (len(rows) > 1)} {', '.join(numbers)}"

    def path_of(self, split: str) -> str:
        """Where the rows of a split are."""
        return self.test_path if split == "test" and self.test_path else self.path

    def _source(self, split: str, cache_dir: str | None) -> Source:
        held_out = split == "test"
        splits = [self.split, self.test_split or self.split]
        part = Part(splits[held_out], splits[not held_out], self.subset, self.data_dir, self.streaming)
        return find_source(self.path_of(split), part, cache_dir)

    def _at_least_one(self, items: Items, place: str, report: DataReport) -> Items:
        empty = True
        for item in items:
            empty = False
            yield item
        if empty:
            found = "; ".join(line.strip() for line in report.lines()) or "it has none"
            raise UserError(
                f"datasets: {place}: no usable row ({found}). Expected rows with chosen and rejected, and prompt unless both "
                "are dialogues, or a map of the fields: datasets=[{path: ..., prompt: ..., chosen: ..., rejected: ...}]."
            )


# The fields in every fingerprint; later additions are included only where they are set.
ALWAYS_NAMED = (
    "prompt", "chosen", "rejected", "system", "response", "score", "responses", "scores", "ranks", "implicit_prompt", "where",
    "top_k",
)  # fmt: skip


def field_map_text(field_map: FieldMap) -> str:
    """A field map as text, for fingerprints: unchanged when FieldMap gains fields that the map does not set."""
    usual = FieldMap()
    values = {item.name: getattr(field_map, item.name) for item in fields(FieldMap)}
    more = [name for name, value in values.items() if name not in ALWAYS_NAMED and value != getattr(usual, name)]
    return f"FieldMap({', '.join(f'{name}={values[name]!r}' for name in (*ALWAYS_NAMED, *more))})"
