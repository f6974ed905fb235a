"""Whether a saved directory is the model that was saved: other libraries load it, and it gives the same log-probs.

A few sequences of random tokens are scored by the model in memory, and by what plain transformers (and peft) load from the
directory. Without memory for a second model, names, shapes, values and the configuration are compared instead.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from preference_training.batching.packing import PackedBatch
from preference_training.core.errors import UserError, first_line
from preference_training.core.process_group import reshard
from preference_training.modeling.adapters.files import WEIGHTS_FILE, check_adapter_shapes, is_adapter, read_adapter_config
from preference_training.modeling.adapters.weights import weights_to_save
from preference_training.modeling.archives import archive_shapes, model_from_archive, weight_files
from preference_training.modeling.loading import cast_weights, config_differences, saved_head
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.proof import TOLERANCES, ErrorScale, random_tries
from preference_training.modeling.quantization import quantize, use_float8, weight_numels
from preference_training.modeling.state import free_memory
from preference_training.modeling.value_head import add_values, auto_class, has_value_head

# Relative tolerance of a token's log-prob between two computations in float32; absolute below 1 nat.
FLOAT32 = 1e-5


class DifferentModelError(Exception):
    """A directory does not load as the model that was saved; the message says why."""


# ---- log-probs to compare -------------------------------------------------------------------------------------------------


def probe(model: nn.Module) -> PackedBatch:
    """The sequences that are scored."""
    return random_tries(model.config.get_text_config().vocab_size)


@torch.no_grad()
def probe_logps(model: nn.Module, device: torch.device | None = None) -> Tensor:
    """A model's log-prob [R] of each response of `probe`, on the CPU. All processes of a sharded model call it together."""
    training = model.training
    model.eval()
    try:
        return response_scores(model, probe(model).to(device or torch.device("cpu"))).cpu()
    finally:
        reshard(model)
        model.train(training)


@torch.no_grad()
def compute_in_float32(model: nn.Module) -> nn.Module:
    """Have a model compute in float32 with the weights that it has, in place and exactly. Quantized weights stay."""
    model.autocast_dtype = None
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.float()
    return model


def probe_logps_in_float32(model: nn.Module, dtype: torch.dtype) -> Tensor:
    """`probe_logps` of a model whose weights are of a dtype, computed in float32; they are of that dtype again afterwards."""
    logps = probe_logps(compute_in_float32(model))
    cast_weights(model, dtype)
    return logps


def largest_difference(found: Tensor, expected: Tensor, model: nn.Module) -> float:
    """The largest difference per token between two models' `probe_logps`."""
    return ErrorScale.of(model, probe(model), expected).error(found, expected)


