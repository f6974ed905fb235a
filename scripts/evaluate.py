"""What a run has learnt: its checkpoint's held-out scores, distance from the reference, win rate and tasks. Trains nothing.

python scripts/evaluate.py RUN_OR_CHECKPOINT [KEY=VALUE ...] [--judge ollama:llama3.1] [--against DIR] [--tasks open_llm]

The run is put together as its own configuration says; KEY=VALUE changes that, as on train.py's command line. The table is
printed, and results.json goes into the run directory.
"""

import argparse
import sys
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.core.signals import STOPPED, StoppedError
from train import start

# The keys of `evaluation` that have an option of their own.
OPTIONS = ("to", "judge", "judge_url", "against", "tasks")


def arguments() -> argparse.Namespace:
    """The command line, understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory, whose newest checkpoint is taken, or a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on train.py's command line")
    parser.add_argument("--judge", help="toy, reward_model:NAME, openai:MODEL or ollama:MODEL")
    parser.add_argument("--judge-url", help="server of openai: or ollama:, such as http://localhost:8000/v1")
    parser.add_argument("--against", help="whose answers the policy's are compared with: reference, or a checkpoint directory")
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), help="suites or tasks of lm-evaluation-harness, with commas between them"
    )
    parser.add_argument("--to", help="file of the results; else results.json in the run directory")
    return parser.parse_intermixed_args()


def main() -> None:
    """Evaluate. A mistake of the user's becomes one message and exit status 2."""
    options = arguments()
    try:
        from preference_training.data.entries import read_entries
        from preference_training.evaluation.runs import config_of_run

        given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
        config = config_of_run(options.run, options.overrides, given)
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
