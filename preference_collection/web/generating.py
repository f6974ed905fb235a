"""Asking a model for answers on the page: replies stream in, and become a comparison once all can be used."""

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from preference_collection.generation.asking import Sampling, instruction_for
from preference_collection.generation.sources import PULL
from preference_collection.generation.writing import Writing, as_comparison, write_again, write_answers
from preference_collection.store.model import Task
from preference_collection.web.labeling import view_of
from preference_collection.web.shared import Shared, html, labeler_of, missing, shared_of
from preference_training.core.errors import UserError

# How much of a reply on its way is shown. Unit: characters.
TAIL = 20_000
LONGEST_INSTRUCTION = 10_000


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
    model = chosen.get("model") if chosen.get("source") == name else next(iter(models), "")
    values = {"fault": fault, "command": command, "temperature": chosen.get("temperature", shared.settings.temperature)}
    form = html(
        "generate.html", task=task, instruction=_instruction(shared, labeler, task), sources=names, source=name, models=models,
        model=model, **values,
    )  # fmt: skip
    return JSONResponse({"html": form})


def _instruction(shared: Shared, labeler: str, task: Task) -> str:
    """The instruction that a labeler last used for such tasks, or that of the settings where it is for this one."""
    known = shared.instructions.get((labeler, task.kind))
    if known is not None:
        return known
    given = shared.settings.instruction
    return given if instruction_for(task, given) else ""


def generate(request: Request, data: dict) -> dict:
    """POST /api/generate: ask a model for answers; settings.answers says how many."""
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
    instruction = str(data.get("instruction") or "")[:LONGEST_INSTRUCTION]
    shared.chosen[labeler] = {"source": source, "model": model, "temperature": temperature}
    shared.instructions[labeler, task.kind] = instruction
    if (labeler, task.id) not in shared.writings:
        sampling = Sampling(temperature, shared.settings.max_tokens, instruction)
        count = shared.settings.answers
        shared.writings[labeler, task.id] = write_answers(shared.sources[source], model, task, sampling, count)
    return _state(shared, labeler, task)


def writing(request: Request) -> Response:
    """GET /api/writing/{task}: the replies so far, or the comparison that they became."""
    shared = shared_of(request)
    return JSONResponse(_state(shared, labeler_of(request), _task(shared, request.path_params["task"])))


def steer(request: Request, data: dict) -> dict:
    """POST /api/writing/{task}/{action}: stop the replies, ask again for one, keep all as they are, or discard them."""
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
    task = shared.task(id)
    if task is None:
        raise missing("task")
    return task


def _parted(message: str) -> tuple[str, str]:
    """A message, and the command that it proposes, or ""."""
    text, _, command = message.partition(PULL)
    return (text + PULL.rstrip() if command else message), command


def _state(shared: Shared, labeler: str, task: Task, keep: bool = False) -> dict:
    """The replies for the page; a comparison if all can be used, or are to be kept."""
    writings = shared.writings.get((labeler, task.id))
    if writings is None:
        return {"closed": True}
    over = all(each.over for each in writings)
    faults = [each.fault(task) for each in writings]
    if over and (not any(faults) or (keep and all(each.text for each in writings))):
        return _kept(shared, labeler, task, writings)
    replies = [_reply(shared, number, each, fault) for number, (each, fault) in enumerate(zip(writings, faults, strict=True))]
    return {"html": html("writing.html", replies=replies, over=over, keepable=all(each.text for each in writings))}


def _kept(shared: Shared, labeler: str, task: Task, writings: list[Writing]) -> dict:
    """Add the comparison of the replies to the store, once, and show it."""
    if shared.writings.pop((labeler, task.id), None) is None:
        return {"closed": True}
    comparison = as_comparison(task, writings)
    shared.store.add_comparisons([comparison])
    shared.queue.added([comparison.id])
    return {"next": view_of(shared, labeler, comparison), "said": "The answers are kept."}


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
