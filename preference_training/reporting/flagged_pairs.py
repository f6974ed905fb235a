"""Training pairs that a run's margin ledger calls into question, and their texts.

stays wrong     negative margin at every sighting in the second half of the run, of which there are two or more
mislabelled     its margins look like those of pairs with swapped labels
forgotten       had a positive margin, and a negative one at the last sighting
contradicted    the data also has the same pair with the opposite label

    ledger, prompts -> findings -> RUN/flagged_pairs.jsonl -> rows that the labeling app imports

Shapes: N sightings, K distinct pairs.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

from preference_training.core.errors import UserError
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.tracking.ledger import Observations, read_ledger
from preference_training.tracking.run_files import FLAGGED, json_lines, write_json_lines

KINDS = {
    "stays wrong": "the policy keeps preferring the rejected response",
    "mislabelled": "the label is probably wrong",
    "forgotten": "the policy ranked the pair correctly at first, but no longer does",
    "contradicted": "the data also has the pair with the opposite label",
}
# Pairs of each kind that are written, the worst first.
MAX_PAIRS = 1000
# Margins of a pair that are written, the latest ones.
MAX_MARGINS = 8
# Successive sightings that are compared with each other.
BLOCK_SIZE = 128
# The evidence of one sighting for or against a label, at most, in nats; and the prior probability of a wrong label.
MAX_EVIDENCE, PRIOR = 4.0, 0.05


# ---- what the margins say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The distinct pairs, [K]. The sightings of pair k are `order[starts[k]:starts[k + 1]]`, the oldest first."""

    preferred: numpy.ndarray
    other: numpy.ndarray
    order: numpy.ndarray
    starts: numpy.ndarray

    @classmethod
    def of(cls, seen: Observations) -> "Pairs":
        """The distinct pairs of some sightings."""
        # One integer per pair: numpy.unique is much faster on these than on rows.
        base = int(seen.other.max(initial=0)) + 1
        keys, number = numpy.unique(seen.preferred * base + seen.other, return_inverse=True)
        order = numpy.argsort(number, kind="stable")
        starts = numpy.searchsorted(number[order], numpy.arange(len(keys) + 1))
        return cls(keys // base, keys % base, order, starts)

    def sums(self, values: numpy.ndarray) -> numpy.ndarray:
        """The sum of values [N] over each pair's sightings: [K]."""
        return numpy.add.reduceat(values[self.order], self.starts[:-1]) if len(self.order) else values[:0]

    def last(self, values: numpy.ndarray) -> numpy.ndarray:
        """The value [N] at each pair's last sighting: [K]."""
        return values[self.order[self.starts[1:] - 1]]


def evidence(seen: Observations) -> numpy.ndarray:
    """The evidence of each margin for its label, [N], in nats: the log-ratio of normal densities around +m and around -m.

    m and the spread are those of the margins seen at about the same time: while the policy knows nothing, m is 0, and so is the
    evidence. A pair is first seen before it is trained on; the mean margin over sightings identifies wrong labels for the same
    reason (Pleiss et al. 2020, area under the margin).
    """
    found = numpy.zeros(len(seen))
    for start in range(0, len(seen), BLOCK_SIZE):
        # The last block is as large as the others.
        block = slice(max(0, min(start, len(seen) - BLOCK_SIZE)), start + BLOCK_SIZE)
        margins = seen.margins[block].astype(float)
        median = numpy.median(margins)
        with numpy.errstate(invalid="ignore"):  # infinite margins are skipped below
            spread = 1.4826 * numpy.median(numpy.abs(margins - median))
        if median > 0 and numpy.isfinite(spread):
            found[block] = numpy.clip(2 * median * margins / max(spread, 1e-6 * median) ** 2, -MAX_EVIDENCE, MAX_EVIDENCE)
    return numpy.nan_to_num(found)


def wrong_label_probability(pairs: Pairs, seen: Observations) -> numpy.ndarray:
    """The probability that each pair's label is wrong, given its sightings and PRIOR: [K]."""
    log_odds = numpy.log(PRIOR / (1 - PRIOR)) - pairs.sums(evidence(seen))
    return 1 / (1 + numpy.exp(-log_odds))


@dataclass(frozen=True)
class Finding:
    """A questionable pair: one of KINDS, the indices of its responses, and its severity."""

    kind: str
    preferred: int
    other: int
    severity: float


def find_by_margins(seen: Observations) -> list[Finding]:
    """The pairs that their margins call into question, at most MAX_PAIRS of each kind, the worst first."""
    pairs = Pairs.of(seen)
    probability = wrong_label_probability(pairs, seen)
    wrong = seen.margins < 0
    late = seen.examples > seen.examples.max(initial=0) / 2
    times_late = pairs.sums(late.astype(int))
    mean_late = pairs.sums(numpy.where(late, seen.margins, 0)) / numpy.maximum(times_late, 1)
    last = pairs.last(seen.margins)
    was_right = pairs.sums((seen.margins > 0).astype(int)) > 0
    chosen = {
        "stays wrong": ((times_late > 1) & (pairs.sums((wrong & late).astype(int)) == times_late), -mean_late),
        "mislabelled": (probability > 0.5, probability),
        "forgotten": (was_right & (last < 0), -last),
    }
    found = []
    for kind, (is_chosen, severity) in chosen.items():
        numbers = numpy.flatnonzero(is_chosen)
        for k in numbers[numpy.argsort(-severity[numbers], kind="stable")][:MAX_PAIRS]:
            found.append(Finding(kind, int(pairs.preferred[k]), int(pairs.other[k]), float(severity[k])))
    return found


# ---- what the data says ---------------------------------------------------------------------------------------------------


def find_contradictions(table: PromptTable) -> list[Finding]:
    """Pairs that the data has with both labels, next to each other; at most MAX_PAIRS."""
    found = []
    for prompts in candidate_prompts(table):
        directions = defaultdict(list)
        for prompt in prompts:
            texts = [tuple(response) for response in prompt.responses]
            for i, j in prompt.pairs:
                directions[texts[i], texts[j]].append((prompt.first_row + i, prompt.first_row + j))
        for (one, other), places in directions.items():
            # Count the two directions once.
            if one < other and (other, one) in directions:
                found += [Finding("contradicted", *pair, 0.0) for pair in dict.fromkeys(places + directions[other, one])]
        if len(found) >= MAX_PAIRS:
            break
    return found[:MAX_PAIRS]


def candidate_prompts(table: PromptTable) -> Iterator[list[TokenizedPrompt]]:
    """Groups of prompts with the same token ids, and single prompts with several pairs, which may contradict each other."""
    batches = [columns.prompts.hashes for part in table.parts for columns in part.batches]
    keys = numpy.concatenate([numpy.zeros(0, numpy.uint64), *batches])
    _, first, counts = numpy.unique(keys, return_index=True, return_counts=True)
    for index in numpy.flatnonzero(table.num_examples > 1):
        if counts[numpy.searchsorted(keys[first], keys[index])] == 1:
            yield [table[int(index)]]
    order = numpy.argsort(keys, kind="stable")
    starts = numpy.searchsorted(keys[order], keys[first][counts > 1])
    for start, count in zip(starts, counts[counts > 1], strict=True):
        yield [table[int(index)] for index in order[start : start + count]]


# ---- with their texts -----------------------------------------------------------------------------------------------------


class PairFinder:
    """Writes a run's flagged_pairs.jsonl. table: the training data, tokenized by `tokenizer`."""

    def __init__(self, run_dir: Path, table: PromptTable, tokenizer):
        self.run_dir, self.table, self.tokenizer = run_dir, table, tokenizer
        self.contradicted: list[Finding] | None = None
        # Decoding takes most of the time, and most pairs are found again at the next evaluation.
        self.texts: dict[tuple[int, int], dict] = {}

    def write(self) -> None:
        """Write the pairs that the ledger and the data call into question now. Raises OSError."""
        seen = read_ledger(self.run_dir)
        if not len(seen):
            return
        if self.contradicted is None:
            self.contradicted = find_contradictions(self.table)
        rows = self.rows(seen, [*find_by_margins(seen), *self.contradicted])
        write_json_lines(self.run_dir / FLAGGED, rows)

    def rows(self, seen: Observations, findings: Iterable[Finding]) -> Iterator[dict]:
        """A row for each finding: kind, source, texts, latest margins, and the probability of a wrong label."""
        pairs = Pairs.of(seen)
        probability = wrong_label_probability(pairs, seen)
        number = {pair: k for k, pair in enumerate(zip(pairs.preferred.tolist(), pairs.other.tolist(), strict=True))}
        for finding in findings:
            k = number.get((finding.preferred, finding.other))
            own = pairs.order[:0] if k is None else pairs.order[pairs.starts[k] : pairs.starts[k + 1]]
            yield {
                "kind": finding.kind,
                **self.decode(finding.preferred, finding.other),
                "times_seen": len(own),
                "margins": [round(margin, 4) for margin in seen.margins[own[-MAX_MARGINS:]].tolist()],
                "wrong_label_probability": None if k is None else round(float(probability[k]), 4),
            }

    def decode(self, preferred: int, other: int) -> dict:
        """The source and the texts of a pair."""
        if (preferred, other) not in self.texts:
            prompt = self.table[self.table.prompt_index(preferred)]
            ids = prompt.prompt_ids, *(prompt.responses[row - prompt.first_row] for row in (preferred, other))
            texts = self.tokenizer.batch_decode(list(ids), skip_special_tokens=True)
            named = dict(zip(("prompt", "preferred", "other"), texts, strict=True))
            self.texts[preferred, other] = {"source": prompt.source, **named}
        return self.texts[preferred, other]


# ---- for the labeling app -------------------------------------------------------------------------------------------------

ROW = {"kind": str, "source": str, "prompt": str, "preferred": str, "other": str}


def flagged_rows(run_dir: Path) -> list[dict]:
    """The valid rows of a run's flagged_pairs.jsonl."""
    rows = json_lines(run_dir / FLAGGED)
    return [row for row in rows if all(isinstance(row.get(name), kind) for name, kind in ROW.items())]


def labeling_rows(rows: Iterable[dict]) -> list[dict]:
    """Flagged pairs as the labeling app imports them, each pair of texts once: a problem and two versions.

    The preference is left open for a new judgment; `labelled` is the data's label, 0 for version1.
    """
    found: dict[tuple, dict] = {}
    for row in rows:
        # The order must not reveal the label to the annotator.
        texts = sorted([row["preferred"], row["other"]])
        judged = {"description": row["prompt"], "version1": texts[0], "version2": texts[1], "preference": None}
        judged |= {"labelled": texts.index(row["preferred"]), "source": row["source"], "flagged": row["kind"]}
        known = found.setdefault((row["prompt"], *texts), judged)
        if row["kind"] not in known["flagged"].split(", "):
            known["flagged"] += f", {row['kind']}"
    return list(found.values())


def write_labeling_file(run_dir: Path, to: Path) -> int:
    """Write a run's flagged pairs for the labeling app, as JSON lines; returns their number, and writes nothing without any.

    Raises UserError for a run that does not look for such pairs, and for a file that cannot be written.
    """
    if not (run_dir / FLAGGED).is_file():
        raise UserError(
            f"{run_dir}: no {FLAGGED}. Expected the directory of a run with ledger=true and a preference loss that has been "
            "evaluated after training steps."
        )
    rows = labeling_rows(flagged_rows(run_dir))
    try:
        if rows:
            to.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--flagged: cannot write {to}: {error.strerror}. Expected a writable file.") from error
    return len(rows)
