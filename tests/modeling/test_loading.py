"""Tokenizers, models from every source, archives of every kind, and the identity of policy and reference."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from preference_training.checkpointing.snapshot import Snapshot
from preference_training.checkpointing.writer import CheckpointWriter
from preference_training.core.errors import UserError
from preference_training.modeling.archives import read_archive
from preference_training.modeling.kernels import choose_attention, compile_between_attentions
from preference_training.modeling.loading import check_model, load_model
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.proof import logps_and_gradients, random_tries
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.state import reference_copy
from preference_training.modeling.token_budget import token_budget
from preference_training.modeling.tokenizer import byte_level_tokenizer, load_tokenizer
from tests.architectures.tiny_models import build
from tests.support.files import GOLDEN

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}

BYTES = "model.tokenizer_name_or_path=byte_level"


@pytest.fixture
def tiny(compose):
    """The embedded model's configuration, two layers deep."""
    return lambda *overrides: compose("model.from_config.num_hidden_layers=2", *overrides).model


def same_weights(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def policy_and_reference(config):
    """What a run of that configuration starts with."""
    policy = load_model(config, byte_level_tokenizer())
    return policy, reference_copy(policy, config)


def test_the_byte_level_tokenizer_gives_back_any_text(tmp_path):
    tokenizer = byte_level_tokenizer()
    text = " Grüße,\n\n\tこんにちは 👋 \x00"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ids


def test_policy_and_reference_start_with_the_same_weights_and_the_reference_stays_frozen(tiny):
    policy, reference = policy_and_reference(tiny())
    assert same_weights(policy, reference)
    assert policy.training and not reference.training
    assert all(weight.requires_grad for weight in policy.parameters())
    assert not any(weight.requires_grad for weight in reference.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_has_the_policys_dtype_unless_told_otherwise(tiny, dtype):
    policy, reference = policy_and_reference(tiny(f"model.policy_dtype={dtype}"))
    assert policy.dtype == reference.dtype == getattr(torch, dtype)
    _, other = policy_and_reference(tiny("model.reference_dtype=bfloat16"))
    assert other.dtype == torch.bfloat16


def test_dropout_is_off_wherever_an_architecture_keeps_it(compose):
    dropout = "attn_pdrop: 0.5, resid_pdrop: 0.5, embd_pdrop: 0.5"
    config = compose(
        "model=blank_model",
        f"++model.from_config={{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, {dropout}}}",
        "model.tokenizer_name_or_path=byte_level",
    ).model
    model = load_model(config, byte_level_tokenizer()).train()
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.attn_pdrop == 0.5, "what is written with the checkpoint is the architecture's own"


@pytest.mark.parametrize("model_type", ["phimoe", "mixtral"])
def test_experts_that_add_noise_in_training_compute_as_in_evaluation(model_type, compose):
    sizes = "hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2"
    noise = "num_local_experts: 4, router_jitter_noise: 0.3, input_jitter_noise: 0.3"
    config = compose("model=blank_model", f"++model.from_config={{model_type: {model_type}, {sizes}, {noise}}}", BYTES).model
    model = load_model(config, byte_level_tokenizer())
    ids = torch.arange(20)[None]
    in_training = model.train()(ids).logits
    assert torch.equal(in_training, model.train()(ids).logits)
    assert torch.equal(in_training, model.eval()(ids).logits)


def test_a_model_with_a_learned_mask_gives_the_same_log_probs_with_and_without_gradients(compose):
    sizes = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2"
    config = compose("model=blank_model", f"++model.from_config={{model_type: doge, {sizes}}}", BYTES).model
    model = load_model(config, byte_level_tokenizer())
    for name, weight in model.named_parameters():
        if weight.dim() > 1 or name.endswith(".A"):
            nn.init.normal_(weight, std=0.2)
    batch = random_tries(model.config.vocab_size)
    with torch.no_grad():
        expected = response_scores(model, batch)
    assert torch.equal(response_scores(model, batch), expected)


def test_the_token_budget_of_a_model_with_layers_of_different_widths_is_that_of_the_widest():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, intermediate_size=64))
    expected = token_budget(model, free=2**30)
    vars(model.config)["intermediate_size"] = [16, 64]
    assert token_budget(model, free=2**30) == expected


