"""The checkpoint that an export reads: its state, its tokenizer and its model."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from preference_training.checkpointing.checkpoint import Checkpoint, DamagedError, list_checkpoints
from preference_training.configuration.saved import model_config
from preference_training.configuration.sections import DTYPES, ModelConfig
from preference_training.core.errors import UserError
from preference_training.modeling import loading
from preference_training.modeling.adapters import is_adapter
from preference_training.modeling.archives import MODEL_CONFIG, TOKENIZER_CONFIG
from preference_training.modeling.tokenizer import BYTE_LEVEL, load_tokenizer
from preference_training.tracking.run_files import CHECKSUMS, LATEST, METRICS, RESULTS_FILE, metric_rows, read_results

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


@dataclass(frozen=True)
class Source:
    """A complete checkpoint, its run, and the run's metrics up to it.

    rows: the rows of metrics.jsonl; evaluation: the held-out part of results.json, empty unless it is of this checkpoint.
    """

    checkpoint: Path
    run: dict
    examples: int
    held_out: dict[str, float]
    rows: list[dict]
    evaluation: dict
    trust_remote_code: bool = False

    @classmethod
    def read(cls, path: Path, trust_remote_code: bool = False) -> "Source":
        """Read a checkpoint, or the LATEST one of a run directory. Raises UserError for other paths and damaged checkpoints."""
        if not path.is_dir():
            raise UserError(f"{path}: no such directory. {EXPECTED}")
        if not (path / CHECKSUMS).exists() and list_checkpoints(path):
            path = path / LATEST if (path / LATEST).is_dir() else list_checkpoints(path)[0]
        checkpoint = path.resolve()
        state = _valid_state(checkpoint)
        rows = metric_rows(checkpoint.parent / METRICS, state["examples"])
        results = read_results(checkpoint.parent / RESULTS_FILE)
        evaluation = results["held_out"]["all"] if results.get("examples_trained") == state["examples"] else {}
        held_out = state["held_out"] or {}
        return cls(checkpoint, state["run"], state["examples"], held_out, rows, evaluation, trust_remote_code)

    @property
    def config(self) -> dict:
        """The run's whole configuration."""
        return self.run["config"]

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint holds an adapter rather than full weights."""
        return is_adapter(str(self.checkpoint))

    @property
    def head(self) -> str:
        """The head of the model: lm or value."""
        return loading.saved_head(self.checkpoint)

    @property
    def base(self) -> str | None:
        """The model that the run started from, as its configuration names it; None for random initialization."""
        return self.config["model"].get("name_or_path")

    @cached_property
    def stored_config(self) -> dict:
        """The checkpoint's config.json; empty for an adapter."""
        try:
            return json.loads((self.checkpoint / MODEL_CONFIG).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    @property
    def dtype(self) -> str:
        """The name of the dtype of the weights; for an adapter, of its base model's."""
        stored = self.stored_config.get("dtype")
        return stored if stored in DTYPES else self.config["model"]["policy_dtype"]

    @property
    def cache_dir(self) -> str | None:
        """The run's cache directory."""
        found = self.config.get("cache_dir")
        return found if isinstance(found, str) else None

    @property
    def tokenizer_sources(self) -> list[str]:
        """The directories and hub ids that may hold files of the tokenizer."""
        sources = [str(self.checkpoint), self.config["model"].get("tokenizer_name_or_path"), self.base]
        return [source for source in sources if source and source != BYTE_LEVEL]

    def load_tokenizer(self):
        """The tokenizer: the checkpoint's, or else the run's."""
        name = self.config["model"].get("tokenizer_name_or_path")
        if (self.checkpoint / TOKENIZER_CONFIG).is_file():
            name = str(self.checkpoint)
        known = {"name_or_path": self.base, "tokenizer_name_or_path": name, "head": self.head}
        return load_tokenizer(model_config(known, trust_remote_code=self.trust_remote_code))

    def model_config(self) -> ModelConfig:
        """The `model` configuration that loads the checkpoint, in the dtype of its weights."""
        own = {"name_or_path": str(self.checkpoint), "policy_dtype": self.dtype}
        known = self.config["model"] if self.is_adapter else own
        return model_config(known, trust_remote_code=self.trust_remote_code, head=self.head)

    def load_model(self):
        """The model as its run has it, with its adapter if it has one. Raises UserError where its files cannot be read."""
        tokenizer, config = self.load_tokenizer(), self.model_config()
        if self.is_adapter:
            return loading.load_with_adapter(self.checkpoint, config, tokenizer, self.cache_dir)
        return loading.load_model(config, tokenizer, self.cache_dir)


def _valid_state(checkpoint: Path) -> dict:
    """A checkpoint's state. Raises UserError where the checkpoint is incomplete or damaged."""
    try:
        return Checkpoint.verified(checkpoint, STATE_SHAPE).state
    except DamagedError as error:
        raise UserError(f"{checkpoint}: {error}. {EXPECTED}") from None
