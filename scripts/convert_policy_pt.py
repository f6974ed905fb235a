"""Convert a policy.pt, as the original DPO code writes it, into a directory that AutoModelForCausalLM loads.

python scripts/convert_policy_pt.py POLICY_PT --model PRESET_OR_PATH --to DIRECTORY [--dtype bfloat16]
"""

import argparse
import sys
from pathlib import Path

from preference_training.configuration.sections import DTYPES
from preference_training.core.errors import UserError


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, metavar="POLICY_PT", help='the file, with the weights under "state"')
    parser.add_argument("--model", required=True, help="the model of the weights: a preset (pythia28), a path or a hub id")
    parser.add_argument("--to", type=Path, required=True, help="the directory to create; it must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: float32)")
    return parser.parse_args()


def main() -> None:
    """Convert an archive. A user's mistake is reported as one message, with exit status 2."""
    options = arguments()
    from preference_training.core.machine import quiet_libraries
    from preference_training.export.policy_pt import convert

    quiet_libraries()
    try:
        lines = convert(options.archive, options.model, options.to, options.dtype)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
