"""Monitors of training: each detects one kind of failure from the metrics of the steps, and warns once. They change nothing."""

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from preference_training.configuration.schema import RunConfig
from preference_training.core.metric_names import EXAMPLES, TOKENS_SAVED, TRAIN_ACCURACY, TRAIN_CHOSEN_LOGPS, TRAIN_LOSS
from preference_training.core.process_group import to_local
from preference_training.tracking.tracker import NoTracker, Tracker
from preference_training.training.optimizers.schedules import warmup_steps

# Steps that a mean is taken over, and after which it means something.
STEPS = 100
# How far the mean log-prob of chosen responses may fall below its start before a warning. Unit: nats.
COLLAPSE = 50.0
# Sampled values per weight.
VALUES = 1024
# Of the values that a step should change, the share below which a warning is given.
CHANGED = 1 / 3


def warmup_warning(warmup: int, steps: int, lr: float) -> str | None:
    """The warning for a warm-up that is not over before a run of so many steps is; None where it is."""
    if warmup < steps:
        return None
    share = steps / (warmup + 1)
    return (
        f"warm-up takes {warmup:,} steps, and the run has {steps:,}: the learning rate rises to {lr * share:.2g}, {share:.0%} "
        f"of lr={lr:g}, and the run will hardly learn. Set warmup_share=0.1, which is a tenth of any run, or warmup_steps=0."
    )


class TrainingMonitor:
    """Watches every step's metrics and warns. spike: how many times its running mean a loss may be; None switches that off."""

    def __init__(self, tracker: Tracker | NoTracker, spike: float | None = None):
        self.tracker, self.spike = tracker, spike
        self.newest: dict[str, deque[float]] = {
            name: deque(maxlen=STEPS) for name in (TRAIN_LOSS, TRAIN_CHOSEN_LOGPS, TRAIN_ACCURACY)
        }
        self.chosen_at_start: float | None = None
        self.warned: list[str] = []
        # The sum of the steps' shares, and how many there were.
        self.tokens_saved, self.sharing_steps = 0.0, 0

    def check_warmup(self, config: RunConfig, steps: int) -> None:
        """Warn before the first step where the learning rate will not have risen when the last one is taken."""
        if text := warmup_warning(warmup_steps(config, steps), steps, config.lr):
            self.warn("warm-up", text)

    def observe(self, metrics: dict[str, float]) -> None:
        """Observe the metrics of a step."""
        at = f"after {metrics[EXAMPLES]} examples"
        losses = self.newest[TRAIN_LOSS]
        if self.spike is not None and len(losses) == STEPS and metrics[TRAIN_LOSS] > self.spike * abs(_mean(losses)):
            self.tracker.log_message(
                f"warning: {at} the loss is {metrics[TRAIN_LOSS]:.4g}, its mean over {STEPS} steps {_mean(losses):.4g}"
            )
        for name in self.newest.keys() & metrics.keys():
            self.newest[name].append(metrics[name])
        if TOKENS_SAVED in metrics:
            self.tokens_saved += metrics[TOKENS_SAVED]
            self.sharing_steps += 1
        self._check_chosen(at)
        self._check_accuracy(at)

    def report_sharing(self) -> None:
        """Log what prefix sharing has saved, where it was on."""
        if self.sharing_steps:
            share = self.tokens_saved / self.sharing_steps
            self.tracker.log_message(f"prefix sharing: {share:.0%} of the tokens of all rows did not have to be computed")

    def _check_chosen(self, at: str) -> None:
        chosen = self.newest[TRAIN_CHOSEN_LOGPS]
        if len(chosen) < STEPS:
            return
        if self.chosen_at_start is None:
            self.chosen_at_start = _mean(chosen)
        fallen = self.chosen_at_start - _mean(chosen)
        if fallen > COLLAPSE:
            self.warn(
                "collapse",
                f"{at} the log-prob of preferred responses has fallen by {fallen:.0f} nats: good and bad responses both become "
                "unlikely. Look at samples.jsonl; raise loss.beta, lower lr, or stop earlier.",
            )

    def _check_accuracy(self, at: str) -> None:
        accuracies = self.newest[TRAIN_ACCURACY]
        if len(accuracies) < STEPS:
            return
        mean = _mean(accuracies)
        error = math.sqrt(sum((value - mean) ** 2 for value in accuracies)) / STEPS
        if mean + 2 * error < 0.5:
            self.warn(
                "accuracy",
                f"{at} the reward accuracy of the last {STEPS} steps is {mean:.2f}, below chance. Are chosen and rejected the "
                "right way round in the data? Is lr too high?",
            )

    def observe_share_changed(self, share: float | None, lr: float, dtype: str) -> None:
        """Warn about a small share of sampled weights in `dtype` that a step has changed; None where that was not checked."""
        if share is None or share >= CHANGED:
            return
        remedy = "Raise lr."
        if dtype != "float32":
            remedy = "Set master_weights=true, which keeps float32 copies of them in the optimizer, or raise lr."
        self.warn(
            "unchanged weights",
            f"a step with lr {lr:g} has changed {share:.1%} of the sampled weights: its updates are too small for "
            f"weights in {dtype}, and most are rounded away. {remedy}",
        )

    def warn(self, kind: str, text: str) -> None:
        """Warn once for each kind."""
        if kind not in self.warned:
            self.warned.append(kind)
            self.tracker.log_finding(kind, f"warning: {text}")

    def state_dict(self) -> dict:
        """The recent metrics, the warnings given and what prefix sharing has saved, as plain values."""
        seen = {name: list(values) for name, values in self.newest.items()}
        saved = {"tokens_saved": self.tokens_saved, "sharing_steps": self.sharing_steps}
        return {"newest": seen, "chosen_at_start": self.chosen_at_start, "said": self.warned, **saved}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned; checkpoints of earlier versions lack what prefix sharing has saved."""
        self.tokens_saved, self.sharing_steps = state.get("tokens_saved", 0.0), state.get("sharing_steps", 0)
        self.newest = {name: deque(values, maxlen=STEPS) for name, values in state["newest"].items()}
        self.chosen_at_start, self.warned = state["chosen_at_start"], list(state["said"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class UnchangedWeights:
    """A sample of all weights before a step, to find how many of them it leaves unchanged.

    updated: what the optimizer is about to update, with its gradients. Sampled are values that float32 arithmetic would change:
    those that are not 0 and have a gradient, which the embeddings of unused tokens have not. Of matrices alone where there are
    any: the scales of norms are far from the size of ordinary weights.
    """

    def __init__(self, updated: Sequence[tuple[Tensor, Tensor]]):
        matrices = [pair for pair in updated if pair[0].ndim > 1]
        self.samples = [self._begin(to_local(weight.detach()), to_local(gradient)) for weight, gradient in matrices or updated]

    @staticmethod
    def _begin(weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = _sample(weight).clone()
        return weight, values, (values != 0) & (_sample(gradient).to(values.device) != 0)

    def share_changed(self) -> float | None:
        """The share of the values that have changed, of those that should have; None where there are none."""
        counts = [
            torch.stack([moves.sum(), ((_sample(weight) != values) & moves).sum()]) for weight, values, moves in self.samples
        ]
        if not counts:
            return None
        # Read at once: one wait for the device.
        expected, changed = torch.stack([each.to(counts[0].device) for each in counts]).sum(0).tolist()
        return changed / expected if expected else None


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    # An odd stride visits all columns of a matrix, whose sizes are even.
    return flat[:: len(flat) // VALUES | 1]
