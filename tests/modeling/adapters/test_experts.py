"""Adapters on the stacked experts of mixture-of-experts models: what starts, what plain peft loads, what a merge gives."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from preference_training.core.errors import UserError
from preference_training.modeling.adapters.weights import reference_mode
from preference_training.modeling.loading import check_model, load_model
from tests.modeling import test_adapters
from tests.modeling.test_adapters import answers, checkpoint_of, configured, load_merged, small, with_trained_adapter

__all__ = ["configured", "small"]

EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
FAMILIES = {
    "qwen3_moe": test_adapters.SIZES | EXPERTS | {"num_experts": 4},
    "deepseek_v3": test_adapters.SIZES
    | EXPERTS
    | {
        "head_dim": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
STACKED = "model.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_adapters_of_experts_are_those_of_plain_peft_and_merge(name, small, configured, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(test_adapters, "SMALL", test_adapters.SMALL | FAMILIES)
    config = configured("+adapter=lora", f"model.name_or_path={small(name)}", "model.lora.target_modules=[o_proj]", STACKED)
    plain = AutoModelForCausalLM.from_pretrained(small(name), dtype=torch.float32)
    began = answers(plain)
    model = load_model(config.model, tokenizer)
    assert torch.equal(answers(model), began)
    trained = with_trained_adapter(model)
    with reference_mode(trained):
        assert torch.equal(answers(trained), began)
    checkpoint = checkpoint_of(trained, tokenizer, tmp_path)
    expected = answers(PeftModel.from_pretrained(plain, str(checkpoint)).get_base_model())
    assert (expected - began).abs().max() > 0.01
    torch.testing.assert_close(answers(trained), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(answers(load_merged(checkpoint, config.model, tokenizer)), expected, rtol=1e-5, atol=1e-4)


def test_a_weight_that_is_not_there_is_refused_with_those_that_are(small, configured, tokenizer):
    config = configured("+adapter=lora", f"model.name_or_path={small('gpt_oss')}", "model.lora.target_parameters=[experts.up]")
    with pytest.raises(UserError, match=r"target_parameters: found experts.up, .*model\.layers\.\*\.mlp\.experts\.down_proj"):
        check_model(config.model, tokenizer)
    with pytest.raises(UserError, match="target_parameters: found .* with layers, which does not apply to them"):
        configured("+adapter=lora", STACKED, "model.lora.layers=[0]")
