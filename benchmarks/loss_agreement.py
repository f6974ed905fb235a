"""Compare this project's losses with TRL's own code, on random log-probs in float64: losses, gradients and rewards.

    python benchmarks/loss_agreement.py                                         # a table; exit status 1 if they disagree
    python benchmarks/loss_agreement.py --golden tests/golden/trl_losses.json   # also write TRL's numbers, for the tests

TRL implements its formulas in trainer methods. These run unchanged here, on a stand-in for the trainer with the attributes that
they read, and a stand-in for the model that returns the drawn log-probs. They get one pair at a time: some of TRL's terms are
means over the tokens of a whole batch, which for one pair equal this project's means over a response.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from preference_training.losses.base import Examples
from preference_training.losses.objectives import RewardShift
from preference_training.losses.registry import build_loss

COMMAND = "python benchmarks/loss_agreement.py --golden tests/golden/trl_losses.json"
NUM_PAIRS = 12
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Token log-probs of two responses, chosen before rejected, under the policy and the reference."""

    policy: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor]

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each response, [2]."""
        return torch.tensor([len(tokens) for tokens in self.policy])


@dataclass(frozen=True)
class Numbers:
    """A pair's loss, its derivative with respect to each response's log-prob, and rewards (None if not compared)."""

    loss: float
    gradient: list[float]
    rewards: list[float] | None


@dataclass(frozen=True)
class Case:
    """A loss of this project by its keys, TRL's counterpart, and the tolerance.

    compare_rewards is false where TRL logs different rewards. reward_shift is BCO's; TRL has none, which equals 0.
    """

    keys: dict
    theirs: Callable[[Pair], Numbers]
    tolerance: float = 1e-10
    compare_rewards: bool = True
    reward_shift: float | None = None


def draw_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Random pairs with 1 to 7 tokens per response and token log-probs between -3 and -0.01."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return -0.01 - 2.99 * torch.rand(length, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 8, (count, 2), generator=generator).tolist()
    return [Pair(*(tuple(tokens(length) for length in pair) for _ in range(2))) for pair in lengths]


# ---- this project -----------------------------------------------------------------------------------------------------------


def ours(case: Case, pair: Pair) -> Numbers:
    """This project's numbers for a pair."""
    policy, reference = (torch.stack([tokens.sum() for tokens in side]) for side in (pair.policy, pair.reference))
    policy.requires_grad_()
    statistics = None if case.reward_shift is None else RewardShift(case.reward_shift)
    output = build_loss(**case.keys)(policy, reference, Examples(torch.tensor([[0, 1]]), pair.lengths), statistics)
    output.losses.mean().backward()
    rewards = [output.chosen_rewards.item(), output.rejected_rewards.item()]
    return Numbers(output.losses.item(), policy.grad.tolist(), rewards)


# ---- TRL ------------------------------------------------------------------------------------------------------------------


def stand_in(trainer_class: type, **attributes):
    """A TRL trainer without the state that its constructor needs."""
    trainer = object.__new__(trainer_class)
    same = lambda value: value  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    vars(trainer).update({"accelerator": accelerator, "aux_loss_enabled": False} | attributes)
    return trainer


def leaves(pair: Pair) -> list[Tensor]:
    """The policy's token log-probs, with gradients enabled."""
    return [tokens.clone().requires_grad_() for tokens in pair.policy]


def collect_numbers(loss: Tensor, tokens: list[Tensor], rewards: list[float]) -> Numbers:
    """The numbers of a loss. Its derivative must be equal for all tokens of a response: it is the derivative by their sum."""
    gradients = torch.autograd.grad(loss, tokens)
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradient.mean().expand_as(gradient), rtol=1e-6, atol=1e-9)
    return Numbers(loss.item(), [gradient.mean().item() for gradient in gradients], rewards)


