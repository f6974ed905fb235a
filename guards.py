"""What goes wrong while training, noticed in the numbers of each step. Says so, once for each thing; changes nothing."""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ranks import local

# Steps that a mean is taken over, and after which it means something.
STEPS = 100
# How far the mean log-prob of chosen responses may fall below its start before that is said. Unit: nats.
COLLAPSE = 50.0
# Weights looked at, and values of each.
WEIGHTS, VALUES = 8, 1024


class Watch:
    """Sees every step's metrics. `say` prints a line; spike: how many times its running mean a loss has to be, None is off."""

    def __init__(self, say: Callable[[str], None], spike: float | None = None):
        self.say, self.spike = say, spike
        self.newest: dict[str, deque[float]] = {
            name: deque(maxlen=STEPS) for name in ("loss/train", "logps_train/chosen", "rewards_train/accuracies")
        }
        self.chosen_at_start: float | None = None
        self.said: list[str] = []

    def see(self, metrics: dict[str, float]) -> None:
        """Look at the metrics of a step that was taken."""
        at = f"after {metrics['counters/examples']} examples"
        losses = self.newest["loss/train"]
        if self.spike is not None and len(losses) == STEPS and metrics["loss/train"] > self.spike * abs(_mean(losses)):
            self.say(f"warning: {at} the loss is {metrics['loss/train']:.4g}, its mean over {STEPS} steps {_mean(losses):.4g}")
        for name in self.newest.keys() & metrics.keys():
            self.newest[name].append(metrics[name])
        self._see_chosen(at)
        self._see_accuracy(at)

    def _see_chosen(self, at: str) -> None:
        chosen = self.newest["logps_train/chosen"]
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

    def _see_accuracy(self, at: str) -> None:
        accuracies = self.newest["rewards_train/accuracies"]
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

    def warn(self, kind: str, text: str) -> None:
        """Say something, once for each kind."""
        if kind not in self.said:
            self.said.append(kind)
            self.say(f"warning: {text}")

    def state_dict(self) -> dict:
        """What has been seen and said, as plain values."""
        seen = {name: list(values) for name, values in self.newest.items()}
        return {"newest": seen, "chosen_at_start": self.chosen_at_start, "said": self.said}

    def load_state_dict(self, state: dict) -> None:
        """Remember what `state_dict` gave."""
        self.newest = {name: deque(values, maxlen=STEPS) for name, values in state["newest"].items()}
        self.chosen_at_start, self.said = state["chosen_at_start"], list(state["said"])


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values)


class StillWeights:
    """Some values of some weights as they are now, to see whether a step changes any of them."""

    def __init__(self, model: nn.Module):
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.weights = trained[:: max(1, len(trained) // WEIGHTS)]
        self.values = self._look()

    def _look(self) -> list[Tensor]:
        return [local(weight.detach()).reshape(-1)[:VALUES].clone() for weight in self.weights]

    def are_the_same(self) -> bool:
        """Whether none of the values has changed."""
        return all(torch.equal(one, other) for one, other in zip(self.values, self._look(), strict=True))
