"""Merge the weights of several models of one architecture into one model.

python scripts/merge.py MODEL MODEL ... --method linear --to DIRECTORY [--weights 0.6 0.4]
python scripts/merge.py MODEL MODEL --method slerp --t 0.3 --to DIRECTORY
python scripts/merge.py MODEL ... --method ties|dare_ties|task_arithmetic --base MODEL --to DIRECTORY [--density 0.5]
python scripts/merge.py --soup SWEEP_DIR --top 3 [--greedy] --to DIRECTORY

A MODEL is a run directory, a checkpoint, an adapter, a model directory or a hub id.
"""

import argparse
import sys
from pathlib import Path

import preference_datasets  # noqa: F401  its data sets register themselves
from preference_training.core.errors import UserError

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="what to merge; KEY=VALUE overrides the configuration of the held-out run"
    )
    parser.add_argument("--to", type=Path, required=True, help="the directory to create; it must not exist, or be empty")
    parser.add_argument("--method", choices=METHODS, help="how (default: linear)")
    parser.add_argument("--base", metavar="MODEL", help="the model that all of them were fine-tuned from")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="a weight for each model (default: equal ones)")
    parser.add_argument("--t", type=float, help="slerp: 0 is the first model, 1 the second (default: 0.5)")
    parser.add_argument("--density", type=float, help="ties, dare_ties: the share of a task vector to keep (default: 0.5)")
    parser.add_argument("--scale", type=float, help="the factor of what is added to the base model (default: 1)")
    parser.add_argument("--seed", type=int, help="dare_ties: of what is dropped (default: 0)")
    parser.add_argument("--held-out", type=Path, metavar="RUN", help="measure all models on the rows that a run holds out")
    parser.add_argument(
        "--soup", type=Path, metavar="SWEEP_DIR", help="average the best runs of a sweep, or of a folder of runs"
    )
    parser.add_argument("--top", type=int, help="--soup: how many runs (default: 3)")
    parser.add_argument("--greedy", action="store_true", help="--soup: add a run only where the held-out metric improves")
    parser.add_argument("--metric", help="--soup: the held-out metric that chooses (default: the runs' objective)")
    parser.add_argument("--cache-dir", help="the cache directory for models of the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    return parser.parse_intermixed_args()


def main() -> None:
    """Merge. A user's mistake is reported as one message, with exit status 2."""
    options = arguments()
    from preference_training.merging.command import merge_as_asked

    try:
        lines = merge_as_asked(options)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
