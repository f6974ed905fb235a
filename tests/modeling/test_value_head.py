"""Reward models: values against transformers' own forward, with shared prefixes and on padded rows; what can become one."""

import json
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.configuration.saved import model_config
from preference_training.core.errors import UserError
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.loading import check_model, load_model, saved_head
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing import proof
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.tokenizer import byte_level_tokenizer, load_tokenizer
from preference_training.modeling.value_head import add_values, has_value_head
from tests.architectures.tiny_models import TINY, make
from tests.support.files import GOLDEN

PROMPTS = [
    TokenizedPrompt([5, 6, 7, 8, 9], [[10, 11, 0], [12, 0]], [(0, 1)]),
    # Tokens of padding (0 for the golden models) in a response and at its end.
    TokenizedPrompt([13], [[14, 15, 0, 0, 18, 19, 20, 0], [0]], [(0, 1)]),
    # The second ends within the first, so that its last token is in the middle of a branch.
    TokenizedPrompt(list(range(30, 60)), [[62, 63, 64, 0], [62, 63], [62, 65, 0]], [(0, 1), (2, 1)]),
]


def configured(name: str, **values):
    """The `model` section for a golden model with a value head."""
    return model_config({"name_or_path": str(GOLDEN / name)}, head="value", **values)


def plain_values(model, prompts) -> list[float]:
    """transformers' own forward, on each row alone: without an id of padding it reads the last token."""
    with mock.patch.object(model.config.get_text_config(), "pad_token_id", None), torch.no_grad():
        rows = [prompt.prompt_ids + response for prompt in prompts for response in prompt.responses]
        return [model(input_ids=torch.tensor([row])).logits.item() for row in rows]


@pytest.fixture(params=["gpt_neox", "llama"])
def model(request, tokenizer):
    torch.manual_seed(0)
    return load_model(configured(request.param), tokenizer).eval()


@torch.no_grad()
def test_values_are_those_of_transformers_own_forward_with_shared_prefixes_and_on_padded_rows(model):
    expected, batch = plain_values(model, PROMPTS), pack_examples(list(iterate_examples(PROMPTS)))
    found = response_scores(model, batch)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-5)
    assert share_prefixes(model, "on")
    assert response_scores(model, batch).tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05, "the rows differ"


def test_gradients_are_those_of_transformers_own_forward(model):
    share_prefixes(model, "on")
    weights = dict(model.named_parameters())
    gradients = {}
    with mock.patch.object(model.config, "pad_token_id", None):
        rows = [prompt.prompt_ids + response for prompt in PROMPTS for response in prompt.responses]
        plain = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
        packed = response_scores(model, pack_examples(list(iterate_examples(PROMPTS))))
        for name, values in (("plain", plain), ("packed", packed)):
            gradients[name] = torch.autograd.grad((values * torch.arange(1.0, 8.0)).sum(), list(weights.values()))
    for name, plain, packed in zip(weights, gradients["plain"], gradients["packed"], strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-6, msg=name)


def test_the_proof_finds_values_that_are_read_at_the_wrong_token(model, monkeypatch):
    usual = proof.pack_examples

    def one_token_early(examples):
        batch = usual(examples)
        return replace(batch, last_tokens=(batch.last_tokens - 1).clamp(min=0))

    monkeypatch.setattr(proof, "pack_examples", one_token_early)
    with pytest.raises(UserError, match=r"ForSequenceClassification cannot: its values would be wrong by .* of the largest"):
        share_prefixes(model, "on")


def test_values_of_a_bfloat16_model_are_computed_by_its_head_in_float32(tokenizer):
    torch.manual_seed(0)
    model = load_model(configured("llama", policy_dtype="bfloat16"), tokenizer)
    batch = pack_examples(list(iterate_examples(PROMPTS)))
    found = response_scores(model, batch)
    # Rounded to eight bits most of them would stay the same.
    assert found.dtype == torch.float32 and not torch.equal(found.bfloat16().float(), found)


# ---- what becomes a reward model --------------------------------------------------------------------------------------------


def test_the_body_is_the_language_models_and_the_head_is_drawn_by_the_seed(tokenizer):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_model(configured("llama"), tokenizer))
    language = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama").state_dict()
    weights = models[0].state_dict()
    assert weights.keys() ^ language.keys() == {"score.weight", "lm_head.weight"}
    assert all(torch.equal(weights[name], language[name]) for name in weights.keys() & language.keys())
    heads = [model.score.weight for model in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2]) and heads[0].shape == (1, 64)


