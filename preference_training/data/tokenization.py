"""Tokenize prompts and responses, each response with its end-of-sequence token, and truncate them.

records -> `tokenize_records` -> TokenizedPrompt
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice
from typing import NamedTuple

from preference_training.data.chunking import CHUNKS, text_chunks
from preference_training.data.records.record import PreferenceRecord, Prompt, prompt_text
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.chat_rendering import ConversationError
from preference_training.data.rendering.encoding import Encoder, Ids, ScoredIds, Texts
from preference_training.data.rendering.records import Rendered, Renderer
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.examples import renumbered, used_responses
from preference_training.data.rows.grouping import BOTH_LABELS
from preference_training.data.rows.templates import build_template
from preference_training.losses.base import MISSING_NUMBERS


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt and of the responses that are trained on, each response with its end-of-sequence token.

    `examples` holds indices into `responses`: (preferred, dispreferred), a ranking from best to worst, or a labeled response
    and a mismatched one; if it is empty, as for SFT, every response is an example of its own. `source` names the record in
    messages; `number` counts the records of its data set and split. `first_row` is the index of its first response among all
    responses of the run's data.

    spans: the scored tokens of each response as [start, end) spans; None where all are scored. weights, margins, labels: a
    number for each example, if the data has them; a label is 1 for a desirable response, 0 for an undesirable one.
    """

    prompt_ids: list[int]
    responses: list[list[int]]
    examples: list[tuple[int, ...]]
    source: str = ""
    number: int = 0
    first_row: int = 0
    spans: list[list[tuple[int, int]]] | None = None
    weights: list[float] | None = None
    margins: list[float] | None = None
    labels: list[float] | None = None

    @property
    def num_examples(self) -> int:
        """How many examples it holds."""
        return len(self.examples) or len(self.responses)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Preferred and dispreferred response of every pair, also of those that a ranking implies."""
        return [pair for members in self.examples for pair in combinations(members, 2)] if self.labels is None else []

    @cached_property
    def sequences(self) -> list[list[int]]:
        """The prompt with each of its responses."""
        return [self.prompt_ids + response for response in self.responses]

    def scored_spans(self, k: int) -> list[tuple[int, int]]:
        """The scored spans of response k."""
        return [(0, len(self.responses[k]))] if self.spans is None else self.spans[k]

    def members(self, k: int) -> tuple[int, ...]:
        """The responses of example k, as indices."""
        return self.examples[k] if self.examples else (k,)


def text_reader(tokenizer, settings: TokenSettings) -> Callable[[Prompt], str]:
    """A function from a prompt to the text that the model reads, whose hash decides which prompts are held out.

    For a conversation that the chat template rejects it is `prompt_text`; tokenization reports the error.
    """
    if settings.version == 1:
        return prompt_text
    template = build_template(settings.template, settings.system_prompt, tokenizer)

    def text_of(prompt: Prompt) -> str:
        try:
            return template(prompt, [])[0]
        except ConversationError:
            return prompt_text(prompt)

    return text_of


def tokenize_records(
    records: Iterable[PreferenceRecord], tokenizer, settings: TokenSettings, report: DataReport | None = None
) -> Iterator[TokenizedPrompt]:
    """Yield the tokenized prompts of `records`.

    Prompt and responses are tokenized separately and their ids concatenated, so that the boundary between them is exact; for
    SFT, a response of several turns is tokenized with its prompt, as chat templates are. Prompts get a beginning-of-sequence
    token if the tokenizer adds one, or if there is no prompt; each response gets the end-of-sequence token. Truncation and
    skipping: `trainable_part`.

    Texts that contain the end-of-sequence token, prompts without tokens, and conversations that the tokenizer's chat template
    rejects go to the report; without one they raise UserError.
    """
    work = _Tokenization(tokenizer, settings, report if report is not None else DataReport())
    records = iter(records)
    # Two threads encode what is not of known words, on all cores and without the GIL, while this one renders the next chunk:
    # one encodes while the other builds lists.
    with ThreadPoolExecutor(2) as encoder:
        pending: deque = deque()
        while chunk := list(islice(records, 1024)):
            kept = [rendered for record in chunk for rendered in work.renderer.render(record)]
            pending.append(work.start(kept, encoder))
            if len(pending) > 4:
                yield from work.finish(pending.popleft())
        for started in pending:
            yield from work.finish(started)


class _Started(NamedTuple):
    """A chunk of rendered records whose texts are being encoded. known: the ids of known words, None where there are others."""

    kept: list[Rendered]
    known: Ids
    others: Future

    def ids(self) -> Iterator[Iterator]:
        """The ids of prompts, of responses that are texts, and of other responses, each one by one."""
        return map(_filled, self.known, map(iter, self.others.result()))


def _filled(known: Iterable, others: Iterator) -> Iterator:
    """What is known, with the next of the others in place of each None."""
    return (next(others) if ids is None else ids for ids in known)


class _Tokenization:
    """The steps of `tokenize_records`, with the tokenizer and settings they share."""

    def __init__(self, tokenizer, settings: TokenSettings, report: DataReport):
        self.settings, self.report = settings, report
        self.renderer, self.encoder = Renderer(tokenizer, settings, report), Encoder(tokenizer)
        self.bos = bos_ids(tokenizer)
        # Cached: a tokenizer looks up its special tokens on each access.
        self.eos_id, self.bos_id = tokenizer.eos_token_id, tokenizer.bos_token_id

    def start(self, kept: list[Rendered], threads: ThreadPoolExecutor) -> _Started:
        """Begin to encode a chunk."""
        # Pairs share their prompt, whatever follows it.
        with_prompt = self.settings.examples == "targets"
        scored = [
            (one.prompt if with_prompt else None, text) for one in kept for text in one.texts if not isinstance(text, str)
        ]
        texts = Texts(
            [one.prompt for one in kept], [text for one in kept for text in one.texts if isinstance(text, str)], scored
        )
        known = self.encoder.look_up(texts)
        others = ([text for text, ids in zip(*both, strict=True) if ids is None] for both in zip(texts, known, strict=True))
        return _Started(kept, known, threads.submit(self.encoder.encode, Texts(*others)))

    def finish(self, chunk: _Started) -> Iterator[TokenizedPrompt]:
        """The tokenized prompts of a chunk, from the ids of all its texts."""
        prompts, texts, scored = chunk.ids()
        for one in chunk.kept:
            prompt_ids = next(prompts)
            whole = [ScoredIds(next(texts), [], True) if isinstance(text, str) else next(scored) for text in one.texts]
            if joined := next((ids.prompt_ids for ids in whole if ids.prompt_ids), None):
                prompt_ids = joined
            prompt = self._prompt(one, prompt_ids, whole)
            if prompt is not None and self._is_plain_text(one):
                yield from self._chunks(prompt)
            elif prompt is not None:
                always_kept = len(self.bos) if self.settings.version == 1 else int(prompt.prompt_ids[0] == self.bos_id)
                left = trainable_part(prompt, self.settings, always_kept, self.report)
                if left is not None:
                    yield left

    def _is_plain_text(self, one: Rendered) -> bool:
        """Whether SFT learns a text without a prompt."""
        return not one.prompt and self.settings.examples == "targets" and isinstance(one.part.responses[0], str)

    def _chunks(self, text: TokenizedPrompt) -> Iterator[TokenizedPrompt]:
        """A text in parts of at most `max_length` tokens: none of it is lost."""
        chunks = list(text_chunks(text.prompt_ids + text.responses[0], self.settings.max_length, self.bos_id))
        self.report.change(CHUNKS, len(chunks) - 1)
        for chunk in chunks:
            yield replace(text, prompt_ids=chunk.prompt_ids, responses=[chunk.ids], spans=chunk.spans)

    def _prompt(self, one: Rendered, prompt_ids: list[int], whole: list[ScoredIds]) -> TokenizedPrompt | None:
        """A prompt and its responses, with the special tokens that are added; None after an error."""
        record, part = one.record, one.part
        if prompt_ids[: len(self.bos)] != self.bos:
            prompt_ids = self.bos + prompt_ids
        if not prompt_ids and not one.prompt:
            prompt_ids, whole = self._without_prompt(whole)
        if not prompt_ids:
            self.renderer.refuse(record, "the prompt is empty. Expected at least one token before a response.")
            return None
        if any(self.eos_id in some.ids for some, text in zip(whole, one.texts, strict=True) if isinstance(text, str)):
            self.renderer.refuse_end(record)
            return None
        responses = [[*response.ids, self.eos_id] for response in whole]
        spans = None
        if not all(isinstance(text, str) for text in one.texts):
            spans = [
                [(0, len(response.ids) + 1)] if isinstance(text, str) else _with_end(response)
                for response, text in zip(whole, one.texts, strict=True)
            ]
        return TokenizedPrompt(
            prompt_ids,
            responses,
            part.examples,
            record.source,
            record.row or record.number,
            0,
            spans,
            part.weights,
            part.margins,
            part.labels,
        )

    def _without_prompt(self, whole: list[ScoredIds]) -> tuple[list[int], list[ScoredIds]]:
        """What responses without a prompt are conditioned on, and these: the first token where none begins a sequence."""
        if self.bos_id is not None:
            return [self.bos_id], whole
        if len(whole) == 1 and whole[0].ids:
            [(ids, spans, ends, _)] = whole
            return ids[:1], [ScoredIds(ids[1:], [(max(start - 1, 0), end - 1) for start, end in spans if end > 1], ends)]
        return [self.eos_id], whole


def _with_end(response: ScoredIds) -> list[tuple[int, int]]:
    """The scored spans of a response with its end-of-sequence token."""
    end = len(response.ids)
    if not response.ends:
        return response.spans
    spans = response.spans or [(end, end)]
    start, last = spans[-1]
    return [*spans[:-1], (start, end + 1)] if last == end else [*spans, (end, end + 1)]


def bos_ids(tokenizer) -> list[int]:
    """The beginning-of-sequence token as a list, if the tokenizer adds it to texts; else empty."""
    ids = tokenizer("a").input_ids
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


# ---- the part that is trained on ----------------------------------------------------------------------------------------

SAME_IDS = "chosen and rejected are the same token ids"
SAME_IDS_RANKED = "a response is the same token ids as a better one of its ranking"
NOT_SCORED = "a response has no scored token"
NOTHING_LEFT = "no token of the prompt is left within max_prompt_length"


def trainable_part(
    prompt: TokenizedPrompt, settings: TokenSettings, always_kept: int, report: DataReport
) -> TokenizedPrompt | None:
    """The part of a prompt that is trained on, within the lengths of the settings, or None. The report counts what is skipped.

    Skipped are pairs whose responses have become identical, by template or truncation, examples with a response of which no
    token is scored, and prompts of which only the `always_kept` beginning-of-sequence tokens remain.
    """
    fitted = truncate(prompt, settings, report, always_kept)
    if fitted is None or settings.version == 1:
        return fitted
    ids = fitted.prompt_ids
    if always_kept and settings.truncation_mode == "keep_end" and len(ids) < len(prompt.prompt_ids) and ids[1:2] == ids[:1]:
        # A template may write a beginning-of-sequence token before each turn, and the kept end may start with one.
        fitted = replace(fitted, prompt_ids=ids[1:])
    left = None
    if always_kept and len(fitted.prompt_ids) <= always_kept < len(prompt.prompt_ids):
        report.skip(NOTHING_LEFT, fitted.num_examples)
    else:
        left = drop_identical(fitted, report)
        left = left and drop_unscored(left, report)
    if left is not fitted:
        _uncount_cuts(prompt, fitted, left, report)
    return left


def _uncount_cuts(prompt: TokenizedPrompt, fitted: TokenizedPrompt, left: TokenizedPrompt | None, report: DataReport) -> None:
    """Subtract truncated texts that are skipped afterwards: only what a model reads counts."""
    whole = set(map(tuple, prompt.responses))
    cut, still_cut = (
        sum(tuple(response) not in whole for response in (part.responses if part else ())) for part in (fitted, left)
    )
    report.change(RESPONSE_CUT, still_cut - cut)
    report.change(PROMPT_CUT, -int(left is None and fitted.prompt_ids != prompt.prompt_ids))


def keep(
    prompt: TokenizedPrompt, examples: Sequence[tuple[int, tuple[int, ...]]], responses: Sequence[int] | None = None
) -> TokenizedPrompt | None:
    """The prompt with some examples, given as their numbers and members, and some responses; None without any example.

    By default the responses are those of the examples.
    """
    if not examples:
        return None
    chosen = [members for _, members in examples]
    used = used_responses(chosen) if responses is None else responses
    numbers = {name: getattr(prompt, name) for name in MISSING_NUMBERS}
    return replace(
        prompt,
        responses=[prompt.responses[index] for index in used],
        examples=renumbered(chosen, used) if prompt.examples else [],
        spans=prompt.spans and [prompt.spans[index] for index in used],
        **{name: values and [values[k] for k, _ in examples] for name, values in numbers.items()},
    )


def drop_identical(prompt: TokenizedPrompt, report: DataReport) -> TokenizedPrompt | None:
    """The prompt with each response once, without pairs of identical responses, which have no gradient.

    Rankings lose the worse of identical responses; responses that are labeled both ways are skipped. None without any remaining
    example; unchanged for SFT.
    """
    if not prompt.examples or (len(prompt.responses) == 2 and prompt.responses[0] != prompt.responses[1]):
        return prompt
    spans = prompt.spans or [[] for _ in prompt.responses]
    first: dict[tuple, int] = {}
    keys = zip(map(tuple, prompt.responses), map(tuple, spans), strict=True)
    places = [first.setdefault(key, index) for index, key in enumerate(keys)]
    if len(first) == len(places):
        return prompt
    examples = [tuple(dict.fromkeys(places[index] for index in members)) for members in prompt.examples]
    if prompt.labels:
        labeled = set(zip(examples, prompt.labels, strict=True))
        kept = [(k, members) for k, members in enumerate(examples) if (members, 1 - prompt.labels[k]) not in labeled]
        report.skip(BOTH_LABELS, len(examples) - len(kept))
        return keep(prompt, kept)
    kept = [(k, members) for k, members in enumerate(examples) if len(members) > 1]
    report.skip(SAME_IDS, len(examples) - len(kept))
    report.skip(SAME_IDS_RANKED, sum(len(prompt.examples[k]) - len(members) for k, members in kept))
    return keep(prompt, kept)


def drop_unscored(prompt: TokenizedPrompt, report: DataReport) -> TokenizedPrompt | None:
    """The prompt without examples that have a response of which no token is scored; None without any remaining example."""
    if prompt.spans is None:
        return prompt
    scored = [any(start < end for start, end in spans) for spans in prompt.spans]
    members = [(k, prompt.members(k)) for k in range(prompt.num_examples)]
    kept = [example for example in members if all(scored[index] for index in example[1])]
    report.skip(NOT_SCORED, len(members) - len(kept))
    return prompt if len(kept) == len(members) else keep(prompt, kept)


# ---- lengths ------------------------------------------------------------------------------------------------------------

PROMPT_CUT = "prompts cut"
RESPONSE_CUT = "responses cut (they lose their end-of-sequence token)"


def truncate(
    prompt: TokenizedPrompt, settings: TokenSettings, report: DataReport, always_kept: int = 0
) -> TokenizedPrompt | None:
    """Truncate a prompt and its responses to `max_length` tokens; None if nothing remains.

    keep_start, keep_end: if the prompt and its longest response are too long together, the prompt is truncated to
    `max_prompt_length`, keeping that end; if that is not enough, the responses are truncated to `max_length -
    max_prompt_length`. drop: responses that do not fit are skipped, with their pairs, or leave their rankings. The first
    `always_kept` tokens of a prompt, its beginning-of-sequence token, are kept with either end.
    """
    max_length, max_prompt_length = settings.max_length, settings.max_prompt_length
    longest = max(map(len, prompt.responses), default=0)
    if len(prompt.prompt_ids) + longest <= max_length:
        return prompt if prompt.responses else None
    if settings.truncation_mode == "drop":
        return _without_long_responses(prompt, max_length, report)
    ids = prompt.prompt_ids
    if len(ids) > max_prompt_length:
        start = max_prompt_length if settings.truncation_mode == "keep_start" else min(always_kept, max_prompt_length)
        ids = ids[:start] + ids[len(ids) - (max_prompt_length - start) :]
        report.change(PROMPT_CUT)
    fitted = replace(prompt, prompt_ids=ids)
    if len(ids) + longest > max_length:
        room = max_length - max_prompt_length
        report.change(RESPONSE_CUT, sum(len(response) > room for response in prompt.responses))
        fitted = with_responses_cut(fitted, room)
    return fitted


def with_responses_cut(prompt: TokenizedPrompt, room: int) -> TokenizedPrompt:
    """The prompt with only the first `room` tokens of each response, and what they hold of its spans."""
    cut = prompt.spans and [[(start, min(end, room)) for start, end in spans if start < room] for spans in prompt.spans]
    return replace(prompt, responses=[response[:room] for response in prompt.responses], spans=cut)


def _without_long_responses(prompt: TokenizedPrompt, max_length: int, report: DataReport) -> TokenizedPrompt | None:
    room = max_length - len(prompt.prompt_ids)
    fits = [len(response) <= room for response in prompt.responses]
    examples = [prompt.members(k) for k in range(prompt.num_examples)]
    left = [tuple(index for index in members if fits[index]) for members in examples]
    # A ranking of the others remains; half a pair does not.
    kept = [(k, some) for k, some in enumerate(left) if len(some) == len(examples[k]) or len(some) > 1]
    too_long = f"longer than max_length, {max_length} tokens"
    report.skip(too_long, len(examples) - len(kept))
    report.skip(f"a response of a ranking is {too_long}", sum(len(examples[k]) - len(some) for k, some in kept))
    return keep(prompt, kept, [index for index, is_kept in enumerate(fits) if is_kept])
