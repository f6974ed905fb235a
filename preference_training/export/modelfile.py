"""What Ollama needs beside a model's directory: a Modelfile whose TEMPLATE writes the prompt of training, in Go's language.

Ollama reads a few facts from other places than transformers does; `fit_for_ollama` writes them there.
"""

import hashlib
import json
from pathlib import Path

from preference_training.core.errors import UserError, first_line
from preference_training.data.chat_templates import Turns, format_of_run, turns_of
from preference_training.data.tokenization import bos_of
from preference_training.modeling.archives import MODEL_CONFIG, TOKENIZER_CONFIG

# Language models that `ollama create` converts from safetensors (convert/convert.go of Ollama 0.33).
ARCHITECTURES = (
    "CohereForCausalLM", "DeepseekV3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM",
    "GemmaForCausalLM", "Glm4MoeLiteForCausalLM", "GptOssForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM",
    "LlamaForCausalLM", "Ministral3ForCausalLM", "MixtralForCausalLM", "NemotronHForCausalLM", "Olmo3ForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3NextForCausalLM",
)  # fmt: skip

# SHA-256 of the regular expressions by which a tokenizer cuts texts, of those that Ollama tells apart: Llama 3, DeepSeek LLM
# and Coder, Qwen 2 (convert/tokenizer.go). All others are cut as its default does.
KNOWN_CUTS = (
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f",
    "03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02",
    "21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e",
)


def check_architecture(architecture: str) -> None:
    """Raise UserError for a class of models that Ollama does not convert."""
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"--ollama: Ollama does not convert {architecture} from safetensors. Expected one of {', '.join(ARCHITECTURES)}. "
            "Export without --ollama, and convert the directory with llama.cpp's convert_hf_to_gguf.py."
        )


# ---- the Modelfile ----------------------------------------------------------------------------------------------------------


def modelfile_of(config: dict, tokenizer, wanted: str | None = None) -> tuple[str, list[str]]:
    """The Modelfile of a run, from its configuration, and notes on what it cannot say.

    wanted is the template that the user names (`format_of_run`). Raises UserError where there is none that Ollama could have.
    """
    name, system = format_of_run(config, wanted)
    if name == "raw":
        template, stops = RAW, ()
        notes = ["raw: one text is written as it is, several turns with an empty line behind each"]
    else:
        turns = turns_of(name, tokenizer)
        template, stops, notes = go_template(turns), turns.stops, list(turns.notes)
    lines = [
        "# Made by this directory's export; `ollama create NAME -f Modelfile` reads it.",
        "# Versions of Ollama that do not convert safetensors take a GGUF file: make one with llama.cpp's",
        "#   python convert_hf_to_gguf.py DIRECTORY --outfile model.gguf",
        "# and write FROM ./model.gguf here.",
        "FROM .",
        f"TEMPLATE {_quoted(template, '--template')}",
    ]
    if system:
        lines.append(f"SYSTEM {_quoted(system, 'system_prompt')}")
    lines += [f"PARAMETER stop {_quoted(stop, '--template')}" for stop in dict.fromkeys((*stops, tokenizer.eos_token))]
    return "\n".join(lines) + "\n", notes + _notes_on_tokens(tokenizer)


# Several texts are a conversation, of which training writes an empty line behind each turn.
RAW = (
    r"{{ $several := gt (len .Messages) 1 }}{{ range .Messages }}{{ .Content }}"
    r'{{ if $several }}{{ "\n\n" }}{{ end }}{{ end }}'
)


def go_template(turns: Turns) -> str:
    """Turns as a template of Go's text/template over Ollama's .Messages, on one line."""
    text = f"{{{{ if not .System }}}}{_go(turns.opening)}{{{{ end }}}}" if turns.opening else ""
    text += "{{ range .Messages }}"
    around = {"system": turns.system, "user": turns.user, "assistant": turns.assistant}
    branches = [(role, parts) for role, parts in around.items() if parts is not None]
    for number, (role, (before, behind)) in enumerate(branches):
        text += f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}'
        if role == "assistant" and before.endswith(" "):
            # An earlier answer begins with that blank where the model wrote it, and not where a person did.
            text += f'{_go(before[:-1])}{{{{ if not (and .Content (eq (slice .Content 0 1) " ")) }}}}{_go(" ")}{{{{ end }}}}'
        else:
            text += _go(before)
        text += f"{{{{ .Content }}}}{_go(behind)}"
    return f"{text}{{{{ end }}}}{{{{ end }}}}{_go(turns.answer)}"


ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r", '"': r"\"", "\\": r"\\"}


