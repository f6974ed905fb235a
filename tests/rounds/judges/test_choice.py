"""What `rounds.judge` may say: kinds with their arguments and options, lists of them, and what is refused."""

import pytest

from preference_training.configuration.rerun import rerun_values
from preference_training.core.errors import UserError
from preference_training.rounds.judges.choice import KINDS, build_judge, build_second_judge, check_judge
from tests.support.files import ROOT


@pytest.fixture
def config_of(compose, tmp_path):
    """The configuration of a loop with these overrides."""

    def config_of(*more: str):
        return compose("+rounds=default", "rounds.prompts=x.jsonl", f"local_run_dir={tmp_path}", *more)

    return config_of


@pytest.mark.parametrize(("judge", "name", "kind"), [
    ("toy", "toy", "ToyJudge"), ("tests", "tests", "TestsJudge"), ("person", "person", "PeopleJudge"),
    ("'regex:^\\d+'", "regex:^\\d+", "RulesJudge"), ("'length:words<=5'", "length:words<=5", "RulesJudge"),
    ("{judge:rules,rules:['words<=5','matches a,b']}", "rules", "RulesJudge"),
    ("[toy,{judge:person,weight:2}]", "toy + person", "EnsembleJudge"),
])  # fmt: skip
def test_a_judge_is_a_name_a_mapping_or_a_list(judge, name, kind, config_of):
    config = config_of(f"rounds.judge={judge}")
    check_judge(config)
    found = build_judge(config)
    assert (found.name, type(found).__name__) == (name, kind)
    assert build_second_judge(config) is None
    assert build_second_judge(config_of("rounds.judge=toy", f"rounds.second_judge={judge}")).name == name


@pytest.mark.parametrize(("judge", "words"), [
    ("test", "no judge 'test'; did you mean tests"), ("tests:x", "found 'tests:x', expected tests"),
    ("openai", "expected openai:MODEL"), ("'regex:'", "expected regex:PATTERN"), ("rules", "judging.rules: found none"),
    ("'length:5'", "expected UNIT<=N"), ("'regex:('", "is no regular expression"),
    ("{judge:toy,weight:2}", "toy does not read weight. A judge that is not in a list has no weight"),
    ("{judge:tests,rubric:x}", "tests does not read rubric. It has: tests_column"),
    ("{judge:toy,rubrik:x}", "no option 'rubrik'; did you mean rubric"),
    ("[{judge:toy,weight:-1}]", r"rounds.judge: toy: weight: found -1, expected a number above 0"),
    ("{kind:toy}", "expected a judge, a mapping as"), ("[]", r"found \[\], expected a judge"),
    ("3", "found 3, expected a judge"),
    ("[toy,[toy]]", r"found \['toy'\], expected"),
])  # fmt: skip
def test_what_is_no_judge_is_refused_with_what_is_one(judge, words, config_of):
    with pytest.raises(UserError, match=words):
        check_judge(config_of(f"rounds.judge={judge}"))


def test_options_of_a_list_are_each_ones_own_and_otherwise_those_of_judging(config_of):
    config = config_of(
        "rounds.judging.tests_seconds=7", "rounds.judge=[{judge:tests,weight:3},{judge:tests,tests_seconds:2,normalize:none}]"
    )
    first, second = build_judge(config).members
    assert (first.weight, first.is_normalized, first.judge.limits.cpu_seconds) == (3, True, 7)
    assert (second.weight, second.is_normalized, second.judge.limits.cpu_seconds) == (1, False, 2)


def test_a_loop_finds_the_files_of_its_judge_wherever_it_is_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rubric.txt", "mine.py"):
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "model").mkdir()
    found = rerun_values([
        "rounds.judge=[mine.py:score,{judge:openai:m,rubric:rubric.txt},'reward_model:model','regex:rubric.txt']",
        "rounds.second_judge=reward_model:some/name", "rounds.judging.rubric=rubric.txt",
    ])  # fmt: skip
    assert found == {
        "rounds.judge": [
            f"{tmp_path}/mine.py:score", {"judge": "openai:m", "rubric": f"{tmp_path}/rubric.txt"},
            f"reward_model:{tmp_path}/model", "regex:rubric.txt",
        ],
        "rounds.second_judge": "reward_model:some/name", "rounds.judging.rubric": f"{tmp_path}/rubric.txt",
    }  # fmt: skip


def test_the_comment_of_the_key_names_every_kind():
    comment = (ROOT / "config" / "rounds" / "default.yaml").read_text().split("judge: ???")[0].split("# Who scores")[1]
    assert [name for name in KINDS if f"#   {name}" not in comment and f" {name}:" not in comment] == []
