"""Keeps a rank that has run out of memory in step with the other ranks of a sharded model, until all repeat the step.

FSDP gathers and reduces weights block by block: a rank that leaves a forward or backward pass on the way would let all others
wait. Such a rank frees what it has computed, makes the remaining collectives of the pass without computing anything, and hands
on zeros. The passes are those of FSDP's hooks, which this module calls in the order recorded when the model was loaded; a pass
that fits into memory is not touched.

    fails in block 3:   forward  1 2 (3) 3' 4'  ->  zeros  ->  backward  4' 3' 2' 1'      ' collectives alone
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from preference_training.core.errors import UserError
from preference_training.core.process_group import Ranks
from preference_training.modeling.prefix_sharing.longest_row import frequency_limits
from preference_training.modeling.state import compute_device

Computed = TypeVar("Computed")
# Functions of FSDP that reduce gradients: what fails in them has left no trace of whether other ranks wait for it.
REDUCING = {"foreach_reduce", "post_backward", "_root_post_backward_final_callback"}
ROOT = ""


class BackwardEvent(NamedTuple):
    """One event of a backward pass: the weights of a module are gathered ("pre"), or its gradient is reduced ("post")."""

    kind: str
    module: str


@dataclass
class Passes:
    """The order of FSDP's collectives in a forward and a backward pass of a model, by the names of its sharded modules.

    forward: the modules in the order in which they end. backward: its events, without those at the very end, which FSDP makes
    for whatever is left. trained: the weights that get a gradient.
    """

    forward: list[str] = field(default_factory=list)
    backward: list[BackwardEvent] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)


class Lockstep:
    """How one process meets torch.OutOfMemoryError in a step: it does not, and the error goes on."""

    failed = False

    def begin(self) -> None:
        """Begin a step."""
        self.failed = False

    def forward(
        self, model: nn.Module | None, compute: Callable[[], Computed], zeros: Callable[[Tensor], Computed]
    ) -> Computed:
        """What `compute` returns: one forward of a model. zeros: the like of it that depends on a scalar zero."""
        return compute()

    def after_forward(self, model: nn.Module, compute: Callable[[], Computed], zeros: Callable[[Tensor], Computed]) -> Computed:
        """What `compute` returns, which makes no forward of the model, but depends on one that was made."""
        return compute()

    def backward(self, model: nn.Module, loss: Tensor, scale: Callable[[Tensor], Tensor]) -> None:
        """The backward pass of a scalar loss, scaled."""
        scale(loss).backward()


class ShardedLockstep(Lockstep):
    """Keeps this rank in step with the others. failed: whether it has run out of memory since `begin`."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def forward(
        self, model: nn.Module | None, compute: Callable[[], Computed], zeros: Callable[[Tensor], Computed]
    ) -> Computed:
        """As of Lockstep; zeros once memory has run out, whose backward pass makes the collectives alone."""
        if model is None or not can_keep_step(model):
            return compute()
        before = len(ended_groups(model))
        try:
            if not self.failed:
                return compute()
        except torch.OutOfMemoryError as error:
            self._note(error)
        # Outside the handler: the exception keeps the pass's tensors alive.
        free_cache(model)
        passes = ShardedPasses(model)
        passes.finish_forward(len(ended_groups(model)) - before)
        return zeros(passes.zero())

    def after_forward(self, model: nn.Module, compute: Callable[[], Computed], zeros: Callable[[Tensor], Computed]) -> Computed:
        """As of Lockstep; zeros where memory runs out."""
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            if not can_keep_step(model):
                raise
            self._note(error)
        free_cache(model)
        return zeros(ShardedPasses(model).zero())

    def backward(self, model: nn.Module, loss: Tensor, scale: Callable[[Tensor], Tensor]) -> None:
        """As of Lockstep; where memory runs out, the rest of the pass is its collectives alone."""
        try:
            scale(loss).backward()
            return
        except torch.OutOfMemoryError as error:
            if not can_keep_step(model):
                raise
            self._note(error)
        # Nothing else may hold what the pass still keeps.
        loss.detach_()
        free_cache(model)
        passes = ShardedPasses(model)
        passes.forget_final_callback()
        passes.zero().backward()

    def _note(self, error: torch.OutOfMemoryError) -> None:
        """Note the failure. Raises UserError where it lies in a reduction, which cannot be repeated."""
        self.failed = True
        frames = _frames_of_fsdp(error)
        if REDUCING & frames.keys():
            raise UserError(
                f"max_tokens_per_microbatch: rank {self.ranks.rank} ran out of memory while gradients were reduced over the "
                "ranks, where no rank can go back. Set it below the tokens that fit, resume with resume=auto, or shard over "
                "more processes."
            ) from error
        if "pre_backward" in frames:
            # The weights were being gathered for a gradient: they are gathered again, with what is gathered ahead.
            group = frames["pre_backward"]["self"]
            group._training_state = type(group._training_state).IDLE
            ahead = frames.get("_backward_prefetch", {})
            if "curr_index" in ahead:
                group._post_forward_indices.append(ahead["curr_index"])


def free_cache(model: nn.Module) -> None:
    """Free what the allocator keeps of a GPU's memory."""
    if compute_device(model).type == "cuda":
        torch.cuda.empty_cache()


def can_keep_step(model: nn.Module) -> bool:
    """Whether a model's collectives are known: it is sharded, and computes a pack in one forward."""
    return getattr(model, "recorded_passes", None) is not None and not frequency_limits(model)


