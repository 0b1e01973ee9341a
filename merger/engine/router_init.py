"""Routers computed from prompts: what the base model makes of them, layer by layer, or their embeddings' mean.

transformers computes the layers, one at a time with the weights of no other in memory; each prompt is run alone, on one
thread, so that no number depends on the others. Not here: routers drawn by chance (sources), and the memory this takes
(planning.budget).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from merger.engine.inputs.readers import load_input
from merger.engine.inputs.stored import floats
from merger.engine.runner import Work, blocks
from merger.errors import ModelError, Problem, RecipeError
from merger.lock.locked import LockedModel
from merger.methods.registry import Method
from merger.methods.steps.step import Array
from merger.models.mixtures import EMBEDDING
from merger.planning.budget import EMBEDDED, embedding, layers, prompts, routers_of
from merger.planning.inputs.base import PASSTHROUGH, Job, Operand, Stored
from merger.planning.inputs.derived import Routed
from merger.planning.plan import Plan
from merger.safety.limits import of, parse_json
from merger.stores.ports import Reader, Store, Ticket

_CONDITION = 5.0
"""A router whose singular values lie further apart has rows that are nearly alike."""

_NO_LENGTH = 1e-8
_MULTIPLIER = "embedding_multiplier"
"""Of Granite: a factor of embeddings before the first layer, which every model of one layer would apply again."""

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
    base = _Base(plan, table, store)
    states = base.embedded(_tokens(plan, store, prompts(wanted)))
    if wanted[0].mode == EMBEDDED:
        return {router: _rows(router, states) for router in wanted}
    for rows in states.values():
        rows *= np.float32(plan.locked.config_model.checkpoint.config.get(_MULTIPLIER, 1.0))
    return _through_layers(base, wanted, states)


def _through_layers(base: _Base, wanted: Sequence[Routed], states: States) -> dict[Routed, Array]:
    """Each router from its layer's input."""
    found: dict[Routed, Array] = {}
    run = layers(base.plan.locked, wanted)
    decoders = _Decoders(base.plan.locked.config_model.checkpoint.config)
    with ThreadPoolExecutor(base.plan.threads) as pool, closing(base.weights(run)) as weights:
        for layer in range(len(run) + 1):
            found |= {router: _rows(router, states) for router in wanted if router.layer == layer}
            if layer < len(run):
                decoder = decoders.loaded(layer, next(weights))
                states = dict(zip(states, pool.map(decoder, states.values()), strict=True))
                decoders.empty()
    return found


def doubts(found: Mapping[Routed, Array]) -> tuple[str, ...]:
    """Whether some of the routers can hardly tell their experts apart, in a sentence."""
    several = {router: rows for router, rows in found.items() if len(rows) > 1}
    odd = sorted(router.layer for router, rows in several.items() if _condition(rows) > _CONDITION)
    if not odd:
        return ()
    which = ", ".join(map(str, odd[:8])) + (", ..." if len(odd) > 8 else "")
    what = f"the router's rows are nearly alike in {len(odd)} of {len(several)} layers ({which})"
    return (f"{what}: the experts' prompts may be too similar, and some experts will hardly be chosen",)


def _condition(rows: Array) -> float:
    values = np.linalg.svd(rows, compute_uv=False)
    return float(values.max() / values.min())


# ---- rows -----------------------------------------------------------------------------------------------------------


def _rows(router: Routed, states: States) -> Array:
    """A row for each expert: what its positive prompts have in common, less the same of the negative ones."""
    rows = [
        _unit(_side(positive, states, router.mode) - _side(negative, states, router.mode))
        if negative
        else _unit(_side(positive, states, router.mode))
        for positive, negative in router.prompts
    ]
    return np.stack(rows)


def _side(texts: Sequence[str], states: States, mode: str) -> Array:
    if mode == EMBEDDED:
        return _unit(np.concatenate([states[text] for text in texts]).mean(0))
    pooled = [states[text].mean(0) if mode == "hidden_avg" else states[text][-1] for text in texts]
    found: Array = np.stack(pooled).mean(0)
    return found


def _unit(row: Array) -> Array:
    return np.divide(row, max(_NO_LENGTH, float(np.sqrt(row @ row))))


# ---- prompts --------------------------------------------------------------------------------------------------------


