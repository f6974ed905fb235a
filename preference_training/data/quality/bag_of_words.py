"""Bag of words: a logistic regression on the words of two responses. What it gets right needs no language model.

The model of Bradley and Terry: the preferred response wins with probability sigmoid(w · (x - x')), where x is log(1 + count) of
each word of a response. Its L2-regularized likelihood is convex and has one optimum, found by L-BFGS.
"""

import numpy

from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality.pairs import Baseline, Pairs
from preference_training.data.quality.words import decode, word_hashes

# Words share a weight where their hashes agree in this many bits.
BITS = 18
MOST_TRAINED, MOST_SCORED = 20_000, 10_000
FEWEST = 20


def bag_of_words(tables: tuple[PromptTable, PromptTable], train: Pairs, held_out: Pairs, tokenizer) -> Baseline | None:
    """Fit on pairs of the first table, and score those of the second; None where there are too few of either.

    Of many pairs it takes some at equal distances.
    """
    if len(train) < FEWEST or not len(held_out):
        return None
    fitted, scored = spread(len(train), MOST_TRAINED), spread(len(held_out), MOST_SCORED)
    weights = fit(differences(tables[0], train, fitted, tokenizer))
    margins = differences(tables[1], held_out, scored, tokenizer) @ weights
    return Baseline("bag of words", (1 + numpy.sign(margins)) / 2, held_out.prompts[scored])


def spread(size: int, most: int) -> numpy.ndarray:
    """At most so many of the numbers below `size`, at equal distances."""
    return numpy.unique(numpy.linspace(0, size - 1, min(size, most)).round().astype(int))


def differences(table: PromptTable, pairs: Pairs, chosen: numpy.ndarray, tokenizer):
    """The words of the preferred minus those of the other response of chosen pairs: sparse [pairs, 2 ** BITS]."""
    found: list[list[int]] = []
    for prompt, *rows in zip(pairs.prompts[chosen], pairs.preferred[chosen], pairs.other[chosen], strict=True):
        read = table[int(prompt)]
        found += [read.responses[row - (read.first_row - table.first_row)] for row in rows]
    counts = word_counts(found, tokenizer)
    return counts[::2] - counts[1::2]


def word_counts(responses: list[list[int]], tokenizer):
    """log(1 + count) of the words of responses: sparse [responses, 2 ** BITS]."""
    from scipy.sparse import csr_array

    found = word_hashes(decode(tokenizer, responses))
    columns = (found.values % numpy.uint64(2**BITS)).astype(numpy.int32)
    counts = csr_array((numpy.ones(len(columns)), columns, found.offsets), shape=(len(responses), 2**BITS))
    counts.sum_duplicates()
    counts.data = numpy.log1p(counts.data)
    return counts


def fit(differences, strength: float = 1.0) -> numpy.ndarray:
    """The weights that minimize sum of log(1 + exp(-w · x)) + strength / 2 |w|²."""
    from scipy.optimize import minimize
    from scipy.special import expit

    # Most of the columns are no word of the data.
    used = numpy.unique(differences.indices)
    matrix = differences[:, used].tocsr()
    transposed = matrix.T.tocsr()

    def loss(weights: numpy.ndarray) -> tuple[float, numpy.ndarray]:
        margins = matrix @ weights
        value = numpy.logaddexp(0, -margins).sum() + strength / 2 * weights @ weights
        return value, strength * weights - transposed @ expit(-margins)

    found = minimize(loss, numpy.zeros(len(used)), jac=True, method="L-BFGS-B", options={"maxiter": 100})
    weights = numpy.zeros(differences.shape[1])
    weights[used] = found.x
    return weights
