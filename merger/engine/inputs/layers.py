"""A model a layer at a time: its tensors in float32, made like those of any merge, and a module of transformers for it.

No more than a layer's weights is in memory. Not here: what is run through it (router_init, statistics), and the memory
this takes (planning.budget).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from merger.engine.inputs.readers import load_input
from merger.engine.inputs.stored import floats
from merger.engine.runner import Work, blocks
from merger.engine.tensors import RunSetup
from merger.errors import ModelError, Problem
from merger.lock.locked import LockedModel
from merger.methods.registry import Method
from merger.methods.steps.step import Array
from merger.models.mixtures import EMBEDDING
from merger.planning.budget import embedding
from merger.planning.inputs.base import PASSTHROUGH, Job, Operand, Stored
from merger.planning.stage_model import StagedRecipe
from merger.safety.limits import of, parse_json
from merger.stores.ports import Reader, Store, Ticket

EMBEDDING_FACTOR = "embedding_multiplier"
"""Of Granite: a factor of embeddings before the first layer, which every model of one layer would apply again."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

_FEW = 8
"""Rows of an embedding are read by themselves where this many times as many are not wanted."""


def about_tokens(model: LockedModel, what: str, hint: str) -> Problem:
    """What is wrong with a model's tokens."""
    return Problem(f"{model.name}: {what}", model.ref.at, "base_model", hint)


def load_encoder(model: LockedModel, files: Mapping[str, bytes]) -> Callable[[str], list[int]]:
    """What makes a text's tokens, behind the one that begins a text, if the tokenizer has one.

    Args:
        model: whose they are.
        files: those of `TOKENIZER_FILES` that it has.

    Raises:
        ModelError: there is none that can be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files[TOKENIZER_FILES[0]].decode())
    except Exception as error:  # the library raises nothing more special
        what = f"{TOKENIZER_FILES[0]} cannot be read ({error})"
        raise ModelError(about_tokens(model, what, "download it again")) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    begin = _begin(files)
    return lambda text: list(tokenizer.encode(begin + text, add_special_tokens=False).ids)


def _begin(files: Mapping[str, bytes]) -> str:
    """The text of the token that begins a text, empty where there is none."""
    for file in TOKENIZER_FILES[1:]:
        try:
            said = parse_json(files.get(file, b"{}"), of(file))
        except ValueError:
            said = {}
        token = said.get("bos_token") if isinstance(said, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return ""


class ModelTensors:
    """The config model's tensors in float32, made like those of any merge, whatever they are made of.

    Args:
        locked: the recipe and its models.
        table: the merge methods by name.
        store: where the models' bytes come from.
        seed: for what is drawn on the way.
        ahead: how many bytes may be read ahead of need.
    """

    def __init__(
        self, locked: StagedRecipe, table: Mapping[str, Method], store: Store, seed: int = 0, ahead: int = 0
    ) -> None:
        self._locked, self._table, self._store = locked, table, store
        self._seed, self._ahead = seed, ahead

    def rows(self, ids: Sequence[int]) -> Array:
        """The embeddings of these tokens.

        Raises:
            ModelError: it has no such token, or bytes cannot be had.
        """
        job = embedding(self._locked)
        if max(ids) >= job.shape[0]:
            what = f"its tokenizer knows the token {max(ids)}, and its embedding has {job.shape[0]} rows"
            raise ModelError(about_tokens(self._locked.config_model, what, "take a base_model whose tokenizer fits it"))
        source = job.sources[0]
        if isinstance(source, Stored) and len(ids) * _FEW <= job.shape[0]:
            return self._stored_rows(source, ids)
        return self._made_rows(job, ids)

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
        """Each layer's tensors by role."""
        place = self._locked.config_model.architecture.place
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
        """A whole tensor."""
        made = floats(job.entries)
        room = made.view(np.uint8)
        with closing(self._work(job, first, reader)) as work:
            if work.wants_preparing:
                work.prepare()
            for block in blocks(job, work.method):
                work.make(block, room[block.start * (1 if job.is_copy else 4) :])
        return made

    def _work(self, job: Job, first: int, reader: Reader) -> Work:
        return Work(job, RunSetup(self._table, reader, self._seed), first)

    def _reader(self, jobs: Sequence[Job]) -> Reader:
        models = self._locked.models
        leaves = [stored for job in jobs for stored in job.reads]
        tickets = [Ticket(models[of.model].located, of.tensor.file, of.tensor.start, of.tensor.stop) for of in leaves]
        return self._store.reader(tickets, self._ahead)


class LayerModel:
    """The model without its embedding and with one layer, whose weights can be exchanged.

    Layers of another kind of attention have a module of their own.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        import torch
        from transformers import CONFIG_MAPPING

        self._torch: Any = torch
        self._config = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        self._kinds = getattr(self._config, "layer_types", None)
        self._models: dict[str | None, Any] = {}
        self.norm: Any = None

    def loaded(self, layer: int, weights: Mapping[str, Array]) -> Any:
        """The module that holds that layer alone: from `inputs_embeds` to `last_hidden_state`."""
        kind = self._kinds[layer] if self._kinds else None
        if kind not in self._models:
            self._models[kind] = self._model(kind)
        model = self._models[kind]
        tensors = {role: self._torch.from_numpy(held) for role, held in weights.items()}
        model.layers[0].load_state_dict(tensors, strict=True, assign=True)
        return model

    def run(self, model: Any, state: Array) -> Array:
        """What the module makes of one text's states."""
        with self._torch.no_grad():
            inputs = self._torch.from_numpy(state)[None]
            output: Array = model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0].numpy()
            return output

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
        if hasattr(one, EMBEDDING_FACTOR):
            setattr(one, EMBEDDING_FACTOR, 1.0)
        with self._torch.device("meta"):  # no weight is drawn that would only be replaced
            model: Any = AutoModel.from_config(one, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
        model.rotary_emb = type(model.rotary_emb)(one)
        self.norm, model.norm = model.norm, self._torch.nn.Identity()
        return model.eval()
