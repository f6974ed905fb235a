"""The configuration of a model in transformers: of the Hub, a directory, or the keys of `model.from_config`."""

import copy
from contextlib import contextmanager
from pathlib import Path

from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError, first_line
from preference_training.modeling.kernels import refuse_kernels
from preference_training.modeling.value_head import ROW_END, check_head


@contextmanager
def loading_errors(key: str, name: str):
    """Context in which any error while loading `name` becomes a UserError that names the configuration's `key`."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise UserError(f"{key}: {name}: no such directory. Paths are relative to {Path.cwd()}.")
    try:
        yield
    except Exception as error:  # a dozen types: networks, and damaged files in half a dozen formats
        raise UserError(
            f"{key}: {name} could not be loaded: {first_line(error)}. Expected a hub id (and a network, or the model in the "
            "hub's cache) or a local directory. Code that comes with it runs only with model.trust_remote_code=true."
        ) from error


def model_configuration(model_config: ModelConfig, tokenizer, cache_dir: str | None = None):
    """The transformers configuration of `name_or_path` with the values of `from_config`, or of `from_config` alone.

    Raises UserError where there is none, or it is not that of a model with the configured head.
    """
    config = _configuration(model_config, tokenizer, cache_dir)
    check_head(config, model_config.head, model_config.name_or_path or config.model_type)
    if model_config.head == "value":
        config.num_labels = 1
        setattr(config, ROW_END, tokenizer.eos_token_id)
    return config


def _configuration(model_config: ModelConfig, tokenizer, cache_dir: str | None):
    from transformers import AutoConfig

    # transformers writes into what it is given.
    values = copy.deepcopy(model_config.from_config)
    if model_config.name_or_path:
        name, trusted = model_config.name_or_path, model_config.trust_remote_code
        with loading_errors("model.name_or_path", name):
            config = AutoConfig.from_pretrained(name, **(values | {"cache_dir": cache_dir, "trust_remote_code": trusted}))
            if not trusted:
                refuse_kernels(config)
            _undo_quantization(config, name)
            return config
    tokens = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        # Ids may have gaps, so the vocabulary ends with the largest.
        size = max(len(tokenizer), *(number + 1 for number in tokenizer.get_vocab().values()))
        return AutoConfig.for_model(**{"vocab_size": size, **tokens, **values})
    except ValueError as error:
        raise UserError(f"model.from_config.model_type: {values.get('model_type')!r} is not known to transformers.") from error


def _undo_quantization(config, name: str) -> None:
    """Have weights that were published in few bits loaded in `policy_dtype`. Raises UserError where that is impossible."""
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method in ("mxfp4", "fp8"):
        # With a GPU's kernels they would stay as they are, which cannot be trained.
        quantization["dequantize"] = True
    elif method in ("awq", "gptq"):
        raise UserError(
            f"model.name_or_path: the weights of {name} are quantized ({method}), and cannot be trained. Name the model "
            "that they were made of; +adapter=qlora quantizes it in memory."
        )
