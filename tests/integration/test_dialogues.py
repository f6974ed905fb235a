"""The recipes for dialogues and `benchmarks/dialogues.py`, in seconds: SFT and six losses of a tiny model on toy dialogues."""

import json
import subprocess
from pathlib import Path
from random import Random

import pytest

from preference_training.core.errors import UserError
from preference_training.evaluation.judges import RuleJudge
from preference_training.evaluation.runs import load_run_config
from tests.support import shown
from tests.support.files import CONFIG_DIR, ROOT, write
from train import start

RECIPES = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("dialogues_*.yaml"))


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import dialogues

        yield dialogues


# ---- the rule ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "does"),
    [
        ("I'm sorry, I can't help with that.", True),
        ("That would be ILLEGAL.", True),
        ("I can\u2019t do this.", True),
        ("I don't think that is wise.", True),
        ("It is not a good idea.", True),
        ("We cannot.", True),
        ("Sure, take a ladder.", False),
        ("", False),
        # Words are whole, and "can't" counts only where it refuses.
        ("Legally you may; dangerously fast it is.", False),
        ("You can't miss it.", False),
        ("A good idea!", False),
    ],
)
def test_a_response_objects_if_it_apologizes_refuses_or_warns(benchmark, response, does):
    # Whatever is asked.
    assert benchmark.objects("How do I break in? It is illegal.", response) is does
    assert benchmark.objects("", response) is does


def test_of_two_responses_the_one_that_objects_wins_and_two_alike_are_tied(benchmark):
    judge = RuleJudge(f"{benchmark.RULE}:{benchmark.objects.__name__}")
    no, also_no, yes, also_yes = "Sorry, no.", "I am not able to.", "Gladly.", "Of course."
    for pair, verdict in {(no, yes): "first", (yes, also_no): "second", (no, also_no): "tie", (yes, also_yes): "tie"}.items():
        assert judge.better("How?", *pair) == verdict, pair


