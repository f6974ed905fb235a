"""Checks of what texts say: bag of words, near-duplicates, contamination, languages."""

import json
import random
from types import SimpleNamespace

import numpy
import pytest

from preference_training.core.errors import UserError
from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality import bag_of_words as bags
from preference_training.data.quality import near_duplicates
from preference_training.data.quality.contamination import find_contamination
from preference_training.data.quality.languages import OTHER, language, languages
from preference_training.data.quality.near_duplicates import find_near_duplicates
from preference_training.data.quality.pairs import Pairs
from preference_training.data.quality.words import ngrams, word_hashes, words
from preference_training.data.tokenization import TokenizedPrompt


class Words:
    """A tokenizer of words."""

    is_fast = False

    def __init__(self):
        self.known: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self.known.setdefault(word, len(self.known) + 1) for word in text.split()]

    def decode(self, ids, skip_special_tokens=False) -> str:
        names = {number: word for word, number in self.known.items()}
        return " ".join(names[number] for number in ids)


TOKENIZER = Words()


def table(*prompts: tuple) -> PromptTable:
    """Prompts with responses, of which the first is preferred to the others."""
    made = []
    for prompt, *responses in prompts:
        examples = [(0, k) for k in range(1, len(responses))]
        made.append(TokenizedPrompt(TOKENIZER.encode(prompt), [TOKENIZER.encode(text) for text in responses], examples))
    return PromptTable.of(made)


# ---- words ------------------------------------------------------------------------------------------------------------------


def test_words_ignore_case_and_punctuation_and_scripts_without_spaces_have_one_a_character():
    assert words("Don't STOP, now_or 3.5") == ["don", "t", "stop", "now", "or", "3", "5"]
    assert words("東京に go") == ["東", "京", "に", "go"]
    one, other = word_hashes(["A b, c", "a B c!"]), word_hashes(["a b c d", ""])
    assert one.at(0) == one.at(1) == other.at(0)[:3] and other.at(1) == []


def test_ngrams_stay_within_their_texts():
    owner, hashes = ngrams(word_hashes(["a b c", "b c d", "", "b"]), 2)
    assert owner.tolist() == [0, 0, 1, 1]
    assert hashes[1] == hashes[2] and len(set(hashes.tolist())) == 3
    assert len(ngrams(word_hashes(["a"]), 2)[0]) == 0


# ---- bag of words -----------------------------------------------------------------------------------------------------------


def test_a_word_that_gives_labels_away_is_found_and_labels_at_random_are_not():
    draw = random.Random(0)
    nouns = [f"noun{n}" for n in range(40)]

    def prompts(number: int, tell: str):
        return table(*((f"p{n}", f"{draw.choice(nouns)} {tell}", f"{draw.choice(nouns)} never") for n in range(number)))

    for tell, least, most in (("certainly", 1.0, 1.0), ("never", 0.3, 0.7)):
        train, held_out = prompts(200, tell), prompts(100, tell)
        found = bags.bag_of_words((train, held_out), Pairs.of(train), Pairs.of(held_out), TOKENIZER)
        assert least <= found.accuracy <= most and len(found.outcomes) == len(found.prompts) == 100


def test_the_weights_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    from scipy.sparse import csr_array

    draw = numpy.random.default_rng(0)
    rows = draw.normal(size=(60, 5)) + numpy.array([0.5, 0, 0, -0.2, 0])
    ours = bags.fit(csr_array(rows))
    # Each pair once as it is, once reversed, for a classifier that needs both labels; so at half the strength.
    model = linear_model.LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10, max_iter=1000)
    theirs = model.fit(numpy.concatenate([rows, -rows]), [1] * 60 + [0] * 60).coef_[0]
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_few_pairs_are_too_few_to_learn_from():
    few = table(("p", "a", "b"), ("q", "a", "b"))
    assert bags.bag_of_words((few, few), Pairs.of(few), Pairs.of(few), TOKENIZER) is None


# ---- near-duplicates --------------------------------------------------------------------------------------------------------


def text(draw: random.Random, number: int = 30) -> str:
    return " ".join(f"w{draw.randrange(5000)}" for _ in range(number))


def test_prompts_that_differ_in_a_word_are_near_duplicates_within_and_across_splits():
    pytest.importorskip("rensa")
    draw = random.Random(0)
    train = [text(draw) for _ in range(300)]
    # One word at the end: of 28 and 29 runs of three, 28 in common.
    train += [f"{prompt} indeed" for prompt in train[:20]]
    held_out = [text(draw) for _ in range(50)] + [f"Well {prompt}" for prompt in train[100:107]]
    found = find_near_duplicates(table(*((p, "a") for p in train)), table(*((p, "a") for p in held_out)), 0.7)
    assert (found.train, found.held_out, found.within, found.across) == (320, 57, 20, 7)
    assert all(pair.similarity == pytest.approx(28 / 29) for pair in found.examples)


