"""A run's model as a directory from which it is served: whole or an adapter, quantized, with a card, for Ollama, on the hub.

A directory is written beside its place and renamed when it is complete. What can be refused early is refused before weights are
read.
"""

import errno
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor

from preference_training.checkpointing.checkpoint import Checkpoint, DamagedError, checkpoints_of
from preference_training.checkpointing.model_files import end_as_trained, save_tokenizer
from preference_training.checkpointing.saved_models import (
    DifferentModelError,
    compare,
    compare_parts,
    compute_in_float32,
    fits_in_memory,
    largest_difference,
    load_plain,
    probe_logps,
    probe_logps_in_float32,
    tolerance,
)
from preference_training.configuration.composition import CONFIG_DIR, choices_of
from preference_training.configuration.validation import DTYPES, TEMPLATES
from preference_training.core.errors import UserError, nearest
from preference_training.core.files import atomic_directory, load_tensors
from preference_training.data.chat_templates import end_tokens, format_of_run, serve_as_trained
from preference_training.export import hub
from preference_training.export.modelfile import check_architecture, fit_for_ollama, modelfile_of, tokenizer_model
from preference_training.modeling import loading
from preference_training.modeling.adapters import (
    BASE_DIR,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    is_adapter,
    quantise,
    restore_bits,
    settings_of_file,
)
from preference_training.modeling.archives import GENERATION_CONFIG, MODEL_CONFIG, TOKENIZER_CONFIG
from preference_training.modeling.tokenizer import BYTE_LEVEL, load_tokenizer
from preference_training.reporting.model_card import CardFacts, model_card
from preference_training.tracking.run_files import CHECKSUMS, LATEST, METRICS, RESULTS_FILE, metric_rows, results_of

SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Wishes:
    """What an export is to be, as the command line says it. `to` is the directory that is made."""

    to: Path
    dtype: str | None = None
    merge: bool = False
    quantize: str | None = None
    ollama: str | None = None
    template: str | None = None
    push: str | None = None
    private: bool = False
    trust_remote_code: bool = False


# ---- what is exported -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint that is whole, what its run was, and its rows of metrics.jsonl."""

    checkpoint: Path
    run: dict
    examples: int
    held_out: dict[str, float]
    rows: list[dict]
    evaluation: dict

    @property
    def config(self) -> dict:
        """The run's whole configuration."""
        return self.run["config"]

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, and not whole weights."""
        return is_adapter(str(self.checkpoint))

    @property
    def base(self) -> str | None:
        """What the run's weights came from, as its configuration names it; None for a model made from scratch."""
        return self.config["model"].get("name_or_path")


# What an export reads of a checkpoint's state.
CONFIG = {
    "model": {"name_or_path": (str, None), "policy_dtype": str},
    "loss": {"name": str},
    "trainer": {"name": str},
    "datasets": ([(str, dict)], str, dict),
    "template": (str, None),
    "system_prompt": (str, None),
}
STATE_SHAPE = {"examples": int, "held_out": ({...: (float, int)}, None), "run": {"config": CONFIG}}


def source_of(path: Path) -> Source:
    """The checkpoint that a path means: itself, or the LATEST of a run directory.

    Raises UserError for a path that is neither, and for a checkpoint that is damaged.
    """
    expected = "Expected a run directory, or a checkpoint (step-N) in one."
    if not path.is_dir():
        raise UserError(f"{path}: no such directory. {expected}")
    if not (path / CHECKSUMS).exists() and checkpoints_of(path):
        path = path / LATEST if (path / LATEST).is_dir() else checkpoints_of(path)[0]
    checkpoint = path.resolve()
    try:
        found = Checkpoint.verified(checkpoint, STATE_SHAPE)
    except DamagedError as fault:
        raise UserError(f"{checkpoint}: {fault}. {expected}") from None
    state = found.state
    rows = metric_rows(checkpoint.parent / METRICS, state["examples"])
    results = results_of(checkpoint.parent / RESULTS_FILE)
    # One of another checkpoint says nothing of this one.
    evaluation = results["held_out"]["all"] if results.get("examples_trained") == state["examples"] else {}
    return Source(checkpoint, found.run, state["examples"], state["held_out"] or {}, rows, evaluation)


