"""YAML that lies beside a model (lock, card, another tool's recipe) as plain data, counted before any of it is made.

Not here: recipes, whose every value knows its place (recipe.spans).
"""

from __future__ import annotations

from typing import Any

import yaml

from merger.safety.limits import MAX_DEPTH, Limit

_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Base: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_LONGEST_NUMBER = 400  # PyYAML takes minutes over 1:1:1:... of a megabyte


def load_yaml(text: str, limit: Limit, only_text: bool = False) -> Any:
    """The value of a text of one document.

    Args:
        limit: how many characters and values it may have, each alias counted as what it stands for.
        only_text: every scalar is the text that it is written as.

    Raises:
        ValueError: it goes beyond that.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > limit.most:
        raise ValueError(f"it has more than {limit.most:,} characters")
    _count(text, limit)
    return yaml.load(text, _Base if only_text else _Safe)


def _count(text: str, limit: Limit) -> None:
    """Go through the events once: no node is made of them."""
    sizes: dict[str | None, int] = {}
    inside: list[tuple[str | None, int]] = []
    size = 0
    for event in yaml.parse(text, _Base):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = inside.pop()
            if anchor is not None:
                sizes[anchor] = size - before
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        before = size
        size += sizes.get(event.anchor, limit.most) if isinstance(event, yaml.AliasEvent) else 1
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append((event.anchor, before))
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if event.implicit[0] and len(event.value) > _LONGEST_NUMBER and event.value[:1] in "-+.0123456789":
                raise ValueError("a number in it is too long")
        if (limit.values is not None and size > limit.values) or len(inside) > MAX_DEPTH:
            raise ValueError("it holds more than is read")
