"""What several test modules share: golden numbers, tiny models, and a composed configuration."""

import json
import os

import pytest
from hypothesis import settings

import preference_datasets  # noqa: F401  registers the named data sets, whichever test comes first
from tests.support.files import CONFIG_DIR, GOLDEN

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models here are so small that a second thread costs more than it brings, above all beside another process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("here", deadline=None)
settings.load_profile("here")


@pytest.fixture(scope="session")
def golden():
    """Read a golden file by name: `golden("losses.json")`."""
    return lambda name: json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="session")
def tokenizer():
    """The golden tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture
def forked_workers(monkeypatch):
    """`launch` forks its workers, which then need not import what all of them import. Runs of the command line spawn theirs."""
    from preference_training.distributed import launching
    from tests.support import forked

    forked.start_server()
    config = launching.LaunchConfig
    monkeypatch.setattr(launching, "LaunchConfig", lambda **given: config(**given | {"start_method": "forkserver"}))


@pytest.fixture(scope="session")
def compose():
    """Compose the project's configuration from overrides, as the command line does."""
    from hydra import compose, initialize_config_dir

    import train  # noqa: F401  registers the resolver that the configuration uses

    def composed(*overrides: str):
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return compose("config", overrides=list(overrides))

    return composed
