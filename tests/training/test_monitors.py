"""What goes wrong while training is said once, with enough steps behind it, and remembered by a run that goes on."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import iterate_examples
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.adapters.adding import add_adapter
from preference_training.tracking.tracker import NoTracker
from preference_training.training.monitors import COLLAPSE, STEPS, TrainingMonitor, UnchangedWeights
from tests.support.building import build_trainer
from tests.support.files import GOLDEN


class Says(NoTracker):
    """A tracker that keeps the lines that were said."""

    def __init__(self):
        self.said: list[str] = []

    def log_message(self, text: str) -> None:
        self.said.append(text)


class Run:
    """A watch, and the lines that it has said."""

    def __init__(self, spike: float | None = 5.0):
        tracker = Says()
        self.said = tracker.said
        self.monitor = TrainingMonitor(tracker, spike)
        self.examples = 0

    def observe(self, count: int = 1, **metrics: float) -> None:
        """Steps with these metrics: loss, chosen, accuracy."""
        names = {"loss": "loss/train", "chosen": "logps_train/chosen", "accuracy": "rewards_train/accuracies"}
        for _ in range(count):
            self.examples += 8
            named = {names[name]: value for name, value in ({"loss": 1.0} | metrics).items()}
            self.monitor.observe(named | {"counters/examples": self.examples})


def test_a_loss_far_above_its_running_mean_is_said_each_time():
    run = Run(spike=5.0)
    run.observe(STEPS, loss=2.0)
    # The mean is 2, so 10 is not yet more than five times it.
    run.observe(loss=10.0)
    assert run.said == []
    # Of the last 100 losses 99 are 2 and one is 10: 2.08 is the mean.
    run.observe(loss=10.5)
    assert run.said == ["warning: after 816 examples the loss is 10.5, its mean over 100 steps 2.08"]
    run.observe(loss=20.0)
    assert len(run.said) == 2


def test_a_spike_needs_steps_to_be_compared_with_and_a_number_that_says_what_one_is():
    run = Run(spike=5.0)
    run.observe(STEPS - 1, loss=1.0)
    run.observe(loss=1000.0)
    assert run.said == []
    off = Run(spike=None)
    off.observe(STEPS, loss=1.0)
    off.observe(loss=1e9)
    assert off.said == []


def test_a_loss_of_another_sign_is_compared_with_the_size_of_its_mean():
    run = Run(spike=2.0)
    run.observe(STEPS, loss=-1.0)
    run.observe(loss=1.9)
    assert run.said == []
    # The mean of 99 times -1 and once 1.9 is -0.971.
    run.observe(loss=1.95)
    assert len(run.said) == 1


def test_chosen_log_probs_that_fall_by_more_than_fifty_nats_are_said_once():
    run = Run()
    run.observe(STEPS, chosen=-100.0)
    # 100 steps at -150 make the mean fall by exactly COLLAPSE, which is not more.
    run.observe(STEPS, chosen=-100.0 - COLLAPSE)
    assert run.said == []
    run.observe(chosen=-100.0 - COLLAPSE - STEPS)
    assert len(run.said) == 1 and "after 1608 examples the log-prob of preferred responses has fallen by 51 nats" in run.said[0]
    run.observe(STEPS, chosen=-500.0)
    assert len(run.said) == 1


def test_chosen_log_probs_that_rise_or_begin_low_are_no_collapse():
    run = Run()
    run.observe(STEPS, chosen=-1000.0)
    run.observe(STEPS, chosen=-10.0)
    run.observe(STEPS, chosen=-1000.0)
    assert run.said == []


def test_an_accuracy_below_chance_is_said_once_when_it_cannot_be_chance():
    run = Run()
    run.observe(STEPS - 1, accuracy=0.25)
    assert run.said == []
    run.observe(accuracy=0.25)
    assert len(run.said) == 1 and "the reward accuracy of the last 100 steps is 0.25, below chance" in run.said[0]
    run.observe(STEPS, accuracy=0.0)
    assert len(run.said) == 1


@pytest.mark.parametrize(
    ("wins", "said"),
    # Of n steps with accuracy 1 and 100 - n with 0 the mean m is n/100, and its error sqrt(m (1 - m) / 100): two errors are
    # 0.098 at 0.4 and 0.0995 at 0.45, so that 0.40 is below chance by more than two of them, and 0.41 is not.
    [(50, 0), (45, 0), (41, 0), (40, 1), (0, 1)],
)
def test_an_accuracy_is_below_chance_where_half_lies_more_than_two_errors_above_it(wins, said):
    mean = wins / STEPS
    assert (mean + 2 * math.sqrt(mean * (1 - mean) / STEPS) < 0.5) is bool(said)
    run = Run()
    for step in range(STEPS):
        run.observe(accuracy=float(step < wins))
    assert len(run.said) == said


def test_sft_has_no_accuracies_to_be_watched():
    run = Run()
    run.observe(3 * STEPS, chosen=-5.0)
    assert run.said == []


def test_a_watch_that_goes_on_from_its_state_says_what_it_would_have_said():
    whole, first = Run(), Run()
    for run in (whole, first):
        run.observe(60, accuracy=0.0, chosen=-100.0, loss=2.0)
    state = json.loads(json.dumps(first.monitor.state_dict()))
    second = Run()
    second.examples = first.examples
    second.monitor.load_state_dict(state)
    for run in (whole, second):
        run.observe(60, accuracy=0.0, chosen=-100.0, loss=2.0)
        run.observe(100, accuracy=0.0, chosen=-200.0, loss=50.0)
    assert whole.said == first.said + second.said and len(whole.said) > 2
    assert whole.monitor.state_dict() == second.monitor.state_dict()
    # What was said before is not said again.
    third = Run()
    third.monitor.load_state_dict(json.loads(json.dumps(second.monitor.state_dict())))
    third.observe(100, accuracy=0.0, chosen=-300.0, loss=50.0)
    assert third.said == []


# ---- weights that stay ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stepped(compose):
    """Take a trainer's real steps on a model in some dtype, and return what was said."""

    def take(steps: int, dtype: torch.dtype, *overrides: str, n_steps: int = 20) -> list[str]:
        tracker = Says()
        policy = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=dtype)
        prompts = [TokenizedPrompt([5, 6, 7], [[10, 11, 0]], [])]
        batch = [MicroBatch.of(list(iterate_examples(prompts)))]
        config = compose("optimizer=AdamW", "warmup_steps=0", "batch_size=1", *overrides)
        if config.model.lora.r is not None:
            add_adapter(policy, config.model)
        batches = BatchIterator(Schedule(PromptTable.of(prompts), 1, length=RunLength(n_epochs=None, n_steps=n_steps)))
        trainer = build_trainer(config, policy, build_loss("sft"), train=batches, tracker=tracker)
        for _ in range(steps):
            trainer.train_step(batch)
        return tracker.said

    return take


