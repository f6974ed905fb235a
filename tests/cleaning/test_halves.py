"""Halves of the data judge each other's labels, before a run that weighs its pairs; stopped anywhere, it goes on."""

import json
import random
import time
from contextlib import closing
from pathlib import Path
from signal import SIGTERM

import numpy
import pytest
import torch
from omegaconf import OmegaConf

from preference_collection.exchange.importing import import_into
from preference_collection.store.store import open_store
from preference_training.cleaning import halves
from preference_training.core.errors import UserError
from preference_training.core.signals import STOPPED, StoppedError
from preference_training.data.toy_preferences import response_kind
from preference_training.losses.registry import build_loss
from preference_training.tracking.run_files import json_lines
from tests.rounds.loops import TINY, in_this_process
from tests.support import forked
from tests.support.files import ROOT
from utils import compose, train

FLIPPED, ROWS = 0.2, 160
RUN = (
    *TINY, "loss=dpo", "loss.beta=0.5", "lr=5e-3", "n_epochs=3", "datasets=rows.jsonl", "data.weights=ledger",
    "do_first_eval=false", "save_policy_pt=false", "local_dirs=runs", "max_length=64", "max_prompt_length=32",
)  # fmt: skip


def make_rows(folder: Path) -> None:
    """rows.jsonl: answers of letters are preferred to answers of digits, but for the flipped share."""
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(ROWS):
            pair = ["".join(draw.choices(signs, k=6)) for signs in ("abcdef", "012345")]
            chosen, rejected = pair[::-1] if draw.random() < FLIPPED else pair
            row = {"prompt": f"Question {number}?\n", "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


def is_wrong(row: dict) -> bool:
    """Whether the label of a row of label_weights.jsonl is flipped."""
    return row["preferred"].strip().isdigit()


def auroc(rows: list[dict], wrong: list[bool]) -> float:
    """How often a flipped pair has the larger probability than a right one; ties count half."""
    values, wrong = numpy.array([row["probability"] for row in rows]), numpy.array(wrong)
    one, other = values[wrong][:, None], values[~wrong]
    return float(((one > other) + 0.5 * (one == other)).mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with rows, and a run on them, in whose first half a signal came, and after that another start."""
    place = tmp_path_factory.mktemp("cleaning")
    make_rows(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        commands = []

        def stopped_in_the_second(command, name):
            commands.append(name)
            if len(commands) == 2:
                raise StoppedError("stopped: SIGTERM")
            in_this_process(command, name)

        patch.setattr(halves, "run_step", stopped_in_the_second)
        assert train(compose(*RUN, "local_run_dir=run"), quiet=True).stopped == "stopped: SIGTERM"
        train(compose(*RUN, "local_run_dir=run", "resume=auto"), quiet=True)
        # The first half was complete.
        assert commands == ["the run on half 1", "the run on half 2", "the run on half 2"]
    return place


@pytest.fixture
def here(folder, monkeypatch):
    """That folder, as the one to be in; no run on a half starts."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(halves, "run_step", lambda command, name: pytest.fail(f"{name} was started"))
    return folder


def weights_of(run: Path) -> list[dict]:
    return list(json_lines(run / "label_weights.jsonl"))


def test_flipped_labels_have_larger_probabilities_and_smaller_weights(folder):
    rows, noise = weights_of(folder / "run"), json.loads((folder / "run" / "label_noise.json").read_text())
    assert auroc(rows, [is_wrong(row) for row in rows]) >= 0.85
    wrong, right = (numpy.mean([row["weight"] for row in rows if is_wrong(row) is kind]) for kind in (True, False))
    assert wrong < 0.5 * right
    assert numpy.mean([row["weight"] for row in rows]) == pytest.approx(1, abs=1e-4)
    share = numpy.mean([is_wrong(row) for row in rows])
    assert abs(noise["flipped_share"] - share) < 3.5 * noise["flipped_share_error"]


def test_each_half_judges_what_the_other_was_trained_on_and_no_prompt_is_in_both(folder):
    both = [list(json_lines(folder / "run" / "halves" / half / "margins.jsonl")) for half in ("1", "2")]
    prompts = [{row["prompt"] for row in rows} for rows in both]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0] | prompts[1]) == len(weights_of(folder / "run"))
    for rows, other in zip(both, reversed(both), strict=True):
        assert len(rows) > ROWS / 4
        # An evaluation over all pairs of the other half, and no other.
        metrics = list(json_lines(folder / "run" / "halves" / ("1" if rows is both[0] else "2") / "metrics.jsonl"))
        evaluations = [row for row in metrics if "loss/eval" in row]
        assert [row["counters/held_out_prompts"] for row in evaluations] == [len(rows)]
        assert evaluations[0]["rewards_eval/margins"] == pytest.approx(numpy.mean([row["margin"] for row in rows]), abs=1e-4)
        assert metrics[-1]["counters/examples"] == 3 * len(other)


