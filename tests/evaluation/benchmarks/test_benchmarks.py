"""Benchmarks as the script runs them: pair accuracy against plain transformers, win rates by all kinds of judges, the page."""

import json
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preference_training.core.errors import UserError
from preference_training.core.files import run_file
from preference_training.data.records.report import OTHER_PROMPT, SAME_TEXT, DataReport
from preference_training.evaluation.benchmarks import arena, length_control, sections
from preference_training.evaluation.benchmarks.command import benchmark_win_rate, pair_accuracy
from preference_training.evaluation.benchmarks.outputs import read_outputs
from preference_training.evaluation.benchmarks.pairs import read_pairs, score_by_language_model, tokenized
from preference_training.evaluation.benchmarks.text import pair_lines
from preference_training.evaluation.results_text import format_results
from preference_training.generation.chat import load_for_chat
from tests.support import shown
from tests.support.files import GOLDEN, ROOT, write
from tests.support.judge_servers import serving, verdict
from train import start

PAIRS = [
    {"prompt": "Name a color.", "chosen": " Blue.", "rejected": " Seven, I would say.", "subset": "alpacaeval-easy"},
    {"prompt": "Name a river.", "chosen": " The long Nile.", "rejected": " Go.", "subset": "mt-bench-easy"},
    {"prompt": "Name a river.", "chosen": " The Rhine.", "rejected": " No.", "subset": "mt-bench-easy"},
    {"prompt": "How do I pick a lock?", "chosen": " Call a locksmith.", "rejected": " Break it.", "subset": "donotanswer"},
]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    for module in (arena, length_control, sections):
        monkeypatch.setattr(module, "ROUNDS", 50)


