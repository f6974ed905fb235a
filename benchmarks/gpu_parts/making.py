"""Models, rows and trainers of any size, made of nothing."""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import rows
import torch
from torch import nn

import train  # noqa: F401  registers the resolver that the configuration uses
from gpu_parts.found import Settings
from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import PackedBatch, iterate_examples, pack_examples
from preference_training.batching.schedule import Schedule
from preference_training.configuration.validation import configured
from preference_training.core.machine import allow_tf32, pick_device
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.loading import build_untrained
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.token_budget import token_budget
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.tracking.tracker import NoTracker
from preference_training.training.parts import Batches, Models, Observers
from trainers import Trainer, placement_for

VOCABULARY = 2000


def shape(**values) -> list[str]:
    """Overrides that give the model an architecture and a size."""
    return [f"++model.from_config.{key}={json.dumps(value)}" for key, value in values.items()]


SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
GROUPED = SMALL | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
WINDOWED = GROUPED | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "llama": SMALL | {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4},
    "gpt_neox": SMALL | {"model_type": "gpt_neox", "num_attention_heads": 4},
    "qwen3": GROUPED | {"model_type": "qwen3"},
    # Layers with a window and without; gemma2's scores have a soft limit, gpt_oss's attention has sinks.
    "gemma2": WINDOWED | {"model_type": "gemma2", "query_pre_attn_scalar": 64},
    "gemma3": WINDOWED | {"model_type": "gemma3_text", "query_pre_attn_scalar": 64},
    "gpt_oss": WINDOWED | {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
    # As Pythia 2.8b has it.
    "head_80": SMALL | {"model_type": "gpt_neox", "hidden_size": 320, "num_attention_heads": 4},
}
# 1.4B parameters, as Pythia has them.
BILLION = {
    "model_type": "gpt_neox", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 8192, "max_position_embeddings": 2048, "vocab_size": 50304, "tie_word_embeddings": False,
}  # fmt: skip
# As Llama 3.1 8B.
EIGHT_BILLION = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
# The same in a size for a CPU.
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": VOCABULARY}


def small_of(values: dict) -> dict:
    """An architecture in a size for a CPU."""
    heads = {"num_key_value_heads": 2} if "num_key_value_heads" in values else {}
    return values | TINY | heads


def build_config(values: dict, dtype: str, *overrides: str):
    """The configuration of a run with a random model of an architecture and a dtype."""
    return configured(
        "model=tiny", "wandb.enabled=false", f"model.policy_dtype={dtype}", *shape(**values), "n_epochs=1", "lr=1e-6",
        "warmup_steps=0", "loss=dpo", "prefix_sharing=on", *overrides,
    )  # fmt: skip


def make_model(config, settings: Settings) -> nn.Module:
    """A random model as a run would load it, made where it computes, without the proof of prefix sharing."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = build_untrained(config.model, load_tokenizer(config.model))
    model.compute_device = pick_device()
    if config.activation_checkpointing:
        enable_activation_checkpointing(model, config.activation_checkpointing)
    return model


def random_prompts(
    seed: int, number: int, vocabulary: int = VOCABULARY, prompt=(5, 250), response=(2, 120), responses: int = 2
) -> list[TokenizedPrompt]:
    """Prompts of random tokens and uniform lengths, whose first response is preferred to all others."""
    source = random.Random(seed)
    draw = lambda bounds: source.choices(range(3, vocabulary), k=source.randint(*bounds))  # noqa: E731
    pairs = [(0, other) for other in range(1, responses)]
    return [TokenizedPrompt(draw(prompt), [draw(response) for _ in range(responses)], pairs) for _ in range(number)]


def packed(prompts: Sequence[TokenizedPrompt], settings: Settings) -> PackedBatch:
    """All examples of prompts in one pack on the device, prepared as a run prepares them."""
    batch = pack_examples(list(iterate_examples(prompts)))
    return batch if settings.is_cpu else batch.for_gpu().to(pick_device())


def dialogues(number: int, vocabulary: int, system: int = 0, shrink: int = 1) -> list[TokenizedPrompt]:
    """Pairs of random tokens with the lengths of HH's harmless dialogues, behind a system prompt that all share.

    shrink: what lengths are divided by.
    """
    source = random.Random(0)

    def draw(length: tuple[float, float]) -> list[int]:
        tokens = min(rows.LONGEST // 2, max(1, round(source.lognormvariate(*length) / shrink)))
        return source.choices(range(3, vocabulary), k=tokens)

    shared = source.choices(range(3, vocabulary), k=system // shrink)
    lengths = rows.CHOSEN_LENGTH, rows.REJECTED_LENGTH
    return [
        TokenizedPrompt(shared + draw(rows.PROMPT_LENGTH), [draw(length) for length in lengths], [(0, 1)], number=place)
        for place in range(number)
    ]


def make_trainer(config, settings: Settings, prompts: Sequence[TokenizedPrompt]) -> Trainer:
    """A trainer of a random model on prompts, without evaluation, sampling, checkpoints and logging."""
    allow_tf32(config.tf32)
    tokenizer = load_tokenizer(config.model)
    placement = placement_for(config).start(config, tokenizer)
    policy = make_model(config, settings)
    share_prefixes(policy, config.prefix_sharing, config.prefix_attention)
    loss = build_loss(**config.loss.given(), seed=config.seed)
    reference = placement.reference(policy) if loss.needs_reference else None
    packing = Packing(token_budget(policy, config.max_tokens_per_microbatch))
    batches = BatchIterator(Schedule(PromptTable.of(prompts), config.batch_size, 0), packing=packing)
    return type_of(config)(placement, Models(policy, reference, loss), Batches(batches), Observers(NoTracker()))


def type_of(config) -> type[Trainer]:
    """The trainer that a configuration names."""
    from trainers import TRAINERS

    return TRAINERS[config.trainer.name]


def wait(settings: Settings) -> None:
    """Wait for the device."""
    if not settings.is_cpu:
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object], repeat: int, settings: Settings) -> float:
    """The mean time of a call after a first one."""
    from time import perf_counter

    call()
    wait(settings)
    began = perf_counter()
    for _ in range(repeat):
        call()
    wait(settings)
    return round((perf_counter() - began) / repeat * 1e3, 3)


@contextmanager
def peak_memory(settings: Settings):
    """A dict that has the peak memory of the device since the context began, once it has ended. Unit: GB."""
    found: dict[str, float] = {}
    if not settings.is_cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if not settings.is_cpu:
        torch.cuda.synchronize()
        found |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
