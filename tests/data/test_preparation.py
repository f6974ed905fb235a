"""Data is tokenized once and found again, by whoever needs it, unless something changed that its ids depend on; and neither a
fault nor a kill nor a full disk leaves anything half-written."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data import preparation as data_preparation
from preference_training.data import prompt_table
from preference_training.data.entries import Entry, read_entry
from preference_training.data.mismatched import ONLY_PROMPT
from preference_training.data.preparation import (
    HELD_OUT_ELSEWHERE,
    count_identical_pairs,
    exclude_held_out,
    overlap,
    prepare,
    tokenizer_hash,
)
from preference_training.data.records.report import SAME_TEXT, DataReport
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.examples import NO_MARGIN
from preference_training.data.token_files import write_tokenized
from preference_training.data.tokenization import PROMPT_CUT, SAME_IDS, tokenize_records
from preference_training.losses.registry import build_loss
from tests.support import forked
from tests.support.files import ROOT

# Imported by processes of its own, which start sooner without torch and transformers: those come where a test needs them.


class Characters:
    """A tokenizer whose tokens are characters, and which counts the texts that it is asked for."""

    is_fast, bos_token, bos_token_id, eos_token, eos_token_id, chat_template = False, None, None, "</s>", 0, None

    def __init__(self):
        self.texts = 0

    def __call__(self, texts, **_options):
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=[ord(character) for character in texts])
        self.texts += len(texts)
        return SimpleNamespace(input_ids=[[ord(character) for character in text] for text in texts])

    def __len__(self):
        return 0x110000

    def get_vocab(self):
        return {chr(k): k for k in range(5)}


PAIRS = TokenSettings(examples="pairs", max_length=64, max_prompt_length=32)


def rows(count: int, answer: str = "good") -> list[dict]:
    return [{"prompt": f"question {n}", "chosen": f"{answer} {n}", "rejected": f"bad {n}"} for n in range(count)]


def write(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def prepared(entry, directory: Path, split: str = "train", of=PAIRS, tokenizer=None, **options):
    """`prepare` for one entry. Returns table, report, and how many texts the tokenizer was asked for."""
    tokenizer = tokenizer or Characters()
    before = getattr(tokenizer, "texts", 0)
    entry = entry if isinstance(entry, Entry) else read_entry(entry)
    found = prepare([entry], split, tokenizer, lambda _: of, directory, **options)
    return found.table, found.reports[0], getattr(tokenizer, "texts", 0) - before


def contents(table) -> list[tuple]:
    return [(prompt.prompt_ids, prompt.responses, prompt.pairs, prompt.number) for prompt in table]


def file_names(table) -> list[str]:
    """The names of a table's files."""
    return [part.name for part in table.parts]


def suffixes(directory: Path) -> list[str]:
    """The endings of what lies in a folder of prepared data, apart from the locks, which are empty."""
    return sorted(path.name.split(".", 1)[1] for path in directory.iterdir() if path.suffix != ".lock")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with rows.jsonl, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", rows(20))
    return tmp_path


def whole(path: str = "rows.jsonl", **more) -> dict:
    """An entry of which nothing is held out."""
    return {"path": path, "held_out_share": 0, **more}


# ---- once, and found again ------------------------------------------------------------------------------------------------


def test_a_second_start_reads_the_file_and_asks_the_tokenizer_nothing(folder):
    for split in ("train", "test"):
        first, report, texts = prepared("rows.jsonl", folder / "prepared", split)
        # A prompt and two responses each.
        assert texts == 3 * len(first) > 0
        again, same_report, none = prepared("rows.jsonl", folder / "prepared", split)
        assert none == 0
        assert contents(again) == contents(first) and again.fingerprint == first.fingerprint
        assert same_report == report
    assert suffixes(folder / "prepared") == ["arrow", "arrow", "json", "json"]


def test_what_was_not_read_is_said_again_of_data_found_again_and_what_has_no_effect_as_the_entry_stands(folder):
    write(folder / "more.jsonl", [row | {"annotator": 1} for row in rows(5)])
    for keys, notes in (({}, []), ({"split": "train"}, ["split has no effect: a file has no splits or subsets"])):
        for _ in range(2):
            _, report, _ = prepared(whole("more.jsonl", **keys), folder / "prepared")
            assert (report.columns_not_read, report.notes) == ({"annotator": 5}, notes)


def test_what_is_prepared_is_what_the_tokenizer_says_of_the_records(folder):
    from preference_training.data.entries import load_records

    table, report, _ = prepared(whole(), folder / "prepared", first_row=7)
    expected = list(tokenize_records(load_records(read_entry(whole()), "train"), Characters(), PAIRS))
    first_rows = [7 + 2 * k for k in range(20)]
    # In messages, a record is named by the row of the file.
    assert [prompt.source for prompt in expected] == [f"rows.jsonl, row {n}" for n in range(1, 21)]
    assert [replace(prompt, source="") for prompt in table] == [
        replace(prompt, first_row=row, source="") for prompt, row in zip(expected, first_rows, strict=True)
    ]
    assert table[3].source == "rows.jsonl, row 4"
    assert (report.rows_read, report.num_prompts) == (20, 20)


def test_several_entries_are_one_table_and_a_report_each_with_their_weights_in_training_alone(folder):
    write(folder / "more.jsonl", rows(5, "fine"))
    entries = [read_entry(whole("rows.jsonl", weight=2)), read_entry(whole("more.jsonl", weight=0.5))]
    found = prepare(entries, "train", Characters(), lambda _: PAIRS, folder / "prepared")
    assert (len(found.table), [report.num_prompts for report in found.reports]) == (25, [20, 5])
    assert [part.weight for part in found.table.parts] == [2, 0.5]
    assert [prompt.first_row for prompt in found.table] == list(range(0, 50, 2))
    held_out = [replace(entry, dataset=read_entry(entry.name).dataset) for entry in entries]
    test = prepare(held_out, "test", Characters(), lambda _: PAIRS, folder / "prepared")
    assert {part.weight for part in test.table.parts} == {1.0}


def test_settings_are_asked_for_each_entry(folder):
    write(folder / "more.jsonl", rows(5))
    entries = [read_entry(whole("rows.jsonl")), read_entry(whole("more.jsonl", template="hh"))]
    of = lambda entry: replace(PAIRS, template=entry.template)  # noqa: E731
    table = prepare(entries, "train", Characters(), of, folder / "prepared").table
    texts = ["".join(map(chr, table[k].prompt_ids)) for k in (0, 20)]
    assert texts == ["question 0", "\n\nHuman: question 0\n\nAssistant:"]


