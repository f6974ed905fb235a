"""Log-probs of responses under a model, and the reference that gives them without gradients.

Shapes: T packed tokens, S scored tokens (of all responses together), R responses, L tokens of the longest padded row, H hidden
size, V vocabulary. Position i of the logits predicts token i + 1, so a response is scored from the last position of its prompt
on.
"""

import inspect
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from preference_training.batching.packing import PackedBatch
from preference_training.core.process_group import reshard, to_local
from preference_training.modeling.adapters import has_adapter, reference_mode
from preference_training.modeling.prefix_sharing.tree_attention import RESPONSE_TREES
from preference_training.modeling.state import spans_devices

# The most float32 logits in memory at once. Unit: bytes.
MAX_LOGITS_BYTES = 2**29
# Label of positions that are not scored: cross_entropy's default.
IGNORE_INDEX = -100


def response_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Log-prob of each response given its prompt, summed over its tokens: [R] float32, in the batch's order.

    A model with tree attention computes every prompt once; any other computes padded rows. A model with an attribute
    `autocast_dtype` runs under autocast in that dtype; the softmax is always in float32.
    """
    compute = tree_logps if model.config._attn_implementation == RESPONSE_TREES else padded_logps
    dtype = getattr(model, "autocast_dtype", None)
    with torch.autocast(batch.input_ids.device.type, dtype=dtype, enabled=dtype is not None):
        return compute(model, batch)


def tree_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`response_logps` in one forward of the packed tokens; the head computes the scored positions only."""
    head = model.get_output_embeddings()
    scores_in_head = isinstance(head, ScoringHead)
    if scores_in_head:
        head.scored_ids = batch.scored_ids
    try:
        output = _packed_forward(model, batch)
    finally:
        if scores_in_head:
            head.scored_ids = None
    token_logps = _to_float64(output[:, 0] if scores_in_head else score_tokens(output, batch.scored_ids))
    return token_logps.new_zeros(len(batch.response_lengths)).index_add(0, batch.scored_responses, token_logps).float()


def _packed_forward(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The output of the model's head at the scored positions: [S, V] logits, or [S, 1] log-probs of a ScoringHead."""
    return model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        # Four dimensions, so that transformers builds no mask of its own: tree attention reads the layout instead.
        attention_mask=batch.input_ids.new_zeros((1, 1, 1, 1)),
        response_trees=batch.layout,
        logits_to_keep=_head_index(model, batch.predicted_at),
        use_cache=False,
    ).logits[0]


def _head_index(model: nn.Module, positions: Tensor) -> Tensor:
    """Positions as an index of the last hidden states, whose device is not that of the inputs if the model spans several."""
    return positions.cpu() if spans_devices(model) else positions


def _to_float64(token_logps: Tensor) -> Tensor:
    """Token log-probs in float64 where the device supports it, so that their sum is exact to float32."""
    return token_logps if token_logps.device.type == "mps" else token_logps.double()


def score_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-prob of each token [S] under its logits [S, V], in float32; 0 where the id is IGNORE_INDEX."""
    return -F.cross_entropy(logits.float(), ids, reduction="none")


class ScoringHead(nn.Linear):
    """A language-model head that, given the tokens to score, returns their log-probs instead of logits.

    A model's head becomes one by a change of class (`head.__class__ = ScoringHead`), which leaves weights, names and ties as
    they are. Logits are computed in chunks of at most MAX_LOGITS_BYTES and, where there are several chunks, recomputed in the
    backward pass, so that their memory does not grow with the batch.
    """

    scored_ids: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [1, S, H] to log-probs [1, S, 1] of `scored_ids` [S]; to logits where there are none."""
        if self.scored_ids is None:
            return super().forward(hidden)
        size = max(1, MAX_LOGITS_BYTES // (4 * self.out_features))
        # In a model that spans devices, the head is not on the device of the inputs.
        ids = self.scored_ids.to(hidden.device)
        if len(ids) <= size:
            logps = [self._score(hidden[0], ids)]
        else:
            chunks = zip(hidden[0].split(size), ids.split(size), strict=True)
            logps = [checkpoint(self._score, states, ids, use_reentrant=False) for states, ids in chunks]
        # A copy: FSDP registers a hook on the model's output, which a view modified in place would lose.
        return torch.cat([part[:, None] for part in logps])[None].clone()

    def _score(self, states: Tensor, ids: Tensor) -> Tensor:
        return score_tokens(F.linear(states, self.weight, self.bias), ids)


def padded_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`response_logps` with one row for each response after its prompt, padded on the right.

    The head computes positions from the last one of the shortest prompt on.
    """
    input_ids, labels, attention_mask = _padded_rows(batch)
    first = min(tree.prompt_length for tree in batch.trees) - 1
    positions = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device)
    logits = _logits_at(model, input_ids, attention_mask, positions)
    token_logps = _to_float64(score_tokens(logits.flatten(0, 1), labels[:, first + 1 :].flatten()))
    return token_logps.view(len(labels), -1).sum(1).float()


def _logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits [R, len(positions), V] at these positions of every row; the head skips all others where the model supports it."""
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if _has_logits_to_keep(type(model)):
        return model(**arguments, logits_to_keep=_head_index(model, positions)).logits
    return model(**arguments).logits[:, positions]


@cache
def _has_logits_to_keep(model_class: type[nn.Module]) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def _padded_rows(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and attention mask, each [R, L]: one row for each response after its prompt, padded on the right.

    Labels are IGNORE_INDEX outside the response. Padding is masked by length, never by a token's id.
    """
    rows, labels = [], []
    for tree in batch.trees:
        prompt = batch.input_ids[tree.start : tree.start + tree.prompt_length]
        for start, length in zip(tree.response_starts, tree.response_lengths, strict=True):
            response = batch.input_ids[start : start + length]
            rows.append(torch.cat([prompt, response]))
            labels.append(torch.cat([torch.full_like(prompt, IGNORE_INDEX), response]))
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return (
        pad_sequence(rows, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        attention_mask,
    )


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
            return response_logps(self.model, batch)

    @torch.no_grad()
    def move_towards(self, policy: nn.Module, share: float) -> None:
        """Move each weight in place by `share` of the difference to the policy's; each rank moves its shards."""
        for model in (self.model, policy):
            reshard(model)
        for mine, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
            mine = to_local(mine)
            mine.lerp_(to_local(theirs).to(mine), share)


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
