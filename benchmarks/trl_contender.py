"""TRL as a contender: DPOTrainer and SFTTrainer on token ids, with their fastest or their default settings."""

from importlib.util import find_spec

import torch
from datasets import Dataset
from measure import Clock
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from works import Work


def run(job: dict, work: Work, data: dict) -> dict:
    """Train on the rows; `worker.py` describes the result."""
    rows = [data["prompts"][number] for number in data["order"]]
    settings = _needed(job, work)
    if job["contender"] == "trl":
        settings |= _fast(job, work) | job["trl_options"]
    accumulation = settings.setdefault("gradient_accumulation_steps", 1)
    settings["per_device_train_batch_size"] = work.examples_per_step // accumulation
    config, trainer, dataset = (SFTConfig, _Sft, _sft_rows(rows)) if work.loss == "sft" else (DPOConfig, _Dpo, _dpo_rows(rows))
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(job["model_dir"])
    trainer = trainer(
        model=job["model_dir"],
        args=config(output_dir=job["output_dir"], **settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[_Ticks(clock)],
    )
    trainer.train()
    return {"seconds": clock.seconds, **trainer.seen(accumulation)}


# ---- settings -------------------------------------------------------------------------------------------------------------


def _needed(job: dict, work: Work) -> dict:
    """The settings that TRL needs for the same arithmetic on the same rows in the same order, and nothing more."""
    settings = {
        "model_init_kwargs": {"dtype": job["dtype"]},
        # TRL would otherwise compute in bfloat16, even on a CPU.
        "bf16": job["dtype"] == "bfloat16",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 10.0,
        # No row is as long.
        "max_length": job["model"]["max_position_embeddings"],
        "max_steps": job["steps"],
        "train_sampling_strategy": "sequential",
        "use_cpu": job["device"] == "cpu",
        "save_strategy": "no",
        "report_to": "none",
    }
    if work.loss == "sft":
        return settings | {"completion_only_loss": True}
    return settings | {"beta": 0.1, "precompute_ref_log_probs": work.cached}


def _fast(job: dict, work: Work) -> dict:
    """TRL's fastest settings that do not change the losses.

    Also off: `padding_free`, which DPOTrainer ignores in this version and which was no faster than micro-batches of one for
    SFTTrainer; and sorting by length, which changes the order of the rows.
    """
    settings = {
        # transformers' fused attention: the default, set explicitly.
        "model_init_kwargs": {"dtype": job["dtype"], "attn_implementation": "sdpa"},
        # On by default; trades time for memory.
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if job["device"] == "cpu":
        # A single pair is padded only to its own longer response, not to the longest row of the batch: on HH this is 2.4 times
        # as fast as the whole batch at once, with a third of its peak memory (SFT: 1.4 times). Two halves gain a tenth.
        settings["gradient_accumulation_steps"] = work.examples_per_step
    elif find_spec("liger_kernel"):
        # Triton kernels, on a GPU only. The best way to split the batch there has not been measured.
        settings["use_liger_kernel"] = True
    return settings


# ---- rows -----------------------------------------------------------------------------------------------------------------


def _dpo_rows(prompts: list[dict]) -> Dataset:
    """One row per pair, the format that TRL expects."""
    return Dataset.from_list(
        [
            {"prompt_ids": row["prompt"], "chosen_ids": row["responses"][i], "rejected_ids": row["responses"][j]}
            for row in prompts
            for i, j in row["pairs"]
        ]
    )


def _sft_rows(prompts: list[dict]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "input_ids": row["prompt"] + response,
                "completion_mask": [0] * len(row["prompt"]) + [1] * len(response),
            }
            for row in prompts
            for response in row["responses"]
        ]
    )


# ---- trainers -------------------------------------------------------------------------------------------------------------


class _Ticks(TrainerCallback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_begin(self, *_, **__):
        self.clock.start()

    def on_step_end(self, *_, **__):
        self.clock.tick()


class _Dpo(DPOTrainer):
    """DPOTrainer that accepts token ids instead of text, and records the results of each micro-batch."""

    def _prepare_dataset(self, dataset, *_):
        self.kept = []
        return dataset

    def compute_loss(self, *arguments, **options):
        loss = super().compute_loss(*arguments, **options)
        # TRL's own metrics have the log-probs, already on the host.
        chosen, rejected = (self._metrics["train"][f"logps/{name}"][-1] for name in ("chosen", "rejected"))
        self.kept.append((loss.detach(), chosen, rejected))
        return loss

    def seen(self, accumulation: int) -> dict:
        """Losses and mean log-probs of each step, averaged over its micro-batches of equal size."""
        means = torch.tensor(self.kept).view(-1, accumulation, 3).mean(1)
        names = ("losses", "chosen_logps", "rejected_logps")
        return {name: values.tolist() for name, values in zip(names, means.unbind(1), strict=True)}


class _Sft(SFTTrainer):
    """SFTTrainer with this project's loss: summed over a response's tokens, averaged over the responses of a step.

    TRL's own loss is the mean over all tokens of a step, which differs by a factor known before the step.
    """

    kept = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        loss = loss * (num_items_in_batch / size)
        self.kept = [*(self.kept or []), loss.detach()]
        return loss

    def seen(self, accumulation: int) -> dict:
        """Losses of each step, summed over its micro-batches, each of which contributes a share."""
        return {"losses": torch.tensor(self.kept).view(-1, accumulation).sum(1).tolist()}
