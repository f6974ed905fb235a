"""The command line: a user error gives one message and exit status 2, before anything is changed."""

import json
import subprocess
import sys

import pytest

from preference_collection.__main__ import main
from preference_collection.settings import DEFAULTS


def told(capsys, *line: str) -> str:
    main(line)
    return capsys.readouterr().out.strip()


def refused(capsys, *line: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


def test_from_rows_to_a_data_set(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    row = {"id": 1, "description": "Say 1.", "version1": "a", "version2": "b", "preference": 1}
    rows.write_text(json.dumps(row) + "\n")
    store = f"store={tmp_path / 'collection.duckdb'}"
    assert told(capsys, "import", str(rows), store).endswith("1 task added, 1 new comparison, 1 judgment")
    assert told(capsys, "export", str(tmp_path / "out"), store).endswith("out: 1 preference, 0 ties, 0 skips")
    assert told(capsys, "export", str(tmp_path / "out.jsonl"), "--names", store).endswith("1 preference, 0 ties, 0 skips")
    [record] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (record["chosen"], record["rejected"], record["labeller"]) == ("b", "a", "imported")


def test_columns_of_other_names_are_mapped_and_what_is_not_read_is_said(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    row = {"ask": "What is best?", "left": "a", "right": "b", "verdict": 2, "note": "n"}
    rows.write_text(json.dumps(row) + "\n")
    store = f"store={tmp_path / 'collection.duckdb'}"
    columns = ("--map", "prompt=ask", "--map", "answers=[left, right]", "--map", "better={verdict: [1, 2]}")
    said = told(capsys, "import", str(rows), *columns, store).splitlines()
    assert said == [f"{tmp_path / 'collection.duckdb'}: 1 task added, 1 new comparison, 1 judgment", "  columns not read: note"]
    told(capsys, "export", str(tmp_path / "out.jsonl"), store)
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert (record["prompt"], record["chosen"], record["rejected"]) == ("What is best?", "b", "a")


def test_control_characters_in_columns_and_values_do_not_reach_the_terminal(tmp_path, capsys):
    rows, store = tmp_path / "rows.jsonl", f"store={tmp_path / 'c.duckdb'}"
    rows.write_text(json.dumps({"prompt": "What?", "chosen": "a", "rejected": "b", "x\x1b[2J": 1}) + "\n")
    assert told(capsys, "import", str(rows), store).endswith(r"columns not read: x\x1b[2J")
    rows.write_text(json.dumps({"description": "d", "version1": "a", "version2": "b", "preference": "\x1b]0;x\x07"}) + "\n")
    said = refused(capsys, "import", str(rows), store)
    assert r"preference is '\x1b]0;x\x07'" in said and "\x1b" not in said


def test_a_place_where_no_store_can_be_is_one_message_and_makes_no_directories(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What?"}) + "\n")
    assert refused(capsys, "import", str(rows), f"store={tmp_path}") == (
        f"store: {tmp_path} is a directory. Expected a file in it, such as {tmp_path / 'collection.duckdb'}."
    )
    assert refused(capsys, "import", str(rows), f"store={tmp_path / 'a' / 'b' / 'c.duckdb'}") == (
        f"store: {tmp_path / 'a' / 'b' / 'c.duckdb'}: there is no directory {tmp_path / 'a'}. Create it, or name another place."
    )
    assert list(tmp_path.iterdir()) == [rows]
    assert refused(capsys, "import", str(rows), "store=/proc/mine/c.duckdb").startswith("store: /proc/mine/c.duckdb cannot be ")


def test_an_import_brings_no_samples(tmp_path, capsys, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What is best?"}) + "\n")
    monkeypatch.setattr("preference_collection.settings.DEFAULTS", own := tmp_path / "collect.yaml")
    text = DEFAULTS.read_text().replace("runs/collection.duckdb", str(tmp_path / "c.duckdb"))
    own.write_text(text)
    assert told(capsys, "import", str(rows)).startswith(f"{tmp_path / 'c.duckdb'}: 1 task added\n")


def test_a_user_error_gives_one_line(tmp_path, capsys):
    assert refused(capsys, "export", "out", f"store={tmp_path / 'x'}") == (
        f"store: {tmp_path / 'x'}: no such file. Expected an existing store."
    )
    assert refused(capsys, "export", "out", "stroe=x").startswith("'stroe=x' overrides no setting; did you mean store?")
    assert refused(capsys, "import", str(tmp_path / "y"), f"store={tmp_path / 'x'}").startswith(f"import: {tmp_path / 'y'}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"ask": "a"}\n')
    own = f"store={tmp_path / 'new.duckdb'}"
    assert refused(capsys, "import", str(rows), "--map", "prompt", own) == (
        "--map: found 'prompt', expected KEY=COLUMN, such as prompt=question."
    )
    assert refused(capsys, "import", str(rows), "--map", "better={a", own).startswith("--map: 'better={a' cannot be read: ")
    assert "no key 'promt'; did you mean prompt?" in refused(capsys, "import", str(rows), "--map", "promt=ask", own)
    assert refused(capsys, "score", own) == "score: expected a checkpoint, or --ledger RUN."
    assert refused(capsys, "score", "--ledger", str(tmp_path), own).startswith(f"score: {tmp_path}: no ledger.")
    assert refused(capsys, "push", str(tmp_path), "a/b").startswith(f"push: {tmp_path} is not an export.")
    assert refused(capsys, "export", "out", "--namse").endswith("unrecognized: --namse")
    assert "COLLECT_PASSWORD" in refused(capsys, "serve", "address=0.0.0.0")


def test_the_modules_need_neither_torch_nor_the_page(tmp_path):
    script = "import sys, preference_collection.__main__, preference_collection.generation.sources\n"
    script += "import preference_collection.exchange.export\n"
    script += "print({'torch', 'transformers', 'starlette'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"set()\n"
