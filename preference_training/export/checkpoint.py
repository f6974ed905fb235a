"""Export of a run's checkpoint as a directory to serve from, with a model card; optionally quantized, for Ollama, to the hub.

What can be refused early is refused before any weights are read.

    checkpoint -> weights or adapter, tokenizer, Modelfile -> comparison with the run's model -> README.md -> hub
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from preference_training.checkpointing.model_files import save_tokenizer
from preference_training.checkpointing.saved_models import compare_parts, load_plain
from preference_training.configuration.schema import TEMPLATES
from preference_training.core.errors import UserError
from preference_training.data.rendering.chat_templates import end_tokens, run_format, serve_as_trained
from preference_training.export import gguf_model, hub, modelfile, verification
from preference_training.export.directory import new_directory, save_weights
from preference_training.export.gguf_model import GgufFile
from preference_training.export.gguf_tokenizer import Vocabulary
from preference_training.export.modelfile import OllamaFiles
from preference_training.export.options import ExportOptions, check_options
from preference_training.export.quality import RunRows, describe_quality, missing_rows, readable_rows
from preference_training.export.quantization import WINDOW, WINDOWS, group_size, quantize_weights
from preference_training.export.serving import Served
from preference_training.export.source import Source, base_license
from preference_training.modeling import loading
from preference_training.modeling.adapters.files import BASE_DIR, CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from preference_training.modeling.archives import GENERATION_CONFIG
from preference_training.modeling.sources.configurations import model_configuration
from preference_training.modeling.value_head import auto_class
from preference_training.reporting.model_card import CardFacts, Quality, Quantized, model_card


def export(path: Path, options: ExportOptions) -> list[str]:
    """Export the model of a run directory or a checkpoint; returns the lines to print.

    Raises UserError if the export fails, and then leaves no directory.
    """
    source = Source.read(path, options.trust_remote_code)
    check_options(options, source.is_adapter, source.head)
    tokenizer = source.load_tokenizer()
    prompt_format = _prompt_format(source, options.template)
    prompt, notes = serve_as_trained(prompt_format, tokenizer, source.config)
    kind, ollama, ends = gguf_type(source, options), None, end_tokens(prompt_format, tokenizer)
    _check_format(source, tokenizer, kind, options.quantize, ends)
    if options.ollama:
        template = options.template or prompt_format
        file = kind and _gguf_name(options, kind)
        ollama = OllamaFiles.build(source.config, tokenizer, template, source.tokenizer_sources, file)
        notes += ollama.notes
    dtype = options.dtype or source.dtype
    rows = None
    if options.quantize or kind in gguf_model.QUANTIZED:
        rows, why = readable_rows(source)
        notes += [] if rows else missing_rows(options.quantize, why)
    if options.push:
        # The last of the checks: it creates a repository.
        hub.reserve(options.push, options.private)
    task = _Export(source, options, tokenizer, dtype, ends, kind, rows)
    with new_directory(options.to) as partial:
        with verification.refuse_other_model(options.to):
            facts, verify = task.write(partial)
        save_tokenizer(tokenizer, partial)
        if ollama:
            ollama.write(partial, tokenizer)
        with verification.refuse_other_model(options.to):
            found, costs = verify()
        notes += found
        facts = replace(facts, costs=costs, name=options.push or options.to.resolve().name, prompt=prompt)
        (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    served = Served(options.to, dtype, facts, options.ollama, kind and _gguf_name(options, kind))
    uploaded = [f"on the hub: {hub.upload(options.to, options.push)}"] if options.push else []
    said = [note if note.startswith("warning: ") else f"note: {note}" for note in notes + served.notes()]
    return [facts.summary(options.to), *said, *served.lines(), *uploaded]


def _prompt_format(source: Source, template: str | None) -> str | None:
    """The format of the run's prompts: as its configuration says, or else as its first checkpoint recorded it."""
    recorded = source.run.get("prompt_format")
    try:
        return run_format(source.config, template)[0]
    except UserError:
        return recorded if recorded in TEMPLATES else None


