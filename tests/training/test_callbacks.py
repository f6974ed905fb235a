"""A user's callbacks are told of steps, evaluations, checkpoints and the end, and may end a run."""

import pytest
from transformers import AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import evaluation_batches
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.core.errors import UserError
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.tracking.callbacks import Callback, Callbacks
from preference_training.tracking.run_files import json_lines
from preference_training.tracking.tracker import Tracker
from tests.support.building import build_trainer
from tests.support.files import GOLDEN

PROMPTS = PromptTable.of(TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0]], []) for n in range(12))


class Told(Callback):
    """Keeps what it is told, in order; `answers` are what it says to a method at the count of examples."""

    def __init__(self, **answers):
        self.told, self.answers = [], answers

    def on_step(self, metrics):
        self.told.append(("step", metrics["counters/examples"], metrics["loss/train"]))
        return self.answers.get("step", {}).get(metrics["counters/examples"])

    def on_evaluation(self, metrics):
        self.told.append(("evaluation", metrics["counters/examples"], metrics["loss/eval"]))
        return self.answers.get("evaluation", {}).get(metrics["counters/examples"])

    def on_checkpoint(self, path):
        assert (path / "checksums.json").is_file()
        self.told.append(("checkpoint", path.name))

    @property
    def steps(self) -> list[int]:
        return [told[1] for told in self.told if told[0] == "step"]


@pytest.fixture
def trained(compose, tokenizer, tmp_path):
    """SFT of the golden Llama over three steps of four examples, evaluated after each other, with callbacks."""

    def train(*callbacks, background: bool = False):
        config = compose("batch_size=4", "eval_every=8", "warmup_steps=0", "lr=1e-3", "max_length=32", "max_prompt_length=16")
        policy = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama")
        batches = BatchIterator(Schedule(PROMPTS, 4, length=RunLength(n_epochs=1)))
        held_out = evaluation_batches(PROMPTS, 4, None, seed=0)
        with (
            Tracker(tmp_path, 12) as tracker,
            CheckpointWriter(tmp_path, policy, tokenizer, options=SaveOptions(background=background)) as writer,
        ):
            trainer = build_trainer(
                config,
                policy,
                build_loss("sft"),
                tokenizer=tokenizer,
                train=batches,
                held_out=held_out,
                tracker=tracker,
                writer=writer,
                callbacks=Callbacks(callbacks),
            )
            trainer.train()
        return trainer

    return train


@pytest.mark.parametrize("background", [False, True])
def test_a_callback_is_told_what_metrics_jsonl_has_and_of_every_checkpoint(trained, tmp_path, background):
    told = Told()
    trained(told, background=background)
    rows = list(json_lines(tmp_path / "metrics.jsonl"))
    expected = [
        ("step", row["counters/examples"], row["loss/train"])
        if "loss/train" in row
        else ("evaluation", row["counters/examples"], row["loss/eval"])
        for row in rows
    ]
    assert [each for each in told.told if each[0] != "checkpoint"] == expected
    assert [each[0] for each in expected] == ["evaluation", "step", "step", "evaluation", "step", "evaluation"]
    # Written in the background, a checkpoint may be complete before the next step or after it.
    assert [each[1] for each in told.told if each[0] == "checkpoint"] == ["step-8", "step-12"]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"step": {4: True}}, "on_step of a callback has asked for it"),
        ({"step": {4: "good enough"}}, "good enough"),
        ({"step": {4: False, 8: None}}, None),
        ({"evaluation": {0: "bad from the start"}}, "bad from the start"),
    ],
)
def test_a_callback_ends_the_run_after_its_step_with_an_evaluation_and_a_checkpoint(trained, tmp_path, answers, reason):
    told = Told(**answers)
    trained(told)
    assert told.steps == ([4] if reason else [4, 8, 12])
    assert told.told[-1] == ("checkpoint", f"step-{told.steps[-1]}") and told.told[-2][:2] == ("evaluation", told.steps[-1])
    events = [row["text"] for row in json_lines(tmp_path / "events.jsonl")]
    assert [text for text in events if text.startswith("callback: ")] == ([f"callback: {reason}"] if reason else [])


def test_a_callback_needs_only_the_methods_that_it_is_interested_in_and_an_error_in_it_is_the_users(trained):
    class Fails:
        def on_evaluation(self, metrics):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        trained(Fails())


@pytest.mark.parametrize("wrong", [object(), print, Told])
def test_what_is_no_callback_is_refused(wrong):
    with pytest.raises(UserError, match="callbacks: found .*, expected an object with at least one of the methods on_step"):
        Callbacks([wrong])


def test_other_processes_than_that_of_rank_0_call_nothing():
    told = Told()
    callbacks = Callbacks([told], calls=False)
    assert callbacks and not callbacks.read("on_step")
    callbacks.call("on_evaluation", {"counters/examples": 4, "loss/eval": 1.0})
    assert told.told == []
