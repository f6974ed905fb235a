"""Models to talk to: loaded from whatever has one, with the prompt format and the end tokens of their training."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.saved_run import SavedRun, newest_checkpoint
from preference_training.configuration.composition import default_values
from preference_training.configuration.model_names import is_gguf, presets
from preference_training.configuration.saved import CONFIG, model_config
from preference_training.configuration.schema import TEMPLATES
from preference_training.configuration.sections import DTYPES
from preference_training.core.errors import UserError, first_line, nearest
from preference_training.core.machine import pick_device
from preference_training.core.values import UNREADABLE
from preference_training.data.records.record import Prompt, Turn
from preference_training.data.rendering.chat_templates import run_format
from preference_training.generation.chat_format import ChatFormat
from preference_training.generation.decoding import Ends, generate
from preference_training.generation.sampling import (
    OTHER,
    POLICY,
    Sampler,
    advised_generation,
    as_trained,
    choice_of_tokens,
    ends_of,
    named_ends,
)
from preference_training.generation.servers import Reply, served_model
from preference_training.generation.settings import GenerationSettings, LoadOptions
from preference_training.generation.streaming import PrefixCache, StreamedDecoding, TextStream
from preference_training.modeling import loading
from preference_training.modeling.adapters.files import (
    CONFIG_FILE,
    is_adapter,
    read_adapter_config,
    saved_base,
    set_initial_adapter,
)
from preference_training.modeling.adapters.weights import reference_mode
from preference_training.modeling.archives import MODEL_CONFIG, TOKENIZER_CONFIG
from preference_training.modeling.sources.configurations import model_configuration
from preference_training.modeling.sources.gguf import gguf_directory
from preference_training.modeling.state import move_to_devices
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.tracking.run_files import STATE

EXPECTED = (
    "Expected a run directory, a checkpoint (step-N) in one, an export, a model directory, a .gguf file, a preset, a hub id."
)
BEFORE_TRAINING = "before training"
AS_FITS = LoadOptions()
# Where a model's configuration does not say how many tokens it can read.
UNLIMITED = 1 << 20


class Responder(Protocol):
    """Who responds to a conversation: a model in this process, or behind a server."""

    name: str

    def respond(self, turns: Sequence[Turn], changes: dict[str, Any], say: Callable[[str], None]) -> Reply:
        """The response to a conversation, each part of which goes to `say` as it comes. Raises UserError, and what `say` does.

        changes: settings that differ from the model's own, by their names in GenerationSettings.
        """

    def responses(self, prompts: Sequence[Prompt], changes: dict[str, Any]) -> list[str]:
        """The responses to several prompts, each the one that `respond` gives."""


@dataclass(frozen=True)
class ChatModel:
    """A model in this process that one can talk to. It keeps the cache of the last conversation.

    settings: how its generation_config.json advises to choose tokens. system_prompt: what its training began conversations
    with. is_before_training: its adapter is switched off. saved: the checkpoint that it is from, if it is of a run. stream: the
    name of its noise, another one for each of two models that are compared.
    """

    name: str
    model: nn.Module
    tokenizer: object
    format: ChatFormat
    ends: Ends
    settings: GenerationSettings
    system_prompt: str | None = None
    notes: tuple[str, ...] = ()
    saved: SavedRun | None = None
    has_adapter: bool = False
    is_before_training: bool = False
    stream: str = POLICY
    cache: PrefixCache = field(default_factory=PrefixCache)

    @property
    def context(self) -> int:
        """How many tokens it can read."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED

    def respond(
        self, turns: Sequence[Turn], changes: dict[str, Any], say: Callable[[str], None], stops: Sequence[str] = ()
    ) -> Reply:
        """The response to a conversation, computed from where the kept cache ends. stops: further texts that end it."""
        settings = self.settings.changed(changes)
        prompt = self.prompt_ids(tuple(turns))
        limit = min(settings.max_new_tokens, self.context - len(prompt))
        stream = TextStream(self.tokenizer, say, (*self.format.stops, *stops), self.format.response)
        noise = choice_of_tokens([(prompt, 0)], settings.seed, self.stream, settings)
        decoding = StreamedDecoding(noise, limit, self.ends, stream.add)
        with torch.no_grad(), as_trained(self.model), self.weights():
            try:
                arguments = settings.arguments() | self.cache.take(prompt)
                [(ids, _)] = generate(self.model, [prompt], self.ends, limit, decoding, **arguments)
            except KeyboardInterrupt:
                # In the middle of a forward pass, which has left the cache incomplete.
                decoding.rows = None
                raise
            finally:
                self.cache.keep(decoding.rows)
        is_cut = len(ids) == limit and ids[-1] not in self.ends.tokens and not stream.is_stopped
        return Reply(stream.end(), "length" if is_cut else "stop", prompt_tokens=len(prompt), tokens=len(ids))

    def responses(self, prompts: Sequence[Prompt], changes: dict[str, Any]) -> list[str]:
        """The responses to several prompts, computed in batches."""
        settings = self.settings.changed(changes)
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        longest = min(self.context, max(map(len, ids), default=0) + settings.max_new_tokens)
        sampler = Sampler(self.tokenizer, longest, settings.seed, settings=settings, ends=self.ends.tokens)
        with self.weights():
            return [self._text(found) for found in sampler.responses(self.model, ids, self.stream)]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Raises UserError where it leaves no room for a response."""
        ids = self.format.prompt_ids(prompt)
        if len(ids) >= self.context:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, and {self.name} reads at most {self.context:,} with the response. "
                "Begin a new one, or shorten it."
            )
        return ids

    def _text(self, ids: list[int]) -> str:
        """The text of a response's tokens."""
        stream = TextStream(self.tokenizer, lambda _: None, self.format.stops, self.format.response)
        for token in ids[:-1] if ids[-1] in self.ends.tokens else ids:
            if not stream.add(token):
                break
        return stream.end()

    def weights(self):
        """Context in which the model computes as it did before training, or as it does now."""
        return reference_mode(self.model) if self.is_before_training else nullcontext()