def test_the_weights_that_are_used_are_those_that_were_written(folder, monkeypatch):
    """The loss of a step is the mean of weight times loss, with the weights of the file; pairs of the file have no own ones."""
    from preference_training.training import preparation

    monkeypatch.chdir(folder)
    found = []
    usual = preparation.weigh
    monkeypatch.setattr(preparation, "weigh", lambda *given: found.append(usual(*given)) or found[-1])
    config = compose(*RUN, "local_run_dir=run", "resume=run", "n_epochs=4")
    assert train(config, quiet=True).stopped is None
    [weighed] = found
    written = {row["prompt"]: row["weight"] for row in weights_of(folder / "run")}
    table = weighed.prepared.table
    texts = {prompt.number: prompt.weights for prompt in table}
    by_number = {int(row["source"].rsplit(" ", 1)[1]): row["weight"] for row in weights_of(folder / "run")}
    assert texts == {number: [weight] for number, weight in by_number.items()} and len(written) == len(by_number)
    losses = build_loss("dpo", beta=0.5)
    from preference_training.losses.base import Examples

    weights = torch.tensor([texts[number][0] for number in list(texts)[:2]])
    examples = Examples(torch.tensor([[0, 1], [2, 3]]), torch.ones(4), weights=weights)
    policy = torch.tensor([0.0, -1.0, -2.0, 0.0], requires_grad=True)
    output = losses(policy, torch.zeros(4), examples).weighted(examples.weights)
    output.losses.mean().backward()
    # d/d policy of -ln sigmoid(0.5 * margin) is -0.5 * sigmoid(-0.5 * margin) for the preferred response.
    margins = torch.tensor([1.0, -2.0])
    assert torch.allclose(policy.grad[[0, 2]], -0.5 * weights * torch.sigmoid(-0.5 * margins) / 2)


def test_an_earlier_run_is_used_again_and_pairs_that_it_does_not_know_count_one(here, capsys):
    rows = (here / "rows.jsonl").read_text().splitlines()
    # One label turned around: another pair.
    first = json.loads(rows[0])
    turned = json.dumps({"prompt": first["prompt"], "chosen": first["rejected"], "rejected": first["chosen"]})
    new = json.dumps({"prompt": "New?\n", "chosen": "abc", "rejected": "123"})
    (here / "more.jsonl").write_text("\n".join([turned, *rows[1:], new]) + "\n")
    more = ("datasets=more.jsonl", "data.weights=run", "local_run_dir=again", "n_examples=8", "held_out_share=0")
    train(compose(*RUN, *more), quiet=False)
    known = sum(1 for row in weights_of(here / "run") if row["prompt"] != first["prompt"])
    said = capsys.readouterr().out
    assert f"data.weights: {known} of {ROWS + 1} training pairs weighted; {ROWS + 1 - known} are not among those" in said


