"""Judgments are exported in a form that the framework's loaders read, and uploaded to the Hub."""

import json
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_collection.exchange.export import CARD, FILES, export_dataset, export_records, push
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task
from preference_datasets import leetcode_records
from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.hub_sets import load_hub
from preference_training.data.records.record import Turn
from preference_training.data.records.report import DataReport
from preference_training.data.records.validation import item_error


def judged_store(store):
    """Three problems: two judged by two people, who disagree on the second, one tie and one skip."""
    store.add_tasks([a_task("a"), a_task("b"), a_task("c")])
    pairs = {name: a_comparison(name, (f"{name} one", f"{name} two")) for name in "abc"}
    store.add_comparisons(pairs.values())
    more = {"order": (1, 0), "seconds": 2.5, "reasons": ("faster",), "comment": 'said "so"'}
    for labeler, name, said in [
        ("ada", "a", 0), ("bob", "a", 0), ("ada", "b", 1), ("bob", "b", 0), ("ada", "c", "tie"), ("bob", "c", "skip"),
    ]:  # fmt: skip
        store.judge(a_judgment(pairs[name], said, labeler, **more))
    return store


def lc_records(directory) -> dict:
    """What `datasets=[{name: lc, data_dir: ...}]` reads, of both splits: prompt → set of (preferred, other)."""
    entry = read_entry({"name": "lc", "data_dir": str(directory)})
    found = {}
    for split in ("train", "test"):
        for record in load_records(entry, split):
            pairs = [(record.responses[i], record.responses[j]) for i, j in record.pairs]
            found.setdefault(record.prompt, []).extend(pairs)
    return found


def test_the_lc_loader_reads_the_preferences_and_nothing_else(store, tmp_path):
    counts = export_dataset(judged_store(store), tmp_path / "out")
    assert +counts == {"preferences": 4, "ties": 1, "skips": 1, "unsettled": 1}
    assert lc_records(tmp_path / "out") == {
        (Turn("user", "Add two numbers (a)."),): [("a one", "a two")] * 2,
        (Turn("user", "Add two numbers (b)."),): [("b two", "b one"), ("b one", "b two")],
    }


def test_each_judgment_is_a_row_with_the_votes_on_its_pair(store, tmp_path):
    export_dataset(judged_store(store), tmp_path / "out")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "data").to_pylist()
    assert [(row["id"], row["preference"], row["votes_version1"], row["votes_version2"]) for row in rows] == [
        ("a", 0, 2, 0), ("a", 0, 2, 0), ("b", 1, 1, 1), ("b", 0, 1, 1),
    ]  # fmt: skip
    first = rows[0]
    assert (first["labeller"], first["seconds"], first["shown_left"], first["reasons"]) == ("labeller 1", 2.5, 1, ["faster"])
    assert "ada" not in (tmp_path / "out" / CARD).read_text() and first["comment"] == 'said "so"'
    [tie] = pyarrow.parquet.read_table(tmp_path / "out" / "apart" / "ties.parquet").to_pylist()
    assert (tie["id"], tie["preference"], tie["votes_tie"], tie["votes_skip"]) == ("c", None, 1, 1)
    export_dataset(store, tmp_path / "out", names=True)
    assert pyarrow.parquet.read_table(tmp_path / "out" / "apart" / "skips.parquet").to_pylist()[0]["labeller"] == "bob"


def test_an_undone_judgment_is_not_exported(store, tmp_path):
    judged_store(store).undo("bob")
    assert +export_dataset(store, tmp_path / "out") == {"preferences": 4, "ties": 1, "unsettled": 1}
    assert not (tmp_path / "out" / "apart" / "skips.parquet").exists()


@pytest.mark.parametrize("name", ["picked.jsonl", "picked.parquet"])
def test_a_file_of_records_is_read_by_its_path_and_has_the_shape_of_records(store, tmp_path, name):
    path = tmp_path / name
    assert export_records(judged_store(store), path)["preferences"] == 4
    report = DataReport()
    entry = read_entry(str(path))
    found = [record for split in ("train", "test") for record in load_records(entry, split, report)]
    assert sorted((record.prompt, len(record.pairs)) for record in found) == [
        ("Add two numbers (a).", 2), ("Add two numbers (b).", 2),
    ]  # fmt: skip
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else (
        pyarrow.parquet.read_table(path).to_pylist())  # fmt: skip
    for row in rows:
        record = {
            "responses": row["responses"],
            "pairs": [tuple(pair) for pair in row["pairs"]],
            "sft_target": row["sft_target"],
        }
        assert item_error((row["prompt"], record)) is None
        assert record["responses"][record["pairs"][0][0]] == row["sft_target"] == row["chosen"]
    apart = {path.name for path in tmp_path.iterdir()} - {"collection.duckdb", "collection.duckdb.wal", name}
    assert apart == {name.replace(".", ".ties."), name.replace(".", ".skips.")}


