"""A loop of rounds from its beginning to its end: what it learns, what it keeps, and how it goes on."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preference_training.core.errors import UserError
from preference_training.core.metric_names import HELD_OUT_REWARD, PAIRS
from preference_training.core.signals import StoppedError
from preference_training.data.entries import load_records, read_entry
from preference_training.rounds import judging, sampling
from preference_training.rounds.__main__ import arguments, main
from preference_training.rounds.loop import Loop
from preference_training.rounds.summary import loop_metrics, read_summary, track
from preference_training.rounds.tables import read_table
from preference_training.rounds.training import training_values
from preference_training.tracking.dashboards.base import Dashboard
from preference_training.tracking.dashboards.starting import DASHBOARDS
from tests.rounds import loops

FAST = (
    "loss=dpo", "lr=1e-2", "n_epochs=3", "batch_size=16", "rounds.pairs=all", "rounds.n_samples=6", "loss.beta=0.05",
    "rounds.n_held_out_samples=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def done(first, tmp_path_factory):
    """A loop of two rounds that was not disturbed."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(first, folder, dirs_exist_ok=True, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sampling, "PROMPTS_PER_PART", 4)
        loop = loops.start(folder, *FAST)
        loops.run(loop)
    return loop


def weights(loop: Loop, number: int) -> dict:
    return load_file(loop.round(number).policy / "model.safetensors")


def content(path: Path) -> dict[str, bytes]:
    """The tables and summaries of a loop."""
    files = [*path.glob("*/*.parquet"), *path.glob("*/summary.json"), *path.glob("*/excluded.json")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


# ---- what it does ------------------------------------------------------------------------------------------------------------


def test_what_the_judge_prefers_becomes_more_frequent(done):
    [before, between, after] = [read_summary(files)["held_out"] for files in done.rounds()]
    assert before["score"]["mean"] < between["score"]["mean"] < after["score"]["mean"]
    assert after["score"]["low"] > before["score"]["high"]
    assert after["win_rate"]["low"] > 0.5 and before["win_rate"] is None
    # The model before the first round is itself.
    assert before["kl"]["mean"] == 0 and after["kl"]["mean"] > 0


def test_the_metrics_of_all_policies_are_in_one_file_by_what_they_were_trained_on(done):
    rows = [json.loads(line) for line in (done.directory / "metrics.jsonl").read_text().splitlines()]
    scores = [read_summary(files)["held_out"]["score"]["mean"] for files in done.rounds()]
    assert [row["rounds/reward_held_out"] for row in rows] == scores
    assert [row["counters/round"] for row in rows] == [0, 1, 2]
    # A checkpoint is named by the examples of its own training.
    one, other = (int(done.round(number).policy.resolve().name.removeprefix("step-")) for number in (1, 2))
    assert [row["counters/examples"] for row in rows] == [0, one, one + other]


def test_nothing_is_judged_twice_and_every_response_once(done):
    asked = Counter(loops.asked(done.directory.parent))
    assert set(asked.values()) == {1}
    rows = [row for files in done.rounds() for path in (files.samples, files.held_out_samples) if path.is_file()
            for row in read_table(path)]  # fmt: skip
    prompts = {prompt.prompt_id: prompt.prompt for prompt in done.prompts}
    assert {repr((prompts[row["prompt_id"]], row["text"])) for row in rows} == set(asked)


def test_held_out_prompts_are_in_no_pairs(done):
    held_out = {prompt.prompt for prompt in done.held_out}
    assert len(held_out) == 4
    for number in (1, 2):
        assert held_out.isdisjoint(row["prompt"] for row in read_table(done.round(number).pairs))


def test_pairs_are_read_as_any_file_of_a_user_and_no_column_is_left_unread(done):
    entry = read_entry({"path": str(done.round(1).pairs), "held_out_share": 0})
    rows = read_table(done.round(1).pairs)
    records = list(load_records(entry, "train"))
    assert [record.prompt for record in records] == [row["prompt"] for row in rows]
    for record, row in zip(records, rows, strict=True):
        assert (record.responses, record.scores) == (row["responses"], row["scores"])
        assert [list(pair) for pair in record.pairs] == row["pairs"] and record.sft_target == row["sft_target"]


def test_the_log_probs_of_samples_are_those_of_the_model_computed_by_transformers_alone(done):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = done.round(1).policy
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts = {prompt.prompt_id: tokenizer(prompt.prompt).input_ids for prompt in done.prompts}
    for table, column in ((done.round(2).samples, "logp"), (done.round(2).held_out_samples, "logp")):
        for row in read_table(table)[:3]:
            ids = torch.tensor([prompts[row["prompt_id"]] + row["token_ids"]])
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)
            start = len(prompts[row["prompt_id"]])
            expected = sum(logps[0, start - 1 + k, token].item() for k, token in enumerate(row["token_ids"]))
            assert row[column] == pytest.approx(expected, abs=1e-3)


