"""The part of the store that keeps tasks, answers and comparisons."""

import json
from collections.abc import Iterable, Iterator

from preference_collection.store.database import Database, as_json, chunks, insert, prompt_of_json
from preference_collection.store.model import LEAST_ANSWERS, MOST_ANSWERS, Answer, Comparison, Task
from preference_collection.store.schema import now

INSERT_TASKS = """INSERT INTO tasks SELECT unnest(?::BIGINT[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::TIMESTAMP[])"""
INSERT_ANSWERS = """INSERT INTO answers SELECT unnest(?::BIGINT[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::TIMESTAMP[])"""
INSERT_COMPARISONS = """INSERT INTO comparisons SELECT unnest(?::BIGINT[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    CAST(unnest(?::VARCHAR[]) AS JSON)::VARCHAR[], unnest(?::TIMESTAMP[])"""

TASKS = """SELECT id, title, difficulty, prompt, function_name, tests, kind FROM tasks
    WHERE id IN (SELECT unnest($ids::VARCHAR[]))"""
TASKS_WITHOUT_COMPARISON = """SELECT id, title, difficulty, prompt, function_name, tests, kind FROM tasks
    WHERE id NOT IN (SELECT task FROM comparisons) ORDER BY number LIMIT $limit"""
ANSWERS = """SELECT id, model, prompt, parameters, text, code FROM answers WHERE id IN (SELECT unnest($ids::VARCHAR[]))"""
ANSWERS_OF = "SELECT id, model, prompt, parameters, text, code FROM answers WHERE task = $task ORDER BY number"
KNOWN_TASKS = "SELECT id FROM tasks"
KNOWN_ANSWERS = "SELECT id FROM answers WHERE id IN (SELECT unnest(?::VARCHAR[]))"
KNOWN_COMPARISONS = "SELECT id FROM comparisons WHERE id IN (SELECT unnest(?::VARCHAR[]))"
COMPARISON_IDS = "SELECT id FROM comparisons ORDER BY number"
COMPARISONS = "SELECT id, task, answers FROM comparisons WHERE id IN (SELECT unnest($ids::VARCHAR[]))"
COMPARISONS_OF = "SELECT id FROM comparisons WHERE task = $task ORDER BY number DESC"

# More than any store has.
ALL = 2**62


