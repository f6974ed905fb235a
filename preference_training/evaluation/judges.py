"""Judges of pairs of responses: the toy data's ground truth, a rule, a reward model, or a language model behind HTTP.

Responses are untrusted text. A language model sees them between markers with a code that they cannot contain, and its verdict
must carry this code.
"""

import json
import math
import threading
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from string import Template
from typing import TypeVar

import xxhash

from preference_training.configuration.checks.evaluation import EVALUATION_REQUIREMENTS, KEY_VARIABLE, RULE
from preference_training.configuration.composition import CONFIG_DIR
from preference_training.configuration.sections import EvaluationConfig
from preference_training.core.errors import UserError, nearest
from preference_training.core.files import hash_file, run_file
from preference_training.core.values import hash_values
from preference_training.data.toy_preferences import response_kind
from preference_training.generation.servers import ChatServer, OllamaServer, OpenAIServer, Reply, ServerError, retrying

T = TypeVar("T")
VERDICTS = ("first", "second", "tie")
# Verdicts, with those of a judge that also says how much better a response is, and the outcome of each for the first response.
OUTCOMES = {"first": 1.0, "second": 0.0, "tie": 0.5, "first much": 1.0, "second much": 0.0}


class NoVerdictError(Exception):
    """A judge gave no verdict, for a short `reason`. pause: how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, is_retryable: bool = True, pause: float | None = None):
        super().__init__(reason)
        self.reason, self.is_retryable, self.pause = reason, is_retryable, pause


class Judge(ABC):
    """Decides which of two responses is better. identity: everything that its verdicts depend on besides the question."""

    both_orders = False

    def __init__(self, identity: str):
        self.identity = identity
        # The number of retries that nobody has taken yet, by reason.
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

    def begin(self) -> None:
        """Allow retries again, if others were stopped: the next questions are asked like the first."""
        self.stopped = threading.Event()

    def stop(self) -> None:
        """Stop retrying: requests in progress end without a verdict."""
        self.stopped.set()

    def take_retries(self) -> Counter:
        """The number of retries since the last call, by reason."""
        found, self.retries = self.retries, Counter()
        return found


class ToyJudge(Judge):
    """The ground truth of the toy data: a response of the preferred kind beats any other."""

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS."""
        return verdict_by_score(*(float(response_kind(response) == "preferred") for response in (first, second)))


class RuleJudge(Judge):
    """A user's function of a prompt and a response: the response with the higher score is better.

    rule: FILE.py:NAME. Raises UserError where the file has no such function; exceptions of the file itself pass through.
    """

    def __init__(self, rule: str):
        file, _, name = rule.rpartition(":")
        path = Path(file).expanduser().absolute()
        defined = vars(run_file(path, "judge"))
        if not callable(defined.get(name)):
            functions = [key for key, value in defined.items() if getattr(value, "__module__", None) == defined["__name__"]]
            raise UserError(f"evaluation.judge: {file} has no function {name!r}; {nearest(name, functions)}")
        self.rule, self.score_of = rule, defined[name]
        # Verdicts of a file that has changed since are not reused.
        super().__init__(f"{name} of {hash_file(path)}")
        # A user's function need not be safe for several threads.
        self.thread = threading.Lock()

    def score(self, prompt: str, response: str) -> float:
        """The score of one response. Raises UserError for anything but a finite number."""
        with self.thread:
            found = self.score_of(prompt, response)
        if not isinstance(found, Real) or not math.isfinite(found):
            raise UserError(
                f"evaluation.judge: {self.rule} gives {found!r} for the response {response[:40]!r}. Expected a number, true or "
                "false: the response with the higher one wins."
            )
        return float(found)

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS."""
        return verdict_by_score(self.score(prompt, first), self.score(prompt, second))


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


class ScoreJudge(Judge):
    """A judge that scores each response alone: the higher score is better, None is none. identity: what scores depend on."""

    def __init__(self, identity: str, score: Callable[[str, str], float | None]):
        super().__init__(identity)
        self.score = score
        self.thread = threading.Lock()

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS."""
        with self.thread:
            one, other = self.score(prompt, first), self.score(prompt, second)
        if one is None or other is None:
            raise NoVerdictError("the judge cannot score a response", is_retryable=False)
        return verdict_by_score(one, other)


def verdict_by_score(first: float, second: float) -> str:
    """The verdict for two scores: the higher one is better."""
    return "tie" if first == second else "first" if first > second else "second"


# ---- language models as judges ----------------------------------------------------------------------------------------------


