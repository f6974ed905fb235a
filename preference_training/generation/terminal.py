"""A conversation in a terminal: with one model, or with two side by side."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from preference_training.core.errors import UserError, nearest
from preference_training.data.records.record import Turn
from preference_training.generation.chat import Responder
from preference_training.generation.settings import KNOWN, GenerationSettings

HELP = """\
/new               begin a new conversation
/undo              take back the last question and its answer
/retry             ask the last question again (with another seed, if answers are sampled)
/system TEXT       set the system prompt of this conversation; without TEXT show it, with - have none
/set NAME VALUE    set temperature, top_p, top_k, repetition_penalty, max_new_tokens or seed; alone, show them
/save FILE         write the conversation as a row of `messages` for each model
/help              show this
/quit              leave, as Ctrl-D does; Ctrl-C stops an answer
A line that ends with \\ goes on in the next."""
BOLD, FAINT, PLAIN = "\033[1m", "\033[2m", "\033[0m"


class StoppedError(Exception):
    """The user has stopped an answer."""


@dataclass
class Round:
    """A question, and what each model answered to it."""

    question: str
    answers: list[str] = field(default_factory=list)


@dataclass
class Conversation:
    """What was said so far. system: the system prompt; None for none."""

    system: str | None = None
    rounds: list[Round] = field(default_factory=list)

    def turns(self, number: int) -> list[Turn]:
        """The conversation with the model of a number: each has its own answers."""
        turns = [Turn("system", self.system)] if self.system else []
        for each in self.rounds:
            turns.append(Turn("user", each.question))
            if number < len(each.answers):
                turns.append(Turn("assistant", each.answers[number]))
        return turns


@contextmanager
def ctrl_c_stops() -> Iterator[Callable[[], None]]:
    """Context in which the first Ctrl-C has the function that it gives raise StoppedError; a second one ends at once."""
    pressed: list[int] = []

    def note(*_) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(1)

    def check() -> None:
        if pressed:
            raise StoppedError

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """The loop: reads lines, follows commands, and has each responder answer what is none.

    changes: the settings that differ from the models' own. system: the system prompt that conversations begin with.
    """

    def __init__(self, responders: Sequence[Responder], changes: dict[str, Any], system: str | None = None):
        self.responders, self.changes, self.system = responders, dict(changes), system
        self.conversation = Conversation(system)
        self.retries = 0
        self.output: TextIO = sys.stdout
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Talk until the user leaves."""
        if self.is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  it gives `input` a history and editing keys
        while True:
            try:
                line = self._read()
            except EOFError:
                self._print("")
                return
            except KeyboardInterrupt:
                self._print("\nCtrl-D or /quit leaves.", FAINT)
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self.take(line)
            except UserError as error:
                self._print(str(error), FAINT)
            except KeyboardInterrupt:
                self._print("")

    def take(self, line: str) -> None:
        """Follow a line of the user's: a command, or a question."""
        if not line.strip():
            return
        word, _, rest = line.strip().partition(" ")
        if not word.startswith("/") or word.startswith("//"):
            self.ask(line.removeprefix("/") if line.startswith("//") else line)
            return
        name, rest = word[1:], rest.strip()
        if name not in COMMANDS:
            raise UserError(f"{word}: no such command; {nearest(name, COMMANDS)} A line for the model may begin with //.")
        COMMANDS[name](self, rest)

    def ask(self, question: str) -> None:
        """Have each model answer a question. One that nobody answers is no part of the conversation."""
        current = Round(question)
        self.conversation.rounds.append(current)
        try:
            for number, responder in enumerate(self.responders):
                if len(self.responders) > 1:
                    self._print(responder.name, BOLD)
                current.answers.append(self._answer(number, responder))
        finally:
            if not any(current.answers):
                self.conversation.rounds.pop()
            # A model that was not asked any more has said nothing.
            current.answers += [""] * (len(self.responders) - len(current.answers))

    def _answer(self, number: int, responder: Responder) -> str:
        """The answer of a model, printed as it comes; what there is of it if the user stops it."""
        said: list[str] = []
        changes = self.changes
        if self.retries:
            changes = changes | {"seed": int(changes.get("seed", 0)) + self.retries}
        with ctrl_c_stops() as check:

            def say(text: str) -> None:
                said.append(text)
                self.output.write(printable(text))
                self.output.flush()
                check()

            try:
                reply = responder.respond(self.conversation.turns(number), changes, say)
            except StoppedError:
                self._print(" [stopped]", FAINT)
                return "".join(said)
        note = " [cut at max_new_tokens]" * (reply.ended == "length") or "[an empty answer]" * (not reply.text)
        self._print(note, FAINT)
        return reply.text

    # ---- commands ---------------------------------------------------------------------------------------------------------

    def help(self, _text: str) -> None:
        """Show what there is to type."""
        self._print(HELP)

    def new(self, _text: str) -> None:
        """Begin a new conversation."""
        self.conversation, self.retries = Conversation(self.system), 0

    def undo(self, _text: str) -> None:
        """Take back the last question and its answers."""
        self._print(f"taken back: {self._last().question}", FAINT)
        self.conversation.rounds.pop()
        self.retries = 0

    def retry(self, _text: str) -> None:
        """Ask the last question again."""
        question = self._last().question
        self.conversation.rounds.pop()
        self.retries += 1
        self.ask(question)

    def _last(self) -> Round:
        if not self.conversation.rounds:
            raise UserError("Nothing was asked yet.")
        return self.conversation.rounds[-1]

    def set_system(self, text: str) -> None:
        """Show or set the system prompt."""
        if text:
            self.system = self.conversation.system = None if text == "-" else text
        self._print(f"system prompt: {self.conversation.system or 'none'}", FAINT)

    def set(self, text: str) -> None:
        """Show or set the settings."""
        name, _, value = text.replace("=", " ").partition(" ")
        if name:
            found = GenerationSettings().changed({name: value.strip()})
            self.changes[name] = getattr(found, name)
            self.retries = 0
        self._print(settings_line(self.responders, self.changes), FAINT)

    def save(self, text: str) -> None:
        """Write the conversation as rows of `messages`."""
        if not text:
            raise UserError("/save: expected the name of a file.")
        rows = []
        for number, responder in enumerate(self.responders):
            messages = [{"role": turn.role, "content": turn.content} for turn in self.conversation.turns(number)]
            rows.append(json.dumps({"messages": messages, "model": responder.name}, ensure_ascii=False) + "\n")
        try:
            with Path(text).expanduser().open("a", encoding="utf-8") as file:
                file.writelines(rows)
        except OSError as error:
            raise UserError(f"/save: cannot write {text}: {error.strerror}.") from error
        self._print(f"{len(rows)} row{'s' * (len(rows) > 1)} added to {text}", FAINT)

    # ---- the terminal -----------------------------------------------------------------------------------------------------

    def _read(self) -> str:
        """A line of the user's, with those that it goes on in."""
        line = input("> " if self.is_terminal else "")
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{input('. ' if self.is_terminal else '')}"
        return line

    def _print(self, text: str, style: str = "") -> None:
        style = style if self.is_terminal and text else ""
        self.output.write(f"{style}{text}{PLAIN if style else ''}\n")
        self.output.flush()


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": Chat.help,
    "new": Chat.new,
    "undo": Chat.undo,
    "retry": Chat.retry,
    "system": Chat.set_system,
    "set": Chat.set,
    "save": Chat.save,
    # `run` follows it; it is here for `nearest`.
    "quit": Chat.help,
}


def greeting(responders: Sequence[Responder], changes: dict[str, Any], system: str | None) -> str:
    """Who is there, and how they answer."""
    notes = [f"{each.name}: {note}" for each in responders for note in getattr(each, "notes", ())]
    prompt = [f"system prompt: {system}"] * bool(system)
    talking = "talking to " + " and to ".join(each.name for each in responders)
    return "\n".join([talking, settings_line(responders, changes), *prompt, *notes, "/help lists commands, Ctrl-D leaves"])


def printable(text: str) -> str:
    """A model's text without what would steer the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def settings_line(responders: Sequence[Responder], changes: dict[str, Any]) -> str:
    """The settings of all models, in one line."""
    own = {settings.changed(changes).text() for each in responders if (settings := getattr(each, "settings", None))}
    changed = ", ".join(f"{name} {value}" for name, value in changes.items())
    return "; ".join(sorted(own)) or changed or f"the server's own settings ({', '.join(KNOWN)} can be set)"
