"""Where things lie, and rows written as files."""

import csv
import gzip
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG_DIR = ROOT / "config"
GOLDEN = ROOT / "tests" / "golden"
# The usual endings, which `write` knows.
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format that the path's ending says, in a folder that is made for them."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, encoding="utf-8")
    return path
