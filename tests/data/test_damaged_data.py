"""Data that is damaged at random: each file, directory or loader gives sound records whose counts add up, or one message.

Files are spoilt byte by byte, line by line and value by value, below and above their compression; loaders give junk.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.files import read_rows
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.records.report import DataReport
from preference_training.data.records.validation import item_error
from preference_training.data.registry import DATASETS, Dataset
from tests.support.files import DATA_SUFFIXES

# Hypothesis runs one function many times; each example writes its own file, so that sharing tmp_path is harmless.
FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


TEXT_ROWS = [
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"prompt": "p", "chosen": "c", "rejected": "a"},
    {"prompt": "several\nlines, \"quoted\"", "chosen": "ü🙂", "rejected": "\ttab \\ "},
    {"prompt": "q", "chosen": "same", "rejected": "same"},
    {"prompt": "r", "chosen": "a", "rejected": "b"},
]  # fmt: skip
DIALOGUES = [{"chosen": dialogue(q, "a"), "rejected": dialogue("q", b)} for q, b in ("qb", "qa", "rb", "q ")]
CONVERSATIONS = [{"chosen": talk("q", "a"), "rejected": talk(q, "b")} for q in "qr"]
SUFFIXES = st.sampled_from(DATA_SUFFIXES)
POLICIES = st.sampled_from(["stop", "skip", "skip"])


@pytest.fixture(autouse=True, scope="module")
def no_bars() -> Iterator[None]:
    """The hub library's bars would hide what a failure prints."""
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# ---- what must hold -------------------------------------------------------------------------------------------------------


def records_or_message(entry: dict, split: str, report: DataReport, names: list[str], cache_dir=None) -> list | None:
    """The sound records of one split, or None where a message that begins as it should names what it is about."""
    try:
        records = list(load_records(read_entry(entry, {"held_out_share": 0.3}), split, report, cache_dir))
    except UserError as refusal:
        text = str(refusal)
        assert text.startswith("datasets: ")
        assert any(name in text for name in names)
        return None
    assert_sound(records)
    assert (report.num_bad_rows == 0) or report.skip_bad_rows
    # Rows that are bad alike share a message; of more than ten kinds, ten have one.
    told = len(report.bad_rows) + sum(report.alike.values())
    assert told == report.num_bad_rows or (told < report.num_bad_rows and len(report.bad_rows) == 10)
    assert report.alike.keys() <= set(report.bad_rows)
    assert all(message.startswith("datasets: ") for message in report.bad_rows)
    assert DataReport(**json.loads(json.dumps(report.as_dict()))) == report
    return records


def assert_sound(records: list[PreferenceRecord]) -> None:
    for record in records:
        item = (record.prompt, {"responses": record.responses, "pairs": record.pairs, "sft_target": record.sft_target})
        assert item_error(item) is None
        assert all(type(index) is int for pair in record.pairs for index in pair)
    numbers = [record.number for record in records]
    assert numbers == sorted(set(numbers))


def most_pairs(row: dict) -> int:
    """One, or as many as there are if a column lists several answers."""
    numbers = [len(value) if isinstance(value, list) else 1 for value in (row.get("chosen"), row.get("rejected"))]
    return max(1, numbers[0] * numbers[1])


def assert_file_gives_records_or_a_message(path: Path, on_bad_row: str, **keys) -> None:
    """Both splits of a file; where both are read, every row is in a pair, left out, bad, or in a record without a pair."""
    entry = {"path": str(path), "on_bad_row": on_bad_row} | keys
    reports = {split: DataReport(skip_bad_rows=on_bad_row == "skip") for split in ("train", "test")}
    found = {split: records_or_message(entry, split, report, [str(path)]) for split, report in reports.items()}
    # A file is refused, or read, as a whole.
    assert (found["train"] is None) == (found["test"] is None)
    if found["train"] is None:
        return
    records = found["train"] + found["test"]
    assert records
    # Answers without a prompt are held out one by one.
    train, test = ({record.prompt or ("", record.sft_target) for record in found[split]} for split in ("train", "test"))
    assert not train & test
    reader = DataReport(skip_bad_rows=True)
    rows = list(read_rows(path, reader))
    report = reports["train"]
    assert report.rows_read == len(rows)
    assert reports["test"] == DataReport(skip_bad_rows=on_bad_row == "skip")
    if not keys or keys.keys() == {"implicit_prompt"}:
        pairs = sum(len(record.pairs) or len(record.targets) for record in records)
        surplus = pairs + sum(report.left_out.values()) + report.num_bad_rows - len(rows) - reader.num_bad_rows
        assert 0 <= surplus <= sum(most_pairs(row) - 1 for _, row in rows)
    else:
        assert reader.num_bad_rows <= report.num_bad_rows <= len(rows) + reader.num_bad_rows


