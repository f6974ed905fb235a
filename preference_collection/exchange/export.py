"""Exporting judgments as training data: a data set that `lc` reads, or a file of records; and uploading to the Hub.

Each current judgment is one row. Rows with a preference are training data; ties and skips are stored separately. Each row has
the vote counts of its pair. Labelers are numbered unless names are requested.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet

from preference_collection.store.statistics import Agreement
from preference_collection.store.store import Store
from preference_training.core.errors import UserError, first_line
from preference_training.data.rows.records import item_error

# The kind of row by choice: training data, or stored separately.
KINDS = {"ranked": "preferences", "tie": "ties", "bad": "ties", "skip": "skips"}

# The library `datasets` recognizes the first as data by its name, and ignores the others. The card does not list the files: if
# it did, the library would cache by the directory's name, and find an earlier export instead of this one.
FILES = {"preferences": "data/train-00000-of-00001.parquet", "ties": "apart/ties.parquet", "skips": "apart/skips.parquet"}

TEXT, COUNT = pyarrow.string(), pyarrow.int64()
# The first columns are those of the public data set that `lc` reads.
LC_SCHEMA = pyarrow.schema(
    {
        "id": TEXT, "difficulty": TEXT, "title": TEXT, "description": TEXT, "version1": TEXT, "version2": TEXT,
        "preference": COUNT, "model1": TEXT, "model2": TEXT, "votes_version1": COUNT, "votes_version2": COUNT,
        "votes_tie": COUNT, "votes_skip": COUNT, "labeller": TEXT, "seconds": pyarrow.float64(), "shown_left": COUNT,
        "reasons": pyarrow.list_(TEXT), "comment": TEXT, "judged": TEXT, "judgement": TEXT,
    }
)  # fmt: skip
OF_THE_RECORD = ("description", "version1", "version2", "preference")
RECORD_SCHEMA = pyarrow.schema(
    [
        ("prompt", TEXT), ("responses", pyarrow.list_(TEXT)), ("pairs", pyarrow.list_(pyarrow.list_(COUNT))),
        ("sft_target", TEXT), ("chosen", TEXT), ("rejected", TEXT),
        *[LC_SCHEMA.field(name) for name in LC_SCHEMA.names if name not in OF_THE_RECORD],
    ]
)  # fmt: skip

# A directory with this file was written by `export_dataset`, and may be overwritten.
CARD = "README.md"
CARD_MARK = "<!-- written by preference_collection -->"


def lc_rows(store: Store, names: bool = False) -> Iterator[tuple[str, dict]]:
    """(kind, row) of every current judgment, in LC_SCHEMA. preference is 0 or 1, and None for ties and skips."""
    numbers: dict[str, int] = {}
    for judged in store.judgments():
        said, task, votes = judged.judgment, judged.task, judged.votes
        if len(judged.comparison.answers) != 2 or not isinstance(judged.comparison.answers[0].prompt, str):
            raise UserError(f"export: comparison {said.comparison} of task {task.id!r}: expected two answers to a text.")
        one, two = judged.comparison.answers
        number = numbers.setdefault(said.labeler, len(numbers) + 1)
        yield KINDS[said.choice], {
            "id": task.id, "difficulty": task.difficulty, "title": task.title, "description": one.prompt,
            "version1": one.text, "version2": two.text, "preference": said.ranks.index(1) if said.ranks else None,
            "model1": one.model, "model2": two.model, "votes_version1": votes.best[0], "votes_version2": votes.best[1],
            "votes_tie": votes.ties, "votes_skip": votes.skips,
            "labeller": said.labeler if names else f"labeller {number}", "seconds": said.seconds,
            "shown_left": said.order[0], "reasons": list(said.reasons), "comment": said.comment,
            "judged": judged.moment.isoformat(timespec="seconds"), "judgement": said.id,
        }  # fmt: skip


def record_row(row: dict) -> dict:
    """A row of LC_SCHEMA as a preference record, plus the chosen and the rejected text, if any."""
    texts = [row["version1"].strip(), row["version2"].strip()]
    best = row["preference"]
    decided = best is not None
    record = {"responses": texts, "pairs": [(best, 1 - best)] if decided else [], "sft_target": texts[best or 0]}
    if decided and (fault := item_error((row["description"], record))):
        raise UserError(f"export: judgment {row['judgement']} of problem {row['id']!r}: {fault}. Undo it.")
    fields = {"prompt": row["description"], **record}
    fields |= {"chosen": texts[best] if decided else None, "rejected": texts[1 - best] if decided else None}
    return {name: fields[name] if name in fields else row[name] for name in RECORD_SCHEMA.names}


# ---- writing ----------------------------------------------------------------------------------------------------------------


def export_records(store: Store, path: Path, names: bool = False) -> Counter:
    """Write records to a .jsonl or .parquet file; ties and skips, if any, to files next to it.

    Returns the count of each kind. Raises UserError for another file type, if there are no preferences yet, and if the file
    cannot be written.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"export: {path}: expected a .jsonl or .parquet file, or a directory.")
    rows: dict[str, list[dict]] = {kind: [] for kind in KINDS.values()}
    for kind, row in lc_rows(store, names):
        rows[kind].append(record_row(row))
    counts = _counts(rows)
    for kind, some in rows.items():
        target = path if kind == "preferences" else path.with_name(f"{path.stem}.{kind}{path.suffix}")
        if some:
            _write_file(target, some)
        else:
            target.unlink(missing_ok=True)
    return counts


