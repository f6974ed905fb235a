"""Random streams that go on where they were, and what is said of errors."""

import random

import numpy
import pytest
import torch

from preference_training.checkpointing.state import from_json, to_json
from preference_training.core.errors import first_line
from preference_training.core.files import load_tensors
from preference_training.core.random_streams import random_streams, restore_random_streams, seed_everything


def drawn() -> list[float]:
    """A few numbers from each global stream; an odd number of normal ones, of which Python and numpy make two at once."""
    python = [random.random(), random.gauss(0, 1), random.randrange(10**30)]
    arrays = [*numpy.random.random(2), numpy.random.normal(), numpy.random.randint(2**31)]
    return [*python, *map(float, arrays), *torch.randn(3).tolist(), torch.randint(2**31, (1,)).item()]


@pytest.mark.parametrize("already", [0, 1, 2, 700])
def test_random_streams_go_on_where_they_were_through_json_too(already):
    seed_everything(already)
    for _ in range(already):
        drawn()
    written = to_json(random_streams())
    expected = [drawn() for _ in range(3)]
    seed_everything(12345)
    assert drawn() != expected[0]
    restore_random_streams(from_json(written))
    assert [drawn() for _ in range(3)] == expected


def test_looking_at_the_random_streams_does_not_move_them():
    seed_everything(0)
    expected = drawn()
    seed_everything(0)
    random_streams()
    assert drawn() == expected


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("one\ntwo", "one"),
        ("  \n one. \n", "one"),
        ("", "ValueError"),
        ("\x1b[1mbold\x1b[0m and \x07bell\x1b]0;title\x07", "bold and bell]0;title"),
        ("x" * 300, "x" * 200),
    ],
)
def test_the_first_line_of_an_error_is_short_and_nothing_that_a_terminal_obeys(said, line):
    assert first_line(ValueError(said)) == line


def test_tensors_and_plain_values_come_back_as_they_were_saved(tmp_path):
    saved = {"state": {"w": torch.arange(3.0)}, "step_idx": 5, "metrics": {"a": [1.5, None, "x"]}}
    torch.save(saved, tmp_path / "policy.pt")
    for mapped in (False, True):
        found = load_tensors(tmp_path / "policy.pt", mapped)
        assert torch.equal(found["state"].pop("w"), torch.arange(3.0))
        assert found == {"state": {}, "step_idx": 5, "metrics": {"a": [1.5, None, "x"]}}
