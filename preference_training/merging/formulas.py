"""How the tensors of several models become one. All of them have one shape and are float32; so is the result.

Notation: theta_i is a tensor of model i, theta_0 that of the base model, tau_i = theta_i - theta_0 its task vector. What looks
at several elements of a model (trimming, the angle of SLERP) looks at one tensor at a time.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Where the cosine of two tensors is nearer to 1 or -1, their angle is not known well enough to divide by its sine.
PARALLEL = 0.9995


def linear(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean sum_i w_i theta_i, for weights that sum to 1; of equal weights a model soup (Wortsman et al. 2022).

    It is computed as theta_1 + sum_i w_i (theta_i - theta_1), so that the mean of equal tensors is that tensor, bit for bit.
    """
    merged = models[0].clone()
    for model, weight in zip(models[1:], weights[1:], strict=True):
        merged.add_(model - models[0], alpha=weight)
    return merged


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Spherical linear interpolation (Shoemake 1985): the first tensor at t = 0, the second at t = 1.

        sin((1 - t) o) / sin(o) theta_1 + sin(t o) / sin(o) theta_2,    cos(o) = <theta_1, theta_2> / (|theta_1| |theta_2|)

    Tensors that are zero or (nearly) parallel are interpolated linearly, which is the limit for o to 0.
    """
    norms = float(torch.linalg.vector_norm(first)) * float(torch.linalg.vector_norm(second))
    cosine = float((first * second).sum(dtype=torch.float64)) / norms if norms else 1.0
    if abs(cosine) > PARALLEL:
        # Exact at both ends, and for equal tensors everywhere.
        return torch.lerp(first, second, t)
    angle = math.acos(cosine)
    return first * (math.sin((1 - t) * angle) / math.sin(angle)) + second * (math.sin(t * angle) / math.sin(angle))


def task_arithmetic(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    """theta_0 + scale sum_i w_i tau_i (Ilharco et al. 2022). A negative weight makes a model forget its task."""
    merged = base.clone()
    for model, weight in zip(models, weights, strict=True):
        merged.add_(model - base, alpha=scale * weight)
    return merged


def ties(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], density: float, scale: float) -> Tensor:
    """TIES (Yadav et al. 2023): trim, elect a sign, average what agrees with it.

    Of each task vector only the share `density` of largest magnitude is kept; then `agreeing_mean`, times `scale` (their
    lambda), is added to theta_0.
    """
    return base + scale * agreeing_mean([trimmed(model - base, density) for model in models], weights)


def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """DARE (Yu et al. 2023) in place of the trimming of TIES: `dropped` task vectors, then as `ties`.

    generators: one for each model, which draws what is dropped of this tensor.
    """
    vectors = [dropped(model - base, density, generator) for model, generator in zip(models, generators, strict=True)]
    return base + scale * agreeing_mean(vectors, weights)


# ---- task vectors -----------------------------------------------------------------------------------------------------------


def trimmed(vector: Tensor, density: float) -> Tensor:
    """A task vector whose elements are 0 but for the share `density` of largest magnitude, at least one.

    Elements as large as the smallest that is kept are kept too.
    """
    kept = max(1, round(density * vector.numel()))
    if kept >= vector.numel():
        return vector
    magnitudes = vector.abs()
    least = magnitudes.flatten().kthvalue(vector.numel() - kept + 1).values
    return torch.where(magnitudes >= least, vector, 0.0)


def dropped(vector: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A task vector of which each element is kept with probability `density`, and divided by it; else it is 0.

    With the drop rate p = 1 - density: m ~ Bernoulli(p), (1 - m) tau / (1 - p). Its expectation is the task vector.
    """
    if density >= 1:
        return vector
    return torch.where(torch.rand(vector.shape, generator=generator) < density, vector / density, 0.0)


def agreeing_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The disjoint mean of TIES: of each element, the mean of those vectors that have the sign of the weighted sum.

    s = sgn(sum_i w_i tau_i),    sum_i w_i tau_i [sgn(tau_i) = s] / sum_i w_i [sgn(tau_i) = s],    0 where none has it
    """
    total = sum(weight * vector for vector, weight in zip(vectors, weights, strict=True))
    sign = torch.sign(total)
    agreeing, weight_of = torch.zeros_like(sign), torch.zeros_like(sign)
    for vector, weight in zip(vectors, weights, strict=True):
        agrees = (torch.sign(vector) == sign) & (vector != 0)
        agreeing.add_(torch.where(agrees, vector, 0.0), alpha=weight)
        weight_of.add_(agrees, alpha=weight)
    return torch.where(weight_of > 0, agreeing / weight_of, 0.0)
