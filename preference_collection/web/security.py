"""What protects the page: headers, hosts, origins, sign-in. Nothing can be read before sign-in except the sign-in page."""

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preference_training.core.errors import UserError

# No script, style or request of another origin, none inline, and no frame around the page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# The page's address goes to no other site. It goes to our own: with "no-referrer" a browser sends forms without their Origin.
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# Read before sign-in.
OPEN = ("/", "/sign-in", "/static/")
# Length of a request's body. Unit: bytes.
LONGEST_BODY = 4 * 2**20
WRITING = ("POST", "PUT", "PATCH", "DELETE")


def is_local(address: str) -> bool:
    """Whether an address, or the name in a Host header, is of this machine alone."""
    name = address.strip("[]").lower()
    with suppress(ValueError):
        return ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


def session_key(store: str, password: str) -> str:
    """The key that signs sessions: it is kept beside the store, so that a restart signs nobody out; another password does.

    The file has mode 0600. A store that is no file, and one in a directory that cannot be written, has a new key every time.
    """
    key = secrets.token_bytes(32)
    if not store.startswith(("md:", ":memory:")):
        path = Path(f"{store}.key")
        with suppress(FileExistsError, PermissionError, OSError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(key)
        if path.is_file():
            key = _read_key(path)
    return hmac.new(key, password.encode(), hashlib.sha256).hexdigest()


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise UserError(f"store: {path}, the key of sessions, cannot be read: {error.strerror}. Make it readable.") from error
    if len(key) < 32:
        raise UserError(f"store: {path}, the key of sessions, has {len(key)} bytes instead of 32. Remove it.")
    return key


class Guard:
    """Refuses requests of other hosts and origins and of those who are not signed in, and adds the headers to all responses.

    It stands within the session's middleware, whose `session` it reads.
    """

    def __init__(self, app: ASGIApp, only_local: bool):
        """only_local: serve requests by a name of this machine only, so that no other site's name can stand for it."""
        self._app = app
        self._only_local = only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers):
        """The response to a request that is refused, else None."""
        host, path = headers.get("host", ""), scope["path"]
        if self._only_local and not is_local(urlsplit(f"//{host}").hostname or ""):
            return PlainTextResponse("This page is served to this machine only. Open it at http://localhost.", 400)
        if scope["method"] in WRITING:
            if urlsplit(headers.get("origin", "")).netloc != host:
                return JSONResponse({"error": "The request comes from another page."}, 403)
            if path.startswith("/api/") and headers.get("content-type", "").partition(";")[0] != "application/json":
                return JSONResponse({"error": "Expected application/json."}, 415)
            # Without a length a body could grow forever.
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return JSONResponse({"error": "The request does not say how long it is."}, 411)
            if int(length) > LONGEST_BODY:
                return JSONResponse({"error": f"The request is longer than {LONGEST_BODY // 2**20} MB."}, 413)
        if not scope["session"].get("labeler") and path not in OPEN[:2] and not path.startswith(OPEN[2]):
            if path.startswith("/api/"):
                return JSONResponse({"error": "You are signed out. Sign in again."}, 401)
            return RedirectResponse("/", 303)
        return None


class HeadersAdded:
    """Adds HEADERS to all responses, those to errors included, so it stands around everything."""

    def __init__(self, app: ASGIApp):
        """app: what answers."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-cache" if scope["path"].startswith("/static/") else "no-store")
            await send(message)

        await self._app(scope, receive, send_with_headers)