def with_tokens(**values) -> Characters:
    """A tokenizer that differs in something."""
    tokenizer = Characters()
    for name, value in values.items():
        setattr(tokenizer, name, value)
    return tokenizer


CHANGES = {
    "paired": {"of": replace(PAIRS, examples="targets")},
    "max_length": {"of": replace(PAIRS, max_length=65)},
    "max_prompt_length": {"of": replace(PAIRS, max_prompt_length=31)},
    "truncation_mode": {"of": replace(PAIRS, truncation_mode="drop")},
    "template": {"of": replace(PAIRS, template="hh")},
    "system_prompt": {"of": replace(PAIRS, system_prompt="Be brief.")},
    "eos_token": {"tokenizer": with_tokens(eos_token="<end>")},
    "bos_token": {"tokenizer": with_tokens(bos_token="<s>")},
    "chat_template": {"tokenizer": with_tokens(chat_template="{{ messages }}")},
    "vocabulary": {"tokenizer": with_tokens(get_vocab=lambda: {"a": 1})},
    "split": {"split": "test"},
    "held_out_share": {"entry": {"path": "rows.jsonl", "held_out_share": 0.5}},
    "where": {"entry": whole(where={"prompt": "question 3"})},
    "chosen": {"entry": whole(chosen="rejected", rejected="chosen")},
    "on_bad_row": {"entry": whole(on_bad_row="skip")},
    "version": {"of": replace(PAIRS, version=1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_ids_depend_on_is_prepared_anew_when_it_changes_and_the_old_is_still_there(folder, change):
    usual = {"entry": {"path": "rows.jsonl", "held_out_share": 0.1} if change == "split" else whole()}
    first, *_ = prepared(**usual, directory=folder / "prepared")
    changed, _, texts = prepared(**usual | CHANGES[change], directory=folder / "prepared")
    assert texts > 0 and file_names(changed) != file_names(first)
    # The fingerprint is that of the ids: a length that nothing reaches changes none.
    ids = [[prompt[:3] for prompt in contents(table)] for table in (first, changed)]
    assert (changed.fingerprint == first.fingerprint) == (ids[0] == ids[1])
    again, _, texts = prepared(**usual, directory=folder / "prepared")
    assert texts == 0 and (again.fingerprint, file_names(again)) == (first.fingerprint, file_names(first))


def test_a_file_whose_content_changes_is_prepared_anew_and_one_that_is_only_touched_is_not(folder):
    prepared(whole(), folder / "prepared")
    os.utime("rows.jsonl", (1, 1))
    assert prepared(whole(), folder / "prepared")[2] == 0
    # One letter, and not the file's length.
    text = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(text.replace("good 7", "food 7"))
    table, _, texts = prepared(whole(), folder / "prepared")
    assert texts == 60 and "".join(map(chr, table[7].responses[0][:-1])) == "food 7"
    Path("rows.jsonl").write_text(text)
    assert prepared(whole(), folder / "prepared")[2] == 0


def test_a_set_in_two_files_depends_on_the_one_of_its_split(folder):
    write(folder / "test.jsonl", rows(3, "fine"))
    entry = {"path": "rows.jsonl", "test_path": "test.jsonl"}
    tables = {split: prepared(entry, folder / "prepared", split)[0] for split in ("train", "test")}
    assert {split: len(table) for split, table in tables.items()} == {"train": 20, "test": 3}
    write(folder / "test.jsonl", rows(4, "fine"))
    assert prepared(entry, folder / "prepared", "train")[2] == 0
    assert prepared(entry, folder / "prepared", "test")[2] == 12


def test_weight_and_first_row_change_no_file(folder):
    prepared(whole(), folder / "prepared")
    table, _, texts = prepared(whole(weight=3), folder / "prepared", first_row=100)
    assert texts == 0
    assert (table.parts[0].weight, table[0].first_row) == (3, 100)


def test_a_fast_tokenizer_is_the_same_however_often_it_was_used_and_another_one_is_not():
    from preference_training.modeling.tokenizer import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    known = tokenizer_hash(tokenizer)
    assert tokenizer_hash(byte_level_tokenizer()) == known
    # Both change what the tokenizer's own file would say, at every call.
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokenizer_hash(tokenizer) == known
    tokenizer("a")
    assert tokenizer_hash(tokenizer) == known
    tokenizer.add_tokens(["new"])
    assert tokenizer_hash(tokenizer) != known


def test_a_file_of_token_ids_is_read_once_and_anew_when_it_changes(folder, monkeypatch):
    read = []
    real = data_preparation.read_tokenized
    monkeypatch.setattr(data_preparation, "read_tokenized", lambda *options: read.append(1) or real(*options))
    table, *_ = prepared(whole(), folder / "prepared")
    write_tokenized(folder / "ids.pt", table)
    first, report, _ = prepared(whole("ids.pt"), folder / "prepared")
    assert [prompt[:3] for prompt in contents(first)] == [prompt[:3] for prompt in contents(table)]
    assert first[4].source == "ids.pt, row 5" and report.rows_read == 20
    prepared(whole("ids.pt"), folder / "prepared")
    assert len(read) == 1
    write_tokenized(folder / "ids.pt", [table[k] for k in range(3)])
    assert len(prepared(whole("ids.pt"), folder / "prepared")[0]) == 3 and len(read) == 2


@pytest.mark.parametrize(
    "entry", [{"path": "ids.pt", "test_path": "rows.jsonl"}, {"path": "rows.jsonl", "test_path": "ids.pt"}]
)
def test_a_file_of_token_ids_is_all_of_its_entry(folder, entry):
    (folder / "ids.pt").touch()
    with pytest.raises(UserError, match=rf"datasets: {entry['path']}: test_path does not go with a file of token ids"):
        read_entry(entry)


# ---- loaders whose content is not known in advance ------------------------------------------------------------------------

LOADER = """
import json
from pathlib import Path
from preference_datasets import register

@register("mine")
def get_mine(split, silent=False, cache_dir=None, language="en"):
    for row in json.loads(Path("content.json").read_text()):
        yield f"{language}: {row}", {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"}
"""
MINE = "mine.py:mine"


@pytest.fixture
def mine(folder) -> Path:
    """A folder with a loader of the user's, which yields what content.json lists."""
    (folder / "mine.py").write_text(LOADER)
    (folder / "content.json").write_text('["x", "y", "z"]')
    return folder


def test_what_a_loader_yields_is_prepared_once_and_anew_when_it_changes(mine):
    first, _, texts = prepared(MINE, mine / "prepared")
    assert texts == 9
    again, _, texts = prepared(MINE, mine / "prepared")
    assert texts == 0 and contents(again) == contents(first)
    (mine / "content.json").write_text('["x", "y", "Z"]')
    changed, _, texts = prepared(MINE, mine / "prepared")
    assert texts == 9 and changed.fingerprint != first.fingerprint
    assert "".join(map(chr, changed[2].prompt_ids)) == "en: Z"
    # What was there before is still known.
    (mine / "content.json").write_text('["x", "y", "z"]')
    assert prepared(MINE, mine / "prepared")[2] == 0


def test_another_order_or_number_of_the_same_prompts_is_other_data(mine):
    prepared(MINE, mine / "prepared")
    for content in ('["x", "z", "y"]', '["x", "y"]', '["x", "y", "z", "z"]'):
        (mine / "content.json").write_text(content)
        assert prepared(MINE, mine / "prepared")[2] == 3 * len(json.loads(content))


def test_an_entrys_options_are_the_loaders(mine):
    prepared({"name": MINE}, mine / "prepared")
    table, _, texts = prepared({"name": MINE, "language": "de"}, mine / "prepared")
    assert texts == 9 and "".join(map(chr, table[0].prompt_ids)) == "de: x"
    assert prepared({"name": MINE, "language": "en"}, mine / "prepared")[2] == 0


def test_data_that_was_prepared_with_bad_rows_skipped_is_not_found_where_they_stop(mine):
    (mine / "content.json").write_text('["x", "the marker </s>"]')
    for _ in range(2):
        table, report, _ = prepared({"name": MINE, "on_bad_row": "skip"}, mine / "prepared")
        assert (len(table), report.num_bad_rows) == (1, 1)
        with pytest.raises(UserError, match="mine.py:mine, train prompt 2: the text contains '</s>'"):
            prepared({"name": MINE, "on_bad_row": "stop"}, mine / "prepared")


def test_a_loader_that_yields_nothing_is_an_empty_table_each_time(mine):
    (mine / "content.json").write_text("[]")
    for _ in range(2):
        table, report, texts = prepared(MINE, mine / "prepared")
        assert (len(table), report.num_prompts, texts) == (0, 0, 0)


# ---- faults on the way ----------------------------------------------------------------------------------------------------


def failing_after(count: int, error: BaseException):
    """`tokenize_records` that raises behind some prompts."""

    def tokenize(*options):
        for number, prompt in enumerate(tokenize_records(*options)):
            if number == count:
                raise error
            yield prompt

    return tokenize


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), MemoryError(), UserError("a mistake")], ids=repr)
@pytest.mark.parametrize("data", ["rows.jsonl", MINE])
def test_an_error_half_way_is_raised_as_it_is_and_leaves_nothing_behind(mine, monkeypatch, error, data):
    (mine / "content.json").write_text(json.dumps([f"text {n}" for n in range(20)]))
    monkeypatch.setattr(prompt_table, "PROMPTS_PER_BATCH", 2)
    with monkeypatch.context() as patch:
        patch.setattr(data_preparation, "tokenize_records", failing_after(9, error))
        with pytest.raises(type(error)) as raised:
            prepared(data, mine / "prepared")
        assert raised.value is error
    assert suffixes(mine / "prepared") == []
    assert len(prepared(data, mine / "prepared")[0]) >= 19
    assert suffixes(mine / "prepared") == ["arrow", "json"]