def test_samples_are_trained_on_with_the_token_ids_that_were_sampled_from(done):
    """The prompt that a round trains on is, token by token, the one that the policy was asked with."""
    prompt = done.prompts[0]
    policy = sampling.Policy.of(done.config, done.prompts)
    assert policy.format.name == "hh"
    assert policy.prompt_ids(prompt) == policy.tokenizer("\n\nHuman: Question 0?\n\nAssistant:").input_ids


# ---- how it goes on ----------------------------------------------------------------------------------------------------------


def test_a_loop_that_is_interrupted_everywhere_ends_with_the_same_files_and_weights(done, folder, monkeypatch):
    """Stopped at each part of sampling, within judging, and before each step: it goes on, and nothing is judged twice."""
    # As of the other, since the last bits of log-probs depend on what is computed together.
    monkeypatch.setattr(sampling, "PROMPTS_PER_PART", 4)
    written, save, added = [], sampling.write_table, []

    def write_table(path, rows, schema):
        save(path, rows, schema)
        written.append(path)
        if len(written) % 2:
            raise StoppedError("between two parts")

    monkeypatch.setattr(sampling, "write_table", write_table)
    add = judging.Verdicts.add

    def add_and_stop(self, *given):
        add(self, *given)
        added.append(given)
        if len(added) % 2:
            raise StoppedError("between two verdicts")

    monkeypatch.setattr(judging.Verdicts, "add", add_and_stop)
    monkeypatch.setattr(judging.Judge, "at_once", 16)
    loop, stops = loops.start(folder, *FAST), 0
    while True:
        try:
            loops.run(loop)
            break
        except StoppedError:
            stops += 1
    assert stops > 10
    assert content(loop.directory) == content(done.directory)
    # Whoever is killed between an answer and its line in the file asks again; here no stop falls between.
    assert set(Counter(loops.asked(folder)).values()) == {1}
    for number in (1, 2):
        one, other = weights(loop, number), weights(done, number)
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_more_rounds_continue_a_loop_that_is_over(done, folder, monkeypatch):
    shutil.copytree(done.directory, folder / "loop", symlinks=True)
    before = content(folder / "loop")
    loop = Loop.open(folder / "loop")
    assert loop.round(3).directory.name == "final" and loop.round(3).next_step is None
    monkeypatch.chdir(done.directory.parent)
    loop = loops.start(done.directory.parent, *FAST, "rounds.rounds=3", f"local_run_dir={folder / 'loop'}")
    assert (loop.round(3).directory.name, loop.round(3).next_step) == ("round-3", "sample")
    after = content(folder / "loop")
    # What was of the last policy is not of the new last one.
    assert after == {name: found for name, found in before.items() if not name.startswith("final/")}
    assert loop.round(4).next_step == "sample"


def test_a_loop_is_not_continued_with_another_configuration(folder):
    loops.start(folder, *FAST)
    with pytest.raises(UserError, match=r"another configuration: loss\.beta: was 0\.05, is 0\.1"):
        loops.start(folder, *FAST, "loss.beta=0.1")
    with pytest.raises(UserError, match=r"rounds\.judge: was '.*my_judge\.py:score', is '.*my_judge\.py:other'"):
        loops.start(folder, *FAST, "rounds.judge=my_judge.py:other")


