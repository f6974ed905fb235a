"""Token ids beyond a model's embedding and rows beyond its positions are refused with a message, before a run comes to them."""

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.core.errors import UserError
from preference_training.data.entries import read_entries
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.generation.sampling import Sampler
from preference_training.modeling.limits import Limits, check_limits, check_rows, model_limits, tokens_without_embedding
from preference_training.modeling.sources.configurations import model_configuration
from preference_training.modeling.tokenizer import byte_level_tokenizer, load_tokenizer

BERT_LIKE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT_LIKE = {"n_embd": 16, "n_layer": 1, "n_head": 2}
MODELS = {
    "gpt2": GPT_LIKE | {"n_positions": 24},
    "gpt_bigcode": GPT_LIKE | {"n_positions": 24},
    "gptj": GPT_LIKE | {"n_positions": 24, "rotary_dim": 4},
    "codegen": GPT_LIKE | {"n_head": 4, "n_positions": 24, "n_ctx": 24, "rotary_dim": 4},
    "ctrl": GPT_LIKE | {"n_positions": 24, "dff": 16},
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    | {"max_position_embeddings": 24, "intermediate_size": 16},
    "opt": {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    | {"max_position_embeddings": 24},
    "biogpt": BERT_LIKE | {"max_position_embeddings": 24},
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 24},
    "llama": BERT_LIKE | {"max_position_embeddings": 24},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 24},
    "xglm": {"d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": 24},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
}


def settings(compose, *overrides: str, **model):
    """The tiny configuration, its model replaced where one is given."""
    config = compose(*overrides)
    return config.changed({"model.from_config": model}) if model else config


def computes(model, length: int) -> bool:
    """Whether a model's forward takes so many tokens."""
    try:
        model(torch.arange(length)[None] % 50)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("model_type", MODELS)
def test_the_position_limit_is_where_the_forward_fails(model_type, compose):
    config = settings(compose, "max_length=600", model_type=model_type, **MODELS[model_type])
    tokenizer = load_tokenizer(config.model)
    limits = model_limits(config, tokenizer)
    model = AutoModelForCausalLM.from_config(model_configuration(config.model, tokenizer)).eval()
    if limits.positions is None:
        assert computes(model, 2 * 24)
    else:
        assert limits.positions == 24
        assert computes(model, 24) and not computes(model, 25)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mpt", "codegen"])
def test_a_max_length_beyond_the_position_table_is_refused(model_type, compose):
    wanted = {"model_type": model_type, **MODELS[model_type]}
    config = settings(compose, "max_length=25", "max_prompt_length=8", **wanted)
    tokenizer = load_tokenizer(config.model)
    with pytest.raises(UserError, match="max_length: found 25, expected at most 24: .* Set max_length=24"):
        check_limits(config, read_entries(config), tokenizer, model_limits(config, tokenizer))
    config = config.changed({"max_length": 24})
    check_limits(config, read_entries(config), tokenizer, model_limits(config, tokenizer))


@pytest.mark.parametrize(("model_type", "said"), [("llama", True), ("falcon", True), ("bloom", False)])
def test_rows_beyond_the_declared_positions_are_allowed_with_a_notice_where_positions_are_computed(
    model_type, said, compose, capsys
):
    config = settings(compose, "max_length=25", "max_prompt_length=8", model_type=model_type, **MODELS[model_type])
    tokenizer = load_tokenizer(config.model)
    check_limits(config, read_entries(config), tokenizer, model_limits(config, tokenizer))
    assert ("more than the 24 positions that" in capsys.readouterr().out) is said


def test_a_resumed_run_keeps_its_max_length_and_only_its_rows_are_checked(compose):
    config = settings(compose, "max_length=600", "resume=auto", model_type="gpt2", **MODELS["gpt2"])
    tokenizer = load_tokenizer(config.model)
    limits = model_limits(config, tokenizer)
    check_limits(config, read_entries(config), tokenizer, limits)
    rows = lambda *lengths: PromptTable.of([TokenizedPrompt([1] * 4, [[2] * n for n in lengths], [])])  # noqa: E731
    check_rows(config, tokenizer, limits, [rows(20, 3), rows(1)])
    with pytest.raises(UserError, match="max_length: the data has a row of 25 tokens, expected at most 24"):
        check_rows(config, tokenizer, limits, [rows(20), rows(3, 21, 1)])


# ---- token ids ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def enlarged():
    """A tokenizer with two tokens, at the end, that the tiny model's embedding of `size` rows lacks."""
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer, size


