"""Files are replaced whole or not at all, and nothing half-written is left; equal content has equal hashes."""

import os

import pytest
import xxhash
from filelock import FileLock

from preference_training.core import files
from preference_training.core.files import (
    atomic_directory,
    atomic_file,
    atomic_path,
    hash_file,
    is_locked,
    partial_path,
    write_atomically,
)
from preference_training.core.values import hash_values


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_reader_finds_the_old_file_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "a").write_text("old")
    with atomic_file(tmp_path / "a") as file:
        file.write("new")
        file.flush()
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", [atomic_file, atomic_path, partial_path])
def test_what_goes_wrong_while_a_file_is_written_leaves_the_old_one_and_nothing_beside_it(kind, tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), kind(tmp_path / "a") as opened:
        (opened.write if kind is atomic_file else opened.write_text)("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_file_that_a_full_disk_refuses_only_at_the_end_is_not_renamed(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a.partial").symlink_to("/dev/full")
    # Few enough bytes to be refused when the file is closed.
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_durable_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda _: done.append(("sync", names(tmp_path))))
    usual = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: done.append("replace") or usual(*paths))
    with atomic_file(tmp_path / "a", "wb", durable=True) as file:
        file.write(b"content")
    assert done == [("sync", ["a.partial"]), "replace"]


def test_processes_that_write_the_same_file_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    with atomic_file(tmp_path / "a", concurrent=True) as mine:
        mine.write("mine")
        monkeypatch.setattr(files.os, "getpid", lambda: 1)
        write_atomically(tmp_path / "a", "theirs", concurrent=True)
        assert (tmp_path / "a").read_text() == "theirs"
    assert (tmp_path / "a").read_text() == "mine" and names(tmp_path) == ["a"]


def test_text_is_utf_8_and_half_a_surrogate_pair_a_question_mark(tmp_path):
    write_atomically(tmp_path / "a", "é\ud800")
    assert (tmp_path / "a").read_bytes() == "é?".encode()


def test_a_directory_is_there_when_it_is_complete_and_not_at_all_where_anything_goes_wrong(tmp_path):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "left by a kill").touch()
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "a") as partial:
        (partial / "b").touch()
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with atomic_directory(tmp_path / "a") as partial:
        (partial / "b").touch()
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["b"]


def test_a_hash_is_of_content_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert hash_file(tmp_path / "a") == xxhash.xxh3_128_hexdigest(b"content")
    assert hash_values({"a": 1, "b": [None]}) == hash_values({"b": [None], "a": 1})
    assert hash_values({"a": 1}) == xxhash.xxh3_128_hexdigest(b'{"a": 1}')
    assert hash_values({"a": 1}) != hash_values({"a": 1.0})
    with pytest.raises(TypeError):
        hash_values(tmp_path)
    assert hash_values(tmp_path, default=str) == hash_values(str(tmp_path))


def test_a_lock_is_looked_at_without_a_trace_or_an_error(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    assert not is_locked(path) and not path.exists()
    with FileLock(path):
        assert is_locked(path)
    assert path.touch() or not is_locked(path), "a killed process leaves it behind"

    def refuse(*_, **__):
        raise PermissionError("not your file")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert not is_locked(path)
