"""The recipe's own templates for the card: a folder or a file of this machine, as far as its words reach, or the Hub.

Not here: what is written with them (card).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from merger.errors import MissingError, ModelError, Problem, RecipeError
from merger.recipe.model import Publish
from merger.safety.limits import TEMPLATE, TEMPLATES, excess
from merger.stores.ports import Located, Store

LAYOUT = "card.md.j2"
_HUB = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:/(?P<path>[^@]+))?(?:@(?P<revision>.+))?")
_EXTENSION = ".j2"


def own_templates(publish: Publish, store: Store, folders: Store) -> Mapping[str, str]:
    """The texts by name: a file stands in for the layout of the card, a folder's files for ours of the same names.

    Args:
        publish: which names them.
        store: reads those on the Hub.
        folders: reads those of this machine, as far as the recipe's words reach.

    Raises:
        RecipeError: there is no such template, or no text in it.
        ModelError: the Hub cannot be asked.
    """
    if publish.template is None:
        return {}
    found = _HUB.fullmatch(publish.template)
    if found is not None:
        return _texts(publish, *_on_the_hub(publish, found, store), store)
    try:
        return _texts(publish, *_here(publish, publish.template, folders), folders)
    except ModelError as error:
        raise RecipeError(_at(publish, error)) from None


def _at(publish: Publish, error: ModelError) -> list[Problem]:
    return [replace(problem, at=publish.template_at, where="publish.template") for problem in error.problems]


def _texts(publish: Publish, located: Located, path: str, store: Store) -> Mapping[str, str]:
    stem = f"{path.rstrip('/')}/" if path else ""
    inside = [name for name in located.files if name.startswith(stem) and name.endswith(_EXTENSION)]
    named = {LAYOUT: path} if path in located.files else {name.removeprefix(stem): name for name in inside}
    if not named:
        _missing(publish)
    for size, limit in ((sum(located.files[file].size for file in named.values()), TEMPLATE), (len(named), TEMPLATES)):
        if problem := excess(f"the template {publish.template}", size, limit):
            _refuse(publish, problem.what, problem.hint or "")
    return {name: _text(publish, located, file, store) for name, file in named.items()}


def _on_the_hub(publish: Publish, found: re.Match[str], store: Store) -> tuple[Located, str]:
    """The repo, and the path in it."""
    try:
        located = store.locate(found["repo"], found["revision"])
    except ModelError as error:
        raise ModelError(_at(publish, error)) from None
    if located.commit is None:
        what = f"{found['repo']} is a folder here, and the template is to come from the Hub"
        _refuse(publish, what, "rename the folder, or run it from another one")
    return located, found["path"] or ""


def _here(publish: Publish, template: str, folders: Store) -> tuple[Located, str]:
    """The folder, or the file and its name."""
    try:
        located = folders.locate(template, None)
    except MissingError:
        _missing(publish)
    return located, "" if os.path.isdir(os.path.expanduser(template)) else located.name


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
