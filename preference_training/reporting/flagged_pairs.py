"""Which pairs of the training data a ledger speaks against, and their texts.

stays wrong     wrong at every sighting in the later half of the run, which has two or more of them
mislabelled     its margins are rather those of pairs whose label is the wrong way round
forgotten       it was right, and is wrong at its last sighting
contradicted    the same two responses to the same prompt stand in the data the other way round too

    ledger, prompts -> findings -> RUN/flagged_pairs.jsonl -> the form that the labelling app imports

Shapes: N sightings, K different pairs.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import xxhash

from preference_training.core.errors import UserError
from preference_training.core.files import atomic_file
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.tracking.ledger import Observations, read_ledger
from preference_training.tracking.run_files import FLAGGED, json_lines

KINDS = {
    "stays wrong": "the policy prefers the other response, again and again",
    "mislabelled": "the label is probably the wrong way round",
    "forgotten": "the policy was right, and is wrong now",
    "contradicted": "the data says the opposite elsewhere",
}
# Pairs of each kind whose texts are written, the worst first.
LISTED = 1000
# Margins of a pair that are listed, the newest.
MARGINS_LISTED = 8
# Observations side by side that are compared with each other.
BLOCK = 128
# The most that one sighting says for or against a label, and how probable a wrong one is before any. Unit: nats.
LIMIT, PRIOR = 4.0, 0.05


# ---- what the margins say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Each pair once, [K], and its sightings: of pair k those numbered `order[starts[k]:starts[k + 1]]`, oldest first."""

    preferred: numpy.ndarray
    other: numpy.ndarray
    order: numpy.ndarray
    starts: numpy.ndarray

    @classmethod
    def of(cls, seen: Observations) -> "Pairs":
        """The pairs among some sightings."""
        # One number for both, since numpy finds those again much faster.
        base = int(seen.other.max(initial=0)) + 1
        keys, number = numpy.unique(seen.preferred * base + seen.other, return_inverse=True)
        order = numpy.argsort(number, kind="stable")
        starts = numpy.searchsorted(number[order], numpy.arange(len(keys) + 1))
        return cls(keys // base, keys % base, order, starts)

    def sums(self, values: numpy.ndarray) -> numpy.ndarray:
        """The sum of values [N] over each pair's sightings: [K]."""
        return numpy.add.reduceat(values[self.order], self.starts[:-1]) if len(self.order) else values[:0]

    def last(self, values: numpy.ndarray) -> numpy.ndarray:
        """The value [N] of each pair's newest sighting: [K]."""
        return values[self.order[self.starts[1:] - 1]]


def evidence(seen: Observations) -> numpy.ndarray:
    """By how many nats each margin speaks for its label, [N]: log of normal densities about +m and about -m.

    m is the median of the margins seen at about the same time, and the spread theirs: while the policy knows nothing, m is
    0, and so is the evidence. A first sighting is of a pair that was not trained on yet; a margin's mean over sightings finds
    wrong labels for the same reason (Pleiss et al. 2020, the area under the margin).
    """
    found = numpy.zeros(len(seen))
    for start in range(0, len(seen), BLOCK):
        # The last ones are compared with as many as the others are.
        block = slice(max(0, min(start, len(seen) - BLOCK)), start + BLOCK)
        margins = seen.margins[block].astype(float)
        median = numpy.median(margins)
        with numpy.errstate(invalid="ignore"):  # of infinite margins, which are left out below
            spread = 1.4826 * numpy.median(numpy.abs(margins - median))
        if median > 0 and numpy.isfinite(spread):
            found[block] = numpy.clip(2 * median * margins / max(spread, 1e-6 * median) ** 2, -LIMIT, LIMIT)
    return numpy.nan_to_num(found)


def wrong_label_probability(pairs: Pairs, seen: Observations) -> numpy.ndarray:
    """How probable it is that a pair's label is the wrong way round, from all its sightings and PRIOR: [K]."""
    log_odds = numpy.log(PRIOR / (1 - PRIOR)) - pairs.sums(evidence(seen))
    return 1 / (1 + numpy.exp(-log_odds))


@dataclass(frozen=True)
class Finding:
    """A pair and what is said against it: the places of its responses, one of KINDS, and what it is ordered by, worst first."""

    kind: str
    preferred: int
    other: int
    badness: float


def findings_of(seen: Observations) -> list[Finding]:
    """The pairs that margins speak against, at most LISTED of each kind, the worst first."""
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
    for kind, (is_chosen, badness) in chosen.items():
        numbers = numpy.flatnonzero(is_chosen)
        for k in numbers[numpy.argsort(-badness[numbers], kind="stable")][:LISTED]:
            found.append(Finding(kind, int(pairs.preferred[k]), int(pairs.other[k]), float(badness[k])))
    return found


# ---- what the data says ---------------------------------------------------------------------------------------------------


def contradictions(table: PromptTable) -> list[Finding]:
    """Pairs that stand in the data in both directions, each of them, those of the same texts side by side; at most LISTED."""
    found = []
    for prompts in prompts_to_compare(table):
        directions = defaultdict(list)
        for prompt in prompts:
            texts = [tuple(response) for response in prompt.responses]
            for i, j in prompt.pairs:
                directions[texts[i], texts[j]].append((prompt.first_row + i, prompt.first_row + j))
        for (one, other), places in directions.items():
            # Each two once, from the first of them.
            if one < other and (other, one) in directions:
                found += [Finding("contradicted", *pair, 0.0) for pair in dict.fromkeys(places + directions[other, one])]
        if len(found) >= LISTED:
            break
    return found[:LISTED]


def prompts_to_compare(table: PromptTable) -> Iterator[list[TokenizedPrompt]]:
    """Prompts with the same token ids, together; and each that has several pairs, which may contradict each other."""
    _, first, counts = numpy.unique(keys := prompt_keys(table), return_index=True, return_counts=True)
    for index in numpy.flatnonzero(table.num_examples > 1):
        if counts[numpy.searchsorted(keys[first], keys[index])] == 1:
            yield [table[int(index)]]
    order = numpy.argsort(keys, kind="stable")
    starts = numpy.searchsorted(keys[order], keys[first][counts > 1])
    for start, count in zip(starts, counts[counts > 1], strict=True):
        yield [table[int(index)] for index in order[start : start + count]]


def prompt_keys(table: PromptTable) -> numpy.ndarray:
    """A hash of each prompt's token ids: [prompts] uint64."""
    keys = [
        xxhash.xxh3_64_intdigest(columns.prompt_ids[start:end].tobytes())
        for part in table.parts
        for columns in part.batches
        for start, end in zip(columns.prompt_offsets[:-1], columns.prompt_offsets[1:], strict=True)
    ]
    return numpy.array(keys, numpy.uint64)


# ---- with their texts -----------------------------------------------------------------------------------------------------


class PairFinder:
    """Writes a run's flagged_pairs.jsonl. `table` is the training data, and its token ids are the tokenizer's."""

    def __init__(self, run_dir: Path, table: PromptTable, tokenizer):
        self.run_dir, self.table, self.tokenizer = run_dir, table, tokenizer
        self.contradicted: list[Finding] | None = None
        # Decoding takes longer than all the rest, and most pairs are found again.
        self.texts: dict[tuple[int, int], dict] = {}

    def write(self) -> None:
        """Write the pairs that the ledger and the data speak against, as they are now. Raises OSError."""
        seen = read_ledger(self.run_dir)
        if not len(seen):
            return
        if self.contradicted is None:
            self.contradicted = contradictions(self.table)
        rows = self.rows(seen, [*findings_of(seen), *self.contradicted])
        with atomic_file(self.run_dir / FLAGGED, encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def rows(self, seen: Observations, findings: Iterable[Finding]) -> Iterator[dict]:
        """A row for each finding: kind, where it is from, its texts, its newest margins, and how probable a wrong label is."""
        pairs = Pairs.of(seen)
        probability = wrong_label_probability(pairs, seen)
        number = {pair: k for k, pair in enumerate(zip(pairs.preferred.tolist(), pairs.other.tolist(), strict=True))}
        for finding in findings:
            k = number.get((finding.preferred, finding.other))
            own = pairs.order[:0] if k is None else pairs.order[pairs.starts[k] : pairs.starts[k + 1]]
            yield {
                "kind": finding.kind,
                **self.text_of(finding.preferred, finding.other),
                "times_seen": len(own),
                "margins": [round(margin, 4) for margin in seen.margins[own[-MARGINS_LISTED:]].tolist()],
                "wrong_label_probability": None if k is None else round(float(probability[k]), 4),
            }

    def text_of(self, preferred: int, other: int) -> dict:
        """Where a pair is from, and its texts."""
        if (preferred, other) not in self.texts:
            prompt = self.table[self.table.place_of_response(preferred)]
            ids = prompt.prompt_ids, *(prompt.responses[row - prompt.first_row] for row in (preferred, other))
            texts = self.tokenizer.batch_decode(list(ids), skip_special_tokens=True)
            named = dict(zip(("prompt", "preferred", "other"), texts, strict=True))
            self.texts[preferred, other] = {"source": prompt.source, **named}
        return self.texts[preferred, other]


# ---- to be judged anew ----------------------------------------------------------------------------------------------------

ROW = {"kind": str, "source": str, "prompt": str, "preferred": str, "other": str}


def flagged_rows(run_dir: Path) -> list[dict]:
    """The rows of a run's flagged_pairs.jsonl that are sound."""
    rows = json_lines(run_dir / FLAGGED)
    return [row for row in rows if all(isinstance(row.get(name), kind) for name, kind in ROW.items())]


def to_be_judged(rows: Iterable[dict]) -> list[dict]:
    """Flagged pairs in the form that the labelling app imports, each pair of texts once: a problem and two versions.

    The preference is left open, so that they are judged anew; what the data said is `labelled`, 0 for version1.
    """
    found: dict[tuple, dict] = {}
    for row in rows:
        # In which order the two stand is nothing that a judge should learn the label from.
        texts = sorted([row["preferred"], row["other"]])
        judged = {"description": row["prompt"], "version1": texts[0], "version2": texts[1], "preference": None}
        judged |= {"labelled": texts.index(row["preferred"]), "source": row["source"], "flagged": row["kind"]}
        known = found.setdefault((row["prompt"], *texts), judged)
        if row["kind"] not in known["flagged"].split(", "):
            known["flagged"] += f", {row['kind']}"
    return list(found.values())


def write_flagged(run_dir: Path, to: Path) -> int:
    """Write a run's flagged pairs for the labelling app, as JSON lines; returns how many.

    Raises UserError for a run without any, and for a file that cannot be written.
    """
    rows = to_be_judged(flagged_rows(run_dir))
    if not rows:
        raise UserError(
            f"{run_dir}: no {FLAGGED} with pairs in it. Expected the directory of a run with ledger=true and a loss of pairs, "
            "after its first evaluation with steps before it."
        )
    try:
        to.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--flagged: {to} cannot be written: {error.strerror}. Expected a file of yours.") from error
    return len(rows)
