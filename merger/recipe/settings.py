"""A parameter's value in a recipe: a number, a gradient over the layers, or a list of those with filters.

Not here: reading YAML (parse) and which levels there are (model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merger.errors import Span


@dataclass(frozen=True)
class Rule:
    """One value for the tensors whose name contains `filter` (None: every tensor).

    Args:
        values: one number, or a gradient: numbers spread evenly from a slice's first layer to its last.
        filter: a case-sensitive substring of the tensor's name.
        at: where the value stands in the recipe.
    """

    values: tuple[float, ...]
    filter: str | None = None
    at: Span | None = field(default=None, compare=False)

    def matches(self, tensor: str) -> bool:
        """Whether this rule speaks about the tensor of this name."""
        return self.filter is None or self.filter == "*" or self.filter in tensor

    def value_at(self, position: float) -> float:
        """The gradient's value at `position`, 0 for the slice's first layer and 1 for its last."""
        x = position * (len(self.values) - 1)
        low = int(x)
        high = min(low + 1, len(self.values) - 1)
        share = x - low
        return (1.0 - share) * self.values[low] + share * self.values[high]


@dataclass(frozen=True)
class Setting:
    """What a recipe gives for one parameter at one place: rules, of which the first that matches counts."""

    rules: tuple[Rule, ...]

    def value_at(self, tensor: str, position: float) -> float | None:
        """The value for a tensor at a position in its slice; None where no rule speaks about it."""
        rule = next((rule for rule in self.rules if rule.matches(tensor)), None)
        return None if rule is None else rule.value_at(position)


Parameters = Mapping[str, Setting]
"""A `parameters:` block: settings by the parameter's name."""


def first_value(levels: Sequence[Parameters], name: str, tensor: str, position: float) -> float | None:
    """The value of parameter `name` from the first of `levels` whose setting speaks about this tensor."""
    for level in levels:
        value = level[name].value_at(tensor, position) if name in level else None
        if value is not None:
            return value
    return None
