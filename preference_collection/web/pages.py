"""What the page of a comparison shows: the task, the answers in their order, their tests, what was judged."""

from dataclasses import dataclass

from markupsafe import Markup

from preference_collection.generation.judges import shown_reason
from preference_collection.generation.writing import read_reply
from preference_collection.running import TestRun
from preference_collection.store.model import Comparison, Judgment, Task, Verdict, shown_order
from preference_collection.web.markup import code_block, rendered
from preference_collection.web.shared import Shared, html

# What the names of two answers are where they stand side by side, and where one stands above the other.
BESIDE, STACKED = ("left", "right"), ("upper", "lower")
SIGNS = {"passed": "✓", "failed": "✗", "error": "!", "timed out": "⏱"}


@dataclass(frozen=True)
class Side:
    """An answer as shown: number counts from the left and is its key, index is its place in the comparison.

    beside and stacked are its names where answers stand side by side, and one above the other. fault is what makes it useless,
    as the end of a sentence, called the function that its tests call if that is not the task's.
    """

    number: int
    index: int
    beside: str
    stacked: str
    html: Markup
    tests: Markup
    fault: str | None
    called: str


@dataclass(frozen=True)
class Shown:
    """A comparison as shown to a labeler. polled: some tests still run. others: (address, name, whether it is this).

    repeated: the title is the beginning of the prompt, and need not be seen twice.
    given_*: what they gave with the judgment that this one replaces. given_from: the number of the answer that theirs began as.
    """

    id: str
    task: Task
    order: tuple[int, ...]
    prompt: Markup
    turns: tuple[tuple[str, Markup], ...]
    tests: tuple[str, ...]
    sides: tuple[Side, ...] = ()
    polled: bool = False
    repeated: bool = False
    note: str = ""
    others: tuple[tuple[str, str, bool], ...] = ()
    reasons: tuple[str, ...] = ()
    given_reasons: tuple[str, ...] = ()
    given_comment: str = ""
    given_edited: str = ""
    given_from: int | None = None


def show_task(shared: Shared, task: Task, **more) -> Shown:
    """A task without answers."""
    prompt, turns = Markup(), ()
    said = [task.prompt] if isinstance(task.prompt, str) else [turn[1] for turn in task.prompt]
    begins = " ".join(task.title.rstrip("….").split())
    more["repeated"] = bool(begins) and not task.difficulty and any(" ".join(text.split()).startswith(begins) for text in said)
    if isinstance(task.prompt, str):
        prompt = rendered(task.prompt, shared.settings.fold_lines)
    else:
        turns = tuple((turn[0], rendered(turn[1], shared.settings.fold_lines)) for turn in task.prompt)
    tests = tuple(f"{task.function_name}({', '.join(map(repr, test['args']))}) → {test['expected']!r}" for test in task.tests)
    return Shown(**{"id": "", "order": (), **more}, task=task, prompt=prompt, turns=turns, tests=tests)


def show_comparison(
    shared: Shared, labeler: str, comparison: Comparison, again: Judgment | None = None, is_new: bool = False
) -> Shown:
    """A comparison for a labeler.

    again: their undone judgment of it, whose reasons, comment and better answer are kept. is_new: it comes from the queue, so
    that they have not judged it.
    """
    task = shared.task(comparison.task)
    order = shown_order(labeler, comparison.id, len(comparison.answers))
    runs = runs_of(shared, comparison, task)
    sides = tuple(_side(shared, comparison, task, number, index, runs[index]) for number, index in enumerate(order, start=1))
    standing = [] if is_new else shared.store.standing(comparison.id)
    own = next((judgment for judgment in standing if judgment.labeler == labeler and not judgment.settles), None)
    note = f"You judged: {judged_words(own, order)}. Judging again replaces it." if own else ""
    reasons = shared.settings.reasons if task.kind == "code" else shared.settings.text_reasons
    return show_task(
        shared, task, id=comparison.id, order=order, sides=sides, note=note,
        others=() if is_new else _others(shared, comparison),
        polled=any(run and not run.over for run in runs), reasons=tuple(reasons),
        **_given(again or own, order),
    )  # fmt: skip


def _given(judgment: Judgment | None, order: tuple[int, ...]) -> dict:
    if judgment is None:
        return {}
    begun = None if judgment.edited_from is None else order.index(judgment.edited_from) + 1
    return {
        "given_reasons": judgment.reasons,
        "given_comment": judgment.comment,
        "given_edited": judgment.edited,
        "given_from": begun,
    }


