"""Whether a model computes each prompt once for all its responses, proved at load."""

from torch import nn

from preference_training.core.errors import UserError
from preference_training.modeling.logprobs import ScoringHead
from preference_training.modeling.prefix_sharing.proof import find_sharing_fault
from preference_training.modeling.prefix_sharing.tree_attention import RESPONSE_TREES, register_tree_attention


def share_prefixes(model: nn.Module, mode: str) -> bool:
    """Let `model` compute each prompt once for all its responses, if it proves that it can. Returns whether it does.

    mode: auto (padded rows where the proof fails, said in one line), on (a failed proof is a UserError), off.
    """
    if mode == "off":
        return False
    register_tree_attention()
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = ScoringHead
        if _fault_of_tree_forward(model) is None:
            model.set_attn_implementation(RESPONSE_TREES)
            return True
        # A model may change its logits behind the head, by a soft-cap say.
        head.__class__ = nn.Linear
    fault = _fault_of_tree_forward(model)
    if fault is None:
        model.set_attn_implementation(RESPONSE_TREES)
        return True
    if mode == "on":
        raise UserError(f"prefix_sharing: found on, but {type(model).__name__} cannot: {fault}. Set it to auto or off.")
    print(f"prefix sharing: off, padded rows instead: {type(model).__name__} cannot: {fault}", flush=True)
    return False


def _fault_of_tree_forward(model: nn.Module) -> str | None:
    """Why a model cannot share prefixes with the head that it has now; None where it can."""
    return find_sharing_fault(model)


def scores_in_head(model: nn.Module) -> bool:
    """Whether a model's head gives log-probs of chosen tokens, so that logits are there in chunks only."""
    return isinstance(model.get_output_embeddings(), ScoringHead)


def attend_over_trees(model: nn.Module, scoring_head: bool = True) -> None:
    """What `share_prefixes` does to a model, without its proof: for a model without numbers, or a twin of a proved one."""
    register_tree_attention()
    head = model.get_output_embeddings()
    if scoring_head and type(head) is nn.Linear:
        head.__class__ = ScoringHead
    model.set_attn_implementation(RESPONSE_TREES)
