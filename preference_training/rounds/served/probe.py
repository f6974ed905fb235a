"""Whether a server has the weights of the policy: the log-probs of tokens that it samples are compared with ours.

The prompts are the loop's own: what the server has kept of them, computed with the weights of an earlier round, shows as well.
"""

import threading
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from preference_training.core.errors import UserError
from preference_training.generation.servers import ServerError, retrying
from preference_training.modeling.state import compute_device
from preference_training.rounds.prompts import LoopPrompt
from preference_training.rounds.served import asking
from preference_training.rounds.served.protocols import TokenProtocol, tokens_of

if TYPE_CHECKING:
    from preference_training.rounds.sampling import Policy

# How many prompts are probed, and tokens sampled to each.
PROMPTS, TOKENS = 4, 16
# The largest mean difference of a token's log-prob, in nats, by the coarser of the two dtypes. In float32 the same weights gave
# 6e-6, and a vLLM that had kept one layer of the round before 2e-3.
TOLERANCES = {"float32": 0.001}
COARSE = 0.05


class Probed(NamedTuple):
    """Tokens that a server has sampled to each prompt, and their log-probs there."""

    tokens: list[list[int]]
    logps: list[list[float]]


def probe(protocol: TokenProtocol, prompts: Sequence[LoopPrompt]) -> Probed:
    """Sample by a server. Raises UserError where it gives no token ids with their log-probs."""
    found = []
    for prompt in prompts[:PROMPTS]:
        body = protocol.request(protocol.policy.prompt_ids(prompt), TOKENS, 0, n=1, temperature=1.0, top_p=1.0)
        found.append(_ask(protocol, body))
    return Probed([tokens for tokens, _ in found], [logps for _, logps in found])


def _ask(protocol: TokenProtocol, body: dict) -> tuple[list[int], list[float]]:
    def once() -> tuple[list[int], list[float]]:
        return tokens_of(protocol.server.send("POST", protocol.url, body).json()["choices"][0])

    try:
        return retrying(asking.ATTEMPTS, asking.FIRST_PAUSE, threading.Event(), lambda _: None)(once)
    except (ServerError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = getattr(error, "reason", "its reply has no token ids with their log-probs")
        raise UserError(
            f"rounds.sampler: {protocol.url}: {reason}. Expected a vLLM that takes and returns token ids, with the model of "
            "the loop and room for its prompts (--max-model-len)."
        ) from error


@torch.no_grad()
def computed_here(policy: "Policy", prompts: Sequence[LoopPrompt], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probs of tokens behind their prompts under the policy that is loaded here."""
    found = []
    for prompt, response in zip(prompts, tokens, strict=False):
        ids = policy.prompt_ids(prompt)
        given = torch.tensor([ids + list(response)], device=compute_device(policy.model))
        logps = policy.model(input_ids=given, use_cache=False).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
        chosen = torch.tensor(list(response), device=logps.device)
        found.append(logps.gather(1, chosen[:, None])[:, 0].tolist())
    return found


def check_same_model(
    protocol: TokenProtocol, probed: Probed, here: list[list[float]], dtypes: Sequence[str | None], tried: str
) -> float:
    """The mean difference of the log-probs. Raises UserError where it is more than rounding.

    dtypes: of the server, None if unknown, and of the policy here. tried: what has put the weights there.
    """
    pairs = [
        (one, other) for there, ours in zip(probed.logps, here, strict=True) for one, other in zip(there, ours, strict=True)
    ]
    difference = mean(abs(one - other) for one, other in pairs)
    tolerance = max(TOLERANCES.get(str(dtype), COARSE) for dtype in dtypes)
    if not difference <= tolerance:
        of = ", ".join(f"{dtype or 'an unknown dtype'} {where}" for dtype, where in zip(dtypes, ("there", "here"), strict=True))
        raise UserError(
            f"rounds.sampler: {protocol.server.base} does not have the weights of the policy ({tried}): its log-probs of "
            f"{len(pairs)} tokens differ by {difference:.3g} nats in the mean from those computed here, expected at most "
            f"{tolerance:g} ({of}). Expected a vLLM of the same model, without quantization of its own, in the same dtype "
            "(--dtype)."
        )
    return difference


def check_has_changed(protocol: TokenProtocol, probed: Probed, before: dict[str, Any]) -> None:
    """Raise UserError where a server's log-probs are, to the last bit, those of the round before, whose policy was another."""
    then = before.get("probe")
    if then == [list(probed.tokens), list(probed.logps)] and before.get("model") != protocol.policy.identity:
        raise UserError(
            f"rounds.sampler: {protocol.server.base} has the log-probs of the round before to the last bit: it has not taken "
            "the weights, or its dtype cannot express how they have changed. Serve the model with --dtype float32, or train "
            "with a larger lr."
        )