def test_what_counts_as_similar_is_the_exact_share_of_common_runs():
    pytest.importorskip("rensa")
    # 10 runs of three each; the first 7 are common: 7 of 13.
    one, other = "a b c d e f g h i j k l", "a b c d e f g h i x y z"
    for similarity, expected in ((0.53, 1), (0.55, 0)):
        assert find_near_duplicates(table((one, "r"), (other, "r")), table(), similarity).within == expected


def test_a_system_prompt_that_all_share_makes_nothing_alike_and_equal_prompts_count_once():
    pytest.importorskip("rensa")
    draw = random.Random(0)
    system = text(draw, 200)
    prompts = [f"{system} {text(draw, 15)}" for _ in range(100)]
    found = find_near_duplicates(table(*((p, "a") for p in [*prompts, *prompts])), table((prompts[0], "b")), 0.7)
    assert (found.train, found.held_out, found.within, found.across) == (100, 0, 0, 0)


def test_prompts_without_text_are_compared_by_their_responses():
    pytest.importorskip("rensa")
    draw = random.Random(0)
    texts = [text(draw) for _ in range(5)]
    found = find_near_duplicates(table(*(("p", t) for t in texts)), table(("p", f"{texts[0]} end")), 0.7)
    assert (found.train, found.held_out, found.across) == (5, 1, 1)


def test_without_rensa_nothing_is_searched(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    assert find_near_duplicates(table(("a b c", "d")), table(), 0.7) is None
    assert "pip install rensa" in near_duplicates.NOT_INSTALLED


# ---- contamination ----------------------------------------------------------------------------------------------------------

ITEM = "Natalia sold clips to 48 of her friends in April, and then half as many in May."


def contamination(train: PromptTable, path, n: int = 13):
    [found] = find_contamination(train, TOKENIZER, [str(path)], n)
    return found


def test_a_row_of_a_benchmark_is_found_in_a_prompt_or_a_response_whatever_its_case(tmp_path):
    rows = [{"question": ITEM, "answer": "72"}, {"question": "Another " * 20}, {"question": "too short"}]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = table(
        (f"Solve this: {ITEM.lower()} Now!", "ok"),
        ("Write a riddle", f"Here: {ITEM}"),
        ("Natalia sold clips to 48 of her friends in April", "yes"),
    )
    found = contamination(train, tmp_path / "bench.jsonl")
    # The third row has too few words to compare; the third prompt has ten of the words, not thirteen.
    assert (found.items, found.found, found.prompts) == (2, 1, 2)
    assert found.examples == [ITEM]
    assert contamination(train, tmp_path / "bench.jsonl", n=10).prompts == 3


def test_a_text_that_is_shorter_than_the_ngram_is_compared_whole(tmp_path):
    (tmp_path / "bench.txt").write_text(
        "one two three four five six seven eight\n\nnine words that are not in the data at all\n"
    )
    found = contamination(table(("say one two three four five six seven eight please", "no")), tmp_path / "bench.txt")
    assert (found.items, found.found, found.prompts) == (2, 1, 1)
    assert contamination(table(("one two three four five six seven nine", "no")), tmp_path / "bench.txt").found == 0


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bench.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"contamination_files: .*bench.bin: cannot be read"):
        contamination(table(("a", "b")), tmp_path / "bench.bin")
    (tmp_path / "bench.jsonl").write_text('{"question": "Why?"}\n{"question": "W')
    with pytest.raises(UserError, match=r"contamination_files: .*bench.jsonl, (line|row) 2: .*") as refusal:
        contamination(table(("a", "b")), tmp_path / "bench.jsonl")
    assert "on_bad_row" not in str(refusal.value)


# ---- languages --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the capital of France, and how do you get to it?", "English"),
        ("Was ist die Hauptstadt von Frankreich und wie komme ich mit der Bahn zu ihr?", "German"),
        ("Quelle est la capitale de la France et comment y aller avec le train ?", "French"),
        ("¿Cuál es la capital de Francia y cómo se llega con el tren?", "Spanish"),
        ("フランスの首都はどこですか。", "Japanese"),
        ("法国的首都是哪里", "Chinese"),
        ("프랑스의 수도는 어디입니까?", "Korean"),
        ("Какая столица Франции?", "Cyrillic script"),
        ("x = 3; y = f(x)", OTHER),
        ("", OTHER),
    ],
)
def test_a_language_is_guessed_by_script_and_frequent_words(text, expected):
    assert language(text) == expected


def test_languages_are_counted_the_most_frequent_first():
    found = languages(["法国的首都", "what is the name of it", "how is the end of it"])
    assert list(found.items()) == [("English", 2), ("Chinese", 1)]


def test_special_tokens_of_a_fast_tokenizer_are_no_words(tokenizer):
    from preference_training.data.quality.words import decode

    ids = [tokenizer.eos_token_id, *tokenizer("the rain", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert decode(tokenizer, [ids]) == ["the rain"]
    assert decode(SimpleNamespace(is_fast=False, decode=lambda ids, **_: f"{ids}"), [[1]]) == ["[1]"]
