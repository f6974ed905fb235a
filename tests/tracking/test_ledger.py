"""The ledger has every pair each time a step was taken with it, whatever computed it and whatever the disk did."""

import numpy
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import TokenBudget
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.core.process_group import Ranks
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference
from preference_training.tracking.ledger import (
    SCHEMA,
    STEPS_KEPT,
    Ledger,
    Observations,
    ledger_files,
    read_ledger,
    truncate_ledger,
)
from preference_training.tracking.tracker import Tracker
from preference_training.training.updates import Updater
from tests.support.building import build_trainer
from tests.support.files import GOLDEN


def seen(*pairs: tuple[int, int, float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One pack of a step: pairs as (preferred, other, margin)."""
    rows = torch.tensor([pair[:2] for pair in pairs], dtype=torch.int64).reshape(-1, 2)
    return [(rows, torch.tensor([pair[2] for pair in pairs], dtype=torch.float32))]


def listed(sightings: Observations) -> list[tuple]:
    return list(zip(*(column.tolist() for column in sightings.columns().values()), strict=True))


def test_what_was_seen_is_read_back_in_the_order_of_the_steps(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.record(2, seen((4, 5, 0.5), (0, 1, -1.0)))
    ledger.record(4, seen((2, 3, 0.25)) + seen((0, 1, 2.0)))
    ledger.write()
    ledger.record(6, seen((4, 5, 1.5)))
    ledger.write()
    expected = [(2, 0, 1, -1.0), (2, 4, 5, 0.5), (4, 0, 1, 2.0), (4, 2, 3, 0.25), (6, 4, 5, 1.5)]
    assert listed(read_ledger(tmp_path)) == expected
    assert [path.name for path in ledger_files(tmp_path)] == ["4.parquet", "6.parquet"]


class TwoRanks(Ranks):
    """The first of two ranks; what the other one gathers is given beforehand."""

    def all_gather_object(self, value):
        return [value, self.group]


PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(width=32, allow_nan=False)), max_size=8)


@given(steps=st.lists(PAIRS, min_size=1, max_size=4), data=st.data())
def test_it_is_the_same_however_a_step_was_cut_into_packs_and_spread_over_ranks(steps, data, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    whole, other = Ledger(folders[0]), Ledger(folders[0])
    mine = Ledger(folders[1])
    for number, pairs in enumerate(steps, start=1):
        whole.record(number, seen(*pairs))
        cut = data.draw(st.integers(0, len(pairs)))
        mine.record(number, [pack for pair in pairs[:cut] for pack in seen(pair)])
        other.record(number, seen(*pairs[cut:]))
    mine.ranks = TwoRanks(0, 2, True, other._own())
    whole.write()
    mine.write()
    assert listed(read_ledger(folders[0])) == listed(read_ledger(folders[1]))


def test_it_is_written_after_many_steps_if_nobody_asks(tmp_path):
    ledger = Ledger(tmp_path)
    for number in range(1, STEPS_KEPT + 2):
        ledger.record(number, seen((0, 1, 0.0)))
    assert len(read_ledger(tmp_path)) == STEPS_KEPT
    assert ledger.write() is None and len(read_ledger(tmp_path)) == STEPS_KEPT + 1


def test_a_disk_without_room_is_said_once_and_costs_nothing_when_it_has_room_again(tmp_path):
    said = []
    ledger = Ledger(tmp_path, log_message=said.append)
    (tmp_path / "ledger").write_text("in its place")
    for number in (1, 2):
        ledger.record(number, seen((number, 0, 0.5)))
        ledger.write()
    (tmp_path / "ledger").unlink()
    ledger.record(3, seen((3, 0, 0.5)))
    ledger.write()
    assert len(said) == 1 and said[0].startswith("warning: the ledger cannot be written to, its rows are kept for later")
    assert [row[:2] for row in listed(read_ledger(tmp_path))] == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("examples", [-1, 0, 1, 2, 3, 4, 9])
def test_truncated_it_has_what_was_seen_up_to_a_checkpoint(examples, tmp_path):
    ledger = Ledger(tmp_path)
    # The file of 3 reaches back to 2, as where the disk had no room at 2.
    for number, is_written in ((1, True), (2, False), (3, True), (4, True)):
        ledger.record(number, seen((number, 0, 0.5)))
        if is_written:
            ledger.write()
    (tmp_path / "ledger" / "5.parquet").write_bytes(b"half a file")
    (tmp_path / "ledger" / "5.parquet.partial").write_bytes(b"half a file")
    truncate_ledger(tmp_path, examples)
    assert [row[0] for row in listed(read_ledger(tmp_path))] == [number for number in (1, 2, 3, 4) if number <= examples]
    assert all(int(path.stem) <= examples for path in ledger_files(tmp_path))
    assert not list((tmp_path / "ledger").glob("*.partial"))


def test_a_run_without_a_ledger_has_nothing_to_cut_and_nothing_to_read(tmp_path):
    truncate_ledger(tmp_path, 3)
    assert len(read_ledger(tmp_path)) == 0 and not list(tmp_path.iterdir())


def test_a_damaged_file_is_passed_over(tmp_path):
    ledger = Ledger(tmp_path)
    for number in (1, 2):
        ledger.record(number, seen((number, 0, 0.5)))
        ledger.write()
    (tmp_path / "ledger" / "1.parquet").write_bytes(b"PAR1 and no more")
    pyarrow.parquet.write_table(pyarrow.table({"other": ["columns"]}), tmp_path / "ledger" / "3.parquet")
    assert [row[0] for row in listed(read_ledger(tmp_path))] == [2]


def test_a_sighting_takes_less_than_16_bytes(tmp_path):
    draw = numpy.random.default_rng(0)
    ledger = Ledger(tmp_path)
    for number in range(200):
        preferred = torch.from_numpy(draw.integers(0, 300_000, 100))
        ledger.record(100 * number, [(torch.stack([preferred, preferred + 1], 1), torch.from_numpy(draw.normal(size=100)))])
    ledger.write()
    [file] = ledger_files(tmp_path)
    assert file.stat().st_size < 16 * 20_000 and pyarrow.parquet.read_schema(file).equals(SCHEMA)


# ---- a trainer's ------------------------------------------------------------------------------------------------------------

# Every second prompt has two pairs that share a response.
PROMPTS = [
    TokenizedPrompt([5 + n, 6, 7], [[10 + n, 0], [12 + n, 11, 0], [13 + n, 0]], [(0, 1), (2, 1)][: 1 + n % 2], f"prompt {n}", n)
    for n in range(12)
]


def trained(compose, tokenizer, run_dir, *overrides: str, budget: int = 10**6, loss: str = "dpo") -> list[dict]:
    """Train on PROMPTS with a ledger in `run_dir`; the metrics of each step."""
    run_dir.mkdir()
    config = compose("batch_size=6", "warmup_steps=0", "n_epochs=2", "lr=1e-3", "optimizer=AdamW", *overrides)
    policy, reference = (AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32) for _ in range(2))
    packs = config.gradient_accumulation_steps
    table = PromptTable.of(PROMPTS)
    batches = BatchIterator(Schedule(table, 6, length=RunLength(n_epochs=2)), packs, Packing(TokenBudget(budget, budget)))
    ledger = Ledger(run_dir)
    steps = []
    tracker = Tracker(run_dir, None)
    tracker.log_step = steps.append
    models = policy, build_loss(loss, beta=0.1), LiveReference(reference)
    build_trainer(config, *models, tokenizer=tokenizer, train=batches, tracker=tracker, ledger=ledger).train()
    return steps


@pytest.mark.parametrize("loss", ["dpo", "bco"])
def test_the_margins_of_a_step_have_the_mean_that_its_metrics_say(loss, compose, tokenizer, tmp_path):
    steps = trained(compose, tokenizer, tmp_path / "run", loss=loss)
    found = read_ledger(tmp_path / "run")
    assert sorted(set(found.examples.tolist())) == [6, 12, 18, 24, 30, 36]
    for step in steps:
        margins = found.margins[found.examples == step["counters/examples"]]
        assert len(margins) == 6
        assert margins.mean() == pytest.approx(step["rewards_train/margins"], abs=1e-6)
    assert steps[-1]["rewards_train/margins"] > 0.01


def test_an_epoch_sees_each_pair_once_under_the_places_of_its_responses(compose, tokenizer, tmp_path):
    trained(compose, tokenizer, tmp_path / "run")
    table = PromptTable.of(PROMPTS)
    expected = sorted((p.first_row + i, p.first_row + j) for p in table for i, j in p.pairs)
    found = read_ledger(tmp_path / "run")
    for epoch in (found.examples <= 18, found.examples > 18):
        assert sorted(zip(found.preferred[epoch].tolist(), found.other[epoch].tolist(), strict=True)) == expected
    places = {int(row): table.prompt_index(int(row)) for row in found.preferred}
    assert all(table[place].first_row <= row < table[place].first_row + 3 for row, place in places.items())


def test_it_does_not_depend_on_micro_batches_and_packs(compose, tokenizer, tmp_path):
    trained(compose, tokenizer, tmp_path / "whole")
    trained(compose, tokenizer, tmp_path / "packs", "gradient_accumulation_steps=3", budget=12)
    one, other = (read_ledger(tmp_path / name) for name in ("whole", "packs"))
    for name in ("examples", "preferred", "other"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    numpy.testing.assert_allclose(one.margins, other.margins, rtol=1e-3, atol=1e-5)


def test_a_step_that_is_not_taken_is_not_in_it(compose, tokenizer, tmp_path, monkeypatch):
    usual = Updater.clip_gradient
    monkeypatch.setattr(
        Updater,
        "clip_gradient",
        lambda updater: usual(updater) * (float("nan") if updater.state.examples == 12 else 1.0),
    )
    trained(compose, tokenizer, tmp_path / "run")
    assert sorted(set(read_ledger(tmp_path / "run").examples.tolist())) == [6, 12, 24, 30, 36]
