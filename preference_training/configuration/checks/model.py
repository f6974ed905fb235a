"""What does not go together in a run's `model` section: adapters and their kinds, chosen weights, added tokens, FP8, noise."""

from pathlib import Path

from preference_training.configuration.keys import listed
from preference_training.configuration.model_names import ADAPTER_CONFIG
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import BASE_MODEL
from preference_training.core.errors import UserError


def check_model_keys(config: RunConfig) -> None:
    """Raise UserError for the first combination of keys that cannot work."""
    _check_adapter(config)
    _check_kind_of_adapter(config)
    _check_what_is_trained(config)
    _check_float8(config)


def _check_adapter(config: RunConfig) -> None:
    model, has_adapter = config.model, config.model.lora.r is not None
    if model.quantization and not has_adapter:
        raise UserError("model.quantization: quantized weights cannot be trained themselves. Add +adapter=lora.")
    if model.quantization and config.trainer.splits_layers:
        raise UserError(
            "model.quantization: TensorParallelTrainer splits the rows and columns of a layer, and quantized weights share "
            "scales across both. Use trainer=FSDPTrainer, or leave model.quantization null."
        )
    if model.quantization == "int8" and config.trainer.is_sharded:
        raise UserError(
            "model.quantization: FSDPTrainer cannot check int8 layers at load: they round activations to eight bits on a GPU, "
            "and not on the CPU of rank 0, which it compares with. Use nf4, or trainer=BasicTrainer."
        )
    if has_adapter and config.trainer.splits_layers:
        raise UserError(
            "model.lora.r: TensorParallelTrainer splits the layers that an adapter changes. Use FSDPTrainer or BasicTrainer."
        )
    if has_adapter and config.loss.moves_reference:
        raise UserError(
            f"model.lora.r: loss={config.loss.name} moves the reference, which with an adapter has no weights of its own. "
            "Train all weights, or use another loss."
        )
    reference = model.reference_archive
    if has_adapter and reference not in (None, BASE_MODEL) and not (Path(reference) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model.reference_archive: found {reference}, expected an adapter or base: with an adapter the reference is the "
            "same model, under another adapter or none."
        )
    if has_adapter and model.reference_dtype != model.policy_dtype:
        raise UserError(
            f"model.reference_dtype: found {model.reference_dtype}, expected policy_dtype, {model.policy_dtype}: with an "
            "adapter the reference is the same weights."
        )


def _check_kind_of_adapter(config: RunConfig) -> None:
    lora = config.model.lora
    defaults = {
        "use_dora": False,
        "use_rslora": False,
        "init": "default",
        "layers": None,
        "target_parameters": None,
        "modules_to_save": None,
        "loraplus_lr_ratio": None,
    }
    given = [name for name, default in defaults.items() if getattr(lora, name) != default]
    if given and lora.r is None:
        found = ", ".join(map(str, listed(getattr(lora, given[0]))))
        raise UserError(f"model.lora.{given[0]}: found {found}, and there is no adapter. Add +adapter=lora, or leave it out.")
    if lora.layers is not None and isinstance(lora.target_modules, str):
        raise UserError(
            f"model.lora.layers: found {lora.layers} beside target_modules={lora.target_modules}, a regular expression. Name "
            "the blocks in that, or list the modules: [q_proj,v_proj]."
        )
    if lora.target_parameters is not None and (lora.layers is not None or lora.dropout):
        other = "layers" if lora.layers is not None else "dropout"
        raise UserError(
            f"model.lora.target_parameters: found {lora.target_parameters} with {other}, which does not apply to them. Name "
            "blocks as in layers.1.mlp.experts.down_proj, and leave dropout 0."
        )
    if config.rounds is not None and lora.subtracts_start:
        raise UserError(
            f"model.lora.init: found {lora.init} in rounds, each of which starts from the adapter of the round before: one of "
            "twice the rank. Expected default or gaussian."
        )
    if lora.use_dora and lora.subtracts_start:
        raise UserError(
            f"model.lora.init: found {lora.init} with use_dora, whose lengths leave no plain adapter to save. Use one of them."
        )
    if lora.init == "orthogonal" and lora.r is not None and lora.r % 2:
        raise UserError(f"model.lora.r: found {lora.r}, expected an even rank with model.lora.init=orthogonal.")
    if lora.use_dora and config.sharded_dtype not in (None, "float32"):
        raise UserError(
            f"model.lora.use_dora: {config.trainer.name} rounds the learned lengths to {config.sharded_dtype}, so that the "
            "adapter would change the model before training. Set model.autocast_dtype in place of model.fsdp_policy_mp or "
            "trainer.param_dtype."
        )


def _check_what_is_trained(config: RunConfig) -> None:
    model = config.model
    chosen = {name: getattr(model, name) for name in ("trainable", "freeze", "spectrum_share")}
    given = [name for name, value in chosen.items() if value is not None]
    if given and model.lora.r is not None:
        raise UserError(
            f"model.{given[0]}: found {chosen[given[0]]} with an adapter, which freezes all weights under it. Choose its "
            "layers by model.lora.target_modules and model.lora.layers, or train without it."
        )
    if model.spectrum_share is not None and model.trainable is not None:
        raise UserError("model.spectrum_share: given beside model.trainable, which chooses weights too. Expected one of them.")
    unsplit = {**chosen, "neftune_alpha": model.neftune_alpha, "add_tokens": model.added_tokens or None}
    if config.trainer.splits_layers and (named := [name for name, value in unsplit.items() if value is not None]):
        raise UserError(
            f"model.{named[0]}: TensorParallelTrainer splits the weights that it is about. Use FSDPTrainer or BasicTrainer."
        )
    if twice := set(model.add_tokens) & set(model.add_special_tokens):
        raise UserError(f"model.add_special_tokens: {sorted(twice)[0]!r} is in model.add_tokens too. Expected one of them.")


def _check_float8(config: RunConfig) -> None:
    model = config.model
    if not model.fp8:
        return
    if model.lora.r is not None:
        raise UserError(
            "model.fp8: found true with an adapter: FP8 layers compute gradients of the weights under it, which are frozen. "
            "Train all weights, or set it to false."
        )
    if config.trainer.name != "BasicTrainer":
        raise UserError(
            f"model.fp8: {config.trainer.name} compares its sharded model with the unsharded one, whose products are "
            "not rounded to FP8. Use trainer=BasicTrainer."
        )


def check_noise(config: RunConfig, needs_reference: bool) -> None:
    """Raise UserError where noise on embeddings would be measured against a reference without it."""
    if config.model.neftune_alpha is not None and needs_reference:
        raise UserError(
            f"model.neftune_alpha: found {config.model.neftune_alpha:g}, and loss={config.loss.name} compares the policy with "
            "its reference, from which noise would part it before training. Leave it null, or use it with a loss that has no "
            "reference, such as sft."
        )
