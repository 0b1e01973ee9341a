"""The card's templates: ours, in their place the recipe's own, and a sandbox in which they are filled in.

Every value is escaped unless a filter here has made Markdown of it; there is no way to hand one through as it is. A
template that breaks is refused with its file and line. Not here: what a card says (render, and the templates).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from types import GeneratorType, SimpleNamespace
from typing import Any, NoReturn

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.filters import FILTERS
from jinja2.nodes import Concat
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from merger.card import escape
from merger.errors import MissingError, ModelError, Problem, RecipeError, did_you_mean
from merger.recipe.model import Publish
from merger.safety.apart import BeyondError, Bounds, call
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


OURS = "merger/"
"""What stands before a name of a template of ours where a recipe's own template has the same name."""

MAX_CHARACTERS = 1_000_000
_BOUNDS = Bounds()
_SAID = 1_000
_SIMPLER = "a template puts words and values in their places: leave out what counts far or makes long texts"
_UNESCAPING = ("e", "escape", "forceescape", "safe", "tojson", "urlize", "xmlattr")
_HERE = Path(__file__).resolve().parent
TEMPLATES_FOLDER = next((f for f in (_HERE.parent / "templates", _HERE.parents[1] / "templates") if f.is_dir()), _HERE)


def fill(own: Mapping[str, str], publish: Publish, content: Mapping[str, Any]) -> str:
    """The card's text from its templates.

    Args:
        own: the text of the recipe's own templates by name; what is not among them is ours.
        publish: which says where they come from.
        content: what templates may name.

    Raises:
        RecipeError: a template of the recipe cannot be filled in.
    """
    if not own:
        return _render(_with_ours(), content)
    origin = publish.template or ""
    try:
        answer = call(f"{__name__}:{fill_unbounded.__name__}", (dict(own), origin, _data(content)), _BOUNDS)
    except BeyondError as error:
        answer = {"what": f"{origin}: to fill in the card's template {error}", "hint": _SIMPLER}
    if "made" not in answer:
        raise RecipeError(Problem(answer["what"], publish.template_at, "publish.template", answer["hint"]))
    made: str = answer["made"]
    return made


def fill_unbounded(asked: tuple[Mapping[str, str], str, Mapping[str, Any]]) -> dict[str, str]:
    """What comes of a recipe's own templates, or why nothing does; without any limit of time or memory.

    Args:
        asked: the templates, where they come from, and what they may name.
    """
    own, origin, content = asked
    loader = _Loader(own, origin)
    try:
        return {"made": _render(_environment(loader), content)}
    except MemoryError:
        raise
    except Exception as error:  # a template may raise whatever Python can
        return {"what": f"{loader.place(error)}: {_sentence(error)}", "hint": _hint(error, content)}


@cache
def _with_ours() -> jinja2.Environment:
    """Which keeps what it compiles: a card is rendered at least twice a run. In its HTML no value stands."""
    made = _environment(_Loader({}, ""))
    made.finalize = partial(_print_value, as_text=escape.prose)
    return made


def _render(environment: jinja2.Environment, content: Mapping[str, Any]) -> str:
    made = environment.get_template(LAYOUT).render(content)
    if len(made) > MAX_CHARACTERS:
        raise jinja2.TemplateError(f"it makes a card of {len(made):,} characters; {MAX_CHARACTERS:,} are allowed")
    if made.lstrip().startswith("---\n"):
        raise jinja2.TemplateError("it begins with front matter, which is made without it: leave that out")
    return made


def _data(value: Any) -> Any:
    """The same without our classes: the process that fills templates in need not import what they are made for."""
    if is_dataclass(value):
        told = [name for name in dir(type(value)) if isinstance(getattr(type(value), name), property)]
        return SimpleNamespace(**{name: _data(getattr(value, name)) for name in (*vars(value), *told)})
    if isinstance(value, Mapping):
        return {name: _data(held) for name, held in value.items()}
    return type(value)(map(_data, value)) if isinstance(value, list | tuple) else value


def refuse_unused(own: Mapping[str, str], publish: Publish) -> None:
    """A template that stands in for none of ours, and that no other names, is a slip of its name.

    Raises:
        RecipeError: there is one.
    """
    ours = _ours()
    for name in own.keys() - ours.keys():
        if not any(name in source for other, source in own.items() if other != name):
            what = f"{publish.template}/{name} stands in for no part of the card, and no other template names it"
            raise RecipeError(Problem(what, publish.template_at, "publish.template", did_you_mean(name, ours)))


