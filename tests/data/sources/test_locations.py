"""Folders, patterns and saved directories: every file's rows, split, with messages that name the file and the row."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.records.report import DataReport
from tests.support.files import write


def triplets(start: int, end: int) -> list[dict]:
    return [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": "bad"} for n in range(start, end)]


def prompts(entry, split: str = "train", report: DataReport | None = None, **defaults) -> list[int]:
    """The numbers of the prompts of an entry, in their order; nothing is held out unless it says so."""
    read = read_entry(entry, {"held_out_share": 0} | defaults)
    return [int(record.prompt[1:]) for record in load_records(read, split, report)]


@pytest.fixture
def shards(tmp_path, monkeypatch) -> Path:
    """A folder with files of four formats, among others that hold no rows; the working directory is the one above it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shards" / "part0.jsonl", triplets(0, 3))
    write(tmp_path / "shards" / "part1.csv", triplets(3, 5))
    write(tmp_path / "shards" / "part2.parquet", triplets(5, 7))
    (tmp_path / "shards" / "part3.JSONL.GZ").write_bytes(gzip.compress(json.dumps(triplets(7, 8)[0]).encode()))
    for name in ("README.md", "notes.txt", "dataset_info.json", ".hidden.jsonl"):
        (tmp_path / "shards" / name).write_text("{}")
    return tmp_path / "shards"


@pytest.mark.parametrize("path", ["shards", "shards/", "./shards", "{shards}", "{shards}/"])
def test_a_folder_is_the_rows_of_all_its_files(shards, path):
    path = path.format(shards=shards)
    assert prompts(path) == prompts({"path": path}) == list(range(8))


def test_a_pattern_is_the_rows_of_the_files_that_match_it(shards):
    assert prompts("shards/part[01].*") == prompts(f"{shards}/part[01]*") == list(range(5))
    assert prompts("shards/*.jsonl") == [0, 1, 2]
    assert prompts("**/part?.parquet") == [5, 6]
    with pytest.raises(
        UserError, match=r"datasets: shards/\*\.json: no data file matches; 1 of other kinds\. Expected files ending in "
    ):
        read_entry("shards/*.json")
    with pytest.raises(UserError, match=r"datasets: shards/\*\.md: no data file matches; 1 of other kinds\."):
        read_entry("shards/*.md")


OPTIONS = {"split": "train", "test_split": "train", "subset": "en", "data_dir": "x", "streaming": True}


@pytest.mark.parametrize(
    ("path", "unused", "reason"),
    [
        ("shards/part[01].*", sorted(OPTIONS), "files of a pattern have no splits or subsets"),
        ("shards/p*", sorted(OPTIONS), "files of a pattern have no splits or subsets"),
        ("shards/part1.csv", sorted(OPTIONS), "a file has no splits or subsets"),
        ("table", sorted(OPTIONS), "what save_to_disk wrote here has no splits or subsets"),
        ("splits", ["data_dir", "streaming", "subset"], "what save_to_disk wrote here has no subsets"),
        ("shards", [], ""),
    ],
)
def test_options_that_a_path_does_not_have_are_noted(shards, path, unused, reason):
    table = datasets.Dataset.from_list(triplets(0, 20))
    table.save_to_disk("table")
    datasets.DatasetDict(train=table, dev=table).save_to_disk("splits")
    entry = {"path": path, **OPTIONS}
    assert list(read_entry(entry).notes) == [f"{key} has no effect: {reason}" for key in unused]
    # Where there are no splits, a share is held out: what is trained on is not.
    if "test_split" in unused:
        read = {"path": path, "test_split": "train"}
        assert not set(prompts(read, held_out_share=0.5)) & set(prompts(read, "test", held_out_share=0.5))


def test_options_of_a_test_path_count_where_the_other_path_has_none_of_them(shards):
    datasets.DatasetDict(dev=datasets.Dataset.from_list(triplets(8, 9))).save_to_disk("splits")
    entry = {"path": "shards/part0.jsonl", "test_path": "splits", "test_split": "dev", "held_out_share": 0.5}
    assert list(read_entry(entry).notes) == ["held_out_share has no effect: test_path and test_split define the held-out split"]
    assert (prompts(entry), prompts(entry, "test")) == ([0, 1, 2], [8])


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_lists_in_cells_are_read_of_what_the_hub_library_loaded_from_a_table_without_types(tmp_path, kind):
    rows = [{"prompt": "q", "chosen": '["a"]', "rejected": '["b", "c"]'}]
    path = write(tmp_path / ("rows.csv" if kind == "csv" else "rows.jsonl"), rows)
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    (record,) = load_records(read_entry(f"{tmp_path}/saved", {"held_out_share": 0}), "train")
    assert record.responses == (["a", "b", "c"] if kind == "csv" else ['["a"]', '["b", "c"]'])


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    write(tmp_path / "rows[1].jsonl", triplets(0, 2))
    assert prompts(str(tmp_path / "rows[1].jsonl")) == [0, 1]