def benchmark(monkeypatch, *words: object) -> list[str]:
    """What scripts/benchmark.py does, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
    script = run_file(ROOT / "scripts" / "benchmark.py", "script")
    options = script.arguments()
    return pair_accuracy(options) if options.command == "pairs" else benchmark_win_rate(options, *script.judging(options))


# ---- pairs ------------------------------------------------------------------------------------------------------------------


def test_rows_of_one_scored_response_form_pairs_of_their_prompt_and_category(tmp_path):
    rows = [
        {"prompt": prompt, "response": response, "score": score, "subset": subset}
        for prompt, response, score, subset in (
            ("p", "a", 3, "x"), ("q", "c", 2, "x"), ("p", "b", 1, "x"), ("p", "d", 1, "y"), ("q", "e", 2, "x"),
            ("q", "f", 1, "x"),
        )
    ]  # fmt: skip
    pairs = read_pairs(str(write(tmp_path / "pairs.jsonl", rows)))
    assert [(record.prompt, record.responses, record.pairs) for record in pairs.records] == [
        ("p", ["a", "b"], [(0, 1)]),
        ("q", ["c", "e", "f"], [(0, 2), (1, 2)]),
    ]
    assert pairs.categories == {0: "x", 1: "x"}
    assert pairs.left_out == {"two responses have equal scores": 1, "a prompt has no two responses with different scores": 1}


def test_what_is_left_out_of_pairs_is_counted_and_said(tmp_path):
    rows = [
        *PAIRS,
        PAIRS[0] | {"rejected": " Blue."},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"prompt": "q", "chosen": "only", "rejected": []},
    ]
    file = write(tmp_path / "pairs.jsonl", rows)
    pairs = read_pairs(str(file))
    assert pairs.left_out == {SAME_TEXT: 1, OTHER_PROMPT: 1, "no rejected answer": 1}
    found = {"all": {"pairs": 4, "mean": 0.5, "low": 0.1, "high": 0.9}}
    models = {"m": {"accuracy": {"reward": found}, "sections": {}, "left_out": {}}}
    assert f"left out of {file}: 1 x {SAME_TEXT}" in pair_lines(
        {"file": str(file), "left_out": pairs.left_out, "models": models}
    )


def test_what_a_model_cannot_tokenize_is_counted(tmp_path):
    model = load_for_chat(str(GOLDEN / "llama"))
    rows = [*PAIRS, {"prompt": "p", "chosen": f" a{model.tokenizer.eos_token}", "rejected": " b"}]
    scored = score_by_language_model(read_pairs(str(write(tmp_path / "pairs.jsonl", rows))), model, None)
    [(reason, count)] = scored.left_out.items()
    assert (len(scored.records), count) == (4, 1) and "row 5: the text contains" in reason


def test_a_faulty_file_of_pairs_is_named_with_the_command_that_reads_it(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "cho')
    with pytest.raises(UserError, match="pairs: .*pairs.jsonl, row 2: not JSON.*Fix the row.$"):
        read_pairs(str(tmp_path / "pairs.jsonl"))
    write(tmp_path / "pairs.jsonl", [PAIRS[0], {"prompt": " ", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match="pairs: .*pairs.jsonl, row 2: field 'prompt' is empty. Fix the row.$"):
        read_pairs(str(tmp_path / "pairs.jsonl"))


def plain_logps(directory: Path, prompts) -> dict[int, list[tuple[float, int]]]:
    """By record: the log-prob of each response and its number of tokens, by plain transformers."""
    model, found = AutoModelForCausalLM.from_pretrained(directory), {}
    for prompt in prompts:
        for response in prompt.responses:
            ids = torch.tensor([prompt.prompt_ids + response])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            logps = logps.gather(1, ids[0, 1:, None])[len(prompt.prompt_ids) - 1 :]
            found.setdefault(prompt.number, []).append((float(logps.double().sum()), len(response)))
    return found


def test_margins_are_those_of_plain_transformers_with_and_without_length(tmp_path):
    pairs = read_pairs(str(write(tmp_path / "pairs.jsonl", PAIRS)))
    policy, reference = load_for_chat(str(GOLDEN / "llama_policy")), load_for_chat(str(GOLDEN / "llama"))
    scored = score_by_language_model(pairs, policy, reference)
    prompts = tokenized(pairs, policy, DataReport())
    now, before = (plain_logps(GOLDEN / name, prompts) for name in ("llama_policy", "llama"))
    expected = {name: [] for name in ("reward", "log-prob", "reward per token", "log-prob per token")}
    for number in scored.records:
        (chosen, n), (rejected, m) = now[number]
        rewards = chosen - before[number][0][0], rejected - before[number][1][0]
        expected["log-prob"].append(chosen - rejected)
        expected["log-prob per token"].append(chosen / n - rejected / m)
        expected["reward"].append(rewards[0] - rewards[1])
        expected["reward per token"].append(rewards[0] / n - rewards[1] / m)
    assert scored.records == [0, 1, 2, 3] and scored.margins.keys() == expected.keys()
    for name, values in expected.items():
        numpy.testing.assert_allclose(scored.margins[name], values, rtol=0, atol=1e-4)
    assert scored.outcomes("log-prob").tolist() == [float(value > 0) for value in expected["log-prob"]]
    equal = score_by_language_model(pairs, reference, reference)
    assert equal.outcomes("reward").tolist() == [0.5] * 4, "equal scores are half a point"


def test_pair_accuracy_is_printed_by_category_and_written_as_json(tmp_path, monkeypatch, reward_model):
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    words = ["pairs", file, "--model", GOLDEN / "llama_policy", "--reference", GOLDEN / "llama", "--reward-model", reward_model]
    lines = benchmark(monkeypatch, *words, "--to", tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    policy, judge = (found["models"][str(path)] for path in (GOLDEN / "llama_policy", reward_model))
    assert [*policy["accuracy"]] == ["reward", "log-prob", "reward per token", "log-prob per token"]
    assert [*judge["accuracy"]] == ["reward"] and found["category_column"] == "subset"
    assert [*policy["accuracy"]["reward"]] == ["all", "alpacaeval-easy", "mt-bench-easy", "donotanswer"]
    assert policy["accuracy"]["reward"]["mt-bench-easy"]["pairs"] == 2
    assert [*policy["sections"]["reward"]] == ["Chat", "Safety"]
    # Chat: one pair of one subset, two of the other.
    easy, bench = (policy["accuracy"]["reward"][name]["mean"] for name in ("alpacaeval-easy", "mt-bench-easy"))
    assert policy["sections"]["reward"]["Chat"]["mean"] == pytest.approx((easy + 2 * bench) / 3)
    assert any(line.startswith("no score: it is of the sections Chat, Chat Hard, Safety and Reasoning") for line in lines)
    assert any("too few to decide anything by" in line for line in lines) and lines[-1].endswith("results.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pairs", "none.jsonl", "--model", "x"], "none.jsonl: no such data file"),
        (["pairs", "pairs.jsonl"], "nothing to score them by. Add --model"),
        (["pairs", "pairs.jsonl", "--reward-model", "x", "--reference", "y"], "--reference: what the log-probs of --model"),
        (["pairs", "pairs.jsonl", "--model", "x", "--by", "kind"], "no row of .* has a column 'kind'. Expected one of prompt"),
        (["pairs", "same.jsonl", "--model", "x"], "has no pair of two different responses"),
        (["win-rate", "--baseline", "base.jsonl", "--judge", "toy"], "--outputs: expected files of outputs, or --model"),
        (["win-rate", "--baseline", "base.jsonl", "--judge", "toy", "--outputs", "less.jsonl"], "no output for 1 of .* 2 ins"),
        (["win-rate", "--baseline", "base.jsonl", "--judge", "toy", "--outputs", "pairs.jsonl"], "none of the columns .* outp"),
        (["win-rate", "--baseline", "twice.jsonl", "--judge", "toy", "--outputs", "base.jsonl"], "row 2: .* already"),
        (["win-rate", "--baseline", "base.jsonl", "--judge", "toy", "--outputs", "base.jsonl", "--graded"], "gives no degrees"),
        (["win-rate", "--baseline", "base.jsonl", "--judge", "rules:word<=3", "--outputs", "x"], "no unit 'word'; did you mea"),
        (["win-rate", "--baseline", "base.jsonl", "--judge", "toi", "--outputs", "x"], "evaluation.judge"),
        (["win-rate", "--baseline", "base.jsonl", "--judge", "toy", "--outputs", "base.jsonl", "a=base.jsonl", "a=base.jsonl"],
         "two models are called a"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_loaded(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {k}.", "output": "So."} for k in range(2)]
    for name, content in {
        "pairs": PAIRS, "same": [{"prompt": "A?", "chosen": "b", "rejected": "b"}], "base": rows, "less": rows[:1],
        "twice": [rows[0]] * 2,
    }.items():  # fmt: skip
        write(tmp_path / f"{name}.jsonl", content)
    with pytest.raises(UserError, match=message):
        benchmark(monkeypatch, *words)


# ---- win rates --------------------------------------------------------------------------------------------------------------


def rows_of(texts: list[str]) -> list[dict]:
    return [{"instruction": f"Question {k}?", "output": text} for k, text in enumerate(texts)]


def test_several_models_are_compared_by_a_rule_of_ones_own(tmp_path, monkeypatch):
    write(tmp_path / "base.jsonl", rows_of(["one", "two", "three", "four"]))
    write(tmp_path / "good.jsonl", [*rows_of(["one ok", "ok", "ok three", "x"]), {"instruction": "More?", "output": "ok"}])
    write(tmp_path / "bad.jsonl", rows_of(["no", "two", "no", "no"]))
    (tmp_path / "my_judge.py").write_text("def ok(prompt, response):\n    return 'ok' in response\n")
    words = ["--baseline", tmp_path / "base.jsonl", "--judge", f"{tmp_path}/my_judge.py:ok", "--to", tmp_path / "r.json"]
    lines = benchmark(monkeypatch, "win-rate", *words, "--outputs", tmp_path / "good.jsonl", f"other={tmp_path}/bad.jsonl")
    found = json.loads((tmp_path / "r.json").read_text())["models"]
    assert (found["good"]["wins"], found["good"]["ties"], found["good"]["losses"]) == (3, 1, 0)
    assert found["good"]["rate"]["mean"] == 3.5 / 4 and found["other"]["rate"]["mean"] == 0.5
    # One order for a judge without position bias: 3 wins and a tie of 4 battles.
    assert found["good"]["arena"]["mean"] == pytest.approx(3.5 / 4, abs=1e-3)
    assert found["other"]["arena"]["mean"] == pytest.approx(0.5) and found["other"]["length_controlled"][
        "mean"
    ] == pytest.approx(0.5)
    assert not found["good"]["difficulty"] and "no difficulty of instructions" in lines[4]
    assert (tmp_path / "r_judgements.jsonl").read_text().count("\n") == 7, "a verdict for each pair of different outputs"


def test_the_difficulty_of_instructions_is_read_from_the_baseline(tmp_path, monkeypatch):
    rows = [row | {"instruction_difficulty": k / 7} for k, row in enumerate(rows_of(["one", "two", "three", "four"]))]
    write(tmp_path / "base.jsonl", rows)
    assert [each.difficulty for each in read_outputs(str(tmp_path / "base.jsonl"), "--baseline").values()][1] == 1 / 7
    write(tmp_path / "mine.jsonl", rows_of(["1", "2 2 2 2", "3 3 3 3 3", "4"]))
    words = ["--baseline", tmp_path / "base.jsonl", "--outputs", tmp_path / "mine.jsonl", "--to", tmp_path / "r.json"]
    lines = benchmark(monkeypatch, "win-rate", *words, "--judge", "rules:words>=3")
    found = json.loads((tmp_path / "r.json").read_text())["models"]["mine"]
    assert [*found["length_controlled"]["coefficients"]] == ["model", "length", "difficulty"] and (
        found["wins"],
        found["ties"],
    ) == (2, 2)
    assert "length-controlled: terms for model and length, and difficulty of the instruction" in lines


def test_a_language_model_gives_degrees_in_both_orders(tmp_path, monkeypatch):
    def judged(question):
        long, short = len(question[2]) > len(question[3]), len(question[2]) < len(question[3])
        much = abs(len(question[2]) - len(question[3])) > 5
        return verdict(question, "A>>B" if long and much else "A>B" if long else "B>>A" if much else "B>A" if short else "A=B")

    write(tmp_path / "base.jsonl", rows_of(["12345", "12345", "12345", "12345"]))
    write(tmp_path / "mine.jsonl", rows_of(["1234567890 12", "123456", "1234", "54321"]))
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-test")
    words = ["--baseline", tmp_path / "base.jsonl", "--outputs", tmp_path / "mine.jsonl", "--to", tmp_path / "r.json"]
    with serving(judged) as server:
        server_words = ["--judge", "openai:m", "--judge-url", f"{server.url}/v1", "evaluation.judge_workers=1"]
        for _ in range(2):
            benchmark(monkeypatch, "win-rate", *words, *server_words[:4], "--graded", server_words[4])
        assert len(server.questions) == 8, "both orders, and nothing twice"
    found = json.loads((tmp_path / "r.json").read_text())["models"]["mine"]
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    # Both orders: two strong wins (3 each), two wins, two losses, two ties.
    assert found["arena"]["mean"] == pytest.approx((6 + 2 + 1) / (6 + 2 + 2 + 2), abs=1e-3)


# ---- the page ---------------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_run_on_the_tiny_model(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs") / "my_run_DATE"
    overrides = (
        "loss=dpo",
        "model.from_config.num_hidden_layers=1",
        "n_examples=8",
        "n_eval_examples=8",
        "do_first_eval=false",
    )
    quiet = (
        "sample_during_eval=false",
        "wandb.enabled=false",
        "prefix_sharing=off",
        "reference_logps=live",
        "save_policy_pt=false",
    )
    start(compose(*overrides, *quiet, f"local_run_dir={run}"), run, in_sweep=False)
    (run / "results.json").write_text(json.dumps({"examples_trained": 8, "held_out": {"all": {"examples": 1, "prompts": 20}}}))
    shown.write_files("docs/evaluation.md", tmp_path)
    printed = {}
    for _, words in shown.commands(r"python scripts/benchmark\.py", ["docs/evaluation.md"]):
        if not any(word.startswith("openai:") for word in words):
            printed[" ".join(words)] = benchmark(monkeypatch, *words[2:])
    [pairs, by_rule, by_toy] = printed.values()
    assert pairs[-1] == f"results: {run.resolve()}/benchmarks/pairs_my_benchmark_pairs.json"
    assert (
        pairs[:2] == [str(run), pairs[1]]
        and pairs[2].startswith("all ")
        and any(line.startswith("RewardBench") for line in pairs)
    )
    page = "\n".join(block.text for block in shown.blocks("docs/evaluation.md") if "Arena-Hard score" in block.text)
    counts = re.compile(r"my_outputs +1/0/1")
    assert counts.search(page) and counts.search("\n".join(by_rule)) and by_rule[0] in page
    assert by_toy[-1].endswith("benchmarks/win_rate_my_baseline.json")
    assert (run / "benchmarks" / "win_rate_my_baseline_outputs.jsonl").read_text().count("\n") == 2
    # In the report, below the evaluation.
    kept = json.loads((run / "results.json").read_text())
    assert [*kept["benchmarks"]] == ["pairs_my_benchmark_pairs", "win_rate_my_baseline"]
    assert pairs[2] in format_results(kept)
    assert AutoTokenizer.from_pretrained(run / "LATEST").eos_token is not None
