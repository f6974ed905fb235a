"""Stand-ins for servers that sample: a vLLM with a model of its own, which takes weights and adapters, and servers for chats.

The vLLM computes with transformers, in OpenAI's protocol over HTTP. It caches what it computed of prompts, with the weights of
then, until it is told to drop that.
"""

import copy
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


@dataclass
class Fault:
    """What a server does in place of an answer: an HTTP status with a body, no answer until the test is over, or a hang-up."""

    status: int = 200
    body: str = "{}"
    hangs: bool = False
    drops: bool = False


class Listening:
    """An HTTP server on a free port. `fault` may make a Fault of a request: (path, body, how many came to the path before).

    asked: (path, body) of all requests, in their order. Subclasses answer them: a status, and a text or what becomes JSON.
    """

    def __init__(self, fault: Callable[[str, dict, int], Fault | None] = lambda *_: None):
        self.fault = fault
        self.asked: list[tuple[str, dict]] = []
        self.counts: Counter = Counter()
        self.over, self.writing = threading.Event(), threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        """The answer to a request."""
        raise NotImplementedError

    def handler(self) -> type:
        """The class that answers requests."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.reply("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

            def do_GET(self):
                self.reply("GET", {})

            def reply(self, method: str, body: dict):
                path = urlsplit(self.path).path
                with server.writing:
                    server.asked.append((path, body))
                    fault = server.fault(path, body, server.counts[path])
                    server.counts[path] += 1
                if fault is not None and (fault.hangs or fault.drops):
                    if fault.hangs:
                        server.over.wait()
                    self.close_connection = True
                    return
                status, content = (fault.status, fault.body) if fault else server.answer(method, path, body)
                text = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        return Handler

    def bodies(self, path: str) -> list[dict]:
        """What was asked of a path."""
        return [body for at, body in self.asked if at == path]


class Vllm(Listening):
    """A vLLM on a checkpoint. takes: which of its endpoints for weights it has, "reload" and "lora".

    reloads: whether a reload changes anything. resets: whether it drops its cache when it is told to.
    """

    def __init__(self, directory: Path, *takes: str, name: str = "the-model", max_model_len: int = 512, **given):
        super().__init__(**given)
        self.takes, self.name, self.root, self.max_model_len = takes, name, str(directory), max_model_len
        self.reloads, self.resets, self.running = True, True, 0
        self.computing = threading.Lock()
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.adapters: dict[str, tuple[str, torch.nn.Module]] = {}
        self.cache: dict[tuple, DynamicCache] = {}

    def answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        """The answer of an endpoint; 405 to a method that it does not have."""
        endpoints = {
            "/v1/models": ("GET", self.models),
            "/v1/completions": ("POST", self.complete),
            "/metrics": ("GET", self.metrics),
        }
        if "reload" in self.takes:
            endpoints |= {
                "/collective_rpc": ("POST", self.reload),
                "/reset_prefix_cache": ("POST", self.reset),
                "/server_info": ("GET", lambda _: (200, {"vllm_config": {"model_config": {"dtype": "torch.float32"}}})),
            }
        if "lora" in self.takes:
            endpoints |= {
                "/v1/load_lora_adapter": ("POST", self.load_adapter),
                "/v1/unload_lora_adapter": ("POST", self.unload_adapter),
            }
        if path not in endpoints:
            return 404, {"detail": "Not Found"}
        expected, found = endpoints[path]
        return found(body) if method == expected else (405, {"detail": "Method Not Allowed"})

    def models(self, _body: dict):
        """Its model, and the adapters that are loaded."""
        own = {"id": self.name, "root": self.root, "parent": None, "max_model_len": self.max_model_len}
        adapters = [{"id": name, "root": path, "parent": self.name} for name, (path, _) in self.adapters.items()]
        return 200, {"object": "list", "data": [own, *adapters]}

    def metrics(self, _body: dict):
        """The requests in progress, as Prometheus reads them."""
        return 200, (
            f'# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{engine="0"}} {float(self.running)}\n'
            'vllm:num_requests_waiting{engine="0"} 0.0\n'
        )

    def reload(self, body: dict):
        """Take the weights of a checkpoint."""
        assert body["method"] == "reload_weights"
        if self.reloads:
            with self.computing:
                self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        return 200, {"results": [None]}

    def reset(self, _body: dict):
        """Drop the cache."""
        if self.resets:
            self.cache.clear()
        return 200, {"success": self.resets}

    def load_adapter(self, body: dict):
        """Load an adapter under a name that is new."""
        from peft import PeftModel

        if body["lora_name"] in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
        model = PeftModel.from_pretrained(copy.deepcopy(self.model), body["lora_path"]).eval()
        self.adapters[body["lora_name"]] = body["lora_path"], model
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def unload_adapter(self, body: dict):
        """Forget an adapter."""
        del self.adapters[body["lora_name"]]
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    @torch.no_grad()
    def complete(self, body: dict):
        """Sample responses to token ids."""
        name, ids = body["model"], body["prompt"]
        if name != self.name and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        if len(ids) + body["max_tokens"] > self.max_model_len:
            return 400, {"error": {"message": f"This model's maximum context length is {self.max_model_len} tokens."}}
        model = self.model if name == self.name else self.adapters[name][1]
        with self.computing:
            choices = [self.sample(model, body, body["seed"] + k) | {"index": k} for k in range(body["n"])]
        return 200, {"object": "text_completion", "model": name, "choices": choices}

    def sample(self, model, body: dict, seed: int) -> dict:
        """A response, token by token, behind what is cached of the prompt."""
        noise, ends = torch.Generator().manual_seed(seed), set(body["stop_token_ids"])
        key = (body["model"], *body["prompt"])
        if key not in self.cache:
            self.cache[key] = DynamicCache()
            model(torch.tensor([body["prompt"][:-1]]), past_key_values=self.cache[key], use_cache=True)
        cache, ids, logps = copy.deepcopy(self.cache[key]), [], []
        last, text, stops = body["prompt"][-1], "", body.get("stop", [])
        while len(ids) < body["max_tokens"] and not (ids and last in ends) and not any(stop in text for stop in stops):
            scores = model(torch.tensor([[last]]), past_key_values=cache, use_cache=True).logits[0, -1].float()
            last = int(torch.multinomial((scores / max(body["temperature"], 1e-5)).softmax(-1), 1, generator=noise))
            ids.append(last)
            logps.append(scores.log_softmax(-1)[last].item())
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        has_ended = last in ends or any(stop in text for stop in stops)
        return {
            "text": text,
            "token_ids": ids,
            "logprobs": {"token_logprobs": logps},
            "finish_reason": "stop" if has_ended else "length",
        }


class Chats(Listening):
    """A model for chats in OpenAI's protocol and in Ollama's. write: (messages, seed) → a text, and why it ends.

    most: the largest n that it takes; more is refused, or less is given where `is_quiet`.
    """

    def __init__(self, write: Callable[[list[dict], int], tuple[str, str]], most: int = 100, is_quiet: bool = False, **given):
        super().__init__(**given)
        self.write, self.most, self.is_quiet = write, most, is_quiet

    def answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        """The answer of an endpoint."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "teacher", "object": "model"}]}
        if path == "/api/tags":
            return 200, {"models": [{"name": "teacher:latest", "digest": "abc"}]}
        if path == "/api/chat":
            text, end = self.write(body["messages"], body["options"]["seed"])
            return 200, {"message": {"role": "assistant", "content": text}, "done": True, "done_reason": end}
        if path != "/v1/chat/completions":
            return 404, {"error": {"message": "File Not Found", "code": 404}}
        count = body.get("n", 1)
        if count > self.most and not self.is_quiet:
            return 400, {"error": {"message": "n: only one completion choice is allowed"}}
        found = [self.write(body["messages"], body["seed"] + k) for k in range(min(count, self.most))]
        return 200, {
            "choices": [
                {"index": k, "message": {"role": "assistant", "content": text}, "finish_reason": end}
                for k, (text, end) in enumerate(found)
            ]
        }
