"""Squared gradients of each sequence's log-likelihood, a layer at a time from the last to the first.

The states at the layers' boundaries are kept, so that each layer is walked back by itself: the gradients are those of
the whole model. Sequences are independent, and summed up in their order. Not here: the order of layers (measure).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from merger.engine.inputs.layers import EMBEDDING_FACTOR
from merger.methods.steps.step import Array
from merger.planning.budget import embedding
from merger.statistics.plan import BEFORE, ROWS_AT_ONCE, StatisticsShard
from merger.statistics.walk import Walk

_SCALING = "logits_scaling"
"""Of Granite: what logits are divided by."""


def sum_squares(walk: Walk, missing: Sequence[StatisticsShard]) -> None:
    """Measure these files on the way back from the head to the first layer that one of them is of."""
    walk.embed()
    wanted, count = {shard.layer: shard for shard in missing}, len(walk.planned.layers)
    for layer, model in walk.loaded(range(count)):
        walk.forward(walk.runner(model), layer, layer + 1)
    head = _Head(walk)
    head.walk_back(wanted.get(count))
    for layer, model in walk.loaded(range(count - 1, max(min(wanted), 0) - 1, -1)):
        _walk_layer_back(walk, layer, model, wanted.get(layer))
    if BEFORE in wanted:
        head.embedding(wanted[BEFORE])


def _walk_layer_back(walk: Walk, layer: int, model: Any, shard: StatisticsShard | None) -> None:
    """From the gradients of a layer's output, which are kept, to those of its input, in their place."""
    import torch

    held = {} if shard is None else dict(model.layers[0].named_parameters())
    sums, kept = {name: torch.zeros_like(weight) for name, weight in held.items()}, walk.planned.gradients

    def run(given: Any) -> Any:
        return model(inputs_embeds=given, use_cache=False).last_hidden_state

    def back(sequence: int) -> tuple[Array, list[Any]]:
        return walk_back(run, [*held.values()], walk.states.read(sequence, layer), walk.states.read(sequence, kept))

    for batch in walk.batches(walk.planned.threads):
        for sequence, (gradient, found) in zip(batch, walk.pool.map(back, batch), strict=True):
            walk.states.write(sequence, gradient, kept)
            add_squares([*sums.values()], found)
    if shard is not None:
        roles = {tensor.name: walk.role(tensor.name) for tensor in shard.tensors}
        walk.write(shard, {name: _mean(walk, sums[role]) for name, role in roles.items()})


def _mean(walk: Walk, total: Any) -> Array:
    """By predicted token, over all sequences."""
    sequences, length = walk.planned.tokens.shape
    mean: Array = total.div_(sequences * (length - 1)).numpy()
    return mean


def walk_back(
    run: Callable[[Any], Any], parameters: Sequence[Any], state: Array, gradient: Array
) -> tuple[Array, list[Any]]:
    """Through a module for one sequence.

    Args:
        run: makes the output of the input.
        parameters: what it is made with.
        state: the input, of shape (length, width).
        gradient: of the output.

    Returns:
        The gradient of the input, and those of the parameters.
    """
    import torch

    given = torch.from_numpy(state)[None].requires_grad_()
    back, *found = torch.autograd.grad(run(given), [given, *parameters], torch.from_numpy(gradient)[None])
    return back[0].numpy(), found


def add_squares(sums: Sequence[Any], found: Sequence[Any]) -> None:
    """Add each gradient's square."""
    for total, gradient in zip(sums, found, strict=True):
        total.addcmul_(gradient, gradient)


