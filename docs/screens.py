"""Photographs what people see in a real browser: the Space's page in each state, a merge's page, README, card, comment.

`python docs/screens.py` writes them to docs/pictures; `--tree` takes README, page, card and the Action's words from
another work tree, for the pictures of before: those are of 6359bca^, the Space's of 54acb75^. `--only`, `--dark`,
`--all` and `--to` are for looking. Needs what the tests need. Not here: the pictures of a merge by itself (pictures),
and the texts of a terminal (console).
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
_PARSER = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
_PARSER.add_argument("--to", type=Path, default=ROOT / "docs" / "pictures", help="the folder of the pictures")
_PARSER.add_argument("--tree", type=Path, default=ROOT, help="of what is photographed, such as another work tree")
_PARSER.add_argument("--only", default="", help="the screens whose names match")
_PARSER.add_argument("--dark", action="store_true", help="as people see it who like it dark")
_PARSER.add_argument("--all", action="store_true", help="each screen at each width")
GIVEN = _PARSER.parse_args()
sys.path[:0] = [str(ROOT / "tests" / "space"), str(ROOT / "tests"), str(GIVEN.tree)]
from conftest import ALONE, CHROMIUM, Visitor  # noqa: E402  rooms of the tests
from loopback import LoopbackHub  # noqa: E402
from pictures import LINEAR, merged  # noqa: E402
from places import ZOO  # noqa: E402
from served import ServedSpace, halted, zoo  # noqa: E402

from merger.card.facts import PlanSummary  # noqa: E402
from merger.cli import markdown  # noqa: E402
from merger.errors import Problem, RecipeError  # noqa: E402
from merger.methods.registry import methods  # noqa: E402
from merger.recipe.parse import parse  # noqa: E402
from merger.run.options import Options  # noqa: E402
from merger.run.pipeline import merge  # noqa: E402
from merger.run.prepare import plan, read_recipe  # noqa: E402

action: Any = import_module(
    "merger.action.outcomes" if (GIVEN.tree / "merger/action").is_dir() else "merger.cli.action"
)
"""It was a room of the command's before."""

NARROW = ("space-planned", "search-done", "merge", "card", "comment")
"""Which screens are kept at 390 pixels, too, so that the pictures stay within two megabytes."""

STYLE = """\
:root { color-scheme: light dark; --ink: #1f2328; --ground: #fff; --soft: #f6f8fa; --edge: #d1d9e0; --quiet: #59636e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f0f6fc; --ground: #0d1117; --soft: #151b23; --edge: #3d444d; --quiet: #9198a1 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 880px; margin: 0 auto; padding: 1em; color: var(--ink);
  background: var(--ground); overflow-wrap: break-word }
h1, h2 { border-bottom: 1px solid var(--edge); padding-bottom: .3em } a { color: #0969da } img { max-width: 100% }
pre { background: var(--soft); padding: 1em; overflow: auto; font-size: 13.6px; line-height: 1.45 }
code { background: var(--soft); font-size: 85%; padding: .2em .4em; border-radius: 6px } pre code { padding: 0 }
table { border-collapse: collapse; display: block; width: max-content; max-width: 100%;
  overflow: auto; margin: 0 0 16px }
td, th { border: 1px solid var(--edge); padding: 6px 13px }
blockquote { border-left: 4px solid var(--edge); margin: 0; padding-left: 1em; color: var(--quiet) }
details { margin-bottom: 16px } summary { cursor: pointer; margin-bottom: 4px }
"""
UNFOLDED = """
for (const part of document.querySelectorAll('details')) part.open = !part.innerText.startsWith('The card')
"""
THERE = "https://huggingface.co/you/your-merge"
Shoot = Callable[[Any, str], None]


def page(text: str, base: Path) -> str:
    """Markdown as GitHub and the Hub show it, but for formulas; pictures lie below a folder."""
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    head = "<!doctype html><meta charset=utf-8><meta name=viewport content=width=device-width>"
    return f"{head}<base href='{base.as_uri()}/'><style>{STYLE}</style>{body}"


def space(visitor: Visitor, hub: LoopbackHub, shoot: Shoot) -> None:
    """The page as it opens, with a curve and a mistake typed, refused, planned, at work, done; and the merge's own."""
    on, good = visitor.page, visitor.recipe()
    shoot(on, "space-opened")
    visitor.write(good.replace("weight: 0.85", "weight: [0, 0.5, 1]", 1))
    on.locator("figure.curves").first.wait_for()
    shoot(on, "space-typed")
    visitor.write(good.replace("weight: 0.85", "wieght: 0.85", 1).replace("task_arithmetic", "task_arithmetik"))
    on.locator("#problems li.error").first.wait_for()
    shoot(on, "space-mistake")
    visitor.write(good)
    on.get_by_text("No problem found").wait_for()
    visitor.click("button", "Merge and publish")
    on.locator("#refused").get_by_text("nobody is signed in").wait_for()
    shoot(on, "space-refused")
    visitor.click("button", "Plan")
    on.locator("#table").get_by_text("about 1 min").wait_for()
    shoot(on, "space-planned")
    visitor.sign_in("alice")
    reached, go = halted(hub)
    visitor.click("button", "Merge and publish")
    assert reached.wait(60)
    visitor.job("running")
    on.wait_for_timeout(1500)
    shoot(on, "space-running")
    go.set()
    visitor.job("done")
    shoot(on, "space-done")
    own = on.locator("#job a[href^='/merges/']")
    if own.count():
        on.goto(visitor.url + str(own.get_attribute("href")))
        shoot(on, "merge")


