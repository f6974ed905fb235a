"""Merged directories: what plain transformers loads from them, and what is refused before anything is written."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from preference_training.core.errors import UserError
from preference_training.core.files import run_file
from preference_training.merging import weights
from preference_training.merging.command import merge_as_asked
from preference_training.merging.ingredients import Ingredient
from preference_training.merging.recipe import METHODS
from preference_training.modeling import loading
from tests.support.files import GOLDEN, ROOT

LLAMA = GOLDEN / "llama"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with two fine-tunings of the golden Llama, `one` and `other`, and its base in bfloat16, `base`."""
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("one", "other")):
        model = AutoModelForCausalLM.from_pretrained(LLAMA)
        torch.manual_seed(number)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        saved(model, folder / name)
    saved(AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.bfloat16), folder / "base")
    return folder


def saved(model, directory: Path) -> Path:
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(directory)
    return directory


def merged(monkeypatch, *words: object) -> list[str]:
    """What scripts/merge.py does, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, words)])
    return merge_as_asked(run_file(ROOT / "scripts" / "merge.py", "script").arguments())


def state(directory: Path) -> dict[str, torch.Tensor]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


def test_a_merged_directory_loads_as_it_is_and_holds_the_mean(models, tmp_path, monkeypatch):
    one, other, out = models / "one", models / "other", tmp_path / "out"
    [line] = merged(monkeypatch, one, other, "--weights", 0.25, 0.75, "--to", out)
    assert line == f"{out}: LlamaForCausalLM, 122,432 parameters, float32, linear of 2 models"
    first, second = state(one), state(other)
    for name, weight in state(out).items():
        torch.testing.assert_close(weight, 0.25 * first[name] + 0.75 * second[name], rtol=0, atol=1e-6)
    tokenizer, before = (AutoTokenizer.from_pretrained(path) for path in (out, one))
    assert tokenizer("Hello!").input_ids == before("Hello!").input_ids and tokenizer.chat_template == before.chat_template
    # The tokenizer's, and what the model's own generation configuration names.
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["merge"] and "| `one` | 0.25 |" in card.text and "| `other` | 0.75 |" in card.text
    assert str(models) not in card.text


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_a_base_gives_the_dtype_and_what_models_have_learned_is_added_to_it(method, models, tmp_path, monkeypatch):
    base, one, out = models / "base", models / "one", tmp_path / "out"
    given = [] if method == "task_arithmetic" else ["--density", 1]
    merged(monkeypatch, one, "--method", method, "--base", base, "--to", out, *given)
    first = state(one)
    for name, weight in state(out).items():
        # Rounded once, of what is computed in float32.
        assert weight.dtype == torch.bfloat16 and torch.allclose(weight.float(), first[name], rtol=2**-8, atol=1e-6), name


def test_a_merge_in_several_files_is_that_in_one(models, tmp_path, monkeypatch):
    words = (models / "one", models / "other", "--method", "dare_ties", "--base", models / "base", "--seed", 3)
    merged(monkeypatch, *words, "--to", tmp_path / "whole")
    monkeypatch.setattr(weights, "SHARD_SIZE", 100_000)
    merged(monkeypatch, *words, "--to", tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_files_that_name_the_body_alone_are_merged_with_files_of_the_whole_model(models, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    bare = shutil.copytree(models / "other", tmp_path / "bare")
    named = load_file(bare / "model.safetensors")
    tables = {"rotary_emb.inv_freq": torch.ones(4)}
    save_file({name.removeprefix("model."): each for name, each in named.items()} | tables, bare / "model.safetensors")
    for name, other in (("of_bare", bare), ("of_whole", models / "other")):
        merged(monkeypatch, models / "one", other, "--to", tmp_path / name)
    expected = state(tmp_path / "of_whole")
    assert all(torch.equal(weight, expected[name]) for name, weight in state(tmp_path / "of_bare").items())


def test_experts_that_are_stored_one_by_one_are_merged_as_the_stacked_ones_that_are_loaded(tmp_path, monkeypatch):
    sizes = {"vocab_size": len(AutoTokenizer.from_pretrained(LLAMA)), "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        saved(AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **layers)), tmp_path / name)
    merged(monkeypatch, tmp_path / "one", tmp_path / "other", "--to", tmp_path / "out")
    first, second, found = (state(tmp_path / name) for name in ("one", "other", "out"))
    assert any("experts" in name and weight.dim() == 3 for name, weight in found.items())
    for name, weight in found.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2, rtol=0, atol=1e-6)


def test_an_adapter_is_merged_into_its_base_first(models, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(models / "one"), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    merged(monkeypatch, tmp_path / "adapter", models / "other", "--method", "slerp", "--t", 0, "--to", tmp_path / "out")
    expected = adapted.merge_and_unload().state_dict()
    for name, weight in state(tmp_path / "out").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    assert not list(tmp_path.glob(".merging_*")), "what was written on the way is gone"


@pytest.fixture
def tied(tmp_path) -> Path:
    """A directory with a model whose head is its embedding."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(LLAMA, tie_word_embeddings=True)
    return saved(AutoModelForCausalLM.from_config(config), tmp_path / "tied")


