"""`make demo`'s program, whole: what SFT and DPO achieve on the embedded data, by the data's own ground truth."""

import json
import subprocess
import sys

import pytest

from tests.support.files import ROOT


@pytest.mark.long
def test_the_demo_teaches_both_kinds_of_answer_and_then_the_preferred_one(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["SFT"]["SFT loss (nats per response)"] < 0.1 * results["untrained"]["SFT loss (nats per response)"]
    assert results["SFT"]["sampled responses of the preferred kind"] < 0.6
    assert results["SFT"]["reward accuracy"] == 0.5 and results["SFT"]["reward margin"] == 0
    assert results["DPO"]["reward accuracy"] >= 0.95
    assert results["DPO"]["sampled responses of the preferred kind"] >= 0.9
    for told in ("384 held-out prompts", "reward margin", "sft/LATEST", "Output in"):
        assert told in done.stdout