def test_the_queue_begins_with_flipped_labels_and_the_labeling_app_imports_it(folder, tmp_path):
    queue = list(json_lines(folder / "run" / "label_queue.jsonl"))
    rows = weights_of(folder / "run")
    assert len(queue) == len(rows)
    assert [row["gain"] for row in queue] == sorted((row["gain"] for row in queue), reverse=True)
    wrong = {row["prompt"] for row in rows if is_wrong(row)}
    first = queue[: len(queue) // 10]
    assert sum(row["description"] in wrong for row in first) > 0.8 * len(first)
    with closing(open_store(str(tmp_path / "store.duckdb"))) as store:
        imported = import_into(store, folder / "run" / "label_queue.jsonl")
        assert imported.line() == f"{len(queue)} tasks added, {len(queue)} new comparisons"


def test_the_script_has_the_probabilities_of_the_halves(folder, monkeypatch):
    from scripts.flip_probabilities import flip_probabilities

    monkeypatch.chdir(folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    given = [
        (k, {"id": str(k), "prompt": row["prompt"], "responses": sorted([row["chosen"], row["rejected"]])} | NO_OTHERS)
        for k, row in enumerate(rows)
    ]
    known = {row["prompt"]: row["probability"] for row in weights_of(folder / "run")}
    found = flip_probabilities(folder / "run", given)
    assert found == {str(k): known[row["prompt"]] for k, row in enumerate(rows) if row["prompt"] in known}


NO_OTHERS = dict.fromkeys(("sft_target", "chosen", "rejected"))


@pytest.mark.long
def test_a_command_that_is_stopped_in_a_half_goes_on_and_finds_the_flipped_labels_of_the_toy_data(tmp_path):
    """The command line: SIGTERM in the middle of the first half, resume=auto, and the same numbers as without a stop."""
    (tmp_path / "mine.py").write_text(LOADER)
    given = [text for text in RUN if not text.startswith(("datasets", "n_epochs", "max_"))]
    given += ["datasets=mine.py:flipped", "n_epochs=1", "save_every=64", "max_length=128", "max_prompt_length=64"]
    command = [str(ROOT / "train.py"), *given]
    with (tmp_path / "said").open("w") as file:
        stopped = forked.Program([*command, "local_run_dir=run"], tmp_path, file.fileno(), file.fileno())
    checkpoint = tmp_path / "run" / "halves" / "1" / "step-64"
    while stopped.poll() is None and not checkpoint.is_dir():
        time.sleep(0.1)
    stopped.send_signal(SIGTERM)
    status, said = stopped.wait(300), (tmp_path / "said").read_text()
    assert status == STOPPED and "stopped during the run on half 1: SIGTERM" in said, said
    assert said.count("the same command with resume=auto continues from there") == said.count("continues from there") == 1
    done = forked.run([*command, "local_run_dir=run", "resume=auto"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resume: continuing the halves of {tmp_path / 'run'}" in done.stdout and "resume: continuing from" in done.stdout
    assert done.stdout.count("run directory:") == done.stdout.count("talk to it:") == 1
    rows = weights_of(tmp_path / "run")
    kinds = [response_kind(row["preferred"]) != "preferred" for row in rows]
    assert auroc(rows, kinds) >= 0.85
    weights = numpy.array([row["weight"] for row in rows])
    assert weights[kinds].mean() < 0.5 * weights[~numpy.array(kinds)].mean()
    # The run on all pairs is resumed with the same weights: other ones would be other data.
    done = forked.run([*command, "local_run_dir=run", "resume=run", "n_epochs=null", "n_examples=1000"], tmp_path)
    assert done.returncode == 0 and f"{len(rows):,} of {len(rows):,} training pairs weighted" in done.stdout, done.stderr


LOADER = """
import random
from preference_training.data.registry import register
from preference_training.data.toy_preferences import toy_records

@register("flipped")
def get_flipped(split, silent=False, cache_dir=None):
    draw, records = random.Random(0), toy_records(split)
    for record in records.values() if split == "train" else ():
        record["pairs"] = [pair[::-1] if draw.random() < 0.2 else pair for pair in record["pairs"]]
    return records
"""


# ---- what is started ------------------------------------------------------------------------------------------------------


def test_a_half_is_the_same_configuration_on_half_of_the_examples(here):
    values = OmegaConf.to_container(OmegaConf.load(here / "run" / "halves" / "half_2.yaml"))
    config = compose(*RUN, "local_run_dir=run")
    half = config.changed({"exp_name": "run-half-2"})
    assert (values["data.half"], values["exp_name"], values["resume"]) == (2, half.exp_name, "auto")
    assert "data.weights" not in values and values["loss.beta"] == 0.5 and Path(values["datasets"]).is_absolute()
    counted = halves.half_values(compose(*RUN, "n_examples=101", "n_steps=7"), here, 1)
    # Half of them, rounded up.
    assert (counted["n_examples"], counted["n_steps"]) == (51, 4)


def test_halves_that_were_begun_with_another_configuration_are_not_continued(here):
    directory = here / "begun"
    halves.write_half(compose(*RUN, "lr=1e-3"), directory, 1)
    halves.write_half(compose(*RUN, "lr=1e-3", "save_every=80"), directory, 1)
    with pytest.raises(UserError, match=r"were begun with another configuration: lr: was 0.001, is 0.002. Restore it"):
        halves.write_half(compose(*RUN, "lr=2e-3"), directory, 1)


def test_a_new_run_in_the_same_directory_sets_the_halves_aside_with_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "halves" / "1").mkdir(parents=True)
    (tmp_path / "run" / "label_weights.jsonl").write_text("{}\n")
    make_rows(tmp_path)
    assert halves.find_directory(compose(*RUN), tmp_path / "run") == tmp_path / "run"
    assert not (tmp_path / "run" / "halves").exists()
    assert {path.name for path in tmp_path.glob("run/set_aside_*/*")} == {"halves", "label_weights.jsonl"}


def test_a_start_that_is_resumed_finds_its_halves_until_the_run_on_all_pairs_has_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_rows(tmp_path)
    earlier = tmp_path / "runs" / "run_2026-01-01_00-00-00-000000"
    (earlier / "halves").mkdir(parents=True)
    new = tmp_path / "runs" / "run_2026-01-02_00-00-00-000000"
    resumed = compose(*RUN, "resume=auto", "exp_name=run")
    assert halves.find_directory(resumed, new) == earlier
    assert halves.find_directory(compose(*RUN, f"resume={earlier}"), new) == earlier
    (earlier / "step-8").mkdir()
    assert halves.find_directory(resumed, new) is None
    assert halves.find_directory(compose(*RUN, "resume=auto", "exp_name=other"), new) == new


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ("loss=sft",),
            "data.weights: found ledger, and loss=sft does not train on pairs. Expected a loss that does",
        ),
        (("loss=kto",), "data.weights: found ledger, and loss=kto does not train on pairs"),
        (("data.half=1",), "data.half: found 1 with data.weights=ledger. Expected one of them"),
        (("data.half=3", "data.weights=null"), "data.half: found 3, expected 1, 2 or null"),
        (
            ("+rounds=default", "rounds.prompts=rows.jsonl", "rounds.judge=toy"),
            "data.weights: found ledger, and a loop of rounds makes its own",
        ),
        (("data.weights=nowhere",), "data.weights: nowhere: no such directory. Expected ledger, or the directory of a run"),
        (("data.weights=runs",), "data.weights: runs has no label_weights.jsonl with weights. Expected the directory"),
    ],
)
def test_what_cannot_be_weighed_is_refused(here, given, told):
    # SFT has no beta.
    run = [text for text in RUN if "loss=sft" not in given or not text.startswith("loss.beta")]
    with pytest.raises(UserError) as error:
        train(compose(*run, "local_run_dir=refused", *given), quiet=True)
    assert str(error.value).startswith(told)


def test_sweeps_and_launchers_are_told_to_name_a_run(here, monkeypatch):
    with pytest.raises(UserError, match="in a sweep, each of whose jobs would train three runs"):
        halves.train_halves(compose(*RUN), here / "refused", in_sweep=True)
    monkeypatch.setattr(halves, "in_worker", lambda: True)
    with pytest.raises(UserError, match="a launcher has started this process. Run python train.py by itself, or name"):
        halves.train_halves(compose(*RUN), here / "refused")


def test_a_dry_run_says_what_would_be_trained_and_trains_nothing(here, capsys):
    from train import start

    start(compose(*RUN, "local_run_dir=dry", "dry_run=true"), here / "dry", False)
    assert "data.weights: before this run, the same configuration would be trained on each half" in capsys.readouterr().out
    assert not (here / "dry" / "halves").exists()
