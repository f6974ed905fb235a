"""What a run says of the precision in which its weights are updated."""

from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import SPACINGS


def precision_notices(config: RunConfig) -> list[str]:
    """Notices about weights that are trained in low precision; empty where there are none."""
    dtype, lines = config.model.policy_dtype, []
    if config.master_weights is True and not config.model.trains_low_precision:
        why = "an adapter's weights are float32" if dtype in SPACINGS else f"model.policy_dtype={dtype}"
        lines.append(f"master_weights: none are needed: {why}")
    if config.model.trains_low_precision:
        lines.append(f"master_weights: {_chosen_precision(config)}")
    share = config.loss.reference_update_share
    if share is not None and share < 0.5 and config.model.reference_dtype in SPACINGS:
        lines.append(
            f"loss.reference_update_share: with {share:g} a reference in {config.model.reference_dtype} follows the policy "
            f"only where they differ by more than {0.5 / share:.2g} times the distance of neighboring numbers: smaller moves "
            "are rounded away. Not so with a share of 0.5 or more, or model.policy_dtype=float32 (and "
            "model.autocast_dtype=bfloat16)"
        )
    return lines


def averages_notice(config: RunConfig) -> str | None:
    """The notice for a run that evaluates and saves other weights than it trains; None for any other."""
    if not config.averages_weights:
        return None
    saved = "is what is evaluated, sampled from and saved"
    if config.ema_decay is None:
        return f"optimizer: {config.optimizer} averages the weights over all updates; the average {saved}"
    updates = f"about the last {1 / (1 - config.ema_decay):,.3g} updates"
    where = "CPU memory" if config.trainer.cpu_offload else "the memory of the weights' device"
    return f"ema_decay: an average of the weights over {updates} {saved}; it takes 4 bytes per trained weight of {where}"


def _chosen_precision(config: RunConfig) -> str:
    dtype = config.model.policy_dtype
    kept = config.keeps_master_weights
    copies, none = f"the optimizer keeps float32 copies of the {dtype} weights", f"none, {dtype} weights are updated directly"
    what = copies if kept else none
    if config.master_weights != "auto":
        return what
    limit = config.model.smallest_kept_lr
    if config.averages_weights:
        return f"{what}: an average of {dtype} weights would be rounded away"
    if not config.optimizer_facts.updates_by_lr:
        return (
            f"{what}: {config.optimizer}'s updates may be too small for {dtype} (master_weights=false does without, in less "
            "memory)"
        )
    if kept:
        return f"{what}: updates of lr {config.lr:g} would be rounded away (master_weights=false does without, in less memory)"
    return f"{what}: updates of lr {config.lr:g} are not rounded away in weights of ordinary size (limit: {limit:.1g})"
