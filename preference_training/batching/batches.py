"""From tokenised prompts to packed batches, and an iterator over the steps of a run.

Shapes: T packed tokens, R responses, P pairs. A packed batch holds every prompt once and every response once, without
padding: a *tree* is a prompt followed by its responses, and the batch is one tree after the other. Each response continues
the positions of its prompt.

    PromptTable -> `BatchIterator` -> the micro-batches of a step, each a list of PackedBatches
"""

import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from operator import itemgetter

import numpy
import torch
from torch import Tensor

from preference_training.batching.trees import Tree, TreeLayout
from preference_training.core.ranks import ALONE, Ranks
from preference_training.data.prompt_table import PromptTable, Selection, shuffled
from preference_training.data.tokenization import TokenizedPrompt

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
    places: [E], the places of its examples among those of the micro-batch, over all ranks.
    sources: [examples], for messages. is_filler: whether it is there only because other ranks have one pack more; it counts
    for nothing.
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
    places: Tensor
    sources: tuple[str, ...]
    is_filler: bool = False

    @property
    def num_examples(self) -> int:
        """Pairs, or for SFT responses."""
        return len(self.pairs) or len(self.response_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens, each prompt and response counted once; none of what only fills up."""
        return 0 if self.is_filler else len(self.input_ids)

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


def pack_examples(examples: Sequence[Example], places: Sequence[int] | None = None) -> PackedBatch:
    """Pack examples so that prompts and responses that several of them share are there once. `places`: one after the other."""
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
        places=torch.tensor(range(len(examples)) if places is None else places),
        sources=tuple(prompt.source for prompt, _ in examples),
    )


def cut(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Consecutive parts of `size` examples; the last may be smaller."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


@dataclass(frozen=True)
class TokenBudget:
    """How many packed tokens are computed at once.

    limit: more would not fit into memory. comfortable: more would not be faster, so that a new prompt begins a new pack;
    the pairs of one prompt stay together up to the limit, for the sake of what they share.
    """

    limit: int
    comfortable: int


UNLIMITED = TokenBudget(sys.maxsize, sys.maxsize)


def tokens_of(example: Example) -> dict[tuple[int, int | None], int]:
    """How long the parts of an example are: its prompt's key and those of its responses, which other examples may share."""
    prompt, pair = example
    parts = {(id(prompt), None): len(prompt.prompt_ids)}
    return parts | {(id(prompt), index): len(prompt.responses[index]) for index in pair or (0,)}


def cut_within(examples: Sequence[Example], places: Iterable[int], budget: TokenBudget) -> Iterator[list[int]]:
    """Cut the examples at `places`, in their order, into packs that keep within the budget.

    An example that is longer by itself gets a pack of its own.
    """
    pack: list[int] = []
    tokens, seen = 0, set()
    for place in places:
        parts = tokens_of(examples[place])
        prompt = next(iter(parts))
        added = sum(length for key, length in parts.items() if key not in seen)
        most = budget.limit if prompt in seen else budget.comfortable
        if pack and tokens + added > most:
            yield pack
            pack, tokens, seen, added = [], 0, set(), sum(parts.values())
        pack.append(place)
        seen |= parts.keys()
        tokens += added
    if pack:
        yield pack


def spread(examples: Sequence[Example], size: int) -> list[list[int]]:
    """The places of the examples that each of `size` ranks computes, so that all have about as many tokens.

    The examples of a prompt stay together unless they are more than a rank's fair part. Every rank finds the same.
    """
    if size == 1:
        return [list(range(len(examples)))]
    groups: dict[int, list[int]] = {}
    for place, (prompt, _) in enumerate(examples):
        groups.setdefault(id(prompt), []).append(place)
    weigh = lambda places: sum({key: n for p in places for key, n in tokens_of(examples[p]).items()}.values())  # noqa: E731
    weighed = [(weigh(group), group) for group in groups.values()]
    fair = sum(weight for weight, _ in weighed) / size
    units = [(weight, group) for weight, group in weighed if weight <= fair]
    units += [(weigh([place]), [place]) for weight, group in weighed if weight > fair for place in group]
    loads, parts = [0] * size, [[] for _ in range(size)]
    # The longest first, each to the rank that has the least.
    for weight, unit in sorted(units, key=itemgetter(0), reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += weight
        parts[lightest] += unit
    return [sorted(part) for part in parts]


def packs_of(examples: Sequence[Example], budget: TokenBudget, ranks: Ranks = ALONE) -> list[PackedBatch]:
    """This rank's part of some examples, packed in packs within the budget. Every rank gets equally many packs.

    Sharded models compute together, so a rank with fewer packs than another gets fillers, which count for nothing.
    """
    cuts = [list(cut_within(examples, places, budget)) for places in spread(examples, ranks.size)]
    packs = [pack_examples([examples[place] for place in places], places) for places in cuts[ranks.rank]]
    missing = max(map(len, cuts)) - len(packs)
    if missing:
        shortest = min(range(len(examples)), key=lambda place: sum(tokens_of(examples[place]).values()))
        packs += [replace(pack_examples([examples[shortest]], [shortest]), is_filler=True)] * missing
    return packs


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

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
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
        # A thread that computes while the interpreter ends would abort the process.
        thread.join()


def _pinned(batch: PackedBatch) -> PackedBatch:
    """The batch in page-locked memory where there is a GPU, so that it is copied there while the GPU computes."""
    return batch.with_tensors(Tensor.pin_memory) if torch.cuda.is_available() else batch


@dataclass(frozen=True)
class MicroBatch:
    """What a step computes at once: the examples that `gradient_accumulation_steps` puts together.

    packs are this rank's, each within the budget. num_examples counts those of all ranks; `examples` are these.
    """

    packs: list[PackedBatch]
    num_examples: int
    examples: Sequence[Example] = ()


# The position of a run that has not taken a step.
BEGINNING = {"epoch": 0, "examples_in_epoch": 0, "examples": 0}


class BatchIterator:
    """The optimizer steps of a run: each a list of micro-batches, `batch_size` examples together.

    A micro-batch is cut into packed packs, each within `budget`; of these, `ranks` says which are this process's. Steps are
    made ahead of their use, and are the same for any number of ranks.

    An epoch visits every prompt once (those of a weighted data set as often as its weight says), in an order that depends on
    `seed` and the epoch alone; the pairs of a prompt stay side by side. The last batch of an epoch has what is left. With
    `n_examples` the run ends after exactly so many examples, with `n_epochs` after so many passes, with `n_steps` after so many
    steps, with several after whichever comes first.

    The budget may become smaller on the way; `first_budget` is what the run began with.

    `state_dict` gives the position behind the last step that was handed out, not behind those made ahead; iterating after
    `load_state_dict` continues with the step that follows it.
    """

    def __init__(
        self,
        prompts: PromptTable,
        batch_size: int,
        num_micro_batches: int = 1,
        seed: int = 0,
        n_epochs: int | None = 1,
        n_examples: int | None = None,
        budget: TokenBudget = UNLIMITED,
        ranks: Ranks = ALONE,
        n_steps: int | None = None,
        first_budget: TokenBudget | None = None,
    ):
        self.prompts = prompts
        self.ranks = ranks
        self.budget = budget
        self.first_budget = first_budget or budget
        self.batch_size = batch_size
        self.micro_batch_size = batch_size // num_micro_batches
        self.seed = seed
        self.n_epochs = n_epochs
        self.n_examples = n_examples
        self.n_steps = n_steps
        self.epoch_sizes: dict[int, int] = {}
        self.position = dict(BEGINNING)

    @cached_property
    def total_examples(self) -> int | None:
        """How many examples the run has in all."""
        limits = [] if self.n_examples is None else [self.n_examples]
        if self.n_epochs is not None:
            limits.append(sum(self.examples_of_epoch(epoch) for epoch in range(self.n_epochs)))
        if self.n_steps is not None:
            limits.append(self._examples_of_steps(self.n_steps))
        return min(limits, default=None)

    def _examples_of_steps(self, left: int) -> int:
        examples, epoch = 0, 0
        while left > 0:
            size = self.examples_of_epoch(epoch)
            examples, left, epoch = examples + min(size, left * self.batch_size), left - -(-size // self.batch_size), epoch + 1
        return examples

    def examples_of_epoch(self, epoch: int) -> int:
        """How many examples an epoch has; with weights that are no whole numbers it differs from one to the next."""
        if epoch not in self.epoch_sizes:
            visits = self.prompts.epoch_visits(self._seed_of(epoch))
            self.epoch_sizes[epoch] = int(self.prompts.num_examples[visits].sum())
        return self.epoch_sizes[epoch]

    @cached_property
    def total_steps(self) -> int:
        """How many optimizer steps the run has."""
        steps, left, epoch = 0, self.total_examples, 0
        while left > 0:
            size = min(left, self.examples_of_epoch(epoch))
            steps, left, epoch = steps - (-size // self.batch_size), left - size, epoch + 1
        return steps

    def total_steps_of(self, config: dict) -> int:
        """How many optimizer steps a run over the same data has that a configuration, in plain values, says the end of."""
        limits = {name: config[name] for name in ("n_epochs", "n_examples", "n_steps")}
        other = BatchIterator(self.prompts, self.batch_size, seed=self.seed, **limits)
        other.epoch_sizes = self.epoch_sizes
        return other.total_steps

    @property
    def epochs_done(self) -> float:
        """How many passes over the data the run has made, behind the step that was handed out last."""
        epoch = self.position["epoch"]
        return epoch + self.position["examples_in_epoch"] / self.examples_of_epoch(epoch)

    @cached_property
    def visits_again(self) -> bool:
        """Whether the run sees prompts more than once."""
        return self.total_examples > int(self.prompts.num_examples[self.prompts_seen.indices].sum())

    def state_dict(self) -> dict:
        """The position (epoch, examples of it that were handed out, examples in all), both budgets, and for how many ranks."""
        budgets = [length for budget in (self.budget, self.first_budget) for length in (budget.limit, budget.comfortable)]
        return {"position": self.position, "budget": budgets, "ranks": self.ranks.size}

    def load_state_dict(self, state: dict) -> None:
        """Continue from the position in a state that `state_dict` gave, on any number of ranks."""
        self.position = dict(state["position"])

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for batch, budget, position in prefetch(self._packed(self._steps(dict(self.position)))):
            self.position = position
            # Made ahead, before the packs were halved?
            yield batch if budget == self.budget else self._cut_anew(batch)

    @property
    def finished(self) -> bool:
        """Whether the last step has been handed out."""
        return self.position["examples"] >= self.total_examples

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the step that was handed out last is the last of its epoch."""
        return self.position["examples_in_epoch"] == self.examples_of_epoch(self.position["epoch"])

    def halve_packs(self, batch: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Cut a step into packs half as large as its largest, and all later steps too."""
        largest = max(len(pack.input_ids) for micro_batch in batch for pack in micro_batch.packs)
        self.budget = TokenBudget(largest // 2, min(largest // 2, self.budget.comfortable))
        return self._cut_anew(batch)

    def _cut_anew(self, batch: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [self._micro_batch(micro_batch.examples) for micro_batch in batch]

    @cached_property
    def prompts_seen(self) -> Selection:
        """The prompts that a run from its beginning sees, each once."""
        return self.prompts.select(numpy.flatnonzero(self._seen()))

    @cached_property
    def prompts_seen_later(self) -> Selection:
        """Those of them that its first epoch does not see, as it may be where data sets have weights."""
        return self.prompts.select(numpy.flatnonzero(self._seen() & ~self._seen(epochs=1)))

    def _seen(self, epochs: int | None = None) -> numpy.ndarray:
        """Whether each prompt is seen, in so many epochs at most: [N] bool."""
        seen, left, epoch = numpy.zeros(len(self.prompts), bool), self.total_examples, 0
        while left > 0 and epoch != epochs and not seen.all():
            order = self._order(epoch)
            examples = numpy.cumsum(self.prompts.num_examples[order])
            seen[order[: numpy.searchsorted(examples, left) + 1]] = True
            left, epoch = left - int(examples[-1]), epoch + 1
        return seen

    def first_epoch(self) -> Iterator[PackedBatch]:
        """This rank's packs of all micro-batches of the first epoch, as the run computes them when it begins."""
        for examples, position in self._steps(dict(BEGINNING)):
            if position["epoch"] > 0:
                return
            for part in cut(examples, self.micro_batch_size):
                yield from packs_of(part, self.first_budget, self.ranks)

    def _order(self, epoch: int) -> numpy.ndarray:
        return self.prompts.epoch_order(self._seed_of(epoch))

    def _seed_of(self, epoch: int) -> str:
        return f"{self.seed} {epoch}"

    def _packed(self, steps) -> Iterator[tuple[list[MicroBatch], TokenBudget, dict[str, int]]]:
        for examples, position in steps:
            budget, parts = self.budget, cut(examples, self.micro_batch_size)
            yield [self._micro_batch(part) for part in parts], budget, position

    def _micro_batch(self, examples: Sequence[Example]) -> MicroBatch:
        packs = [_pinned(pack) for pack in packs_of(examples, self.budget, self.ranks)]
        return MicroBatch(packs, len(examples), examples)

    def _steps(self, position: dict[str, int]) -> Iterator[tuple[list[Example], dict[str, int]]]:
        """The examples of each step from `position` on, and the position behind it."""
        epoch, in_epoch, total = (position[key] for key in ("epoch", "examples_in_epoch", "examples"))
        while self.n_epochs is None or epoch < self.n_epochs:
            order = self._order(epoch)
            # Prompts that were done before are passed over without being looked at.
            done = numpy.cumsum(self.prompts.num_examples[order]) if in_epoch else order[:0]
            first = int(numpy.searchsorted(done, in_epoch, side="right"))
            skip = in_epoch - (int(done[first - 1]) if first else 0)
            examples = islice(examples_of(self.prompts.select(order[first:])), skip, None)
            while step := list(islice(examples, self._size_after(total))):
                in_epoch, total = in_epoch + len(step), total + len(step)
                yield step, {"epoch": epoch, "examples_in_epoch": in_epoch, "examples": total}
            if self._size_after(total) == 0:
                return
            epoch, in_epoch = epoch + 1, 0

    def _size_after(self, examples: int) -> int:
        total = self.total_examples
        return self.batch_size if total is None else min(self.batch_size, total - examples)


def evaluation_prompts(prompts: PromptTable, n_examples: int | None, seed: int) -> Selection:
    """The prompts of the `n_examples` held-out examples (None: all) of every evaluation, drawn by `seed`."""
    order = shuffled(len(prompts), f"{seed} evaluation")
    if n_examples is not None:
        order = order[: numpy.searchsorted(numpy.cumsum(prompts.num_examples[order]), n_examples) + 1]
    return prompts.select(order)


def evaluation_batches(
    prompts: PromptTable,
    batch_size: int,
    n_examples: int | None,
    seed: int,
    budget: TokenBudget = UNLIMITED,
    ranks: Ranks = ALONE,
) -> list[PackedBatch]:
    """This rank's part of the `n_examples` held-out examples, in batches of at most `batch_size` over all ranks.

    Their `places` are those among all held-out examples.
    """
    examples = list(islice(examples_of(evaluation_prompts(prompts, n_examples, seed)), n_examples))
    return batches_of(examples, batch_size, budget, ranks)


def batches_of(
    examples: Sequence[Example], batch_size: int, budget: TokenBudget = UNLIMITED, ranks: Ranks = ALONE
) -> list[PackedBatch]:
    """This rank's part of some examples, in batches of at most `batch_size` over all ranks; `places` are among them all."""
    starts = range(0, len(examples), batch_size)
    return [
        replace(pack, places=pack.places + start)
        for start in starts
        for pack in packs_of(examples[start : start + batch_size], budget, ranks)
    ]
