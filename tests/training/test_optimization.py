"""The optimizer, which weights decay, the learning rate over a run, and when a run ends."""

import copy
import json
import math
import time
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import evaluation_batches
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.resume import resumable
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions, publish
from preference_training.configuration.schema import SCHEDULES
from preference_training.core.errors import UserError
from preference_training.core.random_streams import seed_everything
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import TokenizedPrompt, tokenize_records
from preference_training.data.toy_preferences import toy_records
from preference_training.distributed.launching import settle_batch_size
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference
from preference_training.tracking.tracker import NoTracker
from preference_training.training.optimizers.building import build_optimizer, check_optimizer, update_kernels
from preference_training.training.optimizers.master_weights import MasterWeights
from preference_training.training.optimizers.notices import precision_notices
from preference_training.training.optimizers.schedules import schedule, warmup_steps
from tests.support.building import build_trainer, weights_of
from tests.support.files import GOLDEN
from trainers import Trainer

LENGTHS = ("max_length=32", "max_prompt_length=16")
PROMPTS = PromptTable.of(TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0], [12 + n, 0]], [(0, 1)]) for n in range(10))


class Said(NoTracker):
    """Remembers the lines that were said."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_message(self, text: str) -> None:
        self.lines.append(text)


def trainer_of(compose, tokenizer, *overrides, run_dir=None, n_examples=None) -> Trainer:
    """SFT of the golden Llama: ten examples, three steps an epoch."""
    config = compose("batch_size=4", "eval_every=4", "warmup_steps=0", *LENGTHS, "lr=1e-3", *overrides)
    seed_everything(0)
    policy = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=getattr(torch, config.model.policy_dtype))
    steps = BatchIterator(
        Schedule(PROMPTS, 4, length=RunLength(n_epochs=config.n_epochs, n_examples=n_examples, n_steps=config.n_steps))
    )
    about = {"config": config.as_dict(), "data": ["a"], "began_with": "b", "wandb_id": "0" * 32}
    writer = run_dir and CheckpointWriter(run_dir, policy, tokenizer, options=SaveOptions(run=about))
    held_out = evaluation_batches(PROMPTS, 4, 4, seed=0)
    made = {"tokenizer": tokenizer, "train": steps, "held_out": held_out, "tracker": Said(), "writer": writer}
    return build_trainer(config, policy, build_loss("sft"), **made)


# ---- the learning rate ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rates(compose):
    """The learning rate of each of ten steps, over `lr`."""

    def rates(*overrides):
        factor = schedule(compose("warmup_steps=2", *overrides), 10)
        return [factor(step) for step in range(10)]

    return rates


def test_constant_rises_in_equal_steps_and_stays(rates):
    assert rates() == pytest.approx([1 / 3, 2 / 3] + [1] * 8)


def test_linear_falls_in_equal_steps_to_its_end_at_the_last_step_and_to_zero_behind_it(rates):
    assert rates("lr_schedule=linear") == pytest.approx([1 / 3, 2 / 3, *(1 - k / 8 for k in range(8))])
    assert rates("lr_schedule=linear", "final_lr_share=0.1")[-1] == pytest.approx(0.1)


def test_cosine_is_half_way_down_in_the_middle(rates):
    found = rates("lr_schedule=cosine", "final_lr_share=0.2", "warmup_steps=1")
    assert found[1] == 1 and found[-1] == pytest.approx(0.2)
    # Step 5 is the middle of steps 1 to 9.
    assert found[5] == pytest.approx((1 + 0.2) / 2)
    assert found[3] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_inverse_sqrt_is_one_at_the_end_of_the_warm_up_and_a_half_after_four_times_as_many_steps(compose):
    factor = schedule(compose("warmup_steps=4", "lr_schedule=inverse_sqrt"), 100)
    assert factor(4) == 1
    assert factor(19) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize("total", [0, 1, 2, 3, 50])
def test_every_schedule_stays_between_0_and_1_however_short_the_run(compose, shape, total):
    factor = schedule(compose(f"lr_schedule={shape}", "warmup_share=0.4"), total)
    assert all(0 <= factor(step) <= 1 for step in range(total + 3))


def test_a_share_of_warm_up_follows_the_length_of_the_run(compose):
    config = compose("warmup_share=0.1")
    assert [warmup_steps(config, total) for total in (5, 100, 2000)] == [0, 10, 200]


def test_a_trainers_last_step_has_the_final_learning_rate(compose, tokenizer):
    trainer = trainer_of(
        compose, tokenizer, "lr_schedule=linear", "final_lr_share=0.25", "n_epochs=2", "n_eval_model_samples=0"
    )
    used = []
    for batch in trainer.batches.train:
        used.append(trainer.step.updater.optimizer.param_groups[0]["lr"])
        trainer.train_step(batch)
    assert used == pytest.approx([1e-3 * (1 - 0.75 * k / 5) for k in range(6)])


@pytest.mark.parametrize(
    ("overrides", "more", "said"),
    [
        # Of three steps all behind the last have lr 0; of six the fourth is half way down.
        (["lr_schedule=cosine"], "n_epochs=2", "is 0.0005 at the next step, where it would have been 0"),
        (["lr_schedule=linear"], "n_epochs=2", "is 0.0005 at the next step, where it would have been 0"),
        (
            ["warmup_steps=null", "warmup_share=0.9"],
            "n_epochs=2",
            "is 0.000667 at the next step, where it would have been 0.001",
        ),
        (["lr_schedule=constant"], "n_epochs=2", None),
        (["lr_schedule=inverse_sqrt", "warmup_steps=1"], "n_epochs=2", None),
    ],
)
def test_a_longer_run_goes_on_by_its_own_schedule_and_says_so(compose, tokenizer, tmp_path, overrides, more, said):
    trainer_of(compose, tokenizer, *overrides, "n_epochs=1", run_dir=tmp_path).train()
    longer = trainer_of(compose, tokenizer, *overrides, more)
    longer.continue_from(Checkpoint.read(tmp_path / "LATEST"))
    lines = [line for line in longer.tracker.lines if line.startswith("resume: the run has")]
    assert len(lines) == (said is not None)
    if said:
        assert lines[0].startswith("resume: the run has 6 steps now, not 3, and lr_schedule=") and lines[0].endswith(said)
    used = []
    longer.tracker.log_step = lambda metrics: used.append(metrics["lr"])
    longer.train()
    factor = schedule(longer.config, 6)
    assert used == pytest.approx([1e-3 * factor(step) for step in (3, 4, 5)])


def test_a_run_that_goes_on_to_the_same_end_says_nothing_of_its_schedule(compose, tokenizer, tmp_path):
    overrides = "lr_schedule=cosine", "n_epochs=2"
    trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path).train()
    again = trainer_of(compose, tokenizer, *overrides, "n_steps=6")
    again.continue_from(Checkpoint.read(tmp_path / "step-8"))
    assert again.tracker.lines == []


def test_every_step_tells_its_learning_rate_epoch_time_and_tokens(compose, tokenizer):
    trainer = trainer_of(compose, tokenizer, "lr_schedule=linear", "n_epochs=2")
    rows = []
    trainer.tracker.log_step = rows.append
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * (1 - k / 6) for k in range(6)])
    sizes = [row["counters/examples"] for row in rows]
    assert [row["epoch"] for row in rows] == pytest.approx([size / (sizes[-1] / 2) for size in sizes])
    assert rows[0]["time"] > 0 and rows[-1]["time"] <= seconds
    assert all(one["time"] < other["time"] for one, other in pairwise(rows))
    # Of ten prompts in two epochs: three tokens, and responses of three and two, each counted once.
    assert rows[-1]["counters/tokens"] == 2 * 10 * (3 + 3 + 2) == trainer.state.tokens
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert "mfu" not in rows[0], "of a CPU no peak is known"


# ---- weights that decay ---------------------------------------------------------------------------------------------------


def test_biases_and_scales_of_norms_do_not_decay(compose):
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(model, compose("optimizer=SGD", "weight_decay=0.5", "lr=0.1"))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name == "0.weight" else 1
        torch.testing.assert_close(weight.detach(), factor * before[name])


def test_without_weight_decay_the_optimizer_has_its_own(compose):
    groups = build_optimizer(nn.Linear(3, 2), compose("optimizer=AdamW")).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01]


# ---- float32 master weights -------------------------------------------------------------------------------------------------

BF16 = "model.policy_dtype=bfloat16"


def toy_prompts(tokenizer) -> PromptTable:
    """48 toy pairs in tokens of the golden tokenizer."""
    rows = list(toy_records("train").items())[:48]
    records = [
        PreferenceRecord(prompt, row["responses"], row["pairs"], row["sft_target"], number, f"row {number}")
        for number, (prompt, row) in enumerate(rows)
    ]
    return PromptTable.of(tokenize_records(records, tokenizer, TokenSettings("pairs", 64, 32)))


@pytest.fixture
def dpo_update(compose, tokenizer):
    """Train the golden Llama with DPO for six steps; returns the whole update of its master weights, or of its weights."""

    def train(dtype: str, *overrides: str) -> torch.Tensor:
        settings = "batch_size=8", "warmup_steps=2", "n_steps=6", f"model.policy_dtype={dtype}", *overrides
        config = compose("loss=dpo", "loss.beta=0.1", *settings)
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=getattr(torch, dtype)) for _ in range(2)
        )
        steps = BatchIterator(Schedule(toy_prompts(tokenizer), 8, length=RunLength(n_epochs=None, n_steps=6)))
        scorer, loss = LiveReference(reference.requires_grad_(False)), build_loss("dpo", beta=0.1)
        trainer = build_trainer(config, policy, loss, scorer, tokenizer=tokenizer, train=steps, tracker=Said())
        for batch in steps:
            trainer.train_step(batch)
        masters = trainer.step.updater.optimizer.masters if trainer.step.updater.has_masters else {}
        for weight, master in masters.items():
            assert torch.equal(weight, master.to(weight.dtype))
        pairs = zip(policy.parameters(), reference.parameters(), strict=True)
        return torch.cat(
            [(masters.get(weight, weight).detach().float() - before.float()).flatten() for weight, before in pairs]
        )

    return train


@pytest.mark.parametrize(("optimizer", "lr"), [("RMSprop", "5e-7"), ("AdamW", "5e-7"), ("SGD", "1e-5")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_with_master_weights_follows_the_run_in_float32(dpo_update, optimizer, lr, dtype):
    settings = f"optimizer={optimizer}", f"lr={lr}"
    exact, found = dpo_update("float32", *settings), dpo_update(dtype, *settings)
    assert torch.cosine_similarity(exact, found, 0) > 0.999
    assert found.norm() / exact.norm() == pytest.approx(1, abs=0.02)


def test_without_master_weights_most_of_an_update_is_rounded_away(dpo_update):
    settings = "optimizer=RMSprop", "lr=5e-7"
    exact, found = dpo_update("float32", *settings), dpo_update("bfloat16", *settings, "master_weights=false")
    assert torch.cosine_similarity(exact, found, 0) < 0.5
    assert found.norm() / exact.norm() < 0.5


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        # Half of the distance of bfloat16's neighbours, 2^-8 of a weight of 0.05, is 2e-4; of float16's, 2^-11 of it, 2.4e-5.
        ([BF16, "lr=5e-7"], True),
        ([BF16, "lr=1.9e-4"], True),
        ([BF16, "lr=2e-4"], False),
        (["model.policy_dtype=float16", "lr=2e-5"], True),
        (["model.policy_dtype=float16", "lr=3e-5"], False),
        # What SGD changes depends on the gradient.
        ([BF16, "lr=0.1", "optimizer=SGD"], True),
        (["lr=5e-7"], False),
        (["lr=5e-7", "model.autocast_dtype=bfloat16"], False),
        (["lr=5e-7", "trainer=FSDPTrainer", "model.fsdp_policy_mp=bfloat16"], False),
        # An adapter is float32 whatever lies under it.
        ([BF16, "lr=5e-7", "+adapter=lora"], False),
        ([BF16, "lr=5e-7", "master_weights=false"], False),
        ([BF16, "lr=1", "master_weights=true"], True),
        (["master_weights=true"], False),
    ],
)
def test_master_weights_are_chosen_by_dtype_and_learning_rate(compose, overrides, kept):
    config = compose(*overrides)
    assert config.keeps_master_weights is kept


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ([], []),
        ([BF16, "lr=5e-7"], ["copies of the bfloat16 weights: updates of lr 5e-07 would be rounded away"]),
        ([BF16, "lr=1e-3"], ["none, bfloat16 weights are updated directly: updates of lr 0.001 are not rounded away"]),
        ([BF16, "master_weights=false"], ["master_weights: none, bfloat16 weights are updated directly"]),
        (["master_weights=true"], ["master_weights: none are needed: model.policy_dtype=float32"]),
        ([BF16, "+adapter=lora", "master_weights=true"], ["none are needed: an adapter's weights are float32"]),
        ([BF16, "+adapter=lora"], []),
        ([BF16, "lr=1e-3", "loss=tr_dpo"], ["updated directly"]),
        ([BF16, "lr=1e-3", "loss=tr_dpo", "loss.reference_update_share=0.1"], ["updated directly", "more than 5 times"]),
    ],
)
def test_what_was_chosen_for_low_precision_weights_is_said(compose, overrides, lines):
    found = precision_notices(compose(*overrides))
    assert len(found) == len(lines) and all(line in text for line, text in zip(lines, found, strict=True))


def test_an_evaluation_makes_no_master_weights(compose, tokenizer):
    trainer = trainer_of(compose, tokenizer, BF16, "lr=5e-7")
    trainer.evaluator.evaluate()
    assert trainer.step.updater.has_masters and not trainer.step.updater.optimizer.masters


@pytest.mark.parametrize(
    "settings", [("optimizer=RMSprop",), ("optimizer=AdamW", "weight_decay=0.1"), ("optimizer=AdamW8bit",)], ids=" ".join
)
def test_a_run_with_master_weights_resumes_bit_for_bit(compose, tokenizer, tmp_path, settings):
    overrides = BF16, "lr=1e-5", "n_epochs=2", "lr_schedule=cosine", "save_every=4", *settings
    whole = trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path)
    whole.train()
    resumed = trainer_of(compose, tokenizer, *overrides)
    resumed.continue_from(Checkpoint.read(tmp_path / "step-4"))
    resumed.train()
    later = whole.tracker.lines[len(whole.tracker.lines) - len(resumed.tracker.lines) :]
    assert resumed.tracker.lines == later and resumed.state.tokens == whole.state.tokens
    for weight, other in zip(whole.models.policy.parameters(), resumed.models.policy.parameters(), strict=True):
        assert torch.equal(weight, other)
        master = whole.step.updater.optimizer.masters[weight]
        assert master.dtype == torch.float32 and torch.equal(master, resumed.step.updater.optimizer.masters[other])
    resumable(tmp_path / "step-4")


def as_before(checkpoint):
    """Make of a checkpoint what a version without master weights would have written."""
    state = json.loads((checkpoint / "state.json").read_text())
    for name in ("master_weights", "tokens"):
        del state[name]
    del state["run"]["config"]["master_weights"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    publish(checkpoint.rename(f"{checkpoint}.partial"), checkpoint)


@pytest.mark.parametrize("masters", ["auto", "false"])
def test_an_older_run_in_bfloat16_goes_on_as_it_would_have(compose, tokenizer, tmp_path, masters):
    overrides = BF16, "lr=1e-4", "optimizer=AdamW", "n_epochs=2", "save_every=4"
    whole = trainer_of(compose, tokenizer, *overrides, "master_weights=false", run_dir=tmp_path)
    whole.train()
    as_before(tmp_path / "step-4")
    resumed = trainer_of(compose, tokenizer, *overrides, f"master_weights={masters}")
    assert resumed.step.updater.has_masters is (masters == "auto")
    resumed.continue_from(Checkpoint.read(tmp_path / "step-4"))
    said = "continues without them; master_weights=true starts them from its weights" in " ".join(resumed.tracker.lines)
    assert said is (masters == "auto")
    resumed.train()
    for weight, other in zip(whole.models.policy.parameters(), resumed.models.policy.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_master_weights_of_an_older_run_start_from_its_weights_and_may_be_dropped(compose, tokenizer, tmp_path):
    overrides = BF16, "lr=1e-4", "optimizer=AdamW", "n_epochs=2", "save_every=4"
    trainer_of(compose, tokenizer, *overrides, "master_weights=false", run_dir=tmp_path).train()
    as_before(tmp_path / "step-4")
    resumed = trainer_of(compose, tokenizer, *overrides, "master_weights=true", run_dir=tmp_path)
    resumed.continue_from(Checkpoint.read(tmp_path / "step-4"))
    assert "they start from its weights" in resumed.tracker.lines[-1]
    for weight, state in resumed.step.updater.optimizer.state.items():
        assert torch.equal(state["master"], weight.float()) and state["exp_avg"].dtype == torch.float32
        assert state["step"] == 1 and state["exp_avg_sq"].any()
    resumed.train()
    dropped = trainer_of(compose, tokenizer, *overrides, "master_weights=false")
    dropped.continue_from(Checkpoint.read(tmp_path / "step-8"))
    assert "are dropped" in dropped.tracker.lines[-1] and not dropped.step.updater.has_masters
    dropped.train()


# ---- optimizers of bitsandbytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "RMSprop8bit", "Lion8bit", "PagedAdamW8bit"])
def test_optimizers_of_eight_bits_train_and_resume_bit_for_bit(compose, tokenizer, tmp_path, optimizer):
    overrides = f"optimizer={optimizer}", "weight_decay=0.1", "n_epochs=1", "lr_schedule=cosine"
    trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path).train()
    whole, resumed = (trainer_of(compose, tokenizer, *overrides) for _ in range(2))
    whole.train()
    resumed.continue_from(Checkpoint.read(tmp_path / "step-4"))
    resumed.train()
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    states = [
        value
        for state in whole.step.updater.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    assert any(value.dtype == torch.uint8 for value in states)
    resumable(tmp_path / "step-4")


# ---- when a run ends --------------------------------------------------------------------------------------------------------


def test_a_run_of_steps_ends_after_them_whatever_an_epoch_leaves(compose, tokenizer):
    # An epoch is 4 + 4 + 2 examples.
    for steps, examples in [(1, 4), (3, 10), (4, 14), (6, 20), (8, 28)]:
        batches = BatchIterator(Schedule(PROMPTS, 4, length=RunLength(n_epochs=None, n_steps=steps)))
        assert batches.schedule.total_examples == examples
        assert batches.schedule.total_steps == steps
        assert [sum(part.num_examples for part in batch) for batch in batches] == ([4, 4, 2] * 3)[:steps]
    assert BatchIterator(Schedule(PROMPTS, 4, length=RunLength(n_epochs=1, n_steps=8))).schedule.total_examples == 10


def test_a_run_stops_when_the_objective_has_not_been_better_for_long_enough(compose, tokenizer, tmp_path):
    overrides = "early_stopping_patience=2", "n_epochs=20", "lr=1e-30"
    trainer = trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path)
    trainer.train()
    # The evaluation before the first step is the best, and the two after it are the same to the last bit.
    assert trainer.state.examples == 8
    assert trainer.tracker.lines[-1].startswith("early stopping: loss/eval was not better than ")
    state = Checkpoint.read(tmp_path / "LATEST").state
    assert state["evaluations_since_best"] == 2 and state["best"] == state["held_out"]["loss/eval"]
    resumed = trainer_of(compose, tokenizer, *overrides)
    resumed.continue_from(Checkpoint.read(tmp_path / "LATEST"))
    assert resumed.finished
    longer = trainer_of(compose, tokenizer, "early_stopping_patience=3", "n_epochs=20", "lr=1e-30")
    longer.continue_from(Checkpoint.read(tmp_path / "LATEST"))
    longer.train()
    # Steps end at 10 and 14, of which the second is the first behind 12.
    assert longer.state.examples == 14


def test_a_run_that_becomes_better_is_not_stopped(compose, tokenizer):
    trainer = trainer_of(compose, tokenizer, "early_stopping_patience=1", "n_epochs=2", "optimizer=AdamW")
    trainer.train()
    assert trainer.state.examples == 20


# ---- sizes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 6),
        (["trainer=FSDPTrainer", "trainer.nproc_per_node=4"], 24),
        (["trainer=TensorParallelTrainer", "trainer.nproc_per_node=4", "trainer.tensor_parallel_size=2"], 12),
        (["trainer=TensorParallelTrainer", "trainer.nproc_per_node=4"], 6),
        (["trainer=FSDPTrainer", "trainer.nproc_per_node=8", "trainer.world_size=512", "dry_run=true"], 6 * 512),
    ],
)
def test_the_batch_follows_from_what_one_device_computes(compose, overrides, expected):
    config = compose("per_device_batch_size=2", "gradient_accumulation_steps=3", "eval_every=20_000", *overrides)
    assert settle_batch_size(config).batch_size == expected


def test_under_a_launcher_its_own_number_of_processes_counts(compose, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    config = compose("per_device_batch_size=2", "trainer=FSDPTrainer", "eval_every=20_000")
    assert settle_batch_size(config).batch_size == 12


def test_a_batch_larger_than_an_interval_is_refused_once_it_is_known(compose):
    config = compose("per_device_batch_size=300", "eval_every=256")
    with pytest.raises(UserError, match="eval_every: found 256, expected at least batch_size, which is 300"):
        settle_batch_size(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lr_schedule=cosin"], "lr_schedule: found 'cosin', expected constant, linear, cosine, inverse_sqrt"),
        (["final_lr_share=1.5"], "final_lr_share: found 1.5, expected a share from 0 to below 1"),
        (["warmup_share=-0.1"], "warmup_share: found -0.1"),
        (["weight_decay=-1"], "weight_decay: found -1, expected a number from 0 or null"),
        (["weight_decay=0.1", "++optimizer_kwargs.weight_decay=0.2"], "given here and in optimizer_kwargs"),
        (["optimizer=AdamW8bit", "trainer=FSDPTrainer"], "do not support sharded weights"),
        (["optimizer=AdamW8bits"], "no optimizer 'AdamW8bits'; did you mean AdamW8bit"),
        (["n_steps=0"], "n_steps: found 0"),
        (["early_stopping_patience=0"], "early_stopping_patience: found 0"),
        (["per_device_batch_size=0"], "per_device_batch_size: found 0"),
        (["n_epochs=null"], "n_epochs, n_examples, n_steps: all are null"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(compose, overrides, message):
    with pytest.raises(UserError, match=message):
        compose(*overrides)


def test_a_batch_size_beside_that_of_one_device_is_refused(compose):
    overrides = ["per_device_batch_size=2", "batch_size=8"]
    with pytest.raises(UserError, match="given together with batch_size, which follows from it"):
        compose(*overrides)


def test_arguments_that_an_optimizer_does_not_take_are_refused(compose):
    with pytest.raises(UserError, match="optimizer_kwargs: AdamW8bit refuses .*'nesterov'"):
        check_optimizer(compose("optimizer=AdamW8bit", "++optimizer_kwargs.nesterov=true"))


def test_gradients_of_several_packs_are_summed_in_float32_beside_master_weights():
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.SGD([weight], lr=1.0))
    # 256 + 1/2 is between two numbers of bfloat16.
    parts = (256.0, 0.5, 0.5)
    optimizer.sum_gradients_in_float32(True)
    for part in parts:
        (weight * part).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad[0] == sum(parts)
    optimizer.step()
    assert weight.dtype == torch.bfloat16 and optimizer.masters[weight][0] == 1 - sum(parts)
    # One alone takes no more memory than its dtype.
    optimizer.sum_gradients_in_float32(False)
    (weight * 2.0).sum().backward()
    assert weight.grad.dtype == torch.bfloat16


def test_without_master_weights_they_are_summed_in_the_dtype_of_the_weights():
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    for part in (256.0, 0.5, 0.5):
        (weight * part).sum().backward()
    assert weight.grad.dtype == torch.bfloat16 and weight.grad[0] == 256


# ---- kernels ----------------------------------------------------------------------------------------------------------------

FUSED, FOREACH = {"fused": True}, {"foreach": True}


@pytest.mark.parametrize(
    ("name", "weights", "is_sharded", "expected"),
    [
        ("AdamW", [("cuda", torch.bfloat16), ("cuda", torch.float32)], False, FUSED),
        ("AdamW", [("cuda", torch.bfloat16)], True, FUSED),
        ("Adam", [("cpu", torch.float32)], True, FUSED),
        ("SGD", [("cuda", torch.float32)], False, FUSED),
        ("SGD", [("cuda", torch.float32)], True, FOREACH),
        ("RMSprop", [("cuda", torch.float32)], True, FOREACH),
        ("RMSprop", [("cpu", torch.float32)], False, {}),
        ("AdamW", [("cuda", torch.complex64)], False, FOREACH),
        ("AdamW", [("meta", torch.float32)], False, {}),
    ],
)
def test_one_kernel_updates_many_weights_where_torch_has_it(name, weights, is_sharded, expected):
    assert update_kernels(getattr(torch.optim, name), weights, is_sharded) == expected


def test_a_kernel_of_the_users_choice_is_used(compose):
    optimizer = build_optimizer(nn.Linear(2, 2), compose("optimizer=AdamW", "++optimizer_kwargs.foreach=true"))
    assert optimizer.defaults["foreach"] and not optimizer.defaults["fused"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", [(FUSED, {"fused": False}), ({"fused": False}, FUSED)])
def test_a_state_of_one_kernel_is_continued_by_another_as_by_itself(compose, dtype, kernels):
    # With float32 master weights for bfloat16. The kernels may differ in the last bit of a step, not in what they keep.
    def built(arguments):
        torch.manual_seed(0)
        layer = nn.Linear(8, 8, dtype=getattr(torch, dtype))
        written = [f"++optimizer_kwargs.{name}={str(value).lower()}" for name, value in arguments.items()]
        config = compose("optimizer=AdamW", "lr=1e-3", f"model.policy_dtype={dtype}", "master_weights=true", *written)
        return layer, build_optimizer(layer, config)

    def step(layer, optimizer, seed):
        torch.manual_seed(seed)
        for weight in layer.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()

    before, after = kernels
    layer, optimizer = built(before)
    for seed in range(3):
        step(layer, optimizer, seed)
    results = []
    for names in (before, after):
        other, continued = built(names)
        other.load_state_dict(copy.deepcopy(layer.state_dict()))
        continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        # A checkpoint's choice is loaded too.
        for group in getattr(continued, "inner", continued).param_groups:
            group |= names
        step(other, continued, 3)
        results.append((other, continued.state_dict()["state"]))
    (one, first), (two, second) = results
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert {number: set(values) for number, values in first.items()} == {number: set(v) for number, v in second.items()}
    assert {float(values["step"]) for values in second.values()} == {4.0}
