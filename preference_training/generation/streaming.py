"""A response token by token: its text as it grows, and the cache that is kept for the next turn."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from preference_training.generation.decoding import DecodedRows, Decoding, Ends, PreallocatedLayer


class TextStream:
    """The text of a growing response. `say` gets each part of it as soon as no later token can change it.

    finish: what is done to the whole text. stops: texts that end the response and do not belong to it.
    """

    def __init__(self, tokenizer, say: Callable[[str], None], stops: Sequence[str] = (), finish: Callable[[str], str] = str):
        self.tokenizer, self.say, self.stops, self.finish = tokenizer, say, stops, finish
        self.ids: list[int] = []
        self.said, self.is_stopped = "", False

    def add(self, token: int) -> bool:
        """Add a token; whether the response goes on."""
        self.ids.append(token)
        text = self._text()
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.is_stopped = bool(places)
        self._say(text[: min(places)] if places else text[: len(text) - self._undecided(text)])
        return not self.is_stopped

    def end(self) -> str:
        """Say the rest; returns the whole text."""
        if not self.is_stopped:
            self._say(self._text())
        return self.said

    def _text(self) -> str:
        return self.finish(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _undecided(self, text: str) -> int:
        """The length of the end of a text that may turn into something else: half a character, or part of a stop."""
        half = len(text) - len(text.rstrip("\ufffd"))
        stops = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(half, *stops, 0)

    def _say(self, text: str) -> None:
        # Always, even nothing: who listens may want to end the response.
        more = text[len(self.said) :]
        self.said = text
        self.say(more)


class StreamedDecoding(Decoding):
    """The decoding of one row, of which each token goes to `add`, which says whether to go on."""

    def __init__(self, noise: Callable, limit: int, ends: Ends, add: Callable[[int], bool]):
        super().__init__(noise, [limit], ends)
        self.add = add
        self.rows: DecodedRows | None = None

    def _decode(self, rows: DecodedRows) -> None:
        self.rows = rows
        super()._decode(rows)

    def _after(self, number: int | None, token: int) -> int | None:
        goes_on = token in self.ends.tokens or self.add(token)
        after = super()._after(number, token)
        return after if goes_on else None


# ---- the cache between turns ----------------------------------------------------------------------------------------------


class PrefixCache:
    """The keys and values of a conversation so far, of which the next turn computes only what is new.

    Kept are caches that can be cut back to any length: those of full attention, and of sliding windows that are not full yet.
    Others (recurrent states, full windows) are dropped, and the next turn computes its whole prompt.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.cache: Any = None

    def take(self, prompt: Sequence[int]) -> dict[str, Any]:
        """The keyword arguments of `generate` that continue the cache, which is cut back to what it shares with a prompt."""
        cache, ids = self.cache, self.ids
        self.cache, self.ids = None, []
        # At least one token has to be computed, for the scores after it.
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(ids, prompt, strict=False))
        shared = min(sum(1 for _ in alike), len(prompt) - 1)
        if cache is None or not shared:
            return {}
        if len(ids) > shared:
            cache.crop(shared - len(ids))
        return {"past_key_values": cache}

    def keep(self, rows: DecodedRows | None) -> None:
        """Keep the cache of a row that has been decoded, if it can be cut back."""
        cache = rows.arguments.get("past_key_values") if rows is not None else None
        if cache is not None and is_croppable(cache):
            self.cache, self.ids = cache, rows.ids[0, : cache.get_seq_length()].tolist()


def is_croppable(cache) -> bool:
    """Whether a cache can be cut back to any of its lengths without loss."""
    # Subclasses hold states beside their layers.
    return type(cache) is DynamicCache and all(_holds_everything(layer) for layer in cache.layers)


def _holds_everything(layer) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.get_seq_length() < layer.sliding_window
    return type(layer) in (DynamicLayer, PreallocatedLayer)