# ---- damage ---------------------------------------------------------------------------------------------------------------

GARBAGE = [
    b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b'"', b'""', b"\\", b"{", b"}", b"[",
    b"]", b",", b":", b"null", b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"\\u0000", b"[" * 3000, b"9" * 5000, b'{"p":',
    b"PAR1", b"\x1f\x8b\x08\x00", b"Assistant:", b"\xe2\x80\xa8", b"true", b"\x1a", b"\x85",
]  # fmt: skip


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The content after one to three edits: bits flipped, bytes changed, put in or taken out, lines mixed up, an end cut."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        before, after = content[:place], content[place:]
        what = draw(st.sampled_from(["flip", "overwrite", "insert", "delete", "cut", "lines", "repeat"]))
        some = draw(st.sampled_from(GARBAGE) | st.binary(min_size=1, max_size=8))
        if what == "flip" and after:
            content = before + bytes([after[0] ^ (1 << draw(st.integers(0, 7)))]) + after[1:]
        elif what == "overwrite":
            content = before + some + after[len(some) :]
        elif what == "insert":
            content = before + some + after
        elif what == "delete":
            content = before + after[draw(st.integers(1, 40)) :]
        elif what == "cut":
            content = before if draw(st.booleans()) else after
        elif what == "repeat":
            content = before + after + after
        else:
            lines = content.splitlines(keepends=True)
            content = b"".join(draw(st.lists(st.sampled_from(lines), max_size=8))) if lines else some
    return content


def encoded(rows: list[dict], suffix: str) -> bytes:
    """Rows as the bytes of a file with this ending."""
    if suffix == ".parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    if suffix == ".json":
        return json.dumps(rows, indent=1).encode()
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(content, mtime=0) if suffix == ".jsonl.gz" else content


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
@settings(max_examples=250, **FUZZ)
@given(
    data=st.data(),
    rows=st.sampled_from([TEXT_ROWS, DIALOGUES, TEXT_ROWS[:2]]),
    on_bad_row=POLICIES,
    above_compression=st.booleans(),
)
def test_a_file_spoilt_byte_by_byte_gives_records_or_a_message(tmp_path, suffix, data, rows, on_bad_row, above_compression):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl.gz" and above_compression:
        path.write_bytes(gzip.compress(data.draw(damaged(encoded(rows, ".jsonl"))), mtime=0))
    else:
        path.write_bytes(data.draw(damaged(encoded(rows, suffix))))
    assert_file_gives_records_or_a_message(path, on_bad_row)


@settings(max_examples=200, **FUZZ)
@given(content=st.text(alphabet='{}[]",:\\n\r\n au0d8-e.\x00\ufeff', max_size=60), suffix=SUFFIXES, on_bad_row=POLICIES)
def test_a_file_of_nonsense_gives_records_or_a_message(tmp_path, content, suffix, on_bad_row):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content.encode(), mtime=0) if suffix == ".jsonl.gz" else content.encode())
    assert_file_gives_records_or_a_message(path, on_bad_row)


