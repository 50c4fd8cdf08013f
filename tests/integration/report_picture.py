"""Makes the picture of a report that the README shows, `deploy/report.png`. By hand; needs Chromium.

python -m tests.integration.report_picture         # of a run of the demo, which takes some minutes
python -m tests.integration.report_picture RUN     # of a run that is there
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.support.browser import CHROMIUM, DRIVER, browser
from tuner.report.facts import read_run
from tuner.report.write import write_report
from tuner.results.output import REPORT_FILE, Output

PICTURE = Path(__file__).parents[2] / "deploy" / "report.png"
WIDTH = 1160
LARGEST_BYTES = 150_000
LAST_SECTION = ".pair"
"""The picture ends below it."""


def main(arguments: list[str]) -> int:
    """Run the demo unless there is a run, and photograph its report."""
    if not (CHROMIUM and DRIVER):
        print("Debian's chromium and chromium-driver are missing", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments[0] if arguments else scratch)
        if not arguments:
            subprocess.run([sys.executable, "-m", "tuner.run", "--output-dir", scratch], check=True)
        page = Path(scratch) / REPORT_FILE
        write_report(Output(scratch), REPORT_FILE, [read_run(folder)])
        photograph(page)
    size = PICTURE.stat().st_size
    print(f"{PICTURE}: {size:,} bytes")
    return 0 if size < LARGEST_BYTES else 1


def photograph(page: Path) -> None:
    """The top of the page, in as few colours as it takes."""
    with browser() as tab:
        tab.open(page, width=WIDTH)
        bottom = tab.value(f"document.querySelector('{LAST_SECTION}').getBoundingClientRect().bottom")
        tab.picture(PICTURE, height=int(bottom) + 14)
    Image.open(PICTURE).convert("RGB").quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
