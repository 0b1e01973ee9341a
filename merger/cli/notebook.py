"""How a notebook shows what the Python API gives: a recipe's text, a plan and a result as the Action's summary does.

Not here: what they say (cli.markdown), and when a notebook is told (merger).
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.card.escape import fence
from merger.card.facts import PlanSummary
from merger.cli.markdown import plan_section, result_section
from merger.planning.plan import Plan
from merger.recipe.model import Recipe
from merger.run.pipeline import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LINEAGE = "pictures/lineage.png"


def recipe_markdown(recipe: Recipe) -> str:
    """The text as it was written."""
    return fence(recipe.text, "yaml")


def plan_markdown(plan: Plan) -> str:
    """What is made, of what, and what that takes."""
    return plan_section(PlanSummary(plan))


def result_markdown(result: Result) -> str:
    """What has become of it, the files of tensors, and the picture of its lineage where that lies on this machine."""
    rows = [f"| `{shard.name}` | {shard.size:,} | `{shard.sha256[:12]}` |" for shard in result.shards]
    files = "\n".join(["| file | bytes | SHA-256 |", "| --- | --- | --- |", *rows]) if rows else ""
    drawn = Path(result.where) / _LINEAGE
    data = base64.b64encode(drawn.read_bytes()).decode() if drawn.is_file() else None
    picture = f"![lineage](data:image/png;base64,{data})" if data else ""
    return "\n\n".join(part for part in (result_section(result), files, picture) if part)


SHOWN: Mapping[type, Callable[[Any], str]] = {
    Recipe: recipe_markdown, Plan: plan_markdown, Result: result_markdown,
}  # fmt: skip


def show_in(shell: Any) -> None:
    """From now on IPython's notebook shows these as Markdown."""
    for kind, render in SHOWN.items():
        shell.display_formatter.formatters["text/markdown"].for_type(kind, render)
