"""FlexAttention over tries: all branches of a packed batch in one kernel, which is compiled when it is first needed.

The kernel is compiled as a whole: a graph break, or more versions of it than its limit, is an error, never a silent return to
uncompiled code, which holds all T x T scores. After such a fault, and on devices that FlexAttention has no kernels for,
attention goes branch by branch, and a line says so.

Shapes: T packed tokens, H query heads, G key heads (G divides H), D head size.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from preference_training.batching.tries import TrieLayout
from preference_training.core.errors import first_line
from preference_training.modeling.kernels import VISIBLE_REGIONS
from preference_training.modeling.prefix_sharing.rules import Rules

# The oldest NVIDIA GPUs that FlexAttention has kernels for: A100, RTX 30.
MIN_CAPABILITY = (8, 0)
# One kernel for all lengths. Left to choose, torch takes another one below 128 tokens, for decoding, which does not compile
# where several query heads share a key head.
KERNEL_OPTIONS = {"BACKEND": "TRITON"}
# Why the kernel is not used any more, by the type of device; empty before the first fault.
_faults: dict[str, str] = {}


@cache
def unsupported_device(device: torch.device) -> str | None:
    """Why a GPU cannot run FlexAttention's compiled kernels, as a sentence for the log; None where it can."""
    from torch.utils._triton import has_triton_package

    if device.type != "cuda":
        return f"it has no kernels for {device.type}"
    if torch.version.hip is not None:
        return "it has not been tried on AMD GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {'.'.join(map(str, capability))}, and it needs 8.0"
    if not has_triton_package():
        return "it needs the package triton: pip install triton"
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "Triton needs a C compiler: install gcc, or set CC"
    return None


def block_attention_fault(device: torch.device) -> str | None:
    """Why attention over tries goes branch by branch on a GPU; None where it goes through FlexAttention."""
    return _faults.get(device.type) or unsupported_device(device)


def give_up_block_attention(device: torch.device, reason: str) -> None:
    """Go branch by branch from now on, and say why, once."""
    if device.type not in _faults:
        _faults[device.type] = reason
        print(f"attention over tries: branch by branch, not through FlexAttention, which failed: {reason}", flush=True)


def attention_by_blocks(query: Tensor, key: Tensor, value: Tensor, layout: TrieLayout, rules: Rules) -> Tensor:
    """Attention of query [1, H, T, D] to key and value [1, G, T, D] under the layout's block mask: [1, H, T, D]."""
    from torch.nn.attention.flex_attention import AuxRequest

    attend = compiled_attention(query.device.type)
    arguments = {
        "score_mod": None if rules.softcap is None else soft_cap(rules.softcap),
        "block_mask": layout.block_mask(rules.window, rules.chunk),
        "scale": rules.scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": KERNEL_OPTIONS,
    }
    if rules.sinks is None:
        return attend(query, key, value, **arguments)
    output, found = attend(query, key, value, **arguments, return_aux=AuxRequest(lse=True))
    # A sink adds exp(sink) to the denominator of the softmax, whose logarithm was lse.
    return output * torch.sigmoid(found.lse - rules.sinks.float()[:, None])[..., None].to(output.dtype)


def compile_error(error: Exception) -> str | None:
    """What compilation failed with, in a line; None for any other error, such as memory that does not suffice."""
    is_compilers = type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))
    return f"{type(error).__name__}: {first_line(error)}" if is_compilers else None


@cache
def soft_cap(cap: float) -> Callable[..., Tensor]:
    """The score modification cap * tanh(score / cap), with the cap as a constant of the compiled code.

    A number that a function refers to becomes an input of the graph, which its backward pass cannot take. Text is a constant.
    """
    text = repr(cap)

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return float(text) * torch.tanh(score / float(text))

    return capped


@cache
def compiled_attention(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention, on a GPU compiled once for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention, "inductor") if device_type == "cuda" else flex_attention


def compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """A function compiled as a whole, for all sizes."""
    # Else two sizes that are equal in the first batch, of tokens and of a head for instance, would be compiled as one.
    torch.fx.experimental._config.use_duck_shape = False
    options = {"options": VISIBLE_REGIONS} if backend == "inductor" else {}
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend, **options)
