"""For each labeled response one to another prompt: from these KTO's loss estimates how far the policy is from the reference."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from preference_training.data.records.report import DataReport
from preference_training.data.tokenization import TokenizedPrompt, with_responses_cut

ONLY_PROMPT = "a labeled response to the only prompt (the loss needs a response to another one: two prompts or more)"
MISMATCHED_CUT = "responses to other prompts cut, to fit behind a longer prompt"


def with_mismatched(prompts: Iterable[TokenizedPrompt], max_length: int, report: DataReport) -> Iterator[TokenizedPrompt]:
    """The prompts, each with responses to the last other prompt before it, as second members of its examples.

    The first prompts take those of the first other prompt behind them. All are cut to `max_length` tokens with the prompt.
    """
    last, other = None, None
    waiting: list[TokenizedPrompt] = []
    for prompt in prompts:
        if last is not None and prompt.prompt_ids != last.prompt_ids:
            other = last
        last = prompt
        if other is None:
            waiting.append(prompt)
            continue
        yield from (_with_responses_of(prompt, early, max_length, report) for early in waiting)
        waiting.clear()
        yield _with_responses_of(other, prompt, max_length, report)
    report.skip(ONLY_PROMPT, sum(prompt.num_examples for prompt in waiting))


def _with_responses_of(other: TokenizedPrompt, prompt: TokenizedPrompt, max_length: int, report: DataReport) -> TokenizedPrompt:
    """The prompt with one response of `other` for each of its examples, which share them if they are more."""
    room = max_length - len(prompt.prompt_ids)
    sources = [other.members(k % other.num_examples)[0] for k in range(prompt.num_examples)]
    used = sorted(set(sources))
    report.change(MISMATCHED_CUT, sum(len(other.responses[index]) > room for index in used))
    cut = with_responses_cut(other, room)
    place = {index: len(prompt.responses) + k for k, index in enumerate(used)}
    spans = [*_spans(prompt), *(_spans(cut)[index] for index in used)] if prompt.spans or cut.spans else None
    return replace(
        prompt,
        responses=[*prompt.responses, *(cut.responses[index] for index in used)],
        examples=[(*members, place[index]) for members, index in zip(prompt.examples, sources, strict=True)],
        spans=spans,
    )


def _spans(prompt: TokenizedPrompt) -> list[list[tuple[int, int]]]:
    """The scored spans of each response: the whole response where none are given, or none are left after a cut."""
    return [prompt.scored_spans(k) or [(0, len(response))] for k, response in enumerate(prompt.responses)]
