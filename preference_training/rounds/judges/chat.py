"""Language models behind HTTP as judges: they score a response by a rubric, or compare two of them in both orders."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from string import Template
from threading import Lock
from typing import TypeVar

import xxhash

from preference_training.configuration.composition import CONFIG_DIR
from preference_training.configuration.keys import is_number
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import JudgingConfig
from preference_training.core.errors import UserError
from preference_training.core.values import hash_values
from preference_training.data.records.record import Prompt
from preference_training.evaluation.judges import ChatJudge, NoVerdictError, OllamaJudge, OpenAIJudge, read_coded
from preference_training.evaluation.win_rates import VerdictStore
from preference_training.rounds.judges.base import Judge, JudgedInput, Keep, Score
from preference_training.rounds.judges.comparing import ComparingJudge, Comparison, Outcome

KEYS = ("rounds.judge", "rounds.judging.url")
PROTOCOLS: dict[str, type[ChatJudge]] = {"openai": OpenAIJudge, "ollama": OllamaJudge}
# Verdicts of comparisons in the loop's directory, in the format of an evaluation's.
COMPARISONS = "comparisons.jsonl"
VALUES = {"first": 1.0, "second": 0.0, "tie": 0.5}

Question = TypeVar("Question")


def connected(kind: str, model: str, options: JudgingConfig, config: RunConfig) -> ChatJudge:
    """A language model to ask; nothing is sent yet. Raises UserError."""
    settings = replace(config.evaluation, judge_url=options.url or config.evaluation.judge_url)
    chat = PROTOCOLS[kind](kind, model, settings)
    chat.keys = KEYS
    return chat


def identified(chat: ChatJudge) -> ChatJudge:
    """The same, having been asked what it serves. Raises UserError where nobody answers."""
    note = chat.identify()
    if chat.is_silent:
        raise UserError(
            f"{KEYS[0]}: {chat.server.base} does not answer. Start the server, or name another with {KEYS[1]}; the loop "
            "goes on from here with resume=auto."
        )
    if note:
        print(f"judge: {note}", flush=True)
    return chat


def readable(prompt: Prompt) -> str:
    """A prompt as a judge reads it: a text, or the turns under the names of their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


class Asking:
    """Asks a language model many questions, some at a time.

    A question that the model does not answer as it was told has a reason. So has one that the server did not answer, whatever
    was tried; but where these are more than a share of the questions, the loop stops, since it can go on later.
    """

    def __init__(self, chat: ChatJudge, config: RunConfig):
        self.chat, self.workers = chat, config.evaluation.judge_workers
        self.max_missing = config.evaluation.max_missing

    def ask(self, questions: Sequence[Question], answer: Callable[[Question], object]) -> dict[Question, str]:
        """Have each question answered, in threads; why the others were not. Raises UserError."""
        missing: dict[Question, str] = {}
        unreached: Counter = Counter()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="judge") as pool:
            waiting = {pool.submit(answer, question): question for question in questions}
            try:
                for future in as_completed(waiting):
                    try:
                        future.result()
                    except NoVerdictError as error:
                        missing[waiting[future]] = error.reason
                        unreached[error.reason] += error.is_retryable
                        self._stop_if_many(unreached, len(questions))
            except BaseException:
                self.chat.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return missing

    def _stop_if_many(self, unreached: Counter, asked: int) -> None:
        if unreached.total() > self.max_missing * asked:
            reason, _ = unreached.most_common(1)[0]
            raise UserError(
                f"{KEYS[0]}: {self.chat.server.url} does not answer ({reason}): {unreached.total()} of {asked} questions, and "
                "evaluation.max_missing allows fewer. What it has said is kept; the loop goes on from here with resume=auto."
            )


