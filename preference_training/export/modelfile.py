"""The files that Ollama needs: a Modelfile whose TEMPLATE, a Go template, formats prompts as in training.

Ollama looks for a few values in other places than transformers does; `adapt_configs` copies them there.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from preference_training.core.errors import UserError, first_line
from preference_training.data.rendering.chat_templates import ConversationFormat, conversation_format, run_format
from preference_training.data.tokenization import bos_ids
from preference_training.export.gguf_model import CONVERTER

# The language models that `ollama create` converts from safetensors (convert/convert.go, Ollama 0.33).
ARCHITECTURES = (
    "CohereForCausalLM", "DeepseekV3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM",
    "GemmaForCausalLM", "Glm4MoeLiteForCausalLM", "GptOssForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM",
    "LlamaForCausalLM", "Ministral3ForCausalLM", "MixtralForCausalLM", "NemotronHForCausalLM", "Olmo3ForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3NextForCausalLM",
)  # fmt: skip

# SHA-256 of the pre-tokenizer regular expressions that Ollama recognizes: Llama 3, DeepSeek LLM and Coder, Qwen 2
# (convert/tokenizer.go). It pre-tokenizes for all other models with its default.
KNOWN_PRE_TOKENIZERS = (
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f",
    "03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02",
    "21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e",
)


def check_architecture(architecture: str) -> None:
    """Raise UserError for an architecture that Ollama does not convert."""
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"--ollama: Ollama does not convert {architecture} from safetensors. Expected one of {', '.join(ARCHITECTURES)}. "
            f"Export without --ollama and convert the directory to GGUF: {CONVERTER}"
        )


@dataclass(frozen=True)
class OllamaFiles:
    """The content of Modelfile and, for a SentencePiece vocabulary, of tokenizer.model; notes say what they cannot express."""

    modelfile: str
    tokenizer_model: bytes | None
    notes: list[str]

    @classmethod
    def build(cls, config: dict, tokenizer, template: str | None, sources: list[str], gguf: str | None = None) -> "OllamaFiles":
        """The files for a run's configuration. Raises UserError where Ollama cannot serve the model as it was trained.

        sources: directories and hub ids that may hold files of the tokenizer. gguf: the file to serve instead of safetensors.
        """
        modelfile, notes = build_modelfile(config, tokenizer, template, gguf)
        return cls(modelfile, None if gguf else read_tokenizer_model(tokenizer, sources), notes)

    def write(self, directory: Path, tokenizer) -> None:
        """Write the files into an exported directory, and adapt the ones there."""
        adapt_configs(directory, tokenizer)
        (directory / "Modelfile").write_text(self.modelfile, encoding="utf-8")
        if self.tokenizer_model:
            (directory / "tokenizer.model").write_bytes(self.tokenizer_model)


WRITTEN = "# Written by the export of this directory, for `ollama create NAME -f Modelfile`."
OLD_VERSIONS = (
    "# A version of Ollama that does not convert safetensors needs a GGUF file: export with --gguf, which names it here.",
)


# ---- the Modelfile ----------------------------------------------------------------------------------------------------------


def build_modelfile(config: dict, tokenizer, template: str | None = None, gguf: str | None = None) -> tuple[str, list[str]]:
    """The Modelfile for a run's configuration, and notes on what it cannot express.

    template: overrides the configuration's (`run_format`). gguf: the name of a GGUF file to serve. Raises UserError where
    Ollama cannot express it.
    """
    name, system = run_format(config, template)
    if name == "raw":
        text, stops = RAW, ()
        notes = ["raw: a single message is passed through as it is; several are each followed by an empty line"]
    else:
        turns = conversation_format(name, tokenizer)
        text, stops, notes = go_template(turns), turns.stops, list(turns.notes)
    lines = [
        WRITTEN,
        *(() if gguf else OLD_VERSIONS),
        f"FROM ./{gguf}" if gguf else "FROM .",
        f"TEMPLATE {_quoted(text, '--template')}",
    ]
    if system:
        lines.append(f"SYSTEM {_quoted(system, 'system_prompt')}")
    lines += [f"PARAMETER stop {_quoted(stop, '--template')}" for stop in dict.fromkeys((*stops, tokenizer.eos_token))]
    return "\n".join(lines) + "\n", notes if gguf else notes + _notes_on_tokens(tokenizer)


# Several messages are a conversation, in which training puts an empty line after each turn.
RAW = (
    r"{{ $several := gt (len .Messages) 1 }}{{ range .Messages }}{{ .Content }}"
    r'{{ if $several }}{{ "\n\n" }}{{ end }}{{ end }}'
)


def go_template(turns: ConversationFormat) -> str:
    """The format of turns as a Go text/template over Ollama's .Messages, on one line."""
    text = f"{{{{ if not .System }}}}{_go(turns.opening)}{{{{ end }}}}" if turns.opening else ""
    text += "{{ range .Messages }}"
    around = {"system": turns.system, "user": turns.user, "assistant": turns.assistant}
    branches = [(role, parts) for role, parts in around.items() if parts is not None]
    for number, (role, (before, behind)) in enumerate(branches):
        text += f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}'
        if role == "assistant" and before.endswith(" "):
            # A response in the history starts with this space if the model generated it, but not if a person wrote it.
            text += f'{_go(before[:-1])}{{{{ if not (and .Content (eq (slice .Content 0 1) " ")) }}}}{_go(" ")}{{{{ end }}}}'
        else:
            text += _go(before)
        text += f"{{{{ .Content }}}}{_go(behind)}"
    return f"{text}{{{{ end }}}}{{{{ end }}}}{_go(turns.generation_prompt)}"


ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r", '"': r"\"", "\\": r"\\"}


