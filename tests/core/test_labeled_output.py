"""Output whose lines name their job, in this process and in those that it starts."""

import io
import os
import subprocess
import sys

from preference_training.core.labeled_output import LabeledStream, labeled_output


def test_each_line_has_the_label_once_however_it_is_written(capsys):
    with labeled_output("job 3"):
        print("one\ntwo", "more")
        print("three", end="")
        print(" goes on\n\nfour")
        print("wrong", file=sys.stderr)
    print("outside")
    said = capsys.readouterr()
    assert said.out == "[job 3] one\n[job 3] two more\n[job 3] three goes on\n\n[job 3] four\noutside\n"
    assert said.err == "[job 3] wrong\n"


def test_a_progress_bar_is_drawn_as_without_a_label():
    stream = LabeledStream(io.StringIO(), "[job 3] ")
    for text in ("\r 10%|#   |", "\r           \r", "a line\n", "\r 20%|##  |"):
        stream.write(text)
    assert stream.getvalue() == "\r 10%|#   |\r           \r[job 3] a line\n\r 20%|##  |"


def test_processes_that_are_started_inside_know_the_label(capfd):
    code = "from preference_training.core.labeled_output import label_output; label_output(); print('there')"
    with labeled_output("job 3"):
        subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", code], check=True)
    assert capfd.readouterr().out == "[job 3] there\nthere\n"
    assert "OUTPUT_LABEL" not in os.environ