class Tasks(Database):
    """Tasks with the answers to them, and comparisons of these."""

    def task(self, task: str) -> Task | None:
        """The task with an id."""
        return self._tasks([task]).get(task)

    def tasks_without_comparison(self, limit: int | None = None) -> list[Task]:
        """The tasks without a comparison in order of their addition, at most `limit`."""
        return [_task(row) for row in self._rows(TASKS_WITHOUT_COMPARISON, {"limit": ALL if limit is None else limit})]

    def _tasks(self, ids: list[str]) -> dict[str, Task]:
        return {row[0]: _task(row) for row in self._rows(TASKS, {"ids": ids})}

    def difficulties(self) -> list[str]:
        """All difficulties in use."""
        return [row[0] for row in self._rows("SELECT DISTINCT difficulty FROM tasks ORDER BY 1")]

    def answers_of(self, task: str) -> list[Answer]:
        """The answers to a task in order of their addition, also those that no comparison has."""
        return [_answer(row) for row in self._rows(ANSWERS_OF, {"task": task})]

    def comparison(self, comparison: str) -> Comparison | None:
        """The comparison with an id."""
        return self._comparisons([comparison]).get(comparison)

    def comparisons_of(self, task: str) -> list[Comparison]:
        """The comparisons of a task, newest first."""
        ids = [id for (id,) in self._rows(COMPARISONS_OF, {"task": task})]
        found = self._comparisons(ids)
        return [found[id] for id in ids]

    def comparisons(self) -> Iterator[Comparison]:
        """All comparisons, oldest first."""
        for ids in chunks(self.comparison_ids()):
            found = self._comparisons(ids)
            yield from (found[id] for id in ids)

    def comparison_ids(self) -> list[str]:
        """The ids of all comparisons, oldest first."""
        return [id for (id,) in self._rows(COMPARISON_IDS)]

    def _comparisons(self, ids: list[str]) -> dict[str, Comparison]:
        rows = self._rows(COMPARISONS, {"ids": ids})
        wanted = list({answer for _, _, answers in rows for answer in answers})
        found = {row[0]: _answer(row) for row in self._rows(ANSWERS, {"ids": wanted})} if wanted else {}
        return {id: Comparison(id, task, tuple(found[answer] for answer in answers)) for id, task, answers in rows}

    # ---- adding ------------------------------------------------------------------------------------------------------------

    def add_tasks(self, tasks: Iterable[Task]) -> tuple[int, int]:
        """Add tasks with new ids; known ones are not changed. Returns the numbers of added and of known tasks."""
        added = known = 0
        with self._writing() as cursor:
            seen = {id for (id,) in cursor.execute(KNOWN_TASKS).fetchall()}
            for some in chunks(tasks):
                new = [task for task in some if not (task.id in seen or seen.add(task.id))]
                rows = [
                    (next(self._numbers), t.id, t.title, t.difficulty, as_json(t.prompt), t.function_name, as_json(t.tests),
                     t.kind, now())
                    for t in new
                ]  # fmt: skip
                insert(cursor, INSERT_TASKS, rows)
                added, known = added + len(new), known + len(some) - len(new)
        return added, known

    def add_answers(self, task: str, answers: Iterable[Answer]) -> None:
        """Add answers to a task, before there are enough of them for a comparison. Known ones are not changed."""
        with self._writing() as cursor:
            for some in chunks(answers):
                self._add_answers(cursor, {answer.id: (answer, task) for answer in some})

    def add_answers_to(self, answers: Iterable[tuple[str, Answer]]) -> int:
        """Add answers to many tasks, all or none: (task, answer). Known ones are not changed. Returns how many are new."""
        with self._writing() as cursor:
            return sum(
                self._add_answers(cursor, {answer.id: (answer, task) for task, answer in some}) for some in chunks(answers)
            )

    def _add_answers(self, cursor, answers: dict[str, tuple[Answer, str]]) -> int:
        known = {id for (id,) in cursor.execute(KNOWN_ANSWERS, [list(answers)]).fetchall()}
        rows = [
            (next(self._numbers), a.id, task, a.model, as_json(a.prompt), as_json(a.parameters), a.text, a.code, now())
            for a, task in answers.values()
            if a.id not in known
        ]
        insert(cursor, INSERT_ANSWERS, rows)
        return len(rows)

    def _add_comparisons(self, cursor, comparisons: list[Comparison]) -> int:
        """Add comparisons with new ids, and their answers; returns how many these are."""
        for comparison in comparisons:
            if not LEAST_ANSWERS <= len({answer.id for answer in comparison.answers}) == len(comparison.answers):
                raise ValueError(f"comparison {comparison.id}: expected two or more answers, each once")
            if len(comparison.answers) > MOST_ANSWERS:
                raise ValueError(f"comparison {comparison.id}: expected at most {MOST_ANSWERS} answers")
        ids = [comparison.id for comparison in comparisons]
        seen = {id for (id,) in cursor.execute(KNOWN_COMPARISONS, [ids]).fetchall()}
        new = [comparison for comparison in comparisons if not (comparison.id in seen or seen.add(comparison.id))]
        self._add_answers(cursor, {answer.id: (answer, c.task) for c in new for answer in c.answers})
        rows = [(next(self._numbers), c.id, c.task, as_json([answer.id for answer in c.answers]), now()) for c in new]
        insert(cursor, INSERT_COMPARISONS, rows)
        return len(new)


def _task(row: tuple) -> Task:
    id, title, difficulty, prompt, function_name, tests, kind = row
    return Task(id, title, difficulty, prompt_of_json(prompt), function_name, tuple(json.loads(tests)), kind)


def _answer(row: tuple) -> Answer:
    id, model, prompt, parameters, text, code = row
    return Answer(id, model, prompt_of_json(prompt), json.loads(parameters), text, code)
