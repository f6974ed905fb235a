"""The ledger of a run: the margin of every training pair, at each step that was taken with it.

    RUN/ledger/<examples>.parquet   observations since the file before, up to so many examples

A pair is identified by the indices of its two responses among all responses of the run's data, which are the same in every
epoch and on any number of processes. Shapes: N observations, P pairs of a step.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
from torch import Tensor

from preference_training.core.files import PARTIAL, atomic_path
from preference_training.core.process_group import SINGLE_PROCESS, Ranks

FOLDER = "ledger"
SCHEMA = pyarrow.schema(
    {"examples": pyarrow.int64(), "preferred": pyarrow.int64(), "other": pyarrow.int64(), "margins": pyarrow.float32()}
)
# Steps after which observations are written, if no evaluation or checkpoint comes first.
STEPS_KEPT = 1000


@dataclass(frozen=True)
class Observations:
    """Margins of pairs, in the order of the steps; all are [N].

    examples: int64, how many examples the run had seen at the end of the step. preferred, other: int64, the indices of the
    pair's responses. margins: float32, the reward of the preferred minus that of the other, before the step's update.
    """

    examples: numpy.ndarray
    preferred: numpy.ndarray
    other: numpy.ndarray
    margins: numpy.ndarray

    @classmethod
    def joined(cls, parts: Iterable["Observations"]) -> "Observations":
        """Several joined, in an order that does not depend on which rank computed what."""
        parts = [part.columns() for part in parts]
        columns = [
            numpy.concatenate([numpy.empty(0, field.type.to_pandas_dtype()), *(part[field.name] for part in parts)])
            for field in SCHEMA
        ]
        order = numpy.lexsort(columns[::-1])
        return cls(*(column[order] for column in columns))

    def columns(self) -> dict[str, numpy.ndarray]:
        """The arrays by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __len__(self) -> int:
        return len(self.margins)


class Ledger:
    """Records margins, and writes them at evaluations and checkpoints. `log_message` prints a line.

    All ranks of a run record and write together; each keeps its own pairs on its own device until then.
    """

    def __init__(self, run_dir: Path, ranks: Ranks = SINGLE_PROCESS, log_message: Callable[[str], None] = print):
        self.folder, self.ranks, self.log_message = run_dir / FOLDER, ranks, log_message
        self.steps: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []
        # What a full disk has not taken yet.
        self.unwritten = Observations.joined([])
        self.failed = False

    def record(self, examples: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Record the pairs of a step that was taken: response indices [P, 2] and margins [P] of each pack."""
        self.steps.append((examples, pairs))
        if len(self.steps) >= STEPS_KEPT:
            self.write()

    def write(self) -> None:
        """Write what was recorded since the last time. A full disk is reported once, and tried again the next time."""
        if not self.steps:
            return
        own, examples = self._own(), self.steps[-1][0]
        self.steps = []
        parts = self.ranks.all_gather_object(own)
        if not self.ranks.is_rank_zero:
            return
        self.unwritten = Observations.joined([self.unwritten, *parts])
        try:
            self.folder.mkdir(exist_ok=True)
            _write(self.folder / f"{examples}.parquet", pyarrow.table(self.unwritten.columns(), SCHEMA))
        except OSError as error:
            if not self.failed:
                self.log_message(
                    f"warning: the ledger cannot be written to, its rows are kept for later: {error.strerror or error}"
                )
            self.failed = True
        else:
            self.unwritten, self.failed = Observations.joined([]), False

    def _own(self) -> Observations:
        packs = [(examples, *pack) for examples, pairs in self.steps for pack in pairs]
        if not packs:
            return Observations.joined([])
        rows = torch.cat([rows for _, rows, _ in packs]).cpu().numpy()
        margins = torch.cat([margins for *_, margins in packs]).float().cpu().numpy()
        examples = numpy.repeat([examples for examples, *_ in packs], [len(margins) for *_, margins in packs])
        return Observations(examples, rows[:, 0], rows[:, 1], margins)


def _write(path: Path, table: pyarrow.Table) -> None:
    with atomic_path(path) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")


def ledger_files(run_dir: Path) -> list[Path]:
    """The files of a run's ledger, in their order."""
    found = [path for path in (run_dir / FOLDER).glob("*.parquet") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def read_ledger(run_dir: Path) -> Observations:
    """All observations in a run's ledger; damaged files are skipped."""
    parts = []
    for path in ledger_files(run_dir):
        try:
            table = pyarrow.parquet.read_table(path, schema=SCHEMA)
        except (OSError, pyarrow.ArrowException):
            continue
        parts.append(Observations(*(table[name].to_numpy() for name in SCHEMA.names)))
    return Observations.joined(parts)


def truncate_ledger(run_dir: Path, examples: int) -> None:
    """Remove observations after so many examples, and damaged files after them."""
    for path in (run_dir / FOLDER).glob(f"*{PARTIAL}"):
        path.unlink()
    for path in ledger_files(run_dir):
        if int(path.stem) <= examples:
            continue
        try:
            table = pyarrow.parquet.read_table(path, schema=SCHEMA)
            kept = table.filter(pyarrow.compute.field("examples") <= examples)
        except (OSError, pyarrow.ArrowException):
            kept = ()
        # A file spans the cut only where the disk had no room for the one before it.
        if len(kept):
            _write(path.with_stem(str(examples)), kept)
        path.unlink()
