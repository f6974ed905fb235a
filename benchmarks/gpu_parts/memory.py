"""Memory: whether the token budget fits, how much it uses, whether a dry run is right, and what a head of 128k words takes."""

import time
from itertools import islice

import torch
from torch import nn

from gpu_parts.found import Found, Settings
from gpu_parts.making import (
    BILLION,
    TINY,
    build_config,
    dialogues,
    make_model,
    make_trainer,
    packed,
    peak_memory,
    random_prompts,
    small_of,
)
from preference_training.dry_run.memory_estimate import step_memory
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.scoring_head import MAX_LOGITS_BYTES
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries, share_prefixes
from preference_training.modeling.token_budget import token_budget
from preference_training.training.budget_trial import measured_budget
from trainers import Trainer

# Tokens of one prompt and its two responses, each a third of them.
PART = 100
WORDS = 128 * 1024


def memory(found: Found, settings: Settings) -> None:
    """The budget of 1.4B parameters, filled; and heads of large vocabularies."""
    config = build_config(settings.choose(BILLION, small_of(BILLION)), settings.choose("bfloat16", "float32"))
    model = make_model(config, settings)
    found.attempt("shares", share_prefixes, model, "auto", must=lambda shares: shares)
    limit = token_budget(model).limit
    found.put("limit", limit)
    # The trie of a very long pack takes long to build; what is measured is a token's share.
    for share in settings.choose((0.25, 1.0), (0.002,)):
        found.attempt(f"{share:g} of the budget", fill, model, int(min(limit, 200_000) * share), settings, must=fits)
    for kind in (False, "selective", True):
        found.attempt(f"activation checkpointing, {kind}", checkpointed, model, kind, settings)
    del model
    found.attempt("a step, as a dry run estimates it", step_and_estimate, settings, must=agree)
    found.attempt("the budget on trial", budget_on_trial, settings, must=leaves_gaps)
    for frozen in (False, True):
        found.attempt(f"head, {'frozen' if frozen else 'trained'}", head, frozen, settings, must=is_small)


def fill(model: nn.Module, tokens: int, settings: Settings) -> dict:
    """A forward and backward pass of `tokens` tokens: peak memory, and that of activations alone."""
    prompts = random_prompts(0, max(1, tokens // (3 * PART)), prompt=(PART, PART), response=(PART, PART))
    batch = packed(prompts, settings)
    held = 0 if settings.is_cpu else torch.cuda.memory_allocated()
    with peak_memory(settings) as found:
        response_scores(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)
    result = {"tokens": len(batch.input_ids), **found}
    if found:
        total = torch.cuda.get_device_properties(0).total_memory
        weights = sum(weight.nbytes for weight in model.parameters())
        bytes_a_token = (found["peak_gb"] * 1e9 - held - weights) / result["tokens"]
        result |= {"bytes_a_token": round(bytes_a_token), "of_device": found["peak_gb"] * 1e9 / total}
    return result


def step_trainer(settings: Settings, pairs: int) -> Trainer:
    """DPO of 1.4B parameters with a live reference and AdamW on rows of HH's lengths, in one pack a step."""
    values = settings.choose(BILLION, small_of(BILLION))
    overrides = ("optimizer=AdamW", f"batch_size={pairs}", "max_tokens_per_microbatch=1000000", "reference_logps=live")
    config = build_config(values, settings.choose("bfloat16", "float32"), *overrides)
    return make_trainer(config, settings, dialogues(pairs * 4, values["vocab_size"]))


def step_and_estimate(settings: Settings) -> dict:
    """The peak of a step once the optimizer has its states, and a dry run's estimate of it. Unit: GB."""
    trainer = step_trainer(settings, settings.choose(32, 2))
    first, second = islice(trainer.batches.train, 2)
    trainer.train_step(first)
    with peak_memory(settings) as found:
        trainer.train_step(second)
    packs = [pack for part in second for pack in part.packs]
    kinds = step_memory(trainer.placement, trainer.models.loss, True, packs)
    result = {"tokens": len(packs[0].input_ids), "estimated_gb": sum(kinds.values()) / 1e9, **found}
    return result | ({"ratio": result["estimated_gb"] / found["peak_gb"]} if found else {})


def agree(result: dict) -> bool:
    """Whether the estimate is within 10% of what was measured."""
    return abs(result.get("ratio", 1) - 1) <= 0.1


def budget_on_trial(settings: Settings) -> dict:
    """The budget that packs on trial give, and the share of the device that a step with packs of that size takes."""
    trainer = step_trainer(settings, settings.choose(512, 2))
    models, table = trainer.models, trainer.batches.train.schedule.prompts
    models.reference = None
    estimated = token_budget(models.policy).limit
    budget = measured_budget(trainer.placement, models.policy, models.loss, table, live_reference=True)
    if budget is None:
        return {"estimated": estimated}
    models.reference = trainer.placement.reference(models.policy)
    trainer.batches.train.budget = budget
    batches = islice(trainer.batches.train, 2)
    trainer.train_step(next(batches))
    with peak_memory(settings) as found:
        trainer.train_step(next(batches))
    total = torch.cuda.get_device_properties(0).total_memory
    return {"limit": budget.limit, "estimated": estimated, **found, "of_device": found["reserved_gb"] * 1e9 / total}


def leaves_gaps(result: dict) -> bool:
    """Whether a step at the budget left at least half of the reserve free."""
    return result.get("of_device", 0) < 0.95


def checkpointed(model: nn.Module, kind: bool | str, settings: Settings) -> dict:
    """What a pack takes, and how long, with a kind of activation checkpointing; once before, to compile."""
    model.train()
    if kind:
        enable_activation_checkpointing(model, kind)
    tokens = settings.choose(30_000, 600)
    fill(model, tokens, settings)
    began = time.perf_counter()
    return fill(model, tokens, settings) | {"seconds": round(time.perf_counter() - began, 3)}


def fits(result: dict) -> bool:
    """Whether a pack left room for gradients and optimizer states; out of memory is an error of its own."""
    return result.get("of_device", 0) < 0.9


def head(frozen: bool, settings: Settings) -> dict:
    """What the head of a small model with 128k words takes for many scored tokens, above its gradient."""
    words = settings.choose(WORDS, 4096)
    values = {"model_type": "llama", "num_key_value_heads": 2} | TINY | {"vocab_size": words, "tie_word_embeddings": False}
    model = make_model(build_config(values, settings.choose("bfloat16", "float32")), settings)
    attend_over_tries(model)
    output = model.get_output_embeddings()
    output.weight.requires_grad_(not frozen)
    batch = packed(random_prompts(0, settings.choose(64, 2), words, prompt=(5, 5), response=(250, 250)), settings)
    held = 0 if settings.is_cpu else torch.cuda.memory_allocated()
    with peak_memory(settings) as found:
        response_scores(model, batch).sum().backward()
    scored = len(batch.scored_ids)
    result = {"scored_tokens": scored, "gb_of_all_logits": 4 * scored * words / 1e9, **found}
    if found:
        result["gb_above_weights"] = found["peak_gb"] - (held + 2 * output.weight.nbytes) / 1e9
    return result


def is_small(result: dict) -> bool:
    """Whether logits existed in chunks only: three copies of the largest chunk at most, and activations of a tiny model."""
    return result.get("gb_above_weights", 0) < 3 * MAX_LOGITS_BYTES / 1e9 + 0.5
