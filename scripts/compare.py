"""Compare runs: a table, their curves, and the settings in which they differ, as a page and as CSV.

python scripts/compare.py multirun/DATE/TIME            # the jobs of a sweep
python scripts/compare.py runs/one_DATE runs/other_DATE --to comparison
"""

import argparse
import sys
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.reporting.comparison import write_comparison


def main() -> None:
    """Write the comparison. A user's mistake is reported as one message, with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or folders of them")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="folder for the files (default: the only path, or the current folder)"
    )
    options = parser.parse_args()
    default = options.runs[0] if len(options.runs) == 1 else Path()
    try:
        page, table = write_comparison(options.runs, options.to or default)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"comparison: {page}\ntable: {table}")


if __name__ == "__main__":
    main()
