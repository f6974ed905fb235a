"""Trained checkpoints generate solutions and score pairs."""

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from preference_collection.__main__ import main
from preference_collection.generation.asking import Request
from preference_collection.generation.checkpoint_source import CheckpointSource, checkpoint_at, load_checkpoint, margins
from preference_collection.generation.sources import model_named
from preference_collection.generation.writing import Writing
from preference_collection.settings import load_settings
from preference_collection.store.model import Query
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_task, tiny_checkpoint
from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("runs") / "run" / "LATEST")


def written(model: Path, seed: int = 1, temperature: float = 1.0) -> Writing:
    request = Request(str(model), "Add two numbers.", temperature, seed, max_tokens=12)
    return Writing(CheckpointSource(()), request).start().wait(60)


def test_the_newest_checkpoints_are_offered_first_and_incomplete_ones_never(tmp_path):
    for age, name in enumerate(("old", "collect/dpo", "half", "new")):
        latest = tmp_path / name / "LATEST"
        latest.mkdir(parents=True)
        if name != "half":
            (latest / "config.json").touch()
        os.utime(latest, (age, age))
    found = CheckpointSource((tmp_path, tmp_path / "absent")).models()
    assert found == [str(tmp_path / name / "LATEST") for name in ("new", "collect/dpo", "old")]


def test_a_run_or_a_checkpoint_is_named_by_its_path(checkpoint, tmp_path):
    for path in (checkpoint, checkpoint.parent):
        found = model_named(str(path), load_settings())
        assert (found.model, found.name) == (str(checkpoint), str(path))
    with pytest.raises(
        UserError, match=r"no checkpoint. Expected a directory with config.json or adapter_config.json, or a run"
    ):
        checkpoint_at(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(UserError, match="an adapter that does not name its base model"):
        checkpoint_at(tmp_path)


def test_a_reply_says_whether_it_was_cut(checkpoint):
    assert written(checkpoint).finish in ("length", "stop")
    lengths = {written(checkpoint, seed).finish for seed in range(3)}
    assert "length" in lengths, "twelve random tokens of 250 rarely have an end"


def test_a_conversation_is_formatted_as_in_training(checkpoint):
    loaded = load_checkpoint(str(checkpoint))
    turns = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "Add."))
    text = loaded.tokenizer.decode(loaded.prompt_ids(turns), skip_special_tokens=True)
    assert text == "Be brief.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Add.\n\nAssistant:"


def test_a_checkpoint_is_deterministic_per_seed_and_keeps_the_global_random_state(checkpoint):
    before = torch.get_rng_state()
    one, same, other = (written(checkpoint, seed) for seed in (1, 1, 2))
    assert one.state == "done" and one.text == same.text != other.text
    assert torch.equal(before, torch.get_rng_state())
    assert written(checkpoint, 1, 0.0).text == written(checkpoint, 2, 0.0).text


def test_a_checkpoint_formats_its_prompt_as_in_training(checkpoint):
    loaded = load_checkpoint(str(checkpoint))
    ids = loaded.prompt_ids("Add.")
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "\n\nHuman: Add.\n\nAssistant:"
    assert ids.count(loaded.tokenizer.eos_token_id) == 0 or loaded.tokenizer.bos_token_id == loaded.tokenizer.eos_token_id
    assert loaded.response_ids("Add.", "x")[-1] == loaded.tokenizer.eos_token_id
    (checkpoint.parent / "config.yaml").write_text("template: chatml\nsystem_prompt: Be brief.\n")
    load_checkpoint.cache_clear()
    text = load_checkpoint(str(checkpoint)).tokenizer.decode(load_checkpoint(str(checkpoint)).prompt_ids("Add."))
    (checkpoint.parent / "config.yaml").unlink()
    load_checkpoint.cache_clear()
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>" in text


def test_an_adapter_is_offered_and_generates_with_its_base_model(checkpoint, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = tmp_path / "runs" / "lora" / "LATEST"
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), settings)
    model.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(adapter)
    assert CheckpointSource((tmp_path / "runs",)).models() == [str(adapter)]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(str(adapter)).model(ids).logits, model.eval()(ids).logits)
    assert written(adapter).state == "done"
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert CheckpointSource((tmp_path / "runs",)).models() == [], "its model was made from scratch, and is nowhere"
    load_checkpoint.cache_clear()
    monkeypatch.setattr("preference_collection.generation.checkpoint_source.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is an adapter. Install: pip install -r requirements/lora.txt"):
        load_checkpoint(str(adapter))


def test_an_invalid_checkpoint_gives_one_message(tmp_path):
    (tmp_path / "LATEST").mkdir()
    writing = written(tmp_path / "LATEST")
    assert writing.state == "failed" and writing.message.startswith(f"checkpoints: {tmp_path / 'LATEST'} cannot be loaded")
    with pytest.raises(UserError):
        next(margins(str(tmp_path / "LATEST"), []))


def test_pairs_are_scored_by_their_log_probs(checkpoint, tmp_path, capsys):
    """The log-probs agree with transformers' own loss, which is a mean over the response."""
    address = str(tmp_path / "collection.duckdb")
    comparison = a_comparison()
    with closing(open_store(address)) as store:
        store.add_tasks([a_task()])
        store.add_comparisons([comparison])
    main(["score", str(checkpoint), f"store={address}"])
    assert "1 comparison scored" in capsys.readouterr().out
    with closing(open_store(address)) as store:
        [row] = store.browse(Query(order="uncertain"))[0]
    loaded = load_checkpoint(str(checkpoint))
    logps = []
    for text in ("one", "two"):
        prompt = loaded.tokenizer(f"\n\nHuman: {comparison.answers[0].prompt}\n\nAssistant:").input_ids
        response = [*loaded.tokenizer(f" {text}", add_special_tokens=False).input_ids, loaded.tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = loaded.model(input_ids=torch.tensor([prompt + response]), labels=labels).loss.item()
        logps.append(-loss * len(response))
    assert row.margin == pytest.approx(logps[0] - logps[1], abs=1e-4)
