"""What each kind of quantized export of a run costs: size, held-out perplexity, reward accuracy, seconds.

python benchmarks/quantized_exports.py RUN [--kinds int8 int4 q8_0 ...] [--results FILE]

RUN is a run directory with held-out examples. Each kind is an export of its own into a temporary directory.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import preference_datasets  # noqa: F401  its data sets register themselves
from preference_training.export.checkpoint import export
from preference_training.export.options import ExportOptions

KINDS = ("bf16", "int8", "int4", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
PACKAGES = ("torch", "transformers", "torchao", "auto-round", "compressed-tensors", "gguf")
COST = re.compile(r"held-out perplexity (\S+), (\S+) in full \(\S+\)(?:; reward accuracy (\S+), (\S+) in full)?; (\d+)")
NAMES = ("perplexity", "perplexity_in_full", "accuracy", "accuracy_in_full", "examples")


def measure(run: Path, kind: str) -> dict:
    """Export a run in one kind: the lines that the export printed, and the numbers in them."""
    options = {"int8": {"quantize": kind}, "int4": {"quantize": kind}, "bf16": {"dtype": "bfloat16"}}.get(kind, {"gguf": kind})
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        lines = export(run, ExportOptions(to=Path(folder) / "out", **options))
        seconds = time.perf_counter() - began
        pattern = "*.gguf" if "gguf" in options else "model*.safetensors"
        size = sum(file.stat().st_size for file in (Path(folder) / "out").glob(pattern))
    cost = next((found for line in lines if (found := COST.search(line))), None)
    numbers = {} if cost is None else {name: text and float(text) for name, text in zip(NAMES, cost.groups(), strict=True)}
    said = [line.replace(folder, "FOLDER") for line in lines]
    return {"kind": kind, "bytes": size, "seconds": round(seconds, 1), "lines": said, **numbers}


def main() -> None:
    """Measure each kind, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    versions = {name: version(name) for name in PACKAGES}
    found = {"command": sys.argv, "machine": platform.machine(), "python": platform.python_version(), "versions": versions}
    rows = []
    for kind in arguments.kinds:
        rows.append(measure(arguments.run, kind))
        print(json.dumps({name: value for name, value in rows[-1].items() if name != "lines"}), flush=True)
        if arguments.results:
            # As they come: a kind takes minutes.
            arguments.results.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
