"""Which attention over tries is fastest: FlexAttention, its backend FLASH, flash attention in parts, or SDPA over padded rows.

Both passes in bfloat16, at the shapes that docs/memory-and-speed.md speaks of. Ends with the lines for MEASURED in
preference_training/modeling/prefix_sharing/attention_choice.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.attention import passes
from gpu_parts.compiling import pretend_to_be_a_gpu
from gpu_parts.found import Found, Settings
from gpu_parts.making import dialogues, random_prompts
from preference_training.batching.packing import PackedBatch, iterate_examples, pack_examples
from preference_training.batching.tries import TrieLayout
from preference_training.core.machine import pick_device
from preference_training.modeling.prefix_sharing import block_attention
from preference_training.modeling.prefix_sharing.attention_choice import FLEX, VARLEN, Measured, Shape
from preference_training.modeling.prefix_sharing.block_attention import attention_by_blocks
from preference_training.modeling.prefix_sharing.merged_attention import attention_by_parts
from preference_training.modeling.prefix_sharing.rules import Rules
from preference_training.modeling.prefix_sharing.varlen_kernels import PlainKernel, TorchFlash

# Query and key heads, by head size: as in 1.4B parameters with small heads, and as in Llama 3.1 8B.
HEADS = {64: (32, 32), 128: (32, 8)}
VOCABULARY = 2000
# The largest difference of outputs of about 1 in bfloat16, whose rounding is 2^-8 of a number, of two or three roundings.
TOLERANCE = 3e-2


class Work(NamedTuple):
    """A trie on the device, its inputs, and the length of each of its sequences."""

    layout: TrieLayout
    inputs: list[Tensor]
    lengths: list[int]

    def padded(self) -> list[Tensor]:
        """Inputs of the same sequences as padded rows."""
        return [random_like(each, len(self.lengths), max(self.lengths)) for each in self.inputs]


def choice(found: Found, settings: Settings) -> None:
    """All ways at all shapes, first those that a run can use."""
    if settings.is_cpu:
        pretend_to_be_a_gpu()
    best: list[Measured] = []
    times: dict[str, dict[str, float]] = {}
    shapes = [(size, name) for size in settings.choose(HEADS, [64]) for name in batches(settings)]
    for size, name in shapes:
        work = prepare(batches(settings)[name], size, settings)
        ways = {"flex": by_flex(work), "varlen": by_parts(work, settings), "padded": by_rows(rows := work.padded())}
        for way, attend in ways.items():
            inputs = rows if way == "padded" else work.inputs
            measured = found.attempt(f"{name} {size} {way}", passes, attend, inputs, settings)
            times.setdefault(f"{name} {size}", {})[way] = measured["both_ms"] if measured else float("inf")
        must = lambda each: max(each["output"], each["gradient"]) < TOLERANCE  # noqa: E731
        found.attempt(f"{name} {size} agree", agreement, ways["flex"], ways["varlen"], work.inputs, must=must)
        here = times[f"{name} {size}"]
        best.append(Measured(Shape.of(size, work.layout.trie), FLEX if here["flex"] <= here["varlen"] else VARLEN))
        found.put("fastest", {shape: min(each, key=each.get) for shape, each in times.items()})
        found.put("MEASURED", [repr(each) for each in best])
    # Last: without the package flash-attn-4 there is no such backend, and that is no failure.
    for size, name in shapes:
        found.put(f"{name} {size} flex FLASH", flash_backend(batches(settings)[name], size, settings))


def batches(settings: Settings) -> dict[str, Callable[[], PackedBatch]]:
    """Batches of about 16,000 packed tokens, by name."""
    shrink = settings.choose(1, 16)
    number = settings.choose(1, 32)
    answers = settings.choose({"prompt": (100, 100), "response": (150, 150)}, {"prompt": (9, 9), "response": (7, 7)})
    prompts = {
        "pairs of HH": lambda: dialogues(80 // number, VOCABULARY, shrink=shrink),
        "7 responses": lambda: random_prompts(0, 14 // min(number, 14), VOCABULARY, responses=7, **answers),
        "system prompt of 300": lambda: dialogues(80 // number, VOCABULARY, system=300, shrink=shrink),
    }
    return {name: lambda draw=draw: pack_examples(list(iterate_examples(draw()))).for_gpu() for name, draw in prompts.items()}


def prepare(batch: Callable[[], PackedBatch], size: int, settings: Settings) -> Work:
    """A batch as a run has it on the device, and random inputs with heads of a size."""
    packed, dtype = batch(), settings.choose(torch.bfloat16, torch.float32)
    layout = TrieLayout(packed.trie, pick_device())
    heads, groups = settings.choose(HEADS, {64: (4, 2)})[size]
    like = torch.empty(0, device=pick_device(), dtype=dtype)
    inputs = [random_like(like.new_empty(1, each, 0, size), 1, packed.trie.num_tokens) for each in (heads, groups, groups)]
    return Work(layout, inputs, [length for _, length in packed.trie.ends])


def random_like(tensor: Tensor, rows: int, tokens: int) -> Tensor:
    """Random values [rows, H, tokens, D] with the heads, the dtype and the device of [., H, ., D]; they lie token by token."""
    shape = rows, tokens, tensor.shape[1], tensor.shape[3]
    return torch.randn(shape, dtype=tensor.dtype, device=tensor.device).transpose(1, 2).requires_grad_()


def by_flex(work: Work) -> Callable[[], Tensor]:
    """FlexAttention, as a run computes it."""
    return lambda: attention_by_blocks(*work.inputs, work.layout, Rules())


def by_parts(work: Work, settings: Settings) -> Callable[[], Tensor]:
    """Flash attention in parts, as a run computes it."""
    kernel = settings.choose(TorchFlash(), PlainKernel())
    return lambda: attention_by_parts(*work.inputs, work.layout, Rules(), kernel)


def by_rows(rows: list[Tensor]) -> Callable[[], Tensor]:
    """SDPA over padded rows."""
    return lambda: F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=rows[0].shape[1] != rows[1].shape[1])


def agreement(one: Callable[[], Tensor], other: Callable[[], Tensor], inputs: list[Tensor]) -> dict:
    """The largest difference of two outputs, and of their gradients relative to the norm."""
    first, second = one(), other()
    weights = torch.randn_like(first)
    gradients = [torch.autograd.grad(each, inputs, weights) for each in (first, second)]
    apart = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*gradients, strict=True))
    return {"output": (first - second).abs().max().item(), "gradient": apart}


def flash_backend(batch: Callable[[], PackedBatch], size: int, settings: Settings) -> dict | str:
    """FlexAttention through flash attention's own kernels, which need the package flash-attn-4: its times, or why not."""
    if settings.is_cpu:
        return "it has no kernels for cpu"
    usual = dict(block_attention.KERNEL_OPTIONS)
    block_attention.KERNEL_OPTIONS |= {"BACKEND": "FLASH"}
    torch._dynamo.reset()
    try:
        work = prepare(batch, size, settings)
        return passes(by_flex(work), work.inputs, settings)
    except Exception as error:  # whatever a version without it raises
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        block_attention.KERNEL_OPTIONS |= usual
