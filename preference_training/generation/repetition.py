"""Whether samples repeat themselves, as those of a model do that training has broken.

Measured is the share of 4-grams of tokens that their response has had before, over all responses: 0 where nothing returns, and
near 1 where a few words go round.
"""

from collections.abc import Iterable, Sequence

SIZE = 4
# With fewer 4-grams, one phrase that returns would decide.
FEWEST = 32
# A share from which responses repeat, and by how much it must exceed that of the reference's responses, which set what is usual
# for these prompts and this tokenizer.
MANY, MORE = 0.4, 0.2


def repeated_share(responses: Iterable[Sequence[int]]) -> float | None:
    """The share of repeated 4-grams in responses as token ids; None where they are too short to tell."""
    total = different = 0
    for tokens in responses:
        found = [tuple(tokens[start : start + SIZE]) for start in range(len(tokens) - SIZE + 1)]
        total += len(found)
        different += len(set(found))
    return 1 - different / total if total >= FEWEST else None


def repetition(responses: Sequence[Sequence[int]], usual: Sequence[Sequence[int]] | None) -> str | None:
    """What speaks for responses, as token ids, that repeat themselves, in words; None where nothing does.

    usual: the reference's responses to the same prompts, or those before training; None where there are none.
    """
    share = repeated_share(responses)
    before = repeated_share(usual) if usual is not None else None
    if share is None or share < MANY or (before is not None and share < before + MORE):
        return None
    compared = "" if before is None else f", and {before:.0%} of the reference's"
    return f"{share:.0%} of all runs of {SIZE} tokens in the policy's samples are repetitions{compared}"
