"""Who says which of two answers is the better one: the toy data's ground truth, a reward model, a language model behind HTTP.

Answers are texts of others. Before a language model they stand between markers that they cannot know, and a verdict has to
carry the markers' code.
"""

import json
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from string import Template
from time import time

import xxhash

from preference_training.configuration.composition import CONFIG_DIR
from preference_training.configuration.validation import EVALUATION_REQUIREMENTS, KEY_VARIABLE
from preference_training.core.errors import UserError, first_line
from preference_training.core.hashing import hash_of_values
from preference_training.data.rows.templates import parse_dialogue
from preference_training.data.toy_preferences import answer_kind

VERDICTS = ("first", "second", "tie")
# Longest pause before another attempt, whatever a server asks for. Unit: seconds.
LONGEST_PAUSE = 120.0
# Letters of what a server says for a reason.
LONGEST_REASON = 200


class NoJudgementError(Exception):
    """A judge has not answered. `reason` is short; `pause` is how long the server asks to be left alone, in seconds.

    has_answered: whether a server has said anything at all.
    """

    def __init__(self, reason: str, may_answer_later: bool = True, pause: float | None = None, has_answered: bool = False):
        super().__init__(reason)
        self.reason, self.may_answer_later, self.pause, self.has_answered = reason, may_answer_later, pause, has_answered


class Judge(ABC):
    """Says which of two answers is better. identity stands for what its verdicts depend on, beside what it is asked."""

    both_orders = False

    def __init__(self, identity: str):
        self.identity = identity
        # Attempts that were made again, by their reasons.
        self.retries: Counter = Counter()
        self.stopped = threading.Event()

    @abstractmethod
    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS. Raises NoJudgementError where there is none."""

    def identify(self) -> str | None:
        """Complete `identity` by asking whoever judges, once; returns what is to be said of verdicts that are kept."""
        return None

    def request(self, prompt: str, first: str, second: str) -> list | dict:
        """All that is asked for one verdict, in plain values."""
        return [prompt, first, second]

    def stop(self) -> None:
        """No further attempts: those under way end without an answer."""
        self.stopped.set()


class ToyJudge(Judge):
    """The ground truth of the toy data: an answer of the preferred kind beats one that is not."""

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS."""
        return by_score(*(float(answer_kind(answer) == "preferred") for answer in (first, second)))


class RewardModelJudge(Judge):
    """A sequence classifier with one output: the answer with the larger output is better."""

    def __init__(self, name: str, cache_dir: str | None, device):
        from preference_training.modeling.loading import weights_hash

        self.model, self.tokenizer = load_reward_model(name, cache_dir)
        reads = [self.model.config.to_json_string(), str(self.tokenizer.chat_template), self.tokenizer.get_vocab()]
        how = hash_of_values(reads)
        super().__init__(f"reward_model:{name} {weights_hash(self.model)} {how}")
        self.model.to(device)
        self.thread = threading.Lock()

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS."""
        with self.thread:
            return by_score(self.reward(prompt, first), self.reward(prompt, second))

    def reward(self, prompt: str, answer: str) -> float:
        """The model's output for an answer; a text that is too long is cut at its beginning."""
        import torch

        if self.tokenizer.chat_template:
            turns = parse_dialogue(prompt) or [("user", prompt)]
            messages = [{"role": role, "content": content} for role, content in turns]
            messages.append({"role": "assistant", "content": answer.strip()})
            text, special = self.tokenizer.apply_chat_template(messages, tokenize=False), False
        else:
            text, special = prompt + answer, True
        ids = self.tokenizer(text, return_tensors="pt", truncation=True, add_special_tokens=special).to(self.model.device)
        with torch.no_grad():
            return self.model(input_ids=ids.input_ids, attention_mask=ids.attention_mask).logits.item()


