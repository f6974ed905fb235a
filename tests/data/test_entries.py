"""Entries of `datasets`: what one may say, what is refused and how, and the records that files and own loaders give."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_training.configuration.schema import GENERAL_KEYS
from preference_training.core.errors import UserError
from preference_training.data import registry
from preference_training.data.entries import UserData, check_examples, load_records, read_entries, read_entry
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.records.report import OTHER_PROMPT, SAME_TEXT, DataReport
from preference_training.data.registry import Dataset
from preference_training.data.rows.field_maps import FieldMap
from preference_training.losses.registry import build_loss
from tests.support.files import DATA_SUFFIXES, write

# Hypothesis runs one function many times; each example writes its own file, so that sharing tmp_path is harmless.
SHARES_FOLDER = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def restored_registry(monkeypatch):
    """The registry, put back as it was after each test."""
    known = dict(registry.DATASETS)
    yield registry.DATASETS
    registry.DATASETS.clear()
    registry.DATASETS.update(known)


def triplets(count: int) -> list[dict]:
    return [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)]


def records_of(entry, split: str = "train", report: DataReport | None = None, **defaults) -> list[PreferenceRecord]:
    """The records of an entry; nothing is held out unless it, or the defaults, say so."""
    return list(load_records(read_entry(entry, {"held_out_share": 0} | defaults), split, report))


def refusal(entry, **defaults) -> str:
    """What is told about an entry, before anything is loaded."""
    with pytest.raises(UserError) as refused:
        read_entry(entry, defaults)
    assert str(refused.value).startswith("datasets: ")
    return str(refused.value)


# ---- names, paths and keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "hh", "hh-harmless-base", "lc", "leetcode", "nectar"])
def test_a_name_alone_is_the_registered_data_set(restored_registry, name):
    entry = read_entry(name)
    assert (entry.name, entry.dataset, entry.options, entry.weight) == (name, restored_registry[name], {}, 1.0)
    assert read_entry({"name": name}) == entry


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_a_path_alone_is_a_file_of_the_users(tmp_path, suffix):
    path = str(write(tmp_path / f"rows{suffix}", triplets(1)))
    for entry in map(read_entry, (path, {"path": path})):
        assert entry.dataset.load.__self__ == UserData(path)
        assert (entry.name, entry.options, entry.weight) == (path, {}, 1.0)
    assert (entry.name, entry.dataset.truncation_mode, entry.dataset.skip_bad_rows) == (path, "keep_end", False)


def test_a_name_with_a_slash_is_a_set_of_the_hub_and_one_that_is_registered_is_not(restored_registry):
    assert read_entry("organisation/name").dataset.load.__self__ == UserData("organisation/name")
    restored_registry["organisation/name"] = restored_registry["toy"]
    assert read_entry("organisation/name").dataset is restored_registry["toy"]


def test_a_file_of_token_ids_is_known_by_its_ending(tmp_path):
    (tmp_path / "ids.pt").touch()
    assert read_entry(str(tmp_path / "ids.pt")).tokenized_file == tmp_path / "ids.pt"
    assert read_entry("toy").tokenized_file is None


@pytest.mark.parametrize("entry", [None, 5, [], ["toy"], {}, {"weight": 2}, {"name": "toy", "path": "a/b"}, True])
def test_what_is_neither_a_name_nor_a_path_is_refused(entry):
    assert refusal(entry) == f"datasets: found {entry!r}, expected a name, a path, or a dict with either name or path."


@pytest.mark.parametrize("entry", ["hh-harmles-base", {"name": "hh-harmles-base"}, {"name": "HH-Harmless-Base"}])
def test_an_unknown_name_is_refused_with_the_nearest_one(entry):
    assert "unknown data set" in refusal(entry)
    assert "did you mean hh-harmless-base?" in refusal(entry)


def test_a_name_near_no_other_is_refused_with_all_names_and_the_forms_of_other_data():
    text = refusal("completely else")
    assert "known are: capybara, helpsteer3, hh, hh-harmless-base, " in text
    assert text.endswith("a set of the hub is ORGANIZATION/NAME; a loader of your own is FILE.py:NAME.")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("choosen", "chosen"),
        ("reject", "rejected"),
        ("temlpate", "template"),
        ("weigth", "weight"),
        ("held_out", "held_out_share"),
        ("topk", "top_k"),
        ("test_file", "test_split"),
        ("implicit", "implicit_prompt"),
    ],
)
def test_an_unknown_key_of_a_path_is_refused_with_the_nearest_one(tmp_path, key, meant):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    assert refusal({"path": path, key: 1}) == f"datasets: {path}: no key {key!r}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [
        ("shp", "min_score", "min_score_ratio"),
        ("hh", "data_directory", "data_dir"),
        ("hh-helpful-base", "data_directory", "data_dir"),
        ("toy", "weigth", "weight"),
        ("orca", "trunctation_mode", "truncation_mode"),
    ],
)
def test_an_unknown_key_of_a_name_is_refused_with_the_nearest_one(name, key, meant):
    assert refusal({"name": name, key: 1}) == f"datasets: {name}: no key {key!r}; did you mean {meant}?"


def test_keys_of_files_are_none_of_names_and_keys_need_not_be_texts(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    assert "no key 'ranks'; known are: on_bad_row, system_prompt," in refusal({"name": "toy", "ranks": "k"})
    assert "no key 'report'" in refusal({"name": "shp", "report": None})
    assert "no key 'cache_dir'" in refusal({"name": "shp", "cache_dir": "."})
    assert "no key 'min_score_ratio'" in refusal({"path": path, "min_score_ratio": 2})
    assert "no key 5" in refusal({"path": path, 5: 1})
    assert "no key 5" in refusal({"name": "toy", 5: 1})


# ---- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"template": "chatlm"}, "template: found 'chatlm'; did you mean chatml?"),
        ({"template": ["raw"]}, "template: found ['raw'];"),
        ({"template": False}, "template: found False;"),
        ({"truncation_mode": "keep_both"}, "truncation_mode: found 'keep_both'; did you mean keep_"),
        ({"on_bad_row": "ignore"}, "on_bad_row: found 'ignore'; known are: skip, stop."),
        ({"on_bad_row": True}, "on_bad_row: found True; known are: skip, stop."),
        ({"weight": 0}, "weight: found 0, expected a number above 0."),
        ({"weight": -1.5}, "weight: found -1.5, expected a number above 0."),
        ({"weight": "2"}, "weight: found '2', expected a number above 0."),
        ({"weight": True}, "weight: found True, expected a number above 0."),
        ({"weight": float("inf")}, "weight: found inf, expected a number above 0."),
        ({"weight": float("nan")}, "weight: found nan, expected a number above 0."),
        ({"system_prompt": 5}, "system_prompt: found 5, expected a text."),
    ],
)
def test_a_general_key_with_a_senseless_value_is_refused_in_entries_and_as_a_default(tmp_path, keys, told):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    assert refusal({"name": "toy"} | keys).startswith(f"datasets: toy: {told}")
    assert refusal({"path": path} | keys).startswith(f"datasets: {path}: {told}")
    assert refusal("toy", **keys).startswith(f"datasets: toy: {told}")


NUMBERS_OR = "responses needs either scores (higher is better) or ranks (lower is better)."
SHARE = "expected 0 to below 1."


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"prompt": 5}, "prompt: found 5, expected the name of a field."),
        ({"chosen": ["a", "b"]}, "chosen: found ['a', 'b'], expected the name of a field."),
        ({"system": True}, "system: found True, expected the name of a field."),
        ({"responses": "r"}, NUMBERS_OR),
        ({"responses": "r", "scores": "s", "ranks": "k"}, NUMBERS_OR),
        ({"scores": "s"}, "scores needs responses."),
        (
            {"roles": {"bot": "robot"}},
            "roles: found {'bot': 'robot'}, expected {NAME: ROLE}, with the roles system, developer,",
        ),
        ({"roles": "bot"}, "roles: found 'bot', expected {NAME: ROLE}"),
        ({"ranks": "s", "response": "r"}, "ranks needs responses."),
        ({"score": "s"}, "score needs response."),
        ({"score": "s", "responses": "r", "ranks": "k"}, "score needs response."),
        ({"label": "l"}, "label needs response or messages."),
        ({"label": "l", "score": "s", "response": "r"}, "found score and label, expected one of them."),
        ({"margin": "m", "response": "r"}, "margin is of pairs of chosen and rejected, and responses are in response."),
        (
            {"example_weight": "w", "responses": "r", "scores": "s"},
            "example_weight is of pairs of chosen and rejected, and responses are in responses.",
        ),
        ({"margin": 5}, "margin: found 5, expected the name of a field."),
        ({"top_k": 5}, "top_k: found 5, expected {column: NAME, k: NUMBER}."),
        ({"top_k": {"column": "n"}}, "top_k: found {'column': 'n'}, expected {column: NAME, k: NUMBER}."),
        ({"top_k": {"column": "n", "k": 0}}, "top_k: found {'column': 'n', 'k': 0}, expected"),
        ({"top_k": {"column": "n", "k": 2.0}}, "top_k: found {'column': 'n', 'k': 2.0}, expected"),
        ({"top_k": {"column": "n", "k": True}}, "top_k: found {'column': 'n', 'k': True}, expected"),
        ({"top_k": {"column": 5, "k": 2}}, "top_k: found {'column': 5, 'k': 2}, expected"),
        ({"top_k": {"column": "n", "k": 2, "more": 1}}, "top_k: found"),
        ({"where": "n > "}, "where: found 'n > ' (invalid syntax), expected comparisons of columns, numbers and texts"),
        ({"where": ["n"]}, "where: found ['n'], expected {COLUMN: VALUE}, or a text of comparisons"),
        (
            {"where": {"n": ">= much"}},
            "where: n: found '>= much', expected a value, a list of values, or a comparison such as '>= 0.5'.",
        ),
        ({"where": {5: "x"}}, "where: found the column 5, expected the name of a field."),
        ({"held_out_share": 1}, f"held_out_share: found 1, {SHARE}"),
        ({"held_out_share": -0.1}, f"held_out_share: found -0.1, {SHARE}"),
        ({"held_out_share": "5%"}, f"held_out_share: found '5%', {SHARE}"),
        ({"held_out_share": float("nan")}, f"held_out_share: found nan, {SHARE}"),
        ({"split": 5}, "split: found 5, expected a text."),
        ({"test_split": ["test"]}, "test_split: found ['test'], expected a text."),
        ({"test_path": 5}, "test_path: found 5, expected a text."),
        ({"subset": ["a", "b"]}, "subset: found ['a', 'b'], expected a text."),
        ({"data_dir": 5}, "data_dir: found 5, expected a text."),
    ],
)
def test_a_map_of_fields_that_contradicts_itself_is_refused(tmp_path, keys, told):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    assert refusal({"path": path} | keys).startswith(f"datasets: {path}: {told}")


PAIRED = "Expected chosen and rejected, or several responses to a prompt, each with a score (score: {}; true is above false)."
RANKED = "Expected responses with scores or ranks, response with score, or chosen and rejected."
LABELED = "Expected response with label: COLUMN, or pairs."
TRIPLET = "the columns prompt, chosen, rejected, none of them known to hold margins"
MARGINS = "Expected a column of margins, margin: COLUMN, or responses with scores."


@pytest.mark.parametrize(
    ("loss", "keys", "told"),
    [
        ("odpo", {}, f"reads the margin of each pair, and the rows have {TRIPLET}. {MARGINS}"),
        ("odpo", {"margin": "m"}, None),
        ("odpo", {"responses": "r", "ranks": "k"}, None),
        ("plackett_luce", {}, None),
        ("plackett_luce", {"response": "r", "score": "s"}, None),
        (
            "plackett_luce",
            {"response": "r"},
            f"learns rankings, and the rows have single responses (r) without a score or label. {RANKED}",
        ),
        (
            "plackett_luce",
            {"response": "r", "label": "l"},
            f"learns rankings, and the rows have single responses (r) labeled (l). {RANKED}",
        ),
        ("kto", {}, None),
        ("kto", {"response": "r", "label": "l"}, None),
        (
            "kto",
            {"response": "r"},
            f"learns from labels, and the rows have single responses (r) without a score or label. {LABELED}",
        ),
        (
            "dpo",
            {"response": "r", "label": "l"},
            f"compares pairs, and the rows have single responses (r) labeled (l). {PAIRED.format('l')} "
            "Otherwise use loss=sft, or a loss of labels such as kto.",
        ),
        (
            "dpo",
            {"response": "r"},
            f"compares pairs, and the rows have single responses (r) without a score or label. {PAIRED.format('COLUMN')} "
            "Otherwise use loss=sft.",
        ),
        ("dpo", {"response": "r", "score": "s"}, None),
        ("dpo", {"answers": ["a", "b"], "better": "c"}, None),
        (
            "dpo",
            {"messages": "m"},
            f"compares pairs, and the rows have conversations in m, which nothing is compared with. {PAIRED.format('COLUMN')} "
            "Otherwise use loss=sft.",
        ),
        ("dpo", {}, None),
        ("sft", {"response": "r", "label": "l"}, None),
    ],
)
def test_a_loss_that_the_fields_of_a_file_cannot_serve_is_refused(tmp_path, loss, keys, told, compose):
    columns = {name: "1" for value in keys.values() for name in (value if isinstance(value, list) else [value])}
    path = str(write(tmp_path / "rows.jsonl", [row | columns for row in triplets(1)]))
    built = build_loss(**compose(f"loss={loss}").loss.given())
    if told is None:
        return check_examples([read_entry({"path": path} | keys)], built, loss)
    with pytest.raises(UserError) as refused:
        check_examples([read_entry({"path": path} | keys)], built, loss)
    assert str(refused.value) == f"datasets: {path}: loss={loss} {told}"


COLUMNS = "the columns are prompt, chosen, rejected"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"chosen": "foo"}, f"chosen: no row has a column 'foo', {COLUMNS}. Change chosen in the field map"),
        (
            {"rejected": ["rejected", "rejectd"]},
            f"'rejectd', {COLUMNS}; did you mean rejected? Change rejected in the field map",
        ),
        ({"prompt": "prompt.text"}, f"prompt: no row has a column 'prompt.text', {COLUMNS}; did you mean prompt?"),
        ({"system": "sys"}, f"system: no row has a column 'sys', {COLUMNS}. Change system"),
    ],
)
def test_a_field_map_that_names_a_column_which_no_row_has_is_refused_with_the_columns_there_are(tmp_path, keys, told, compose):
    path = str(write(tmp_path / "rows.jsonl", triplets(2)))
    dpo = build_loss(**compose("loss=dpo").loss.given())
    for key in ("path", "name"):
        with pytest.raises(UserError) as refused:
            check_examples([read_entry({key: path} | keys)], dpo, "dpo")
        assert str(refused.value).startswith(f"datasets: {path}: ") and told in str(refused.value)
        assert "Fix the row" not in str(refused.value)
    check_examples([read_entry({"path": path, "chosen": "rejected", "rejected": "chosen"})], dpo, "dpo")


@pytest.mark.parametrize("row", [{"foo": "Some text."}, {"foo": "Some text.", "bar": "Another one."}])
def test_rows_in_which_nothing_can_be_compared_get_no_hint_that_a_loss_of_pairs_would_refuse(tmp_path, row, compose):
    path = str(write(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(UserError, match=f"the columns {', '.join(row)}, none of them known to hold chosen") as refused:
        check_examples([read_entry(path)], build_loss(**compose("loss=dpo").loss.given()), "dpo")
    assert "text: foo" not in str(refused.value)
    # What learns single texts is told how to read them, with the row.
    check_examples([read_entry(path)], build_loss(**compose("loss=sft").loss.given()), "sft")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "p", "completion": "a"}, "single responses (completion) without a score or label"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "conversations in messages"),
        ({"text": "A text."}, "plain text in text"),
    ],
)
def test_a_loss_that_the_format_of_a_file_cannot_serve_is_refused_with_what_was_found(tmp_path, row, found, compose):
    path = str(write(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(UserError) as refused:
        check_examples([read_entry(path)], build_loss(**compose("loss=dpo").loss.given()), "dpo")
    assert str(refused.value).startswith(f"datasets: {path}: loss=dpo compares pairs, and the rows have {found}")
    assert str(refused.value).endswith("Otherwise use loss=sft.")
    check_examples([read_entry(path)], build_loss(**compose("loss=sft").loss.given()), "sft")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"answers": ["a", "b"]}, "answers and better go together."),
        ({"answers": ["a"], "better": "c"}, "answers: found ['a'], expected the name of a field, or names of fields."),
        ({"answers": ["a", "b", "c"], "better": "c"}, "answers: expected two fields, or a list."),
        ({"answers": ["a", "b"], "better": {"c": [1]}}, "better: found {'c': [1]}, expected COLUMN, or {COLUMN: [VALUE OF"),
        ({"responses": ["a", 5], "scores": "s"}, "responses: found ['a', 5], expected the name of a field"),
        ({"messages": "m", "margin": "n"}, "margin is of pairs of chosen and rejected, and responses are in messages."),
    ],
)
def test_a_map_of_verdicts_or_columns_that_is_incomplete_is_refused(tmp_path, keys, told):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    assert refusal({"path": path} | keys).startswith(f"datasets: {path}: {told}")


def test_a_senseless_share_of_the_configuration_is_refused(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    assert refusal(path, held_out_share=1.5) == f"datasets: {path}: held_out_share: found 1.5, expected 0 to below 1."
    # A name has its own splits.
    assert read_entry("toy", {"held_out_share": 1.5}).name == "toy"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"min_score_ratio": "two"}, "min_score_ratio: found 'two', expected a number."),
        ({"min_score_ratio": True}, "min_score_ratio: found True, expected a number."),
        ({"subset": 5}, "subset: found 5, expected a text."),
        ({"data_dir": "no/such"}, "data_dir: no/such: no such directory; relative to "),
        ({"data_dir": 5}, "data_dir: 5: no such directory; relative to "),
    ],
)
def test_a_senseless_value_for_a_named_set_is_refused(keys, told):
    assert refusal({"name": "shp"} | keys).startswith(f"datasets: shp: {told}")


def test_files_that_do_not_exist_and_directories_are_refused_with_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    write(tmp_path / "rows.jsonl", triplets(1))
    missing = f"missing.csv: no such file. Expected a readable file; paths are relative to {tmp_path}."
    assert refusal("missing.csv") == refusal({"path": "missing.csv"}) == f"datasets: {missing}"
    assert refusal({"path": "rows.jsonl", "test_path": "missing.csv"}) == f"datasets: {missing}"
    assert refusal("folder.jsonl").startswith("datasets: folder.jsonl: a directory. Expected a readable file")
    assert refusal("ids.pt").startswith("datasets: ids.pt: no such file.")
    assert read_entry("rows.jsonl").name == "rows.jsonl"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "chosen", ">= 1", ">= x", "toy", "skip"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["column", "k", "name"]) | st.integers(), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = st.sampled_from([*FieldMap.__dataclass_fields__, *UserData.OPTIONS, *GENERAL_KEYS, "min_score_ratio", "unknown"])


@settings(max_examples=400, deadline=None, suppress_health_check=SHARES_FOLDER)
@given(keys=st.dictionaries(KEYS, JUNK, max_size=3), start=st.sampled_from(["toy", "shp", "path"]), bare=JUNK)
def test_any_entry_is_understood_or_refused_with_one_message(tmp_path, keys, start, bare):
    path = tmp_path / "rows.jsonl"
    if not path.exists():
        write(path, triplets(1))
    for entry in (({"path": str(path)} if start == "path" else {"name": start}) | keys, bare):
        try:
            understood = read_entry(entry)
        except UserError as refused:
            assert str(refused).startswith("datasets: ")
        else:
            assert understood.weight > 0
            assert 0 <= understood.held_out_share < 1


# ---- the configuration's values -------------------------------------------------------------------------------------------

DEFAULTS = {
    "template": "hh",
    "system_prompt": "be brief",
    "train_on": "last_turn",
    "truncation_mode": "drop",
    "on_bad_row": "skip",
    "weight": 2,
}


def general(entry) -> dict:
    return {key: getattr(entry, key) for key in GENERAL_KEYS}


def test_what_an_entry_does_not_say_is_as_the_configuration_says():
    assert general(read_entry("toy")) == dict.fromkeys(GENERAL_KEYS) | {"weight": 1.0}
    assert general(read_entry("toy", DEFAULTS)) == DEFAULTS
    assert general(read_entry({"name": "toy", "template": None}, DEFAULTS)) == DEFAULTS
    assert general(read_entry("toy", dict.fromkeys(GENERAL_KEYS))) == general(read_entry("toy"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("template", "raw"),
        ("system_prompt", ""),
        ("train_on", "all_turns"),
        ("truncation_mode", "keep_end"),
        ("on_bad_row", "stop"),
        ("weight", 0.5),
    ],
)
def test_each_key_of_an_entry_goes_before_the_configurations(tmp_path, key, value):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    for entry in ({"name": "toy"}, {"path": path}):
        assert general(read_entry(entry | {key: value}, DEFAULTS)) == DEFAULTS | {key: value}


def test_the_share_that_is_held_out_is_the_entrys_else_the_configurations_else_a_twentieth(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    assert read_entry(path).held_out_share == 0.05
    assert read_entry(path, {"held_out_share": 0.2}).held_out_share == 0.2
    assert read_entry({"path": path, "held_out_share": 0.3}, {"held_out_share": 0.2}).held_out_share == 0.3
    assert read_entry({"path": path, "held_out_share": None}, {"held_out_share": 0.2}).held_out_share == 0.2
    assert read_entry({"path": path, "held_out_share": 0}, {"held_out_share": 0.2}).dataset.load.__self__.held_out_share == 0


def test_null_is_what_is_not_given(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    nothing = dict.fromkeys([*FieldMap.__dataclass_fields__, *UserData.OPTIONS, *GENERAL_KEYS])
    entry = read_entry({"path": path} | nothing)
    assert entry.dataset.load.__self__ == UserData(path)
    assert general(entry) == general(read_entry(path))


def test_bad_rows_are_skipped_in_public_sets_and_stop_in_the_users_unless_an_entry_says_otherwise(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", triplets(1)))
    assert {name: read_entry(name).report().skip_bad_rows for name in ("toy", "hh", "hh-harmless-base", "shp", path)} == {
        "toy": False, "hh": True, "hh-harmless-base": True, "shp": True, path: False,
    }  # fmt: skip
    assert read_entry({"name": "hh", "on_bad_row": "stop"}).report().skip_bad_rows is False
    assert read_entry({"path": path, "on_bad_row": "skip"}).report().skip_bad_rows is True
    assert read_entry("hh", {"on_bad_row": "stop"}).report().skip_bad_rows is False


# ---- own files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_a_file_of_every_format_gives_the_same_records(tmp_path, suffix):
    path = str(write(tmp_path / f"rows{suffix}", [*triplets(2), triplets(1)[0] | {"chosen": "better"}]))
    report = DataReport()
    assert records_of(path, report=report) == [
        PreferenceRecord(
            "question 0",
            ["good 0", "bad 0", "better"],
            [(0, 1), (2, 1)],
            "better",
            1,
            f"{path}, rows 1, 3",
            ("good 0", "better"),
            row=1,
        ),
        PreferenceRecord("question 1", ["good 1", "bad 1"], [(0, 1)], "good 1", 2, f"{path}, row 2", row=2),
    ]
    assert report == DataReport(rows_read=3)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_conversations_and_lists_are_read_of_every_format_that_has_them(tmp_path, suffix):
    row = {
        "talk": [{"role": "user", "content": "q"}],
        "answers": [{"text": "a", "place": 2}, {"text": "b", "place": 1}],
        "meta": {"sys": "be brief"},
    }
    entry = {"path": str(write(tmp_path / f"rows{suffix}", [row])), "prompt": "talk", "system": "meta.sys"}
    (record,) = records_of(entry | {"responses": "answers.text", "ranks": "answers.place"})
    assert record.prompt == (Turn("system", "be brief"), Turn("user", "q"))
    assert (record.responses, record.pairs, record.sft_target) == (["a", "b"], [(1, 0)], "b")


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_scored_responses_of_every_format_are_filtered_ordered_and_paired(tmp_path, suffix):
    rows = [{"q": "p", "text": f"answer {n}", "n": n, "language": "en" if n < 5 else "de"} for n in (1, 4, 3, 9, 2)]
    entry = {"path": str(write(tmp_path / f"rows{suffix}", rows)), "prompt": "q", "response": "text", "score": "n"}
    report = DataReport()
    keys = {"where": {"language": "en", "n": "> 1"}, "top_k": {"column": "n", "k": 2}}
    (record,) = records_of(entry | keys, report=report)
    assert (record.responses, record.pairs, record.sft_target) == (["answer 4", "answer 3"], [(0, 1)], "answer 4")
    assert report.left_out == {"language is not en": 1, "n is not > 1": 1, "not among the 2 largest of n": 1}
    assert report.rows_read == 5


def test_rows_with_one_response_are_sft_records(tmp_path):
    rows = [{"prompt": "p", "text": "a"}, {"prompt": "p", "text": "b"}]
    records = records_of({"path": str(write(tmp_path / "rows.jsonl", rows)), "response": "text"})
    assert [(r.prompt, r.responses, r.pairs, r.sft_target) for r in records] == [("p", ["a"], [], "a"), ("p", ["b"], [], "b")]


def test_a_text_that_both_responses_start_with_serves_as_the_prompt(tmp_path):
    rows = [{"chosen": "Say hello. Hello!", "rejected": "Say hello. No."}]
    (record,) = records_of({"path": str(write(tmp_path / "rows.csv", rows)), "implicit_prompt": True})
    assert (record.prompt, record.responses) == ("Say hello.", [" Hello!", " No."])


def test_an_invalid_row_stops_with_file_and_number_or_is_counted_where_it_is_to_be_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    good, *_ = lines = [json.dumps(row) for row in triplets(1)]
    lines = [good, "", "{broken", good.replace("good 0", ""), "5", good.replace("good", "better")]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"rows.jsonl, row 3: not JSON: .* skip such rows with on_bad_row=skip\."):
        records_of(str(path))
    report = DataReport(skip_bad_rows=True)
    (record,) = records_of({"path": str(path), "on_bad_row": "skip"}, report=report)
    assert record.responses == ["good 0", "bad 0", "better 0"]
    assert report.bad_rows == [
        f"datasets: {path}, row 3: not JSON: Expecting property name enclosed in double quotes at column 2. "
        "Expected one object a line.",
        f"datasets: {path}, row 4: field 'chosen' is empty.",
        f"datasets: {path}, row 5: found int, expected a JSON object.",
    ]
    # Read are the rows that are objects; what is no object was never a row.
    assert (report.rows_read, report.num_bad_rows) == (3, 3)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], "it has none"),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}], f"1 skipped: {SAME_TEXT}"),
        ([{"prompt": "p", "chosen": "a", "rejected": 5}] * 2, "2 bad rows skipped; datasets: "),
    ],
    ids=["no rows", "all left out", "all bad"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_without_a_usable_row_is_refused_with_what_became_of_its_rows(tmp_path, rows, found, split):
    path = str(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError) as refused:
        records_of({"path": path, "on_bad_row": "skip"}, split)
    assert str(refused.value).startswith(f"datasets: {path}: no usable row ({found}")
    assert "a map of the fields" in str(refused.value)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
TRIPLETS = st.lists(st.fixed_dictionaries({key: TEXT for key in ("prompt", "chosen", "rejected")}), min_size=1, max_size=5)


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
@settings(max_examples=50, deadline=None, suppress_health_check=SHARES_FOLDER)
@given(rows=TRIPLETS)
def test_any_texts_survive_the_way_through_a_file(tmp_path, suffix, rows):
    path = write(tmp_path / f"rows{suffix}", rows)
    expected = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows if row["chosen"] != row["rejected"]]
    if not expected:
        with pytest.raises(UserError, match="no usable row"):
            records_of(str(path))
        return
    report = DataReport()
    records = records_of(str(path), report=report)
    found = [(r.prompt, r.responses[chosen], r.responses[rejected]) for r in records for chosen, rejected in r.pairs]
    order = list(dict.fromkeys(prompt for prompt, _, _ in expected))
    assert found == sorted(expected, key=lambda pair: order.index(pair[0]))
    assert (report.rows_read, report.left_out.get(SAME_TEXT, 0)) == (len(rows), len(rows) - len(expected))


# ---- what is held out of own files ----------------------------------------------------------------------------------------


def prompts_of(entry, split: str, report: DataReport | None = None) -> set[str]:
    return {record.prompt for record in records_of(entry, split, report)}


def test_a_share_of_the_prompts_is_held_out_and_the_rest_is_trained_on(tmp_path):
    entry = {"path": str(write(tmp_path / "rows.jsonl", triplets(400) * 2)), "held_out_share": 0.1}
    train, test = prompts_of(entry, "train"), prompts_of(entry, "test")
    # Binomial(400, 0.1) has a standard deviation of 6; the hash is fixed, so that this cannot fail by chance.
    assert abs(len(test) - 40) < 24
    assert not train & test
    assert train | test == {row["prompt"] for row in triplets(400)}


def test_a_test_file_is_all_that_is_held_out_and_is_read_through_the_same_map(tmp_path):
    rows = [{"q": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in triplets(20)]
    train, test = write(tmp_path / "rows.jsonl", rows[:15]), write(tmp_path / "more.csv", rows[15:])
    entry = {"path": str(train), "test_path": str(test), "prompt": "q", "held_out_share": 0.5}
    assert prompts_of(entry, "train") == {f"question {n}" for n in range(15)}
    assert prompts_of(entry, "test") == {f"question {n}" for n in range(15, 20)}


def test_an_error_in_a_test_file_names_that_file(tmp_path):
    train, test = write(tmp_path / "rows.jsonl", triplets(2)), write(tmp_path / "more.jsonl", [{"prompt": "p"}])
    with pytest.raises(UserError, match=r"datasets: .*more\.jsonl, row 1: no field 'chosen'"):
        records_of({"path": str(train), "test_path": str(test)}, "test")


def test_rows_of_a_file_that_both_splits_are_read_of_are_counted_once(tmp_path):
    rows = [*triplets(10), {"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p"}]
    entry = {"path": str(write(tmp_path / "rows.jsonl", rows)), "held_out_share": 0.3, "on_bad_row": "skip"}
    train, test = DataReport(skip_bad_rows=True), DataReport(skip_bad_rows=True)
    assert len(prompts_of(entry, "train", train)) + len(prompts_of(entry, "test", test)) == 10
    assert (train.rows_read, train.left_out, train.num_bad_rows) == (12, {SAME_TEXT: 1}, 1)
    assert test == DataReport(skip_bad_rows=True)
    with_test_file = entry | {"test_path": entry["path"]}
    prompts_of(with_test_file, "test", test)
    assert (test.rows_read, test.left_out, test.num_bad_rows) == (12, {SAME_TEXT: 1}, 1)


def test_dialogues_that_answer_different_prompts_are_counted(tmp_path):
    rows = [{"chosen": f"\n\nHuman: {q}\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"} for q in "qr"]
    report = DataReport()
    assert len(records_of(str(write(tmp_path / "rows.jsonl", rows)), report=report)) == 1
    assert report.left_out == {OTHER_PROMPT: 1}


# ---- what data depends on -------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_file_is_that_of_its_content_its_map_and_its_split(tmp_path):
    first, same, other = (tmp_path / f"{name}.jsonl" for name in ("first", "same", "other"))
    for path, count in ((first, 3), (same, 3), (other, 4)):
        write(path, triplets(count))

    def fingerprint(path, split="train", **keys) -> str:
        return read_entry({"path": str(path)} | keys).fingerprint(split, None)

    assert fingerprint(first) == fingerprint(same)
    different = [
        fingerprint(first),
        fingerprint(first, "test"),
        fingerprint(other),
        fingerprint(first, held_out_share=0.2),
        fingerprint(first, prompt="chosen"),
        fingerprint(first, where={"prompt": "question 1"}),
        fingerprint(first, top_k={"column": "n", "k": 1}),
        fingerprint(first, on_bad_row="skip"),
        fingerprint(first, test_path=str(other)),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint(first, "test", test_path=str(other)) == fingerprint(same, "test", test_path=str(other))
    assert fingerprint(first, weight=2, template="raw") == fingerprint(first)


def test_only_loading_tells_what_a_generated_set_or_an_own_loader_gives(restored_registry):
    restored_registry["mine"] = Dataset(lambda *_, **__: {})
    assert read_entry("toy").fingerprint("train", None) is read_entry("mine").fingerprint("train", None) is None


# ---- own loaders --------------------------------------------------------------------------------------------------------

OWN_LOADERS = """
from preference_datasets import register