def test_a_loader_that_raises_half_way_keeps_its_error(mine):
    (mine / "mine.py").write_text(LOADER + "        if row == 'y': raise ZeroDivisionError('of the loader')\n")
    with pytest.raises(ZeroDivisionError, match="of the loader"):
        prepared(MINE, mine / "prepared")
    assert suffixes(mine / "prepared") == []


def test_a_loader_that_cannot_read_its_own_files_is_named_and_not_the_folder_of_prepared_data(mine):
    for _ in range(2):
        (mine / "content.json").unlink()
        with pytest.raises(UserError, match=r"datasets: mine\.py:mine: .*No such file or directory: 'content\.json'"):
            prepared(MINE, mine / "prepared")
        # The second time, there is data to compare with.
        (mine / "content.json").write_text('["x"]')
        prepared(MINE, mine / "prepared")


@pytest.mark.parametrize("damage", ["", "{", "{}", "[]", "null", '{"a": 1}', '{"num_prompts": 7}', "\xff"])
def test_a_damaged_report_is_prepared_anew_and_said(folder, capsys, damage):
    first, report, _ = prepared(whole(), folder / "prepared")
    [path] = (folder / "prepared").glob("*.json")
    path.write_bytes(damage.encode("latin-1"))
    table, again, texts = prepared(whole(), folder / "prepared")
    assert (contents(table), again, texts) == (contents(first), report, 60)
    said = f"rows.jsonl: {path.with_suffix('.arrow')} is damaged and prepared again"
    assert capsys.readouterr().out.count(said) == 1
    assert prepared(whole(), folder / "prepared")[2] == 0


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("tail", [b"", b"\0" * 400], ids=["cut short", "zeros at the end"])
def test_damaged_data_is_prepared_anew_and_said(folder, capsys, keep, tail):
    first, report, _ = prepared(whole(), folder / "prepared")
    [path] = (folder / "prepared").glob("*.arrow")
    content = path.read_bytes()
    # Another file, and not the one that is mapped.
    path.unlink()
    path.write_bytes(content[: int(len(content) * keep)] + tail)
    table, again, texts = prepared(whole(), folder / "prepared")
    assert (contents(table), again, texts) == (contents(first), report, 60)
    assert capsys.readouterr().out.count(f"rows.jsonl: {path} is damaged and prepared again") == 1
    assert path.read_bytes() == content


