"""Labeling: the comparison to judge, judging it, undoing, passing on. An answer to each brings the next comparison."""

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from preference_collection.generation.writing import as_text
from preference_collection.store.model import Comparison, Judgment
from preference_collection.web import pages
from preference_collection.web.differences import differences as compared
from preference_collection.web.shared import Shared, html, labeler_of, missing, page, shared_of
from preference_training.core.errors import UserError

LONGEST_ID, LONGEST_COMMENT, LONGEST_SECONDS, MOST_REASONS = 64, 2000, 10**9, 100
# Settled comparisons that are looked through and listed.
MOST_SETTLED = 50


def next_of(shared: Shared, labeler: str, after: str | None = None) -> dict:
    """The next comparison of a labeler, for the page: its id ("" if nothing is left), HTML, address, and the progress.

    after: a comparison that they leave, which comes last.
    """
    id = shared.queue.next(labeler, skip=after)
    comparison = shared.comparison(id) if id else None
    if comparison is None:
        return {"id": "", "html": _nothing_left(shared, labeler), "address": "/label", "progress": progress(shared, labeler)}
    return view_of(shared, labeler, comparison, is_new=True)


def view_of(shared: Shared, labeler: str, comparison: Comparison, again: Judgment | None = None, is_new: bool = False) -> dict:
    """A comparison for the page: its id, HTML, address, and the progress."""
    shared.seen(labeler, partial(pages.prepare, shared))
    shown = pages.show_comparison(shared, labeler, comparison, again, is_new)
    fragment = html("comparison.html", shown=shown, read_only=shared.store.read_only)
    return {"id": comparison.id, "html": fragment, "address": f"/label/{comparison.id}", "progress": progress(shared, labeler)}


def progress(shared: Shared, labeler: str) -> str:
    """The progress of a labeler in words."""
    return pages.progress_words(shared.queue.done(labeler), shared.queue.remaining(labeler))


def _nothing_left(shared: Shared, labeler: str) -> str:
    waiting = shared.store.tasks_without_comparison(1)
    done = shared.queue.done(labeler)
    makes = bool(waiting and shared.ahead and shared.settings.generator)
    lines = ["You have judged every comparison that waits for you. Thank you." if done else "No comparison waits for you."]
    if makes:
        lines.append(f"{shared.settings.generator} is asked for more answers. They appear here by themselves.")
    elif waiting:
        lines.append(f"Tasks without answers are left, the next is “{waiting[0].title}”. Press g to have a model answer it.")
    if shared.ahead and shared.ahead.status():
        lines.append(shared.ahead.status())
    return html(
        "empty.html", title="Nothing left to judge" if done else "Nothing to judge yet", lines=lines, shown=None,
        task=waiting[0] if waiting else None, opens=False, waits=makes, read_only=shared.store.read_only,
    )  # fmt: skip


# ---- pages ------------------------------------------------------------------------------------------------------------------


def _desk(request: Request, view: dict) -> Response:
    shared = shared_of(request)
    # Guidelines are shown before the first comparison of a session.
    first = bool(shared.guidelines and view.get("id") and not request.session.get("guided"))
    if first:
        request.session["guided"] = True
    shown = {"fragment": view["html"], "progress": view["progress"], "guidelines": shared.guidelines}
    return page(request, "label.html", **shown, first=first)


def label(request: Request) -> Response:
    """GET /label: the next comparison."""
    return _desk(request, next_of(shared_of(request), labeler_of(request)))


def label_one(request: Request) -> Response:
    """GET /label/{comparison}: one of them."""
    shared = shared_of(request)
    comparison = shared.comparison(request.path_params["comparison"])
    if comparison is None:
        raise missing("comparison")
    return _desk(request, view_of(shared, labeler_of(request), comparison))


def label_task(request: Request) -> Response:
    """GET /task/{task}: its newest comparison, or what asks a model for answers."""
    shared, labeler = shared_of(request), labeler_of(request)
    task = shared.task(request.path_params["task"])
    if task is None:
        raise missing("task")
    comparisons = shared.store.comparisons_of(task.id)
    if comparisons:
        return _desk(request, view_of(shared, labeler, comparisons[0]))
    fragment = html(
        "empty.html", title=task.title, lines=["This task has no answers yet."], shown=pages.show_task(shared, task), task=task,
        opens=not shared.store.read_only, waits=False, read_only=shared.store.read_only,
    )  # fmt: skip
    return _desk(request, {"html": fragment, "progress": progress(shared, labeler)})


def differences(request: Request) -> Response:
    """GET /api/differences/{comparison}: each answer compared with the one shown first, as HTML."""
    shared, labeler = shared_of(request), labeler_of(request)
    comparison = shared.comparison(request.path_params["comparison"])
    if comparison is None:
        raise missing("comparison")
    answers = [comparison.answers[index] for index in pages.shown_order(labeler, comparison.id, len(comparison.answers))]
    code = all(answer.code is not None for answer in answers)
    found = compared([answer.code if code else answer.text for answer in answers], code)
    return JSONResponse({"html": html("differences.html", found=found)})