def answer(prompt, *responses):
    return prompt, {"responses": list(responses), "pairs": [(0, 1)], "sft_target": responses[0]}


@register("with_options", truncation_mode="keep_end")
def get_with_options(split, silent=False, cache_dir=None, language="en", *, number: float = 2):
    return dict([answer(f"{split} {language} {number} {silent} {cache_dir}", "a", "b")])


@register("with_any_option")
def get_with_any_option(split, silent=False, cache_dir=None, **options):
    yield answer(f"{split} {sorted(options.items())}", "a", "b")


@register("with_report")
def get_with_report(split, silent=False, cache_dir=None, report=None):
    report.rows_read += 1
    report.skip("not wanted")
    yield answer("p", "a", "b")
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN_LOADERS)
    return f"{tmp_path}/own.py"


def test_further_keys_of_an_entry_are_keyword_arguments_of_an_own_loader(own):
    entry = read_entry({"name": f"{own}:with_options", "language": "de", "number": 3, "weight": 2})
    assert (entry.options, entry.weight, entry.dataset.truncation_mode) == ({"language": "de", "number": 3}, 2, "keep_end")
    (record,) = load_records(entry, "test", cache_dir="there")
    assert record.prompt == "test de 3 False there"
    assert record.source == f"{own}:with_options, test prompt 1"
    assert [record.prompt for record in records_of(f"{own}:with_options")] == ["train en 2 False None"]


