"""The pictures of reports in docs/, as README and pages show them.

python -m tests_apart.browser.picture RUN [SWEEP]      # of make demo-chat; of a sweep over betas and seeds
"""

import sys
from pathlib import Path

from preference_training.reporting.comparison import write_comparison
from preference_training.reporting.run_report import rebuild_report
from tests_apart.browser.browser import HEIGHTS, chromium, open_page, photograph, show

DOCS = Path(__file__).parents[2] / "docs"
# To the end of the first row of curves. Unit: pixels.
TALL = 1010


def main() -> None:
    """Write the pages again and take their pictures."""
    run, *sweeps = map(Path, sys.argv[1:])
    report = rebuild_report(run)
    HEIGHTS[1280] = TALL
    with chromium() as browser:
        take(browser, report, DOCS / "report.png", 1280, "light")
        take(browser, report, DOCS / "pages" / "report-390-dark.png", 390, "dark")
        for sweep in sweeps:
            page, _ = write_comparison([sweep], sweep)
            take(browser, page, DOCS / "pages" / "comparison-1280-light.png", 1280, "light")


def take(browser, page: Path, picture: Path, width: int, colours: str) -> None:
    """Take a picture of what a window shows of a page."""
    show(browser, width, colours)
    open_page(browser, page)
    photograph(browser, picture, whole=False)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
