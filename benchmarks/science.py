"""What the losses and defaults claim, run again: raw numbers in benchmarks/results/, pictures in docs/.

    python benchmarks/science.py closed_form     what DPO, IPO, conservative and robust DPO converge to
    python benchmarks/science.py beta_dpo        beta-DPO and others on flipped labels: win rate against KL divergence
    python benchmarks/science.py rates           learning rate, beta, warm-up and schedule of short runs
    python benchmarks/science.py --draw          the pictures again, from the newest raw numbers
    python benchmarks/science.py --check         nothing is written; exit status 1 where a picture is not what would be drawn

Each experiment takes at most a few minutes of one core. docs/science.md says what was found.
"""

import argparse
import datetime
import importlib
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
EXPERIMENTS = ("closed_form", "beta_dpo", "rates")


def run(name: str, results: Path, short: bool = False) -> Path:
    """Run an experiment; returns its file of raw numbers."""
    from measure import hardware, versions

    started = time.process_time()
    found = importlib.import_module(f"science_parts.{name}").experiment(short)
    facts = {
        "command": f"benchmarks/science.py {name}",
        "hardware": hardware(),
        "versions": versions(),
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    path = results / f"{datetime.date.today()}_science_{name}_cpu.json"
    # Seven digits are more than what a picture shows, and a third of the size.
    path.write_text(json.dumps(facts | rounded(found), separators=(",", ":")) + "\n")
    return path


def rounded(value):
    """Numbers of nested lists and dictionaries, to seven digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def newest(name: str, results: Path = RESULTS) -> dict:
    """The raw numbers of an experiment's newest run."""
    return json.loads(max(results.glob(f"*_science_{name}_cpu.json")).read_text())


def pictures(name: str, found: dict) -> dict[str, str]:
    """The pictures of an experiment: SVG by file name in docs/."""
    return importlib.import_module(f"science_parts.{name}_pictures").pictures(found)


def main() -> None:
    """Run one experiment, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--draw", action="store_true", help="only draw, all")
    parser.add_argument("--check", action="store_true", help="only compare the pictures with the raw numbers")
    options = parser.parse_args()
    if not (options.experiment or options.draw or options.check):
        parser.error("which experiment?")
    if options.experiment:
        import torch

        torch.set_num_threads(1)
        print(run(options.experiment, RESULTS))
    for name in [options.experiment] if options.experiment else EXPERIMENTS:
        for file, drawn in pictures(name, newest(name)).items():
            path = ROOT / "docs" / file
            if options.check and path.read_text() != drawn:
                sys.exit(f"docs/{file} is not what its raw numbers give: python benchmarks/science.py --draw")
            if not options.check:
                path.write_text(drawn)
                print(path)


if __name__ == "__main__":
    main()
