"""Scores of responses under a model, and the reference that gives log-probs without gradients.

A score is the log-prob of a response, or, of a model with a value head, its value.

Shapes: T packed tokens, S scored tokens, C contributions (a scored token counts for each response that shares it), R
responses, L tokens of the longest padded row, H hidden size, V vocabulary, K 1 or 2 values a token. Position i of the logits
predicts token i + 1, so a response is scored from the last position of its prompt on.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from preference_training.batching.packing import PackedBatch
from preference_training.batching.parts import PackPart, SlicedLayout
from preference_training.batching.staging import StagedTensors
from preference_training.core.process_group import WHOLE_PACKS, reshard, to_local
from preference_training.losses.base import Loss, TokenLogps
from preference_training.modeling.adapters.weights import has_adapter, reference_mode
from preference_training.modeling.prefix_sharing.context import assemble
from preference_training.modeling.prefix_sharing.longest_row import forget_longest_row, frequency_groups, frequency_limits
from preference_training.modeling.prefix_sharing.scoring_head import ScoringHead, heads_of, score_tokens
from preference_training.modeling.prefix_sharing.tree_attention import TREE_ATTENTION
from preference_training.modeling.state import spans_devices
from preference_training.modeling.value_head import has_value_head

# What is computed of all responses in one forward of the trie.
ByTrie = Callable[[nn.Module, PackedBatch], Tensor]
# What is computed of some responses, given by their numbers, in one forward of padded rows: a tensor for each.
ByRows = Callable[[nn.Module, PackedBatch, Sequence[int]], Sequence[Tensor]]


def shares_prefixes(model: nn.Module) -> bool:
    """Whether a model computes what sequences share once."""
    return model.config._attn_implementation == TREE_ATTENTION


def response_scores(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The score of each response: [R] float32, in the batch's order.

    Its log-prob given its prompt, summed over its scored tokens; of a model with a value head the value at its last token.
    """
    return _by_response(model, _computed(model, batch, *_ways(model)), batch)


def scored_tokens(model: nn.Module, batch: PackedBatch, collision: bool = False) -> Tensor:
    """Log-probs of the scored tokens, response by response: [C, 1] float64 (float32 on MPS).

    collision: also log sum_v p_v^2 of the distribution that each token is drawn from: [C, 2]. The softmax is always in float32.
    """
    return _computed(model, batch, partial(_score_trie, collision=collision), partial(_score_rows, collision=collision))


def policy_scores(model: nn.Module, batch: PackedBatch, loss: Loss | None) -> tuple[Tensor, TokenLogps | None]:
    """`response_scores` of a policy, and those of its tokens for a loss that reads them."""
    if loss is None or not (loss.reads_tokens or loss.reads_collision):
        return response_scores(model, batch), None
    values = scored_tokens(model, batch, loss.reads_collision)
    tokens = TokenLogps(values[:, 0], batch.scored_responses, values[:, 1] if loss.reads_collision else None)
    return _sum_by_response(values, batch), tokens


def reference_logps(reference, batch: PackedBatch, loss: Loss | None) -> tuple[Tensor | None, TokenLogps | None]:
    """What a loss reads of a reference: the log-probs [R] of the responses and of their tokens; None for what it does not."""
    if reference is None:
        return None, None
    return reference.with_tokens(batch) if loss is not None and loss.reads_tokens else (reference(batch), None)


def zero_scores(batch: PackedBatch, loss: Loss | None, zero: Tensor) -> tuple[Tensor, TokenLogps | None]:
    """The like of what `policy_scores` gives: zeros that depend on a scalar zero."""
    scores = zero + zero.new_zeros(len(batch.response_lengths))
    if loss is None or not (loss.reads_tokens or loss.reads_collision):
        return scores, None
    values = _to_float64(zero + zero.new_zeros(len(batch.scored)))
    return scores, TokenLogps(values, batch.scored_responses, values if loss.reads_collision else None)


