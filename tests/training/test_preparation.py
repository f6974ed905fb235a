"""What a run says and refuses before any model is loaded."""

import pytest

from preference_training.configuration.validation import configured
from preference_training.data.entries import read_entries
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.report import DataReport
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.tokenizer import byte_level_tokenizer
from preference_training.tracking.run_files import is_of_loop
from preference_training.training.preparation import (
    adapter_notice,
    few_held_out,
    other_template_notice,
    process_notices,
    remarks_on,
    report_split,
)

KTO = build_loss("kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)


def labeled(*labels: float) -> PromptTable:
    return PromptTable.of(
        [TokenizedPrompt([1, 2], [[3], [4]], [(0, 1)], "mine", 2 * k, labels=[label]) for k, label in enumerate(labels)]
    )


@pytest.mark.parametrize(("label", "found", "lacking"), [(1.0, "desirable", "undesirable"), (0.0, "undesirable", "desirable")])
def test_labels_of_one_kind_alone_are_warned_of(label, found, lacking):
    [said] = remarks_on("train", labeled(label, label), KTO)
    assert (
        said == f"warning: datasets: all responses to train on are labeled {found}, expected {lacking} ones too to learn from."
    )
    assert remarks_on("train", labeled(label, 1 - label), KTO) == []
    assert remarks_on("test", labeled(label), KTO) == []


def test_it_is_said_that_nothing_is_evaluated_where_nothing_is_held_out():
    [said] = remarks_on("test", PromptTable.of([]), build_loss("dpo", beta=0.1))
    assert said.strip().startswith("nothing is held out, so nothing is evaluated: ")


@pytest.mark.parametrize(
    ("prompts", "overrides", "said"),
    [
        (9, (), "9 prompts, too few to decide anything by; expected at least 10. Raise held_out_share."),
        (10, (), None),
        # Of ten prompts, three examples are evaluated.
        (
            10,
            ("n_eval_examples=3",),
            "3 prompts, too few to decide anything by; expected at least 10. Raise n_eval_examples, which",
        ),
        (1, (), "1 prompt, too few to decide anything by"),
        (0, (), None),
    ],
)
def test_too_few_held_out_prompts_are_warned_of_before_anything_is_loaded(prompts, overrides, said):
    text = few_held_out(configured("model=tiny", *overrides), labeled(*[1.0] * prompts))
    assert (text is None) if said is None else text.startswith(f"warning: held-out metrics: {said}")


def test_of_a_rounds_training_few_held_out_prompts_are_not_said(tmp_path):
    run_dir = tmp_path / "round-1" / "run"
    assert not is_of_loop(run_dir)
    (tmp_path / "rounds.json").write_text("{}")
    assert is_of_loop(run_dir)


def test_one_prompt_and_one_response_are_said_in_the_singular(capsys):
    class OfOne:
        table, reports = labeled(1.0), [DataReport()]

    class Named:
        name = "mine"

    report_split(OfOne, [Named], "test", "labeled responses", needed=True)
    assert capsys.readouterr().out == "test: 1 prompt, 1 labeled response\n"


@pytest.mark.parametrize(
    ("saved", "template", "archive", "told"),
    [
        ("{{ other }}", "chat", "LATEST", True),
        ("{{ other }}", "chat", "LATEST/policy.pt", True),
        ("{{ own }}", "chat", "LATEST", False),
        # Responses of such runs are rendered without it.
        ("{{ other }}", "hh", "LATEST", False),
        (None, "chat", "LATEST", False),
        ("{{ other }}", "chat", None, False),
    ],
)
def test_an_archive_with_another_chat_template_is_told_with_the_key_that_keeps_it(tmp_path, saved, template, archive, told):
    (tmp_path / "LATEST").mkdir()
    (tmp_path / "LATEST" / "policy.pt").touch()
    if saved:
        (tmp_path / "LATEST" / "chat_template.jinja").write_text(saved)
    config = configured(f"template={template}", f"model.archive={tmp_path / archive if archive else 'null'}")
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ own }}"
    notice = other_template_notice(config, read_entries(config), tokenizer)
    assert (notice is not None) == told
    assert not told or notice.endswith(f"set model.chat_template={tmp_path / 'LATEST' / 'chat_template.jinja'}")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("", None),
        ("+adapter=lora", "LoRA adapters of rank 16 (alpha 32) are trained, all other weights are frozen"),
    ],
)
def test_what_an_adapter_leaves_frozen_is_told(overrides, told, compose):
    notice = adapter_notice(compose("loss=dpo", *overrides.split()))
    assert notice == (told and f"model.lora.r: {told}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.context_parallel_size=2"], ["trainer.context_parallel_size: 2 processes compute each pack together"]),
        (
            ["trainer.world_size=8"],
            ["trainer.world_size: read by dry_run=true alone; this run has the processes that are started"],
        ),
        (["trainer.world_size=8", "dry_run=true"], []),
        ([], []),
    ],
)
def test_it_is_said_how_processes_share_work(overrides, said):
    assert process_notices(configured("trainer=FSDPTrainer", *overrides)) == said