def test_a_model_directory_is_loaded_as_it_is(compose):
    config = compose("model=blank_model", f"model.name_or_path={GOLDEN / 'llama'}").model
    model = load_model(config, load_tokenizer(config))
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32))


def test_weights_that_do_not_fit_the_sizes_of_the_preset_are_refused_with_the_preset_that_sets_none(compose):
    config = compose("model=tiny", f"model.name_or_path={GOLDEN / 'llama'}").model
    with pytest.raises(UserError, match=r"than model\.from_config sets\. Set model=blank_model, which sets none"):
        load_model(config, load_tokenizer(config))


def test_a_model_that_is_not_there_is_a_user_error(compose, tmp_path):
    config = compose("model=blank_model", f"model.name_or_path={tmp_path}").model
    with pytest.raises(UserError, match="could not be loaded"):
        load_tokenizer(config)
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(config, byte_level_tokenizer())


def test_an_unknown_model_type_is_a_user_error(tiny):
    with pytest.raises(UserError, match="lama.*not known"):
        load_model(tiny("model.from_config.model_type=lama"), byte_level_tokenizer())


# ---- archives -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A model with weights of its own, and its checkpoint directory with policy.pt."""
    torch.manual_seed(7)
    model = load_model(tiny(), byte_level_tokenizer())
    (tmp_path / "run").mkdir()
    with CheckpointWriter(tmp_path / "run", model, byte_level_tokenizer()) as writer:
        writer.write(Snapshot.of(64, model.state_dict(keep_vars=True), {}, {}), with_policy_pt=True)
    return model, tmp_path / "run" / "LATEST"


@pytest.mark.parametrize("file", ["", "policy.pt"])
def test_an_archive_of_either_kind_gives_policy_and_reference_its_weights(checkpoint, tiny, file):
    model, latest = checkpoint
    config = tiny(f"model.archive={latest / file}")
    check_model(config, byte_level_tokenizer())
    policy, reference = policy_and_reference(config)
    assert same_weights(policy, model) and same_weights(reference, model)


def test_a_sharded_checkpoint_directory_is_read_whole(checkpoint, tiny, tmp_path):
    model, _ = checkpoint
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert same_weights(load_model(tiny(f"model.archive={tmp_path / 'sharded'}"), byte_level_tokenizer()), model)


def test_buffers_of_old_checkpoints_are_ignored(compose, tmp_path):
    (tmp_path / "policy.pt").touch()
    config = compose(
        "model=blank_model", f"model.name_or_path={GOLDEN / 'gpt_neox'}", f"model.archive={tmp_path / 'policy.pt'}"
    ).model
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "gpt_neox_policy", dtype=torch.float32)
    layer = "gpt_neox.layers.0.attention"
    old = {
        f"{layer}.bias": torch.ones(1, 1, 8, 8),
        f"{layer}.masked_bias": torch.tensor(-1e9),
        f"{layer}.rotary_emb.inv_freq": torch.ones(2),
    }
    torch.save({"step_idx": 8, "state": model.state_dict() | old, "metrics": {}}, tmp_path / "policy.pt")
    assert same_weights(load_model(config, load_tokenizer(config)), model)


