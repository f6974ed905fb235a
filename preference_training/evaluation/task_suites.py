"""Tasks of lm-evaluation-harness on the policy, through its own interface, and the suites that others publish numbers of.

A suite is a list of (task, examples shown before the question); None leaves that to the task.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from torch import nn

from preference_training.configuration.validation import EVALUATION_REQUIREMENTS
from preference_training.core.errors import UserError, first_line, nearest

SUITES: dict[str, list[tuple[str, int | None]]] = {
    # The first Open LLM Leaderboard, as its "About" page says: arc acc_norm, hellaswag acc_norm, mmlu acc, truthfulqa_mc2 acc,
    # winogrande acc, gsm8k exact_match. The same as the harness's own group `openllm`, but for truthfulqa's other tasks.
    "open_llm": [
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("gsm8k", 5),
    ],
    # What Nous Research reports of its models (the repository teknium1/LLM-Benchmark-Logs): GPT4All, AGIEval, TruthfulQA and
    # BigBench, all without examples. The harness has the three sizes of logical_deduction and tracking_shuffled_objects in one
    # task each.
    "nous": [
        *((task, 0) for task in ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")),
        ("agieval_nous", 0),
        ("truthfulqa_mc1", 0),
        ("truthfulqa_mc2", 0),
        *(
            (f"bigbench_{name}_multiple_choice", 0)
            for name in (
                "causal_judgment", "date_understanding", "disambiguation_qa", "geometric_shapes", "logical_deduction",
                "movie_recommendation", "navigate", "reasoning_about_colored_objects", "ruin_names",
                "salient_translation_error_detection", "snarks", "sports_understanding", "temporal_sequences",
                "tracking_shuffled_objects",
            )
        ),
    ],
}  # fmt: skip


def check_harness() -> None:
    """Raise UserError where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(f"evaluation.tasks: lm-evaluation-harness is not installed. Run: {EVALUATION_REQUIREMENTS}")


@cache
def task_manager(task_path: str | None, with_own: bool):
    """The harness's index of the tasks of a folder, and of its own ones."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_path, include_defaults=with_own)


class TaskList:
    """The tasks that names stand for, found before any model is loaded. task_path is a folder of task files, or None.

    Raises UserError for a name that is neither a suite's nor a task's.
    """

    def __init__(self, names: Sequence[str], task_path: str | None):
        check_harness()
        self.tasks = [task for name in names for task in SUITES.get(name, [(name, None)])]
        # The harness's own thousands of files are read only if need be.
        self.manager = task_manager(task_path, with_own=False)
        if not {task for task, _ in self.tasks} <= set(self.manager.all_tasks):
            self.manager = task_manager(task_path, with_own=True)
        known = set(self.manager.all_tasks)
        for task, _ in self.tasks:
            if task not in known:
                near = nearest(task, known | SUITES.keys())
                # Thousands of names are no help.
                hint = near if near.startswith("did you") else f"expected a task of the harness, or {' or '.join(SUITES)}."
                raise UserError(f"evaluation.tasks: no task {task!r}; {hint}")

    def results(self, model: nn.Module, tokenizer, limit: int | None, batch_size: int) -> dict[str, dict[str, float | None]]:
        """Task → metric → value, standard errors among them; null where there is none. Tasks of groups have rows of their own.

        limit: examples of each task, None for all. Raises UserError where a task's data cannot be had.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        training = model.training
        try:
            harness = HFLM(pretrained=model.eval(), tokenizer=tokenizer, backend="causal", batch_size=batch_size)
            found: dict[str, dict[str, float | None]] = {}
            for task, shots in self.tasks:
                options = {"task_manager": self.manager, "num_fewshot": shots, "limit": limit, "log_samples": False}
                try:
                    rows = simple_evaluate(harness, tasks=[task], **options)["results"]
                except OSError as error:
                    # What the data sets library raises, also without a network.
                    raise UserError(
                        f"evaluation.tasks: the data of {task} cannot be had: {first_line(error)}. Expected a network, or the "
                        "data in the hub library's cache."
                    ) from error
                found |= {name: numbers_of(row) for name, row in rows.items()}
            return found
        finally:
            model.train(training)


def numbers_of(row: dict) -> dict[str, float | None]:
    """The metrics of a task's row, named as the harness does without its filter "none"; null for what is no number."""
    metrics = {name.removesuffix(",none"): value for name, value in row.items() if "," in name}
    return {name: float(value) if isinstance(value, int | float) else None for name, value in metrics.items()}
