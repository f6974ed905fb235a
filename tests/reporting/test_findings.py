"""What the reader of a run must know first: each finding on made-up metrics, and none of a sound run."""

import json
import math
import random
from pathlib import Path

import pytest

from preference_training.core.metric_names import change
from preference_training.reporting.findings import VANISHED, findings
from preference_training.reporting.run_record import RunRecord
from preference_training.reporting.summary import conclude

LN2 = math.log(2)
DPO = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "reference_free": False, "mode_loss": "DPO"}
CONFIG = {
    "loss": DPO,
    "lr": 5e-7,
    "batch_size": 4,
    "warmup_steps": 0,
    "warmup_share": None,
    "max_length": 512,
    "datasets": ["toy"],
}


def steps(losses: list[float], **more: float) -> list[dict]:
    """Steps with these losses, four examples each."""
    counted = (
        {"counters/examples": 4 * n, "counters/updates": n, "loss/train": loss} for n, loss in enumerate(losses, start=1)
    )
    return [row | {"grad_norm": 1.0} | more for row in counted]


def evaluation(examples: int, loss: float, error: float = 0.0, prompts: int = 50, **more: float) -> dict:
    """An evaluation whose loss has an interval of twice this error."""
    bounds = {"loss/eval": loss, "loss/eval/low": loss - error, "loss/eval/high": loss + error}
    counted = {"counters/examples": examples, "counters/updates": examples // 4, "counters/held_out_prompts": prompts}
    return bounds | counted | more


def changed(low: float, high: float, metric: str = "loss/eval") -> dict[str, float]:
    """The metrics of a change, in the middle of its interval."""
    return dict(zip(change(metric), ((low + high) / 2, low, high), strict=True))


def run_of(
    rows: list[dict], config: dict | None = None, about: dict | None = None, directory: Path = Path("absent")
) -> RunRecord:
    """A run that has come to its end, unless `about` says otherwise."""
    seen = max((row["counters/examples"] for row in rows), default=0)
    return RunRecord(directory, "run", CONFIG | (config or {}), {"examples": seen} | (about or {}), rows, {})


def kinds(*given, **named) -> set[str]:
    return {finding.kind for finding in findings(run_of(*given, **named))}


def falling(start: float, end: float, number: int, noise: float = 0.0) -> list[float]:
    """Losses that fall in a line, with noise of this standard deviation but in the first."""
    draw = random.Random(0)
    line = (start + (end - start) * n / (number - 1) for n in range(number))
    return [loss + (draw.gauss(0, noise) if n else 0) for n, loss in enumerate(line)]


# ---- nothing learned --------------------------------------------------------------------------------------------------------


def test_a_loss_that_stays_at_ln_2_is_said_with_both_values():
    rows = [evaluation(0, LN2), *steps(falling(LN2, 0.69305, 9)), evaluation(36, 0.6931, 1e-5, **changed(-1e-4, 2e-5))]
    [found] = findings(run_of(rows))
    assert (found.kind, found.severity) == ("nothing learned", "error")
    assert "held-out loss was 0.6931 at the start and is 0.6931 at the end" in found.text
    assert "training loss was 0.6931 at the start" in found.text and "lr=5e-07" in found.text
    assert found.line == f"warning: {found.text}"


def test_a_tiny_gain_is_none_however_well_it_is_measured():
    # Half a percent of ln 2 is 0.0035.
    def said(gain: float) -> set[str]:
        return kinds([evaluation(0, LN2), *steps([LN2] * 9), evaluation(36, LN2 - gain, **changed(-gain - 1e-5, -gain + 1e-5))])

    assert said(0.003) == {"nothing learned"}
    assert said(0.004) == set()


@pytest.mark.parametrize(
    ("change", "said"),
    # Of ln 2 five percent are 0.035: whether a run has learned that may have changed so much is not known, and not said.
    [((-0.03, 0.02), True), ((-0.05, 0.02), False), ((-0.2, -0.1), False), ((-0.03, -0.01), False)],
)
def test_what_may_be_noise_and_small_is_nothing_and_what_may_be_much_is_not_judged(change, said):
    rows = [evaluation(0, LN2), *steps([LN2] * 9), evaluation(36, LN2 + sum(change) / 2, **changed(*change))]
    assert ("nothing learned" in kinds(rows)) is said


def test_a_run_whose_training_loss_falls_has_learned_something_also_without_evaluations():
    assert kinds(steps(falling(LN2, 0.5, 40, noise=0.05))) == set()
    assert kinds(steps(falling(LN2, LN2, 400, noise=0.005))) == {"nothing learned"}


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        ({"name": "ipo", "beta": 0.1, "length_normalised": False}, 25.0),
        ({"name": "hinge", "beta": 0.1}, 1.0),
        ({"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, 0.5),
    ],
)
def test_what_a_loss_starts_at_is_the_losses_own(loss, start):
    # A step whose noise would hide a fall from the first steps: the value at the start has none.
    losses = [start, *(start * (1 - 0.02 * share) for share in (3, 1, 2, 3, 2, 3, 2, 3))]
    assert kinds(steps(losses), {"loss": loss}) == set()
    assert kinds(steps([start] * 9), {"loss": loss}) == {"nothing learned"}


def test_the_loss_of_sft_is_compared_with_its_own_first_steps_and_example_by_example():
    sft = {"loss": {"name": "sft", "average": "responses"}}
    noisy = steps(falling(100, 97, 40, noise=15))
    assert kinds(noisy, sft) == set(), "the noise is too large to say anything"
    apart = [evaluation(0, 100, 30), *noisy, evaluation(160, 97, 30)]
    assert kinds(apart, sft) == set()
    paired = [evaluation(0, 100, 30), *noisy, evaluation(160, 99.9, 30, **changed(-0.4, 0.2))]
    assert "nothing learned" in kinds([paired[0], *steps(falling(100, 100, 40, noise=2)), paired[-1]], sft)


def test_nothing_is_said_of_a_run_that_is_not_over_or_whose_reference_follows():
    rows = [evaluation(0, LN2), *steps([LN2] * 9), evaluation(36, LN2, **changed(-1e-5, 1e-5))]
    assert kinds(rows, about={"examples": 400}) == set()
    follows = DPO | {"name": "tr_dpo", "reference_update_every": 10, "reference_update_share": 1.0}
    assert kinds(rows, {"loss": follows}) == set()


def test_a_warm_up_longer_than_the_run_is_the_reason():
    rows = steps([LN2] * 9)
    first, second = findings(run_of(rows, {"warmup_steps": 150}))
    assert (first.kind, second.kind) == ("warm-up", "nothing learned")
    assert "warm-up takes 150 steps, and the run has 9" in first.text and "set warmup_share=0.1" in second.text
    assert "warm-up" not in kinds(rows, {"warmup_steps": 150, "warmup_share": 0.1})
    # 36 examples are 9 steps of 4; a run that says how many it has is believed.
    assert "warm-up" not in kinds(rows, {"warmup_steps": 9}, {"steps": 10})


@pytest.mark.parametrize(
    ("usual", "optimizer", "said"),
    [(5e-5, "AdamW", True), (1e-6, "AdamW", False), (5e-5, "SGD", False), (None, "AdamW", False)],
)
def test_a_learning_rate_far_below_the_usual_one_is_the_reason(usual, optimizer, said):
    [found] = findings(run_of(steps([LN2] * 9), {"optimizer": optimizer}, {"usual_lr": usual}))
    assert ("lr=5e-07 is far below what is usual for such a loss and model, 5e-05" in found.text) is said


@pytest.mark.parametrize(("norm", "said"), [(0.0, "no gradient"), (VANISHED / 2, "next to no gradient"), (1e-4, None)])
def test_a_gradient_that_is_0_from_the_start_is_said(norm, said):
    losses = falling(LN2, 0.4, 20)
    found = findings(run_of(steps(losses, grad_norm=norm)))
    assert [finding.kind for finding in found] == ["gradient"] * (said is not None)
    assert said is None or f"the loss has {said}" in found[0].text
    # That of a hinge vanishes where all is learned.
    late = steps(losses[:10]) + [
        row | {"counters/examples": 40 + 4 * n} for n, row in enumerate(steps([0.0] * 10, grad_norm=0.0))
    ]
    assert "gradient" not in kinds(late)


# ---- the data ---------------------------------------------------------------------------------------------------------------


def about_data(cut: int = 0, left_out: dict | None = None, bad_rows: int = 0) -> dict:
    changed = {"responses cut (they lose their end-of-sequence token)": cut} if cut else {}
    report = {"name": "mine", "changed": changed, "left_out": left_out or {}, "num_bad_rows": bad_rows}
    return {"data": {"train": [report]}, "train": {"examples": 10, "responses": 20}}


@pytest.mark.parametrize(("cut", "severity"), [(0, None), (10, None), (11, "warning"), (19, "warning"), (20, "error")])
def test_responses_that_are_mostly_cut_are_said(cut, severity):
    found = findings(run_of(steps(falling(LN2, 0.4, 20)), about=about_data(cut)))
    assert [(finding.kind, finding.severity) for finding in found] == [("truncated", severity)] * (severity is not None)
    assert severity is None or "Raise max_length (512)" in found[0].text


@pytest.mark.parametrize(("left_out", "bad_rows", "said"), [({}, 0, False), ({"a": 60}, 30, False), ({"a": 61}, 30, True)])
def test_data_of_which_nearly_all_is_skipped_is_said_with_the_main_reason(left_out, bad_rows, said):
    found = findings(run_of(steps(falling(LN2, 0.4, 20)), about=about_data(0, left_out, bad_rows)))
    assert [finding.kind for finding in found] == ["skipped data"] * said
    assert not said or "of 101 training examples 10 are left; most were skipped because: a (61)" in found[0].text


def test_a_filter_that_keeps_next_to_nothing_is_said():
    rows = falling(LN2, 0.4, 20)
    assert kinds(steps(rows, **{"beta_DPO/kept_fraction": 0.05})) == {"filtered pairs"}
    assert kinds(steps(rows, **{"beta_DPO/kept_fraction": 0.2})) == set()


def test_of_a_high_learning_rate_that_a_warm_up_has_not_let_rise_one_thing_is_said():
    config, about = {"warmup_steps": 150, "lr": 1e-4, "model": {"name_or_path": "a/b"}}, {"usual_lr": 5e-7}
    first, second = findings(run_of(steps([LN2] * 9), config, about))
    assert (first.kind, second.kind) == ("warm-up", "nothing learned")
    for finding in (first, second):
        assert finding.text.endswith("model, 5e-07: set lr=5e-07 and warmup_share=0.1.")
        assert "lower" not in finding.text and "hardly learn" not in finding.text


@pytest.mark.parametrize(
    ("lr", "more", "said"),
    [
        (1e-4, {}, True),
        (4e-6, {}, False),
        (1e-4, {"optimizer": "SGD"}, False),
        # From scratch.
        (1e-4, {"model": {}}, False),
    ],
)
def test_a_learning_rate_far_above_the_usual_one_is_said_of_a_run_that_went_badly_alone(lr, more, said):
    config, about = {"lr": lr, "model": {"name_or_path": "a/b"}} | more, {"usual_lr": 5e-7}
    learned = [evaluation(0, LN2), *steps(falling(LN2, 0.3, 20)), evaluation(80, 0.3, **changed(-0.4, -0.3))]
    assert kinds(learned, config=config, about=about) == set()
    worse = [*learned[:-1], evaluation(80, 0.9, **changed(0.1, 0.3))]
    assert ("learning rate" in kinds(worse, config=config, about=about)) == said
    assert "worse than before" in kinds(worse, config=config, about=about)


def test_samples_that_repeat_are_said_at_the_head_of_the_report(tmp_path):
    event = {"time": "2026-01-01T12:00:00+00:00", "examples": 8, "text": "warning: they repeat.", "finding": "samples repeat"}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    [found] = findings(run_of(steps(falling(LN2, 0.3, 20)), directory=tmp_path))
    assert (found.kind, found.severity, found.text) == ("samples repeat", "warning", "they repeat.")


# ---- held-out examples ------------------------------------------------------------------------------------------------------

ACCURACY = "rewards_eval/accuracies"


def accuracy(value: float, low: float, high: float) -> dict[str, float]:
    return {ACCURACY: value, f"{ACCURACY}/low": low, f"{ACCURACY}/high": high}


def test_a_perfect_accuracy_of_three_prompts_is_said_to_decide_nothing():
    rows = [*steps(falling(LN2, 0.4, 20)), evaluation(80, 0.4, prompts=3, **accuracy(1.0, 0.2924, 1.0))]
    [found] = findings(run_of(rows))
    assert (found.kind, found.severity) == ("few prompts", "note") and found.line.startswith(
        "note: held-out metrics: 3 prompts"
    )
    assert "A reward accuracy of 1 may be anything from 0.29 to 1" in found.text
    assert kinds([*rows[:-1], rows[-1] | {"counters/held_out_prompts": 10}]) == set()


def test_what_was_said_before_the_first_step_is_not_said_again_at_the_end(tmp_path):
    rows = [*steps(falling(LN2, 0.4, 20)), evaluation(80, 0.4, prompts=3, **accuracy(1.0, 0.2924, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = conclude(tmp_path)
    assert [finding.kind for finding in found.findings] == ["few prompts"]
    assert not any("too few" in line for line in found.lines)


@pytest.mark.parametrize(("low", "high", "said"), [(0.1, 0.4, True), (0.45, 0.6, False), (0.6, 0.9, False)])
def test_an_accuracy_below_chance_is_said(low, high, said):
    rows = [*steps(falling(LN2, 0.4, 20)), evaluation(80, 0.4, **accuracy((low + high) / 2, low, high))]
    assert kinds(rows) == ({"accuracy"} if said else set())


def test_held_out_examples_that_became_worse_are_said_beyond_their_intervals_alone():
    learned = steps(falling(2.0, 1.6, 20))
    sft = {"loss": {"name": "sft", "average": "tokens"}}

    def said(low: float, high: float, **more) -> set[str]:
        return kinds([evaluation(0, 2.0), *learned, evaluation(80, 2 + (low + high) / 2, **changed(low, high), **more)], sft)

    assert "worse than before" in said(0.1, 0.3)
    assert "worse than before" not in said(-0.1, 0.3)
    assert "worse than before" not in said(0.1, 0.3, prompts=3)
    assert "worse than before" in said(-0.3, -0.1, **accuracy(0.4, 0.3, 0.55), **changed(-0.2, -0.05, ACCURACY))
    # A loss that rises while the model learns to tell the responses apart.
    assert "worse than before" not in said(0.1, 0.3, **accuracy(0.7, 0.6, 0.8), **changed(0.1, 0.3, ACCURACY))


def test_a_rising_held_out_loss_is_said_with_its_minimum():
    def rows(*losses: float, error: float = 0.05) -> list[dict]:
        return [*steps(falling(0.7, 0.4, 20)), *(evaluation(40 * n, loss, error) for n, loss in enumerate(losses))]

    [found] = findings(run_of(rows(0.7, 0.5, 0.6)))
    assert found.kind == "overfitting" and "lowest after 40 examples (0.5) and is 0.6 at the end" in found.text
    assert kinds(rows(0.7, 0.5, 0.6, error=0.15)) == set()
    # Never better than before training: that is not overfitting.
    assert "overfitting" not in kinds(rows(0.5, 0.6, 0.65))
    assert "overfitting" not in kinds(rows(0.7, 0.5, 0.6), {"loss": {"name": "tr_dpo", "reference_update_every": 8}})
    # The first two are beta-DPO's of an earlier version, at the beta in force.
    mixed = [row | {"beta_DPO/beta_used": 0.2} if "loss/eval" in row else row for row in rows(0.7, 0.5, 0.6)]
    mixed[-1]["beta_DPO/loss_eval_at_beta_used"] = 0.4
    assert "overfitting" not in kinds(mixed)


def test_a_training_loss_that_falls_alone_is_said():
    training = steps(falling(2.0, 0.2, 40))
    sft = {"loss": {"name": "sft", "average": "tokens"}}

    def said(low: float, high: float, before: float = 2.0) -> set[str]:
        last = evaluation(160, before + (low + high) / 2, **changed(low, high))
        return kinds([evaluation(0, before), *training, last], sft)

    # Of 1.57 that the last quarter is below the first, examples that were held out have gained a tenth, or nearly all.
    assert said(-0.2, -0.1) == {"overfitting"}
    assert said(-1.5, -1.2) == set()
    # Losses that began apart are not of the same examples or definition.
    assert said(-0.2, -0.1, before=3.0) == set()


# ---- what the run has seen itself -------------------------------------------------------------------------------------------


def test_what_only_the_run_can_see_is_read_from_its_events(tmp_path):
    events = [
        {"time": "2026-11-21T12:00:00+01:00", "examples": 4, "text": "warning: too small", "finding": "unchanged weights"},
        {"time": "2026-11-21T12:00:00+01:00", "examples": 8, "text": "warning: the loss is 10, its mean 2"},
        {"time": "2026-11-21T12:00:00+01:00", "examples": 8, "text": "warning: an older one", "finding": "nothing learned"},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    [found] = findings(run_of(steps(falling(LN2, 0.4, 20)), directory=tmp_path))
    assert (found.kind, found.severity, found.text) == ("unchanged weights", "error", "too small")


def test_the_worst_comes_first_and_a_run_without_metrics_has_no_findings(tmp_path):
    rows = [*steps([LN2] * 9, grad_norm=0.0), evaluation(36, LN2, prompts=3)]
    assert [finding.severity for finding in findings(run_of(rows))] == ["error", "error", "note"]
    assert findings(RunRecord.read(tmp_path)) == []


def test_the_last_lines_of_a_run_say_what_was_trained_what_it_did_and_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "mine"
    (run_dir / "LATEST").mkdir(parents=True)
    (run_dir / "report.html").touch()
    rows = [
        evaluation(0, LN2),
        *steps(falling(LN2, 0.4, 20), time=250.0),
        evaluation(80, 0.45, 0.05, **accuracy(0.8, 0.7, 0.9)),
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "config.yaml").write_text(json.dumps(CONFIG | {"datasets": [{"path": "data/mine.jsonl"}]}))
    (run_dir / "about.json").write_text(json.dumps({"examples": 80, "train": {"examples": 80}}))
    conclusion = conclude(run_dir)
    assert conclusion.findings == []
    assert conclusion.lines == [
        "",
        "DPO (beta 0.1) on 80 pairs of mine.jsonl · 4 min: 80 of 80 examples, 20 updates",
        "  held-out loss: 0.6931 -> 0.45 [0.4, 0.5] (50 prompts; 95% intervals)",
        "  held-out reward accuracy: 0.8 [0.7, 0.9]",
        "talk to it: python scripts/chat.py runs/mine",
        "report: runs/mine/report.html",
    ]
    assert conclude(run_dir, with_next_steps=False).lines == conclusion.lines[:-2]


def expert_steps(loads: list[float], dead: list[int]) -> list[dict]:
    """Steps of a mixture of experts with two layers, of which the second is the worse."""
    rows = steps([LN2 - 0.01 * number for number in range(len(loads))])
    numbers = [
        {"experts/max_load": load, "experts/max_load/3": 1.1, "experts/max_load/7": load, "experts/dead": float(count)}
        for load, count in zip(loads, dead, strict=True)
    ]
    return [row | more | {"experts/aux_loss": 2.0} for row, more in zip(rows, numbers, strict=True)]


def test_experts_that_die_and_a_balance_that_collapses_are_said():
    found = {item.kind: item.text for item in findings(run_of(expert_steps([1.5] * 4 + [4.0] * 12, [1, 0, 0, 1] + [3] * 12)))}
    assert found["dead experts"].startswith(
        "experts have died: no token was sent to 3 of them or more in any of the last 4 steps"
    )
    assert "gets 4 times the mean, and got 1.5 at first; layer 7 is the worst" in found["expert balance"]
    assert "set model.router_aux_loss=0.001" in found["expert balance"]
    raised = run_of(expert_steps([1.5] * 4 + [4.0] * 12, [0] * 16), {"model": {"router_aux_loss": 0.01}})
    assert "raise model.router_aux_loss, 0.01" in next(item.text for item in findings(raised) if item.kind == "expert balance")


def test_experts_that_a_batch_misses_by_chance_and_few_steps_say_nothing():
    chance = expert_steps([1.5, 2.0] * 8, [2, 0] * 8)
    assert not kinds(chance) & {"dead experts", "expert balance"}
    assert not kinds(expert_steps([1.0, 9.0, 9.0, 9.0], [0, 5, 5, 5])) & {"dead experts", "expert balance"}
