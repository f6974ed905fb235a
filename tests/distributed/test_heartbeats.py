"""Heartbeats of ranks, as threads on one store: who is named when a rank waits."""

import re
import time

import pytest
import torch

from preference_training.core.process_group import progress
from preference_training.distributed.heartbeats import Heartbeats

# Of a collective; a heartbeat each sixteenth. Unit: seconds.
TIMEOUT = 2.4


@pytest.fixture
def beat():
    """Starts the heartbeats of a rank of three on a common store; all end with the test."""
    store, started = torch.distributed.HashStore(), []

    def begin(rank: int) -> Heartbeats:
        started.append(Heartbeats(store, rank, 3, TIMEOUT))
        started[-1].start()
        return started[-1]

    yield begin
    for each in started:
        each.stop()
    progress.at(None)


def said(heartbeats: Heartbeats) -> str:
    """What a rank says, once it does."""
    deadline = time.monotonic() + 20
    while not heartbeats.said:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return heartbeats.said


def seen(heartbeats: Heartbeats, rank: int) -> None:
    """Wait until a rank has read another's heartbeat."""
    deadline = time.monotonic() + 20
    while rank not in heartbeats.seen:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_that_falls_silent_is_named_with_what_it_last_did(beat, capsys):
    zero, one, two = beat(0), beat(1), beat(2)
    progress.at("step 3, pack 1 of 2")
    for rank in (1, 2):
        seen(zero, rank)
    two.stop()
    line = r"rank 0 has been in step 3, pack 1 of 2 for \d+ s; not heard of for \d+ s: rank 2 \(last: step 3, pack 1 of 2\)"
    assert re.fullmatch(line, said(zero))
    assert capsys.readouterr().err.startswith(f"waiting: {zero.said}") and not one.said


def test_a_silent_rank_0_is_named_by_the_first_that_is_heard_of(beat):
    zero, one = beat(0), beat(1)
    progress.at("a checkpoint")
    seen(one, 0)
    zero.stop()
    assert re.fullmatch(r"rank 0 has not been heard of for \d s; it last did: a checkpoint", said(one))


def test_nobody_is_named_while_ranks_are_heard_of_and_none_waits(beat):
    every = [beat(rank) for rank in range(3)]
    time.sleep(1.5 * TIMEOUT)
    assert [each.said for each in every] == ["", "", ""]