def test_data_with_the_columns_of_an_earlier_version_is_prepared_anew_and_said(folder, capsys):
    first, report, _ = prepared(whole(), folder / "prepared")
    [path] = (folder / "prepared").glob("*.arrow")
    content = path.read_bytes()
    table = pyarrow.ipc.open_file(pyarrow.BufferReader(content)).read_all().select(["number", "prompt_ids", "responses"])
    path.unlink()
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    table, again, texts = prepared(whole(), folder / "prepared")
    assert (contents(table), again, texts) == (contents(first), report, 60)
    said = f"rows.jsonl: {path} has the columns of an earlier version and is prepared again\n"
    assert capsys.readouterr().out.count(said) == 1
    assert path.read_bytes() == content


@pytest.mark.parametrize("gone", ["*.arrow", "*.json"])
def test_data_of_which_a_half_is_gone_is_prepared_anew(folder, gone):
    first, report, _ = prepared(whole(), folder / "prepared")
    [path] = (folder / "prepared").glob(gone)
    path.unlink()
    table, again, texts = prepared(whole(), folder / "prepared")
    assert (contents(table), again, texts) == (contents(first), report, 60)


def test_a_table_stays_readable_while_its_file_is_prepared_anew(folder):
    table, *_ = prepared(whole(), folder / "prepared")
    expected = contents(table)
    [path] = (folder / "prepared").glob("*.arrow")
    path.with_suffix(".json").write_text("damaged")
    before = path.stat().st_ino
    prepared(whole(), folder / "prepared")
    # Not written over, but put in its place: who has mapped the old file keeps it.
    assert path.stat().st_ino != before
    assert contents(table) == expected


def test_nothing_held_out_is_an_empty_table_that_is_remembered(folder):
    for asked in (60, 0):
        assert prepared(whole(), folder / "prepared", "train")[2] == asked
        table, report, texts = prepared(whole(), folder / "prepared", "test")
        assert (len(table), table.num_responses, table.num_examples.tolist(), texts) == (0, 0, [], 0)
        # Both splits read all rows; they are counted with the first.
        assert report == DataReport()
    # Of the held-out split a report and no data.
    assert suffixes(folder / "prepared") == ["arrow", "json", "json"]


def test_what_was_skipped_and_which_rows_were_bad_is_known_at_the_second_start_too(folder):
    odd = [
        {"prompt": "same", "chosen": "a", "rejected": "a"},
        {"prompt": 1},
        {"prompt": "end", "chosen": "</s>", "rejected": "b"},
    ]
    long = [{"prompt": "long " * 20, "chosen": "a", "rejected": "b"}]
    write(folder / "rows.jsonl", rows(3) + odd + long)
    reports = [prepared(whole(on_bad_row="skip"), folder / "prepared")[1] for _ in range(2)]
    assert reports[0] == reports[1]
    assert (reports[1].rows_read, reports[1].num_prompts, reports[1].num_bad_rows) == (7, 4, 2)
    assert (reports[1].left_out, reports[1].changed) == ({SAME_TEXT: 1}, {PROMPT_CUT: 1})
    assert reports[1].bad_rows[0].startswith("datasets: rows.jsonl, row 5: ")
    assert reports[1].lines()[0] == f"1 skipped: {SAME_TEXT}; 1 {PROMPT_CUT}; 2 bad rows skipped"


values = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=2), max_size=2)
usual_rows = st.builds(lambda n: rows(n + 1)[n], st.integers(0, 3))
any_rows = st.lists(usual_rows | st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), values)), max_size=6)


@settings(deadline=None, max_examples=60)
@given(content=any_rows, split=st.sampled_from(["train", "test"]), share=st.sampled_from([0, 0.5]))
def test_whatever_a_file_holds_the_second_start_says_the_same_as_the_first(content, split, share):
    with TemporaryDirectory() as name:
        entry = {"path": str(write(Path(name) / "rows.jsonl", content)), "on_bad_row": "skip", "held_out_share": share}
        try:
            first, report, _ = prepared(entry, Path(name) / "prepared", split)
        except UserError as error:
            with pytest.raises(UserError, match=re.escape(str(error))):
                prepared(entry, Path(name) / "prepared", split)
            return
        again, same_report, texts = prepared(entry, Path(name) / "prepared", split)
        assert (contents(again), same_report, texts) == (contents(first), report, 0)


# ---- folders that cannot be written -----------------------------------------------------------------------------------------


