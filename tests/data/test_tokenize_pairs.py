"""`scripts/tokenize_pairs.py` as a real process, and a run that trains on what it writes."""

import json
import math
import resource
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from preference_training.data.token_files import TOKEN_FIELDS
from preference_training.modeling.tokenizer import byte_level_tokenizer
from tests.support import forked
from tests.support.files import ROOT


def run(folder: Path, script: str, *arguments: str, file_size: int | None = None) -> subprocess.CompletedProcess:
    """A script of the project as a user would run it; no file that it writes can be larger than `file_size`."""
    first = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_size, file_size)) if file_size else None
    return forked.run([ROOT / script, *arguments], folder, first=first)


def tokenize(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return run(folder, "scripts/tokenize_pairs.py", *arguments, **options)


def done(process: subprocess.CompletedProcess) -> list[str]:
    """What a process that succeeded has printed, line by line."""
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.splitlines()


def refused(process: subprocess.CompletedProcess) -> str:
    """The message of a process that refused: status 2, and nothing beside one line."""
    assert process.returncode == 2, process.stdout + process.stderr
    [message] = process.stderr.strip().splitlines()
    return message


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with rows.jsonl: 24 pairs of 20 prompts, of which some have two pairs."""
    rows = [{"prompt": f"question {n % 20}?", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


ROWS = "--model byte_level --dataset rows.jsonl"
BYTES = ROWS.split()


def texts_of(path: Path, tokenizer) -> list[list[str]]:
    """Prompt, preferred and other text of every row, as the masks cut them."""
    found = []
    for row in torch.load(path, weights_only=True):
        assert row.keys() == set(TOKEN_FIELDS)
        cut = {}
        for side in ("chosen", "rejected"):
            tokens, mask = row[f"prompt_{side}_tokens"], row[f"{side}_loss_mask"].bool()
            cut[side] = [tokenizer.decode(tokens[~mask]), tokenizer.decode(tokens[mask])]
        assert cut["chosen"][0] == cut["rejected"][0]
        found.append([cut["chosen"][0], cut["chosen"][1], cut["rejected"][1]])
    return found


def expected_texts(folder: Path, end: str) -> list[list[str]]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [[row["prompt"], row["chosen"] + end, row["rejected"] + end] for row in rows]


def test_every_pair_is_written_with_masks_that_cut_prompt_and_response(folder):
    assert done(tokenize(folder, *BYTES, "--output", "pairs.pt")) == ["pairs.pt: 24 pairs of 20 prompts"]
    found = texts_of(folder / "pairs.pt", byte_level_tokenizer())
    assert sorted(found) == sorted(expected_texts(folder, "<|endoftext|>"))
    # Pairs of one prompt stand side by side.
    assert len(found) - sum(one[0] == other[0] for one, other in pairwise(found)) == 20
    assert sorted(path.name for path in folder.iterdir()) == ["pairs.pt", "rows.jsonl"]


def test_a_models_own_tokenizer_is_used_and_the_file_is_named_after_the_data(folder):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder / "model")
    assert done(tokenize(folder, "--model", "model", "--dataset", "rows.jsonl")) == ["rows.pt: 24 pairs of 20 prompts"]
    assert sorted(texts_of(folder / "rows.pt", tokenizer)) == sorted(expected_texts(folder, "<end>"))


def test_the_splits_are_those_of_a_run_and_all_is_both(folder):
    rows = {}
    for split in ("train", "test", "all"):
        done(tokenize(folder, *BYTES, "--split", split, "--output", f"{split}.pt"))
        rows[split] = texts_of(folder / f"{split}.pt", byte_level_tokenizer())
    assert rows["all"] == rows["train"] + rows["test"]
    assert {row[0] for row in rows["train"]}.isdisjoint(row[0] for row in rows["test"])


def test_template_system_prompt_and_lengths_are_what_a_run_does_with_them(folder):
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "QQQQ", "chosen": "X" * 30, "rejected": "Z"}) + "\n")
    texts = lambda: texts_of(folder / "rows.pt", byte_level_tokenizer())  # noqa: E731
    done(tokenize(folder, *BYTES, "--template", "hh", "--system-prompt", "Be brief."))
    prompt = "Be brief.\n\nHuman: QQQQ\n\nAssistant:"
    assert texts() == [[prompt, " " + "X" * 30 + "<|endoftext|>", " Z<|endoftext|>"]]
    # 4 + 31 tokens do not fit into 20, nor 2 + 31: the response gets 20 - 2.
    lengths = ("--max-length", "20", "--max-prompt-length", "2")
    cut = ["1 prompts cut; 1 responses cut (they lose their end-of-sequence token)", "rows.pt: 1 pairs of 1 prompts"]
    assert done(tokenize(folder, *BYTES, *lengths, "--truncation-mode", "keep_start")) == cut
    assert texts() == [["QQ", "X" * 18, "Z<|endoftext|>"]]
    # The response that fits not at all is left out with its pair, which was the only one.
    message = refused(tokenize(folder, *BYTES, *lengths, "--truncation-mode", "drop"))
    assert message.startswith("--dataset: rows.jsonl: no pair is left (1 skipped: longer than max_length, 20 tokens).")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--model byte_level --dataset absent.jsonl", "datasets: absent.jsonl: no such file."),
        ("--model byte_level --dataset tooy", "datasets: unknown data set 'tooy'; did you mean toy?"),
        ("--model absent --dataset rows.jsonl", "--model: absent could not be loaded: "),
        ("--model byte_level --chat-template absent --dataset rows.jsonl", "--chat-template: absent could not be read: "),
        ("--model byte_level --dataset bad.jsonl", "datasets: bad.jsonl, row 2: no field 'chosen'"),
        ("--model byte_level --dataset rows.pt", "--dataset: rows.pt holds token ids already."),
        (
            "--model byte_level --dataset rows.jsonl --output rows.json",
            "--output: found rows.json, expected a name that ends in .pt",
        ),
        (
            "--model byte_level --dataset rows.jsonl --output absent/rows.pt",
            "--output: absent/rows.pt: expected a file in an existing directory",
        ),
        (f"{ROWS} --max-length 8", "--max-prompt-length: found 256, expected 1 to less than"),
        (
            "--model byte_level --dataset rows.jsonl --max-prompt-length 0",
            "--max-prompt-length: found 0, expected 1 to less than",
        ),
    ],
)
def test_a_mistake_is_one_message_and_status_2_and_writes_nothing(folder, arguments, told):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "bad.jsonl").write_text(f'{lines[0]}\n{{"prompt": "p"}}\n')
    assert refused(tokenize(folder, *arguments.split())).startswith(told)
    assert sorted(path.name for path in folder.iterdir()) == ["bad.jsonl", "rows.jsonl"]


def test_an_option_that_does_not_exist_is_status_2_with_the_usage(folder):
    process = tokenize(folder, *BYTES, "--split", "half")
    assert process.returncode == 2 and process.stderr.startswith("usage: tokenize_pairs.py")
    assert "argument --split: invalid choice: 'half'" in process.stderr


def test_a_full_disk_is_one_message_and_an_older_file_stays_whole(folder):
    done(tokenize(folder, *BYTES))
    older = (folder / "rows.pt").read_bytes()
    message = refused(tokenize(folder, *BYTES, file_size=5000))
    assert message.startswith("--output: cannot write rows.pt: ")
    assert (folder / "rows.pt").read_bytes() == older
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "rows.pt"]


def first_step(folder: Path, data: str) -> tuple[list[str], dict]:
    """What `train.py` says of a file that is all trained on, and the metrics of one step over all of its pairs."""
    overrides = ["loss=dpo", "held_out_share=0", "batch_size=24", "eval_every=24", "n_epochs=1", "debug=true"]
    lines = done(run(folder, "train.py", f"datasets=[{data}]", *overrides, f"local_run_dir={folder / data}.run"))
    [step] = (folder / f"{data}.run" / "metrics.jsonl").read_text().splitlines()
    return lines[:2], json.loads(step)


def test_a_run_on_the_written_file_is_the_run_on_the_texts(folder):
    done(tokenize(folder, *BYTES))
    (lines, ids), (other_lines, texts) = (first_step(folder, data) for data in ("rows.pt", "rows.jsonl"))
    assert lines == other_lines == ["train: 20 prompts, 24 pairs", "test: 0 prompts, 0 pairs"]
    # Before the first step policy and reference agree: each pair's loss is -log sigmoid(0).
    assert ids["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
    # The order differs, so that sums are rounded differently.
    for name in ("loss/train", "logps_train/chosen", "logps_train/rejected", "grad_norm"):
        assert ids[name] == pytest.approx(texts[name], rel=1e-4)


def test_a_run_evaluates_on_the_held_out_share_of_the_written_file(folder):
    done(tokenize(folder, *BYTES))
    overrides = ["loss=dpo", "held_out_share=0.4", "batch_size=8", "n_examples=8", "sample_during_eval=false", "debug=true"]
    lines = done(run(folder, "train.py", "datasets=[rows.pt]", *overrides, f"local_run_dir={folder / 'run'}"))
    pairs = [int(line.split(", ")[1].split()[0]) for line in lines[:2]]
    assert sum(pairs) == 24 and min(pairs) > 0
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)
