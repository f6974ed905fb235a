"""The store at full size: fifty concurrent labelers, a hundred thousand tasks."""

from collections import Counter
from threading import Thread
from time import perf_counter, process_time

from preference_collection.store.model import Query
from preference_collection.store.queue import Queue
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task
from preference_collection.tests.test_store import judge_at_once

# Server time for a page of the list. Unit: seconds of CPU time, which a busy machine affects little.
PAGE_CHANGE = 0.3


def test_fifty_labelers_write_ten_thousand_judgments_and_none_is_lost_or_duplicated(store):
    judge_at_once(store, labelers=50, each=200)


def test_fifty_labelers_get_two_thousand_of_ten_thousand_comparisons_and_none_twice(store):
    """Some skip and undo now and then. Whatever was judged is kept, once, and by as many people as are wanted."""
    store.add_tasks([a_task()])
    comparisons = {f"c{index}": a_comparison(id=f"c{index}") for index in range(10_000)}
    store.add_comparisons(comparisons.values())
    queue, failures, waits, kept = Queue(store), [], [], []

    def label(name: str) -> None:
        try:
            for number in range(40):
                begun = perf_counter()
                id = queue.next(name)
                waits.append(perf_counter() - begun)
                store.judge(a_judgment(comparisons[id], "skip" if number % 10 == 3 else 0, name))
                queue.judged(name, id)
                if number % 10 == 5:
                    queue.undone(name, store.undo(name))
                else:
                    kept.append((id, name, number % 10 != 3, False))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [Thread(target=label, args=(f"labeler {number}",)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(store.judged_by()) == sorted(kept) and len(kept) == 50 * 36
    assert max(Counter(id for id, _, counts, _ in kept if counts).values()) == 1
    print(f"next: median {sorted(waits)[len(waits) // 2] * 1e3:.2f} ms")


def page_change(store, query: Query, start: int) -> float:
    """CPU time of the server for a page of the list and one task. Unit: seconds."""
    begun = process_time()
    store.browse(query, start)
    store.progress("labeler 1")
    store.agreement()
    store.task("p4711")
    store.comparisons_of("p4710")
    return process_time() - begun


def test_a_hundred_thousand_tasks_are_browsed_without_waiting(store):
    store.add_tasks(a_task(f"p{index}", difficulty=("easy", "medium", "hard")[index % 3]) for index in range(100_000))
    pairs = [a_comparison(f"p{index}") for index in range(0, 100_000, 5)]
    said = [a_judgment(pair, 0, f"labeler {index % 7}") for index, pair in enumerate(pairs[::2])]
    store.add_comparisons(pairs, said)
    store.add_scores("policy", [(pair.id, float(index % 11)) for index, pair in enumerate(pairs)])
    slowest = {}
    for query in (
        Query("labeler 1"),
        Query("labeler 1", only="unlabeled", difficulty="hard"),
        Query("labeler 1", only="disagreement"),
        Query("labeler 1", order="uncertain", search="p99"),
    ):
        for start in (0, 50, 5_000):
            slowest[query] = max(slowest.get(query, 0), min(page_change(store, query, start) for _ in range(3)))
    print(slowest)
    assert max(slowest.values()) < PAGE_CHANGE
