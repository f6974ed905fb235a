"""Contamination: n-grams of words that training data shares with files of the user's, such as benchmarks.

An item of a file is contaminated if a prompt or a response holds one of its n-grams; of a shorter text, all of its words.
Letter case and punctuation do not count.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from preference_training.core.errors import UserError
from preference_training.data.files import format_of, read_whole_file
from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality.words import decode, ngrams, word_hashes

# Texts with fewer words are not compared: common phrases have as many.
FEWEST_WORDS = 8
BUCKETS = 2**24


class Contamination(NamedTuple):
    """What training prompts, with their responses, share with one file.

    items: rows or paragraphs with a text long enough to compare. found: those of which the data holds an n-gram. prompts: how
    many hold one. examples: parts of some items that were found.
    """

    path: str
    items: int
    found: int
    prompts: int
    examples: list[str]


def find_contamination(table: PromptTable, tokenizer, paths: Sequence[str], n: int) -> list[Contamination]:
    """What a table shares with each file. Raises UserError where one cannot be read."""
    files = [_File.read(Path(path), n) for path in paths]
    if not files:
        return []
    for part in table.parts:
        for columns in part.batches:
            number, responses = len(columns.numbers), columns.responses
            owner = numpy.concatenate([numpy.arange(number), numpy.repeat(numpy.arange(number), responses.counts)])
            sequences = [lists.at(k) for lists in (columns.prompts, responses.lists) for k in range(len(lists.lengths))]
            found = word_hashes(decode(tokenizer, sequences))
            for file in files:
                file.search(found, owner, number)
        part.release()
    return [file.result() for file in files]


def check_readable(paths: Sequence[str]) -> None:
    """Raise UserError where a file cannot be read whole: said before the data is prepared that it would be compared with."""
    for path in paths:
        deque(read_items(Path(path)), maxlen=0)


def read_items(path: Path) -> Iterator[list[str]]:
    """The texts of each row of a data file, or each paragraph of any other file."""
    kind = format_of(path)
    if kind is not None:
        for _, row in read_whole_file(str(path), "contamination_files"):
            yield from ([paragraph] for paragraph in _paragraphs(row["text"])) if kind == ".txt" else [list(_texts(row))]
        return
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"contamination_files: {path}: cannot be read: {error}. Expected a text or data file.") from error
    yield from ([paragraph] for paragraph in _paragraphs(content))


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def _texts(value) -> Iterator[str]:
    """All texts in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


class _File:
    """The n-grams of a file, by their length: sorted hashes, with the item of each, and those found so far."""

    def __init__(self, path: Path, texts: list[str], items: numpy.ndarray, n: int):
        self.path, self.texts, self.items, self.prompts = path, texts, items, 0
        found = word_hashes(texts)
        self.lengths = numpy.minimum(found.lengths, n)
        self.grams: dict[int, tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]] = {}
        for length in numpy.unique(self.lengths[self.lengths >= FEWEST_WORDS]).tolist():
            owner, hashes = ngrams(found, length)
            fits = self.lengths[owner] == length
            order = numpy.argsort(hashes[fits], kind="stable")
            filled = numpy.zeros(BUCKETS, bool)
            filled[(hashes[fits] % numpy.uint64(BUCKETS)).astype(int)] = True
            self.grams[length] = hashes[fits][order], owner[fits][order], filled
        self.found = {length: numpy.zeros(len(hashes), bool) for length, (hashes, _, _) in self.grams.items()}

    @classmethod
    def read(cls, path: Path, n: int) -> "_File":
        """The file at a path."""
        texts, items = [], []
        for number, some in enumerate(read_items(path)):
            texts += some
            items += [number] * len(some)
        return cls(path, texts, numpy.array(items, int), n)

    def search(self, found, owner: numpy.ndarray, num_prompts: int) -> None:
        """Look for its n-grams in the words of some prompts; owner: the prompt of each text."""
        hit = numpy.zeros(num_prompts, bool)
        for length, (known, _, filled) in self.grams.items():
            texts, hashes = ngrams(found, length)
            maybe = filled[(hashes % numpy.uint64(BUCKETS)).astype(int)]
            texts, hashes = texts[maybe], hashes[maybe]
            here = numpy.isin(hashes, known)
            if here.any():
                self.found[length] |= numpy.isin(known, hashes[here])
                hit[owner[texts[here]]] = True
        self.prompts += int(hit.sum())

    def result(self) -> Contamination:
        """What was found so far."""
        compared = numpy.unique(self.items[self.lengths >= FEWEST_WORDS])
        owners = [owner[self.found[length]] for length, (_, owner, _) in self.grams.items()]
        texts = numpy.unique(numpy.concatenate([numpy.zeros(0, int), *owners]))
        examples = [self.texts[k] for k in texts[:3]]
        return Contamination(str(self.path), len(compared), len(numpy.unique(self.items[texts])), self.prompts, examples)
