"""A small table of merge methods, so that the language is tested apart from the arithmetic.

The methods are registered aside: the real table is neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from unittest.mock import patch

import pytest

from merger.methods import registry
from merger.methods.registry import Deltas, Method, PerModel, Range, Tensors, merge_method
from merger.recipe.model import Recipe
from merger.recipe.parse import parse

if TYPE_CHECKING:
    from torch import Tensor


def _linear(tensors: Tensors, weight: PerModel, normalize: bool = True) -> Tensor:
    """The weighted mean.

    Args:
        weight: each model's share.
        normalize: divide by the sum of the weights.
    """
    raise NotImplementedError


def _slerp(tensors: Tensors, t: Annotated[float, Range(0, 1)]) -> Tensor:
    """Along the arc from the base model to the other.

    Args:
        t: 0 is the base model, 1 the other.
    """
    raise NotImplementedError


def _passthrough(tensors: Tensors, scale: PerModel = 1.0) -> Tensor:
    """One model's layers as they are.

    Args:
        scale: a factor on the tensor.
    """
    raise NotImplementedError


def _ties(
    deltas: Deltas,
    weight: PerModel,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Trim, elect, merge.

    Args:
        weight: each model's share.
        density: share of entries kept in each task vector, by magnitude.
        normalize: divide by the sum of the agreeing weights.
        lambda_: a factor on the merged task vector.
    """
    raise NotImplementedError


def _dare_ties(
    deltas: Deltas,
    weight: PerModel,
    density: Annotated[PerModel, Range(0, 1)] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rounds: int = 1,
) -> Tensor:
    """Drop and rescale, then elect.

    Args:
        weight: each model's share.
        density: share of entries kept in each task vector, at random.
        normalize: divide by the sum of the agreeing weights.
        rescale: make up for the dropped entries.
        rounds: how often the lot is drawn.
    """
    raise NotImplementedError


@pytest.fixture(scope="session")
def table() -> Mapping[str, Method]:
    """linear, slerp, passthrough, ties and dare_ties, as far as a recipe knows them."""
    with patch.dict(registry._METHODS, clear=True):
        merge_method("linear", title="Linear", models=(1, None))(_linear)
        merge_method("slerp", title="SLERP", models=(2, 2), base="first")(_slerp)
        merge_method("passthrough", title="Passthrough", models=(1, 1))(_passthrough)
        merge_method("ties", title="TIES", models=(1, None))(_ties)
        merge_method("dare_ties", title="DARE-TIES", models=(1, None))(_dare_ties)
        return dict(registry._METHODS)


@pytest.fixture(scope="session")
def read(table: Mapping[str, Method]) -> Callable[[str], Recipe]:
    """Parse a text with the small table, as the file mine.yaml."""
    return lambda text: parse(text, "mine.yaml", table)


HERE = Path(__file__).parent
WILD = sorted((HERE / "wild").glob("*.yaml"))
