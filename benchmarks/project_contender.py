"""This project as a contender: its own configuration, loading, batches and training step, on the given rows.

`build` assembles a trainer as `train.py` does; only `_overrides` names this project's options.
"""

import time
from pathlib import Path

from measure import Clock, clocked
from works import Work

from preference_training.batching import micro_batches
from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import UNLIMITED, TokenBudget
from preference_training.batching.schedule import Schedule
from preference_training.configuration.validation import configured
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt

ROOT = Path(__file__).parent.parent

SEED = 0


def run(job: dict, work: Work, data: dict) -> dict:
    """Train on the rows; `worker.py` describes the result."""
    trainer = build(job, work, _tokenized(data["prompts"]))
    clock, rows, building = Clock(), [], []
    # Packs are built in a thread of their own, beside the step before.
    clocked(micro_batches, "build_packs", building, time.thread_time)
    clock.start()
    for step in trainer.batches.train:
        rows.append(trainer.train_step(step))
        clock.tick()
    result = {"seconds": clock.seconds, "losses": [float(row["loss/train"]) for row in rows], "building_seconds": building}
    if work.loss == "dpo":
        result |= {f"{name}_logps": [float(row[f"logps_train/{name}"]) for row in rows] for name in ("chosen", "rejected")}
    return result


def build(job: dict, work: Work, prompts: PromptTable):
    """A trainer as in `train.py`, without evaluation, sampling, checkpoints and logging."""
    from preference_training.core.machine import quiet_libraries, tune_malloc
    from preference_training.core.random_streams import seed_everything
    from preference_training.losses.registry import build_loss
    from preference_training.modeling.reference_cache import ReferencePlan
    from preference_training.modeling.token_budget import token_budget
    from preference_training.modeling.tokenizer import load_tokenizer
    from preference_training.tracking.tracker import NoTracker
    from preference_training.training.assembly import make_reference
    from preference_training.training.parts import Batches, Models, Observers
    from trainers import TRAINERS, placement_for

    quiet_libraries()
    tune_malloc(keep_freed=True)
    config = _config(job, work)
    seed_everything(config.seed)
    loss = build_loss(**config.loss.given(), seed=config.seed)
    tokenizer = load_tokenizer(config.model, config.cache_dir)
    placement = placement_for(config).start(config, tokenizer)
    policy = placement.load_policy()
    # No pack holds two examples under a budget of one token.
    budget = TokenBudget(1, 1) if job["contender"] == "alone" else token_budget(policy, config.max_tokens_per_microbatch)
    batches = _iterator(prompts, work, budget)
    reads = ReferencePlan(batches.schedule.prompts_seen, batches.schedule.prompts_seen)
    reference = make_reference(config, placement, policy, reads, False) if loss.needs_reference else None
    parts = Models(policy, reference, loss), Batches(batches), Observers(NoTracker())
    return TRAINERS[config.trainer.name](placement, *parts)


def _config(job: dict, work: Work):
    """The composed configuration of a contender."""
    import train  # noqa: F401  registers the resolver that the configuration uses

    return configured(*_overrides(job, work))


def _overrides(job: dict, work: Work) -> list[str]:
    """The command line of a contender, without warm-up, so that every step uses the full learning rate."""
    overrides = {
        "seed": SEED,
        "model": "blank_model",
        "model.name_or_path": job["model_dir"],
        "model.policy_dtype": job["dtype"],
        "batch_size": work.examples_per_step,
        "max_length": job["model"]["max_position_embeddings"],
        "n_epochs": 1,
        "optimizer": "AdamW",
        "++optimizer_kwargs.weight_decay": 0.0,
        "lr": 1e-6,
        "warmup_steps": 0,
        "max_grad_norm": 10.0,
        "loss": work.loss,
        # Holds the cached log-probs of the reference.
        "local_dirs": f"[{job['output_dir']}]",
        "reference_logps": "cached" if work.cached else "live",
        "prefix_sharing": "off" if job["contender"] == "padded" else "on",
    }
    if work.loss == "dpo":
        overrides["loss.beta"] = 0.1
    return [f"{key}={value}" for key, value in overrides.items()]


# ---- rows -----------------------------------------------------------------------------------------------------------------


def prompt_order(prompts: list[dict], work: Work) -> list[int]:
    """The index of each prompt in training order; the pairs of a prompt stay together."""
    steps = _iterator(_tokenized(prompts), work, UNLIMITED)
    sources = [source for step in steps for micro_batch in step for pack in micro_batch.packs for source in pack.sources]
    return list(dict.fromkeys(int(source.removeprefix("prompt ")) for source in sources))


def _tokenized(prompts: list[dict]) -> PromptTable:
    """The rows as this project's prompts, numbered by index."""
    return PromptTable.of(
        TokenizedPrompt(row["prompt"], row["responses"], [tuple(pair) for pair in row["pairs"]], number=number)
        for number, row in enumerate(prompts)
    )


def _iterator(prompts: PromptTable, work: Work, budget: TokenBudget) -> BatchIterator:
    return BatchIterator(Schedule(prompts, work.examples_per_step, SEED), packing=Packing(budget))