def _go(text: str) -> str:
    """A Go action that writes a text. What cannot be printed is escaped: a Modelfile's reader drops it."""
    return f'{{{{ "{"".join(map(_go_letter, text))}" }}}}' if text else ""


def _go_letter(letter: str) -> str:
    if letter in ESCAPES or letter.isprintable():
        return ESCAPES.get(letter, letter)
    return f"\\U{ord(letter):08x}" if letter > "\uffff" else f"\\u{ord(letter):04x}"


def _quoted(text: str, key: str) -> str:
    """A value of a Modelfile, which has no escapes. Raises UserError naming `key` for a text that it cannot hold."""
    lost = sorted({letter for letter in text if not (letter.isprintable() or letter in "\n\t")})
    if '"""' in text or lost:
        what = "three quotes in a row" if '"""' in text else f"{lost[0]!r}, which its reader drops"
        raise UserError(f"{key}: a Modelfile cannot hold this text: it has {what}. Export without --ollama, or change it.")
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


# ---- tokens -----------------------------------------------------------------------------------------------------------------


def _description(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}, "pre_tokenizer": None}


def needs_tokenizer_model(tokenizer) -> bool:
    """Whether the vocabulary is SentencePiece's, which Ollama reads from tokenizer.model alone."""
    model = _description(tokenizer)["model"]
    return model.get("type") == "Unigram" or bool(model.get("byte_fallback"))


def _notes_on_tokens(tokenizer) -> list[str]:
    """What is known to make Ollama's tokens of a text others than those of training."""
    if needs_tokenizer_model(tokenizer):
        return []
    parts = (_description(tokenizer)["pre_tokenizer"] or {}).get("pretokenizers", [])
    expressions = "".join((part.get("pattern") or {}).get("Regex", "") for part in parts if part["type"] == "Split")
    if hashlib.sha256(expressions.encode()).hexdigest() in KNOWN_CUTS:
        return []
    return [
        "Ollama does not know how this tokenizer cuts texts into words and cuts them as its default does: the text of a prompt "
        "is that of training, some of its tokens may differ"
    ]


def fit_for_ollama(directory: Path, tokenizer) -> None:
    """Write into an exported directory's files what Ollama looks for elsewhere than transformers does.

    Nothing else changes by it.
    """
    config = _read(directory / MODEL_CONFIG)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope and "rope_theta" not in config:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        _write(directory / MODEL_CONFIG, config)
    values = _read(directory / TOKENIZER_CONFIG)
    values["add_bos_token"] = bool(bos_of(tokenizer))
    if not tokenizer.bos_token and "bos_token" not in (tokenizer.chat_template or ""):
        # Of a tokenizer without such a token it asks nothing, and its newer engine then puts token 0 before every prompt.
        values["bos_token"] = tokenizer.eos_token
    _write(directory / TOKENIZER_CONFIG, values)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_model(tokenizer, sources: list[str]) -> bytes | None:
    """The file tokenizer.model of a SentencePiece vocabulary; None for others, which need none.

    sources are directories or hub ids where it may be. Raises UserError where none of them has it.
    """
    from huggingface_hub import hf_hub_download

    if not needs_tokenizer_model(tokenizer):
        return None
    reasons = []
    for source in sources:
        try:
            found = Path(source) / "tokenizer.model" if Path(source).is_dir() else hf_hub_download(source, "tokenizer.model")
            return Path(found).read_bytes()
        except Exception as error:  # a dozen types: of networks, of names, of files
            reasons.append(f"{source}: {first_line(error)}")
    raise UserError(
        "--ollama: this tokenizer is SentencePiece's, and Ollama reads such a one from a file tokenizer.model, which is not to "
        f"be had ({'; '.join(reasons)}). Put the base model's into the checkpoint's directory."
    )
