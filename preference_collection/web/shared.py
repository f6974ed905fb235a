"""What all requests share: the store, the queue, the tests, the sources of answers, the templates."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import DictConfig
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from preference_collection.generation.ahead import Ahead
from preference_collection.generation.sources import Source
from preference_collection.generation.writing import Writing
from preference_collection.running import TestRunner
from preference_collection.store.model import Comparison, Task
from preference_collection.store.queue import Queue
from preference_collection.store.store import Store
from preference_collection.web.characters import shown
from preference_training.core.errors import UserError

HERE = Path(__file__).parent
TEMPLATES = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["shown"] = shown
# Tasks and comparisons that are remembered, and the number of comparisons that are prepared for a labeler.
REMEMBERED, PREPARED = 300, 2
# The pages in the header.
LINKS = (
    ("/label", "Label"),
    ("/tasks", "Tasks"),
    ("/agreement", "Agreement"),
    ("/progress", "Progress"),
    ("/export", "Export"),
)


@dataclass
class Shared:
    """What all requests share.

    guidelines are HTML. writings are the replies on their way, by labeler and task. chosen is what each labeler last asked a
    model with, and instructions the instruction, by labeler and kind of task. ahead is told who is active. names are those who
    have signed in.
    """

    settings: DictConfig
    store: Store
    queue: Queue
    runner: TestRunner
    sources: dict[str, Source]
    password: str = ""
    guidelines: str = ""
    writings: dict[tuple[str, str], list[Writing]] = field(default_factory=dict)
    chosen: dict[str, dict] = field(default_factory=dict)
    instructions: dict[tuple[str, str], str] = field(default_factory=dict)
    ahead: Ahead | None = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self):
        """Tasks and comparisons never change, so that those last asked for are remembered."""
        self._remembered = {
            "comparison": lru_cache(REMEMBERED)(partial(_found, self.store.comparison)),
            "task": lru_cache(REMEMBERED)(partial(_found, self.store.task)),
        }
        self._background = ThreadPoolExecutor(1, thread_name_prefix="next")

    def comparison(self, id: str) -> Comparison | None:
        """The comparison with an id."""
        with suppress(LookupError):
            return self._remembered["comparison"](id)
        return None

    def task(self, id: str) -> Task | None:
        """The task with an id."""
        with suppress(LookupError):
            return self._remembered["task"](id)
        return None

    def known_name(self, name: str) -> str:
        """A name as it is known, whatever its capitals: "ada" is Ada. A new one is known from now on."""
        known = [*self.store.labelers(), *self.names]
        if name in known:
            return name
        found = next((each for each in known if each.casefold() == name.casefold()), None)
        if found is None:
            self.names.append(name)
        return found or name

    def seen(self, labeler: str, prepare: Callable[[str], object]) -> None:
        """A labeler sees a comparison: `prepare` is called with the ids of the next ones, in the background."""
        if self.ahead:
            self.ahead.seen(labeler)
            self._background.submit(lambda: [prepare(id) for id in self.queue.peek(labeler, PREPARED)])

    def close(self) -> None:
        """Stop working for what comes next, and asking models."""
        for each in [each for writings in self.writings.values() for each in writings]:
            each.cancel()
        self._background.shutdown()


def _found(find: Callable, id: str):
    """What `find` finds. Raises LookupError if there is none, which is not remembered: it may come."""
    found = find(id)
    if found is None:
        raise LookupError(id)
    return found


def shared_of(request: Request) -> Shared:
    """What all requests share."""
    return request.app.state.shared


def labeler_of(request: Request) -> str:
    """The name that the request's labeler signed in with."""
    return request.session["labeler"]


def html(template: str, **values) -> Markup:
    """A template filled with values, which are escaped unless they are Markup."""
    return Markup(TEMPLATES.get_template(template).render(values))


def page(request: Request, template: str, status: int = 200, **values) -> HTMLResponse:
    """A whole page: a template that extends base.html."""
    labeler = request.session.get("labeler", "")
    return HTMLResponse(html(template, labeler=labeler, links=LINKS, here=request.url.path, **values), status)


def posted(function: Callable[[Request, dict], dict]):
    """The endpoint of a POST: `function` gets the request and the object in its body, and returns the object of the response.

    It runs in a thread. ValueError is a request that no page of ours sends (status 400), UserError is what a labeler can read
    and act on (409).
    """

    async def endpoint(request: Request) -> Response:
        try:
            data = _object(await request.body())
            return JSONResponse(await run_in_threadpool(function, request, data))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 409)
        except ValueError as error:
            return JSONResponse({"error": f"Invalid request: {error}."}, 400)

    return endpoint


def _object(body: bytes) -> dict:
    try:
        data = json.loads(body)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError("expected an object")
    return data


def missing(what: str) -> HTTPException:
    """The error for something that does not exist."""
    return HTTPException(404, f"There is no such {what}.")
