"""The form and the recipe's text, both ways: what the form shows of a text, and the text after a turn of a knob.

The text is the truth: an edit changes the lines it is about, and leaves comments and all else as they are. Reading is
lenient, for what is wrong is told beside the text (work.admission). Not here: the controls themselves (page).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from merger.safety import numbers

if TYPE_CHECKING:
    from merger.methods.registry import Method, Param

MOST_POINTS = 64
MOST_BRACKETS = 200
"""Of brackets in brackets the reading takes a time that grows with the square of their number."""

MOST_CHARACTERS = 16_000
"""A longer recipe is for the text alone: reading it with its comments takes a second for every 50,000 of them."""

_NAME_CHARACTERS = 90


@dataclass(frozen=True)
class ShownSetting:
    """A parameter's value as the form shows it.

    Args:
        curves: the numbers from the first layer to the last, one for a plain number; by filter, ``""`` for all.
        is_simple: whether the form can change it; a list of filters, or what is left open for a search, it cannot.
    """

    curves: Mapping[str, tuple[float, ...]]
    is_simple: bool = True

    @property
    def numbers(self) -> tuple[float, ...]:
        """Those of the first curve."""
        return next(iter(self.curves.values()), ())


@dataclass(frozen=True)
class ModelRow:
    """A model of the recipe, and its own parameters."""

    model: str
    settings: Mapping[str, ShownSetting] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What the form shows of a recipe.

    Args:
        method: the name of the merge method, or empty.
        base: the base model, or empty.
        rows: the models.
        settings: the parameters at the top.
        repo, private, licence: where the result goes and how.
        is_simple: whether the recipe lists models; slices and modules are for the text alone.
    """

    method: str = ""
    base: str = ""
    rows: tuple[ModelRow, ...] = ()
    settings: Mapping[str, ShownSetting] = field(default_factory=dict)
    repo: str = ""
    private: bool = False
    licence: str = ""
    is_simple: bool = True

    def __hash__(self) -> int:
        """By what it holds: the page makes the controls anew when this changes."""
        return hash(repr(self))

    @property
    def models(self) -> list[str]:
        """The models' names."""
        return [row.model for row in self.rows]


def read_form(text: str) -> Form | None:
    """What the form shows; None where the text is no YAML map, and the form stays as it was."""
    top = _tree(text)
    if top is None:
        return None
    listed = top.get("models")
    rows = [_row(item) for item in listed] if isinstance(listed, list) else []
    publish = top.get("publish") if isinstance(top.get("publish"), dict) else {}
    return Form(
        method=_text(top.get("merge_method")),
        base=_text(top.get("base_model")),
        rows=tuple(row for row in rows if row.model),
        settings=_settings(top.get("parameters")),
        repo=_text(publish.get("repo")),
        private=publish.get("private") is True,
        licence=_text(publish.get("license")),
        is_simple="slices" not in top and "modules" not in top,
    )


def _tree(text: str) -> CommentedMap | None:
    if len(text) > MOST_CHARACTERS or text.count("[") + text.count("{") > MOST_BRACKETS:
        return None
    try:
        documents = list(_yaml().load_all(text))
    except (YAMLError, ValueError, TypeError, RecursionError, AttributeError, KeyError):
        return None
    only = documents[0] if len(documents) == 1 else None
    return only if isinstance(only, CommentedMap) and "<<" not in text else None


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _row(item: Any) -> ModelRow:
    known = item if isinstance(item, dict) else {}
    return ModelRow(_text(known.get("model")), _settings(known.get("parameters")))


def _settings(block: Any) -> dict[str, ShownSetting]:
    known = block if isinstance(block, dict) else {}
    read = {str(name): _setting(value) for name, value in known.items()}
    return {name: setting for name, setting in read.items() if setting is not None}


def _setting(value: Any) -> ShownSetting | None:
    if isinstance(value, dict) and "search" in value:
        return ShownSetting({}, is_simple=False)
    rules = value if isinstance(value, list) and any(isinstance(item, dict) for item in value) else None
    if rules is None:
        simple = _numbers(value)
        return ShownSetting({"": simple}) if simple else None
    pairs = [(_text(rule.get("filter")), _numbers(rule.get("value"))) for rule in rules if isinstance(rule, dict)]
    return ShownSetting({name: found for name, found in pairs if found}, is_simple=False)


def _numbers(value: Any) -> tuple[float, ...]:
    items = list(value)[:MOST_POINTS] if isinstance(value, list) else [value]
    return tuple(float(item) for item in items) if all(_is_number(item) for item in items) else ()


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) and numbers.ANY.holds(item)


# ---- edits ----------------------------------------------------------------------------------------------------------


def edit(text: str, change: Callable[[CommentedMap], None]) -> str:
    """The text after a change; as it is where it is no YAML map."""
    top = CommentedMap() if not text.strip() else _tree(text)
    if top is None:
        return text
    change(top)
    out = io.StringIO()
    _yaml().dump(top, out)
    return out.getvalue()


def with_method(text: str, method: Method, table: Mapping[str, Method]) -> str:
    """With another method: parameters that it has no use for go, and those that it needs come."""

    def change(top: CommentedMap) -> None:
        top["merge_method"] = method.name
        listed = top.get("models")
        for block in (top, *(listed if isinstance(listed, list) else ())):
            if isinstance(block, dict):
                _drop_unused(block, method, table)
        for param in method.params:
            if param.required and not any(_mentions(block, param.name) for block in (top, *(listed or ()))):
                _block(top)[param.name] = start_value(param)

    return edit(text, change)