def load_reward_model(name: str, cache_dir: str | None = None):
    """Model and tokenizer of a reward model, from the hub or a directory. Raises UserError where it is none."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from preference_training.modeling.loading import refuse_kernels

    where = {"cache_dir": cache_dir, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        refuse_kernels(config)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype="auto", output_loading_info=True, use_safetensors=True, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left", **where)
    except Exception as error:  # a dozen types, of networks and of damaged files
        raise UserError(
            f"evaluation.judge: reward_model:{name} could not be loaded: {first_line(error)}. Expected a sequence classifier "
            "with its tokenizer: an id of the hub, or a local directory with safetensors."
        ) from error
    if config.num_labels != 1 or info["missing_keys"]:
        missing = f", and has no {sorted(info['missing_keys'])[0]}" if info["missing_keys"] else ""
        raise UserError(
            f"evaluation.judge: reward_model:{name} has {config.num_labels} outputs{missing}. Expected a trained reward "
            "model: a sequence classifier with one output."
        )
    return model.eval(), tokenizer


def by_score(first: float, second: float) -> str:
    """The verdict of two numbers, of which the larger one is better."""
    return "tie" if first == second else "first" if first > second else "second"


# ---- language models as judges ----------------------------------------------------------------------------------------------


class ChatJudge(Judge):
    """A language model behind HTTP. Subclasses know a protocol: where to ask, what to send, where the answer is.

    settings is the section `evaluation` of the configuration.
    """

    both_orders = True
    usual_url = ""
    # Of questions, and of the list of models.
    path = ""
    models_path = ""

    def __init__(self, kind: str, model: str, settings):
        if find_spec("tenacity") is None:
            raise UserError(f"evaluation.judge: {kind} needs a library. Run: {EVALUATION_REQUIREMENTS}")
        self.template = Template((CONFIG_DIR / "judge_prompt.txt").read_text())
        base = (settings.judge_url or self.usual_url).rstrip("/").removesuffix(self.path)
        super().__init__(f"{kind}:{model} {base}")
        self.model, self.base, self.url = model, base, f"{base}{self.path}"
        self.timeout, self.attempts, self.first_pause = settings.judge_timeout, settings.judge_attempts, settings.judge_pause
        self.max_tokens = settings.judge_max_tokens
        self.counting = threading.Lock()
        self.identified, self.note = False, None

    @abstractmethod
    def body(self, message: str) -> dict:
        """The request that asks for an answer to a message, at temperature 0."""

    @abstractmethod
    def text(self, reply: dict) -> str:
        """The answer in a reply. Raises LookupError or TypeError where there is none, NoJudgementError where it says why."""

    @abstractmethod
    def served(self, reply: dict) -> list:
        """What a list of models says of this one, without what changes from call to call; of all where it is not among them."""

    def key(self) -> str | None:
        """The secret that requests carry, of the environment; None for none."""
        return None

    def identify(self) -> str | None:
        """Ask the server which model it serves: verdicts of another server, or another model behind the name, are not its."""
        if not self.identified:
            self.identified = True
            self._identify()
        return self.note

    def _identify(self) -> None:
        try:
            reply = self._attempts()(self.send, "GET", f"{self.base}{self.models_path}")
            said = self.served(reply.json())
        except NoJudgementError as error:
            if not error.has_answered:
                # Who knows what will answer when it answers.
                self.identity += f" unknown {uuid.uuid4().hex}"
                self.note = f"{self.base} does not answer ({error.reason}): verdicts of earlier evaluations are not used"
                return
            self._take_as_it_is(error.reason)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self._take_as_it_is("its list of models cannot be read")
        else:
            self.identity += f" {hash_of_values(said)}"

    def _take_as_it_is(self, reason: str) -> None:
        self.note = (
            f"{self.base} does not say which model it serves ({reason}): verdicts of earlier evaluations at this address are "
            f"taken to be of the same {self.model}"
        )

    def request(self, prompt: str, first: str, second: str) -> dict:
        """The body of the request."""
        message = self.template.substitute(code=code_of(prompt, first, second), prompt=prompt, first=first, second=second)
        return self.body(message)

    def better(self, prompt: str, first: str, second: str) -> str:
        """One of VERDICTS, asked for again, after longer and longer pauses, where the server may answer later."""
        return self._attempts()(self.ask, self.request(prompt, first, second), code_of(prompt, first, second))

    def _attempts(self):
        import tenacity

        usual = tenacity.wait_exponential_jitter(self.first_pause, LONGEST_PAUSE, jitter=self.first_pause)
        asked_for = tenacity.wait_exception(lambda error: min(error.pause or 0.0, LONGEST_PAUSE))
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, NoJudgementError) and error.may_answer_later),
            wait=lambda state: max(usual(state), asked_for(state)),
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_when_event_set(self.stopped),
            sleep=tenacity.sleep_using_event(self.stopped),
            before_sleep=self._count,
            reraise=True,
        )

    def _count(self, state) -> None:
        with self.counting:
            self.retries[state.outcome.exception().reason] += 1

    def ask(self, body: dict, code: str) -> str:
        """One attempt. Raises NoJudgementError, and UserError where no attempt will ever succeed."""
        reply = self.send("POST", self.url, body)
        try:
            return verdict_of(self.text(reply.json()), code)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            # At temperature 0 it would say the same again.
            raise NoJudgementError("malformed", may_answer_later=False) from error

    def send(self, method: str, url: str, body: dict | None = None):
        """The reply to a request. Raises as `ask`."""
        import requests

        try:
            # Not to where it may be redirected to: prompt and key are meant for this server.
            reply = requests.request(method, url, json=body, auth=self._authorise, timeout=self.timeout, allow_redirects=False)
        except requests.Timeout as error:
            raise NoJudgementError("timeout") from error
        except requests.RequestException as error:
            raise NoJudgementError("unreachable") from error
        if method == "POST" and reply.status_code in (401, 403, 404):
            raise UserError(
                f"evaluation.judge: {url} answers {self.model} with status {reply.status_code}{self._said(reply)}. Expected a "
                "server that knows the model and takes the key; look at evaluation.judge_url and, for openai, "
                f"{KEY_VARIABLE}."
            )
        if reply.status_code != 200:
            # Who has no list of models never has one.
            later = reply.status_code in (408, 409, 425, 429) or (reply.status_code >= 500 and reply.status_code != 501)
            reason = f"status {reply.status_code}{self._said(reply)}"
            raise NoJudgementError(reason, later, pause_of(reply.headers.get("Retry-After")), has_answered=True)
        return reply

    def _said(self, reply) -> str:
        """What a reply that is no answer says, behind a colon; its first line, without the key."""
        try:
            found = error_in(reply.json())
        except (ValueError, RecursionError):
            found = reply.text
        line = next((line.strip() for line in found.splitlines() if line.strip()), "")
        line = "".join(letter for letter in line if letter.isprintable())
        line = line.replace(self.key() or "\0", "...")[:LONGEST_REASON]
        return f": {line}" if line else ""

    def _authorise(self, request):
        if key := self.key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request


def code_of(prompt: str, first: str, second: str) -> str:
    """The code of a question. It is no secret, but no answer can hold the hash of itself and of the answer beside it."""
    return xxhash.xxh3_128_hexdigest(json.dumps([prompt, first, second]).encode())[:10]


def error_in(reply) -> str:
    """The message in a body that reports an error, in one of the shapes that servers give it; nothing where it has none."""
    if not isinstance(reply, dict):
        return json.dumps(reply)
    error = reply.get("error")
    found = error.get("message") if isinstance(error, dict) else error
    for text in (found, reply.get("message"), reply.get("detail")):
        if isinstance(text, str):
            return text
    return ""


class OpenAIJudge(ChatJudge):
    """A model behind OpenAI's protocol, of which there are many servers."""

    usual_url = "https://api.openai.com/v1"
    path = "/chat/completions"
    models_path = "/models"

    def body(self, message: str) -> dict:
        """A request of /chat/completions."""
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {"model": self.model, "temperature": 0, **limit, "messages": [{"role": "user", "content": message}]}

    def text(self, reply: dict) -> str:
        """The answer in a reply of /chat/completions."""
        choice = reply["choices"][0]
        refuse_ending(choice.get("finish_reason"), bool(choice["message"].get("refusal")))
        return choice["message"]["content"]

    def served(self, reply: dict) -> list:
        """What /models says; vLLM has the moment of the call in it, and permissions with numbers of their own."""
        found = [{key: value for key, value in each.items() if key not in ("created", "permission")} for each in reply["data"]]
        return [each for each in found if each["id"] == self.model] or found

    def key(self) -> str | None:
        """The environment's OPENAI_API_KEY."""
        return os.environ.get(KEY_VARIABLE)


