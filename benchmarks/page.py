"""Seconds that somebody at the Space's page waits: first paint, until it can be used, error, plan, and a merge.

`python benchmarks/page.py` opens the page in this machine's Chromium, beside a Hub on this machine, so that no network
is in the numbers. Needs what the tests need.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "space")]
from loopback import LoopbackHub  # noqa: E402  rooms of the tests
from served import ServedSpace, zoo  # noqa: E402

WRONG = "merge_method: linear\nmodels: [{modl: a/b}]\n"
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"


def visit(page: Page, space: ServedSpace, number: int) -> dict[str, float]:
    """One visit from the first paint to a published merge, signed in by two clicks."""
    told: dict[str, float] = {}

    def timed(what: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
        start = time.perf_counter()
        begin()
        end()
        told[what] = time.perf_counter() - start

    control = page.get_by_label("number input for lambda").first
    timed("usable: form, text and controls are there", lambda: page.goto(space.url), control.wait_for)
    told = {"first paint": float(page.evaluate(PAINTED)), **told}
    editor, good = page.locator("#recipe .cm-content"), page.locator("#recipe .cm-line").all_inner_texts()

    def write(text: str) -> None:
        editor.click()
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(text)

    timed("error shown, after the last key", lambda: write(WRONG), page.locator("#problems li.error").first.wait_for)
    write("\n".join(good))
    page.get_by_text("No problem found").wait_for()
    timed("plan shown", page.get_by_role("button", name="Plan").click, page.get_by_text("about 1 min").first.wait_for)
    page.get_by_role("button", name="Sign in with Hugging Face").click()
    page.get_by_role("link", name="Authorize as alice").click()
    page.get_by_role("button", name="Logout (alice)").wait_for()
    box = page.locator("#repo input, #repo textarea").first
    box.press("Control+a")
    box.press_sequentially(f"alice/seconds-{number}")
    page.locator("#recipe").get_by_text(f"alice/seconds-{number}").wait_for()
    done = page.locator("#job .state.done").get_by_text(f"alice/seconds-{number}")
    timed(
        "merge and publish, from click to done",
        page.get_by_role("button", name="Merge and publish").click,
        done.wait_for,
    )
    return told


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visits", type=int, default=3, help="of which the median counts")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    options = parser.parse_args()
    found: list[dict[str, float]] = []
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as folder, sync_playwright() as running:
        zoo(hub)
        space = ServedSpace(hub, Path(folder))
        space.start()
        browser = running.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for number in range(options.visits):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            found.append(visit(context.new_page(), space, number))
            context.close()
        browser.close()
        space.kill()
    print("| what | seconds |\n|---|---|")
    for what in found[0]:
        print(f"| {what} | {median(each[what] for each in found):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