def test_an_archive_is_a_language_model_or_a_reward_model(tmp_path, tokenizer):
    language, name = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_policy"), "model.layers.1.mlp.up_proj.weight"
    models = []
    for archive in (GOLDEN / "llama_policy", tmp_path):
        config = configured("llama", archive=str(archive))
        assert check_model(config, tokenizer) == []
        models.append(load_model(config, tokenizer))
        assert torch.equal(models[-1].state_dict()[name], language.state_dict()[name])
        models[0].save_pretrained(tmp_path)
    assert torch.equal(models[0].score.weight, models[1].score.weight), "the second has the first's head"
    assert saved_head(tmp_path) == "value" and saved_head(GOLDEN / "llama") == "lm"
    of_language = replace(configured("llama", archive=str(tmp_path)), head="lm")
    with pytest.raises(UserError, match=r"score.weight is not part of the model\nThe archive is a reward model"):
        load_model(of_language, tokenizer)


def test_training_goes_on_from_a_reward_model(tmp_path, tokenizer):
    first = load_model(configured("llama"), tokenizer)
    first.save_pretrained(tmp_path)
    again = load_model(model_config({"name_or_path": str(tmp_path)}, head="value"), tokenizer)
    assert has_value_head(again) and torch.equal(first.score.weight, again.score.weight)
    with pytest.raises(
        UserError, match=r"model.name_or_path: .* is a sequence classifier, and this loss trains a language model"
    ):
        check_model(model_config({"name_or_path": str(tmp_path)}), tokenizer)


def test_models_that_cannot_become_reward_models_are_named(tmp_path, tokenizer):
    config = AutoConfig.from_pretrained(GOLDEN / "llama", num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a classifier with 3 labels. Expected a reward model, which has one"):
        check_model(model_config({"name_or_path": str(tmp_path)}, head="value"), tokenizer)

    def refused(**values) -> str:
        with pytest.raises(UserError) as error:
            check_model(model_config({"from_config": values}, head="value"), tokenizer)
        return str(error.value)

    assert "mamba cannot become a reward model: transformers has no sequence classifier for mamba" in refused(
        model_type="mamba"
    )
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    assert "BertForSequenceClassification has no linear layer score behind its body" in refused(model_type="bert", **small)


CLASSIFIERS = [
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neo",
    "gpt_neox", "gptj", "opt", "falcon", "bloom", "stablelm", "mixtral", "olmo2",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name in TINY])
def test_architectures_compute_the_values_of_transformers_own_forward(name, tmp_path):
    make(name, tmp_path)
    torch.manual_seed(0)
    model = load_model(
        model_config({"name_or_path": str(tmp_path)}, head="value"),
        load_tokenizer(model_config({"name_or_path": str(tmp_path)})),
    ).eval()
    expected, batch = plain_values(model, PROMPTS), pack_examples(list(iterate_examples(PROMPTS)))
    share_prefixes(model, "auto")
    with torch.no_grad():
        assert response_scores(model, batch).tolist() == pytest.approx(expected, abs=1e-5 * max(1.0, *map(abs, expected)))


# ---- padding ----------------------------------------------------------------------------------------------------------------


def padding_of(tokenizer, tmp_path) -> str:
    """The padding token of a reward model with this tokenizer."""
    tokenizer.save_pretrained(tmp_path)
    return load_tokenizer(model_config({"name_or_path": str(tmp_path)}, head="value")).pad_token


def test_padding_is_not_the_token_that_ends_responses(tmp_path, capsys):
    own = byte_level_tokenizer()
    assert padding_of(own, tmp_path / "own") == own.pad_token and not capsys.readouterr().out
    own.pad_token = own.eos_token
    # It still has the token that was made for padding.
    assert padding_of(own, tmp_path / "named") == "<|pad|>"
    assert "the reward model pads with '<|pad|>': transformers, which reads a reward" in capsys.readouterr().out
    golden = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    assert golden.pad_token == golden.eos_token
    assert padding_of(golden, tmp_path / "other") not in (None, golden.eos_token)


def test_rows_padded_by_the_tokenizer_have_the_rewards_of_rows_alone(tmp_path):
    tokenizer = load_tokenizer(configured("llama", tokenizer_name_or_path=str(GOLDEN / "tokenizer")))
    model = load_model(configured("llama"), tokenizer).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    rows = [prompt.prompt_ids + response for prompt in PROMPTS for response in prompt.responses if response[-1] == 0]
    whole = [replace(prompt, responses=[r for r in prompt.responses if r[-1] == 0], examples=[]) for prompt in PROMPTS]
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        found = model(**padded).logits[:, 0].tolist()
    assert found == pytest.approx(plain_values(model, whole), abs=1e-5)


def test_a_model_class_is_changed_once_and_keeps_its_name(tokenizer, tmp_path):
    models = [load_model(configured("llama"), tokenizer) for _ in range(2)]
    assert type(models[0]) is type(models[1]) and type(models[0]).__name__ == "LlamaForSequenceClassification"
    models[0].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="LlamaForCausalLM has no linear layer score"):
        add_values(AutoModelForCausalLM.from_pretrained(GOLDEN / "llama"))
