"""What a LoRA adapter makes of a model's tensors: which of them it means, and whether it fits there.

Not here: what an adapter's files hold (adapter, modules), and names of other classes of models (counterparts).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merger.errors import ModelError, Problem
from merger.models.architecture import is_embedding, is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.models.config import is_tied
from merger.models.lora.adapter import KERNELS, MERGE_FIRST, SHOWN, Adapter, dims
from merger.models.lora.counterparts import counterparts
from merger.models.lora.modules import TURNED_EXPERTS, AdaptedModule, AdaptedParameters, Home
from merger.models.mixtures import join, without_blocks
from merger.models.tokenizer_files import TokenRows

TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Kinds of models whose linear layers hold their matrices with the inputs first (transformers' Conv1D)."""


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor of its model, in this order.

    Args:
        whole: it is replaced by this one.
        tokens: some of its rows are replaced by these.
        low_rank: a product of two small matrices is added to it.
        transposed: whether the tensor has the module's inputs as rows.
        added: this is added to it, times `scale`.
        scale: see there.
    """

    whole: TensorInfo | None = None
    tokens: TokenRows | None = None
    low_rank: AdaptedModule | None = None
    transposed: bool = False
    added: TensorInfo | None = None
    scale: float = 1.0


def changes(adapter: Adapter, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Mapping[str, Change]:
    """What an adapter makes of a model's tensors, by their names.

    Args:
        adapter: the adapter.
        tensors: the model's tensors by name.
        config: the model's config.json.

    Raises:
        ModelError: some part of it has no place in the model, or does not fit there.
    """
    places = _Places(adapter, tensors, config)
    found = _Fitting(places).changes()
    if places.problems:
        raise ModelError(places.problems)
    return found


def _wanted_shapes(adapter: Adapter) -> dict[str, tuple[int, ...] | None]:
    """The names by which an adapter calls its model's tensors, and their shapes where it tells them."""
    modules = adapter.modules.values()
    return {
        **dict.fromkeys(adapter.tokens),
        **{name: tensor.shape for name, tensor in adapter.whole.items()},
        **{f"{module.name}.weight": (module.outputs, module.inputs) for module in modules},
        **{f"{module.name}.bias": (module.outputs,) for module in modules if module.bias is not None},
        **{name: None for held in adapter.parameters for name in held.named},
    }


def _with_parameters_of(adapter: Adapter, names: Iterable[str]) -> Adapter:
    """The adapter with those parameters alone that a model with these names may have: the rest are modules."""
    ends = {_end(name) for name in names}
    modules, kept = dict(adapter.modules), []
    for held in adapter.parameters:
        named = {name: strength for name, strength in held.named.items() if _end(name) in ends}
        if named or held.alone is None:
            kept.append(replace(held, named=named))
        else:
            modules[held.module] = held.alone
    return replace(adapter, modules=modules, parameters=kept)


def _end(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-2:])


