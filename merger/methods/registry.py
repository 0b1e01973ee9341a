"""What a merge method is, read off one decorated function, and the table of them.

Signature, hints and docstring are the single source: recipe schema, bounds errors, menus, cards and laws are made
from what stands here. Not here: any arithmetic. This file and the method files can be imported without torch.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, TypeVar, get_args, get_origin, get_type_hints

from merger.errors import Problem, RecipeError, did_you_mean
from merger.safety.numbers import LIMIT
from merger.safety.numbers import Range as Range  # methods name it with the rest of what they declare

if TYPE_CHECKING:
    from merger.methods.steps.step import Array

Tensors = NewType("Tensors", Sequence["Array"])
"""One float32 block of each model, all of one shape, in the recipe's order."""
Deltas = NewType("Deltas", Sequence["Array"])
"""The same, with the base model's block already subtracted from each; the base itself is not among them."""


class _PerModelMark:
    """Marks an argument that takes one number a model."""


PerModel = Annotated[float | Sequence[float], _PerModelMark()]
"""One number for each model, or one number for all of them."""

Base = Literal["unused", "first", "subtracted", "optional", "included"]
"""What the base model is to a method: no input | one of the models, handed over first | subtracted from the others |
subtracted where the recipe names one | one more model where the recipe names one."""

Statistic = Literal["fisher", "gram", "activations"]
"""What may have been measured of a model: squared gradients of each entry | products of a layer's inputs, XᵀX | the
inputs' magnitudes."""

Unit = Literal["entries", "rows", "matrix"]
"""What a block must hold: any run of entries (1-D) | whole rows (2-D: the last dimension; a 1-D tensor is one row) |
a whole matrix (2-D; a 1-D tensor is whole): that of the tensor, or one of those that it is a stack of."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; its authors by their full names, after each other with commas."""

    authors: str
    year: int
    title: str
    url: str

    @property
    def by(self) -> str:
        """Its authors as a text names them: Yadav et al.; a name's last word is the surname."""
        names = [name.split()[-1] for name in self.authors.split(", ")]
        return " & ".join(names) if len(names) < 3 else f"{names[0]} et al."


@dataclass(frozen=True)
class Law:
    """A sentence that tests hold for every method that claims it (tests/methods/test_laws.py says each in words)."""

    name: str
    settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    like: str | None = None


def endpoints(parameter: str) -> Law:
    """At `parameter` 0 the result is the first tensor, at 1 the second."""
    return Law("endpoints", {parameter: 0.0})


def full(like: str, **settings: float) -> Law:
    """With these settings nothing is left out, and the method equals the method `like`."""
    return Law("full", settings, like)


@dataclass(frozen=True)
class Param:
    """One parameter of a method, as recipes write it; `bounds` are those that it declares."""

    name: str
    argument: str
    kind: Literal["float", "int", "bool"]
    per_model: bool
    required: bool
    default: float | int | bool | None
    bounds: Range | None
    description: str

    @property
    def range(self) -> Range:
        """Where its value must lie, whether it declares bounds or not."""
        return self.bounds or (Range(0, 1) if self.kind == "bool" else Range())


@dataclass(frozen=True)
class Method:
    """A merge method: its function, and all that others need to know about it.

    `models` counts the tensors that the function is handed, least and most (None: any number). `measure`, if there is
    one, reads the blocks of the whole tensor before the function sees the first of them. `check`, if there is one,
    raises ValueError, with a sentence, for arguments that are each in bounds but not together. `workspace` is
    how many float32 arrays as large as an input the method may hold besides these, `searches` whether `measure` looks
    for ranks. `spreads` says that it shares out the strength of what it is given among all directions that a matrix can
    have. `placed` says that it is told as `start` at which entry of the tensor its block starts; a random one is told
    by `rng`. `needs` is torch where it is handed torch's tensors, and not numpy's arrays. `statistics` is what has to
    have been measured of each model, or `of_base` of the base model alone: an argument of that name holds an array for
    each of these, and none where nothing is said of a tensor.
    """

    name: str
    title: str
    function: Callable[..., Any]
    measure: Callable[..., Any] | None
    params: tuple[Param, ...]
    takes: Literal["tensors", "deltas"]
    base: Base
    models: tuple[int, int | None]
    laws: tuple[Law, ...]
    random: bool
    placed: bool
    unit: Unit
    workspace: int
    paper: Paper | None
    summary: str
    description: str
    formula: str | None = None
    check: Callable[..., None] | None = None
    spreads: bool = False
    needs: Literal["torch"] | None = None
    searches: bool = True
    statistics: Statistic | None = None
    of_base: bool = False

    def asks(self, base: bool) -> bool:
        """Whether something has to have been measured of a model, or of the base model that is subtracted."""
        return self.statistics is not None and self.of_base == base

    def place(self, arrays: Sequence[Any], device: str = "cpu") -> Sequence[Any]:
        """Numpy's arrays as the function wants them: as they are, or as torch's tensors on a device."""
        if device == "cpu" and self.needs != "torch":
            return arrays
        import torch

        return [torch.from_numpy(entries).to(device) for entries in arrays]

    @property
    def explanation(self) -> str:
        """The description for readers of a card: without what other tools do otherwise."""
        return "\n\n".join(part for part in self.description.split("\n\n") if not part.startswith("Departs from"))

    @property
    def needs_base(self) -> bool:
        """Whether a recipe that uses this method must name a base_model."""
        return self.base in ("first", "subtracted")

    @property
    def takes_base(self) -> bool:
        """Whether a base_model, where the recipe names one, is read."""
        return self.base != "unused"

    @property
    def subtracts_base(self) -> bool:
        """Whether a base_model, where there is one, is subtracted from the others, and not handed over itself."""
        return self.base in ("subtracted", "optional")

    def param(self, name: str) -> Param | None:
        """The parameter that recipes call `name`, or None."""
        return next((param for param in self.params if param.name == name), None)