class OllamaJudge(ChatJudge):
    """A model behind Ollama's own protocol."""

    usual_url = "http://localhost:11434"
    path = "/api/chat"
    models_path = "/api/tags"

    def body(self, message: str) -> dict:
        """A request of /api/chat."""
        options = {"temperature": 0} | ({} if self.max_tokens is None else {"num_predict": self.max_tokens})
        messages = [{"role": "user", "content": message}]
        return {"model": self.model, "stream": False, "options": options, "messages": messages}

    def text(self, reply: dict) -> str:
        """The answer in a reply of /api/chat."""
        refuse_ending(reply.get("done_reason"))
        return reply["message"]["content"]

    def served(self, reply: dict) -> list:
        """The digests that /api/tags has: hashes of weights, template and parameters."""
        digests = {each["name"]: each["digest"] for each in reply["models"]}
        name = self.model if ":" in self.model else f"{self.model}:latest"
        return [digests[name]] if name in digests else sorted(digests.items())


def refuse_ending(reason: str | None, is_refusal: bool = False) -> None:
    """Raise NoJudgementError where a server says of an answer that it is none, or not all of it."""
    if reason == "length":
        raise NoJudgementError("cut at judge_max_tokens", may_answer_later=False)
    if is_refusal or reason == "content_filter":
        raise NoJudgementError("refused", may_answer_later=False)


def verdict_of(answer: str, code: str) -> str:
    """The verdict in a judge's answer: JSON with the question's code in its last line, and that line alone.

    Raises ValueError where it holds none: what a judge may have quoted of the answers carries no such code.
    """
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip().strip("`")]
    found = json.loads(lines[-1] if lines else "")
    if not isinstance(found, dict) or found.get("code") != code or found.get("better") not in ("A", "B", "tie"):
        raise ValueError("no verdict")
    return {"A": "first", "B": "second", "tie": "tie"}[found["better"]]


def pause_of(header: str | None) -> float | None:
    """How long a Retry-After header asks to wait, in seconds: it is a number, or a date; None for neither."""
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (TypeError, ValueError):
        return None


def build_judge(config, device) -> Judge:
    """The judge that a checked configuration names. Raises UserError where it cannot be had."""
    kind, _, model = config.evaluation.judge.partition(":")
    if kind == "toy":
        return ToyJudge("toy")
    if kind == "reward_model":
        return RewardModelJudge(model, config.cache_dir, device)
    return {"openai": OpenAIJudge, "ollama": OllamaJudge}[kind](kind, model, config.evaluation)
