"""Importing tasks, answers and judgments: any file that training reads, programming problems, and stores of the older layout.

    rows -> tasks, single answers, comparisons, judgments -> the store

Ids are hashes of what they are of, so that importing a row twice adds it once. A row's preference is a judgment by the labeler
`imported`. What an answer has besides its text is in its parameters: `turns`, of an answer of several turns or with calls of
tools, and `tools`, the JSON text of the tools that its prompt offers.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path

from preference_collection.exchange.code_rows import CodeRow, code_row, content_id, older_rows
from preference_collection.exchange.text_rows import TextRow, text_rows
from preference_collection.store.model import (
    MOST_ANSWERS,
    Answer,
    Comparison,
    Judgment,
    Task,
    ranks_of_pick,
    ranks_of_scores,
)
from preference_collection.store.store import Store
from preference_training.core.errors import UserError
from preference_training.data.files import is_data_file, read_rows
from preference_training.data.records.record import Prompt, Response, prompt_text
from preference_training.data.records.report import SAME_TEXT, DataReport
from preference_training.data.rows.column_names import PROMPTS
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.values import is_empty
from preference_training.data.sources.storage import expanded, is_pattern, is_remote
from preference_training.sandbox.replies import extract_code

SAMPLE_FOLDER = Path(__file__).parent.parent / "samples"
# Programming problems, and prompts and conversations with answers.
SAMPLES, CONVERSATIONS = SAMPLE_FOLDER / "problems.jsonl", SAMPLE_FOLDER / "conversations.jsonl"

# The labeler and model of imported rows.
IMPORTED = "imported"

# The rows that decide what a file has.
FIRST_ROWS = 100

# Columns that only programming problems have.
OF_PROBLEMS = {"function_name", "tests", "version1", "version2"}

# Columns that make a prompt with tests a row of answers like any other.
ANSWERS = {"response", "responses", "completion", "rejected"}

MORE_ANSWERS = f"answers left out: of more than {MOST_ANSWERS} answers to a prompt, the first {MOST_ANSWERS} are compared"
REPEATED = "judgments that repeat an earlier one, and count once"
OWN = "judgments that this store has, from which they were exported"
OPPOSED = "judgments that differ from an earlier one of the same answers, and are a further labeler's"
ANSWER_ALONE = "an answer without a prompt, which nothing can be compared with"
TOOLS_OF_PROMPT = "prompts without an answer whose tools are not kept"
LABEL_ALONE = "labels of single answers, which are not kept until they are compared"


@dataclass
class Import:
    """The content of the rows, and the counts after adding it.

    answers: those that have none to be compared with yet, with their tasks. singles: answers in rows of their own, by task,
    with the score and the label of each. store_has: the ids of the store's judgments. added, known: numbers of tasks. waiting:
    the number of answers added alone.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    answers: dict[str, tuple[str, Answer]] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    judgments: dict[str, Judgment] = field(default_factory=dict)
    report: DataReport = field(default_factory=lambda: DataReport(skip_bad_rows=True))
    singles: dict[str, list[tuple[Answer, float | None, bool | None]]] = field(default_factory=dict)
    store_has: set[str] = field(default_factory=set)
    added: int = 0
    known: int = 0
    waiting: int = 0

    @property
    def num_bad_rows(self) -> int:
        """The number of invalid rows."""
        return self.report.num_bad_rows

    def line(self) -> str:
        """A one-line summary."""
        judged, compared = len(self.judgments), len(self.comparisons)
        counts = (
            (self.added, "task", "tasks", " added"), (self.known, "known task", "known tasks", ""),
            (compared, "new comparison", "new comparisons", ""), (judged, "judgment", "judgments", ""),
            (self.waiting, "single answer", "single answers", " with no other answer to the prompt"),
            (self.num_bad_rows, "invalid row", "invalid rows", " skipped"),
        )  # fmt: skip
        parts = [f"{count} {one if count == 1 else many}{rest}" for count, one, many, rest in counts if count]
        return ", ".join(parts) or "nothing new"

    def lines(self) -> list[str]:
        """The summary, and what was changed, left out or not read."""
        counts = [f"{count} {what}" for count, what in self.report.counts() if not what.startswith("bad row")]
        lines = ["; ".join(counts)] * bool(counts) + self.report.remarks() + self.report.bad_row_lines()
        return [self.line(), *(f"  {line.removeprefix('datasets: ')}" for line in lines)]

    # ---- content of rows ----------------------------------------------------------------------------------------------------

    def take_code(self, row: CodeRow) -> None:
        """Add a problem, and the comparison of its versions. Raises RowError for what contradicts an earlier row."""
        task = row.task
        if not self.tasks.setdefault(task.id, task).same_prompt(task):
            raise RowError(f"id {task.id!r} belongs to a different problem in an earlier row")
        if not row.versions:
            return
        answers = tuple(_code_answer(task, text) for text in row.versions)
        if answers[0].id == answers[1].id:
            self.report.skip(SAME_TEXT)
            return
        comparison = Comparison(content_id(*(answer.id for answer in answers)), task.id, answers)
        self.comparisons[comparison.id] = comparison
        if row.label is not None and not self._is_own(row):
            ranks = ranks_of_pick(row.label, len(answers))
            judgment = _imported(comparison, IMPORTED, "ranked", ranks)
            if self.judgments.setdefault(judgment.id, judgment) != judgment:
                raise RowError("the same two solutions have the opposite preference in an earlier row")

    def take_text(self, row: TextRow) -> None:
        """Add a prompt and its answers. Raises RowError for an answer that nothing can be compared with."""
        task = task_of(row)
        answers = [text_answer(task, response, row.tools) for response in row.answers]
        if not row.prompt and len(answers) < 2:
            raise RowError(f"{ANSWER_ALONE}.")
        self.tasks.setdefault(task.id, task)
        if not answers:
            self.report.change(TOOLS_OF_PROMPT, bool(row.tools))
        elif len(answers) == 1:
            self.singles.setdefault(task.id, []).append((answers[0], row.score, row.label))
        else:
            said = () if self._is_own(row) else (row.choice, row.ranks, row.edited)
            self._compare(task, answers, *said)

    def _is_own(self, row: CodeRow | TextRow) -> bool:
        """Whether a row is an export of one of the store's own judgments, which counts once."""
        is_own = row.judgment in self.store_has
        self.report.change(OWN, is_own)
        return is_own

    def _compare(
        self, task: Task, answers: Sequence[Answer], choice: str = "", ranks: Sequence[int] = (), edited: Response = ""
    ) -> None:
        """Add a comparison of answers, each once, and what a row says of them."""
        first = {answer.id: k for k, answer in reversed(list(enumerate(answers)))}
        kept = sorted(first.values())
        if len(kept) < len(answers):
            self.report.skip(SAME_TEXT, len(answers) - len(kept))
        self.report.change(MORE_ANSWERS, len(kept[MOST_ANSWERS:]))
        # Rows often begin with the preferred answer. Sorted, the order says nothing, and is the same for the same answers.
        kept = sorted(kept[:MOST_ANSWERS], key=lambda k: answers[k].id)
        if len(kept) < 2:
            self.singles.setdefault(task.id, []).append((answers[kept[0]], None, None))
            return
        some = tuple(answers[k] for k in kept)
        comparison = Comparison(content_id(*(answer.id for answer in some)), task.id, some)
        self.comparisons[comparison.id] = comparison
        if ranks:
            ranks = ranks_of_scores([-ranks[k] for k in kept])
            choice, ranks = ("ranked", ranks) if max(ranks) > 1 else ("tie", ())
        if choice:
            self._judge(comparison, choice, tuple(ranks), "" if isinstance(edited, tuple) else edited)

    def _judge(self, comparison: Comparison, choice: str, ranks: tuple[int, ...], edited: str) -> None:
        """Add a judgment. Different ones of the same answers are those of several labelers."""
        for labeler in _imported_labelers():
            judgment = _imported(comparison, labeler, choice, ranks, edited)
            if judgment.id not in self.judgments:
                self.judgments[judgment.id] = judgment
                self.report.change(OPPOSED, labeler != IMPORTED)
                return
            if self.judgments[judgment.id] == judgment:
                self.report.change(REPEATED)
                return

    def drop_known(self, store: Store) -> None:
        """Drop the comparisons that a store has, and of their judgments those that `imported` has given before.

        What `imported` has judged otherwise is the judgment of a further labeler.
        """
        known = set(store.comparison_ids())
        of_known = {id: said for id, said in self.judgments.items() if said.comparison in known}
        earlier: dict[str, dict[str, tuple]] = defaultdict(dict)
        for each in store.standing_among({said.comparison for said in of_known.values()}):
            earlier[each.comparison][each.labeler] = each.choice, each.ranks, each.edited
        self.judgments = {id: said for id, said in self.judgments.items() if id not in of_known}
        for said in of_known.values():
            opinion, others = (said.choice, said.ranks, said.edited), earlier[said.comparison]
            labeler = next(name for name in _imported_labelers() if others.get(name, opinion) == opinion)
            if labeler not in others:
                others[labeler] = opinion
                again = _imported(self.comparisons[said.comparison], labeler, *opinion)
                self.judgments[again.id] = again
            self.report.change(OPPOSED, (labeler != IMPORTED) - (said.labeler != IMPORTED))
        self.comparisons = {id: comparison for id, comparison in self.comparisons.items() if id not in known}

    def compare_singles(self) -> None:
        """Compare answers that stand in rows of their own, where a prompt has several; scores and labels judge them."""
        for id, singles in self.singles.items():
            distinct = {answer.id: (answer, score, label) for answer, score, label in reversed(singles)}
            found = list(reversed(distinct.values()))
            self.report.skip(SAME_TEXT, len(singles) - len(found))
            if len(found) == 1:
                [(answer, _, label)] = found
                self.answers[answer.id] = id, answer
                self.report.change(LABEL_ALONE, label is not None)
                continue
            answers, scores, labels = zip(*found, strict=True)
            numbers = scores if None not in scores else labels if None not in labels else ()
            choice = "bad" if numbers is labels and not any(labels) else ""
            self._compare(self.tasks[id], answers, choice, () if choice or not numbers else ranks_of_scores(numbers))
        self.singles = {}


