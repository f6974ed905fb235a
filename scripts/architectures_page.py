"""docs/architectures.md: the results of the sweep over tiny architectures, from tests/architectures/results.json.

python scripts/architectures_page.py [--check]

--check writes nothing, and exits with status 1 if the page is out of date. `make architectures ARCHITECTURES=--write` updates
both files.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "tests" / "architectures" / "results.json", ROOT / "docs" / "architectures.md"

HEAD = """# Supported architectures

```bash
make architectures ARCHITECTURES="--only llama,gpt2 --checks dpo,lora"
```

Any causal language model in transformers can be trained. The sweep below tests tiny versions of them, which train in
milliseconds and whose attention windows and chunks are shorter than the rows; `make architectures` repeats it, or as above a
part of it.

| column | what is compared |
|---|---|
| prefix | *shared*: what sequences share is computed once; *padded*: the model runs on padded rows |
| sft, dpo | log-probs before and after two steps, with plain transformers; weights, with the same steps written by hand |
| start | at DPO's first step, margin 0 and loss ln 2, exactly: in float32 and bfloat16, with a live and a cached reference |
| resumed | a run resumed from its checkpoint, with an uninterrupted one |
| lora | the adapter of `+adapter=lora`, loaded with plain PEFT |
| merged, exported | what `scripts/export.py` writes, with `--merge` and of a whole model, loaded with plain transformers |
| fsdp | two steps of `FSDPTrainer` on two processes, with one process |

Log-probs may differ by 1e-5 per token, and weights by 1e-5 of their size. The notes below the table explain the numbers in
parentheses.

Three kinds of models run on padded rows. Some compute attention in code of their own, which cannot be replaced (ALiBi, and
older models). Some build their own attention mask. The rest are recurrent: sharing a prefix would require every kind of layer
to save its state at each branch and continue from it, with gradients through both. transformers' caches do not support that,
and most kernels support only one state per row.
"""


def page() -> str:
    """The whole page."""
    kept = json.loads(RESULTS.read_text())
    columns = list(next(iter(kept["results"].values())))
    reasons: list[str] = []
    rows = [
        f"| {name} | " + " | ".join(cell(name, check, found.get(check, ""), reasons) for check in columns) + " |"
        for name, found in kept["results"].items()
    ]
    table = [f"| architecture | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows]
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    versions = ", ".join(f"{name} {kept['versions'][name]}" for name in ("torch", "transformers"))
    made = f"Measured on {kept['date']} with {versions}, by `{kept['command']}`, in {kept['seconds'] / 60:.0f} minutes.\n"
    return "\n".join([HEAD, *table, "", *notes, "", made])


def cell(name: str, check: str, result: str, reasons: list[str]) -> str:
    """A cell of the table; each distinct reason becomes one numbered note."""
    how, _, reason = result.partition(": ")
    if not reason:
        return result
    # Paths of this run's temporary files.
    reason = re.sub(r"/\S*?/(model|lora|dpo)\b", r"\1", reason).replace("|", "\\|")
    if reason not in reasons:
        reasons.append(reason)
    return f"{how} ({reasons.index(reason) + 1})"


def main() -> None:
    """Write the page, or look whether it is as the results say."""
    from generated import write_or_check

    write_or_check(PAGE, page())


if __name__ == "__main__":
    main()
