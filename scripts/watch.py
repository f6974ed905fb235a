"""A run's curves and events in the terminal, while it goes on; from any shell or machine that sees its directory.

python scripts/watch.py RUN             # until the run ends, or Ctrl-C
python scripts/watch.py RUN --once      # as it is now
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.reporting.terminal_view import watch


def main() -> None:
    """Show the run. A mistake of the user's becomes one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="how often its files are looked at")
    parser.add_argument("--once", action="store_true", help="show it as it is now, and leave")
    options = parser.parse_args()
    try:
        with suppress(KeyboardInterrupt):
            watch(options.run, max(0.1, options.every), options.once)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
