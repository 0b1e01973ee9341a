"""The recipe as a card shows it: folders by their last part, so that no place on a disk is published.

Not here: the recipe's own text, as it lies beside the card and in the lock file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from merger.plan.plan import Plan
from merger.recipe.model import Publish


def shown_recipe(planned: Plan) -> str:
    """The text, word for word but for the places of folders: in values, and where they stand in comments."""
    recipe = planned.locked.recipe
    named = {model.ref.path: f"./{model.name}" for model in planned.locked.models if model.located.commit is None}
    everything = {**named, **_template(recipe.publish)}
    places = {path: name for path, name in everything.items() if path.removeprefix("./") != name.removeprefix("./")}
    text = recipe.text.removeprefix("\ufeff")
    for start, end, anchored, value in reversed(_scalars(text) if places else []):
        found = next((path for path in places if value in (path, f"{path}/") or value.startswith(f"{path}+")), None)
        if found is not None:
            new = places[found] + value[len(found) :].removeprefix("/")
            text = text[:start] + _replaced(text[start:end], value, new, anchored) + text[end:]
    for path in sorted(places, key=len, reverse=True):
        if path.count("/") > 1:
            text = text.replace(path.rstrip("/"), places[path])
    return text


def _template(publish: Publish) -> Mapping[str, str]:
    path = publish.template or publish.left_out
    return {} if path is None or path.startswith("hf://") else {path: f"./{path.rstrip('/').split('/')[-1]}"}


def _scalars(text: str) -> list[tuple[int, int, bool, str]]:
    """Each value's beginning and end in the text, whether an anchor or a tag stands before it, and what it means."""
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    scalars: Iterable[Any] = (event for event in events if isinstance(event, yaml.ScalarEvent))
    return [
        (event.start_mark.index, event.end_mark.index, bool(event.anchor or event.tag), event.value)
        for event in scalars
    ]


def _replaced(source: str, value: str, new: str, anchored: bool) -> str:
    """The value's source with another value; one that is escaped is quoted anew."""
    return source.replace(value, new) if anchored or value in source else json.dumps(new, ensure_ascii=False)