@contextmanager
def without_rights():
    """Be a user who may not write where only the owner may: root may everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_without_write_permission_is_one_message_that_names_it():
    with TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        write(folder / "rows.jsonl", rows(3))
        entry = read_entry(str(folder / "rows.jsonl"))
        (folder / "there").mkdir()
        for directory in (folder / "new", folder / "there"):
            for path in (folder / "there", folder):
                path.chmod(0o555)
            try:
                with without_rights(), pytest.raises(UserError) as refusal:
                    prepared(entry, directory)
            finally:
                for path in (folder, folder / "there"):
                    path.chmod(0o755)
            expected = (
                f"local_dirs: cannot write prepared data to {directory}: Permission denied. Expected a writable directory"
            )
            assert str(refusal.value).startswith(expected) and "\n" not in str(refusal.value)


def test_a_file_where_the_folder_should_be_is_one_message_that_names_it(folder):
    (folder / "file").touch()
    for directory in (folder / "file", folder / "file" / "below"):
        with pytest.raises(UserError, match=rf"local_dirs: cannot write prepared data to {directory}: "):
            prepared("rows.jsonl", directory)


def run_train(folder: Path, *overrides: str, file_size: int | None = None) -> subprocess.CompletedProcess:
    """`python train.py` in a folder; no file that it writes can be larger than `file_size`."""
    first = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_size, file_size)) if file_size else None
    return forked.run([ROOT / "train.py", *overrides, "wandb.enabled=false"], folder, first=first)


def test_a_full_disk_ends_a_run_with_one_message_that_names_the_folder_and_leaves_nothing_half_written(folder):
    write(folder / "rows.jsonl", rows(500))
    done = run_train(folder, "datasets=[rows.jsonl]", "loss=dpo", file_size=10_000)
    directory = folder / "runs" / "prepared_data"
    assert done.returncode == 2, done.stdout + done.stderr
    [message] = done.stderr.strip().splitlines()
    assert message.startswith(f"local_dirs: cannot write prepared data to {directory}: File too large.")
    assert suffixes(directory) == []
    # Nothing of the run either.
    assert list((folder / "runs").iterdir()) == [directory]


def test_a_file_in_the_place_of_the_prepared_data_ends_a_run_with_one_message(folder):
    (folder / "runs").mkdir()
    (folder / "runs" / "prepared_data").touch()
    done = run_train(folder, "datasets=[rows.jsonl]", "loss=dpo")
    assert done.returncode == 2, done.stdout + done.stderr
    [message] = done.stderr.strip().splitlines()
    assert message.startswith(f"local_dirs: cannot write prepared data to {folder / 'runs' / 'prepared_data'}: File exists.")


def fill_the_disk() -> None:
    """In a process of its own: prepare again and again, each time with room for larger files, until it works."""
    prompt_table.PROMPTS_PER_BATCH = 5
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in range(0, 100_000, 500):
        directory, message = Path(f"prepared {limit}"), None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited))
        try:
            table, *_ = prepared(whole(on_bad_row="skip"), directory)
        except UserError as error:
            message = str(error)
        # What is printed goes into a file too.
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        if message is None:
            assert len(table) == 20 and suffixes(directory) == ["arrow", "json"]
            print("done", flush=True)
            return
        assert message.startswith(f"local_dirs: cannot write prepared data to {directory}: File too large."), message
        assert suffixes(directory) == [], suffixes(directory)
        print("full", flush=True)


def test_wherever_the_disk_is_full_it_is_said_and_nothing_is_half_written(folder):
    # A row that is told of by its only field: the report is longer than the data, and so the last that does not fit.
    write(folder / "rows.jsonl", [*rows(20), {"x" * 15_000: 1}])
    done = in_a_process("fill_the_disk", folder).wait_for_end()
    assert done[:3] == ["full"] * 3 and done[-1] == "done" and set(done) == {"full", "done"}


# ---- several processes ------------------------------------------------------------------------------------------------------


class Process:
    """A function of this module in a process of its own, which runs in a folder."""

    def __init__(self, function: str, folder: Path, name: str):
        self.output = folder / f"{name}.out"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", f"from {__name__} import {function}; {function}()"]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def says(self, text: str) -> bool:
        return text in self.output.read_text()

    def wait_until(self, said: str) -> None:
        deadline = time.monotonic() + 120
        while not self.says(said):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.01)

    def wait_for_end(self, status: int = 0) -> list[str]:
        """What it has printed, line by line."""
        found = self.process.wait(timeout=120)
        lines = self.output.read_text().splitlines()
        assert found == status, lines
        return lines


@pytest.fixture
def processes():
    """Processes that are ended with the test, whatever becomes of it."""
    started = []
    yield started
    for process in started:
        process.process.kill()
        process.process.wait()


def in_a_process(function: str, folder: Path, name: str = "process") -> Process:
    return Process(function, folder, name)


def prepare_and_stop_half_way() -> None:
    """In a process of its own: prepare rows.jsonl; half-way, say so and wait until the folder has a file called go."""
    # Who starts the tests in the background of a shell has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prompt_table.PROMPTS_PER_BATCH = 2
    middle = len(Path("rows.jsonl").read_text().splitlines()) // 2

    def half_way(*options):
        for number, prompt in enumerate(tokenize_records(*options)):
            if number == middle:
                print("half-way", flush=True)
                while not Path("go").exists():
                    time.sleep(0.01)
            yield prompt

    data_preparation.tokenize_records = half_way
    table, report, _ = prepared(whole(), Path("prepared"))
    print(f"table {table.fingerprint} {contents(table)} {report}", flush=True)


HALF_WAY = "prepare_and_stop_half_way"


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_need_the_same_data_wait_for_the_one_that_prepares_it(folder, processes, count):
    processes += [in_a_process(HALF_WAY, folder, f"process {k}") for k in range(count)]
    deadline = time.monotonic() + 120
    waiting = "rows.jsonl: waiting for the process that prepares it"
    while sum(process.says("half-way") or process.says(waiting) for process in processes) < count:
        assert time.monotonic() < deadline, [process.output.read_text() for process in processes]
        time.sleep(0.01)
    # Nothing can be found yet under its name.
    assert suffixes(folder / "prepared") == ["partial"]
    (folder / "go").touch()
    outputs = sorted((process.wait_for_end() for process in processes), key=len)
    tables = {lines[-1] for lines in outputs}
    assert len(tables) == 1 and tables.pop().startswith("table ")
    assert sorted(lines[0] for lines in outputs) == ["half-way"] + [waiting] * (count - 1)
    assert suffixes(folder / "prepared") == ["arrow", "json"]
    table, _, texts = prepared(whole(), folder / "prepared")
    assert texts == 0 and f"{contents(table)}" in outputs[0][-1]


def test_a_killed_preparation_leaves_nothing_under_a_final_name_and_the_next_start_works(folder, processes):
    # So many that some have left the process before it ends.
    write(folder / "rows.jsonl", rows(300))
    processes.append(in_a_process(HALF_WAY, folder))
    processes[0].wait_until("half-way")
    processes[0].process.send_signal(signal.SIGKILL)
    processes[0].wait_for_end(-signal.SIGKILL)
    [partial] = (folder / "prepared").glob("*.partial")
    assert partial.stat().st_size > 0
    assert suffixes(folder / "prepared") == ["partial"]
    table, _, texts = prepared(whole(), folder / "prepared")
    assert (len(table), texts) == (300, 900)
    assert suffixes(folder / "prepared") == ["arrow", "json"]


def test_preparing_other_data_removes_what_a_killed_preparation_left_but_not_what_is_being_prepared(folder, processes):
    write(folder / "rows.jsonl", rows(300))
    for name in ("killed", "alive"):
        processes.append(in_a_process(HALF_WAY, folder, name))
        processes[-1].wait_until("half-way")
        if name == "killed":
            processes[-1].process.send_signal(signal.SIGKILL)
            processes[-1].wait_for_end(-signal.SIGKILL)
            left = next((folder / "prepared").glob("*.partial"))
            # Left by a preparation of something else, as far as the second process can see.
            left.rename(left.with_name("0" * 32 + ".partial"))
    assert [path.name for path in (folder / "prepared").glob("0*.partial")] == []
    write(folder / "others.jsonl", rows(5))
    prepared(read_entry({"path": str(folder / "others.jsonl"), "held_out_share": 0}), folder / "prepared")
    assert suffixes(folder / "prepared") == ["arrow", "json", "partial"]
    (folder / "go").touch()
    processes[-1].wait_for_end()
    assert suffixes(folder / "prepared") == ["arrow", "arrow", "json", "json"]


def test_who_waits_for_a_process_that_is_killed_prepares_the_data_itself(folder, processes):
    processes.append(in_a_process(HALF_WAY, folder, "first"))
    processes[0].wait_until("half-way")
    processes.append(in_a_process(HALF_WAY, folder, "second"))
    processes[1].wait_until("waiting for the process that prepares it")
    processes[0].process.send_signal(signal.SIGKILL)
    processes[1].wait_until("half-way")
    (folder / "go").touch()
    assert processes[1].wait_for_end()[-1].startswith("table ")
    assert suffixes(folder / "prepared") == ["arrow", "json"]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_preparation_leaves_no_data_and_the_next_start_works(folder, processes, end):
    processes.append(in_a_process(HALF_WAY, folder))
    processes[0].wait_until("half-way")
    processes[0].process.send_signal(end)
    assert processes[0].process.wait(timeout=60) != 0
    # Python tidies up behind an interrupt, and is not asked at a termination.
    assert suffixes(folder / "prepared") == ([] if end == signal.SIGINT else ["partial"])
    assert len(prepared(whole(), folder / "prepared")[0]) == 20
    assert suffixes(folder / "prepared") == ["arrow", "json"]


# ---- training and held-out prompts together ---------------------------------------------------------------------------------


def conversation(number: int, end: str = "") -> dict:
    answers = {side: [{"role": "assistant", "content": f"{side} {number}"}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": f"Is it {number}?{end}"}], **answers}


def dialogue(number: int, end: str = "") -> dict:
    """The same prompt as a text, as the usual template writes it."""
    return {"prompt": f"\n\nHuman: Is it {number}?{end}\n\nAssistant:", "chosen": " good", "rejected": " bad"}


def both_splits(entries: list, directory: Path, of=PAIRS, tokenizer=None):
    """The tables of both splits as a run has them, and the reports of the training split."""
    tokenizer, entries = tokenizer or Characters(), [read_entry(entry) for entry in entries]
    train, held_out = (prepare(entries, split, tokenizer, lambda _: of, directory) for split in ("train", "test"))
    train = exclude_held_out(train, held_out, entries, directory)
    return train.table, held_out.table, train.reports


def ids_of(table) -> list[tuple[int, ...]]:
    return [tuple(prompt.prompt_ids) for prompt in table]


def test_a_prompt_is_on_the_same_side_as_a_text_and_as_a_conversation(folder):
    write(folder / "texts.jsonl", [dialogue(n) for n in range(200)])
    write(folder / "turns.jsonl", [conversation(n) for n in range(200)])
    of = replace(PAIRS, max_length=200, max_prompt_length=100)
    train, held_out, reports = both_splits(["texts.jsonl", "turns.jsonl"], folder / "prepared", of)
    assert len(train) + len(held_out) == 400 and len(held_out) > 4
    assert not set(ids_of(train)) & set(ids_of(held_out))
    # By the hash alone: nothing had to be left out for it.
    assert [report.left_out for report in reports] == [{}, {}]
    assert sorted(ids_of(held_out)[: len(held_out) // 2]) == sorted(ids_of(held_out)[len(held_out) // 2 :])


def entry_of(draw, folder: Path, place: int) -> dict:
    """An entry of some prompts in one of four forms, of which any share is held out."""
    numbers = draw(st.lists(st.integers(0, 12), max_size=9))
    forms = st.sampled_from([dialogue, conversation, lambda n: dialogue(n, " "), lambda n: conversation(n, " ")])
    content = [draw(forms)(n) for n in numbers]
    path = write(folder / f"{place}.jsonl", content or [dialogue(99)])
    share = draw(st.sampled_from([0.01, 0.2, 0.5]))
    if not draw(st.booleans()):
        return {"path": str(path), "held_out_share": share}
    table, *_ = prepared(read_entry({"path": str(path), "held_out_share": 0}), folder / "prepared")
    write_tokenized(path.with_suffix(".pt"), table)
    return {"path": str(path.with_suffix(".pt")), "held_out_share": share}


@settings(max_examples=30)
@given(
    data=st.data(), lengths=st.sampled_from([(200, 100), (40, 30), (25, 8)]), mode=st.sampled_from(["keep_start", "keep_end"])
)
def test_no_held_out_prompt_is_trained_on_whatever_forms_shares_and_cuts_are_mixed(data, lengths, mode):
    with TemporaryDirectory() as name:
        of = TokenSettings("pairs", *lengths, mode)
        entries = [entry_of(data.draw, Path(name), place) for place in range(data.draw(st.integers(1, 3)))]
        read = [read_entry(entry) for entry in entries]
        before = prepare(read, "train", Characters(), lambda _: of, Path(name) / "prepared")
        train, held_out, reports = both_splits(entries, Path(name) / "prepared", of)
        assert not set(ids_of(train)) & set(ids_of(held_out))
        assert overlap(train, held_out) is None
        # Nothing else is left out, all of it is counted, and the rest keeps its order.
        assert contents(train) == [c for c in contents(before.table) if tuple(c[0]) not in set(ids_of(held_out))]
        assert [report.num_prompts for report in reports if report.num_prompts] == [part.num_prompts for part in train.parts]
        gone = sum(report.left_out.get(HELD_OUT_ELSEWHERE, 0) for report in reports)
        assert before.table.num_examples.sum() - train.num_examples.sum() == gone


def test_of_a_few_prompts_the_one_that_is_held_out_anyway_is_excluded_from_other_sets_and_found_again(folder):
    write(folder / "few.jsonl", [dialogue(n) for n in range(5)])
    write(folder / "more.jsonl", [conversation(n) for n in range(20)])
    of = replace(PAIRS, max_length=200, max_prompt_length=100)
    entries = [{"path": "few.jsonl", "held_out_share": 1e-9}, {"path": "more.jsonl", "held_out_share": 1e-9, "weight": 2.0}]
    for _ in range(2):
        train, held_out, reports = both_splits(entries, folder / "prepared", of)
        assert (len(train), len(held_out)) == (4 + 18, 2)
        assert [report.left_out for report in reports] == [{}, {HELD_OUT_ELSEWHERE: 1}]
        assert [part.weight for part in train.parts] == [1.0, 2.0]
    # A file that is damaged is written anew.
    [path] = [folder / "prepared" / f"{train.parts[1].name}.arrow"]
    path.write_bytes(path.read_bytes()[:-100])
    assert both_splits(entries, folder / "prepared", of)[0].fingerprint == train.fingerprint


def test_what_has_a_test_file_of_its_own_stays_and_what_is_in_both_is_said_with_an_example(folder):
    write(folder / "train.jsonl", [dialogue(n) for n in range(6)])
    write(folder / "test.jsonl", [conversation(n) for n in range(4, 9)])
    of = replace(PAIRS, max_length=200, max_prompt_length=100)
    train, held_out, reports = both_splits([{"path": "train.jsonl", "test_path": "test.jsonl"}], folder / "prepared", of)
    assert (len(train), len(held_out), reports[0].left_out) == (6, 5, {})
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    assert overlap(train, held_out).line(tokenizer) == (
        "held-out prompts that are also trained on: 2 of 5, for example '\\n\\nHuman: Is it 4?\\n\\nAssistant:' "
        "(test.jsonl, row 1 = train.jsonl, row 5)"
    )


def test_a_prompt_that_a_set_holds_out_is_excluded_from_a_set_with_a_test_file_too(folder):
    write(folder / "shared.jsonl", [dialogue(n) for n in range(40)])
    write(folder / "train.jsonl", [conversation(n) for n in range(40)])
    write(folder / "test.jsonl", [conversation(n) for n in range(38, 45)])
    of = replace(PAIRS, max_length=200, max_prompt_length=100)
    entries = [{"path": "shared.jsonl", "held_out_share": 0.2}, {"path": "train.jsonl", "test_path": "test.jsonl"}]
    train, held_out, reports = both_splits(entries, folder / "prepared", of)
    by_share = set(ids_of(held_out)[: held_out.parts[0].num_prompts])
    assert len(by_share) > 2 and not set(ids_of(train)) & by_share
    assert [report.left_out for report in reports] == [{}, {HELD_OUT_ELSEWHERE: len(by_share)}]
    # What only the test file holds out stays, and is said.
    assert 0 < overlap(train, held_out).count <= 2


VALUED = """
from preference_datasets import register