# ---- checks ---------------------------------------------------------------------------------------------------------------

OLLAMA_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)*(:[\w.-]+)?")


def check_wishes(wishes: Wishes, adapter: bool) -> None:
    """Raise UserError for wishes that contradict each other, or that this model or this machine cannot fulfil."""
    stays_adapter = adapter and not wishes.merge
    if wishes.merge and not adapter:
        raise UserError("--merge: this checkpoint holds a whole model and no adapter. Leave it out.")
    for key, wanted in (("--dtype", wishes.dtype), ("--quantize", wishes.quantize), ("--ollama", wishes.ollama)):
        if wanted and stays_adapter:
            raise UserError(f"{key}: this checkpoint holds an adapter. Add --merge, which makes it a whole model.")
    if wishes.quantize and wishes.ollama:
        raise UserError("--quantize: Ollama quantizes by itself, from whole weights. Leave one of --quantize and --ollama out.")
    if wishes.private and not wishes.push:
        raise UserError("--private: nothing is pushed. Expected --push ORGANISATION/NAME beside it.")
    if wishes.ollama and not OLLAMA_NAME.fullmatch(wishes.ollama):
        raise UserError(f"--ollama: found {wishes.ollama!r}, expected a name as in my-model, or NAMESPACE/MODEL:TAG.")
    if wishes.quantize:
        quantization_of(wishes.quantize)
    _check_place(wishes.to)


def _check_place(place: Path) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise UserError(f"--to: {place} is no directory. Expected the name of one that is to be made.")
    if place.is_dir() and any(place.iterdir()):
        raise UserError(f"--to: {place} is not empty. Expected a new directory, or an empty one.")
    if not place.absolute().parent.is_dir():
        raise UserError(f"--to: {place.absolute().parent} is no directory. Make it first.")


# ---- the model ------------------------------------------------------------------------------------------------------------


def whole_model(source: Source, dtype: str, trust_remote_code: bool = False):
    """The model of a checkpoint, whole. dtype is a name such as bfloat16. Raises UserError where its files cannot be read."""
    tokenizer = tokenizer_of(source, trust_remote_code)
    config = _model_config(source, trust_remote_code)
    if source.is_adapter:
        return loading.load_merged(source.checkpoint, config, tokenizer, _cache_dir(source), getattr(torch, dtype))
    config.policy_dtype = dtype
    return loading.load_model(config, tokenizer, _cache_dir(source))


def own_model(source: Source, trust_remote_code: bool = False):
    """The model of a checkpoint as its run has it, its adapter in it."""
    tokenizer, config = tokenizer_of(source, trust_remote_code), _model_config(source, trust_remote_code)
    if source.is_adapter:
        return loading.load_with_adapter(source.checkpoint, config, tokenizer, _cache_dir(source))
    return loading.load_model(config, tokenizer, _cache_dir(source))


def _model_config(source: Source, trust_remote_code: bool):
    """The `model` configuration that loads a checkpoint, in the dtype that its weights have."""
    defaults = OmegaConf.load(CONFIG_DIR / "model" / "base_model.yaml")
    trusted = {"trust_remote_code": trust_remote_code}
    if source.is_adapter:
        return OmegaConf.merge(defaults, source.config["model"], trusted)
    return OmegaConf.merge(defaults, trusted, {"name_or_path": str(source.checkpoint), "policy_dtype": _dtype_of(source)})


def _dtype_of(source: Source) -> str:
    """The dtype of a checkpoint's weights, of an adapter's base."""
    stored = _stored(source).get("dtype")
    return stored if stored in DTYPES else source.config["model"]["policy_dtype"]


def _cache_dir(source: Source) -> str | None:
    found = source.config.get("cache_dir")
    return found if isinstance(found, str) else None


