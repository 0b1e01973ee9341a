"""Draws the pictures of docs/pictures.md: those of a merge of the zoo, and the lineage of an invented family.

`python docs/pictures.py` writes them to docs/pictures. Not here: a check for drift, as each matplotlib draws other
bytes, and photographs of pages (screens).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

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


def main() -> int:
    """Merge and draw."""
    with tempfile.TemporaryDirectory() as work:
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
