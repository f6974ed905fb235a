"""The ledger flags the right pairs and no others, with their texts, as rows for the labeling app."""

import json
from contextlib import closing

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import AutoModelForCausalLM

from preference_collection.exchange.importing import import_into
from preference_collection.store.store import open_store
from preference_training.batching.iterator import BatchIterator
from preference_training.batching.schedule import Schedule
from preference_training.core.errors import UserError
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference
from preference_training.reporting.flagged_pairs import (
    BLOCK_SIZE,
    KINDS,
    MAX_PAIRS,
    PairFinder,
    Pairs,
    evidence,
    find_by_margins,
    find_contradictions,
    flagged_rows,
    labeling_rows,
    write_labeling_file,
    wrong_label_probability,
)
from preference_training.tracking.ledger import Ledger, Observations
from preference_training.tracking.tracker import Tracker
from tests.support.building import build_trainer
from tests.support.files import GOLDEN


def sightings(epochs: numpy.ndarray) -> Observations:
    """Each row of margins [epochs, pairs] is an epoch over pairs (0, 1), (2, 3), ..., one example a step."""
    number = epochs.shape[1]
    preferred = numpy.tile(2 * numpy.arange(number), len(epochs))
    return Observations(numpy.arange(1, epochs.size + 1), preferred, preferred + 1, epochs.reshape(-1).astype(numpy.float32))


def found(seen: Observations, kind: str) -> list[int]:
    """The numbers of the pairs that are of a kind, in the order of `sightings`."""
    return [finding.preferred // 2 for finding in find_by_margins(seen) if finding.kind == kind]


# ---- what the margins say ---------------------------------------------------------------------------------------------------


def test_pairs_with_margins_opposite_to_most_are_probably_mislabeled():
    draw = numpy.random.default_rng(0)
    margins = draw.normal(2.0, 0.3, (1, 1000))
    wrong = numpy.arange(3, 1000, 20)
    margins[0, wrong] *= -1
    assert sorted(found(sightings(margins), "mislabelled")) == wrong.tolist()


def test_a_policy_that_knows_nothing_finds_nothing():
    draw = numpy.random.default_rng(0)
    assert found(sightings(draw.normal(0.0, 1.0, (1, 2000)) - 0.1), "mislabelled") == []
    assert not evidence(sightings(numpy.zeros((1, 300)))).any()


def test_the_evidence_of_a_sighting_is_the_log_ratio_of_two_normal_densities():
    # Median 1; of the distances 0, 1 and 1 to it the median is 1, so that the spread is 1.4826: 2 m / 1.4826^2 of margin m.
    seen = sightings(numpy.array([[0.0, 1.0, 2.0]]))
    numpy.testing.assert_allclose(evidence(seen), 2 * numpy.array([0, 1, 2]) / 1.4826**2, rtol=1e-6)
    # The odds are 1 to 19 before.
    probability = wrong_label_probability(Pairs.of(seen), seen)
    assert probability[0] == pytest.approx(0.05)


def test_early_sightings_count_for_nothing_and_later_ones_add_up():
    draw = numpy.random.default_rng(0)
    margins = numpy.concatenate([numpy.zeros((1, 4 * BLOCK_SIZE)), draw.normal(1.0, 0.4, (3, 4 * BLOCK_SIZE))])
    margins[1:, 7] = -0.15
    probability = lambda rows: wrong_label_probability(Pairs.of(sightings(rows)), sightings(rows))[7]  # noqa: E731
    assert probability(margins[:1]) == pytest.approx(0.05)
    assert probability(margins[:2]) < probability(margins[:3]) < probability(margins)
    assert found(sightings(margins), "mislabelled") == [7]


def test_a_pair_stays_wrong_if_it_is_wrong_throughout_the_second_half():
    # Pair by pair over four epochs, of which the last two are the later half.
    margins = numpy.array([[1, -1, -1, -1], [-1, -1, -1, 0.5], [1, 1, -1, -3], [1, 1, 1, 1]]).T
    assert found(sightings(margins), "stays wrong") == [2, 0], "the worst first"


def test_a_single_epoch_finds_no_pair_that_stays_wrong():
    assert found(sightings(-numpy.ones((1, 50))), "stays wrong") == []


def test_a_pair_is_forgotten_if_it_was_right_and_is_wrong_at_the_end():
    margins = numpy.array([[1, -1, 1, -0.5], [-1, -1, -1, -1], [-1, 1, -1, 1], [1, 1, 1, -2], [1, 1, 1, 1]]).T
    assert found(sightings(margins), "forgotten") == [3, 0]


def test_the_number_of_pairs_of_each_kind_is_limited():
    assert len(found(sightings(-numpy.ones((4, MAX_PAIRS + 50))), "stays wrong")) == MAX_PAIRS


@given(arrays.arrays(numpy.float32, st.tuples(st.integers(1, 4), st.integers(0, 40)), elements=st.floats(width=32)))
def test_each_finding_is_a_pair_that_was_seen_whatever_the_margins(margins):
    seen = sightings(margins)
    for finding in find_by_margins(seen):
        assert finding.kind in KINDS and finding.other == finding.preferred + 1
        assert finding.preferred in seen.preferred
    probability = wrong_label_probability(Pairs.of(seen), seen)
    assert ((probability >= 0) & (probability <= 1)).all()


# ---- what the data says -----------------------------------------------------------------------------------------------------


def prompts(*rows: tuple[list[int], list[list[int]], list[tuple[int, int]]]) -> PromptTable:
    return PromptTable.of(TokenizedPrompt(*row, number=number) for number, row in enumerate(rows, start=1))


def test_pairs_in_both_directions_contradict_each_other_within_a_prompt_and_across_prompts():
    table = prompts(
        ([5], [[10, 0], [11, 0]], [(0, 1)]),
        ([6], [[10, 0], [11, 0]], [(0, 1)]),  # of another prompt
        ([5], [[11, 0], [10, 0], [12, 0]], [(0, 1), (2, 1)]),
        ([7], [[10, 0], [11, 0], [12, 0]], [(0, 1), (1, 0), (0, 2)]),
    )
    found = sorted((each.preferred, each.other) for each in find_contradictions(table))
    assert found == [(0, 1), (4, 5), (7, 8), (8, 7)]


PAIR_LISTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(lambda pair: pair[0] != pair[1]), max_size=4)
ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(5, 6), min_size=1, max_size=2),
        st.permutations([[10, 0], [11, 0], [12, 0]]),
        PAIR_LISTS,
    ),
    max_size=5,
)


