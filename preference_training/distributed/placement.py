"""Where a run's weights live: in one process, split by layers over its devices, or sharded over several processes.

The placement of a run is the one object that knows. It loads policy and reference, gives and takes whole or sharded weights and
optimizer state, clips gradients, and says which ranks share the data.
"""

import copy
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh

from preference_training.core.errors import UserError
from preference_training.core.machine import pick_device
from preference_training.core.process_group import SINGLE_PROCESS, Ranks, local_world_size, reshard
from preference_training.distributed.launching import end_group, start_group
from preference_training.distributed.layer_splitting import (
    copy_split_model,
    join_optimizer_state,
    join_weights,
    load_split,
    set_joined_weights,
    split_optimizer_state,
    splits_in_one_process,
)
from preference_training.distributed.out_of_memory import Lockstep, ShardedLockstep
from preference_training.distributed.sharding import (
    Layout,
    clip_by_global_norm,
    data_ranks,
    load_sharded,
    make_mesh,
    reference_beside,
)
from preference_training.modeling.adapters.weights import has_adapter, set_joined_adapter, weights_to_save
from preference_training.modeling.kernels import compile_between_attentions, enable_activation_checkpointing
from preference_training.modeling.loading import load_model, reference_errors
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing.proof import find_recomputing_failure
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.quantization import FP8_MULTIPLE, use_float8
from preference_training.modeling.state import move_to_devices, print_loaded, reference_copy, weights_hash


