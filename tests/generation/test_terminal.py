"""Conversations in a terminal: what is typed, what is shown, what is kept; once in a real terminal with Ctrl-C and Ctrl-D."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from preference_training.core.errors import UserError
from preference_training.generation.chat import load_for_chat
from preference_training.generation.servers import Reply
from preference_training.generation.settings import GenerationSettings
from preference_training.generation.terminal import Chat, Conversation, StoppedError, ctrl_c_stops, greeting, printable
from tests.architectures.tiny_models import make
from tests.support.chat_templates import PHI
from tests.support.files import ROOT


class Parrot:
    """Repeats what it was asked, and notes what it was sent."""

    settings = GenerationSettings()

    def __init__(self, name: str = "parrot", words: tuple[str, ...] = ()):
        self.name, self.words, self.asked = name, words, []

    def respond(self, turns, changes, say) -> Reply:
        self.asked.append(([tuple(turn[:2]) for turn in turns], changes))
        words = self.words or (f"{turns[-1].content}?",)
        for word in words:
            say(word)
        return Reply("".join(words), "stop")


@pytest.fixture
def talk():
    """What was said in a conversation of some lines with some responders: `talk(lines, *responders, system=..., **changes)`."""

    def run(lines: list[str], *responders, system: str | None = None, **changes) -> tuple[Chat, str]:
        chat = Chat(responders or (Parrot(),), changes, system)
        chat.output = StringIO()
        for line in lines:
            try:
                chat.take(line)
            except UserError as error:
                chat.output.write(f"{error}\n")
        return chat, chat.output.getvalue()

    return run


def test_a_conversation_has_what_was_said_before(talk):
    parrot = Parrot()
    _, said = talk(["Why?", "  ", "And how?"], parrot, system="Be brief.")
    assert said == "Why??\n\nAnd how??\n\n".replace("\n\n", "\n")
    system, first, answer = ("system", "Be brief."), ("user", "Why?"), ("assistant", "Why??")
    assert [turns for turns, _ in parrot.asked] == [[system, first], [system, first, answer, ("user", "And how?")]]


def test_two_models_have_a_history_each(talk):
    one, other = Parrot("before training", ("Long ", "answer.")), Parrot("mine", ("Short.",))
    _, said = talk(["Why?", "How?"], one, other)
    assert said.startswith("before training\nLong answer.\nmine\nShort.\n")
    assert one.asked[1][0][1] == ("assistant", "Long answer.") and other.asked[1][0][1] == ("assistant", "Short.")


def test_a_question_is_taken_back_or_asked_again(talk):
    parrot = Parrot()
    chat, said = talk(["One", "Two", "/undo", "Three", "/retry", "/retry"], parrot, temperature=1.0)
    assert [each.question for each in chat.conversation.rounds] == ["One", "Three"] and "taken back: Two" in said
    # Sampled again, it is another answer.
    assert [changes.get("seed") for _, changes in parrot.asked] == [None, None, None, 1, 2]
    assert [turns[-1][1] for turns, _ in parrot.asked] == ["One", "Two", "Three", "Three", "Three"]
    assert "Nothing was asked yet." in talk(["/undo"])[1]


def test_a_new_conversation_begins_with_the_system_prompt(talk):
    parrot = Parrot()
    _, said = talk(["/system Be brief.", "One", "/new", "Two", "/system -", "/new", "Three", "/system"], parrot)
    assert [turns for turns, _ in parrot.asked] == [
        [("system", "Be brief."), ("user", "One")], [("system", "Be brief."), ("user", "Two")], [("user", "Three")],
    ]  # fmt: skip
    assert said.endswith("system prompt: none\n")


def test_settings_are_set_and_shown(talk):
    parrot = Parrot()
    _, said = talk(["/set temperature 0.7", "/set max_new_tokens=9", "Why?", "/set", "/set top_p 7", "/set x 1"], parrot)
    assert parrot.asked[0][1] == {"temperature": 0.7, "max_new_tokens": 9}
    assert said.splitlines()[0] == "temperature 0.7, seed 0, at most 512 tokens"
    assert "top_p: found 7, expected a number above 0" in said and "x: no such setting; known are:" in said


def test_a_conversation_is_saved_as_rows_that_training_reads(talk, tmp_path):
    file = tmp_path / "talked.jsonl"
    talk(["Why?", f"/save {file}"], Parrot("one", ("Rain.",)), Parrot("two", ("Rain.",)), system="Be brief.")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["one", "two"]
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]
    from preference_training.data.entries import load_records, read_entry

    records = load_records(read_entry({"path": str(file), "held_out_share": 0}), "train")
    assert {record.sft_target for record in records} == {"Rain."}
    assert "expected the name of a file" in talk(["/save"])[1]
    assert "cannot write" in talk(["Why?", "/save /nowhere/x"])[1]


def test_unknown_commands_suggest_known_ones_and_a_model_can_be_sent_a_slash(talk):
    parrot = Parrot()
    _, said = talk(["/undoo", "//etc is a folder", "/help"], parrot)
    assert "/undoo: no such command; did you mean undo?" in said and "/retry" in said
    assert [turns[-1][1] for turns, _ in parrot.asked] == ["/etc is a folder"]


def test_a_question_that_fails_is_no_part_of_the_conversation(talk):
    class Broken(Parrot):
        def respond(self, turns, changes, say):
            raise UserError("too long")

    chat, said = talk(["Why?"], Broken())
    assert "too long" in said and chat.conversation == Conversation()


def test_what_a_model_says_cannot_steer_the_terminal(talk):
    assert printable("a\x1b[31mb\x07\r\n\tc\u202e") == "a[31mb\n\tc"
    _, said = talk(["Why?"], Parrot(words=("\x1b]0;title\x07", "ok")))
    assert "\x1b" not in said and "ok" in said


def test_an_answer_that_was_cut_says_so(talk):
    class Cut(Parrot):
        def respond(self, turns, changes, say):
            say("word")
            return Reply("word", "length")

    assert talk(["Why?"], Cut())[1] == "word [cut at max_new_tokens]\n"


def test_the_first_ctrl_c_stops_the_answer_and_the_second_ends_it_at_once():
    before = signal.getsignal(signal.SIGINT)
    with ctrl_c_stops() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StoppedError):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_greeting_says_who_is_there_and_how_they_answer():
    said = greeting([Parrot("before training"), Parrot("mine")], {"temperature": 0.5}, "Be brief.")
    assert said.splitlines()[:3] == [
        "talking to before training and to mine", "temperature 0.5, seed 0, at most 512 tokens", "system prompt: Be brief.",
    ]  # fmt: skip


# ---- a real terminal --------------------------------------------------------------------------------------------------------


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, command: list, folder: Path):
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(ROOT)}
        # A session of its own, with this terminal: Ctrl-C is then a signal to it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, *map(str, command)],
            cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def until(self, text: str, seconds: float = 120) -> str:
        """What is shown from the last call up to a text."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in {self.shown!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.master, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError:
                    assert text in self.shown, self.shown
        found, _, self.shown = self.shown.partition(text)
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


