"""What a model's configuration says of its experts, against what a run asks for: refused, or said before anything is loaded."""

from preference_training.core.errors import UserError
from preference_training.modeling.experts.routers import num_chosen, num_experts

# What configurations call the coefficient of their load-balancing loss. Only a run's own has an effect.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_alpha")
# The method by which routers choose in configurations of DeepSeek-V3 and its kin.
BALANCED_BY_BIAS = "noaux_tc"
# Of those, by model_type, that do not say so.
BIASED = ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "dots1", "lfm2_moe", "minimax_m2", "nemotron_h")


def describe_balancing(config, coefficient: float | None) -> list[str]:
    """Lines for the user: whether the load-balancing loss is on. Raises UserError where it is asked for without experts.

    config: of transformers. coefficient: `model.router_aux_loss`.
    """
    text, experts = config.get_text_config(), num_experts(config)
    if coefficient and experts is None:
        raise UserError(
            f"model.router_aux_loss: found {coefficient:g}, but {config.model_type} has no experts to balance. Set it to null."
        )
    lines = []
    if coefficient:
        lines.append(
            f"model.router_aux_loss: {coefficient:g} times the load-balancing loss of {experts} experts, {num_chosen(config)} "
            "a token, over the whole batch; a batch of several packs takes one more forward"
        )
    else:
        named = [key for key in COEFFICIENTS if getattr(text, key, None)]
        lines += [
            f"model: {key} ({getattr(text, key)}) has no effect by itself: model.router_aux_loss adds the load-balancing loss"
            for key in named
        ]
    if coefficient and (text.model_type in BIASED or getattr(text, "topk_method", None) == BALANCED_BY_BIAS):
        lines.append(
            f"model: {text.model_type} was balanced by a bias of each expert, which training leaves as it is here; the loss is "
            "of the shares of its sigmoid scores"
        )
    return lines
