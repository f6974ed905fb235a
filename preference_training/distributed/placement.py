"""Where a run's weights live, decided once: in one process, or laid over several.

A placement loads the policy and the reference, and says which processes share the data. The rest of a run does not ask.
`began_with` is the hash of the weights that the policy was loaded with, known to the main process; `base_dir` is where the run
keeps the model under its adapter, if it has to; None for nowhere.
"""

from pathlib import Path

import torch
from torch import nn

from preference_training.core.devices import pick_device
from preference_training.core.errors import UserError
from preference_training.core.ranks import ALONE, local_world_size
from preference_training.modeling.adapters import has_adapter
from preference_training.modeling.kernels import compile_between_attentions, enable_activation_checkpointing
from preference_training.modeling.loading import load_model
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.state import move_to_devices, reference_copy, weights_hash


class OneProcess:
    """All weights in this process: on one device, or layer by layer over its GPUs."""

    ranks = ALONE
    began_with: str | None = None
    base_dir: Path | None = None

    def __init__(self, config, tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.device = pick_device()

    def policy(self) -> nn.Module:
        """The model that is trained."""
        policy = move_to_devices(
            load_model(self.config.model, self.tokenizer, self.config.cache_dir, self.base_dir), self.device
        )
        self.began_with = weights_hash(policy)
        share_prefixes(policy, self.config.prefix_sharing)
        if self.config.activation_checkpointing:
            enable_activation_checkpointing(policy)
        return self.compiled(policy)

    def compiled(self, model: nn.Module) -> nn.Module:
        """A model, compiled where that is asked for: policy and reference alike, so that they say the same."""
        if self.config.compile:
            compile_between_attentions(model)
        return model

    def reference(self, policy: nn.Module) -> LiveReference:
        """The policy as it is now, which does not change: a frozen copy, or itself without what an adapter will add."""
        if has_adapter(policy):
            return LiveReference(policy)
        return LiveReference(self.compiled(move_to_devices(reference_copy(policy, self.config.model), policy.device)))

    def samples(self, wanted: bool | None) -> bool:
        """Whether to sample at evaluations, where `sample_during_eval` is `wanted`."""
        return wanted is None or wanted

    def end(self) -> None:
        """Nothing was started."""


class SplitLayers(OneProcess):
    """Every layer split over the devices of this process."""

    def policy(self) -> nn.Module:
        """The model that is trained."""
        from preference_training.distributed.layer_splitting import load_split

        policy, self.began_with = load_split(self.config, self.tokenizer)
        return policy

    def reference(self, policy: nn.Module) -> LiveReference:
        """A frozen copy of the policy as it is now, split alike."""
        from preference_training.distributed.layer_splitting import copy_of_split

        return LiveReference(copy_of_split(policy, getattr(torch, self.config.model.reference_dtype)))


class Sharded:
    """Weights laid over all processes of the run, by `trainer.sharding`; joins them."""

    began_with: str | None = None
    base_dir: Path | None = None

    def __init__(self, config, tokenizer):
        from preference_training.distributed.launching import start_group

        self.config, self.tokenizer = config, tokenizer
        self.device = start_group(config.trainer.distributed_timeout_minutes, config.trainer.cpu_offload)
        self.ranks, self.layout = self.lay_out(config, self.device.type, local_world_size())

    @classmethod
    def lay_out(cls, config, device_type: str, local_size: int) -> tuple:
        """The `Ranks` that share the data and the `Layout` of weights, over joined processes, `local_size` on each machine."""
        from preference_training.distributed.sharding import Layout, make_mesh, ranks_of

        world = torch.distributed.get_world_size()
        size = cls.tensor_parallel_size(config, world)
        mesh = make_mesh(device_type, world, local_size, config.trainer.sharding, size)
        return ranks_of(mesh), Layout.of(config, mesh)

    @staticmethod
    def tensor_parallel_size(config, world_size: int) -> int:
        """Over how many processes each layer is split."""
        return 1

    def policy(self) -> nn.Module:
        """The model that is trained; this process's part of it."""
        from preference_training.distributed.sharding import load_sharded

        made = self.config, self.tokenizer, self.layout, self.device, self.ranks, self.base_dir
        policy, self.began_with = load_sharded(*made)
        return policy

    def reference(self, policy: nn.Module) -> LiveReference:
        """The policy as it is now, which does not change: a frozen copy laid out alike, or itself without its adapter."""
        from preference_training.distributed.sharding import reference_beside

        if has_adapter(policy):
            return LiveReference(policy)
        return LiveReference(reference_beside(policy, self.config, self.tokenizer, self.layout, self.device))

    def samples(self, wanted: bool | None) -> bool:
        """Whether to sample at evaluations: only where that is asked for, since every token gathers all weights again."""
        if wanted is None:
            print("sample_during_eval: off, since the weights are split; sample_during_eval=true turns it on", flush=True)
        return bool(wanted)

    def end(self) -> None:
        """Leave the other processes."""
        from preference_training.distributed.launching import end_group

        end_group()


class TensorParallel(Sharded):
    """Every layer split over `trainer.tensor_parallel_size` processes; what is left of the world shards."""

    @staticmethod
    def tensor_parallel_size(config, world_size: int) -> int:
        """Over how many processes each layer is split. Raises UserError for a number that the world is no multiple of."""
        size = config.trainer.tensor_parallel_size or world_size
        if world_size % size:
            raise UserError(
                f"trainer.tensor_parallel_size: found {size}, expected a divisor of the number of processes, {world_size}."
            )
        return size
