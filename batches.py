"""From text to packed batches: token ids of each prompt and response, and an iterator over the steps of a run.

Shapes: T packed tokens, R responses, P pairs. A packed batch holds every prompt once and every response once, without
padding: a *tree* is a prompt followed by its responses, and the batch is one tree after the other. Each response continues
the positions of its prompt.

    records -> `tokenize_records` -> TokenizedPrompt -> `BatchIterator` -> the micro-batches of a step, each a PackedBatch
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import torch
from torch import Tensor

from preference_datasets import PreferenceRecord
from utils import UserError

# ---- text to token ids --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt and of the responses that are trained on, each response with its end-of-sequence token.

    `pairs` holds (preferred, dispreferred) indices into `responses`; it is empty for SFT, where `responses` is the target.
    `source` names the record in messages, `prompt` and `target` are its texts.
    """

    prompt_ids: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]
    source: str
    prompt: str

    @property
    def num_examples(self) -> int:
        """How many examples it holds: its pairs, or for SFT its responses."""
        return len(self.pairs) or len(self.responses)


@dataclass
class LengthReport:
    """How many texts were too long, and what was done about it."""

    prompts_cut: int = 0
    responses_cut: int = 0
    examples_dropped: int = 0

    def __str__(self) -> str:
        counts = {
            "prompts cut": self.prompts_cut,
            "responses cut (they lose their end-of-sequence token)": self.responses_cut,
            "examples left out": self.examples_dropped,
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def tokenize_records(
    records: Iterable[PreferenceRecord],
    tokenizer,
    paired: bool,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: str | None = None,
    report: LengthReport | None = None,
) -> Iterator[TokenizedPrompt]:
    """Yield the tokenised prompts of `records`, for preference losses (`paired`) or for SFT.

    Prompt and responses are tokenised apart and their ids joined, so that the boundary between them is exact. The prompt
    gets a beginning-of-sequence token where the tokenizer itself would add one; each response gets the end-of-sequence
    token. Lengths: `fit`; `truncation_mode` None takes each record's own.

    Raises UserError for a text that holds the end-of-sequence token, and for a prompt without tokens.
    """
    report = report if report is not None else LengthReport()
    bos = _bos_of(tokenizer)
    records = iter(records)
    while chunk := [_used_part(record, paired) for record in islice(records, 1024)]:
        texts = [text for record in chunk for text in (record.prompt, *record.responses)]
        ids = iter(tokenizer(texts, add_special_tokens=False).input_ids) if texts else iter(())
        for record in chunk:
            prompt_ids = next(ids)
            prompt_ids = prompt_ids if prompt_ids[: len(bos)] == bos else bos + prompt_ids
            responses = [next(ids) for _ in record.responses]
            _check_ids(record, prompt_ids, responses, tokenizer)
            whole = [[*response, tokenizer.eos_token_id] for response in responses]
            prompt = TokenizedPrompt(prompt_ids, whole, record.pairs, record.source, record.prompt)
            fitted = fit(prompt, max_length, max_prompt_length, truncation_mode or record.truncation_mode, report)
            if fitted is not None:
                yield fitted


def _used_part(record: PreferenceRecord, paired: bool) -> PreferenceRecord:
    """The record with only those responses that the loss looks at: those of its pairs, or for SFT the target."""
    if not paired:
        return replace(record, responses=[record.sft_target], pairs=[])
    used = sorted({index for pair in record.pairs for index in pair})
    place = {index: position for position, index in enumerate(used)}
    pairs = [(place[chosen], place[rejected]) for chosen, rejected in record.pairs]
    return replace(record, responses=[record.responses[index] for index in used], pairs=pairs)


def _bos_of(tokenizer) -> list[int]:
    """The beginning-of-sequence token as a list, where the tokenizer itself begins a text with it; else empty."""
    ids = tokenizer("a").input_ids
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _check_ids(record: PreferenceRecord, prompt_ids: list[int], responses: list[list[int]], tokenizer) -> None:
    if any(tokenizer.eos_token_id in ids for ids in (prompt_ids[1:], *responses)):
        raise UserError(
            f"datasets: {record.source}: the text holds {tokenizer.eos_token!r}, which marks the end of a response. "
            "Remove it from the data; it is added where it belongs."
        )
    if not prompt_ids:
        raise UserError(f"datasets: {record.source}: the prompt is empty. Expected at least one token before a response.")


def fit(
    prompt: TokenizedPrompt, max_length: int, max_prompt_length: int, truncation_mode: str, report: LengthReport
) -> TokenizedPrompt | None:
    """The prompt with all its responses within `max_length` tokens, or None where nothing of it is left.

    keep_start, keep_end: if the prompt and its longest response are too long together, the prompt is cut to
    `max_prompt_length` at its end or at its start; if that is not enough, the responses are cut to
    `max_length - max_prompt_length`. drop: responses that do not fit are left out, with their pairs.
    """
    longest = max(map(len, prompt.responses), default=0)
    if len(prompt.prompt_ids) + longest <= max_length:
        return prompt if prompt.responses else None
    if truncation_mode == "drop":
        return _without_long_responses(prompt, max_length, report)
    ids = prompt.prompt_ids
    if len(ids) > max_prompt_length:
        ids = ids[:max_prompt_length] if truncation_mode == "keep_start" else ids[-max_prompt_length:]
        report.prompts_cut += 1
    responses = prompt.responses
    if len(ids) + longest > max_length:
        room = max_length - max_prompt_length
        report.responses_cut += sum(len(response) > room for response in responses)
        responses = [response[:room] for response in responses]
    return replace(prompt, prompt_ids=ids, responses=responses)


def _without_long_responses(prompt: TokenizedPrompt, max_length: int, report: LengthReport) -> TokenizedPrompt | None:
    room = max_length - len(prompt.prompt_ids)
    kept = [index for index, response in enumerate(prompt.responses) if len(response) <= room]
    place = {index: position for position, index in enumerate(kept)}
    pairs = [(place[i], place[j]) for i, j in prompt.pairs if i in place and j in place]
    survives = bool(pairs) if prompt.pairs else bool(kept)
    report.examples_dropped += prompt.num_examples - (len(pairs) or len(kept) if survives else 0)
    return replace(prompt, responses=[prompt.responses[index] for index in kept], pairs=pairs) if survives else None


# ---- packed batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """Where one prompt and its responses lie among the packed tokens: the prompt from `start`, then each response."""

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]

    @property
    def response_starts(self) -> list[int]:
        """Index of each response's first packed token."""
        return list(accumulate(self.response_lengths[:-1], initial=self.start + self.prompt_length))

    @property
    def end(self) -> int:
        """One past the tree's last packed token."""
        return self.start + self.prompt_length + sum(self.response_lengths)


