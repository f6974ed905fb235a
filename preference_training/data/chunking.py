"""Cut plain text that is longer than `max_length` into chunks, so that each of its tokens is trained on once."""

from collections.abc import Iterator
from typing import NamedTuple

CHUNKS = "chunks that continue a text longer than max_length"


class Chunk(NamedTuple):
    """A part of a text. ids: what follows the prompt. spans: which of it is scored, as [start, end); None is all."""

    prompt_ids: list[int]
    ids: list[int]
    spans: list[list[tuple[int, int]]] | None = None


def text_chunks(text: list[int], max_length: int, bos_id: int | None) -> Iterator[Chunk]:
    """The chunks of a text's token ids, of at most `max_length` each; the last has what is left.

    The first token, a beginning-of-sequence token or the text's own, is the prompt. Every other token is scored in exactly one
    chunk, and the one before it is always there: a later chunk starts with the last token of the chunk before, behind a
    beginning-of-sequence token where the text has one.
    """
    yield Chunk(text[:1], text[1:max_length])
    # Two tokens leave no room for both.
    begins = text[0] == bos_id and max_length > 2
    end = max_length
    while end < len(text):
        start, end = end, end + max_length - 1 - begins
        if begins:
            ids = text[start - 1 : end]
            yield Chunk(text[:1], ids, [[(1, len(ids))]])
        else:
            yield Chunk(text[start - 1 : start], text[start:end])
