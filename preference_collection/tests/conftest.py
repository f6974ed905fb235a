"""Shared fixtures of the app's tests: a store with content, and a stand-in for Ollama."""

import signal
import threading
from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings

from preference_collection.store.model import Answer, Comparison, Judgment, Task, new_id, ranks_of_pick
from preference_collection.store.store import open_store

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a shell pytest ignores Ctrl-C, and so would the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def store(tmp_path):
    """A new store in its own file."""
    opened = open_store(str(tmp_path / "collection.duckdb"))
    yield opened
    opened.close()


def all_at_once(label: Callable[[str], None], labelers: int) -> None:
    """Have so many labelers label, each in a thread; fails where one of them does."""
    failures = []

    def watched(name: str) -> None:
        try:
            label(name)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=watched, args=(f"labeler {number}",)) for number in range(labelers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def a_task(id: str = "sum", **changed) -> Task:
    """A programming problem with one test."""
    values = {
        "id": id, "title": f"The {id}", "difficulty": "easy", "prompt": f"Add two numbers ({id}).", "function_name": "add",
        "tests": ({"args": [1, 2], "expected": 3},), "kind": "code",
    }  # fmt: skip
    return Task(**{**values, **changed})


def a_comparison(task: str = "sum", texts: Sequence[str] = ("one", "two"), id: str | None = None, **changed) -> Comparison:
    """A comparison of answers with these texts."""
    values = {"model": "tiny", "prompt": f"Add two numbers ({task}).", "parameters": {"seed": 7}} | changed
    answers = tuple(Answer(id=new_id(), text=text, code=text, **values) for text in texts)
    return Comparison(id or new_id(), task, answers)


def a_judgment(comparison: Comparison, said: int | tuple[int, ...] | str = 0, labeler: str = "ada", **more) -> Judgment:
    """A judgment: the index of the best answer, the ranks of all, or a choice without ranks."""
    n = len(comparison.answers)
    ranks = ranks_of_pick(said, n) if isinstance(said, int) else said if isinstance(said, tuple) else ()
    choice = "ranked" if ranks else said
    values = {"id": new_id(), "order": tuple(range(n))} | more
    return Judgment(comparison=comparison.id, labeler=labeler, choice=choice, ranks=ranks, **values)


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
