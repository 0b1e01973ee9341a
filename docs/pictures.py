"""Draws the pictures of docs/pictures.md and docs/cards.md: those of a merge of the zoo, the lineage of an invented
family, and the page that a card makes, in a real browser.

`python docs/pictures.py` writes them to docs/pictures. Not here: a check for drift; each matplotlib draws other bytes.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image
from playwright.sync_api import sync_playwright

from merger.card.ancestors import Family, Member
from merger.card.pictures.lineage import portrait
from merger.run.options import Options
from merger.run.pipeline import merge
from merger.run.prepare import plan, read_recipe

DOCS = Path(__file__).resolve().parent
ZOO = DOCS.parent / "examples" / "zoo"
RECIPE = f"""\
merge_method: dare_ties
base_model: {ZOO}/base
models:
  - model: {ZOO}/kjv
    parameters: {{weight: [0.2, 0.8, 0.4], density: 0.6}}
  - model: {ZOO}/python
    parameters:
      weight: 0.5
      density:
        - {{filter: self_attn, value: [0.3, 0.9]}}
        - {{filter: mlp, value: [0.9, 0.2]}}
        - {{value: 0.5}}
"""
LINEAR = f"""\
merge_method: linear
models:
  - {{model: {ZOO}/kjv, parameters: {{weight: 0.7}}}}
  - {{model: {ZOO}/python, parameters: {{weight: 0.3}}}}
publish: {{license: mit}}
"""
STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 880px; margin: 1em auto; padding: 0 1em; color: #1f2328 }
img { max-width: 100% } pre { background: #f6f8fa; padding: 1em; overflow: auto; font-size: 13px }
table { border-collapse: collapse; display: block; overflow: auto } td, th { border: 1px solid #ddd; padding: 4px 8px }
code { background: #f6f8fa } blockquote { border-left: 4px solid #ddd; margin: 0; padding-left: 1em; color: #59636e }
summary { cursor: pointer }
"""
INVENTED = Family(
    (
        Member("you/grandchild", made="merge by ties", parents=(1, 2, 3)),
        Member("you/child", "3f2a9c10" * 5, "apache-2.0", "merge by slerp", parents=(4, 5)),
        Member("other/fine-tune", "77ab0c2e" * 5, "llama3.1", "fine-tune", parents=(6,)),
        Member("big/base-8B", "51d07e44" * 5, "apache-2.0"),
        Member("one/chat", "0c9de8f1" * 5, "apache-2.0", "fine-tune", parents=(3,)),
        Member("gone/stories", note="deleted, renamed or private"),
        Member("meta/gated-8B", "aa10b3c5" * 5, "llama3.1", note="gated"),
    )
)


def merged(text: str, work: str, name: str) -> Path:
    """The folder with what a recipe makes."""
    recipe, options = Path(work) / "recipe.yaml", Options(to=f"{work}/{name}")
    recipe.write_text(text)
    merge(*plan(read_recipe(recipe), options), options)
    return Path(work) / name


def page(folder: Path) -> Path:
    """The page of a folder's card, as the Hub shows it but for formulas."""
    text = (folder / "README.md").read_text("utf-8").split("---\n", 2)[2]
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    made = folder / "card.html"
    made.write_text(f"<meta charset=utf-8><meta name=viewport content=width=device-width><style>{STYLE}</style>{body}")
    return made


def photograph(page: Path) -> None:
    """The page as wide and as narrow as people have it, all of it."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"))
        for name, width in (("card", 1280), ("card-390", 390)):
            view = browser.new_page(viewport={"width": width, "height": 800})
            view.goto(page.as_uri())
            shot = Image.open(io.BytesIO(view.screenshot(full_page=True))).convert("RGB")
            shot.quantize(32).save(DOCS / "pictures" / f"{name}.png", optimize=True)


def main() -> int:
    """Merge and draw."""
    with tempfile.TemporaryDirectory() as work:
        photograph(page(merged(LINEAR, work, "your-merge")))
        merged(RECIPE, work, "out")
        charts = [item for item in (Path(work) / "out" / "pictures").iterdir() if item.stem != "lineage"]
        drawn = {f"pictures/{item.name}": item.read_bytes() for item in charts}
    for place, content in {**portrait(INVENTED).files, **drawn}.items():
        (DOCS / place).parent.mkdir(exist_ok=True)
        (DOCS / place).write_bytes(content)
    print(INVENTED.tree())
    return 0


if __name__ == "__main__":
    sys.exit(main())
