"""Stand-ins for servers of language models: they listen on a port and speak OpenAI's protocol and Ollama's."""

import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.listening import listening

# What a model is told of a question, as it reads it in its prompt: (code, prompt, answer A, answer B).
Question = tuple[str, str, str, str]


@dataclass
class Reply:
    """What a server does with a question: a status and a body, or nothing at all until the test is over.

    text is what the model says, and ends why it ends; body is in place of a reply that has both.
    """

    text: str = ""
    ends: str = "stop"
    body: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    drops: bool = False


def verdict(question: Question, better: str) -> Reply:
    """What a model says that judges as it was told."""
    return Reply(f"Both answer.\nOne is shorter.\n{json.dumps({'code': question[0], 'better': better})}")


def shorter_wins(question: Question) -> Reply:
    """A judge who likes short answers, whichever stands first."""
    first, second = len(question[2]), len(question[3])
    return verdict(question, "tie" if first == second else "A" if first < second else "B")


def read_question(message: str) -> Question:
    """What the prompt of the judge says; of one that scores by a rubric: (code, prompt, rubric, answer)."""
    code = re.search(r"<request (\w+)>", message)[1]
    names = ("request", "answer A", "answer B") if f"<answer A {code}>" in message else ("request", "rubric", "answer")
    parts = [re.search(f"<{name} {code}>\n(.*?)\n</{name} {code}>", message, flags=re.DOTALL)[1] for name in names]
    return code, *parts


class Server:
    """A running stand-in. `answer` makes a Reply of a question; questions, keys and bodies are those that came, in order.

    models says of each model what stands for its weights; None is a server without a list of models. listed counts how often
    the list was asked for. port: where it listens, 0 is any that is free.
    """

    def __init__(self, answer: Callable[[Question], Reply], models: dict[str, str] | None = None, port: int = 0):
        self.answer, self.models, self.listed = answer, models, 0
        self.questions: list[Question] = []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.over = threading.Event()
        self.writing = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self.handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def handler(self) -> type:
        """The class that answers requests."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = read_question(body["messages"][-1]["content"])
                with server.writing:
                    server.bodies.append(body)
                    server.questions.append(question)
                    server.keys.append(self.headers["Authorization"])
                    reply = server.answer(question)
                if reply.hangs:
                    server.over.wait()
                if reply.hangs or reply.drops:
                    self.close_connection = True
                    return
                content = json.dumps(server.wrapped(self.path, reply)) if reply.body is None else reply.body
                self.send(reply.status, content, reply.headers)

            def do_GET(self):
                server.listed += 1
                known = server.models is not None
                self.send(200 if known else 404, json.dumps(server.list_of_models(self.path)) if known else "no such page", {})

            def send(self, status: int, text: str, headers: dict):
                content = text.encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        return Handler

    def list_of_models(self, path: str) -> dict:
        """The models as vLLM and Ollama list them; the former with the moment, and numbers that change from call to call."""
        if path == "/v1/models":
            fixed = {"object": "model", "owned_by": "vllm"}
            moving = {"created": self.listed, "permission": [{"id": f"modelperm-{self.listed}"}]}
            return {"object": "list", "data": [{"id": n, "root": root, **fixed, **moving} for n, root in self.models.items()]}
        if path == "/api/tags":
            return {"models": [{"name": name, "model": name, "digest": digest} for name, digest in self.models.items()]}
        raise AssertionError(f"nobody asks for {path}")

    @staticmethod
    def wrapped(path: str, reply: Reply) -> dict:
        """A model's text as each protocol wraps it."""
        message = {"role": "assistant", "content": reply.text}
        if path == "/v1/chat/completions":
            return {
                "id": "x",
                "object": "chat.completion",
                "choices": [{"index": 0, "message": message, "finish_reason": reply.ends}],
            }
        if path == "/api/chat":
            return {
                "model": "m",
                "created_at": "2026-01-01T00:00:00Z",
                "message": message,
                "done": True,
                "done_reason": reply.ends,
            }
        raise AssertionError(f"nobody asks for {path}")


@contextmanager
def serving(answer: Callable[[Question], Reply], models: dict[str, str] | None = None, port: int = 0):
    """A running Server, ended behind it."""
    with listening(Server(answer, models, port)) as server:
        yield server