def adapter_with_a_head(base: Path, directory: Path, seed: int):
    """An adapter of a tied model that has trained the head alone."""
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), wanted)
    torch.manual_seed(seed)
    with torch.no_grad():
        head = adapted.base_model.model.lm_head.modules_to_save["default"].weight
        head.add_(torch.randn_like(head))
    adapted.save_pretrained(directory)
    return head


def test_a_head_that_adapters_have_trained_apart_from_the_embedding_is_merged(tied, tmp_path, monkeypatch):
    heads = [adapter_with_a_head(tied, tmp_path / name, seed) for seed, name in enumerate(("one", "other"))]
    out, embedding = tmp_path / "out", state(tied)["model.embed_tokens.weight"]
    merged(monkeypatch, tmp_path / "one", tmp_path / "other", "--to", out)
    found = state(out)
    torch.testing.assert_close(found["lm_head.weight"], (heads[0] + heads[1]) / 2, rtol=0, atol=1e-6)
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    # The base model's head is its embedding.
    words = ("--method", "task_arithmetic", "--base", tied, "--weights", 0.5, "--to", tmp_path / "half")
    lines = merged(monkeypatch, tmp_path / "one", *words)
    torch.testing.assert_close(state(tmp_path / "half")["lm_head.weight"], (heads[0] + embedding) / 2, rtol=0, atol=1e-6)
    one = tmp_path / "one"
    assert f"note: head and embedding are one in some of the models, not in {one}; the merged model has both" in lines
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_a_file_has_beside_the_embedding_is_merged_whatever_the_configuration_says(tied, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tied, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    head = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights | {"lm_head.weight": head}, other / "model.safetensors", {"format": "pt"})
    merged(monkeypatch, tied, other, "--to", tmp_path / "out")
    expected = (weights["model.embed_tokens.weight"] + head) / 2
    torch.testing.assert_close(state(tmp_path / "out")["lm_head.weight"], expected, rtol=0, atol=1e-6)
    merged(monkeypatch, tied, tied, "--to", tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text())["tie_word_embeddings"] is True


# ---- mistakes ---------------------------------------------------------------------------------------------------------------


def refused(monkeypatch, out: Path, *words: object) -> str:
    with pytest.raises(UserError) as error:
        merged(monkeypatch, *words, "--to", out)
    assert not out.exists() and not list(out.parent.glob(".merging_*"))
    return str(error.value)


