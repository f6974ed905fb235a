"""The words of tokenized texts, as hashes: whatever the tokenizer, the letter case and the punctuation."""

import re
import zlib
from collections.abc import Sequence
from itertools import chain

import numpy

from preference_training.data.columns import Lists

# Scripts without spaces between words: each character is a word.
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
MOST_REMEMBERED = 1_000_000


def decode(tokenizer, sequences: Sequence[list[int]]) -> list[str]:
    """The texts of sequences of token ids, without special tokens."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.decode_batch(list(sequences), skip_special_tokens=True)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


class _Hashes(dict):
    """The hash of each word, computed once. The same in every process, which Python's own is not."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_REMEMBERED:
            self.clear()
        self[word] = found = zlib.crc32(word.encode(errors="surrogatepass"))
        return found


HASHES = _Hashes()


def word_hashes(texts: Sequence[str]) -> Lists:
    """The hashes of the words of each text, as uint64."""
    found = [words(text) for text in texts]
    offsets = numpy.concatenate([[0], numpy.cumsum([len(some) for some in found], dtype=numpy.int64)])
    flat = map(HASHES.__getitem__, chain.from_iterable(found))
    return Lists(offsets, numpy.fromiter(flat, numpy.uint64, int(offsets[-1])))


def ngrams(lists: Lists, n: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """A hash of every n numbers in a row within a list: the list of each [K], and the hashes [K] uint64."""
    values = lists.values.astype(numpy.uint64)
    number = len(values) - n + 1
    if number < 1:
        return numpy.zeros(0, numpy.int64), numpy.zeros(0, numpy.uint64)
    # Multiplication and addition wrap around.
    found = numpy.zeros(number, numpy.uint64)
    for k in range(n):
        found *= numpy.uint64(0x9E3779B97F4A7C15)
        found += values[k : k + number] + numpy.uint64(0x2545F491)
        found ^= found >> numpy.uint64(29)
    owner = numpy.repeat(numpy.arange(len(lists.lengths)), lists.lengths)
    inside = owner[:number] == owner[n - 1 :]
    return owner[:number][inside], found[inside]
