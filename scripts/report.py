"""Rebuild report.html from a run directory, or that of a loop of rounds; it may still be in progress.

python scripts/report.py RUN [--flagged FILE.jsonl]

--flagged also writes the training pairs that the run calls into question, as rows that the labeling app imports.
"""

import argparse
import sys
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.reporting.flagged_pairs import write_labeling_file
from preference_training.reporting.loops.page import rebuild_loop_report
from preference_training.reporting.run_report import rebuild_report
from preference_training.tracking.run_files import ROUNDS_FILE


def main() -> None:
    """Write the page. A user's mistake is reported as one message, with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--flagged", type=Path, metavar="FILE", help="write flagged pairs to this file, as JSON lines")
    options = parser.parse_args()
    try:
        is_loop = (options.run / ROUNDS_FILE).is_file()
        if is_loop and options.flagged:
            raise UserError(f"--flagged: {options.run} is a loop of rounds. Give the run of a round, such as round-1/run.")
        print(f"report: {(rebuild_loop_report if is_loop else rebuild_report)(options.run)}")
        if options.flagged:
            number = write_labeling_file(options.run, options.flagged)
            print(f"{number} pairs: {options.flagged}" if number else "none flagged: no pair's label is in question")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
