"""What is saved is the model that was saved, and where it is not, that is noticed and said."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from preference_training.checkpointing.model_files import save_configuration, set_end_tokens
from preference_training.checkpointing.saved_models import (
    DifferentModelError,
    checkpoint_check,
    compare,
    compare_parts,
    largest_difference,
    load_plain,
    probe_logps,
    tolerance,
)
from preference_training.checkpointing.snapshot import Snapshot
from preference_training.checkpointing.writer import CheckpointWriter
from preference_training.core.errors import UserError
from preference_training.modeling.loading import cast_weights, save_model
from tests.support.files import GOLDEN


@pytest.fixture
def config(compose):
    """A configuration of the golden Llama."""
    return compose("model=blank_model", f"model.name_or_path={GOLDEN / 'llama'}", "loss=dpo")


def golden_model() -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32)
    model.autocast_dtype = None
    return model


def saved(model, tokenizer, run_dir: Path, config) -> Path:
    """A first checkpoint of a model, looked at as a run does."""
    with CheckpointWriter(run_dir, model, tokenizer, log_message=lambda _: None) as writer:
        writer.check = checkpoint_check(model, config, torch.device("cpu"))
        writer.write(Snapshot.of(4, model.state_dict(keep_vars=True), {}, {"examples": 4}))
    return run_dir / "LATEST"


# ---- a run's first checkpoint -----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_runs_model_is_kept_and_the_random_streams_stay_where_they_are(tmp_path, tokenizer, config):
    model = golden_model()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    checkpoint = saved(model, tokenizer, tmp_path, config)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(probe_logps(load_plain(checkpoint, torch.float32)), probe_logps(model))


def louder(model) -> None:
    model.lm_head.register_forward_hook(lambda module, given, output: 1.01 * output)


def with_more(model) -> None:
    model.model.layers[0].mlp.extra = nn.Linear(2, 2)


def of_another_configuration(model) -> None:
    # Its frequencies were computed from what was there before.
    model.config.rope_parameters["rope_theta"] = 100.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (louder, r"its log-probs differ by [\d.e+-]+ per token, expected at most"),
        (with_more, "plain transformers loads it with unexpected keys: model.layers.0.mlp.extra"),
        (of_another_configuration, "its log-probs differ by"),
    ],
)
def test_a_checkpoint_that_other_libraries_load_as_another_model_stops_the_run(change, told, tmp_path, tokenizer, config):
    model = golden_model()
    change(model)
    with pytest.raises(UserError, match=f"checkpoint: what is saved of LlamaForCausalLM is not the run's model: {told}"):
        saved(model, tokenizer, tmp_path, config)
    assert not list(tmp_path.iterdir()), "and nothing of it is kept"


def test_where_memory_does_not_hold_a_second_model_its_parts_are_compared(tmp_path, tokenizer, config, monkeypatch):
    monkeypatch.setattr("preference_training.checkpointing.saved_models.free_memory", lambda _: 1000)
    monkeypatch.setattr(
        "preference_training.checkpointing.saved_models.load_plain", lambda *_, **__: pytest.fail("a second model was loaded")
    )
    model = golden_model()
    checkpoint = saved(model, tokenizer, tmp_path, config)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(DifferentModelError, match="model.layers.1.mlp.up_proj.weight has other values"):
        compare_parts(checkpoint, model)
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 0.5}))
    with pytest.raises(DifferentModelError, match="its config.json differs in rms_norm_eps"):
        compare_parts(checkpoint, golden_model())
    (checkpoint / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 1}))
    with pytest.raises(DifferentModelError, match=r"its config.json differs in .*num_hidden_layers"):
        compare_parts(checkpoint, golden_model())


def test_float32_allows_a_hundred_thousandth_of_a_log_prob_and_short_dtypes_their_rounding():
    model = golden_model()
    answers = probe_logps(model)
    # Of responses with 19, 19, 1, 7, 2, 3 and 3 scored tokens, seven in all.
    lengths = torch.tensor([19, 19, 1, 7, 2, 3, 3])
    most = (answers.abs() / lengths).max().item()
    assert tolerance(answers, model) == pytest.approx(1e-5 * most) and most > 1
    assert tolerance(answers, model, torch.bfloat16) == 3e-2
    moved = answers + 2e-5 * most * lengths
    assert largest_difference(moved, answers, model) == pytest.approx(2e-5 * most, rel=0.1)
    with pytest.raises(DifferentModelError, match="differ"):
        compare(moved, answers, model, tolerance(answers, model))
    with pytest.raises(DifferentModelError, match="differ by nan"):
        compare(answers * float("nan"), answers, model, 1.0)


# ---- weights in another dtype ----------------------------------------------------------------------------------------------


def test_weights_are_rounded_and_what_is_computed_from_the_configuration_is_not():
    model = golden_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before, "the rotary frequencies"
    cast_weights(model, torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model._keep_in_fp32_modules_strict = {"norm"}
    other = golden_model()
    other._keep_in_fp32_modules_strict = {"norm"}
    cast_weights(other, torch.bfloat16)
    assert other.model.norm.weight.dtype == torch.float32 and other.lm_head.weight.dtype == torch.bfloat16


# ---- where answers end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_config", "in_generation", "more", "expected"),
    [
        (0, 0, [], (0, 0)),
        # The tokenizer's is 0.
        (7, 7, [], (0, [0, 7])),
        (None, None, [], (0, 0)),
        ([7, 0], [7, 0], [], ([7, 0], [7, 0])),
        (0, [3, 0, 4], [], (0, [3, 0, 4])),
        (0, 0, [9], (0, [0, 9])),
    ],
)
def test_a_saved_model_ends_its_answers_with_the_tokens_of_training(in_config, in_generation, more, expected, tokenizer):
    assert tokenizer.eos_token_id == 0
    model = golden_model()
    model.config.eos_token_id, model.generation_config.eos_token_id = in_config, in_generation
    model.generation_config.pad_token_id = None
    padding = model.config.pad_token_id
    set_end_tokens(model.config, model.generation_config, tokenizer, more)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == expected
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.pad_token_id == padding, "there it would keep an embedding from being trained"


def test_sampling_settings_that_greedy_decoding_does_not_read_are_saved_as_they_are(tmp_path, tokenizer):
    model = golden_model()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    model.generation_config.eos_token_id = 7
    save_configuration(model, tmp_path, tokenizer)
    set_end_tokens(model.config, model.generation_config, tokenizer)
    save_model(model, tmp_path / "exported")
    for folder in (tmp_path, tmp_path / "exported"):
        values = json.loads((folder / "generation_config.json").read_text())
        assert (values["temperature"], values["eos_token_id"]) == (0.6, [0, 7])


def test_a_text_configuration_within_another_is_the_one_that_says_where_answers_end(tokenizer):
    class Outer:
        eos_token_id = 5

        def get_text_config(self):
            return inner

    inner = LlamaConfig(eos_token_id=3)
    set_end_tokens(Outer(), None, tokenizer)
    assert inner.eos_token_id == 0
