"""The checkpoint that an export reads: its state, its tokenizer and its model."""

from dataclasses import dataclass
from pathlib import Path

from preference_training.checkpointing.checkpoint import Checkpoint, DamagedError
from preference_training.checkpointing.saved_run import SavedRun, newest_checkpoint
from preference_training.core.errors import UserError
from preference_training.modeling.tokenizer import BYTE_LEVEL
from preference_training.tracking.run_files import METRICS, RESULTS_FILE, metric_rows, read_results

# The part of a checkpoint's state that an export reads.
CONFIG = {
    "model": {"name_or_path": (str, None), "policy_dtype": str},
    "loss": {"name": str},
    "trainer": {"name": str},
    "datasets": ([(str, dict)], str, dict),
    "template": (str, None),
    "system_prompt": (str, None),
}
STATE_SHAPE = {"examples": int, "held_out": ({...: (float, int)}, None), "run": {"config": CONFIG}}
EXPECTED = "Expected a run directory, or a checkpoint (step-N) in one."


@dataclass(frozen=True, kw_only=True)
class Source(SavedRun):
    """A complete checkpoint, its run, and the run's metrics up to it.

    rows: the rows of metrics.jsonl; evaluation: the held-out part of results.json, empty unless it is of this checkpoint.
    """

    examples: int
    held_out: dict[str, float]
    rows: list[dict]
    evaluation: dict

    @classmethod
    def read(cls, path: Path, trust_remote_code: bool = False) -> "Source":
        """Read a checkpoint, or the LATEST one of a run directory. Raises UserError for other paths and damaged checkpoints."""
        if not path.is_dir():
            raise UserError(f"{path}: no such directory. {EXPECTED}")
        checkpoint = newest_checkpoint(path).resolve()
        state = _valid_state(checkpoint)
        rows = metric_rows(checkpoint.parent / METRICS, state["examples"])
        results = read_results(checkpoint.parent / RESULTS_FILE)
        evaluation = results["held_out"]["all"] if results.get("examples_trained") == state["examples"] else {}
        held_out = state["held_out"] or {}
        return cls(
            checkpoint=checkpoint,
            run=state["run"],
            trust_remote_code=trust_remote_code,
            examples=state["examples"],
            held_out=held_out,
            rows=rows,
            evaluation=evaluation,
        )

    @property
    def tokenizer_sources(self) -> list[str]:
        """The directories and hub ids that may hold files of the tokenizer."""
        sources = [str(self.checkpoint), self.config["model"].get("tokenizer_name_or_path"), self.base]
        return [source for source in sources if source and source != BYTE_LEVEL]


def _valid_state(checkpoint: Path) -> dict:
    """A checkpoint's state. Raises UserError where the checkpoint is incomplete or damaged."""
    try:
        return Checkpoint.verified(checkpoint, STATE_SHAPE).state
    except DamagedError as error:
        raise UserError(f"{checkpoint}: {error}. {EXPECTED}") from None