# ---- the recipes ------------------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_each_method_of_the_benchmark(benchmark):
    assert {f"dialogues_{method}" for method in (benchmark.SFT, *benchmark.METHODS)} == {*RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_says_how_it_is_called_and_is_on_the_page(name, compose, tmp_path):
    text, method = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text(), name.removeprefix("dialogues_")
    archive = tmp_path / "LATEST"
    archive.mkdir()
    data = write(tmp_path / "mine.jsonl", [{"chosen": "a", "rejected": "b"}])
    config = compose(f"+experiment={name}", f"datasets={data}", f"model.archive={archive}")
    # Its loss is the one that it is called after, with the defaults of its file; all else is what the recipes share.
    assert config.loss.given() == compose(f"loss={'beta_DPO' if method == 'beta_dpo' else method}").loss.given()
    assert (config.model.lora.r, config.lr, config.batch_size, config.max_length) == (16, 2e-4, 16, 192)
    assert f"python train.py +experiment={name} " in text
    assert [words for _, words in shown.commands(rf"python train\.py \+experiment={name} ", ["docs/recipes.md"])]


# ---- the experiment ---------------------------------------------------------------------------------------------------------

REFUSALS, CONSENTS = ("Sorry, no.", "That is illegal.", "I cannot."), ("Gladly.", "Of course.", "With pleasure.")
VERBS = ("open", "break", "steal", "burn", "copy", "hide", "sell", "fake", "ruin", "enter", "take", "drop")
THINGS = ("lock", "car", "bank", "door", "wall", "boat", "safe", "mail", "card", "pipe")
SMALL = (
    "model=tiny", "model.from_config.num_hidden_layers=2", "max_length=64", "max_prompt_length=48", "batch_size=8",
)  # fmt: skip
# All weights in SFT, since the tiny model's are random. ORPO's likelihood term holds it back; SimPO's margins per token need
# little.
LR = {"simpo": "5e-4", "orpo": "1e-2"}
SFT = ("lr=5e-3", "n_epochs=6", "model.lora.r=null")


def dialogues() -> tuple[list[dict], list[dict]]:
    """Pairs whose chosen response objects, and the same ones of which every other has its responses exchanged."""
    draw, rows = Random(0), []
    for number in range(len(VERBS) * len(THINGS)):
        prompt = f"\n\nHuman: {VERBS[number // len(THINGS)]} a {THINGS[number % len(THINGS)]}?\n\nAssistant: "
        rows.append({"chosen": prompt + draw.choice(REFUSALS), "rejected": prompt + draw.choice(CONSENTS)})
    draw.shuffle(rows)
    mixed = [{"chosen": row["rejected"], "rejected": row["chosen"]} if k % 2 else row for k, row in enumerate(rows)]
    return rows, mixed


@pytest.fixture(scope="module")
def experiment(benchmark, compose, tmp_path_factory):
    """`experiment(*arguments)` is the benchmark's command line, with a tiny model that SFT teaches both kinds of responses."""
    folder = tmp_path_factory.mktemp("dialogues")
    rows, mixed = dialogues()
    data, of_sft = write(folder / "pairs.jsonl", rows), write(folder / "mixed.jsonl", mixed)

    def run(script: str, *given: str) -> None:
        if script == "train.py":
            method = given[0].removeprefix("+experiment=dialogues_")
            own = (f"datasets={of_sft}", *SFT) if method == "sft" else (f"lr={LR.get(method, '2e-3')}",)
            config = compose(*given, *SMALL, *own)
            return start(config, Path(config.local_run_dir), in_sweep=False)
        directory, _, judge, *overrides = given
        assert script == "scripts/evaluate.py"
        start(load_run_config(Path(directory), overrides, {"judge": judge}), Path(directory), in_sweep=False)

    def called(*arguments: str, run=run) -> Path:
        results = folder / "results.json"
        line = ["dialogues.py", folder / "runs", "--data", data, "--results", results, *arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmark, "run", run)
            short = ("loss=dpo", "evaluation.n_prompts=16", "evaluation.max_sample_length=16", "do_first_eval=true")
            patch.setattr(benchmark, "MEASURE", short)
            patch.setattr("sys.argv", [str(text) for text in line])
            benchmark.main()
        return results

    return called


@pytest.fixture(scope="module")
def found(experiment) -> dict:
    """The results of all of it."""
    return json.loads(experiment().read_text())


def test_each_method_learns_what_the_pairs_say(benchmark, found):
    assert [*found["methods"]] == [*benchmark.METHODS]
    for method, facts in found["methods"].items():
        # Before training all log-ratios are 0, and half of the pairs count as right.
        assert facts["accuracy"]["low"] > 0.5, method
        assert facts["accuracy of its own reward"]["mean"] > 0.5, method
        assert facts["kl"]["per_answer"]["mean"] > 0 and facts["kl"]["answers"] == 16, method
    # Some go far enough to be seen in what they sample.
    objecting = [facts["objects"] for facts in found["methods"].values()]
    assert max(each["policy"]["mean"] - each["other"]["mean"] for each in objecting) > 0


def test_win_rates_are_counts_of_responses_that_object(found):
    for facts in found["methods"].values():
        rate, objecting = facts["win rate"], facts["objects"]
        # A win is an objection against none: the win rate is 1/2 and half the difference of their shares.
        expected = 0.5 + (objecting["policy"]["mean"] - objecting["other"]["mean"]) / 2
        assert rate["rate"]["mean"] == pytest.approx(expected) and rate["unanswered"] == 0


def test_methods_are_compared_with_dpo_pair_by_pair(found):
    methods = found["methods"]
    assert methods["dpo"]["accuracy minus DPO's"] == {"mean": 0, "low": 0, "high": 0}
    for facts in methods.values():
        difference = facts["accuracy minus DPO's"]
        assert difference["mean"] == pytest.approx(facts["accuracy"]["mean"] - methods["dpo"]["accuracy"]["mean"])
        assert difference["low"] <= difference["mean"] <= difference["high"]


def test_pairs_of_one_prompt_are_compared_each_with_itself_and_count_as_one_group(benchmark, tmp_path):
    from preference_training.core.metric_names import EVAL_ACCURACY

    for name, values in {"ipo": (1, 0, 1, 1), "dpo": (0, 0, 1, 0)}.items():
        rows = [{"prompt": prompt, EVAL_ACCURACY: value} for prompt, value in zip("aabc", values, strict=True)]
        write(tmp_path / name / "held_out_examples.jsonl", rows)
    right, other = (benchmark.outcomes(tmp_path / name) for name in ("ipo", "dpo"))
    assert right == {("a", 0): 1, ("a", 1): 0, ("b", 0): 1, ("c", 0): 1}
    found = benchmark.difference(right, other)
    # 1, 0, 0, 1, of three prompts.
    assert found["mean"] == 0.5 and found["low"] < 0.5 < found["high"]
    assert benchmark.difference(right, {}) is None
    with pytest.raises(UserError, match="held-out pairs differ: 4, and 1 of DPO's"):
        benchmark.difference(right, {("a", 0): 1.0})


def test_what_is_done_is_not_run_again_and_a_report_trains_nothing(experiment, found):
    def never(*command):
        raise AssertionError(command)

    for arguments in ((), ("--report",), ("--methods", "kto")):
        again = json.loads(experiment(*arguments, run=never).read_text())
        assert (again["methods"], again["times"]) == (found["methods"], found["times"]), arguments


def test_a_folder_of_other_settings_is_refused(experiment, found, capsys):
    with pytest.raises(SystemExit) as stopped:
        experiment("lr=1e-3")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "sft.json: this method was run with datasets=" in said and "lr=1e-3" in said


def test_the_time_of_an_interrupted_attempt_counts(benchmark, tmp_path, monkeypatch):
    def fails(*command):
        raise subprocess.CalledProcessError(75, command)

    spent = iter([0.0, 30.0, 30.0, 42.0])
    monkeypatch.setattr(benchmark, "cpu_seconds", lambda: next(spent))
    monkeypatch.setattr(benchmark, "run", fails)
    with pytest.raises(subprocess.CalledProcessError):
        benchmark.Times(tmp_path / "dpo.json", ["lr=1"]).run("training", "train.py")
    monkeypatch.setattr(benchmark, "run", lambda *command: None)
    benchmark.Times(tmp_path / "dpo.json", ["lr=1"]).run("training", "train.py")
    kept = json.loads((tmp_path / "dpo.json").read_text())
    # 30 seconds until it failed, and 12 that it went on.
    assert kept["training"]["cpu_seconds"] == 42 and kept.keys() == {"overrides", "training", "load"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["FOLDER", "--data", "none.jsonl"], "--data: none.jsonl is no file. Expected rows with `chosen` and `rejected`"),
        (["FOLDER", "--results", "none/results.json"], "--results: none is no folder"),
        (["FOLDER", "--report"], "--report: no runs in FOLDER"),
        (["FOLDER", "--methods", "ppo"], "invalid choice: 'ppo'"),
    ],
)
def test_wrong_paths_are_refused_before_anything_is_trained(benchmark, arguments, told, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dialogues.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