def _drop_unused(block: Any, method: Method, table: Mapping[str, Method]) -> None:
    known = block.get("parameters")
    if not isinstance(known, dict):
        return
    others = {param.name for other in table.values() for param in other.params}
    for name in [name for name in known if name in others and method.param(name) is None]:
        del known[name]
    if not known:
        del block["parameters"]


def _mentions(block: Any, name: str) -> bool:
    known = block.get("parameters") if isinstance(block, dict) else None
    return isinstance(known, dict) and name in known


def _block(level: Any, key: str = "parameters") -> Any:
    if not isinstance(level.get(key), dict):
        level[key] = CommentedMap()
    return level[key]


def _put(block: Any, key: str, value: str | bool) -> None:
    """A key and its value, or no key where that is empty."""
    if value:
        block[key] = value
    else:
        block.pop(key, None)


def start_value(param: Param) -> float | int | bool:
    """Where a control stands before anybody has touched it."""
    if param.default is not None:
        return param.default
    return {"float": 0.5, "int": 1, "bool": False}[param.kind]


def slider_range(param: Param, value: float) -> tuple[float, float]:
    """Where a slider begins and ends: the parameter's bounds, else what is usual."""
    low, high = (param.bounds.low, param.bounds.high) if param.bounds else (None, None)
    least = min(0.0 if value >= 0 else -2.0, value) if low is None else min(low, value)
    most = max(2.0, 2 * value) if high is None else max(high, value)
    return least, most


def with_models(text: str, names: Sequence[str]) -> str:
    """With these models, in this order; one that was there keeps what stands with it."""

    def change(top: CommentedMap) -> None:
        listed = top.get("models")
        if not isinstance(listed, list):
            listed = top["models"] = CommentedSeq()
        there = {_row(item).model: item for item in listed}
        gone = [number for number, item in enumerate(listed) if _row(item).model not in names]
        for number in reversed(gone):
            del listed[number]
        for name in names:
            if name not in there:
                listed.append(CommentedMap(model=name))

    return edit(text, change)


def with_text(text: str, key: str, value: str) -> str:
    """With a name at the top, such as the base model's; without the key where it is empty."""
    return edit(text, lambda top: _put(top, key, value.strip()))


def with_publish(text: str, key: str, value: str | bool) -> str:
    """With another destination, or another way to go there."""

    def change(top: CommentedMap) -> None:
        _put(_block(top, "publish"), key, value)
        _put(top, "publish", top["publish"])

    return edit(text, change)


def with_value(text: str, row: int | None, param: Param, points: Sequence[float | None]) -> str:
    """With another value of a parameter: a number, or a gradient over the layers.

    Args:
        text: the recipe.
        row: the model's number among those listed; None: at the top.
        param: the parameter.
        points: one number, or those from the first layer to the last; a field that was emptied changes nothing.
    """
    if not all(_is_number(point) for point in points):
        return text
    values = [_plain(number, param) for number in points]

    def change(top: CommentedMap) -> None:
        block = _block(top if row is None else top["models"][row])
        if len(values) == 1:
            block[param.name] = values[0]
        else:
            block[param.name] = CommentedSeq(values)
            block[param.name].fa.set_flow_style()

    return edit(text, change)


def _plain(number: Any, param: Param) -> float | int | bool:
    if param.kind == "bool":
        return bool(number)
    rounded = round(float(number), 6)
    return int(rounded) if param.kind == "int" or rounded.is_integer() else rounded


def parse_numbers(words: str) -> list[float]:
    """The numbers that somebody typed; none if there is anything among them that a recipe may not have.

    >>> parse_numbers("0, .5 1"), parse_numbers("0, a")
    ([0.0, 0.5, 1.0], [])
    """
    typed = [word for word in re.split(r"[,;\s]+", words.strip(" []")) if word]
    try:
        return [numbers.parse_decimal(word, numbers.ANY) for word in typed][:MOST_POINTS]
    except ValueError:
        return []


def with_destination(text: str, user: str, before: str | None = None) -> str:
    """With a repo of this user's to publish to, unless it names one that is more than a suggestion.

    Args:
        text: the recipe.
        user: whose repo it shall be.
        before: the recipe of which it may name the suggestion, as it was before an edit; None: as it is.
    """
    shown, old = read_form(text), read_form(text if before is None else before)
    if shown is None or old is None or shown.repo not in ("", suggest_repo(old, shown.repo.partition("/")[0])):
        return text
    return with_publish(text, "repo", suggest_repo(shown, user))


def suggest_repo(form: Form, user: str) -> str:
    """A repo's name for a result, of what it is made of."""
    parts = [name.split("@")[0].split("/")[-1] for name in form.models if name != form.base][:3]
    words = [part.split("-") for part in parts]
    shared = next((at for at, same in enumerate(zip(*words, strict=False)) if len(set(same)) > 1), 0)
    told = words[0] + [word for each in words[1:] for word in each[shared:]] if words else []
    name = re.sub(r"(?:[^A-Za-z0-9.]|\.(?=[^A-Za-z0-9]))+", "-", "-".join([*told, form.method or "merge"]))
    name = re.sub(r"^[-.]+|(?:\.git|[-.])+$", "", name[:_NAME_CHARACTERS])
    return f"{user}/{name or 'merge'}"
