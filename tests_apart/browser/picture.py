"""docs/report.png: the top of a run's report, as the README shows it.

python -m tests_apart.browser.picture RUN      # of make demo-chat
"""

import sys
from pathlib import Path

from preference_training.reporting.run_report import rebuild_report
from tests_apart.browser.browser import HEIGHTS, chromium, open_page, photograph, show

PICTURE = Path(__file__).parents[2] / "docs" / "report.png"
# To the end of the first row of curves. Unit: pixels.
WIDTH, HEIGHT = 1280, 1010


def main() -> None:
    """Write the report again and take its picture."""
    HEIGHTS[WIDTH] = HEIGHT
    page = rebuild_report(Path(sys.argv[1]))
    with chromium() as browser:
        show(browser, WIDTH)
        open_page(browser, page)
        photograph(browser, PICTURE, whole=False)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    main()
