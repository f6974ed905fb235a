"""What counts alone say of pairs: verdicts on the same two responses, and rules of length and position."""

from collections import Counter
from itertools import combinations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality.facts import collect_facts
from preference_training.data.quality.pairs import Pairs, Votes, position_is_known, simple_baselines
from preference_training.data.tokenization import TokenizedPrompt

A, B, C = [7, 0], [8, 8, 0], [9, 9, 9, 0]


def pairs(*prompts: TokenizedPrompt) -> Pairs:
    return Pairs.of(PromptTable.of(prompts))


def test_pairs_are_those_of_the_prompts_in_their_order_with_numbers_lengths_and_places():
    found = pairs(
        TokenizedPrompt([1], [A, B, C], [(0, 2), (1, 0)]),
        TokenizedPrompt([2], [A], []),
        TokenizedPrompt([3], [C, B], [(1, 0)]),
    )
    assert found.prompts.tolist() == [0, 0, 2]
    assert list(zip(found.preferred.tolist(), found.other.tolist(), strict=True)) == [(0, 2), (1, 0), (5, 4)]
    assert list(zip(found.preferred_lengths, found.other_lengths, strict=True)) == [(2, 4), (3, 2), (3, 4)]
    assert found.preferred_is_first.tolist() == [True, False, False]
    # Only the last prompt has two responses and one pair.
    assert found.is_only_pair.tolist() == [False, False, True]


def test_the_same_response_to_another_prompt_is_another_one():
    found = pairs(TokenizedPrompt([1], [A, B], [(0, 1)]), TokenizedPrompt([2], [A, B], [(0, 1)]))
    assert len({*found.preferred_hashes.tolist(), *found.other_hashes.tolist()}) == 4


def test_rankings_imply_pairs_and_labels_do_not():
    ranked = pairs(TokenizedPrompt([1], [A, B, C], [(2, 0, 1)]))
    assert list(zip(ranked.preferred.tolist(), ranked.other.tolist(), strict=True)) == [(2, 0), (2, 1), (0, 1)]
    assert len(pairs(TokenizedPrompt([1], [A, B], [(0, 1)], labels=[1.0]))) == 0
    assert len(pairs()) == 0 and Votes.of(pairs()).compared == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.permutations(range(4)), st.integers(1, 3)).map(
            lambda drawn: (drawn[0], [(drawn[1][k], drawn[1][k + 1]) for k in range(drawn[2])])
        ),
        max_size=12,
    )
)
def test_votes_are_what_counting_them_one_by_one_gives(prompts):
    responses = [[n, n] for n in range(4)]
    found = Votes.of(pairs(*(TokenizedPrompt([p], responses, examples) for p, examples in prompts)))
    verdicts: dict[tuple, Counter] = {}
    for prompt, examples in prompts:
        for one, other in examples:
            verdicts.setdefault((prompt, *sorted((one, other))), Counter())[one] += 1
    assert found.compared == len(verdicts)
    assert found.contradictory == sum(len(votes) == 2 for votes in verdicts.values())
    assert found.duplicates == sum(count - 1 for votes in verdicts.values() for count in votes.values())
    expected = []
    for votes in verdicts.values():
        two = list(combinations(votes.elements(), 2))
        expected += [sum(a == b for a, b in two) / len(two)] if two else []
    assert sorted(found.agreements.tolist()) == pytest.approx(sorted(expected))


def test_three_verdicts_of_which_one_differs_agree_in_one_of_three_pairs():
    same = [(0, 1), (0, 1), (1, 0)]
    assert Votes.of(pairs(TokenizedPrompt([1], [A, B], same))).agreements.tolist() == pytest.approx([1 / 3])


def baselines(train: Pairs, held_out: Pairs) -> dict[str, float]:
    return {each.name: each.accuracy for each in simple_baselines(train, held_out)}


def test_length_is_a_rule_whose_direction_training_pairs_decide_and_a_tie_is_half_right():
    longer, shorter, tied = (TokenizedPrompt([1], two, [(0, 1)]) for two in ([B, A], [A, B], [A, [5, 5]]))
    held_out = pairs(longer, longer, shorter, tied)
    assert baselines(pairs(longer), held_out) == {"longer wins": (2 + 0.5) / 4}
    assert baselines(pairs(shorter), held_out) == {"shorter wins": (1 + 0.5) / 4}


def test_position_is_a_rule_only_where_the_data_lists_responses_in_an_order_of_its_own():
    first, second = TokenizedPrompt([1], [A, B], [(0, 1)]), TokenizedPrompt([2], [A, B], [(1, 0)])
    train, held_out = pairs(*[first] * 3, *[second] * 7), pairs(first, second, second, second)
    assert baselines(train, held_out)["the last wins"] == 3 / 4
    # chosen stands first in all rows: that is how they are written down.
    assert not position_is_known(pairs(first, first), pairs(first))
    # A reversed copy makes no other order: the prompt has two pairs.
    both = TokenizedPrompt([3], [A, B], [(0, 1), (1, 0)])
    assert not position_is_known(pairs(first, *[both] * 9), pairs(first))


def test_facts_of_a_split_are_those_of_its_prompts():
    facts = collect_facts(PromptTable.of([TokenizedPrompt([1, 2], [A, B], [(0, 1)]), TokenizedPrompt([1, 2, 3], [C], [])]))
    assert facts.prompt_lengths.tolist() == [2, 3] and facts.response_lengths.tolist() == [2, 3, 4]
    assert facts.example_lengths.tolist() == [2 + 3, 3 + 4] and facts.tokens == 2 + 2 + 3 + 3 + 4
    assert len(numpy.unique(facts.prompt_hashes)) == 2
