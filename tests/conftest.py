"""What several test modules share: golden numbers, tiny models, and a composed configuration."""

import functools
import gc
import json
import os
import pickle
import signal
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from omegaconf import OmegaConf

import train  # noqa: F401  registers the named data sets, and the resolver that the configuration uses
from tests.support.files import GOLDEN

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a shell pytest ignores Ctrl-C, and so would the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models here are so small that a second thread costs more than it brings, above all beside another process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says how busy the machine is, and nothing of the code. Each run draws others.
settings.register_profile("here", deadline=None, max_examples=50)
settings.load_profile("here")

# What the imports have made stays: a collection need not go through it again.
gc.freeze()

_remembered: dict[tuple, bytes] = {}


def _once(make, key):
    """What `make` makes, of a key that was asked for before from memory: composing takes longer than most tests."""
    if key not in _remembered:
        _remembered[key] = pickle.dumps(make())
    return pickle.loads(_remembered[key])


def _compose(config_name, overrides, compose=hydra.compose, **options):
    places = [each.path for each in GlobalHydra.instance().config_loader().get_search_path().get_path()]
    make = functools.partial(compose, config_name, overrides, **options)
    # A test's own presets and models may change.
    has_own = any(text.startswith("hydra.searchpath=") or (text.startswith("model=") and "/" in text) for text in overrides)
    return make() if has_own else _once(make, ("compose", config_name, *overrides, *options.items(), *places))


def _load(file, load=OmegaConf.load):
    make = functools.partial(load, file)
    name = getattr(file, "name", file)
    if not isinstance(name, str | Path) or not Path(name).is_file():
        return make()
    found = Path(name).stat()
    return _once(make, ("load", str(name), found.st_mtime_ns, found.st_size))


OmegaConf.load = _load
hydra.compose = _compose


@pytest.fixture(scope="session")
def golden():
    """Read a golden file by name: `golden("losses.json")`."""
    return lambda name: json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="session")
def tokenizer():
    """The golden tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tokenizer):
    """A directory with a classifier of one output, whose weights are those of a golden model and a drawn head."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    path = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(GOLDEN / "llama", num_labels=1)
    AutoModelForSequenceClassification.from_pretrained(GOLDEN / "llama", config=config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


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
    """The project's configuration from overrides, composed and validated as the command line's is."""
    from preference_training.configuration.validation import configured

    return configured


@pytest.fixture(scope="session")
def plain(compose):
    """What overrides compose to, in plain values: not validated, so that paths need not exist."""
    from preference_training.configuration.composition import compose_overrides

    return lambda *overrides: OmegaConf.to_container(compose_overrides(*overrides)[0], resolve=True)
