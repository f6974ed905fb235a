"""Layers split over the devices of one process, by the package tensor_parallel: for models that transformers has no plan for.

    a whole model on the CPU  ->  a shard on each device  ->  the first shard, which runs the others alongside

Every weight is trained in one place. What the package would copy onto each shard, or divide among them as parts of one sum,
is on the first and lent to the others, so that gradients, their norm and the optimizer's state are those of the whole model.
"""

import copy
import functools
import logging
import queue
import re
import threading
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.batching.tries import TrieLayout
from preference_training.core.errors import UserError, first_line
from preference_training.core.processes import in_worker
from preference_training.distributed.sharding import check_divisible
from preference_training.modeling.loading import build_on_meta, load_model
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.proof import (
    TOLERANCES,
    ErrorScale,
    disagreement,
    exact_arithmetic,
    logps_and_ends,
    logps_and_gradients,
    random_tries,
)
from preference_training.modeling.prefix_sharing.scoring_head import ScoringHead
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.state import compute_device, copied_dtype, print_loaded, weights_hash
from preference_training.modeling.tokenizer import load_tokenizer

# ---- choosing it for a model----------------------------------------------------------------------------------------------


def splits_in_one_process(config) -> bool:
    """Whether transformers has no plan to split a configuration's model, so that the package has to. Reads no weights.

    Raises UserError where the package is not installed, or cannot do what is configured.
    """
    model = build_on_meta(config.model, load_tokenizer(config.model, config.cache_dir), config.cache_dir)
    if model.tp_plan:
        return False
    name = type(model).__name__
    begin = f"trainer=TensorParallelTrainer: transformers has no plan for {name}, and"
    try:
        _package()
    except ImportError as error:
        raise UserError(
            f"{begin} the package tensor_parallel, which would split it, cannot be imported ({error}). "
            "Install it with pip install -r requirements/tensor-parallel.txt, or use trainer=FSDPTrainer."
        ) from error
    if in_worker():
        raise UserError(
            f"{begin} the package tensor_parallel splits it over the devices of one process. "
            "Start python train.py without torchrun, or use trainer=FSDPTrainer."
        )
    _check_settings(config, name)
    check_divisible(model, len(split_devices(config.trainer)))
    return True


def _check_settings(config, name: str) -> None:
    """Raise UserError for settings that need several processes, or that threads cannot support."""
    trainer, dtypes = config.trainer, "set model.policy_dtype or model.autocast_dtype"
    settings = [
        ("trainer.nproc_per_node", trainer.nproc_per_node, "set trainer.tensor_parallel_size"),
        ("trainer.cpu_offload", trainer.cpu_offload, "set it to false"),
        ("trainer.param_dtype", trainer.param_dtype, dtypes),
        ("trainer.output_dtype", trainer.output_dtype, dtypes),
        ("model.fsdp_policy_mp", config.model.fsdp_policy_mp, dtypes),
        # In the backward pass one thread would wait for shards that it is to compute itself, later.
        ("activation_checkpointing", config.activation_checkpointing, "lower max_tokens_per_microbatch instead"),
    ]
    for key, found, remedy in settings:
        if found:
            raise UserError(
                f"{key}: found {found}, which is not for {name}: transformers has no plan for it, and the package "
                f"tensor_parallel splits it over the devices of one process. Please {remedy}, or use trainer=FSDPTrainer."
            )


def split_devices(trainer) -> list[torch.device]:
    """The devices to split a model over: `trainer.tensor_parallel_size` GPUs (null: all that are visible), or as many shards on
    a CPU (null: 2). Raises UserError for one alone, and for more GPUs than there are.
    """
    visible = torch.cuda.device_count()
    size = trainer.tensor_parallel_size or visible or 2
    if size == 1:
        raise UserError("trainer.tensor_parallel_size: found 1, expected at least 2. Use trainer=BasicTrainer on one device.")
    if visible and size > visible:
        raise UserError(f"trainer.tensor_parallel_size: found {size}, expected at most {visible}, the visible GPUs.")
    return [torch.device("cuda", number) if visible else torch.device("cpu") for number in range(size)]


