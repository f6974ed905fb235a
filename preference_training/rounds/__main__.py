"""The steps of a loop by hand, and what is left of it.

python -m preference_training.rounds status DIRECTORY              # what is done
python -m preference_training.rounds run DIRECTORY                 # all that is missing
python -m preference_training.rounds sample DIRECTORY --round 2    # one step: sample, judge, pair, summarize, train
python -m preference_training.rounds report DIRECTORY              # report.html again
python -m preference_training.rounds judge DIRECTORY --round 2 --again    # ask again where the judge could not judge
"""

import argparse
import sys
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.core.signals import STOPPED, StoppedError
from preference_training.reporting.loops.page import rebuild_loop_report, write_loop_report
from preference_training.rounds.driver import (
    APART,
    REPORTED,
    check_can_begin,
    refresh,
    run_loop,
    run_one,
    table,
    work,
    write_page,
)
from preference_training.rounds.loop import Loop
from preference_training.rounds.processes import StepFailedError, locked_loop
from preference_training.rounds.summary import track

STEPS = ("sample", "judge", "pair", "summarize", "train")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m preference_training.rounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=(*STEPS, "run", "status", "report"))
    parser.add_argument("directory", type=Path, help="the run directory of python train.py +rounds=default")
    parser.add_argument(
        "--round",
        type=int,
        metavar="K",
        help="which round, from 1; the one after the last is the last policy's (default: the first)"
        " in which the step is missing",
    )
    parser.add_argument("--again", action="store_true", help="judge: ask again where the judge could not judge")
    # Of sampling in several processes, which one of them has.
    parser.add_argument("--share", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(options: argparse.Namespace) -> None:
    """Do what was asked. Raises UserError."""
    directory = options.directory.absolute()
    if options.again and options.step != "judge":
        raise UserError(f"--again: {options.step} does not read it. Expected the step judge.")
    if options.round is not None and options.step not in STEPS:
        raise UserError(f"--round: {options.step} is of the whole loop. Expected one of {', '.join(STEPS)}, or no --round.")
    if options.step == "report":
        print(f"report: {rebuild_loop_report(directory)}")
        return
    loop = Loop.open(directory)
    if options.step == "status":
        print(*table(loop), sep="\n")
    elif options.step == "run":
        run_loop(loop, report=write_loop_report)
    else:
        with locked_loop(directory):
            number = _missing(loop, options.step) if options.round is None else options.round
            check_round(loop, number, options.step)
            if options.step in APART:
                work(loop, number, options.step, options.again, options.share)
            else:
                run_one(loop, number, options.step)
            if options.again:
                refresh(loop, number)
            if options.again or options.step in REPORTED:
                write_page(loop, write_loop_report)
                track(loop)


def _missing(loop: Loop, step: str) -> int:
    rounds = enumerate(loop.rounds(), start=1)
    found = next((number for number, files in rounds if step in files.steps and not files.is_done(step)), None)
    if found is None:
        raise UserError(f"{step}: done in every round of {loop.directory}. Name a round with --round, or raise rounds.rounds.")
    return found


def check_round(loop: Loop, number: int, step: str) -> None:
    """Raise UserError where there is no such round, or it is not as far."""
    last = loop.config.rounds.rounds
    if not 1 <= number <= last + 1 or step not in loop.round(number).steps:
        after = f" ({last + 1}: the last policy's held-out responses)" if step in loop.round(last + 1).steps else ""
        raise UserError(f"--round: found {number}, expected 1 to {last}{after}.")
    check_can_begin(loop, number, step)


def command_line() -> None:
    """Run `main`: a mistake of the user's is one message, with exit status 2."""
    try:
        main(arguments())
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    except (StoppedError, KeyboardInterrupt) as stopped:
        # Ctrl-C comes from the terminal and from the loop: once more when a step has stopped handling it.
        print(str(stopped) or "stopped: SIGINT", flush=True)
        sys.exit(STOPPED)
    except StepFailedError as failed:
        sys.exit(failed.told())


if __name__ == "__main__":
    command_line()