class RubricJudge(Judge):
    """Scores a response by a rubric, 1 to `scale`, with the judge's reason."""

    def __init__(self, chat: ChatJudge, rubric: str, scale: int, asking: Asking):
        self.chat, self.rubric, self.scale, self.asking = chat, rubric, scale, asking
        self.template = Template((CONFIG_DIR / "rubric_prompt.txt").read_text())
        self.name = f"{chat.server.kind}:{chat.server.model}"
        asked = [chat.identity, self.template.template, rubric, scale, chat.settings]
        self.identity = f"rubric {self.name} {hash_values(asked)}"

    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """The score of each response; None, with the reason, where the model does not give one. Raises UserError."""
        scores: dict[int, Score] = {}
        self._ask(samples, scores.__setitem__)
        return [scores[number] for number in range(len(samples))]

    def judge_each(self, samples: Sequence[JudgedInput], keep: Keep) -> None:
        """Have each score kept as it comes: it has been paid for. Raises UserError."""
        for start in range(0, len(samples), self.at_once):
            some = samples[start : start + self.at_once]
            self._ask(some, lambda number, score, some=some: keep([some[number]], [score]))  # type: ignore[misc]

    def _ask(self, samples: Sequence[JudgedInput], keep: Callable[[int, Score], None]) -> None:
        keeping = Lock()

        def answer(number: int) -> None:
            score = self._answer(samples[number])
            with keeping:
                keep(number, score)

        for number, reason in self.asking.ask(range(len(samples)), answer).items():
            keep(number, Score(None, reason))

    def _answer(self, sample: JudgedInput) -> Score:
        prompt = readable(sample.prompt)
        code = xxhash.xxh3_128_hexdigest(json.dumps([self.rubric, prompt, sample.response]).encode())[:10]
        message = self.template.substitute(
            code=code, rubric=self.rubric, prompt=prompt, response=sample.response, scale=self.scale
        )
        body = self.chat.server.body([{"role": "user", "content": message}], self.chat.settings)
        return self.chat.answer(body, lambda text: parse_score(text, code, self.scale))


def parse_score(reply: str, code: str, scale: int) -> Score:
    """The score in a judge's reply, with the text before it as the reason. Raises ValueError without one."""
    found, reason = read_coded(reply, code)
    value = found.get("score")
    if not is_number(value) or not 1 <= value <= scale:
        raise ValueError(f"no score from 1 to {scale}")
    return Score(float(value), reason or None)


class PairwiseJudge(ComparingJudge):
    """Compares two responses in both orders; two different verdicts make a tie, and are counted.

    path: the file that verdicts are kept in, as soon as they are known.
    """

    def __init__(self, chat: ChatJudge, limit: int | None, path: Path, asking: Asking):
        name = f"{chat.server.kind}:{chat.server.model}"
        super().__init__(name, hash_values([chat.identity, chat.template.template, chat.settings]), limit)
        self.chat, self.asking = chat, asking
        self.store = VerdictStore(path, "local_run_dir")
        self.missing: dict[tuple[str, str, str], str] = {}

    def ask(self, comparisons: Sequence[Comparison]) -> None:
        """Ask for the verdicts that are not known, each once. Raises UserError."""
        questions = {VerdictStore.key(self.chat, each): each for some in map(self._questions, comparisons) for each in some}
        unknown = [each for key, each in questions.items() if key not in self.store.known]
        self.missing |= self.asking.ask(unknown, lambda each: self.store.add(self.chat, each, self.chat.better(*each)))

    def recall(self, comparison: Comparison) -> Outcome:
        """The outcome of a comparison: that of both orders, or a tie."""
        questions = self._questions(comparison)
        verdicts = [self.store.known.get(VerdictStore.key(self.chat, each)) for each in questions]
        if None in verdicts:
            reasons = [self.missing[each] for each in questions if each in self.missing]
            return Outcome(None, reasons[0] if reasons else None)
        forward, backward = VALUES[str(verdicts[0])], 1 - VALUES[str(verdicts[1])]
        return Outcome(forward if forward == backward else 0.5, orders_disagree=forward != backward)

    @staticmethod
    def _questions(comparison: Comparison) -> list[tuple[str, str, str]]:
        prompt = readable(comparison.prompt)
        return [(prompt, comparison.first, comparison.second), (prompt, comparison.second, comparison.first)]


def rubric_text(path: str) -> str:
    """The text of a rubric file. Raises UserError."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rounds.judging.rubric: {path}: cannot be read: {error}. Expected a text file.") from error
    if not text:
        raise UserError(f"rounds.judging.rubric: {path} is empty. Expected a text that says what a good response is.")
    return text
