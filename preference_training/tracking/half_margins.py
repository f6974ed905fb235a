"""The margins of pairs under a model that was trained on the other half of the data: RUN/halves/N/margins.jsonl.

A row a pair, with its texts: {"pair": key of `pair_key`, "source", "margin", "prompt", "preferred", "other"}
"""

import json
from collections.abc import Iterable
from pathlib import Path

from preference_training.core.files import atomic_file
from preference_training.data.pairs.weights import pair_key
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.tracking.run_files import HALF_MARGINS


def write_half_margins(
    run_dir: Path, examples: Iterable[tuple[TokenizedPrompt, int]], margins: Iterable[float], tokenizer
) -> None:
    """Write the margins of pairs, given as prompts and numbers of examples. Raises OSError."""
    with atomic_file(run_dir / HALF_MARGINS, encoding="utf-8") as file:
        for (prompt, number), margin in zip(examples, margins, strict=True):
            preferred, other = (prompt.responses[k] for k in prompt.members(number))
            ids = prompt.prompt_ids, preferred, other
            texts = tokenizer.batch_decode(list(ids), skip_special_tokens=True)
            row = {"pair": pair_key(*ids), "source": prompt.source, "margin": margin}
            row |= dict(zip(("prompt", "preferred", "other"), texts, strict=True))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
