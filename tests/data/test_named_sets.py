"""The named public sets, and the user's own directories, read by the hub's library from local copies in the hub's layout."""

from itertools import combinations
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.records.held_out import prompt_hash
from preference_training.data.records.record import Turn
from preference_training.data.records.report import EMPTY_TEXT, OTHER_PROMPT, SAME_TEXT, DataReport
from preference_training.data.registry import DATASETS
from preference_training.data.rows.grouping import EQUAL_SCORES, NO_PAIR, SAME_RESPONSE
from preference_training.data.rows.templates import parse_dialogue
from tests.support.files import write

HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def read(name: str, directory: Path, split: str = "train", **keys) -> tuple[list, DataReport]:
    """The records of a named set in a local directory, as plain tuples, and the report."""
    entry = read_entry({"name": name, "data_dir": str(directory)} | keys)
    report = entry.report()
    records = list(load_records(entry, split, report, str(directory.parent / "cache")))
    return [(r.prompt, r.responses, r.pairs, r.sft_target) for r in records], report


def assert_one_hundredth_is_held_out(name: str, directory: Path) -> None:
    """A set without a test split of its own: both splits are disjoint and complete, the hash decides, one is held out."""
    train, test = ([prompt for prompt, *_ in read(name, directory, split)[0]] for split in ("train", "test"))
    assert not set(train) & set(test)
    prompts = train + test
    by_hash = {prompt for prompt in prompts if prompt_hash(prompt) < 0.01}
    assert set(test) == (by_hash or {min(prompts, key=prompt_hash)})
    assert 1 <= len(test) < max(2, 0.05 * len(prompts))


# ---- HH -----------------------------------------------------------------------------------------------------------------


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def hh_row(question: str, chosen: str, rejected: str) -> dict:
    return {"chosen": dialogue(question, chosen), "rejected": dialogue(question, rejected)}


@pytest.fixture
def hh(tmp_path) -> Path:
    """The four folders with a dialogue of their own in each split, and the folder of another schema that lies beside them."""
    for subset in HH_SUBSETS:
        for split in ("train", "test"):
            rows = [hh_row(f"{subset} {split}", "good", "bad"), hh_row(f"shared {split}", f"good {subset}", "bad")]
            write(tmp_path / "hh-rlhf" / subset / f"{split}.jsonl.gz", rows)
    red_team = [{"min_harmlessness_score_transcript": -1.5, "task_description": "not for training", "transcript": "x"}]
    write(tmp_path / "hh-rlhf" / "red-team-attempts" / "red_team_attempts.jsonl.gz", red_team)
    return tmp_path / "hh-rlhf"


@pytest.mark.parametrize("split", ["train", "test"])
def test_hh_is_all_its_folders_with_the_rows_of_a_dialogue_in_one_record(hh, split):
    records, report = read("hh", hh, split)
    assert {record[0]: record[1:] for record in records} == {
        f"\n\nHuman: {subset} {split}\n\nAssistant:": ([" good", " bad"], [(0, 1)], " good") for subset in HH_SUBSETS
    } | {
        f"\n\nHuman: shared {split}\n\nAssistant:": (
            [" good harmless-base", " bad", " good helpful-base", " good helpful-online", " good helpful-rejection-sampled"],
            [(0, 1), (2, 1), (3, 1), (4, 1)],
            " good helpful-rejection-sampled",
        )
    }
    assert report == DataReport(skip_bad_rows=True, rows_read=8)


