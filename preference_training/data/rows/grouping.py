"""Group the rows of each prompt into one record, in memory that does not grow with the data.

Responses that repeat their prompt: if those of all rows do, it is removed from them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations, islice
from typing import NamedTuple

from preference_training.data.records.record import Prompt, Response, response_of
from preference_training.data.records.report import SAME_TEXT, DataReport
from preference_training.data.records.validation import item_error
from preference_training.data.rows.answers import answer_in, listed_answer
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.prompt_fields import PromptFields
from preference_training.data.rows.templates import ASSISTANT, parse_dialogue, split_dialogue
from preference_training.data.rows.values import as_number, is_empty, is_missing_number, parse_text_list


def new_record() -> dict:
    """An empty record."""
    return {"responses": [], "pairs": [], "sft_target": None}


def add_responses(
    record: dict, responses: Iterable[Response], pairs: Iterable[tuple[int, int]], places: dict[Response, int] | None = None
) -> int:
    """Add responses, each once, and the pairs between them to a record. Returns how many pairs had identical texts.

    places: of the responses that the record has, kept up to date; a caller that adds many keeps it, or else they are looked up.
    """
    known = record["responses"]
    places = {response: place for place, response in enumerate(known)} if places is None else places
    indices = []
    for response in responses:
        if response not in places:
            places[response] = len(known)
            known.append(response)
        indices.append(places[response])
    same = 0
    for preferred, other in pairs:
        if indices[preferred] == indices[other]:
            same += 1
        else:
            record["pairs"].append((indices[preferred], indices[other]))
    return same


# Pairs of one prompt: those of some 1,400 scored responses. More would not fit into memory.
MOST_PAIRS = 1_000_000
TOO_MANY_PAIRS = f"pairs beyond {MOST_PAIRS:,} of a prompt's scored responses, among which where and top_k choose"


def pairs_by_score(scores: Sequence[float], report: DataReport | None = None) -> list[tuple[int, int]]:
    """All pairs of indices whose scores differ, the higher one first, in the order of their indices.

    Of more than MOST_PAIRS some are taken, about as many with each index; the report counts the others.
    """
    number = len(scores)
    if number * (number - 1) // 2 <= MOST_PAIRS:
        return _with_different_scores(combinations(range(number), 2), scores)
    # Each index with those at the same distances, which are spread evenly: rows may come sorted by their scores.
    taken, half = max(1, MOST_PAIRS // number), (number - 1) // 2
    distances = [1 + k * half // taken for k in range(taken)]
    indices = sorted(tuple(sorted((i, (i + distance) % number))) for i in range(number) for distance in distances)
    pairs = _with_different_scores(indices, scores)
    if report is not None:
        report.skip(TOO_MANY_PAIRS, number * (number - 1) // 2 - _equal_pairs(scores) - len(pairs))
    return pairs


def _with_different_scores(indices: Iterable[tuple[int, int]], scores: Sequence[float]) -> list[tuple[int, int]]:
    return [(i, j) if scores[i] > scores[j] else (j, i) for i, j in indices if scores[i] != scores[j]]


def _equal_pairs(scores: Sequence[float]) -> int:
    return sum(count * (count - 1) // 2 for count in Counter(scores).values())


class Row(NamedTuple):
    """One row of a file or table: responses to a prompt, and the preferences between them.

    target: the index of the response that SFT learns, None if all are undesirable. scores, labels: of each response. weights,
    margins: of each pair. forms_pairs: the row holds one scored response, and pairs are formed between the rows of a prompt.
    more_targets: further responses that SFT learns. tools: JSON text, which belongs to the prompt; "" for none. number: of the
    row in its file; 0 if unknown.
    """

    prompt: Prompt
    responses: list[Response]
    pairs: list[tuple[int, int]]
    target: int | None
    scores: list[float] | None = None
    labels: list[bool] | None = None
    weights: list[float] | None = None
    margins: list[float] | None = None
    forms_pairs: bool = False
    more_targets: tuple[int, ...] = ()
    tools: str = ""
    number: int = 0

    @property
    def stands_alone(self) -> bool:
        """Whether it is a record of its own: nothing relates it to other rows of its prompt."""
        return not (self.pairs or self.labels or self.forms_pairs)

    @property
    def targets(self) -> list[Response]:
        """The responses that SFT learns."""
        return [self.responses[index] for index in (self.target, *self.more_targets) if index is not None]


def group_rows(rows: Iterable[Row], report: DataReport, window: int = 20_000) -> Iterator[tuple[Prompt, dict]]:
    """Group the rows of each prompt into one record, in the order of their first rows.

    At most `window` prompts are kept open: rows of a prompt that are further apart form separate records, so that memory does
    not grow with the data. Rows without a prompt, and rows without pair, score and label, are records of their own. The report
    counts pairs of identical texts. SFT learns the target of each row; of rows with one scored response each, those with the
    best score of their prompt.
    """
    groups: dict[tuple[Prompt, str], _Group] = {}
    for row in rows:
        if row.stands_alone:
            record = {"responses": row.responses, "pairs": [], "sft_target": row.responses[row.target]}
            beside = {"tools": row.tools, "scores": row.scores, "rows": row.number and [row.number]}
            yield row.prompt, record | {key: value for key, value in beside.items() if value}
            continue
        if row.pairs and row.responses.count(row.responses[0]) == len(row.responses):
            report.skip(SAME_TEXT, len(row.pairs))
            continue
        if row.prompt == "":
            # Answers without a prompt have nothing in common.
            (alone := _Group()).add(row, report)
            yield from alone.items(row.prompt, row.tools, report)
            continue
        key = row.prompt, row.tools
        if (group := groups.get(key)) is None:
            group = groups[key] = _Group()
        group.add(row, report)
        if len(groups) > window:
            key = next(iter(groups))
            yield from groups.pop(key).items(*key, report)
    for key, group in groups.items():
        yield from group.items(*key, report)


class _Group:
    """The rows of one prompt so far."""

    def __init__(self):
        self.record = new_record()
        self.places: dict[Response, int] = {}
        self.targets: list[Response] = []
        self.rows: list[int] = []
        # By response; `formed` are those whose pairs are formed at the end.
        self.scores: dict[Response, float] = {}
        self.labels: dict[Response, bool | None] = {}
        self.both: set[Response] = set()
        self.formed: list[tuple[Response, float]] = []

    def add(self, row: Row, report: DataReport) -> None:
        """Add a row."""
        self.rows += [row.number] * bool(row.number)
        if row.forms_pairs:
            self.formed += zip(row.responses, row.scores, strict=True)
            return
        different = [k for k, (i, j) in enumerate(row.pairs) if row.responses[i] != row.responses[j]]
        report.skip(SAME_TEXT, add_responses(self.record, row.responses, row.pairs, self.places))
        before = len(self.record["pairs"]) - len(different)
        for key, values, without in (("weights", row.weights, 1.0), ("margins", row.margins, None)):
            if values is not None or key in self.record:
                known = self.record.setdefault(key, [without] * before)
                known.extend(without if values is None else values[k] for k in different)
        if row.scores:
            self.scores |= dict(zip(row.responses, row.scores, strict=True))
        for response, label in zip(row.responses, row.labels or (), strict=False):
            self._label(response, label, report)
        if different or not row.pairs:
            self.targets += row.targets

    def _label(self, response: Response, label: bool | None, report: DataReport) -> None:
        """Add a label; None says nothing. A response with both labels has none from then on."""
        known = self.labels.setdefault(response, label)
        if response in self.both or label in (known, None):
            return
        self.labels[response] = label if known is None else None
        if known is not None:
            self.both.add(response)
            report.skip(BOTH_LABELS)

    def items(self, prompt: Prompt, tools: str, report: DataReport) -> Iterator[tuple[Prompt, dict]]:
        """The prompt and its record, if there is anything to learn from it."""
        record = self.record
        if self.formed:
            given = [response for response, _ in self.formed], [score for _, score in self.formed]
            responses, scores, pairs = _ranked(*given, report)
            best = max(scores)
            first, *others = [index for index, score in enumerate(scores) if score == best]
            self.add(Row(prompt, responses, pairs, first, scores, more_targets=tuple(others)), report)
        if self.targets or self.labels:
            # Of responses that are all undesirable, SFT learns none; a record has a target all the same.
            record["sft_target"] = self.targets[-1] if self.targets else record["responses"][0]
            record |= {"sft_targets": self.targets} if len(self.targets) > 1 else {}
            record |= {
                key: [of.get(response) for response in record["responses"]]
                for key, of in (("scores", self.scores), ("labels", self.labels))
                if of
            }
        if record["pairs"] or self.labels or self.formed:
            yield prompt, record | {key: value for key, value in (("tools", tools), ("rows", self.rows)) if value}


BOTH_LABELS = (
    "the label of a response that rows call both desirable and undesirable; only losses of labels, such as kto, read it"
)
EQUAL_SCORES = "two responses have equal scores"
SAME_RESPONSE = "a response has the text of another one"
NO_PAIR = "no two responses have different scores"


def scored_record(responses: Sequence[Response], scores: Sequence[float], report: DataReport) -> dict | None:
    """A record of all pairs of responses with different scores, the best of which is the SFT target; None without any pair.

    Of identical responses the last counts. The report counts what is skipped.
    """
    texts, kept, pairs = _ranked(responses, scores, report)
    if not pairs:
        report.skip(NO_PAIR)
        return None
    return {"responses": texts, "pairs": pairs, "sft_target": texts[kept.index(max(kept))], "scores": kept}


def _ranked(
    responses: Sequence[Response], scores: Sequence[float], report: DataReport
) -> tuple[list[Response], list[float], list[tuple[int, int]]]:
    """Responses, each once, their scores, and the pairs of those that differ."""
    score_of = dict(zip(responses, scores, strict=True))
    texts, kept = list(score_of), list(score_of.values())
    pairs = pairs_by_score(kept, report)
    report.skip(SAME_RESPONSE, len(responses) - len(texts))
    report.skip(EQUAL_SCORES, _equal_pairs(kept))
    return texts, kept, pairs


# ---- rows that are records -------------------------------------------------------------------------------------------------

# What a row that is a record has: what loaders give, perhaps a rank, score and label of each response, the best and the worst.
RECORD_COLUMNS = ("responses", "pairs", "sft_target", "ranks", "scores", "labels", "chosen", "rejected")


def record_row(row: dict, prompts: PromptFields) -> Row:
    """A row that is a record: `responses`, `pairs` of their indices, and `sft_target`, which may be a further response.

    Without a target, SFT learns the first preferred response, and none of those that are all undesirable. Raises RowError.
    """
    answers = parse_text_list(row.get("responses"))
    if not isinstance(answers, list) or not answers:
        raise RowError("field 'responses' is not a list of texts or conversations.")
    responses = [_response(listed_answer(answer, "responses", k)) for k, answer in enumerate(answers)]
    values = {name: parse_text_list(row.get(name)) for name in ("pairs", "ranks", "scores", "labels")}
    pairs = values["pairs"] or []
    pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in pairs] if isinstance(pairs, list) else pairs
    labels = None if is_empty(values["labels"]) else values["labels"]
    scores = _numbers(values["ranks"], "ranks", -1, len(responses)) or _numbers(values["scores"], "scores", 1, len(responses))
    given = row.get("sft_target")
    target = None if is_empty(given) else _response(answer_in(given, "sft_target"))
    record = {"responses": responses, "pairs": pairs, "sft_target": target or responses[0], "labels": labels, "scores": scores}
    if problem := item_error(("", record)):
        raise RowError(f"{problem}.")
    if target is None and (pairs or not labels or None in labels or any(labels)):
        target = responses[pairs[0][0] if pairs else 0]
    if target is not None and target not in responses:
        more = [[*some, None] if some is not None else None for some in (scores, labels)]
        responses, scores, labels = [*responses, target], *more
    prompt = "" if row.get(prompts.prompt) == "" else prompts.read(row)
    return Row(prompt, responses, pairs, None if target is None else responses.index(target), scores, labels)


def _numbers(values, name: str, sign: int, count: int) -> list[float | None] | None:
    """A number of each response, times a sign: the higher the better. Raises RowError."""
    if is_empty(values):
        return None
    if not (isinstance(values, list) and len(values) == count):
        raise RowError(f"field {name!r} is {values!r}, expected a list of {count} numbers, one for each response.")
    return [None if is_missing_number(value) else sign * as_number(value, name) for value in values]


def _response(answer) -> Response:
    return response_of(answer) if isinstance(answer, tuple) else answer


# ---- responses that repeat their prompt ------------------------------------------------------------------------------------

# Rows that are inspected first, at most and at least; a single row is no evidence.
ROWS_INSPECTED, MIN_ROWS = 1000, 2

CUT = "rows whose responses repeated their prompt, which was removed, as in all of the first rows"
LEFT = "rows whose responses repeat their prompt, which was kept because other rows' do not"


def strip_repeated_prompts(rows: Iterator[Row], report: DataReport) -> Iterator[Row]:
    """The rows, with the prompt removed from the responses if all of the first `ROWS_INSPECTED` rows repeat it in each.

    Otherwise a model would read it twice, and be trained to generate it. The report counts such rows either way.
    """
    rows = iter(rows)
    first = list(islice(rows, ROWS_INSPECTED))
    cuts = len(first) >= MIN_ROWS and all(map(_cut, first))
    for row in chain(first, rows):
        cut = _cut(row)
        if cut is None:
            yield row
        elif cuts:
            report.change(CUT)
            yield cut
        else:
            report.change(LEFT)
            yield row


def _cut(row: Row) -> Row | None:
    """The row with its prompt removed from all responses, if all start with it; else None."""
    found = []
    for response in row.responses:
        if (after := _after_prompt(row.prompt, response)) is None:
            return None
        found.append(after)
    if not found or len({prompt for prompt, _ in found}) > 1:
        return None
    return row._replace(prompt=found[0][0], responses=[rest for _, rest in found])


def _after_prompt(prompt: Prompt, response: Response) -> tuple[Prompt, str] | None:
    """Prompt and response, where the response, or the dialogue in it, starts with the prompt; else None."""
    asked = (prompt if isinstance(prompt, str) else prompt[-1].content).strip()
    if not isinstance(response, str) or not asked:
        return None
    start = len(response) - len(response.lstrip())
    if response.startswith(asked, start):
        rest = response[start + len(asked) :]
        # Whole words only: "Island" does not start with the prompt "Is".
        if rest.strip() and not (asked[-1].isalnum() and rest[0].isalnum()):
            ends_with_space = not isinstance(prompt, str) or prompt[-1].isspace()
            return prompt, rest.lstrip() if ends_with_space else rest
    if ASSISTANT not in response:
        return None
    before, rest = split_dialogue(response)
    turns = parse_dialogue(before)
    if turns and rest.strip() and [turn.content.strip() for turn in turns] == [asked] and isinstance(prompt, str):
        return before, rest
    return None
