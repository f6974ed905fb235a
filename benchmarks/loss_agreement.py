"""Compare this project's losses with TRL's own code, on random log-probs in float64: losses, gradients and rewards.

    python benchmarks/loss_agreement.py                                         # a table; exit status 1 if they disagree
    python benchmarks/loss_agreement.py --golden tests/golden/trl_losses.json   # also write TRL's numbers, for the tests

TRL implements its formulas in trainer methods. These run unchanged here, on a stand-in for the trainer with the attributes that
they read, and a stand-in for the model that returns the drawn log-probs. They get one pair at a time where a loss is one of
single pairs, and all at once where it is one of a whole batch: sorted (AOT), averaged over tokens, or with a KL term (KTO).
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from preference_training.losses.base import Examples, TokenLogps
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
    # Logarithms of the sum of squared probabilities at each token, for WPO.
    collision: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Numbers:
    """The loss of one pair or of a batch, its derivative by each token's log-prob, and mean rewards."""

    loss: float
    gradient: list[float]
    rewards: list[float]


@dataclass(frozen=True)
class Case:
    """A loss of this project by its keys, TRL's counterpart, and the tolerance.

    compare_rewards is false where TRL logs different rewards. reward_shift is BCO's; TRL has none, which equals 0. together:
    all pairs are one batch. labeled: of each pair the first response counts as desirable, the second as undesirable.
    """

    keys: dict
    theirs: Callable[[list[Pair]], Numbers]
    tolerance: float = 1e-10
    compare_rewards: bool = True
    reward_shift: float | None = None
    together: bool = False
    labeled: bool = False

    def batches(self, pairs: list[Pair]) -> list[list[Pair]]:
        """The pairs as TRL gets them."""
        return [pairs] if self.together else [[pair] for pair in pairs]


def draw_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Random pairs with 1 to 7 tokens per response and token log-probs between -3 and -0.01."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return -0.01 - 2.99 * torch.rand(length, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 8, (count, 2), generator=generator).tolist()
    return [Pair(*(tuple(tokens(length) for length in pair) for _ in range(3))) for pair in lengths]


# ---- this project -----------------------------------------------------------------------------------------------------------


def examples_of(case: Case, pairs: list[Pair], tokens: list[Tensor]) -> Examples:
    """The pairs as this project's losses see them; `tokens` are the policy's, response by response."""
    lengths = torch.tensor([len(each) for each in tokens])
    responses = torch.arange(len(tokens)).repeat_interleave(lengths)
    members = torch.arange(len(tokens)).view(-1, 2)
    labels = None
    if case.labeled:
        # TRL's mismatched response of an example is that of the one before it.
        members = torch.stack([torch.arange(len(tokens)), torch.arange(len(tokens)).roll(1)], dim=1)
        labels = torch.tensor([True, False] * len(pairs))
    collision, reference = (
        torch.cat([side for pair in pairs for side in getattr(pair, name)]) for name in ("collision", "reference")
    )
    return Examples(
        members,
        lengths,
        mean_length=lengths[members[:, 0]].double().mean().item(),
        labels=labels,
        policy_tokens=TokenLogps(torch.cat(tokens), responses, collision),
        reference_tokens=TokenLogps(reference, responses),
    )


def ours(case: Case, pairs: list[Pair]) -> Numbers:
    """This project's numbers for a batch of pairs."""
    tokens = leaves(pairs)
    policy = torch.stack([each.sum() for each in tokens])
    reference = torch.stack([side.sum() for pair in pairs for side in pair.reference])
    examples = examples_of(case, pairs, tokens)
    statistics = None if case.reward_shift is None else RewardShift(case.reward_shift)
    output = build_loss(**case.keys)(policy, reference, examples, statistics)
    loss = output.losses.mean()
    gradients = torch.autograd.grad(loss, tokens)
    rewards = [output.chosen_rewards.nanmean().item(), output.rejected_rewards.nanmean().item()]
    return Numbers(loss.item(), torch.cat(gradients).tolist(), rewards)


# ---- TRL ------------------------------------------------------------------------------------------------------------------


def stand_in(trainer_class: type, **attributes):
    """A TRL trainer without the state that its constructor needs."""
    trainer = object.__new__(trainer_class)
    same = lambda value: value  # noqa: E731
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same, autocast=nullcontext
    )
    vars(trainer).update({"accelerator": accelerator, "aux_loss_enabled": False} | attributes)
    return trainer


def leaves(pairs: list[Pair]) -> list[Tensor]:
    """The policy's token log-probs, response by response, with gradients enabled."""
    return [tokens.clone().requires_grad_() for pair in pairs for tokens in pair.policy]