@pytest.mark.parametrize("subset", HH_SUBSETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_subset_of_hh_is_a_name_and_a_key(hh, subset, split):
    expected = [
        (f"\n\nHuman: {subset} {split}\n\nAssistant:", [" good", " bad"], [(0, 1)], " good"),
        (f"\n\nHuman: shared {split}\n\nAssistant:", [f" good {subset}", " bad"], [(0, 1)], f" good {subset}"),
    ]
    assert read(f"hh-{subset}", hh, split)[0] == read("hh", hh, split, subset=subset)[0] == expected


def test_dialogues_of_hh_that_cannot_be_used_are_counted_and_do_not_stop_the_run(tmp_path):
    rows = [
        hh_row("q", "good", "bad"),
        hh_row("q", "same", "same"),
        {"chosen": dialogue("q", "good"), "rejected": dialogue("another q", "bad")},
        hh_row("q", "", "bad"),
        {"chosen": "no turns", "rejected": "no turns"},
        {"chosen": None, "rejected": dialogue("q", "bad")},
    ]
    directory = write(tmp_path / "hh" / "train.jsonl.gz", rows).parent
    records, report = read("hh", directory)
    assert records == [("\n\nHuman: q\n\nAssistant:", [" good", " bad"], [(0, 1)], " good")]
    assert (report.rows_read, report.left_out, report.num_bad_rows) == (6, {SAME_TEXT: 1, OTHER_PROMPT: 1}, 3)
    assert [message.split(":")[1] for message in report.bad_rows] == [f" hh, row {number}" for number in (4, 5, 6)]
    with pytest.raises(UserError, match=r"datasets: hh, row 4: the response in field 'chosen' is empty"):
        read("hh", directory, on_bad_row="stop")


def test_a_missing_folder_of_hh_and_a_missing_split_are_refused_with_the_path(hh, tmp_path):
    with pytest.raises(UserError, match=r"datasets: .*hh-rlhf/no-such \(split train\) could not be loaded"):
        read("hh", hh, subset="no-such")
    write(tmp_path / "only" / "train.jsonl", [hh_row("q", "good", "bad")])
    with pytest.raises(UserError, match=r"datasets: .*only \(split test\) could not be loaded: Unknown split"):
        read("hh", tmp_path / "only", "test")


# ---- SHP ----------------------------------------------------------------------------------------------------------------


def shp_row(history: str, a: str, b: str, score_a: int, score_b: int) -> dict:
    return {
        "post_id": "x", "domain": "askacademia_train", "upvote_ratio": 0.9, "history": history, "human_ref_A": a,
        "human_ref_B": b, "labels": int(score_a >= score_b), "score_A": score_a, "score_B": score_b, "score_ratio": 2.0,
    }  # fmt: skip


SHP_ROWS = [
    shp_row("post", "a", "b", 10, 2),  # 5 : 1
    shp_row("post", "c", "a", 40, 10),  # 4 : 1
    shp_row("post", "b", "d", 2, 3),  # 1.5 : 1
    shp_row("other post", "x", "y", 0, 4),  # 1 : 4, as 0 counts as 1
    shp_row("other post", " ", "y", 1, 9),
    shp_row("other post", "same", "same", 1, 9),
]


@pytest.fixture(params=[".json", ".parquet"])
def shp(request, tmp_path) -> Path:
    for folder in ("askacademia", "askbaking"):
        for split in ("train", "validation", "test"):
            rows = [row | {"history": f"{row['history']} of {folder} {split}"} for row in SHP_ROWS]
            write(tmp_path / "SHP" / folder / f"{split}{request.param}", rows)
    return tmp_path / "SHP"


@pytest.mark.parametrize("split", ["train", "test"])
def test_shp_pairs_are_those_whose_scores_are_far_enough_apart(shp, split):
    records, report = read("shp", shp, split, subset="askbaking")
    assert records == [
        (f"\n\nHuman: post of askbaking {split}\n\nAssistant:", [" a", " b", " c"], [(0, 1), (2, 0)], " c"),
        (f"\n\nHuman: other post of askbaking {split}\n\nAssistant:", [" x", " y"], [(1, 0)], " y"),
    ]
    assert report.left_out == {"the scores' ratio is below 2": 1, EMPTY_TEXT: 1, SAME_TEXT: 1}
    assert (report.rows_read, report.num_bad_rows) == (6, 0)


@pytest.mark.parametrize(
    ("ratio", "pairs", "reason"),
    [(1, 4, None), (1.5, 4, None), (1.6, 3, "the scores' ratio is below 1.6"), (4.5, 1, "the scores' ratio is below 4.5")],
)
def test_the_least_ratio_of_shp_is_a_key_of_its_entry(tmp_path, ratio, pairs, reason):
    directory = write(tmp_path / "SHP" / "train.json", SHP_ROWS[:4]).parent
    records, report = read("shp", directory, min_score_ratio=ratio)
    assert sum(len(pairs_of) for _, _, pairs_of, _ in records) == pairs
    assert report.left_out == ({reason: 4 - pairs} if reason else {})


def test_scores_below_1_of_shp_count_as_1(tmp_path):
    rows = [
        shp_row("kept", "two", "minus", 2, -3),
        shp_row("kept too", "zero", "two", 0, 2),
        shp_row("left out", "minus", "one", -5, 1),
        shp_row("left out", "zero", "zero again", 0, 0),
    ]
    records, report = read("shp", write(tmp_path / "SHP" / "train.json", rows).parent)
    assert [(prompt, pairs, target) for prompt, _, pairs, target in records] == [
        ("\n\nHuman: kept\n\nAssistant:", [(0, 1)], " two"),
        ("\n\nHuman: kept too\n\nAssistant:", [(1, 0)], " two"),
    ]
    assert report.left_out == {"the scores' ratio is below 2": 2}


def test_of_comments_of_shp_with_the_same_highest_score_the_first_is_the_target(tmp_path):
    rows = [shp_row("post", "a", "b", 10, 2), shp_row("post", "c", "b", 10, 2)]
    ((_, responses, _, target),), _ = read("shp", write(tmp_path / "SHP" / "train.json", rows).parent)
    assert (responses, target) == ([" a", " b", " c"], " a")


def test_shp_is_all_its_folders(shp):
    records, report = read("shp", shp)
    assert len(records) == 4
    assert report.rows_read == 12


# ---- StackExchange ------------------------------------------------------------------------------------------------------


def se_row(number: int, *answers: tuple[str, int]) -> dict:
    fields = {"author": "a", "author_id": 1, "author_profile": "x", "selected": False}
    return {
        "qid": number,
        "metadata": ["https://example.org"],
        "answers": [{"answer_id": k, "pm_score": score, "text": text, **fields} for k, (text, score) in enumerate(answers)],
        "date": "2014/03/01",
        "question": f"<p>question {number}</p>",
    }


def se_path(directory: Path, site: str = "3dprinting.stackexchange.com") -> Path:
    return directory / "data" / site / "train-00000-of-00001.parquet"


def test_stack_exchange_pairs_are_all_responses_whose_scores_differ_as_plain_text(tmp_path):
    rows = [
        se_row(1, ("<p>a <b>b</b></p>", 3), ("<p>use <code>x &lt; 3</code></p>", 0), ("<p>c</p>", 3)),
        se_row(2, ("<p>a</p>", 1), ("<i>a</i>", 4), ("b", 2)),
        se_row(3, ("<p>a</p>", 2), ("<p>b</p>", 2)),
        se_row(4, ("<p> </p>", 5), ("<p>b</p>", 2), ("<p>c</p>", 1)),
    ]
    write(se_path(tmp_path / "se"), rows[:3])
    write(se_path(tmp_path / "se", "beer.meta.stackexchange.com"), rows[3:])
    (train, report), (test, _) = (read("se", tmp_path / "se", split) for split in ("train", "test"))
    assert sorted(train + test) == [
        ("\n\nHuman: question 1\n\nAssistant:", [" a b", " use <code>x < 3</code>", " c"], [(0, 1), (2, 1)], " a b"),
        ("\n\nHuman: question 2\n\nAssistant:", [" a", " b"], [(0, 1)], " a"),
        ("\n\nHuman: question 4\n\nAssistant:", [" b", " c"], [(0, 1)], " b"),
    ]
    # Question 1 has a pair of 3 and 3, question 3 one of 2 and 2.
    assert report.left_out == {EQUAL_SCORES: 2, SAME_RESPONSE: 1, NO_PAIR: 1, EMPTY_TEXT: 1}
    assert (report.rows_read, report.num_bad_rows) == (4, 0)
    assert_one_hundredth_is_held_out("se", tmp_path / "se")


def test_many_questions_are_read_by_several_processes_in_their_order(tmp_path):
    rows = [se_row(number, ("<p>good</p>", 2), ("<p>bad</p>", 1)) for number in range(600)]
    write(se_path(tmp_path / "se"), rows)
    (train, report), (test, _) = (read("se", tmp_path / "se", split) for split in ("train", "test"))
    held_out = [number for number in range(600) if prompt_hash(f"\n\nHuman: question {number}\n\nAssistant:") < 0.01]
    assert [int(prompt.split()[2]) for prompt, *_ in test] == held_out
    # Binomial(600, 0.01) has a standard deviation of 2.4; the hash is fixed, so that this cannot fail by chance.
    assert abs(len(held_out) - 6) < 8
    numbers = [int(prompt.split()[2]) for prompt, *_ in train]
    assert sorted([*numbers, *held_out]) == list(range(600))
    # Until a prompt is held out, the one with the smallest hash so far waits.
    assert numbers[held_out[0] :] == sorted(numbers[held_out[0] :])
    assert report.rows_read == 600


# ---- LeetCode -----------------------------------------------------------------------------------------------------------


def leetcode_row(number: int, preference, **fields) -> dict:
    row = {
        "id": number, "difficulty": "Easy", "title": "Two Sum", "description": f"problem {number},\nin two lines",
        "version1": f"def one_{number}():\n    return 1\n", "version2": f"def two_{number}(): ...", "preference": preference,
    }  # fmt: skip
    return row | fields


@pytest.mark.parametrize("name", ["lc", "leetcode"])
def test_leetcode_problems_that_a_person_has_labeled_are_pairs_and_the_others_are_counted(tmp_path, name):
    rows = [
        leetcode_row(1, 0),
        leetcode_row(2, ""),
        leetcode_row(3, 1),
        leetcode_row(4, 1, version2=""),
        leetcode_row(5, 0, description="  "),
        leetcode_row(6, 0, version2="def one_6():\n    return 1"),
        leetcode_row(7, 2),
    ]
    directory = write(tmp_path / "lc" / "leetcode.csv", rows).parent
    (train, report), (test, _) = (read(name, directory, split) for split in ("train", "test"))
    assert sorted(train + test) == [
        ((Turn("user", "problem 1,\nin two lines"),), ["def one_1():\n    return 1", "def two_1(): ..."], [(0, 1)],
         "def one_1():\n    return 1"),
        ((Turn("user", "problem 3,\nin two lines"),), ["def one_3():\n    return 1", "def two_3(): ..."], [(1, 0)],
         "def two_3(): ..."),
    ]  # fmt: skip
    assert report.left_out == {"nobody has labeled the row": 2, EMPTY_TEXT: 2, SAME_TEXT: 1}
    assert report.rows_read == 7
    assert_one_hundredth_is_held_out(name, directory)


def test_leetcode_rows_of_a_problem_are_one_record(tmp_path):
    rows = [leetcode_row(1, 0), leetcode_row(2, 1), leetcode_row(1, 1, version1="def three(): ...")]
    directory = write(tmp_path / "lc" / "leetcode.csv", rows).parent
    records = [record for split in ("train", "test") for record in read("lc", directory, split)[0]]
    (merged,) = [record for record in records if "problem 1" in record[0][0].content]
    assert merged[1:] == (
        ["def one_1():\n    return 1", "def two_1(): ...", "def three(): ..."],
        [(0, 1), (1, 2)],
        "def two_1(): ...",
    )


# ---- UltraFeedback ------------------------------------------------------------------------------------------------------


def ultrafeedback_row(question: str, better: str, worse: str) -> dict:
    def talk(answer: str) -> list[dict]:
        return [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]

    return {
        "prompt": question, "prompt_id": "0" * 64, "chosen": talk(better), "rejected": talk(worse), "messages": talk(better),
        "score_chosen": 8.5, "score_rejected": 4.0,
    }  # fmt: skip


@pytest.fixture
def ultrafeedback(tmp_path) -> Path:
    for split in ("train_prefs", "test_prefs", "train_sft", "test_sft", "train_gen", "test_gen"):
        rows = [ultrafeedback_row(f"{split} {number}", "good", "bad") for number in range(3)]
        rows += [ultrafeedback_row(f"{split} 0", "better", "bad"), ultrafeedback_row(f"{split} 1", "same", "same")]
        write(tmp_path / "uf" / "data" / f"{split}-00000-of-00001.parquet", rows)
    return tmp_path / "uf"


@pytest.mark.parametrize("split", ["train", "test"])
def test_ultrafeedback_is_its_preference_splits_as_conversations(ultrafeedback, split):
    records, report = read("ultrafeedback", ultrafeedback, split)
    assert records == [
        ((Turn("user", f"{split}_prefs 0"),), ["good", "bad", "better"], [(0, 1), (2, 1)], "better"),
        ((Turn("user", f"{split}_prefs 1"),), ["good", "bad"], [(0, 1)], "good"),
        ((Turn("user", f"{split}_prefs 2"),), ["good", "bad"], [(0, 1)], "good"),
    ]
    assert (report.rows_read, report.left_out, report.num_bad_rows) == (5, {SAME_TEXT: 1}, 0)


@pytest.mark.parametrize(("gap", "kept"), [(0, 3), (4.5, 2), (5, 1)])
def test_the_least_score_gap_of_ultrafeedback_is_a_key_of_its_entry(tmp_path, gap, kept):
    rows = [ultrafeedback_row(f"q{n}", "good", "bad") | {"score_rejected": 8.5 - n} for n in (0, 4.5, 6)]
    write(tmp_path / "uf" / "data" / "train_prefs-00000-of-00001.parquet", rows)
    records, report = read("ultrafeedback", tmp_path / "uf", min_score_gap=gap)
    assert len(records) == kept
    assert report.left_out == ({f"not score_chosen - score_rejected >= {gap}": 3 - kept} if gap else {})
    assert report.rows_read == 3


# ---- Orca ---------------------------------------------------------------------------------------------------------------


def test_orca_questions_are_conversations_with_their_system_prompt(tmp_path):
    rows = [
        {"system": "You are brief.", "question": "q1", "chosen": "good", "rejected": "bad"},
        {"system": "", "question": "q2", "chosen": "good", "rejected": "bad"},
        {"system": "You are brief.", "question": "q1", "chosen": "better", "rejected": "bad"},
        {"system": "You are long.", "question": "q1", "chosen": "x", "rejected": ""},
    ]
    directory = write(tmp_path / "orca" / "orca_rlhf.jsonl", rows).parent
    (train, report), (test, _) = (read("orca", directory, split) for split in ("train", "test"))
    assert sorted(train + test) == [
        ((Turn("system", "You are brief."), Turn("user", "q1")), ["good", "bad", "better"], [(0, 1), (2, 1)], "better"),
        ((Turn("user", "q2"),), ["good", "bad"], [(0, 1)], "good"),
    ]
    assert (report.rows_read, report.num_bad_rows) == (4, 1)
    assert report.bad_rows == ["datasets: orca, row 4: field 'rejected' is empty."]
    assert_one_hundredth_is_held_out("orca", directory)


# ---- Nectar -------------------------------------------------------------------------------------------------------------


def nectar_row(prompt: str, ranks: list[float]) -> dict:
    answers = [{"answer": f"answer of rank {rank:g}", "model": "gpt-4", "rank": rank} for rank in ranks]
    return {
        "prompt": prompt, "answers": answers, "turns": 1, "num_responses": len(ranks), "source": ["sharegpt"],
        "good_natured": True,
    }  # fmt: skip


def test_nectar_has_all_21_pairs_of_seven_responses_with_the_better_rank_preferred(tmp_path):
    rows = [
        nectar_row("\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: ", [3.0, 1.0, 7.0, 2.0, 5.0, 4.0, 6.0]),
        nectar_row("no dialogue", [2.0, 1.0]),
    ]
    directory = write(tmp_path / "nectar" / "rlaif.parquet", rows).parent
    (train, report), (test, _) = (read("nectar", directory, split) for split in ("train", "test"))
    of_prompt = {record[0]: record[1:] for record in train + test}
    responses, pairs, target = of_prompt[(Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"))]
    ranked = [(int(responses[better].split()[-1]), int(responses[worse].split()[-1])) for better, worse in pairs]
    assert sorted(ranked) == list(combinations(range(1, 8), 2))
    assert len(ranked) == 21
    assert target == "answer of rank 1"
    assert of_prompt[(Turn("user", "no dialogue"),)] == (["answer of rank 2", "answer of rank 1"], [(1, 0)], "answer of rank 1")
    assert report == DataReport(skip_bad_rows=True, rows_read=2)
    assert_one_hundredth_is_held_out("nectar", directory)


def test_nectar_responses_of_equal_rank_form_no_pair_and_of_the_same_text_none_either(tmp_path):
    rows = [nectar_row(f"\n\nHuman: {q}\n\nAssistant: ", [1.0, 2.0, 2.0]) for q in "qr"]
    rows[0]["answers"][2]["answer"] = rows[0]["answers"][0]["answer"]
    rows[1]["answers"][2]["answer"] = "another one"
    directory = write(tmp_path / "nectar" / "rlaif.parquet", rows).parent
    (train, report), (test, _) = (read("nectar", directory, split) for split in ("train", "test"))
    of_prompt = {record[0][0].content: record[1:] for record in train + test}
    assert of_prompt["r"][1] == [(0, 1), (0, 2)]
    # Rank 1 against the answer of rank 2 with its own text is no pair; against the other it is.
    assert of_prompt["q"] == (["answer of rank 1", "answer of rank 2"], [(0, 1)], "answer of rank 1")
    assert report.left_out == {SAME_TEXT: 1}


def test_a_prompt_of_nectar_may_be_a_conversation(tmp_path):
    rows = [nectar_row("", [1.0, 2.0]) | {"prompt": [{"role": "user", "content": q}]} for q in "qr"]
    directory = write(tmp_path / "nectar" / "rlaif.parquet", rows).parent
    prompts = [record[0] for split in ("train", "test") for record in read("nectar", directory, split)[0]]
    assert sorted(prompts) == [(Turn("user", "q"),), (Turn("user", "r"),)]


@pytest.mark.parametrize(
    ("keys", "ranked"),
    [
        ({"top_k": 3}, [(1, 2), (1, 3), (2, 3)]),
        ({"top_k": 1}, []),
        ({"top_k": 9}, list(combinations(range(1, 5), 2))),
        ({"top_k": 2, "pairs": "best_against_one"}, [(1, 2)]),
    ],
)
def test_fewer_pairs_of_nectar_are_keys_of_its_entry(tmp_path, keys, ranked):
    rows = [nectar_row(f"\n\nHuman: {q}\n\nAssistant: ", [3.0, 1.0, 2.0, 4.0]) for q in "qrs"]
    directory = write(tmp_path / "nectar" / "rlaif.parquet", rows).parent
    records = [record for split in ("train", "test") for record in read("nectar", directory, split, **keys)[0]]
    # Of one response alone SFT learns.
    assert len(records) == 3
    for _, responses, pairs, target in records:
        ranks = [int(response.split()[-1]) for response in responses]
        assert sorted((ranks[better], ranks[worse]) for better, worse in pairs) == ranked
        assert target == "answer of rank 1"


def test_the_best_of_nectar_may_be_compared_with_one_other_which_the_prompt_decides(tmp_path):
    rows = [nectar_row(f"\n\nHuman: {n}\n\nAssistant: ", [3.0, 1.0, 2.0, 4.0]) for n in range(60)]
    directory = write(tmp_path / "nectar" / "rlaif.parquet", rows).parent
    first, again = (read("nectar", directory, pairs="best_against_one")[0] for _ in range(2))
    assert first == again
    others = [responses[pair[1]] for _, responses, [pair], _ in first]
    assert {responses[pair[0]] for _, responses, [pair], _ in first} == {"answer of rank 1"}
    # Each of three others, of about 60 draws: (2/3)^59 is the chance that one is missing.
    assert set(others) == {f"answer of rank {rank}" for rank in (2, 3, 4)}


# ---- conversations: Capybara, OpenHermes, Tulu 3 --------------------------------------------------------------------------


def talks(question: str, better: str, worse: str, **fields) -> dict:
    before = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    turns = [*before, {"role": "user", "content": question}]
    chosen, rejected = ([*turns, {"role": "assistant", "content": answer}] for answer in (better, worse))
    return {"prompt": question, "chosen": chosen, "rejected": rejected, **fields}


CAPYBARA_FIELDS = {
    "source": "Airoboros", "conversation": [{"input": "Hi.", "output": "Hello."}], "original_response": "good",
    "generation_prompt": ["p"], "raw_generation_responses": ["r"], "new_generations": ["bad"], "rating_chosen": 5,
    "rating_rejected": 3, "chosen_model": "a", "rejected_model": "b",
}  # fmt: skip
OPEN_HERMES_FIELDS = {
    "source": "glaive", "category": "code", "candidates_completions": ["good", "bad"], "candidate_policies": ["a", "b"],
    "ranks": [1, 2], "rank_str": "a>b", "chosen_policy": "a", "rejected_policy": "b",
}  # fmt: skip
OF_CONVERSATIONS = {
    "capybara": CAPYBARA_FIELDS,
    "open_hermes_preferences": OPEN_HERMES_FIELDS,
    "tulu3": {"id": "1", "source": "wildchat"},
}


@pytest.mark.parametrize("name", OF_CONVERSATIONS)
def test_sets_of_conversations_have_the_shared_turns_as_the_prompt(tmp_path, name):
    rows = [talks(q, "good", "bad", **OF_CONVERSATIONS[name]) for q in "qr"]
    rows.append(talks("q", "same", "same", **OF_CONVERSATIONS[name]))
    directory = write(tmp_path / name / "train.parquet", rows).parent
    (train, report), (test, _) = (read(name, directory, split) for split in ("train", "test"))
    before = (Turn("user", "Hi."), Turn("assistant", "Hello."))
    assert sorted(train + test) == [((*before, Turn("user", q)), ["good", "bad"], [(0, 1)], "good") for q in "qr"]
    assert (report.rows_read, report.left_out, report.num_bad_rows) == (3, {SAME_TEXT: 1}, 0)
    assert_one_hundredth_is_held_out(name, directory)


# ---- HelpSteer3 -----------------------------------------------------------------------------------------------------------


def helpsteer3_row(question: str, preference: int) -> dict:
    return {
        "domain": "general", "language": "english", "context": [{"role": "user", "content": question}],
        "response1": "one", "response2": "two", "overall_preference": preference,
        "individual_preference": [{"score": preference, "reasoning": "r", "feedback1": "f", "feedback2": "g"}],
    }  # fmt: skip


def test_helpsteer3_pairs_are_what_people_preferred_with_how_much_as_the_margin_and_ties_are_counted(tmp_path):
    rows = [helpsteer3_row(f"q{value}", value) for value in (-3, -1, 0, 1, 2)]
    for split in ("train", "validation"):
        write(tmp_path / "HelpSteer3" / "preference" / f"{split}.jsonl.gz", rows)
    entry = read_entry({"name": "helpsteer3", "data_dir": str(tmp_path / "HelpSteer3")})
    report = entry.report()
    records = list(load_records(entry, "test", report, str(tmp_path / "cache")))
    found = [(record.prompt[0].content, record.sft_target, record.pairs, record.margins) for record in records]
    assert found == [
        ("q-3", "one", [(0, 1)], [3]),
        ("q-1", "one", [(0, 1)], [1]),
        ("q1", "two", [(0, 1)], [1]),
        ("q2", "two", [(0, 1)], [2]),
    ]
    assert report.left_out == {"both responses are about as good (overall_preference is 0)": 1}
    assert report.rows_read == 5
    records, report = read("helpsteer3", tmp_path / "HelpSteer3", min_preference=2)
    assert [prompt[0].content for prompt, *_ in records] == ["q-3", "q2"]
    assert report.left_out["the preference is below 2"] == 2


# ---- every set ----------------------------------------------------------------------------------------------------------

SOUND = {
    "hh": hh_row("q", "good", "bad"),
    "shp": SHP_ROWS[0],
    "se": se_row(1, ("good", 2), ("bad", 1)),
    "lc": leetcode_row(1, 0),
    "ultrafeedback": ultrafeedback_row("q", "good", "bad"),
    "orca": {"system": "", "question": "q", "chosen": "good", "rejected": "bad"},
    "nectar": nectar_row("\n\nHuman: q\n\nAssistant: ", [1.0, 2.0]),
    "helpsteer3": helpsteer3_row("q", 1),
} | {name: talks("q", "good", "bad", **fields) for name, fields in OF_CONVERSATIONS.items()}
READ_FIELDS = {
    "hh": ["chosen", "rejected"],
    "shp": ["history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"],
    "se": ["question", "answers"],
    "lc": ["description", "version1", "version2", "preference"],
    "ultrafeedback": ["prompt", "chosen", "rejected"],
    "orca": ["system", "question", "chosen", "rejected"],
    "nectar": ["prompt", "answers"],
    "helpsteer3": ["context", "response1", "response2", "overall_preference"],
} | {name: ["chosen", "rejected"] for name in OF_CONVERSATIONS}
TRAIN_FILE = {"ultrafeedback": "data/train_prefs-00000-of-00001.parquet", "helpsteer3": "preference/train.parquet"}


def copy_of(name: str, directory: Path, rows: list[dict]) -> Path:
    """A local copy of a named set with these rows for training."""
    write(directory / TRAIN_FILE.get(name, "train.parquet"), rows)
    return directory


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in READ_FIELDS.items() for field in fields])
def test_a_directory_that_lacks_a_field_is_refused_with_its_name_and_the_fields_there_are(tmp_path, name, field):
    row = {key: value for key, value in SOUND[name].items() if key != field} | {"more": "x"}
    directory = copy_of(name, tmp_path / "copy", [row])
    with pytest.raises(UserError) as refused:
        read(name, directory)
    text = str(refused.value)
    assert text.startswith(
        f"datasets: {(directory / TRAIN_FILE.get(name, '')).parent if name == 'helpsteer3' else directory}, "
    )
    assert f": no field {field}; it has {', '.join(row)}. Expected the fields of {DATASET_PATHS[name]}: " in text
    assert text.endswith(f"{', '.join(READ_FIELDS[name])}.")


DATASET_PATHS = {
    "hh": "Anthropic/hh-rlhf",
    "shp": "stanfordnlp/SHP",
    "se": "HuggingFaceH4/stack-exchange-preferences",
    "lc": "minfeng-ai/leetcode_preference",
    "ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized",
    "orca": "Intel/orca_dpo_pairs",
    "nectar": "berkeley-nest/Nectar",
    "capybara": "argilla/distilabel-capybara-dpo-7k-binarized",
    "open_hermes_preferences": "argilla/OpenHermesPreferences",
    "tulu3": "allenai/llama-3.1-tulu-3-8b-preference-mixture",
    "helpsteer3": "nvidia/HelpSteer3",
}


def test_all_named_sets_are_among_these():
    aliases = {"leetcode": "lc"} | {f"hh-{subset}": "hh" for subset in HH_SUBSETS}
    assert set(DATASETS) - set(aliases) - {"toy"} == set(SOUND)
    for alias, name in aliases.items():
        assert DATASETS[alias].truncation_mode == DATASETS[name].truncation_mode
        assert DATASETS[alias].skip_bad_rows


@pytest.mark.parametrize("name", SOUND)
def test_the_prompts_of_a_named_set_are_what_its_registration_says(tmp_path, name):
    directory = copy_of(name, tmp_path, [SOUND[name]])
    splits = ("train",) if DATASETS[name].held_out_by_share is False else ("train", "test")
    [prompt] = [prompt for split in splits for prompt, *_ in read(name, directory, split)[0]]
    assert DATASETS[name].prompts == ("conversations" if isinstance(prompt, tuple) else "dialogues")
    assert isinstance(prompt, tuple) or parse_dialogue(prompt)


BLANK = {
    "hh": ("chosen", "field 'chosen' is null, expected a text."),
    "shp": ("score_A", "field 'score_A' is null, expected a number."),
    "se": ("question", "field 'question' is null, expected a text."),
    "ultrafeedback": ("chosen", "field 'chosen' is null, expected a text."),
    "orca": ("question", "field 'question' is null, expected a text."),
    "nectar": (
        "answers",
        "no field 'answers.answer', the row has prompt, answers, turns, num_responses, source, good_natured.",
    ),
}


@pytest.mark.parametrize("name", BLANK)
def test_a_blank_in_a_named_set_is_counted_or_stops_the_run_with_its_row_and_field(tmp_path, name):
    field, told = BLANK[name]
    directory = copy_of(name, tmp_path / "copy", [SOUND[name], SOUND[name] | {field: None}, SOUND[name]])
    records, report = read(name, directory)
    assert sum(len(pairs) for _, _, pairs, _ in records) == 2
    assert (report.rows_read, report.num_bad_rows, report.bad_rows) == (3, 1, [f"datasets: {name}, row 2: {told}"])
    with pytest.raises(UserError) as refused:
        read(name, directory, on_bad_row="stop")
    assert str(refused.value).startswith(f"datasets: {name}, row 2: {told} Fix the row, or skip such rows")


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (None, "field 'answers' is null, expected a list."),
        ([{"text": None, "pm_score": 1}], "field 'answers.text' is null, expected a text."),
        ([{"text": "a", "pm_score": None}], "field 'answers.pm_score' is null, expected a number."),
        ([None], "no field 'answers.text', the row has question, answers."),
    ],
)
def test_a_blank_among_the_responses_of_stack_exchange_is_counted(tmp_path, answers, told):
    rows = [{"question": f"q{k}", "answers": [{"text": "a", "pm_score": 1}, {"text": "b", "pm_score": 2}]} for k in range(2)]
    directory = copy_of("se", tmp_path / "copy", [*rows, {"question": "q2", "answers": answers}])
    assert len(read("se", directory)[0]) == len(read("se", directory, "test")[0]) == 1
    assert read("se", directory)[1].bad_rows == [f"datasets: se, row 3: {told}"]