@dataclass(frozen=True)
class PackedBatch:
    """Trees one after the other, without padding. Responses are numbered through the batch, tree by tree.

    input_ids, position_ids: [T] int64; a response's positions continue its prompt's. pairs: [P, 2] int64, response numbers of
    preferred and dispreferred; empty for SFT. response_lengths: [R] int64, tokens. sources: [examples], for messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    trees: tuple[Tree, ...]
    pairs: Tensor
    response_lengths: Tensor
    sources: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        """Pairs, or for SFT responses."""
        return len(self.pairs) or len(self.response_lengths)

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its tensors on `device`."""
        names = ("input_ids", "position_ids", "pairs", "response_lengths")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


# One example: a prompt and one of its pairs; for SFT the pair is None.
Example = tuple[TokenizedPrompt, tuple[int, int] | None]


def examples_of(prompts: Iterable[TokenizedPrompt]) -> Iterator[Example]:
    """Every example of `prompts`, those of one prompt side by side."""
    for prompt in prompts:
        if prompt.pairs:
            yield from ((prompt, pair) for pair in prompt.pairs)
        else:
            yield prompt, None


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Pack examples so that prompts and responses that several of them share are there once."""
    used: dict[int, tuple[TokenizedPrompt, dict[int, int]]] = {}
    for prompt, pair in examples:
        _, numbers = used.setdefault(id(prompt), (prompt, {}))
        for index in pair or (0,):
            numbers.setdefault(index, len(numbers))
    ids: list[int] = []
    positions: list[int] = []
    trees: list[Tree] = []
    first_number: dict[int, int] = {}
    num_responses = 0
    for key, (prompt, numbers) in used.items():
        responses = [prompt.responses[index] for index in numbers]
        trees.append(Tree(len(ids), len(prompt.prompt_ids), tuple(map(len, responses))))
        first_number[key], num_responses = num_responses, num_responses + len(responses)
        ids += prompt.prompt_ids
        positions += range(len(prompt.prompt_ids))
        for response in responses:
            ids += response
            positions += range(len(prompt.prompt_ids), len(prompt.prompt_ids) + len(response))
    pairs = [[first_number[id(p)] + used[id(p)][1][index] for index in pair] for p, pair in examples if pair]
    return PackedBatch(
        torch.tensor(ids),
        torch.tensor(positions),
        tuple(trees),
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        torch.tensor([length for tree in trees for length in tree.response_lengths]),
        tuple(prompt.source for prompt, _ in examples),
    )


def cut(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Consecutive pieces of `size` examples; the last may be smaller."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


class BatchIterator:
    """The optimizer steps of a run: each a list of micro-batches, `batch_size` examples together.

    An epoch visits every prompt once, in an order that depends on `seed` and the epoch alone; the pairs of a prompt stay
    side by side. The last batch of an epoch has what is left. With `n_examples` the run ends after exactly so many
    examples, with `n_epochs` after so many passes, with both after whichever comes first.

    `state_dict` gives the position behind the last step that was handed out; iterating after `load_state_dict` continues
    with the step that follows it.
    """

    def __init__(
        self,
        prompts: Sequence[TokenizedPrompt],
        batch_size: int,
        num_micro_batches: int = 1,
        seed: int = 0,
        n_epochs: int | None = 1,
        n_examples: int | None = None,
    ):
        self.prompts = prompts
        self.batch_size = batch_size
        self.micro_batch_size = batch_size // num_micro_batches
        self.seed = seed
        self.n_epochs = n_epochs
        self.n_examples = n_examples
        self.epoch = 0
        self.examples_in_epoch = 0
        self.examples = 0

    @property
    def total_examples(self) -> int | None:
        """How many examples the run has in all."""
        limits = [] if self.n_examples is None else [self.n_examples]
        if self.n_epochs is not None:
            limits.append(self.n_epochs * sum(prompt.num_examples for prompt in self.prompts))
        return min(limits, default=None)

    def state_dict(self) -> dict[str, int]:
        """The position: epoch, examples of it that were handed out, and examples in all."""
        return {"epoch": self.epoch, "examples_in_epoch": self.examples_in_epoch, "examples": self.examples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position that `state_dict` gave."""
        self.epoch, self.examples_in_epoch, self.examples = (state[key] for key in ("epoch", "examples_in_epoch", "examples"))

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        while self.n_epochs is None or self.epoch < self.n_epochs:
            order = list(self.prompts)
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
            examples = islice(examples_of(order), self.examples_in_epoch, None)
            while batch := list(islice(examples, self._next_size())):
                self.examples_in_epoch += len(batch)
                self.examples += len(batch)
                yield [pack(piece) for piece in cut(batch, self.micro_batch_size)]
            if self._next_size() == 0:
                return
            self.epoch, self.examples_in_epoch = self.epoch + 1, 0

    def _next_size(self) -> int:
        return self.batch_size if self.n_examples is None else min(self.batch_size, self.n_examples - self.examples)


def evaluation_batches(
    prompts: Sequence[TokenizedPrompt], batch_size: int, n_examples: int | None, seed: int
) -> list[PackedBatch]:
    """The same `n_examples` held-out examples (None: all) at every evaluation, drawn by `seed`, cut into batches."""
    order = list(prompts)
    random.Random(f"{seed} evaluation").shuffle(order)
    return [pack(piece) for piece in cut(list(islice(examples_of(order), n_examples)), batch_size)]
