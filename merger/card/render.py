"""The model card: what was merged, how, from which commits, under which licences, and how to use it.

Templates run in Jinja's sandbox, and an unknown name in them is an error. Metadata is built as data, never as text.
Not here: the lock file (lineage), and which licence it is (licences).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import BaseLoader, ChoiceLoader, DictLoader, FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from merger.card.licences import licence, licence_note
from merger.card.lineage import shown
from merger.card.relations import Relations
from merger.card.scores import Board
from merger.checkpoints.config import is_diffusion
from merger.errors import Problem, RecipeError
from merger.methods.registry import Method
from merger.plan.plan import Plan
from merger.recipe.model import Publish, Recipe

CARD = "card.md.j2"
GIVES, BASE, CONFIG_ONLY = "model", "base model", "config and tokenizer only"
_HERE = Path(__file__).resolve().parent
_TEMPLATES = next((f for f in (_HERE.parent / "templates", _HERE.parents[1] / "templates") if f.is_dir()), _HERE)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


@dataclass(frozen=True)
class Parent:
    """A row of the card's table of parents."""

    name: str
    url: str
    commit: str | None
    licence: str | None
    role: str


@dataclass(frozen=True)
class Stage:
    """A row of the card's table of stages: a document of the recipe, its methods and what it is made of."""

    name: str | None
    methods: str
    models: tuple[str, ...]


NO_PARTS: Mapping[str, Any] = {"lineage": "", "pictures": {}, "parameters": (), "scores": None}
"""The parts of the card that are known only at the end, as they are before."""


def render(
    planned: Plan, table: Mapping[str, Method], name: str, related: Relations, parts: Mapping[str, Any] = NO_PARTS
) -> str:
    """The text of README.md.

    Args:
        planned: what was made.
        table: the merge methods by name.
        name: ``owner/name``, or the folder's last part.
        related: how the parents relate, as far as this run has seen it.
        parts: lineage as text, pictures by name, parameters, scores; each name of `NO_PARTS`.

    Raises:
        RecipeError: the recipe's own template cannot be rendered.
    """
    publish = planned.locked.recipe.publish
    environment = SandboxedEnvironment(
        loader=_loader(publish),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escaped, "fenced": fenced}
    try:
        content = {**_content(planned, table, name, parts["scores"]), "related": related, **parts}
        return environment.get_template(CARD).render(content)
    except TemplateError as error:
        what = f"the card's template cannot be rendered: {type(error).__name__}: {error.message}"
        raise RecipeError(Problem(what, publish.template_at, "publish.template")) from None


def _loader(publish: Publish) -> BaseLoader:
    """Our templates, and before them the recipe's own: a folder, or a file in place of the card."""
    if publish.template is None:
        return FileSystemLoader(_TEMPLATES)
    own = Path(publish.template)
    try:
        first = FileSystemLoader(own) if own.is_dir() else DictLoader({CARD: own.read_text(encoding="utf-8")})
    except (OSError, UnicodeDecodeError):
        what = f"there is no template {publish.template!r}"
        hint = "name a file, or a folder that holds card.md.j2, relative to the working directory"
        raise RecipeError(Problem(what, publish.template_at, "publish.template", hint)) from None
    return ChoiceLoader([first, FileSystemLoader(_TEMPLATES)])


def _content(planned: Plan, table: Mapping[str, Method], name: str, scores: Board | None) -> dict[str, Any]:
    documents = planned.locked.recipe.documents
    used = [table[name] for name in dict.fromkeys(piece.method for of in documents for piece in of.slices)]
    parents = [_parent(planned, number) for number in range(len(planned.locked.models))]
    hub_name = "/" in name
    return {
        "metadata": _metadata(planned, used, scores),
        "name": name,
        "title": name.split("/")[-1],
        "address": name if hub_name else f"./{name}",
        "parents": parents,
        "givers": [parent.name for parent in parents if parent.role == GIVES],
        "bases": [parent.name for parent in parents if parent.role == BASE],
        "methods": used,
        "stages": [_stage(planned, table, recipe) for recipe in documents] if len(documents) > 1 else [],
        "recipe": planned.locked.recipe.text,
        "licence": licence(planned),
        "licence_note": licence_note(planned),
        "plan": planned,
        "library": _library(planned.config),
        "class_name": planned.config.get("_class_name"),
        "auto_class": _auto_class(planned.config),
        "dtypes": list(dict.fromkeys(job.dtype for job in planned.jobs)),
        "local": all(parent.commit is None for parent in parents),
        "any_local": any(parent.commit is None for parent in parents),
    }


def _stage(planned: Plan, table: Mapping[str, Method], recipe: Recipe) -> Stage:
    """A row of the table of stages; of the result's own document without a name."""
    titles = dict.fromkeys(table[piece.method].title for piece in recipe.slices)
    models = [planned.locked.model(ref) for ref in recipe.parents]
    own = recipe is not planned.locked.recipe
    return Stage(recipe.name if own else None, ", ".join(titles), tuple(shown(model) for model in models))


def _metadata(planned: Plan, used: list[Method], scores: Board | None) -> str:
    donor = planned.locked.donor
    parents = [model.located.where for model in planned.locked.models if model.located.commit is not None]
    stated = licence(planned)
    data: dict[str, Any] = {}
    if stated is not None:
        data["license"] = stated
    if library := _library(planned.config):
        data["library_name"] = library
    task = donor.card.get("pipeline_tag") or _TASKS.get(_auto_class(planned.config))
    if isinstance(task, str) and _TASK.fullmatch(task):
        data["pipeline_tag"] = task
    data["tags"] = ["merge", "merger", *(method.name for method in used)]
    if parents:
        data["base_model"] = parents
        data["base_model_relation"] = "merge"
    if scores is not None:
        data["model-index"] = scores.index
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


_TASK = re.compile(r"[a-z0-9-]+")
_TASKS = {"AutoModelForCausalLM": "text-generation"}


def _library(config: Mapping[str, Any]) -> str | None:
    """What loads the result; None for tensors without a config."""
    if not config:
        return None
    return "diffusers" if is_diffusion(config) else "transformers"


def _auto_class(config: Mapping[str, Any]) -> str:
    """The transformers class that loads the result, as its config tells."""
    architectures = config.get("architectures") or [""]
    for ending in ("ForCausalLM", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification"):
        if str(architectures[0]).endswith(ending):
            return f"AutoModel{ending}"
    return "AutoModel"


def _parent(planned: Plan, number: int) -> Parent:
    model = planned.locked.models[number]
    pieces = [piece for recipe in planned.locked.recipe.documents for piece in recipe.slices]
    bases = {planned.locked.index(piece.base_model) for piece in pieces if piece.base_model}
    giving = any(entry.model == number for job in planned.jobs for entry in job.reads)
    role = (BASE if number in bases else GIVES) if giving else CONFIG_ONLY
    url = f"/{model.located.where}/tree/{model.located.commit}"  # a page of the Hub that the card lies on
    return Parent(shown(model), url, model.located.commit, model.licence, role)


def escaped(text: object) -> str:
    """Text that stands for itself in Markdown, whatever it holds, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def fenced(text: str, language: str = "") -> str:
    """Text as a code block that nothing inside can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
