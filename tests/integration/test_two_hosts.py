"""How `scripts/two_hosts.py` compares two runs; what it proves with that needs namespaces, and is a test of its own."""

import json
import sys
from math import inf
from pathlib import Path

import pytest
import torch

from tests.support.files import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from two_hosts import TOLERANCE, compare_metrics, compare_weights, same


def metrics(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_largest_difference_of_each_metric_is_found_and_speed_is_left_out(tmp_path):
    one = metrics(tmp_path / "one", {"loss": 2.0, "examples_per_second": 1}, {"loss": 0.001})
    other = metrics(tmp_path / "other", {"loss": 4.0, "examples_per_second": 9}, {"loss": 0.002})
    # (4 - 2) / 4, and a difference of 0.001 as a share of 0.1, since small numbers count as that.
    assert compare_metrics(one, other) == {"loss": pytest.approx(0.5)}
    assert compare_metrics(metrics(one, {"loss": 0.001}), metrics(other, {"loss": 0.002})) == {"loss": pytest.approx(0.01)}


@pytest.mark.parametrize("rows", [[{"loss": 1}], [{"loss": 1}, {"lost": 1}], [{"loss": 1}] * 3], ids=["few", "other", "many"])
def test_other_lines_or_other_metrics_are_refused(tmp_path, rows):
    with pytest.raises(ValueError):
        compare_metrics(metrics(tmp_path / "one", *rows), metrics(tmp_path / "other", {"loss": 1}, {"loss": 1}))


def test_weights_are_compared_by_name(tmp_path):
    paths = tmp_path / "one", tmp_path / "other"
    for path, value in zip(paths, (1.0, 1.25), strict=True):
        torch.save({"state": {"a": torch.tensor([1.0, value]), "b": torch.zeros(2)}}, path)
    assert compare_weights(*paths) == {"a": pytest.approx(0.2), "b": 0}
    torch.save({"state": {"a": torch.ones(2)}}, paths[0])
    with pytest.raises(ValueError):
        compare_weights(*paths)


def test_a_number_that_is_none_is_a_difference(tmp_path):
    none = float("nan")
    assert compare_metrics(metrics(tmp_path / "one", {"a": none}), metrics(tmp_path / "other", {"a": 1.0})) == {"a": inf}
    for path, value in ((tmp_path / "1.pt", 1.0), (tmp_path / "2.pt", none)):
        torch.save({"state": {"a": torch.tensor([1.0, value])}}, path)
    assert compare_weights(tmp_path / "1.pt", tmp_path / "2.pt") == {"a": inf}


def test_two_runs_are_the_same_up_to_the_tolerance(capsys):
    assert same("runs", {"a": TOLERANCE, "b": 0.0})
    assert not same("runs", {"a": 0.0, "b": 2 * TOLERANCE})
    assert "NOT THE SAME: runs: 2 compared, at most 2.0e-04 (b)" in capsys.readouterr().out