def test_a_share_of_the_rows_of_a_folder_is_held_out_and_a_test_path_may_be_one(shards):
    write(shards.parent / "held_out" / "a.jsonl", triplets(20, 22))
    entry = {"path": "shards", "held_out_share": 0.5}
    train, test = prompts(entry), prompts(entry, "test")
    assert sorted(train + test) == list(range(8)) and test
    entry = {"path": "shards/*.jsonl", "test_path": "held_out"}
    assert (prompts(entry), prompts(entry, "test")) == ([0, 1, 2], [20, 21])


def test_an_invalid_row_is_named_with_its_file_and_its_number_there(shards):
    write(shards / "part1.csv", [*triplets(3, 5), {"prompt": "q9", "chosen": "", "rejected": "bad"}])
    for path, place in (("shards", "shards/"), ("shards/part[01].*", "shards/part[01].*")):
        with pytest.raises(UserError) as refused:
            prompts(path)
        name = "part1.csv" if path == "shards" else "shards/part1.csv"
        assert str(refused.value).startswith(f"datasets: {place}, row 3 of {name}: ")
    report = DataReport(skip_bad_rows=True)
    assert prompts({"path": "shards"}, report=report) == list(range(8))
    assert (report.num_bad_rows, report.rows_read) == (1, 9)


def test_the_splits_of_a_folder_are_its_files_names_and_those_that_nobody_reads_are_named(tmp_path):
    for split, rows in (("train", triplets(0, 3)), ("test", triplets(3, 5)), ("validation", triplets(5, 6))):
        write(tmp_path / "mine" / f"{split}.jsonl", rows)
    report = DataReport()
    assert prompts(f"{tmp_path}/mine", report=report) == [0, 1, 2]
    told = "beside train, the folder has validation (1 file), test (1 file), which split and test_split name"
    assert report.notes == [told]
    report = DataReport()
    entry = {"path": f"{tmp_path}/mine", "test_split": "test"}
    assert (prompts(entry, report=report), prompts(entry, "test")) == ([0, 1, 2], [3, 4])
    assert report.notes == ["beside train, the folder has validation (1 file), which split and test_split name"]


def test_a_folder_of_texts_is_a_document_a_file(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(f"document {n}")
    from preference_training.data.sources.locations import Part, find_source

    source = find_source(str(tmp_path), Part(), None)
    assert [row for _, row in source.rows(DataReport())] == [{"text": f"document {n}"} for n in range(3)]


def test_the_content_of_a_folder_identifies_it(shards):
    def fingerprint(path: str) -> str:
        return read_entry(path).fingerprint("train", None)

    before = fingerprint("shards")
    assert fingerprint("shards/") == fingerprint(str(shards)) == before
    assert fingerprint("shards/*.jsonl") != before
    write(shards / "part1.csv", triplets(3, 6))
    assert fingerprint("shards") != before


def test_a_directory_that_save_to_disk_wrote_is_read_whole_or_by_split(tmp_path):
    train, test = (datasets.Dataset.from_list(triplets(*limits)) for limits in ((0, 4), (4, 6)))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert prompts(str(tmp_path / "one")) == prompts(str(tmp_path / "both")) == [0, 1, 2, 3]
    assert prompts({"path": str(tmp_path / "both"), "test_split": "test"}, "test") == [4, 5]
    assert prompts({"path": str(tmp_path / "both"), "test_path": str(tmp_path / "one")}, "test") == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"both: no split 'dev'\. Expected one of train, test"):
        prompts({"path": str(tmp_path / "both"), "split": "dev"})
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"one: cannot be loaded: .*Expected a directory that save_to_disk wrote"):
        prompts(str(tmp_path / "one"))


def test_a_set_of_the_hub_may_be_streamed(tmp_path):
    write(tmp_path / "mine" / "train.jsonl", triplets(0, 5))
    write(tmp_path / "mine" / "test.jsonl", triplets(5, 6))
    entry = {"path": f"{tmp_path}/mine", "streaming": True, "test_split": "test"}
    assert (prompts(entry), prompts(entry, "test")) == ([0, 1, 2, 3, 4], [5])
    # Only reading the rows says what they are.
    assert read_entry(entry).fingerprint("train", None) is None
    with pytest.raises(UserError, match="streaming: found 'yes', expected true or false"):
        read_entry({"path": f"{tmp_path}/mine", "streaming": "yes"})


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine \(split train\) could not be loaded: "):
        prompts(f"{tmp_path}/mine")
