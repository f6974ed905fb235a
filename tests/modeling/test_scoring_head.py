"""Log-probs from a head whose logits exist in chunks: values and gradients of the whole, in a bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from preference_training.modeling.prefix_sharing import scoring_head
from preference_training.modeling.prefix_sharing.scoring_head import ChunkedScores, score_tokens

SCORED, HIDDEN, VOCABULARY = 23, 8, 50


def head(dtype: torch.dtype, has_bias: bool, is_frozen: bool):
    """Hidden states, weight, bias and token ids of a head."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(SCORED, HIDDEN, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw).to(dtype).requires_grad_(not is_frozen)
    bias = torch.randn(VOCABULARY, generator=draw).to(dtype).requires_grad_(not is_frozen) if has_bias else None
    return states, weight, bias, torch.randint(0, VOCABULARY, (SCORED,), generator=draw)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("collision", [False, True])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_chunks_have_the_values_and_gradients_of_the_whole(monkeypatch, dtype, autocast, is_frozen, has_bias, collision):
    states, weight, bias, ids = head(dtype, has_bias, is_frozen)
    inputs = [each for each in (states, weight, bias) if each is not None and each.requires_grad]
    factors = torch.linspace(-1, 1, SCORED * (1 + collision)).view(SCORED, -1)
    # Chunks of five tokens.
    monkeypatch.setattr(scoring_head, "MAX_LOGITS_BYTES", 5 * 8 * VOCABULARY)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = ChunkedScores.apply(states, weight, bias, ids, collision, True)
        expected = score_tokens(F.linear(states, weight, bias), ids, collision)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # Gradients of bfloat16 logits are rounded in either order.
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 and not autocast else {"rtol": 3e-2, "atol": 6e-2}
    for one, other in zip(*(torch.autograd.grad((each * factors).sum(), inputs) for each in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **close)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that is computed."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("is_frozen", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch, is_frozen):
    states, weight, bias, ids = head(torch.float32, True, is_frozen)
    monkeypatch.setattr(scoring_head, "MAX_LOGITS_BYTES", 9 * 8 * VOCABULARY)
    with LargestTensor() as largest:
        ChunkedScores.apply(states, weight, bias, ids, False, True).sum().backward()
    assert largest.elements == max(9 * VOCABULARY, VOCABULARY * HIDDEN)


def test_a_frozen_head_is_not_computed_again_in_the_backward_pass(monkeypatch):
    states, weight, _, ids = head(torch.float32, False, True)
    monkeypatch.setattr(scoring_head, "MAX_LOGITS_BYTES", 9 * 8 * VOCABULARY)
    values = ChunkedScores.apply(states, weight, None, ids, False, True)
    with LargestTensor() as largest:
        values.sum().backward()
    assert largest.elements == SCORED * HIDDEN
