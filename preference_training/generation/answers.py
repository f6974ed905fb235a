"""Answers to all prompts of a file, as JSON lines."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from preference_training.core.errors import UserError, first_line
from preference_training.core.machine import said_while_slow
from preference_training.data.entries import load_records, read_entry
from preference_training.data.files import format_of, read_rows
from preference_training.data.records.record import Prompt, message_of
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.prompt_fields import PromptFields
from preference_training.generation.chat import Responder

# Prompts that are answered before their lines are written.
CHUNK = 64
# The columns of rows that are prompts alone, in the order in which they are looked for.
PROMPT_COLUMNS = ("messages", "conversations", "conversation", "prompt", "question", "instruction", "query", "input", "text")


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a text file, one in each line, or of rows in any format that training reads, with or without answers.

    Raises UserError where there are none.
    """
    kind = format_of(path)
    if kind in (None, ".txt") and not Path(path).is_file():
        raise UserError(f"--prompts: {path}: no such file. Expected a .txt file with a prompt in each line, or a file of rows.")
    found = _lines(Path(path)) if kind in (None, ".txt") else _rows(path)
    if not found:
        raise UserError(f"--prompts: {path} has no prompts.")
    return found


def _lines(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {path} cannot be read: {first_line(error)}. Expected a text file.") from error
    return [line for line in lines if line.strip()]


def _rows(path: str) -> list[Prompt]:
    """The prompts of rows: as training reads them, or else of rows without answers."""
    entry = read_entry({"path": path, "held_out_share": 0})
    try:
        return [record.prompt for record in load_records(entry, "train") if record.prompt]
    except UserError as error:
        first = next((row for _, row in read_rows(path)), {})
        column = next((name for name in PROMPT_COLUMNS if name in first), None)
        if column is None:
            raise
        fields = PromptFields(column)
        try:
            return [fields.read(row) for _, row in read_rows(path)]
        except RowError:
            raise error from None


def write_answers(
    responders: Sequence[Responder], prompts: Sequence[Prompt], changes: dict[str, Any], to: Path | None, progress: TextIO
) -> None:
    """Have each responder answer all prompts; a line of JSON for each goes to a file, or to the standard output.

    The last responder's answer is `response`, that of one before it `against`. Raises UserError.
    """
    try:
        opened = to.open("w", encoding="utf-8") if to else nullcontext(sys.stdout)
    except OSError as error:
        raise UserError(f"--to: cannot write {to}: {error.strerror}. Expected a file in a writable folder.") from error
    together = f", {CHUNK} at a time" if len(prompts) > CHUNK else ""
    print(f"answering {len(prompts):,} prompts{together} ...", file=progress, flush=True)
    with opened as file:
        for start in range(0, len(prompts), CHUNK):
            with said_while_slow("still answering", file=progress):
                rows = list(_answered(responders, prompts[start : start + CHUNK], changes))
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done = min(len(prompts), start + CHUNK)
            print(f"{done:,} of {len(prompts):,} prompts answered", file=progress, flush=True)


def _answered(responders: Sequence[Responder], prompts: Sequence[Prompt], changes: dict[str, Any]) -> Iterator[dict]:
    """The rows of some prompts."""
    *others, last = [responder.responses(prompts, changes) for responder in responders]
    for number, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else [message_of(turn) for turn in prompt]
        yield {"prompt": text, "response": last[number]} | ({"against": others[0][number]} if others else {})