# The terminal becomes the one that controls the session; then the program runs as it does from a shell.
BEGIN = (
    "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.argv = sys.argv[1:];"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_a_conversation_in_a_real_terminal(tmp_path):
    make("llama", tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    tokenizer.chat_template = PHI
    tokenizer.save_pretrained(tmp_path / "tiny")
    # Room for an answer that goes on until it is stopped.
    config = json.loads((tmp_path / "tiny" / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    terminal = Terminal([ROOT / "scripts/chat.py", "tiny", "--max_new_tokens", "4"], tmp_path)
    try:
        assert "talking to tiny\ngreedy, at most 4 tokens" in terminal.until("> ")
        terminal.type("Why?\n")
        answer = terminal.until("[cut at max_new_tokens]")
        chat = load_for_chat(str(tmp_path / "tiny"))
        from preference_training.data.records.record import Turn

        expected = chat.respond([Turn("user", "Why?")], {"max_new_tokens": 4}, lambda _: None).text
        assert printable(expected).strip() in answer
        assert chat.respond([Turn("user", "Again?")], {"max_new_tokens": 200}, lambda _: None).ended == "length"
        terminal.type("/set max_new_tokens 7000\n")
        terminal.until("at most 7,000 tokens")
        terminal.until("> ")
        terminal.type("Again?\n")
        terminal.until("Again?\n")
        time.sleep(1)
        terminal.type("\x03")
        terminal.until("[stopped]")
        terminal.type("/undo\n")
        terminal.until("taken back: Again?")
        terminal.until("> ")
        # A signal between the prompt and the wait for keys is seen with the next key only: no person is that fast.
        time.sleep(1)
        terminal.type("\x03")
        terminal.until("Ctrl-D or /quit leaves.")
        terminal.until("> ")
        time.sleep(1)
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