# ---- loading ----------------------------------------------------------------------------------------------------------------


def load_for_chat(name: str, options: LoadOptions = AS_FITS) -> ChatModel:
    """The model of a run directory, a checkpoint, an export, a model directory, a GGUF file or a hub id.

    Raises UserError where there is none, or none that writes text.
    """
    if name in presets() and not Path(name).exists():
        name = default_values(model=name)["model"]["name_or_path"] or name
    path = Path(name).expanduser()
    if is_gguf(name):
        path = gguf_directory(name)
    if not path.is_dir():
        _check_name(name, path)
        return _load_directory(name, None, options)
    checkpoint = newest_checkpoint(path)
    if (checkpoint / STATE).is_file():
        return _load_checkpoint(checkpoint, options)
    files = (MODEL_CONFIG, CONFIG_FILE)
    if not any((path / file).is_file() for file in files):
        if (path / CONFIG).is_file():
            raise UserError(
                f"{path}: this run has no checkpoint yet. Wait for its first one, or lower save_every; a run without a "
                "checkpoint leaves no model."
            )
        raise UserError(f"{path}: this directory holds no model: none of {', '.join(files)}. {EXPECTED}")
    return _load_directory(str(path), path, options)


def open_responders(name: str, against: str | None, url: str | None, options: LoadOptions) -> list[Responder]:
    """Who a name means (`load_for_chat`, or openai:MODEL, ollama:MODEL), and who `against` does: also "reference".

    url: the address of servers. Raises UserError.
    """
    found: list[Responder] = [_open(name, url, options)]
    if against == "reference":
        [first] = found
        if not isinstance(first, ChatModel):
            raise UserError(f"--against reference: nobody knows what {name} was before its training. Name a model.")
        found.insert(0, load_before_training(first, options))
    elif against is not None:
        other = _open(against, url, options)
        found.insert(0, replace(other, stream=OTHER) if isinstance(other, ChatModel) else other)
    return found


def _open(name: str, url: str | None, options: LoadOptions) -> Responder:
    served = served_model(name, url)
    if served is None:
        return load_for_chat(name, options)
    served.check()
    return served


def newest_of(names: Sequence[str]) -> str:
    """The only name, or of several run directories, which a shell makes of runs/mine_*, the newest. Raises UserError."""
    if len(names) == 1:
        return names[0]
    others = [name for name in names if not Path(name).is_dir()]
    if others:
        raise UserError(f"{others[0]}: expected one model, or run directories, of which the newest is taken.")
    return max(names, key=lambda name: Path(name).stat().st_mtime)


def load_before_training(chat: ChatModel, options: LoadOptions = AS_FITS) -> ChatModel:
    """The model that a run started from: its own weights without the adapter, or those that it loaded. Raises UserError."""
    if chat.has_adapter:
        set_initial_adapter(chat.model, chat.saved.initial_adapter if chat.saved else None)
        return replace(chat, name=BEFORE_TRAINING, is_before_training=True, stream=OTHER, cache=PrefixCache(), notes=())
    if chat.saved is None:
        raise UserError(
            f"--against reference: {chat.name} is not a run of this project, so that the model it started from is unknown. "
            "Name it: --against DIRECTORY, or a hub id."
        )
    model = _placed(chat.saved.load_initial_model(), options)
    return replace(chat, name=BEFORE_TRAINING, model=model, stream=OTHER, saved=None, cache=PrefixCache(), notes=())


