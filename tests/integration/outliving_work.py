"""A program of two workers that hear of their launcher's death as a run does, and come to their end all the same.

outliving_work.py FOLDER    each worker leaves a file there, under the number of its process
"""

import os
import sys
import time
from pathlib import Path

from launching import launch
from stopping import StopRequests


def outlive(folder: str) -> None:
    """Return when a signal has come."""
    with StopRequests() as stop:
        (Path(folder) / str(os.getpid())).touch()
        while stop.reason is None:
            time.sleep(0.01)


if __name__ == "__main__":
    launch(outlive, (sys.argv[1],), 2, None)
