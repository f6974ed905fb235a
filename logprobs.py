"""From a model and a packed batch to the log-prob of every response.

Shapes: R responses, L tokens of the longest row, V vocabulary. Position i of a row's logits holds the prediction of token
i + 1, so a response is scored from the prompt's last position on.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from batches import PackedBatch

# Label of a position that is not scored: cross_entropy's default.
NOT_SCORED = -100


def response_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Log-prob of each response given its prompt, summed over the response's tokens: [R] float32, in the batch's order.

    Every response is a row of its own behind its prompt, padded at the end. The vocabulary head runs from the shortest
    prompt's last position on; the softmax is computed in float32.
    """
    input_ids, labels, attention_mask = _padded_rows(batch)
    first = min(tree.prompt_length for tree in batch.trees) - 1
    positions = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device)
    logits = _logits_at(model, input_ids, attention_mask, positions)
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels[:, first + 1 :].flatten(), reduction="none")
    return -losses.view(len(labels), -1).sum(1)


def _logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits [R, len(positions), V] at the given positions of every row; the head runs only there where the model can."""
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**arguments, logits_to_keep=positions).logits
    return model(**arguments).logits[:, positions]


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