def _check_name(name: str, path: Path) -> None:
    """Raise UserError for a name that cannot be a hub id."""
    if path.is_file():
        raise UserError(f"{name}: this file is no model. {EXPECTED}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir():
        beside = _models_in(path.parent)
        there_are = f"there are {', '.join(beside)}."
        hint = f" Beside it: {nearest(str(path), beside, there_are)}" if 0 < len(beside) <= 20 else ""
        raise UserError(f"{name}: no such directory.{hint} {EXPECTED}")


def _models_in(folder: Path) -> list[str]:
    """The directories in a folder that can be talked to: runs, checkpoints, exports and models."""
    files = (CONFIG, STATE, MODEL_CONFIG, CONFIG_FILE)
    directories = sorted(folder.iterdir()) if folder.is_dir() else []
    return [str(each) for each in directories if any((each / file).is_file() for file in files)]


def _load_checkpoint(path: Path, options: LoadOptions) -> ChatModel:
    """The model of a run's checkpoint."""
    try:
        run = Checkpoint.read(path).run
        saved = SavedRun(checkpoint=path, run=run, trust_remote_code=options.trust_remote_code)
        config, recorded = saved.config, run.get("prompt_format")
        _ = config["model"], config["datasets"], config["template"], config["system_prompt"]
    except UNREADABLE as error:
        raise UserError(f"{path}: its {STATE} is damaged ({first_line(error)}). {EXPECTED}") from error
    _refuse_reward_model(path, saved.head)
    tokenizer = saved.load_tokenizer()
    try:
        name, system = run_format(config, options.template)
    except UserError:
        if options.template or recorded not in TEMPLATES:
            name, system = options.template or ("chat" if tokenizer.chat_template else "raw"), None
        else:
            name, system = recorded, None
    loaded = _Loaded(saved.load_model(), tokenizer, options, path if (path / "generation_config.json").is_file() else None)
    return loaded.chat(f"{path.parent.name} {path.name}", name, system, saved)


def _load_directory(name: str, path: Path | None, options: LoadOptions) -> ChatModel:
    """A model that no run of this project has left, or an export of one; path: its directory, if it is one."""
    head, values = "lm", {"name_or_path": name, "policy_dtype": "float32"}
    adapter = path is not None and is_adapter(str(path))
    if path is not None:
        head = loading.saved_head(path)
        _refuse_reward_model(path, head)
    if adapter:
        base = read_adapter_config(path).get("base_model_name_or_path")
        own = str(path) if (path / TOKENIZER_CONFIG).is_file() else None
        values |= {"name_or_path": str(saved_base(path) or base), "tokenizer_name_or_path": own}
    config = model_config(values, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(config)
    if adapter:
        model = loading.load_with_adapter(path, config, tokenizer)
    else:
        stored = getattr(model_configuration(config, tokenizer), "dtype", None)
        stored = str(stored).removeprefix("torch.")
        model = loading.load_model(replace(config, policy_dtype=stored if stored in DTYPES else "float32"), tokenizer)
    template = options.template or ("chat" if tokenizer.chat_template else "raw")
    return _Loaded(model, tokenizer, options, path).chat(path.resolve().name if path else name, template, None, None)


def _refuse_reward_model(path: Path, head: str) -> None:
    if head == "value":
        raise UserError(f"{path}: this is a reward model, which scores responses and writes none. Name a language model.")


@dataclass(frozen=True)
class _Loaded:
    """A model as it was loaded. directory: that with its generation_config.json, if there is any."""

    model: nn.Module
    tokenizer: Any
    options: LoadOptions
    directory: Path | None

    def chat(self, name: str, template: str, system: str | None, saved: SavedRun | None) -> ChatModel:
        """The model, ready to talk."""
        chat_format = ChatFormat(template, self.tokenizer)
        advised = advised_generation(self.model, self.directory)
        ends = frozenset([self.tokenizer.eos_token_id, *chat_format.end_tokens, *named_ends(advised)])
        notes = []
        if template == "raw":
            notes.append("raw: what you write is continued as it is, without a chat template")
        return ChatModel(
            name=name,
            model=_placed(self.model, self.options),
            tokenizer=self.tokenizer,
            format=chat_format,
            ends=ends_of(self.model, self.tokenizer, ends),
            settings=GenerationSettings.of(advised),
            system_prompt=system,
            notes=tuple(notes),
            saved=saved,
            has_adapter=hasattr(self.model, "peft_config"),
        )


def _placed(model: nn.Module, options: LoadOptions) -> nn.Module:
    """A model on its device, in its dtype: by default as stored, and in float32 on CPUs, which compute faster in it."""
    device = pick_device() if options.device is None else torch.device(options.device)
    dtype = options.dtype or ("float32" if device.type == "cpu" and model.dtype.itemsize == 2 else None)
    if dtype is not None:
        loading.cast_weights(model, getattr(torch, dtype))
    return move_to_devices(model, device).eval()
