"""Every architecture of tiny_models.py through every check of checks.py, as a table. Exit status 1 where one is wrong.

python -m tests.architectures.sweep [--only llama,gpt2] [--checks dpo,lora] [--write]

--write keeps the results in results.json, beside those of other architectures and checks that it has, and makes
docs/architectures.md of them. What is refused is no failure: the table says with which reason.
"""

import argparse
import datetime
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from preference_training.core.machine import quiet_libraries  # noqa: E402

# Architectures whose runs of two processes follow each other in the same two.
AT_ONCE = 12


def arguments(names: list[str], checks: list[str]) -> argparse.Namespace:
    """The command line, understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(names), help="architectures, separated by commas")
    parser.add_argument("--checks", default=",".join(checks), help="checks, separated by commas")
    parser.add_argument("--write", action="store_true", help="keep the results, and make the page of them")
    given = parser.parse_args()
    for key, known in (("only", names), ("checks", checks)):
        wanted = [name.strip() for name in getattr(given, key).split(",")]
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"--{key}: no {unknown[0]!r}. Expected some of {', '.join(known)}.")
        setattr(given, key, wanted)
    return given


def failed(said: str) -> bool:
    """Whether a cell is a wrong number or a crash."""
    return said.startswith(("WRONG", "TRACEBACK"))


def sweep(names: list[str], wanted: list[str], folder: Path) -> dict[str, dict[str, str]]:
    """What each check says of each architecture; prints it as it comes."""
    from tests.architectures import checks

    results: dict[str, dict[str, str]] = {}
    for first in range(0, len(names), AT_ONCE):
        some = [checks.Architecture(name, folder / name) for name in names[first : first + AT_ONCE]]
        if "fsdp" in wanted:
            checks.run_sharded(some)
        for of in some:
            started = time.perf_counter()
            results[of.name] = dict(checks.outcomes(of, wanted))
            print(f"{of.name} ({time.perf_counter() - started:.0f} s)", flush=True)
            for name, said in results[of.name].items():
                print(f"    {name:9} {said}", flush=True)
    return results


def write(results: dict[str, dict[str, str]], names: list[str], seconds: float) -> None:
    """Keep the results with the earlier ones of the other cells, in the order of `names`, and make the page of them."""
    from measure import hardware, versions

    file = HERE / "results.json"
    earlier = json.loads(file.read_text())
    is_whole = list(results) == names and all(
        found.keys() >= earlier["results"].get(name, {}).keys() for name, found in results.items()
    )
    facts = {
        "command": "make architectures ARCHITECTURES=--write",
        "date": str(datetime.date.today()),
        "seconds": round(seconds) if is_whole else earlier["seconds"],
    }
    cells = {name: earlier["results"].get(name, {}) | results.get(name, {}) for name in names}
    kept = {**facts, "hardware": hardware(), "versions": versions(), "results": cells}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    spec = importlib.util.spec_from_file_location("architectures_page", ROOT / "scripts" / "architectures_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    page.PAGE.write_text(page.page())


def main() -> int:
    """Run the sweep; the exit status."""
    quiet_libraries()
    # What libraries advise of models this small.
    warnings.simplefilter("ignore")
    from tests.architectures.checks import CHECKS
    from tests.architectures.tiny_models import TINY

    given = arguments(list(TINY), list(CHECKS))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = sweep(given.only, given.checks, Path(folder))
    seconds = time.perf_counter() - started
    if given.write:
        write(results, list(TINY), seconds)
    bad = [f"{name}, {check}: {said}" for name, found in results.items() for check, said in found.items() if failed(said)]
    print(f"{len(results)} architectures in {seconds:.0f} s, {len(bad)} failures", *bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
