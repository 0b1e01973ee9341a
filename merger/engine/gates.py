"""Routers computed from prompts: what the base model makes of them, layer by layer, or their embeddings' mean.

transformers computes the layers, one at a time with the weights of no other in memory; each prompt is run alone, on one
thread, so that no number depends on the others. Not here: routers drawn by chance (sources), and the memory this takes
(plan.routing).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from merger.checkpoints.checkpoint import TensorInfo
from merger.checkpoints.mixtures import EMBEDDING
from merger.engine.blocks import TORCH_DTYPES
from merger.errors import ModelError, Problem, RecipeError
from merger.plan.lock import LockedModel
from merger.plan.plan import Plan, Shard
from merger.plan.routing import EMBEDDED, layers, prompts, routed
from merger.plan.sources import Routed
from merger.stores.ports import Reader, Store, Ticket

_CONDITION = 5.0
"""A router whose singular values lie further apart has rows that are nearly alike."""

_NO_LENGTH = 1e-8
States = Mapping[str, Tensor]
"""For each prompt a row for each of its tokens, in float32."""


def gates(plan: Plan, shards: Sequence[Shard], store: Store) -> dict[Routed, Tensor]:
    """The routers of these shards that are computed from prompts; each row is of unit length.

    Raises:
        RecipeError: a package that this needs is not installed.
        ModelError: bytes of the base model or its tokenizer cannot be read.
    """
    wanted = routed([job for shard in shards for job in shard.jobs])
    if not wanted:
        return {}
    needed = ("tokenizers",) if wanted[0].mode == EMBEDDED else ("tokenizers", "transformers")
    _refuse_missing(plan, needed)
    donor = plan.locked.donor
    states = _embedded(donor, _tokens(donor, store, prompts(wanted)), store, plan.read_ahead)
    if wanted[0].mode == EMBEDDED:
        return {router: _rows(router, states) for router in wanted}
    return _through_layers(plan, wanted, states, store)


def _through_layers(plan: Plan, wanted: Sequence[Routed], states: States, store: Store) -> dict[Routed, Tensor]:
    """Each router from its layer's input."""
    found: dict[Routed, Tensor] = {}
    run = layers(plan.locked, wanted)
    with ThreadPoolExecutor(plan.threads) as pool, closing(_reader(plan, run, store)) as reader:
        weights = _weights(plan.locked.donor, run, reader)
        decoders = _Decoders(plan.locked.donor.checkpoint.config)
        for layer in range(len(run) + 1):
            found |= {router: _rows(router, states) for router in wanted if router.layer == layer}
            if layer < len(run):
                decoder = decoders.loaded(layer, next(weights))
                states = dict(zip(states, pool.map(decoder, states.values()), strict=True))
    return found


def doubts(found: Mapping[Routed, Tensor]) -> tuple[str, ...]:
    """Whether some of the routers can hardly tell their experts apart, in a sentence."""
    several = {router: rows for router, rows in found.items() if len(rows) > 1}
    odd = sorted(router.layer for router, rows in several.items() if _condition(rows) > _CONDITION)
    if not odd:
        return ()
    which = ", ".join(map(str, odd[:8])) + (", ..." if len(odd) > 8 else "")
    what = f"the router's rows are nearly alike in {len(odd)} of {len(several)} layers ({which})"
    return (f"{what}: the experts' prompts may be too similar, and some experts will hardly be chosen",)


def _condition(rows: Tensor) -> float:
    values = torch.linalg.svdvals(rows)
    return float(values.max() / values.min())


# ---- rows -----------------------------------------------------------------------------------------------------------


def _rows(router: Routed, states: States) -> Tensor:
    """A row for each expert: what its positive prompts have in common, less the same of the negative ones."""
    rows = [
        _unit(_side(positive, states, router.mode) - _side(negative, states, router.mode))
        if negative
        else _unit(_side(positive, states, router.mode))
        for positive, negative in router.prompts
    ]
    return torch.stack(rows)


def _side(texts: Sequence[str], states: States, mode: str) -> Tensor:
    if mode == EMBEDDED:
        return _unit(torch.cat([states[text] for text in texts]).mean(0))
    pooled = [states[text].mean(0) if mode == "hidden_avg" else states[text][-1] for text in texts]
    return torch.stack(pooled).mean(0)


def _unit(row: Tensor) -> Tensor:
    unit: Tensor = row / row.norm().clamp(min=_NO_LENGTH)
    return unit


# ---- prompts --------------------------------------------------------------------------------------------------------