def prepare(shared: Shared, id: str) -> None:
    """Do what showing a comparison needs before it is shown, except its tests."""
    comparison = shared.comparison(id)
    if comparison:
        show_task(shared, shared.task(comparison.task))
        for index in range(len(comparison.answers)):
            answer_html(shared, comparison, index)


def runs_of(shared: Shared, comparison: Comparison, task: Task) -> list[TestRun | None]:
    """The tests of each answer, in the comparison's order; started where they have not run."""
    return [shared.runner.start_tests(answer, task) for answer in comparison.answers]


def tests_of(run: TestRun | None, task: Task) -> Markup:
    """The badges of the tests of one answer."""
    return html("badges.html", run=run, has_tests=bool(task.tests), signs=SIGNS, line_of=line_of)


def line_of(result: dict) -> str:
    """The details of a failed test."""
    said = result["message"] or f"got {result['got']}, expected {result['expected']}"
    return f"{result['call']}\n    {result['status']}: {said}"


def _side(shared: Shared, comparison: Comparison, task: Task, number: int, index: int, run: TestRun | None) -> Side:
    answer, two = comparison.answers[index], len(comparison.answers) == 2
    name = f"answer {number}"
    beside, stacked = (BESIDE[number - 1], STACKED[number - 1]) if two else (name, name)
    fault = read_reply(task, answer.text).fault
    text, called = answer_html(shared, comparison, index), answer.parameters.get("function_name", "")
    return Side(number, index, beside, stacked, text, tests_of(run, task), fault, called)


def answer_html(shared: Shared, comparison: Comparison, index: int) -> Markup:
    """An answer: its code with the whole reply behind a fold, or the reply."""
    answer, fold_lines = comparison.answers[index], shared.settings.fold_lines
    whole = f"/text/{comparison.id}/{index}"
    if answer.code is None:
        return rendered(answer.text, fold_lines, whole)
    code = code_block(answer.code, "python", fold_lines, whole)
    if answer.code.strip() == answer.text.strip():
        return code
    reply = Markup('<details class="reply"><summary>Full reply</summary>{}</details>')
    return code + reply.format(rendered(answer.text, 0, whole))


def _others(shared: Shared, comparison: Comparison) -> tuple[tuple[str, str, bool], ...]:
    """The comparisons of the same task, if there are several, oldest first."""
    all_of_task = shared.store.comparisons_of(comparison.task)[::-1]
    if len(all_of_task) < 2:
        return ()
    return tuple((f"/label/{c.id}", f"comparison {n}", c.id == comparison.id) for n, c in enumerate(all_of_task, start=1))


# ---- in words ---------------------------------------------------------------------------------------------------------------


def judged_words(judgment: Judgment, order: tuple[int, ...]) -> str:
    """What a judgment says of the answers in the order shown."""
    if judgment.choice != "ranked":
        bad = "both are bad" if len(order) == 2 else "all are bad"
        return {"tie": "a tie", "bad": bad, "skip": "skipped"}[judgment.choice]
    return ranked_words(judgment.ranks, order)


def ranked_words(ranks: tuple[int, ...], order: tuple[int, ...]) -> str:
    """Ranks in words: "answer 2 is better" of two, "2 > 1 = 3" of more, by the numbers shown."""
    if len(set(ranks)) == 1:
        return "a tie"
    places = [
        [str(number) for number, index in enumerate(order, start=1) if ranks[index] == rank] for rank in sorted(set(ranks))
    ]
    return f"answer {places[0][0]} is better" if len(ranks) == 2 else " > ".join(" = ".join(place) for place in places)


def verdict_words(verdict: Verdict, order: tuple[int, ...]) -> dict:
    """The verdict of a model: judge, words, reason, and of two answers the number of the better one, as shown, else 0."""
    ranks = [verdict.ranks[index] for index in order]
    number = ranks.index(1) + 1 if len(ranks) == 2 and ranks[0] != ranks[1] else 0
    reason = reason_words(verdict, order)
    return {"judge": verdict.judge, "words": ranked_words(verdict.ranks, order), "number": number, "reason": reason}


def reason_words(verdict: Verdict, order: tuple[int, ...]) -> str:
    """The reason of a verdict, with the answers by the numbers shown."""
    return shown_reason(verdict.reason, [f"answer {order.index(index) + 1}" for index in range(len(order))])


def progress_words(judged: int, left: int) -> str:
    """The progress of a labeler: what is left may be judged by others first."""
    if not left:
        return f"{judged:,} judged by you · nothing left"
    return f"{judged:,} judged by you · up to {left:,} left"
