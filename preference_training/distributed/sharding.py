"""Weights sharded over several processes (FSDP2), split within layers (tensor parallel), or both.

    a model on rank 0's CPU  ->  an empty model of the same shape, sharded over the mesh  ->  the weights, broadcast once

The mesh has three dimensions: `replicate` (copies), `shard` (parts of every weight), `tensor` (parts of every layer). Ranks
that differ in the first two train on different data, or, with context parallelism, on different tokens of the same packs.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from preference_training.batching.packing import PackedBatch
from preference_training.batching.tries import BLOCK
from preference_training.core.errors import UserError
from preference_training.core.machine import tune_malloc
from preference_training.core.process_group import (
    WHOLE_PACKS,
    ContextGroup,
    Ranks,
    full_tensor,
    local_world_size,
    reshard,
    to_local,
)
from preference_training.distributed.launching import check_context_size
from preference_training.distributed.out_of_memory import recorded_passes
from preference_training.modeling.adapters.weights import has_adapter
from preference_training.modeling.kernels import compile_between_attentions, enable_activation_checkpointing
from preference_training.modeling.loading import build_on_meta, load_model
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.attention_choice import ask_for
from preference_training.modeling.prefix_sharing.longest_row import frequency_limits
from preference_training.modeling.prefix_sharing.proof import (
    TOLERANCES,
    ErrorScale,
    disagreement,
    exact_arithmetic,
    logps_and_ends,
    random_tries,
    weights_named,
)
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries, scores_in_head, share_prefixes
from preference_training.modeling.prefix_sharing.tree_attention import TREE_ATTENTION
from preference_training.modeling.quantization import PackedLinear, packed_state
from preference_training.modeling.state import compute_device, free_memory, print_loaded, set_buffers, weights_hash
from preference_training.modeling.tuning.chosen_weights import train_only, trained_names

# ---- the mesh -----------------------------------------------------------------------------------------------------------


def make_mesh(device_type: str, world_size: int, local_size: int, sharding: str, tensor_size: int = 1) -> DeviceMesh:
    """The mesh of a sharding over `world_size` processes, `local_size` of them on each machine."""
    data = world_size // tensor_size
    shard = {"none": 1, "hybrid": max(1, local_size // tensor_size)}.get(sharding, data)
    sizes = (data // shard, shard, tensor_size)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard", "tensor"))


def data_ranks(mesh: DeviceMesh, context_size: int = 1) -> Ranks:
    """This process among the data-parallel ranks, each of which is `context_size` neighbors that share their packs.

    Raises UserError where that does not divide the processes.
    """
    data = mesh["replicate", "shard"]
    if context_size > 1:
        return _ranks_of_groups(mesh.device_type, data.size(), context_size, mesh["tensor"].size())
    flat = data._flatten("data") if data.size() > 1 else None
    is_rank_zero = torch.distributed.get_rank() == 0
    if flat is None:
        return Ranks(is_rank_zero=is_rank_zero)
    return Ranks(flat.get_local_rank(), flat.size(), is_rank_zero, flat.get_group())


def _ranks_of_groups(device_type: str, processes: int, context_size: int, tensor_size: int) -> Ranks:
    """The same, from a mesh of their own: weights are sharded over all processes, whatever they compute."""
    check_context_size(context_size, processes)
    names = ("data", "context", "tensor")
    mesh = init_device_mesh(device_type, (processes // context_size, context_size, tensor_size), mesh_dim_names=names)
    context = ContextGroup(mesh["context"].get_local_rank(), context_size, mesh["context"].get_group())
    data, is_rank_zero = mesh["data"], torch.distributed.get_rank() == 0
    group = data.get_group() if data.size() > 1 else None
    return Ranks(data.get_local_rank(), data.size(), is_rank_zero, group, context)


# ---- sharding a model over it---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a configuration's weights are laid over a mesh, and in which dtypes they are computed with and reduced.

    context: the processes that compute a pack together.
    """

    config: Any
    mesh: DeviceMesh
    precision: MixedPrecisionPolicy
    offload: OffloadPolicy
    context: ContextGroup = WHOLE_PACKS

    @classmethod
    def of(cls, config, mesh: DeviceMesh, context: ContextGroup = WHOLE_PACKS) -> "Layout":
        """What a configuration asks for."""
        trainer = config.trainer
        dtypes = {
            "param_dtype": config.sharded_dtype,
            "reduce_dtype": trainer.reduce_dtype,
            "output_dtype": trainer.output_dtype,
        }
        precision = MixedPrecisionPolicy(**{name: dtype and getattr(torch, dtype) for name, dtype in dtypes.items()})
        # Page-locked memory is for transfers to a GPU, and cannot be had without one.
        pinned = torch.cuda.is_available()
        offload = CPUOffloadPolicy(pin_memory=pinned) if trainer.cpu_offload else OffloadPolicy()
        return cls(config, mesh, precision, offload, context)

    @property
    def reshards_after_forward(self) -> bool:
        """Whether gathered weights are freed after the forward of their block."""
        return self.config.trainer.sharding in ("full", "hybrid")

    def apply(self, model: nn.Module) -> None:
        """Shard an empty model's weights over the mesh."""
        model.reshards_after_forward = self.reshards_after_forward
        if self.mesh["tensor"].size() > 1:
            split_layers(model, self.mesh["tensor"])
        if self.config.activation_checkpointing:
            enable_activation_checkpointing(model, self.config.activation_checkpointing)
        if self.config.compile:
            compile_between_attentions(model)
        options = {
            "mesh": self.mesh["replicate", "shard"] if self.mesh["replicate"].size() > 1 else self.mesh["shard"],
            "reshard_after_forward": self.reshards_after_forward,
            "mp_policy": self.precision,
            "offload_policy": self.offload,
        }
        self._set_quantized_dtype(model)
        for block in without_shared(find_blocks(model, self.config.model.block_name)):
            gather_as_bytes(fully_shard(block, **options))
        # What is left, embeddings, head and what several blocks share, is one group: tied weights stay together.
        gather_as_bytes(fully_shard(model, **options))

    def _set_quantized_dtype(self, model: nn.Module) -> None:
        """Have quantized layers compute in the dtype of the others, unless theirs is configured."""
        if self.precision.param_dtype and not self.config.model.quantized_compute_dtype:
            for layer in model.modules():
                if isinstance(layer, PackedLinear):
                    layer.compute_dtype = self.precision.param_dtype