F = TypeVar("F", bound=Callable[..., Any])
_METHODS: dict[str, Method] = {}


def merge_method(
    name: str,
    *,
    title: str,
    models: tuple[int, int | None],
    formula: str | None = None,
    paper: Paper | None = None,
    base: Base | None = None,
    measure: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    unit: Unit = "entries",
    workspace: int = 10,
    laws: Iterable[str | Law] = (),
    spreads: bool = False,
    needs: Literal["torch"] | None = None,
    searches: bool = True,
    statistics: Statistic | None = None,
    of_base: bool = False,
) -> Callable[[F], F]:
    """Register a function as the merge method `name`; the function comes back unchanged.

    Args:
        name: the word that recipes write in ``merge_method``.
        title: the name people write.
        models: how many tensors the function takes, least and most (None: any number).
        formula: what it computes with its defaults, in LaTeX, in signs that Markdown leaves alone.
        paper: where the method comes from.
        base: what the base model is to it; by default subtracted for `Deltas`, unused for `Tensors`.
        measure: a function of the whole tensor's blocks (an iterable that may be walked several times) and any of the
            method's own arguments, by name; what it returns reaches the method as its argument ``measured``.
        check: a function of any of the method's own arguments, by name (a list where it takes one number a model), that
            raises ValueError for a combination that cannot be meant.
        unit: what a block must hold.
        workspace: how many float32 arrays, as large as an input that it is handed, it may hold at once besides these.
        laws: what tests may hold about it.
        spreads: whether it shares out strength among all directions of a matrix: of adapters little is left then.
        needs: what it is handed in place of numpy's arrays.
        searches: whether `measure` looks for ranks, and not only sums: that takes memory.
        statistics: what has to have been measured of each model; it reaches the function as ``statistics``.
        of_base: whether that is of the base model alone, which is subtracted.

    Raises:
        TypeError: at import, when an argument has no hint the table can read, or no description.
    """

    def register(function: F) -> F:
        if name in _METHODS:
            raise TypeError(f"two merge methods are called {name!r}")
        takes = _takes(function)
        summary, description, arguments = _docstring(function)
        _METHODS[name] = Method(
            name=name,
            title=title,
            function=function,
            measure=measure,
            params=_params(function, arguments),
            takes=takes,
            base=base or ("subtracted" if takes == "deltas" else "unused"),
            models=models,
            laws=tuple(Law(law) if isinstance(law, str) else law for law in laws),
            random="rng" in (given := inspect.signature(function).parameters),
            placed="start" in given,
            unit=unit,
            workspace=workspace,
            paper=paper,
            summary=summary,
            description=description,
            formula=formula,
            check=check,
            spreads=spreads,
            needs=needs,
            searches=searches,
            statistics=statistics,
            of_base=of_base,
        )
        return function

    return register


def parameters_of(shared: Callable[..., Any], **defaults: Any) -> Callable[[F], F]:
    """Give a function the parameters of another one, with their hints, and what is said of them where it says nothing.

    Args:
        shared: the other function, which methods that differ in what comes after it have in common.
        defaults: those that are otherwise.
    """

    def give(function: F) -> F:
        signature = inspect.signature(shared)
        changed = [p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()]

        @wraps(function)
        def method(*positional: Any, **named: Any) -> Any:
            return function(**(defaults | dict(zip(signature.parameters, positional, strict=False)) | named))

        found: Any = method
        found.__signature__, found.__annotations__ = signature.replace(parameters=changed), shared.__annotations__
        found.shared = shared
        made: F = found
        return made

    return give


