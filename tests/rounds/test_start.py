"""What is refused before a loop begins, and what its command line leads to."""

import json
import shutil

import pytest

from preference_training.configuration.command_line import prepare_arguments
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.rounds.__main__ import arguments, main
from preference_training.rounds.loop import ROUNDS, Loop
from preference_training.rounds.start import check, find_loop, start_loop
from preference_training.rounds.summary import distinct_2, similarity, win_rate
from preference_training.rounds.training import write_training

OF_ROUNDS = ("+rounds=default", "rounds.prompts=prompts.jsonl", "rounds.judge=toy")
LOOP = (*OF_ROUNDS, "model=blank_model", "model.name_or_path=some/model")


@pytest.mark.parametrize(("given", "words"), [
    (("loss=reward",), "loss: reward trains a reward model, which writes no responses"),
    (("loss=dpo", "rounds.pairs=ranking"), "rounds.pairs: found ranking, which loss=dpo cannot train on. Expected best_w"),
    (("loss=sft", "rounds.pairs=all"), "rounds.pairs: found all, which loss=sft cannot train on. Expected best_of_n"),
    (("loss=dpo", "rounds.reference=moving"), "found moving, and the reference of loss=dpo does not move. Set loss=tr_dpo"),
    (("loss=tr_dpo",), "found previous, and the reference of loss=tr_dpo moves. Set rounds.reference=moving"),
    (("loss=simpo", "rounds.reference=first"), "found first, and loss=simpo has no reference"),
    (("loss=dpo", "rounds.n_samples=1"), "rounds.n_samples: found 1, and pairs=best_worst compares responses"),
    (("loss=dpo", "rounds.temperature=0"), "rounds.temperature: found 0, at which all 8 responses"),
    (("loss=dpo", "eval_only=true"), "eval_only: found true"),
    (("loss=dpo", "debug=true"), "debug: found true"),
    (("loss=dpo", "rounds.judge=tyo"), "^rounds.judge: no judge 'tyo'; did you mean toy"),
    (("loss=dpo", "rounds.second_judge=tyo"), "^rounds.second_judge: no judge 'tyo'; did you mean toy"),
])  # fmt: skip
def test_a_loop_that_cannot_work_is_refused(compose, given, words):
    with pytest.raises(UserError, match=words):
        check(compose(*LOOP, *given))


