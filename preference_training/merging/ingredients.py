"""The models of a merge: runs, checkpoints, adapters, model directories and hub ids, each as a directory of safetensors.

An adapter is merged into its base model first, in float32, in a directory of its own that is gone afterwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from preference_training.checkpointing.saved_models import DifferentModelError, load_plain
from preference_training.checkpointing.saved_run import newest_checkpoint
from preference_training.configuration.sections import DTYPES
from preference_training.core.errors import UserError, first_line
from preference_training.export.source import Source
from preference_training.merging.places import EXPECTED, check_place
from preference_training.modeling import loading
from preference_training.modeling.adapters.files import is_adapter, read_adapter_config, saved_base
from preference_training.modeling.archives import MODEL_CONFIG
from preference_training.modeling.sources.configurations import model_configuration
from preference_training.reporting.model_card import is_hub_id
from preference_training.tracking.run_files import STATE


@dataclass(frozen=True)
class Ingredient:
    """A model to merge. name: as it was given. location: its directory, or its hub id. source: its checkpoint, if it has one.

    weights: the directory of its whole weights, once they are on this machine (`on_disk`).
    """

    name: str
    location: str
    source: Source | None = None
    trust_remote_code: bool = False
    cache_dir: str | None = None
    weights: Path | None = None

    @classmethod
    def read(cls, name: str, trust_remote_code: bool = False, cache_dir: str | None = None) -> "Ingredient":
        """The model of a name. Raises UserError where there is none."""
        path = Path(name).expanduser()
        check_place(name)
        if not path.is_dir():
            return cls(name, name, None, trust_remote_code, cache_dir)
        checkpoint = newest_checkpoint(path).resolve()
        if (checkpoint / STATE).is_file():
            source = Source.read(path, trust_remote_code)
            return cls(name, str(source.checkpoint), source, trust_remote_code, source.cache_dir or cache_dir)
        if not is_adapter(str(path)) and not (path / MODEL_CONFIG).is_file():
            raise UserError(f"{name}: no model in it. {EXPECTED}")
        return cls(name, str(path.resolve()), None, trust_remote_code, cache_dir)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, and not a whole model."""
        return is_adapter(self.location)

    @property
    def head(self) -> str:
        """The head of the model: lm or value."""
        return loading.saved_head(Path(self.location)) if Path(self.location).is_dir() else "lm"

    @cached_property
    def config(self):
        """The transformers configuration of the whole model. Raises UserError where it cannot be read.

        That of an adapter is its base model's until it is merged, which may untie the head.
        """
        if self.is_adapter and self.weights is not None:
            return self._read_config(str(self.weights))
        return self._original_config

    @cached_property
    def _original_config(self):
        if self.source is not None and self.is_adapter:
            # With the rows of added tokens: a run that adds some keeps its base model.
            if base := saved_base(self.location):
                return self._read_config(str(base))
            return model_configuration(self.source.model_config(), self.tokenizer, self.cache_dir)
        name = self.location
        if self.is_adapter:
            name = read_adapter_config(Path(name)).get("base_model_name_or_path")
            if not name:
                raise UserError(f"{self.name}: its adapter_config.json names no base model. Merge it into its base first.")
        return self._read_config(name)

    def _read_config(self, name: str):
        from transformers import AutoConfig

        options = {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code}
        with _errors(self.name):
            return AutoConfig.from_pretrained(name, **options)

    @cached_property
    def tokenizer(self):
        """Its tokenizer, or its base model's where it has none. Raises UserError where there is none."""
        from transformers import AutoTokenizer

        if self.source is not None:
            return self.source.load_tokenizer()
        name, path = self.location, Path(self.location)
        if self.is_adapter and not (path / "tokenizer_config.json").is_file():
            name = read_adapter_config(path).get("base_model_name_or_path")
        with _errors(self.name):
            found = AutoTokenizer.from_pretrained(name, cache_dir=self.cache_dir, trust_remote_code=self.trust_remote_code)
        if found.eos_token_id is None:
            raise UserError(
                f"{self.name}: its tokenizer has no end-of-sequence token. Set eos_token in its tokenizer_config.json."
            )
        return found

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of an adapter's merged weights; None for a whole model, whose tensors have their own."""
        if not self.is_adapter:
            return None
        if self.source is not None:
            return getattr(torch, self.source.dtype)
        found = str(self._original_config.dtype).removeprefix("torch.")
        return getattr(torch, found) if found in DTYPES else torch.float32

    def on_disk(self, folder: Path) -> "Ingredient":
        """With its whole weights in a directory: downloaded, or merged into a new one below `folder`."""
        if self.is_adapter:
            merged = folder / f"merged_{len(list(folder.iterdir()))}"
            print(f"merging the adapter {self.name} into its base model", flush=True)
            self._merge_adapter(merged)
            return replace(self, weights=merged)
        if Path(self.location).is_dir():
            return replace(self, weights=Path(self.location))
        from huggingface_hub import snapshot_download

        with _errors(self.name):
            patterns = ["*.safetensors", "*.safetensors.index.json", "*.json"]
            return replace(
                self, weights=Path(snapshot_download(self.location, cache_dir=self.cache_dir, allow_patterns=patterns))
            )

    def _merge_adapter(self, directory: Path) -> None:
        if self.source is not None:
            model = loading.merge_and_cast(self.source.load_model(), torch.float32)
        else:
            try:
                model = load_plain(Path(self.location), torch.float32, self.trust_remote_code, self.cache_dir)
            except DifferentModelError as error:
                raise UserError(f"{self.name}: {error}. Merge it with peft first, and name the merged model.") from error
            loading.merge_and_cast(model, torch.float32)
        loading.save_model(model, directory)


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turn what libraries raise for a model that they cannot find or read into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # networks, and damaged files in half a dozen formats
        raise UserError(f"{name}: cannot be loaded: {first_line(error)}. {EXPECTED}") from error


