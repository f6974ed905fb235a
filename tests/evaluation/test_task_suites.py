"""Tasks of lm-evaluation-harness from a folder, without a network; and the names in the suites."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from preference_training.core.errors import UserError
from preference_training.evaluation import task_suites
from preference_training.evaluation.task_suites import SUITES, TaskList, check_harness
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.support.files import GOLDEN, write

QUESTIONS = [("The opposite of hot is", "cold", "hot"), ("Two and two are", "four", "five"), ("A cat is an", "animal", "idea")]

TASK = """
task: opposites
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def own_task(tmp_path: Path) -> Path:
    """A folder with one task, `opposites`, of three questions."""
    rows = [dict(zip(("question", "right", "wrong"), row, strict=True)) for row in QUESTIONS]
    data = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "opposites.yaml").write_text(TASK.format(data=data))
    return tmp_path / "tasks"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one task of three questions."""
    return own_task(tmp_path)


@pytest.fixture(scope="module")
def model():
    """A golden model."""
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_policy", dtype=torch.float32)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_task_counts_the_questions_whose_correct_answer_is_more_likely(sharing, folder, model, tokenizer):
    def logp(question: str, answer: str) -> float:
        start, ids = len(tokenizer(question).input_ids), tokenizer(f"{question} {answer}", return_tensors="pt").input_ids
        logps = model(ids).logits[0].log_softmax(-1)
        return sum(logps[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))

    with torch.no_grad():
        right = [logp(question, one) > logp(question, other) for question, one, other in QUESTIONS]
    tried = copy.deepcopy(model)
    if sharing:
        assert share_prefixes(tried, "on")
    found = TaskList(["opposites"], str(folder)).results(tried.train(), tokenizer, None, 2)
    assert found["opposites"]["acc"] == pytest.approx(sum(right) / 3)
    assert found["opposites"].keys() >= {"acc", "acc_norm", "acc_stderr"}
    assert tried.training
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_limit_is_a_number_of_examples(folder, model, tokenizer):
    found = TaskList(["opposites"], str(folder)).results(model, tokenizer, 1, 2)
    assert found["opposites"]["acc"] in (0.0, 1.0)


def test_unavailable_data_is_one_message(folder, model, tokenizer):
    text = (folder / "opposites.yaml").read_text()
    (folder / "opposites.yaml").write_text(text.replace("rows.jsonl", "elsewhere.jsonl"))
    with pytest.raises(UserError, match="evaluation.tasks: cannot load the data of opposites: "):
        TaskList(["opposites"], str(folder)).results(model, tokenizer, None, 2)


def test_every_task_of_the_suites_exists_and_unknown_names_are_refused():
    tasks = TaskList(list(SUITES), None)
    assert [task for task, _ in tasks.tasks] == [task for suite in SUITES.values() for task, _ in suite]
    assert ("gsm8k", 5) in tasks.tasks and ("agieval_nous", 0) in tasks.tasks
    with pytest.raises(UserError, match="evaluation.tasks: no task 'gsm8kk'; did you mean gsm8k"):
        TaskList(["open_llm", "gsm8kk"], None)
    with pytest.raises(UserError, match="no task '%%%%%%%%'; expected a task of the harness, or open_llm or nous"):
        TaskList(["%%%%%%%%"], None)


def test_without_the_harness_the_message_has_its_pip_command(monkeypatch):
    monkeypatch.setattr(task_suites, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"not installed. Run: pip install -r requirements/evaluation.txt"):
        check_harness()