def _package():
    """The parts of the package in use: its splitter, its plans by model type, the default plan, its rule that divides a sum."""
    with warnings.catch_warnings():
        # It uses deprecated functions of its dependencies.
        warnings.simplefilter("ignore")
        import tensor_parallel
        from tensor_parallel.autoconfig import get_default_config
        from tensor_parallel.slicing_configs import PREDEFINED_CONFIGS
        from tensor_parallel.state_actions import Scale
    for file in Path(tensor_parallel.__file__).parent.glob("*.py"):
        logging.getLogger(str(file)).setLevel(logging.ERROR)
    return tensor_parallel.TensorParallel, PREDEFINED_CONFIGS, get_default_config, Scale


# ---- splitting ----------------------------------------------------------------------------------------------------------


def load_split(config, tokenizer) -> tuple[nn.Module, str]:
    """The policy of a configuration, split and compared with the whole model, and the hash of its weights.

    Raises UserError where the package cannot split it, or where the split model computes something else.
    """
    devices = split_devices(config.trainer)
    began = time.perf_counter()
    source = load_model(config.model, tokenizer, config.cache_dir)
    print_loaded(source, began)
    share_prefixes(source, _sharing_mode(config.prefix_sharing, devices), config.prefix_attention)
    refusal = f"trainer=TensorParallelTrainer: the package tensor_parallel cannot split {type(source).__name__}:"
    try:
        policy = split_layers(source, devices)
        problem = _split_error(policy, source)
    except Exception as error:  # whatever the package raises for an architecture that it does not know
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{refusal} {reason}. Use trainer=FSDPTrainer.") from error
    if problem:
        raise UserError(f"{refusal} {problem}. Use trainer=FSDPTrainer.")
    return policy, weights_hash(source)


def _sharing_mode(mode: str, devices: list[torch.device]) -> str:
    """The mode of `share_prefixes`: on GPUs its attention is compiled, which threads cannot do concurrently."""
    if mode == "off" or devices[0].type != "cuda":
        return mode
    if mode == "on":
        raise UserError("prefix_sharing: found on, but threads that share a model's layers cannot. Set it to auto or off.")
    print("prefix sharing: off, using padded rows: threads that share a model's layers cannot on GPUs", flush=True)
    return "off"


def split_layers(model: nn.Module, devices: list[torch.device]) -> nn.Module:
    """Shards of a model, one on each device, as one model of its class: the first, which contains the others.

    The model itself is left as it was. Raises whatever the package raises.
    """
    splitter, plans, plan_of_any, divided_sum = _package()
    plan_of = plans.get(model.config.model_type)
    plan = plan_of(model.config, devices) if plan_of else plan_of_any(model, devices)
    plan.state_rules = {key: _on_first if isinstance(rule, divided_sum) else rule for key, rule in plan.state_rules.items()}
    rules = {
        name: next((rule for pattern, rule in plan.state_rules.items() if pattern.search(name)), None)
        for name, _ in model.named_parameters()
    }
    shards = splitter(model, devices, tensor_parallel_config=plan, distributed=False, sharded=False).module_shards
    first, *others = shards
    first.split_by = {name: rule for name, rule in rules.items() if rule not in (None, _on_first)}
    first.loans = [loan for shard in others for loan in _borrow(shard, first, rules)]
    first.other_shards = nn.ModuleList(others)
    first.devices = devices
    first.compute_device = devices[0]
    for module in first.modules():
        if isinstance(module, ScoringHead):
            # Parts of logits add up, parts of log-probs do not.
            module.__class__ = nn.Linear
    first.__class__ = _split_class(type(first))
    return first.train()


def _on_first(tensor: Tensor, rank: int) -> Tensor:
    """Keep a weight that is added once on the first shard, where the package would have each shard add its share."""
    return tensor if rank == 0 else torch.zeros_like(tensor)


