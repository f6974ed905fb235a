"""The long form of the tests of this folder: many kills and signals, a summary, and all that happened as JSON.

python -m tests.faults.long --kills 200 --stops 50 --minutes 25
"""

import argparse
import datetime
import json
import os
import sys
from collections import Counter

import pytest

from tests.support.files import ROOT

sys.path[:0] = [str(ROOT / "benchmarks")]


class Report:
    """What the tests have recorded, whichever process they ran in."""

    def __init__(self):
        self.tests: list[dict] = []

    def pytest_runtest_logreport(self, report) -> None:
        """Keep a test's outcome; a failure shows in its setup, too."""
        if report.when == "call" or report.failed:
            outcome = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
            self.tests.append(outcome | {"facts": dict(report.user_properties)})

    def summary(self) -> dict:
        """How often each fault has struck, how many examples a resumed run repeated, and what failed."""
        campaigns = [facts for test in self.tests for facts in test["facts"].values()]
        return {
            "struck": dict(Counter(fault for facts in campaigns for fault in facts["struck"])),
            "left out": sum(facts.get("left out", 0) for facts in campaigns),
            "killed while a checkpoint was written by half": sum(facts["written by half"] for facts in campaigns),
            "examples repeated": dict(sorted(Counter(n for facts in campaigns for n in facts["repeated"]).items())),
            "tests": dict(Counter(test["outcome"] for test in self.tests)),
        }


def main() -> int:
    """Run the tests of this folder; exit status as pytest's."""
    from measure import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", default="200", help="kills in all")
    parser.add_argument("--stops", default="50", help="signals in all")
    parser.add_argument("--minutes", default="inf", help="each kind of run begins no other after so long")
    parser.add_argument("--only", default="", help="which tests, as pytest's -k has it: 'two and ranks'")
    args = parser.parse_args()
    os.environ |= {"FAULT_KILLS": args.kills, "FAULT_STOPS": args.stops, "FAULT_MINUTES": args.minutes}
    report = Report()
    status = pytest.main([str(ROOT / "tests" / "faults"), "--timeout=0", "-m", "", "-k", args.only], plugins=[report])
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), **report.summary(), "all": report.tests}
    name = "_".join([str(datetime.date.today()), *args.only.split()])
    path = ROOT / "tests" / "faults" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(report.summary(), indent=1), path, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