def gguf_type(source: Source, options: ExportOptions) -> str | None:
    """The type of weights of the GGUF file to write, None for no file.

    Ollama needs one for an architecture that it does not convert itself. Raises UserError where there can be none.
    """
    wanted = options.gguf
    if wanted is None and options.ollama is None:
        return None
    architecture = _architecture(source)
    if wanted is None and architecture not in gguf_model.ARCHITECTURES:
        modelfile.check_architecture(architecture)
    elif wanted is None and architecture not in modelfile.ARCHITECTURES:
        wanted = gguf_model.AUTO
    if wanted is None:
        return None
    gguf_model.check_architecture(architecture)
    return gguf_model.choose_type(wanted, options.dtype or source.dtype)


def _check_format(source: Source, tokenizer, kind: str | None, quantize: str | None, ends: list[int]) -> None:
    """Raise UserError where a GGUF file or int4 weights cannot represent the model or its tokenizer. Reads no weights."""
    if kind is None and quantize != "int4":
        return
    config = model_configuration(source.model_config(), tokenizer, source.cache_dir)
    with torch.device("meta"):
        model = auto_class(source.head).from_config(config, trust_remote_code=source.trust_remote_code)
    if kind:
        gguf_model.check_model(model)
        Vocabulary.of(tokenizer, config.get_text_config().vocab_size, ends)
    else:
        group_size(model)