def test_an_own_loader_that_takes_any_keyword_is_given_all(own):
    (record,) = records_of({"name": f"{own}:with_any_option", "languages": ["de", "en"], "data_dir": "no/such", "weight": 2})
    assert record.prompt == "train [('data_dir', 'no/such'), ('languages', ['de', 'en'])]"


def test_an_unknown_keyword_of_an_own_loader_is_refused_with_the_nearest_one(own):
    name = f"{own}:with_options"
    assert refusal({"name": name, "langauge": "de"}) == f"datasets: {name}: no key 'langauge'; did you mean language?"
    assert "no key 'silent'; known are: language, number, on_bad_row," in refusal({"name": name, "silent": True})
    assert refusal({"name": name, "number": "three"}) == f"datasets: {name}: number: found 'three', expected a number."


def test_an_own_loader_with_a_parameter_called_report_counts_in_it(own):
    report = DataReport()
    records_of(f"{own}:with_report", report=report)
    assert report == DataReport(rows_read=1, left_out={"not wanted": 1})
    # Without a report, one is made.
    assert len(list(load_records(read_entry(f"{own}:with_report"), "train"))) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("with_option", "registers no data set 'with_option'; did you mean with_options?"),
        ("toy", "registers no data set 'toy'; known are: with_any_option, with_options, with_report."),
        ("", "registers no data set ''; known are: with_any_option,"),
    ],
)
def test_a_name_that_an_own_file_does_not_register_is_refused(own, name, told):
    assert refusal(f"{own}:{name}").startswith(f"datasets: {own} {told}")


