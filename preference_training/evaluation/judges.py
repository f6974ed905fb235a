"""Judges of pairs of responses: the toy data's ground truth, a reward model, or a language model behind HTTP.

Responses are untrusted text. A language model sees them between markers with a code that they cannot contain, and its verdict
must carry this code.
"""

import json
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from string import Template
from time import time

import xxhash

from preference_training.configuration.composition import CONFIG_DIR
from preference_training.configuration.sections import EvaluationConfig
from preference_training.configuration.validation import EVALUATION_REQUIREMENTS, KEY_VARIABLE
from preference_training.core.errors import UserError
from preference_training.core.values import hash_values
from preference_training.data.toy_preferences import response_kind

VERDICTS = ("first", "second", "tie")
# The longest pause before a retry, whatever a server asks for. Unit: seconds.
MAX_PAUSE = 120.0
# Characters of a server's error message that are kept.
MAX_REASON_LENGTH = 200


class NoVerdictError(Exception):
    """A judge gave no verdict, for a short `reason`. pause: how long the server asks to wait, in seconds.

    has_answered: whether the server responded at all.
    """

    def __init__(self, reason: str, is_retryable: bool = True, pause: float | None = None, has_answered: bool = False):
        super().__init__(reason)
        self.reason, self.is_retryable, self.pause, self.has_answered = reason, is_retryable, pause, has_answered


class Judge(ABC):
    """Decides which of two responses is better. identity: everything that its verdicts depend on besides the question."""

    both_orders = False

    def __init__(self, identity: str):
        self.identity = identity
        # The number of retries, by reason.
        self.retries: Counter = Counter()
        self.stopped = threading.Event()

    @abstractmethod
    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS. Raises NoVerdictError where there is none."""

    def identify(self) -> str | None:
        """Complete `identity` by asking the server, once; returns a note on the reuse of earlier verdicts."""
        return None

    def prepare(self, questions: Sequence[tuple[str, str, str]]) -> None:  # noqa: B027  most judges need no preparation
        """See all questions that will be asked, (prompt, first, second), before the first."""

    def request(self, prompt: str, first: str, second: str) -> list | dict:
        """Everything that is sent for one verdict, as plain values."""
        return [prompt, first, second]

    def stop(self) -> None:
        """Stop retrying: requests in progress end without a verdict."""
        self.stopped.set()


class ToyJudge(Judge):
    """The ground truth of the toy data: a response of the preferred kind beats any other."""

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS."""
        return verdict_by_score(*(float(response_kind(response) == "preferred") for response in (first, second)))


