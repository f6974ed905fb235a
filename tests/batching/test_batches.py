"""Token ids to packed batches, and the order in which a run sees them."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.micro_batches import evaluation_batches, evaluation_prompts
from preference_training.batching.packing import (
    TokenBudget,
    assign_to_ranks,
    build_packs,
    divide,
    iterate_examples,
    pack_examples,
    split_by_budget,
)
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.core.process_group import Ranks
from preference_training.data.columns import Columns
from preference_training.data.prompt_table import PromptTable, TablePart
from preference_training.data.tokenization import TokenizedPrompt

# ---- packing ------------------------------------------------------------------------------------------------------------


def some_prompts(count: int, pairs: int = 1) -> list[TokenizedPrompt]:
    """Prompts that differ in every token, with `pairs` + 1 responses, the first of which wins every pair."""
    return [
        TokenizedPrompt(
            [100 * n, 100 * n + 1],
            [[100 * n + 10 + k, 0] for k in range(pairs + 1)],
            [(0, k + 1) for k in range(pairs)],
            number=n,
        )
        for n in range(count)
    ]


def test_a_pack_holds_prompts_and_shared_responses_once_at_their_positions():
    [prompt] = some_prompts(1, pairs=2)
    batch = pack_examples(list(iterate_examples([prompt])))
    assert batch.input_ids.tolist() == [0, 1, 10, 0, 11, 0, 12, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 2, 3]
    assert batch.members.tolist() == [[0, 1], [0, 2]]
    assert batch.response_lengths.tolist() == [2, 2, 2]
    assert [(branch.shared, branch.own) for branch in batch.trie.branches] == [(0, 4), (2, 2), (2, 2)]


def test_responses_are_numbered_through_the_batch():
    batch = pack_examples(list(iterate_examples(some_prompts(3))))
    assert batch.members.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [branch.start for branch in batch.trie.branches if branch.parent < 0] == [0, 6, 12]
    assert batch.num_examples == 3


@given(st.data())
def test_any_examples_can_be_read_back_from_their_pack(data):
    prompts = [
        TokenizedPrompt(
            data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=4)),
            data.draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=2, max_size=4)),
            [(0, 1), (1, 0)],
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    examples = data.draw(st.permutations(list(iterate_examples(prompts))))
    batch = pack_examples(examples)
    for (prompt, k), numbers in zip(examples, batch.members.tolist(), strict=True):
        found = [batch.input_ids[batch.trie.path(number)].tolist() for number in numbers]
        assert found == [prompt.prompt_ids + prompt.responses[index] for index in prompt.members(k)]


# ---- the order of a run ---------------------------------------------------------------------------------------------------


def table(count: int, pairs: int = 1) -> PromptTable:
    return PromptTable.of(some_prompts(count, pairs))


def weighted(count: int, pairs: int, weight: float) -> PromptTable:
    """`count` prompts of weight 1 (prompt 0, prompt 1, ...), then as many of another weight (other 0, other 1, ...)."""
    columns = Columns.of(some_prompts(count, pairs))
    return PromptTable([TablePart("prompt", [columns], "a"), TablePart("other", [columns], "b", weight)])


def sources(batches) -> list[list[str]]:
    return [[source for part in batch for pack in part.packs for source in pack.sources] for batch in batches]


def test_an_epoch_sees_every_example_once_and_the_last_batch_is_what_is_left():
    seen = sources(BatchIterator(Schedule(table(10, pairs=3), 8), 2))
    assert [len(batch) for batch in seen] == [8, 8, 8, 6]
    assert sorted(source for batch in seen for source in batch) == sorted(f"prompt {n}" for n in range(10) for _ in range(3))


def test_the_pairs_of_a_prompt_share_its_tokens_within_a_micro_batch():
    [[micro_batch]] = BatchIterator(Schedule(table(2, pairs=3), 6))
    [batch] = micro_batch.packs
    assert [branch.parent for branch in batch.trie.branches] == [-1, 0, 0, 0, -1, 4, 4, 4]


def test_epochs_differ_in_order_and_seeds_too_but_not_runs():
    order = lambda seed: sources(BatchIterator(Schedule(table(20), 20, seed, RunLength(2))))  # noqa: E731
    first, second = order(1)
    assert first != second
    assert order(1) == [first, second] != order(2)


def test_n_examples_ends_the_run_exactly_there_also_across_epochs():
    iterator = BatchIterator(Schedule(table(5), 4, length=RunLength(n_epochs=None, n_examples=13)))
    assert [len(batch) for batch in sources(iterator)] == [4, 1, 4, 1, 3]
    assert iterator.schedule.total_examples == 13


WEIGHTS = st.sampled_from([0.25, 1.0, 1.5, 2.0])


@given(prompts=st.integers(1, 9), pairs=st.integers(1, 3), weight=WEIGHTS, size=st.integers(1, 5), stop=st.integers(1, 30))
def test_an_iterator_continues_from_any_saved_position(prompts, pairs, weight, size, stop):
    make = lambda: BatchIterator(Schedule(weighted(prompts, pairs, weight), size, length=RunLength(n_epochs=3)))  # noqa: E731
    whole = sources(make())
    interrupted, seen = make(), []
    for batch in interrupted:
        seen.append(batch)
        if len(seen) == stop:
            break
    continued = make()
    continued.load_state_dict(interrupted.state_dict())
    assert sources(seen) + sources(continued) == whole


def with_replacement(prompts, size: int, length: RunLength, seed: int = 0) -> BatchIterator:
    return BatchIterator(Schedule(prompts, size, seed, length, replacement=True))


def test_sampling_with_replacement_fills_every_batch_and_draws_some_prompts_twice_and_others_never():
    iterator = with_replacement(table(50), 8, RunLength(n_epochs=None, n_steps=20))
    seen = sources(iterator)
    assert [len(batch) for batch in seen] == [8] * 20
    assert iterator.schedule.total_examples == 160 and iterator.schedule.total_steps == 20
    # The first 50 of 50 prompts: all different with a chance of 50! / 50^50, which is 3e-21.
    assert len({source for batch in seen[:6] for source in batch}) < 48
    assert seen == sources(with_replacement(table(50), 8, RunLength(n_epochs=None, n_steps=20)))
    assert seen != sources(with_replacement(table(50), 8, RunLength(n_epochs=None, n_steps=20), seed=1))
    # A longer run begins with the same steps.
    assert sources(with_replacement(table(50), 8, RunLength(n_epochs=None, n_steps=30)))[:20] == seen


@given(prompts=st.integers(1, 9), pairs=st.integers(1, 3), weight=WEIGHTS, size=st.integers(1, 5), stop=st.integers(1, 30))
def test_sampling_with_replacement_continues_from_any_saved_position(prompts, pairs, weight, size, stop):
    make = lambda: with_replacement(weighted(prompts, pairs, weight), size, RunLength(None, None, 20))  # noqa: E731
    whole = sources(make())
    assert [len(batch) for batch in whole] == [size] * 20
    interrupted, seen = make(), []
    for batch in interrupted:
        seen.append(batch)
        if len(seen) == stop:
            break
    continued = make()
    continued.load_state_dict(interrupted.state_dict())
    assert sources(seen) + sources(continued) == whole
    assert sorted(prompt.source for prompt in make().schedule.prompts_seen) == sorted(
        {source for batch in whole for source in batch}
    )


def test_sampling_with_replacement_draws_data_sets_in_proportion_to_their_weights():
    iterator = with_replacement(weighted(100, 2, 3), 100, RunLength(n_epochs=None, n_steps=100))
    drawn = [source.split()[0] for batch in sources(iterator) for source in batch]
    # Of 5,000 draws of two pairs each, three in four: 3,750, with a standard deviation of (5000 * 3/16)^0.5 = 31.
    assert abs(drawn.count("other") / 2 - 3750) < 5 * 31


def test_an_epoch_visits_each_data_set_as_often_as_its_weight_says():
    iterator = BatchIterator(Schedule(weighted(8, 2, 2.25), 100, length=RunLength(n_epochs=2)))
    assert [iterator.schedule.epoch_size(epoch) for epoch in (0, 1)] == [8 * 2 + 2 * 8 * 2 + 2 * 2] * 2
    for epoch in sources(iterator):
        visits = {source: epoch.count(source) // 2 for source in set(epoch)}
        assert [visits[f"prompt {n}"] for n in range(8)] == [1] * 8
        assert sorted(visits[f"other {n}"] for n in range(8)) == [2] * 6 + [3] * 2


@given(
    prompts=st.integers(1, 9),
    pairs=st.integers(1, 3),
    weight=WEIGHTS,
    n_epochs=st.none() | st.integers(1, 3),
    n_examples=st.integers(1, 60),
    seed=st.integers(0, 3),
)
def test_a_run_says_in_advance_how_many_examples_and_which_prompts_it_will_see(
    prompts, pairs, weight, n_epochs, n_examples, seed
):
    iterator = BatchIterator(Schedule(weighted(prompts, pairs, weight), 4, seed, RunLength(n_epochs, n_examples)))
    told, total = [prompt.source for prompt in iterator.schedule.prompts_seen], iterator.schedule.total_examples
    seen = [source for batch in sources(iterator) for source in batch]
    assert len(seen) == total
    assert sorted(told) == sorted(set(seen))


def test_a_run_visits_prompts_again_once_it_has_more_examples_than_an_epoch():
    again = lambda *length: Schedule(table(5), 4, 0, RunLength(*length)).visits_again  # noqa: E731
    assert [again(1, None), again(1, 3), again(None, 5), again(3, 5)] == [False] * 4
    assert [again(2, None), again(2, 6), again(None, 6)] == [True] * 3


def test_evaluation_takes_the_same_examples_every_time_and_keeps_the_partial_batch():
    batches = evaluation_batches(table(30), 4, 10, seed=0)
    assert [batch.num_examples for batch in batches] == [4, 4, 2]
    again = evaluation_batches(table(30), 4, 10, seed=0)
    assert [batch.sources for batch in again] == [batch.sources for batch in batches]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))


@given(count=st.integers(1, 12), pairs=st.integers(1, 3), wanted=st.none() | st.integers(1, 40), seed=st.integers(0, 3))
def test_the_prompts_of_an_evaluation_are_those_of_its_batches(count, pairs, wanted, seed):
    prompts = table(count, pairs)
    seen = [source for batch in evaluation_batches(prompts, 4, wanted, seed) for source in batch.sources]
    told = [prompt.source for prompt in evaluation_prompts(prompts, wanted, seed)]
    assert told == list(dict.fromkeys(seen))
    assert len(seen) == min(count * pairs, wanted or count * pairs)


def test_sft_batches_have_no_pairs():
    prompts = PromptTable.of(replace(prompt, responses=prompt.responses[:1], examples=[]) for prompt in some_prompts(3))
    [[micro_batch]] = BatchIterator(Schedule(prompts, 3))
    [batch] = micro_batch.packs
    assert batch.members.tolist() == [[0], [1], [2]] and batch.num_examples == 3


def test_a_run_that_visits_prompts_twice_in_one_epoch_sees_them_again():
    prompts = [TokenizedPrompt([1], [[2], [3]], [(0, 1)], number=n) for n in range(3)]
    once, twice = (PromptTable([TablePart("x", [Columns.of(prompts)], "f", weight)]) for weight in (1.0, 2.0))
    assert not BatchIterator(Schedule(once, 2)).schedule.visits_again
    assert BatchIterator(Schedule(twice, 2)).schedule.visits_again


def some_examples(lengths: list[tuple[int, int]]):
    """Examples of prompts with so many tokens and pairs."""
    prompts = [
        TokenizedPrompt([7] * length, [[8, 0], *([9, k, 0] for k in range(pairs))], [(0, k + 1) for k in range(pairs)])
        for length, pairs in lengths
    ]
    return list(iterate_examples(prompts))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=8),
    size=st.integers(1, 5),
    budget=st.integers(1, 90),
)
def test_ranks_share_every_example_once_in_equally_many_packs(lengths, size, budget):
    examples = some_examples(lengths)
    limit = TokenBudget(budget, budget)
    shares = [build_packs(examples, limit, Ranks(rank, size)) for rank in range(size)]
    assert len({len(packs) for packs in shares}) == 1
    places = [place for packs in shares for pack in packs if not pack.is_filler for place in pack.places.tolist()]
    assert sorted(places) == list(range(len(examples)))
    for packs in shares:
        for pack in packs:
            assert [pack.sources[k] for k in range(len(pack.places))] == [examples[p][0].source for p in pack.places]


def test_ranks_get_about_as_many_tokens_and_the_pairs_of_a_prompt_stay_together():
    # Prompts of 30, 20, 10 and 10 tokens, a pair each (5 tokens more): 35 + 15 and 25 + 15.
    parts = assign_to_ranks(some_examples([(30, 1), (20, 1), (10, 1), (10, 1)]), 2)
    assert [sorted(part) for part in parts] == [[0, 3], [1, 2]]
    together = assign_to_ranks(some_examples([(10, 3), (10, 3)]), 2)
    assert together == [[0, 1, 2], [3, 4, 5]]
    # One prompt with many pairs is more than a rank's part, and is divided.
    assert sorted(map(len, assign_to_ranks(some_examples([(10, 6)]), 3))) == [2, 2, 2]


def test_several_ranks_divide_their_shares_evenly_over_the_fewest_packs_the_largest_first():
    # Pairs of 10, 20 and 15 tokens for each of two ranks. One after the other within 25 tokens they would take three packs.
    examples = some_examples([(5, 1), (15, 1), (10, 1)] * 2)
    assert len(list(split_by_budget(examples, [0, 1, 2], TokenBudget(25, 25)))) == 3
    assert divide(examples, TokenBudget(25, 25), 2) == [[[0, 2], [1]], [[3, 5], [4]]]
    # One rank alone fills its packs.
    assert divide(examples[:3], TokenBudget(25, 25), 1) == [[[0], [1], [2]]]


def test_a_prompt_that_exceeds_the_budget_alone_does_not_keep_the_other_packs_uneven():
    # Prompts of 105 and 70 tokens with their pairs have packs of their own; those of 10 tokens go by twos within 25.
    packs = divide(some_examples([(100, 1), *[(5, 1)] * 5, (65, 1)]), TokenBudget(25, 25), 2)
    assert packs == [[[0], [5]], [[6], [3, 4], [1, 2]]]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=2, max_size=12),
    size=st.integers(2, 4),
    budget=st.integers(20, 90),
    shared=st.sampled_from((0, 30)),
)
def test_ranks_in_lockstep_never_wait_longer_than_for_packs_filled_one_after_the_other(lengths, size, budget, shared):
    prompts = [
        TokenizedPrompt(
            [1 + n % 2] * shared + [7 + n] * own,
            [[8, 0], *([9 + k, 0, 0] for k in range(pairs))],
            [(0, k + 1) for k in range(pairs)],
        )
        for n, (own, pairs) in enumerate(lengths)
    ]
    examples, limit = list(iterate_examples(prompts)), TokenBudget(budget, budget)
    found = divide(examples, limit, size)
    filled = [list(split_by_budget(examples, places, limit)) for places in assign_to_ranks(examples, size)]

    def waited(ranks) -> int:
        rows = [
            sorted((len(pack_examples([examples[p] for p in places]).input_ids) for places in cuts), reverse=True)
            for cuts in ranks
        ]
        return sum(max(row[k] for row in rows if k < len(row)) for k in range(max(map(len, rows))))

    # The counter of shared tokens may count too many, never too few.
    assert max(map(len, found)) <= max(map(len, filled))
    assert shared or waited(found) <= waited(filled)
    for cuts in found:
        for places in cuts:
            assert len(places) == 1 or len(pack_examples([examples[p] for p in places]).input_ids) <= budget


def test_prompts_that_share_much_stay_together_on_several_ranks():
    # Two preambles of 60 tokens; 8 pairs with each, of 8 tokens of their own. Two packs a rank: one for each preamble.
    prompts = [
        TokenizedPrompt([1 + n // 8] * 60 + [10 + n] * 3, [[8, 0], [9, 5, 0]], [(0, 1)], number=n)
        for n in (*range(16), *range(16))
    ]
    examples = list(iterate_examples(prompts))
    for cuts in divide(examples, TokenBudget(130, 130), 2):
        sizes = [len(pack_examples([examples[place] for place in places]).input_ids) for places in cuts]
        filled = [place for places in cuts for place in places]
        alone = [list(split_by_budget(examples, sorted(filled), TokenBudget(130, 130)))]
        assert sum(sizes) <= sum(len(pack_examples([examples[p] for p in places]).input_ids) for places in alone[0])


# ---- packs and the run's end ---------------------------------------------------------------------------------------------


def examples_in(batch) -> list[list[tuple]]:
    """The token ids of every example of a step's micro-batches, in the order of their places."""
    found = []
    for micro_batch in batch:
        ids = {}
        for pack in micro_batch.packs:
            for place, numbers in zip(pack.places.tolist(), pack.members.tolist(), strict=True):
                ids[place] = tuple(tuple(pack.input_ids[pack.trie.path(number)].tolist()) for number in numbers)
        found.append([ids[place] for place in sorted(ids)])
    return found


