"""Pairs are known by their token ids, in the direction of their label; tables get their weights, and halves their prompts."""

import numpy
import pytest

from preference_training.core.errors import UserError
from preference_training.data.pairs.halves import halves
from preference_training.data.pairs.weights import pair_key, pair_keys, weigh
from preference_training.data.preparation import Prepared
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.report import DataReport
from preference_training.data.tokenization import TokenizedPrompt


def prompt(number: int, weights: list[float] | None = None, pairs=((0, 1),)) -> TokenizedPrompt:
    responses = [[number, 5, 1], [number, 6, 1], [number, 7, 1]]
    return TokenizedPrompt([9, number], responses, list(pairs), "mine", number, weights=weights)


def prepared(*prompts: TokenizedPrompt) -> Prepared:
    table = PromptTable.of(prompts)
    return Prepared(table, [DataReport(num_prompts=len(table))])


def weights_of(data: Prepared) -> list[list[float] | None]:
    return [each.weights for each in data.table]


def test_the_key_of_a_pair_depends_on_all_token_ids_on_their_places_and_on_the_label():
    keys = {pair_key([1], [2], [3]), pair_key([1], [3], [2]), pair_key([1, 2], [], [3]), pair_key([], [1, 2], [3])}
    assert len(keys) == 4
    assert pair_key([1], [2], [3]) == pair_key((1,), numpy.array([2]), [3])


def test_weights_multiply_those_of_the_data_and_pairs_without_one_keep_theirs(tmp_path):
    data = prepared(prompt(1), prompt(2, [0.5, 4.0], [(0, 1), (2, 1)]), prompt(3, [3.0]))
    first, second = pair_keys(prompt(2, pairs=[(0, 1), (2, 1)]))
    weighed = weigh(data, {pair_keys(prompt(1))[0]: 0.25, second: 0.5}, tmp_path)
    assert weights_of(weighed.prepared) == [[0.25], [0.5, 2.0], [3.0]]
    assert (weighed.known, weighed.pairs) == (2, 4) and first != second
    assert weighed.line == ("data.weights: 2 of 4 training pairs weighted; 2 are not among those that were judged, and count 1")
    ids = [(each.prompt_ids, each.responses, each.examples, each.number) for each in weighed.prepared.table]
    assert ids == [(each.prompt_ids, each.responses, each.examples, each.number) for each in data.table]


def test_data_with_other_weights_has_another_fingerprint_so_that_no_run_is_resumed_with_them(tmp_path):
    data, [key] = prepared(prompt(1), prompt(2)), pair_keys(prompt(1))
    half, again, third = (weigh(data, {key: weight}, tmp_path).prepared.fingerprint for weight in (0.5, 0.5, 0.3))
    assert half == again and len({data.fingerprint, half, third}) == 3
    # Weights of 1 are none.
    assert weigh(data, {key: 1.0}, tmp_path).prepared.fingerprint == data.fingerprint


def test_all_pairs_of_a_prompt_are_in_one_half_and_both_halves_are_the_whole(tmp_path):
    data = prepared(*(prompt(number % 40, pairs=[(0, 1), (2, 1)]) for number in range(80)))
    one, other = halves(data, 1, tmp_path)
    numbers = [[each.number for each in part.table] for part in (one, other)]
    assert sorted(numbers[0] + numbers[1]) == sorted(number % 40 for number in range(80))
    # The same prompt twice is in the same half twice.
    assert not set(numbers[0]) & set(numbers[1])
    assert [report.num_prompts for report in one.reports + other.reports] == [len(part) for part in numbers]
    assert [part.fingerprint for part in halves(data, 2, tmp_path)] == [other.fingerprint, one.fingerprint]


def test_data_that_cannot_be_halved_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.weights: the halves of the training data have 1 prompts and none"):
        halves(prepared(prompt(1)), 1, tmp_path)