class RewardModelJudge(Judge):
    """A reward model: the response with the higher reward is better."""

    def __init__(self, name: str, cache_dir: str | None, device):
        from preference_training.evaluation.reward_models import RewardModel

        self.model = RewardModel(name, cache_dir, device)
        super().__init__(f"reward_model:{name} {self.model.identity}")
        self.thread = threading.Lock()

    def prepare(self, questions: Sequence[tuple[str, str, str]]) -> None:
        """Compute all rewards, in batches."""
        self.model.rewards([(prompt, response) for prompt, *responses in questions for response in responses])

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS."""
        with self.thread:
            one, other = self.model.rewards([(prompt, first), (prompt, second)])
        if one is None or other is None:
            raise NoVerdictError("the reward model cannot read the prompt or a response", is_retryable=False)
        return verdict_by_score(one, other)


def verdict_by_score(first: float, second: float) -> str:
    """The verdict for two scores: the higher one is better."""
    return "tie" if first == second else "first" if first > second else "second"


# ---- language models as judges ----------------------------------------------------------------------------------------------


class ChatJudge(Judge):
    """A language model behind HTTP. Subclasses implement a protocol: paths, request bodies and replies.

    settings: the section `evaluation` of the configuration.
    """

    both_orders = True
    default_url = ""
    path = ""
    models_path = ""

    def __init__(self, kind: str, model: str, settings):
        if find_spec("tenacity") is None:
            raise UserError(f"evaluation.judge: {kind} needs the package tenacity. Run: {EVALUATION_REQUIREMENTS}")
        self.template = Template((CONFIG_DIR / "judge_prompt.txt").read_text())
        base = (settings.judge_url or self.default_url).rstrip("/").removesuffix(self.path)
        super().__init__(f"{kind}:{model} {base}")
        self.model, self.base, self.url = model, base, f"{base}{self.path}"
        self.timeout, self.attempts, self.first_pause = settings.judge_timeout, settings.judge_attempts, settings.judge_pause
        self.max_tokens = settings.judge_max_tokens
        self.counting = threading.Lock()
        self.identified, self.note = False, None

    @abstractmethod
    def body(self, message: str) -> dict:
        """The body of a request for a reply to a message, at temperature 0."""

    @abstractmethod
    def text(self, reply: dict) -> str:
        """The text of a reply. Raises LookupError or TypeError without any, NoVerdictError where the reply says why."""

    @abstractmethod
    def served(self, reply: dict) -> list:
        """What a list of models says about this one, or about all if it is not listed, without values that change."""

    def key(self) -> str | None:
        """The API key of the environment, if there is one."""
        return None

    def identify(self) -> str | None:
        """Ask the server which model it serves: verdicts of another server or model must not be reused."""
        if not self.identified:
            self.identified = True
            self._identify()
        return self.note

    def _identify(self) -> None:
        try:
            reply = self._retrying()(self.send, "GET", f"{self.base}{self.models_path}")
            served = self.served(reply.json())
        except NoVerdictError as error:
            if not error.has_answered:
                # Nobody knows which model will answer later.
                self.identity += f" unknown {uuid.uuid4().hex}"
                self.note = f"{self.base} does not answer ({error.reason}): verdicts of earlier evaluations are not reused"
                return
            reason = error.reason
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            reason = "its list of models cannot be read"
        else:
            self.identity += f" {hash_values(served)}"
            return
        self.note = (
            f"{self.base} does not say which model it serves ({reason}): verdicts of earlier evaluations at this address are "
            f"assumed to be of the same {self.model}"
        )

    def request(self, prompt: str, first: str, second: str) -> dict:
        """The body of the request."""
        message = self.template.substitute(code=question_code(prompt, first, second), prompt=prompt, first=first, second=second)
        return self.body(message)

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS; temporary failures are retried with exponential backoff."""
        return self._retrying()(self.ask, self.request(prompt, first, second), question_code(prompt, first, second))

    def _retrying(self):
        import tenacity

        backoff = tenacity.wait_exponential_jitter(self.first_pause, MAX_PAUSE, jitter=self.first_pause)
        requested = tenacity.wait_exception(lambda error: min(error.pause or 0.0, MAX_PAUSE))
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, NoVerdictError) and error.is_retryable),
            wait=lambda state: max(backoff(state), requested(state)),
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_when_event_set(self.stopped),
            sleep=tenacity.sleep_using_event(self.stopped),
            before_sleep=self._count_retry,
            reraise=True,
        )

    def _count_retry(self, state) -> None:
        with self.counting:
            self.retries[state.outcome.exception().reason] += 1

    def ask(self, body: dict, code: str) -> str:
        """Ask once. Raises NoVerdictError, and UserError where no retry can succeed."""
        reply = self.send("POST", self.url, body)
        try:
            return parse_verdict(self.text(reply.json()), code)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            # At temperature 0 the reply would be the same again.
            raise NoVerdictError("malformed", is_retryable=False) from error

    def send(self, method: str, url: str, body: dict | None = None):
        """Send a request and return its reply. Raises as `ask`."""
        import requests

        try:
            # No redirects: the prompts and the key are for this server only.
            reply = requests.request(method, url, json=body, auth=self._authorize, timeout=self.timeout, allow_redirects=False)
        except requests.Timeout as error:
            raise NoVerdictError("timeout") from error
        except requests.RequestException as error:
            raise NoVerdictError("unreachable") from error
        if method == "POST" and reply.status_code in (401, 403, 404):
            raise UserError(
                f"evaluation.judge: {url} rejects {self.model} with status {reply.status_code}{self._error_detail(reply)}. "
                f"Expected a server that has the model and accepts the key. Check evaluation.judge_url and, for openai, "
                f"{KEY_VARIABLE}."
            )
        if reply.status_code != 200:
            # A server without a list of models will not get one.
            is_retryable = reply.status_code in (408, 409, 425, 429) or (reply.status_code >= 500 and reply.status_code != 501)
            reason = f"status {reply.status_code}{self._error_detail(reply)}"
            raise NoVerdictError(reason, is_retryable, parse_retry_after(reply.headers.get("Retry-After")), has_answered=True)
        return reply

    def _error_detail(self, reply) -> str:
        """The first line of an error message, after a colon and without the API key."""
        try:
            found = error_message(reply.json())
        except (ValueError, RecursionError):
            found = reply.text
        line = next((line.strip() for line in found.splitlines() if line.strip()), "")
        line = "".join(character for character in line if character.isprintable())
        line = line.replace(self.key() or "\0", "...")[:MAX_REASON_LENGTH]
        return f": {line}" if line else ""

    def _authorize(self, request):
        if key := self.key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request


