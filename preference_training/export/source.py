"""The checkpoint that an export reads: its state, its tokenizer and its model."""

from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from preference_training.checkpointing.checkpoint import Checkpoint, DamagedError
from preference_training.checkpointing.saved_run import SavedRun, newest_checkpoint
from preference_training.configuration.rerun import RERUN
from preference_training.core.errors import UserError
from preference_training.core.values import UNREADABLE
from preference_training.modeling.tokenizer import BYTE_LEVEL
from preference_training.tracking.run_files import (
    ABOUT,
    METRICS,
    RESULTS_FILE,
    SAMPLES,
    json_lines,
    json_object,
    metric_rows,
    read_results,
)

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

    @cached_property
    def about(self) -> dict:
        """What about.json says of the run's start; empty where there is none."""
        return json_object(self.checkpoint.parent / ABOUT)

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the libraries that the run computed with."""
        found = self.about.get("versions") or self.run.get("versions") or {}
        return {name: version for name, version in found.items() if isinstance(version, str)}

    @property
    def held_out_prompts(self) -> int | None:
        """How many held-out prompts there were, if it is known."""
        try:
            return sum(entry["num_prompts"] for entry in self.about["data"]["held out"])
        except UNREADABLE:
            return None

    @property
    def overrides(self) -> dict:
        """The overrides of the run's command line; empty where they were not recorded."""
        try:
            found = OmegaConf.to_container(OmegaConf.load(self.checkpoint.parent / RERUN))
        except (*UNREADABLE, OmegaConfBaseException, YAMLError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def sample(self) -> tuple[str, str] | None:
        """A held-out prompt and the response to it, the last that was sampled up to this checkpoint."""
        rows = [row for row in json_lines(self.checkpoint.parent / SAMPLES) if row.get("examples", inf) <= self.examples]
        newest = next((row for row in rows if row.get("examples") == rows[-1].get("examples")), {})
        prompt, response = newest.get("prompt"), newest.get("policy")
        return (prompt, response) if isinstance(prompt, str) and isinstance(response, str) else None


def base_license(base: str | None, cache_dir: str | None) -> str | None:
    """The license of a base model, as its own card names it, if that is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if base is None:
        return None
    try:
        found = Path(base) / "README.md" if Path(base).is_dir() else try_to_load_from_cache(base, "README.md", cache_dir)
        named = ModelCard(Path(found).read_text(encoding="utf-8")).data.to_dict().get("license") if found else None
    except (*UNREADABLE, YAMLError):
        # A damaged card: a license is not worth an export.
        return None
    return named if isinstance(named, str) else None


def _valid_state(checkpoint: Path) -> dict:
    """A checkpoint's state. Raises UserError where the checkpoint is incomplete or damaged."""
    try:
        return Checkpoint.verified(checkpoint, STATE_SHAPE).state
    except DamagedError as error:
        raise UserError(f"{checkpoint}: {error}. {EXPECTED}") from None