def import_into(store: Store, path: Path | str, skip_bad_rows: bool = False, given: dict | None = None) -> Import:
    """Add the content of a file, or of what else training reads, to a store, all or nothing.

    given: keys of an entry of `datasets` that say which column is which. Raises UserError for an unreadable file and, unless
    skip_bad_rows, for invalid rows, listing the first ten kinds with their numbers, counted from 1.
    """
    found = Import(store_has=store.judgment_ids())
    try:
        _read(expanded(str(path)), given or {}, found)
    except UserError as error:
        raise UserError(f"import: {str(error).removeprefix('datasets: ').removeprefix('import: ')}") from error
    found.compare_singles()
    if found.num_bad_rows and not skip_bad_rows:
        rows = "\n".join(f"  {line.removeprefix('datasets: ')}" for line in found.report.bad_row_lines())
        several = found.num_bad_rows > 1
        invalid = f"{found.num_bad_rows} rows of {path} are" if several else f"1 row of {path} is"
        raise UserError(
            f"import: {invalid} invalid, and nothing was imported. Fix {'them, or skip them' if several else 'it, or skip it'} "
            f"with --skip-bad-rows.{' The first of them:' * several}\n{rows}"
        )
    if not (found.tasks or found.num_bad_rows or list(found.report.counts())):
        raise UserError(f"import: {path} has no rows. Expected rows that training reads, or a store of the older layout.")
    return _add(store, found)


