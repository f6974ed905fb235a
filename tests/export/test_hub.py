"""Refusals by the hub, and checks for it before anything is exported."""

import huggingface_hub.constants
import pytest

from preference_training.core.errors import UserError
from preference_training.export import hub
from tests.support.hub_stand_in import TOKEN, serving


@pytest.fixture
def served(monkeypatch):
    """A hub on this machine, which the library takes for the real one; the token is the environment's."""
    with serving() as there:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", there.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield there


def test_a_repository_is_private_only_on_request(served):
    hub.reserve("me/open", private=False)
    hub.reserve("me/closed", private=True)
    assert served.private == {"me/open": False, "me/closed": True}
    hub.reserve("me/closed", private=True)


def test_a_private_upload_into_a_public_repository_is_refused(served):
    hub.reserve("me/open", private=False)
    with pytest.raises(UserError, match="--private: me/open already exists and is public"):
        hub.reserve("me/open", private=True)


def test_a_hub_error_is_one_message_without_the_token(served, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("no metadata")
    hub.reserve("me/open", private=False)
    for action, told in (
        (lambda: hub.reserve("others/it", False), "--push: others/it: "),
        (lambda: hub.reserve("not a name", False), "--push: not a name: "),
        (lambda: hub.upload(tmp_path, "me/open"), "--push: me/open: Invalid metadata in README.md"),
    ):
        with pytest.raises(UserError) as refusal:
            action()
        assert str(refusal.value).startswith(told) and TOKEN not in str(refusal.value) and "\n" not in str(refusal.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="--push: me/it: .*401"):
        hub.reserve("me/it", private=False)


def test_without_a_network_the_message_says_that_the_directory_is_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="offline mode is enabled.* is complete: upload it later with `hf upload`"):
        hub.upload(tmp_path, "me/it")
