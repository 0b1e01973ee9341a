"""Routers computed from prompts: what the base model makes of them, layer by layer, or their embeddings' mean.

transformers computes the layers, one at a time with the weights of no other in memory; each prompt is run alone, on one
thread, so that no number depends on the others. Not here: routers drawn by chance (sources), and the memory this takes
(planning.budget).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import numpy as np

from merger.engine.inputs.layers import (
    EMBEDDING_FACTOR,
    TOKENIZER_FILES,
    LayerModel,
    ModelTensors,
    about_tokens,
    load_encoder,
)
from merger.errors import RecipeError
from merger.methods.registry import Method
from merger.methods.steps.step import Array
from merger.planning.budget import EMBEDDED, layers, prompts, routers_of
from merger.planning.inputs.base import Job
from merger.planning.inputs.derived import Routed
from merger.planning.plan import Plan
from merger.stores.ports import Store

_CONDITION = 5.0
"""A router whose singular values lie further apart has rows that are nearly alike."""

_NO_LENGTH = 1e-8
States = Mapping[str, Array]
"""For each prompt a row for each of its tokens, in float32."""


def gates(plan: Plan, jobs: Sequence[Job], table: Mapping[str, Method], store: Store) -> dict[Routed, Array]:
    """The routers of these jobs that are computed from prompts; each row is of unit length.

    Raises:
        ModelError: bytes of the base model or its tokenizer cannot be read.
    """
    wanted = routers_of(jobs)
    if not wanted:
        return {}
    tensors = ModelTensors(plan.locked, table, store, plan.seed, plan.read_ahead)
    states = _embed(tensors, _tokens(plan, store, prompts(wanted)))
    if wanted[0].mode == EMBEDDED:
        return {router: _rows(router, states) for router in wanted}
    for rows in states.values():
        rows *= np.float32(plan.locked.config_model.checkpoint.config.get(EMBEDDING_FACTOR, 1.0))
    return _through_layers(plan, tensors, wanted, states)


def _embed(tensors: ModelTensors, tokens: Mapping[str, Sequence[int]]) -> States:
    """The embeddings of each prompt's tokens."""
    ids = sorted({token for row in tokens.values() for token in row})
    rows, places = tensors.rows(ids), {token: place for place, token in enumerate(ids)}
    return {text: rows[[places[token] for token in row]] for text, row in tokens.items()}


def _through_layers(plan: Plan, tensors: ModelTensors, wanted: Sequence[Routed], states: States) -> dict[Routed, Array]:
    """Each router from its layer's input."""
    found: dict[Routed, Array] = {}
    run = layers(plan.locked, wanted)
    decoder = LayerModel(plan.locked.config_model.checkpoint.config)
    with ThreadPoolExecutor(plan.threads) as pool, closing(tensors.weights(run)) as weights:
        for layer in range(len(run) + 1):
            found |= {router: _rows(router, states) for router in wanted if router.layer == layer}
            if layer < len(run):
                decode = partial(decoder.run, decoder.loaded(layer, next(weights)))
                states = dict(zip(states, pool.map(decode, states.values()), strict=True))
                decoder.empty()
    return found


def doubts(found: Mapping[Routed, Array]) -> tuple[str, ...]:
    """Whether some of the routers can hardly tell their experts apart, in a sentence."""
    several = {router: rows for router, rows in found.items() if len(rows) > 1}
    odd = sorted(router.layer for router, rows in several.items() if np.linalg.cond(rows) > _CONDITION)
    if not odd:
        return ()
    which = ", ".join(map(str, odd[:8])) + (", ..." if len(odd) > 8 else "")
    what = f"the router's rows are nearly alike in {len(odd)} of {len(several)} layers ({which})"
    return (f"{what}: the experts' prompts may be too similar, and some experts will hardly be chosen",)


def _rows(router: Routed, states: States) -> Array:
    """A row for each expert: what its positive prompts have in common, less the same of the negative ones."""
    sides = [[_side(side, states, router.mode) for side in pair if side] for pair in router.prompts]
    return np.stack([_unit(np.subtract(*pair) if len(pair) > 1 else pair[0]) for pair in sides])


def _side(texts: Sequence[str], states: States, mode: str) -> Array:
    if mode == EMBEDDED:
        return _unit(np.concatenate([states[text] for text in texts]).mean(0))
    pooled = [states[text].mean(0) if mode == "hidden_avg" else states[text][-1] for text in texts]
    found: Array = np.stack(pooled).mean(0)
    return found


def _unit(row: Array) -> Array:
    return np.divide(row, max(_NO_LENGTH, float(np.sqrt(row @ row))))


def _tokens(plan: Plan, store: Store, texts: Sequence[str]) -> dict[str, list[int]]:
    """Each prompt's tokens behind the one that begins a text, if the tokenizer has one; no chat template is put on."""
    models, config_model = plan.locked.models, plan.locked.config_model
    files = {
        name: store.fetch(models[number].located, name)
        for name, number in plan.texts.taken.items()
        if name in TOKENIZER_FILES
    }
    encode = load_encoder(config_model, files)
    encoded = {text: encode(text) for text in texts}
    if (empty := next((text for text, ids in encoded.items() if not ids), None)) is not None:
        raise RecipeError(
            about_tokens(config_model, f"its tokenizer makes no token of the prompt {empty!r}", "take the prompt out")
        )
    return encoded
