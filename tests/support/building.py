"""One builder of trainers for all tests."""

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.schedule import Schedule
from preference_training.data.prompt_table import PromptTable
from preference_training.distributed.placement import OneProcess
from preference_training.tracking.tracker import NoTracker
from preference_training.training.parts import Batches, Models, Observers
from trainers import BasicTrainer, Trainer


def build_trainer(
    config,
    policy,
    loss,
    reference=None,
    *,
    tokenizer=None,
    placement=None,
    train=None,
    held_out=(),
    sample_prompts=(),
    start_check=None,
    tracker=None,
    trainer_class: type[Trainer] = BasicTrainer,
    **observers,
) -> Trainer:
    """A trainer on models that are there; without batches it is for single steps. observers: by their names in `Observers`."""
    steps = BatchIterator(Schedule(PromptTable.of([]), config.batch_size)) if train is None else train
    return trainer_class(
        placement or OneProcess(config, tokenizer),
        Models(policy, reference, loss, start_check),
        Batches(steps, held_out, sample_prompts),
        Observers(tracker or NoTracker(), **observers),
    )


def weights_of(trainer: Trainer) -> dict:
    """The policy's weights as a checkpoint would hold them."""
    return trainer.placement.weights(trainer.models.policy)


def take_steps(trainer: Trainer, until: int | None = None) -> None:
    """Take the steps of a trainer, up to so many updates or to their end, without evaluations and checkpoints."""
    for batch in trainer.batches.train:
        trainer.train_step(batch)
        if trainer.state.updates == until:
            break