def test_a_missing_file_of_loaders_is_refused():
    assert refusal("no/such.py:mine") == "datasets: no/such.py: no such file. Expected a Python file that registers 'mine'."
    assert "FILE.py:NAME" in refusal({"name": "own.py"})


# ---- records of loaders ---------------------------------------------------------------------------------------------------

SOUND = {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"}


@pytest.mark.parametrize("given", [None, 5, True, 0.5, object])
def test_a_loader_that_gives_nothing_to_go_through_is_refused(restored_registry, given):
    restored_registry["mine"] = Dataset(lambda *_, **__: given)
    with pytest.raises(
        UserError, match=r"datasets: mine: the loader gave \w+, expected a dict or \(prompt, record\) one by one"
    ):
        records_of("mine")


def test_records_are_numbered_as_the_loader_gives_them_and_invalid_ones_keep_their_numbers(restored_registry):
    items = [("p", SOUND), ("q", SOUND | {"pairs": [(0, 5)]}), (" ", SOUND), "junk", ((Turn("user", "r"),), SOUND)]
    restored_registry["mine"] = Dataset(lambda *_, **__: iter(items))
    report = DataReport(skip_bad_rows=True)
    records = records_of({"name": "mine", "on_bad_row": "skip"}, "test", report)
    assert [(r.prompt, r.number, r.source) for r in records] == [
        ("p", 1, "mine, test prompt 1"),
        ((Turn("user", "r"),), 5, "mine, test prompt 5"),
    ]
    expected = "Expected {responses, pairs, sft_target} as in preference_datasets.py."
    assert report.bad_rows == [
        f"datasets: mine, test prompt 2: pair (0, 5) does not name two of the 2 responses. {expected}",
        f"datasets: mine, test prompt 3: the prompt is empty. {expected}",
        f"datasets: mine, test prompt 4: found str, expected a prompt and a dict. {expected}",
    ]
    found = load_records(read_entry("mine"), "test")
    assert next(found).prompt == "p"
    with pytest.raises(UserError, match="mine, test prompt 2: pair .* with on_bad_row=skip"):
        next(found)


def test_lists_and_tuples_and_numbers_of_other_libraries_serve_in_records(restored_registry):
    import numpy

    record = {"responses": ("a", "b"), "pairs": ([numpy.int64(1), numpy.int8(0)],), "sft_target": "a"}
    restored_registry["mine"] = Dataset(lambda *_, **__: {"p": record})
    (found,) = records_of("mine")
    assert (found.responses, found.pairs) == (["a", "b"], [(1, 0)])
    assert {type(index) for index in found.pairs[0]} == {int}


def test_records_stream_through(restored_registry):
    def endless(split, silent=False, cache_dir=None):
        while True:
            yield "p", SOUND

    restored_registry["mine"] = Dataset(endless)
    found = load_records(read_entry("mine"), "train")
    assert [next(found).number for _ in range(3)] == [1, 2, 3]


# ---- what has no effect -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "notes"),
    [
        ({}, []),
        ({"split": "train"}, ["split has no effect: a file has no splits or subsets"]),
        ({"subset": "en"}, ["subset has no effect: a file has no splits or subsets"]),
        ({"test_split": "test", "test_path": "TEST"}, ["test_split has no effect: a file has no splits or subsets"]),
        ({"held_out_share": 0.1, "test_path": "TEST"}, ["held_out_share has no effect: test_path defines the held-out split"]),
        ({"response": "a", "chosen": "b", "implicit_prompt": False}, ["chosen has no effect: responses are in response"]),
        (
            {"responses": "a", "ranks": "b", "response": "c", "implicit_prompt": True},
            ["implicit_prompt has no effect: responses are in responses", "response has no effect: responses are in responses"],
        ),
    ],
)
def test_keys_of_an_entry_that_say_nothing_are_noted(tmp_path, keys, notes):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    keys = {key: str(path) if value == "TEST" else value for key, value in keys.items()}
    assert list(read_entry({"path": str(path)} | keys).notes) == notes