@pytest.mark.parametrize("steps", [1, 3])
def test_a_learning_rate_too_small_for_the_weights_dtype_is_said_once(steps, stepped):
    [told] = stepped(steps, torch.bfloat16, "lr=1e-9")
    assert told.startswith("warning: a step with lr 1e-09 has changed 0.0% of the sampled weights")
    assert "weights in bfloat16" in told and "master_weights=true" in told


def test_of_an_adapter_the_dtype_is_its_own_and_no_master_weights_are_advised(stepped):
    # One whose values are not 0 at the start.
    own = "lr=1e-12", "model.policy_dtype=bfloat16", "+adapter=pissa"
    [told] = stepped(1, torch.bfloat16, *own)
    assert "too small for weights in float32" in told and told.endswith(" Raise lr.")
    # A module that is trained as a whole beside it has the dtype of the model.
    whole = "model.lora.modules_to_save=[lm_head]"
    [told] = stepped(1, torch.bfloat16, *own, whole, "master_weights=false")
    assert "weights in bfloat16" in told and "master_weights=true" in told


def test_a_few_small_weights_that_change_do_not_hide_the_many_that_stay(stepped):
    # A step of AdamW's has the size of lr. A weight w of bfloat16 takes it where it is more than half the distance of its
    # neighbours, w / 512 to w / 256: that is where w is below some 2e-4, of weights with a deviation of 0.02 one in a hundred.
    [told] = stepped(1, torch.bfloat16, "lr=5e-7")
    share = float(told.split("has changed ")[1].split("%")[0])
    assert 0 < share < 3


@pytest.mark.parametrize(
    ("dtype", "lr"), [(torch.bfloat16, "1e-3"), (torch.float16, "1e-3"), (torch.float32, "5e-9"), (torch.float32, "5e-7")]
)
def test_a_step_that_changes_weights_is_not_remarked(dtype, lr, stepped):
    assert stepped(1, dtype, f"lr={lr}", "++optimizer_kwargs.eps=1e-7") == []


def test_master_weights_take_what_bfloat16_would_round_away(stepped):
    assert stepped(3, torch.bfloat16, "lr=5e-7", "model.policy_dtype=bfloat16") == []
    assert len(stepped(3, torch.bfloat16, "lr=5e-7", "model.policy_dtype=bfloat16", "master_weights=false")) == 1


