"""The hub's interface for uploads, as a real server on this machine: repositories, preupload, LFS batches, commits."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "thetokenofthetests" * 2


class Hub:
    """What the server has: repositories with their files, large objects by their hash, and the requests' own words."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.address = ""

    # Each takes the rest of the path and the body, and returns (status, JSON).

    def create(self, body: dict):
        name = f"{body['organization']}/{body['name']}"
        if body["organization"] == "others":
            return 403, {"error": "You don't have the rights to create a model under the namespace others"}
        if name in self.files:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
        self.files[name], self.private[name] = {}, body.get("visibility") == "private"
        return 200, {"url": f"{self.address}/{name}", "name": name, "id": "1"}

    def describe(self, name: str):
        if name not in self.files:
            return 404, {"error": "Repository not found"}
        return 200, {"id": name, "modelId": name, "private": self.private[name], "siblings": []}

    def tree(self, name: str):
        return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.files[name].items()]

    def validate(self, body: dict):
        # As the hub: metadata stand first, between lines of dashes.
        sound = body["content"].startswith("---\n") and "\n---\n" in body["content"][4:]
        return (200, {}) if sound else (400, {"errors": [{"message": "no metadata"}]})

    def preupload(self, body: dict):
        modes = {
            f["path"]: "lfs" if f["path"].endswith((".safetensors", "tokenizer.json")) else "regular" for f in body["files"]
        }
        return 200, {
            "files": [{"path": p, "uploadMode": mode, "shouldIgnore": False, "oid": None} for p, mode in modes.items()]
        }

    def batch(self, body: dict):
        actions = lambda oid: {"upload": {"href": f"{self.address}/objects/{oid}", "header": {}}}  # noqa: E731
        return 200, {
            "transfer": "basic",
            "objects": [{"oid": o["oid"], "size": o["size"], "actions": actions(o["oid"])} for o in body["objects"]],
        }

    def commit(self, name: str, lines: list[dict]):
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[name][value["path"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, value) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            if status >= 400 and isinstance(value, dict):
                self.send_header("X-Error-Message", value.get("error", ""))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            name = "/".join(parts[2:4])
            self.answer(*(hub.tree(name) if "tree" in parts and name in hub.files else hub.describe(name)))

        def do_PUT(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            oid = self.path.rsplit("/", 1)[-1]
            sound = hashlib.sha256(content).hexdigest() == oid
            if sound:
                hub.objects[oid] = content
            self.answer(200 if sound else 400, {})

        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid username or password."})
                return
            lines = [json.loads(line) for line in content.splitlines()]
            parts = self.path.split("?")[0].strip("/").split("/")
            if "create" in parts:
                self.answer(*hub.create(lines[0]))
            elif "validate-yaml" in parts:
                self.answer(*hub.validate(lines[0]))
            elif "preupload" in parts:
                self.answer(*hub.preupload(lines[0]))
            elif "batch" in parts:
                self.answer(*hub.batch(lines[0]))
            elif "commit" in parts:
                self.answer(*hub.commit("/".join(parts[2:4]), lines))

        def log_message(self, *_):
            """Nothing on the console."""

    return Handler


@contextmanager
def serving():
    """A hub at its `address`, until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