def trl_dpo(*loss_types: str, weights: list[float] | None = None, beta: float = 0.1, label_smoothing: float = 0.0) -> Callable:
    """TRL's DPOTrainer with these losses."""

    def of(pair: Pair) -> Numbers:
        tokens = leaves(pair)
        rows = pad_sequence(tokens, batch_first=True)
        # The prompt is a single token.
        mask = torch.nn.functional.pad(pad_sequence([torch.ones_like(side) for side in pair.policy], batch_first=True), (1, 0))
        zeros = torch.zeros_like(rows)
        output = SimpleNamespace(log_probs=rows, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        trainer = stand_in(
            DPOTrainer,
            model=SimpleNamespace(training=True),
            loss_types=list(loss_types),
            loss_weights=weights or [1.0] * len(loss_types),
            beta=beta,
            label_smoothing=label_smoothing,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            use_weighting=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        inputs = {"input_ids": torch.zeros_like(mask).long(), "attention_mask": mask, "completion_mask": mask.long()}
        inputs |= {f"ref_{side}_logps": logps.sum()[None] for side, logps in zip(SIDES, pair.reference, strict=True)}
        loss = trainer._compute_loss(lambda **_: output, inputs, return_outputs=False)
        return collect_numbers(loss, tokens, [trainer._metrics["train"][f"rewards/{side}"][0] for side in SIDES])

    return of


def trl_without_reference(trainer_class: type, **settings) -> Callable:
    """TRL's CPOTrainer or ORPOTrainer, on logits that yield these token log-probs."""

    def of(pair: Pair) -> Numbers:
        tokens = leaves(pair)
        # Token 0 of a vocabulary of two has the given probability; the last position predicts nothing.
        logits = [torch.stack([side, torch.log(-torch.expm1(side))], dim=-1) for side in tokens]
        logits = torch.nn.functional.pad(pad_sequence(logits, batch_first=True), (0, 0, 0, 1))
        batch = {}
        for side, length in zip(SIDES, pair.lengths.tolist(), strict=True):
            ids = torch.zeros(1, length + 1, dtype=torch.int64)
            labels = ids.clone()
            labels[:, 0] = -100
            batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": torch.ones_like(ids), f"{side}_labels": labels}
        trainer = stand_in(trainer_class, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **settings)
        loss, metrics = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)
        return collect_numbers(loss, tokens, [float(metrics[f"rewards/{side}"]) for side in SIDES])

    return of


def cases() -> list[Case]:
    """The losses that both have, at settings where every term has an effect."""
    simpo = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2, "cpo_alpha": 0.0, "alpha": 0.0, "label_smoothing": 0.0}
    robust = {"beta": 0.3, "label_smoothing": 0.2}
    return [
        Case({"name": "dpo", "beta": 0.3}, trl_dpo("sigmoid", beta=0.3)),
        Case({"name": "ipo", "beta": 0.3, "length_normalised": True}, trl_dpo("ipo", beta=0.3)),
        Case({"name": "hinge", "beta": 0.3}, trl_dpo("hinge", beta=0.3)),
        Case({"name": "robust"} | robust, trl_dpo("robust", **robust)),
        Case({"name": "rpo", "beta": 0.3, "alpha": 0.7}, trl_dpo("sigmoid", "sft", weights=[1.0, 0.7], beta=0.3)),
        Case({"name": "dpo_norm", "beta": 5.0}, trl_dpo("sigmoid_norm", beta=5.0), compare_rewards=False),
        Case({"name": "bco", "beta": 0.3}, trl_dpo("bco_pair", beta=0.3), reward_shift=0.0),
        Case({"name": "simpo", "beta": 2.0, "gamma": 1.2}, trl_without_reference(CPOTrainer, **simpo)),
        # TRL computes the odds in float32.
        Case({"name": "orpo", "beta": 0.3}, trl_without_reference(ORPOTrainer, beta=0.3), tolerance=1e-5),
    ]


# ---- comparison -------------------------------------------------------------------------------------------------------------


def furthest(found: list[float], expected: list[float]) -> float:
    """The largest difference, relative to the larger of the expected number and 1."""
    return max(abs(one - other) / max(1.0, abs(other)) for one, other in zip(found, expected, strict=True))


def compare(case: Case, pairs: list[Pair]) -> tuple[dict[str, float], list[Numbers]]:
    """The differences in losses, gradients and rewards, and TRL's numbers for each pair."""
    theirs = [case.theirs(pair) for pair in pairs]
    mine = [ours(case, pair) for pair in pairs]
    apart = {
        "loss": furthest([one.loss for one in mine], [other.loss for other in theirs]),
        "gradient": max(furthest(one.gradient, other.gradient) for one, other in zip(mine, theirs, strict=True)),
    }
    if case.compare_rewards:
        apart["rewards"] = max(furthest(one.rewards, other.rewards) for one, other in zip(mine, theirs, strict=True))
    return apart, theirs


def golden(pairs: list[Pair], compared: list[tuple[Case, list[Numbers]]]) -> dict:
    """TRL's numbers, with the log-probs that they were computed from."""

    def expected(case: Case, numbers: list[Numbers]) -> dict:
        kept = {"losses": [each.loss for each in numbers], "gradients": [each.gradient for each in numbers]}
        return kept | ({"rewards": [each.rewards for each in numbers]} if case.compare_rewards else {})

    return {
        "command": COMMAND,
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
        "pairs": [
            {
                "policy": [tokens.sum().item() for tokens in pair.policy],
                "reference": [tokens.sum().item() for tokens in pair.reference],
                "lengths": pair.lengths.tolist(),
            }
            for pair in pairs
        ],
        "losses": [
            {
                "keys": case.keys,
                "tolerance": case.tolerance,
                "reward_shift": case.reward_shift,
                "expect": expected(case, numbers),
            }
            for case, numbers in compared
        ],
    }


def main() -> int:
    """Print the table; returns 1 if any difference exceeds its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, help="also write TRL's numbers to this file")
    arguments = parser.parse_args()
    pairs, compared, agree = draw_pairs(NUM_PAIRS), [], True
    print(f"{'loss':10}{'values':>12}{'gradients':>12}{'rewards':>12}   tolerance")
    for case in cases():
        apart, theirs = compare(case, pairs)
        compared.append((case, theirs))
        agrees = max(apart.values()) <= case.tolerance
        agree &= agrees
        numbers = "".join(f"{apart[name]:12.1e}" if name in apart else f"{'-':>12}" for name in ("loss", "gradient", "rewards"))
        print(f"{case.keys['name']:10}{numbers}   {case.tolerance:.0e}{'' if agrees else '   DISAGREE'}")
    if arguments.golden:
        arguments.golden.write_text(json.dumps(golden(pairs, compared), indent=1) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