def add_samples(store: Store) -> None:
    """Add the sample problems and the sample conversations."""
    for path in (SAMPLES, CONVERSATIONS):
        import_into(store, path)


def _add(store: Store, found: Import) -> Import:
    found.added, found.known = store.add_tasks(found.tasks.values())
    found.drop_known(store)
    store.add_comparisons(found.comparisons.values(), found.judgments.values())
    found.waiting = store.add_answers_to(found.answers.values())
    return found


# ---- reading ----------------------------------------------------------------------------------------------------------------


def _read(path: str, given: dict, found: Import) -> None:
    """Read all rows of a path."""
    for number, row in _contents(path, given, found.report):
        try:
            found.take_text(row) if isinstance(row, TextRow) else found.take_code(row)
        except RowError as fault:
            found.report.bad_row(UserError(f"datasets: {path}, row {number}: {str(fault).removesuffix('.')}."))


def _contents(path: str, given: dict, report: DataReport) -> Iterator[tuple[int, CodeRow | TextRow]]:
    is_local = not (path.startswith("md:") or is_remote(path) or is_pattern(path))
    # Names on the Hub are ORGANIZATION/NAME.
    if is_local and not Path(path).exists() and (is_data_file(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)):
        raise UserError(f"{path}: no such file. Expected rows that training reads, or a store of the older layout.")
    if path.startswith("md:") or (is_local and Path(path).is_file() and not is_data_file(path)):
        yield from _of_code(path, older_rows(path, report), report)
        return
    if not given and is_data_file(path) and not is_pattern(path) and (is_remote(path) or Path(path).is_file()):
        rows = read_rows(path, DataReport(skip_bad_rows=True))
        if has_problems(row for _, row in islice(rows, FIRST_ROWS)):
            yield from _of_code(path, read_rows(path, report), report)
            return
    yield from text_rows(path, given, report)


