"""Win rates: both orders, missing verdicts, stored verdicts, and a process that is killed."""

import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.evaluation.judges import Judge, NoVerdictError, OllamaJudge, OpenAIJudge
from preference_training.evaluation.results_text import format_win_rate
from preference_training.evaluation.win_rates import Comparison, VerdictStore, win_rate
from tests.support.files import ROOT
from tests.support.judge_servers import Reply, serving, shorter_wins, verdict


def settings_of(url: str = "http://127.0.0.1:9", **changes) -> SimpleNamespace:
    """The section `evaluation` of the configuration."""
    values = {
        "judge": "ollama:m",
        "judge_url": url,
        "against": "reference",
        "judge_timeout": 20,
        "judge_attempts": 2,
        "judge_max_tokens": 99,
    }
    return SimpleNamespace(**values | {"judge_pause": 0.001, "judge_workers": 2, "max_missing": 0.1} | changes)


def comparisons(count: int) -> list[Comparison]:
    """Of each three, the policy's answer is the shorter one, the longer one, and as long."""
    return [Comparison(f"request {n}", "a" * (5 + (n % 3 == 1)), "b" * (5 + (n % 3 == 0))) for n in range(count)]


def rate_of(found: dict) -> float | None:
    return found["rate"] and found["rate"]["mean"]


@pytest.mark.parametrize("judge_class", [OpenAIJudge, OllamaJudge])
def test_the_win_rate_counts_wins_and_half_the_ties_over_both_orders(judge_class, tmp_path):
    with serving(shorter_wins) as server:
        wanted = settings_of(server.url + "/v1" * (judge_class is OpenAIJudge))
        found = win_rate(judge_class("ollama", "m", wanted), comparisons(9), tmp_path / "j.jsonl", wanted)
    assert (found["wins"], found["ties"], found["losses"], found["unanswered"]) == (3, 3, 3, 0)
    assert rate_of(found) == 0.5
    assert found["rate"]["low"] < 0.5 < found["rate"]["high"]
    pairs = [question[1:] for question in server.questions]
    assert len(pairs) == 18 and {(p, b, a) for p, a, b in pairs} == set(pairs)


def test_a_judge_with_a_position_bias_gives_only_ties(tmp_path):
    with serving(lambda question: verdict(question, "A")) as server:
        wanted = settings_of(server.url)
        found = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(6), tmp_path / "j.jsonl", wanted)
    assert (found["wins"], found["ties"], found["losses"]) == (0, 6, 0)


def test_equal_responses_are_a_tie_without_a_question(tmp_path):
    wanted = settings_of()
    found = win_rate(OllamaJudge("ollama", "m", wanted), [Comparison("p", "x", "x")] * 3, tmp_path / "j.jsonl", wanted)
    assert (found["ties"], found["unanswered"], rate_of(found)) == (3, 0, 0.5)


def test_known_verdicts_are_reused(tmp_path):
    with serving(shorter_wins) as server:
        wanted = settings_of(server.url)
        first = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(6), tmp_path / "j.jsonl", wanted)
        assert win_rate(OllamaJudge("ollama", "m", wanted), comparisons(6), tmp_path / "j.jsonl", wanted) == first
        assert len(server.questions) == 12
        win_rate(OllamaJudge("ollama", "m", wanted), comparisons(7), tmp_path / "j.jsonl", wanted)
        assert len(server.questions) == 14
        # Another model is another judge.
        win_rate(OllamaJudge("ollama", "other", wanted), comparisons(6), tmp_path / "j.jsonl", wanted)
        assert len(server.questions) == 26


@pytest.mark.parametrize(("judge_class", "base"), [(OpenAIJudge, "/v1"), (OllamaJudge, "")])
def test_verdicts_belong_to_one_model_at_one_server(judge_class, base, tmp_path, capsys):
    def rate(server, **changes) -> dict:
        wanted = settings_of(server.url + base, **changes)
        return win_rate(judge_class("kind", "m", wanted), comparisons(6), tmp_path / "j.jsonl", wanted)

    name = "m" if base else "m:latest"
    with serving(shorter_wins, {name: "these weights", "other": "others"}) as server:
        assert rate_of(rate(server)) == 0.5 and len(server.questions) == 12
        # The same model, though its list of models has another moment in it: nothing is asked again.
        assert rate(server)["note"] is None and len(server.questions) == 12 and server.listed == 2
        assert "12 of 12 verdicts reused from earlier evaluations" in capsys.readouterr().out
        server.models["other"] = "newer"
        rate(server)
        assert len(server.questions) == 12
        # Another limit is another request.
        rate(server, judge_max_tokens=98)
        assert len(server.questions) == 24
        # Other weights behind the name.
        server.models[name], server.answer = "other weights", lambda question: verdict(question, "tie")
        assert rate(server)["ties"] == 6 and len(server.questions) == 36
    with serving(shorter_wins, {name: "these weights"}) as server:
        rate(server)
        assert len(server.questions) == 12, "another address is another server"