def test_models_that_are_not_alike_are_refused(models, tmp_path, monkeypatch):
    one, out = models / "one", tmp_path / "out"
    text = refused(monkeypatch, out, one, GOLDEN / "gpt_neox")
    assert "model_type is gpt_neox, and that of" in text and "fine-tunings of one base model" in text
    larger = AutoModelForCausalLM.from_pretrained(one)
    larger.resize_token_embeddings(larger.config.vocab_size + 8)
    text = refused(monkeypatch, out, one, saved(larger, tmp_path / "larger"))
    assert "the vocabularies have different sizes. Resize the embedding" in text and "weight is [386, 64], and" in text
    config = AutoConfig.from_pretrained(one, num_hidden_layers=1)
    text = refused(monkeypatch, out, one, saved(AutoModelForCausalLM.from_config(config), tmp_path / "shallow"))
    assert "shallow: it has no model.layers.1." in text
    config = AutoConfig.from_pretrained(one, intermediate_size=8)
    text = refused(monkeypatch, out, one, saved(AutoModelForCausalLM.from_config(config), tmp_path / "narrow"))
    assert "the models have different sizes. Only fine-tunings of one base model" in text
    renamed = shutil.copytree(one, tmp_path / "renamed")
    written = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (renamed / "tokenizer.json").write_text(json.dumps(written))
    assert "its vocabulary is another: token " in refused(monkeypatch, out, one, renamed)


def test_a_model_that_is_not_there_or_cannot_be_averaged_is_refused(models, tmp_path, monkeypatch):
    one, out = models / "one", tmp_path / "out"
    assert "no such directory. Expected a run directory, " in refused(monkeypatch, out, one, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "empty: no model in it" in refused(monkeypatch, out, one, tmp_path / "empty")
    pickled = shutil.copytree(one, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "It has pytorch_model.bin, which is not read" in refused(monkeypatch, out, one, pickled)
    quantized = shutil.copytree(one, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert "its weights are quantized (gptq), and cannot be averaged" in refused(monkeypatch, out, one, quantized)
    broken = AutoModelForCausalLM.from_pretrained(one)
    broken.model.norm.weight.data[0] = torch.nan
    text = refused(monkeypatch, out, one, saved(broken, tmp_path / "broken"))
    assert "model.norm.weight is not finite" in text


def test_an_adapter_of_another_size_is_refused_before_it_is_merged(models, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    larger = AutoModelForCausalLM.from_pretrained(models / "one")
    larger.resize_token_embeddings(larger.config.vocab_size + 8)
    saved(larger, tmp_path / "larger")
    get_peft_model(larger, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "larger")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Ingredient, "_merge_adapter", None)
    text = refused(monkeypatch, tmp_path / "out", models / "one", tmp_path / "adapter")
    assert "vocab_size is 386, and that of" in text and "the vocabularies have different sizes. Resize the embedding" in text


def test_a_disk_that_fills_while_an_adapter_is_merged_is_one_message(models, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(models / "one")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loading, "save_model", full)
    text = refused(monkeypatch, tmp_path / "out", tmp_path / "adapter", models / "one")
    assert text.startswith(f"--to: cannot write {tmp_path / 'out'}: No space left on device")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_folder_that_is_not_writable_is_refused_before_models_are_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(Ingredient, "read", None)
    text = refused(monkeypatch, tmp_path / "out", models / "one", models / "other")
    assert text.startswith(f"--to: cannot write {tmp_path / 'out'}: ") and "Expected a writable folder" in text


def test_the_script_names_the_methods_that_there_are():
    assert tuple(METHODS) == run_file(ROOT / "scripts" / "merge.py", "script").METHODS


def test_options_of_the_other_kind_of_merge_are_refused(models, tmp_path, monkeypatch):
    one, out = models / "one", tmp_path / "out"
    assert "--top: chooses among the runs of a sweep" in refused(monkeypatch, out, one, one, "--top", 2)
    assert "--soup: found --method beside it" in refused(monkeypatch, out, "--soup", tmp_path, "--method", "ties")
    assert "lr=1: overrides the configuration of the run of --held-out" in refused(monkeypatch, out, one, one, "lr=1")
    assert "merge: no model to merge" in refused(monkeypatch, out)
    assert "no complete runs" not in refused(monkeypatch, out, "--soup", tmp_path / "none")
    assert "has 0 complete runs, expected at least 2" in refused(monkeypatch, out, "--soup", models)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        merged(monkeypatch, one, one, "--to", tmp_path / "full")
