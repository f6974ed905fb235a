"""Which weights are trained where not all are: by patterns over their names, or by their signal-to-noise ratio (Spectrum)."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.configuration.keys import listed
from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.machine import pick_device
from preference_training.modeling.tuning.towers import is_in, tower_weights, towers
from preference_training.modeling.value_head import output_head

# File of a run directory that lists the weights that Spectrum chose.
CHOSEN_FILE = "trained_weights.json"
# The range between the quartiles of a normal distribution, in standard deviations.
NORMAL_QUARTILES = 1.349


def choose_weights(model: nn.Module, model_config: ModelConfig, run_dir: Path | None = None) -> None:
    """Freeze what a `model` configuration does not train. run_dir: where Spectrum's choice is kept for a resumed run.

    On the meta device, where there are no values to choose by, Spectrum's share is the first blocks. Raises UserError for
    patterns that match no weight, and where no weight is left to train.
    """
    if not model_config.chooses_weights:
        return
    names: dict[Tensor, list[str]] = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        names[weight].append(name)
    trained = _matching(names, "trainable", model_config.trainable)
    if model_config.spectrum_share is not None:
        chosen = set(_spectrum_choice(model, model_config.spectrum_share, run_dir))
        trained = {weight for weight, own in names.items() if chosen & set(own)}
    trained -= _matching(names, "freeze", model_config.freeze) if model_config.freeze else set()
    unreached = tower_weights(model)
    trained -= unreached
    if not trained:
        key = "freeze" if model_config.freeze else "trainable"
        reached = {weight: own for weight, own in names.items() if weight not in unreached}
        raise UserError(
            f"model.{key}: found {getattr(model_config, key)}, which leaves no weight of {type(model).__name__} to train that "
            f"text reaches. Names of weights: {_examples(reached)}."
        )
    for weight in names:
        weight.requires_grad_(weight in trained)


def trained_names(model: nn.Module) -> frozenset[str]:
    """The names of the weights that are trained."""
    return frozenset(name for name, weight in model.named_parameters() if weight.requires_grad)


def train_only(model: nn.Module, names: frozenset[str]) -> None:
    """Train the weights of these names, and no other."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)


def describe_choice(model: nn.Module, model_config: ModelConfig) -> list[str]:
    """A line for the user: how much of a model is trained, where that is not all."""
    if not model_config.chooses_weights:
        return []
    weights = list(model.parameters())
    trained, total = sum(weight.numel() for weight in weights if weight.requires_grad), sum(map(torch.numel, weights))
    if model_config.spectrum_share is not None:
        return [
            f"model.spectrum_share: of the matrices of each kind the share {model_config.spectrum_share:g} with the highest "
            "signal-to-noise ratio is trained, and embeddings and head"
        ]
    key = "trainable" if model_config.trainable is not None else "freeze"
    return [f"model.{key}: {trained:,} of {total:,} weights are trained, the others are frozen"]


def _matching(names: dict[Tensor, list[str]], key: str, patterns: list[str] | str | None) -> set[Tensor]:
    """The weights with a name in which any of the patterns is found; all where there are none."""
    if patterns is None:
        return set(names)
    found = set()
    for pattern in listed(patterns):
        matching = {weight for weight, own in names.items() if any(re.search(pattern, name) for name in own)}
        if not matching:
            raise UserError(
                f"model.{key}: {pattern!r} is found in no name of a weight. Expected a regular expression for names such as "
                f"{_examples(names)}."
            )
        found |= matching
    return found


def _examples(names: dict[Tensor, list[str]]) -> str:
    """A name of each kind of weight."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".0.", own[0]) for own in names.values()))


# ---- Spectrum ---------------------------------------------------------------------------------------------------------------


def _spectrum_choice(model: nn.Module, share: float, run_dir: Path | None) -> list[str]:
    """The names of the weights that Spectrum trains: those that a run has chosen before, or now."""
    kept = None if run_dir is None else run_dir / CHOSEN_FILE
    if kept is not None and kept.is_file():
        return list(json.loads(kept.read_text())["trained"])
    kinds = matrices_by_kind(model)
    is_meta = next(model.parameters()).is_meta
    ratios = {} if is_meta else {name: signal_to_noise(weight) for kind in kinds.values() for name, weight in kind.items()}
    chosen = best_of_each_kind(kinds.values(), ratios, share)
    # As its authors do.
    ends = {id(model.get_input_embeddings()), id(output_head(model))}
    chosen += [f"{name}.weight" for name, module in model.named_modules() if id(module) in ends]
    if kept is not None and not is_meta:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps({"trained": sorted(chosen), "signal_to_noise": ratios}, indent=1).encode())
        print(f"model.spectrum_share: {len(chosen)} weights are trained, listed in {kept}", flush=True)
    return chosen


def matrices_by_kind(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The matrices of a model's blocks, by the name of the weight, of each kind: what follows the number of the block."""
    kinds: dict[str, dict[str, Tensor]] = defaultdict(dict)
    beside = towers(model)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and (place := re.search(r"\.\d+\.(.+)$", name)) and not is_in(name, beside):
            kinds[place[1]][name] = weight
    return kinds


def best_of_each_kind(kinds: Iterable[dict[str, Tensor]], ratios: dict[str, float], share: float) -> list[str]:
    """The share of each kind's names with the highest ratios, at least one of a kind; without ratios the first."""
    chosen = []
    for kind in kinds:
        ranked = sorted(kind, key=lambda name: -ratios.get(name, 0.0))
        chosen += ranked[: max(1, math.ceil(share * len(ranked)))]
    return chosen


@torch.no_grad()
def signal_to_noise(weight: Tensor) -> float:
    """The signal-to-noise ratio of a matrix [n, m], or the mean of several [.., n, m] (Hartford et al. 2024, section 3.2).

    Singular values up to the bound of Marchenko and Pastur, sigma (1 + sqrt(n / m)), are what random entries have. The ratio
    of the sum of those above to the sum of the others, over the largest one, so that kinds of layers compare. sigma is
    estimated from the range between the quartiles, which a few large values do not move.
    """
    matrices = weight.detach().reshape(-1, *weight.shape[-2:])
    return sum(_ratio(matrix.to(pick_device(), torch.float32)) for matrix in matrices) / len(matrices)


def _ratio(matrix: Tensor) -> float:
    short, long = sorted(matrix.shape)
    wide = matrix if matrix.shape[0] == short else matrix.T
    # In float64: squares have half of the digits.
    squares = torch.linalg.eigvalsh((wide @ wide.T).double())
    values = squares.clamp(min=0).sqrt()
    lower, upper = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device))
    bound = (upper - lower) / NORMAL_QUARTILES * (1 + math.sqrt(short / long))
    signal, noise = values[values > bound].sum(), values[values <= bound].sum()
    largest = values.max()
    return float(signal / noise / largest) if noise > 0 and largest > 0 else float(largest > 0) * 1e6