def test_verdicts_of_an_unreachable_server_are_not_reused(tmp_path):
    with serving(shorter_wins, {"m:latest": "these weights"}) as server:
        wanted = settings_of(server.url)
        win_rate(OllamaJudge("ollama", "m", wanted), comparisons(6), tmp_path / "j.jsonl", wanted)
    found = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(6), tmp_path / "j.jsonl", wanted)
    assert found["rate"] is None and found["unanswered"] == 6 and "unreachable" in found["reasons"]
    assert "does not answer (unreachable): verdicts of earlier evaluations are not reused" in found["note"]


def test_a_server_without_a_list_of_models_is_assumed_to_be_unchanged_with_a_note(tmp_path):
    with serving(shorter_wins) as server:
        wanted = settings_of(server.url)
        for _ in range(2):
            found = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(6), tmp_path / "j.jsonl", wanted)
    assert len(server.questions) == 12 and found["unanswered"] == 0
    assert "does not say which model it serves (status 404: no such page)" in found["note"]
    assert any("assumed to be of the same m" in line for line in format_win_rate(found))


def test_the_reasons_for_missing_verdicts_are_printed_with_their_counts(tmp_path):
    faults = {
        0: Reply("Hm."),
        1: Reply(status=400, body='{"error": "prompt too long"}'),
        2: Reply(status=500, body="overloaded"),
        3: Reply("", ends="length"),
    }

    def answer(question) -> Reply:
        number = int(question[1].split()[1])
        return faults[number % 4] if number < 12 else shorter_wins(question)

    with serving(answer) as server:
        wanted = settings_of(server.url, max_missing=0.9)
        found = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(40), tmp_path / "j.jsonl", wanted)
    expected = {"malformed": 6, "status 400: prompt too long": 6, "status 500: overloaded": 6, "cut at judge_max_tokens": 6}
    assert found["reasons"] == expected and found["unanswered"] == 12 and found["retried"] == {"status 500: overloaded": 6}
    lines = format_win_rate(found)
    assert "  not answered: 6 x status 400: prompt too long" in lines
    assert "  retried: 6 x status 500: overloaded" in lines


@pytest.mark.parametrize(("wins", "low"), [(1, 0.025), (8, 0.6306), (128, 0.9716)])
def test_a_rate_of_1_is_not_certain(wins, low, tmp_path):
    class Fond(Judge):
        def better(self, prompt, first, second):
            return "first"

    found = win_rate(Fond("fond"), comparisons(wins), tmp_path / "j.jsonl", settings_of(judge_workers=1))
    assert found["rate"] == {"mean": 1.0, "low": pytest.approx(low, abs=1e-4), "high": 1.0}


def failing_for(requests: set[str], reply: Reply):
    """A server that never answers some requests."""
    return lambda question: reply if question[1] in requests else shorter_wins(question)


def test_comparisons_without_a_verdict_are_counted_separately_and_excluded(tmp_path):
    # The policy wins 0, 3, 6, ...: without 0 it has 6 of 19 comparisons, and 6 or 7 ties.
    with serving(failing_for({"request 0"}, Reply("Hm."))) as server:
        wanted = settings_of(server.url)
        found = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(20), tmp_path / "j.jsonl", wanted)
        assert (found["wins"], found["ties"], found["losses"], found["unanswered"]) == (6, 6, 7, 1)
        assert rate_of(found) == pytest.approx((6 + 3) / 19)
        assert found["reasons"] == {"malformed": 2} and found["retried"] == {}
        # It may be answered another time.
        server.answer = shorter_wins
        again = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(20), tmp_path / "j.jsonl", wanted)
        assert (again["wins"], again["unanswered"]) == (7, 0)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 19)), st.floats(0, 0.9))
def test_there_is_no_rate_where_too_many_verdicts_are_missing(tmp_path_factory, missing, share):
    class Moody(Judge):
        def better(self, prompt, first, second):
            if int(prompt.split()[1]) in missing:
                raise NoVerdictError("mood")
            return "first"

    wanted = settings_of(max_missing=share, judge_workers=1)
    path = tmp_path_factory.mktemp("judged") / "j.jsonl"
    found = win_rate(Moody("moody"), comparisons(20), path, wanted)
    if len(missing) > int(20 * share):
        assert found["rate"] is None and found["unanswered"] > int(20 * share)
    else:
        assert rate_of(found) == (1.0 if len(missing) < 20 else None) and found["unanswered"] == len(missing)
    assert found["wins"] + found["unanswered"] == 20