def test_a_model_with_random_weights_is_not_sampled_from_after_the_files_are_checked(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose(*OF_ROUNDS, "model=tiny")
    with pytest.raises(UserError, match="rounds.prompts: .*prompts.jsonl"):
        start_loop(config, tmp_path / "loop")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How are you?"}\n' * 3)
    with pytest.raises(UserError, match="rounds.judge: .*mine.py"):
        start_loop(compose(*OF_ROUNDS, "model=tiny", "rounds.judge=mine.py:score"), tmp_path / "loop")
    with pytest.raises(UserError, match="model: rounds sample from the model, and this one would have random weights"):
        start_loop(config, tmp_path / "loop")


@pytest.mark.parametrize("loss", ["dpo", "kto", "plackett_luce", "sft", "simpo", "orpo"])
def test_every_kind_of_loss_has_a_way_to_pair(compose, loss):
    assert check(compose(*LOOP, f"loss={loss}")) == []


def test_keys_without_effect_are_named(compose):
    assert check(compose(*LOOP, "loss=dpo", "rounds.top_k=3", "rounds.margin=1")) == [
        "rounds.top_k: without effect, since pairs is best_worst"
    ]
    assert check(compose(*LOOP, "loss=kto", "rounds.length_matched=0.1", "rounds.threshold=1")) == [
        "rounds.length_matched: without effect, since pairs is unpaired"
    ]


def test_loops_are_not_pruned(compose):
    with pytest.raises(UserError, match="pruner: found MedianPruner, and loops of rounds have no evaluations in common"):
        check(compose(*LOOP, "loss=dpo", "pruner=MedianPruner"))


def test_an_objective_over_held_out_prompts_needs_some(compose, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    given = ("loss=dpo", f"rounds.prompts={tmp_path / 'prompts.jsonl'}", "rounds.held_out=0")
    config = compose(*LOOP, *given, "objective=rounds/reward_held_out")
    with pytest.raises(UserError, match="objective: rounds/reward_held_out is of held-out prompts, and there are none"):
        start_loop(config, tmp_path)


def test_in_a_sweep_a_loop_beside_is_another_job(compose, tmp_path):
    (tmp_path / "mine_1").mkdir()
    (tmp_path / "mine_1" / "rounds.json").write_text("{}")
    config = compose(*LOOP, "resume=auto", "exp_name=mine")
    assert find_loop(config, tmp_path / "0") == tmp_path / "mine_1"
    assert find_loop(config, tmp_path / "0", in_sweep=True) == tmp_path / "0"


def test_a_key_of_rounds_without_the_group_is_explained(compose):
    with pytest.raises(UserError, match=r"rounds\.judge: these keys come with \+rounds=default"):
        compose("rounds.judge=toy")


def test_a_dry_run_reads_the_prompts_and_writes_nothing(compose, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Question {k}?"} for k in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start_loop(compose(*LOOP, "loss=dpo", "dry_run=true", "rounds.held_out=0"), tmp_path / "loop")
    assert capsys.readouterr().out == "rounds: 3, each of 8 responses to 20 of 20 prompts; 0 held out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_resume_finds_a_loop_and_a_new_one_does_not_begin_on_top_of_another(compose, tmp_path):
    for name in ("mine_1", "mine_2", "other_3"):
        (tmp_path / name).mkdir()
    for name in ("mine_1", "other_3"):
        (tmp_path / name / ROUNDS).write_text("{}")
    new = tmp_path / "mine_4"
    assert find_loop(compose(*LOOP, "exp_name=mine"), new) == new
    assert find_loop(compose(*LOOP, "exp_name=mine", "resume=auto"), new) == tmp_path / "mine_1"
    assert find_loop(compose(*LOOP, "exp_name=none", "resume=auto"), new) == new
    assert find_loop(compose(*LOOP, f"resume={tmp_path / 'other_3'}"), new) == tmp_path / "other_3"
    with pytest.raises(UserError, match=f"holds a loop of rounds. Continue it with resume={tmp_path / 'mine_1'}"):
        find_loop(compose(*LOOP), tmp_path / "mine_1")
    with pytest.raises(UserError, match="holds no loop of rounds"):
        find_loop(compose(*LOOP, f"resume={tmp_path / 'mine_2'}"), new)


def test_presets_of_the_users_own_are_those_of_every_step(tmp_path, monkeypatch):
    """Of a folder that is gone when the loop goes on."""
    monkeypatch.chdir(tmp_path)
    for group, text in {
        "loss": "defaults: [dpo, _self_]\nbeta: 0.03\n",
        "model": "defaults: [pretrained, _self_]\nseed: 3\n",
    }.items():
        (tmp_path / "my" / group).mkdir(parents=True)
        (tmp_path / "my" / group / "mine.yaml").write_text(text if group == "loss" else f"# @package _global_\n{text}")
    given = [text.replace("blank_model", "mine") for text in LOOP]
    Loop.start(tmp_path / "loop", configured("--config-dir=my", *given, "loss=mine", f"local_run_dir={tmp_path / 'loop'}"))
    shutil.rmtree(tmp_path / "my")
    loop = Loop.open(tmp_path / "loop")
    (tmp_path / "loop" / "round-1").mkdir()
    command = write_training(loop, 1)
    shutil.rmtree(tmp_path / "loop" / "loss")
    train = configured(*prepare_arguments(command[2:]))
    for config in (loop.config, train):
        assert (config.loss.name, config.loss.beta, config.seed, config.model.name_or_path) == ("dpo", 0.03, 3, "some/model")


def test_a_step_by_hand_needs_a_loop(tmp_path):
    with pytest.raises(UserError, match=r"no loop of rounds: it has no rounds\.json"):
        main(arguments(["status", str(tmp_path)]))


# ---- numbers of a round ------------------------------------------------------------------------------------------------


def test_a_win_rate_compares_every_response_with_every_other_to_its_prompt_and_ties_count_half():
    rows = [{"prompt_id": 1, "score": 2.0}, {"prompt_id": 1, "score": 0.0}, {"prompt_id": 2, "score": 1.0}]
    others = [{"prompt_id": 1, "score": 1.0}, {"prompt_id": 1, "score": 0.0}, {"prompt_id": 2, "score": None}]
    # 2 wins twice; 0 loses to 1 and ties with 0; prompt 2 has nothing to be compared with.
    assert win_rate(rows, others)["mean"] == (1 + 1 + 0 + 0.5) / 4
    assert win_rate([], others) == {"mean": None, "low": None, "high": None}


def test_diversity_is_of_words():
    # a b, b a, a b: two of three are different.
    assert distinct_2(["a b a", "a b"]) == 2 / 3 and distinct_2(["a", ""]) is None
    # {a, b} and {b, c}: 1 of 3; each with {a, b} again: 1 and 1/3.
    assert similarity(["a b", "b c", "b a"]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert similarity(["", ""]) == 1