@cache
def _ours() -> Mapping[str, Path]:
    return {path.relative_to(TEMPLATES_FOLDER).as_posix(): path for path in sorted(TEMPLATES_FOLDER.rglob("*.md.j2"))}


class _Loader(jinja2.BaseLoader):
    """Our templates, and before them the recipe's own, each with the name that its author knows it by."""

    def __init__(self, own: Mapping[str, str], origin: str) -> None:
        self._own = own
        self._origin = origin
        self._shown = {name: origin if list(own) == [LAYOUT] else f"{origin}/{name}" for name in own}

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        if template in self._own:
            return self._own[template], self._shown[template], lambda: True
        path = _ours().get(template.removeprefix(OURS))
        if path is None:
            raise jinja2.TemplateNotFound(template)
        return path.read_text("utf-8"), str(path), lambda: True

    def place(self, error: BaseException) -> str:
        """The file and line of a template at which it broke, as far as known; one of the recipe's before ours."""
        if isinstance(error, jinja2.TemplateSyntaxError):
            return f"{error.filename or self._origin}:{error.lineno}"
        frames, trace = [], error.__traceback__
        while trace is not None:
            frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
        own = [f"{file}:{line}" for file, line in frames if file in self._shown.values()]
        return own[-1] if own else self._origin


def _sentence(error: Exception) -> str:
    said = (error.message if isinstance(error, jinja2.TemplateError) else str(error)) or type(error).__name__
    kind = next((words for kind, words in _KINDS.items() if isinstance(error, kind)), f"{type(error).__name__}: ")
    return f"the card's template cannot be rendered: {kind}{' '.join(said[:_SAID].split()).rstrip('.')}"


_KINDS: Mapping[type[Exception], str] = {
    jinja2.TemplateNotFound: "there is no template ",
    SecurityError: "it leaves the sandbox: ",
    jinja2.TemplateError: "",
}


def _hint(error: Exception, content: Mapping[str, Any]) -> str:
    unknown = re.match(r"'(\w+)' is undefined", str(error)) if isinstance(error, UndefinedError) else None
    meant = did_you_mean(unknown[1], content) if unknown else None
    return meant or "docs/cards.md says what a template may use"


class _Generator(CodeGenerator):
    """``a ~ b`` is text like any other: it is escaped as a whole, and not part by part as HTML alone."""

    def visit_Concat(self, node: Concat, frame: Any) -> None:
        self.write("str_join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox, in which what is Markdown already turns into text again as soon as anything is done to it."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "%", "*"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not isinstance(obj, Markup) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return super().call_binop(context, operator, _plain(left), _plain(right))


def _environment(loader: jinja2.BaseLoader) -> jinja2.Environment:
    environment = _Sandbox(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        finalize=_print_value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters = {name: _on_text(of) for name, of in FILTERS.items() if name not in _UNESCAPING}
    environment.filters |= {
        "code": escape.code,
        "e": escape.escape_text,
        "escape": escape.escape_text,
        "fenced": escape.fence,
        "join": _join,
        "literal": escape.literal,
        "shell": escape.shell,
    }
    del environment.globals["lipsum"]
    return environment


def _print_value(value: Any, as_text: Callable[[object], Markup] = escape.escape_text) -> Markup:
    """What stands in the card for a value; of what is no single value nothing could."""
    if isinstance(value, str | int | float | jinja2.Undefined):
        return as_text(value)
    raise jinja2.TemplateRuntimeError(f"{_WORDS.get(type(value), type(value).__name__)} has no text: name a part of it")


_WORDS = {type(None): "none", dict: "a map", list: "a list", tuple: "a list", GeneratorType: "a list"}


def _plain(value: Any) -> Any:
    return str.__str__(value) if isinstance(value, Markup) else value


def _on_text(of: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that is handed text where it would be handed Markdown."""

    @wraps(of)  # the wrapper must carry Jinja's mark of what is passed first
    def on_text(*values: Any, **named: Any) -> Any:
        return of(*map(_plain, values), **{name: _plain(value) for name, value in named.items()})

    return on_text


def _join(values: Any, between: str = "") -> Markup:
    return Markup(str(escape.inline(between)).join(escape.escape_text(value) for value in values))