class Placement:
    """Where the weights of a run live; by itself one device, on which everything is whole.

    began_with: the hash of the weights that the policy was loaded with, on rank 0. base_dir: where the run keeps the model
    under its adapter, None for nowhere.
    """

    ranks: Ranks = SINGLE_PROCESS
    began_with: str | None = None
    base_dir: Path | None = None

    def __init__(self, config, tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.device = pick_device()

    @classmethod
    def for_model(cls, config) -> type["Placement"]:
        """The placement for a configuration's model, where this one cannot split it. Raises UserError where none can."""
        return cls

    @classmethod
    def start(cls, config, tokenizer) -> "Placement":
        """The placement of a run."""
        return cls(config, tokenizer)

    def end(self) -> None:
        """Leave what `start` has joined."""

    # ---- models ---------------------------------------------------------------------------------------------------------

    def load_policy(self) -> nn.Module:
        """Load the model to train."""
        raise NotImplementedError

    def frozen_copy(self, policy: nn.Module) -> nn.Module:
        """A copy of the policy as it is now, in `reference_dtype`, placed alike."""
        raise NotImplementedError

    def reference(self, policy: nn.Module) -> LiveReference:
        """The policy as it is now, frozen: a copy, or the model under its adapter; or that of `model.reference_archive`."""
        if has_adapter(policy):
            return LiveReference(policy)
        if self.config.model.reference_archive is None:
            return LiveReference(self.frozen_copy(policy))
        other = same_devices(self, replace(self.config, model=self.config.model.of_reference()))
        with reference_errors():
            return LiveReference(other.load_policy().eval().requires_grad_(False))

    def samples(self, requested: bool | None) -> bool:
        """Whether to sample at evaluations, where `sample_during_eval` is `requested`; never from a reward model."""
        if self.config.model.head == "lm":
            return requested is None or requested
        if requested is not False:
            print("sample_during_eval: off, since a reward model writes no responses", flush=True)
        return False

    # ---- a step ---------------------------------------------------------------------------------------------------------

    def lockstep(self) -> Lockstep:
        """What keeps this process in step with others when it runs out of memory."""
        return Lockstep()

    def before_backward(self, policy: nn.Module, is_last: bool) -> None:
        """Prepare for a pack's backward pass; `is_last` for the last one of a step."""

    def clip_gradient(self, policy: nn.Module) -> Tensor:
        """Clip the gradient to `max_grad_norm`; returns its global norm before that, a scalar."""
        return nn.utils.clip_grad_norm_(policy.parameters(), self.config.max_grad_norm)

    # ---- weights and optimizer state, for checkpoints -------------------------------------------------------------------

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights and persistent buffers by name, or the adapter's alone. Not copies; tied weights share one tensor."""
        return weights_to_save(model.state_dict(keep_vars=True))

    def set_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Take over values that were written into what `weights` returned: the model's own tensors, or copies of adapters."""
        set_joined_adapter(model, weights)

    def optimizer_state(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """The optimizer's state by the weights' names, initialized where it is not yet. Not copies."""
        return flat_state(get_optimizer_state_dict(policy, optimizer))

    def set_optimizer_state(self, policy: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Load what `optimizer_state` returned."""
        # Weights without a gradient have no state.
        set_optimizer_state_dict(policy, optimizer, state, options=StateDictOptions(strict=False))


def flat_state(state: dict) -> dict:
    """An optimizer's state without nested sections: bitsandbytes keeps those of few bits in one."""
    by_weight = {}
    for weight, values in state["state"].items():
        sections = [value for value in values.values() if isinstance(value, dict)]
        plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
        by_weight[weight] = {name: value for part in (plain, *sections) for name, value in part.items()}
    return state | {"state": by_weight}


def same_devices(placement: Placement, config) -> Placement:
    """A placement like another for the model of another configuration, which keeps no model under an adapter."""
    other = copy.copy(placement)
    other.config, other.base_dir = config, None
    if isinstance(other, Sharded):
        other.layout = Layout.of(config, other.layout.mesh, other.ranks.context)
    return other


class OneProcess(Placement):
    """All weights in this process: on one device, or layer by layer over its GPUs."""

    def load_policy(self) -> nn.Module:
        """Load the model to train."""
        began = time.perf_counter()
        loaded = load_model(self.config.model, self.tokenizer, self.config.cache_dir, self.base_dir)
        policy = move_to_devices(loaded, self.device)
        print_loaded(policy, began)
        self.began_with = weights_hash(policy)
        share_prefixes(policy, self.config.prefix_sharing, self.config.prefix_attention)
        self._use_float8(policy, says=True)
        self._save_activations(policy)
        return self._compiled(policy)

    def _save_activations(self, policy: nn.Module) -> None:
        """Switch activation checkpointing on where it is asked for. Raises UserError for a model that cannot be selective."""
        kind = self.config.activation_checkpointing
        if kind == "selective":
            failure = find_recomputing_failure(policy, lambda: enable_activation_checkpointing(policy, kind))
            if failure:
                raise UserError(
                    f"activation_checkpointing: found selective, but {type(policy).__name__} cannot: {failure}. Set it to true."
                )
        elif kind:
            enable_activation_checkpointing(policy)

    def frozen_copy(self, policy: nn.Module) -> nn.Module:
        """A copy of the policy as it is now, in `reference_dtype`, on the same devices."""
        reference = move_to_devices(reference_copy(policy, self.config.model), policy.device)
        self._use_float8(reference)
        return self._compiled(reference)

    def _use_float8(self, model: nn.Module, says: bool = False) -> None:
        """Let a model multiply in FP8 where the configuration asks for it: policy and reference alike. says: print how."""
        if not self.config.model.fp8:
            return
        # After the proof, whose tolerances are those of wider products.
        count = use_float8(model)
        if count == 0:
            raise UserError(
                f"model.fp8: {type(model).__name__} has no linear layer that can use it: all but the head whose sizes are "
                f"multiples of {FP8_MULTIPLE}. Set it to false."
            )
        if says:
            how = "" if torch.cuda.is_available() else ", emulated: there is no GPU here"
            print(f"model.fp8: on in {count} linear layers{how}", flush=True)

    def _compiled(self, model: nn.Module) -> nn.Module:
        """Compile a model where the configuration asks for it: policy and reference alike, so that they compute the same."""
        if self.config.compile:
            compile_between_attentions(model)
        return model


class SplitLayers(Placement):
    """Every layer split over the devices of this process. Checkpoints hold whole weights."""

    def load_policy(self) -> nn.Module:
        """Load the model to train, and split it."""
        policy, self.began_with = load_split(self.config, self.tokenizer)
        return policy

    def frozen_copy(self, policy: nn.Module) -> nn.Module:
        """A copy of the policy as it is now, in `reference_dtype`, split alike."""
        return copy_split_model(policy, getattr(torch, self.config.model.reference_dtype))

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights and persistent buffers by name, joined: copies. Tied weights share one tensor."""
        return join_weights(model)

    def set_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Split whole weights among the devices."""
        set_joined_weights(model, weights)

    def optimizer_state(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """The optimizer's state by the names of whole weights, joined: copies."""
        return join_optimizer_state(policy, super().optimizer_state(policy, optimizer))

    def set_optimizer_state(self, policy: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Split the state of whole weights among the devices."""
        super().set_optimizer_state(policy, optimizer, split_optimizer_state(policy, state))


class Sharded(Placement):
    """Weights sharded over all processes of a run, as `trainer.sharding` says, on a mesh over the process group."""

    def __init__(self, config, tokenizer, device: torch.device, mesh: DeviceMesh):
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.ranks = data_ranks(mesh, config.trainer.context_parallel_size or 1)
        self.layout = Layout.of(config, mesh, self.ranks.context)
        # Where gradients stay whole until the step, they are reduced once, after the last pack.
        self.reduces_once = config.trainer.sharding in ("optimizer", "none")

    @classmethod
    def start(cls, config, tokenizer) -> "Sharded":
        """Join the process group. Raises UserError where the number of processes does not fit."""
        device = start_group(config.trainer.distributed_timeout_minutes, config.trainer.cpu_offload)
        return cls(config, tokenizer, device, cls.mesh(config, device.type, local_world_size()))

    def end(self) -> None:
        """Leave the process group."""
        end_group()

    @classmethod
    def mesh(cls, config, device_type: str, local_size: int) -> DeviceMesh:
        """The mesh of a configuration over the process group, with `local_size` processes on each machine."""
        world = torch.distributed.get_world_size()
        size = cls.tensor_parallel_size(config, world)
        return make_mesh(device_type, world, local_size, config.trainer.sharding, size)

    @staticmethod
    def tensor_parallel_size(config, world_size: int) -> int:
        """Over how many processes each layer is split."""
        return 1

    def load_policy(self) -> nn.Module:
        """Load the model to train; rank 0 reads it and each process keeps its shard."""
        policy, self.began_with = load_sharded(self.layout, self.tokenizer, self.device, self.ranks, self.base_dir)
        return policy

    def frozen_copy(self, policy: nn.Module) -> nn.Module:
        """A copy of the policy as it is now, in `reference_dtype`, sharded alike."""
        return reference_beside(policy, self.layout, self.tokenizer, self.device)

    def samples(self, requested: bool | None) -> bool:
        """Whether to sample at evaluations: only if asked to, since that gathers all weights."""
        if requested is None and self.config.model.head == "lm":
            print("sample_during_eval: off, since the weights are sharded; sample_during_eval=true turns it on", flush=True)
            return False
        return super().samples(requested)

    def lockstep(self) -> Lockstep:
        """What keeps this process in step with others when it runs out of memory; not within a layer that is split."""
        # Inside a layer, processes that split it or its tokens wait for each other too.
        return Lockstep() if self.ranks.have_members else ShardedLockstep(self.ranks)

    def before_backward(self, policy: nn.Module, is_last: bool) -> None:
        """Tell FSDP when to reduce gradients."""
        policy.set_is_last_backward(is_last)
        if self.reduces_once:
            policy.set_requires_gradient_sync(is_last)
            policy.set_reshard_after_backward(is_last)

    def clip_gradient(self, policy: nn.Module) -> Tensor:
        """Clip the gradient to `max_grad_norm`; returns its norm over all ranks before that, a scalar."""
        return clip_by_global_norm(policy.parameters(), self.config.max_grad_norm)

    def optimizer_state(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """This process's shard of the optimizer's state by the weights' names, initialized where it is not yet."""
        reshard(policy)
        return super().optimizer_state(policy, optimizer)


class TensorParallel(Sharded):
    """Every layer split over `trainer.tensor_parallel_size` processes; what is left of the world shards."""

    @classmethod
    def for_model(cls, config) -> type[Placement]:
        """Split the layers within one process where transformers has no plan for the model. Raises UserError."""
        return SplitLayers if splits_in_one_process(config) else cls

    @staticmethod
    def tensor_parallel_size(config, world_size: int) -> int:
        """Over how many processes each layer is split. Raises UserError where that does not divide the world."""
        size = config.trainer.tensor_parallel_size or world_size
        if world_size % size:
            raise UserError(
                f"trainer.tensor_parallel_size: found {size}, expected a divisor of the number of processes, {world_size}."
            )
        return size
