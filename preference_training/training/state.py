"""How far a run is, as its checkpoints keep it."""

from dataclasses import asdict, dataclass

from preference_training.core.metric_names import EXAMPLES, TOKENS, UPDATES
from preference_training.tracking.tracker import Metrics


@dataclass
class RunState:
    """The counters of a run, and what its evaluations have found.

    examples, updates, tokens: trained on so far. bad_steps: steps in a row that were skipped. evaluated_at: the number of
    examples at the newest evaluation, and held_out its mean metrics. best: the best value of `objective` so far.
    reference_answers: the reference's answers to the sample prompts, while they are known.
    """

    examples: int = 0
    updates: int = 0
    tokens: int = 0
    bad_steps: int = 0
    evaluated_at: int | None = None
    held_out: dict[str, float] | None = None
    best: float | None = None
    evaluations_since_best: int = 0
    reference_answers: list[str] | None = None

    def counters(self) -> Metrics:
        """The counters as metrics."""
        return {EXAMPLES: self.examples, UPDATES: self.updates, TOKENS: self.tokens}

    def state_dict(self) -> dict:
        """All of it, as plain values."""
        return asdict(self)

    def load_state_dict(self, saved: dict) -> None:
        """Load what `state_dict` returned; checkpoints of early versions count no tokens."""
        for name in asdict(self):
            setattr(self, name, saved.get(name, 0) if name == "tokens" else saved[name])