def test_where_nothing_can_be_paired_the_loop_stops_with_the_reason(folder):
    (folder / "my_judge.py").write_text("def score(prompt, response):\n    return 1\n")
    loop = loops.start(folder, *FAST)
    reasons = "180 pairs of responses with equal scores; 12 prompts whose responses all have the same score"
    with pytest.raises(UserError, match=rf"all makes nothing to train on of the 72 responses of round-1: {reasons}"):
        loops.run(loop)
    assert not loop.round(1).pairs.exists()


def test_replay_takes_the_share_that_was_asked_for(folder, done):
    shutil.copytree(done.directory, folder / "loop", symlinks=True)
    loop = Loop.open(folder / "loop")
    loop = Loop(loop.directory, loop.config.changed({"rounds.replay_share": 0.25}), loop.values)
    [now, earlier] = training_values(loop, 2)["datasets"]
    counts = [len(read_table(loop.round(number).pairs)) for number in (1, 2)]
    assert earlier["weight"] * counts[0] == pytest.approx(0.25 * (counts[1] + earlier["weight"] * counts[0]), abs=1e-3)
    assert now == {"path": str(loop.round(2).pairs)}


@pytest.mark.long
def test_the_first_model_as_reference_is_the_one_that_the_loop_began_with(folder):
    loop = loops.start(folder, *FAST, "rounds.reference=first")
    loops.run(loop)
    trained = json.dumps(loop.round(2).training.read_text())
    assert f"model.reference_archive: {folder / 'first' / 'LATEST'}" in trained
    rows = [json.loads(line) for line in (loop.round(2).run / "metrics.jsonl").read_text().splitlines()]
    # Policy and reference are two models: at step 0 the loss is not ln 2.
    assert rows[0]["rewards_eval/margins"] != 0


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_sampled(folder):
    rows = [{"prompt": "Short?"}, {"prompt": "\n\nHuman: " + "Long? " * 200 + "\n\nAssistant:"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = loops.start(folder, *FAST)
    with pytest.raises(UserError, match=r"rounds\.prompts: prompt 1 has .* tokens, and max_length leaves no room"):
        loops.run(loop)
    assert not list(loop.directory.glob("round-1/*"))


def by_hand(*words: object) -> None:
    main(arguments([str(word) for word in words]))


def test_steps_by_hand_are_those_of_the_loop(folder, done, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "PROMPTS_PER_PART", 4)
    directory = loops.start(folder, *FAST).directory
    with pytest.raises(UserError, match=r"judge: round-1 is not done with the step sample\. Run it first: python -m .* sample"):
        by_hand("judge", directory)
    with pytest.raises(UserError, match=r"--round: found 4, expected 1 to 2 \(3: the last policy's held-out responses\)"):
        by_hand("sample", directory, "--round", 4)
    with pytest.raises(UserError, match="round 1 of .* is not trained yet"):
        by_hand("sample", directory, "--round", 2)
    for step in ("sample", "judge", "pair", "summarize"):
        by_hand(step, directory)
    capsys.readouterr()
    by_hand("status", directory)
    [first, *others] = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "round-1: done: sample, judge, pair, summarize; next: train; the model before the first round, on 4"
    )
    assert others == ["round-2: not begun", "final: not begun"]
    of_first = {name: data for name, data in content(done.directory).items() if name.startswith("round-1/")}
    assert content(directory) == of_first


def test_what_could_not_be_judged_can_be_asked_again(folder, capsys):
    (folder / "my_judge.py").write_text(loops.JUDGE.replace("return ", "return None if not Path('open').exists() else "))
    directory = loops.start(folder, *FAST).directory
    by_hand("sample", directory)
    by_hand("judge", directory)
    before = len(loops.asked(folder))
    assert {row["score"] for row in read_table(directory / "round-1" / "scores.parquet")} == {None}
    (folder / "open").touch()
    by_hand("judge", directory, "--round", 1)
    assert len(loops.asked(folder)) == before
    by_hand("judge", directory, "--round", 1, "--again")
    assert len(loops.asked(folder)) == 2 * before
    assert None not in {row["score"] for row in read_table(directory / "round-1" / "scores.parquet")}


def test_what_was_made_of_the_scores_is_made_again_when_the_judge_is_asked_again(folder, capsys):
    """At first the judge knows some of the responses."""
    some = "return None if len(response) % 2 and not Path('open').exists() else "
    (folder / "my_judge.py").write_text(loops.JUDGE.replace("return ", some))
    files = loops.start(folder, *FAST).round(1)
    for step in ("sample", "judge", "pair", "summarize"):
        by_hand(step, files.directory.parent)

    def made() -> tuple:
        [row] = (json.loads(line) for line in (files.directory.parent / "metrics.jsonl").read_text().splitlines())
        page = (files.directory.parent / "report.html").read_text()
        return read_summary(files)["held_out"]["unjudged"], row[PAIRS], row[HELD_OUT_REWARD], page

    before = made()
    (folder / "open").touch()
    by_hand("judge", files.directory.parent, "--round", 1, "--again")
    after = made()
    assert before[0] > 0 == after[0] and before[1] < after[1]
    assert before[2] != after[2] and before[3] != after[3]
    assert "training has had" not in capsys.readouterr().out
    files.run.mkdir()
    kept = files.pairs.read_bytes()
    by_hand("judge", files.directory.parent, "--round", 1, "--again")
    assert "round-1: its training has had the pairs of the scores before" in capsys.readouterr().out
    assert files.pairs.read_bytes() == kept


def test_options_that_a_step_does_not_read_are_refused(folder):
    directory = loops.start(folder, *FAST).directory
    with pytest.raises(UserError, match="--again: sample does not read it"):
        by_hand("sample", directory, "--again")
    with pytest.raises(UserError, match="--round: status is of the whole loop"):
        by_hand("status", directory, "--round", 1)
    with pytest.raises(UserError, match="--round: found 0, expected 1 to 2"):
        by_hand("sample", directory, "--round", 0)


def test_dashboards_get_each_row_of_the_loop_once_and_again_only_where_it_has_changed(folder, done, monkeypatch):
    """As a run of the loop's own, which is continued when the loop is."""
    shutil.copytree(done.directory, folder / "loop", symlinks=True)
    given: list = []

    class Noting(Dashboard):
        def __init__(self, start):
            given.append((start.config["exp_name"], start.run_dir.name, start.examples))
            ids.add(start.run_id)

        def log(self, row):
            given.append(row["counters/round"])

        def log_page(self, path):
            given.append(path.name)

    ids: set = set()
    monkeypatch.setitem(DASHBOARDS, "wandb", Noting)
    loop = Loop.open(folder / "loop")
    loop = Loop(loop.directory, loop.config.changed({"wandb.enabled": True, "tracking": ["jsonl", "wandb"]}), loop.values)
    (loop.directory / "report.html").touch()
    [one, other] = (row["counters/examples"] for row in loop_metrics(list(loop.rounds()))[1:])
    # The loop after its first round.
    summary = loop.round(2).summary.rename(folder / "kept")
    loop.round(3).summary.rename(folder / "final")
    track(loop)
    summary.rename(loop.round(2).summary)
    track(loop)
    track(loop)
    (folder / "final").rename(loop.round(3).summary)
    loops.run(loop)
    name = loop.config.exp_name
    assert given == [(name, "loop", 0), 0, (name, "loop", 0), 1, (name, "loop", one), 2, "report.html"] and len(ids) == 1
    given.clear()
    text = loop.round(2).summary.read_text()
    loop.round(2).summary.write_text(text.replace('"score": {\n   "mean": ', '"score": {\n   "mean": 1'))
    track(loop)
    assert given == [(name, "loop", 0), 1, 2, "report.html"] and other > one
