"""The pages about a team: guidelines, progress in plain words, agreement, and disagreements to settle."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup
from omegaconf import DictConfig
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from preference_collection.settings import guidelines_text
from preference_collection.store.model import Judgment, Verdict, new_id, ranks_of_pick
from preference_collection.store.statistics import Agreement, LabelerProgress
from preference_collection.web.labeling import MOST_SETTLED, progress
from preference_collection.web.markup import rendered
from preference_collection.web.pages import (
    answer_html,
    judged_words,
    ranked_words,
    reason_words,
    runs_of,
    show_task,
    tests_of,
)
from preference_collection.web.shared import Shared, html, labeler_of, missing, page, posted, shared_of

# Disagreements on one page.
PAGE_SIZE = 10
# Krippendorff's own bounds: labels of at least the first can be relied on, and below the second conclude nothing.
RELIABLE, TENTATIVE = 0.8, 0.667


def routes() -> list[Route]:
    """The routes of these pages."""
    return [
        Route("/agreement", agreement),
        Route("/progress", team_progress),
        Route("/api/settle", posted(settle), methods=["POST"]),
        Route("/api/unsettle", posted(unsettle), methods=["POST"]),
    ]


def guidelines_of(settings: DictConfig) -> Markup:
    """The guidelines as HTML, empty if there are none. Raises UserError if there are two, or their file cannot be read."""
    text = guidelines_text(settings)
    return rendered(text, 0) if text else Markup()


# ---- progress ---------------------------------------------------------------------------------------------------------------


def team_progress(request: Request) -> Response:
    """GET /progress: what everyone has judged, and what is left."""
    shared, labeler = shared_of(request), labeler_of(request)
    people = shared.store.progress_by_labeler()
    overlap = shared.settings.overlap
    done, total = shared.store.finished(overlap), shared.store.progress().comparisons
    return page(
        request, "progress.html", progress=progress(shared, labeler), done=done, total=total,
        summary=summary_words(done, total, overlap), people=[person_words(person) for person in people],
        left=left_words((total - done) * overlap, people),
    )  # fmt: skip


def summary_words(done: int, total: int, overlap: int) -> str:
    """How far all are: "120 of 200 comparisons have the 2 judgments they need."."""
    needed = "the judgment they need" if overlap == 1 else f"the {overlap} judgments they need"
    if not total:
        return "There are no comparisons yet."
    return f"{done:,} of {total:,} comparisons have {needed}."


def person_words(person: LabelerProgress) -> str:
    """What one has judged: "Ada judged 40 comparisons, 12 s each, 3 today."."""
    parts = [f"{person.labeler} judged {person.judgments:,} comparison{'s' * (person.judgments != 1)}"]
    if person.median_seconds is not None:
        parts.append(f"{seconds_words(person.median_seconds)} each")
    if person.skips:
        parts.append(f"{person.skips:,} skipped")
    if person.settled:
        parts.append(f"settled {person.settled:,}")
    return f"{', '.join(parts)}, {f'{person.today:,}' if person.today else 'none'} today."


def left_words(missing: int, people: Sequence[LabelerProgress]) -> str:
    """How long the judgments that are missing take at the pace so far; empty if nobody knows."""
    paces = [person.median_seconds for person in people if person.median_seconds is not None]
    if not missing or not paces:
        return ""
    return f"At this pace, the rest takes one person {seconds_words(missing * median(paces))}."


def seconds_words(seconds: float) -> str:
    """A duration: "12 s", "2 min", "3 h"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:,.0f} h"


# ---- agreement --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disagreement:
    """A comparison that people judge differently: its task, its answers, who said what and why, and ways to settle it.

    answers are (HTML, badges of their tests). said is (who, opinion, reasons, comment), written (who, the better answer that
    they wrote as HTML), ways are (words, body of the request).
    """

    id: str
    title: str
    prompt: Markup
    answers: tuple[tuple[Markup, Markup], ...]
    said: tuple[tuple[str, str, str, str], ...]
    written: tuple[tuple[str, Markup], ...]
    ways: tuple[tuple[str, dict], ...]


def agreement(request: Request) -> Response:
    """GET /agreement: alpha with what it means, agreement by pair of labelers and with judges, disagreements."""
    shared, labeler = shared_of(request), labeler_of(request)
    start = request.query_params.get("start", "")
    start = int(start) if start.isdecimal() and len(start) < 10 else 0
    open_ones, hidden = disagreements_for(shared, labeler)
    found = shared.store.agreement()
    return page(
        request, "agreement.html", progress=progress(shared, labeler), summary=alpha_words(found), found=found,
        people=shared.store.agreement_by_pair(), judges=shared.store.agreement_with_judges(), hidden=hidden,
        disagreements=[disagreement_of(shared, id) for id in open_ones[start : start + PAGE_SIZE]], start=start,
        settled=settled_of(shared), most_settled=MOST_SETTLED,
        total=len(open_ones), size=PAGE_SIZE, read_only=shared.store.read_only, share=share,
    )  # fmt: skip


def share(found: Agreement) -> str:
    """The share of equal opinions in words: "31 of 40 (78%)"."""
    return "nothing" if found.share is None else f"{found.agreed:,} of {found.compared:,} ({found.share:.0%})"


