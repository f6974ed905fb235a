"""Outputs of models on the instructions of a benchmark: files of them, joined by their instructions."""

from collections.abc import Sequence
from typing import NamedTuple

from preference_training.core.errors import UserError
from preference_training.data.files import read_whole_file
from preference_training.data.records.record import Prompt, prompt_text
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.prompt_fields import PromptFields
from preference_training.data.rows.values import as_number, is_empty, is_missing
from preference_training.generation.answers import PROMPT_COLUMNS

# The columns of an output, in the order in which they are looked for.
OUTPUT_COLUMNS = ("output", "response", "completion", "answer", "generation")
# The difficulty of an instruction, as AlpacaEval calls it.
DIFFICULTY = "instruction_difficulty"


class Output(NamedTuple):
    """A model's output to an instruction. difficulty: of the instruction, None if the file does not say."""

    prompt: Prompt
    text: str
    difficulty: float | None = None


def read_outputs(path: str, option: str) -> dict[str, Output]:
    """The outputs of a file by the text of their instructions, in its order. Raises UserError, which names the option."""
    found: dict[str, Output] = {}
    for number, row in read_whole_file(path, option):
        try:
            output = _output(row)
        except RowError as error:
            raise UserError(f"{option}: {path}, row {number}: {error}") from error
        text = prompt_text(output.prompt)
        if text in found:
            raise UserError(
                f"{option}: {path}, row {number}: the instruction {text[:60]!r} has an output already. Expected one each."
            )
        found[text] = output
    if not found:
        raise UserError(f"{option}: {path} has no rows. Expected rows with an instruction and an output.")
    return found


def _output(row: dict) -> Output:
    column = next((name for name in ("instruction", *PROMPT_COLUMNS) if not is_empty(row.get(name))), None)
    answer = next((name for name in OUTPUT_COLUMNS if isinstance(row.get(name), str)), None)
    if column is None or answer is None:
        missing, known = ("an instruction", PROMPT_COLUMNS) if column is None else ("an output", OUTPUT_COLUMNS)
        raise RowError(f"none of the columns {', '.join(map(str, row))} is {missing}. Expected one of {', '.join(known)}.")
    difficulty = None if is_missing(row.get(DIFFICULTY)) else as_number(row[DIFFICULTY], DIFFICULTY)
    return Output(PromptFields(column).read(row), row[answer], difficulty)


def joined(baseline: dict[str, Output], outputs: dict[str, Output], name: str) -> tuple[list[Output], int]:
    """A model's outputs in the order of the baseline's, and how many others it has. Raises UserError where one is missing."""
    missing = [text for text in baseline if text not in outputs]
    if missing:
        raise UserError(
            f"--outputs: {name} has no output for {len(missing):,} of the baseline's {len(baseline):,} instructions; the first "
            f"is {missing[0][:60]!r}. Answer them: python scripts/chat.py MODEL --prompts FILE --to OUTPUTS.jsonl"
        )
    return [outputs[text] for text in baseline], len(outputs.keys() - baseline.keys())


def difficulties(outputs: Sequence[Output]) -> list[float] | None:
    """The difficulty of each instruction; None unless all are known."""
    found = [output.difficulty for output in outputs]
    return None if None in found else found