def has_problems(rows: Iterator[dict]) -> bool:
    """Whether rows are programming problems: a description with what only they have or no prompt, or a prompt with tests."""
    rows = list(rows)
    names = {name for row in rows for name in row}
    prompts = {name for row in rows for name, value in row.items() if not is_empty(value)} & {*PROMPTS, "chosen", "text"}
    if "description" not in names:
        return "tests" in names and prompts == {"prompt"} and not names & ANSWERS
    return bool(names & OF_PROBLEMS) or not prompts


def _of_code(path: str, rows: Iterator[tuple[int, dict]], report: DataReport) -> Iterator[tuple[int, CodeRow | TextRow]]:
    for number, row in rows:
        try:
            found = code_row(row)
        except RowError as fault:
            report.bad_row(UserError(f"datasets: {path}, row {number}: {fault}."))
            continue
        # Pairs that a run's report calls into question may be of any kind.
        if "flagged" in row and found.versions and not all(map(_is_code, found.versions)):
            choice, ranks = ("ranked", ranks_of_pick(found.label, 2)) if found.label is not None else ("", ())
            yield number, TextRow(found.task.prompt, found.versions, choice, ranks)
        else:
            yield number, found


def _is_code(text: str) -> bool:
    found = extract_code(text)
    return found.fault is None and re.search(r"^\s*(async def|def|class) \w", found.code, re.MULTILINE) is not None


# ---- tasks and answers ------------------------------------------------------------------------------------------------------


def task_of(row: TextRow) -> Task:
    """The task of a row, with an id and a title of its content."""
    form = "text" if isinstance(row.prompt, str) else "turns"
    id = content_id(form, prompt_text(row.prompt), row.tools)
    return Task(id, row.title or _title(row.prompt), row.difficulty.lower(), row.prompt)


def _title(prompt: Prompt) -> str:
    """The beginning of what is asked."""
    asked = prompt if isinstance(prompt, str) else next((turn.content for turn in prompt[::-1] if turn.role == "user"), "")
    lines = asked.replace("\n\nHuman:", "\n").replace("\n\nAssistant:", "\n").strip().splitlines()
    first = (lines[-1] if asked.rstrip().endswith("Assistant:") else lines[0]).strip() if lines else ""
    return first if len(first) <= 80 else f"{first[:79]}…"


def _code_answer(task: Task, text: str) -> Answer:
    found = extract_code(text, task.function_name, task.tests)
    parameters = {"function_name": found.function_name} if found.function_name else {}
    return Answer(content_id(task.id, text), IMPORTED, task.prompt, parameters, text, found.code)


def _imported_labelers() -> Iterator[str]:
    """The labelers of imported judgments: different ones of the same answers are those of several."""
    yield IMPORTED
    yield from (f"{IMPORTED} {number}" for number in count(2))


def _imported(comparison: Comparison, labeler: str, choice: str, ranks: Sequence[int], edited: str = "") -> Judgment:
    order = tuple(range(len(comparison.answers)))
    id = content_id(comparison.id, labeler)
    return Judgment(id, comparison.id, labeler, choice, order, tuple(ranks), edited=edited)


def text_answer(task: Task, response: Response, tools: str = "") -> Answer:
    """An answer with a response of training's: a text, or turns, which its parameters keep."""
    parameters = {"tools": tools} if tools else {}
    if isinstance(response, str):
        return Answer(content_id(task.id, response), IMPORTED, task.prompt, parameters, response)
    shown = "\n\n".join(f"{turn.role}: {turn.content}".strip() if len(response) > 1 else turn.content for turn in response)
    more = [turn.rest for turn in response if turn.rest]
    parameters["turns"] = [list(turn) for turn in response]
    id = content_id(task.id, *chain(*response))
    return Answer(id, IMPORTED, task.prompt, parameters, "\n\n".join(filter(None, [shown, *more])))