# ---- values of wrong types ------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", " ", "a", "b", "1", "nan", "1e400", "\ud800", "x\x00y", dialogue("q", "a"), dialogue("", "a")])
)
NAMES = ["prompt", "chosen", "rejected", "role", "content", "from", "value", "text", "n"]
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=2), inner, max_size=3)
        | st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), inner)
        | st.builds(talk, inner, inner)
    ),
    max_leaves=8,
)
NUMBERED = [{"prompt": p, "chosen": c, "rejected": "b", "n": n, "text": "s"} for p, c, n in (("p", "a", 1), ("q", "b", -2.5))]
LISTS = [{"prompt": p, "chosen": ["a", "b", "c"], "n": [1, "2", n]} for p, n in (("p", 1), ("q", 3))]
NESTED = [{"prompt": p, "chosen": talk("a", "b"), "rejected": [{"n": 2}, {"n": 1}]} for p in "pq"]
PARTS = [{"chosen": {"role": p, "content": "a"}, "rejected": "b"} for p in "pq"]
# Maps of fields, and rows that are sound in them.
MAPS = [
    ({}, [*TEXT_ROWS, *DIALOGUES, *CONVERSATIONS]),
    ({"implicit_prompt": True}, [*TEXT_ROWS, *DIALOGUES]),
    ({"system": "text"}, NUMBERED),
    ({"responses": "chosen", "scores": "n"}, LISTS),
    ({"responses": "chosen.content", "ranks": "rejected.n"}, NESTED),
    ({"response": "chosen", "score": "n"}, [row | {"prompt": "p"} for row in NUMBERED]),
    ({"response": "text"}, NUMBERED),
    ({"prompt": "chosen.role", "chosen": "chosen.content"}, PARTS),
    ({"where": {"chosen": "!= b", "n": ["1", 2]}}, NUMBERED),
    ({"where": {"n": "< 1"}}, NUMBERED),
    ({"top_k": {"column": "n", "k": 2}}, NUMBERED),
]
KEYS = st.sampled_from([keys for keys, _ in MAPS])


@st.composite
def mapped_rows(draw, values, junk, maps=MAPS) -> tuple[dict, list]:
    """A map of fields, and rows of which some are sound in it, some have a wrong value or two, and some are junk."""
    keys, sound = draw(st.sampled_from(maps))
    sound = st.sampled_from(sound)
    spoilt = st.builds(lambda row, more: row | more, sound, st.dictionaries(st.sampled_from(NAMES), values, max_size=2))
    rows = draw(st.lists(sound, min_size=1, max_size=3)) + draw(st.lists(sound | spoilt | junk, max_size=5))
    return keys, draw(st.permutations(rows))


@settings(max_examples=600, **FUZZ)
@given(
    mapped=mapped_rows(JUNK, JUNK),
    suffix=st.sampled_from([".jsonl", ".json", ".jsonl.gz"]),
    on_bad_row=POLICIES,
)
def test_rows_with_values_of_any_type_give_records_or_a_message(tmp_path, mapped, suffix, on_bad_row):
    keys, rows = mapped
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(encoded(rows, suffix))
    assert_file_gives_records_or_a_message(path, on_bad_row, **keys)


@settings(max_examples=150, **FUZZ)
@given(
    mapped=mapped_rows(SCALARS, st.nothing(), [(keys, NUMBERED) for keys, rows in MAPS if rows not in (LISTS, NESTED, PARTS)]),
    on_bad_row=POLICIES,
)
def test_csv_with_any_values_gives_records_or_a_message(tmp_path, mapped, on_bad_row):
    keys, rows = mapped
    path = tmp_path / "rows.csv"
    path.write_bytes(encoded(rows, ".csv"))
    assert_file_gives_records_or_a_message(path, on_bad_row, **keys)