def test_settings_of_texts_are_noted_for_files_of_token_ids(tmp_path):
    path = tmp_path / "rows.pt"
    path.touch()
    entry = read_entry({"path": str(path), "template": "chat"}, {"system_prompt": "Be brief.", "truncation_mode": "drop"})
    assert list(entry.notes) == [f"{key} has no effect: the file holds token ids" for key in ("template", "system_prompt")]


def test_the_choice_of_turns_is_noted_where_nothing_learns_turns(tmp_path, compose):
    ids, rows = tmp_path / "rows.pt", write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    ids.touch()
    given = f"datasets=['{ids}','{rows}',{{name: toy, train_on: all_turns}}]", "train_on=last_turn"
    of_dpo, of_sft = ([entry.notes for entry in read_entries(compose(f"loss={name}", *given))] for name in ("dpo", "sft"))
    token_ids = ("train_on has no effect: the file holds token ids",)
    assert of_dpo == [token_ids, ("train_on has no effect: loss=dpo trains on pairs, and it is of SFT",), ()]
    assert of_sft == [token_ids, (), ()]


def test_keys_of_a_loaders_records_that_nobody_reads_are_named(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from preference_datasets import register\n\n\n"
        "@register('own')\ndef load(split, silent=False, cache_dir=None):\n"
        "    return {'p': {'responses': ['a', 'b'], 'pairs': [(0, 1)], 'sft_target': 'b',\n"
        "                  'sft_targets': ['a', 'b'], 'weight': 2}}\n"
    )
    report = DataReport()
    (record,) = load_records(read_entry(f"{file}:own"), "train", report)
    assert (record.targets, report.columns_not_read) == (("a", "b"), {"weight": 1})


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.sampled_from("abc")] * 3), min_size=1, max_size=12),
    form=st.sampled_from(["pairs", "responses"]),
)
def test_sft_has_an_example_for_each_usable_row(tmp_path, rows, form):
    path = tmp_path / "rows.jsonl"
    write(path, [{"prompt": f"{p}?", "chosen": f"{c}.", "rejected": f"{r}."} for p, c, r in rows])
    entry = {"path": str(path)} | ({"response": "chosen"} if form == "responses" else {})
    usable = [row for row in rows if form == "responses" or row[1] != row[2]]
    report = DataReport()
    if not usable:
        with pytest.raises(UserError, match="no usable row"):
            records_of(entry, report=report)
        return
    learned = [(record.prompt, target) for record in records_of(entry, report=report) for target in record.targets]
    assert Counter(learned) == Counter((f"{prompt}?", f"{chosen}.") for prompt, chosen, _ in usable)
    assert report.left_out.get(SAME_TEXT, 0) == len(rows) - len(usable)
