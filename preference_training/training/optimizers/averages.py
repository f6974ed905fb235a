"""Averages of weights: those that are evaluated and saved, while others are trained.

    ema_decay           an exponential moving average of the weights after each update
    schedule-free       the optimizer's own average (Defazio et al. 2024, "The road less scheduled")

The average is a state of each weight that is updated (of its master weight, where it has one). While it is evaluated or saved
it takes the weight's place, and the weight is a state: what a checkpoint has as weights is the average, and what its optimizer
state has as `trained` is what training continues with, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from preference_training.core.process_group import reshard, to_local
from preference_training.training.optimizers.master_weights import MasterWeights

# States of a weight: its average, and, while that is in its place, the weight itself.
AVERAGE, TRAINED = "average", "trained"
# In parameter groups: how many updates the average is of.
AVERAGED_UPDATES = "averaged_updates"


def average_in(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Have an optimizer average its weights over its updates, in its state.

    After update t its weight is (1 - decay) / (1 - decay ** t): a mean of the weights after all updates, each `decay` times as
    heavy as the next one. Nothing of the weights before training is in it.
    """
    for group in optimizer.param_groups:
        group[AVERAGED_UPDATES] = 0
    optimizer.register_step_post_hook(partial(_average, decay=decay))


@torch.no_grad()
def _average(optimizer: torch.optim.Optimizer, *_arguments: object, decay: float) -> None:
    for group in optimizer.param_groups:
        group[AVERAGED_UPDATES] += 1
        share = (1 - decay) / (1 - decay ** group[AVERAGED_UPDATES])
        # One without a gradient so far is what it was, and has no state, by which optimizers know that.
        moved = [weight for weight in group["params"] if weight.grad is not None or optimizer.state.get(weight)]
        for weight in moved:
            if AVERAGE not in optimizer.state[weight]:
                optimizer.state[weight][AVERAGE] = weight.detach().clone()
        if moved:
            averages = [to_local(optimizer.state[weight][AVERAGE]) for weight in moved]
            torch._foreach_lerp_(averages, [to_local(weight.detach()) for weight in moved], share)


@contextmanager
def averages_in_place(optimizer: torch.optim.Optimizer, policy: nn.Module) -> Iterator[None]:
    """Context in which the weights of a model are the averages that its optimizer keeps; as they are where it keeps none.

    Nothing is trained inside. A state that is loaded inside is one that was saved inside.
    """
    _exchange(optimizer, policy, _put_averages)
    try:
        yield
    finally:
        _exchange(optimizer, policy, _put_trained)


@torch.no_grad()
def _exchange(optimizer: torch.optim.Optimizer, policy: nn.Module, put) -> None:
    # Gathered copies would not follow.
    reshard(policy)
    put(optimizer.inner if isinstance(optimizer, MasterWeights) else optimizer)
    if isinstance(optimizer, MasterWeights):
        optimizer.round_weights()


def _put_averages(optimizer: torch.optim.Optimizer) -> None:
    if _averages_itself(optimizer):
        for weight, state in optimizer.state.items():
            # One that has had no gradient has an empty state since its first `eval`, and no average.
            if state:
                state[TRAINED] = weight.detach().clone()
        optimizer.eval()
        return
    for weight, state in optimizer.state.items():
        if AVERAGE in state:
            state[TRAINED] = _swapped(weight, state.pop(AVERAGE))


def _put_trained(optimizer: torch.optim.Optimizer) -> None:
    if _averages_itself(optimizer):
        optimizer.train()
        for weight, state in optimizer.state.items():
            if TRAINED in state:
                weight.copy_(state.pop(TRAINED))
        return
    for weight, state in optimizer.state.items():
        if TRAINED in state:
            state[AVERAGE] = _swapped(weight, state.pop(TRAINED))


def _averages_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is a schedule-free optimizer that has taken a step: only then is there an average."""
    return hasattr(optimizer, "eval") and bool(optimizer.state)


def _swapped(weight: Tensor, other: Tensor) -> Tensor:
    """Exchange the values of a weight and a tensor; returns the tensor."""
    kept = weight.detach().clone()
    weight.copy_(other)
    return other.copy_(kept)