def test_steps_before_the_whole_learning_rate_are_not_looked_at(stepped):
    # While the learning rate rises, its first steps may be too small.
    assert stepped(2, torch.bfloat16, "lr=1e-9", "warmup_steps=2", n_steps=9) == []
    assert len(stepped(3, torch.bfloat16, "lr=1e-9", "warmup_steps=2", n_steps=9)) == 1


def test_of_a_run_shorter_than_its_warm_up_the_last_step_is_looked_at(stepped):
    assert stepped(2, torch.bfloat16, "lr=1e-9", "warmup_steps=150", n_steps=3) == []
    assert len(stepped(3, torch.bfloat16, "lr=1e-9", "warmup_steps=150", n_steps=3)) == 1


def looked_at(*weights: torch.Tensor) -> UnchangedWeights:
    """Weights whose values all have a gradient, but for the first row of each matrix."""
    gradients = [torch.ones_like(weight) for weight in weights]
    for gradient in gradients:
        if gradient.ndim > 1:
            gradient[0] = 0
    return UnchangedWeights(list(zip(weights, gradients, strict=True)))


def test_every_matrix_is_looked_at_all_over_and_what_has_no_gradient_or_is_zero_is_not():
    weights = [torch.ones(40, 64) for _ in range(20)]
    weights[3].zero_()
    still = looked_at(*weights, torch.ones(64))
    assert still.share_changed() == 0
    for weight in weights:
        # The first row has no gradient, as an embedding of a token that is not there.
        weight[1:].add_(1)
    assert still.share_changed() == 1
    for weight in weights[10:]:
        weight[1:].sub_(1)
    # 19 of the 20 hold values other than 0, and 9 of these have changed.
    assert still.share_changed() == pytest.approx(9 / 19)


def test_scales_of_norms_count_only_where_nothing_else_is_trained():
    scales = torch.ones(64)
    still = looked_at(torch.ones(8, 8), scales)
    scales.add_(1)
    assert still.share_changed() == 0
    still = looked_at(scales)
    scales[:32].add_(1)
    assert still.share_changed() == 0.5


def test_where_no_value_has_a_gradient_there_is_no_share():
    # As at the first step of a fresh adapter, one of whose matrices is 0 and the other without a gradient.
    weight = torch.ones(4, 4)
    assert UnchangedWeights([(weight, torch.zeros_like(weight)), (torch.zeros(4, 4), torch.ones(4, 4))]).share_changed() is None


@pytest.mark.parametrize(
    ("overrides", "steps", "said"),
    [
        (["warmup_steps=150"], 9, True),
        # The last of 150 steps has 150/151 of the learning rate, and no step has all of it.
        (["warmup_steps=150"], 150, True),
        (["warmup_steps=150"], 151, False),
        (["warmup_steps=0"], 1, False),
        (["warmup_share=0.1"], 9, False),
    ],
)
def test_a_warm_up_that_is_longer_than_the_run_is_said_before_the_first_step(overrides, steps, said, compose):
    run = Run()
    for _ in range(2):
        run.monitor.check_warmup(compose("lr=5e-7", *overrides), steps)
    assert len(run.said) == said
    if steps == 9 and said and "warmup_steps=150" in overrides:
        # The ninth of 150 steps of warm-up has 9/151 of lr.
        assert run.said[0].startswith(
            "warning: warm-up takes 150 steps, and the run has 9: the learning rate rises to 3e-08, 6%"
        )
        assert "warmup_share=0.1" in run.said[0]


def test_what_prefix_sharing_saved_is_said_once_and_only_where_it_was_on():
    run = Run()
    run.observe(3)
    run.monitor.report_sharing()
    assert run.said == []
    for saved in (0.2, 0.4):
        run.monitor.observe({"loss/train": 1.0, "counters/examples": 8, "tokens_saved": saved})
    state = json.loads(json.dumps(run.monitor.state_dict()))
    run.monitor.report_sharing()
    assert run.said == ["prefix sharing: 30% of the tokens of all rows did not have to be computed"]
    # Of a run that was resumed it is that of all its steps, where its checkpoint has it.
    resumed, older = Run(), Run()
    resumed.monitor.load_state_dict(state)
    older.monitor.load_state_dict({name: state[name] for name in ("newest", "chosen_at_start", "said")})
    for run, share in ((resumed, "40%"), (older, "60%")):
        run.monitor.observe({"loss/train": 1.0, "counters/examples": 8, "tokens_saved": 0.6})
        run.monitor.report_sharing()
        assert run.said == [f"prefix sharing: {share} of the tokens of all rows did not have to be computed"]