@contextmanager
def all_on_disk(ingredients: Sequence[Ingredient], inside: Path) -> Iterator[list[Ingredient]]:
    """The ingredients with their weights on disk; what is written for that lies in a folder, and is removed at the end."""
    with TemporaryDirectory(prefix=".merging_", dir=inside) as folder:
        yield [each.on_disk(Path(folder)) for each in ingredients]


# ---- whether they can be merged ------------------------------------------------------------------------------------------


def check_alike(ingredients: Sequence[Ingredient]) -> list[str]:
    """Raise UserError where models have other architectures or vocabularies than the first; returns notes. Reads no weights."""
    first, notes = ingredients[0], []
    for each in ingredients:
        if quantized := getattr(each.config, "quantization_config", None):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else "quantized"
            raise UserError(
                f"{each.name}: its weights are quantized ({method}), and cannot be averaged. Name the model that they are from."
            )
    for other in ingredients[1:]:
        for key in _STRUCTURE:
            mine, theirs = _STRUCTURE[key](first), _STRUCTURE[key](other)
            if mine != theirs:
                raise UserError(
                    f"{other.name}: {key} is {theirs}, and that of {first.name} is {mine}. Only models of one architecture can "
                    "be merged: fine-tunings of one base model."
                )
        _check_vocabularies(first, other)
        _check_sizes(first, other)
        known = (*_SIZES, "tie_word_embeddings")
        differing = [key for key in loading.config_differences(first.config, other.config) if key not in known]
        if differing:
            notes.append(
                f"{other.name} differs from {first.name} in {', '.join(differing)} of config.json; the merged model has those "
                f"of {first.name}"
            )
        if getattr(other.tokenizer, "chat_template", None) != getattr(first.tokenizer, "chat_template", None):
            notes.append(f"{other.name} has another chat template; the merged model has that of {first.name}")
    return notes


# What has to be equal, by its name.
_STRUCTURE = {
    "model_type": lambda each: each.config.get_text_config().model_type,
    "head": lambda each: each.head,
}
# What shapes of tensors say better, where they are known: those of an adapter are once it is merged.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


OTHER_VOCABULARY = (
    "the vocabularies have different sizes. Resize the embedding of one of them (resize_token_embeddings), or name models with "
    "one tokenizer."
)
OTHER_SIZES = "the models have different sizes. Only fine-tunings of one base model can be merged."


def _check_sizes(first: Ingredient, other: Ingredient) -> None:
    if not (first.is_adapter or other.is_adapter):
        return
    for key in _SIZES:
        mine, theirs = (getattr(each.config.get_text_config(), key, None) for each in (first, other))
        if mine != theirs:
            why = OTHER_VOCABULARY if key == "vocab_size" else OTHER_SIZES
            raise UserError(f"{other.name}: {key} is {theirs}, and that of {first.name} is {mine}: {why}")


def _check_vocabularies(first: Ingredient, other: Ingredient) -> None:
    mine, theirs = ({number: token for token, number in each.tokenizer.get_vocab().items()} for each in (first, other))
    for number in sorted(mine.keys() & theirs.keys()):
        if mine[number] != theirs[number]:
            raise UserError(
                f"{other.name}: its vocabulary is another: token {number} is {theirs[number]!r}, and that of {first.name} is "
                f"{mine[number]!r}. Only models with one tokenizer can be merged: fine-tunings of one base model."
            )


def listed_base(ingredient: Ingredient) -> str:
    """How a model card names a model: its hub id, or the last part of its path."""
    name = ingredient.name
    if ingredient.source is None and is_hub_id(name):
        return name
    path = Path(ingredient.location)
    return f"{path.parent.name}/{path.name}" if ingredient.source is not None else path.name