class ChatJudge(Judge):
    """A language model behind HTTP, at temperature 0. server: its protocol.

    settings: the section `evaluation` of the configuration. keys: those that name the judge and its server, for messages.
    """

    both_orders = True
    server_class: type[ChatServer]
    keys = ("evaluation.judge", "evaluation.judge_url")
    # The file of its instruction.
    prompt_file = "judge_prompt.txt"

    def __init__(self, kind: str, model: str, settings):
        if find_spec("tenacity") is None:
            raise UserError(f"evaluation.judge: {kind} needs the package tenacity. Run: {EVALUATION_REQUIREMENTS}")
        self.template = Template((CONFIG_DIR / self.prompt_file).read_text())
        self.server = self.server_class(model, settings.judge_url, settings.judge_timeout)
        super().__init__(f"{kind}:{model} {self.server.base}")
        self.attempts, self.first_pause = settings.judge_attempts, settings.judge_pause
        limit = settings.judge_max_tokens
        self.settings = {"temperature": 0} | ({} if limit is None else {"max_new_tokens": limit})
        self.counting = threading.Lock()
        self.identified, self.note, self.is_silent = False, None, False

    def identify(self) -> str | None:
        """Ask the server which model it serves: verdicts of another server or model must not be reused."""
        if not self.identified:
            self.identified = True
            self._identify()
        return self.note

    def _identify(self) -> None:
        base = self.server.base
        try:
            served = self.server.served(self._retrying()(self.server.models))
        except ServerError as error:
            if not error.has_answered:
                # Nobody knows which model will answer later.
                self.identity += f" unknown {uuid.uuid4().hex}"
                self.is_silent = True
                self.note = (
                    f"{self.server.base} does not answer ({error.reason}): verdicts of earlier evaluations are not reused"
                )
                return
            reason = error.reason
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            reason = "its list of models cannot be read"
        else:
            self.identity += f" {hash_values(served)}"
            return
        self.note = (
            f"{base} does not say which model it serves ({reason}): verdicts of earlier evaluations at this address are "
            f"assumed to be of the same {self.server.model}"
        )

    def request(self, prompt: str, first: str, second: str) -> dict:
        """The body of the request."""
        message = self.template.substitute(code=question_code(prompt, first, second), prompt=prompt, first=first, second=second)
        return self.server.body([{"role": "user", "content": message}], self.settings)

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS."""
        code = question_code(prompt, first, second)
        return self.answer(self.request(prompt, first, second), lambda text: parse_verdict(text, code))

    def answer(self, body: dict, read: Callable[[str], T]) -> T:
        """What `read` makes of the reply's text; temporary failures are retried with exponential backoff.

        Raises NoVerdictError where there is no reply, or `read` raises ValueError; and UserError where no retry can succeed.
        """
        return self._retrying()(self.ask, body, read)

    def _retrying(self):
        return retrying(self.attempts, self.first_pause, self.stopped, self._count_retry)

    def _count_retry(self, error: NoVerdictError | ServerError) -> None:
        with self.counting:
            self.retries[error.reason] += 1

    def ask(self, body: dict, read: Callable[[str], T]) -> T:
        """Ask once, as `answer` does."""
        try:
            reply = self.server.send("POST", self.server.url, body)
        except ServerError as error:
            if error.is_rejection:
                raise UserError(
                    f"{self.keys[0]}: {self.server.url} rejects {self.server.model} with {error.reason}. Expected a server "
                    f"that has the model and accepts the key. Check {self.keys[1]} and, for openai, {KEY_VARIABLE}."
                ) from error
            raise NoVerdictError(error.reason, error.is_retryable, error.pause) from error
        try:
            return read(checked_text(self.server.reply(reply.json())))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            # At temperature 0 the reply would be the same again.
            raise NoVerdictError("malformed", is_retryable=False) from error


def question_code(prompt: str, first: str, second: str) -> str:
    """The code of a question. It is not secret, but no response can contain a hash of itself and of the other response."""
    return xxhash.xxh3_128_hexdigest(json.dumps([prompt, first, second]).encode())[:10]


class OpenAIJudge(ChatJudge):
    """A model behind the OpenAI protocol."""

    server_class = OpenAIServer


class OllamaJudge(ChatJudge):
    """A model behind the protocol of Ollama."""

    server_class = OllamaServer


def checked_text(reply: Reply) -> str:
    """The text of a reply. Raises NoVerdictError where the server reports a refusal or a truncated reply."""
    if reply.ended == "length":
        raise NoVerdictError("cut at judge_max_tokens", is_retryable=False)
    if reply.is_refusal or reply.ended == "content_filter":
        raise NoVerdictError("refused", is_retryable=False)
    return reply.text


def parse_verdict(reply: str, code: str) -> str:
    """The verdict in a judge's reply. Raises ValueError without one."""
    found, _ = read_coded(reply, code)
    if found.get("better") not in ("A", "B", "tie"):
        raise ValueError("no verdict")
    return {"A": "first", "B": "second", "tie": "tie"}[found["better"]]


def read_coded(reply: str, code: str) -> tuple[dict, str]:
    """The JSON with the question's code, alone on the last line of a judge's reply, and the text before it.

    Raises ValueError without one: what a judge quotes from the responses cannot carry the code.
    """
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip().strip("`")]
    found = json.loads(lines[-1] if lines else "")
    if not isinstance(found, dict) or found.get("code") != code:
        raise ValueError("no verdict")
    return found, "\n".join(lines[:-1])


def build_judge(options: EvaluationConfig, cache_dir: str | None, device) -> Judge:
    """The judge that a validated configuration names. Raises UserError where it cannot be loaded."""
    if RULE.search(options.judge):
        return RuleJudge(options.judge)
    kind, _, model = options.judge.partition(":")
    if kind == "toy":
        return ToyJudge("toy")
    if kind == "reward_model":
        return RewardModelJudge(model, cache_dir, device)
    return {"openai": OpenAIJudge, "ollama": OllamaJudge}[kind](kind, model, options)
