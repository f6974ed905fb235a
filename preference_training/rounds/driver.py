"""The loop: every step of every round that is not done, in order; the heavy ones in processes of their own."""

import sys
from collections.abc import Callable
from pathlib import Path

from preference_training.core.errors import UserError, first_line
from preference_training.core.signals import StoppedError
from preference_training.rounds.judges.base import PendingError
from preference_training.rounds.loop import Loop, RoundFiles
from preference_training.rounds.processes import handling, locked_loop, run_step, stop_at_signal
from preference_training.rounds.records import make_pairs
from preference_training.rounds.summary import held_out_line, read_summary, summarize, track, write_metrics
from preference_training.rounds.training import finish_training, reference_moves, write_training
from preference_training.tracking.run_files import REPORT

MODULE = "preference_training.rounds"
# Steps that load a model, or a user's judge.
APART = ("sample", "judge")
Run = Callable[..., None]
# Steps after which there is something new to read.
REPORTED = ("summarize", "train")


def run_loop(loop: Loop, run: Run = run_step, report: Callable[[Path], object] | None = None) -> None:
    """Run what is missing of a loop. run: runs a command as a process of its own. report: makes a page of a loop's directory.

    Raises StoppedError where it is to stop, StepFailedError where a process has failed, UserError.
    """
    # Between the steps, and in those that this process does itself.
    with locked_loop(loop.directory), handling(stop_at_signal):
        for number, files in enumerate(loop.rounds(), start=1):
            while (step := files.next_step) is not None:
                run_one(loop, number, step, run)
                if files.number is None or step not in REPORTED:
                    continue
                if report:
                    write_page(loop, report)
                track(loop)
        # Also where a kill has fallen between a summary and these.
        write_metrics(loop)
        if report:
            write_page(loop, report)
        track(loop)
    pages = [f"report: {loop.directory / REPORT}"] if (loop.directory / REPORT).is_file() else []
    print(*table(loop), f"loop: {loop.directory}", *pages, sep="\n", flush=True)


def refresh(loop: Loop, number: int) -> None:
    """Make again what was made of a round's scores, which have changed: pairs that were not trained on, and summaries.

    Later policies are compared with the responses of the first one: their summaries are made again too. Raises UserError.
    """
    files = loop.round(number)
    if files.number is not None and files.is_done("pair"):
        if files.run.exists():
            print(f"{files.name}: its training has had the pairs of the scores before, which stay", flush=True)
        else:
            files.pairs.unlink()
            make_pairs(loop, number)
    for later in range(number, loop.config.rounds.rounds + 2):
        if loop.round(later).is_done("summarize"):
            summarize(loop, later)
    print(*write_metrics(loop), sep="\n", flush=True)


def write_page(loop: Loop, report: Callable[[Path], object]) -> None:
    """Write the page of a loop; where that fails, say so."""
    try:
        report(loop.directory)
    except StoppedError:
        raise
    except Exception as error:
        # No page is worth a loop.
        again = f"python scripts/report.py {loop.directory} tries it again"
        print(f"warning: {REPORT} could not be written: {type(error).__name__}: {first_line(error)}. {again}", flush=True)


def run_one(loop: Loop, number: int, step: str, run: Run = run_step) -> None:
    """Run one step of a round: in this process where it is light."""
    name = f"{step} of {loop.round(number).name}"
    if step in APART:
        run([sys.executable, "-m", MODULE, step, str(loop.directory), "--round", str(number)], name)
    elif step == "train":
        print(f"{loop.round(number).name}: training, {_reference(loop, number)}", flush=True)
        run(write_training(loop, number), name)
        finish_training(loop.round(number))
        if every := loop.config.loss.reference_update_every:
            print(f"{loop.round(number).name}: {reference_moves(loop.round(number), every)}", flush=True)
    else:
        (make_pairs if step == "pair" else summarize)(loop, number)
        if step == "summarize":
            print(*write_metrics(loop), sep="\n", flush=True)


def _reference(loop: Loop, number: int) -> str:
    words = {
        "previous": "compared with the policy that it begins with",
        "first": "compared with the model before the first round",
    }
    policy = "from the first model" if number == 1 else f"from the policy of round {number - 1}"
    return f"{policy}, {words.get(loop.config.rounds.reference, 'compared with a reference that begins as it and follows it')}"


def work(loop: Loop, number: int, step: str, again: bool = False, share: str | None = None) -> None:
    """Do one step in this process, which it may fill. Raises StoppedError at a signal, and where verdicts are still to come.

    share: of sampling, the NUMBER/SIZE of one of several processes.
    """
    from preference_training.rounds.judging import judge

    with handling(stop_at_signal):
        if step == "judge":
            try:
                judge(loop, number, again)
            except PendingError as error:
                raise StoppedError(str(error)) from error
        else:
            # torch and transformers.
            from preference_training.rounds.sampling import Share, sample

            sample(loop, number, share and Share(*map(int, share.split("/"))))


def check_can_begin(loop: Loop, number: int, step: str) -> None:
    """Raise UserError where a step of a round lacks what an earlier one writes."""
    files = loop.round(number)
    before = files.steps[: files.steps.index(step)] if step in files.steps else ()
    missing = next((each for each in before if not files.is_done(each)), None)
    if missing is not None and not (step == "train" and missing == "summarize"):
        first = f"python -m {MODULE} {missing} {loop.directory}"
        raise UserError(f"{step}: {files.name} is not done with the step {missing}. Run it first: {first}")


def table(loop: Loop) -> list[str]:
    """The state of a loop: a line for each round."""
    return [f"{files.name}: {_state(files, number)}" for number, files in enumerate(loop.rounds(), start=1)]


def _state(files: RoundFiles, number: int) -> str:
    done = [step for step in files.steps if files.is_done(step)]
    if not done:
        return "not begun"
    state = "done" if len(done) == len(files.steps) else f"done: {', '.join(done)}; next: {files.next_step}"
    summary = read_summary(files)
    return f"{state}; {held_out_line(summary['held_out'], number)}" if "held_out" in summary else state
