"""Where the rows of a path lie: a file, files of a folder or pattern, a directory that save_to_disk wrote, or the hub."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from preference_training.core.errors import UserError, first_line
from preference_training.data.files import EXPECTED, format_of, is_data_file, read_rows
from preference_training.data.hub_sets import hub_rows, load_hub
from preference_training.data.records.record import NumberedRows
from preference_training.data.records.report import DataReport
from preference_training.data.registry import TOKENIZED_SUFFIX
from preference_training.data.rows.values import UntypedRow
from preference_training.data.sources.storage import cloud_errors, content_hash, file_system, is_pattern, is_remote


class RowNumber(int):
    """A number of a row among those of several files, which is written as its number in its file."""

    text: str

    def __new__(cls, number: int, row: int, file: str):
        """The row `row` of `file`."""
        self = super().__new__(cls, number)
        self.text = f"{int(row)} of {file}"
        return self

    def __str__(self) -> str:
        return self.text


class Source(Protocol):
    """Rows that can be read and identified. place: its name in messages."""

    place: str

    def rows(self, report: DataReport) -> NumberedRows:
        """(row number, row); bad rows go to the report."""

    def fingerprint(self) -> str | None:
        """A text that identifies the rows; None if that takes reading them."""


@dataclass(frozen=True)
class FilesSource:
    """The rows of files, one after the other. note: a remark on what is beside them."""

    place: str
    files: tuple[str, ...]
    note: str | None = None

    def rows(self, report: DataReport) -> NumberedRows:
        """(row number, row); of several files the numbers say of which."""
        if self.note:
            report.note(self.note)
        if self.files == (self.place,):
            return read_rows(self.place, report)
        return self._of_several(report)

    def _of_several(self, report: DataReport) -> Iterator[tuple[int, dict]]:
        total = 0
        for file in self.files:
            name = file.removeprefix(self.place).lstrip("/")
            for number, row in read_rows(file, report):
                total += 1
                yield RowNumber(total, number, name), row

    def fingerprint(self) -> str:
        """The hash of a file, or of those of several."""
        hashes = [content_hash(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("".join(hashes).encode())


@dataclass(frozen=True)
class TableSource:
    """The rows of a data set of the hub's library, loaded or streaming."""

    place: str
    table: Any

    def rows(self, report: DataReport) -> NumberedRows:
        """(row number, row)."""
        rows = hub_rows(self.table, self.place, report)
        if self.table.info.builder_name != "csv":
            return rows
        return ((number, UntypedRow(row)) for number, row in rows)

    def fingerprint(self) -> str | None:
        """The library's; a stream has none."""
        # A stream's changes with every process.
        return self.table._fingerprint if hasattr(self.table, "num_rows") else None


@dataclass(frozen=True)
class Part:
    """Which rows of a path: a split, a subset and a folder of a set of the hub, and whether to stream it.

    other_split: the split that is read besides, as held out or for training.
    """

    split: str = "train"
    other_split: str | None = None
    subset: str | None = None
    data_dir: str | None = None
    streaming: bool = False


def is_location(name: str) -> bool:
    """Whether a text is the path of rows rather than the name of a data set."""
    return is_data_file(name) or "/" in name or is_pattern(name) or (name != "" and Path(name).is_dir())


def check_location(path: str) -> None:
    """Raise UserError where no rows can lie at a path; nothing is read."""
    if is_remote(path):
        file_system(path)
    elif is_pattern(path):
        _matching(path)
    elif (is_data_file(path) or path.endswith(TOKENIZED_SUFFIX)) and not Path(path).is_file():
        if not Path(path).is_dir():
            raise UserError(f"datasets: {path}: no such file. Expected a readable file; paths are relative to {Path.cwd()}.")
        if not any(is_data_file(each.name) for each in Path(path).rglob("*")):
            raise UserError(
                f"datasets: {path}: a directory. Expected a readable file, or a directory of data files: {EXPECTED}."
            )


def find_source(path: str, part: Part, cache_dir: str | None) -> Source:
    """The source of a path's rows. Raises UserError where there is none."""
    if is_pattern(path):
        return FilesSource(path, _matching(path))
    is_folder = _is_folder(path)
    if is_data_file(path) and not is_folder:
        return FilesSource(path, (path,))
    place = f"{path} ({part.split})"
    if is_folder and _is_saved(path):
        return TableSource(place, _load_saved(path, part.split))
    if is_folder and not (part.subset or part.data_dir or part.streaming) and (found := _files_of_split(path, part)):
        return found
    return TableSource(place, load_hub(path, part.subset, part.data_dir, part.split, cache_dir, part.streaming))


# What says which part of a set of the hub is read.
HUB_OPTIONS = ("data_dir", "split", "streaming", "subset", "test_split")


def options_without_effect(path: str, test_path: str | None, given: Container[str]) -> dict[str, str]:
    """The given options for sets of the hub that say nothing about the rows of a path and of a test path, with the reason."""
    ignored = {place: _ignored(place) for place in (path, test_path) if place and any(map(given.__contains__, HUB_OPTIONS))}
    found = {}
    for key in filter(given.__contains__, HUB_OPTIONS):
        # The held-out split may lie elsewhere.
        reasons = [of.get(key) for place, of in ignored.items() if key != "test_split" or place == (test_path or path)]
        if all(reasons):
            found[key] = reasons[0]
    return found


