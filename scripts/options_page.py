"""docs/options-that-pay.md: the tables of memory and time, from the newest raw results of benchmarks/memory_options.py.

python scripts/options_page.py [--check]

--check writes nothing, and exits with status 1 if the page is out of date.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "options-that-pay.md"

# Between these lines of the page stands what is generated.
BEGIN, END = "<!-- generated: python scripts/options_page.py -->", "<!-- end of what is generated -->"
NOT_MEASURED = "Not measured yet."
TITLES = {"llama-62m": "A Llama of 62M parameters, from scratch", "smollm2": "SmolLM2, 135M parameters"}
HEAD = (
    "| option | against | memory, MiB | relative | seconds a step | relative |",
    "|---|---|---|---|---|---|",
)


def newest_results() -> Path | None:
    """The newest file of raw results that has both models' settings; None where there is none."""
    files = sorted(RESULTS.glob("*_memory_options_cpu.json"))
    return next((file for file in reversed(files) if "models" in json.loads(file.read_text())), None)


def measured(runs: list[dict]) -> tuple[float, float] | None:
    """Peak memory in MiB and processor seconds of a step: medians over the runs that gave numbers, None where none did.

    A run's step is its fastest behind the first, which is a warm-up.
    """
    good = [run for run in runs if "error" not in run]
    if not good:
        return None
    return median(run["peak_in_steps"] / 2**20 for run in good), median(min(run["cpu_seconds"][1:]) for run in good)


def row(name: str, settings: dict[str, dict]) -> str:
    """A setting's row: its numbers, beside those of the setting without its option."""
    entry = settings[name]
    own, other = measured(entry["runs"]), entry["against"]
    if own is None:
        reason = entry["runs"][-1]["error"].replace("|", "\\|") if entry["runs"] else "not measured"
        return f"| {name} | {other or ''} | failed: {reason} | | | |"
    than = measured(settings[other]["runs"]) if other in settings else None
    memory, seconds = (f"{mine / its:.2f}" if than else "" for mine, its in zip(own, than or own, strict=True))
    return f"| {name} | {other or ''} | {own[0]:,.0f} | {memory} | {own[1]:.2f} | {seconds} |"


def tables(file: Path | None) -> str:
    """What stands between the two lines of the page."""
    if file is None:
        return NOT_MEASURED
    found = json.loads(file.read_text())
    lines = []
    for model, facts in found["models"].items():
        settings = facts["settings"]
        lines += [f"### {TITLES[model]}", "", *HEAD, *(row(name, settings) for name in settings), ""]
    cores, load = found["hardware"]["cores"], max(one for one, *_ in found["load_average"])
    lines.append(f"Raw results: `{file.relative_to(ROOT)}` ({cores} cores, load average at most {load:.0f}).")
    return "\n".join(lines)


def page() -> str:
    """The page, with the tables of the newest results."""
    between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", flags=re.DOTALL)
    return between.sub(lambda _: f"{BEGIN}\n\n{tables(newest_results())}\n\n{END}", PAGE.read_text())


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if the page is out of date")
    parser.parse_args()
    from generated import write_or_check

    write_or_check(PAGE, page())


if __name__ == "__main__":
    main()
