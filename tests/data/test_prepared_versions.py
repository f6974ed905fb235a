"""The version of the rules by which rows become token ids is raised whenever they change, and data of an earlier one is found.

tests/golden/prepared_data.json says for each version what comes of a handful of small inputs. After a change of the output:

    1. raise `VERSION` in rendering/settings.py, and say in VERSIONS what is new
    2. python -m tests.data.test_prepared_versions adds what comes of the inputs now; what is there it never changes

Where nothing was to change, the output has changed by mistake.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from preference_training.data.entries import read_entry
from preference_training.data.preparation import prepare
from preference_training.data.rendering.settings import VERSION, VERSIONS, TokenSettings
from preference_training.data.token_files import write_tokenized
from preference_training.data.tokenization import TokenizedPrompt as Prompt
from tests.support.files import GOLDEN

KNOWN = GOLDEN / "prepared_data.json"

LOADER = """
from preference_datasets import register

@register("mine")
def get_mine(split, silent=False, cache_dir=None):
    for n in range(5):
        yield f"{split} {n}", {"responses": [" good", f" bad {n}"], "pairs": [(0, 1)], "sft_target": " good"}
"""


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


ROWS = {
    "text": [{"prompt": f"Question {n}?\n", "chosen": f"Yes, {n}.", "rejected": "No."} for n in range(40)],
    "dialogues": [
        {"chosen": f"\n\nHuman: Is it {n}?\n\nAssistant: It is.", "rejected": f"\n\nHuman: Is it {n}?\n\nAssistant: No"}
        for n in range(10)
    ],
    "conversations": [
        {"prompt": [user(f"Is it {n}?")], "chosen": [answer("Yes.")], "rejected": [answer("Yes. \n" if n % 3 else "no")]}
        for n in range(40)
    ],
    "scored": [
        {"prompt": f"What is {n}?", "answers": [{"text": f"{n} {k}", "score": k % 3} for k in range(n % 4 + 2)]}
        for n in range(12)
    ],
    "targets": [{"prompt": f"Say {n}.\n", "completion": f"{n}" * (n % 9 + 1)} for n in range(30)],
}
PAIRS = TokenSettings(examples="pairs", max_length=512, max_prompt_length=256, version=VERSION)
SHORT = replace(PAIRS, max_length=30, max_prompt_length=20)
LISTS = {"path": "scored.jsonl", "responses": "answers.text", "scores": "answers.score"}
# A name, the entry, and the settings.
CASES = {
    "texts": ("text.jsonl", PAIRS),
    "texts, half of them held out": ({"path": "text.jsonl", "held_out_share": 0.5}, PAIRS),
    "texts in a template": ({"path": "text.jsonl", "held_out_share": 0.2}, replace(PAIRS, template="chatml")),
    "dialogues": ("dialogues.jsonl", PAIRS),
    "dialogues, cut": ("dialogues.jsonl", replace(SHORT, truncation_mode="keep_end")),
    "dialogues that fit": ("dialogues.jsonl", replace(SHORT, truncation_mode="drop", max_length=41)),
    "conversations": ({"path": "conversations.jsonl", "held_out_share": 0.2}, PAIRS),
    "conversations, trimmed": (
        {"path": "conversations.jsonl", "held_out_share": 0.2},
        replace(PAIRS, template="chat", system_prompt="Be brief."),
    ),
    "conversations, cut": ("conversations.jsonl", replace(SHORT, template="chat", truncation_mode="keep_end")),
    "scored answers": (LISTS, PAIRS),
    "targets": ({"path": "targets.jsonl", "response": "completion"}, replace(PAIRS, examples="targets")),
    "the generated set": ("toy", PAIRS),
    "a loader of the user's": ("mine.py:mine", PAIRS),
    "token ids": ({"path": "ids.pt", "held_out_share": 0.3}, SHORT),
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_with_template():
    """The byte-level tokenizer, with a beginning of the sequence that only its chat template writes."""
    from preference_training.modeling.tokenizer import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_inputs(folder: Path) -> None:
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(LOADER)
    ids = [Prompt([1, n, n + 1], [[n, 2], [3] * (n % 40 + 1), [n, 2]], [(0, 1)]) for n in range(4, 44)]
    write_tokenized(folder / "ids.pt", ids)


def outcome(case: str, tokenizer, directory: Path, version: int) -> dict:
    """Fingerprint of the content, and names of the files where the inputs' bytes are ours, of both splits."""
    given, settings = CASES[case]
    entry = read_entry(given)
    splits = [
        prepare([entry], split, tokenizer, lambda _: replace(settings, version=version), directory)
        for split in ("train", "test")
    ]
    found = {"content": [split.table.fingerprint for split in splits]}
    # What torch makes of token ids may differ from version to version.
    return found if entry.tokenized_file else found | {"files": [part.name for split in splits for part in split.table.parts]}


def all_outcomes(version: int) -> dict[str, dict]:
    here = Path.cwd()
    with TemporaryDirectory() as name:
        os.chdir(name)
        try:
            write_inputs(Path(name))
            tokenizer = tokenizer_with_template()
            return {case: outcome(case, tokenizer, Path(name) / "prepared", version) for case in CASES}
        finally:
            os.chdir(here)


@pytest.fixture(scope="module")
def known() -> dict[str, dict]:
    return json.loads(KNOWN.read_text())


@pytest.mark.parametrize("version", [1, VERSION])
def test_what_comes_of_the_inputs_is_what_came_of_them_in_that_version(known, version):
    """A run that began with an earlier version goes on with its data, found by its name or prepared anew."""
    found = all_outcomes(version)
    changed = [case for case in CASES if found[case] != known[str(version)].get(case)]
    assert not changed, f"the rules of version {version} give other data than before for {changed}: {__doc__}"


def test_every_version_says_what_was_new_and_gives_other_data(known):
    assert [int(version) for version in known] == list(VERSIONS) == list(range(1, VERSION + 1))
    assert all(known[str(version)] != known[str(version - 1)] for version in range(2, VERSION + 1))


def test_texts_of_the_usual_template_stay_on_their_side_of_the_split_from_the_first_version_on(known):
    for case in ("texts", "texts, half of them held out", "dialogues", "scored answers"):
        assert known["1"][case]["content"] == known["2"][case]["content"]
        assert known["1"][case]["files"] != known["2"][case]["files"]


def add_version() -> None:
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    for version in VERSIONS:
        if str(version) not in known:
            known[str(version)] = all_outcomes(version)
            print(f"version {version} added")
    KNOWN.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    add_version()