def _ignored(path: str) -> dict[str, str]:
    """The options that have no effect on a path's rows, with the reason."""
    if is_pattern(path):
        return dict.fromkeys(HUB_OPTIONS, "files of a pattern have no splits or subsets")
    is_folder = _is_folder(path)
    if is_data_file(path) and not is_folder:
        return dict.fromkeys(HUB_OPTIONS, "a file has no splits or subsets")
    if not is_folder or not _is_saved(path):
        return {}
    ignored = ("data_dir", "streaming", "subset") if _is_saved(path, SAVED[1:]) else HUB_OPTIONS
    return dict.fromkeys(ignored, f"what save_to_disk wrote here has no {'splits or ' * (ignored is HUB_OPTIONS)}subsets")


def _matching(pattern: str) -> tuple[str, ...]:
    """The data files whose paths match a pattern, sorted."""
    import fsspec.core

    if is_remote(pattern):
        system, path = file_system(pattern)
        with cloud_errors(pattern):
            names = [system.unstrip_protocol(name) for name in system.glob(path)]
    else:
        system = fsspec.core.url_to_fs("")[0]
        start = "" if Path(pattern).is_absolute() else f"{Path.cwd()}/"
        names = [name.removeprefix(start) for name in system.glob(pattern)]
    # As in a shell, files whose names begin with a dot are meant only where the pattern says so.
    hidden = pattern.rsplit("/", 1)[-1].startswith(".")
    names = [name for name in names if hidden or not name.rsplit("/", 1)[-1].startswith(".")]
    files = tuple(sorted(name for name in names if _holds_rows(name)))
    if not files:
        others = f"; {len(names)} of other kinds" if names else ""
        raise UserError(
            f"datasets: {pattern}: no data file matches{others}. Expected files ending in {EXPECTED}; paths are relative to "
            f"{Path.cwd()}."
        )
    return files


def _is_folder(path: str) -> bool:
    if not is_remote(path):
        return Path(path).is_dir()
    system, inside = file_system(path)
    with cloud_errors(path):
        return system.isdir(inside)


# ---- directories that save_to_disk wrote -----------------------------------------------------------------------------------

# Of one table, and of one with several splits.
SAVED = ("state.json", "dataset_dict.json")


def _is_saved(path: str, names: Sequence[str] = SAVED) -> bool:
    if not is_remote(path):
        return any((Path(path) / name).is_file() for name in names)
    system, inside = file_system(path)
    with cloud_errors(path):
        return any(system.exists(f"{inside.rstrip('/')}/{name}") for name in names)


def _load_saved(path: str, split: str):
    """The data set that save_to_disk wrote, or one of its splits."""
    import datasets

    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # half a dozen types, for damaged files
        raise UserError(
            f"datasets: {path}: cannot be loaded: {first_line(error)}. Expected a directory that save_to_disk wrote."
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise UserError(f"datasets: {path}: no split {split!r}. Expected one of {', '.join(found)} (split, test_split).")
    return found[split]


# ---- folders of files ------------------------------------------------------------------------------------------------------

# What writers of data put beside it.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "metadata.json", "config.json", "_metadata.parquet")


def _files_of_split(folder: str, part: Part) -> FilesSource | None:
    """The data files of a folder's split, by the hub library's rules; None where the library must read the folder itself."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    base = folder if is_remote(folder) else str(Path(folder).absolute())
    if _has_configuration(base):
        return None
    try:
        patterns = get_data_patterns(base)
    except EmptyDatasetError:
        patterns = {}
    files = {str(name): _resolved(base, some) for name, some in patterns.items()}
    files = {name: found for name, found in files.items() if found}
    # The library knows more kinds of files, and what to say where there are none.
    if part.split not in files:
        return None
    place, absolute = folder.rstrip("/") + "/", base.rstrip("/") + "/"
    own = tuple(name if is_remote(folder) else place + name.removeprefix(absolute) for name in files[part.split])
    others = {name: found for name, found in files.items() if name not in (part.split, part.other_split)}
    return FilesSource(place, own, f"beside {part.split}, the folder has {_listed(others)}" if others else None)


def _holds_rows(name: str) -> bool:
    return is_data_file(name) and Path(name).name not in DESCRIPTIONS


def _listed(splits: dict[str, list[str]]) -> str:
    counts = (f"{name} ({len(found)} file{'s' * (len(found) > 1)})" for name, found in splits.items())
    return f"{', '.join(counts)}, which split and test_split name"


def _resolved(base: str, patterns: list[str]) -> list[str]:
    """The data files that patterns match in a folder; texts only where nothing else is."""
    from datasets.data_files import resolve_pattern

    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            found |= dict.fromkeys(map(str, resolve_pattern(pattern, base)))
        except FileNotFoundError:
            continue
    files = [name for name in found if _holds_rows(name)]
    return [name for name in files if format_of(name) != ".txt"] or files


def _has_configuration(folder: str) -> bool:
    """Whether a README or a script describes which files are which, for the hub's library."""
    if is_remote(folder):
        return False
    if (Path(folder) / f"{Path(folder).name}.py").is_file():
        return True
    readme = Path(folder) / "README.md"
    return readme.is_file() and "configs:" in readme.read_text(errors="replace")[:10_000]
