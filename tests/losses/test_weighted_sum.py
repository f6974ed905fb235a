"""Weighted sums of losses, averages over tokens, and weights of examples."""

import pytest
import torch

from preference_training.core.errors import UserError
from preference_training.losses.base import Examples, LossOutput
from preference_training.losses.registry import build_loss
from tests.support.losses import f64, of_pairs, softplus, statistics_of

POLICY, REFERENCE = f64(-6, -8, -2, -3), f64(-5, -5, -4, -1)
EXAMPLES = Examples(torch.tensor([[0, 1], [2, 3]]), torch.tensor([3, 4, 1, 2]), mean_length=2.0)


def mixed(*parts: dict):
    return build_loss("mix", parts=list(parts))


def test_a_mix_is_the_weighted_sum_of_its_parts():
    output = mixed({"name": "dpo", "beta": 0.5, "weight": 2}, {"name": "sft", "weight": 0.25})(POLICY, REFERENCE, EXAMPLES)
    # Margins -1 + 3 = 2 and 2 + 2 = 4 at beta 0.5; minus the log-probs of the chosen responses, 6 and 2.
    assert output.losses.tolist() == pytest.approx([2 * softplus(-1) + 6 / 4, 2 * softplus(-2) + 2 / 4], rel=1e-12)
    assert output.chosen_rewards.tolist() == [-0.5, 1]


def test_a_mix_of_dpo_and_sft_over_tokens_is_rpo_over_tokens():
    parts = {"name": "dpo", "beta": 0.5}, {"name": "sft", "weight": 0.7, "average": "tokens"}
    rpo = build_loss("rpo", beta=0.5, alpha=0.7, average="tokens")
    torch.testing.assert_close(mixed(*parts)(POLICY, REFERENCE, EXAMPLES).losses, rpo(POLICY, REFERENCE, EXAMPLES).losses)


def test_a_mix_gives_each_part_its_statistics_and_keeps_its_state():
    mix, bco = mixed({"name": "dpo"}, {"name": "bco", "beta": 0.5}), build_loss("bco", beta=0.5)
    assert mix.needs_batch_statistics and mix.evaluation_depends_on == "a running mean of training's rewards"
    ratios = (POLICY - REFERENCE).view(2, 2)
    found, expected = statistics_of(mix, ratios), statistics_of(bco, ratios)
    output, of_bco = mix(POLICY, REFERENCE, EXAMPLES, found), bco(POLICY, REFERENCE, EXAMPLES, expected)
    torch.testing.assert_close(output.losses, build_loss("dpo")(POLICY, REFERENCE, EXAMPLES).losses + of_bco.losses)
    assert output.statistics == of_bco.statistics
    other = mixed({"name": "dpo"}, {"name": "bco", "beta": 0.5})
    other.load_state_dict(mix.state_dict())
    assert other.state_dict() == mix.state_dict() == {"parts": [{}, {"shift": bco.shift}]}


def test_a_mix_needs_a_reference_and_margins_where_a_part_does():
    assert not mixed({"name": "simpo"}, {"name": "sft"}).needs_reference
    assert mixed({"name": "simpo"}, {"name": "dpo"}).needs_reference
    assert mixed({"name": "dpo"}, {"name": "odpo"}).margin_use == "positive"
    assert mixed({"name": "dpo"}, {"name": "odpo", "scale": "linear"}).margin_use == "required"
    assert mixed({"name": "dpo"}, {"name": "ld_dpo"}).reads_tokens


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([], r"loss\.parts: found \[\], expected a list"),
        ("dpo", r"loss\.parts: found 'dpo', expected a list"),
        (["dpo"], r"loss\.parts\[0\]: found 'dpo', expected \{name: LOSS"),
        ([{"name": "dppo"}], r"loss\.parts\[0\]\.name: no loss 'dppo' that can be a part; did you mean dpo"),
        ([{"name": "dpo"}, {"name": "sft", "weight": 0}], r"loss\.parts\[1\]\.weight: found 0, expected a number above 0"),
        ([{"name": "dpo", "bta": 0.1}], r"loss\.parts\[0\]\.bta: loss=dpo has no such key; did you mean beta\?"),
        ([{"name": "dpo", "beta": -1}], r"loss\.parts\[0\]\.beta: found -1, expected a number above 0"),
        ([{"name": "sft", "average": "token"}], r"loss\.parts\[0\]\.average: found 'token', expected responses or tokens"),
        ([{"name": "dpo", "label_smoothing": 2}], r"^loss\.parts\[0\]\.label_smoothing: found 2"),
        ([{"name": "sft"}], r"loss\.parts: found no loss of pairs"),
        ([{"name": "dpo"}, {"name": "kto"}], r"loss\.parts\[1\]\.name: found kto, expected a loss of pairs"),
        ([{"name": "tr_dpo"}], r"loss\.parts\[0\]\.name: found tr_dpo, expected a loss of pairs with a frozen reference"),
    ],
)
def test_what_is_no_mix_is_refused(parts, told):
    with pytest.raises(UserError, match=told):
        build_loss("mix", parts=parts)


