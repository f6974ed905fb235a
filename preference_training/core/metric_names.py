"""The names of a run's metrics: in metrics.jsonl, in dashboards, and as `objective`."""

from collections.abc import Mapping

TRAIN, EVAL = "train", "eval"
CHOSEN, REJECTED = "chosen", "rejected"


def loss(split: str) -> str:
    """The mean loss of a split, "train" or "eval"."""
    return f"loss/{split}"


def reward(split: str, kind: str) -> str:
    """A mean of rewards: "chosen", "rejected", "accuracies" or "margins"."""
    return f"rewards_{split}/{kind}"


def logps(split: str, kind: str) -> str:
    """The mean log-prob of responses: "chosen" or "rejected"."""
    return f"logps_{split}/{kind}"


TRAIN_LOSS, EVAL_LOSS = loss(TRAIN), loss(EVAL)
TRAIN_ACCURACY, EVAL_ACCURACY = reward(TRAIN, "accuracies"), reward(EVAL, "accuracies")
TRAIN_MARGIN, EVAL_MARGIN = reward(TRAIN, "margins"), reward(EVAL, "margins")
TRAIN_CHOSEN_REWARD, TRAIN_REJECTED_REWARD = reward(TRAIN, CHOSEN), reward(TRAIN, REJECTED)
EVAL_CHOSEN_REWARD, EVAL_REJECTED_REWARD = reward(EVAL, CHOSEN), reward(EVAL, REJECTED)
TRAIN_CHOSEN_LOGPS, TRAIN_REJECTED_LOGPS = logps(TRAIN, CHOSEN), logps(TRAIN, REJECTED)
EVAL_CHOSEN_LOGPS, EVAL_REJECTED_LOGPS = logps(EVAL, CHOSEN), logps(EVAL, REJECTED)

# Where a run is.
COUNTERS = "counters/"
EXAMPLES, UPDATES, TOKENS = f"{COUNTERS}examples", f"{COUNTERS}updates", f"{COUNTERS}tokens"
# How many prompts an evaluation's held-out numbers are of.
HELD_OUT_PROMPTS = f"{COUNTERS}held_out_prompts"

GRAD_NORM, LEARNING_RATE, EPOCH = "grad_norm", "lr", "epoch"
# Seconds since the run's start, without those between a stop and its resume.
TIME, MEMORY = "time", "memory_gib"
# The share of the tokens of all rows that prefix sharing did not have to compute.
TOKENS_SAVED = "tokens_saved"
EXAMPLES_PER_SECOND, TOKENS_PER_SECOND = "examples_per_second", "tokens_per_second"
# Model FLOPs utilization: the share of the devices' peak arithmetic that a step uses; where their peak is known.
MFU = "mfu"
# Measured by a clock or the machine: differs between runs that are otherwise the same.
MEASURED = (EXAMPLES_PER_SECOND, TOKENS_PER_SECOND, MFU, MEMORY, TIME)

# Of the routers of a mixture of experts, over a batch: the load-balancing loss; the tokens of the busiest expert as a
# multiple of the mean, in the worst layer; the entropy of a token's routing as a share of its maximum, a mean over layers; the
# experts of all layers that no token was sent to. Of single layers: NAME/LAYER.
EXPERTS = "experts/"
AUX_LOSS, MAX_LOAD = f"{EXPERTS}aux_loss", f"{EXPERTS}max_load"
ROUTING_ENTROPY, DEAD_EXPERTS = f"{EXPERTS}entropy", f"{EXPERTS}dead"

# Of beta-DPO's steps.
BETA_USED, KEPT_FRACTION = "beta_DPO/beta_used", "beta_DPO/kept_fraction"
GAP_MEAN, GAP_STD = "beta_DPO/gap_mean", "beta_DPO/gap_std"
# Of its evaluations: the mean loss at the beta that training would take for the held-out pairs. Those without it, of an
# earlier version, have EVAL_LOSS at the beta in force.
LOSS_AT_BETA_USED = "beta_DPO/loss_eval_at_beta_used"

# Of a loop of rounds: how many rounds a policy was trained in; what it does on held-out prompts; what is sampled from it next.
ROUNDS = "rounds/"
ROUND = f"{COUNTERS}round"
HELD_OUT_REWARD, HELD_OUT_WIN_RATE = f"{ROUNDS}reward_held_out", f"{ROUNDS}win_rate_held_out"
HELD_OUT_SECOND_WIN_RATE = f"{ROUNDS}second_win_rate_held_out"
HELD_OUT_LENGTH, HELD_OUT_KL = f"{ROUNDS}length_held_out", f"{ROUNDS}kl_held_out"
SAMPLES_REWARD, SAMPLES_LENGTH = f"{ROUNDS}reward_samples", f"{ROUNDS}length_samples"
DISTINCT, SIMILARITY = f"{ROUNDS}distinct_2", f"{ROUNDS}similarity"
PAIRS, RECORDS = f"{ROUNDS}pairs", f"{ROUNDS}records"

# What follows a held-out metric's name: the ends of its interval; and its change since before training, with an interval.
LOW, HIGH, CHANGE = "/low", "/high", "/change"


def change(metric: str) -> tuple[str, str, str]:
    """The names of a held-out metric's change since before training, and of its interval's ends."""
    return f"{metric}{CHANGE}", f"{metric}{CHANGE}{LOW}", f"{metric}{CHANGE}{HIGH}"


def smaller_is_better(metric: str) -> bool:
    """Whether a held-out metric is to be small; all but losses are to be large."""
    return metric.startswith("loss")


def loss_is_at_beta_used(held_out: Mapping[str, object] | None) -> bool:
    """Whether an evaluation's metrics are of an earlier version, whose loss/eval of beta-DPO was at the beta in force."""
    return bool(held_out) and BETA_USED in held_out and LOSS_AT_BETA_USED not in held_out
