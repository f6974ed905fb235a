"""Exporting judgments as training data: a file of records, or a data set in the Hub's layout; and uploading to the Hub.

A directory of programming problems alone has the columns of the public set that `lc` reads; one of any other text, or with
answers that labelers wrote, has records, as files have. Ties, skips, and what was overruled or is disputed are stored apart.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from preference_collection.exchange.cards import CARD_MARK, code_card, text_card
from preference_collection.exchange.judged_rows import (
    ALL_KINDS,
    DISPUTED,
    EDITED,
    LC_SCHEMA,
    RECORD_SCHEMA,
    UNUSABLE,
    as_written,
    has_edited,
    lc_rows,
    record_rows,
    task_kinds,
)
from preference_collection.store.store import Store
from preference_training.core.errors import UserError, first_line

# The library `datasets` recognizes the first as data by its name, and ignores the others. The card does not list the files: if
# it did, the library would cache by the directory's name, and find an earlier export instead of this one.
TRAIN = "data/train-00000-of-00001.parquet"
TRAINED_ON = ("preferences", "bad", EDITED)
APART = tuple(kind for kind in ALL_KINDS if kind not in (*TRAINED_ON, UNUSABLE))
FILES = {"preferences": TRAIN} | {kind: f"apart/{kind}.parquet" for kind in ("bad", *APART)}

# A directory with this file was written by `export_dataset`, and may be overwritten.
CARD = "README.md"
# What is counted, in words: of one, and of several.
UNSETTLED = "unsettled"
WORDS = {
    "preferences": ("preference", "preferences"),
    "bad": ("with all answers bad",) * 2,
    "ties": ("tie", "ties"),
    "skips": ("skip", "skips"),
    "overruled": ("overruled by a settlement",) * 2,
    DISPUTED: ("judgment left out, since labelers disagree", "judgments left out, since labelers disagree"),
    UNUSABLE: ("unusable, since answers are empty or the same",) * 2,
    EDITED: ("better answer written by a labeler", "better answers written by labelers"),
}


def counts_line(counts: Counter) -> str:
    """The counts of an export in words."""
    shown = ("preferences", "ties", "skips")
    some = {kind: counts[kind] for kind in WORDS if counts[kind] or kind in shown}
    line = ", ".join(f"{count:,} {WORDS[kind][count != 1]}" for kind, count in some.items())
    return f"{line}. {unsettled_line(counts[UNSETTLED])}" if counts[UNSETTLED] else line


def unsettled_line(count: int) -> str:
    """What is exported of a number of comparisons on which labelers disagree, and what to do about it."""
    of = "1 comparison has" if count == 1 else f"{count:,} comparisons have"
    return (
        f"{of} opposite judgments that nobody settled, and all are exported: settle them on the Agreement page, or export "
        "without them (--agreed)"
    )


def export_records(store: Store, path: Path, names: bool = False, agreed: bool = False) -> Counter:
    """Write records to a .jsonl or .parquet file; what is no training data, if any, to files next to it, one for each kind.

    Answers that are all bad are records of their own: labels without a pair; so are answers that labelers wrote where they
    preferred none. agreed: exclude unsettled disagreements. Returns the count of each kind, and of disagreements that were
    exported. Raises UserError for another file type, if nothing can be trained on yet, and if the file cannot be written.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"export: {path}: expected a .jsonl or .parquet file, or a directory.")
    rows = _records(store, names, agreed, as_text=path.suffix == ".parquet")
    counts = _counts(store, rows, agreed)
    _write_file(path, _trained_on(rows))
    for kind in APART:
        target = path.with_name(f"{path.stem}.{kind}{path.suffix}")
        if rows[kind]:
            _write_file(target, rows[kind])
        else:
            target.unlink(missing_ok=True)
    return counts


def _trained_on(rows: dict[str, list[dict]]) -> list[dict]:
    return [row for kind in TRAINED_ON for row in rows[kind]]


def _records(store: Store, names: bool, agreed: bool, as_text: bool) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {kind: [] for kind in ALL_KINDS}
    for kind, row in record_rows(store, names, agreed):
        rows[kind].append(row if kind == UNUSABLE else as_written(row, as_text))
    return rows


