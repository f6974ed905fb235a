"""Lines of output that begin with a label, so that those of several jobs can be told apart."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# Hands the label on to processes that this one starts.
LABEL = "OUTPUT_LABEL"
# Where a line begins whose first letter is known. What follows a carriage return is drawn again, as a progress bar is.
LINE = re.compile(r"(?<=\n)(?=[^\r\n])")


class LabeledStream:
    """A text stream whose lines begin with a label; all else is the stream's own."""

    def __init__(self, stream: TextIO, label: str):
        self.stream, self.label = stream, label
        self.is_at_start = True

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, with the label before each line that begins in it."""
        if not text:
            return 0
        labeled = LINE.sub(lambda _: self.label, text)
        if self.is_at_start and text[0] not in "\r\n":
            labeled = self.label + labeled
        self.is_at_start = text[-1] in "\r\n"
        self.stream.write(labeled)
        return len(text)


@contextmanager
def labeled_output(label: str) -> Iterator[None]:
    """Inside, lines that this process and those it starts print begin with `[label] `."""
    usual = sys.stdout, sys.stderr
    os.environ[LABEL] = label
    label_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = usual
        del os.environ[LABEL]


def label_output() -> None:
    """From here on, label what this process prints, if it was started inside `labeled_output`."""
    if label := os.environ.get(LABEL):
        sys.stdout, sys.stderr = (LabeledStream(stream, f"[{label}] ") for stream in (sys.stdout, sys.stderr))
