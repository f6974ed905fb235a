"""The margins of pairs under a model that was trained on the other half of the data: RUN/halves/N/margins.jsonl.

A row a pair, with its texts: {"pair": key of `pair_key`, "source", "margin", "prompt", "preferred", "other"}
half.json beside it names the content of both halves: {"trained": [hash of a data set], "judged": [hash of a data set]}
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from preference_training.core.files import write_atomically
from preference_training.data.pairs.weights import pair_key
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.tracking.run_files import HALF_DATA, HALF_MARGINS, json_object, write_json_lines


def write_half_data(run_dir: Path, tables: Sequence[PromptTable]) -> None:
    """Write what the half that was trained on contains, and the one that was judged. Raises OSError."""
    hashes = [[part.fingerprint for part in table.parts] for table in tables]
    write_atomically(run_dir / HALF_DATA, json.dumps(dict(zip(("trained", "judged"), hashes, strict=True))) + "\n")


def is_same_data(one: Path, other: Path) -> bool:
    """Whether the runs on two halves had the same data: what one has trained on, the other has judged."""
    first, second = (json_object(run_dir / HALF_DATA) for run_dir in (one, other))
    return (first.get("trained"), first.get("judged")) == (second.get("judged"), second.get("trained"))


def write_half_margins(
    run_dir: Path, examples: Iterable[tuple[TokenizedPrompt, int]], margins: Iterable[float], tokenizer
) -> None:
    """Write the margins of pairs, given as prompts and numbers of examples. Raises OSError."""
    pairs = zip(examples, margins, strict=True)
    write_json_lines(run_dir / HALF_MARGINS, (_row(prompt, number, margin, tokenizer) for (prompt, number), margin in pairs))


def _row(prompt: TokenizedPrompt, number: int, margin: float, tokenizer) -> dict:
    preferred, other = (prompt.responses[k] for k in prompt.members(number))
    ids = prompt.prompt_ids, preferred, other
    texts = tokenizer.batch_decode(list(ids), skip_special_tokens=True)
    row = {"pair": pair_key(*ids), "source": prompt.source, "margin": margin}
    return row | dict(zip(("prompt", "preferred", "other"), texts, strict=True))