def test_an_archive_of_another_architecture_is_refused_with_the_tensors_that_differ(checkpoint, tiny):
    config = tiny(f"model.archive={checkpoint[1]}", "model.from_config.hidden_size=64")
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[\d+, 128\], expected \[\d+, 64\]"):
        check_model(config, byte_level_tokenizer())
    with pytest.raises(UserError, match="layers.2.* is missing"):
        check_model(tiny(f"model.archive={checkpoint[1]}", "model.from_config.num_hidden_layers=3"), byte_level_tokenizer())
    with pytest.raises(UserError, match="layers.1.* is not part of the model"):
        check_model(tiny(f"model.archive={checkpoint[1]}", "model.from_config.num_hidden_layers=1"), byte_level_tokenizer())


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_a_damaged_checkpoint_directory_is_refused(checkpoint, file):
    directory = checkpoint[1].resolve()
    (directory / file).write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        read_archive(directory)


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_of_an_archive_is_executed(tmp_path):
    torch.save({"state": Hostile(tmp_path / "executed")}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        read_archive(tmp_path / "policy.pt")
    assert not (tmp_path / "executed").exists()


def test_an_index_cannot_lead_out_of_its_directory(tmp_path):
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    directory = tmp_path / "archive"
    directory.mkdir()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="secret.safetensors"):
        read_archive(directory)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "no state"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "policy.pt"
    path.write_bytes(content) if content is not None else torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="Expected a checkpoint directory"):
        read_archive(path)


# ---- kernels ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_model_uses_the_configured_attention(tiny, name):
    assert load_model(tiny(f"model.attn_implementation={name}"), byte_level_tokenizer()).config._attn_implementation == name


def test_the_best_attention_is_the_models_own_where_no_other_is_installed(tiny):
    assert load_model(tiny(), byte_level_tokenizer()).config._attn_implementation == "sdpa"


def test_a_soft_cap_of_attention_is_not_left_out():
    capped = build("gemma2")
    # Which has no soft-cap, and is Gemma 2's default in transformers 5.17.
    capped.config._attn_implementation = "sdpa"
    choose_attention(capped, "auto")
    assert capped.config._attn_implementation == "eager"


def test_an_unavailable_attention_implementation_is_refused(tiny):
    with pytest.raises(UserError, match="model.attn_implementation: LlamaForCausalLM cannot use flash_attention_3 here"):
        load_model(tiny("model.attn_implementation=flash_attention_3"), byte_level_tokenizer())


def test_liger_kernels_are_refused_without_a_gpu(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="model.liger_kernels: found true, but there is no GPU here"):
        load_model(tiny("model.liger_kernels=true"), byte_level_tokenizer())


@pytest.mark.long
def test_compilation_leaves_log_probs_as_they_were(tiny):
    model = load_model(tiny("model.from_config.num_hidden_layers=1"), byte_level_tokenizer())
    share_prefixes(model, "on")
    batch = random_tries(512)
    weights = [model.model.layers[0].mlp.up_proj.weight]
    logps, gradients = logps_and_gradients(response_scores, model, batch, weights)
    compile_between_attentions(model)
    again, compiled = logps_and_gradients(response_scores, model, batch, weights)
    assert model.model.layers[0].mlp._compiled_call_impl is not None
    assert model.model.layers[0].self_attn._compiled_call_impl is None
    torch.testing.assert_close(again, logps, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(compiled, gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("mixtral", "aot_eager"), ("qwen3_moe", "aot_eager"), pytest.param("mixtral", "inductor", marks=pytest.mark.long)],
)
def test_experts_that_are_compiled_are_trained_as_they_would_be(name, backend):
    """aot_eager generates no code. A second length has the graphs made for any."""
    steps = []
    for is_compiled in (False, True):
        model = build(name).train()
        if is_compiled:
            compile_between_attentions(model, backend)
        optimizer, losses = torch.optim.SGD(model.parameters(), 1e-3), []
        for length in (24, 37, 24):
            ids = torch.arange(length)[None] * 7 % 250
            losses.append(model(ids, labels=ids).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.append((torch.stack(losses).detach(), *(weight.detach() for weight in model.parameters())))
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_directory_that_is_not_there_is_named_by_the_key_that_names_it(compose):
    config = compose("model=blank_model", "model.name_or_path=/nowhere/llama").model
    with pytest.raises(UserError, match=r"^model\.name_or_path: /nowhere/llama: no such directory\."):
        load_tokenizer(config)
    config = compose("model=blank_model", "model.name_or_path=a/b", "model.tokenizer_name_or_path=./nowhere").model
    with pytest.raises(UserError, match=r"^model\.tokenizer_name_or_path: \./nowhere: no such directory\."):
        load_tokenizer(config)
