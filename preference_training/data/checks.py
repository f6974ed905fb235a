"""What can be checked of a run before anything heavy is imported: whether its loss and its data sets go with its other keys."""

from preference_training.configuration.checks.run import check_objective, check_weights
from preference_training.configuration.schema import RunConfig
from preference_training.data.entries import read_entries
from preference_training.losses.registry import example_kind, model_head


def check_run(config: RunConfig) -> None:
    """Raise UserError where keys do not go with what the loss declares, or an entry of `datasets` cannot be what it is."""
    loss, examples = config.loss.name, example_kind(config.loss.name)
    check_objective(config.objective, loss, examples, model_head(loss), config.rounds is not None)
    check_weights(config, examples)
    read_entries(config)
