"""The list of tasks, with filters, and the page that exports."""

from pathlib import Path
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from preference_collection.exchange.export import counts_line, export_dataset, training_command
from preference_collection.store.model import FILTERS, ORDERS, Query
from preference_collection.web.labeling import progress
from preference_collection.web.shared import labeler_of, page, shared_of

PAGE_SIZE = 50
# The filters in words.
NAMES = {"all": "all tasks", "unlabeled": "not judged by me", "disagreement": "disagreement"}


def tasks(request: Request) -> Response:
    """GET /tasks: a page of the tasks that match the filters. Values that no form of ours sends are as if not given."""
    shared, labeler, asked = shared_of(request), labeler_of(request), request.query_params
    only = asked.get("only") if asked.get("only") in FILTERS else FILTERS[0]
    order = asked.get("order") if asked.get("order") in ORDERS else ORDERS[0]
    query = Query(labeler, only, order, asked.get("difficulty", ""), asked.get("search", ""))
    start = int(asked["start"]) if asked.get("start", "").isdecimal() and len(asked["start"]) < 10 else 0
    rows, total = shared.store.browse(query, start, PAGE_SIZE)
    chosen = {"only": only, "order": order, "difficulty": query.difficulty, "search": query.search}

    def at(place: int) -> str:
        return f"/tasks?{urlencode({**chosen, 'start': place})}"

    return page(
        request, "tasks.html", rows=rows, total=total, start=start, chosen=chosen, filters=NAMES, orders=ORDERS,
        difficulties=[name for name in shared.store.difficulties() if name], progress=progress(shared, labeler),
        before=at(max(0, start - PAGE_SIZE)) if start else "",
        after=at(start + PAGE_SIZE) if start + PAGE_SIZE < total else "",
    )  # fmt: skip


def export_page(request: Request) -> Response:
    """GET /export: where the judgments are exported to."""
    shared = shared_of(request)
    target = Path(shared.settings.export).absolute()
    return page(request, "export.html", target=target, progress=progress(shared, labeler_of(request)))


def export(request: Request, data: dict) -> dict:
    """POST /api/export: write the judgments as a data set, to the directory in the settings.

    With `agreed`, what labelers disagree on and nobody has settled is left out.
    """
    shared = shared_of(request)
    target = Path(shared.settings.export).absolute()
    counts = export_dataset(shared.store, target, agreed=data.get("agreed") is True)
    return {
        "said": f"Exported to {target}: {counts_line(counts)}.",
        "command": training_command(target),
    }