def collect_numbers(loss: Tensor, tokens: list[Tensor], rewards: list[float]) -> Numbers:
    """The numbers of a loss."""
    return Numbers(loss.item(), torch.cat(torch.autograd.grad(loss, tokens)).tolist(), rewards)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of tokens padded on the right, and the mask of completions, behind a prompt of a single token."""
    mask = torch.nn.functional.pad(pad_sequence([torch.ones_like(row) for row in rows], batch_first=True), (1, 0))
    return pad_sequence(rows, batch_first=True), mask


def model_output(rows: Tensor, **more: Tensor) -> SimpleNamespace:
    """What TRL's models return."""
    zeros = torch.zeros_like(rows)
    return SimpleNamespace(log_probs=rows, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), **more)


METRICS = {"_total_train_tokens": 0, "_tp_size": 1, "precompute_ref_logps": True}


def trl_dpo(*loss_types: str, weights: list[float] | None = None, dtype: torch.dtype = torch.float64, **settings) -> Callable:
    """TRL's DPOTrainer with these losses, computed in `dtype`."""

    def of(pairs: list[Pair]) -> Numbers:
        tokens = leaves(pairs)
        # Chosen before rejected.
        rows, mask = padded(tokens[::2] + tokens[1::2])
        collision, _ = padded([pair.collision[side] for side in (0, 1) for pair in pairs])
        defaults = {
            "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
            "beta": 0.1,
            "label_smoothing": 0.0,
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
        }
        trainer = stand_in(
            DPOTrainer,
            model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
            ref_model=True,
            loss_types=list(loss_types),
            loss_weights=weights or [1.0] * len(loss_types),
            _metrics=defaultdict(lambda: defaultdict(list)),
            **METRICS | defaults | {"use_weighting": False} | settings,
        )
        inputs = {"input_ids": torch.zeros_like(mask).long(), "attention_mask": mask, "completion_mask": mask.long()}
        reference, _ = padded([pair.reference[side] for side in (0, 1) for pair in pairs])
        known = trainer.compute_ref_log_probs(lambda **_: model_output(reference.to(dtype)), inputs)
        inputs |= {f"ref_{side}_logps": logps for side, logps in zip(SIDES, known, strict=True)}
        output = model_output(rows.to(dtype), log_sum_sq_probs=collision)
        loss = trainer._compute_loss(lambda **_: output, inputs, return_outputs=False)
        return collect_numbers(loss, tokens, [trainer._metrics["train"][f"rewards/{side}"][0] for side in SIDES])

    return of


def trl_kto(**settings) -> Callable:
    """TRL's KTOTrainer: every response is an example, the first of each pair desirable."""

    def of(pairs: list[Pair]) -> Numbers:
        tokens = leaves(pairs)
        rows, mask = padded(tokens)
        known = torch.stack([side.sum() for pair in pairs for side in pair.reference])
        # Mismatched: the response of the example before. Only the sums of its tokens count.
        mismatched = rows.roll(1, 0).detach()
        outputs = iter([model_output(mismatched), model_output(rows)])
        trainer = stand_in(
            KTOTrainer,
            model=SimpleNamespace(training=True),
            loss_type="kto",
            calculate_KL=True,
            _metrics=defaultdict(lambda: defaultdict(list)),
            **METRICS | settings,
        )
        batch = {"input_ids": torch.zeros_like(mask).long(), "attention_mask": mask, "completion_mask": mask.long()}
        batch |= {f"KL_{name}": value for name, value in batch.items()}
        batch |= {"label": torch.tensor([True, False] * len(pairs)), "ref_logps": known, "ref_KL_logps": known.roll(1)}
        loss = trainer._compute_loss(lambda **_: next(outputs), batch, return_outputs=False)
        return collect_numbers(loss, tokens, [trainer._metrics["train"][f"rewards/{side}"][0] for side in SIDES])

    return of