@given(ROWS)
def test_contradictions_are_the_pairs_whose_texts_also_have_the_opposite_label(rows):
    table = prompts(*rows)
    texts = {
        (p.first_row + i, p.first_row + j): (tuple(p.prompt_ids), tuple(p.responses[i]), tuple(p.responses[j]))
        for p in table
        for i, j in p.pairs
    }
    known = set(texts.values())
    expected = {pair for pair, (prompt, one, other) in texts.items() if (prompt, other, one) in known}
    assert {(each.preferred, each.other) for each in find_contradictions(table)} == expected


# ---- with their texts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tokenizer, tmp_path):
    """A run that has seen five pairs four times: the first was right once, and the last is the fourth one's opposite."""
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    eos = tokenizer.eos_token_id
    rows = [(ids(f"Human: name {n}"), [[*ids("the cat"), eos], [*ids("the rain"), eos]], [(0, 1)]) for n in "abcd"]
    rows.append((rows[3][0], rows[3][1][::-1], [(0, 1)]))
    table = prompts(*rows)
    ledger = Ledger(tmp_path)
    for epoch, margin in enumerate((1.0, -1.0, -1.5, -2.0)):
        for pair in range(5):
            margins = torch.tensor([margin if pair == 0 else 1.0])
            ledger.record(5 * epoch + pair + 1, [(torch.tensor([[2 * pair, 2 * pair + 1]]), margins)])
    ledger.write()
    PairFinder(tmp_path, table, tokenizer).write()
    return tmp_path


def test_texts_margins_and_source_of_flagged_pairs_are_written(run_dir):
    rows = flagged_rows(run_dir)
    first = next(row for row in rows if row["kind"] == "forgotten")
    assert (first["prompt"], first["preferred"], first["other"]) == ("Human: name a", "the cat", "the rain")
    assert first["margins"] == [1.0, -1.0, -1.5, -2.0] and first["times_seen"] == 4
    assert first["source"] == "prompt 1" and 0.5 < first["wrong_label_probability"] <= 1
    opposite = [(row["preferred"], row["other"]) for row in rows if row["kind"] == "contradicted"]
    assert sorted(opposite) == [("the cat", "the rain"), ("the rain", "the cat")]