def _borrow(shard: nn.Module, first: nn.Module, rules: dict) -> list[tuple]:
    """Take from a shard the weights that are trained on the first: (module, name in it, weight, device) of each that it is
    lent. Of a weight that is added once it keeps zeros.
    """
    owned, trained = dict(first.named_parameters()), {id(w): n for n, w in shard.named_parameters()}
    loans = []
    for path, weight in list(shard.named_parameters(remove_duplicate=False)):
        rule = rules[_original(trained[id(weight)])]
        if rule not in (None, _on_first):
            continue
        module, leaf = shard.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        delattr(module, leaf)
        if rule is None:
            loans.append((module, leaf, owned[trained[id(weight)]], weight.device))
        else:
            module.register_buffer(leaf, weight.detach(), persistent=False)
    return loans


def copy_split_model(policy: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy of a split model as it is now, on the same devices; its weights are in `dtype`, its buffers as they are."""
    # What shards add up and gather with holds locks; one model runs at a time, so they share it.
    rules = [(*m.input_actions.values(), *m.output_actions.values()) for m in policy.modules() if hasattr(m, "output_actions")]
    shared = {id(rule): rule for some in rules for rule in some}
    twin = copy.deepcopy(policy, shared).eval().requires_grad_(False)
    weights = dict(twin.named_parameters())
    # Where a weight is added on the first shard, the others keep zeros in a buffer.
    names = set(map(_original, weights))
    zeros = {name: buffer for name, buffer in twin.named_buffers() if _original(name) in names}
    for value in (*weights.values(), *zeros.values()):
        value.data = value.data.to(copied_dtype(policy, value, dtype))
    return twin


@exact_arithmetic()
def _split_error(policy: nn.Module, source: nn.Module) -> str | None:
    """Compare a small batch with the whole model: log-probs, and the gradients of the first and last weight."""
    batch = random_tries(source.config.get_text_config().vocab_size)
    names, expected = logps_and_ends(response_scores, source, batch)
    parts = _parts(dict(policy.named_parameters()))
    tried = [part for name in names for part in parts[name]]
    logps, gradients = logps_and_gradients(response_scores, policy, batch.to(compute_device(policy)), tried)
    by_part = dict(zip(map(id, tried), gradients, strict=True))
    gradients = [_joined(policy, name, [by_part[id(part)] for part in parts[name]]).cpu() for name in names]
    rounding = TOLERANCES[source.autocast_dtype or source.dtype]
    return disagreement((logps.cpu(), gradients), expected, ErrorScale.of(source, batch, expected[0]), rounding)


# ---- running ------------------------------------------------------------------------------------------------------------


@functools.cache
def _split_class(model_class: type[nn.Module]) -> type:
    """A subclass of a model's class whose forward runs all shards and returns what the first returns."""

    class Split(model_class):
        @functools.wraps(model_class.forward)
        def forward(self, *args, **inputs):
            for module, leaf, weight, device in self.loans:
                # A view, since a module would keep the weight itself as its own.
                setattr(module, leaf, weight.to(device).view_as(weight))
            calls = [functools.partial(super().forward, *args, **inputs)]
            for number, (shard, device) in enumerate(zip(self.other_shards, self.devices[1:], strict=True)):
                on_device = {name: _for_shard(value, number, device) for name, value in inputs.items()}
                calls.append(functools.partial(shard, *(_for_shard(value, number, device) for value in args), **on_device))
            output = _run_together(calls, self.devices)
            # A tensor with a history cannot be copied, and would be out of date after a step.
            for module, leaf, _, _ in self.loans:
                delattr(module, leaf)
            return output

    Split.__name__, Split.__qualname__ = model_class.__name__, model_class.__qualname__
    return Split


def _for_shard(value, number: int, device: torch.device):
    """An input of the forward as another shard needs it: on its device, and with a cache of its own heads."""
    from transformers import Cache

    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, TrieLayout):
        return TrieLayout(value.trie, device)
    if isinstance(value, Cache):
        # The first shard fills the cache that generation sees; it is empty when the others' are made.
        others = vars(value).setdefault("of_other_shards", {})
        if number not in others:
            others[number] = copy.deepcopy(value)
        return others[number]
    return value


