"""The recipe's own templates for the card, fetched from where its models come from: a folder, a file, or the Hub.

Not here: what is written with them (card).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from merger.errors import ModelError, Problem, RecipeError
from merger.recipe.model import Publish
from merger.safety.limits import TEMPLATE, TEMPLATES, excess
from merger.stores.ports import Located, Store

LAYOUT = "card.md.j2"
_HUB = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:/(?P<path>[^@]+))?(?:@(?P<revision>.+))?")
_EXTENSION = ".j2"


def own_templates(publish: Publish, store: Store) -> Mapping[str, str]:
    """The texts by name: a file stands in for the layout of the card, a folder's files for ours of the same names.

    Raises:
        RecipeError: there is no such template, or no text in it.
        ModelError: the Hub cannot be asked.
    """
    if publish.template is None:
        return {}
    located, path = _located(publish, publish.template, store)
    stem = f"{path.rstrip('/')}/" if path else ""
    inside = [name for name in located.files if name.startswith(stem) and name.endswith(_EXTENSION)]
    named = {LAYOUT: path} if path in located.files else {name.removeprefix(stem): name for name in inside}
    if not named:
        _missing(publish)
    for size, limit in ((sum(located.files[file].size for file in named.values()), TEMPLATE), (len(named), TEMPLATES)):
        if problem := excess(f"the template {publish.template}", size, limit):
            _refuse(publish, problem.what, problem.hint or "")
    return {name: _text(publish, located, file, store) for name, file in named.items()}


def _located(publish: Publish, template: str, store: Store) -> tuple[Located, str]:
    """The repo or folder, and the path in it."""
    found = _HUB.fullmatch(template)
    if found is None:
        return _in_a_folder(publish, template, store)
    try:
        located = store.locate(found["repo"], found["revision"])
    except ModelError as error:
        raise ModelError(
            replace(problem, at=publish.template_at, where="publish.template") for problem in error.problems
        ) from None
    if located.commit is None:
        what = f"{found['repo']} is a folder here, and the template is to come from the Hub"
        _refuse(publish, what, "rename the folder, or run it from another one")
    return located, found["path"] or ""


def _in_a_folder(publish: Publish, template: str, store: Store) -> tuple[Located, str]:
    written = template if template.startswith(("/", "~", "./", "../")) else f"./{template}"
    folder, _, name = written.rstrip("/").rpartition("/")
    try:
        beside = store.locate(folder or "/", None)
        return (beside, name) if name in beside.files else (store.locate(written, None), "")
    except ModelError:
        _missing(publish)


def _text(publish: Publish, located: Located, file: str, store: Store) -> str:
    try:
        return store.fetch(located, file).decode("utf-8")
    except UnicodeDecodeError:
        _refuse(publish, f"the template {file} is no UTF-8 text", "save it as UTF-8")


def _missing(publish: Publish) -> NoReturn:
    hint = "name a file, or a folder that holds card.md.j2 or parts/*.md.j2, here or as hf://owner/name/path@revision"
    _refuse(publish, f"there is no template {publish.template!r}", hint)


def _refuse(publish: Publish, what: str, hint: str) -> NoReturn:
    raise RecipeError(Problem(what, publish.template_at, "publish.template", hint))