def _counts(store: Store, rows: dict[str, list], agreed: bool, usable: Sequence[str] = TRAINED_ON) -> Counter:
    counts = Counter({kind: len(some) for kind, some in rows.items()})
    if not any(counts[kind] for kind in usable):
        others = counts_line(counts).partition(", ")[2]
        raise UserError(
            f"export: there are no preferences yet ({others}). Expected at least one judgment that prefers an answer."
        )
    counts[EDITED] = sum(map(has_edited, store.judgments()))
    counts[UNSETTLED] = 0 if agreed else len(store.disagreements())
    return counts


def _write_file(path: Path, rows: list[dict]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            schema = RECORD_SCHEMA if "responses" in rows[0] else LC_SCHEMA
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), partial)
        else:
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"export: {path} cannot be written: {error.strerror or first_line(error)}.") from error
    finally:
        partial.unlink(missing_ok=True)


def export_dataset(store: Store, directory: Path, names: bool = False, agreed: bool = False) -> Counter:
    """Write a data set in the Hub's layout; `entry_of` trains on it.

    Judgments of programming problems alone are written in the columns of `lc`, unless labelers wrote answers; all others as
    records. agreed: exclude unsettled disagreements. Returns the count of each kind, and of exported disagreements. Raises
    UserError if nothing can be trained on yet, and for a directory with other content.
    """
    if directory.exists() and not _is_own(directory):
        raise UserError(f"export: {directory} contains other files. Expected a new or empty directory, or an earlier export.")
    if task_kinds(store) == {"code"} and not any(map(has_edited, store.judgments())):
        rows: dict[str, list[dict]] = {kind: [] for kind in ALL_KINDS}
        for kind, row in lc_rows(store, names, agreed):
            rows[kind].append(row)
        counts = _counts(store, rows, agreed, ("preferences",))
        card = code_card(counts, store.agreement())
    else:
        rows = _records(store, names, agreed, as_text=True)
        counts = _counts(store, rows, agreed)
        card = text_card(counts, store.agreement())
        rows["preferences"], rows["bad"] = _trained_on(rows), []
    fresh = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    for kind, some in rows.items():
        if some and kind in FILES:
            _write_file(fresh / FILES[kind], some)
    (fresh / CARD).write_text(card, encoding="utf-8")
    if directory.exists():
        shutil.rmtree(directory)
    fresh.rename(directory)
    return counts


def _is_own(directory: Path) -> bool:
    card = directory / CARD
    empty = directory.is_dir() and not any(directory.iterdir())
    return empty or (card.is_file() and CARD_MARK in card.read_text(encoding="utf-8", errors="replace"))


def is_export(directory: Path) -> bool:
    """Whether a directory holds an export."""
    return (directory / CARD).is_file() and _is_own(directory)


def entry_of(directory: Path) -> str:
    """The entry of `datasets` that trains on an exported directory, as the command line has it."""
    return f"'{str(directory).rstrip('/')}/'"


def training_command(directory: Path) -> str:
    """The command that trains on an exported directory, for a shell."""
    return f'python train.py loss=dpo "datasets=[{entry_of(directory)}]"'


# ---- the hub ----------------------------------------------------------------------------------------------------------------


def push(directory: Path, repository: str, private: bool = True) -> str:
    """Upload an exported directory to the Hub as a data set, created if needed. Returns its URL.

    The token comes from HF_TOKEN or `hf auth login`. Unless private is False, uploading to an existing public data set is
    refused. Raises UserError for that, and if the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not is_export(directory):
        raise UserError(f"push: {directory} is not an export. Create one: python -m preference_collection export DIRECTORY")
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        if private and not api.repo_info(repository, repo_type="dataset").private:
            raise UserError(f"push: {repository} is public. Use --public, or another name.")
        api.upload_folder(
            folder_path=directory, repo_id=repository, repo_type="dataset", commit_message="Export preferences",
            delete_patterns=["*.parquet"],
        )  # fmt: skip
    except HFValidationError as error:
        raise UserError(f"push: {repository!r} is not a data set name: {first_line(error)}. Expected USER/NAME.") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"push: the Hub refuses {repository}: {first_line(error)}. Expected a token with write access (HF_TOKEN)."
        ) from error
    return f"{api.endpoint}/datasets/{repository}"
