"""What is shown before training: facts of the data, examples token by token, steps and memory; and that nothing is trained."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy
import pytest

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import UNLIMITED, TokenBudget
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.core.errors import UserError
from preference_training.core.process_group import Ranks
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.report import DataReport
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.dry_run.preview import (
    check_memory,
    collect_facts,
    describe_data,
    describe_examples,
    describe_steps,
    describe_warmup,
    first_steps,
    histogram,
    tokens_shown,
)
from tests.support import forked
from tests.support.files import ROOT


def run(cwd: Path, *overrides: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}
    return forked.run([ROOT / "train.py", "dry_run=true", *overrides], cwd, environment)


def table(*prompts: TokenizedPrompt) -> PromptTable:
    return PromptTable.of(prompts)


A, B, C = [7, 0], [8, 8, 0], [9, 0]


def test_a_dry_run_shows_data_examples_steps_and_memory_and_leaves_no_run_behind(tmp_path):
    rows = [{"prompt": f"Question {n}?\n", "chosen": "Yes.", "rejected": "No."} for n in range(40)]
    rows += [rows[0], {"prompt": "Question 1?\n", "chosen": "No.", "rejected": "Yes."}]
    rows += [
        {"prompt": "Question 2?\n", "chosen": "Same.", "rejected": "Same."},
        {"prompt": "Q", "chosen": "", "rejected": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(tmp_path, "datasets=[rows.jsonl]", "loss=dpo", "on_bad_row=skip", "batch_size=8", "n_epochs=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("too few to decide anything by") == 1
    shown = done.stdout.split("\n\n", 1)[1]
    for line in (
        "rows.jsonl: 44 rows read",
        "1 skipped: chosen and rejected are the same",
        "1 bad row skipped",
        "1 more prompt held out (held_out_share=0.05)",
        "rows that are skipped or held out are not among them",
        "rows.jsonl, row 44: field 'chosen' is empty",
        "duplicate pairs: 1; pairs in both directions: 1",
        "prompts in both splits: 0",
        "<|endoftext|>»",
        "steps of 8 examples",
        "parameters",
        "total",
    ):
        assert line in shown, f"{line!r} is not in\n{shown}"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["data_report.html", "prepared_data"]


def test_a_model_that_fits_no_machine_is_refused_without_being_built(tmp_path):
    huge = (
        "model.from_config.hidden_size=65536",
        "model.from_config.intermediate_size=262144",
        "model.from_config.num_hidden_layers=4",
    )
    done = run(tmp_path, *huge, "model.from_config.num_attention_heads=64", "model.from_config.num_key_value_heads=64")
    assert done.returncode == 2
    assert done.stderr.startswith("memory: a step would need ") and "Lower max_tokens_per_microbatch" in done.stderr


HUGE = ("model.from_config.hidden_size=65536", "model.from_config.intermediate_size=262144")


def test_rank_0_of_many_processes_is_previewed_whatever_this_machine_has(tmp_path):
    # 4 layers of 4 x 65536^2 + 3 x 65536 x 262144 and embeddings are 275 billion weights: 1 TB, 2 GB on each of 512.
    done = run(tmp_path, *HUGE, "trainer=FSDPTrainer", "trainer.world_size=512", "batch_size=512")
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("\nsteps\n")[1]
    assert "tokens per rank in the first " in shown and "  duration: not known, since the peak of the device is not" in shown
    assert "512 processes, 512 of them with different data" in shown and "peak on rank 0 of 512, with " in shown
    assert re.search(r"parameters +2\.0\d\d GB", shown) and re.search(r"policy +all-gather +float32 +over +512 ranks", shown)
    # Nothing says how much memory there is, so a micro-batch is not cut.
    assert "set trainer.device_memory or max_tokens_per_microbatch otherwise" in shown


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("trainer=FSDPTrainer", "trainer.world_size=64", "batch_size=32"), "batch_size: found 32, which in 1 micro-batches"),
        (("trainer=FSDPTrainer", "trainer.world_size=8", "trainer.device_memory=0.001"), "memory: a step would need 0.0"),
        (("trainer=FSDPTrainer", *HUGE), r"on 2 processes of this machine"),
    ],
    ids=["batch", "device memory", "this machine"],
)
def test_processes_that_could_not_train_are_refused(tmp_path, overrides, expected):
    done = run(tmp_path, *overrides)
    assert done.returncode == 2 and expected in done.stderr


def test_duplicates_and_contradictions_are_counted_over_all_prompts():
    # The pair (A, B) stands there twice, and once the other way round; C has another prompt, so its pair is its own.
    facts = collect_facts(
        table(
            TokenizedPrompt([1, 2], [A, B], [(0, 1)]),
            TokenizedPrompt([1, 2], [B, A], [(1, 0)]),
            TokenizedPrompt([1, 2], [A, B], [(1, 0)]),
            TokenizedPrompt([1, 3], [A, B, C], [(0, 1), (0, 2)]),
        )
    )
    assert (facts.votes.duplicates, facts.votes.contradictory) == (1, 1)
    assert (facts.prompts, facts.responses, facts.examples) == (4, 9, 5)
    # Prompts of 2 tokens; responses of 2 and 3, in the last of 2, 3 and 2.
    assert facts.tokens == 3 * (2 + 5) + 2 + 7


def test_prompts_in_both_splits_are_found_by_their_hashes():
    train = collect_facts(table(TokenizedPrompt([1, 2], [A, B], [(0, 1)]), TokenizedPrompt([5, 6], [A, B], [(0, 1)])))
    held_out = collect_facts(table(TokenizedPrompt([5, 6], [B, C], [(0, 1)])))
    assert len(numpy.intersect1d(train.prompt_hashes, held_out.prompt_hashes)) == 1


def test_sft_data_is_counted_in_examples():
    facts = collect_facts(table(TokenizedPrompt([1, 2], [A], []), TokenizedPrompt([1, 3], [B], [])))
    lines = describe_data(["mine"], [DataReport(rows_read=3, num_prompts=2, left_out={"it is odd": 1})], facts, paired=False)
    assert "  mine: 3 rows read, 2 prompts kept" in lines and "    1 skipped: it is odd" in lines
    assert "  2 prompts, 2 responses, 2 examples, 9 tokens" in lines
    lines = describe_data(["mine"], [DataReport(rows_read=1, num_prompts=1)], facts, False, ["1 more prompt held out"])
    assert lines[:2] == ["  mine: 1 row read, 1 prompt kept", "    1 more prompt held out"]
    report = DataReport(columns_not_read={"margin": 2, "weight": 1}, notes=["top_k has no effect"], bad_rows=["row 3"])
    assert describe_data(["mine"], [report], facts, paired=False)[1:4] == [
        "    columns not read: margin, weight (with margin: margin it is the margin of the pair; with example_weight: weight "
        "it is the weight of the pair)",
        "    top_k has no effect",
        "    row 3",
    ]


def test_an_empty_split_has_its_counts_and_no_lengths():
    assert describe_data([], [], collect_facts(table()), paired=True) == ["  0 prompts, 0 responses, 0 pairs, 0 tokens"]


def test_a_histogram_counts_every_value_once():
    lines = histogram(numpy.array([1, 1, 2, 9, 16]), rows=4, width=10)
    assert [line.split()[-1] for line in lines] == ["3", "0", "1", "1"]
    assert [line.split()[0] for line in lines] == ["0-4", "5-8", "9-12", "13-16"]


def test_tokens_are_shown_one_by_one_with_scored_ones_marked(tokenizer):
    ids = tokenizer("rain\nover", add_special_tokens=False).input_ids
    plain = tokens_shown(ids, tokenizer, False, color=False)
    assert plain.replace("|", "").replace("⏎", "\n") == tokenizer.decode(ids)
    scored = tokens_shown([*ids, tokenizer.eos_token_id], tokenizer, True, color=False)
    assert scored == f"«{plain}|{tokenizer.eos_token}»"
    assert "\033[32m" in tokens_shown(ids, tokenizer, True, color=True)


@pytest.mark.parametrize("color", [False, True])
def test_control_characters_in_examples_do_not_reach_the_terminal(tokenizer, color):
    ids = tokenizer("red\x1b]0;x\x07 \x00\x08", add_special_tokens=False).input_ids
    text = tokens_shown(ids, tokenizer, True, color)
    assert not set("\x07\x00\x08") & set(text) and "\x1b]" not in text.replace("|", "")
    assert all(name in text for name in (r"\x1b", r"\x07", r"\x00", r"\x08"))


def shown(prompt: TokenizedPrompt, kind: str, tokenizer) -> list[str]:
    """What each response is, and its tokens: the lines behind that of the prompt."""
    return [line.strip() for line in describe_examples([prompt], kind, tokenizer, color=False)[2:]]


def test_examples_are_shown_with_what_each_response_is_its_scored_spans_and_their_numbers(tokenizer):
    a, b, c = (tokenizer.convert_ids_to_tokens(token) for token in (40, 41, 42))
    pair = TokenizedPrompt([50], [[40], [41]], [(1, 0)], weights=[0.5], margins=[2.0])
    assert shown(pair, "pairs", tokenizer) == [f"other     «{a}»", f"preferred «{b}»", "weights: 0.5", "margins: 2"]
    ranking = TokenizedPrompt([50], [[40], [41], [42]], [(2, 0, 1)])
    of_two = TokenizedPrompt([50], [[40], [41]], [(1, 0)])
    assert shown(of_two, "rankings", tokenizer) == [f"rank 2    «{a}»", f"rank 1    «{b}»"]
    assert shown(ranking, "rankings", tokenizer) == [f"rank 2    «{a}»", f"rank 3    «{b}»", f"rank 1    «{c}»"]
    labeled = TokenizedPrompt([50], [[40], [41], [42]], [(0, 2), (1, 2)], labels=[1.0, 0.0])
    assert shown(labeled, "labels", tokenizer) == [f"desirable «{a}»", f"undesirable «{b}»", f"mismatched «{c}»"]
    spans = TokenizedPrompt([50], [[40, 41, 42, 40, 41]], [], spans=[[(1, 3), (4, 5)]])
    assert shown(spans, "targets", tokenizer) == [f"response  {a}|«{b}|{c}»|{a}|«{b}»"]


def test_blanks_are_visible_even_those_that_sentencepiece_drops_from_a_single_token(tokenizer):
    from tests.data.test_tokenization import gpt2, legacy_llama, llama, unigram

    for make in (llama, legacy_llama, unigram, gpt2):
        ids = make()("ask the  yes\n\tno ", add_special_tokens=False).input_ids
        shown = tokens_shown(ids, make(), False, color=False)
        assert shown.replace("|", "").removeprefix("▁") == "ask▁the▁▁yes⏎⇥no▁", make
        assert shown.count("|") == len(ids) - 1
    # A letter of several tokens: each by its name, none lost.
    ids = tokenizer("漢", add_special_tokens=False).input_ids
    shown = tokens_shown(ids, tokenizer, False, color=False)
    assert len(ids) > 1 and "\ufffd" not in shown and shown == "|".join(tokenizer.convert_ids_to_tokens(ids))


def test_steps_and_what_sharing_saves_are_those_of_the_run():
    prompts = table(*(TokenizedPrompt([1, 2, 3, n], [A, B], [(0, 1)]) for n in range(10)))
    batches = BatchIterator(Schedule(prompts, 4, length=RunLength(n_epochs=3)))
    lines = describe_steps(batches.schedule, first_steps(batches, UNLIMITED))
    # 30 examples in batches of 4 within each epoch of 10: 3 steps an epoch. A prompt of 4 tokens with responses of 2 and 3.
    assert lines[0].strip() == "9 steps of 4 examples, 30 in total; 30 tokens per step on average"
    assert "270 tokens in the first 9 steps instead of 390 in rows: 31% less with prefix sharing (if the model" in lines[1]


def test_a_warm_up_that_would_not_be_over_is_said_with_the_steps(compose):
    schedule = Schedule(table(*(TokenizedPrompt([1, n], [A, B], [(0, 1)]) for n in range(10))), 4)
    [line] = describe_warmup(compose("warmup_steps=3", "lr=0.01"), schedule)
    # Three steps: the last has 3/4 of lr.
    assert line.startswith("  warning: warm-up takes 3 steps, and the run has 3: the learning rate rises to 0.0075, 75%")
    assert describe_warmup(compose("warmup_steps=2"), schedule) == []


def test_a_response_of_several_pairs_is_a_row_of_each_without_sharing():
    batches = BatchIterator(Schedule(table(TokenizedPrompt([1, 2], [A, B, C], [(0, 1), (0, 2)])), 2))
    first = first_steps(batches, UNLIMITED)
    # Once each: 2 + 2 + 3 + 2 tokens; in rows: A and B, A and C, each behind the prompt.
    assert (first.tokens, first.row_tokens) == (9, (4 + 5) + (4 + 4))


def test_fillers_save_nothing_and_cost_nothing_in_tokens():
    prompts = table(*(TokenizedPrompt([1, 2, 3, n], [A, B], [(0, 1)]) for n in range(3)))
    ranks = Ranks(rank=1, size=2)
    batches = BatchIterator(Schedule(prompts, 3), packing=Packing(TokenBudget(9, 9), ranks))
    first = first_steps(batches, UNLIMITED)
    # One of three examples is this rank's: 4 tokens, and 2 and 3; its other pack is a filler.
    assert [pack.is_filler for pack in first.step[0].packs] == [False, True]
    assert (first.tokens, first.row_tokens) == (9, 6 + 7)


def test_the_first_steps_are_found_and_two_where_a_step_has_several():
    prompts = table(*(TokenizedPrompt([1] * (2 + n), [A, B], [(0, 1)]) for n in range(10)))
    first = first_steps(BatchIterator(Schedule(prompts, 10)), UNLIMITED)
    [whole] = first.packs
    assert first.step[0].packs[0].input_ids.equal(whole.input_ids)
    assert len(whole.input_ids) == sum(2 + n + 5 for n in range(10))
    budget = TokenBudget(20, 20)
    packs = first_steps(BatchIterator(Schedule(prompts, 10), packing=Packing(budget)), budget).packs
    assert len(packs) == 2 and all(len(pack.input_ids) <= 20 for pack in packs)


def test_a_step_that_needs_too_much_memory_is_refused_with_remedies():
    check_memory(10, 10, "cpu")
    with pytest.raises(UserError, match=r"would need 2\.0 GB on cuda, which has 1\.0 GB"):
        check_memory(2 * 2**30, 2**30, "cuda")


def test_a_strict_dry_run_ends_with_status_2_and_names_what_failed_and_any_other_goes_on(tmp_path):
    rows = [{"prompt": f"Question {n}?\n", "chosen": "Yes, it is.", "rejected": "No."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    data = ("datasets=[{path: rows.jsonl, test_path: test.jsonl}]", "loss=dpo", "batch_size=8")
    done = run(tmp_path, *data)
    assert done.returncode == 0, done.stderr
    assert "held-out prompts that are also trained on: 30 of 30 (100.00%); expected at most 0.0%" in done.stdout
    assert f"data report: {tmp_path / 'runs' / 'data_report.html'}" in done.stdout
    done = run(tmp_path, *data, "dry_run=strict")
    assert done.returncode == 2 and "memory" in done.stdout
    assert done.stderr.splitlines()[0] == "dry_run=strict: the data does not pass:"
    named = [line.split(":")[0].strip() for line in done.stderr.splitlines()[1:]]
    assert named[0] == "quality.max_leaked" and set(named[1:]) == {"quality.max_baseline_accuracy"}


def test_a_contamination_file_that_is_missing_is_named_before_anything_is_prepared(tmp_path):
    done = run(tmp_path, "contamination_files=[gone.jsonl]")
    assert done.returncode == 2 and done.stderr.startswith("contamination_files: gone.jsonl: no such file.")
    assert not (tmp_path / "runs").exists()


def test_a_contamination_file_that_is_damaged_is_named_before_anything_is_prepared(tmp_path):
    (tmp_path / "bench.jsonl").write_text('{"question": "Why?"}\n{"question": "W')
    done = run(tmp_path, "contamination_files=bench.jsonl")
    assert done.returncode == 2 and done.stderr.startswith("contamination_files: bench.jsonl, "), done.stderr
    assert "train" not in done.stdout
