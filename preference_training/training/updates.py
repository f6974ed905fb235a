"""Weight updates: the optimizer of a run, its learning-rate schedule and its gradient scaler; resumed bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.distributed.placement import Placement
from preference_training.modeling.state import compute_device
from preference_training.training.monitors import UnchangedWeights
from preference_training.training.optimizers.averages import averages_in_place
from preference_training.training.optimizers.building import build_optimizer
from preference_training.training.optimizers.loss_scaling import LossScaler, computes_in_float16
from preference_training.training.optimizers.master_weights import MASTER, MasterWeights, pending_updates
from preference_training.training.optimizers.schedules import schedule, warmup_steps
from preference_training.training.parts import RunState

# Messages of a run that is resumed with another choice of master weights.
WITHOUT_MASTERS = (
    "the run had no float32 master weights, and continues without them; master_weights=true starts them from its weights"
)
MASTERS_BEGIN = "the run had no float32 master weights; they start from its weights"
MASTERS_DROPPED = "the run's float32 master weights are dropped (master_weights=false); it continues from its rounded weights"


class Updater:
    """Updates the policy's weights from their gradients, and counts the updates in `state`."""

    def __init__(self, placement: Placement, policy: nn.Module, state: RunState, total_steps: int):
        config = placement.config
        self.config, self.placement, self.policy, self.state = config, placement, policy, state
        # Small gradients would underflow; the scaler skips a step whose scaled gradients overflow.
        self.scales_loss = computes_in_float16(config)
        self.scaler = LossScaler(compute_device(policy).type, enabled=self.scales_loss)
        self.schedule = schedule(config, total_steps)
        # The last one, where the learning rate rises through all of a run.
        self.first_full_step = min(warmup_steps(config, total_steps), max(0, total_steps - 1))
        self.build()

    def build(self, masters: bool | None = None) -> None:
        """Build the optimizer and its schedule. masters: with float32 master weights; None decides as configured."""
        self.optimizer = build_optimizer(self.policy, self.config, masters)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer keeps float32 master weights."""
        return isinstance(self.optimizer, MasterWeights)

    @property
    def dtype(self) -> str:
        """The dtype that updates are rounded to: that of master weights, else the least precise one of the trained weights."""
        trained = {weight.dtype for weight in self.policy.parameters() if weight.requires_grad}
        least_precise = torch.float32 if self.has_masters else max(trained, key=lambda dtype: torch.finfo(dtype).eps)
        return str(least_precise).removeprefix("torch.")

    @property
    def lr(self) -> float:
        """The learning rate of the next step, of weights that have no factor of their own."""
        return self.config.lr * self.schedule(self.scheduler.last_epoch)

    @contextmanager
    def averages_in_place(self) -> Iterator[None]:
        """Context in which the policy's weights are those that are evaluated and saved: an average, where the run keeps one."""
        if not self.config.averages_weights:
            yield
            return
        with averages_in_place(self.optimizer, self.policy):
            yield

    # ---- one step -------------------------------------------------------------------------------------------------------

    def expect_gradients(self, packs: int) -> None:
        """Prepare for the backward passes of so many packs, whose gradients are summed."""
        if self.has_masters:
            # Scaled back in float16, they would underflow after all.
            self.optimizer.sum_gradients_in_float32(packs > 1 or self.scales_loss)

    def clip_gradient(self) -> Tensor:
        """Unscale the gradient and clip it to `max_grad_norm`; returns its global norm before that, a scalar."""
        self.scaler.unscale_(self.optimizer)
        return self.placement.clip_gradient(self.policy)

    def update(self) -> None:
        """Update the weights, and clear the gradient."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.updates += 1

    def update_and_check(self) -> float | None:
        """`update`; returns the share of the sampled weights that it changed, at the steps that are checked, else None.

        Checked are the first step with the whole learning rate, and some later ones.
        """
        later = self.state.updates - self.first_full_step
        checks = later == 0 or (later > 0 and later & (later - 1) == 0 and self.schedule(self.state.updates) == 1)
        unchanged = UnchangedWeights(pending_updates(self.optimizer)) if checks else None
        self.update()
        return None if unchanged is None else unchanged.share_changed()

    def skip_step(self) -> None:
        """Clear the gradient of a step that cannot be taken."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def forget_gradient(self) -> None:
        """Clear a gradient that is computed again; unlike a skipped step, it says nothing of the scale of later ones."""
        scale = self.scaler.state_dict()
        if scale:
            # Until it is updated, a scaler unscales no second time; it cannot be where it has not unscaled.
            with suppress(AssertionError):
                self.scaler.update()
            self.scaler.load_state_dict(scale)
        self.optimizer.zero_grad(set_to_none=True)

    # ---- checkpoints ----------------------------------------------------------------------------------------------------

    def optimizer_state(self) -> dict:
        """The optimizer's state by the weights' names, initialized where it is not yet. Not copies."""
        return self.placement.optimizer_state(self.policy, self.optimizer)

    def load(self, checkpoint: Checkpoint, log_message: Callable[[str], None]) -> None:
        """Load the optimizer's state of a checkpoint, with its master weights where it has some and they are used."""
        kept, saved = checkpoint.has_master_weights, checkpoint.state
        if self.config.master_weights == "auto" and kept != self.has_masters:
            self.build(masters=kept)
            if not kept:
                log_message(f"resume: {WITHOUT_MASTERS}")
        elif kept != self.has_masters:
            log_message(f"resume: {MASTERS_DROPPED if kept else MASTERS_BEGIN}")
        if self.config.averages_weights:
            # Begins the state, of which an average is part.
            self.optimizer_state()
        with self.averages_in_place():
            optimizer = self.optimizer_state() | {"param_groups": saved["optimizer_groups"]}
            optimizer["state"] = _saved_part(optimizer["state"], checkpoint.optimizer_state_names())
            read = optimizer["state"]
            if not kept:
                read = {name: {key: value for key, value in values.items() if key != MASTER} for name, values in read.items()}
            checkpoint.read_optimizer(read)
            for name, values in saved["optimizer_numbers"].items():
                optimizer["state"][name] |= values
            self.placement.set_optimizer_state(self.policy, self.optimizer, optimizer)

    def continue_schedule(self, data: Schedule, config_then: dict, log_message: Callable[[str], None]) -> None:
        """Continue with this run's learning-rate schedule; log it if the checkpoint was under another."""
        length = RunLength(config_then["n_epochs"], config_then["n_examples"], config_then["n_steps"])
        done, total_then, total = self.state.updates, data.with_length(length).total_steps, data.total_steps
        schedule_then = schedule(self.config, total_then)
        before, now = schedule_then(done), self.schedule(done)
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * now
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        to_come = range(done, max(total_then, done + 1))
        if any(schedule_then(step) != self.schedule(step) for step in to_come):
            lr = self.config.lr
            log_message(
                f"resume: the run has {total:,} steps now, not {total_then:,}, and lr_schedule={self.config.lr_schedule} is "
                f"that of {total:,} steps from here on: lr is {lr * now:.3g} at the next step, where it would have been "
                f"{lr * before:.3g}"
            )


def _saved_part(state: dict[str, dict], saved: dict[str, set[str]]) -> dict[str, dict]:
    """An optimizer's state by weight name, of weights that had no gradient before it was saved nothing but a master weight."""
    if not saved:
        return state
    without = {name for name in state if not saved.get(name, set()) - {MASTER}}
    masters = {name: {key: value for key, value in state[name].items() if key == MASTER} for name in without}
    return {name: masters.get(name, values) for name, values in state.items() if masters.get(name, values)}