def _tokens(donor: LockedModel, store: Store, texts: Sequence[str]) -> dict[str, list[int]]:
    """Each prompt's tokens behind the one that begins a text, if the tokenizer has one; no chat template is put on."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(store.fetch(donor.located, "tokenizer.json").decode())
    except ModelError:
        raise
    except Exception as error:  # the library raises nothing more special
        raise ModelError(_about(donor, f"tokenizer.json cannot be read ({error})", "download it again")) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    begin = _begin(donor, store)
    encoded = {text: tokenizer.encode(begin + text, add_special_tokens=False).ids for text in texts}
    if empty := next((text for text, ids in encoded.items() if not ids), None):
        raise RecipeError(_about(donor, f"the tokenizer makes no token of the prompt {empty!r}", "take it out"))
    return encoded


def _begin(donor: LockedModel, store: Store) -> str:
    """The text of the token that begins a text, empty where there is none."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            said = json.loads(store.fetch(donor.located, file)) if file in donor.located.files else {}
        except ValueError:
            said = {}
        token = said.get("bos_token") if isinstance(said, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return ""


def _embedded(donor: LockedModel, tokens: Mapping[str, list[int]], store: Store, ahead: int) -> States:
    """The embeddings of each prompt's tokens: only these rows are read."""
    tensor = donor.checkpoint.tensors[EMBEDDING]
    ids = sorted({token for row in tokens.values() for token in row})
    if ids[-1] >= tensor.shape[0]:
        what = f"its tokenizer knows the token {ids[-1]}, and its embedding has {tensor.shape[0]} rows"
        raise ModelError(_about(donor, what, "take a base_model whose tokenizer fits it"))
    size = tensor.nbytes // tensor.shape[0]
    starts = [tensor.start + token * size for token in ids]
    rows = torch.empty(len(ids), tensor.shape[1])
    with closing(store.reader([Ticket(donor.located, tensor.file, at, at + size) for at in starts], ahead)) as reader:
        for number in range(len(ids)):
            rows[number] = _read(reader, number, size, tensor)
    places = {token: place for place, token in enumerate(ids)}
    return {text: rows[[places[token] for token in row]] for text, row in tokens.items()}


def _about(donor: LockedModel, what: str, hint: str) -> Problem:
    return Problem(f"{donor.name}: {what}", donor.ref.at, "base_model", hint)


def _refuse_missing(plan: Plan, packages: Sequence[str]) -> None:
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            mixture = plan.locked.recipe.mixture
            what = f"a router is computed from prompts with {package}, which is not installed here"
            at = mixture.gate_mode_at or mixture.at if mixture else None
            raise RecipeError(Problem(what, at, "gate_mode", "pip install 'hub-merger[moe]'")) from None


# ---- layers ---------------------------------------------------------------------------------------------------------


def _reader(plan: Plan, run: Sequence[Sequence[TensorInfo]], store: Store) -> Reader:
    donor = plan.locked.donor.located
    tickets = [Ticket(donor, tensor.file, tensor.start, tensor.stop) for layer in run for tensor in layer]
    return store.reader(tickets, plan.read_ahead)


def _weights(donor: LockedModel, run: Sequence[Sequence[TensorInfo]], reader: Reader) -> Iterator[dict[str, Tensor]]:
    """Each layer's tensors by role, in float32."""
    ticket = 0
    for layer in run:
        held = {}
        for tensor in layer:
            role = donor.architecture.place(tensor.name).role
            held[role] = _read(reader, ticket, tensor.nbytes, tensor).view(tensor.shape)
            ticket += 1
        yield held
        held.clear()


def _read(reader: Reader, ticket: int, nbytes: int, tensor: TensorInfo) -> Tensor:
    raw = bytearray(nbytes)
    reader.read(ticket, 0, memoryview(raw))
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[tensor.dtype]).float()


class _Decoders:
    """The model without its embedding and last norm and with one layer, whose weights can be exchanged.

    Layers of another kind of attention have a model of their own.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import CONFIG_MAPPING

        self._config = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        self._kinds = getattr(self._config, "layer_types", None)
        self._models: dict[str | None, Any] = {}

    def loaded(self, layer: int, weights: dict[str, Tensor]) -> Any:
        """A function from the input of that layer to its output, for one prompt."""
        kind = self._kinds[layer] if self._kinds else None
        if kind not in self._models:
            self._models[kind] = self._model(kind)
        model = self._models[kind]
        model.layers[0].load_state_dict(weights, strict=True, assign=True)

        def decode(state: Tensor) -> Tensor:
            with torch.no_grad():
                output: Tensor = model(inputs_embeds=state[None], use_cache=False).last_hidden_state[0]
                return output

        return decode

    def _model(self, kind: str | None) -> Any:
        from transformers import AutoModel

        one = type(self._config).from_dict(self._config.to_dict())
        one.num_hidden_layers, one.vocab_size, one.pad_token_id = 1, 1, None
        if kind is not None:
            one.layer_types = [kind]
        with torch.device("meta"):  # no weight is drawn that would only be replaced
            model: Any = AutoModel.from_config(one, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
        model.rotary_emb = type(model.rotary_emb)(one)
        model.norm = torch.nn.Identity()
        return model.eval()
