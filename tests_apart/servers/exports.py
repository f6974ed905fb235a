"""Runs of SmolLM2 and of tiny models of other architectures, exported; and what transformers computes of the exports."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests_apart.servers.servers import ROOT

QUESTIONS = (
    "What is the capital of France?", "Name three fruits.", "How do I boil an egg?", "What is 12 + 30?", "Who wrote Hamlet?",
    "Why is the sky blue?", "Wie heißt du? 你好 🙂", "Write a line of Python that prints 1,234.5",
)  # fmt: skip
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a color."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another one?"},
]
CONVERSATIONS = [*([{"role": "user", "content": question}] for question in QUESTIONS), CONVERSATION]
TOKENS = 40
TRAIN = (
    *("template=chat", "loss=dpo", "wandb.enabled=false", "sample_during_eval=false", "batch_size=4", "eval_batch_size=4"),
    *("n_epochs=1", "optimizer=AdamW", "warmup_steps=1", "max_length=128", "max_prompt_length=64", "eval_every=1000"),
)


def rows(file: Path) -> Path:
    """Sixteen pairs that prefer a short answer."""
    pairs = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": "Short: yes."}],
            "rejected": [{"role": "assistant", "content": "There are many things to say about this question."}],
        }
        for question in [*QUESTIONS, *(f"{question} Please." for question in QUESTIONS)]
    ]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


def python(*arguments) -> list[str]:
    """Run a script of the project; returns its lines."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()


def train(data: Path, run: Path, *overrides: str) -> None:
    """Train SmolLM2 for a few steps."""
    entry = f"datasets=[{{path: {data}, held_out_share: 0.25}}]"
    python("train.py", "model=smollm2-135m", entry, *TRAIN, f"local_run_dir={run}", *overrides)


@dataclass(frozen=True)
class Exported:
    """An exported directory, and the lines that the export printed."""

    directory: Path
    lines: list[str]

    @classmethod
    def of(cls, run: Path, directory: Path, *options: str) -> "Exported":
        """Export a run by the script."""
        return cls(directory, python("scripts/export.py", run, "--to", directory, *options))

    def line(self, server: str) -> str:
        """The command that the export printed for a server."""
        return next(line.partition(": ")[2] for line in self.lines if line.startswith(f"for {server}: "))

    @property
    def gguf(self) -> Path:
        """The GGUF file in it."""
        return next(self.directory.glob("*.gguf"))


class Expected:
    """What transformers computes of a model in float32: prompts, greedy tokens, and how near the second choice was."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def of(cls, directory: Path) -> "Expected":
        """Of a directory, perhaps one with an adapter."""
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(directory))

    def prompt(self, conversation: list[dict]) -> list[int]:
        """The token ids of a conversation."""
        return list(self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False))

    def text(self, conversation: list[dict]) -> str:
        """A conversation as text."""
        return self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    @torch.no_grad()
    def greedy(self, prompt: list[int], tokens: int = TOKENS, **options) -> list[int]:
        """The tokens that follow a prompt, the one that ends the response included."""
        output = self.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens, **options)
        return output[0, len(prompt) :].tolist()

    @torch.no_grad()
    def gap(self, prompt: list[int], one: int, other: int) -> float:
        """How far the log-probs of two next tokens are from each other."""
        logps = self.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        return (logps[one] - logps[other]).abs().item()

    def ends(self) -> set[int]:
        """The tokens at which generation stops."""
        found = self.model.generation_config.eos_token_id
        return set(found if isinstance(found, list) else [found])


# ---- tiny models of other architectures -------------------------------------------------------------------------------------

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.18}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FACTORS = {"short_factor": [1.0] * 6, "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **FACTORS}
BIASES = {"attention_bias": True, "mlp_bias": True}
GEMMA = {"head_dim": 256, "sliding_window": 16}
ARCHITECTURES = {
    "llama": SMALL,
    "llama-tied": SMALL | {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": SMALL | BIASES | {"model_type": "llama"},
    "llama3-rope": SMALL | {"model_type": "llama", "rope_parameters": LLAMA_3 | {"original_max_position_embeddings": 64}},
    "mistral": SMALL | {"sliding_window": None, "head_dim": 16},
    "qwen2": SMALL,
    "qwen2-yarn": SMALL | {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": SMALL | {"head_dim": 128},
    "qwen3-linear": SMALL | {"model_type": "qwen3", "head_dim": 128, "rope_parameters": LINEAR},
    "gemma2": SMALL | GEMMA | {"num_hidden_layers": 4},
    "gemma3_text": SMALL | GEMMA | {"num_hidden_layers": 6},
    "phi3": SMALL | {"sliding_window": None},
    "phi3-longrope": SMALL
    | {
        "model_type": "phi3",
        "sliding_window": None,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 64,
        "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
    },
}


def tiny(name: str, tokenizer):
    """A model of an architecture with weights that make predictions depend on everything."""
    values = dict(ARCHITECTURES[name])
    kind = values.pop("model_type", name)
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ids, **values))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.float().eval()