def largest(batch) -> int:
    return max(len(pack.input_ids) for micro_batch in batch for pack in micro_batch.packs)


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=8),
    size=st.integers(1, 3),
    packs=st.integers(1, 2),
)
def test_halved_packs_hold_the_same_examples_and_are_half_as_large_where_they_can_be(lengths, size, packs):
    prompts = [
        TokenizedPrompt([7] * length, [[8, k, 0] for k in range(pairs + 1)], [(0, k + 1) for k in range(pairs)], number=n)
        for n, (length, pairs) in enumerate(lengths)
    ]
    iterator = BatchIterator(Schedule(PromptTable.of(prompts), 2 * size), packs if size % packs == 0 else 1)
    for batch in iterator:
        before, most = examples_in(batch), largest(batch)
        halves = iterator.halve_packs(batch)
        assert examples_in(halves) == before
        assert [part.num_examples for part in halves] == [part.num_examples for part in batch]
        assert iterator.budget.limit == most // 2 and iterator.budget.soft_limit <= most // 2
        # A pair with its prompt cannot be cut.
        assert all(len(pack.input_ids) <= most // 2 or len(pack.members) == 1 for part in halves for pack in part.packs)


def test_batches_that_were_made_ahead_are_cut_anew_once_packs_are_halved():
    # Six prompts of 2 + 2 * 2 tokens a step: one pack of 36 tokens; halved, three prompts each.
    whole, iterator = list(BatchIterator(Schedule(table(30), 6))), BatchIterator(Schedule(table(30), 6))
    steps = iter(iterator)
    first = next(steps)
    assert [len(pack.input_ids) for pack in first[0].packs] == [36]
    assert [len(pack.input_ids) for pack in iterator.halve_packs(first)[0].packs] == [18, 18]
    rest = list(steps)
    assert [[len(pack.input_ids) for pack in batch[0].packs] for batch in rest] == [[18, 18]] * 4
    assert [examples_in(batch) for batch in rest] == [examples_in(batch) for batch in whole[1:]]
    # What the run began with stands behind.
    largest = iterator.first_budget.limit
    assert iterator.state_dict()["budget"] == [18, 18, largest, largest] and largest > 18


def test_packs_that_are_halved_again_and_again_end_at_single_pairs():
    iterator = BatchIterator(Schedule(table(4), 4))
    [batch] = iterator
    for _ in range(8):
        batch = iterator.halve_packs(batch)
    assert [len(pack.members) for pack in batch[0].packs] == [1, 1, 1, 1]


def test_a_soft_limit_size_below_the_half_stays():
    iterator = BatchIterator(Schedule(table(4), 4), packing=Packing(TokenBudget(1000, 6)))
    [batch] = iterator
    assert largest(batch) == 6
    iterator.budget = TokenBudget(24, 2)
    iterator.halve_packs(batch)
    assert iterator.budget == TokenBudget(3, 2)


@given(
    prompts=st.integers(1, 9),
    pairs=st.integers(1, 3),
    weight=WEIGHTS,
    size=st.integers(1, 5),
    n_epochs=st.none() | st.integers(1, 3),
    n_examples=st.integers(1, 60),
)
def test_a_run_is_finished_at_its_last_step_and_an_epoch_at_its_own(prompts, pairs, weight, size, n_epochs, n_examples):
    iterator = BatchIterator(Schedule(weighted(prompts, pairs, weight), size, 0, RunLength(n_epochs, n_examples)))
    assert not iterator.finished and not iterator.at_end_of_epoch
    finished, ends, seen, passed = [], 0, 0, 0
    for batch in iterator:
        seen += batch[0].num_examples
        finished.append(iterator.finished)
        ends += iterator.at_end_of_epoch
        # Added up from the epochs' own sizes: how many of them have been passed by now.
        while passed < 70 and seen >= sum(iterator.schedule.epoch_size(epoch) for epoch in range(passed + 1)):
            passed += 1
        assert ends == passed
    assert finished == [False] * (len(finished) - 1) + [True]
    assert seen == iterator.schedule.total_examples


def test_a_run_that_continues_after_its_end_is_finished_until_it_is_made_longer():
    iterator = BatchIterator(Schedule(table(5), 4))
    assert [iterator.finished for _ in iterator] == [False, True]
    again = BatchIterator(Schedule(table(5), 4))
    again.load_state_dict(iterator.state_dict())
    assert again.finished and again.at_end_of_epoch and list(again) == []
    longer = BatchIterator(Schedule(table(5), 4, length=RunLength(n_epochs=2)))
    longer.load_state_dict(iterator.state_dict())
    assert not longer.finished and len(list(longer)) == 2
