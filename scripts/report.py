"""report.html of a run, made again from what lies in its directory; the run may be going on.

python scripts/report.py RUN [--flagged FILE.jsonl]

--flagged also writes the training pairs that the run speaks against, as rows that the labelling app imports.
"""

import argparse
import sys
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.reporting.flagged_pairs import write_flagged
from preference_training.reporting.run_report import rebuild_report


def main() -> None:
    """Write the page. A mistake of the user's becomes one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--flagged", type=Path, metavar="FILE", help="where flagged pairs go, as JSON lines")
    options = parser.parse_args()
    try:
        print(f"report: {rebuild_report(options.run)}")
        if options.flagged:
            print(f"{write_flagged(options.run, options.flagged)} pairs: {options.flagged}")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
