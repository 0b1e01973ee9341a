"""A recipe to begin with, and the workflow that runs it: what `merger init` writes. Not here: its questions (cli)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merger.card.templates import TEMPLATES_FOLDER
from merger.errors import Problem, RecipeError
from merger.methods.registry import named_method
from merger.run.options import parse_destination
from merger.run.prepare import parse_text
from merger.runtime import addresses, refusal
from merger.safety.names import hub_path

_PACKAGE = Path(__file__).resolve().parents[1]
_WORKFLOWS = (_PACKAGE / "templates" / "workflow.yml", _PACKAGE.parent / "examples" / "workflow.yml")
"""In an installed package, and in a checkout."""


@dataclass(frozen=True)
class Draft:
    """What somebody wants to merge.

    Args:
        models: folders or repos on the Hub.
        method: by its name.
        to: a folder, ``owner/name`` or ``hf://owner/name``.
        base: what they were fine-tuned from, where the method wants that.
    """

    models: tuple[str, ...]
    method: str
    to: str
    base: str | None = None

    @property
    def text(self) -> str:
        """The recipe, with the method's parameters as its own template has them."""
        template = yaml.safe_load((TEMPLATES_FOLDER / "recipes" / f"{self.method}.yaml").read_text("utf-8"))
        measured = [self.base] if self.base and named_method(self.method).asks(base=True) else []
        rows = [self._model(model) for model in dict.fromkeys([*self.models, *measured])]
        content: dict[str, Any] = {"models": rows, "merge_method": self.method}
        content |= {"base_model": self.base} if self.base else {}
        content |= {key: template[key] for key in ("parameters", "dtype") if key in template}
        content |= {"publish": {"repo": repo}} if (repo := self.repo) else {}
        about = f"# `merger methods {self.method}` tells of its parameters, `merger plan` what this makes and takes.\n"
        return f"{schema_line()}{about}{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"

    def _model(self, model: str) -> dict[str, str]:
        """A model's row, with statistics where the method asks for them: as merger measure's help calls them."""
        method = named_method(self.method)
        measured = {"statistics": f"{re.split('[@+]', model)[0]}-{method.statistics}"}
        return {"model": model} | (measured if method.asks(model == self.base and method.subtracts_base) else {})

    @property
    def repo(self) -> str | None:
        """Where on the Hub it goes."""
        return hub_path(parse_destination(self.to))


def schema_line() -> str:
    """By which editors find the schema of recipes: the first line of each recipe that we write."""
    return f"# yaml-language-server: $schema={addresses().get('Repository')}/raw/HEAD/docs/recipe.schema.json\n"


def write_draft(draft: Draft, folder: Path) -> Iterator[Path]:
    """Write the recipe into ``merges``, and the workflow where there is none yet; each path as it is written.

    Raises:
        RecipeError: no recipe can say that, or one of this name is there.
    """
    named_method(draft.method)
    path = folder / "merges" / f"{Path(draft.to).name}.yaml"
    parse_text(draft.text, str(path))
    try:
        yield _write(path, draft.text)
        workflow = folder / ".github" / "workflows" / "merge.yml"
        if not workflow.exists():
            yield _write(workflow, next(place for place in _WORKFLOWS if place.is_file()).read_text("utf-8"))
    except FileExistsError:
        raise RecipeError(Problem(f"{path} is there already", hint="remove it, or choose another --to")) from None
    except OSError as error:
        raise refusal(f"{path} cannot be written", error, RecipeError) from None


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return path
