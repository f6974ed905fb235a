"""The prompts of a loop: read from a file, each once, and split into those to train on and those held out."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from preference_training.configuration.sections import RoundsConfig
from preference_training.core.errors import UserError
from preference_training.data.files import read_whole_file
from preference_training.data.records.held_out import is_held_out
from preference_training.data.records.record import Prompt, message_of, prompt_text
from preference_training.data.rows.conversations import RowError, parse_turns
from preference_training.data.rows.prompt_fields import PromptFields
from preference_training.data.rows.values import is_empty
from preference_training.rounds.tables import PROMPTS, read_table, write_table

# The columns that a prompt may be in, in the order in which they are looked for.
COLUMNS = ("prompt", "messages", "conversations", "conversation", "question", "instruction", "query", "input", "text")
SYSTEMS = ("system", "system_prompt")
# What happens to rows, in words.
REPEATED = "rows whose prompt is an earlier row's, whose columns the judge gets"
ANSWERED = "conversations without their last turn, the assistant's, which the policy is to write"
ALSO_HELD_OUT = "prompts that are held out too, which are not trained on"


class LoopPrompt(NamedTuple):
    """A prompt of a loop. row: the other columns of its row, which the judge gets."""

    prompt_id: int
    prompt: Prompt
    row: dict[str, Any]
    held_out: bool


def read_prompts(config: RoundsConfig) -> tuple[list[LoopPrompt], Counter]:
    """The prompts of a loop, and how many rows were changed or left out, by what was done. Raises UserError."""
    said: Counter = Counter()
    rows = list(_each_once(_read(config.prompts, "rounds.prompts", said), said))
    if isinstance(config.held_out, str):
        held = list(_each_once(_read(config.held_out, "rounds.held_out", said), said))
        texts = {prompt_text(prompt) for prompt, _ in held}
        train = [(prompt, row) for prompt, row in rows if prompt_text(prompt) not in texts]
        said[ALSO_HELD_OUT] += len(rows) - len(train)
        split = [(prompt, row, False) for prompt, row in train] + [(prompt, row, True) for prompt, row in held]
    else:
        split = [(prompt, row, is_held_out(prompt, config.held_out)) for prompt, row in rows]
    prompts = [LoopPrompt(number, *each) for number, each in enumerate(split)]
    if all(prompt.held_out for prompt in prompts):
        raise UserError(
            f"rounds.prompts: {config.prompts} leaves no prompt to train on: {len(prompts)} of {len(prompts)} are held out. "
            "Expected more prompts, or a smaller rounds.held_out."
        )
    return prompts, +said


def _each_once(rows: Iterator[tuple[Prompt, dict]], said: Counter) -> Iterator[tuple[Prompt, dict]]:
    known: set[str] = set()
    for prompt, row in rows:
        text = prompt_text(prompt)
        if text in known:
            said[REPEATED] += 1
            continue
        known.add(text)
        yield prompt, row


def _read(path: str, key: str, said: Counter) -> Iterator[tuple[Prompt, dict]]:
    """The prompts of a file with the other columns of their rows. Raises UserError."""
    empty = True
    for number, row in read_whole_file(path, key):
        column = next((name for name in COLUMNS if not is_empty(row.get(name))), None)
        try:
            if column is None:
                raise RowError(f"none of the columns {', '.join(map(str, row))} is a prompt. Expected prompt or messages.")
            if not is_empty(row.get("tools")):
                raise RowError("field 'tools' is not empty, and rounds sample plain answers only. Remove such rows.")
            yield _prompt(row, column, said)
        except RowError as error:
            raise UserError(f"{key}: {path}, row {number}: {error}") from error
        empty = False
    if empty:
        raise UserError(f"{key}: {path} has no rows. Expected rows with prompt or messages.")


def _prompt(row: dict, column: str, said: Counter) -> tuple[Prompt, dict]:
    system = next((name for name in SYSTEMS if not is_empty(row.get(name))), None)
    fields = PromptFields(column, system, found=frozenset([system] if system else []))
    prompt = fields.read(row)
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        said[ANSWERED] += 1
        prompt = prompt[:-1]
        if all(turn.role in ("system", "developer") for turn in prompt):
            raise RowError(f"field {column!r} has no turn before the assistant's. Expected a question.")
    return prompt, {str(name): value for name, value in row.items() if name not in (column, system)}


# ---- as they are kept -----------------------------------------------------------------------------------------------------


def store(prompts: Sequence[LoopPrompt], path: Path) -> None:
    """Write the prompts of a loop. Raises UserError."""
    rows = [
        {
            "prompt_id": each.prompt_id,
            "prompt": as_json(each.prompt),
            "row": json.dumps(each.row, default=str),
            "held_out": each.held_out,
        }
        for each in prompts
    ]
    write_table(path, rows, PROMPTS)


def read_stored(path: Path) -> list[LoopPrompt]:
    """The prompts of a loop as they were written. Raises UserError."""
    rows = read_table(path)
    return [LoopPrompt(row["prompt_id"], _of_json(row["prompt"]), json.loads(row["row"]), row["held_out"]) for row in rows]


def as_json(prompt: Prompt) -> str:
    """A prompt as JSON: a text, or a list of messages."""
    return json.dumps(prompt if isinstance(prompt, str) else [message_of(turn) for turn in prompt], ensure_ascii=False)


def _of_json(text: str) -> Prompt:
    value = json.loads(text)
    return value if isinstance(value, str) else tuple(parse_turns(value, "prompt"))


# ---- which of them a round samples -----------------------------------------------------------------------------------------


def prompts_of_round(prompts: Sequence[LoopPrompt], number: int, count: int | None, seed: int) -> list[LoopPrompt]:
    """The prompts to train on in a round: all, or the next `count` of a random order, which goes on over the rounds."""
    train = [prompt for prompt in prompts if not prompt.held_out]
    if count is None or count >= len(train):
        return train
    chosen: list[LoopPrompt] = []
    first, last = (number - 1) * count, number * count
    for visit in range(first // len(train), (last - 1) // len(train) + 1):
        order = list(train)
        random.Random(f"{seed} {visit}").shuffle(order)
        start = visit * len(train)
        chosen += order[max(0, first - start) : last - start]
    # Each once: where an order ends within a round, the next one may begin with the same.
    return [each for _, each in sorted({prompt.prompt_id: prompt for prompt in chosen}.items())]