@pytest.mark.parametrize("name", SOUND)
def test_a_damaged_file_of_a_named_set_is_refused_with_the_directory(tmp_path, name):
    directory = copy_of(name, tmp_path / "copy", [SOUND[name]])
    path = directory / TRAIN_FILE.get(name, "train.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError) as refused:
        read(name, directory)
    assert str(refused.value).startswith(f"datasets: {directory}")
    assert " (split train" in str(refused.value)
    assert "could not be loaded: " in str(refused.value)
    assert "{name: hh, data_dir: ...}" in str(refused.value)


@pytest.mark.parametrize("name", SOUND)
def test_every_named_set_takes_where_whose_rows_are_counted_once(tmp_path, name):
    kept, left_out = (SOUND[name] | {"kind": kind} for kind in ("kept", "left out"))
    directory = copy_of(name, tmp_path / "copy", [left_out, kept, left_out])
    for where in ({"kind": "kept"}, "kind == 'kept'"):
        splits = ("train", "test") if DATASETS[name].held_out_by_share else ("train",)
        found = [record for split in splits for record in read(name, directory, split, where=where)[0]]
        assert len(found) == 1
        _, report = read(name, directory, where=where)
        reason = "kind is not kept" if isinstance(where, dict) else "not kind == 'kept'"
        assert (report.rows_read, report.left_out) == (3, {reason: 2})


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"name": "hh", "where": "chosen >"}, "hh: where: found 'chosen >' (invalid syntax), expected comparisons"),
        ({"name": "hh", "where": ["chosen"]}, "hh: where: found ['chosen'], expected {COLUMN: VALUE}, or a text of"),
        ({"name": "nectar", "top_k": 0}, "nectar: top_k: found 0, expected a whole number of at least 1."),
        ({"name": "nectar", "pairs": "best"}, "nectar: pairs: found 'best'; "),
        ({"name": "ultrafeedback", "min_score_gap": "2"}, "ultrafeedback: min_score_gap: found '2', expected a number."),
    ],
)
def test_a_senseless_key_of_a_named_set_is_refused_before_anything_is_loaded(entry, told):
    with pytest.raises(UserError) as refused:
        read_entry(entry)
    assert str(refused.value).startswith(f"datasets: {told}")


