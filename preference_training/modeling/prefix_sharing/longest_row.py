"""Rotary embeddings that depend on the longest row of a batch: LongRoPE and dynamic NTK.

Beyond a limit they choose frequencies by the largest position of a forward, so a sequence has other log-probs beside a longer
one, packed or padded.
"""

from torch import nn

from preference_training.batching.tries import Trie


def frequency_limits(model: nn.Module) -> dict[str, int]:
    """The lengths beyond which a model's rotary embeddings look at the longest row, by kind: longrope, dynamic."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    found: dict[str, int] = {}
    for rope in [parameters] if "rope_type" in parameters else filter(None, parameters.values()):
        kind = rope.get("rope_type", "") if isinstance(rope, dict) else ""
        if kind == "longrope":
            found[kind] = rope["original_max_position_embeddings"]
        elif "dynamic" in kind:
            found["dynamic"] = config.max_position_embeddings
    return found


def sequences_are_independent(model: nn.Module, trie: Trie) -> bool:
    """Whether each sequence has the frequencies in one forward that it has alone."""
    lengths = [length for _, length in trie.ends]
    limits = frequency_limits(model)
    within = all(max(lengths) <= limit for limit in limits.values())
    # LongRoPE has a second set of frequencies for all longer rows, dynamic NTK one for each length.
    return within or ("dynamic" not in limits and min(lengths) > limits["longrope"])


def forget_longest_row(model: nn.Module) -> None:
    """Reset dynamic NTK frequencies, which otherwise stay those of the longest row so far."""
    if "dynamic" not in frequency_limits(model):
        return
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.register_buffer("inv_freq", module.original_inv_freq.to(module.inv_freq.device), persistent=False)