def search(visitor: Visitor, shoot: Shoot) -> None:
    """The tab for searches, planned and then done."""
    on, text = visitor.page, re.sub(r"weight: [\d.]+", "weight: {search: [0, 1.2], start: 0.5}", visitor.recipe())
    objectives = "  objectives: [{loss: search.txt}]\n  report: [{loss: report.txt}]\n"
    visitor.write(f"{text}search:\n  trials: 20\n{objectives}")
    on.get_by_role("tab", name="Search").click()
    words = (ZOO / "kjv" / "heldout.txt").read_text("utf-8")
    on.locator("#search-text textarea").fill(words[:3000])
    on.locator("#report-text textarea").fill(words[3000:6000])
    on.locator("#search-plan").click()
    on.locator("#search-planned").get_by_text("20 candidates").wait_for()
    on.locator("#search-begin").click()
    on.locator("#search-job .state.done").wait_for()
    shoot(on, "search-done")


def documents(work: str) -> dict[str, str]:
    """A card, and the Action's words on a pull request and on a merge, with nothing folded."""
    folder = merged(LINEAR, work, "your-merge")
    card = (folder / "README.md").read_text("utf-8")
    recipe, options = Path(work) / "recipe.yaml", Options(to=str(folder), force=True)
    before, _ = plan(read_recipe(recipe), options)
    recipe.write_text(LINEAR.replace("0.7", "0.6").replace("0.3", "0.4"))
    planned, store = plan(read_recipe(recipe), options)
    now, then = (PlanSummary(each, "hf://you/your-merge") for each in (planned, before))
    done = replace(merge(planned, store, options), where=THERE)
    wrong = action.Outcome("merges/other.yaml", "failed", problems=_problems("models: [{modl: you/chat}]\n"))
    more = {}
    if "changed" in {field.name for field in fields(action.Outcome)}:  # else it is as it was before
        more = {"changed": markdown.changes_section(now, then), "card": card}
    pull = action.Outcome("merges/mine.yaml", "planned", now, **more)
    told = {"comment": [pull, wrong], "summary": [action.Outcome("merges/mine.yaml", "published", now, done)]}
    texts = {name: "\n\n".join(map(_section, outcomes)) for name, outcomes in told.items()}
    return {"card": page(card.split("---\n", 2)[2], folder)} | {name: page(texts[name], folder) for name in texts}


def _section(outcome: Any) -> str:
    of_before = getattr(action, "summary_section", None)
    return str(of_before(outcome) if of_before else action.sections([outcome], 65_000))


def _problems(text: str) -> tuple[Problem, ...]:
    try:
        parse(text, "merges/other.yaml", methods())
    except RecipeError as error:
        return error.problems
    return ()


def main() -> int:
    """Take all pictures."""
    GIVEN.to.mkdir(exist_ok=True, parents=True)

    def shoot(view: Any, name: str) -> None:
        if not re.search(GIVEN.only, name):
            return
        for width in (1280, 390) if GIVEN.all or name in NARROW else (1280,):
            view.set_viewport_size({"width": width, "height": 900})
            if name != "readme":  # of which the first screen is looked at
                height = view.evaluate("document.documentElement.scrollHeight")
                view.set_viewport_size({"width": width, "height": height})  # the editor measures what is in view
            view.wait_for_timeout(500)
            shot = Image.open(io.BytesIO(view.screenshot())).convert("RGB")
            before = "" if GIVEN.tree == ROOT else "before-"
            shot.quantize(48).save(GIVEN.to / f"{before}{name}-{width}.png", optimize=True)
        view.set_viewport_size({"width": 1280, "height": 600})

    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as work, sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        context = browser.new_context(color_scheme="dark" if GIVEN.dark else "light")
        readme = {"readme": page((GIVEN.tree / "README.md").read_text("utf-8"), GIVEN.tree)}
        for name, text in (readme | documents(work)).items():
            (place := Path(work) / f"{name}.html").write_text(text, "utf-8")
            view = context.new_page()
            view.goto(place.as_uri())
            if name != "card":
                view.evaluate(UNFOLDED)
            shoot(view, name)
        zoo(hub)
        served = ServedSpace(hub, Path(work) / "space", {"MERGER_SPACE_SHARD_SIZE": "1MB"}, root=GIVEN.tree)
        served.start()
        visitor = Visitor(context, served.url, forgets=False)
        visitor.open()
        space(visitor, hub, shoot)
        if GIVEN.tree == ROOT:
            visitor.open()
            search(visitor, shoot)
        served.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
