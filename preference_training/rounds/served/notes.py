"""Notes of the responses that a server did not give, so that a round can say how many it lacks, and why."""

import json
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.tracking.run_files import json_lines


def _beside(table: Path) -> Path:
    return table.with_suffix(".unanswered.jsonl")


def note_unanswered(table: Path, prompt_id: int, numbers: Iterable[int], reason: str) -> None:
    """Append a line for each response to a prompt that a server did not give, for a table of samples. Raises UserError."""
    path = _beside(table)
    rows = [{"prompt_id": prompt_id, "number": number, "reason": reason} for number in numbers]
    try:
        with path.open("ab", buffering=0) as file:
            file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    except OSError as error:
        raise UserError(f"local_run_dir: cannot write {path}: {error.strerror}. Expected a folder with room.") from error


def count_unanswered(table: Path, sampled: Collection[tuple[int, int]]) -> Counter:
    """How many responses a table lacks, by the reason. sampled: (prompt_id, number) of those there are.

    A prompt that was asked again, after a stop, may have been answered then, or be noted twice.
    """
    reasons = {(row.get("prompt_id"), row.get("number")): str(row.get("reason")) for row in json_lines(_beside(table))}
    return Counter(f"responses that the server did not give ({reasons[key]})" for key in reasons if key not in sampled)