@register("valued")
def get_valued(split, silent=False, cache_dir=None):
    for n in range(3 if split == "train" else 1):
        yield f"{split} {n}", {
            "responses": [f"a{n}", f"b{n}", f"c{n}"], "pairs": [(1, 0), (2, 0)], "sft_target": f"b{n}",
            "scores": [0, 2.5, 7], "labels": [False, None, True], "weights": [1, 2], "margins": [3, 4] if n else [0.5, 1],
        }
"""


def texts_of(table) -> list[list[str]]:
    """The responses of each prompt, without their ends."""
    return [["".join(map(chr, response[:-1])) for response in prompt.responses] for prompt in table]


@pytest.mark.parametrize(
    ("of", "responses", "first"),
    [
        ("targets", ["b0"], {"examples": []}),
        ("pairs", ["a0", "b0", "c0"], {"examples": [(1, 0), (2, 0)], "weights": [1.0, 2.0]}),
        ("margins", ["a0", "b0", "c0"], {"examples": [(1, 0), (2, 0)], "weights": [1.0, 2.0], "margins": [0.5, 1.0]}),
        ("rankings", ["a0", "b0", "c0"], {"examples": [(2, 1, 0)]}),
        # The first prompt takes the responses of the second.
        ("labels", ["a0", "c0", "a1", "c1"], {"examples": [(0, 2), (1, 3)], "labels": [0.0, 1.0]}),
    ],
)
def test_each_kind_of_loss_finds_its_examples_in_the_records_of_a_loader(folder, of, responses, first):
    (folder / "valued.py").write_text(VALUED)
    settings = replace(PAIRS, margins="required") if of == "margins" else replace(PAIRS, examples=of)
    table, report, _ = prepared("valued.py:valued", folder / "prepared", of=settings)
    assert texts_of(table)[0] == responses
    found = table[0]
    assert {name: getattr(found, name) for name in ("examples", "weights", "margins", "labels")} == {
        "weights": None, "margins": None, "labels": None,
    } | first  # fmt: skip
    assert not report.columns_not_read
    # Found again as it was written.
    again, _, texts = prepared("valued.py:valued", folder / "prepared", of=settings)
    assert (list(again), texts) == (list(table), 0)
    held_out, counted, _ = prepared("valued.py:valued", folder / "prepared", "test", of=settings)
    if of == "labels":
        assert (len(held_out), counted.left_out[ONLY_PROMPT]) == (0, 2)
    else:
        assert len(held_out) == 1


def test_scores_of_a_loader_change_only_the_data_of_losses_that_read_them(folder):
    (folder / "valued.py").write_text(VALUED)
    (folder / "other.py").write_text(VALUED.replace("7]", "8]").replace("[3, 4]", "[3, 5]"))
    for of, is_same in (
        (PAIRS, True),
        (replace(PAIRS, margins="required"), False),
        (replace(PAIRS, examples="rankings"), True),
    ):
        tables = [prepared(f"{name}.py:valued", folder / "prepared", of=of)[0] for name in ("valued", "other")]
        assert (tables[0].fingerprint == tables[1].fingerprint) is is_same


def test_the_loss_of_reward_models_sees_the_column_of_margins_and_others_do_not(folder, compose):
    import torch

    from preference_training.batching.packing import iterate_examples, pack_examples
    from preference_training.training.preparation import token_settings

    write(folder / "margins.jsonl", [row | {"by": margin} for row, margin in zip(rows(3), (2.0, 0.0, 0.5), strict=True)])
    entry = whole("margins.jsonl", margin="by", prompt="prompt", chosen="chosen", rejected="rejected")
    found = {}
    for name in ("reward", "dpo"):
        loss = build_loss(name, **({} if name == "reward" else {"beta": 0.1}))
        of = token_settings(compose(f"loss={name}"), loss)(read_entry(entry))
        found[name] = pack_examples(list(iterate_examples(prepared(entry, folder / "prepared", of=of)[0]))).examples
    assert found["dpo"].margins is None and found["reward"].margins.tolist() == [2.0, 0.0, 0.5]
    # Equal values: the loss is -ln sigmoid(-margin).
    losses = build_loss("reward")(torch.zeros(6), None, found["reward"]).losses
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(margin)) for margin in (2.0, 0.0, 0.5)])


def test_pairs_without_any_margin_are_counted_for_a_loss_that_needs_them(folder):
    table, report, _ = prepared(whole(), folder / "prepared", of=replace(PAIRS, margins="required"))
    assert (len(table), report.left_out) == (0, {NO_MARGIN: 20})


def test_prompts_of_several_files_are_counted_and_those_of_files_prepared_before_rows_were_known_too(folder):
    (folder / "several").mkdir()
    for name in "ab":
        write(folder / "several" / f"{name}.jsonl", rows(2))
    several, *_ = prepared({"path": "several/", "held_out_share": 0}, folder / "prepared")
    assert several[1].source == "several/, train prompt 2"
    write(folder / "skips.jsonl", [{"prompt": "x"}, *rows(2)])
    entry = {"path": "skips.jsonl", "held_out_share": 0, "on_bad_row": "skip"}
    assert prepared(entry, folder / "prepared")[0][1].source == "skips.jsonl, row 3"
    for side in (folder / "prepared").glob("*.json"):
        side.write_text(json.dumps({key: value for key, value in json.loads(side.read_text()).items() if key != "by_row"}))
    assert prepared(entry, folder / "prepared")[0][1].source == "skips.jsonl, train prompt 3"


def test_rows_that_were_prepared_without_their_context_are_prepared_again(folder):
    asked = [{"question": f"q {n}", "answer": "a"} for n in range(3)]
    write(folder / "without.jsonl", asked)
    write(folder / "with.jsonl", [row | {"context": "c"} for row in asked])
    without, joined = (
        read_entry(f"{name}.jsonl").user_data.found_map("train", None).found_keys for name in ("without", "with")
    )
    # Both are in the name of what is prepared.
    assert without == {"response": "answer", "prompt": "question"}
    assert joined == without | {"joined": "context"}


def test_a_run_says_which_held_out_prompts_it_trains_on(folder, compose, capsys):
    from preference_training.data.entries import read_entries
    from preference_training.modeling.tokenizer import byte_level_tokenizer
    from preference_training.training import preparation

    write(folder / "test.jsonl", rows(3))
    config = compose("datasets=[{path: rows.jsonl, test_path: test.jsonl}]", "loss=dpo", f"local_dirs=[{folder}]")
    splits = preparation.prepare_data(config, read_entries(config), byte_level_tokenizer(), build_loss("dpo"))
    assert (
        "held-out prompts that are also trained on: 3 of 3, for example 'question 0' (test.jsonl, row 1 = rows"
        in capsys.readouterr().out
    )
    assert splits[1].table.first_row == splits[0].table.num_responses == 40


# ---- what identifies data -------------------------------------------------------------------------------------------------


def test_a_comment_in_a_file_of_the_users_is_not_other_data_and_other_records_are(mine):
    first, *_ = prepared(MINE, mine / "prepared")
    forget_user_files()
    (mine / "mine.py").write_text(LOADER.replace("    for row", "    # In the order of the file.\n    for row"))
    again, _, texts = prepared(MINE, mine / "prepared")
    assert texts == 0 and again.fingerprint == first.fingerprint
    forget_user_files()
    (mine / "mine.py").write_text(LOADER.replace('"b"', '"c"'))
    assert prepared(MINE, mine / "prepared")[2] == 9


def forget_user_files() -> None:
    """As in a new process."""
    from preference_training.data import registry

    registry._run_user_file.cache_clear()


HUB_LOADER = """
from preference_datasets import HubSet, hub_set

