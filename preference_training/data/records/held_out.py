"""Which prompts of a data set are held out: by a hash of their text, in memory that does not grow with the data."""

import hashlib
from collections.abc import Callable, Iterator

from preference_training.data.records.record import Items, Prompt, prompt_text


def prompt_hash(prompt: Prompt) -> float:
    """A number in [0, 1) that depends only on the prompt's text: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(prompt_text(prompt).encode()).digest()[:8], "big") / 2**64


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Whether a prompt belongs to the held-out `share` of its data set."""
    return prompt_hash(prompt) < share


def split_by_hash(
    items: Items, split: str, share: float, text_of: Callable[[Prompt], str] = prompt_text
) -> Iterator[tuple[Prompt, dict]]:
    """The items of one split, chosen by a hash of the prompt; "test" has about `share` of all prompts.

    text_of returns the text that is hashed: what the model reads, so that the split does not depend on how a prompt is stored.
    If none of two or more prompts would be held out, the one with the smallest hash is; therefore its items wait until a
    smaller hash comes.
    """
    lowest, waiting, several, held_out_any = 1.0, [], False, False
    if share == 0:
        # All are read, also for the split that is empty, since reading reports their errors.
        yield from (item for item in items if split == "train")
        return
    for item in items:
        prompt, record = item
        # Answers without a prompt, as plain texts are, are held out one by one.
        value = prompt_hash(text_of(prompt) if prompt else prompt_text(record["sft_target"]))
        held_out_any |= value < share
        if held_out_any:
            released, waiting = waiting, []
            if split == "train":
                yield from released
            if (value < share) == (split == "test"):
                yield item
        elif value == lowest:
            waiting.append(item)
        else:
            several |= bool(waiting)
            released = [item]
            if value < lowest:
                lowest, waiting, released = value, [item], waiting
            if split == "train":
                yield from released
    if several == (split == "test"):
        yield from waiting
