"""How many generated programs a second can be judged by their unit tests, isolated.

    python benchmarks/unit_tests.py --programs 1000

Half of the programs are right, four in ten wrong, and the rest do not end. Compares one process a program (`run_tests`) with
one a test (the labeling app), and writes wall and CPU time to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from code_problems import read_problems
from measure import cpu_seconds

from preference_training.core.processes import usable_cores
from preference_training.sandbox.assertions import read_tests
from preference_training.sandbox.pass_rates import isolated_sandbox, run_tests
from preference_training.sandbox.sandbox import Limits

LIMITS = Limits(cpu_seconds=1, wall_seconds=4, memory_mb=256, files_mb=1, output_kb=64)
RESULTS = Path(__file__).parent / "results"


def programs(count: int) -> tuple[list[str], list[list[str]]]:
    """Different programs, and their tests."""
    rows = read_problems("train")
    kinds = ["{}"] * 5 + ["{}\nsolve = lambda x: None"] * 4 + ["{}\nwhile True:\n    pass"]
    some = [(rows[number % len(rows)], kinds[number % 10]) for number in range(count)]
    return [f"{kind.format(row['solution'])}\n# {number}" for number, (row, kind) in enumerate(some)], [
        r["tests"] for r, _ in some
    ]


def timed(work) -> dict:
    """Wall and CPU time of work, and how many programs passed."""
    before, started = cpu_seconds(), time.monotonic()
    passed = work()
    return {"passed": passed, "seconds": time.monotonic() - started, "cpu_seconds": cpu_seconds() - before}


def test_by_test(codes: list[str], tests: list[list[str]]) -> int:
    """As the labeling app runs them: a process each test."""
    sandbox = isolated_sandbox(LIMITS)

    def passes(code: str, some: list[str]) -> bool:
        return all([result.status == "passed" for result in sandbox.run(code, *read_tests(some))])

    with ThreadPoolExecutor(usable_cores()) as threads:
        return sum(threads.map(passes, codes, tests))


def main() -> None:
    """Measure, and report."""
    from measure import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--test-by-test", type=int, default=100, help="number of programs to run test by test")
    asked = parser.parse_args()
    codes, tests = programs(asked.programs)
    judged = timed(lambda: sum(each.passed == each.total for each in run_tests(codes, tests, usable_cores(), LIMITS)))
    few = asked.test_by_test
    alone = timed(lambda: test_by_test(codes[:few], tests[:few]))
    rows = [
        {"way": "a process a program", "programs": len(codes), **judged},
        {"way": "a process a test", "programs": few, **alone},
    ]
    for row in rows:
        row["programs_per_second"] = row["programs"] / row["seconds"]
    load = os.getloadavg()
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "load": load, "rows": rows}
    path = RESULTS / f"{datetime.date.today()}_unit_tests_cpu.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(rows, indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
