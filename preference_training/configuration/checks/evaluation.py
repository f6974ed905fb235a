"""Who judges responses and which tasks a model does, as far as it can be checked before a run."""

import os
import re
from pathlib import Path

from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import EvaluationConfig
from preference_training.core.errors import UserError, nearest

# Who may judge, and whether a name follows.
JUDGES = {"toy": False, "reward_model": True, "openai": True, "ollama": True}
# A user's function as a judge, FILE.py:NAME.
RULE = re.compile(r"\.py:\w+$")
KEY_VARIABLE = "OPENAI_API_KEY"
# Installs what HTTP judges and task suites need.
EVALUATION_REQUIREMENTS = "pip install -r requirements/evaluation.txt"


def check_evaluation(evaluation: EvaluationConfig, config: RunConfig) -> None:
    """Raise UserError for a judge, a directory or tasks that cannot be."""
    _check_judge(evaluation)
    for name, path in {"against": evaluation.against, "task_path": evaluation.task_path, "to": evaluation.to}.items():
        directory = Path(path or ".").absolute()
        if path not in (None, "reference") and not (directory.parent if name == "to" else directory).is_dir():
            raise UserError(f"evaluation.{name}: {path}: no such directory. Paths are relative to {Path.cwd()}.")
    if evaluation.against != "reference" and evaluation.judge is None:
        raise UserError(
            f"evaluation.against: found {evaluation.against}, and no judge compares responses. Set evaluation.judge too."
        )
    if evaluation.tasks and config.trainer.is_sharded:
        raise UserError(f"evaluation.tasks: {config.trainer.name} has a part of the model only. Set trainer=BasicTrainer.")
    for name, found in {"judge": evaluation.judge, "tasks": evaluation.tasks}.items():
        if found and not config.eval_only:
            raise UserError(f"evaluation.{name}: found {found!r}, and the run would train. Set eval_only=true too.")


def _check_judge(evaluation: EvaluationConfig) -> None:
    if evaluation.judge is None:
        return
    if RULE.search(evaluation.judge):
        file = evaluation.judge.rpartition(":")[0]
        if not Path(file).is_file():
            raise UserError(
                f"evaluation.judge: {file}: no such file. Expected FILE.py:NAME; paths are relative to {Path.cwd()}."
            )
        return
    kind, _, name = evaluation.judge.partition(":")
    if kind.endswith(".py"):
        raise UserError(f"evaluation.judge: found {evaluation.judge!r}, expected FILE.py:NAME, with the name of a function.")
    if kind not in JUDGES:
        raise UserError(
            f"evaluation.judge: no judge {evaluation.judge!r}; {nearest(kind, JUDGES)} A rule of your own is FILE.py:NAME."
        )
    if bool(name) != JUDGES[kind]:
        raise UserError(f"evaluation.judge: found {evaluation.judge!r}, expected {kind}{':NAME' * JUDGES[kind]}.")
    url = evaluation.judge_url
    if url is not None and not re.match("https?://[^/]", url):
        raise UserError(f"evaluation.judge_url: found {url!r}, expected http://... or https://..., or null.")
    if kind == "openai" and url is None and not os.environ.get(KEY_VARIABLE):
        raise UserError(f"evaluation.judge: openai needs a key in the environment, {KEY_VARIABLE}, or evaluation.judge_url.")