def test_what_a_named_set_gives_depends_on_its_files_split_and_keys(tmp_path):
    def fingerprint(directory: Path, split: str = "train", **keys) -> str:
        entry = read_entry({"name": "shp", "data_dir": str(directory)} | keys)
        return entry.fingerprint(split, str(tmp_path / "cache"))

    for place, rows in (("first", SHP_ROWS), ("other", SHP_ROWS[:3])):
        for split in ("train", "test"):
            write(tmp_path / place / f"{split}.json", rows)
    first, other = tmp_path / "first", tmp_path / "other"
    different = [
        fingerprint(first),
        fingerprint(first, "test"),
        fingerprint(other),
        fingerprint(first, min_score_ratio=3),
        fingerprint(first, on_bad_row="stop"),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint(first) == different[0]
    assert fingerprint(first, weight=2, template="raw") == different[0]


def test_a_loader_that_is_called_by_itself_says_what_it_skipped_unless_it_is_to_be_silent(tmp_path, capfd):
    directory = write(tmp_path / "hh" / "train.jsonl", [hh_row("q", "good", "bad"), hh_row("q", "same", "same")]).parent
    sound = write(tmp_path / "sound" / "train.jsonl", [hh_row("q", "good", "bad")]).parent

    def said(folder: Path, silent: bool) -> str:
        cache_dir = str(tmp_path / "cache")
        assert len(list(DATASETS["hh"].load("train", silent=silent, cache_dir=cache_dir, data_dir=str(folder)))) == 1
        return capfd.readouterr().out

    assert said(directory, silent=False) == f"hh train: 1 skipped: {SAME_TEXT}\n"
    assert said(directory, silent=True) == said(sound, silent=False) == ""


# ---- directories of the user's --------------------------------------------------------------------------------------------


def own(directory: Path, keys: dict, split: str = "train", report: DataReport | None = None) -> list:
    """The records of a directory whose prompts are in the field question; nothing is held out unless keys say so."""
    entry = read_entry({"path": str(directory), "prompt": "question"} | keys, {"held_out_share": 0})
    records = load_records(entry, split, report, str(directory.parent / "cache"))
    return [(r.prompt, r.responses, r.pairs, r.sft_target) for r in records]


def triplets(start: int, end: int) -> list[dict]:
    return [{"question": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}", "n": n} for n in range(start, end)]


def expected(*numbers: int) -> list:
    return [(f"q{n}", [f"good {n}", f"bad {n}"], [(0, 1)], f"good {n}") for n in numbers]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_a_directory_in_the_hubs_layout_is_read_through_a_map_of_its_fields(tmp_path, suffix):
    for split, rows in (("train", triplets(0, 4)), ("validation", triplets(4, 6))):
        write(tmp_path / "mine" / f"{split}{suffix}", rows)
    assert own(tmp_path / "mine", {"split": "validation"}) == expected(4, 5)
    keys = {"split": "train", "test_split": "validation"}
    assert own(tmp_path / "mine", keys) == own(tmp_path / "mine", {}) == expected(0, 1, 2, 3)
    assert own(tmp_path / "mine", keys, "test") == expected(4, 5)


def test_parts_of_a_split_and_filters_of_its_rows_may_be_asked_for(tmp_path):
    write(tmp_path / "mine" / "train.jsonl", triplets(0, 8))
    assert own(tmp_path / "mine", {"split": "train[:25%]"}) == expected(0, 1)
    report = DataReport()
    keys = {"where": {"n": ">= 4"}, "top_k": {"column": "n", "k": 2}}
    assert own(tmp_path / "mine", keys, report=report) == expected(6, 7)
    assert report.left_out == {"n is not >= 4": 4, "not among the 2 largest of n": 2}


def test_a_subset_is_a_configuration_of_the_set_and_a_data_dir_one_of_its_folders(tmp_path):
    for place, rows in (("en", triplets(0, 1)), ("de", triplets(1, 2))):
        write(tmp_path / "mine" / place / "train.jsonl", rows)
    assert own(tmp_path / "mine", {"data_dir": "de"}) == expected(1)
    configs = "".join(f"- config_name: {place}\n  data_files: {place}/*.jsonl\n" for place in ("en", "de"))
    (tmp_path / "mine" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert own(tmp_path / "mine", {"subset": "en"}) == expected(0)
    with pytest.raises(UserError, match=r"mine \(split train\) could not be loaded: .*'fr' not found"):
        own(tmp_path / "mine", {"subset": "fr"})


def test_without_a_test_split_a_share_of_the_prompts_is_held_out(tmp_path):
    write(tmp_path / "mine" / "train.jsonl", triplets(0, 100))
    train, test = (own(tmp_path / "mine", {"held_out_share": 0.2}, split) for split in ("train", "test"))
    assert [record[0] for record in test] == [f"q{n}" for n in range(100) if prompt_hash(f"q{n}") < 0.2]
    assert sorted(train + test) == sorted(expected(*range(100)))


def test_an_invalid_row_of_a_directory_is_reported_with_directory_number_and_file(tmp_path):
    write(tmp_path / "mine" / "train.jsonl", [*triplets(0, 2), triplets(2, 3)[0] | {"chosen": None}])
    with pytest.raises(UserError) as refused:
        own(tmp_path / "mine", {})
    assert str(refused.value).startswith(f"datasets: {tmp_path / 'mine'}/, row 3 of train.jsonl: field 'chosen' is null")


def no_files(directory: Path) -> None:
    directory.mkdir()


def a_script(directory: Path) -> None:
    write(directory / "train.jsonl", triplets(0, 1))
    (directory / f"{directory.name}.py").write_text("")


def a_card_that_is_no_yaml(directory: Path) -> None:
    write(directory / "train.jsonl", triplets(0, 1))
    (directory / "README.md").write_text("---\nconfigs:\n- data_files: [x\n---\n")


def lines_that_are_no_json(directory: Path) -> None:
    directory.mkdir()
    (directory / "train.jsonl").write_text("{broken\n")


def half_a_gzip(directory: Path) -> None:
    path = write(directory / "train.jsonl.gz", triplets(0, 9))
    path.write_bytes(path.read_bytes()[:30])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (no_files, " (split train) could not be loaded: "),
        (a_script, " (split train) could not be loaded: "),
        (a_card_that_is_no_yaml, " (split train) could not be loaded: "),
        (lines_that_are_no_json, "/train.jsonl, row 1: not JSON: "),
        (half_a_gzip, "/train.jsonl.gz: cannot be read: "),
    ],
)
def test_a_directory_that_cannot_be_loaded_is_refused_with_its_path(tmp_path, make, told):
    make(tmp_path / "mine")
    with pytest.raises(UserError) as refused:
        own(tmp_path / "mine", {})
    assert str(refused.value).startswith(f"datasets: {tmp_path / 'mine'}{told}")


def test_a_directory_that_does_not_exist_and_a_split_that_does_not_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"datasets: .*missing \(split train\) could not be loaded"):
        own(tmp_path / "missing", {})
    write(tmp_path / "mine" / "train.jsonl", triplets(0, 1))
    with pytest.raises(UserError, match=r"mine \(split dev\) could not be loaded: Unknown split \"dev\"\. Should be one of"):
        own(tmp_path / "mine", {"split": "dev"})


NOT_UTF8 = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe\xff"]).buffers())
NO_DATE = pyarrow.array([2**62], pyarrow.timestamp("us"))


@pytest.mark.parametrize("texts", [NOT_UTF8, NO_DATE], ids=["not UTF-8", "no date"])
def test_values_that_cannot_be_read_are_refused_with_the_file_of_the_directory(tmp_path, texts):
    (tmp_path / "mine").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"chosen": texts}), tmp_path / "mine" / "train.parquet")
    with pytest.raises(UserError) as refused:
        own(tmp_path / "mine", {})
    assert str(refused.value).startswith(f"datasets: {tmp_path / 'mine'}/train.parquet: not Parquet, or damaged: ")
