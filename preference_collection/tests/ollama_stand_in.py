"""A stand-in for Ollama's HTTP interface, from its documentation: GET /api/tags, and POST /api/chat that streams JSON lines.

It answers each request with what `replies` says of the model: a text, an error in the middle of the stream, a silence.
OpenAI's form of the same (GET /v1/models, POST /v1/chat/completions as server-sent events) is there too.
"""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Silence:
    """Instead of text: no output until the stand-in is told to continue or the client disconnects."""


class Broken(str):
    """Instead of text: an error in the middle of the stream, with this message."""


class StandIn:
    """The behavior of the stand-in, and the requests it received.

    replies: a model's name → a function from the request to the pieces of its reply. requests: what it was asked. refuse: a
    function from a request to the status and headers of an error, or None.
    """

    def __init__(self, replies: dict[str, Callable[[dict], list]]):
        self.replies = replies
        self.requests: list[dict] = []
        self.go_on = threading.Event()
        self.left = threading.Event()
        self.status = 200
        self.refuse: Callable[[dict], tuple[int, dict] | None] = lambda _: None
        self.url = ""
        # Stops listening; requests that were accepted are answered.
        self.leave: Callable[[], None] = lambda: None

    def models(self) -> list[dict]:
        """The entries of /api/tags."""
        return [
            {"name": name, "model": name, "modified_at": "2026-05-04T17:37:44Z", "size": 12345, "digest": "0" * 64,
             "details": {"format": "gguf", "family": "llama", "parameter_size": "1B", "quantization_level": "Q4_0"}}
            for name in self.replies
        ]  # fmt: skip


@contextmanager
def ollama_stand_in(replies: dict[str, Callable[[dict], list]]):
    """A running stand-in."""
    stand_in = StandIn(replies)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"stand_in": stand_in}))
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    stand_in.leave = lambda: (server.shutdown(), server.socket.close())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        stand_in.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Log nothing."""

    def answer(self, status: int, value) -> None:
        """A complete response."""
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        """The lists of models."""
        if self.stand_in.status != 200:
            self.answer(self.stand_in.status, {"error": "the stand-in was told to fail"})
        elif self.path == "/api/tags":
            self.answer(200, {"models": self.stand_in.models()})
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.stand_in.replies]})
        else:
            self.answer(404, {"error": "not found"})

    def do_POST(self):
        """A reply, streamed."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stand_in.requests.append({**request, "authorization": self.headers.get("Authorization")})
        openai = self.path == "/v1/chat/completions"
        if refusal := self.stand_in.refuse(request):
            self.send_response(refusal[0])
            for name, value in {"Content-Length": "0", **refusal[1]}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        if self.stand_in.status != 200:
            self.send_response(self.stand_in.status)
            self.send_header("Location", f"{self.stand_in.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if request["model"] not in self.stand_in.replies:
            message = f"model '{request['model']}' not found"
            self.answer(404, {"error": {"message": message, "code": 404}} if openai else {"error": message})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if openai else "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for piece in self.stand_in.replies[request["model"]](request):
                if isinstance(piece, Silence):
                    self.wait()
                elif isinstance(piece, Broken):
                    self.send({"error": {"message": str(piece)}} if openai else {"error": str(piece)}, openai)
                else:
                    self.send(_piece(request["model"], piece, openai), openai)
            if openai:
                self.chunk(b"data: [DONE]\n\n")
            else:
                self.send({**_piece(request["model"], "", False), "done": True, "done_reason": "stop", "eval_count": 3}, False)
            self.chunk(b"")
        except (BrokenPipeError, ConnectionResetError):
            self.stand_in.left.set()
            self.close_connection = True

    def wait(self) -> None:
        """Wait until told to continue, or until the client disconnects."""
        self.connection.settimeout(0.02)
        while not self.stand_in.go_on.wait(0.01):
            try:
                if self.connection.recv(1) == b"":
                    raise BrokenPipeError
            except TimeoutError:
                pass
        self.connection.settimeout(None)

    def send(self, event: dict, openai: bool) -> None:
        """Send a line of JSON, or an event."""
        line = json.dumps(event).encode()
        self.chunk(b"data: " + line + b"\n\n" if openai else line + b"\n")

    def chunk(self, data: bytes) -> None:
        """Send an HTTP chunk; an empty one ends the response."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _piece(model: str, text: str, openai: bool) -> dict:
    if openai:
        return {"object": "chat.completion.chunk", "model": model, "choices": [{"index": 0, "delta": {"content": text}}]}
    message = {"role": "assistant", "content": text}
    return {"model": model, "created_at": "2026-05-04T08:52:19.385406Z", "message": message, "done": False}
