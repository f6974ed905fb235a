"""What loops of tests start from."""

import shutil

import pytest

from tests.rounds import loops


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    """A folder with the model that loops start from, prompts and a judge."""
    folder = tmp_path_factory.mktemp("first")
    loops.make_model(folder)
    loops.make_prompts(folder)
    return folder


@pytest.fixture
def folder(first, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    shutil.copytree(first, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
