"""Tasks of lm-evaluation-harness, and the suites for which others publish results.

A suite is a list of (task, few-shot examples); None is the default of the task.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from torch import nn

from preference_training.configuration.checks.evaluation import EVALUATION_REQUIREMENTS
from preference_training.core.errors import UserError, first_line, nearest

SUITES: dict[str, list[tuple[str, int | None]]] = {
    # The first Open LLM Leaderboard, as its "About" page says: arc acc_norm, hellaswag acc_norm, mmlu acc, truthfulqa_mc2 acc,
    # winogrande acc, gsm8k exact_match. Equal to the harness's group `openllm`, except for the other truthfulqa tasks.
    "open_llm": [
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("gsm8k", 5),
    ],
    # What Nous Research reports for its models (the repository teknium1/LLM-Benchmark-Logs): GPT4All, AGIEval, TruthfulQA and
    # BigBench, all zero-shot. The harness combines the three sizes of logical_deduction and of tracking_shuffled_objects.
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
def task_manager(task_path: str | None, include_defaults: bool):
    """The harness's index of the tasks of a folder, optionally with its built-in tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_path, include_defaults=include_defaults)


class TaskList:
    """The tasks of some suites and task names, resolved before any model is loaded. task_path: a folder of task files, or None.

    Raises UserError for an unknown name.
    """

    def __init__(self, names: Sequence[str], task_path: str | None):
        check_harness()
        self.tasks = [task for name in names for task in SUITES.get(name, [(name, None)])]
        # Index the thousands of built-in task files only if needed.
        self.manager = task_manager(task_path, include_defaults=False)
        if not {task for task, _ in self.tasks} <= set(self.manager.all_tasks):
            self.manager = task_manager(task_path, include_defaults=True)
        known = set(self.manager.all_tasks)
        for task, _ in self.tasks:
            if task not in known:
                near = nearest(task, known | SUITES.keys())
                # Do not list thousands of names.
                hint = near if near.startswith("did you") else f"expected a task of the harness, or {' or '.join(SUITES)}."
                raise UserError(f"evaluation.tasks: no task {task!r}; {hint}")

    def results(self, model: nn.Module, tokenizer, limit: int | None, batch_size: int) -> dict[str, dict[str, float | None]]:
        """Task → metric → value, including standard errors; None for what is not a number. Groups also list their tasks.

        limit: examples of each task, None for all. Raises UserError where a task's data cannot be loaded.
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
                    # The datasets library raises these, also without a network.
                    raise UserError(
                        f"evaluation.tasks: cannot load the data of {task}: {first_line(error)}. Expected a network "
                        "connection, or the data in the hub's cache."
                    ) from error
                found |= {name: _numeric_metrics(row) for name, row in rows.items()}
            return found
        finally:
            model.train(training)


def _numeric_metrics(row: dict) -> dict[str, float | None]:
    """The metrics in a task's row, without the suffix of the filter "none"; None for what is not a number."""
    metrics = {name.removesuffix(",none"): value for name, value in row.items() if "," in name}
    return {name: float(value) if isinstance(value, int | float) else None for name, value in metrics.items()}
