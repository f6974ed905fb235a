"""The token budget: how many packed tokens are computed at once."""

import torch
from torch import nn

from preference_training.batching.packing import TokenBudget
from preference_training.core.process_group import Ranks, local_world_size, to_local
from preference_training.modeling.loading import build_on_meta
from preference_training.modeling.state import compute_device, free_memory
from preference_training.modeling.value_head import has_value_head


def token_budget(
    model: nn.Module,
    limit: int | None = None,
    device: torch.device | None = None,
    free: int | None = None,
    weight_copies: int = 3,
) -> TokenBudget:
    """The budget of packed tokens: `limit` if given, else as many as fit into the free memory of a device.

    device: where the model is or will be; None is its current one. free: its free bytes; None measures them. weight_copies: the
    memory of gradients and optimizer, in multiples of that of the trained weights. A GPU gets faster with every token; a CPU
    does not beyond a thousand or so: packs of at most 1,536 tokens were as fast as packs of any size (58M Llama, two cores,
    1,442 tokens a step), with 0.82 of the peak memory.
    """
    if limit is not None:
        return TokenBudget(limit, limit)
    moves = device is not None and device != compute_device(model)
    device = device or compute_device(model)
    limit = round_to_two_bits(_tokens_that_fit(model, device, free, moves, weight_copies))
    return TokenBudget(limit, limit if device.type != "cpu" else min(limit, 1536))


def common_budget(budget: TokenBudget, ranks: Ranks) -> TokenBudget:
    """The smallest budget of all processes, which must cut their micro-batches alike.

    Sharded weights are gathered once for each pack, so that several ranks use few packs, as large as memory allows. The
    processes of a context group compute a pack together, which may be as many times as large.
    """
    parts = ranks.context.size
    limit = ranks.all_reduce_min(budget.limit)
    soft = budget.soft_limit if ranks.size * parts == 1 else limit
    return TokenBudget(limit, soft).over(parts)


def untrained_budget(config, tokenizer, device: torch.device) -> TokenBudget:
    """The budget of a configuration's model on a device, without loading its weights."""
    model = build_on_meta(config.model, tokenizer, config.cache_dir)
    return token_budget(model, config.max_tokens_per_microbatch, device, weight_copies=config.weight_copies)


def round_to_two_bits(number: int) -> int:
    """A number rounded down to its two leading binary digits, so that similar amounts of free memory give the same budget.

    The budget determines the packs of a run, and these the last bits of its log-probs.
    """
    shift = max(0, number.bit_length() - 2)
    return number >> shift << shift


def _tokens_that_fit(model: nn.Module, device: torch.device, free: int | None, moves: bool, weight_copies: int) -> int:
    """The packed tokens that fit into one forward and backward pass on a device; at least 512.

    moves: the weights are still to be moved there. A conservative estimate: half of the memory left by gradients and optimizer,
    divided by the activations of a gated transformer block and three copies of the logits, if any, for each token.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # Some models have a width for each layer.
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    per_token = layers * (16 * hidden + 4 * inner) * model.dtype.itemsize + 3 * 4 * (
        0 if has_value_head(model) else config.vocab_size
    )
    # Only weights on this device take of its memory.
    trained = [weight for weight in model.parameters() if weight.requires_grad and (moves or weight.device == device)]
    # Of sharded weights, this process's shards.
    shards = [to_local(weight) for weight in trained]
    weights = sum(shard.numel() * shard.element_size() for shard in shards)
    # Weights that are still to be moved will take of what is free now.
    to_come = weights if moves else 0
    if free is None:
        free = free_memory(device) // (1 if device.type == "cuda" else local_world_size())
    return max(512, int((free - to_come - weight_copies * weights) / 2 / per_token))
