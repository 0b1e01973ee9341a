"""What an adapter adds to a module's matrix, or to parameters of a module, experts in one tensor above all.

PEFT wraps a module once for each of its parameters (`target_parameters`); the names in its file tell how deep, not
which: `experts.base_layer.lora_A` is one's A, `experts.lora_A` another's. Ranks and shapes tell. A of all experts lies
one behind the other; in B column ``direction * experts + expert`` is an expert's. Not here: where a parameter lies in a
model's files (changes), and what else an adapter holds (adapter).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from merger.models.checkpoint import FLOATS, TensorInfo

TURNED_EXPERTS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
"""Kinds of models whose experts' matrices have their inputs first, which PEFT is told by transformers' class."""

_NESTED = re.compile(r"^(?P<module>.+?)(?P<depth>(\.base_layer)*)$")
_MOST_PAIRS, _MOST_NAMES = 4, 6
"""So many parameters of one module are told from each other; real ones have two, or four with biases."""


@dataclass(frozen=True)
class AdaptedModule:
    """What an adapter holds for one module of its model: the module's matrix gets ``scale * B @ A`` added.

    Args:
        name: the module's name in its model, or the parameter's.
        a: A, of `rank` rows, one column for each input.
        b: B, one row for each output, of `rank` columns.
        rank: the number of directions.
        scale: what B A is multiplied by.
        embedding: whether the module is an embedding: its matrix has its inputs (the tokens) as rows.
        bias: what is added, times the scale, to the module's bias.
        magnitude: DoRA's length of each of the sum's rows.
        experts: how many matrices get a product each; A has `rank` rows, and B as many columns, for each of them.
        expert: the only one that is meant, whose rows of A are all that `a` has; None: all of them.
        transposed: whether A and B lie in the file as their transposes.
        kernel: of a convolution the sides of its kernel, which A's columns go through last.
    """

    name: str
    a: TensorInfo
    b: TensorInfo
    rank: int
    scale: float
    embedding: bool = False
    bias: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    experts: int = 1
    expert: int | None = None
    transposed: bool = False
    kernel: tuple[int, ...] = ()

    @property
    def inputs(self) -> int:
        """How many inputs the module has."""
        return self.a.shape[1]

    @property
    def outputs(self) -> int:
        """How many outputs."""
        return self.b.shape[0]


@dataclass(frozen=True)
class AdaptedParameters:
    """What an adapter holds for parameters of one module, of which it does not say which is whose.

    Args:
        module: the module's name in its model.
        pairs: A and B of each parameter.
        named: the rank and the scale that each parameter would have, by the parameters' names.
        alone: what it is if the model has no such parameters, for a target may be no more than a parameter's last name.
    """

    module: str
    pairs: tuple[tuple[TensorInfo, TensorInfo], ...]
    named: Mapping[str, tuple[int, float]]
    alone: AdaptedModule | None = None

    def orders(self, homes: Mapping[str, Home], transposed: bool) -> list[list[AdaptedModule]]:
        """The ways in which the pairs can be the parameters', no more than two of them."""
        names = [name for name in self.named if name in homes]
        return list(islice(self._orders(self.pairs, names, homes, transposed), 2)) if len(names) <= _MOST_NAMES else []

    def _orders(
        self,
        pairs: Sequence[tuple[TensorInfo, TensorInfo]],
        names: list[str],
        homes: Mapping[str, Home],
        transposed: bool,
    ) -> Iterator[list[AdaptedModule]]:
        if not pairs:
            yield []
            return
        for one in (AdaptedModule(name, *pairs[0], *self.named[name]) for name in names):
            if homes[one.name].fits(one, transposed):
                others = [name for name in names if name != one.name]
                yield from ([one, *rest] for rest in self._orders(pairs[1:], others, homes, transposed))


