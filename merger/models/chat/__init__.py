"""Chat templates: where a model keeps its own, and those that are built in (the .jinja files beside this one).

Not here: rendering them, which is the work of whoever loads the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merger.safety.limits import parse_json

JINJA, SETTINGS, PROCESSOR = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
FILES = (JINJA, PROCESSOR, SETTINGS)
"""The files that may hold a chat template; the first that does is the one that counts."""

_KEY, _DEFAULT = "chat_template", "default"


def built_in(name: str) -> str:
    """The text of a chat template that is built in."""
    return (Path(__file__).parent / f"{name}.jinja").read_text("utf-8")


def template(files: Mapping[str, bytes]) -> str | None:
    """A model's own chat template, of several the default one; None where it has none.

    Args:
        files: those of `FILES` that the model has.
    """
    if JINJA in files:
        return files[JINJA].decode("utf-8", "replace")
    held = (_object(files[name]).get(_KEY) for name in (PROCESSOR, SETTINGS) if name in files)
    return next((text for of in held if (text := _default(of)) is not None), None)


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _default(held: object) -> str | None:
    """Of a template, or a list of named ones, that which is used when no name is given."""
    if isinstance(held, list):
        named = [one for one in held if isinstance(one, dict) and one.get("name") == _DEFAULT]
        held = named[0].get("template") if named else None
    return held if isinstance(held, str) else None


def with_template(files: Mapping[str, bytes], text: str) -> dict[str, bytes]:
    """Those of a model's files that must be written anew so that this is its chat template.

    It stands wherever one stood, else in a file of its own.
    """
    made = {name: _replace_template(_object(files[name]), text) for name in (PROCESSOR, SETTINGS) if name in files}
    found = {name: content for name, content in made.items() if content is not None}
    return found if found and JINJA not in files else {**found, JINJA: text.encode()}


def _replace_template(content: dict[str, Any], text: str) -> bytes | None:
    """The JSON with this template in place of its own; None where it has none."""
    if _default(content.get(_KEY)) is None:
        return None
    others = [one for one in content[_KEY] if one.get("name") != _DEFAULT] if isinstance(content[_KEY], list) else []
    content[_KEY] = [{"name": _DEFAULT, "template": text}, *others] if others else text
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
