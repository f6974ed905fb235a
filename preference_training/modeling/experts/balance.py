"""The load-balancing loss of mixtures of experts, and numbers of the balance, over a whole batch.

    L = E * sum over experts e of f_e * P_e          (Fedus et al. 2021, "Switch Transformers", eq. 4-6)

f_e: how many of a token's K choices fall on expert e, averaged over tokens and layers; P_e: the router's probability of e,
averaged alike. This is the loss of transformers' `load_balancing_loss_func`: K where the choices are balanced, up to E. Routers
that score by a sigmoid (DeepSeek-V3) have for a probability the score's share of the token's scores (DeepSeek-AI 2024,
"DeepSeek-V3 Technical Report", eq. 17-20).

Both means are over all rows of the batch, on all ranks: a token that several rows share is computed once, and counts as often
as it stands in a row, as if every row were computed by itself. Since L is a product of two means, the sum of the packs' losses
would depend on the packs. But f has no gradient: with the f of the whole batch, L is linear in what a pack adds to P, and the
sum of the packs' gradients is the gradient of L. For a batch of more than one pack this f takes a forward without gradient.

Shapes: N computed tokens of one forward, L routers, E experts, T packed tokens of a batch.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from preference_training.batching.packing import PackedBatch
from preference_training.core.errors import UserError
from preference_training.core.metric_names import (
    AUX_LOSS,
    DEAD_EXPERTS,
    MAX_LOAD,
    ROUTING_ENTROPY,
)
from preference_training.core.process_group import WHOLE_PACKS, Ranks
from preference_training.modeling.experts.routers import Routed, Router, RouterRecorder, find_routers, num_experts
from preference_training.modeling.logprobs import rows_of_forwards
from preference_training.modeling.state import compute_device


@dataclass(frozen=True)
class Tally:
    """Sums over tokens: counts [L, E], choices of each expert; scores [L, E], its probabilities; entropy [L]; tokens []."""

    counts: Tensor
    scores: Tensor
    entropy: Tensor
    tokens: Tensor

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(a + b for a, b in zip(self.tensors, other.tensors, strict=True)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return self.counts, self.scores, self.entropy, self.tokens

    def over(self, ranks: Ranks) -> "Tally":
        """The sums over all processes that compute parts of a batch."""
        flat = torch.cat([tensor.flatten() for tensor in self.tensors])
        if ranks.context.size > 1:
            flat = flat.clone()
            torch.distributed.all_reduce(flat, group=ranks.context.group)
        parts = ranks.all_reduce_sum(flat).split([tensor.numel() for tensor in self.tensors])
        return Tally(*(part.view_as(like) for part, like in zip(parts, self.tensors, strict=True)))

    @property
    def chosen_share(self) -> Tensor:
        """f: [E], choices of each expert by token and layer."""
        return self.counts.sum(0) / (self.tokens * len(self.counts)).clamp(min=1)

    def aux_loss(self) -> Tensor:
        """The load-balancing loss, a scalar."""
        mean = self.scores.sum(0) / (self.tokens * len(self.counts)).clamp(min=1)
        return self.counts.shape[1] * (self.chosen_share * mean).sum()


class ExpertBalance:
    """What a training step knows of a policy's routers; nothing of a model without.

    coefficient: of the load-balancing loss, 0 for none.
    """

    def __init__(self, policy: nn.Module, ranks: Ranks, coefficient: float | None):
        """Raises UserError where a coefficient asks for what the model does not have."""
        self.policy, self.ranks, self.coefficient = policy, ranks, coefficient or 0.0
        self.recorder = RouterRecorder(find_routers(policy))
        self.labels = labels(self.routers)
        if self.coefficient and not self.routers:
            raise UserError(
                f"model.router_aux_loss: found {coefficient}, but {type(policy).__name__} has no routers that are known here. "
                "Set it to null."
            )
        self.begin()

    @property
    def routers(self) -> list[Router]:
        """The routers, in the order of the layers."""
        return self.recorder.routers

    def begin(self, packs: Sequence[PackedBatch] = (), compute: Callable[[PackedBatch], object] | None = None) -> None:
        """Begin a batch of this rank's packs. compute: a forward of a pack, in what the recorder records.

        Of several packs the loss needs f before the first backward pass: they are computed once more, without gradient.
        """
        self.total: Tally | None = None
        self.chosen_share: Tensor | None = None
        self.tokens: Tensor | None = None
        self.own: list[tuple[Router, Routed, Tensor]] = []
        # Ranks have equally many packs, and so as many collectives.
        self.has_one_pack = len(packs) == 1
        if self.coefficient and compute is not None and not self.has_one_pack:
            with torch.no_grad():
                for pack in packs:
                    moved = pack.to(compute_device(self.policy))
                    compute(moved)
                    self.observe(moved)
            self._fix_share()
            self.total, self.own = None, []

    def _fix_share(self) -> None:
        tally = (self.total or self._nothing()).over(self.ranks)
        self.chosen_share, self.tokens = tally.chosen_share, tally.tokens

    def observe(self, pack: PackedBatch) -> None:
        """Count what the routers gave in the forward of a pack that was just made."""
        if not self.routers:
            return
        forwards = self.recorder.take()
        weights = token_weights(self.policy, pack)
        self.own = [
            (router, routed, weight.to(routed.logits.device))
            for router, calls in zip(self.routers, forwards, strict=True)
            # Further forwards keep ranks in lockstep.
            for routed, weight in zip(calls, weights, strict=False)
        ]
        if self.own:
            with torch.no_grad():
                tally = self._tally(pack)
            self.total = tally if self.total is None else self.total + tally
        if not self.coefficient:
            # The logits would keep the pass's tensors.
            self.own = []
        elif self.has_one_pack:
            self._fix_share()

    def _nothing(self) -> Tally:
        """The tally of no tokens, of a rank that has run out of memory."""
        layers, size, device = len(self.routers), num_experts(self.policy.config) or 1, compute_device(self.policy)
        return Tally(*(torch.zeros(shape, device=device) for shape in ((layers, size), (layers, size), (layers,), ())))

    def _tally(self, pack: PackedBatch) -> Tally:
        device = pack.input_ids.device
        rows: dict[str, list[Tensor]] = {}
        for router, routed, weight in self.own:
            probabilities = routing_probabilities(routed.logits, router.scores_by_sigmoid)
            counts = weight.new_zeros(routed.logits.shape[1])
            counts.index_add_(0, routed.experts.flatten(), weight.repeat_interleave(routed.experts.shape[1]))
            entropy = -(torch.xlogy(probabilities, probabilities).sum(1) * weight).sum()
            sums = torch.cat([counts, weight @ probabilities, entropy[None], weight.sum()[None]]).to(device)
            rows.setdefault(router.name, []).append(sums)
        found = torch.stack([torch.stack(calls).sum(0) for calls in rows.values()])
        size = (found.shape[1] - 2) // 2
        return Tally(found[:, :size], found[:, size : 2 * size], found[:, -2], found[0, -1])

    def loss_of_pack(self) -> Tensor | None:
        """The part of a batch's loss that is the load-balancing loss of the pack observed last; None where there is none.

        A scalar with gradient, for the sum of all packs' losses, which ranks average.
        """
        own, self.own = self.own, []
        if not self.coefficient or self.chosen_share is None or not own:
            return None
        share = self.chosen_share * len(self.chosen_share) / (self.tokens * len(self.routers)).clamp(min=1)
        parts = [
            (weight @ routing_probabilities(routed.logits, router.scores_by_sigmoid) @ share.to(weight.device)).to(share.device)
            for router, routed, weight in own
        ]
        return torch.stack(parts).sum() * (self.coefficient * self.ranks.size * self.ranks.context.size)

    def metrics(self) -> dict[str, float]:
        """The numbers of the batch, over all ranks; empty for a model without routers."""
        if not self.routers:
            return {}
        tally = (self.total or self._nothing()).over(self.ranks)
        counts = tally.counts.double().cpu()
        entropy = (tally.entropy / (tally.tokens.clamp(min=1) * math.log(counts.shape[1]))).tolist()
        loads = (counts.amax(1) / counts.mean(1).clamp(min=1e-9)).tolist()
        dead = (counts == 0).sum(1).tolist()
        found = {
            AUX_LOSS: float(tally.aux_loss()),
            MAX_LOAD: max(loads),
            ROUTING_ENTROPY: sum(entropy) / len(entropy),
            DEAD_EXPERTS: float(sum(dead)),
        }
        for label, *numbers in zip(self.labels, loads, entropy, dead, strict=True):
            names = (MAX_LOAD, ROUTING_ENTROPY, DEAD_EXPERTS)
            found |= {f"{name}/{label}": float(number) for name, number in zip(names, numbers, strict=True)}
        return found


def labels(routers: Sequence[Router]) -> list[str]:
    """What the routers are called in metrics: the numbers of their layers, or, where a layer has several, their own."""
    numbers = [re.search(r"\.(\d+)\.", f".{router.name}.") for router in routers]
    found = [number.group(1) if number else "" for number in numbers]
    return found if len(set(found)) == len(found) and all(found) else [str(number) for number in range(len(routers))]


def routing_probabilities(logits: Tensor, by_sigmoid: bool) -> Tensor:
    """What a router's logits [N, E] say of each expert: float32, of each token with the sum 1."""
    if not by_sigmoid:
        return logits.float().softmax(-1)
    scores = logits.float().sigmoid()
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)


