"""The web app: its routes, sign-in, and errors."""

import contextlib
import hmac
from asyncio import sleep
from collections.abc import AsyncIterator
from urllib.parse import parse_qs

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from preference_collection.exchange.importing import IMPORTED
from preference_collection.web import generating, labeling, lists, team
from preference_collection.web.security import Guard, HeadersAdded, is_local, session_key
from preference_collection.web.shared import HERE, Shared, page, posted, shared_of
from preference_training.core.errors import UserError

# Threads that answer requests: as many labelers can press a key at the same moment.
THREADS = 64
# How long a session lasts. Unit: seconds.
SESSION_SECONDS = 30 * 24 * 3600
LONGEST_NAME = 60
# The pause after a wrong password. Unit: seconds.
WRONG_PASSWORD_SECONDS = 1.0


def build_app(shared: Shared) -> HeadersAdded:
    """The app on what all requests share."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    routes = [
        Route("/", sign_in_page),
        Route("/sign-in", sign_in, methods=["POST"]),
        Route("/sign-out", sign_out, methods=["POST"]),
        Route("/label", labeling.label),
        Route("/label/{comparison}", labeling.label_one),
        Route("/task/{task:path}", labeling.label_task),
        Route("/text/{comparison}/{index:int}", labeling.text),
        Route("/api/judge", posted(labeling.judge), methods=["POST"]),
        Route("/api/undo", posted(labeling.undo), methods=["POST"]),
        Route("/api/next", posted(labeling.pass_on), methods=["POST"]),
        Route("/api/tests/{comparison}", labeling.tests),
        Route("/api/differences/{comparison}", labeling.differences),
        Route("/tasks", lists.tasks),
        Route("/export", lists.export_page),
        Route("/api/export", posted(lists.export), methods=["POST"]),
        Route("/api/generate", posted(generating.generate), methods=["POST"]),
        Route("/api/generate/{task:path}", generating.panel),
        Route("/api/writing/{task:path}/{action}", posted(generating.steer), methods=["POST"]),
        Route("/api/writing/{task:path}", generating.writing),
        *team.routes(),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    key = session_key(shared.store.address, shared.password)
    middleware = [
        Middleware(SessionMiddleware, secret_key=key, session_cookie="labeler", max_age=SESSION_SECONDS, same_site="strict"),
        Middleware(Guard, only_local=is_local(shared.settings.address)),
    ]
    app = Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan,
        exception_handlers={HTTPException: _refused, UserError: _refused, Exception: _failed},
    )  # fmt: skip
    app.state.shared = shared
    return HeadersAdded(app)


# ---- sign-in ----------------------------------------------------------------------------------------------------------------


def sign_in_page(request: Request) -> Response:
    """GET /: the form to sign in, or labeling for those who have."""
    if request.session.get("labeler"):
        return RedirectResponse("/label", 303)
    return _form(request)


def _form(request: Request, name: str = "", fault: str = "") -> Response:
    password = bool(shared_of(request).password)
    # Who works here is said to nobody before the password.
    known = [] if password else [each for each in shared_of(request).store.labelers() if not each.startswith(IMPORTED)]
    return page(request, "sign_in.html", 403 if fault else 200, name=name, fault=fault, password=password, known=known)


async def sign_in(request: Request) -> Response:
    """POST /sign-in: a name, and the password if one is set, compared in constant time and with a pause after a wrong one."""
    form = parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True)
    name, given = (form.get(field, [""])[0] for field in ("name", "password"))
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())[:LONGEST_NAME]
    if not hmac.compare_digest(given.encode(), shared_of(request).password.encode()) and shared_of(request).password:
        await sleep(WRONG_PASSWORD_SECONDS)
        return _form(request, name, "Wrong password.")
    if not name:
        return _form(request, name, "Please enter your name.")
    request.session["labeler"] = await run_in_threadpool(shared_of(request).known_name, name)
    # What others have judged meanwhile may have changed what comes first.
    await run_in_threadpool(shared_of(request).queue.reorder)
    return RedirectResponse("/label", 303)


def sign_out(request: Request) -> Response:
    """POST /sign-out. What the labeler has before them is free for others."""
    shared_of(request).queue.release(request.session["labeler"])
    request.session.clear()
    return RedirectResponse("/", 303)


# ---- errors -----------------------------------------------------------------------------------------------------------------


def _error(request: Request, status: int, message: str) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status)
    return page(request, "error.html", status, message=message)


def _refused(request: Request, error: HTTPException | UserError) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 409
    return _error(request, status, getattr(error, "detail", str(error)))


def _failed(request: Request, error: Exception) -> Response:
    """The response to a bug, whose traceback goes to the terminal."""
    return _error(request, 500, "The server failed. Its terminal says why.")
