"""What an export is to produce, and the checks that need neither weights nor a network."""

import re
from dataclasses import dataclass
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.core.files import check_destination
from preference_training.export.gguf_model import check_type
from preference_training.export.quantization import check_quantization

OLLAMA_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)*(:[\w.-]+)?")


@dataclass(frozen=True)
class ExportOptions:
    """The options of the command line. `to` is the directory to create."""

    to: Path
    dtype: str | None = None
    merge: bool = False
    quantize: str | None = None
    gguf: str | None = None
    ollama: str | None = None
    template: str | None = None
    push: str | None = None
    private: bool = False
    trust_remote_code: bool = False


def check_options(options: ExportOptions, is_adapter: bool, head: str = "lm") -> None:
    """Raise UserError for options that contradict each other, or that this checkpoint or this machine cannot satisfy."""
    if options.merge and not is_adapter:
        raise UserError("--merge: this checkpoint holds full weights, not an adapter. Drop --merge.")
    for_texts = (("--quantize", options.quantize), ("--gguf", options.gguf), ("--ollama", options.ollama))
    for key, value in (("--dtype", options.dtype), *for_texts):
        if value and is_adapter and not options.merge:
            raise UserError(f"{key}: this checkpoint holds an adapter. Add --merge to merge it into its base model.")
    for key, value in for_texts:
        if value and head == "value":
            raise UserError(
                f"{key}: this checkpoint holds a reward model, and {key} is for models that write text. Drop {key}."
            )
    if options.quantize and options.ollama:
        raise UserError("--quantize: Ollama quantizes the full weights itself. Use either --quantize or --ollama.")
    if options.quantize and options.gguf:
        raise UserError("--quantize: a GGUF file has quantized weights of its own. Use --gguf q8_0 instead of --quantize.")
    if options.private and not options.push:
        raise UserError("--private: applies to an upload only. Add --push ORGANIZATION/NAME.")
    if options.ollama and not OLLAMA_NAME.fullmatch(options.ollama):
        raise UserError(f"--ollama: found {options.ollama!r}, expected a name such as my-model or NAMESPACE/MODEL:TAG.")
    if options.quantize:
        check_quantization(options.quantize)
    if options.gguf:
        check_type(options.gguf)
    check_destination(options.to)