def trl_without_reference(trainer_class: type, **settings) -> Callable:
    """TRL's CPOTrainer or ORPOTrainer, on logits that yield these token log-probs."""

    def of(pairs: list[Pair]) -> Numbers:
        [pair], tokens = pairs, leaves(pairs)
        # Token 0 of a vocabulary of two has the given probability; the last position predicts nothing.
        logits = [torch.stack([side, torch.log(-torch.expm1(side))], dim=-1) for side in tokens]
        logits = torch.nn.functional.pad(pad_sequence(logits, batch_first=True), (0, 0, 0, 1))
        batch = {}
        for side, length in zip(SIDES, map(len, pair.policy), strict=True):
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
    smoothed = {"beta": 0.3, "label_smoothing": 0.2}
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    divergences = {"forward_kl": "forward_kl", "js": "js_divergence"}
    mix = [{"name": "dpo", "beta": 0.3, "weight": 0.8}, {"name": "exo_pair", "weight": 0.2} | smoothed]
    return [
        Case({"name": "dpo", "beta": 0.3}, trl_dpo("sigmoid", beta=0.3)),
        Case({"name": "ipo", "beta": 0.3, "length_normalised": True}, trl_dpo("ipo", beta=0.3)),
        Case({"name": "hinge", "beta": 0.3}, trl_dpo("hinge", beta=0.3)),
        Case({"name": "robust"} | smoothed, trl_dpo("robust", **smoothed)),
        Case({"name": "rpo", "beta": 0.3, "alpha": 0.7}, trl_dpo("sigmoid", "sft", weights=[1.0, 0.7], beta=0.3)),
        Case({"name": "dpo_norm", "beta": 5.0}, trl_dpo("sigmoid_norm", beta=5.0), compare_rewards=False),
        Case({"name": "bco", "beta": 0.3}, trl_dpo("bco_pair", beta=0.3), reward_shift=0.0),
        Case({"name": "simpo", "beta": 2.0, "gamma": 1.2}, trl_without_reference(CPOTrainer, **simpo)),
        # TRL computes the odds in float32.
        Case({"name": "orpo", "beta": 0.3}, trl_without_reference(ORPOTrainer, beta=0.3), tolerance=1e-5),
        Case({"name": "exo_pair"} | smoothed, trl_dpo("exo_pair", **smoothed), tolerance=1e-7),
        Case({"name": "nca_pair", "beta": 0.3}, trl_dpo("nca_pair", beta=0.3)),
        Case({"name": "sppo_hard", "beta": 0.3}, trl_dpo("sppo_hard", beta=0.3)),
        Case({"name": "apo_zero", "beta": 0.3}, trl_dpo("apo_zero", beta=0.3)),
        Case({"name": "apo_down", "beta": 0.3}, trl_dpo("apo_down", beta=0.3)),
        Case(
            {"name": "discopop", "beta": 0.3, "temperature": 0.5},
            trl_dpo("discopop", beta=0.3, args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.5)),
        ),
        *(
            Case(
                {"name": "f_dpo", "beta": 0.3, "f_divergence": mine, "f_alpha": 1.0},
                trl_dpo("sigmoid", beta=0.3, f_divergence_type=theirs),
            )
            for mine, theirs in divergences.items()
        ),
        # TRL computes its powers in float32.
        Case(
            {"name": "f_dpo", "beta": 0.3, "f_divergence": "alpha", "f_alpha": 0.4},
            trl_dpo(
                "sigmoid", beta=0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.4, dtype=torch.float32
            ),
            tolerance=1e-5,
        ),
        Case({"name": "ld_dpo", "beta": 0.3, "alpha": 0.4}, trl_dpo("sigmoid", beta=0.3, ld_alpha=0.4)),
        Case({"name": "wpo", "beta": 0.3}, trl_dpo("sigmoid", beta=0.3, use_weighting=True)),
        Case({"name": "aot"} | smoothed, trl_dpo("aot", **smoothed), together=True),
        Case({"name": "aot_unpaired"} | smoothed, trl_dpo("aot_unpaired", **smoothed), together=True),
        Case(
            {"name": "rpo", "beta": 0.3, "alpha": 0.7, "average": "tokens"},
            trl_dpo("sigmoid", "sft", weights=[1.0, 0.7], beta=0.3),
            together=True,
        ),
        Case({"name": "mix", "parts": mix}, trl_dpo("sigmoid", "exo_pair", weights=[0.8, 0.2], **smoothed), tolerance=1e-7),
        Case({"name": "kto", "beta": 0.3} | weights, trl_kto(beta=0.3, **weights), together=True, labeled=True),
    ]


# ---- comparison -------------------------------------------------------------------------------------------------------------


def furthest(found: list[float], expected: list[float]) -> float:
    """The largest difference, relative to the larger of the expected number and 1."""
    return max(abs(one - other) / max(1.0, abs(other)) for one, other in zip(found, expected, strict=True))


def compare(case: Case, pairs: list[Pair]) -> tuple[dict[str, float], list[Numbers]]:
    """The differences in losses, gradients and rewards, and TRL's numbers for each batch."""
    theirs = [case.theirs(batch) for batch in case.batches(pairs)]
    mine = [ours(case, batch) for batch in case.batches(pairs)]
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

    names = ("policy", "reference", "collision")
    return {
        "command": COMMAND,
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
        "pairs": [{name: [tokens.tolist() for tokens in getattr(pair, name)] for name in names} for pair in pairs],
        "losses": [
            {
                "keys": case.keys,
                "tolerance": case.tolerance,
                "reward_shift": case.reward_shift,
                "together": case.together,
                "labeled": case.labeled,
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
    print(f"{'loss':20}{'values':>12}{'gradients':>12}{'rewards':>12}   tolerance")
    for case in cases():
        apart, theirs = compare(case, pairs)
        compared.append((case, theirs))
        agrees = max(apart.values()) <= case.tolerance
        agree &= agrees
        numbers = "".join(f"{apart[name]:12.1e}" if name in apart else f"{'-':>12}" for name in ("loss", "gradient", "rewards"))
        variant = " ".join(str(case.keys[key]) for key in ("name", "f_divergence", "average") if key in case.keys)
        print(f"{variant:20}{numbers}   {case.tolerance:.0e}{'' if agrees else '   DISAGREE'}")
    if arguments.golden:
        arguments.golden.write_text(json.dumps(golden(pairs, compared), indent=1) + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
