"""report.html: its content, its isolation from the network and from hostile texts, and that it can always be written."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from preference_training.configuration.saved import save_config
from preference_training.core.errors import UserError
from preference_training.data.records.report import DataReport
from preference_training.reporting.examples import Samples, last_question
from preference_training.reporting.observations import observations
from preference_training.reporting.run_record import RunRecord
from preference_training.reporting.run_report import rebuild_report, report_page
from preference_training.tracking.about import (
    code_state,
    write_about,
)
from preference_training.tracking.tracker import Tracker
from tests.support.files import ROOT

HOSTILE = '</script><script>alert(1)</script><img src="https://example.org/x">'


def step(examples: int, **more) -> dict:
    row = {"loss/train": 0.5, "rewards_train/margins": 1.0, "grad_norm": 2.0, "examples_per_second": 8.0, "memory_gib": 1.5}
    row |= {"tokens_per_second": 99.0, "mfu": 0.41}
    return row | {"counters/examples": examples, "counters/updates": examples // 4} | more


def evaluation(examples: int, **more) -> dict:
    row = {"loss/eval": 0.4, "rewards_eval/accuracies": 0.75, "rewards_eval/accuracies/low": 0.6}
    return row | {"rewards_eval/accuracies/high": 0.9, "counters/examples": examples, "counters/updates": examples // 4} | more


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(compose, tmp_path) -> Path:
    """A run with everything that a report shows; some of its texts are hostile."""
    import torch

    config = compose("loss=dpo", "loss.beta=0.3", f"exp_name={json.dumps(HOSTILE.replace('/', ''))}", "local_run_dir=x")
    save_config(config, tmp_path)
    write_rows(tmp_path / "metrics.jsonl", [evaluation(0), *(step(n) for n in range(4, 84, 4)), evaluation(80)])
    samples = [{"examples": n, "prompt": HOSTILE, "policy": f"Yes {n}.", "reference": "No."} for n in (0, 40, 80)]
    write_rows(tmp_path / "samples.jsonl", samples)
    pair = {"kind": "forgotten", "source": "toy, train prompt 5", "prompt": HOSTILE, "preferred": "good", "other": "bad"}
    write_rows(tmp_path / "flagged_pairs.jsonl", [pair | {"margins": [0.5, -0.25], "wrong_label_probability": 0.9}])
    moments = [("begins", 0), (f"warning: {HOSTILE}", 40), (f"checkpoint: {tmp_path}/step-80", 80)]
    rows = [{"time": f"2026-11-21T12:00:{n // 2:02}+01:00", "examples": n, "text": text} for text, n in moments]
    write_rows(tmp_path / "events.jsonl", rows)
    write_rows(tmp_path / "bad_batches.jsonl", [{"counters/examples": 8, "pairs": ["row 3"]}])
    report = DataReport(rows_read=100, num_prompts=90, left_out={"a text is empty": 10})
    sizes = {"train": {"examples": 80}, "held out": {"examples": 12}}
    write_about(tmp_path, ["toy"], [[report], [report]], 80, torch.device("cpu"), sizes)
    return tmp_path


def parsed(run_dir: Path) -> BeautifulSoup:
    return BeautifulSoup(page_of(run_dir), "html.parser")


def page_of(run_dir: Path) -> str:
    return report_page(RunRecord.read(run_dir))


def test_a_report_contains_everything_that_a_run_has_recorded(run_dir):
    page = parsed(run_dir)
    text = " ".join(page.get_text(" ").split())
    assert [heading.text for heading in page.find_all("h2")] == [
        "Curves", "Samples", "Held-out metrics", "Training pairs to review", "Events", "Data", "Configuration",
        "Machine and versions",
    ]  # fmt: skip
    charts = [figure.strong.text for figure in page.find_all("figure")]
    assert charts == [
        "Loss", "Reward accuracy", "Reward margin", "Gradient norm", "Speed", "Examples per second", "Use of the GPU", "Memory",
    ]  # fmt: skip
    assert "80 of 80 examples, 20 updates" in text
    assert "Reward accuracy rewards_eval/accuracies 0.75 [0.6, 0.9] 0.75 [0.6, 0.9]" in text
    assert [" ".join(number.get_text(" ").split()) for number in page.find(class_="numbers").find_all("div")] == [
        "reward accuracy 0.75 [0.6, 0.9] 95%, 12 pairs 0.75 at first", "held-out loss 0.4 12 pairs 0.4 at first",
        "tokens per second 99 median", "examples per second 8 median", "MFU 41% of the GPU's peak", "memory 1.5 GiB peak",
    ]  # fmt: skip
    assert "toy train 100 90 10 skipped: a text is empty" in text
    assert "loss.beta 0.3 0.1" in text
    assert "2026-11-21 12:00:00 0 begins 2026-11-21 12:00:20 40 warning: " in text
    assert "80 checkpoint: step-80" in text
    assert [row.find(class_="event").text.startswith("warning: ") for row in page.find_all("tr", class_="warning")] == [True]
    assert "toy, train prompt 5 margins 0.5, -0.25 wrong label 90%" in text
    assert "1 step was skipped" in page.find(class_="findings").get_text()
    assert "torch" in text and "CPU cores" in text


def test_a_report_begins_with_its_name_and_what_was_trained(run_dir):
    page = parsed(run_dir)
    assert page.title.text == page.h1.text == HOSTILE.replace("/", "")
    # It lies where it was written, and its last event is no end.
    assert page.find(class_="summary").text == "DPO (beta 0.3) on 80 pairs of toy · llama built from scratch · 40 s · at 100%"


def test_responses_before_and_after_are_side_by_side_and_their_differences_marked(run_dir):
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n"
    samples = [{"examples": n, "prompt": prompt, "policy": f"Yes it is {n}.", "reference": "Yes it is."} for n in (0, 40, 80)]
    write_rows(run_dir / "samples.jsonl", samples)
    shown = parsed(run_dir).find(id="samples").find_next("details")
    assert shown.summary.get_text(strip=True) == "Why?"
    sides = [(side.h4.text, side.p.text) for side in shown.find(class_="side-by-side").find_all("div")]
    assert sides == [
        ("reference, which is the model before training", "Yes it is."),
        ("after 80 examples", "Yes it is 80."),
    ]
    assert [mark.text for mark in shown.find_all("ins")] == ["is.", "is 80."]
    more = shown.find("details")
    assert "<|im_start|>user" in more.get_text() and "after 40 examples" in more.get_text()
    # SFT has no reference: the model before training is the policy at the first evaluation.
    write_rows(run_dir / "samples.jsonl", [{key: row[key] for key in ("examples", "prompt", "policy")} for row in samples])
    shown = parsed(run_dir).find(id="samples").find_next("details")
    assert [side.h4.text for side in shown.find(class_="side-by-side").find_all("div")] == [
        "before training",
        "after 80 examples",
    ]


def test_a_reference_that_is_another_model_is_not_shown_as_the_model_before_training():
    rows = [{"examples": 8, "prompt": "Why?", "policy": "Now.", "reference": "Then."}]
    [shown] = Samples.select(rows, "reference, another model: sft/step-64").prompts
    assert shown["columns"][0] == ("reference, another model: sft/step-64", "Then.")


@pytest.mark.parametrize(
    "prompt",
    [
        "Who?",
        "\n\nHuman: Hello.\n\nAssistant: Hi.\n\nHuman: Who?\n\nAssistant:",
        "<|im_start|>system\nBe a user.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        "<bos><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n",
        "<|system|>Be kind.<|end|><|user|>Who?<|end|><|assistant|>",
        "<s>[INST] Who? [/INST]",
        "<|start|>user<|message|>Who?<|end|><|start|>assistant",
    ],
)
def test_a_sample_is_named_by_the_last_question_of_its_prompt(prompt):
    assert last_question(prompt) == "Who?"


def test_an_unknown_metric_has_a_chart_of_its_own(run_dir):
    write_rows(run_dir / "metrics.jsonl", [step(4, surprise=1e-3), step(8, surprise=2e-3)])
    assert "surprise" in [figure.strong.text for figure in parsed(run_dir).find_all("figure")]


def test_a_report_makes_no_requests_and_runs_only_its_own_script(run_dir):
    page = parsed(run_dir)
    policy = page.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    [script] = [script for script in page.find_all("script") if script.get("type") != "application/json"]
    digest = base64.b64encode(hashlib.sha256(script.string.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    addresses = [tag[name] for tag in page.find_all() for name in ("src", "href", "action", "data") if tag.has_attr(name)]
    assert all(page.find(id=address[1:]) for address in addresses if address.startswith("#"))
    # The rest are files beside the page.
    icon, *files = [address for address in addresses if not address.startswith("#")]
    assert icon == "data:," and len(files) == 5 and all((run_dir / name).is_file() for name in files)
    assert not re.search(r"url\(|@import", page.style.string)
    assert not any(name.startswith("on") for tag in page.find_all() for name in tag.attrs)
    assert "alert(1)" in page.get_text(), "as text"


def test_a_report_contains_no_secret_of_the_environment(run_dir, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", 'Zq7"secret&key')
    samples = [{"examples": 0, "prompt": 'it is Zq7"secret&key.', "policy": "Yes."}]
    write_rows(run_dir / "samples.jsonl", samples)
    page = page_of(run_dir)
    assert "Zq7" not in BeautifulSoup(page, "html.parser").main.get_text() and "(a secret)" in page


def test_a_run_of_100_000_steps_has_a_report_below_2_mb(run_dir):
    rows = [step(n, **{"rewards_train/margins": n % 7, "logps_train/chosen": -n / 3}) for n in range(1, 100_001)]
    write_rows(run_dir / "metrics.jsonl", [*rows, *(evaluation(n) for n in range(500, 100_001, 500))])
    samples = [{"examples": n, "prompt": f"prompt {k}", "policy": "x " * 2000, "reference": "y " * 2000}
               for n in range(0, 100_000, 5000) for k in range(32)]  # fmt: skip
    write_rows(run_dir / "samples.jsonl", samples)
    assert len(page_of(run_dir).encode()) < 2e6


def test_events_are_shown_without_information_on_the_data(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    write_rows(tmp_path / "events.jsonl", [{"time": "2026-11-21T12:00:00+01:00", "examples": 0, "text": "begins"}])
    page = parsed(tmp_path)
    assert page.find(class_="event").text == "begins" and page.find(id="data") is None
    assert {link["href"] for link in page.nav.find_all("a")} == {"#events", "#configuration"}


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    text = parsed(tmp_path).get_text()
    assert "no step yet" in text and "No metrics have been logged yet." in text


FILES = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "about.json",
    "events.jsonl",
    "flagged_pairs.jsonl",
    "bad_batches.jsonl",
    "results.json",
)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.sampled_from([
                        "counters/examples", "loss/train", "loss/eval", "loss/eval/low", "prompt", "policy", "reference",
                        "examples", "time", "text",
                        "kind", "margins", "data", "machine", "code", "commit", "train", "name", "loss", "trainer",
                        "held_out", "all", "mean", "datasets",
                    ]), each, max_size=4), max_leaves=8)  # fmt: skip


@given(contents=st.dictionaries(st.sampled_from(FILES), st.binary(max_size=20) | st.lists(JSON, max_size=3).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode())))  # fmt: skip
def test_damaged_files_do_not_prevent_a_report(contents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    assert page_of(folder).startswith("<!doctype html>")


# ---- what is worth saying ---------------------------------------------------------------------------------------------------


def said(rows: list[dict], config: dict | None = None) -> str:
    return " ".join(observations(RunRecord(Path("run"), "run", config or {}, {}, rows, {})))


def test_a_falling_log_prob_with_a_growing_margin_is_reported_and_explained():
    rows = [evaluation(n, **{"logps_eval/chosen": -n / 2, "rewards_eval/margins": n / 40}) for n in (0, 40, 80)]
    assert "fell by 40 nats while the margin grew by 2:" in said(rows) and "usual" not in said(rows)
    assert said(rows).endswith("See docs/reading-the-curves.md.")
    assert "This is usual with beta 0.05." in said(rows, {"loss": {"beta": 0.05}})
    assert "fell" not in said([row | {"logps_eval/chosen": -5.0} for row in rows])


@pytest.mark.parametrize(("low", "high", "expected"), [(0.1, 0.4, False), (0.45, 0.6, True), (0.6, 0.9, False)])
def test_an_accuracy_that_may_be_chance_is_reported(low, high, expected):
    last = {
        "rewards_eval/accuracies": (low + high) / 2,
        "rewards_eval/accuracies/low": low,
        "rewards_eval/accuracies/high": high,
    }
    assert ("not distinguishable from chance" in said([step(4), evaluation(8, **last)])) is expected


def test_frequent_clipping_is_reported_where_it_changes_the_steps():
    rows = [step(n, grad_norm=norm) for n, norm in enumerate((5, 5, 5, 1))]
    assert "max_grad_norm=2.0 in 75% of the steps" in said(rows, {"max_grad_norm": 2.0, "optimizer": "SGD"})
    assert "max_grad_norm" not in said(rows, {"max_grad_norm": 10.0, "optimizer": "SGD"})
    # It divides by the size of recent gradients.
    assert "max_grad_norm" not in said(rows, {"max_grad_norm": 2.0, "optimizer": "AdamW"})


# ---- when it is written -----------------------------------------------------------------------------------------------------


def test_a_tracker_writes_the_report_on_request_and_at_the_end(tmp_path):
    written = []
    with Tracker(
        tmp_path, None, write_report=lambda: written.append((tmp_path / "metrics.jsonl").read_text().count("\n"))
    ) as t:
        t.min_interval = 3600
        t.log_step(step(4))
        t.log_step(step(8))
        t.report()
        assert written == [2], "the steps that waited are written before"
        t.log_step(step(12))
    assert written == [2, 3]
    with Tracker(tmp_path, None, write_report=lambda: written.append("again")) as t:
        t.report()
    assert written == [2, 3, "again", "again"]


def test_a_report_that_cannot_be_written_is_one_warning_and_does_not_stop_the_run(tmp_path, capsys):
    def fails():
        raise OSError(28, "No space left on device")

    with Tracker(tmp_path, None, write_report=fails) as tracker:
        tracker.report()
        tracker.log_step(step(4))
        tracker.report()
    assert capsys.readouterr().out.count("warning: report.html could not be written") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def script(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "report.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_rebuilds_the_report_and_writes_flagged_pairs(run_dir, tmp_path):
    done = script(run_dir, "--flagged", tmp_path / "flagged.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {run_dir}/report.html\n1 pairs: {tmp_path}/flagged.jsonl\n"
    assert (run_dir / "report.html").read_text() == page_of(run_dir)
    assert json.loads((tmp_path / "flagged.jsonl").read_text())["version1"] == "bad"
    write_rows(run_dir / "flagged_pairs.jsonl", [])
    done = script(run_dir, "--flagged", tmp_path / "none.jsonl")
    assert (done.returncode, done.stdout.splitlines()[1]) == (0, "none flagged: no pair's label is in question")


def test_another_directory_is_refused_with_one_message(tmp_path):
    done = script(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path}: contains no metrics.jsonl. Expected a run directory.\n"


def test_an_unwritable_report_is_refused_with_one_message(run_dir):
    (run_dir / "report.html").mkdir()
    with pytest.raises(
        UserError, match=r"cannot write .*report.html: Is a directory. Expected a writable folder with enough space."
    ):
        rebuild_report(run_dir)


def test_the_code_state_is_its_commit_or_empty_without_one(tmp_path):
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "new.py").touch()
    state = code_state(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["changed_files"] == 0
    assert code_state(tmp_path / "absent") == {}


def test_a_mixture_of_experts_has_a_section_of_its_balance(run_dir):
    assert parsed(run_dir).find(id="expert-balance") is None
    layers = {"experts/max_load/0": 1.5, "experts/max_load/1": 2.5, "experts/entropy/0": 0.9, "experts/entropy/1": 0.8}
    layers |= {"experts/dead/0": 0.0, "experts/dead/1": 2.0}
    numbers = {"experts/aux_loss": 2.1, "experts/max_load": 2.5, "experts/entropy": 0.85, "experts/dead": 2.0}
    write_rows(run_dir / "metrics.jsonl", [step(n, **numbers, **layers) for n in range(4, 84, 4)])
    section = parsed(run_dir).find(id="expert-balance").parent
    titles = [figure.strong.text for figure in section.find_all("figure")]
    assert titles == [
        *("Load by layer", "Busiest expert", "Entropy of routing", "Experts without tokens", "Load-balancing loss")
    ]
    rows = [[cell.text for cell in row.find_all(["th", "td"])] for row in section.find_all("details")[-1].find_all("tr")]
    assert rows[1:] == [["0", "1.5", "0.9", "0"], ["1", "2.5", "0.8", "2"]]
    # And no chart of their own for each of the layers elsewhere.
    assert "experts/max_load/0" not in parsed(run_dir).get_text()
