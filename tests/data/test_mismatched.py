"""Each labeled response gets a response to another prompt, cut to the lengths, and nothing else changes."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from preference_training.data.mismatched import MISMATCHED_CUT, ONLY_PROMPT, with_mismatched
from preference_training.data.records.report import DataReport
from preference_training.data.tokenization import TokenizedPrompt


def labeled(prompt: int, *responses: list[int], length: int = 1) -> TokenizedPrompt:
    examples = [(k,) for k in range(len(responses))]
    return TokenizedPrompt([prompt] * length, list(responses), examples, labels=[1.0] * len(responses))


def completed(*prompts: TokenizedPrompt, max_length: int = 100) -> tuple[list[TokenizedPrompt], DataReport]:
    report = DataReport()
    return list(with_mismatched(prompts, max_length, report)), report


def test_a_prompt_takes_the_response_of_the_one_before_it_and_the_first_that_of_the_second():
    found, report = completed(labeled(1, [10, 0]), labeled(2, [20, 0]), labeled(3, [30, 0]))
    assert [prompt.responses for prompt in found] == [[[10, 0], [20, 0]], [[20, 0], [10, 0]], [[30, 0], [20, 0]]]
    assert {prompt.examples[0] for prompt in found} == {(0, 1)} and {prompt.num_examples for prompt in found} == {1}
    assert report == DataReport()


def test_examples_share_the_responses_of_a_prompt_with_fewer_and_take_no_more_than_they_need():
    found, _ = completed(labeled(1, [10, 0]), labeled(2, [20, 0], [21, 0], [22, 0]))
    assert found[0].responses == [[10, 0], [20, 0]] and found[0].examples == [(0, 1)]
    assert found[1].responses == [[20, 0], [21, 0], [22, 0], [10, 0]] and found[1].examples == [(0, 3), (1, 3), (2, 3)]


def test_the_same_prompt_again_is_no_other_prompt():
    found, _ = completed(labeled(1, [10, 0]), labeled(1, [11, 0]), labeled(2, [20, 0]), labeled(2, [21, 0]))
    assert [prompt.responses[1] for prompt in found] == [[20, 0], [20, 0], [11, 0], [11, 0]]


def test_a_response_is_cut_where_it_would_not_fit_behind_another_prompt():
    found, report = completed(labeled(1, [10, 11, 12, 0]), labeled(2, [20, 0], length=4), max_length=6)
    assert [prompt.responses[1] for prompt in found] == [[20, 0], [10, 11]]
    assert report.changed == {MISMATCHED_CUT: 1}


def test_responses_to_the_only_prompt_are_skipped_and_counted():
    found, report = completed(labeled(1, [10, 0], [11, 0]), labeled(1, [12, 0]))
    assert (found, report.left_out) == ([], {ONLY_PROMPT: 3})
    assert completed() == ([], DataReport())


def test_scored_spans_come_with_the_responses():
    spans = replace(labeled(1, [10, 11, 12, 0]), spans=[[(0, 1), (2, 4)]])
    found, _ = completed(spans, labeled(2, [20, 0], length=3), max_length=6)
    # Three tokens of the first prompt's response fit behind the second prompt.
    assert [prompt.spans for prompt in found] == [[[(0, 1), (2, 4)], [(0, 2)]], [[(0, 2)], [(0, 1), (2, 3)]]]


@given(
    st.lists(
        st.builds(lambda prompt, lengths: labeled(prompt, *([7] * n for n in lengths)), st.integers(0, 2), st.lists(
            st.integers(1, 4), min_size=1, max_size=3)), max_size=8)
)  # fmt: skip
def test_own_responses_and_labels_stay_in_their_order_and_no_prompt_is_lost(prompts):
    found, report = completed(*prompts)
    if len({tuple(prompt.prompt_ids) for prompt in prompts}) < 2:
        assert found == [] and sum(report.left_out.values()) == sum(prompt.num_examples for prompt in prompts)
        return
    assert [(p.prompt_ids, p.responses[: p.num_examples], p.labels) for p in found] == [
        (p.prompt_ids, p.responses, p.labels) for p in prompts
    ]
    assert all(own < len(p.labels) <= other < len(p.responses) for p in found for own, other in p.examples)
