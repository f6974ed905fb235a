"""A program of two workers that hear a signal as a run does, and come to their end all the same.

outliving_work.py FOLDER    each worker leaves a file there, under the number of its process; the first returns what it heard
"""

import os
import sys
import time
from pathlib import Path

from preference_training.core.signals import StopRequests
from preference_training.distributed.launching import launch


def outlive(folder: str) -> str:
    """Return the name of a signal when one has come."""
    with StopRequests() as stop:
        (Path(folder) / str(os.getpid())).touch()
        while stop.reason is None:
            time.sleep(0.01)
    return stop.reason


if __name__ == "__main__":
    print(launch(outlive, (sys.argv[1],), 2, None))
