"""What `python train.py --help` prints, and what the shell completes."""

import os
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from preference_training.configuration.composition import CONFIG_DIR, GROUPS, OPTIONAL_GROUPS, compose_overrides, known_keys
from tests.support.files import ROOT

HELP = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "hydra" / "help" / "train.yaml"))["template"]
KEYS = re.findall(r"^  \+?([a-z_.]+)=", HELP, re.M)


def train(*arguments, **environment):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_help_describes_some_twenty_keys_each_in_a_line():
    assert 18 <= len(KEYS) <= 25
    assert all(key in known_keys() or key in (*GROUPS, *OPTIONAL_GROUPS) for key in KEYS)
    assert max(map(len, HELP.splitlines())) <= 128


@pytest.mark.parametrize("line", re.findall(r"^  (?:python train.py )?((?:\+?[a-z_.]+=[\w./-]+ ?)+)(?= {2}|$)", HELP, re.M))
def test_every_example_of_the_help_composes(line):
    words = [word for word in line.split() if word != "model=NAME" and "resume" not in word]
    compose_overrides(*words)


def test_help_is_printed_and_hydras_own_stays():
    said = train("--help")
    assert said.strip().startswith("Fine-tune a language model")
    assert "--hydra-help" in said
    assert "Hydra" in train("--hydra-help").splitlines()[0]


def test_the_shell_completes_keys_groups_and_presets():
    assert "complete -o nospace" in train("-sc", "install=bash")
    for typed, completed in (
        ("batch_s", "batch_size="),
        ("loss=dpo_", "loss=dpo_norm"),
        ("model=Qwen/Qwen3-0.6B model=smollm2-135", "model=smollm2-135m"),
        ("adapter=q", "adapter=qlora"),
    ):
        assert train("-sc", "query=bash", COMP_LINE=f"python train.py {typed}").split() == [completed]
