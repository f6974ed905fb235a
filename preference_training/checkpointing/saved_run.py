"""The model of a run's checkpoint, with its tokenizer, and the model that the run started from."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from preference_training.checkpointing.checkpoint import list_checkpoints
from preference_training.configuration.saved import model_config
from preference_training.configuration.sections import DTYPES, ModelConfig
from preference_training.core.errors import UserError
from preference_training.modeling import loading
from preference_training.modeling.adapters.files import is_adapter
from preference_training.modeling.archives import MODEL_CONFIG, TOKENIZER_CONFIG
from preference_training.modeling.state import weights_hash
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.tracking.run_files import CHECKSUMS, LATEST


def newest_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint of a run directory; any other path as it is."""
    if (path / CHECKSUMS).exists():
        return path
    # Checkpoints are renamed when they are complete.
    found = [path / LATEST] * (path / LATEST).is_dir() + list_checkpoints(path)
    return next((each.resolve() for each in found if (each / CHECKSUMS).exists()), found[0].resolve() if found else path)


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A checkpoint, and what its state says of its run."""

    checkpoint: Path
    run: dict
    trust_remote_code: bool = False

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

    def load_model(self) -> nn.Module:
        """The model as its run has it, with its adapter if it has one. Raises UserError where its files cannot be read."""
        tokenizer, config = self.load_tokenizer(), self.model_config()
        if self.is_adapter:
            return loading.load_with_adapter(self.checkpoint, config, tokenizer, self.cache_dir)
        return loading.load_model(config, tokenizer, self.cache_dir)

    @property
    def initial_adapter(self) -> str | None:
        """The adapter that the run started from, if any. Raises UserError where it is gone."""
        archive = self.config["model"].get("archive")
        if archive and not Path(archive).exists():
            raise UserError(f"{self.checkpoint}: the weights that its run started from are gone: {archive}.")
        return archive if is_adapter(archive) else None

    def load_initial_model(self) -> nn.Module:
        """The model that the run started from. Raises UserError where it is no longer what it was."""
        tokenizer = self.load_tokenizer()
        config = model_config(self.config["model"], trust_remote_code=self.trust_remote_code, head=self.head)
        config = config.portable().untrained()
        with loading.seeded_as_its_run(self.checkpoint):
            model = loading.load_model(config, tokenizer, self.cache_dir)
        if weights_hash(model) != self.run.get("began_with"):
            raise UserError(
                f"{self.checkpoint}: the model that its run started from ({config.archive or self.base or 'from scratch'}) is "
                "no longer what it was then. Name a model to compare with: a directory, a hub id, or another run."
            )
        return model