def token_weights(model: nn.Module, pack: PackedBatch) -> list[Tensor]:
    """In how many rows of examples each computed token stands, for each forward of a pack: [N] float32; 0 for padding."""
    times = _times_of_responses(pack)
    rows = rows_of_forwards(model, pack)
    if rows is None:
        counts = _times_of_tokens(pack, times)
        context = getattr(model, "context", WHOLE_PACKS)
        if context.size > 1:
            with unset_fake_temporarily():
                index = pack.on_host.part(context.rank, context.size).index.numpy()
            counts = numpy.pad(counts, (0, int(index.max()) + 1))[index]
        return [torch.from_numpy(counts).to(pack.input_ids.device)]
    found = []
    for numbers in rows:
        lengths = numpy.array([pack.trie.ends[number][1] for number in numbers])
        real = numpy.arange(lengths.max()) < lengths[:, None]
        weights = real * times[numpy.array(numbers)][:, None]
        found.append(torch.from_numpy(weights.astype(numpy.float32).ravel()).to(pack.input_ids.device))
    return found


def _times_of_responses(pack: PackedBatch) -> numpy.ndarray:
    """In how many examples each response is: [R]; 0 in a filler, which counts for nothing."""
    # In a dry run everything else is fake: without values.
    with unset_fake_temporarily():
        members = pack.on_host.members.numpy()
    times = numpy.bincount(members[members >= 0], minlength=len(pack.trie.ends))
    return times * (not pack.is_filler)


def _times_of_tokens(pack: PackedBatch, times: numpy.ndarray) -> numpy.ndarray:
    """In how many rows each packed token stands: [T] float32."""
    found = numpy.zeros(len(pack.input_ids), numpy.float32)
    for number in range(len(pack.trie.ends)):
        found[pack.trie.path(number)] += times[number]
    return found
