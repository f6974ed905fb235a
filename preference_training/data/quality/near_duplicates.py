"""Near-duplicate prompts: MinHash of shingles of token ids, by rensa, and the exact Jaccard similarity of what it finds.

Shingles are `SHINGLE` token ids in a row. Those that more than a tenth of all prompts have do not count: they are a system
prompt or a template. Shapes: D documents, B bands.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy

from preference_training.data.columns import Lists
from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality.words import ngrams

SHINGLE = 3
# With bands of 5 of 125 hashes, documents of similarity 0.7 share a band with probability 1 - (1 - 0.7^5)^25 = 99.0%.
BANDS, ROWS = 25, 5
MOST_DOCUMENTS = 300_000
DOCUMENTS_AT_ONCE = 4096
COUNTERS = 2**22
# A shingle of more documents than this, and than COMMON of all, does not count.
FEW, COMMON = 20, 0.1
# Documents with fewer shingles that count are too short to compare.
FEWEST_SHINGLES = 5
SEED = 0
NOT_INSTALLED = "near-duplicates were not searched, only exact ones: rensa is not installed (pip install rensa)"


class Pair(NamedTuple):
    """Two near-duplicates, as token ids, and their similarity."""

    one: list[int]
    other: list[int]
    similarity: float


class NearDuplicates(NamedTuple):
    """Distinct prompts that were compared, and how many of them have a near-duplicate.

    within: training prompts that resemble an earlier one. across: held-out prompts that resemble a training prompt.
    """

    train: int
    held_out: int
    within: int
    across: int
    examples: list[Pair]


def find_near_duplicates(train: PromptTable, held_out: PromptTable, similarity: float) -> NearDuplicates | None:
    """Search both splits; None where rensa is not installed. Of many prompts it takes some at equal distances."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        return None
    ids, splits = _documents(train, held_out)
    if not len(splits):
        return NearDuplicates(0, 0, 0, 0, [])
    shingles = Shingles(ids)
    signatures, compared = shingles.signatures()
    flagged = numpy.zeros((2, len(splits)), bool)
    examples: list[Pair] = []
    for one, other in _candidates(signatures, compared):
        kind = int(splits[other])
        # An earlier held-out prompt is no leak.
        if splits[one] or flagged[kind, other] or (signatures[one] == signatures[other]).mean() < similarity - 0.15:
            continue
        found = shingles.similarity(one, other)
        if found >= similarity:
            flagged[kind, other] = True
            if kind or len(examples) < 3:
                examples.append(Pair(ids.at(one), ids.at(other), found))
    within, across = flagged.sum(1).tolist()
    in_train, in_held_out = (int((compared & (splits == kind)).sum()) for kind in (0, 1))
    return NearDuplicates(in_train, in_held_out, within, across, examples[-5:])


def _documents(train: PromptTable, held_out: PromptTable) -> tuple[Lists, numpy.ndarray]:
    """Distinct prompts of both splits, first those of training, and the split of each: [D] int, 0 or 1."""
    step = -(-(len(train) + len(held_out)) // MOST_DOCUMENTS) or 1
    sequences, splits = [], []
    for kind, table in enumerate((train, held_out)):
        found = list(_of_table(table, step))
        sequences += found
        splits += [kind] * len(found)
    hashes = Lists.joined(sequences).hashes
    kept = numpy.sort(numpy.unique(hashes, return_index=True)[1]) if len(hashes) else numpy.zeros(0, int)
    return Lists.joined([sequences[k] for k in kept]), numpy.array(splits, int)[kept]


def _of_table(table: PromptTable, step: int) -> Iterator[numpy.ndarray]:
    """The token ids of every `step`-th prompt; of its first response, where the prompt is too short to compare."""
    number = 0
    for part in table.parts:
        for columns in part.batches:
            first, ids = columns.responses.first, columns.responses.lists
            for k, (start, end) in enumerate(pairwise(columns.prompts.offsets.tolist())):
                number += 1
                if (number - 1) % step:
                    continue
                if end - start < SHINGLE and first[k] < first[k + 1]:
                    start, end = ids.offsets[first[k]], ids.offsets[first[k] + 1]
                    yield ids.values[start:end].copy()
                else:
                    yield columns.prompts.values[start:end].copy()
        part.release()


class Shingles:
    """The shingles of documents that count: few enough documents have them."""

    def __init__(self, ids: Lists):
        self.ids = ids
        self.size = len(ids.lengths)
        self._counts = numpy.zeros(COUNTERS, numpy.int64)
        for start in range(0, self.size, DOCUMENTS_AT_ONCE):
            owner, hashes = ngrams(self._chunk(start), SHINGLE)
            once = numpy.unique(hashes ^ owner.astype(numpy.uint64) * numpy.uint64(0xD1B54A32D192ED03), return_index=True)[1]
            self._counts += numpy.bincount((hashes[once] % numpy.uint64(COUNTERS)).astype(int), minlength=COUNTERS)
        self.limit = max(FEW, COMMON * self.size)

    def _chunk(self, start: int, size: int = DOCUMENTS_AT_ONCE) -> Lists:
        offsets = self.ids.offsets[start : start + size + 1]
        return Lists(offsets - offsets[0], self.ids.values[offsets[0] : offsets[-1]])

    def _counted(self, start: int, size: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        owner, hashes = ngrams(self._chunk(start, size), SHINGLE)
        kept = self._counts[(hashes % numpy.uint64(COUNTERS)).astype(int)] <= self.limit
        return owner[kept], hashes[kept]

    def signatures(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The MinHash signatures: [D, BANDS * ROWS] uint32, and whether a document has enough shingles: [D] bool."""
        from rensa import RMinHash

        found, enough = [], []
        for start in range(0, self.size, DOCUMENTS_AT_ONCE):
            owner, hashes = self._counted(start, DOCUMENTS_AT_ONCE)
            counts = numpy.bincount(owner, minlength=min(DOCUMENTS_AT_ONCE, self.size - start))
            offsets = numpy.concatenate([[0], numpy.cumsum(counts)]).astype(numpy.uint64)
            rows = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, BANDS * ROWS, SEED).to_rows()
            found.append(numpy.array(rows, numpy.uint32))
            enough.append(counts >= FEWEST_SHINGLES)
        return numpy.concatenate(found), numpy.concatenate(enough)

    def similarity(self, one: int, other: int) -> float:
        """The Jaccard similarity of two documents: of their shingles that count, the share that both have."""
        sets = [set(self._counted(number, 1)[1].tolist()) for number in (one, other)]
        return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))


def _candidates(signatures: numpy.ndarray, compared: numpy.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of documents that share a band: each with the first one of its bucket and with the one before it."""
    places = numpy.flatnonzero(compared)
    found = [numpy.zeros(0, numpy.int64)]
    for band in range(BANDS):
        rows = signatures[places, band * ROWS : (band + 1) * ROWS].astype(numpy.uint64)
        keys = numpy.zeros(len(places), numpy.uint64)
        for k in range(ROWS):
            keys = (keys ^ rows[:, k]) * numpy.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> numpy.uint64(31)
        order = numpy.argsort(keys, kind="stable")
        same = numpy.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        is_first = numpy.concatenate([[True], keys[order][1:] != keys[order][:-1]])[: len(order)]
        firsts = numpy.maximum.accumulate(numpy.where(is_first, numpy.arange(len(order)), 0))
        for before in (same - 1, firsts[same]):
            found.append(places[order[before]] * len(signatures) + places[order[same]])
    for code in numpy.unique(numpy.concatenate(found)).tolist():
        yield divmod(code, len(signatures))