def _run_together(calls: list, devices: list[torch.device]):
    """Run each call in its own thread, under this thread's grad mode and autocast. Returns what the first returns.

    Shards wait for each other within a call. One that raises leaves the others waiting, so its error is raised at once.
    """
    grad, kind = torch.is_grad_enabled(), devices[0].type
    autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def run(number: int) -> None:
        device = devices[number]
        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with here, torch.set_grad_enabled(grad), torch.autocast(kind, **autocast):
                answers.put((number, calls[number](), None))
        except Exception as error:  # handed on to the thread that asked
            answers.put((number, None, error))

    for number in range(len(calls)):
        threading.Thread(target=run, args=(number,), daemon=True).start()
    outputs = {}
    for _ in calls:
        number, outputs[number], error = answers.get()
        if error is not None:
            raise error
    return outputs[0]


# ---- whole weights and optimizer states ---------------------------------------------------------------------------------


def _original(name: str) -> str:
    """The name in the model that was not split, of a weight of any shard."""
    return re.sub(r"^other_shards\.\d+\.", "", name).replace("tp_wrapped_module.", "")


def _parts(named: dict) -> dict[str, list]:
    """Group values of all shards' weights by the names of the whole weights, in shard order."""
    parts: dict[str, list] = {}
    for name, value in named.items():
        parts.setdefault(_original(name), []).append(value)
    return parts


def _joined(policy: nn.Module, name: str, parts: list[Tensor]) -> Tensor:
    """Join the parts of a tensor shaped like the whole weight `name`."""
    return policy.split_by[name].undo(parts) if name in policy.split_by and parts[0].dim() else parts[0]


def _cut(policy: nn.Module, name: str, whole: Tensor, rank: int) -> Tensor:
    """A shard's part of a tensor shaped like the whole weight `name`; the inverse of `_joined`."""
    part = policy.split_by[name](whole, rank=rank) if name in policy.split_by and whole.dim() else whole
    # Each shard counts its own steps, and fused optimizers read memory in its order, whatever its strides.
    return part.clone(memory_format=torch.contiguous_format)


def join_weights(policy: nn.Module) -> dict[str, Tensor]:
    """All weights of a split model, joined, by the names of the whole model. Tied ones are one tensor."""
    parts = _parts(dict(policy.named_parameters()))
    whole = {id(some[0]): _joined(policy, name, some).detach() for name, some in parts.items()}
    state = _parts(policy.state_dict(keep_vars=True))
    return {name: whole.get(id(some[0]), some[0].detach()) for name, some in state.items()}


@torch.no_grad()
def set_joined_weights(policy: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set a split model's weights from whole ones, by the names of the whole model."""
    for name, parts in _parts(dict(policy.named_parameters())).items():
        for rank, part in enumerate(parts):
            part.copy_(_cut(policy, name, weights[name], rank))


def join_optimizer_state(policy: nn.Module, state: dict) -> dict:
    """An optimizer's state by the names and shapes of whole weights, from one by those of the shards."""
    whole = {
        name: {key: _joined(policy, name, [part[key] for part in parts]) for key in parts[0]}
        for name, parts in _parts(state["state"]).items()
    }
    groups = [group | {"params": list(dict.fromkeys(map(_original, group["params"])))} for group in state["param_groups"]]
    return {"state": whole, "param_groups": groups}


def split_optimizer_state(policy: nn.Module, state: dict) -> dict:
    """The state that `join_optimizer_state` has joined, by the names and shapes of the shards."""
    names = [name for name, _ in policy.named_parameters()]
    split = {
        name: {key: _cut(policy, whole, value, rank) for key, value in state["state"][whole].items()}
        for whole, parts in _parts({name: name for name in names}).items()
        # Weights that have had no gradient have no state.
        if whole in state["state"]
        for rank, name in enumerate(parts)
    }
    groups = [
        group | {"params": [name for name in names if _original(name) in set(group["params"])]}
        for group in state["param_groups"]
    ]
    return {"state": split, "param_groups": groups}