def test_before_the_first_step_nothing_is_written(tmp_path, tokenizer):
    PairFinder(tmp_path, prompts(), tokenizer).write()
    assert not list(tmp_path.iterdir())


def test_the_labeling_app_gets_each_pair_of_texts_once_and_without_its_label(run_dir, tmp_path):
    assert write_labeling_file(run_dir, tmp_path / "flagged.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "flagged.jsonl").read_text().splitlines()]
    of_a = next(row for row in rows if row["description"] == "Human: name a")
    assert (of_a["version1"], of_a["version2"], of_a["preference"]) == ("the cat", "the rain", None)
    assert of_a["labelled"] == 0 and {"stays wrong", "forgotten", "mislabelled"} == set(of_a["flagged"].split(", "))
    assert next(row for row in rows if row["description"] == "Human: name d")["flagged"] == "contradicted"
    with closing(open_store(str(tmp_path / "store.duckdb"))) as store:
        assert import_into(store, tmp_path / "flagged.jsonl").line() == "2 tasks added, 2 new comparisons"


TEXTS = st.text(max_size=3)


@given(st.lists(st.fixed_dictionaries({"kind": st.sampled_from(sorted(KINDS)), "source": TEXTS, "prompt": TEXTS,
                                       "preferred": TEXTS, "other": TEXTS}), max_size=6))  # fmt: skip
def test_the_order_of_texts_does_not_reveal_the_label_which_is_kept(rows):
    judged = labeling_rows(rows)
    keys = [(row["description"], row["version1"], row["version2"]) for row in judged]
    assert len(set(keys)) == len(keys) and all(row["version1"] <= row["version2"] for row in judged)
    for row in rows:
        key = row["prompt"], *sorted([row["preferred"], row["other"]])
        found = judged[keys.index(key)]
        assert row["kind"] in found["flagged"].split(", ")
    for row, (prompt, *versions) in zip(judged, keys, strict=True):
        preferred = versions[row["labelled"]]
        assert any((each["prompt"], each["preferred"]) == (prompt, preferred) for each in rows)


def test_a_run_in_which_nothing_is_flagged_writes_no_file(tmp_path):
    (tmp_path / "flagged_pairs.jsonl").touch()
    assert write_labeling_file(tmp_path, tmp_path / "flagged.jsonl") == 0 and not (tmp_path / "flagged.jsonl").exists()


def test_a_run_that_flags_nothing_ever_and_a_file_that_cannot_be_written_are_one_message(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"no flagged_pairs.jsonl. Expected the directory of a run with"):
        write_labeling_file(tmp_path / "none", tmp_path / "flagged.jsonl")
    with pytest.raises(UserError, match=r"--flagged: cannot write .*absent/f.jsonl: No such file or directory. Expected"):
        write_labeling_file(run_dir, tmp_path / "absent" / "f.jsonl")


# ---- after a run ------------------------------------------------------------------------------------------------------------


def test_labels_that_were_flipped_on_purpose_are_found_after_one_epoch(compose, tokenizer, tmp_path):
    # A response that begins with token 20 is preferred to one that begins with 21; of 600 labels 30 are the other way round.
    draw = numpy.random.default_rng(0)
    flipped = set(draw.permutation(600)[:30].tolist())
    rows = [
        (draw.integers(30, 370, 3).tolist(), [[20, int(a), 0], [21, int(b), 0]], [(1, 0) if n in flipped else (0, 1)])
        for n, (a, b) in enumerate(draw.integers(30, 370, (600, 2)))
    ]
    table = prompts(*rows)
    config = compose("loss=dpo", "batch_size=8", "n_epochs=1", "lr=1e-3", "warmup_steps=5", "optimizer=AdamW")
    policy, reference = (AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32) for _ in range(2))
    models = policy, build_loss(**config.loss.given()), LiveReference(reference)
    followed = {"tracker": Tracker(tmp_path, None, 3600), "ledger": Ledger(tmp_path)}
    build_trainer(config, *models, tokenizer=tokenizer, train=BatchIterator(Schedule(table, 8)), **followed).train()
    PairFinder(tmp_path, table, tokenizer).write()
    named = {int(row["source"].split()[1]) - 1 for row in flagged_rows(tmp_path)}
    assert len(named & flipped) >= 0.8 * len(flipped), "recall"
    assert len(named & flipped) >= 0.6 * len(named), "precision"