@dataclass(frozen=True)
class Home:
    """Where a parameter lies in a model's files: in one tensor, or in one for each expert and matrix.

    Args:
        parts: of each expert the tensors whose rows follow each other in the parameter.
    """

    parts: Sequence[Sequence[TensorInfo]]

    @property
    def is_stack(self) -> bool:
        """Whether all experts are in one tensor."""
        return len(self.parts[0][0].shape) == 3

    @property
    def shape(self) -> tuple[int, ...]:
        """How many experts there are, and rows and columns of each."""
        first = self.parts[0][0].shape
        return first if self.is_stack else (len(self.parts), sum(part.shape[0] for part in self.parts[0]), *first[1:])

    def fits(self, module: AdaptedModule, transposed: bool) -> bool:
        """Whether each expert's B A has its matrix's shape; only of a stack it may be `turned`."""
        experts, *matrix = self.shape
        sizes = [module.outputs, module.inputs]
        directions = (module.a.shape[0], module.b.shape[1])
        return (
            directions == (experts * module.rank,) * 2 and matrix == sizes[:: -1 if transposed and self.is_stack else 1]
        )

    def shares(self, module: AdaptedModule) -> Iterator[tuple[TensorInfo, AdaptedModule]]:
        """The tensors, and what is added to each."""
        whole = replace(module, experts=self.shape[0])
        if self.is_stack:
            yield self.parts[0][0], whole
            return
        for expert, matrices in enumerate(self.parts):
            a, first = module.a.rows(expert * module.rank, (expert + 1) * module.rank), 0
            for tensor in matrices:
                last = first + tensor.shape[0]
                yield tensor, replace(whole, a=a, b=module.b.rows(first, last), expert=expert)
                first = last


Targets = Mapping[str, Collection[str]]
MOST_ENDS = 32
"""So many last names may targets have; real ones have two to four."""

Parts = Mapping[str, Mapping[str, TensorInfo]]
"""Of each module what the adapter has for it, by what that is to it: lora_A and so on."""


def of_parameters(parts: Parts, targets: Targets) -> tuple[dict[str, list[Mapping[str, TensorInfo]]], Parts]:
    """Of the modules whose parameters are targets what the adapter has for these; and what it has for other modules.

    Raises:
        ValueError: they do not follow PEFT's layout; how, in a sentence.
    """
    found: dict[str, dict[int, Mapping[str, TensorInfo]]] = defaultdict(dict)
    rest = dict(parts)
    for name, held in parts.items():
        match = _NESTED.match(name)
        if match and "lora_A" in held and targeted(match["module"], targets):
            found[match["module"]][match["depth"].count(".")] = rest.pop(name)
    for module, levels in found.items():
        if sorted(levels) != list(range(len(levels))):
            raise ValueError(f"{module} has no pair of matrices between the first and the last")
        _check(module, list(levels.values()), targeted(module, targets))
    return {module: list(levels.values()) for module, levels in found.items()}, rest


def by_end(targets: Iterable[str]) -> Targets:
    """Names of parameters, or ends of such, by what they end with."""
    found: dict[str, set[str]] = defaultdict(set)
    for target in sorted(targets):
        found[target.rpartition(".")[2]].add(target)
    return found


def targeted(module: str, targets: Targets) -> list[str]:
    """The parameters of a module that may be among the targets, by their whole names."""
    starts = [module[place:] for place in (0, *(dot.end() for dot in re.finditer(r"\.", module)))]
    return [
        f"{module}.{end}"
        for end, wholes in targets.items()
        if end in wholes or any(f"{start}.{end}" in wholes for start in starts)
    ]


def _check(module: str, held: Sequence[Mapping[str, TensorInfo]], named: Sequence[str]) -> None:
    if len(held) > min(len(named), _MOST_PAIRS):
        raise ValueError(f"{module} has {len(held)} pairs of matrices for {len(named)} target_parameters")
    for parts in held:
        if parts.keys() != {"lora_A", "lora_B"}:
            raise ValueError(
                f"{module} has {', '.join(sorted(parts))} for a parameter, which has lora_A and lora_B alone"
            )
        for tensor in parts.values():
            if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
                raise ValueError(f"{tensor.name} is no matrix of numbers that are read")
