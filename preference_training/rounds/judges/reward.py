"""A reward model as a judge: the reward of a response is its score."""

from collections.abc import Sequence
from pathlib import Path

from preference_training.checkpointing.saved_run import newest_checkpoint
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.machine import pick_device, release_memory
from preference_training.rounds.judges.base import Judge, JudgedInput, Score


def reward_model_path(name: str) -> str:
    """The checkpoint of a run directory; any other name as it is: a checkpoint, or one of the Hub."""
    path = Path(name).expanduser()
    return str(newest_checkpoint(path)) if path.is_dir() else name


def check_reward_model(name: str) -> None:
    """Raise UserError where a name is clearly of no reward model: nothing is loaded."""
    path = Path(reward_model_path(name))
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"rounds.judge: reward_model:{name} is a folder without a model. Expected a run of loss=reward, a checkpoint, or a "
            "sequence classifier with one output."
        )
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise UserError(f"rounds.judge: reward_model:{name}: no such folder. Paths are relative to {Path.cwd()}.")


class RewardJudge(Judge):
    """The reward of a model of loss=reward or any sequence classifier with one output. Raises UserError for other models."""

    def __init__(self, name: str, config: RunConfig):
        from preference_training.evaluation.reward_models import RewardModel

        self.model = RewardModel(reward_model_path(name), config.cache_dir, pick_device())
        self.name, self.identity = f"reward_model:{name}", f"reward_model {self.model.identity}"

    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """The reward of each response; None where the model cannot read it."""
        rewards = self.model.rewards([(sample.prompt, sample.response) for sample in samples])
        unread = Score(None, "the reward model cannot read the prompt or the response")
        return [unread if reward is None else Score(reward) for reward in rewards]

    def close(self) -> None:
        """Release the model's memory."""
        del self.model
        release_memory()