def trie_scores(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`response_scores` in one forward of the packed tokens."""
    by_trie, _ = _ways(model)
    return _by_response(model, by_trie(model, batch), batch)


def unpadded_scores(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`response_scores` of rows without padding: each sequence beside those of its own length only."""
    by_length: dict[int, list[int]] = {}
    for number, (_, length) in enumerate(batch.trie.ends):
        by_length.setdefault(length, []).append(number)
    _, by_rows = _ways(model)
    return _by_response(model, _in_groups(model, batch, by_rows, list(by_length.values())), batch)


# ---- ways to compute ------------------------------------------------------------------------------------------------------


def _ways(model: nn.Module) -> tuple[ByTrie, ByRows]:
    """How a model computes what it says of responses: values, or log-probs of their tokens."""
    return (_value_trie, _value_rows) if has_value_head(model) else (_score_trie, _score_rows)


def _by_response(model: nn.Module, computed: Tensor, batch: PackedBatch) -> Tensor:
    """One number of each response [R], from its value or the log-probs of its tokens."""
    return computed if has_value_head(model) else _sum_by_response(computed, batch)


def _sum_by_response(values: Tensor, batch: PackedBatch) -> Tensor:
    """The sums of the first column of `scored_tokens` over each response's tokens: [R] float32."""
    return values.new_zeros(len(batch.response_lengths)).index_add(0, batch.scored_responses, values[:, 0]).float()


def _computed(model: nn.Module, batch: PackedBatch, by_trie: ByTrie, by_rows: ByRows) -> Tensor:
    """What a model computes of a batch's responses, one after the other.

    A model with tree attention computes what sequences share once; any other computes padded rows, as one does whose rotary
    embeddings would let longer rows affect shorter ones, in several forwards. A model with an attribute `autocast_dtype` runs
    under autocast in that dtype.
    """
    groups = rows_of_forwards(model, batch)
    dtype = getattr(model, "autocast_dtype", None)
    with torch.autocast(batch.input_ids.device.type, dtype=dtype, enabled=dtype is not None):
        if groups is None:
            forget_longest_row(model)
            result = by_trie(model, batch)
        else:
            result = _in_groups(model, batch, by_rows, groups)
        if isinstance(model, FSDPModule) and frequency_limits(model):
            result = result + _zero_of_missing_forwards(model, batch, by_rows, len(groups or [0]))
    return result


def rows_of_forwards(model: nn.Module, batch: PackedBatch) -> list[list[int]] | None:
    """The numbers of the responses whose padded rows each forward computes; None where one forward computes the trie.

    Forwards beyond these, which keep ranks in lockstep, count for nothing.
    """
    groups = frequency_groups(model, batch.trie)
    return None if len(groups) == 1 and shares_prefixes(model) else groups


def _in_groups(model: nn.Module, batch: PackedBatch, by_rows: ByRows, groups: Iterable[Sequence[int]]) -> Tensor:
    """What is computed of all responses in a forward of each group of their numbers."""
    found: dict[int, Tensor] = {}
    for group in groups:
        forget_longest_row(model)
        found |= zip(group, by_rows(model, batch, group), strict=True)
    return torch.cat([found[number] for number in range(len(found))])


def _zero_of_missing_forwards(model: nn.Module, batch: PackedBatch, by_rows: ByRows, forwards: int) -> Tensor:
    """A zero that depends on as many more forwards as another rank has made: ranks of a sharded model compute in lockstep."""
    most = torch.tensor(forwards, device=batch.input_ids.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    zeros = [by_rows(model, batch, [0])[0].sum() * 0 for _ in range(int(most) - forwards)]
    return torch.stack(zeros).sum() if zeros else torch.zeros((), device=batch.input_ids.device)


def _to_float64(values: Tensor) -> Tensor:
    """Token log-probs in float64 where the device supports it, so that their sum is exact to float32."""
    return values if values.device.type == "mps" else values.double()


# ---- one forward of a trie ------------------------------------------------------------------------------------------------


def _score_trie(model: nn.Module, batch: PackedBatch, collision: bool = False) -> Tensor:
    """`scored_tokens` in one forward of the packed tokens; the head computes the scored positions only."""
    heads, computed = heads_of(model), _own_tokens(model, batch)
    scores_in_head = all(isinstance(head, ScoringHead) for head in heads)
    for head in heads if scores_in_head else ():
        head.scored_ids, head.collision = computed.scored_ids, collision
    try:
        # [S, V] logits, or [S, K] of a ScoringHead.
        output = model(**_packed_inputs(computed), logits_to_keep=_head_index(model, computed.predicted_at)).logits[0]
    finally:
        for head in heads if scores_in_head else ():
            head.scored_ids = None
    values = _to_float64(output if scores_in_head else score_tokens(output, computed.scored_ids, collision))
    if isinstance(computed, PackPart):
        values = assemble(values, computed.scored_places, model.context)
    return values[batch.scored]


def _value_trie(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The values of responses in one forward of the packed tokens: [R] float32."""
    computed = _own_tokens(model, batch)
    values = model(**_packed_inputs(computed), values_at=computed.last_tokens)
    return assemble(values, computed.last_places, model.context) if isinstance(computed, PackPart) else values


def _own_tokens(model: nn.Module, batch: PackedBatch) -> PackedBatch | PackPart:
    """What this process computes of a batch: all of it, or its part where a context group computes it together."""
    context = getattr(model, "context", WHOLE_PACKS)
    if context.size == 1:
        return batch
    part = batch.part(context.rank, context.size)
    if isinstance(part.layout, SlicedLayout):
        part.layout.context = context
    return part


def _packed_inputs(batch: PackedBatch | PackPart) -> dict[str, Any]:
    """The arguments of a forward of the packed tokens."""
    # Four dimensions, so that transformers builds no mask of its own: tree attention reads the layout instead.
    mask = batch.input_ids.new_zeros((1, 1, 1, 1))
    # Some models hand on nothing else to their attention.
    mask.trie = batch.layout
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "attention_mask": mask,
        "trie": batch.layout,
        "use_cache": False,
    }


def _head_index(model: nn.Module, positions: Tensor) -> Tensor:
    """Positions as an index of the last hidden states, whose device is not that of the inputs if the model spans several."""
    return positions.cpu() if spans_devices(model) else positions


# ---- padded rows ----------------------------------------------------------------------------------------------------------


def _score_rows(model: nn.Module, batch: PackedBatch, numbers: Sequence[int], collision: bool = False) -> Sequence[Tensor]:
    """Of each of some responses `scored_tokens`, with one row for it after its prompt, padded on the right.

    The head computes the positions between the first and the last one that is scored in any row.
    """
    host = batch.on_host
    of_response = numpy.split(host.scored_positions.numpy(), numpy.cumsum(host.response_lengths.numpy())[:-1])
    positions = [of_response[number] for number in numbers]
    first, last = min(own.min() for own in positions), max(own.max() for own in positions)
    # Where each response's scored tokens lie among those that the head computes, row by row.
    places = numpy.concatenate([own - first + row * (last - first + 1) for row, own in enumerate(positions)])
    input_ids, attention_mask, places = _padded_rows(batch, numbers, torch.from_numpy(places))
    # Position i predicts token i + 1. Tokens that do not count are scored as well, since logits would have to be copied.
    logits = _logits_at(model, input_ids, attention_mask, torch.arange(first - 1, last, device=input_ids.device))
    values = score_tokens(logits.flatten(0, 1), input_ids[:, first : last + 1].flatten(), collision)
    return _to_float64(values[places]).split([len(own) for own in positions])


def _value_rows(model: nn.Module, batch: PackedBatch, numbers: Sequence[int]) -> Sequence[Tensor]:
    """Of each of some responses its value [1], with one row for it after its prompt, padded on the right."""
    input_ids, attention_mask, _ = _padded_rows(batch, numbers)
    before = torch.arange(len(input_ids), device=input_ids.device) * input_ids.shape[1]
    last_tokens = before + attention_mask.sum(1) - 1
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, values_at=last_tokens).split(1)


def _logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits [R, len(positions), V] at these positions of every row; the head skips all others where the model supports it."""
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if _has_logits_to_keep(type(model)):
        return model(**arguments, logits_to_keep=_head_index(model, positions)).logits
    return model(**arguments).logits[:, positions]


@cache
def _has_logits_to_keep(model_class: type[nn.Module]) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def _padded_rows(batch: PackedBatch, numbers: Sequence[int], places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and attention mask of some responses, each [len(numbers), L]: a row for each after its prompt.

    Padding is masked by length, never by a token's id. places: further indices of the host, which reach the device with those
    of the rows, in one copy that the host does not wait for.
    """
    paths = [torch.from_numpy(batch.trie.path(number)) for number in numbers]
    indices = {
        "rows": pad_sequence(paths, batch_first=True),
        "mask": pad_sequence([torch.ones_like(path) for path in paths], batch_first=True),
        "places": torch.empty(0, dtype=torch.long) if places is None else places,
    }
    rows, mask, places = StagedTensors.of(indices).to(batch.input_ids.device).values()
    return batch.input_ids[rows] * mask, mask, places


# ---- the reference ------------------------------------------------------------------------------------------------------


class LiveReference:
    """A reference that computes log-probs when asked: a frozen model, or the policy without its trained adapter.

    Its own model changes only in `move_towards`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.as_reference = reference_mode if has_adapter(model) else nullcontext

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> Tensor:
        """Log-prob of each response of a batch: [R] float32."""
        with self.as_reference(self.model):
            return response_scores(self.model, batch)

    @torch.no_grad()
    def with_tokens(self, batch: PackedBatch) -> tuple[Tensor, TokenLogps]:
        """Log-probs of each response [R] and of its tokens."""
        with self.as_reference(self.model):
            values = scored_tokens(self.model, batch)
        return _sum_by_response(values, batch), TokenLogps(values[:, 0], batch.scored_responses)

    @torch.no_grad()
    def move_towards(self, policy: nn.Module, share: float) -> None:
        """Move each weight in place by `share` of the difference to the policy's; each rank moves its shards."""
        for model in (self.model, policy):
            reshard(model)
        for mine, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
            mine = to_local(mine)
            mine.lerp_(to_local(theirs).to(mine), share)


class RememberedReference:
    """A reference that does not move, and computes the log-probs of the batches of an evaluation once: a float per response.

    `restart` begins an evaluation, all of which have the same batches in the same order. Every rank has as many of them, so
    that all compute, or none.
    """

    def __init__(self, reference: Callable[[PackedBatch], Tensor]):
        self.reference = reference
        self.of_batches: list[Tensor] = []
        self.next = 0

    def restart(self) -> None:
        """Begin an evaluation."""
        self.next = 0

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Log-prob of each response of the next batch: [R] float32, on the batch's device."""
        if self.next == len(self.of_batches):
            self.of_batches.append(self.reference(batch).cpu())
        self.next += 1
        return self.of_batches[self.next - 1].to(batch.response_rows.device)


class CachedReference:
    """A reference that looks up its log-probs, computed beforehand for all responses of the run's data: [rows] float32.

    The last bits of a log-prob depend on the other responses of its pack. Where a response occurs in several packs with
    different bits, `of_packs` holds the values of such a pack by the rows of its responses.
    """

    def __init__(self, logps: Tensor, of_packs: dict[tuple[int, ...], Tensor] | None = None):
        self.logps = logps
        self.of_packs = of_packs or {}

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Log-prob of each response of a batch: [R] float32, on the batch's device."""
        rows = batch.response_rows
        if self.of_packs and (exact := self.of_packs.get(tuple(rows.tolist()))) is not None:
            return exact.to(rows.device)
        self.logps = self.logps.to(rows.device)
        return self.logps[rows]
