"""Upload of a directory to a model repository on the hub, with the token of the environment or of `hf auth login`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preference_training.core.errors import UserError, first_line
from preference_training.core.secrets import without_secrets

# Weights of an earlier upload, which could be loaded instead of the new ones.
STALE_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def reserve(repository: str, private: bool) -> None:
    """Create the repository ORGANIZATION/NAME unless it exists, before any expensive work.

    Raises UserError where that is not permitted, and where a private one is requested but a public one exists.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("--push: no hub token. Set HF_TOKEN in the environment, or log in once with `hf auth login`.")
    with _hub_errors(repository):
        api = HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(repository).private
    if is_public:
        raise UserError(f"--private: {repository} already exists and is public. Make it private, or choose another name.")


def upload(directory: Path, repository: str) -> str:
    """Upload a directory's files in one commit, replacing all weights there; returns the repository's URL."""
    from huggingface_hub import HfApi

    with _hub_errors(repository, f" The directory {directory} is complete: upload it later with `hf upload`."):
        api = HfApi()
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload model", delete_patterns=STALE_WEIGHTS
        )
        return f"{api.endpoint}/{repository}"


@contextmanager
def _hub_errors(repository: str, advice: str = "") -> Iterator[None]:
    """Turn errors of the hub and of the network into a UserError."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, ValueError, OSError) as error:
        raise UserError(
            f"--push: {repository}: {without_secrets(first_line(error))}. Expected ORGANIZATION/NAME that the token "
            f"can write to, and a network connection.{advice}"
        ) from error
