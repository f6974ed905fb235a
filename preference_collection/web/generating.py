"""Asking a model for answers on the page: both replies stream in, and become a comparison once both can be used."""

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from preference_collection.generation.replies import extract_code
from preference_collection.generation.sources import PULL, Writing, as_pair, write_again, write_pair
from preference_collection.store.model import Task
from preference_collection.web.labeling import view_of
from preference_collection.web.shared import Shared, html, labeler_of, missing, shared_of
from preference_training.core.errors import UserError

# How much of a reply on its way is shown. Unit: characters.
TAIL = 20_000


@dataclass(frozen=True)
class Reply:
    """A reply on its way as shown: a line about its state, a command that may help, what makes it useless, its text."""

    number: int
    line: str
    command: str
    failed: bool
    fault: str | None
    text: str
    over: bool


def panel(request: Request) -> Response:
    """GET /api/generate/{task}: the form that asks a model, or the replies that are on their way."""
    shared, labeler = shared_of(request), labeler_of(request)
    task = _task(shared, request.path_params["task"])
    if (labeler, task.id) in shared.writings:
        return JSONResponse(_state(shared, labeler, task))
    chosen = shared.chosen.get(labeler, {})
    names = list(shared.sources)
    name = request.query_params.get("source") or chosen.get("source")
    name = name if name in names else names[0]
    models, fault, command = [], "", ""
    try:
        models = shared.sources[name].models()
    except UserError as error:
        fault, command = _parted(str(error))
    if not models and not fault and name == "Ollama":
        fault, command = "No model is installed. Download one:", "ollama pull qwen2.5-coder:1.5b"
    form = html(
        "generate.html", sources=names, source=name, models=models, fault=fault, command=command,
        model=chosen.get("model") if chosen.get("source") == name else (models[0] if models else ""),
        temperature=chosen.get("temperature", shared.settings.temperature),
    )  # fmt: skip
    return JSONResponse({"html": form})


def generate(request: Request, data: dict) -> dict:
    """POST /api/generate: ask a model for two answers."""
    shared, labeler = shared_of(request), labeler_of(request)
    task = _task(shared, str(data.get("task")))
    source, model, temperature = data.get("source"), str(data.get("model") or "").strip(), data.get("temperature")
    if source not in shared.sources or isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise ValueError("source or temperature is none")
    if not 0 <= temperature <= 10:
        raise UserError(f"Temperature: found {temperature}, expected a number from 0 to 10.")
    if not model:
        raise UserError("Name a model.")
    if shared.store.read_only:
        raise UserError("The store is open read-only.")
    shared.chosen[labeler] = {"source": source, "model": model, "temperature": temperature}
    if (labeler, task.id) not in shared.writings:
        writings = write_pair(shared.sources[source], model, task, temperature, shared.settings.max_tokens)
        shared.writings[labeler, task.id] = list(writings)
    return _state(shared, labeler, task)


def writing(request: Request) -> Response:
    """GET /api/writing/{task}: the replies so far, or the comparison that they became."""
    shared = shared_of(request)
    return JSONResponse(_state(shared, labeler_of(request), _task(shared, request.path_params["task"])))


def steer(request: Request, data: dict) -> dict:
    """POST /api/writing/{task}/{action}: stop both replies, ask again for one, keep both as they are, or discard them."""
    shared, labeler = shared_of(request), labeler_of(request)
    task = _task(shared, request.path_params["task"])
    writings = shared.writings.get((labeler, task.id), [])
    action = request.path_params["action"]
    if action == "again" and writings:
        number = data.get("number")
        if number not in range(len(writings)) or not writings[number].over:
            raise ValueError("number names no finished reply")
        writings[number] = write_again(writings[number])
    elif action in ("stop", "discard"):
        for each in writings:
            each.cancel()
    if action == "discard":
        shared.writings.pop((labeler, task.id), None)
        return {"closed": True}
    return _state(shared, labeler, task, keep=action == "keep")


def _task(shared: Shared, id: str) -> Task:
    task = shared.store.task(id)
    if task is None:
        raise missing("task")
    return task


def _parted(message: str) -> tuple[str, str]:
    """A message, and the command that it proposes, or ""."""
    text, _, command = message.partition(PULL)
    return (text + PULL.rstrip() if command else message), command


def _state(shared: Shared, labeler: str, task: Task, keep: bool = False) -> dict:
    """The replies for the page; a comparison if both can be used, or are to be kept."""
    writings = shared.writings.get((labeler, task.id))
    if writings is None:
        return {"closed": True}
    over = all(each.over for each in writings)
    faults = [_fault(each, task) for each in writings]
    if over and (not any(faults) or (keep and all(each.text for each in writings))):
        return _kept(shared, labeler, task, writings)
    replies = [_reply(shared, number, each, fault) for number, (each, fault) in enumerate(zip(writings, faults, strict=True))]
    return {"html": html("writing.html", replies=replies, over=over, keepable=all(each.text for each in writings))}


def _kept(shared: Shared, labeler: str, task: Task, writings: list[Writing]) -> dict:
    """Add the comparison of the replies to the store, once, and show it."""
    if shared.writings.pop((labeler, task.id), None) is None:
        return {"closed": True}
    comparison = as_pair(task, tuple(writings))
    shared.store.add_comparisons([comparison])
    shared.queue.added([comparison.id])
    return {"next": view_of(shared, labeler, comparison), "said": "Both answers are kept."}


def _fault(writing: Writing, task: Task) -> str | None:
    """Why a finished reply cannot be used, as the end of a sentence, or None."""
    if not writing.over:
        return None
    if writing.state != "done":
        return "was stopped" if writing.state == "stopped" else "failed"
    if task.kind == "code":
        return extract_code(writing.text, task.function_name).fault
    return None if writing.text.strip() else "is empty"


def _reply(shared: Shared, number: int, writing: Writing, fault: str | None) -> Reply:
    quiet, command, failed = writing.quiet_seconds(), "", writing.state == "failed"
    line = f"{writing.request.model}: {writing.state}, {len(writing.text):,} characters, seed {writing.request.seed}"
    if failed:
        line, command = _parted(writing.message)
    elif fault:
        line = f"The reply {fault}."
    elif quiet > shared.settings.slow_seconds:
        line = f"No output for {quiet:.0f} s. The model may still be loading; stop to give up."
    return Reply(number, line, command, failed, fault, writing.text[-TAIL:], writing.over)
