"""A merged model as a directory that `from_pretrained` loads: checks first, then weights tensor by tensor, then a model card.

names -> ingredients -> configurations, tokenizers, names and shapes compared -> weights -> loaded -> README.md
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.checkpointing.model_files import save_tokenizer, set_end_tokens
from preference_training.checkpointing.saved_models import DifferentModelError, load_plain
from preference_training.core.errors import UserError, first_line
from preference_training.core.files import check_destination
from preference_training.core.machine import said_while_slow
from preference_training.data.records.record import Turn
from preference_training.data.rendering.chat_templates import PLAIN_PROMPT, end_tokens, run_format, serve_as_trained
from preference_training.data.rows.templates import build_template
from preference_training.export.directory import new_directory
from preference_training.merging.alignment import Aligned, Alignment
from preference_training.merging.card import MergeFacts, merge_card
from preference_training.merging.held_out import HeldOutRows
from preference_training.merging.ingredients import OTHER_SIZES, OTHER_VOCABULARY, Ingredient, all_on_disk, check_alike
from preference_training.merging.recipe import Recipe
from preference_training.merging.weights import TensorInfo, write_weights
from preference_training.modeling.archives import GENERATION_CONFIG, model_from_archive
from preference_training.modeling.state import free_memory

# Opens the held-out rows that models are measured on: where configurations fit, and before any weights are merged.
OpenRows = Callable[[], HeldOutRows]


@dataclass(frozen=True)
class Merge:
    """Models to merge by a recipe, and their base model where the method has one. `notes`: what the user should know."""

    recipe: Recipe
    models: Sequence[Ingredient]
    base: Ingredient | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ingredients(self) -> list[Ingredient]:
        """All of them, the base model first."""
        return [*([self.base] if self.base else []), *self.models]

    def check(self, to: Path) -> None:
        """Raise UserError for what configurations, tokenizers and the destination say already; adds to `notes`."""
        check_destination(to)
        self.notes.extend(check_alike([*self.models, *([self.base] if self.base else [])]))


def merge(task: Merge, to: Path, open_rows: OpenRows | None = None) -> list[str]:
    """Merge models into a new directory; returns the lines to print. Raises UserError, and then leaves no directory.

    open_rows: of a run, to measure each ingredient and the merged model on.
    """
    task.check(to)
    rows = open_rows() if open_rows is not None else None
    with new_directory(to) as partial, all_on_disk(task.ingredients, partial) as found:
        facts = write_merged(task, found, partial)
        if rows is not None:
            measured = {each.name: rows.measure(each.weights) for each in found} | {MergeFacts.MERGED: rows.measure(partial)}
            facts.held_out, facts.measured_on = {name: each.metrics for name, each in measured.items()}, rows.name
        facts.name = to.resolve().name
        (partial / "README.md").write_text(merge_card(facts), encoding="utf-8")
    return [facts.summary(to), *facts.table(), *(f"note: {note}" for note in facts.notes)]


def write_merged(task: Merge, on_disk: Sequence[Ingredient], directory: Path) -> MergeFacts:
    """Write the merged model into an existing directory, all but its card; returns the facts of the card.

    on_disk: the ingredients of the task, with their weights.
    """
    base, models = (on_disk[0] if task.base else None), on_disk[1 if task.base else 0 :]
    leading = models[0]
    with ExitStack() as opened:
        found = Alignment.of(on_disk, leading, opened)
        under, aligned = (found.weights[0] if base else None), found.weights[1 if base else 0 :]
        plan = _Plan(task.recipe, aligned, under, (base or leading).dtype)
        infos = plan.check(found.model)
        _check_fits(leading, found.config, infos)
        print(f"merging {len(models)} models, {len(infos):,} tensors", flush=True)
        with said_while_slow("still merging"):
            parameters = write_weights(directory, infos, plan.tensor)
    dtype = max(infos.values(), key=lambda info: info.bytes).dtype
    prompt, notes = _write_files(leading, found.model, directory, dtype)
    _check_loads(directory, leading)
    return MergeFacts(
        task.recipe,
        [*models],
        base,
        architecture=type(found.model).__name__,
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        prompt=prompt,
        notes=[*task.notes, *found.notes, *notes],
    )


# ---- tensors ----------------------------------------------------------------------------------------------------------------


class _Plan:
    """Which tensor is computed of which. dtype: of the result; None is that of each tensor of the base, or the first model."""

    def __init__(self, recipe: Recipe, models: Sequence[Aligned], base: Aligned | None, dtype: torch.dtype | None):
        self.recipe, self.models, self.base, self.dtype = recipe, models, base, dtype
        self.leading = base or models[0]

    def check(self, model) -> dict[str, TensorInfo]:
        """What is written, by name, in the order of the first model. Raises UserError where names or shapes differ."""
        all_of_them = [*self.models, *([self.base] if self.base else [])]
        shared = set.intersection(*(set(each.names) for each in all_of_them))
        infos = {}
        for each in all_of_them:
            missing = sorted(set(each.names) - shared - each.extra)
            if missing:
                lacks = next(other for other in all_of_them if missing[0] not in other.names)
                raise UserError(
                    f"{lacks.stored.name}: it has no {missing[0]}, and {each.stored.name} has. Only models of one architecture "
                    "can be merged: fine-tunings of one base model."
                )
        for name in [name for name in self.models[0].names if name in shared]:
            shape, expected = None, self.models[0].info(name).shape
            for other in all_of_them:
                if (shape := other.info(name).shape) != expected:
                    raise UserError(self._other_shape(model, name, other, shape, expected))
            stored = self.leading.info(name).dtype
            infos[name] = TensorInfo(expected, self.dtype if self.dtype and stored.is_floating_point else stored)
        return infos

    def _other_shape(self, model, name: str, other: Aligned, shape: tuple, expected: tuple) -> str:
        first = self.models[0].stored.name
        is_vocabulary = name.rpartition(".")[0] in _vocabulary_layers(model)
        text = f"{other.stored.name}: {name} is {list(shape)}, and that of {first} is {list(expected)}"
        return f"{text}: {OTHER_VOCABULARY if is_vocabulary else OTHER_SIZES}"

    def tensor(self, name: str) -> Tensor:
        """A merged tensor, computed in float32 and rounded once; what is no floating-point number is the leading model's."""
        found = self.leading.read(name)
        dtype = self.dtype or found.dtype
        if not found.is_floating_point():
            return found
        base = self.base.read(name).float() if self.base else None
        merged = self.recipe.merge(name, base, [each.read(name).float() for each in self.models])
        if not bool(torch.isfinite(merged).all()):
            raise UserError(
                f"merge: {name} is not finite in the merged model. Smaller --weights or --scale may help; a model that has NaN "
                "itself cannot be merged."
            )
        return merged.to(dtype)


