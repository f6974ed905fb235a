"""A reward model as a judge: its rewards, its name as a run or a folder, and prompts that are conversations."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.rounds.judges.base import JudgedInput
from preference_training.rounds.judges.choice import build_judge, check_judge

TEMPLATE = "{% for m in messages %}{{ m.role[:1] + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.fixture
def config_of(compose, tmp_path):
    """The configuration of a loop with this reward model."""

    def config_of(name):
        judge = f"rounds.judge='reward_model:{name}'"
        return compose("+rounds=default", "rounds.prompts=x.jsonl", judge, f"local_run_dir={tmp_path}")

    return config_of


def reward(model, tokenizer, text: str) -> float:
    with torch.no_grad():
        classifier = AutoModelForSequenceClassification.from_pretrained(model)
        return classifier(**tokenizer(text, return_tensors="pt")).logits.item()


def test_scores_are_the_rewards_that_transformers_computes(reward_model, config_of, tokenizer):
    samples = [JudgedInput("Why?", text, {}) for text in (" Rain.", " Snow, snow.")]
    found = [score.value for score in build_judge(config_of(reward_model)).judge(samples)]
    assert found == pytest.approx([reward(reward_model, tokenizer, f"Why?{sample.response}") for sample in samples], abs=1e-5)


def test_a_conversation_is_read_by_the_models_chat_template_or_as_a_dialogue(reward_model, config_of, tokenizer):
    judge = build_judge(config_of(reward_model))
    sample = JudgedInput((Turn("system", "Be kind."), Turn("user", "Why?")), "Rain.", {})
    [score] = judge.judge([sample])
    assert score.value == pytest.approx(
        reward(reward_model, tokenizer, "Be kind.\n\nHuman: Why?\n\nAssistant: Rain."), abs=1e-5
    )
    judge = build_judge(config_of(reward_model))
    judge.model.tokenizer.chat_template = TEMPLATE
    [score] = judge.judge([sample])
    assert score.value == pytest.approx(reward(reward_model, tokenizer, "s: Be kind.\nu: Why?\na: Rain.\n"), abs=1e-5)


def test_a_run_is_its_newest_checkpoint_and_other_weights_are_another_judge(reward_model, config_of, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "LATEST").symlink_to(reward_model)
    check_judge(config_of(run))
    judge = build_judge(config_of(run))
    assert judge.identity == build_judge(config_of(reward_model)).identity
    other = AutoModelForSequenceClassification.from_pretrained(reward_model)
    with torch.no_grad():
        other.score.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    judge.model.tokenizer.save_pretrained(tmp_path / "other")
    assert build_judge(config_of(tmp_path / "other")).identity != judge.identity


@pytest.mark.parametrize(("name", "words"), [("./nowhere", "no such folder"), ("empty", "is a folder without a model")])
def test_a_name_of_no_model_is_refused_before_anything_is_loaded(name, words, config_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        check_judge(config_of(name))
