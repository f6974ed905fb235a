"""Models of a stand-in server that write answers, and a store that they fill."""

from preference_collection.generation.batches import Patience
from preference_collection.generation.filling import fill, plan_of
from preference_collection.generation.sources import model_named
from preference_collection.settings import load_settings
from preference_collection.tests.conftest import a_task
from preference_collection.tests.ollama_stand_in import Silence

QUICK = Patience(attempts=3, pause=0.001)


def code(body: str) -> str:
    return f"```python\ndef add(a, b):\n    {body}\n```"


def seed_of(request: dict) -> int:
    return request["options"]["seed"]


REPLIES = {
    "varied": lambda request: [code(f"return a + b  # {seed_of(request)}")],
    "other": lambda request: [code(f"return b + a  # {seed_of(request)}")],
    "same": lambda _: [code("return a + b")],
    "prose": lambda request: [f"I would add them, {seed_of(request)}."],
    "named": lambda request: [f"```python\ndef plus(a, b):\n    return a + b  # {seed_of(request)}\n```"],
    "silent": lambda _: [Silence()],
}


def settings_for(server, *overrides: str):
    return load_settings([f"ollama_host={server.url}", *overrides])


def filled(store, server, *models: str, count: int | None = None, n: int = 100, workers: int = 3) -> str:
    settings = settings_for(server)
    plan = plan_of(settings, [model_named(f"ollama:{model}", settings) for model in models], count)
    return fill(store, plan, n, workers, QUICK)


def with_tasks(store, *ids: str, **changed) -> None:
    store.add_tasks(a_task(id, **changed) for id in ids)
