"""From a model and a packed batch to the log-prob of every response.

Shapes: T packed tokens, S scored tokens (all responses' together), R responses, L tokens of the longest padded row,
V vocabulary. Position i of the logits holds the prediction of token i + 1, so a response is scored from its prompt's last
position on.
"""

import inspect
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from preference_training.batching.batches import PackedBatch
from preference_training.core.process_group import reshard, to_local
from preference_training.modeling.adapters import as_it_began, has_adapter
from preference_training.modeling.state import several_devices
from preference_training.modeling.tree_attention import RESPONSE_TREES

# Float32 logits that are held at once.
LOGITS_BYTES = 2**29
# Label of a position that is not scored: cross_entropy's default.
NOT_SCORED = -100


def response_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Log-prob of each response given its prompt, summed over the response's tokens: [R] float32, in the batch's order.

    A model that attends over response trees computes every prompt once; another one gets padded rows. A model with an
    attribute `autocast_dtype` computes its products in that dtype; the softmax is in float32 whatever happens.
    """
    compute = tree_logps if model.config._attn_implementation == RESPONSE_TREES else padded_logps
    dtype = getattr(model, "autocast_dtype", None)
    with torch.autocast(batch.input_ids.device.type, dtype=dtype, enabled=dtype is not None):
        return compute(model, batch)


def tree_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`response_logps` in one forward of the packed tokens; the vocabulary head runs at the scored positions only."""
    head = model.get_output_embeddings()
    scores = isinstance(head, ScoringHead)
    if scores:
        head.scored_ids = batch.scored_ids
    try:
        output = _packed_forward(model, batch)
    finally:
        if scores:
            head.scored_ids = None
    token_logps = _wide(output[:, 0] if scores else logps_of_tokens(output, batch.scored_ids))
    return token_logps.new_zeros(len(batch.response_lengths)).index_add(0, batch.response_of, token_logps).float()


def _packed_forward(model: nn.Module, batch: PackedBatch) -> Tensor:
    """What the model's head gives at the scored positions: [S, V] logits, or [S, 1] log-probs of a ScoringHead."""
    return model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        # Four dimensions: transformers then builds no mask of its own. Attention reads the layout in its place.
        attention_mask=batch.input_ids.new_zeros((1, 1, 1, 1)),
        response_trees=batch.layout,
        logits_to_keep=_index(model, batch.predicted_at),
        use_cache=False,
    ).logits[0]


def _index(model: nn.Module, places: Tensor) -> Tensor:
    """Places as the model indexes its last states by them, which are on another device than its inputs if it has several."""
    return places.cpu() if several_devices(model) else places


def _wide(token_logps: Tensor) -> Tensor:
    """Token log-probs in float64 where the device has it: hundreds of them add up to a sum that float32 just holds."""
    return token_logps if token_logps.device.type == "mps" else token_logps.double()


def logps_of_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-prob of each token [S] under its logits [S, V], in float32; 0 where the id is NOT_SCORED."""
    return -F.cross_entropy(logits.float(), ids, reduction="none")


class ScoringHead(nn.Linear):
    """A vocabulary head that, told the tokens to score, gives their log-probs in place of all logits.

    A model's own head becomes one by a change of class (`head.__class__ = ScoringHead`): weights, names and copies stay what
    they were. Logits are made in pieces of at most LOGITS_BYTES and, beyond one piece, made again in the backward pass, so
    that their memory does not grow with the batch.
    """

    scored_ids: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [1, S, H] to log-probs [1, S, 1] of `scored_ids` [S]; to logits where there are none."""
        if self.scored_ids is None:
            return super().forward(hidden)
        size = max(1, LOGITS_BYTES // (4 * self.out_features))
        # The head of a model over several devices is not where its inputs are.
        ids = self.scored_ids.to(hidden.device)
        if len(ids) <= size:
            logps = [self._score(hidden[0], ids)]
        else:
            pieces = zip(hidden[0].split(size), ids.split(size), strict=True)
            logps = [checkpoint(self._score, states, ids, use_reentrant=False) for states, ids in pieces]
        # No view: FSDP hangs a hook on a model's output, which one that is changed in place would lose.
        return torch.cat([part[:, None] for part in logps])[None].clone()

    def _score(self, states: Tensor, ids: Tensor) -> Tensor:
        return logps_of_tokens(F.linear(states, self.weight, self.bias), ids)


def padded_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`response_logps` with a row for each response behind its prompt, padded at the end.

    The vocabulary head runs from the shortest prompt's last position on.
    """
    input_ids, labels, attention_mask = _padded_rows(batch)
    first = min(tree.prompt_length for tree in batch.trees) - 1
    positions = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device)
    logits = _logits_at(model, input_ids, attention_mask, positions)
    token_logps = _wide(logps_of_tokens(logits.flatten(0, 1), labels[:, first + 1 :].flatten()))
    return token_logps.view(len(labels), -1).sum(1).float()


def _logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits [R, len(positions), V] at the given positions of every row; the head runs only there where the model can."""
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if _keeps_chosen_logits(type(model)):
        return model(**arguments, logits_to_keep=_index(model, positions)).logits
    return model(**arguments).logits[:, positions]


@cache
def _keeps_chosen_logits(model_class: type) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def _padded_rows(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """One row per response, its prompt before it, padded behind: token ids, labels and attention mask, each [R, L].

    Labels are NOT_SCORED but for the response. What is padding is known from the lengths, never from a token's id.
    """
    rows, labels = [], []
    for tree in batch.trees:
        prompt = batch.input_ids[tree.start : tree.start + tree.prompt_length]
        for start, length in zip(tree.response_starts, tree.response_lengths, strict=True):
            response = batch.input_ids[start : start + length]
            rows.append(torch.cat([prompt, response]))
            labels.append(torch.cat([torch.full_like(prompt, NOT_SCORED), response]))
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return (
        pad_sequence(rows, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=NOT_SCORED),
        attention_mask,
    )


# ---- the reference ------------------------------------------------------------------------------------------------------


class LiveReference:
    """A frozen model that scores each batch when it is asked, or a policy with an adapter as it began.

    A model of its own changes only where it is told to follow the policy.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.as_reference = as_it_began if has_adapter(model) else nullcontext

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> Tensor:
        """Log-prob of each response of a batch: [R] float32."""
        with self.as_reference(self.model):
            return response_logps(self.model, batch)

    @torch.no_grad()
    def move_towards(self, policy: nn.Module, share: float) -> None:
        """Move each weight by `share` of its way to the policy's, in place; of a sharded one each process its own part."""
        for model in (self.model, policy):
            reshard(model)
        for mine, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
            mine = to_local(mine)
            mine.lerp_(to_local(theirs).to(mine), share)


class CachedReference:
    """The reference's log-probs of all responses of the run's data, computed before: [rows] float32.

    The last bits of a log-prob depend on what is computed beside it. `of_pieces` has the values of those pieces in which a
    response was computed that another one holds too, and gave other bits there: by the rows of their responses.
    """

    def __init__(self, logps: Tensor, of_pieces: dict[tuple[int, ...], Tensor] | None = None):
        self.logps = logps
        self.of_pieces = of_pieces or {}

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Log-prob of each response of a batch: [R] float32, on the batch's device."""
        rows = batch.response_rows
        if self.of_pieces and (own := self.of_pieces.get(tuple(rows.tolist()))) is not None:
            return own.to(rows.device)
        self.logps = self.logps.to(rows.device)
        return self.logps[rows]
