"""What the decorator reads off a function, and what it refuses at import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any

import pytest

from merger.methods import registry
from merger.methods.registry import Deltas, Paper, PerModel, Range, Tensors, declared, merge_method, methods


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are gone after it."""
    methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def registered(function: Callable[..., Any], **facts: Any) -> registry.Method:
    """The table's entry for a function registered as ``mine``."""
    assert merge_method("mine", title="Mine", models=(1, None), **facts)(function) is function
    return registry._METHODS["mine"]


def mine(
    deltas: Deltas, gamma: Annotated[PerModel, Range(0, 1)], count: Annotated[int, Range(1)] = 3, lambda_: float = 1.0,
    filter_wise: bool = False, *, rng: object, measured: float | None = None,
) -> Any:  # fmt: skip
    """A line for menus,
    on two lines.

    More about it.

    Args:
        gamma: the share of outliers
            that goes.
        count: how often.
        lambda_: a factor.
        filter_wise: row by row.

    >>> 1 + 1
    2
    """


def test_parameters_are_read_off_the_signature() -> None:
    """Name, kind, default, bounds and description of every parameter come from hints and docstring."""
    method = registered(mine, paper=Paper("A", 2020, "B", "https://c"))
    assert [(param.name, param.argument, param.kind, param.per_model, param.required) for param in method.params] == [
        ("gamma", "gamma", "float", True, True),
        ("count", "count", "int", False, False),
        ("lambda", "lambda_", "float", False, False),
        ("filter_wise", "filter_wise", "bool", False, False),
    ]
    assert [param.default for param in method.params] == [None, 3, 1.0, False]
    assert [str(param.bounds) for param in method.params] == ["0 to 1", "1 to 1,000,000", "None", "None"]
    assert [str(param.range) for param in method.params[2:]] == ["-1,000,000 to 1,000,000", "0 to 1"]
    assert method.params[0].description == "the share of outliers that goes."
    assert method.summary == "A line for menus, on two lines."
    assert method.description.endswith("More about it.")
    assert method.param("lambda") is method.params[2]
    assert method.param("lambda_") is None


def test_what_the_first_argument_says() -> None:
    """Deltas need a base to subtract, tensors none unless it is said; an argument rng makes a method random."""

    def plain(tensors: Tensors) -> Any:
        """A line."""

    method = registered(mine)
    assert (method.takes, method.base, method.needs_base, method.random) == ("deltas", "subtracted", True, True)
    del registry._METHODS["mine"]
    method = registered(plain)
    assert (method.takes, method.base, method.needs_base, method.random) == ("tensors", "unused", False, False)
    del registry._METHODS["mine"]
    assert registered(plain, base="first").needs_base


def undescribed(tensors: Tensors, gamma: float) -> Any:
    """A line."""


def bad_hint(tensors: Tensors, gamma: str) -> Any:
    """A line.

    Args:
        gamma: a word.
    """


def no_docstring(tensors: Tensors) -> Any: ...


def no_tensors(tensors: list[float]) -> Any:
    """A line."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (undescribed, "'gamma' is not described"),
        (bad_hint, "'gamma' has a hint no recipe can fill"),
        (no_docstring, "needs a docstring"),
        (no_tensors, "first argument must be Tensors or Deltas"),
    ],
)
def test_what_cannot_be_read_is_refused(function: Callable[..., Any], message: str) -> None:
    """An argument without description, a hint no recipe can fill, no docstring, no tensors: an error at import."""
    with pytest.raises(TypeError, match=message):
        registered(function)


def test_a_name_is_taken_once() -> None:
    """Two methods of one name are an error."""
    with pytest.raises(TypeError, match="two merge methods are called 'linear'"):
        merge_method("linear", title="Mine", models=(1, None))(mine)


def test_declared_keeps_what_a_function_takes() -> None:
    """Of the arguments on offer a function gets those it names."""
    assert declared(lambda blocks, density: None, {"density": 1, "weight": 2}) == {"density": 1}


def test_measure_and_check_take_only_the_methods_own_arguments() -> None:
    """What a measure or a check declares, beside the blocks, its method declares too."""
    for method in methods().values():
        own = {param.argument for param in method.params} | {"rng"}
        for function, first in ((method.measure, 1), (method.check, 0)):
            if function:
                assert set(list(inspect.signature(function).parameters)[first:]) <= own, method.name


def test_the_table_is_read_without_torch_and_numpy() -> None:
    """Menus, schema and plans need neither, so a command answers at once."""
    code = "import sys; from merger.methods.registry import methods; assert len(methods()) >= 7; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy"} & set(loaded)


def test_methods_are_in_the_order_of_their_names() -> None:
    """The table's order is the same on every machine."""
    assert list(methods()) == sorted(methods())


def test_every_method_has_a_formula_that_markdown_leaves_alone() -> None:
    """The Hub makes LaTeX of it only if nothing in it is Markdown's: no escaped sign, no emphasis, no cell, no tag."""
    for method in methods().values():
        assert method.formula, method.name
        assert not re.search(r"\\[^A-Za-z]|[*|<>$`~]|[^\w]_|\s\s", method.formula), method.name
        assert method.formula.count("{") == method.formula.count("}"), method.name
