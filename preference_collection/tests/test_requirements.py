"""The app runs with what its own requirements install, without those of training."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = Path(__file__).parent.parent
# Imports every module of the app while other distributions cannot be imported, then imports a file and exports a judgment.
WORK = """
import importlib, pkgutil, sys
hidden = set(sys.argv[2:])
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import preference_collection
for module in pkgutil.walk_packages(preference_collection.__path__, "preference_collection."):
    if not {"tests", "tests_whole", "__main__", "child"} & set(module.name.split(".")):
        importlib.import_module(module.name)
from preference_collection.__main__ import main
main(["import", sys.argv[1] + "/pairs.jsonl", "store=" + sys.argv[1] + "/a.duckdb"])
main(["export", sys.argv[1] + "/picks", "store=" + sys.argv[1] + "/a.duckdb"])
"""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(names: list[str]) -> set[str]:
    """Distributions with everything that they require on this machine."""
    found, waiting = set(), [plain(name) for name in names]
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        waiting += [plain(each.name) for each in needed if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


def test_the_app_imports_nothing_that_its_requirements_do_not_install(tmp_path):
    lines = (PACKAGE / "requirements.txt").read_text().splitlines()
    own = installed_with([re.split(r"[=<>]", line)[0] for line in lines if line and not line.startswith("#")])
    hidden = [
        module for module, names in packages_distributions().items()
        if not own & {plain(name) for name in names} and not module.startswith("preference_") and module != "train"
    ]  # fmt: skip
    assert "torch" in hidden and "pytest" in hidden
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "P", "chosen": "A", "rejected": "B"}\n')
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path), *hidden], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 judgment" in done.stdout
