"""comparison.html and comparison.csv: seeds are grouped, differing settings are named, and every run is shown."""

import csv
import json
import re
from pathlib import Path

import numpy
import pytest
from bs4 import BeautifulSoup
from omegaconf import OmegaConf

from preference_training.core.errors import UserError
from preference_training.reporting.comparison import (
    FALL,
    KL,
    comparison_csv,
    comparison_page,
    distance,
    find_runs,
    group_runs,
    read_runs,
    write_comparison,
)


def evaluation(examples: int, accuracy: float, **more) -> dict:
    row = {"counters/examples": examples, "counters/updates": examples // 4, "loss/eval": 0.5}
    row |= {"rewards_eval/accuracies": accuracy, "rewards_eval/chosen": -1.0, "rewards_eval/rejected": -3.0}
    return row | {"rewards_eval/accuracies/low": accuracy - 0.1, "rewards_eval/accuracies/high": accuracy + 0.1} | more


def write_run(folder: Path, rows: list[dict], beta: float = 0.1, seed: int = 0, **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"seed": seed, "exp_name": folder.name, "loss": {"name": "dpo", "beta": beta}} | config
    OmegaConf.save(config, folder / "config.yaml")
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two betas with two seeds each; accuracies 0.6 and 0.7, 0.8 and 0.8."""
    for number, (beta, seed, accuracy) in enumerate([(0.5, 0, 0.8), (0.05, 0, 0.6), (0.5, 1, 0.8), (0.05, 1, 0.7)]):
        steps = [{"counters/examples": n, "loss/train": 0.6, "grad_norm": 1.0 + seed} for n in (4, 8)]
        rows = [evaluation(0, 0.5), *steps, evaluation(8, accuracy)]
        write_run(tmp_path / str(number), rows, beta, seed)
    return tmp_path


def runs_in(folder: Path) -> list:
    return read_runs(find_runs([folder]))


def parsed(folder: Path) -> BeautifulSoup:
    return BeautifulSoup(comparison_page(runs_in(folder), folder), "html.parser")


def test_runs_that_differ_only_in_their_seed_form_a_group_and_groups_are_sorted_by_their_settings(sweep):
    groups = group_runs(runs_in(sweep))
    assert [group.name for group in groups] == ["beta=0.05", "beta=0.5"]
    assert [[run.label for run in group.runs] for group in groups] == [["1", "3"], ["0", "2"]]


def test_the_table_has_the_mean_and_the_standard_deviation_over_seeds(sweep):
    page = parsed(sweep)
    rows = [[cell.get_text(" ") for cell in row.find_all(["th", "td"])] for row in page.find("table").find_all("tr")]
    assert rows[0] == ["run", "loss.beta", "held-out loss", "reward accuracy", "state"]
    # 0.6 and 0.7: the mean is 0.65, the deviation of each from it 0.05, and sqrt(2 * 0.05^2 / (2 - 1)) = 0.071.
    assert rows[1][1:4] == ["0.05", "0.5 ± 0", "0.65 ± 0.071"]
    assert rows[1][0].split() == ["1", "(seed", "0)", "3", "(seed", "1)"] and rows[1][4].count("8 examples, 2 updates") == 2
    assert "They differ in loss.beta." in page.get_text()


def test_a_single_run_has_its_own_interval(tmp_path):
    write_run(tmp_path / "a", [evaluation(8, 0.6)], beta=0.1)
    write_run(tmp_path / "b", [evaluation(8, 0.7)], beta=0.2)
    assert "0.6 [0.5, 0.7]" in parsed(tmp_path).get_text()


def hints(folder: Path) -> str:
    return parsed(folder).find("p", class_="hint").get_text(" ")


def test_losses_with_different_formulas_are_reported_as_not_comparable(tmp_path):
    write_run(tmp_path / "a", [evaluation(8, 0.6)], beta=0.1)
    write_run(tmp_path / "b", [evaluation(8, 0.7)], beta=0.2)
    assert "their formula depends on loss.beta." in hints(tmp_path)
    assert "compare margin / beta" in hints(tmp_path)


def test_beta_dpo_is_comparable_with_dpo_except_in_an_earlier_version(tmp_path):
    named = {"loss": {"name": "dpo", "beta": 0.1, "mode_loss": "beta_DPO", "a": 0.6}}
    at = {"beta_DPO/beta_used": 0.2, "beta_DPO/loss_eval_at_beta_used": 0.3}
    write_run(tmp_path / "plain", [evaluation(8, 0.6)], loss={"name": "dpo", "beta": 0.1, "mode_loss": "DPO", "a": 0.6})
    write_run(tmp_path / "now", [evaluation(8, 0.7, **at)], **named)
    assert "not comparable" not in hints(tmp_path) and "earlier version" not in hints(tmp_path)
    write_run(tmp_path / "then", [evaluation(8, 0.7, **{"beta_DPO/beta_used": 0.2})], **named)
    assert "An earlier version logged the held-out loss at the current beta of beta-DPO: then." in hints(tmp_path)


def test_losses_that_depend_on_their_run_are_reported_as_not_comparable(tmp_path):
    for name, every in (("a", 8), ("b", 16)):
        loss = {"name": "tr_dpo", "beta": 0.1, "reference_update_every": every}
        write_run(tmp_path / name, [evaluation(8, 0.6)], loss=loss)
    assert "Held-out losses of tr_dpo depend on the data seen in training" in hints(tmp_path)


def test_a_mix_depends_on_its_run_as_its_parts_do_and_has_the_rewards_of_its_first_loss_of_pairs(tmp_path):
    parts = [{"name": "sft"}, {"name": "bco", "beta": 0.5}]
    for name, weight in (("a", 1), ("b", 2)):
        loss = {"name": "mix", "parts": [parts[0] | {"weight": weight}, parts[1]]}
        write_run(tmp_path / name, [evaluation(8, 0.6)], loss=loss)
    assert "Held-out losses of mix depend on the data seen in training" in hints(tmp_path)
    write_run(tmp_path / "c", [evaluation(8, 0.6)], loss={"name": "mix", "parts": [{"name": "sft"}, {"name": "dpo"}]})
    # Rewards of -1 and -3 are log-ratios of -2 and -6 at beta 0.5, and of -10 and -30 at the 0.1 of config/loss/dpo.yaml.
    assert [distance(run) for run in runs_in(tmp_path)] == [(FALL, 4.0), (FALL, 4.0), (FALL, pytest.approx(20))]


def test_numbers_from_too_few_prompts_are_marked(tmp_path):
    write_run(tmp_path / "a", [evaluation(8, 0.6, **{"counters/held_out_prompts": 9})])
    write_run(tmp_path / "b", [evaluation(8, 0.6, **{"counters/held_out_prompts": 10})], beta=0.2)
    cells = [row.find_all("td")[-2].text for row in parsed(tmp_path).find("tbody").find_all("tr")]
    assert cells == ["9: too few", "10"]


def test_each_run_has_a_link_to_its_report_that_can_be_moved_with_it(tmp_path):
    for name in ("one run", "other"):
        write_run(tmp_path / "runs" / name, [evaluation(8, 0.6)], optimizer=name)
    (tmp_path / "runs" / "one run" / "report.html").touch()
    runs = runs_in(tmp_path)
    page = BeautifulSoup(comparison_page(runs, tmp_path / "elsewhere"), "html.parser")
    links = [link["href"] for link in page.table.find_all("a")]
    assert links == ["../runs/one%20run/report.html"], "the other has none"


def test_settings_too_many_for_columns_have_a_table_of_their_own(tmp_path):
    for name, number in (("a", 1), ("b", 2)):
        more = {key: number for key in ("lr", "batch_size", "n_epochs", "max_length")} | {"debug": number == 1}
        write_run(tmp_path / name, [evaluation(8, 0.6)], beta=number / 10, **more)
    page = parsed(tmp_path)
    assert [group.name for group in group_runs(runs_in(tmp_path))] == ["a", "b"], "and not by all of them"
    rows = [
        [cell.text for cell in row.find_all(["th", "td"])]
        for row in page.find(id="what-differs").find_next("table").find_all("tr")
    ]
    assert rows[0] == ["key", "a", "b"] and ["loss.beta", "0.1", "0.2"] in rows and len(rows) == 6


def write_samples(run: Path, *rows: tuple[int, str, str]) -> None:
    keys = ("examples", "prompt", "policy")
    (run / "samples.jsonl").write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))


def test_the_responses_of_all_runs_to_a_prompt_stand_side_by_side_whatever_its_template(tmp_path):
    for name, prompt in (("a", "<|im_start|>user\nWhy?<|im_end|>"), ("b", "\n\nHuman: Why?\n\nAssistant:")):
        run = write_run(tmp_path / name, [evaluation(8, 0.6)], optimizer=name)
        write_samples(run, (0, prompt, "Hm."), (8, prompt, f"Said {name}."), (8, f"only {name}", "-"))
    [sample] = parsed(tmp_path).find(id="samples").find_all_next("details")
    assert sample.summary.get_text(strip=True) == "Why?"
    assert [(side.h4.text, side.p.text) for side in sample.find(class_="side-by-side").find_all("div")] == [
        ("before training", "Hm."),
        ("optimizer=a, after 8 examples", "Said a."),
        ("optimizer=b, after 8 examples", "Said b."),
    ]


def test_twenty_runs_share_one_legend_and_their_charts_have_no_intervals(tmp_path):
    for number in range(20):
        write_run(tmp_path / str(number), [evaluation(0, 0.5), evaluation(8, 0.6)], beta=0.1 + number / 100)
    page = parsed(tmp_path)
    assert [len(legend.find_all("li")) for legend in page.select("main > section > .legend")] == [20, 20]
    assert page.select(".chart .legend li") == page.select("path.bar") == []


def test_curves_are_overlaid_and_seeds_become_their_mean_and_range(sweep):
    line = group_runs(runs_in(sweep))[0].line("rewards_eval/accuracies", "beta=0.05", 0)
    assert (line.x.tolist(), line.low.tolist(), line.high.tolist()) == ([0, 8], [0.5, 0.6], [0.5, 0.7])
    assert numpy.allclose(line.y, [0.5, 0.65])
    figures = {figure.strong.text: figure for figure in parsed(sweep).find_all("figure")}
    assert {"Held-out loss", "Reward accuracy", "Training loss", "Gradient norm"} <= figures.keys()
    assert [item.text for item in figures["Training loss"].find_all("li")] == ["beta=0.05", "beta=0.5"]


def test_the_frontier_has_a_point_per_run_and_a_line_through_the_means_by_beta(sweep):
    [figure] = [figure for figure in parsed(sweep).find_all("figure") if "distance" in figure.strong.text]
    lines = {line["name"]: line for line in json.loads(figure.script.string)["lines"]}
    # Rewards of -1 and -3 with beta 0.5 are log-ratios of -2 and -6, with 0.05 of -20 and -60: the mean fall is 4, and 40.
    assert (lines["beta=0.5"]["x"], lines["beta=0.5"]["y"]) == ([4, 4], [0.8, 0.8])
    assert (lines["beta=0.05"]["x"], lines["beta=0.05"]["y"]) == ([40, 40], [0.6, 0.7])
    assert (lines["means, by beta"]["x"], lines["means, by beta"]["y"]) == ([40, 4], [0.65, 0.8])
    assert sorted(name.text for name in figure.find_all("span", class_="name")) == ["beta=0.05", "beta=0.5"]
    assert FALL in figure.find(class_="axis").text


def test_a_run_with_a_kl_estimate_is_placed_by_it(sweep):
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    results = {"examples_trained": 8, "held_out": {"all": {"examples": 4, "prompts": 4, "loss/eval": interval}}}
    (sweep / "0" / "results.json").write_text(json.dumps(results | {"kl": {"per_answer": {"mean": 1.5}}}))
    distances = [distance(run) for run in runs_in(sweep)]
    assert distances[0] == (KL, 1.5) and distances[1] == (FALL, 40.0)
    axes = [figure.find(class_="axis").text for figure in parsed(sweep).find_all("figure")]
    assert axes[0] == f"{FALL}, nats", "a single point of the other measure compares nothing"
    (sweep / "1" / "results.json").write_text((sweep / "0" / "results.json").read_text())
    axes = [figure.find(class_="axis").text for figure in parsed(sweep).find_all("figure")]
    assert axes[:2] == [f"{KL}, nats", f"{FALL}, nats"]


def test_runs_that_differ_in_a_non_numeric_setting_have_no_line_through_their_means(tmp_path):
    for name in ("AdamW", "SGD"):
        write_run(tmp_path / name, [evaluation(8, 0.6)], optimizer=name)
    [figure] = [figure for figure in parsed(tmp_path).find_all("figure") if "distance" in figure.strong.text]
    assert [line["name"] for line in json.loads(figure.script.string)["lines"]] == ["optimizer=AdamW", "optimizer=SGD"]


def test_labels_of_coinciding_points_do_not_overlap(tmp_path):
    for name in "abcdefgh":
        write_run(tmp_path / name, [evaluation(8, 0.6)], optimizer=name)
    [figure] = [figure for figure in parsed(tmp_path).find_all("figure") if "distance" in figure.strong.text]
    names = figure.find_all("span", class_="name")
    assert len(names) == len({re.search("bottom:(.*)%", name["style"])[1] + name["class"][1] for name in names}) <= 2
    assert len(figure.find_all("li")) == 8, "the legend has them all"


def test_the_csv_has_a_row_for_each_run(sweep):
    rows = list(csv.DictReader(comparison_csv(runs_in(sweep)).splitlines()))
    assert [(row["run"], row["seed"], row["loss.beta"], row["rewards_eval/accuracies"]) for row in rows] == [
        ("0", "0", "0.5", "0.8"), ("1", "0", "0.05", "0.6"), ("2", "1", "0.5", "0.8"), ("3", "1", "0.05", "0.7"),
    ]  # fmt: skip
    assert (rows[0]["distance"], rows[0]["distance_measure"]) == ("4.0", FALL)


def test_the_jobs_of_a_sweep_are_in_numeric_order(tmp_path):
    for number in (10, 2, 1):
        write_run(tmp_path / str(number), [])
    assert [path.name for path in find_runs([tmp_path])] == ["1", "2", "10"]


def test_runs_without_metrics_can_be_compared(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, [])
    text = parsed(tmp_path).get_text()
    assert "Comparison of 2 runs" in text and "No metrics have been logged yet." in text and "no step yet" in text


def test_a_folder_without_a_run_is_one_message(tmp_path):
    with pytest.raises(UserError, match=r"no metrics.jsonl at or below this path. Expected run directories"):
        find_runs([tmp_path])


def test_both_files_are_written_to_the_given_folder(sweep, tmp_path):
    page, table = write_comparison([sweep], tmp_path / "there")
    assert page.read_text().startswith("<!doctype html>") and table.read_text().startswith("run,seed,loss.beta")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--to: cannot write"):
        write_comparison([sweep], tmp_path / "file")