def _architecture(source: Source) -> str:
    """The class of the model in transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if names := source.stored_config.get("architectures"):
        return names[0]
    config = model_configuration(source.model_config(), source.load_tokenizer(), source.cache_dir)
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)


def _gguf_name(options: ExportOptions, kind: str) -> str:
    return f"{options.to.resolve().name}-{kind}.gguf"


# ---- weights ----------------------------------------------------------------------------------------------------------------

# Compares a directory once all of it is written; returns notes, and what quantization costs. Raises DifferentModelError.
Verify = Callable[[], tuple[list[str], tuple[Quantized, ...]]]


@dataclass(frozen=True)
class _Export:
    """What an export writes: the source's model in a dtype, with the tokenizer and the end tokens of training.

    rows: of the run, for quantized weights; None for others, or where they are gone.
    """

    source: Source
    options: ExportOptions
    tokenizer: object
    dtype: str
    end_tokens: list
    gguf_type: str | None
    rows: RunRows | None

    def write(self, directory: Path) -> tuple[CardFacts, Verify]:
        """Write the weights or the adapter; returns what the model card needs, and the comparison to run at the end."""
        if self.source.is_adapter and not self.options.merge:
            return self._write_adapter(directory)
        return self._write_model(directory)

    def _write_model(self, directory: Path) -> tuple[CardFacts, Verify]:
        source, dtype, quantize, trust = self.source, self.dtype, self.options.quantize, self.options.trust_remote_code
        model = source.load_model()
        architecture = type(model).__name__
        expected, notes = verification.merge_and_round(model, source, dtype)
        before = self.rows.quality(model) if self.rows and expected is not None else None
        parameters = save_weights(model, directory, self.tokenizer, self.end_tokens)
        if expected is None:
            # Now, because there will be no model to compare with later.
            compare_parts(directory, model, trust)
        if self.gguf_type:
            notes += self._write_gguf(model, directory)
        if quantize:
            windows = self.rows.windows(WINDOWS, WINDOW) if self.rows and quantize == "int4" else ()
            quantize_weights(directory, quantize, dtype, self.tokenizer, windows, trust)
        facts = replace(_card_facts(source), architecture=architecture, dtype=dtype, parameters=parameters, quantized=quantize)
        if expected is None:
            return facts, lambda: (notes, ())

        def verify() -> tuple[list[str], tuple[Quantized, ...]]:
            if quantize:
                error = verification.quantization_error(directory, expected, dtype, trust)
                notes.append(f"{quantize} changes log-probs by up to {error:.2g} nats per token")
            else:
                verification.compare_exported(directory, expected, dtype, trust)
            costs = self._costs(directory, before)
            return [*notes, *(line for cost in costs for line in describe_quality(cost))], costs

        return facts, verify

    def _costs(self, directory: Path, before: Quality | None) -> tuple[Quantized, ...]:
        """What the quantized weights of a directory cost, where that can be measured."""
        if before is None or self.rows is None:
            return ()
        kind, dtype = self.options.quantize, getattr(torch, self.dtype)
        if kind:
            model = load_plain(directory, dtype, self.options.trust_remote_code)
        else:
            kind = str(self.gguf_type)
            model = gguf_model.load(directory, _gguf_name(self.options, kind), dtype)
        return (Quantized(kind, before, self.rows.quality(model)),)

    def _write_gguf(self, model, directory: Path) -> list[str]:
        """Write the model as a GGUF file too; returns notes."""
        config = model.config.get_text_config()
        vocabulary = Vocabulary.of(self.tokenizer, config.vocab_size, self.end_tokens)
        name = _gguf_name(self.options, self.gguf_type)
        license = base_license(self.source.base, self.source.cache_dir)
        GgufFile(self.options.to.resolve().name, vocabulary, self.gguf_type, license).write(model, directory / name)
        return [*vocabulary.notes, *gguf_model.window_note(config)]

    def _write_adapter(self, directory: Path) -> tuple[CardFacts, Verify]:
        from safetensors import safe_open

        source = self.source
        for name in (CONFIG_FILE, WEIGHTS_FILE, GENERATION_CONFIG):
            if name != GENERATION_CONFIG or (source.checkpoint / name).is_file():
                shutil.copyfile(source.checkpoint / name, directory / name)
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118  not a dict
        base = source.base or read_adapter_config(directory).get("base_model_name_or_path")
        parameters = sum(math.prod(shape) for shape in shapes)
        facts = replace(_card_facts(source), base=base, architecture="adapter", dtype=self.dtype, parameters=parameters)
        notes = self._write_base(directory)
        return replace(facts, adapter=True), lambda: (
            notes + verification.compare_adapter(source, directory, self.dtype),
            (),
        )

    def _write_base(self, directory: Path) -> list[str]:
        """Include the adapter's base model unless it is available elsewhere, and point the adapter to it; returns notes."""
        source, settings = self.source, read_adapter_config(directory)
        base = settings.get("base_model_name_or_path")
        is_available = base is not None and (not Path(base).is_absolute() or (Path(base) / "config.json").is_file())
        if is_available and Path(base).name != BASE_DIR:
            return []
        model = loading.load_adapter_base(source.checkpoint, source.model_config(), self.tokenizer, source.cache_dir)
        (directory / BASE_DIR).mkdir()
        save_weights(model, directory / BASE_DIR, self.tokenizer)
        save_tokenizer(self.tokenizer, directory / BASE_DIR)
        settings["base_model_name_or_path"] = path = str(self.options.to.resolve() / BASE_DIR)
        (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return [f"the base model is in {BASE_DIR}/; {CONFIG_FILE} names {path}: change it there if you move the directory"]


def _card_facts(source: Source) -> CardFacts:
    archive = source.config["model"].get("archive")
    return CardFacts(
        name="",
        head=source.head,
        architecture="",
        dtype="",
        parameters=0,
        config=source.config,
        usual=source.run.get("usual"),
        base=source.base,
        examples=source.examples,
        held_out=source.held_out,
        held_out_prompts=source.held_out_prompts,
        evaluation=source.evaluation,
        rows=source.rows,
        versions=source.versions,
        overrides=source.overrides,
        sample=source.sample,
        license=base_license(source.base, source.cache_dir),
        notes=[f"The run started from the weights of an earlier run, `{Path(archive).name}`."] if archive else [],
    )