def test_a_dead_server_is_not_asked_for_every_comparison(tmp_path):
    with serving(lambda _: Reply(status=500)) as server:
        wanted = settings_of(server.url)
        found = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(200), tmp_path / "j.jsonl", wanted)
    # After 40 questions in vain, of 400, the rate cannot be had any more.
    assert len(server.questions) < 100
    assert found["rate"] is None and found["unanswered"] == 200 and found["wins"] == 0
    assert found["reasons"]["not asked"] > 300


def busy_once():
    """A server that rejects each question at first, and answers it when it is asked again."""
    asked = []

    def answer(question):
        asked.append(question)
        return Reply(status=429) if asked.count(question) == 1 else shorter_wins(question)

    return answer


def test_a_judge_retries_for_its_second_model_as_for_its_first(tmp_path):
    with serving(busy_once()) as server:
        wanted = settings_of(server.url)
        judge = OllamaJudge("ollama", "m", wanted)
        for model, pairs in enumerate((comparisons(3), comparisons(5)[3:])):
            found = win_rate(judge, pairs, tmp_path / f"{model}.jsonl", wanted)
            # Each pair in both orders; of this model's questions only.
            assert (found["unanswered"], found["retried"]) == (0, {"status 429": 2 * len(pairs)})


def test_a_judge_that_has_given_up_on_one_model_retries_for_the_next(tmp_path):
    with serving(lambda _: Reply(status=500)) as server:
        wanted = settings_of(server.url)
        judge = OllamaJudge("ollama", "m", wanted)
        assert win_rate(judge, comparisons(9), tmp_path / "a.jsonl", wanted)["rate"] is None
        server.answer = busy_once()
        assert win_rate(judge, comparisons(3), tmp_path / "b.jsonl", wanted)["unanswered"] == 0


def test_a_users_mistake_stops_the_questions_and_keeps_the_verdicts(tmp_path):
    with serving(failing_for({"request 3"}, Reply(status=401))) as server:
        wanted = settings_of(server.url, judge_workers=1)
        with pytest.raises(UserError, match="status 401"):
            win_rate(OllamaJudge("ollama", "m", wanted), comparisons(50), tmp_path / "j.jsonl", wanted)
    assert len(server.questions) < 12
    assert len(VerdictStore(tmp_path / "j.jsonl").known) >= 6


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from preference_training.evaluation.judges import OllamaJudge
from tests.evaluation.test_win_rates import comparisons, settings_of
from preference_training.evaluation.win_rates import win_rate
wanted = settings_of(sys.argv[2], judge_workers=1)
win_rate(OllamaJudge("ollama", "m", wanted), comparisons(6), Path(sys.argv[3]), wanted)
"""


def test_a_killed_process_continues_without_asking_twice(tmp_path):
    reached = threading.Event()

    def answer(question) -> Reply:
        if len(server.questions) <= 5:
            return shorter_wins(question)
        reached.set()
        return Reply(hangs=True)

    with serving(answer) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(ROOT), server.url, str(tmp_path / "j.jsonl")])
        assert reached.wait(120)
        child.kill()
        child.wait()
        # Half a line, as of a kill at another moment.
        with (tmp_path / "j.jsonl").open("a") as file:
            file.write('{"key": "0123')
        server.answer = shorter_wins
        wanted = settings_of(server.url)
        found = win_rate(OllamaJudge("ollama", "m", wanted), comparisons(6), tmp_path / "j.jsonl", wanted)
    assert (found["wins"], found["ties"], found["losses"], found["unanswered"]) == (2, 2, 2, 0)
    asked = [question[1:] for question in server.questions]
    # Six comparisons in two orders, and once more the question that the killed process had no answer to.
    assert len(asked) == 13 and len(set(asked)) == 12 and asked[5] in asked[6:]
    assert len(VerdictStore(tmp_path / "j.jsonl").known) == 12


@given(
    st.binary(max_size=60), st.lists(st.sampled_from([b"", b"null", b"[]", b'{"key": []}', b'{"key": "k", "verdict": "all"}']))
)
def test_only_the_damaged_lines_of_a_file_are_lost(tmp_path_factory, noise, lines):
    path = tmp_path_factory.mktemp("judged") / "j.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"key": "k", "verdict": "tie"}', noise]))
    store = VerdictStore(path)
    assert store.known.get("k") == "tie"

    class Sure(Judge):
        def better(self, prompt, first, second):
            return "first"

    question = "p", "a", "b"
    store.add(Sure("sure"), question, "second")
    assert VerdictStore(path).known[VerdictStore.key(Sure("sure"), question)] == "second"
    assert json.loads(path.read_bytes().splitlines()[-1])["prompt"] == "p"