def _frames_of_fsdp(error: BaseException) -> dict[str, dict[str, Any]]:
    """The functions of FSDP that an error has passed through, with their local variables."""
    walked = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return {frame.f_code.co_name: frame.f_locals for frame in walked if "_fully_shard" in frame.f_code.co_filename}


# ---- the collectives of a pass ----------------------------------------------------------------------------------------------


class ShardedPasses:
    """The passes of a sharded model from the inside: FSDP's states by the names of their modules.

    FSDP offers no way to make its collectives without computing; these are its hooks, the same in torch 2.11 to 2.13.
    """

    def __init__(self, model: nn.Module):
        self.model, self.passes = model, getattr(model, "recorded_passes", None) or Passes()
        self.modules = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
        self.states: dict[str, Any] = {name: module._get_fsdp_state() for name, module in self.modules.items()}

    def finish_forward(self, done: int) -> None:
        """Make the collectives of a forward in which so many modules have ended. One that has begun goes on."""
        left = self.passes.forward[done:]
        if not left:
            return
        self._enter(ROOT)
        for name in left:
            if name != ROOT:
                self._enter(name)
                self._leave(name)
        self._leave(ROOT)

    def _enter(self, name: str) -> None:
        self.states[name]._pre_forward(self.modules[name], (), {})

    def _leave(self, name: str) -> None:
        with torch.no_grad():
            self.states[name]._post_forward(self.modules[name], (), None)

    def zero(self) -> Tensor:
        """A scalar zero whose backward pass, where gradients are computed, makes the collectives that are left of a model's."""
        return _Zero.apply(torch.zeros((), device=compute_device(self.model), requires_grad=True), self)

    def finish_backward(self) -> None:
        """Make the collectives that are left of a backward pass, with zeros as gradients. Within a pass of autograd's."""
        # It makes what no module's own events make.
        self.states[ROOT]._register_root_post_backward_final_callback()
        for state in self.states.values():
            for group in groups_of(state):
                if group._training_state.name == "PRE_BACKWARD":
                    self._fill(group)
        for event in self.passes.backward:
            state = self.states[event.module]
            phases = {group._training_state.name for group in groups_of(state)}
            if event.kind == "pre" and not phases & {"PRE_BACKWARD", "POST_BACKWARD"}:
                state._pre_backward(None)
                for group in groups_of(state):
                    self._fill(group)
            elif event.kind == "post" and phases != {"POST_BACKWARD"}:
                for group in reversed(groups_of(state)):
                    group.post_backward()

    def _fill(self, group: Any) -> None:
        """Give the trained weights of a group zeros where they have no gradient yet: all ranks reduce the same weights."""
        for weight in group.fsdp_params:
            if weight._param_fqn in self.passes.trained and weight.unsharded_accumulated_grad is None:
                whole = weight.unsharded_param
                whole.grad = torch.zeros_like(whole) if whole.grad is None else whole.grad

    def forget_final_callback(self) -> None:
        """Let FSDP end the next backward pass, though the last one has not ended."""
        self.states[ROOT]._state_ctx.post_backward_final_callback_queued = False


class _Zero(torch.autograd.Function):
    # As `ShardedPasses.zero` says.

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: ShardedPasses) -> Tensor:
        """A copy of the anchor."""
        ctx.passes = passes
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Make the collectives that are left."""
        ctx.passes.finish_backward()
        return torch.zeros_like(gradient), None


def ended_groups(model: nn.Module) -> Sequence[Any]:
    """The groups of weights whose forward has ended, since FSDP last cleared the list; it has none before the first forward."""
    return getattr(model._get_fsdp_state()._comm_ctx, "post_forward_order", [])


def groups_of(state: Any) -> Sequence[Any]:
    """The groups of weights of one of FSDP's states: torch 2.11 has one or none, later versions a list."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in (state._fsdp_param_group,) if group is not None] if groups is None else groups


# ---- recording them ---------------------------------------------------------------------------------------------------------


@contextmanager
def recorded_passes(model: nn.Module) -> Iterator[None]:
    """Record the collectives of the one forward and backward pass that are made within, as `model.recorded_passes`."""
    own, passes = ShardedPasses(model), Passes()
    # Whether FSDP has begun to end the backward pass.
    ending: list[bool] = []
    patched: list[tuple[Any, str]] = []

    def observe(target: Any, method: str, note: Callable[[], None]) -> None:
        usual = getattr(target, method)

        def observed(*arguments: Any) -> Any:
            note()
            return usual(*arguments)

        setattr(target, method, observed)
        patched.append((target, method))

    def noted(kind: str, name: str) -> Callable[[], None]:
        event = BackwardEvent(kind, name)
        return lambda: None if ending or event in passes.backward else passes.backward.append(event)

    def end() -> None:
        names = {id(group): name for name, state in own.states.items() for group in groups_of(state)}
        passes.forward = [names[id(group)] for group in ended_groups(model)]
        ending.append(True)

    for name, state in own.states.items():
        observe(state, "_pre_backward", noted("pre", name))
        observe(state, "_root_post_backward_final_callback", end)
        for group in groups_of(state):
            observe(group, "post_backward", noted("post", name))
    try:
        yield
    finally:
        for target, method in patched:
            delattr(target, method)
    weights = [weight for state in own.states.values() for group in groups_of(state) for weight in group.fsdp_params]
    passes.trained = {weight._param_fqn for weight in weights if weight.sharded_param.grad is not None}
    # A module that runs twice in a forward cannot be told from two forwards.
    if len(passes.forward) == len(set(passes.forward)):
        model.recorded_passes = passes