def _counts(rows: dict[str, list]) -> Counter:
    counts = Counter({kind: len(some) for kind, some in rows.items()})
    if not counts["preferences"]:
        raise UserError(
            f"export: there are no preferences yet ({counts['ties']} ties, {counts['skips']} skips). Expected at least one "
            "judgment that prefers a solution."
        )
    return counts


def _write_file(path: Path, rows: list[dict]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            schema = RECORD_SCHEMA if "prompt" in rows[0] else LC_SCHEMA
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), partial)
        else:
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"export: {path} cannot be written: {error.strerror or first_line(error)}.") from error
    finally:
        partial.unlink(missing_ok=True)


def export_dataset(store: Store, directory: Path, names: bool = False) -> Counter:
    """Write a data set in the Hub's layout: `datasets=[{name: lc, data_dir: DIRECTORY}]` trains on it.

    Returns the count of each kind. Raises UserError if there are no preferences yet, and for a directory with other content.
    """
    if directory.exists() and not _is_own(directory):
        raise UserError(f"export: {directory} contains other files. Expected a new or empty directory, or an earlier export.")
    rows: dict[str, list[dict]] = {kind: [] for kind in KINDS.values()}
    for kind, row in lc_rows(store, names):
        rows[kind].append(row)
    counts = _counts(rows)
    fresh = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    for kind, some in rows.items():
        if some:
            _write_file(fresh / FILES[kind], some)
    (fresh / CARD).write_text(data_card(counts, store.agreement()), encoding="utf-8")
    if directory.exists():
        shutil.rmtree(directory)
    fresh.rename(directory)
    return counts


def _is_own(directory: Path) -> bool:
    card = directory / CARD
    empty = directory.is_dir() and not any(directory.iterdir())
    return empty or (card.is_file() and CARD_MARK in card.read_text(encoding="utf-8", errors="replace"))


def data_card(counts: Counter, agreement: Agreement) -> str:
    """The data card, with counts and the meaning of the fields."""
    alpha = "not defined" if agreement.alpha is None else f"{agreement.alpha:.2f}"
    agreed = "No pair was judged by several labelers."
    if agreement.compared:
        agreed = f"Two labelers of the same pair agreed {agreement.agreed} of {agreement.compared} times (alpha: {alpha})."
    return f"""---
pretty_name: Preferences on code
language:
- code
- en
tags:
- preference
- dpo
- code
task_categories:
- text-generation
---
{CARD_MARK}
# Preferences on code

People compared two model-written solutions of a programming problem, with their test results.

- {counts["preferences"]} preferences in `data`, one row per judgment.
- {counts["ties"]} ties and {counts["skips"]} skips in `apart`.
- {agreed} Alpha is Krippendorff's: 1 is perfect agreement, 0 is chance.
- Written {datetime.now():%Y-%m-%d}.

| field | meaning |
|---|---|
| `id`, `title`, `difficulty` | the problem |
| `description` | the prompt given to the models |
| `version1`, `version2` | the replies; `model1`, `model2`: the models that wrote them |
| `preference` | 0: version1 is better, 1: version2; null for ties and skips |
| `votes_version1`, `votes_version2`, `votes_tie`, `votes_skip` | number of labelers with each choice on this pair |
| `labeller`, `seconds`, `shown_left` | the labeler (a number), the time taken, the version on the left (0: version1) |
| `reasons`, `comment`, `judged`, `judgement` | the labeler's reasons and comment, the time, and the id of the judgment |

Train on it with `python train.py loss=dpo 'datasets=[{{name: lc, data_dir: DIRECTORY}}]'`.
"""


# ---- the hub ----------------------------------------------------------------------------------------------------------------


def push(directory: Path, repository: str, private: bool = True) -> str:
    """Upload an exported directory to the Hub as a data set, created if needed. Returns its URL.

    The token comes from HF_TOKEN or `hf auth login`. Unless private is False, uploading to an existing public data set is
    refused. Raises UserError for that, and if the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (directory / CARD).is_file() or not _is_own(directory):
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