def _go(text: str) -> str:
    """A Go action that writes a text. Escapes unprintable characters, which the Modelfile parser drops."""
    return f'{{{{ "{"".join(map(_go_character, text))}" }}}}' if text else ""


def _go_character(character: str) -> str:
    if character in ESCAPES or character.isprintable():
        return ESCAPES.get(character, character)
    return f"\\U{ord(character):08x}" if character > "\uffff" else f"\\u{ord(character):04x}"


def _quoted(text: str, key: str) -> str:
    """A value in a Modelfile, which has no escapes. Raises UserError naming `key` for a text that cannot be represented."""
    dropped = sorted({character for character in text if not (character.isprintable() or character in "\n\t")})
    if '"""' in text or dropped:
        what = "three quotes in a row" if '"""' in text else f"{dropped[0]!r}, which the Modelfile parser drops"
        raise UserError(f"{key}: a Modelfile cannot represent this text: found {what}. Change it, or export without --ollama.")
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


# ---- tokens -----------------------------------------------------------------------------------------------------------------


def _tokenizer_json(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}, "pre_tokenizer": None}


def needs_tokenizer_model(tokenizer) -> bool:
    """Whether the vocabulary is a SentencePiece one, which Ollama reads only from tokenizer.model."""
    model = _tokenizer_json(tokenizer)["model"]
    return model.get("type") == "Unigram" or bool(model.get("byte_fallback"))


def _notes_on_tokens(tokenizer) -> list[str]:
    """Known reasons why Ollama may tokenize a text differently than training did."""
    if needs_tokenizer_model(tokenizer):
        return []
    parts = (_tokenizer_json(tokenizer)["pre_tokenizer"] or {}).get("pretokenizers", [])
    expressions = "".join((part.get("pattern") or {}).get("Regex", "") for part in parts if part["type"] == "Split")
    if hashlib.sha256(expressions.encode()).hexdigest() in KNOWN_PRE_TOKENIZERS:
        return []
    return [
        "Ollama does not recognize this tokenizer's pre-tokenizer and uses its default: prompts have the text of training, but "
        "some of their tokens may differ; with --gguf they do not"
    ]


def adapt_configs(directory: Path, tokenizer) -> None:
    """Copy values in an exported directory's configuration files to where Ollama reads them; transformers is unaffected."""
    config = _read(directory / "config.json")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope and "rope_theta" not in config:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        _write(directory / "config.json", config)
    values = _read(directory / "tokenizer_config.json")
    values["add_bos_token"] = bool(bos_ids(tokenizer))
    if not tokenizer.bos_token and "bos_token" not in (tokenizer.chat_template or ""):
        # Without one, Ollama's newer engine prepends token 0 to every prompt.
        values["bos_token"] = tokenizer.eos_token
    _write(directory / "tokenizer_config.json", values)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tokenizer_model(tokenizer, sources: list[str]) -> bytes | None:
    """The tokenizer.model of a SentencePiece vocabulary; None for other vocabularies.

    sources: directories and hub ids to look in. Raises UserError where none has the file.
    """
    from huggingface_hub import hf_hub_download

    if not needs_tokenizer_model(tokenizer):
        return None
    reasons = []
    for source in sources:
        try:
            found = Path(source) / "tokenizer.model" if Path(source).is_dir() else hf_hub_download(source, "tokenizer.model")
            return Path(found).read_bytes()
        except Exception as error:  # a dozen types: network, repository and file errors
            reasons.append(f"{source}: {first_line(error)}")
    raise UserError(
        "--ollama: Ollama reads a SentencePiece tokenizer from the file tokenizer.model, which was not found "
        f"({'; '.join(reasons)}). Copy the base model's into the checkpoint directory, or add --gguf, which needs none."
    )
