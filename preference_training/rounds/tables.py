"""The tables of a round, as Parquet files that other tools read: samples, scores, pairs; and its small files."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from preference_training.core.errors import UserError, first_line
from preference_training.core.files import atomic_path, write_atomically

# prompt: JSON, a text or a list of messages. row: JSON, the other columns of its row.
PROMPTS = pyarrow.schema([
    ("prompt_id", pyarrow.int64()), ("prompt", pyarrow.string()), ("row", pyarrow.string()), ("held_out", pyarrow.bool_()),
])  # fmt: skip
# number: counts the responses to a prompt from 0. ended: by an end token, not by max_new_tokens. logp: of the response under
# the policy that it is from, without temperature; logp_first: under the model before the first round. null: not computed.
SAMPLES = pyarrow.schema([
    ("prompt_id", pyarrow.int64()), ("number", pyarrow.int32()), ("text", pyarrow.string()),
    ("token_ids", pyarrow.list_(pyarrow.int32())), ("n_tokens", pyarrow.int32()), ("ended", pyarrow.bool_()),
    ("logp", pyarrow.float64()), ("logp_first", pyarrow.float64()), ("model", pyarrow.string()),
])  # fmt: skip
# score: null where the judge could not judge. Each row is the score of the sample with its prompt_id and number. second_score:
# that of rounds.second_judge, of held-out samples.
SCORES = pyarrow.schema([
    ("prompt_id", pyarrow.int64()), ("number", pyarrow.int32()), ("score", pyarrow.float64()), ("reason", pyarrow.string()),
    ("judge", pyarrow.string()), ("second_score", pyarrow.float64()),
])  # fmt: skip


def write_table(path: Path, rows: Iterable[dict[str, Any]], schema: pyarrow.Schema | None = None) -> None:
    """Write a table atomically. Raises UserError where it cannot be written."""
    save_table(path, pyarrow.Table.from_pylist(list(rows), schema=schema))


def save_table(path: Path, table: pyarrow.Table) -> None:
    """Write a table of pyarrow's atomically. Raises UserError where it cannot be written."""
    with can_be_written(path), atomic_path(path) as partial:
        pyarrow.parquet.write_table(table, partial)


def save_text(path: Path, text: str) -> None:
    """Write a small file atomically. Raises UserError where it cannot be written."""
    with can_be_written(path):
        write_atomically(path, text)


@contextmanager
def can_be_written(path: Path) -> Iterator[None]:
    """Inside, a file of the loop that cannot be written is the user's mistake: UserError. Its folder is made first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"local_run_dir: {path} cannot be written: {first_line(error)}. Expected a folder with room; the loop goes on from "
            "here with resume=auto."
        ) from error


def join_tables(paths: Sequence[Path], schema: pyarrow.Schema) -> pyarrow.Table:
    """The rows of several tables in their order."""
    tables = [_opened(path) for path in paths]
    return pyarrow.concat_tables(tables).combine_chunks() if tables else schema.empty_table()


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a table, of some of its columns. Raises UserError where the file is missing or damaged."""
    return _opened(path, columns).to_pylist()


def _opened(path: Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    try:
        return pyarrow.parquet.read_table(path, columns=columns and list(columns))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. The step that writes it has not been run.") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: damaged: {first_line(error)}. Remove it, and its step runs again.") from error