# ---- averages -------------------------------------------------------------------------------------------------------------


def test_over_tokens_the_mean_loss_is_the_mean_over_the_tokens_of_the_whole_batch():
    # Responses of 4 and 2 tokens with 6 and 1 nats: 7 nats over 6 tokens, a mean length of 3.
    loss = build_loss("sft", average="tokens")
    whole = loss(f64(-6, -1), None, Examples(torch.tensor([[0], [1]]), torch.tensor([4, 2]), mean_length=3.0)).losses
    assert whole.mean().item() == pytest.approx(7 / 6)
    # However it is cut: each part knows the mean length of all.
    parts = [
        loss(f64(nats), None, Examples(torch.tensor([[0]]), torch.tensor([length]), 3.0)).losses
        for nats, length in ((-6, 4), (-1, 2))
    ]
    assert torch.cat(parts).tolist() == whole.tolist()


@pytest.mark.parametrize("name", ["rpo", "orpo"])
def test_the_likelihood_term_over_tokens_is_that_of_all_chosen_tokens(name):
    keys = {"beta": 0.5} | ({"alpha": 1.0} if name == "rpo" else {})
    by_response, by_token = (
        build_loss(name, **keys, average=average)(POLICY, REFERENCE, EXAMPLES).losses.mean()
        for average in ("responses", "tokens")
    )
    # (6/3 + 2/1) / 2 = 2 nats; (6 + 2) / (3 + 1) = 2 as well by chance: with another length they differ.
    assert by_response.item() == pytest.approx(by_token.item())
    longer = Examples(EXAMPLES.members, torch.tensor([3, 4, 5, 2]), mean_length=4.0)
    by_response, by_token = (
        build_loss(name, **keys, average=average)(POLICY, REFERENCE, longer).losses.mean()
        for average in ("responses", "tokens")
    )
    assert (by_token - by_response).item() == pytest.approx((6 + 2) / (3 + 5) - (6 / 3 + 2 / 5) / 2)


# ---- weights --------------------------------------------------------------------------------------------------------------


def test_weights_multiply_the_losses_of_their_examples_and_nothing_else():
    output = build_loss("dpo", beta=0.5)(POLICY, REFERENCE, EXAMPLES)
    weighted = output.weighted(f64(0, 3))
    assert weighted.losses.tolist() == [0, 3 * output.losses[1].item()]
    assert torch.equal(weighted.chosen_rewards, output.chosen_rewards)
    assert output.weighted(None) is output


def test_statistics_of_an_output_stay_where_losses_are_weighted():
    assert LossOutput(f64(1), statistics={"x": 1.0}).weighted(f64(2)).statistics == {"x": 1.0}


def test_pairs_are_pairs():
    with pytest.raises(AssertionError, match="no pairs"):
        _ = Examples(torch.tensor([[0], [1]]), torch.ones(2)).pairs
    assert of_pairs(torch.tensor([[0, 1]])).pairs.tolist() == [[0, 1]]
