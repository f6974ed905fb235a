"""Watch a run's curves and events in the terminal, from any shell or machine that can read its directory.

python scripts/watch.py RUN             # until the run ends, or Ctrl-C
python scripts/watch.py RUN --once      # its current state
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.reporting.terminal_view import watch


def main() -> None:
    """Show the run. A user's mistake is reported as one message, with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="how often to read its files")
    parser.add_argument("--once", action="store_true", help="print its current state and exit")
    options = parser.parse_args()
    try:
        with suppress(KeyboardInterrupt):
            watch(options.run, max(0.1, options.every), options.once)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
