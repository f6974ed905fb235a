"""Runs of FSDPTrainer, one after another in the same two processes: what takes long is to start them."""

import io
import json
import os
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException

import train
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.distributed.launching import WorkerDiedError, launch, silence_others

ENDED = "ended"


def runs(wanted: list[tuple[dict, Path]]) -> list[str]:
    """How each run has ended, in order: as ENDED, or by a refusal or an error. Each is a whole configuration and a directory.

    Where the processes die, the run that they were at is lost, and others go on with the rest.
    """
    said: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        while rest := [(number, *one) for number, one in enumerate(wanted) if number not in said]:
            try:
                launch(follow, ([(number, settings, str(run_dir)) for number, settings, run_dir in rest], folder), 2, None)
                lost = "said nothing of how it ended"
            except WorkerDiedError as error:
                lost = str(error).strip().splitlines()[-1]
            said |= {number: found for number, _, _ in rest if (found := _first_said(Path(folder), number))}
            if at := [number for number, _, _ in rest if number not in said]:
                said[at[0]] = f"TRACEBACK: {lost}"
    return [said[number] for number in range(len(wanted))]


def _first_said(folder: Path, number: int) -> str | None:
    """What the process said that was the first to end a run otherwise than well; else that it has ended. None if neither."""
    ends = sorted(json.loads(file.read_text()) for file in folder.glob(f"{number}.*"))
    otherwise = [said for _, said in ends if said != ENDED]
    # Both have to have ended well.
    return otherwise[0] if otherwise else ENDED if len(ends) == 2 else None


def follow(wanted: list[tuple[int, dict, str]], folder: str) -> None:
    """In each of the processes: every run in its turn."""
    silence_others()
    for number, settings, run_dir in wanted:
        # A part of the store of its own: joined processes leave their addresses there.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        said = _end_of(settings, Path(run_dir))
        name = f"{number}.{os.environ['RANK']}"
        partial = Path(folder) / f"partial_{name}"
        partial.write_text(json.dumps([time.time(), said]))
        partial.replace(Path(folder) / name)


def _end_of(settings: dict, run_dir: Path) -> str:
    from tests.architectures.checks import told

    try:
        with redirect_stdout(io.StringIO()):
            train.run(RunConfig.of(settings), run_dir)
        return ENDED
    except UserError as refused:
        return f"refused: {' '.join(str(refused).split())}"
    except (Exception, SystemExit, CheckpointException) as error:
        return f"TRACEBACK: {told(error)}"
