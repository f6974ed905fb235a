"""Fifty labelers at once over HTTP: no judgment is lost, nobody judges anything twice, also if the server is killed."""

import json
import random
import re
import threading
import time
from collections import Counter
from contextlib import closing
from statistics import median, quantiles

import httpx
import pytest

from preference_collection.store.model import Answer, Comparison, Task, new_id
from preference_collection.store.store import open_store
from preference_collection.tests_whole.serving import app

LABELERS, COMPARISONS = 50, 10_000
# How long all judge, and how long each reads: a quick labeler, and one who never reads. Unit: seconds.
WORKS = ((12.0, 4.0), (4.0, 0.0))
# Limit of the server's work for a judgment and the next comparison. Unit: seconds of CPU time, whatever else the machine does.
PAGE_CHANGE = 0.1


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The bytes of a store with all comparisons."""
    path = tmp_path_factory.mktemp("full") / "collection.duckdb"
    with closing(open_store(str(path))) as store:
        tasks = [Task(f"t{i}", f"Question {i}", "", f"What is {i} + {i}?") for i in range(COMPARISONS)]
        store.add_tasks(tasks)
        store.add_comparisons(Comparison(f"c{i}", f"t{i}", (an_answer(2 * i), an_answer(3 * i))) for i in range(COMPARISONS))
    return path.read_bytes()


def an_answer(number: int) -> Answer:
    """An answer with some markdown."""
    return Answer(new_id(), "tiny", "What is the sum?", {}, f"It is **{number}**.\n\n```python\nprint({number})\n```")


class Labeler(threading.Thread):
    """Judges what they are shown until told to stop. acknowledged: (judgment, comparison); seconds: of each request."""

    def __init__(self, url: str, name: str, pause: float):
        super().__init__(name=name)
        self.url, self.pause = url, pause
        self.ready, self.stop = threading.Event(), threading.Event()
        self.acknowledged: list[tuple[str, str]] = []
        self.seconds: list[float] = []
        self.unanswered: dict | None = None

    def run(self) -> None:
        """Sign in and judge."""
        with httpx.Client(base_url=self.url, headers={"Origin": self.url}, timeout=60) as client:
            shown = sign_in(client, self.name)
            self.ready.set()
            self.stop.wait(random.uniform(0, self.pause))
            while not self.stop.is_set():
                self.unanswered = judgment_of(shown)
                begun = time.perf_counter()
                try:
                    answer = client.post("/api/judge", json=self.unanswered)
                except httpx.HTTPError:
                    return
                self.seconds.append(time.perf_counter() - begun)
                assert answer.status_code == 200 and answer.json()["saved"], answer.text
                self.acknowledged.append((self.unanswered["id"], self.unanswered["comparison"]))
                shown, self.unanswered = answer.json()["next"]["html"], None
                self.stop.wait(self.pause)


def sign_in(client: httpx.Client, name: str) -> str:
    """Sign in; returns the page with the first comparison."""
    assert client.post("/sign-in", data={"name": name}).status_code == 303
    page = client.get("/label", follow_redirects=True)
    assert page.status_code == 200
    return page.text


def judgment_of(html: str) -> dict:
    """A pick of the answer on the left."""
    comparison = re.search(r'data-comparison="([^"]+)"', html)[1]
    order = [int(index) for index in re.search(r'data-order="([\d,]+)"', html)[1].split(",")]
    ranks = [1 if index == order[0] else 2 for index in range(len(order))]
    return {"id": new_id(), "comparison": comparison, "choice": "ranked", "order": order, "ranks": ranks, "seconds": 1.5}


def work(url: str, pause: float) -> list[Labeler]:
    """Labelers at work, all signed in."""
    people = [Labeler(url, f"labeler {number}", pause) for number in range(LABELERS)]
    for person in people:
        person.start()
    for person in people:
        assert person.ready.wait(120)
    return people


def finished(people: list[Labeler]) -> list[Labeler]:
    """The labelers, once all have ended."""
    for person in people:
        person.stop.set()
    for person in people:
        person.join(120)
        assert not person.is_alive()
    return people


def stored(folder) -> list:
    """All judgments in the store."""
    with closing(open_store(str(folder / "collection.duckdb"), read_only=True)) as store:
        return [judged.judgment for judged in store.judgments()]


def assert_kept(judgments: list, people: list[Labeler]) -> None:
    """Every acknowledged judgment is kept, and nobody has judged anything twice."""
    ids = {judgment.id: (judgment.labeler, judgment.comparison) for judgment in judgments}
    for person in people:
        for id, comparison in person.acknowledged:
            assert ids[id] == (person.name, comparison)
        assert max(Counter(comparison for _, comparison in person.acknowledged).values(), default=1) == 1


def times(people: list[Labeler]) -> dict:
    """The number of judgments, and how long a labeler waited for the next comparison. Unit: seconds."""
    seconds = [each for person in people for each in person.seconds]
    found = {"median": median(seconds), "95th percentile": quantiles(seconds, n=20)[-1], "longest": max(seconds)}
    return {"judgments": len(seconds), **{name: round(value, 4) for name, value in found.items()}}


def test_fifty_labelers_lose_nothing_and_judge_nothing_twice(full, tmp_path):
    (tmp_path / "collection.duckdb").write_bytes(full)
    with app(tmp_path, "samples=false") as server:
        everyone = []
        for seconds, pause in WORKS:
            people = work(server.url, pause)
            begun = server.cpu_seconds()
            time.sleep(seconds)
            everyone += finished(people)
            found = times(people)
            found["server's CPU time"] = round((server.cpu_seconds() - begun) / found["judgments"], 4)
            print(f"{LABELERS} labelers who read for {pause} s: {json.dumps(found)}")
            assert found["server's CPU time"] < PAGE_CHANGE
    judgments = stored(tmp_path)
    assert len(judgments) == sum(len(person.acknowledged) for person in everyone) > LABELERS
    assert_kept(judgments, everyone)
    # Each comparison needs one judgment, so that no two people get the same.
    assert max(Counter(judgment.comparison for judgment in judgments).values()) == 1


def test_a_server_that_is_killed_loses_no_acknowledged_judgment_and_counts_a_repeated_one_once(full, tmp_path):
    (tmp_path / "collection.duckdb").write_bytes(full)
    with app(tmp_path, "samples=false") as server:
        people = work(server.url, 0.0)
        time.sleep(3)
        server.kill()
        finished(people)
        unanswered = [person for person in people if person.unanswered]
        assert unanswered, "the server was killed while judgments were on their way"
        server.start()
        for person in unanswered:
            with httpx.Client(base_url=server.url, headers={"Origin": server.url}, timeout=60) as client:
                sign_in(client, person.name)
                for _ in range(2):
                    assert client.post("/api/judge", json=person.unanswered).json()["saved"]
            person.acknowledged.append((person.unanswered["id"], person.unanswered["comparison"]))
    judgments = stored(tmp_path)
    assert_kept(judgments, people)
    assert len(judgments) == len({judgment.id for judgment in judgments})
