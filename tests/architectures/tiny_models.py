"""Some hundred architectures of transformers, each in a size that trains in milliseconds.

Every model has the project's byte-level tokenizer, two layers or as many as it takes to have each of its kinds of layer, and
windows and chunks that are shorter than the rows. Weight matrices are larger than at a usual start, so that predictions depend
on what was attended to, and a mistake shows.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.modeling.kernels import choose_attention
from preference_training.modeling.tokenizer import byte_level_tokenizer

WINDOW, CHUNK = 16, 32
# Standard deviation of weight matrices: one over the root of the hidden size, so that attention prefers some tokens to others.
SPREAD = 0.18
DENSE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEAD = DENSE | {"head_dim": 8}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
GROUPED = ROUTED | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": WINDOW}
SCALED_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": WINDOW}
SCALED_YARN |= {"llama_4_scaling_beta": 0.5}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 2 * CHUNK}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "factor": 8.0}
# A tower for images before the language model, whose sizes are in a section of their own.
IMAGES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES |= {"image_size": 28, "patch_size": 14}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}

# Name in the table → the configuration; model_type is the name where none is given.
TINY: dict[str, dict] = {
    # Llama and its kin.
    "llama": DENSE,
    "llama-tied": DENSE | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": HEAD | {"sliding_window": WINDOW},
    "ministral": HEAD | WINDOWED,
    "ministral3": HEAD,
    "qwen2": DENSE,
    "qwen2-tied": DENSE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": HEAD | WINDOWED | {"query_pre_attn_scalar": 8},
    "gemma3_text": HEAD | WINDOWED | {"query_pre_attn_scalar": 8},
    "gemma3": {
        "text_config": HEAD | WINDOWED | {"query_pre_attn_scalar": 8},
        "vision_config": IMAGES,
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": HEAD
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": WINDOW,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": 640,
    },
    "gemma4_text": HEAD
    | WINDOWED
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 640, "per_layer_config": {"01": {"head_dim": 16}}},
    "vaultgemma": HEAD | WINDOWED | {"query_pre_attn_scalar": 8},
    "olmo": DENSE,
    "olmo2": DENSE,
    "olmo3": DENSE | WINDOWED,
    "phi": DENSE | {"num_key_value_heads": 4},
    "phi3": DENSE,
    "stablelm": DENSE,
    "qwen2-window": DENSE | WINDOWED | {"model_type": "qwen2", "use_sliding_window": True},
    # Positions that are compared with lengths: scaled queries, and frequencies that depend on the longest row.
    "ministral3-scaled": HEAD | {"model_type": "ministral3", "rope_parameters": SCALED_YARN},
    "phi3-longrope": DENSE | {"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 2 * CHUNK},
    "smollm3": DENSE | {"no_rope_layers": [1, 0]},
    "granite": DENSE | {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere": DENSE | {"logit_scale": 0.5},
    "cohere2": DENSE | WINDOWED | {"logit_scale": 0.5},
    "starcoder2": DENSE | {"sliding_window": WINDOW},
    "nemotron": DENSE,
    "glm": HEAD,
    "glm4": HEAD,
    "ernie4_5": HEAD,
    "exaone4": DENSE | WINDOWED,
    "apertus": DENSE,
    "arcee": HEAD,
    "bitnet": DENSE,
    "diffllama": HEAD,
    "doge": DENSE,
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "seed_oss": HEAD,
    "nanochat": DENSE,
    "minicpm3": DENSE | LATENT | {"num_key_value_heads": 4, "dim_model_base": 16, "head_dim": 8},
    "persimmon": DENSE,
    # Older ones: learned positions, ALiBi, Conv1D.
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
        "max_position_embeddings": 512,
        "intermediate_size": 64,
    },
    "gpt_neox": DENSE,
    "gptj": OLD | {"rotary_dim": 4},
    "codegen": OLD | {"rotary_dim": 4},
    "opt": DENSE | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 512},
    "biogpt": DENSE,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": DENSE | {"alibi": False},
    "falcon-alibi": DENSE | {"model_type": "falcon", "alibi": True},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "openai-gpt": OLD,
    "ctrl": OLD | {"dff": 64},
    "modernbert-decoder": DENSE
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "local_attention": 2 * WINDOW},
    # Mixtures of experts.
    "mixtral": HEAD | LOCAL_EXPERTS,
    "qwen2_moe": DENSE | EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": HEAD | EXPERTS,
    "olmoe": DENSE | {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": DENSE | {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": DENSE | LOCAL_EXPERTS,
    "granitemoe": DENSE | LOCAL_EXPERTS | {"logits_scaling": 2.0},
    "granitemoeshared": DENSE | LOCAL_EXPERTS | {"shared_intermediate_size": 32},
    "jetmoe": DENSE | LOCAL_EXPERTS | {"kv_channels": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "ernie4_5_moe": DENSE
    | {
        "moe_intermediate_size": 32,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "hunyuan_v1_moe": HEAD | {"num_experts": 4, "moe_topk": 2},
    "glm4_moe": HEAD | ROUTED | {"first_k_dense_replace": 1},
    "dots1": HEAD | ROUTED | WINDOWED | {"first_k_dense_replace": 1},
    "minimax": HEAD | LOCAL_EXPERTS | {"layer_types": ["full_attention", "linear_attention"], "block_size": WINDOW},
    "minimax_m2": HEAD | LOCAL_EXPERTS,
    "deepseek_v2": DENSE | GROUPED | LATENT | {"num_key_value_heads": 4},
    "deepseek_v3": DENSE | GROUPED | LATENT | {"num_key_value_heads": 4},
    "gpt_oss": HEAD | LOCAL_EXPERTS | WINDOWED,
    "llama4_text": HEAD
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    | {"attention_chunk_size": CHUNK, "no_rope_layers": [1, 0]},
    "llama4-scaled": HEAD
    | {"model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    | {"attention_chunk_size": CHUNK, "no_rope_layers": [1, 0], "floor_scale": WINDOW, "attn_scale": 0.5},
    # States in place of attention, alone and between layers of attention.
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": WINDOW,
    },
    "rwkv": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "context_length": 512,
        "attention_hidden_size": 32,
        "intermediate_size": 64,
    },
    "recurrent_gemma": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "lru_width": 32,
        "attention_window_size": WINDOW,
        "head_dim": 8,
    },
    "qwen3_next": HEAD | DELTA | EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": HEAD | DELTA,
    "qwen3_5_moe_text": HEAD | DELTA | EXPERTS | {"shared_expert_intermediate_size": 32},
    "lfm2": DENSE | {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": DENSE | EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "falcon_h1": DENSE | MAMBA_HEADS | {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "bamba": DENSE | MAMBA_HEADS | {"attn_layer_indices": [1]},
    "jamba": DENSE
    | {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba": DENSE
    | {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": DENSE
    | {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "chunk_size": WINDOW,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "granitemoehybrid": DENSE
    | LOCAL_EXPERTS
    | MAMBA_HEADS
    | {"layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 32},
    "nemotron_h": HEAD
    | ROUTED
    | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": WINDOW,
        "moe_shared_expert_intermediate_size": 16,
        "use_mamba_kernels": False,
    },
}


def build(name: str) -> nn.Module:
    """The model of a name, in float32, with the attention of one that is loaded."""
    values = dict(TINY[name])
    tokenizer = byte_level_tokenizer()
    tokens = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    shared = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **tokens}
    if "text_config" in values:
        shared = {"text_config": shared | values.pop("text_config"), **tokens}
    config = AutoConfig.for_model(values.pop("model_type", name), **shared | values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                # Biases begin at 0, and scales at 1.
                weight.add_(0.05 * torch.randn_like(weight))
            elif 0 < (spread := weight.std().item()) < SPREAD:
                weight.mul_(SPREAD / spread)
    choose_attention(model, "auto")
    return model


def make(name: str, folder: Path) -> None:
    """Write the model of a name, and its tokenizer, into a folder."""
    build(name).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