def alpha_words(found: Agreement) -> str:
    """Krippendorff's alpha with what it means."""
    if not found.judged:
        return "No comparison has been judged by two people yet, so nothing is known of their agreement."
    judged = f"{found.judged:,} comparison{'s' * (found.judged != 1)} judged by several people"
    if found.alpha is None:
        return f"All opinions on {judged} are the same. Alpha needs opinions of at least two kinds."
    if found.alpha >= RELIABLE:
        meaning = "people agree well, and the labels can be relied on"
    elif found.alpha >= TENTATIVE:
        meaning = "people agree fairly well: enough for tentative conclusions"
    elif found.alpha > 0:
        meaning = "people agree more than by chance, but too little to rely on single labels. Clearer guidelines may help"
    else:
        meaning = "people agree no more than by chance. Look at the disagreements and make the guidelines clearer"
    return f"Krippendorff's alpha is {found.alpha:.2f} on {judged}: {meaning}."


def disagreements_for(shared: Shared, labeler: str) -> tuple[list[str], int]:
    """Comparisons with opposed judgments that are not settled, and how many more this labeler may not see.

    What they may still be asked to judge is not shown to them, so that they judge it for themselves.
    """
    found = shared.store.disagreements()
    people: dict[str, set[str]] = {}
    for comparison, name, _, _ in shared.store.judged_by(found):
        people.setdefault(comparison, set()).add(name)
    enough = shared.settings.overlap
    visible = [comparison for comparison in found if labeler in people[comparison] or len(people[comparison]) >= enough]
    return visible, len(found) - len(visible)


def disagreement_of(shared: Shared, comparison_id: str) -> Disagreement:
    """A disagreement as the page shows it. Answers are numbered in the order of the comparison, the same for everyone."""
    comparison = shared.store.comparison(comparison_id)
    task = shared.store.task(comparison.task)
    count = len(comparison.answers)
    standing = shared.store.standing(comparison_id)
    said = [opinion_of(judgment, count) for judgment in standing]
    said += [verdict_of(verdict, count) for verdict in shared.store.verdicts(comparison_id)]
    runs = runs_of(shared, comparison, task)
    return Disagreement(
        comparison_id, task.title, html("task.html", shown=show_task(shared, task)),
        tuple((answer_html(shared, comparison, index), tests_of(run, task)) for index, run in enumerate(runs)), tuple(said),
        tuple((each.labeler, rendered(each.edited, shared.settings.fold_lines)) for each in standing if each.edited),
        ways_to_settle(comparison_id, count),
    )  # fmt: skip


def opinion_of(judgment: Judgment, count: int) -> tuple[str, str, str, str]:
    """Who said what and why, of a person."""
    words = judged_words(judgment, tuple(range(count)))
    return judgment.labeler, words, ", ".join(judgment.reasons), judgment.comment


def verdict_of(verdict: Verdict, count: int) -> tuple[str, str, str, str]:
    """Who said what and why, of a model."""
    order = tuple(range(count))
    return f"{verdict.judge} (a model)", ranked_words(verdict.ranks, order), "", reason_words(verdict, order)


def ways_to_settle(comparison: str, count: int) -> tuple[tuple[str, dict], ...]:
    """The buttons that settle a comparison. Each has an id, so that pressing one twice counts once."""
    better = "better" if count == 2 else "best"
    ways = [(f"Answer {index + 1} is {better}", "ranked", ranks_of_pick(index, count)) for index in range(count)]
    ways += [("Tie", "tie", ()), ("Both bad" if count == 2 else "All bad", "bad", ())]
    return tuple(
        (words, {"id": new_id(), "comparison": comparison, "choice": choice, "ranks": list(ranks)})
        for words, choice, ranks in ways
    )


def settle(request: Request, data: dict) -> dict:
    """POST /api/settle: a judgment that is the last word on its comparison. Raises ValueError for one that is none."""
    shared, labeler = shared_of(request), labeler_of(request)
    comparison = shared.store.comparison(str(data.get("comparison")))
    if comparison is None:
        raise missing("comparison")
    judgment = Judgment(
        str(data.get("id") or ""), comparison.id, labeler, str(data.get("choice")), tuple(range(len(comparison.answers))),
        ranks=_ranks(data.get("ranks")), comment=str(data.get("comment") or ""), settles=True,
    )  # fmt: skip
    if not judgment.id or judgment.choice == "skip":
        raise ValueError("expected an id, and a choice other than skip")
    shared.store.judge(judgment)
    shared.queue.judged(labeler, comparison.id)
    words = judged_words(judgment, judgment.order)
    return {"settled": comparison.id, "said": f"Settled: {words}, of “{shared.task(comparison.task).title}”."}


def unsettle(request: Request, data: dict) -> dict:
    """POST /api/unsettle: a comparison is no longer settled."""
    shared, labeler = shared_of(request), labeler_of(request)
    comparison = shared.store.comparison(str(data.get("comparison")))
    if comparison is None:
        raise missing("comparison")
    done = shared.store.unsettle(labeler, comparison.id)
    shared.queue.undone(labeler, comparison.id)
    title = shared.task(comparison.task).title
    return {"said": f"No longer settled: “{title}”." if done else f"“{title}” is not settled."}


def settled_of(shared: Shared) -> list[tuple[str, str, str, str]]:
    """What was settled, the newest first: (comparison, title of its task, words, who settled it)."""
    found = []
    for judgment in shared.store.settled(MOST_SETTLED):
        comparison = shared.comparison(judgment.comparison)
        words = judged_words(judgment, tuple(range(len(comparison.answers))))
        found.append((comparison.id, shared.task(comparison.task).title, words, judgment.labeler))
    return found


def _ranks(value) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError("ranks is no list")
    return tuple(value)