def gather_as_bytes(module: FSDPModule) -> None:
    """Have a sharded module gather weights of bytes as they are; before torch 2.13 they would be cast to `param_dtype` too."""
    if torch.__version__ >= (2, 13):
        return
    group = module._get_fsdp_state()._fsdp_param_group
    for weight in group.fsdp_params if group is not None else ():
        if not weight.sharded_param.is_floating_point():
            uncast = partial(type(weight).init_dtype_attrs, weight, MixedPrecisionPolicy())
            weight.init_dtype_attrs = lambda _, uncast=uncast: uncast()


def find_blocks(model: nn.Module, block_name: str | None) -> list[nn.Module]:
    """The transformer blocks: modules of the class `block_name`, or of the classes that the model itself names.

    A model that names none has its blocks in a list, whose items are all of one class. Raises UserError, with the names there
    are, where none is found.
    """
    listed = Counter(type(item).__name__ for stack in _outermost(model, nn.ModuleList) for item in stack)
    names = {block_name} if block_name else set(model._no_split_modules or ()) or set(listed if len(listed) == 1 else ())
    classes = tuple({type(module) for module in model.modules() if type(module).__name__ in names})
    blocks = _outermost(model, classes)
    if not blocks:
        candidates = ", ".join(f"{name} ({count})" for name, count in listed.items()) or "none"
        found = f"found {block_name!r}" if block_name else "not given, and the model does not say"
        raise UserError(f"model.block_name: {found}. Expected the class of a block of {type(model).__name__}: {candidates}.")
    return blocks


def without_shared(blocks: list[nn.Module]) -> list[nn.Module]:
    """The blocks; in place of one with weights that are another's too (Zamba's attention) those of its parts that have none."""
    owners = Counter(weight for block in blocks for weight in set(block.parameters()))

    def parts_of(module: nn.Module) -> list[nn.Module]:
        if all(owners[weight] == 1 for weight in module.parameters()) and not isinstance(module, nn.ModuleList):
            return [module]
        return [part for child in module.children() if any(True for _ in child.parameters()) for part in parts_of(child)]

    return [part for block in blocks for part in parts_of(block)]


def _outermost(model: nn.Module, classes: type | tuple[type, ...]) -> list[nn.Module]:
    """The modules of some classes that are not within another of them: weights are sharded once."""
    found = []
    for child in model.children():
        found += [child] if isinstance(child, classes) else _outermost(child, classes)
    return found


def split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split every layer over the mesh by the model's own plan. Raises UserError where the sizes do not divide."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    check_divisible(model, mesh.size())
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied:
        # Splitting goes by names, and a tied weight has one of its two.
        head.weight = nn.Parameter(torch.empty_like(embedding.weight))
    apply_tensor_parallelism(model, mesh, plan)
    if tied:
        head.weight = embedding.weight