_READ = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _tokens(plan: Plan, store: Store, texts: Sequence[str]) -> dict[str, list[int]]:
    """Each prompt's tokens behind the one that begins a text, if the tokenizer has one; no chat template is put on."""
    from tokenizers import Tokenizer

    models = plan.locked.models
    files = {
        name: store.fetch(models[number].located, name) for name, number in plan.texts.taken.items() if name in _READ
    }
    config_model = plan.locked.config_model
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # the library raises nothing more special
        raise ModelError(
            _about(config_model, f"tokenizer.json cannot be read ({error})", "download it again")
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    begin = _begin(files)
    encoded = {text: tokenizer.encode(begin + text, add_special_tokens=False).ids for text in texts}
    if (empty := next((text for text, ids in encoded.items() if not ids), None)) is not None:
        raise RecipeError(
            _about(config_model, f"its tokenizer makes no token of the prompt {empty!r}", "take the prompt out")
        )
    return encoded


def _begin(files: Mapping[str, bytes]) -> str:
    """The text of the token that begins a text, empty where there is none."""
    for file in _READ[1:]:
        try:
            said = parse_json(files.get(file, b"{}"), of(file))
        except ValueError:
            said = {}
        token = said.get("bos_token") if isinstance(said, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return ""


def _about(config_model: LockedModel, what: str, hint: str) -> Problem:
    return Problem(f"{config_model.name}: {what}", config_model.ref.at, "base_model", hint)


# ---- the base model -------------------------------------------------------------------------------------------------


class _Base:
    """The base model's tensors in float32, made like those of any merge, whatever they are made of."""

    def __init__(self, plan: Plan, table: Mapping[str, Method], store: Store) -> None:
        self.plan, self._table, self._store = plan, table, store

    def embedded(self, tokens: Mapping[str, list[int]]) -> States:
        """The embeddings of each prompt's tokens."""
        job = embedding(self.plan.locked)
        ids = sorted({token for row in tokens.values() for token in row})
        if ids[-1] >= job.shape[0]:
            what = f"its tokenizer knows the token {ids[-1]}, and its embedding has {job.shape[0]} rows"
            raise ModelError(_about(self.plan.locked.config_model, what, "take a base_model whose tokenizer fits it"))
        source = job.sources[0]
        rows = self._stored_rows(source, ids) if isinstance(source, Stored) else self._made_rows(job, ids)
        places = {token: place for place, token in enumerate(ids)}
        return {text: rows[[places[token] for token in row]] for text, row in tokens.items()}

    def _stored_rows(self, stored: Stored, ids: Sequence[int]) -> Array:
        """Rows of a stored tensor, of which no others are read: each is a tensor of its own for once."""
        count, width = stored.shape
        size = stored.tensor.nbytes // count
        starts = [stored.tensor.start + row * size for row in ids]
        cut = [replace(stored.tensor, shape=(width,), start=start, stop=start + size) for start in starts]
        inputs = [Operand(Stored(stored.model, row), {"scale": 1.0}) for row in cut]
        jobs = [Job(EMBEDDING, "F32", (width,), PASSTHROUGH, (row,)) for row in inputs]
        with closing(self._reader(jobs)) as reader:
            return np.stack([self._make(job, number, reader) for number, job in enumerate(jobs)])

    def _made_rows(self, job: Job, ids: Sequence[int]) -> Array:
        """Rows of what is made on the way."""
        rows = floats(len(ids), job.shape[1])
        with closing(self._reader([job])) as reader, closing(self._work(job, 0, reader)) as work:
            if work.wants_preparing:
                work.prepare()
            for row, token in zip(rows, ids, strict=True):
                start = token * job.shape[1]
                load_input(job.sources[0], start, start + job.shape[1], row, work.tensors)
        return rows

    def weights(self, run: Sequence[Sequence[Job]]) -> Generator[dict[str, Array]]:
        place = self.plan.locked.config_model.architecture.place
        first = 0
        with closing(self._reader([job for layer in run for job in layer])) as reader:
            for layer in run:
                held = {}
                for job in layer:
                    held[place(job.name).role] = self._make(job, first, reader).reshape(job.shape)
                    first += len(job.reads)
                yield held
                held.clear()

    def _make(self, job: Job, first: int, reader: Reader) -> Array:
        made = floats(job.entries)
        room = made.view(np.uint8)
        with closing(self._work(job, first, reader)) as work:
            if work.wants_preparing:
                work.prepare()
            for block in blocks(job, work.method):
                work.make(block, room[block.start * (1 if job.is_copy else 4) :])
        return made

    def _work(self, job: Job, first: int, reader: Reader) -> Work:
        return Work(job, self._table, first, reader, self.plan.seed, "cpu", {})

    def _reader(self, jobs: Sequence[Job]) -> Reader:
        models = self.plan.locked.models
        leaves = [stored for job in jobs for stored in job.reads]
        tickets = [Ticket(models[of.model].located, of.tensor.file, of.tensor.start, of.tensor.stop) for of in leaves]
        return self._store.reader(tickets, self.plan.read_ahead)


class _Decoders:
    """The model without its embedding and last norm and with one layer, whose weights can be exchanged.

    Layers of another kind of attention have a model of their own.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        import torch
        from transformers import CONFIG_MAPPING

        self._torch: Any = torch
        self._config = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        self._kinds = getattr(self._config, "layer_types", None)
        self._models: dict[str | None, Any] = {}

    def loaded(self, layer: int, weights: dict[str, Array]) -> Any:
        """A function from the input of that layer to its output, for one prompt."""
        kind = self._kinds[layer] if self._kinds else None
        if kind not in self._models:
            self._models[kind] = self._model(kind)
        model = self._models[kind]
        tensors = {role: self._torch.from_numpy(held) for role, held in weights.items()}
        model.layers[0].load_state_dict(tensors, strict=True, assign=True)

        def decode(state: Array) -> Array:
            with self._torch.no_grad():
                inputs = self._torch.from_numpy(state)[None]
                output: Array = model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0].numpy()
                return output

        return decode

    def empty(self) -> None:
        """Let go of the weights, before the next ones come."""
        for model in self._models.values():
            model.layers[0].to("meta")

    def _model(self, kind: str | None) -> Any:
        from transformers import AutoModel

        one = type(self._config).from_dict(self._config.to_dict())
        one.num_hidden_layers, one.vocab_size, one.pad_token_id = 1, 1, None
        if kind is not None:
            one.layer_types = [kind]
        if hasattr(one, _MULTIPLIER):
            setattr(one, _MULTIPLIER, 1.0)
        with self._torch.device("meta"):  # no weight is drawn that would only be replaced
            model: Any = AutoModel.from_config(one, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
        model.rotary_emb = type(model.rotary_emb)(one)
        model.norm = self._torch.nn.Identity()
        return model.eval()