TEXT_LIST = pyarrow.list_(pyarrow.string())
TURN_LIST = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
TEXT_COLUMN = pyarrow.array(["a", "b", "c"])
COLUMNS = st.just(TEXT_COLUMN) | st.sampled_from(
    [
        pyarrow.array(["a", "b", None]),
        pyarrow.array(["a", "a", "b"], pyarrow.large_string()),
        pyarrow.array(["a", "b", "a"]).dictionary_encode(),
        pyarrow.array([dialogue("q", "a"), dialogue("q", "b"), "a"]),
        pyarrow.array([1, 2, None]),
        pyarrow.array([0.5, float("nan"), float("inf")]),
        pyarrow.array([True, None, False]),
        pyarrow.array([b"a", b"\xff", None]),
        pyarrow.array([None, None, None]),
        pyarrow.array([0, 1, 2**62], pyarrow.timestamp("us")),
        pyarrow.array([0, 1, 2**31 - 1], pyarrow.date32()),
        pyarrow.array([0, 1, 2**62], pyarrow.duration("s")),
        pyarrow.array([1, 2, 3], pyarrow.decimal128(10, 2)),
        pyarrow.array([["a", "b"], [], None], TEXT_LIST),
        pyarrow.array([[1, 2], [None, 1], [3]]),
        pyarrow.array([talk("q", "a"), talk("q", "b"), None], TURN_LIST),
        pyarrow.array([talk("", "a")[1:], [None], []], TURN_LIST),
        pyarrow.array([{"role": "user", "content": "a"}, None, {"role": None, "content": None}]),
        pyarrow.array([[("a", 1)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    ]
)


def table(columns: list, names: list[str]) -> pyarrow.Table:
    return pyarrow.Table.from_arrays(columns, names=names[: len(columns)])


PARQUET_NAMES = st.permutations(["prompt", "chosen", "rejected", "n", "text"])


@settings(max_examples=200, **FUZZ)
@given(
    columns=st.lists(COLUMNS, min_size=3, max_size=5),
    names=PARQUET_NAMES,
    keys=KEYS,
    on_bad_row=POLICIES,
)
def test_parquet_with_columns_of_any_type_gives_records_or_a_message(tmp_path, columns, names, keys, on_bad_row):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table(columns, names), path)
    assert_file_gives_records_or_a_message(path, on_bad_row, **keys)


# ---- directories in the hub's layout ----------------------------------------------------------------------------------------

NUMBERS = count()


def a_fresh_folder(tmp_path: Path) -> Path:
    """A folder of its own for each example: what is loaded from a path is kept."""
    folder = tmp_path / f"set{next(NUMBERS)}"
    folder.mkdir()
    return folder


@settings(max_examples=60, **FUZZ)
@given(
    data=st.data(),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".csv", ".parquet"]),
    on_bad_row=POLICIES,
)
@pytest.mark.long
def test_a_directory_with_a_spoilt_file_gives_records_or_a_message(tmp_path, data, suffix, on_bad_row):
    folder = a_fresh_folder(tmp_path)
    (folder / f"train{suffix}").write_bytes(data.draw(damaged(encoded(TEXT_ROWS, suffix))))
    report = DataReport(skip_bad_rows=on_bad_row == "skip")
    records_or_message({"path": str(folder), "on_bad_row": on_bad_row}, "train", report, [str(folder)], str(tmp_path))


@settings(max_examples=60, **FUZZ)
@given(columns=st.lists(COLUMNS, min_size=3, max_size=5), names=PARQUET_NAMES, on_bad_row=POLICIES)
def test_a_directory_with_columns_of_any_type_gives_records_or_a_message(tmp_path, columns, names, on_bad_row):
    folder = a_fresh_folder(tmp_path)
    pyarrow.parquet.write_table(table(columns, names), folder / "train.parquet")
    report = DataReport(skip_bad_rows=on_bad_row == "skip")
    records_or_message({"path": str(folder), "on_bad_row": on_bad_row}, "train", report, [str(folder)], str(tmp_path))


FIELDS = {
    "hh": ["chosen", "rejected"],
    "shp": ["history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"],
    "se": ["question", "answers"],
    "lc": ["description", "version1", "version2", "preference"],
    "orca": ["system", "question", "chosen", "rejected"],
    "nectar": ["prompt", "answers"],
}
ANSWER_COLUMNS = st.sampled_from(
    [
        pyarrow.array([[{"text": a, "pm_score": n, "answer": a, "rank": n} for a, n in pairs] for pairs in lists])
        for lists in (
            [[("a", 1), ("b", 2)], [], [("a", 1), ("a", 2)]],
            [[("a", None), ("b", 2)], [(None, 1)], [("<p>a", 1), ("b</p>", 1.5)]],
        )
    ]
)