def check_divisible(model: nn.Module, parts: int) -> None:
    """Raise UserError where a model's layers cannot be split into so many equal parts."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    inner = getattr(config, "intermediate_size", parts)
    # Some have a width for each layer.
    widths = inner if isinstance(inner, list | tuple) else [inner]
    for key, size in (("attention heads", heads), *(("intermediate size", width) for width in widths)):
        if size % parts:
            raise UserError(f"trainer.tensor_parallel_size: found {parts}, which does not divide the model's {size} {key}.")


def load_sharded(
    layout: Layout, tokenizer, device: torch.device, ranks: Ranks, base_dir: Path | None = None
) -> tuple[nn.Module, str | None]:
    """The policy of a layout's configuration. Rank 0 reads its weights, broadcasts them once, and hashes them.

    Whether it shares prefixes is proved on rank 0; that the sharded model computes the same, on all. Raises UserError where it
    does not.
    """
    config = layout.config
    tune_malloc(keep_freed=has_plenty_of_memory(config, tokenizer))
    began = time.perf_counter()
    source = load_model(config.model, tokenizer, config.cache_dir, base_dir) if ranks.is_rank_zero else None
    if source is not None:
        print_loaded(source, began)
    # On all ranks, of which one proves that the model can share prefixes at all.
    ask_for(config.prefix_attention)
    proved = None
    if source is not None and share_prefixes(source, config.prefix_sharing, config.prefix_attention):
        proved = Sharing(scores_in_head(source))
    sharing = ranks.broadcast(proved)
    # Rank 0 has the values that Spectrum chooses weights by.
    chosen = ranks.broadcast(source and trained_names(source))
    model = empty_model(layout, tokenizer, config.model.policy_dtype, sharing, device, chosen)
    check_cuttable(model, layout.context)
    # Offloaded weights are brought to the device for each forward.
    model.compute_device = device
    if source is not None and has_adapter(source):
        # With the place of the model under it.
        model.peft_config = source.peft_config
    state = packed_state(source) if source is not None else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    broadcast_buffers(source, model, device, ranks)
    _check(model, source, layout, ranks)
    return model.train(), weights_hash(source) if source is not None else None


def broadcast_buffers(source: nn.Module | None, model: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Give a sharded model the buffers of rank 0's source, in their dtypes, on the device that computes.

    A model that was built without numbers may have made them in the dtype of its weights, which rounds them.
    """
    buffers = dict(source.named_buffers()) if source is not None else {}
    known = ranks.broadcast({name: (buffer.shape, buffer.dtype) for name, buffer in buffers.items()})
    for name, (shape, dtype) in known.items():
        sent = buffers[name].to(device) if source is not None else torch.empty(shape, dtype=dtype, device=device)
        buffers[name] = sent.contiguous()
        torch.distributed.broadcast(buffers[name], 0)
    set_buffers(model, {name: buffers[name] for name in known})


def has_plenty_of_memory(config, tokenizer) -> bool:
    """Whether each process of this machine has room for the whole model, its gradients and two optimizer states, twice."""
    model = build_on_meta(config.model, tokenizer, config.cache_dir)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return 2 * 4 * weights * local_world_size() <= free_memory(torch.device("cpu"))


def reference_beside(policy: nn.Module, layout: Layout, tokenizer, device: torch.device) -> nn.Module:
    """A frozen copy of a sharded policy as it is now, in `reference_dtype`; nothing is communicated."""
    sharing = Sharing(scores_in_head(policy)) if policy.config._attn_implementation == TREE_ATTENTION else None
    copy = empty_model(layout, tokenizer, layout.config.model.reference_dtype, sharing, device)
    copy.compute_device = device
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), policy.parameters(), strict=True):
            to_local(mine).copy_(to_local(theirs))
    set_buffers(copy, {name: buffer.clone() for name, buffer in policy.named_buffers()})
    copy.recorded_passes = getattr(policy, "recorded_passes", None)
    return copy.eval().requires_grad_(False)


class Sharing(NamedTuple):
    """How a model shares prefixes: whether its head gives log-probs of chosen tokens, or logits."""

    scores_in_head: bool


