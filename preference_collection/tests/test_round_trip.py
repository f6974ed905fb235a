"""What training reads of an export is what was judged, of programming problems and of any other text."""

import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import closing
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import preference_datasets  # noqa: F401  registers lc
from preference_collection.exchange.export import UNUSABLE, counts_line, entry_of, export_dataset, export_records
from preference_collection.exchange.importing import add_samples, import_into, text_answer
from preference_collection.store.model import Comparison, Judgment, Task, new_id, ranks_of_scores, shown_order
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task
from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.hub_sets import load_hub
from preference_training.data.records.record import Turn
from preference_training.data.records.report import DataReport
from tests.support.files import ROOT

CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.text(CHARACTERS, min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    [" b", "b\n", '{"a": 1}', "[1, 2]", "<b>", "\x1b[31m", "\n\nHuman: x\n\nAssistant:", "null", "a\u2028b", "é"]
)
TURNS = st.lists(TEXT, min_size=1, max_size=3).map(
    lambda texts: [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
)
ROWS = st.lists(
    st.fixed_dictionaries({"prompt": TEXT | TURNS, "responses": st.lists(TEXT, min_size=2, max_size=5, unique=True)}),
    min_size=1, max_size=4,
)  # fmt: skip


@st.composite
def judgments(draw, comparison: Comparison) -> list[Judgment]:
    """What up to three labelers say of a comparison, of whom one may settle it."""
    said = []
    for labeler in draw(st.lists(st.sampled_from(["ada", "bob", "eve"]), max_size=3, unique=True)):
        n = len(comparison.answers)
        ranks = ranks_of_scores(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
        choice = draw(st.sampled_from(["ranked", "ranked", "tie", "bad", "skip"])) if max(ranks) > 1 else "tie"
        edited = draw(st.sampled_from(["", " "]) | TEXT)
        order = shown_order(labeler, comparison.id, n)
        ranks = ranks if choice == "ranked" else ()
        said.append(Judgment(new_id(), comparison.id, labeler, choice, order, ranks, edited=edited))
    if said and said[-1].choice != "skip" and draw(st.booleans()):
        last = said[-1]
        said[-1] = Judgment(last.id, last.comparison, last.labeler, last.choice, last.order, last.ranks,
                            edited=last.edited, settles=True)  # fmt: skip
    return said


def what_counts(said: list[Judgment]) -> list[Judgment]:
    return [judgment for judgment in said if judgment.settles] or said


def read(path, **more) -> dict:
    """Prompt -> (pairs of texts, targets, labels of texts), as `datasets=FILE` reads them."""
    entry = read_entry({"path": str(path), "held_out_share": 0, **more})
    found = {}
    for record in load_records(entry, "train"):
        pairs, targets, labels = found.setdefault(record.prompt, (Counter(), Counter(), {}))
        pairs.update((record.responses[i], record.responses[j]) for i, j in record.pairs)
        labels |= dict(zip(record.responses, record.labels or [None] * len(record.responses), strict=True))
        targets.update(target for target in record.targets if labels[target] is not False)
    return found


@settings(max_examples=10, deadline=None)
@given(ROWS, st.data(), st.sampled_from(["picks.jsonl", "picks.parquet", "picks"]))
def test_training_reads_exactly_what_was_judged(tmp_path_factory, rows, data, name):
    check_round_trip(tmp_path_factory, rows, data, name)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(ROWS, st.data(), st.sampled_from(["picks.jsonl", "picks.parquet", "picks"]))
def test_training_reads_exactly_what_was_judged_of_many(tmp_path_factory, rows, data, name):
    check_round_trip(tmp_path_factory, rows, data, name)


def check_round_trip(tmp_path_factory, rows, data, name):
    """Import, judge, export, and compare what training reads with the judgments."""
    directory = tmp_path_factory.mktemp("round")
    source = directory / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected: dict = {}
    with closing(open_store(":memory:")) as store:
        import_into(store, source)
        for comparison in store.comparisons():
            said = data.draw(judgments(comparison))
            for judgment in said:
                store.judge(judgment)
            texts = [answer.text for answer in comparison.answers]
            counted = what_counts(said)
            for judgment in said:
                trained = judgment in counted and judgment.choice in ("ranked", "bad")
                if not trained and not judgment.edited.strip():
                    continue
                pairs, targets = expected.setdefault(store.task(comparison.task).prompt, (Counter(), Counter()))
                if trained and judgment.choice == "ranked":
                    better = {(i, j) for i, j in permutations(range(len(texts)), 2) if judgment.ranks[i] < judgment.ranks[j]}
                    pairs.update((texts[i], texts[j]) for i, j in better)
                    targets[judgment.edited if judgment.edited.strip() else texts[judgment.ranks.index(1)]] += 1
                elif judgment.edited.strip():
                    targets[judgment.edited] += 1
        if not expected:
            return
        counts = (export_records if "." in name else export_dataset)(store, directory / name)
    assert counts[UNUSABLE] == 0
    found = read(f"{directory}/{name}")
    assert {prompt: pairs for prompt, (pairs, *_) in found.items()} == {
        prompt: pairs for prompt, (pairs, _) in expected.items()
    }
    for prompt, (_, targets, labels) in found.items():
        # An answer that another labeler found bad is not learned, even if one wrote it.
        assert targets == Counter({text: n for text, n in expected[prompt][1].items() if labels[text] is not False})


def a_text(id: str = "t", prompt="What is best?", texts=("one", "two", "three")) -> tuple[Task, Comparison]:
    """A task of text, and a comparison of answers to it."""
    task = Task(id, id, "", prompt)
    return task, Comparison(f"c{id}", id, tuple(text_answer(task, text) for text in texts))


def exported(store, tmp_path, *said, **task) -> dict:
    """What training reads of judgments of one comparison: a record's fields."""
    task, comparison = a_text(**task)
    store.add_tasks([task])
    store.add_comparisons([comparison])
    for number, each in enumerate(said):
        store.judge(each if isinstance(each, Judgment) else a_judgment(comparison, each, f"labeler {number}"))
    export_records(store, tmp_path / "picks.jsonl")
    return read(tmp_path / "picks.jsonl")


def test_a_ranking_is_the_pairs_of_all_ordered_ranks(store, tmp_path):
    found = exported(store, tmp_path, (2, 1, 2))["What is best?"]
    assert found == (Counter({("two", "one"): 1, ("two", "three"): 1}), Counter(["two"]),
                     {"one": False, "two": True, "three": False})  # fmt: skip


def test_answers_that_are_all_bad_are_undesirable_and_have_no_pair(store, tmp_path):
    found = exported(store, tmp_path, "bad")["What is best?"]
    assert found == (Counter(), Counter(), {"one": False, "two": False, "three": False})


def test_an_edited_answer_is_what_sft_learns(store, tmp_path):
    _, comparison = a_text()
    found = exported(store, tmp_path, a_judgment(comparison, 0, edited="one, better", edited_from=0))["What is best?"]
    assert found[1] == Counter(["one, better"])


def test_a_settled_disagreement_is_what_was_settled(store, tmp_path):
    _, comparison = a_text(texts=("one", "two"))
    found = exported(store, tmp_path, 0, 1, a_judgment(comparison, 1, "chief", settles=True), texts=("one", "two"))
    assert found["What is best?"][0] == Counter({("two", "one"): 1})
    rows = [json.loads(line) for line in (tmp_path / "picks.overruled.jsonl").read_text().splitlines()]
    assert [row["labeller"] for row in rows] == ["labeller 1", "labeller 2"]


TALK = '[{"role": "user", "content": "hi"}]'


@pytest.mark.parametrize("name", ["picks.jsonl", "picks.parquet"])
def test_texts_that_look_like_conversations_stay_texts(store, tmp_path, name):
    task, comparison = a_text(prompt=TALK, texts=(TALK, '{"from": "human", "value": "x"}'))
    store.add_tasks([task])
    store.add_comparisons([comparison])
    store.judge(a_judgment(comparison, 1))
    export_records(store, tmp_path / name)
    [(prompt, (pairs, *_))] = read(tmp_path / name).items()
    assert prompt == (Turn("user", TALK),)
    assert pairs == Counter({('{"from": "human", "value": "x"}', TALK): 1})


@pytest.mark.parametrize("name", ["picks.jsonl", "picks.parquet"])
def test_turns_and_tools_come_back_as_they_were(store, tmp_path, name):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}]}
    chosen = [call, {"role": "tool", "content": "seen"}, {"role": "assistant", "content": "Done."}]
    row = {"prompt": [{"role": "user", "content": "Look."}], "chosen": chosen, "tools": [{"name": "look"}]}
    row |= {"rejected": [{"role": "assistant", "content": "No."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    import_into(store, tmp_path / "rows.jsonl")
    export_records(store, tmp_path / name)
    entries = (read_entry({"path": str(tmp_path / each), "held_out_share": 0}) for each in ("rows.jsonl", name))
    before, after = (next(iter(load_records(entry, "train"))) for entry in entries)
    assert (before.prompt, before.tools) == (after.prompt, after.tools)
    two = [[(each.responses[i], each.responses[j]) for i, j in each.pairs] for each in (before, after)]
    assert two[0] == two[1] and before.sft_target == after.sft_target


def test_ranks_are_given_only_where_they_are_all_that_was_said_of_a_prompt(store, tmp_path):
    task, comparison = a_text()
    _, other = a_text(texts=("four", "five"))
    store.add_tasks([task])
    store.add_comparisons([comparison, Comparison("other", "t", other.answers)])
    store.judge(a_judgment(comparison, (1, 3, 2)))
    export_records(store, tmp_path / "picks.jsonl")
    assert json.loads((tmp_path / "picks.jsonl").read_text())["ranks"] == [1, 3, 2]
    store.judge(Judgment(new_id(), "other", "ada", "ranked", (0, 1), (1, 2)))
    export_records(store, tmp_path / "picks.jsonl")
    assert {json.loads(line)["ranks"] for line in (tmp_path / "picks.jsonl").read_text().splitlines()} == {None}


def test_both_kinds_together_are_records_and_code_alone_has_the_columns_of_lc(store, tmp_path):
    code = a_comparison("sum", ("def add(a, b):\n    return a + b", "no", "def add():\n    return 3"))
    store.add_tasks([a_task()])
    store.add_comparisons([code])
    store.judge(a_judgment(code, (1, 2, 2)))
    counts = export_dataset(store, tmp_path / "out")
    assert +counts == {"preferences": 2, "ties": 1}
    assert read(tmp_path / "out")["Add two numbers (sum)."][0] == Counter(
        {("def add(a, b):\n    return a + b", text): 1 for text in ("no", "def add():\n    return 3")}
    )
    task, text = a_text()
    store.add_tasks([task])
    store.add_comparisons([text])
    store.judge(a_judgment(text, "bad"))
    assert +export_dataset(store, tmp_path / "out") == {"preferences": 1, "bad": 1}
    assert entry_of(tmp_path / "out") == f"'{tmp_path / 'out'}/'"
    assert read(tmp_path / "out").keys() == {"Add two numbers (sum).", "What is best?"}
    load_hub.cache_clear()
    with pytest.raises(UserError, match=r"Records are read by their path: datasets=\['.*/out/'\]"):
        list(load_records(read_entry({"name": "lc", "data_dir": str(tmp_path / "out")}), "train"))
    assert "1 judgment finds all answers bad" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("choice", ["tie", "skip", "bad", 0])
@pytest.mark.parametrize("name", ["picks.jsonl", "picks.parquet", "picks"])
def test_an_edited_answer_is_a_target_whatever_the_choice(store, tmp_path, choice, name):
    task, comparison = a_text(texts=("one", "two"))
    store.add_tasks([task])
    store.add_comparisons([comparison])
    store.judge(a_judgment(comparison, choice, edited="better"))
    counts = (export_records if "." in name else export_dataset)(store, tmp_path / name)
    assert counts_line(counts).endswith("1 better answer written by a labeler")
    [(pairs, targets, _)] = read(tmp_path / name).values()
    assert (pairs, targets) == (Counter([("one", "two")] * (choice == 0)), Counter(["better"]))


def test_an_edited_answer_is_a_target_where_another_judgment_settled_the_comparison(store, tmp_path):
    _, comparison = a_text(texts=("one", "two"))
    said = a_judgment(comparison, 0, "ada", edited="better"), a_judgment(comparison, 0, "chief", settles=True)
    found = exported(store, tmp_path, *said, texts=("one", "two"))["What is best?"]
    assert found[:2] == (Counter({("one", "two"): 1}), Counter(["one", "better"]))


def test_an_edited_answer_is_a_target_where_the_others_are_empty(store, tmp_path):
    _, comparison = a_text(texts=("one", " "))
    found = exported(store, tmp_path, a_judgment(comparison, "skip", edited="better"), texts=("one", " "))["What is best?"]
    assert found[:2] == (Counter(), Counter(["better"]))


def test_an_edited_answer_comes_back_from_an_export(store, tmp_path):
    _, comparison = a_text()
    exported(store, tmp_path, a_judgment(comparison, "skip", edited="better"))
    with closing(open_store(":memory:")) as other:
        import_into(other, tmp_path / "picks.jsonl")
        assert [judged.judgment.edited for judged in other.judgments()] == ["better"]


def test_problems_with_edited_answers_are_exported_as_records(store, tmp_path):
    code = a_comparison()
    store.add_tasks([a_task()])
    store.add_comparisons([code])
    store.judge(a_judgment(code, 0, edited="def add(a, b):\n    return a + b"))
    counts = export_dataset(store, tmp_path / "out")
    assert counts_line(counts) == "1 preference, 0 ties, 0 skips, 1 better answer written by a labeler"
    [(_, targets, _)] = read(tmp_path / "out").values()
    assert targets == Counter(["def add(a, b):\n    return a + b"])


@pytest.mark.parametrize("name", ["picks.jsonl", "picks"])
def test_opposite_judgments_are_said_and_left_out_on_request(store, tmp_path, name):
    (task, disputed), (other, agreed) = a_text(texts=("one", "two")), a_text("u", "Else?", ("three", "four"))
    store.add_tasks([task, other])
    store.add_comparisons([disputed, agreed])
    for said in ((disputed, 0, "ada"), (disputed, 1, "bob"), (agreed, 0, "ada"), (agreed, 0, "bob")):
        store.judge(a_judgment(*said))
    export = export_records if "." in name else export_dataset
    line = counts_line(export(store, tmp_path / name))
    assert line.startswith("4 preferences, 0 ties, 0 skips. 1 comparison has opposite judgments that nobody settled")
    assert read(tmp_path / name)["What is best?"][0] == Counter({("one", "two"): 1, ("two", "one"): 1})
    line = counts_line(export(store, tmp_path / name, agreed=True))
    assert line == "2 preferences, 0 ties, 0 skips, 2 judgments left out, since labelers disagree"
    assert read(tmp_path / name).keys() == {"Else?"}
    store.judge(a_judgment(disputed, 1, "chief", settles=True))
    line = counts_line(export(store, tmp_path / name))
    assert line == "3 preferences, 0 ties, 0 skips, 2 overruled by a settlement"


def test_an_unusable_ranking_is_counted_and_not_written(store, tmp_path):
    _, comparison = a_text(texts=("one", " "))
    found = exported(store, tmp_path, 0)
    store.add_tasks([Task("u", "u", "", "Else?")])
    store.add_comparisons([Comparison("cu", "u", comparison.answers)])
    store.judge(Judgment(new_id(), "cu", "ada", "ranked", (0, 1), (1, 2)))
    assert export_records(store, tmp_path / "picks.jsonl")[UNUSABLE] == 1
    assert read(tmp_path / "picks.jsonl").keys() == found.keys() == {"What is best?"}


@pytest.mark.parametrize("name", ["picks.jsonl", "picks", "code"])
def test_training_knows_the_columns_of_an_export(store, tmp_path, name):
    task, comparison = (a_task(), a_comparison()) if name == "code" else a_text()
    store.add_tasks([task])
    store.add_comparisons([comparison])
    store.judge(a_judgment(comparison, 0, seconds=1.5, reasons=("clearer",), comment="so"))
    (export_records if "." in name else export_dataset)(store, tmp_path / name)
    report = DataReport()
    assert list(load_records(read_entry({"path": str(tmp_path / name), "held_out_share": 0}), "train", report))
    assert report.columns_not_read == {}


@pytest.mark.parametrize("name", ["picks.jsonl", "picks/"])
@pytest.mark.parametrize("is_code", [False, True])
def test_an_export_adds_no_judgment_to_the_store_that_it_is_of(store, tmp_path, name, is_code):
    row = {"description": "Say 1.", "version1": "one", "version2": "two"} if is_code else {
        "prompt": "What?", "answer_a": "one", "answer_b": "two"}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    import_into(store, tmp_path / "rows.jsonl")
    [comparison] = store.comparisons()
    store.judge(a_judgment(comparison, 0))
    (export_records if "." in name else export_dataset)(store, tmp_path / name)
    import_into(store, f"{tmp_path}/{name}")
    assert store.progress().judgments == 1
    with closing(open_store(":memory:")) as other:
        import_into(other, f"{tmp_path}/{name}")
        assert other.progress().judgments == 1


# ---- with real processes ----------------------------------------------------------------------------------------------------


def trained(directory, *line: str) -> list[str]:
    """Train the embedded model for two steps; returns the lines of the run."""
    command = [sys.executable, "train.py", "model=tiny", "n_steps=2", "batch_size=2", "eval_batch_size=2", "n_eval_examples=2"]
    command += ["sample_during_eval=false", f"local_run_dir='{directory}'", f"local_dirs=['{directory}']", *line]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def judged_samples(path):
    """A store of the samples, whose answers are ranked by their length, and two solutions to each problem."""
    with closing(open_store(str(path))) as store:
        add_samples(store)
        for number, comparison in enumerate(store.comparisons()):
            said = ranks_of_scores([len(answer.text) for answer in comparison.answers])
            store.judge(a_judgment(comparison, "bad" if number == 0 else said))
        for task in store.tasks_without_comparison():
            pair = a_comparison(task.id, (f"def {task.function_name}(*args):\n    return 1", "pass"), prompt=task.prompt)
            store.add_comparisons([pair])
            store.judge(a_judgment(pair, 0))
    return path


def run(*line: str) -> str:
    command = [sys.executable, "-m", "preference_collection", *line]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_judged_samples_of_both_kinds_train_the_tiny_model(tmp_path):
    store = judged_samples(tmp_path / "samples.duckdb")
    picks = tmp_path / "picks.jsonl"
    said = run("export", str(picks), f"store={store}").strip()
    assert said == f"{picks}: 23 preferences, 1 with all answers bad, 0 ties, 0 skips"
    sft = trained(tmp_path / "sft", "loss=sft", f"datasets=['{picks}']")
    assert any("records of `responses`, `pairs` and `sft_target`" in line for line in sft)
    trained(tmp_path / "dpo", "loss=dpo", f"datasets=['{picks}']", f"model.archive='{tmp_path / 'sft' / 'LATEST'}'")
    asked = run("score", "--ledger", str(tmp_path / "dpo"), f"store={store}")
    known, unknown = map(int, re.search(r": (\d+) of 24 comparisons are among the pairs of .*, (\d+) are not;", asked).groups())
    assert known + unknown == 24 and known > 0
    for loss in ("kto", "plackett_luce"):
        trained(tmp_path / loss, f"loss={loss}", f"datasets=['{picks}']")
