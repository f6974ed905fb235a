"""The optimizer, which weights decay, the learning rate over a run, and when a run ends."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoModelForCausalLM

from batches import BatchIterator, evaluation_batches
from checkpoints import CheckpointWriter, read_state
from configuration import SCHEDULES, check_config
from conftest import GOLDEN
from losses import build_loss
from optimization import build_optimizer, check_optimizer, schedule, warmup_steps
from prompt_table import PromptTable
from resuming import fault_of_run
from tokenization import TokenizedPrompt
from tracking import NoTracker
from train import settle_batch_size
from trainers import BasicTrainer
from utils import UserError, seed_everything

PROMPTS = PromptTable.of(TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0], [12 + n, 0]], [(0, 1)]) for n in range(10))


class Said(NoTracker):
    """Remembers the lines that were said."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def trainer_of(compose, tokenizer, *overrides, run_dir=None, n_examples=None) -> BasicTrainer:
    """SFT of the golden Llama: ten examples, three steps an epoch."""
    config = compose("batch_size=4", "eval_every=4", "warmup_steps=0", "max_length=32", "lr=1e-3", *overrides)
    seed_everything(0)
    policy = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32)
    steps = BatchIterator(PROMPTS, 4, n_epochs=config.n_epochs, n_examples=n_examples, n_steps=config.n_steps)
    about = {"config": OmegaConf.to_container(config, resolve=True), "data": ["a"], "began_with": "b", "wandb_id": "0" * 32}
    writer = run_dir and CheckpointWriter(run_dir, policy, tokenizer, about=about)
    held_out = evaluation_batches(PROMPTS, 4, 4, seed=0)
    return BasicTrainer(config, policy, None, build_loss("sft"), tokenizer, steps, held_out, [], Said(), writer)


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


def test_linear_falls_in_equal_steps_to_its_end_at_the_last_step(rates):
    assert rates("lr_schedule=linear") == pytest.approx([1 / 3, 2 / 3, *(1 - k / 7 for k in range(8))])
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
    config = compose("warmup_share=0.1", "warmup_steps=150")
    assert [warmup_steps(config, total) for total in (5, 100, 2000)] == [0, 10, 200]


def test_a_trainers_last_step_has_the_final_learning_rate(compose, tokenizer):
    trainer = trainer_of(
        compose, tokenizer, "lr_schedule=linear", "final_lr_share=0.25", "n_epochs=2", "n_eval_model_samples=0"
    )
    used = []
    for batch in trainer.train_batches:
        used.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.train_step(batch)
    assert used == pytest.approx([1e-3 * (1 - 0.75 * k / 5) for k in range(6)])


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


# ---- optimizers of bitsandbytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "RMSprop8bit", "Lion8bit", "PagedAdamW8bit"])
def test_optimizers_of_eight_bits_train_and_resume_bit_for_bit(compose, tokenizer, tmp_path, optimizer):
    overrides = f"optimizer={optimizer}", "weight_decay=0.1", "n_epochs=1", "lr_schedule=cosine"
    trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path).train()
    whole, resumed = (trainer_of(compose, tokenizer, *overrides) for _ in range(2))
    whole.train()
    resumed.continue_from(tmp_path / "step-4")
    resumed.train()
    for name, weight in whole.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name
    states = [value for state in whole.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert any(value.dtype == torch.uint8 for value in states)
    assert fault_of_run(tmp_path / "step-4") is None


# ---- when a run ends --------------------------------------------------------------------------------------------------------


def test_a_run_of_steps_ends_after_them_whatever_an_epoch_leaves(compose, tokenizer):
    # An epoch is 4 + 4 + 2 examples.
    for steps, examples in [(1, 4), (3, 10), (4, 14), (6, 20), (8, 28)]:
        batches = BatchIterator(PROMPTS, 4, n_epochs=None, n_steps=steps)
        assert batches.total_examples == examples
        assert batches.total_steps == steps
        assert [sum(part.num_examples for part in batch) for batch in batches] == ([4, 4, 2] * 3)[:steps]
    assert BatchIterator(PROMPTS, 4, n_epochs=1, n_steps=8).total_examples == 10


def test_a_run_stops_when_the_objective_has_not_been_better_for_long_enough(compose, tokenizer, tmp_path):
    overrides = "early_stopping_patience=2", "n_epochs=20", "lr=1e-30"
    trainer = trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path)
    trainer.train()
    # The evaluation before the first step is the best, and the two after it are the same to the last bit.
    assert trainer.examples == 8
    assert trainer.tracker.lines[-1].startswith("early stopping: loss/eval was not better than ")
    state = read_state(tmp_path / "LATEST")
    assert state["evaluations_since_best"] == 2 and state["best"] == state["held_out"]["loss/eval"]
    resumed = trainer_of(compose, tokenizer, *overrides)
    resumed.continue_from(tmp_path / "LATEST")
    assert resumed.finished
    longer = trainer_of(compose, tokenizer, "early_stopping_patience=3", "n_epochs=20", "lr=1e-30")
    longer.continue_from(tmp_path / "LATEST")
    longer.train()
    # Steps end at 10 and 14, of which the second is the first behind 12.
    assert longer.examples == 14


def test_a_run_that_becomes_better_is_not_stopped(compose, tokenizer):
    trainer = trainer_of(compose, tokenizer, "early_stopping_patience=1", "n_epochs=2", "optimizer=AdamW")
    trainer.train()
    assert trainer.examples == 20


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
    check_config(config)
    settle_batch_size(config)
    assert config.batch_size == expected


def test_under_a_launcher_its_own_number_of_processes_counts(compose, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    config = compose("per_device_batch_size=2", "trainer=FSDPTrainer", "eval_every=20_000")
    settle_batch_size(config)
    assert config.batch_size == 12


def test_a_batch_larger_than_an_interval_is_refused_once_it_is_known(compose):
    config = compose("per_device_batch_size=300", "eval_every=256")
    check_config(config)
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
        (["optimizer=AdamW8bit", "trainer=FSDPTrainer"], "do not know weights that lie over several processes"),
        (["optimizer=AdamW8bits"], "no optimizer 'AdamW8bits'; did you mean AdamW8bit"),
        (["n_steps=0"], "n_steps: found 0"),
        (["early_stopping_patience=0"], "early_stopping_patience: found 0"),
        (["per_device_batch_size=0"], "per_device_batch_size: found 0"),
        (["n_epochs=null"], "n_epochs, n_examples, n_steps: all are null"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(compose, overrides, message):
    with pytest.raises(UserError, match=message):
        check_config(compose(*overrides))


def test_a_batch_size_beside_that_of_one_device_is_refused(compose):
    overrides = ["per_device_batch_size=2", "batch_size=8"]
    with pytest.raises(UserError, match="given beside batch_size, which follows from it"):
        check_config(compose(*overrides), overrides)


def test_arguments_that_an_optimizer_does_not_take_are_refused(compose):
    with pytest.raises(UserError, match="optimizer_kwargs: AdamW8bit refuses .*'nesterov'"):
        check_optimizer(compose("optimizer=AdamW8bit", "++optimizer_kwargs.nesterov=true"))