def test_a_repeated_export_is_not_read_from_the_cache(store, tmp_path):
    export_dataset(judged_store(store), tmp_path / "out")
    before = lc_records(tmp_path / "out")
    load_hub.cache_clear()
    store.undo("bob")
    store.undo("bob")
    export_dataset(store, tmp_path / "out")
    found = lc_records(tmp_path / "out")
    assert found[Turn("user", "Add two numbers (b)."),] == [("b two", "b one")]
    assert len(before[Turn("user", "Add two numbers (b)."),]) == 2


SOLUTION = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=25, deadline=None)
@given(SOLUTION, SOLUTION, SOLUTION)
def test_any_text_reaches_the_loader_unchanged(tmp_path_factory, description, one, other):
    """Read with the loader's own library, and converted by the loader."""
    directory = tmp_path_factory.mktemp("texts") / "out"
    with closing(open_store(":memory:")) as store:
        store.add_tasks([a_task()])
        comparison = a_comparison(texts=(one, other), prompt=description)
        store.add_comparisons([comparison])
        store.judge(a_judgment(comparison, 1))
        export_dataset(store, directory)
    rows = pyarrow.parquet.read_table(directory / "data").to_pylist()
    found = [
        (prompt, record["responses"], record["pairs"]) for prompt, record in leetcode_records(enumerate(rows), DataReport())
    ]
    one, other = one.strip(), other.strip()
    assert found == ([((Turn("user", description.strip()),), [one, other], [(1, 0)])] if one != other else [])


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def test_an_export_without_preferences_is_refused(store, tmp_path):
    with pytest.raises(UserError, match="there are no preferences yet \\(0 ties, 0 skips\\)"):
        export_dataset(store, tmp_path / "out")
    with pytest.raises(UserError, match="there are no preferences yet"):
        export_records(store, tmp_path / "out.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_files_is_not_overwritten(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="contains other files"):
        export_dataset(judged_store(store), tmp_path / "mine")
    with pytest.raises(UserError, match="expected a .jsonl or .parquet file"):
        export_records(store, tmp_path / "x.csv")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


# ---- the hub ----------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that creates a small data set: create, preupload, commit."""

    seen: list
    there = ("README.md", "apart/old.parquet")
    allow = private = True
    url = ""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if not self.allow:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path.endswith("/datasets/ada/picks"):
            self.answer({"id": "ada/picks", "private": self.private})
        elif "/tree/" not in self.path:
            self.answer({"error": "Not Found"}, 404)
        else:
            self.answer([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.there])

    def do_POST(self):
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else b""
        self.seen.append((self.path, self.headers.get("Authorization"), body))
        if not self.allow:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.url}/datasets/ada/picks", "name": "ada/picks"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            self.answer(
                {"commitUrl": f"{self.url}/datasets/ada/picks/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
            )
        else:
            self.answer({"shouldIgnore": False})

    def answer(self, value, status: int = 200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    handler = type("OneHub", (Hub,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    from huggingface_hub import HfApi, constants

    handler.url = url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=url, token="hf_secret"))
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_export_is_pushed_as_a_private_data_set_with_its_card(store, tmp_path, hub):
    export_dataset(judged_store(store), tmp_path / "out")
    assert push(tmp_path / "out", "ada/picks").endswith("/datasets/ada/picks")
    created = json.loads(hub.seen[0][2])
    assert (created["name"], created["type"], created["visibility"]) == ("picks", "dataset", "private")
    [commit] = [body for path, _, body in hub.seen if "/commit/" in path]
    files = {line["value"]["path"] for line in map(json.loads, commit.splitlines()) if line["key"] == "file"}
    assert files == {CARD, *(FILES[kind] for kind in ("preferences", "ties", "skips"))}


def test_a_public_data_set_is_uploaded_to_only_on_request(store, tmp_path, hub):
    export_dataset(judged_store(store), tmp_path / "out")
    hub.private = False
    with pytest.raises(UserError, match="push: ada/picks is public"):
        push(tmp_path / "out", "ada/picks")
    assert not [path for path, _, _ in hub.seen if "/commit/" in path]
    push(tmp_path / "out", "ada/picks", private=False)
    assert [path for path, _, _ in hub.seen if "/commit/" in path]


def test_a_refusal_by_the_hub_gives_one_message(store, tmp_path, hub):
    export_dataset(judged_store(store), tmp_path / "out")
    hub.allow = False
    with pytest.raises(UserError, match="push: the Hub refuses ada/picks: .* Expected a token with write access"):
        push(tmp_path / "out", "ada/picks")
    with pytest.raises(UserError, match="is not a data set name"):
        push(tmp_path / "out", "a/b/c")
    with pytest.raises(UserError, match="is not an export"):
        push(tmp_path, "ada/picks")
