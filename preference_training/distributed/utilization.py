"""How much of the arithmetic of its devices a run uses.

Model FLOPs utilization (Chowdhery et al. 2022, PaLM, appendix B) counts products with weights, two FLOPs for each weight and
token; not attention scores, norms, or what activation checkpointing computes again. Long sequences look a little less well used
than they are.
"""

from dataclasses import dataclass

import torch
from torch import nn

from preference_training.configuration.schema import RunConfig
from preference_training.core.gpu_peaks import peak_tflops
from preference_training.core.process_group import is_distributed
from preference_training.modeling.experts.routers import num_chosen, num_experts
from preference_training.modeling.logprobs import CachedReference
from preference_training.modeling.quantization import weight_numels
from preference_training.modeling.tuning.towers import is_in, towers

# Of a layer of experts in the names of transformers.
EXPERTS = ".experts."


@dataclass(frozen=True)
class Utilization:
    """FLOPs of a step per token, and the peak of all devices together, in FLOP/s."""

    flops_per_token: float
    peak: float

    @classmethod
    def of(cls, config: RunConfig, policy: nn.Module, reference: object, device: torch.device) -> "Utilization | None":
        """That of a run; None where the peak of its devices is neither known nor given as `peak_tflops`."""
        peak = peak_flops(config, device)
        if peak is None:
            return None
        is_live = reference is not None and not isinstance(reference, CachedReference)
        return cls(step_flops(policy, is_live), peak * num_devices(policy))


def peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """The peak of one device, in FLOP/s: as given in `peak_tflops`, or known of a GPU of its name; else None."""
    peak = config.peak_tflops
    if peak is None and device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device), _dtype_of_products(config), config.tf32)
    return None if peak is None else peak * 1e12


def _dtype_of_products(config: RunConfig) -> str:
    """The dtype that most matrix products of a step are computed in."""
    model = config.model
    quantized = model.quantized_compute_dtype if model.quantization else None
    return quantized or model.autocast_dtype or config.sharded_dtype or model.policy_dtype


# ---- FLOPs ------------------------------------------------------------------------------------------------------------------


def step_flops(policy: nn.Module, reference_is_live: bool) -> float:
    """FLOPs of a training step per token: forward and backward of the policy, and the forward of a live reference.

    The backward takes a product for the gradient of the activations, and for each trained weight one for its own gradient.
    """
    used, trained = _multiplied(policy), _multiplied(policy, trained=True)
    return 2 * (2 * used + trained + used * reference_is_live)


def num_devices(policy: nn.Module) -> int:
    """How many devices the weights of a model, and what is computed with them, are distributed over."""
    if is_distributed():
        return torch.distributed.get_world_size()
    return len({weight.device for weight in policy.parameters()})


def _multiplied(model: nn.Module, trained: bool = False) -> float:
    """How many weights a token is multiplied by; of experts the share that is chosen. Lookups are not products.

    What text does not reach is left out.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # An embedding that is also the head is multiplied by there.
    looked_up.discard(id(getattr(head, "weight", None)))
    share = _share_of_experts(model)
    numels = weight_numels(model)
    beside = towers(model) if hasattr(model, "config") else {}
    return sum(
        numels[name] * (share if EXPERTS in name else 1.0)
        for name, weight in model.named_parameters()
        if id(weight) not in looked_up and (weight.requires_grad or not trained) and not is_in(name, beside)
    )


def _share_of_experts(model: nn.Module) -> float:
    if not hasattr(model, "config"):
        return 1.0
    number, chosen = num_experts(model.config), num_chosen(model.config)
    return chosen / number if number and chosen else 1.0