def tolerance(expected: Tensor, model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference per token that is rounding, where both are computed in a dtype."""
    if dtype != torch.float32:
        return TOLERANCES[dtype]
    scale = ErrorScale.of(model, probe(model), expected)
    return FLOAT32 * max(1.0, scale.error(expected, torch.zeros_like(expected)))


def compare(found: Tensor, expected: Tensor, model: nn.Module, allowed: float) -> float:
    """The `largest_difference` of two models. Raises DifferentModelError where it is more than allowed."""
    difference = largest_difference(found, expected, model)
    if not difference <= allowed:
        what = "values differ by {:.2g} of the largest" if has_value_head(model) else "log-probs differ by {:.2g} per token"
        raise DifferentModelError(f"its {what.format(difference)}, expected at most {allowed:.1g}")
    return difference


# ---- loading as other libraries do ----------------------------------------------------------------------------------------


def load_plain(
    directory: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    base: str | Path | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """The model of a directory as plain transformers (and peft) load it. prepare changes an adapter's base model.

    base: where that lies, if elsewhere than the directory says. Raises DifferentModelError where anything is missing or left.
    """
    adapter, head = is_adapter(str(directory)), saved_head(directory)
    whole = (base or read_adapter_config(directory)["base_model_name_or_path"]) if adapter else directory
    options: dict = {"dtype": dtype, "trust_remote_code": trust_remote_code, "cache_dir": cache_dir}
    if head == "value":
        options["num_labels"] = 1
    try:
        model, info = auto_class(head).from_pretrained(whole, output_loading_info=True, **options)
        if head == "value":
            if adapter:
                # A language model, or a reward model whose head the adapter replaces.
                info |= {"missing_keys": [], "unexpected_keys": []}
            add_values(model)
        rest = [f"{kind.replace('_', ' ')}: {sorted(map(str, names))[0]}" for kind, names in info.items() if names]
        if rest:
            raise DifferentModelError(f"plain transformers loads it with {'; '.join(rest)}")
        if prepare is not None:
            prepare(model)
        return _with_adapter(model, directory) if adapter else model
    except DifferentModelError:
        raise
    except Exception as error:  # whatever a library raises for a file that it does not accept
        raise DifferentModelError(f"plain transformers cannot load it: {type(error).__name__}: {first_line(error)}") from error


def _with_adapter(model: nn.Module, directory: Path) -> nn.Module:
    """A model with the adapter of a directory, as plain peft loads it."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, str(directory)).get_base_model()
    missing = [first_line(text.message) for text in said if "missing adapter keys" in str(text.message)]
    if missing:
        raise DifferentModelError(f"plain peft loads it incompletely: {missing[0]}")
    return model


def fits_in_memory(numel: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether memory suffices for one more model of so many weights, and for computing with it."""
    return 1.25 * numel * dtype.itemsize < free_memory(torch.device("cpu"))


# ---- checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoint_check(policy: nn.Module, config, device: torch.device) -> Callable[[Path], None]:
    """The check of a run's first checkpoint: a function of its directory that raises UserError if the saved model differs.

    The policy is scored here, on all processes; the function compares with the policy as it is now.
    """
    return partial(_check_checkpoint, probe_logps(policy, device), policy, config, device)


def _check_checkpoint(expected: Tensor, policy: nn.Module, config, device: torch.device, directory: Path) -> None:
    dtype = getattr(torch, config.model.policy_dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            quantized_elsewhere = config.model.quantization and device.type != "cpu"
            if quantized_elsewhere or not fits_in_memory(sum(weight_numels(policy).values()), dtype):
                compare_parts(directory, policy, config.model.trust_remote_code)
                return
            prepare = partial(quantize, model_config=config.model) if config.model.quantization else None
            model = load_plain(directory, dtype, config.model.trust_remote_code, config.cache_dir, prepare=prepare)
            model.autocast_dtype = getattr(policy, "autocast_dtype", None)
            if config.model.fp8:
                # As the policy computes: the weights are saved unrounded.
                use_float8(model)
            compare(probe_logps(model), expected, policy, tolerance(expected, policy, _computes_in(policy, config, device)))
    except DifferentModelError as error:
        raise UserError(
            f"checkpoint: what is saved of {type(policy).__name__} is not the run's model: {error}. Other libraries would load "
            "something else than was trained, so the run stops here."
        ) from error


def _computes_in(policy: nn.Module, config, device: torch.device) -> torch.dtype:
    """The dtype whose rounding a policy's log-probs have."""
    name = config.model.autocast_dtype or config.sharded_dtype or config.model.policy_dtype
    dtype = getattr(torch, name)
    # TF32 rounds to as many bits as float16.
    rounds = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return torch.float16 if dtype == torch.float32 and rounds else dtype


def compare_parts(directory: Path, model: nn.Module, trust_remote_code: bool = False) -> None:
    """Compare a directory with a model without loading it: names and shapes, values, and configuration.

    The values of sharded weights are not compared. Raises DifferentModelError where anything differs.
    """
    from transformers import AutoConfig

    try:
        if is_adapter(str(directory)):
            check_adapter_shapes(str(directory), model)
            files = [directory / WEIGHTS_FILE]
        else:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            if differing := config_differences(config, model.config):
                raise DifferentModelError(f"its config.json differs in {', '.join(differing)}")
            shapes = {name: torch.empty(shape, device="meta") for name, shape in archive_shapes(directory).items()}
            on_meta = {"device_map": {"": "meta"}}
            head = "value" if has_value_head(model) else "lm"
            model_from_archive(config, shapes, directory, torch.float32, trust_remote_code, head, **on_meta)
            files = weight_files(directory)
    except (UserError, OSError, ValueError) as error:
        raise DifferentModelError(first_line(error)) from error
    own = {name: weight for name, weight in model.state_dict(keep_vars=True).items() if not isinstance(weight, DTensor)}
    weights = weights_to_save(own)
    for file in files:
        _compare_values(file, weights)


def _compare_values(file: Path, weights: dict[str, Tensor]) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a dict
                mine = weights.get(name)
                if mine is None:
                    continue
                if not torch.equal(opened.get_tensor(name), mine.detach().cpu()):
                    raise DifferentModelError(f"{file.name}: {name} has other values")
    except SafetensorError as error:
        raise DifferentModelError(f"{file.name} cannot be read: {first_line(error)}") from error
