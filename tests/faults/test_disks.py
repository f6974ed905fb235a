"""Disks that are full, and directories that cannot be written to: one line or one message, and what was good stays."""

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from preference_training.checkpointing.checkpoint import list_checkpoints
from preference_training.configuration import run_dirs
from preference_training.core.errors import UserError
from tests.faults.processes import Run, assert_same_weights, assert_whole, rows_of, train_here


@contextmanager
def small_files(_folder: Path):
    """Inside, no file of this process can grow beyond a megabyte; any user may forbid himself that."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@contextmanager
def full_disk(folder: Path):
    """Inside, the folder has room for two more megabytes: a file system in memory, which root may mount."""
    kept = folder.with_name("kept")
    folder.rename(kept)
    folder.mkdir()
    used = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={used + 2**21}", "tmpfs", folder], check=True)
    shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(kept)
        shutil.copytree(folder, kept, symlinks=True)
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()
        kept.rename(folder)


def may_mount() -> bool:
    """Whether this user may mount; whoever may not has the other fault alone."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


# Whether the want of room is seen before anything is written. Files that may not grow are nothing that one can see.
FAULTS = {"small files": (small_files, False)}
if may_mount():
    FAULTS |= {"full disk": (full_disk, True), "full disk noticed while writing": (full_disk, False)}


@pytest.fixture
def go(compose, tmp_path):
    """Train in this process: `go("n_examples=64")`."""
    return partial(train_here, compose, tmp_path)


@pytest.mark.parametrize("name", FAULTS)
def test_a_full_disk_costs_checkpoints_and_a_run_goes_on_when_there_is_room(name, go, tmp_path, capfd, monkeypatch):
    fault, known = FAULTS[name]
    go("n_examples=128", "exp_name=other", name="undisturbed")
    go("n_examples=64")
    if not known:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
    capfd.readouterr()
    with (
        fault(tmp_path / "run"),
        pytest.raises(UserError, match="the last checkpoint of .* could not be written. Make room, then"),
    ):
        go("n_examples=128")
    said = [line for line in capfd.readouterr().out.splitlines() if "could not be written" in line]
    assert [line.split()[1] for line in said] == ["step-96", "step-128"]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-64", "step-32"]
    assert not list((tmp_path / "run").glob("*.partial"))
    assert_whole(tmp_path / "run")
    go("n_examples=128")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "undisturbed")
    assert_same_weights(tmp_path / "run" / "LATEST", tmp_path / "undisturbed" / "LATEST")


def in_the_way(folder: Path) -> None:
    (folder / "blocked").touch()


def another_file_system(folder: Path) -> None:
    # Nobody, root neither, can make a directory there.
    (folder / "blocked").symlink_to("/proc/self")


@pytest.mark.parametrize("block", [in_the_way, another_file_system])
def test_a_run_directory_that_cannot_be_made_is_one_message_and_status_2(block, tmp_path):
    block(tmp_path)
    run = Run(tmp_path, "local_run_dir=blocked/run")
    assert run.wait() == 2
    [message] = run.lines
    assert message.startswith("local_run_dir: ") and " cannot be written to: " in message and "set local_dirs" in message


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", ".lock"])
def test_a_run_directory_that_cannot_be_written_to_is_one_message(name, go, tmp_path):
    # A directory in the way: permissions would not bind root.
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="local_run_dir: .*/run cannot be written to: "):
        go("n_examples=32")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "config.yaml", "metrics.jsonl"}


def test_an_empty_directory_that_cannot_be_removed_hides_no_message(tmp_path, monkeypatch):
    def refuse(_path):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(Path, "rmdir", refuse)
    run_dirs.remove_empty(tmp_path)
    assert tmp_path.is_dir()