def text(request: Request) -> Response:
    """GET /text/{comparison}/{index}: an answer as plain text, whole."""
    comparison = shared_of(request).comparison(request.path_params["comparison"])
    index = request.path_params["index"]
    if comparison is None or index >= len(comparison.answers):
        raise missing("answer")
    return PlainTextResponse(comparison.answers[index].text)


# ---- what the page asks -----------------------------------------------------------------------------------------------------


def judge(request: Request, data: dict) -> dict:
    """POST /api/judge: save a judgment; the same id counts once. Answers with verdicts of models, and the next comparison."""
    shared, labeler = shared_of(request), labeler_of(request)
    check_labeler(data, labeler)
    judgment = judgment_of(data, labeler)
    earlier = own_of(shared, labeler, judgment.comparison)
    shared.store.judge(judgment)
    shared.queue.judged(labeler, judgment.comparison)
    verdicts = [pages.verdict_words(verdict, judgment.order) for verdict in shared.store.verdicts(judgment.comparison)]
    following = next_of(shared, labeler)
    replaced = earlier is not None and earlier.id != judgment.id
    return {"saved": True, "replaced": replaced, "progress": following["progress"], "verdicts": verdicts, "next": following}


def undo(request: Request, data: dict) -> dict:
    """POST /api/undo: undo the labeler's newest judgment, say what it was, and show its comparison again.

    What they settled is undone on the page of agreement.
    """
    shared, labeler = shared_of(request), labeler_of(request)
    check_labeler(data, labeler)
    last = shared.store.undo_label(labeler)
    if last is None:
        settled = any(each.labeler == labeler for each in shared.store.settled(MOST_SETTLED))
        return {"undone": None, "settled": settled}
    shared.queue.undone(labeler, last.comparison)
    comparison = shared.comparison(last.comparison)
    order = pages.shown_order(labeler, comparison.id, len(comparison.answers))
    again = own_of(shared, labeler, comparison.id)
    view = view_of(shared, labeler, comparison, last)
    return {
        "undone": comparison.id, "html": view["html"], "next": view, "what": pages.judged_words(last, order),
        "title": shared.task(comparison.task).title, "again": pages.judged_words(again, order) if again else "",
    }  # fmt: skip


def own_of(shared: Shared, labeler: str, comparison: str) -> Judgment | None:
    """A labeler's own judgment of a comparison that stands."""
    own = (each for each in shared.store.standing(comparison) if each.labeler == labeler and not each.settles)
    return next(own, None)


def pass_on(request: Request, data: dict) -> dict:
    """POST /api/next: the next comparison, without a judgment of this one."""
    shared, labeler = shared_of(request), labeler_of(request)
    check_labeler(data, labeler)
    return {"next": next_of(shared, labeler, after=str(data.get("comparison") or "") or None)}


def tests(request: Request) -> Response:
    """GET /api/tests/{comparison}: the badges of its answers in the order shown, and whether all tests are over."""
    shared, labeler = shared_of(request), labeler_of(request)
    comparison = shared.comparison(request.path_params["comparison"])
    if comparison is None:
        raise missing("comparison")
    task = shared.task(comparison.task)
    runs = pages.runs_of(shared, comparison, task)
    order = pages.shown_order(labeler, comparison.id, len(runs))
    over = all(run is None or run.over for run in runs)
    return JSONResponse({"over": over, "tests": [pages.tests_of(runs[index], task) for index in order]})


def check_labeler(data: dict, labeler: str) -> None:
    """Raise UserError if another tab of the same browser has signed in under another name since the page was loaded."""
    if data.get("labeler", labeler) != labeler:
        raise UserError(f"This browser is signed in as {labeler} now. Load the page again.")


def judgment_of(data: dict, labeler: str) -> Judgment:
    """The judgment in a request. Raises ValueError for what is none; the store checks its values against the comparison."""
    values = {name: _text_of(data, name) for name in ("id", "comparison", "choice")}
    if not 0 < len(values["id"]) <= LONGEST_ID:
        raise ValueError(f"id has {len(values['id'])} characters, expected 1 to {LONGEST_ID}")
    seconds, edited_from = data.get("seconds"), data.get("edited_from")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | None) or (seconds or 0) > LONGEST_SECONDS:
        raise ValueError("seconds is no number of seconds")
    if isinstance(edited_from, bool) or not isinstance(edited_from, int | None):
        raise ValueError("edited_from is no index")
    reasons = data.get("reasons") or []
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        raise ValueError("reasons is no list of texts")
    return Judgment(
        **values, labeler=labeler, order=_indices(data, "order"), ranks=_indices(data, "ranks"), seconds=seconds,
        reasons=tuple(map(as_text, reasons[:MOST_REASONS])), comment=_text_of(data, "comment")[:LONGEST_COMMENT],
        edited=_text_of(data, "edited"), edited_from=edited_from,
    )  # fmt: skip


def _text_of(data: dict, name: str) -> str:
    value = data.get(name) or ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return as_text(value)


def _indices(data: dict, name: str) -> tuple[int, ...]:
    value = data.get(name) or []
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"{name} is no list of integers")
    return tuple(value)