class _Places:
    """The tensors of one model by the names of one adapter; what has no place, or not one alone, is told."""

    def __init__(self, adapter: Adapter, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
        self.tensors, self.config = dict(tensors), config
        self._stacks = {name: Home(parts) for name, parts in join(tensors).items()} if adapter.parameters else {}
        self.adapter = adapter = _with_parameters_of(adapter, [*self.tensors, *self._stacks])
        self._counterparts = counterparts(_wanted_shapes(adapter), self._shapes())
        self._taken: dict[str, str] = {}
        self.homeless: list[str] = []
        self.unclear: list[str] = []
        self.problems: list[Problem] = []

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the model's tensors, and of what its experts have together."""
        return {name: held.shape for of in (self.tensors, self._stacks) for name, held in of.items()}

    def homes(self, names: Sequence[str]) -> dict[str, Home]:
        """Where parameters are: what the model calls so, else what it calls so in another block of experts."""
        shapes = self._shapes()
        theirs, ours = without_blocks(names), defaultdict(list)
        for name, of in without_blocks(shapes).items():
            ours[of].append(name)
        found = counterparts(dict.fromkeys(theirs.values()), {of: shapes[held[0]] for of, held in ours.items()})
        homes = {}
        for name in names:
            alike = [one for of in found.get(theirs.get(name, ""), ()) for one in ours[of]]
            places = self._counterparts[name] or alike
            if len(places) > 1:
                self.unclear.append(f"{name} is {places[0]} or {places[1]}")
            elif places:
                homes[name] = self._stacks.get(places[0]) or Home([(self.tensors[places[0]],)])
        return homes

    def refuse(self, what: str, hint: str) -> None:
        """A part does not fit, or cannot be told."""
        self.problems.append(Problem(what, hint=hint))

    def place(self, name: str, tensor: TensorInfo) -> TensorInfo | None:
        """The model's tensor that the adapter calls `name`."""
        places = self._counterparts[name]
        if (head := self.own_head(name)) is not None:
            return replace(head, shape=self.adapter.whole.get(name, head).shape)
        if not places:
            self.homeless.append(tensor.name)
            return None
        if len(places) > 1:
            self.unclear.append(f"{tensor.name} changes {places[0]} or {places[1]}")
            return None
        place = self.tensors[places[0]]
        return place if self.takes(place, name) else None

    def takes(self, place: TensorInfo, name: str) -> bool:
        """Whether a tensor of the model can be changed, and by nothing else."""
        other = self._taken.setdefault(place.name, name)
        if other != name:
            self.unclear.append(f"{other} or {name} changes {place.name}")
        elif place.dtype not in FLOATS:
            self.refuse(f"it changes {place.name}, which is stored as {place.dtype}", MERGE_FIRST)
        return other == name and place.dtype in FLOATS

    def own_head(self, name: str) -> TensorInfo | None:
        """What a head of its own begins as, where the model's is its embedding."""
        if not (is_head(name) and is_tied(self.config)):
            return None
        found = [tensor for of, tensor in self.tensors.items() if is_embedding(of)]
        return replace(found[0], name=name) if len(found) == 1 else None

    def tell_unplaced(self) -> None:
        """All at once, in the end."""
        if self.unclear:
            rest = f", and so of {len(self.unclear) - 1} more" if len(self.unclear) > 1 else ""
            self.refuse(f"the adapter's names do not tell whether {self.unclear[0]}{rest}", MERGE_FIRST)
        if self.homeless:
            names, more = self.homeless[:SHOWN], len(self.homeless) - SHOWN
            told = ", ".join(names) + (f" and {more} more" if more > 0 else "")
            hint = self.its_model()
            self.refuse(f"the model has no place for {told}", hint)

    def its_model(self) -> str:
        """The hint to take the model that the adapter names."""
        return "take the model that it was trained on" + (f": {self.adapter.model}" if self.adapter.model else "")


class _Fitting:
    """One adapter held against one model."""

    def __init__(self, places: _Places) -> None:
        self._places, self._adapter, self._config = places, places.adapter, places.config

    def changes(self) -> dict[str, Change]:
        found: dict[str, Change] = {}
        for name, tensor in self._adapter.whole.items():
            if is_head(name) and is_tied(self._config) and self._adapter.tied:
                continue
            place = self._places.own_head(name) or self._places.place(name, tensor)
            if place is not None and self._can_replace(place, tensor):
                found[place.name] = Change(whole=tensor)
                self._places.tensors[place.name] = replace(place, shape=tensor.shape)
        self._rows(found)
        added = {name: module for name, module in self._adapter.modules.items() if not self._is_copy(name)}
        places = [(module, self._places.place(f"{name}.weight", module.a)) for name, module in added.items()]
        settled = [(module, place) for module, place in places if place is not None and self._fits(module, place)]
        usual = self._usually_turned(settled)
        for module, place in settled:
            transposed = self._transposed(module, place, usual)
            if transposed and module.magnitude is not None:
                self._places.refuse(f"{module.name} has DoRA and its inputs first, which is not built", MERGE_FIRST)
            found[place.name] = replace(found.get(place.name, Change()), low_rank=module, transposed=transposed)
            self._bias(module, found)
        self._parameters(found)
        self._places.tell_unplaced()
        return found

    def _parameters(self, found: dict[str, Change]) -> None:
        """What is added to parameters: to a tensor each, or to those of all experts."""
        homes = self._places.homes([name for one in self._adapter.parameters for name in one.named])
        transposed = self._transposed_experts(homes)
        for held in self._adapter.parameters:
            orders = held.orders(homes, transposed)
            if not any(name in homes for name in held.named):
                self._places.homeless += [] if self._places.unclear else [held.pairs[0][0].name]
            elif not orders:
                self._places.refuse(_misfit(held, homes), self._places.its_model())
            elif len(orders) > 1:
                one, other = next(two for two in zip(*orders[:2], strict=True) if two[0] != two[1])
                self._places.unclear.append(f"{one.a.name} changes {one.name} or {other.name}")
            else:
                for module in orders[0]:
                    self._add(module, homes[module.name], transposed, found)

    def _transposed_experts(self, homes: Mapping[str, Home]) -> bool:
        """Whether experts that are in one tensor have their inputs first: all or none, as the shapes tell."""
        stacks = [one for one in self._adapter.parameters if any(n in homes and homes[n].is_stack for n in one.named)]
        ways = [way for way in (False, True) if all(one.orders(homes, way) for one in stacks)]
        if not stacks or len(ways) == 1:
            return ways == [True]
        if len(ways) == 2 and self._config.get("model_type") not in TURNED_EXPERTS:
            first = stacks[0].pairs[0]
            what = f"{first[0].name} and {first[1].name} fit the model's experts either way round"
            self._places.refuse(what, MERGE_FIRST)
        return len(ways) == 2

    def _add(self, module: AdaptedModule, home: Home, transposed: bool, found: dict[str, Change]) -> None:
        for tensor, share in home.shares(module):
            if self._places.takes(tensor, module.name):
                found[tensor.name] = replace(
                    found.get(tensor.name, Change()), low_rank=share, transposed=transposed and home.is_stack
                )

    def _rows(self, found: dict[str, Change]) -> None:
        """Single rows; of a head that is the embedding PEFT saves the embedding's once more."""
        for name, tokens in self._adapter.tokens.items():
            if is_head(name) and is_tied(self._config) and tokens.numbers in self._of_embeddings():
                continue
            place = self._places.place(name, tokens.rows)
            if place is None:
                continue
            last = max(tokens.numbers, default=-1)
            if last >= place.shape[0] or tokens.rows.shape[1:] != place.shape[1:]:
                rows = f"it has rows of {tokens.rows.shape[-1]} numbers up to row {last}"
                what = f"{rows} for {name}, but the model's {place.name} is {dims(place.shape)}"
                self._places.refuse(what, self._places.its_model())
            else:
                found[place.name] = replace(found.get(place.name, Change()), tokens=tokens)

    def _of_embeddings(self) -> list[tuple[int, ...]]:
        return [tokens.numbers for name, tokens in self._adapter.tokens.items() if is_embedding(name)]

    def _is_copy(self, name: str) -> bool:
        """Whether a module is a tied head that gets what the embedding gets: PEFT saves that once more."""
        adapted = any(is_embedding(f"{other}.weight") for other in self._adapter.modules)
        return is_head(f"{name}.weight") and is_tied(self._config) and self._adapter.tied and adapted

    def _can_replace(self, place: TensorInfo, tensor: TensorInfo) -> bool:
        """Whether a tensor can stand in the model's place: of its shape, or an embedding or head of other tokens."""
        same = tensor.shape == place.shape or (_is_of_tokens(place) and tensor.shape[1:] == place.shape[1:])
        if tensor.dtype not in FLOATS:
            self._places.refuse(f"{tensor.name} is stored as {tensor.dtype}, which is not read", MERGE_FIRST)
        elif not same:
            what = f"{tensor.name} is {dims(tensor.shape)}, but the model's {place.name} {dims(place.shape)}"
            self._places.refuse(what, self._places.its_model())
        return tensor.dtype in FLOATS and same

    def _fits(self, module: AdaptedModule, place: TensorInfo) -> bool:
        sizes = (module.outputs, module.inputs)
        allowed = [sizes[::-1]] if module.embedding else [sizes, sizes[::-1]]
        kernel = len(place.shape) in KERNELS and module.kernel in ((), place.shape[2:])
        if place.shape in allowed or (kernel and (place.shape[0], math.prod(place.shape[1:])) == sizes):
            return True
        product = "x".join(map(str, allowed[0]))
        what = f"{module.name}: B A is {product}, but the model's {place.name} is {dims(place.shape)}"
        hint = self._places.its_model()
        if _is_of_tokens(place):
            hint += "; if it was given tokens before, give it those first (resize_token_embeddings in transformers)"
        self._places.refuse(what, hint)
        return False

    def _usually_turned(self, settled: Iterable[tuple[AdaptedModule, TensorInfo]]) -> bool:
        """Whether square matrices have their inputs first: as those do whose shape tells, else as the configs say."""
        told = [place.shape == (module.inputs, module.outputs) for module, place in settled
                if module.inputs != module.outputs and not module.embedding]  # fmt: skip
        return any(told) if told else self._adapter.transposed or self._config.get("model_type") in TRANSPOSED_MODELS

    def _transposed(self, module: AdaptedModule, place: TensorInfo, usual: bool) -> bool:
        if module.embedding or module.inputs != module.outputs:
            return place.shape == (module.inputs, module.outputs)
        return usual

    def _bias(self, module: AdaptedModule, found: dict[str, Change]) -> None:
        if module.bias is None:
            return
        place = self._places.place(f"{module.name}.bias", module.bias)
        if place is not None and self._can_replace(place, module.bias):
            found[place.name] = replace(found.get(place.name, Change()), added=module.bias, scale=module.scale)


def _misfit(held: AdaptedParameters, homes: Mapping[str, Home]) -> str:
    """That no pair of matrices is of the shape that a parameter needs."""
    pairs = " and ".join(f"A {dims(a.shape)} with B {dims(b.shape)}" for a, b in held.pairs)
    needs = [f"{name} of rank {held.named[name][0]}, {dims(homes[name].shape)}" for name in held.named if name in homes]
    return f"{held.module}: {pairs} do not fit the model's {' and '.join(needs)}"


def _is_of_tokens(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 2 and (is_embedding(tensor.name) or is_head(tensor.name))
