"""Answers are made ahead: every one is saved, none is asked for twice, and what cannot be had is said once."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from preference_collection.__main__ import main
from preference_collection.generation.asking import Request
from preference_collection.generation.batches import Batch, Progress, duration_text, reply_to
from preference_collection.generation.filling import fill, plan_of
from preference_collection.generation.sources import Model, ServerSource, model_named
from preference_collection.generation.stopping import Stop
from preference_collection.settings import load_settings
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison
from preference_collection.tests.models import QUICK, REPLIES, code, filled, seed_of, settings_for, with_tasks
from preference_collection.tests.ollama_stand_in import Broken, Silence, ollama_stand_in
from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn


@pytest.fixture
def server():
    with ollama_stand_in(dict(REPLIES)) as stand_in:
        yield stand_in


# ---- filling a store --------------------------------------------------------------------------------------------------------


def test_the_first_tasks_without_a_comparison_get_one(store, server):
    with_tasks(store, "a", "b", "c", "d")
    known = a_comparison("b")
    store.add_comparisons([known])
    assert filled(store, server, "varied", n=2) == "4 answers and 2 comparisons added for 2 tasks"
    assert [task.id for task in store.tasks_without_comparison()] == ["d"]
    [comparison] = store.comparisons_of("a")
    assert [answer.model for answer in comparison.answers] == ["varied", "varied"]
    assert comparison.answers[0].code != comparison.answers[1].code
    assert store.comparisons_of("b") == [known]
    assert filled(store, server, "varied", count=5) == "5 answers and 1 comparison added for 1 task"
    assert len(store.comparisons_of("d")[0].answers) == 5
    assert filled(store, server, "varied") == "every task has a comparison"


def test_several_models_give_one_answer_each_and_all_of_the_first_are_asked_for_first(store, server):
    with_tasks(store, "a", "b", "c")
    assert filled(store, server, "varied", "other", workers=1) == "6 answers and 3 comparisons added for 3 tasks"
    assert [request["model"] for request in server.requests] == ["varied"] * 3 + ["other"] * 3
    for comparison in store.comparisons():
        assert [answer.model for answer in comparison.answers] == ["varied", "other"]


def test_so_many_requests_are_sent_at_a_time(store, server):
    with_tasks(store, *"abcdef")
    together = threading.Barrier(4, timeout=20)
    server.replies["varied"] = lambda request: [code(f"return {seed_of(request)}  # {together.wait()}")]
    assert filled(store, server, "varied", n=6, workers=4).startswith("12 answers")


def test_text_without_code_is_no_fault_of_an_answer_to_a_text(store, server):
    with_tasks(store, "a", kind="text", function_name="", tests=())
    assert filled(store, server, "prose") == "2 answers and 1 comparison added for 1 task"
    [comparison] = store.comparisons_of("a")
    assert comparison.answers[0].parameters["instruction"] == "" and comparison.answers[0].prompt == "Add two numbers (a)."


def test_an_unusable_reply_is_asked_for_three_more_times_then_kept_with_its_fault(store, server):
    with_tasks(store, "a")
    assert filled(store, server, "prose") == (
        "2 answers and 1 comparison added for 1 task; 2 of the answers cannot be used, even after 3 more attempts each"
    )
    assert len(server.requests) == 2 * 4 and len({seed_of(request) for request in server.requests}) == 8
    [comparison] = store.comparisons_of("a")
    assert [answer.parameters["fault"] for answer in comparison.answers] == ["contains no code"] * 2


def test_an_answer_that_is_there_already_is_asked_for_three_more_times_then_the_task_is_left(store, server):
    with_tasks(store, "a")
    assert filled(store, server, "same") == (
        "1 answer and 0 comparisons added for 1 task; 1 task left without a comparison, since their answers are the same"
    )
    assert len(server.requests) == 1 + 4
    assert filled(store, server, "varied").startswith("2 answers and 1 comparison"), "of another model both are missing"


def test_a_conversation_is_completed_too(store, server):
    turns = (Turn("system", "Be brief."), Turn("user", "Add."))
    with_tasks(store, "a", prompt=turns, kind="text", function_name="", tests=())
    server.refuse = lambda _: (400, {}) if len(server.requests) == 2 else None
    assert filled(store, server, "prose").startswith("1 answer and 0 comparisons")
    assert filled(store, server, "prose") == "1 answer and 1 comparison added for 1 task"
    assert [answer.prompt for answer in store.comparisons_of("a")[0].answers] == [turns] * 2


def test_the_function_that_the_code_defines_is_kept_with_the_answer(store, server):
    with_tasks(store, "a")
    filled(store, server, "named")
    [comparison] = store.comparisons_of("a")
    assert [answer.parameters["function_name"] for answer in comparison.answers] == ["plus", "plus"]


# ---- servers that fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_temporary_error_is_followed_by_another_attempt(store, server, status):
    with_tasks(store, "a", "b")
    refused = set()
    server.refuse = lambda request: None if seed_of(request) in refused or refused.add(seed_of(request)) else (status, {})
    assert filled(store, server, "varied") == "4 answers and 2 comparisons added for 2 tasks"
    assert len(server.requests) == 2 * 4


def test_the_pause_that_a_server_asks_for_is_kept(store, server, monkeypatch):
    with_tasks(store, "a")
    pauses = []
    monkeypatch.setattr(Stop, "wait", lambda self, seconds=None: pauses.append(seconds))
    first = iter([(429, {"Retry-After": "7"}), (429, {"Retry-After": "86400"})])
    server.refuse = lambda _: next(first, None)
    filled(store, server, "varied", workers=1)
    assert pauses == [7.0, 120.0]


def test_a_server_that_is_gone_ends_the_command_with_one_message_and_the_answers_stay(store, server):
    with_tasks(store, *"abcd")
    server.refuse = lambda _: None if len(server.requests) <= 3 else (404, {})
    with pytest.raises(UserError) as caught:
        filled(store, server, "varied", workers=1)
    assert str(caught.value) == (
        "Ollama has no model 'varied'. Download it with: ollama pull varied\n"
        "3 answers saved; run the command again to continue."
    )
    assert len(server.requests) == 4
    server.refuse = lambda _: None
    assert filled(store, server, "varied").startswith("5 answers and 3 comparisons added for 3 tasks")


def test_where_nobody_listens_the_command_ends_at_once(store):
    with_tasks(store, "a")
    settings = load_settings(["ollama_host=127.0.0.1:1"])
    with pytest.raises(
        UserError, match=r"at http://127.0.0.1:1 cannot be reached. Start it, or set its address \(ollama_host\).$"
    ):
        fill(store, plan_of(settings, [model_named("ollama:x", settings)]), 1, 2, QUICK)


def test_a_server_that_goes_away_ends_the_command_and_the_answers_stay(store, server):
    with_tasks(store, *"abcd")

    def third_is_the_last(request):
        if len(server.requests) == 3:
            server.leave()
        return REPLIES["varied"](request)

    server.replies["varied"] = third_is_the_last
    with pytest.raises(UserError) as caught:
        filled(store, server, "varied", workers=1)
    assert str(caught.value) == (
        f"Ollama at {server.url} cannot be reached. Start it, or set its address (ollama_host).\n"
        "3 answers saved; run the command again to continue."
    )
    assert sum(len(store.answers_of(id)) for id in "abcd") == 3


def test_a_silence_is_followed_by_another_attempt(server):
    first = iter([[Silence()]])
    server.replies["late"] = lambda _: next(first, ["Here."])
    model = Model(ServerSource("ollama", server.url, 0.1), "late", "ollama:late")
    assert reply_to(model, Request("late", "x", 1.0, 1, 9), Stop(), QUICK) == ("Here.", "stop")
    assert len(server.requests) == 2


def test_a_reply_that_breaks_off_is_asked_for_again_as_a_whole(server):
    first = iter([["def ", Broken("out of memory")]])
    server.replies["late"] = lambda _: next(first, ["Here."])
    model = Model(ServerSource("ollama", server.url, 20), "late", "ollama:late")
    assert reply_to(model, Request("late", "x", 1.0, 1, 9), Stop(), QUICK) == ("Here.", "stop")


def test_a_request_that_is_refused_alone_leaves_the_others(store, server):
    with_tasks(store, "a", "b", "c")
    server.refuse = lambda request: (400, {}) if "(b)" in request["messages"][0]["content"] else None
    line = filled(store, server, "varied")
    assert line.startswith("4 answers and 2 comparisons added for 3 tasks; 2 requests without a reply, the first: Ollama at")
    assert [task.id for task in store.tasks_without_comparison()] == ["b"]


def test_ten_failures_in_a_row_end_the_command(store, server):
    with_tasks(store, *map(str, range(20)))
    server.refuse = lambda _: (400, {})
    with pytest.raises(UserError, match="10 requests in a row had no reply. .*status 400"):
        filled(store, server, "varied", workers=1)
    assert len(server.requests) == 10


def test_a_stop_ends_requests_to_a_silent_server(server):
    settings = settings_for(server)
    stop = Stop()
    model, batch = model_named("ollama:silent", settings), Batch(2, stop)
    jobs = [lambda: reply_to(model, Request("silent", "x", 1.0, 1, 9), stop, QUICK)] * 3
    thread = threading.Thread(target=batch.run, args=(jobs,))
    thread.start()
    while len(server.requests) < 2:
        time.sleep(0.005)
    stop.ask()
    thread.join(20)
    assert not thread.is_alive() and len(server.requests) == 2 and not batch.failures


def test_an_error_of_the_program_itself_is_raised_as_it_is():
    def broken():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        Batch(2, Stop()).run([broken, broken])


# ---- progress ---------------------------------------------------------------------------------------------------------------


def test_the_line_of_progress_has_rate_and_time_left():
    progress = Progress(400, "answers", _started=time.monotonic() - 60)
    progress.done = 30
    assert progress.line().startswith("30 of 400 answers, 30.0 a minute, 12 min ")
    assert Progress(400, "answers").line().endswith("unknown time left")
    assert [duration_text(seconds) for seconds in (0.4, 59.6, 3600, 7500)] == ["0 s", "1 min 0 s", "1 h 0 min", "2 h 5 min"]


class Screen(io.StringIO):
    """What a terminal or a file gets."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal


def test_progress_is_one_line_that_is_drawn_again_and_in_a_file_seldom_one():
    terminal, file = Screen(True), Screen(False)
    for stream in (terminal, file):
        progress = Progress(3, "answers", stream)
        progress.skip()
        progress.step()
        progress.step()
        progress.end()
    assert [line.partition(",")[0] for line in terminal.getvalue().split("\r")] == ["", "1 of 2 answers", "2 of 2 answers"]
    assert terminal.getvalue().count("\n") == 1 and file.getvalue() == ""


# ---- the command ------------------------------------------------------------------------------------------------------------


def refused(capsys, *line: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


def test_the_command_says_what_is_wrong_before_it_opens_the_store(tmp_path, capsys):
    store = tmp_path / "x.duckdb"
    for options, said in (
        ([], "generate: no model. Name one with --model or generator=..."),
        (["--model", "ollama:a", "--per-problem", "6"], "--per-problem: found 6, expected a number from 2 to 5."),
        (["--model", "ollama:a", "--model", "ollama:a"], "--model: found the same model twice"),
        (["--model", "ollama:a", "--model", "ollama:b", "--per-problem", "3"], "--per-problem: found 3 and 2 models"),
        (["generator=olama:a"], "olama:a: no such file; did you mean ollama?"),
        (["--n", "0", "generator=ollama:a"], "expected an integer from 1"),
        (["--workers", "65", "generator=ollama:a"], "expected an integer from 1 to 64"),
    ):
        assert said in refused(capsys, "generate", *options, f"store={store}")
    assert not store.exists()


@pytest.mark.parametrize("command", ["generate", "judge"])
def test_a_store_that_cannot_be_written_is_refused_before_a_model_is_asked(tmp_path, server, capsys, command):
    address = str(tmp_path / "c.duckdb")
    with closing(open_store(address)) as store:
        with_tasks(store, "a")
        store.add_comparisons([a_comparison("a")])
    line = [f"store={address}", f"ollama_host={server.url}", "generator=ollama:varied", "judge=ollama:varied", "read_only=true"]
    assert refused(capsys, command, *line) == f"store: {address} is open read-only. Open a store that you can write to."
    assert not server.requests


def test_a_store_without_tasks_says_how_to_get_some(tmp_path, server, capsys):
    said = refused(capsys, "generate", f"store={tmp_path / 'c.duckdb'}", f"ollama_host={server.url}", "generator=ollama:varied")
    assert said.endswith("has no tasks. Import some: python -m preference_collection import FILE.")


def test_a_command_that_was_killed_asks_only_for_what_is_missing(tmp_path, server):
    """SIGKILL in the middle: each request whose answer was saved is not sent again, and nothing saved is lost."""
    address, tasks, per_task, workers = str(tmp_path / "c.duckdb"), 12, 2, 3
    with closing(open_store(address)) as store:
        with_tasks(store, *map(str, range(tasks)))
    enough, go_on = threading.Event(), threading.Event()

    def reply(request):
        # The first ten are answered; then it hangs until the process is killed.
        if len(server.requests) > 10:
            enough.set()
            go_on.wait(30)
        return REPLIES["varied"](request)

    server.replies["varied"] = reply
    line = [sys.executable, "-m", "preference_collection", "generate", "--n", str(tasks), "--per-problem", str(per_task),
            "--workers", str(workers), f"store={address}", f"ollama_host={server.url}", "generator=ollama:varied"]  # fmt: skip
    process = subprocess.Popen(line, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert enough.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    go_on.set()
    with closing(open_store(address)) as store:
        saved = sum(len(store.answers_of(str(number))) for number in range(tasks))
        earlier = {answer.id for number in range(tasks) for answer in store.answers_of(str(number))}
    # Of the ten that were answered, those in the hands of a worker may not be saved yet.
    assert 10 - workers <= saved <= 10
    server.replies["varied"] = REPLIES["varied"]
    server.requests.clear()
    ended = subprocess.run(line, capture_output=True, text=True, check=True)
    assert len(server.requests) == tasks * per_task - saved
    assert f"{tasks * per_task - saved} answers and" in ended.stdout
    with closing(open_store(address)) as store:
        assert not store.tasks_without_comparison()
        answers = [answer.id for comparison in store.comparisons() for answer in comparison.answers]
    assert len(answers) == len(set(answers)) == tasks * per_task and earlier <= set(answers)


def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(tmp_path, server):
    address = str(tmp_path / "c.duckdb")
    with closing(open_store(address)) as store:
        with_tasks(store, "a")
    line = [sys.executable, "-m", "preference_collection", "generate", f"store={address}", f"ollama_host={server.url}",
            "generator=ollama:silent"]  # fmt: skip
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(server.requests) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "stopped. 0 answers saved; run the command again to continue."
