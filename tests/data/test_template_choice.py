"""The template of entries that name none: the tokenizer's chat template, where the rows are for a chat model."""

import json
from copy import copy

import pytest

from preference_training.data.entries import read_entry
from preference_training.data.rendering.choice import choose_templates
from tests.support.chat_templates import tokenizer_of


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


PAIR = {"chosen": "Four.", "rejected": "Five."}
QUESTION = {"prompt": "Two and two?"} | PAIR
CONVERSATION = {"prompt": [user("Two and two?")], "chosen": [answer("Four.")], "rejected": [answer("Five.")]}
DIALOGUE = {f"{key}": f"\n\nHuman: Two and two?\n\nAssistant: {text}" for key, text in PAIR.items()}
MARKED = {"prompt": "<|start_header_id|>user<|end_header_id|>\n\nTwo and two?"} | PAIR
ALPACA = {"prompt": "### Instruction:\nTwo and two?\n\n### Response:\n"} | PAIR
OWN = {"prompt": "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"} | PAIR


@pytest.fixture
def choose(tmp_path):
    """What is chosen for a file of rows, with a tokenizer of a kind."""

    def chosen(*rows: dict, tokenizer=None, **options):
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = read_entry({"path": str(file)} | options)
        return choose_templates([entry], tokenizer or tokenizer_of("Qwen 2.5"))

    return chosen


@pytest.mark.parametrize(
    ("row", "template", "said"),
    [
        (QUESTION, "chat", "rows are prompts with responses"),
        (CONVERSATION, "chat", "rows are conversations"),
        ({"messages": [user("Two and two?"), answer("Four.")]}, "chat", "rows are conversations"),
        (DIALOGUE, "chat", "rows are HH dialogues"),
        ({"text": "Once upon a time."}, None, "rows are plain text"),
        (OWN, None, "rows are rendered in a template already"),
        (MARKED, None, "rows are rendered in a template already"),
        (ALPACA, None, "rows are rendered in a template already"),
    ],
)
def test_the_rows_decide_whether_the_chat_template_is_used(row, template, said, choose):
    [choice] = choose(*[row] * 3).values()
    assert choice.template == template and said in choice.line
    assert choice.line.endswith("; template=raw|hh|chatml overrides") is (template == "chat")


def test_most_of_the_rows_decide(choose):
    [choice] = choose(QUESTION, *[OWN | {"prompt": OWN["prompt"].replace("two?", f"{n}?")} for n in range(9)]).values()
    assert choice.template is None


def test_nothing_is_chosen_where_the_user_has(choose):
    assert choose(CONVERSATION, template="hh") == {}


def test_without_a_chat_template_texts_stay_as_they_are_and_what_becomes_of_conversations_is_said(choose):
    plain = copy(tokenizer_of("Qwen 2.5"))
    plain.chat_template = None
    assert choose(QUESTION, tokenizer=plain) == {} and choose(DIALOGUE, tokenizer=plain) == {}
    [choice] = choose(CONVERSATION, tokenizer=plain).values()
    assert choice.template is None and choice.line.startswith("template: hh, since the tokenizer has no chat template (")


def test_a_chat_template_that_cannot_be_used_is_said(choose):
    broken = copy(tokenizer_of("Qwen 2.5"))
    broken.chat_template = "{% for"
    [choice] = choose(CONVERSATION, tokenizer=broken).values()
    assert choice.template is None and choice.line.startswith(
        "template: null, since the tokenizer's chat template cannot be used"
    )


def test_named_sets_say_what_their_prompts_are_and_are_not_read_for_it():
    choices = choose_templates([read_entry("toy"), read_entry("ultrafeedback"), read_entry("hh")], tokenizer_of("Qwen 2.5"))
    assert {choice.template for choice in choices.values()} == {"chat"} and len(choices) == 3


def test_rows_that_cannot_be_read_are_left_to_their_preparation(choose):
    assert choose({"unknown": 1}) == {}


# ---- in a run -------------------------------------------------------------------------------------------------------------


class Earlier:
    """A run that is resumed."""

    def __init__(self, **run):
        self.run = run


@pytest.fixture
def fit(compose, tmp_path):
    from preference_training.data.entries import read_entries
    from preference_training.training.preparation import fit_templates

    def fitted(*files, earlier=None, overrides=()):
        paths = []
        for number, rows in enumerate(files):
            paths.append(tmp_path / f"rows{number}.jsonl")
            paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = compose(f"datasets=[{','.join(map(str, paths))}]", *overrides)
        return fit_templates(config, read_entries(config), tokenizer_of("Qwen 2.5"), earlier)

    return fitted


def test_a_run_whose_entries_are_all_for_chat_has_that_template_in_its_checkpoints_and_null_in_config_yaml(fit):
    config, entries = fit([QUESTION], [CONVERSATION])
    assert [entry.template for entry in entries] == ["chat", "chat"]
    assert config.as_dict()["template"] == "chat" and config.as_composed["template"] is None


def test_each_entry_has_its_own_template_where_they_differ(fit):
    config, entries = fit([QUESTION], [{"text": "Once."}])
    assert [entry.template for entry in entries] == ["chat", None]
    assert [given["template"] for given in config.as_dict()["datasets"]] == ["chat", None]
    assert config.as_dict()["template"] is None and all(isinstance(given, str) for given in config.as_composed["datasets"])
    # Such a configuration is read as the entries are.
    assert [read_entry(given).template for given in config.as_dict()["datasets"]] == ["chat", None]


def test_a_model_that_learns_from_conversations_and_plain_text_is_served_with_its_chat_template(fit):
    from preference_training.data.rendering.chat_templates import detect_format

    config, _ = fit([QUESTION], [{"text": "Once."}])
    assert detect_format(config.as_dict(), [], None) == "chat"


def test_what_the_user_sets_is_kept(fit):
    config, [entry] = fit([CONVERSATION], overrides=["template=hh"])
    assert entry.template == "hh" and config.template == "hh" and not config.chosen


def test_a_resumed_run_keeps_its_templates_and_one_of_an_earlier_version_has_none(fit):
    _, [entry] = fit([CONVERSATION], earlier=Earlier(templates=["chat"]))
    assert entry.template == "chat"
    _, [entry] = fit([CONVERSATION], earlier=Earlier(templates=[None]))
    assert entry.template is None
    config, [entry] = fit([CONVERSATION], earlier=Earlier())
    assert entry.template is None and not config.chosen