@cache
def methods() -> Mapping[str, Method]:
    """Every merge method by name: those in this folder, and those other packages offer as ``merger.methods``.

    A file is a family of methods; the folder `steps` holds the pieces that they are composed of.
    """
    package = importlib.import_module("merger.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"merger.methods.{module.name}")
    for entry in entry_points(group="merger.methods"):
        entry.load()
    return dict(sorted(_METHODS.items()))


START = ("linear", "task_arithmetic", "iso_c", "slerp")
"""With which to begin, in this order: what docs/which-method.md says for it."""


def methods_by_use() -> list[Method]:
    """Every method, those first with which to begin."""
    return [methods()[name] for name in dict.fromkeys([*START, *methods()])]


def named_method(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: there is none.
    """
    table = methods()
    if name not in table:
        raise RecipeError(Problem(f"there is no method {name!r}", hint=did_you_mean(name, table)))
    return table[name]


def declared(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that `function` declares: what its `measure` or `check` is called with."""
    names = _names(function)
    return {name: value for name, value in arguments.items() if name in names}


@cache
def _names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The evaluated hints; `Tensor` stands for itself, so that torch need not be imported to read them."""
    names = {"Tensor": Any, "Array": Any, "NDArray": list, "np": Any}
    return get_type_hints(getattr(function, "shared", function), localns=names, include_extras=True)


def _takes(function: Callable[..., Any]) -> Literal["tensors", "deltas"]:
    first = next(iter(inspect.signature(function).parameters))
    hint = _hints(function)[first]
    if hint not in (Tensors, Deltas):
        raise TypeError(f"{function.__name__}: the first argument must be Tensors or Deltas, not {hint}")
    return "deltas" if hint is Deltas else "tensors"


_COMMON: Mapping[str, str] = {
    "weight": "how much of each task vector goes in.",
    "density": "share of entries kept in each task vector, by magnitude.",
    "normalize": "divide by the sum of the weights, so that only their ratios count.",
    "lambda_": "what the merged task vector is multiplied by before the base is added.",
    "rescale": "multiply what is kept, so that its L1 norm is that of the whole task vector.",
}
"""What these arguments are wherever a method does not say otherwise."""
_GIVEN_BY_THE_ENGINE = ("measured", "rng", "start", "statistics")


def _params(function: Callable[..., Any], described: Mapping[str, str]) -> tuple[Param, ...]:
    hints = _hints(function)
    arguments = list(inspect.signature(function).parameters.values())[1:]
    return tuple(
        _param(function, argument, hints[argument.name], described)
        for argument in arguments
        if argument.name not in _GIVEN_BY_THE_ENGINE
    )


def _param(function: Callable[..., Any], argument: inspect.Parameter, hint: Any, described: Mapping[str, str]) -> Param:
    base, extras = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    per_model = any(isinstance(extra, _PerModelMark) for extra in extras)
    kind: Any = "float" if per_model else getattr(base, "__name__", str(base))
    if kind not in ("float", "int", "bool"):
        raise TypeError(f"{function.__name__}: argument {argument.name!r} has a hint no recipe can fill: {hint}")
    description = described.get(argument.name, _COMMON.get(argument.name))
    if description is None:
        raise TypeError(f"{function.__name__}: argument {argument.name!r} is not described under Args:")
    required = argument.default is inspect.Parameter.empty
    bounds = next((extra for extra in extras if isinstance(extra, Range)), None)
    if bounds is not None and not -LIMIT <= bounds.least <= bounds.most <= LIMIT:
        raise TypeError(f"{function.__name__}: {argument.name!r} may be {bounds}; recipes write {Range()}")
    return Param(
        name=argument.name.rstrip("_"),
        argument=argument.name,
        kind=kind,
        per_model=per_model,
        required=required,
        default=None if required else argument.default,
        bounds=bounds,
        description=description,
    )


def _docstring(function: Callable[..., Any]) -> tuple[str, str, dict[str, str]]:
    """The summary, the text before ``Args:``, and what stands under each argument."""
    text = inspect.cleandoc(function.__doc__ or "")
    if not text:
        raise TypeError(f"{function.__name__}: a merge method needs a docstring")
    body, _, rest = text.partition("\nArgs:\n")
    body = re.split(r"\n(?=>>> )", body)[0]  # an example without Args: before it
    block = re.split(r"\n(?=\S)", rest, maxsplit=1)[0]
    found = re.findall(r"^    (\w+): ((?:.|\n {8,})*)", block, flags=re.MULTILINE)
    shared = getattr(function, "shared", None)
    arguments = (_docstring(shared)[2] if shared else {}) | {name: " ".join(words.split()) for name, words in found}
    summary = " ".join(body.split("\n\n")[0].split())
    return summary, body.strip(), arguments
