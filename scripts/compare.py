"""Runs side by side: a table, their curves, and which keys set them apart, as a page and as CSV. The runs may be going on.

python scripts/compare.py multirun/DATE/TIME            # the jobs of a sweep
python scripts/compare.py runs/one_DATE runs/other_DATE --to comparison
"""

import argparse
import sys
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.reporting.comparison import write_comparison


def main() -> None:
    """Write the comparison. A mistake of the user's becomes one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or folders with runs below them")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where the files go; else the only folder given, or this one")
    options = parser.parse_args()
    alone = options.runs[0] if len(options.runs) == 1 else Path()
    try:
        page, table = write_comparison(options.runs, options.to or alone)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"comparison: {page}\ntable: {table}")


if __name__ == "__main__":
    main()
