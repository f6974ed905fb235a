"""Evaluate a run's checkpoint: held-out metrics, KL divergence to the reference, win rate and tasks.

python scripts/evaluate.py RUN_OR_CHECKPOINT [KEY=VALUE ...] [--judge ollama:llama3.1] [--against DIR] [--tasks open_llm]

The run's own configuration applies; KEY=VALUE overrides it, as on train.py's command line. Prints a table and writes
results.json into the run directory.
"""

import argparse
import sys
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.core.signals import STOPPED, StoppedError
from train import start

# The keys of `evaluation` that have a command-line option.
OPTIONS = ("to", "judge", "judge_url", "against", "tasks")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory (its latest checkpoint), or a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on train.py's command line")
    parser.add_argument("--judge", help="FILE.py:NAME, toy, reward_model:NAME, openai:MODEL or ollama:MODEL")
    parser.add_argument("--judge-url", help="server of openai: or ollama:, such as http://localhost:8000/v1")
    parser.add_argument("--against", help="the model to compare with: reference, or a checkpoint directory")
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), help="comma-separated suites or tasks of lm-evaluation-harness"
    )
    parser.add_argument("--to", help="results file (default: results.json in the run directory)")
    return parser.parse_intermixed_args()


def main() -> None:
    """Evaluate. A user's mistake is reported as one message, with exit status 2."""
    options = arguments()
    try:
        from preference_training.data.entries import read_entries
        from preference_training.evaluation.runs import load_run_config

        given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
        config = load_run_config(options.run, options.overrides, given)
        read_entries(config)
        start(config, options.run.resolve(), in_sweep=False)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
