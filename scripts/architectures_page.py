"""docs/architectures.md: what the sweep over tiny architectures has found, from tests/architectures/results.json.

python scripts/architectures_page.py [--check]

--check writes nothing, and exits with status 1 where the page is not what the results say. `make architectures
ARCHITECTURES=--write` makes both anew.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "tests" / "architectures" / "results.json", ROOT / "docs" / "architectures.md"

HEAD = """# Which architectures

Any causal language model of transformers can be trained. These were tried, each in a size that trains in milliseconds, with
windows and chunks that are shorter than the rows; `make architectures` tries them again.

| column | what is compared |
|---|---|
| prefix | *shared*: each prompt is computed once for all its responses; *padded*: the model cannot, and each has it before it |
| sft, dpo | log-probs before and after two steps, with plain transformers; weights, with the same steps written by hand |
| start | at DPO's first step margin 0 and loss ln 2, exactly: float32 and bfloat16, live and cached reference |
| resumed | a run that goes on from its checkpoint, with one that was not interrupted |
| lora | the adapter of `+adapter=lora`, loaded with plain peft |
| merged, exported | what `scripts/export.py` writes, with `--merge` and of a whole model, loaded with plain transformers |
| fsdp | two steps of `FSDPTrainer` on two processes, with one process |

A log-prob may differ by 1e-5 a token, weights by 1e-5 of their size. A number is explained below the table.
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
    made = f"Found on {kept['date']} with {versions}, by `{kept['command']}`, in {kept['seconds'] / 60:.0f} minutes.\n"
    return "\n".join([HEAD, *table, "", *notes, "", made])


def cell(name: str, check: str, said: str, reasons: list[str]) -> str:
    """A cell of the table; what it gives as a reason becomes a numbered note, once."""
    how, _, reason = said.partition(": ")
    if not reason:
        return said
    # What only this model's files are called.
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
