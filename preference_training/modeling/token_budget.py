"""How many packed tokens a micro-batch may hold."""

import torch
from torch import nn

from preference_training.batching.batches import TokenBudget
from preference_training.configuration.validation import times_beside_weights
from preference_training.core.process_group import Ranks, local_world_size, to_local
from preference_training.modeling.loading import build_untrained
from preference_training.modeling.state import compute_device, free_memory


def token_budget(
    model: nn.Module,
    limit: int | None = None,
    device: torch.device | None = None,
    free: int | None = None,
    beside_weights: int = 3,
) -> TokenBudget:
    """How many packed tokens to compute at once: up to `limit`, or as many as the free memory holds.

    device is the model's own, or where it will be; `free` its free bytes, None for what is free here and now; beside_weights:
    how many times the memory of the trained weights gradients and optimizer take. A GPU gets faster
    with every token. A CPU does not beyond a thousand or so: pieces of at most 1,536 were as fast as pieces of any size (58M
    Llama, two cores, 1,442 tokens a step), with 0.82 of the peak memory.
    """
    if limit is not None:
        return TokenBudget(limit, limit)
    moves = device is not None and device != compute_device(model)
    device = device or compute_device(model)
    limit = _two_bits(_tokens_that_fit(model, device, free, moves, beside_weights))
    return TokenBudget(limit, limit if device.type != "cpu" else min(limit, 1536))


def shared_budget(budget: TokenBudget, ranks: Ranks) -> TokenBudget:
    """The budget that every rank has room for: all must cut alike.

    For each piece sharded weights are gathered anew, so that several ranks have few pieces, as large as memory allows.
    """
    limit = ranks.all_reduce_min(budget.limit)
    return TokenBudget(limit, budget.comfortable if ranks.size == 1 else limit)


def untrained_budget(config, tokenizer, device: torch.device) -> TokenBudget:
    """The budget that a configuration's model will have on a device, found without its weights."""
    with torch.device("meta"):
        model = build_untrained(config.model, tokenizer, config.cache_dir)
    return token_budget(model, config.max_tokens_per_microbatch, device, beside_weights=times_beside_weights(config))


def _two_bits(number: int) -> int:
    """A number rounded down to its first two binary digits, so that it is the same where free memory is nearly the same.

    How a run's examples are packed depends on it, and the last bits of their log-probs depend on that.
    """
    lost = max(0, number.bit_length() - 2)
    return number >> lost << lost


def _tokens_that_fit(model: nn.Module, device: torch.device, free: int | None, moves: bool, beside_weights: int) -> int:
    """How many packed tokens one forward and backward may hold on a device; at least 512. moves: weights will come to it.

    An estimate on the safe side: half of what is left beside gradients and optimizer, over the activations of a gated
    transformer block and three copies of the logits for each token.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # Some have a width for each layer.
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    per_token = layers * (16 * hidden + 4 * inner) * model.dtype.itemsize + 3 * 4 * config.vocab_size
    # The room is that of one device, so what other devices hold does not count.
    trained = [weight for weight in model.parameters() if weight.requires_grad and (moves or weight.device == device)]
    # Of a weight that is split over processes, this one has a part.
    parts = [to_local(weight) for weight in trained]
    weights = sum(part.numel() * part.element_size() for part in parts)
    # Weights that are not there yet will take of what is free now.
    to_come = weights if moves else 0
    if free is None:
        free = free_memory(device) // (1 if device.type == "cuda" else local_world_size())
    return max(512, int((free - to_come - beside_weights * weights) / 2 / per_token))
