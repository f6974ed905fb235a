"""How to serve an exported directory: the exact commands, and what servers do to its weights."""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from preference_training.modeling.adapters.files import CONFIG_FILE, saved_modules
from preference_training.modeling.archives import CHAT_TEMPLATE
from preference_training.reporting.model_card import CardFacts

# Types of GGUF weights that `ollama create` quantizes further.
QUANTIZED_BY_OLLAMA = ("f16", "f32")


@dataclass(frozen=True)
class Served:
    """An exported directory. ollama: its name there; gguf: the name of the GGUF file in it."""

    directory: Path
    dtype: str
    facts: CardFacts
    ollama: str | None = None
    gguf: str | None = None

    def lines(self) -> list[str]:
        """The commands that serve it, one a line."""
        lines = [] if self.facts.head == "value" else [f"for vLLM: {self._vllm()}"]
        if self.gguf:
            lines.append(f"for llama.cpp: {shlex.join(['llama-server', '-m', str(self.directory / self.gguf), '--jinja'])}")
        if self.ollama:
            missing = "" if shutil.which("ollama") else " (not on this machine: https://ollama.com/download)"
            lines.append(f"for Ollama{missing}: {shlex.join(self._ollama())}")
        return lines

    def notes(self) -> list[str]:
        """What servers do to the weights that was not asked for."""
        if self.facts.head == "value":
            return []
        if self.facts.quantized == "int4":
            return [
                "vLLM reads int4 weights as they are; transformers needs compressed-tensors: pip install compressed-tensors"
            ]
        if self.facts.quantized:
            return [f"vLLM needs the package torchao for {self.facts.quantized} weights: pip install torchao"]
        if self.dtype == "float32" and not self.facts.adapter:
            return [
                "vLLM serves float32 weights in bfloat16 unless --dtype float32 is given, and some answers change; to serve "
                "half the size, export with --dtype bfloat16, which says by how much"
            ]
        return []

    def _vllm(self) -> str:
        if self.facts.adapter:
            settings = json.loads((self.directory / CONFIG_FILE).read_text(encoding="utf-8"))
            if settings.get("use_dora"):
                return "it serves no DoRA adapters: export with --merge"
            if saved_modules(settings):
                return "it serves no adapters with modules that are trained whole: export with --merge"
            return shlex.join(self._vllm_adapter(settings))
        # Without it, vLLM casts float32 to bfloat16.
        dtype = ["--dtype", "float32"] if self.dtype == "float32" else []
        return shlex.join(["vllm", "serve", str(self.directory), *dtype])

    def _vllm_adapter(self, settings: dict) -> list[str]:
        """vLLM reads chat template and end tokens from the base model, unless it is told otherwise."""
        ranks = [settings["r"], *(settings.get("rank_pattern") or {}).values()]
        rank = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= max(ranks)), max(ranks))
        name = self.directory.resolve().name
        words = ["vllm", "serve", settings.get("base_model_name_or_path") or "BASE_MODEL", "--enable-lora"]
        words += ["--lora-modules", f"{name}={self.directory}", "--max-lora-rank", str(rank)]
        words += ["--tokenizer", str(self.directory), "--generation-config", str(self.directory)]
        if (self.directory / CHAT_TEMPLATE).is_file():
            words += ["--chat-template", str(self.directory / CHAT_TEMPLATE)]
        return [*words, *(["--dtype", "float32"] if self.dtype == "float32" else [])]

    def _ollama(self) -> list[str]:
        kind = self.gguf and self.gguf.removesuffix(".gguf").rpartition("-")[2]
        quantize = ["--quantize", "q4_K_M"] if kind is None or kind in QUANTIZED_BY_OLLAMA else []
        return ["ollama", "create", self.ollama or "", *quantize, "-f", str(self.directory / "Modelfile")]
