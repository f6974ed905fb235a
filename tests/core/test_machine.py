"""What a process says of itself."""

import io
import time

from preference_training.core.machine import said_while_slow


def test_what_takes_long_says_that_it_goes_on_and_falls_silent_at_its_end():
    told = io.StringIO()
    with said_while_slow("still sampling", every=0.01, file=told):
        while told.getvalue().count("\n") < 2:
            time.sleep(0.005)
    lines = told.getvalue()
    assert lines.splitlines()[0] == "still sampling: 0 s so far"
    time.sleep(0.05)
    assert told.getvalue() == lines


def test_what_takes_no_time_says_nothing():
    told = io.StringIO()
    with said_while_slow("still sampling", file=told):
        pass
    assert told.getvalue() == ""
