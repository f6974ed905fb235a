"""The ledger of a run: the margin of every training pair, each time a step was taken with it.

    RUN/ledger/<examples>.parquet   what was seen since the file before, up to so many examples

A pair is named by the places of its two responses among all responses of the run's data, which are the same in every epoch
and on any number of processes. Shapes: N sightings, P pairs of a step.
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
from preference_training.core.ranks import ALONE, Ranks

FOLDER = "ledger"
SCHEMA = pyarrow.schema(
    {"examples": pyarrow.int64(), "preferred": pyarrow.int64(), "other": pyarrow.int64(), "margins": pyarrow.float32()}
)
# Steps after which what was seen is written, if neither evaluation nor checkpoint has come before.
STEPS_KEPT = 1000


@dataclass(frozen=True)
class Sightings:
    """Pairs as they were seen, in the order of the steps; all are [N].

    examples: int64, how many examples the run had seen at the end of the step. preferred, other: int64, the places of the
    pair's responses. margins: float32, the reward of the preferred minus that of the other, before the step changed anything.
    """

    examples: numpy.ndarray
    preferred: numpy.ndarray
    other: numpy.ndarray
    margins: numpy.ndarray

    @classmethod
    def joined(cls, parts: Iterable["Sightings"]) -> "Sightings":
        """Several together, in one order whatever computed them."""
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
    """Keeps what is seen, and writes it at evaluations and checkpoints. `say` prints a line.

    All ranks of a run see and write together; each keeps its own pairs on its own device until then.
    """

    def __init__(self, run_dir: Path, ranks: Ranks = ALONE, say: Callable[[str], None] = print):
        self.folder, self.ranks, self.say = run_dir / FOLDER, ranks, say
        self.steps: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []
        # What the disk has had no room for.
        self.unwritten = Sightings.joined([])
        self.failed = False

    def see(self, examples: int, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Keep the pairs of a step that was taken: places of responses [P, 2] with margins [P], piece by piece."""
        self.steps.append((examples, seen))
        if len(self.steps) >= STEPS_KEPT:
            self.write()

    def write(self) -> None:
        """Write what was seen since the last time. A disk without room is said once, and tried again the next time."""
        if not self.steps:
            return
        mine, examples = self._mine(), self.steps[-1][0]
        self.steps = []
        parts = self.ranks.gather(mine)
        if not self.ranks.is_main:
            return
        self.unwritten = Sightings.joined([self.unwritten, *parts])
        try:
            self.folder.mkdir(exist_ok=True)
            _write(self.folder / f"{examples}.parquet", pyarrow.table(self.unwritten.columns(), SCHEMA))
        except OSError as error:
            if not self.failed:
                self.say(f"warning: the ledger cannot be written to, its rows are kept for later: {error.strerror or error}")
            self.failed = True
        else:
            self.unwritten, self.failed = Sightings.joined([]), False

    def _mine(self) -> Sightings:
        pieces = [(examples, *piece) for examples, seen in self.steps for piece in seen]
        if not pieces:
            return Sightings.joined([])
        rows = torch.cat([rows for _, rows, _ in pieces]).cpu().numpy()
        margins = torch.cat([margins for *_, margins in pieces]).float().cpu().numpy()
        examples = numpy.repeat([examples for examples, *_ in pieces], [len(margins) for *_, margins in pieces])
        return Sightings(examples, rows[:, 0], rows[:, 1], margins)


def _write(path: Path, table: pyarrow.Table) -> None:
    with atomic_path(path) as partial:
        pyarrow.parquet.write_table(table, partial, compression="zstd")


def parts_of(run_dir: Path) -> list[Path]:
    """The files of a run's ledger, in their order."""
    found = [path for path in (run_dir / FOLDER).glob("*.parquet") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def read_ledger(run_dir: Path) -> Sightings:
    """All that a run's ledger holds; files that are damaged are passed over."""
    parts = []
    for path in parts_of(run_dir):
        try:
            table = pyarrow.parquet.read_table(path, schema=SCHEMA)
        except (OSError, pyarrow.ArrowException):
            continue
        parts.append(Sightings(*(table[name].to_numpy() for name in SCHEMA.names)))
    return Sightings.joined(parts)


def cut_back_ledger(run_dir: Path, examples: int) -> None:
    """Leave only what was seen up to so many examples; what is damaged behind them goes too."""
    for path in (run_dir / FOLDER).glob(f"*{PARTIAL}"):
        path.unlink()
    for path in parts_of(run_dir):
        if int(path.stem) <= examples:
            continue
        try:
            table = pyarrow.parquet.read_table(path, schema=SCHEMA)
            kept = table.filter(pyarrow.compute.field("examples") <= examples)
        except (OSError, pyarrow.ArrowException):
            kept = ()
        # A file reaches over the end only where the disk had no room for the one before it.
        if len(kept):
            _write(path.with_stem(str(examples)), kept)
        path.unlink()