class _Head:
    """What is outside of the layers: the last norm, the output head, and the embedding, which may be the head.

    Args:
        walk: what is walked through; its states behind the last layer are kept.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk, self._planned = walk, walk.planned
        self._name, self._norm = walk.norm()
        self._head = self._planned.head
        self._scale = 1.0 / walk.config.get(_SCALING, 1.0)

    def walk_back(self, shard: StatisticsShard | None) -> None:
        """To the gradients of the last layer's output, which are kept."""
        import torch

        walk, sums = self._walk, {each.name: torch.zeros(each.shape) for each in (shard.tensors if shard else ())}
        table, parameters = self._table(), [*self._norm.parameters()]

        def back(sequence: int) -> tuple[Any, Any, Array, list[Any]]:
            states, logits = self._logits_gradient(table, sequence)
            given = np.zeros(states.shape, np.float32)
            given[:-1] = (logits @ table).numpy()
            state = walk.states.read(sequence, len(self._planned.layers))
            return states, logits, *walk_back(self._norm, parameters, state, given)

        for batch in walk.batches(self._planned.threads):
            made = list(walk.pool.map(back, batch))
            for sequence, (_, _, gradient, found) in zip(batch, made, strict=True):
                walk.states.write(sequence, gradient, self._planned.gradients)
                add_squares([sums[self._name]] if shard else [], found if shard else [])
            if shard is not None and self._head is not None:
                self._add(sums[self._head.name], [(logits, states) for states, logits, *_ in made], [])
        if shard is not None:
            walk.write(shard, {name: _mean(walk, total) for name, total in sums.items()})

    def embedding(self, shard: StatisticsShard) -> None:
        """The embedding's own file: of a tied one, with what it does as the head."""
        import torch

        walk, (tensor,) = self._walk, shard.tensors
        total, factor = torch.zeros(tensor.shape), walk.config.get(EMBEDDING_FACTOR, 1.0)
        table = self._table() if self._head is None else None
        for batch in walk.batches(self._planned.threads):
            kept = [torch.from_numpy(walk.states.read(sequence, self._planned.gradients)) for sequence in batch]
            rows = [
                (torch.from_numpy(self._planned.tokens[sequence]).long(), gradient * factor)
                for sequence, gradient in zip(batch, kept, strict=True)
            ]
            made = walk.pool.map(
                lambda sequence: self._logits_gradient(table, sequence), batch if table is not None else ()
            )
            self._add(total, [(logits, states) for states, logits in made], rows)
        walk.write(shard, {tensor.name: _mean(walk, total)})

    def _table(self) -> Any:
        import torch

        return torch.from_numpy(self._walk.whole(self._head or embedding(self._planned.locked)))

    def _logits_gradient(self, table: Any, sequence: int) -> tuple[Any, Any]:
        """A sequence's states behind the norm, and of its log-likelihood the gradient by all logits but the last."""
        import torch

        ids = self._planned.tokens[sequence]
        with torch.no_grad():
            states = self._norm(torch.from_numpy(self._walk.states.read(sequence, len(self._planned.layers))))
            found = (states[:-1] @ table.T).mul_(self._scale).softmax(1).neg_()
            found[np.arange(len(ids) - 1), ids[1:]] += 1
            return states, found.mul_(self._scale)

    def _add(self, total: Any, parts: Sequence[tuple[Any, Any]], rows: Sequence[tuple[Any, Any]]) -> None:
        """The squares of a table's gradients, sequence by sequence; threads share out its rows."""
        list(self._walk.pool.map(partial(_add_rows, total, parts, rows), range(0, len(total), ROWS_AT_ONCE)))


def _add_rows(total: Any, parts: Sequence[tuple[Any, Any]], rows: Sequence[tuple[Any, Any]], start: int) -> None:
    """Add the squares of some rows of a table's gradient, a sequence after the other.

    Args:
        total: the whole table's sums.
        parts: of each sequence the logits' gradient and the states that they are made of; none where it is no head.
        rows: of each sequence its tokens and the gradients of their embeddings; none where it is no embedding.
        start: the first of `ROWS_AT_ONCE` rows.
    """
    import torch

    stop = min(start + ROWS_AT_ONCE, len(total))
    with torch.no_grad():
        for place in range(max(len(parts), len(rows))):
            found = torch.zeros(stop - start, total.shape[1])
            if parts:
                logits, states = parts[place]
                torch.mm(logits[:, start:stop].T, states[:-1], out=found)
            if rows:
                ids, gradient = rows[place]
                mine = (ids >= start) & (ids < stop)
                found.index_add_(0, ids[mine] - start, gradient[mine])
            total[start:stop].addcmul_(found, found)