def with_embedding_of(compose, size: int, *overrides: str):
    return compose(*overrides, f"model.from_config.vocab_size={size}")


def test_tokens_that_a_template_writes_and_the_embedding_lacks_are_refused(compose, enlarged):
    tokenizer, size = enlarged
    config = with_embedding_of(compose, size, "template=chatml")
    with pytest.raises(UserError, match=rf"<\|im_start\|> \({size}\), <\|im_end\|> \({size + 1}\), which template=chatml"):
        check_limits(config, read_entries(config), tokenizer, model_limits(config, tokenizer))
    # One of them is as bad as both; an embedding that is larger than the tokenizer is as good as one of its size.
    with pytest.raises(UserError, match="resize_token_embeddings"):
        check_limits(config, read_entries(config), tokenizer, Limits(size + 1, None, None))
    for enough in (size + 2, size + 64):
        check_limits(config, read_entries(config), tokenizer, Limits(enough, None, None))


def test_tokens_of_one_data_sets_own_template_count(compose, enlarged):
    tokenizer, size = enlarged
    config = with_embedding_of(compose, size, "datasets=[toy,{name: toy, template: chatml}]")
    with pytest.raises(UserError, match="template=chatml"):
        check_limits(config, read_entries(config), tokenizer, model_limits(config, tokenizer))


def test_an_end_of_sequence_token_without_an_embedding_is_refused(compose, enlarged):
    tokenizer, size = enlarged
    tokenizer.eos_token = "<|im_end|>"
    with pytest.raises(UserError, match=rf"<\|im_end\|> \({size + 1}\), which the data's template or the end of a response"):
        config = with_embedding_of(compose, size)
        check_limits(config, read_entries(config), tokenizer, Limits(size, None, None))


def test_tokens_that_no_template_writes_are_reported_and_refused_in_rows(compose, enlarged, capsys):
    tokenizer, size = enlarged
    config = with_embedding_of(compose, size)
    limits = model_limits(config, tokenizer)
    check_limits(config, read_entries(config), tokenizer, limits)
    assert f"2 tokens have no row in the model's embedding of {size:,}: <|im_start|> ({size})" in capsys.readouterr().out
    ids = tokenizer("it says <|im_end|> here").input_ids
    assert size + 1 in ids
    rows = [TokenizedPrompt([1, 2], [[3]], [], "toy row 1", 1), TokenizedPrompt([1], [[2], ids], [], "toy row 7", 7)]
    check_rows(config, tokenizer, limits, [PromptTable.of(rows[:1]), PromptTable.of([])])
    with pytest.raises(UserError, match=rf"<\|im_end\|> \({size + 1}\), which prompt 7 has"):
        check_rows(config, tokenizer, limits, [PromptTable.of(rows)])


def test_a_model_from_scratch_has_a_row_for_the_largest_id_of_a_tokenizer_with_gaps(compose):
    tokenizer = byte_level_tokenizer()
    largest = max(tokenizer.get_vocab().values())
    gaps = type("Gaps", (), {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")})
    gaps.__len__, gaps.get_vocab = lambda self: 10, lambda self: tokenizer.get_vocab()
    assert model_configuration(compose().model, gaps()).vocab_size == largest + 1
    assert tokens_without_embedding(tokenizer, largest + 1) == {} and len(tokens_without_embedding(tokenizer, largest)) == 1


def test_padding_without_an_embedding_is_masked_and_not_looked_up():
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    config = AutoConfig.for_model("llama", vocab_size=size, **BERT_LIKE)
    torch.manual_seed(0)
    model, prompts = AutoModelForCausalLM.from_config(config).eval(), [[5, 6, 7], [8]]
    expected = Sampler(tokenizer, 8, seed=0).responses(model, prompts)
    tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
    assert tokenizer.pad_token_id == size
    assert Sampler(tokenizer, 8, seed=0).responses(model, prompts) == expected


def test_a_table_knows_its_longest_row_and_its_largest_id():
    empty = PromptTable.of([])
    assert (empty.longest_row, empty.largest_id) == (0, -1)
    prompts = [
        TokenizedPrompt([9] * 3, [[1], [2] * 5], []),
        TokenizedPrompt([1] * 7, [[70]], []),
        TokenizedPrompt([3], [[4]], []),
    ]
    table = PromptTable.of(prompts).joined(PromptTable.of([TokenizedPrompt([2], [[3]], [])], 4))
    assert table.longest_row == max(len(p.prompt_ids) + len(r) for p in prompts for r in p.responses) == 8
    assert table.largest_id == 70 and isinstance(table.longest_row, int) and numpy.isscalar(table.largest_id)