def _vocabulary_layers(model) -> set[str]:
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name for name, module in model.named_modules() if any(module is layer for layer in layers if layer is not None)}


def _check_fits(leading: Ingredient, config, infos: dict[str, TensorInfo]) -> None:
    """Raise UserError where what would be written is not all of a model."""
    empty = {name: torch.empty(info.shape, device="meta") for name, info in infos.items()}
    options = {"trust_remote_code": leading.trust_remote_code, "head": leading.head, "device_map": {"": "meta"}}
    try:
        model_from_archive(config, empty, Path(leading.location), torch.float32, **options)
    except UserError as error:
        raise UserError(str(error).replace("model.archive: ", "merge: ", 1).partition("\nChoose")[0]) from error


# ---- the other files ---------------------------------------------------------------------------------------------------------


def _write_files(leading: Ingredient, model: nn.Module, directory: Path, dtype: torch.dtype) -> tuple[str, list[str]]:
    """Write the configuration of the merged model, and what it has of the first one; returns an example prompt, and notes."""
    from transformers import GenerationConfig

    tokenizer, config = leading.tokenizer, model.config
    prompt, ends, notes = _prompt(leading)
    try:
        generation = GenerationConfig.from_pretrained(leading.location, cache_dir=leading.cache_dir)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    set_end_tokens(config, None if leading.head == "value" else generation, tokenizer, ends)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(directory)
    if leading.head == "lm":
        generation.to_json_file(directory / GENERATION_CONFIG)
    save_tokenizer(tokenizer, directory)
    return prompt, notes


def _prompt(leading: Ingredient) -> tuple[str, list[int], list[str]]:
    """An example prompt in the format of the first model, the tokens that end a response besides its tokenizer's, and notes.

    The chat template of a run becomes that of its training, as in an export.
    """
    tokenizer = leading.tokenizer
    if leading.source is not None:
        recorded = leading.source.run.get("prompt_format")
        try:
            name = run_format(leading.source.config)[0]
        except UserError:
            name = recorded
        prompt, notes = serve_as_trained(name, tokenizer, leading.source.config)
        return prompt, end_tokens(name, tokenizer), notes
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN_PROMPT, [], []
    try:
        text, _ = build_template("chat", None, tokenizer)((Turn("user", "What is the capital of France?"),), [])
    except UserError as error:
        return PLAIN_PROMPT, [], [f"the chat template could not be tried: {first_line(error)}"]
    return text, end_tokens("chat", tokenizer), []


def _check_loads(directory: Path, leading: Ingredient) -> None:
    """Raise UserError where plain transformers does not load what was written, whole."""
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if size > free_memory(torch.device("cpu")):
        return
    try:
        load_plain(directory, torch.float32 if leading.head == "value" else "auto", leading.trust_remote_code)
    except DifferentModelError as error:
        raise UserError(f"--to: the merged model is not whole: {error}. It was removed.") from error