def empty_model(
    layout: Layout, tokenizer, dtype: str, sharing: Sharing | None, device: torch.device, trained: frozenset | None = None
) -> nn.Module:
    """The model of a layout's configuration, sharded, with memory for this process's shard of the weights but no values.

    dtype: such as bfloat16. sharing: how the model attends over tries, None where it does not. trained: names of weights.
    """
    config = layout.config
    model = build_on_meta(config.model, tokenizer, config.cache_dir, dtype)
    if trained is not None:
        train_only(model, trained)
    if sharing is not None:
        # A head that is split over processes gives logits, which its plan gathers.
        attend_over_tries(model, scoring_head=sharing.scores_in_head and layout.mesh["tensor"].size() == 1)
    layout.apply(model)
    model.context = layout.context
    return model.to_empty(device="cpu" if isinstance(layout.offload, CPUOffloadPolicy) else device)


@contextmanager
def whole_weights(model: nn.Module, ranks: Ranks) -> Iterator[bool]:
    """Context in which every rank has all weights of a sharded model, gathered once; for forward passes without gradient.

    Gives whether it does, so that each rank may compute on its own: False where the weights do not fit into half of some
    rank's free memory, where a layer is split over ranks, and for any model that is not sharded.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded or ranks.size < torch.distributed.get_world_size() or not _fits_whole(model, ranks):
        yield False
        return
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield True
    finally:
        model.set_reshard_after_forward(model.reshards_after_forward)
        reshard(model)


def _fits_whole(model: nn.Module, ranks: Ranks) -> bool:
    """Whether each rank has memory for all weights of a model beside its shards, twice."""
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    device = compute_device(model)
    free = free_memory(device) // (1 if device.type == "cuda" else local_world_size())
    return bool(ranks.all_reduce_min(int(2 * weights <= free)))


def check_cuttable(model: nn.Module, context: ContextGroup) -> None:
    """Raise UserError where the tokens of a model's packs cannot be divided among a context group."""
    if context.size == 1:
        return
    # FSDP renames the class.
    name = type(model).__name__.removeprefix("FSDP")
    begin = f"trainer.context_parallel_size: found {context.size}, but {name}"
    remedy = "Set it to 1, or use another model."
    if model.config._attn_implementation != TREE_ATTENTION:
        raise UserError(
            f"{begin} does not share prefixes, for the reason above, and only what is proved to mix tokens in attention alone "
            f"can be cut between them. {remedy}"
        )
    if limits := frequency_limits(model):
        raise UserError(
            f"{begin} has rotary embeddings ({', '.join(limits)}) that depend on the longest row of a forward, which no "
            f"process sees whole. {remedy}"
        )


# ---- does it compute the same? --------------------------------------------------------------------------------------------


@exact_arithmetic()
def _check(model: nn.Module, source: nn.Module | None, layout: Layout, ranks: Ranks) -> None:
    """Compare a small batch with the model that was not split: log-probs, and the gradients of the first and last weight.

    The source computes on a CPU; the other may not take shorter products for what splitting does.
    """
    batch: PackedBatch = random_tries(model.config.get_text_config().vocab_size, _checked_prompt(model, layout))
    # As rank 0 knows them, of weights that are whole.
    names, expected = logps_and_ends(response_scores, source, batch) if source is not None else (None, None)
    names = ranks.broadcast(names)
    with recorded_passes(model):
        logps = response_scores(model, batch.to(compute_device(model)))
        logps.sum().backward()
    found = [full_tensor(weight.grad).float().cpu() for weight in weights_named(model, names)]
    model.zero_grad(set_to_none=True)
    problem = None
    if source is not None:
        rounding = TOLERANCES[layout.precision.param_dtype or source.autocast_dtype or source.dtype]
        scale = ErrorScale.of(source, batch, expected[0])
        problem = disagreement((logps.detach().cpu(), found), expected, scale, rounding)
    problem = ranks.broadcast(problem)
    if problem:
        raise UserError(
            f"trainer: {type(model).__name__} does not compute the same when it is split: {problem}. Use another trainer."
        )


def _checked_prompt(model: nn.Module, layout: Layout) -> int:
    """The length of one more prompt of the check: on a GPU a pack is cut between blocks, and shorter ones are not cut."""
    if layout.context.size == 1 or compute_device(model).type != "cuda":
        return 0
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 3 * BLOCK
    return min(3 * BLOCK, most - 32)


# ---- gradients ------------------------------------------------------------------------------------------------------------


def clip_by_global_norm(parameters, max_norm: float) -> Tensor:
    """Clip gradients to `max_norm`; returns their global norm before that, a scalar. They may be on several meshes."""
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault(mesh, []).append(parameter.grad)
    norms = [full_tensor(nn.utils.get_total_norm(gradients)) for gradients in groups.values()]
    norm = torch.stack(norms).norm()
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradients in groups.values():
        for gradient in gradients:
            to_local(gradient).mul_(scale.to(gradient.device))
    return norm
