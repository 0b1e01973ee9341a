"""What the linear layers of a layer are fed, summed up over tokens: Gram matrices, and mean magnitudes.

Each sequence is run by one thread and each product made by one, and sums are taken in the sequences' order: no number
of threads changes a bit. Not here: gradients (gradients), and the order of layers (measure).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

from merger.errors import MismatchError, Problem
from merger.lock.statistics import statistic_name
from merger.methods.steps.step import Array
from merger.statistics.plan import BATCH, ROWS_AT_ONCE, StatisticsShard
from merger.statistics.walk import Walk

Fed = Mapping[str, Any]
"""The inputs of one sequence by the statistic's name, of shape (length, width)."""


def sum_inputs(walk: Walk, missing: Sequence[StatisticsShard]) -> None:
    """Measure these files on the way from the first layer to the last that one of them is of."""
    walk.embed()
    wanted, count = {shard.layer: shard for shard in missing}, len(walk.planned.layers)
    for layer, model in walk.loaded(range(min(max(wanted) + 1, count))):
        if layer in wanted:
            _sum_layer(walk, wanted[layer], model, walk.runner(model))
        else:
            walk.forward(walk.runner(model))
    if count in wanted:
        _sum_head(walk, wanted[count])


def sum_through(parts: Sequence[tuple[Walk, Sequence[StatisticsShard]]], merged: Walk) -> None:
    """Measure these files of several models at once: of each, each layer on what the merged layers before make.

    Args:
        parts: of each model its walk, and the files that are missing.
        merged: the merge's layers, each of which is made of what was measured of it before.
    """
    count = len(merged.planned.layers)
    last = min(count, max((shard.layer for _, missing in parts for shard in missing), default=-1))
    table = merged.whole(merged.planned.outside[merged.planned.tables[0]])
    for walk, _ in parts:
        walk.embed(table)
    del table
    for layer in range(last + 1):
        for walk, shard in [(walk, shard) for walk, missing in parts for shard in missing if shard.layer == layer]:
            for _, model in walk.loaded([min(layer, count - 1)]):
                if layer == count:
                    _sum_head(walk, shard)
                else:
                    _sum_layer(walk, shard, model, _passing(walk.runner(model)))
        for _, model in merged.loaded([layer] if layer < last else []):
            for walk, _ in parts:
                walk.forward(merged.runner(model))


def _passing(run: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Runs a state through, and hands it on as it was."""
    return lambda state: (run(state), state)[1]


def _sum_layer(walk: Walk, shard: StatisticsShard, model: Any, run: Callable[[Array], Array]) -> None:
    kind, place = walk.planned.kind, model.layers[0].get_submodule
    matrices = [job.name for job in walk.planned.layers[shard.layer] if len(job.shape) == 2]
    modules = [(statistic_name(kind, name), place(walk.role(name).removesuffix(".weight"))) for name in matrices]
    _sum_up(walk, shard, modules, run)


def _sum_head(walk: Walk, shard: StatisticsShard) -> None:
    """What the last norm makes of the last layer's states."""
    import torch

    (_, norm), fed = walk.norm(), torch.nn.Identity()

    def feed(state: Array) -> Array:
        with torch.no_grad():
            fed(norm(torch.from_numpy(state)))
        return state

    _sum_up(walk, shard, [(shard.tensors[0].name, fed)], feed)


def _sum_up(
    walk: Walk, shard: StatisticsShard, modules: Sequence[tuple[str, Any]], run: Callable[[Array], Array]
) -> None:
    """What modules are fed while all sequences run through them."""
    noted, sums = Feeding(modules), new_sums({each.name: each.shape for each in shard.tensors})
    for batch in walk.batches(BATCH):
        made = list(walk.pool.map(partial(noted.run, run), [walk.states.read(sequence) for sequence in batch]))
        add_inputs(sums, [fed for _, fed in made], walk.pool)
        for sequence, (state, _) in zip(batch, made, strict=True):
            walk.states.write(sequence, state)
    noted.close()
    walk.write(shard, finish_sums(sums, walk.planned.tokens.size))


class Feeding:
    """Notes what the linear modules of a layer are fed, while it is run.

    Args:
        modules: those modules, each with the name of its statistic.
    """

    def __init__(self, modules: Sequence[tuple[str, Any]]) -> None:
        self._here = threading.local()
        self._hooks = [module.register_forward_pre_hook(self._note(name)) for name, module in modules]

    def _note(self, name: str) -> Callable[..., None]:
        def note(_: Any, given: tuple[Any, ...]) -> None:
            before = self._here.fed.setdefault(name, given[0])
            if before is not given[0]:
                what = f"{name} and what is named with it are fed different inputs in this model"
                raise MismatchError(Problem(what, hint="please report the model"))

        return note

    def run(self, run: Callable[[Array], Array], state: Array) -> tuple[Array, Fed]:
        """What comes out for a sequence, and what its modules were fed."""
        self._here.fed = {}
        return run(state), {name: given.reshape(-1, given.shape[-1]) for name, given in self._here.fed.items()}

    def close(self) -> None:
        """Note no more."""
        for hook in self._hooks:
            hook.remove()


def new_sums(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sums of nothing, by statistic."""
    import torch

    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def add_inputs(sums: Mapping[str, Any], fed: Sequence[Fed], pool: Executor) -> None:
    """Add what a few sequences fed the modules; of a Gram matrix the half above the diagonal, and that."""
    import torch

    def add(place: tuple[Any, Any, int]) -> None:
        total, inputs, start = place
        if total.dim() == 1:
            total += inputs.abs().sum(0)
        elif total.dim() == 3:
            size, stop = total.shape[1], start + max(1, ROWS_AT_ONCE // total.shape[1])
            mine = inputs[:, start * size : stop * size]
            filled = torch.nn.functional.pad(mine, (0, -mine.shape[1] % size)).view(len(inputs), -1, size)
            total[start:stop].baddbmm_(filled.permute(1, 2, 0), filled.permute(1, 0, 2))
        else:
            stop = start + ROWS_AT_ONCE
            total[start:stop, start:].addmm_(inputs[:, start:stop].T, inputs[:, start:])

    with torch.no_grad():
        joined = {name: torch.cat([each[name] for each in fed]) for name in sums}
        runs = [(total, joined[name], start) for name, total in sums.items() for start in _starts(total)]
        list(pool.map(add, runs))


def _starts(total: Any) -> range:
    """The first rows, or blocks, of those that are summed up at once."""
    if total.dim() == 3:
        return range(0, len(total), max(1, ROWS_AT_ONCE // total.shape[1]))
    return range(0, len(total), ROWS_AT_ONCE) if total.dim() == 2 else range(1)


def finish_sums(sums: Mapping[str, Any], tokens: int) -> dict[str, Array]:
    """The means over tokens; of a Gram matrix both halves."""
    for total in sums.values():
        total /= tokens
        if total.dim() == 3:
            total.copy_(total.triu() + total.triu(1).mT)
        for start in range(0, len(total) if total.dim() == 2 else 0, ROWS_AT_ONCE):
            stop = start + ROWS_AT_ONCE
            total[stop:, start:stop] = total[start:stop, stop:].T
            square = total[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
    return {name: total.numpy() for name, total in sums.items()}
