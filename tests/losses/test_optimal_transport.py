"""AOT against numbers derived in view, and against a sort of the whole micro-batch with its gradient."""

import pytest
import torch

from preference_training.losses.base import Examples
from preference_training.losses.formulas import dpo_loss
from preference_training.losses.registry import build_loss
from tests.support.losses import f64, of_pairs, softplus

PAIRS = torch.arange(12).view(6, 2)


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(12, generator=draw, dtype=torch.float64) * 5 for _ in range(2))


def sorted_loss(name: str, policy: torch.Tensor, reference: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The mean loss as the paper's algorithm and TRL compute it: with both lists sorted."""
    if name == "aot":
        lists = policy[PAIRS[:, 0]] - policy[PAIRS[:, 1]], reference[PAIRS[:, 0]] - reference[PAIRS[:, 1]]
    else:
        lists = (policy - reference)[PAIRS].unbind(1)
    first, second = (values.sort().values for values in lists)
    return dpo_loss(first, second, 0.3, smoothing).mean()


def test_aot_compares_gaps_of_the_same_rank():
    # Gaps of the policy 3 and 1, of the reference 0 and 2: sorted 1 - 0 and 3 - 2, whichever pair has which.
    policy, reference = f64(3, 0, 1, 0), f64(0, 0, 2, 0)
    output = build_loss("aot", beta=0.5, label_smoothing=0.0)(policy, reference, of_pairs(torch.tensor([[0, 1], [2, 3]])))
    assert output.losses.tolist() == pytest.approx([softplus(-0.5)] * 2, rel=1e-12)


def test_unpaired_aot_compares_a_chosen_response_with_the_rejected_one_of_its_rank():
    # Ratios chosen 3 and 1, rejected -1 and 0: sorted 1 + 1 and 3 - 0. Either pair has one response of each.
    policy, reference = f64(3, -1, 1, 0), torch.zeros(4, dtype=torch.float64)
    output = build_loss("aot_unpaired", beta=0.5, label_smoothing=0.0)(
        policy, reference, of_pairs(torch.tensor([[0, 1], [2, 3]]))
    )
    assert output.losses.tolist() == pytest.approx([(softplus(-1) + softplus(-1.5)) / 2] * 2, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("packs", [[[0, 1, 2, 3, 4, 5]], [[4, 0], [1, 5, 2], [3]]])
def test_packs_have_the_loss_and_the_gradient_of_the_sorted_micro_batch(name, packs, smoothing):
    policy, reference = drawn()
    policy.requires_grad_()
    expected = sorted_loss(name, policy, reference, smoothing)
    [gradient] = torch.autograd.grad(expected, policy)
    loss = build_loss(name, beta=0.3, label_smoothing=smoothing)
    found = loss.batch_statistics(policy.detach()[PAIRS], reference[PAIRS], of_pairs(PAIRS))
    outputs = [
        loss(policy, reference, Examples(PAIRS[places], torch.ones(12)), found.at(torch.tensor(places))) for places in packs
    ]
    total = sum(output.losses.sum() for output in outputs) / len(PAIRS)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, policy)[0], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_an_evaluation_sorts_what_it_is_given(name):
    policy, reference = drawn()
    found = build_loss(name, beta=0.3, label_smoothing=0.0)(policy, reference, of_pairs(PAIRS)).losses.mean()
    torch.testing.assert_close(found, sorted_loss(name, policy, reference, 0.0))
