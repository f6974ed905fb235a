"""Where files lie: compressed, in the home directory, in storage behind an address; and what is told where that fails."""

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import fsspec
import pyarrow
import pytest

from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.files import is_data_file, read_rows
from preference_training.data.records.report import DataReport
from preference_training.data.sources.storage import content_hash

ROWS = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": "bad"} for n in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstandard(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


COMPRESSED = {".gz": gzip.compress, ".zst": zstandard, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture
def memory():
    """fsspec's file system in memory, as the storage of a cloud."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def rows_of(path: str | Path, report: DataReport | None = None) -> list[dict]:
    return [row for _, row in read_rows(path, report)]


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".json", ".csv", ".tsv"])
def test_texts_are_read_through_their_compression(tmp_path, suffix, ending):
    tab = "\t" if ending == ".tsv" else ","
    table = "".join(tab.join(row) + "\n" for row in [ROWS[0].keys(), *(row.values() for row in ROWS)]).encode()
    content = LINES if ending.lower() == ".jsonl" else json.dumps(ROWS).encode() if ending == ".json" else table
    path = tmp_path / f"rows{ending}{suffix.upper() if ending.isupper() else suffix}"
    path.write_bytes(COMPRESSED[suffix](content))
    assert is_data_file(path.name)
    assert rows_of(path) == ROWS


def test_several_frames_of_zstandard_are_read_as_one(tmp_path):
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard(LINES[: len(LINES) // 2]) + zstandard(LINES[len(LINES) // 2 :]))
    assert rows_of(tmp_path / "rows.jsonl.zst") == ROWS


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_compressed_file_that_was_cut_short_or_is_none_is_refused(tmp_path, suffix, share):
    content = COMPRESSED[suffix](LINES * 20)
    path = tmp_path / f"rows.jsonl{suffix}"
    for damaged in (content[: int(len(content) * share)], LINES):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^datasets: {path}: cannot be read: "):
            rows_of(path)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    (tmp_path / "test.jsonl").write_bytes(LINES[:100])
    entry = read_entry({"path": "~/rows.jsonl", "test_path": "~/test.jsonl"})
    assert len(list(load_records(entry, "train"))) == 30
    assert entry.name == str(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=rf"datasets: {tmp_path}/missing\.jsonl: no such file"):
        read_entry("~/missing.jsonl")


def test_files_folders_and_patterns_at_an_address_are_read_as_local_ones_are(memory):
    memory.pipe("/bucket/train/part-0.jsonl", b"".join(LINES.splitlines(True)[:10]))
    memory.pipe("/bucket/train/part-1.jsonl.gz", gzip.compress(b"".join(LINES.splitlines(True)[10:])))
    memory.pipe("/bucket/test.jsonl", LINES.splitlines(True)[0])
    for path in ("memory://bucket/train/*.jsonl*", "memory://bucket/train", "memory://bucket/train/"):
        entry = read_entry({"path": path, "test_path": "memory://bucket/test.jsonl"})
        records = list(load_records(entry, "train"))
        assert [record.prompt for record in records] == [row["prompt"] for row in ROWS]
        assert [record.prompt for record in load_records(entry, "test")] == ["q0"]
    assert rows_of("memory://bucket/test.jsonl") == ROWS[:1]


def test_a_file_at_an_address_is_identified_by_what_storage_says_of_it(memory):
    memory.pipe("/bucket/rows.jsonl", LINES)
    first = content_hash("memory://bucket/rows.jsonl")
    assert content_hash("memory://bucket/rows.jsonl") == first
    memory.pipe("/bucket/rows.jsonl", LINES[:50])
    assert content_hash("memory://bucket/rows.jsonl") != first


def test_an_invalid_row_at_an_address_is_named_with_address_and_number(memory):
    memory.pipe("/bucket/rows.jsonl", LINES + b"{\n")
    with pytest.raises(UserError, match=r"^datasets: memory://bucket/rows\.jsonl, row 31: not JSON"):
        rows_of("memory://bucket/rows.jsonl")


def test_what_storage_does_not_have_is_refused_with_its_address(memory):
    entry = read_entry("memory://bucket/missing.jsonl")
    with pytest.raises(UserError, match=r"^datasets: memory://bucket/missing\.jsonl: cannot be read: "):
        list(load_records(entry, "train"))
    with pytest.raises(UserError, match=r"^datasets: memory://bucket/\*\.jsonl: no data file matches\."):
        list(load_records(read_entry("memory://bucket/*.jsonl"), "train"))


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
@pytest.mark.parametrize("path", ["{}://bucket/rows.jsonl", "{}://bucket/folder", "{}://bucket/*.jsonl"])
def test_a_missing_package_of_storage_is_one_message_before_anything_is_read(monkeypatch, scheme, package, path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as refused:
        read_entry(path.format(scheme))
    text = str(refused.value)
    assert text.startswith(f"datasets: {path.format(scheme)}: {scheme}:// needs a package that is not installed.")
    assert f"pip install {package}" in text and "requirements/cloud.txt" in text


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match=r"^datasets: s4://bucket/rows\.jsonl: Protocol not known: s4"):
        read_entry("s4://bucket/rows.jsonl")
