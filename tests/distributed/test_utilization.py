"""The time of a run, and how much of the devices' arithmetic its steps use."""

import pytest
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.schedule import Schedule
from preference_training.core.gpu_peaks import peak_tflops
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.utilization import step_flops
from preference_training.losses.registry import build_loss
from preference_training.modeling.adapters.targets import fused_experts
from tests.support.building import build_trainer
from tests.support.files import GOLDEN


def test_the_time_of_a_resumed_run_continues_and_its_peak_may_be_given(compose, tokenizer):
    config = compose("batch_size=4", "debug=true", "max_length=32", "max_prompt_length=16", "peak_tflops=0.001")
    policy = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama")
    prompts = PromptTable.of(TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0]], []) for n in range(8))
    steps = BatchIterator(Schedule(prompts, 4))
    trainer = build_trainer(config, policy, build_loss("sft"), tokenizer=tokenizer, train=steps)
    trainer.state.load_state_dict(trainer.state.state_dict() | {"examples": 1, "seconds": 1000.0})
    rows = []
    trainer.tracker.log_step = rows.append
    trainer.train()
    assert all(1000 < row["time"] < 1100 for row in rows)
    # A gigaflop per second is the peak that was given, and the FLOPs of a token are known.
    flops = step_flops(trainer.models.policy, reference_is_live=False)
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 1e9)


def test_the_flops_of_a_step_are_two_for_each_weight_and_token_forward_and_four_backward():
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = LlamaForCausalLM(config)
    # Four square matrices of attention, three of the MLP, the head, the scales of three norms; the embedding is looked up.
    weights = 4 * 8 * 8 + 3 * 8 * 16 + 32 * 8 + 3 * 8
    assert step_flops(model, reference_is_live=False) == 6 * weights
    assert step_flops(model, reference_is_live=True) == 8 * weights
    # An adapter's backward goes through all weights, and has gradients of its own alone.
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert step_flops(model, reference_is_live=False) == 4 * weights + 2 * 32 * 8
    # Tied, the embedding is multiplied by as the head.
    config.tie_word_embeddings = True
    assert step_flops(LlamaForCausalLM(config), reference_is_live=False) == 6 * weights


def test_of_experts_a_token_is_multiplied_by_those_that_are_chosen():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    one, two = (
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=chosen)) for chosen in (1, 2)
    )
    difference = step_flops(two, reference_is_live=False) - step_flops(one, reference_is_live=False)
    assert difference == 6 * 3 * 8 * 16


def test_the_number_of_experts_is_read_wherever_a_configuration_has_it():
    sizes = {
        "d_model": 8,
        "n_heads": 2,
        "n_layers": 1,
        "vocab_size": 32,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    }
    ffn = {"hidden_size": 8, "ffn_hidden_size": 16, "moe_num_experts": 4}
    one, two = (DbrxForCausalLM(DbrxConfig(**sizes, ffn_config=ffn | {"moe_top_k": chosen})) for chosen in (1, 2))
    assert step_flops(two, reference_is_live=False) - step_flops(one, reference_is_live=False) == 6 * 3 * 8 * 16
    assert fused_experts(one) == ["transformer.blocks.0.ffn.experts.mlp"]


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", True, 989.4),
        ("NVIDIA H100 PCIe", "float16", True, 756.0),
        ("NVIDIA A100-SXM4-80GB", "float32", True, 156.0),
        ("NVIDIA A100-SXM4-80GB", "float32", False, None),
        ("NVIDIA A10", "bfloat16", True, 125.0),
        ("NVIDIA A10G", "bfloat16", True, None),
        ("NVIDIA L4", "bfloat16", True, 121.0),
        ("NVIDIA L40S", "bfloat16", True, 362.0),
        ("Tesla T4", "float32", True, None),
        ("NVIDIA GeForce GTX 1080", "float16", True, None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_name_and_dtype(name, dtype, tf32, peak):
    assert peak_tflops(name, dtype, tf32) == peak