@settings(max_examples=80, **FUZZ)
@given(name=st.sampled_from(list(FIELDS)), data=st.data(), on_bad_row=POLICIES)
def test_a_copy_of_a_named_set_with_columns_of_any_type_gives_records_or_a_message(tmp_path, name, data, on_bad_row):
    folder = a_fresh_folder(tmp_path)
    columns = [data.draw(ANSWER_COLUMNS if field == "answers" else COLUMNS) for field in FIELDS[name]]
    pyarrow.parquet.write_table(table(columns, FIELDS[name]), folder / "train.parquet")
    entry = {"name": name, "data_dir": str(folder), "on_bad_row": on_bad_row}
    report = DataReport(skip_bad_rows=on_bad_row == "skip")
    records = records_or_message(entry, "train", report, [str(folder), f"datasets: {name}"], str(tmp_path))
    assert records is None or report.rows_read == 3


# ---- loaders of the user's ------------------------------------------------------------------------------------------------

SOUND = {"responses": ["a", "b", "c"], "pairs": [(0, 1), (2, 1)], "sft_target": "a"}
OTHER_JUNK = st.sampled_from(
    [
        *(b"bytes", object(), object, len, {1, 2}, range(3), 1j, Turn("user", "q"), Turn(None, None)),
        *(numpy.array([0, 1]), numpy.array(["user", "assistant"]), numpy.int64(1), numpy.float32(1), numpy.str_("text")),
    ]
)
ANY = st.recursive(
    SCALARS | OTHER_JUNK | st.just(SOUND),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "user", "assistant"])
TURNS = st.builds(Turn, ROLES | OTHER_JUNK | ANY, st.sampled_from(["q", ""]) | OTHER_JUNK | ANY)
PROMPT = st.sampled_from(["p", "q", "", (Turn("user", "p"),)]) | st.lists(TURNS, max_size=3).map(tuple) | ANY
INDICES = st.integers(-1, 4) | st.just(numpy.int64(1)) | ANY
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "responses": st.just(SOUND["responses"]) | st.lists(st.just("a") | ANY, max_size=3) | ANY,
        "pairs": st.just(SOUND["pairs"]) | st.lists(st.tuples(INDICES, INDICES) | ANY, max_size=2) | ANY,
        "sft_target": st.just("a") | ANY,
    },
)
ITEMS = st.lists(st.tuples(PROMPT, st.just(SOUND) | RECORD | ANY) | st.just(("p", SOUND)) | ANY, max_size=6)


def as_dict(items: list) -> dict:
    """Of the items those that can be keys and values of a dict."""
    pairs = [item for item in items if isinstance(item, tuple) and len(item) == 2]
    return {key: value for key, value in pairs if is_hashable(key)}


def is_hashable(value) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@pytest.fixture
def loader() -> Iterator[Callable]:
    """Register what a loader gives, under a name that is taken back after the test."""

    def register(given) -> str:
        DATASETS["fuzzed"] = Dataset(lambda split, silent=False, cache_dir=None: given)
        return "fuzzed"

    yield register
    DATASETS.pop("fuzzed", None)


@settings(max_examples=600, **FUZZ)
@given(items=ITEMS, form=st.sampled_from([list, iter, tuple, as_dict]), on_bad_row=POLICIES)
def test_a_loader_that_gives_junk_gives_records_or_a_message(loader, items, form, on_bad_row):
    name = loader(form(items))
    report = DataReport(skip_bad_rows=on_bad_row == "skip")
    records = records_or_message({"name": name, "on_bad_row": on_bad_row}, "test", report, ["fuzzed"])
    if records is not None:
        size = len(as_dict(items)) if form is as_dict else len(items)
        assert len(records) + report.num_bad_rows == size
        assert all(record.source == f"fuzzed, test prompt {record.number}" for record in records)


@settings(max_examples=100, **FUZZ)
@given(given=ANY)
def test_a_loader_that_returns_anything_gives_records_or_a_message(loader, given):
    for on_bad_row in ("stop", "skip"):
        report = DataReport(skip_bad_rows=on_bad_row == "skip")
        records_or_message({"name": loader(given), "on_bad_row": on_bad_row}, "train", report, ["fuzzed"])