@hub_set("mine", HubSet("someone/mine", ("text",), test="test"), "conversations")
def mine_records(rows, report):
    for _, row in rows:
        yield row["text"], {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"}
"""


def test_a_hub_loader_of_the_users_is_known_by_what_it_gives_and_not_by_its_rows_alone(folder):
    (folder / "hub").mkdir()
    for split in ("train", "test"):
        write(folder / "hub" / f"{split}.jsonl", [{"text": f"{split} {n}"} for n in range(3)])
    (folder / "mine.py").write_text(HUB_LOADER)
    entry, cache = {"name": MINE, "data_dir": "hub"}, {"cache_dir": str(folder / "cache")}
    assert prepared(entry, folder / "prepared", **cache)[2] == 9
    assert prepared(entry, folder / "prepared", **cache)[2] == 0
    forget_user_files()
    (folder / "mine.py").write_text(HUB_LOADER.replace('["a", "b"]', '["a", "c"]'))
    assert prepared(entry, folder / "prepared", **cache)[2] == 9


def test_a_map_of_fields_is_named_the_same_when_fields_are_added_that_it_does_not_use(monkeypatch):
    from dataclasses import make_dataclass

    from preference_training.data.rows.field_maps import FieldMap
    from preference_training.data.sources import user_data

    usual, larger = FieldMap(chosen="good"), make_dataclass("Larger", [("extra", str, "no")], bases=(FieldMap,), frozen=True)
    known = user_data.field_map_text(usual)
    # As the first version wrote it: its names of files hold this text.
    assert known == (
        "FieldMap(prompt='prompt', chosen='good', rejected='rejected', system=None, response=None, score=None, responses=None, "
        "scores=None, ranks=None, implicit_prompt=False, where={}, top_k=None)"
    )
    monkeypatch.setattr(user_data, "FieldMap", larger)
    assert user_data.field_map_text(larger(chosen="good")) == known
    assert user_data.field_map_text(larger(chosen="good", extra="yes")) == f"{known[:-1]}, extra='yes')"


def test_pairs_of_the_same_ids_are_trained_on_in_data_of_the_first_version_alone_and_counted(folder):
    write(
        folder / "cut.jsonl", [{"prompt": "p" * 40, "chosen": f"{'long' * 20} {n}", "rejected": "long" * 20} for n in range(4)]
    )
    old, report, _ = prepared(whole("cut.jsonl"), folder / "prepared", of=replace(PAIRS, version=1))
    assert (count_identical_pairs(old), report.left_out) == (4, {})
    new, report, _ = prepared(whole("cut.jsonl"), folder / "prepared")
    assert (len(new), report.left_out) == (0, {SAME_IDS: 4})
