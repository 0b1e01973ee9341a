"""Drawn cases of any registered method: how many models, what tensors, which parameters, cut into which blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from merger.methods.registry import Method, Param, Range, declared
from merger.methods.steps.random import Rng

KINDS = ("normal", "heavy", "sparse", "few values", "zeros")
TOLERANCES = (0.0, 1e-8, 1e-5, 1e-2)
KNOWN = "statistics"
STEP = 16  # drawn numbers are whole sixteenths: sums of weights are then exact in float32


@dataclass(frozen=True)
class Case:
    """A method and what to call it with."""

    method: Method
    tensors: tuple[torch.Tensor, ...]
    arguments: dict[str, Any]
    rng: Rng

    def run(self, **others: Any) -> torch.Tensor:
        """The method on whole tensors."""
        given = {**self.arguments, **others}
        if self.method.random:
            given = {"rng": self.rng, **given}
        return as_tensor(self.method.function(self.handed(self.tensors), **given))

    def run_on_tensors(self) -> torch.Tensor:
        """The method on torch's tensors, by the second bodies of its steps."""
        given = {"rng": self.rng} if self.method.random else {}
        given |= {name: list(map(torch.from_numpy, self.arguments[name])) for name in self.arguments.keys() & {KNOWN}}
        result: torch.Tensor = self.method.function(list(self.tensors), **(self.arguments | given))
        return result

    def handed(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """What the engine hands over: numpy's arrays, or tensors where the method needs torch."""
        return [tensor if self.method.needs == "torch" else tensor.numpy() for tensor in tensors]

    def run_in_blocks(self, cuts: Sequence[int]) -> torch.Tensor:
        """The method as the engine calls it: measure over all blocks, then each block by itself."""
        step = self.step
        edges = sorted({0, *(cut // step * step for cut in cuts), self.tensors[0].numel()})
        blocks = [self.handed(block) for block in Blocks(self.tensors, edges, self.method.unit)]
        found = {}
        if self.method.measure:
            offered = {**self.arguments, "rng": self.rng}
            found = {"measured": self.method.measure(blocks, **declared(self.method.measure, offered))}
        pieces = []
        known = [torch.from_numpy(each) for each in self.arguments.get(KNOWN, ())]
        cut = list(Blocks(known, edges)) if self.method.unit == "entries" and known else []
        for place, (start, block) in enumerate(zip(edges, blocks, strict=False)):
            offered = {"rng": self.rng.at(start), "start": start}
            found |= {KNOWN: [each.numpy() for each in cut[place]]} if cut else {}
            given = self.arguments | found | declared(self.method.function, offered)
            pieces.append(as_tensor(self.method.function(block, **given)))
            assert pieces[-1].shape == block[0].shape
        return torch.cat([piece.reshape(-1) for piece in pieces]).view(self.tensors[0].shape)

    @property
    def step(self) -> int:
        """The fewest entries that a block of this method may hold."""
        tensor = self.tensors[0]
        row = tensor.shape[-1] if tensor.ndim > 1 else tensor.numel()
        return {"entries": 1, "rows": row, "matrix": tensor.numel()}[self.method.unit]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Case:
        """The same case on other tensors."""
        return replace(self, tensors=tuple(tensors))


def as_tensor(result: Any) -> torch.Tensor:
    """A result as a tensor."""
    return result if isinstance(result, torch.Tensor) else torch.from_numpy(result)


@dataclass(frozen=True)
class Blocks:
    """Tensors cut at `edges`, as an iterable that may be walked several times."""

    tensors: Sequence[torch.Tensor]
    edges: Sequence[int]
    unit: str = "entries"

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        whole = self.tensors[0].shape
        shape = {"entries": (-1,), "rows": (-1, whole[-1]), "matrix": whole}[self.unit]
        for start, end in zip(self.edges, self.edges[1:], strict=False):
            yield [tensor.reshape(-1)[start:end].clone().view(shape) for tensor in self.tensors]


def tensor(kind: str, seed: int, shape: Sequence[int]) -> torch.Tensor:
    """Float32 entries of a kind, none of them so small or large that float32 rounds differently."""
    draw = np.random.Generator(np.random.PCG64(seed))
    normal = draw.standard_normal(shape)
    entries = {
        "normal": normal * 1e-3,
        "heavy": np.sign(normal) * np.exp(3 * draw.standard_normal(shape)),
        "sparse": normal * (draw.random(shape) < 0.3),
        "few values": np.round(normal),
        "zeros": np.zeros(shape),
    }[kind]
    return torch.from_numpy(np.asarray(entries, np.float32))


def shapes(unit: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Mostly small; one entry; now and then longer than a chunk of a reduction. Mostly matrices for who needs them."""
    small = st.tuples(st.integers(1, 40))
    if unit == "matrix":
        matrices = st.tuples(st.integers(1, 30), st.integers(1, 30))
        return st.one_of(st.just((1,)), small, matrices, matrices, matrices, st.just((3, 5_000)))
    return st.one_of(
        st.just((1,)),
        small,
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
        st.tuples(st.integers(1000, 5000)),
        small,
        st.sampled_from([(65_537,), (3, 50_000)]),
    )


def numbers(bounds: Range | None) -> st.SearchStrategy[float]:
    """Sixteenths inside the bounds, ends included."""
    low = bounds.low if bounds and bounds.low is not None else -3
    high = bounds.high if bounds and bounds.high is not None else 3
    return st.integers(int(low * STEP), int(high * STEP)).map(lambda number: number / STEP)


def wholes(bounds: Range | None) -> st.SearchStrategy[int]:
    """Whole numbers inside the bounds."""
    low = bounds.low if bounds and bounds.low is not None else 0
    high = min(low + 20, bounds.high if bounds and bounds.high is not None else low + 20)
    return st.integers(math.ceil(low), math.floor(high))


def values(param: Param, models: int) -> st.SearchStrategy[Any]:
    """What a recipe may say for `param`, as the engine hands it over."""
    one: st.SearchStrategy[Any] = {
        "bool": st.booleans(),
        "int": wholes(param.bounds),
        "float": st.sampled_from(TOLERANCES) if param.name in ("eps", "tol") else numbers(param.bounds),
    }[param.kind]
    return st.lists(one, min_size=models, max_size=models) if param.per_model else one


def accepted(method: Method, arguments: dict[str, Any]) -> bool:
    """Whether the method's own check lets the combination pass."""
    try:
        if method.check:
            method.check(**declared(method.check, arguments))
    except ValueError:
        return False
    return True


def statistics(method: Method, kinds: Sequence[str], seed: int, shape: Sequence[int]) -> dict[str, Any]:
    """What may have been measured of the models: now and then nothing, and nothing of what is no layer."""
    draw = np.random.Generator(np.random.PCG64(seed))
    if method.statistics is None or seed % 4 == 0:
        return {}
    if method.statistics == "fisher":
        return {KNOWN: [tensor(kind, seed + 99 + place, shape).numpy() ** 2 for place, kind in enumerate(kinds)]}
    if len(shape) != 2 or shape[1] > 100:
        return {}
    if method.of_base:
        return {KNOWN: (np.abs(tensor(kinds[0], seed, shape[1:]).numpy()),)}
    inputs = [draw.standard_normal((shape[1] + 4, shape[1])) * (draw.random(shape[1]) < 0.8) for _ in kinds]
    return {KNOWN: [np.float32(each.T @ each) for each in inputs]}


@st.composite
def cases(draw: st.DrawFn, method: Method, only_required: bool = False) -> Case:
    """A case of `method`, with every parameter drawn, or only those that have no default."""
    least, most = method.models
    models = draw(st.integers(least, least + 3 if most is None else most))
    shape = draw(shapes(method.unit))
    params = [param for param in method.params if param.required or not only_required]
    arguments = {param.argument: draw(values(param, models)) for param in params}
    assume(only_required or accepted(method, arguments))
    seed = draw(st.integers(0, 2**20))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=models, max_size=models))
    tensors = [tensor(kind, seed + place, shape) for place, kind in enumerate(kinds)]
    arguments |= {} if only_required else statistics(method, kinds, seed, shape)
    return Case(method, tuple(tensors), arguments, Rng(seed, "model.norm.weight"))


@st.composite
def cut_points(draw: st.DrawFn, entries: int) -> list[int]:
    """Where to cut a tensor into blocks; at no place or at several."""
    if entries == 1:
        return []
    return sorted(draw(st.sets(st.integers(1, entries - 1), max_size=4)))
