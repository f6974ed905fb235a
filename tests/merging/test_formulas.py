"""The formulas of merging: numbers derived in view, what must hold of any tensors, and peft's own functions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from preference_training.core.errors import UserError
from preference_training.merging import formulas
from preference_training.merging.recipe import read_recipe

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0])


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_mean_is_the_weighted_sum():
    one, other = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    # 0.25 * 1 + 0.75 * 3, 0.25 * -2 + 0.75 * 2
    assert formulas.linear([one, other], [0.25, 0.75]).tolist() == [2.5, 1.0]


@given(st.integers(0, 1000), st.integers(1, 5))
def test_models_that_are_one_model_merge_to_it_bit_for_bit(seed, count):
    model, base = drawn(seed, 7, 3), drawn(seed + 1, 7, 3)
    assert torch.equal(formulas.linear([model] * count, [1 / count] * count), model)
    for t in (0.0, 0.3, 1.0):
        assert torch.equal(formulas.slerp(model, model, t), model)
    for merged in (
        formulas.task_arithmetic(base, [base] * count, [1.0] * count, 1.0),
        formulas.ties(base, [base] * count, [1.0] * count, 0.5, 1.0),
        formulas.dare_ties(base, [base] * count, [1.0] * count, 0.5, 1.0, [torch.Generator() for _ in range(count)]),
    ):
        assert torch.equal(merged, base)


def test_slerp_goes_along_the_circle_from_the_first_to_the_second():
    east, north = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(formulas.slerp(east, north, 0.0), east) and torch.equal(formulas.slerp(east, north, 1.0), north)
    # A third of a right angle is 30 degrees, at the same length.
    expected = torch.tensor([2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)])
    torch.testing.assert_close(formulas.slerp(east, north, 1 / 3), expected)


def test_slerp_of_parallel_opposite_and_zero_tensors_is_linear():
    one = torch.tensor([1.0, 2.0])
    for other in (3 * one, -one, torch.zeros(2)):
        torch.testing.assert_close(formulas.slerp(one, other, 0.25), 0.75 * one + 0.25 * other)


def test_task_arithmetic_adds_what_models_have_learned():
    models = [BASE + torch.tensor([1.0, 0, 0, 2]), BASE + torch.tensor([0.0, 4, 0, 2])]
    # 1 + 0.5 (1 tau_1 - 0.5 tau_2)
    assert formulas.task_arithmetic(BASE, models, [1.0, -0.5], 0.5).tolist() == [1.5, 0.0, 1.0, 1.5]


def test_a_trimmed_task_vector_keeps_the_share_of_largest_magnitude():
    vector = torch.tensor([0.1, -5.0, 2.0, -0.3, 4.0])
    assert formulas.trimmed(vector, 0.4).tolist() == [0, -5, 0, 0, 4]
    assert formulas.trimmed(vector, 1.0).tolist() == vector.tolist()
    assert formulas.trimmed(vector, 0.001).tolist() == [0, -5, 0, 0, 0]


def test_ties_averages_what_agrees_with_the_sign_of_the_sum():
    one = BASE + torch.tensor([4.0, -4.0, 1.0, 0.0])
    other = BASE + torch.tensor([2.0, 1.0, -3.0, 0.5])
    # Sums 6, -3, -2, 0.5: the means of (4, 2), (-4), (-3), (0.5); zeros count nowhere.
    assert formulas.ties(BASE, [one, other], [1.0, 1.0], 1.0, 1.0).tolist() == [4.0, -3.0, -2.0, 1.5]
    # Weights 3 and 1: sums 14, -11, 0, 0.5; (12 + 2) / 4, and nothing where the signs balance.
    assert formulas.ties(BASE, [one, other], [3.0, 1.0], 1.0, 1.0).tolist() == [4.5, -3.0, 1.0, 1.5]
    # Of each, the two largest: (4, -4, 0, 0) and (2, 0, -3, 0); scaled by 0.5.
    assert formulas.ties(BASE, [one, other], [1.0, 1.0], 0.5, 0.5).tolist() == [2.5, -1.0, -0.5, 1.0]


def test_ties_and_task_arithmetic_of_one_whole_task_vector_are_its_model():
    base, model = drawn(0, 50, 4), drawn(1, 50, 4)
    for merged in (
        formulas.ties(base, [model], [0.3], 1.0, 1.0),
        formulas.dare_ties(base, [model], [0.3], 1.0, 1.0, [torch.Generator()]),
        formulas.task_arithmetic(base, [model], [1.0], 1.0),
    ):
        torch.testing.assert_close(merged, model, rtol=0, atol=5e-7)


def test_ties_and_task_arithmetic_are_what_peft_computes_of_task_vectors():
    base, models = drawn(0, 40, 30), [drawn(seed, 40, 30) for seed in (1, 2, 3)]
    vectors = [model - base for model in models]
    ones, weights = torch.ones(3), torch.tensor([0.5, 1.2, -0.8])
    mine = formulas.ties(base, models, [1.0] * 3, 0.4, 1.0) - base
    torch.testing.assert_close(mine, merge_utils.ties(vectors, ones, 0.4), rtol=0, atol=1e-6)
    mine = formulas.task_arithmetic(base, models, weights.tolist(), 1.0) - base
    torch.testing.assert_close(mine, merge_utils.task_arithmetic(vectors, weights), rtol=0, atol=2e-6)


def test_what_dare_drops_is_made_up_for_by_what_it_keeps():
    vector, density, number = torch.tensor([1.0, -2.0, 0.5]), 0.3, 20_000
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([formulas.dropped(vector, density, generator) for _ in range(number)])
    # Each is 0 or tau / density, with mean tau and standard error |tau| sqrt((1 / density - 1) / number).
    assert all(value == pytest.approx(0) or value == pytest.approx(1 / density) for value in found[:, 0].unique().tolist())
    error = vector.abs() * math.sqrt((1 / density - 1) / number)
    assert bool(((found.mean(0) - vector).abs() < 4 * error).all())


def test_what_dare_draws_depends_on_seed_model_and_tensor_alone():
    base, models = torch.zeros(1000), [torch.ones(1000), torch.full((1000,), 2.0)]

    def merged(name: str, **numbers) -> torch.Tensor:
        return read_recipe("dare_ties", 2, True, **numbers).merge(name, base, models)

    assert torch.equal(merged("a", seed=1), merged("a", seed=1))
    assert not torch.equal(merged("a", seed=1), merged("a", seed=2))
    assert not torch.equal(merged("a", seed=1), merged("b", seed=1))
    one, other = read_recipe("dare_ties", 2, True).generators("a")
    assert not torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=other))


# ---- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count", "has_base", "given", "message"),
    [
        ("linear", 2, False, {"weights": [0.5, 0.4]}, "sum to 0.9.*--weights 0.555556 0.444444"),
        ("linear", 2, False, {"weights": [1.0]}, "found 1, expected 2"),
        ("linear", 1, False, {}, "found 1 model, expected at least 2"),
        ("linear", 2, True, {}, "--base: linear has no base model"),
        ("linear", 2, False, {"density": 0.5}, "--density: linear does not read it.*ties or dare_ties"),
        ("slerp", 3, False, {}, "slerp is of 2 models, found 3"),
        ("slerp", 2, False, {"weights": [0.5, 0.5]}, "--weights: slerp does not read it"),
        ("slerp", 2, False, {"t": 1.5}, "--t: found 1.5"),
        ("ties", 2, False, {}, "--base: ties merges what models have learned since their base model"),
        ("dare_ties", 2, False, {}, "--base: dare_ties"),
        ("task_arithmetic", 2, False, {}, "--base: task_arithmetic"),
        ("ties", 2, True, {"density": 0.0}, "--density: found 0"),
        ("ties", 2, True, {"weights": [1.0, -1.0]}, "expected positive numbers"),
        ("ties", 2, True, {"weights": [1.0, math.inf]}, "expected finite numbers"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_a_remedy(method, count, has_base, given, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        read_recipe(method, count, has_base, **given)