def tokenizer_of(source: Source, trust_remote_code: bool = False):
    """The tokenizer of a checkpoint: the one that lies in it, else the run's."""
    values = dict(source.config["model"]) | {"trust_remote_code": trust_remote_code}
    if (source.checkpoint / TOKENIZER_CONFIG).is_file():
        values["tokenizer_name_or_path"] = str(source.checkpoint)
    return load_tokenizer(OmegaConf.create(values))


def _places_of_tokenizer(source: Source) -> list[str]:
    """Where files of a tokenizer may be: directories and hub ids."""
    places = [str(source.checkpoint), source.config["model"].get("tokenizer_name_or_path"), source.base]
    return [place for place in places if place and place != BYTE_LEVEL]


def _stored(source: Source) -> dict:
    """The model's configuration as it lies in a checkpoint; empty in an adapter's."""
    try:
        return json.loads((source.checkpoint / MODEL_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


# ---- quantization ---------------------------------------------------------------------------------------------------------

# int4 is not among them: torchao packs it with kernels of GPUs alone, so that no CPU writes or reads it.
QUANTIZATIONS = ("int8",)


def quantization_of(name: str):
    """The configuration of transformers for a quantization of linear layers: int8, weights alone.

    Raises UserError without the package torchao.
    """
    from transformers import TorchAoConfig

    if name not in QUANTIZATIONS:
        raise UserError(f"--quantize: no format {name!r}; {nearest(name, QUANTIZATIONS)}")
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise UserError(
            "--quantize: the package torchao is missing, or does not fit this torch. Expected: "
            "pip install -r requirements/export.txt"
        ) from error
    return TorchAoConfig(Int8WeightOnlyConfig())


def _quantize(directory: Path, name: str, dtype: str) -> None:
    """Put quantized weights in the place of a directory's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), quantization_config=quantization_of(name)
    )
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    model.save_pretrained(directory, max_shard_size=SHARD_SIZE)


# ---- writing --------------------------------------------------------------------------------------------------------------


def export(path: Path, wishes: Wishes) -> list[str]:
    """Export the model of a run directory or checkpoint as `wishes` say; returns what there is to be said of it.

    Raises UserError for what cannot be done; then there is no directory.
    """
    source = source_of(path)
    check_wishes(wishes, source.is_adapter)
    tokenizer = tokenizer_of(source, wishes.trust_remote_code)
    written_as = _format_of(source, wishes.template)
    prompt, notes = serve_as_trained(written_as, tokenizer)
    modelfile = pieces = None
    if wishes.ollama:
        if architecture := _stored(source).get("architectures"):
            check_architecture(architecture[0])
        modelfile, said = modelfile_of(source.config, tokenizer, wishes.template or written_as)
        notes += said
        pieces = tokenizer_model(tokenizer, _places_of_tokenizer(source))
    if wishes.push:
        hub.reserve(wishes.push, wishes.private)
    dtype = wishes.dtype or _dtype_of(source)
    ends = end_tokens(written_as, tokenizer)
    with written_beside(wishes.to) as partial:
        write = _write_adapter if source.is_adapter and not wishes.merge else _write_whole
        with _compared(wishes.to):
            facts, check = write(source, partial, dtype, wishes, tokenizer, ends)
        save_tokenizer(tokenizer, partial)
        if modelfile:
            fit_for_ollama(partial, tokenizer)
            (partial / "Modelfile").write_text(modelfile, encoding="utf-8")
        if pieces:
            (partial / "tokenizer.model").write_bytes(pieces)
        with _compared(wishes.to):
            notes += check()
        facts = replace(facts, name=wishes.push or wishes.to.resolve().name, prompt=prompt)
        (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    said = [_summary(wishes.to, facts), *(f"note: {note}" for note in notes)]
    if wishes.ollama:
        command = ["ollama", "create", wishes.ollama, "--quantize", "q4_K_M", "-f", str(wishes.to / "Modelfile")]
        said.append(f"for Ollama: {shlex.join(command)}")
    if wishes.push:
        said.append(f"on the hub: {hub.upload(wishes.to, wishes.push)}")
    return said


def _format_of(source: Source, wanted: str | None) -> str | None:
    """How the run's prompts are written, as its configuration says, or else as its first checkpoint found them to be."""
    seen = source.run.get("prompt_format")
    try:
        return format_of_run(source.config, wanted)[0]
    except UserError:
        return seen if seen in TEMPLATES else None


@contextmanager
def _compared(place: Path) -> Iterator[None]:
    """Inside, a directory that turns out to be another model than the run's is a UserError."""
    try:
        yield
    except DifferentModelError as error:
        raise UserError(
            f"--to: {place}: what was written is not the run's model: {error}. It is removed; the "
            "checkpoint stays as it is. Export without --merge or --quantize, or with the run's versions of the libraries."
        ) from error


def _summary(place: Path, facts: CardFacts) -> str:
    return f"{place}: {facts.architecture}, {facts.parameters:,} parameters, {facts.dtype}"


# What looks at a directory when all of it is written; its lines are said. Raises DifferentModelError.
Check = Callable[[], list[str]]


def _write_whole(source: Source, partial: Path, dtype: str, wishes: Wishes, tokenizer, ends) -> tuple[CardFacts, Check]:
    model = own_model(source, wishes.trust_remote_code)
    architecture = type(model).__name__
    if wishes.ollama:
        check_architecture(architecture)
    expected, notes = _made_whole(model, source, dtype)
    parameters = save_weights(model, partial, tokenizer, ends)
    if wishes.quantize:
        _quantize(partial, wishes.quantize, dtype)
    facts = replace(_facts(source), architecture=architecture, dtype=dtype, parameters=parameters, quantized=wishes.quantize)
    if expected is None:
        # Compared at once: later there is nothing to compare with.
        compare_parts(partial, model, wishes.trust_remote_code)
        return facts, lambda: notes
    return facts, lambda: notes + _whole_compared(partial, expected, dtype, wishes)


def _made_whole(model, source: Source, dtype: str) -> tuple[Tensor | None, list[str]]:
    """Merge a model's adapter and give its weights a dtype, in place; what it then says in float32, and notes.

    None for what it says where memory does not suffice for float32.
    """
    wanted = getattr(torch, dtype)
    if not fits_in_memory(sum(weight.numel() for weight in model.parameters())):
        loading.merged(model, wanted) if source.is_adapter else loading.round_weights(model, wanted)
        return None, ["too little memory to compare log-probs: names, shapes, values and configuration were compared"]
    stored, notes = getattr(torch, _dtype_of(source)), []
    if source.config["model"].get("quantization") and source.is_adapter:
        notes += _bits_restored(model, source)
    began = probe_logps(compute_in_float32(model))
    if source.is_adapter:
        loading.merged(model, torch.float32)
        found = probe_logps(model)
        compare(found, began, model, tolerance(began, model))
        stored, began = torch.float32, found
    loading.round_weights(model, wanted)
    expected = probe_logps_in_float32(model, wanted)
    if wanted != stored and (difference := largest_difference(expected, began, model)):
        notes.append(f"rounding the weights to {dtype} changes log-probs by up to {difference:.2g} nats a token")
    return expected, notes


def _bits_restored(model, source: Source) -> list[str]:
    """Turn a model's layers of few bits into usual ones, and compare; notes."""
    config, model.autocast_dtype = source.config["model"], None
    own = probe_logps(model)
    restore_bits(model, getattr(torch, config["policy_dtype"]))
    found = probe_logps(model)
    if config["quantization"] == "int8":
        # These layers round what they read too, which no weight can do.
        difference = largest_difference(found, own, model)
        return [f"merged layers no longer round their inputs to int8: up to {difference:.2g} nats a token"]
    dtype = getattr(torch, config.get("quantized_compute_dtype") or config["policy_dtype"])
    compare(found, own, model, tolerance(own, model, dtype))
    return []


def _whole_compared(directory: Path, expected: Tensor, dtype: str, wishes: Wishes) -> list[str]:
    """Compare a directory, loaded as others load it, with what the model said before."""
    model = load_plain(directory, getattr(torch, dtype), wishes.trust_remote_code)
    if wishes.quantize:
        difference = largest_difference(probe_logps(model), expected, model)
        return [f"{wishes.quantize} changes log-probs by up to {difference:.2g} nats a token"]
    compare(probe_logps(compute_in_float32(model)), expected, model, tolerance(expected, model))
    return []


def save_weights(model, directory: Path, tokenizer, ends=()) -> int:
    """Write a model's weights and configurations; returns how many parameters it has. Raises OSError where there is no room.

    ends: tokens that end an answer, beside the tokenizer's.
    """
    parameters = list(model.parameters())
    needed = sum(weight.numel() * weight.element_size() for weight in parameters)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:,.0f} MiB are needed, and {free / 2**20:,.0f} MiB are free")
    end_as_trained(model.config, model.generation_config if model.can_generate() else None, tokenizer, ends)
    loading.save_model(model, directory, max_shard_size=SHARD_SIZE)
    return sum(weight.numel() for weight in parameters)


def _write_adapter(source: Source, partial: Path, dtype: str, wishes: Wishes, tokenizer, ends) -> tuple[CardFacts, Check]:
    from safetensors import safe_open

    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        shutil.copyfile(source.checkpoint / name, partial / name)
    if (source.checkpoint / GENERATION_CONFIG).is_file():
        shutil.copyfile(source.checkpoint / GENERATION_CONFIG, partial / GENERATION_CONFIG)
    with safe_open(partial / WEIGHTS_FILE, framework="pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118  not a dict
    base = settings_of_file(partial).get("base_model_name_or_path")
    facts = replace(_facts(source), dtype=dtype, parameters=sum(math.prod(shape) for shape in shapes), adapter=True)
    facts = replace(facts, base=source.base or base, architecture="adapter")
    notes = _with_base(source, partial, wishes, tokenizer)
    return facts, lambda: notes + _adapter_compared(source, partial, dtype, wishes)


def _with_base(source: Source, partial: Path, wishes: Wishes, tokenizer) -> list[str]:
    """Put the model under an adapter beside it where nobody but its run has it, and name its place; notes."""
    settings = settings_of_file(partial)
    base = settings.get("base_model_name_or_path")
    lies_elsewhere = base is not None and (not Path(base).is_absolute() or (Path(base) / MODEL_CONFIG).is_file())
    if lies_elsewhere and Path(base).name != BASE_DIR:
        return []
    model = loading.base_of(source.checkpoint, _model_config(source, wishes.trust_remote_code), tokenizer, _cache_dir(source))
    (partial / BASE_DIR).mkdir()
    save_weights(model, partial / BASE_DIR, tokenizer)
    save_tokenizer(tokenizer, partial / BASE_DIR)
    settings["base_model_name_or_path"] = place = str(wishes.to.resolve() / BASE_DIR)
    (partial / SETTINGS_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return [f"the model under the adapter is in {BASE_DIR}/; {SETTINGS_FILE} names {place}: change it there where it is moved"]


def _adapter_compared(source: Source, directory: Path, dtype: str, wishes: Wishes) -> list[str]:
    """Compare an adapter, loaded as others load it, with the run's model."""
    config = _model_config(source, wishes.trust_remote_code)
    own = own_model(source, wishes.trust_remote_code)
    if not fits_in_memory(2 * sum(weight.numel() for weight in own.parameters())):
        return ["too little memory to compare log-probs with the run's"]
    expected = probe_logps(compute_in_float32(own))
    del own
    prepare = (lambda model: quantise(model, config)) if config.quantization else None
    base = directory / BASE_DIR if (directory / BASE_DIR).is_dir() else None
    model = load_plain(directory, getattr(torch, dtype), wishes.trust_remote_code, _cache_dir(source), base, prepare)
    compare(probe_logps(compute_in_float32(model)), expected, model, tolerance(expected, model))
    return []


def _facts(source: Source) -> CardFacts:
    versions = {name: version for name, version in (source.run.get("versions") or {}).items() if isinstance(version, str)}
    started = source.config["model"].get("archive")
    notes = [f"The run started from weights of an earlier one, `{Path(started).name}`."] if started else []
    known = {"config": source.config, "base": source.base, "examples": source.examples, "held_out": source.held_out}
    known |= {"rows": source.rows, "evaluation": source.evaluation, "versions": versions, "notes": notes}
    return CardFacts("", "", "", 0, **known)


@contextmanager
def written_beside(place: Path) -> Iterator[Path]:
    """Inside, a directory beside `place`, which becomes it at the end; where anything goes wrong, nothing is left.

    What the system refuses is a UserError.
    """
    place = place.resolve()
    try:
        with atomic_directory(place) as partial:
            yield partial
            # safetensors gives its files to their owner alone; they are to be as open as the others.
            for file in partial.rglob("*.safetensors"):
                file.chmod((partial / "README.md").stat().st_mode)
    except (OSError, SafetensorError) as error:
        # safetensors has no other class for what the system says.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, SafetensorError) and number is None:
            raise
        reason = os.strerror(int(number[1])) if number else error.strerror or str(error)
        raise UserError(f"--to: {place} cannot be written: {reason}. Expected a place of yours, with room.") from error


# ---- the original code's archives -----------------------------------------------------------------------------------------


def model_config_of(name: str, archive: Path):
    """The `model` configuration of a preset's name or of a model's path or hub id, with the archive's weights in it."""
    from hydra import compose, initialize_config_dir

    presets = choices_of("model")
    if name not in presets and "/" not in name and not Path(name).is_dir():
        raise UserError(f"--model: no preset {name!r}, and no directory; {nearest(name, presets)}")
    chosen = [f"model={name}"] if name in presets else ["model=blank_model"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        model_config = compose("config", overrides=chosen).model
    if name not in presets:
        model_config.name_or_path = name
    model_config.archive = str(archive)
    return model_config


def convert(archive: Path, name: str, to: Path, dtype: str | None = None) -> list[str]:
    """Export the weights of a policy.pt, the original code's or this one's, as a directory; returns what is to be said of it.

    name is a preset of config/model/, or a model's path or hub id, that says what the weights belong to. Raises UserError.
    """
    _check_place(to)
    if not archive.is_file():
        raise UserError(f"{archive}: no such file. Expected a policy.pt.")
    model_config = model_config_of(name, archive)
    model_config.policy_dtype = dtype or model_config.policy_dtype
    tokenizer = load_tokenizer(model_config)
    loading.check_model(model_config, tokenizer)
    held = load_tensors(archive, mapped=True)
    with written_beside(to) as partial, _compared(to):
        model = loading.load_model(model_config, tokenizer)
        compares = fits_in_memory(sum(weight.numel() for weight in model.parameters()))
        expected = probe_logps_in_float32(model, getattr(torch, model_config.policy_dtype)) if compares else None
        parameters = save_weights(model, partial, tokenizer)
        save_tokenizer(tokenizer, partial)
        if compares:
            _whole_compared(partial, expected, model_config.policy_dtype, Wishes(to))
        else:
            compare_parts(partial, model)
        step, metrics = held.get("step_idx"), held.get("metrics")
        facts = CardFacts(
            to.resolve().name,
            type(model).__name__,
            model_config.policy_dtype,
            parameters,
            config=None,
            base=model_config.name_or_path,
            examples=step if isinstance(step, int) else None,
            held_out=_numbers(metrics),
            notes=["Converted from a single file of weights. What it was trained on, and how, is not in that file."],
        )
        (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    return [_summary(to, facts)]


def _numbers(metrics) -> dict[str, float]:
    """What of an archive's metrics is a number."""
    items = metrics.items() if isinstance(metrics, dict) else ()
    return {str(name): float(value) for name, value in items if isinstance(value, float | int)}