def question_code(prompt: str, first: str, second: str) -> str:
    """The code of a question. It is not secret, but no response can contain a hash of itself and of the other response."""
    return xxhash.xxh3_128_hexdigest(json.dumps([prompt, first, second]).encode())[:10]


def error_message(reply) -> str:
    """The error message in a reply, in any of the formats that servers use; empty without one."""
    if not isinstance(reply, dict):
        return json.dumps(reply)
    error = reply.get("error")
    found = error.get("message") if isinstance(error, dict) else error
    for text in (found, reply.get("message"), reply.get("detail")):
        if isinstance(text, str):
            return text
    return ""


class OpenAIJudge(ChatJudge):
    """A model behind the OpenAI protocol, which many servers implement."""

    default_url = "https://api.openai.com/v1"
    path = "/chat/completions"
    models_path = "/models"

    def body(self, message: str) -> dict:
        """A request of /chat/completions."""
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {"model": self.model, "temperature": 0, **limit, "messages": [{"role": "user", "content": message}]}

    def text(self, reply: dict) -> str:
        """The text of a reply of /chat/completions."""
        choice = reply["choices"][0]
        check_finish_reason(choice.get("finish_reason"), bool(choice["message"].get("refusal")))
        return choice["message"]["content"]

    def served(self, reply: dict) -> list:
        """What /models says, without the time and the permission ids that vLLM generates for each call."""
        found = [{key: value for key, value in each.items() if key not in ("created", "permission")} for each in reply["data"]]
        return [each for each in found if each["id"] == self.model] or found

    def key(self) -> str | None:
        """The environment's OPENAI_API_KEY."""
        return os.environ.get(KEY_VARIABLE)


class OllamaJudge(ChatJudge):
    """A model behind the protocol of Ollama."""

    default_url = "http://localhost:11434"
    path = "/api/chat"
    models_path = "/api/tags"

    def body(self, message: str) -> dict:
        """A request of /api/chat."""
        options = {"temperature": 0} | ({} if self.max_tokens is None else {"num_predict": self.max_tokens})
        messages = [{"role": "user", "content": message}]
        return {"model": self.model, "stream": False, "options": options, "messages": messages}

    def text(self, reply: dict) -> str:
        """The text of a reply of /api/chat."""
        check_finish_reason(reply.get("done_reason"))
        return reply["message"]["content"]

    def served(self, reply: dict) -> list:
        """The digests in /api/tags: hashes of weights, template and parameters."""
        digests = {each["name"]: each["digest"] for each in reply["models"]}
        name = self.model if ":" in self.model else f"{self.model}:latest"
        return [digests[name]] if name in digests else sorted(digests.items())


def check_finish_reason(reason: str | None, is_refusal: bool = False) -> None:
    """Raise NoVerdictError where the server reports a refusal or a truncated reply."""
    if reason == "length":
        raise NoVerdictError("cut at judge_max_tokens", is_retryable=False)
    if is_refusal or reason == "content_filter":
        raise NoVerdictError("refused", is_retryable=False)


def parse_verdict(reply: str, code: str) -> str:
    """The verdict in a judge's reply: JSON with the question's code, alone on the last line.

    Raises ValueError without one: what a judge quotes from the responses cannot carry the code.
    """
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip().strip("`")]
    found = json.loads(lines[-1] if lines else "")
    if not isinstance(found, dict) or found.get("code") != code or found.get("better") not in ("A", "B", "tie"):
        raise ValueError("no verdict")
    return {"A": "first", "B": "second", "tie": "tie"}[found["better"]]


def parse_retry_after(header: str | None) -> float | None:
    """The pause in a Retry-After header, in seconds, from a number or a date; None for anything else."""
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (TypeError, ValueError):
        return None


def build_judge(options: EvaluationConfig, cache_dir: str | None, device) -> Judge:
    """The judge that a validated configuration names. Raises UserError where it cannot be loaded."""
    kind, _, model = options.judge.partition(":")
    if kind == "toy":
        return ToyJudge("toy")
    if kind == "reward_model":
        return RewardModelJudge(model, cache_dir, device)
    return {"openai": OpenAIJudge, "ollama": OllamaJudge}[kind](kind, model, options)
