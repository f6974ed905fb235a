"""Shared fixtures of the app's tests: a store with content, and a stand-in for Ollama."""

import sys

import pytest
from hypothesis import settings

from preference_collection.store.store import Generation, Pair, Problem, new_id, open_store

# Isolation needs Linux; elsewhere its tests are not collected. `Isolation` says so on the page too.
collect_ignore = [] if sys.platform == "linux" else ["test_sandbox.py"]

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("here", deadline=None)
settings.load_profile("here")


@pytest.fixture
def store(tmp_path):
    """A new store in its own file."""
    opened = open_store(str(tmp_path / "collection.duckdb"))
    yield opened
    opened.close()


def a_problem(id: str = "sum", **changed) -> Problem:
    """A problem with one test."""
    values = {
        "id": id, "title": f"The {id}", "difficulty": "easy", "description": f"Add two numbers ({id}).", "function_name": "add",
        "tests": ({"args": [1, 2], "expected": 3},),
    }  # fmt: skip
    return Problem(**{**values, **changed})


def a_pair(problem: str = "sum", texts: tuple[str, str] = ("one", "two"), model: str = "tiny", id: str | None = None) -> Pair:
    """A pair of solutions with these texts."""
    first, second = (Generation(new_id(), model, f"Add two numbers ({problem}).", {"seed": 7}, text, text) for text in texts)
    return Pair(id or new_id(), problem, first, second)


def tiny_checkpoint(directory):
    """A run's directory: weights, configuration and the byte-level tokenizer of the embedded model."""
    from omegaconf import OmegaConf
    from transformers import LlamaConfig, LlamaForCausalLM

    from preference_training.modeling.tokenizer import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    OmegaConf.save({"template": None, "system_prompt": None}, directory.parent / "config.yaml")
    return directory
