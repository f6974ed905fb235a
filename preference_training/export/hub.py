"""A directory goes to the hub, as a model's repository. The token is the environment's, or that of the hub's own login."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preference_training.core.errors import UserError, first_line
from preference_training.core.secrets import without_secrets

# Weights of an earlier upload, which would be loaded in place of these.
STALE = ["*.safetensors", "*.safetensors.index.json"]


def reserve(repository: str, private: bool) -> None:
    """Make the repository ORGANISATION/NAME, or find it, before anything expensive is done for it.

    Raises UserError where that is not allowed, and where one is there that everybody sees although it is to be private.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("--push: no token for the hub. Set HF_TOKEN in the environment, or log in once with `hf auth login`.")
    with _refusals(repository):
        api = HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        seen_by_all = private and not api.repo_info(repository).private
    if seen_by_all:
        raise UserError(
            f"--private: {repository} exists already, and is public. Make it private on the hub, or choose another name."
        )


def upload(directory: Path, repository: str) -> str:
    """Upload a directory's files in one commit, in place of weights that are there; returns the repository's address."""
    from huggingface_hub import HfApi

    with _refusals(repository, f" The directory {directory} is complete; `hf upload` takes it up."):
        api = HfApi()
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload model", delete_patterns=STALE)
        return f"{api.endpoint}/{repository}"


@contextmanager
def _refusals(repository: str, advice: str = "") -> Iterator[None]:
    """Inside, what the hub, or the way to it, refuses is a UserError."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, ValueError, OSError) as error:
        raise UserError(
            f"--push: {repository}: {without_secrets(first_line(error))}. Expected ORGANISATION/NAME of a place that the token "
            f"may write to, and a network.{advice}"
        ) from error
