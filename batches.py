"""From text to packed batches: token ids of each prompt and response, and an iterator over the steps of a run.

Shapes: T packed tokens, R responses, P pairs. A packed batch holds every prompt once and every response once, without
padding: a *tree* is a prompt followed by its responses, and the batch is one tree after the other. Each response continues
the positions of its prompt.

    records -> `tokenize_records` -> TokenizedPrompt -> `BatchIterator` -> the micro-batches of a step, each a PackedBatch
"""

import queue
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from preference_datasets import PreferenceRecord
from response_trees import Tree, TreeLayout
from utils import UserError

# ---- text to token ids --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt and of the responses that are trained on, each response with its end-of-sequence token.

    `pairs` holds (preferred, dispreferred) indices into `responses`; it is empty for SFT, where `responses` is the target.
    `first_row` is the place of its first response among all responses of the run's data; `source` names the record in messages,
    `prompt` is its text.
    """

    prompt_ids: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]
    source: str
    prompt: str
    first_row: int = 0

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
    first_row: int = 0,
) -> Iterator[TokenizedPrompt]:
    """Yield the tokenised prompts of `records`, for preference losses (`paired`) or for SFT.

    Prompt and responses are tokenised apart and their ids joined, so that the boundary between them is exact. The prompt
    gets a beginning-of-sequence token where the tokenizer itself would add one; each response gets the end-of-sequence
    token. Lengths: `fit`; `truncation_mode` None takes each record's own. Responses are numbered from `first_row` on.

    Raises UserError for a text that holds the end-of-sequence token, and for a prompt without tokens.
    """
    report = report if report is not None else LengthReport()
    bos = _bos_of(tokenizer)
    records = iter(records)
    row = first_row
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
                yield replace(fitted, first_row=row)
                row += len(fitted.responses)


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
class PackedBatch:
    """Trees one after the other, without padding. Responses are numbered through the batch, tree by tree.

    All tensors are int64.

    input_ids, position_ids: [T]; a response's positions continue its prompt's.
    pairs: [P, 2], response numbers of preferred and dispreferred; empty for SFT.
    response_lengths: [R], tokens.
    response_rows: [R], the responses' places among all responses of the run's data.
    scored_ids: [S], the responses' tokens one after the other; predicted_at: [S], the packed index whose output predicts each
    of them (the token before it: the prompt's last one for a response's first); response_of: [S], the response each belongs to.
    sources: [examples], for messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    trees: tuple[Tree, ...]
    pairs: Tensor
    response_lengths: Tensor
    response_rows: Tensor
    scored_ids: Tensor
    predicted_at: Tensor
    response_of: Tensor
    sources: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        """Pairs, or for SFT responses."""
        return len(self.pairs) or len(self.response_lengths)

    @cached_property
    def layout(self) -> TreeLayout:
        """What attention needs to know, made once for all layers and models that see the batch."""
        return TreeLayout(self.trees, self.input_ids.device)

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        return self.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """The batch with each of its tensors changed."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)})


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
    ids, positions, scored, predicted, owners, rows = [], [], [], [], [], []
    trees: list[Tree] = []
    first_number: dict[int, int] = {}
    for key, (prompt, numbers) in used.items():
        start, prompt_length = len(ids), len(prompt.prompt_ids)
        responses = [prompt.responses[index] for index in numbers]
        trees.append(Tree(start, prompt_length, tuple(map(len, responses))))
        first_number[key] = len(rows)
        ids += prompt.prompt_ids
        positions += range(prompt_length)
        for index, response in zip(numbers, responses, strict=True):
            owners += [len(rows)] * len(response)
            rows.append(prompt.first_row + index)
            predicted += [start + prompt_length - 1, *range(len(ids), len(ids) + len(response) - 1)]
            scored += response
            ids += response
            positions += range(prompt_length, prompt_length + len(response))
    pairs = [[first_number[id(p)] + used[id(p)][1][index] for index in pair] for p, pair in examples if pair]
    return PackedBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        trees=tuple(trees),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        response_lengths=torch.tensor([length for tree in trees for length in tree.response_lengths]),
        response_rows=torch.tensor(rows),
        scored_ids=torch.tensor(scored),
        predicted_at=torch.tensor(predicted),
        response_of=torch.tensor(owners),
        sources=tuple(prompt.source for prompt, _ in examples),
    )


def cut(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Consecutive parts of `size` examples; the last may be smaller."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


@dataclass(frozen=True)
class TokenBudget:
    """How many packed tokens are computed at once.

    limit: more would not fit into memory. comfortable: more would not be faster, so that a new prompt begins a new piece;
    the pairs of one prompt stay together up to the limit, for the sake of what they share.
    """

    limit: int
    comfortable: int


UNLIMITED = TokenBudget(sys.maxsize, sys.maxsize)


def pack_within(examples: Iterable[Example], budget: TokenBudget) -> Iterator[PackedBatch]:
    """Pack examples, in their order, into pieces that keep within the budget.

    An example that is longer by itself gets a piece of its own.
    """
    piece: list[Example] = []
    tokens, seen = 0, set()
    for prompt, pair in examples:
        lengths = {(id(prompt), None): len(prompt.prompt_ids)}
        lengths |= {(id(prompt), index): len(prompt.responses[index]) for index in pair or (0,)}
        added = sum(length for key, length in lengths.items() if key not in seen)
        most = budget.limit if (id(prompt), None) in seen else budget.comfortable
        if piece and tokens + added > most:
            yield pack(piece)
            piece, tokens, seen, added = [], 0, set(), sum(lengths.values())
        piece.append((prompt, pair))
        seen |= lengths.keys()
        tokens += added
    if piece:
        yield pack(piece)


def prefetch(items: Iterator, depth: int = 2) -> Iterator:
    """The same items, made ahead by a thread of its own; what it raises is raised here."""
    waiting: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:  # handed over, not handled
            put((end, error))

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()


def _pinned(batch: PackedBatch) -> PackedBatch:
    """The batch in page-locked memory where there is a GPU, so that it is copied there while the GPU computes."""
    return batch.with_tensors(Tensor.pin_memory) if torch.cuda.is_available() else batch


# What a step computes at once: the examples that `gradient_accumulation_steps` puts together, in pieces that fit into memory.
MicroBatch = list[PackedBatch]


class BatchIterator:
    """The optimizer steps of a run: each a list of micro-batches, `batch_size` examples together.

    A micro-batch is a list of packed pieces, each within `budget`. Steps are made ahead of their use.

    An epoch visits every prompt once, in an order that depends on `seed` and the epoch alone; the pairs of a prompt stay
    side by side. The last batch of an epoch has what is left. With `n_examples` the run ends after exactly so many
    examples, with `n_epochs` after so many passes, with both after whichever comes first.

    `state_dict` gives the position behind the last step that was handed out, not behind those made ahead; iterating after
    `load_state_dict` continues with the step that follows it.
    """

    def __init__(
        self,
        prompts: Sequence[TokenizedPrompt],
        batch_size: int,
        num_micro_batches: int = 1,
        seed: int = 0,
        n_epochs: int | None = 1,
        n_examples: int | None = None,
        budget: TokenBudget = UNLIMITED,
    ):
        self.prompts = prompts
        self.budget = budget
        self.batch_size = batch_size
        self.micro_batch_size = batch_size // num_micro_batches
        self.seed = seed
        self.n_epochs = n_epochs
        self.n_examples = n_examples
        self.position = {"epoch": 0, "examples_in_epoch": 0, "examples": 0}

    @property
    def total_examples(self) -> int | None:
        """How many examples the run has in all."""
        limits = [] if self.n_examples is None else [self.n_examples]
        if self.n_epochs is not None:
            limits.append(self.n_epochs * sum(prompt.num_examples for prompt in self.prompts))
        return min(limits, default=None)

    def state_dict(self) -> dict[str, int]:
        """The position: epoch, examples of it that were handed out, and examples in all."""
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position that `state_dict` gave."""
        self.position = dict(state)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for batch, position in prefetch(self._packed(self._steps(dict(self.position)))):
            self.position = position
            yield batch

    def prompts_seen(self) -> list[TokenizedPrompt]:
        """The prompts that a run from its beginning sees, each once, in the order of their first visit."""
        start = {"epoch": 0, "examples_in_epoch": 0, "examples": 0}
        seen: dict[int, TokenizedPrompt] = {}
        for examples, position in self._steps(start):
            if position["epoch"] > 0:
                break
            seen |= {id(prompt): prompt for prompt, _ in examples}
        return list(seen.values())

    def _packed(self, steps) -> Iterator[tuple[list[MicroBatch], dict[str, int]]]:
        for examples, position in steps:
            parts = cut(examples, self.micro_batch_size)
            yield [[_pinned(piece) for piece in pack_within(part, self.budget)] for part in parts], position

    def _steps(self, position: dict[str, int]) -> Iterator[tuple[list[Example], dict[str, int]]]:
        """The examples of each step from `position` on, and the position behind it."""
        epoch, in_epoch, total = (position[key] for key in ("epoch", "examples_in_epoch", "examples"))
        while self.n_epochs is None or epoch < self.n_epochs:
            order = list(self.prompts)
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            examples = islice(examples_of(order), in_epoch, None)
            while step := list(islice(examples, self._size_after(total))):
                in_epoch, total = in_epoch + len(step), total + len(step)
                yield step, {"epoch": epoch, "examples_in_epoch": in_epoch, "examples": total}
            if self._size_after(total) == 0:
                return
            epoch, in_epoch = epoch + 1, 0

    def _size_after(self, examples: int) -> int:
        return self.batch_size if self.n_examples is None else min(self.batch_size, self.n_examples - examples)


def evaluation_examples(prompts: Sequence[TokenizedPrompt], n_examples: int | None, seed: int) -> list[Example]:
    """The `n_examples` held-out examples (None: all) of every evaluation, drawn by `seed`."""
    order = list(prompts)
    random.Random(f"{seed} evaluation").shuffle(order)
    return list(islice(examples_of(order), n_examples))


def evaluation_batches(
    prompts: Sequence[TokenizedPrompt], batch_size: int, n_examples: int | None, seed: int, budget: TokenBudget = UNLIMITED
) -> list[PackedBatch]:
    """`evaluation_examples`, cut into batches of at most `batch_size` examples, and within the budget."""
    parts = cut(evaluation_examples(prompts, n_examples, seed), batch_size)
    return [batch for part in parts for batch in pack_within(part, budget)]
