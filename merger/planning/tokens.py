"""Which tokens the result knows, and for each model which rows of which embeddings stand for them.

Not here: which tokens a tokenizer's files hold (models.vocabulary), where a row comes from (inputs.new_rows), and
reading them (engine.inputs.readers).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from merger.errors import MismatchError, ModelError, Problem, RecipeError
from merger.lock.locked import LockedModel
from merger.models import vocabulary
from merger.models.architecture import is_embedding, is_head
from merger.models.checkpoint import TensorInfo
from merger.models.vocabulary import Json, Vocabulary
from merger.planning.inputs.base import Input, StageTensor, Stored
from merger.planning.inputs.new_rows import Filling
from merger.planning.inputs.rows import Pursuit, RowMap, RowPairs, Rows
from merger.planning.stage_model import StagedRecipe
from merger.recipe.blocks.tokenizer import BASE, UNION
from merger.recipe.model import ModelRef, Tokenizer

_SAVE = "save it with transformers, whose save_pretrained writes tokenizer.json"
_DAMAGED = "download the model again, or ask its author"


@dataclass(frozen=True)
class Tokens:
    """The result's vocabulary, and what stands for it in each model.

    Args:
        source: the number of the model whose tokenizer the result takes.
        added: what its tokenizer.json must say of each added token; None: its files stay as they are.
        new: how many of them it does not know yet.
        rows: how many rows embedding and head have.
        cut: how many rows of that model, behind the last token, have no place in the result.
        k: how many rows a pursued one is put together from, at most.
        maps: for each merged model, by its number, the rows that make the result's; leaves are numbers of models.
        pairs: for the models of which rows are pursued, what they and the tokenizer's own model have in common.
        follow: for each id of the config model the result's, -1 for none; None: they are the same.
    """

    source: int
    added: tuple[Json, ...] | None
    new: int
    rows: int
    cut: int
    k: int
    maps: Mapping[int, RowMap] = field(repr=False)
    pairs: Mapping[int, RowPairs] = field(repr=False)
    follow: tuple[int, ...] | None = field(repr=False)

    def rows_of(self, locked: StagedRecipe, number: int, tensor: TensorInfo, as_head: bool) -> Input:
        """A model's tensor with the rows that the result's tokens have; any other tensor as it is.

        Args:
            as_head: whether the result's head is made of it.

        Raises:
            MismatchError: rows are to come from a model that has no such tensor.
        """
        model, own = locked.numbered(number), locked.source(number, tensor)
        seen = self.maps[number]
        same = seen.is_identity(number) and len(seen) == model.token_rows
        if not model.by_token(tensor):
            _must_fit(model, tensor, same)
            return own
        if same:
            return own
        others = [int(other) for other in np.unique(seen.tensors) if other != number]
        lent = [(other, _like(locked.numbered(other), model, tensor, as_head)) for other in others]
        parts = tuple(_rows_in(locked, *place) for place in ((number, tensor), *lent))
        known = Rows(parts, seen.among([number, *others]))
        if number not in self.pairs or len(tensor.shape) == 1:
            return known
        complete = _in_place_of(model, tensor, locked.numbered(self.source), as_head)
        if complete is None:
            return known
        return Pursuit(known, _rows_in(locked, self.source, complete), self.pairs[number], self.k)


def _rows_in(locked: StagedRecipe, number: int, tensor: TensorInfo) -> Stored | StageTensor:
    """The tensor as one of which rows are read, whatever their order."""
    source, model = locked.source(number, tensor), locked.numbered(number)
    if isinstance(source, Stored | StageTensor):
        return source
    why, hint = "is quantised", "take the model that it was quantised from, or leave out tokenizer:"
    if model.adapter is not None:
        why = "is changed by an adapter"
        hint = "put a document before this one that merges them by passthrough, and name that"
    what = f"{model.name}: {tensor.name} {why}, and its rows are to be put in another order"
    raise MismatchError(_about(model, what, hint))


def _must_fit(model: LockedModel, tensor: TensorInfo, same: bool) -> None:
    """Some tensors cannot follow the vocabulary: a head or an embedding of other rows, and unless it is the same, a row
    across all tokens.
    """
    if model.across_tokens(tensor) and not same:
        what = f"{model.name}: {tensor.name} is one row across all tokens, and its entries are not put in another order"
        raise MismatchError(_about(model, what, "take models of one vocabulary, without tokenizer:"))
    loose = model.architecture.place(tensor.name).stack is None
    if loose and len(tensor.shape) == 2 and (is_head(tensor.name) or is_embedding(tensor.name)):
        what = f"{model.name}: {tensor.name} has {tensor.shape[0]:,} rows, and the embedding {model.token_rows or 0:,}"
        raise MismatchError(_about(model, what, "leave out tokenizer: for such models"))


def _like(lender: LockedModel, model: LockedModel, tensor: TensorInfo, as_head: bool) -> TensorInfo:
    """The tensor of one model that is in the place of another's."""
    found = _in_place_of(model, tensor, lender, as_head)
    if found is None or found.shape[1:] != tensor.shape[1:]:
        has = f"none like {tensor.name}" if found is None else f"rows of {found.shape[-1]:,}, not {tensor.shape[-1]:,}"
        what = f"{model.name} is to take rows of tokens from {lender.name}, which has {has}"
        raise MismatchError(_about(lender, what, "only models of one architecture can lend each other rows"))
    return found


def _in_place_of(model: LockedModel, tensor: TensorInfo, other: LockedModel, as_head: bool) -> TensorInfo | None:
    """What a model has in the place of another one's tensor."""
    if as_head:
        return other.embedding if other.head is None or other.is_tied else other.head
    if tensor is model.embedding:
        return other.embedding
    found = other.checkpoint.tensors.get(tensor.name)
    if found is None and model.architecture.predicts(tensor.name):  # a copy of the model's own, from where it began
        return other.embedding if is_embedding(tensor.name) or other.head is None else other.head
    return found


def _about(model: LockedModel, what: str, hint: str) -> Problem:
    return Problem(what, model.ref.at, f"models[{model.ref}]", hint)


def tokens(locked: StagedRecipe) -> Tokens | None:
    """What the recipe's tokenizer block brings about; None where there is none.

    Raises:
        ModelError: a model's tokenizer cannot be read.
        MismatchError: a model has no embedding of which the rows are known.
        RecipeError: the block asks for tokens that its models do not have.
    """
    block = locked.recipe.tokenizer
    if block is None:
        return None
    known = _read_vocabularies(locked)
    source = locked.index(block.source if isinstance(block.source, ModelRef) else locked.recipe.config_model)
    spelled = {number: held.spelled(known[source].spelling) for number, held in known.items()}
    whole = _whole(locked, block, spelled, source)
    new = len(whole.ids) - len(known[source].ids)
    if new and vocabulary.TOKENIZER not in locked.numbered(source).tokenizer_model.texts:
        what = (
            f"{locked.numbered(source).name} has no {vocabulary.TOKENIZER}, so no tokens can be added to its tokenizer"
        )
        raise ModelError(Problem(what, block.at, "tokenizer", _SAVE))
    filling = Filling(locked, block, spelled, whole, source)
    config_model = locked.index(locked.recipe.config_model)
    if block.rows == BASE and source != config_model:
        what = f"the base model is {locked.config_model.name}, and the tokenizer that of {locked.numbered(source).name}"
        hint = "leave out rows: base; pad_to_multiple_of: 64 gives rows that no token uses"
        raise RecipeError(Problem(what, block.at, "tokenizer.rows", hint))
    return Tokens(
        source=source,
        added=tuple(whole.added.values()) if new or whole.added.keys() != known[source].added.keys() else None,
        new=new,
        rows=filling.rows,
        cut=filling.cut,
        k=block.k,
        maps={number: filling.map(number) for number in filling.merged},
        pairs={number: found for number in filling.merged if (found := filling.pairs(number)) is not None},
        follow=None if source == config_model else tuple(whole.rows(spelled[config_model].tokens, whole.size).tolist()),
    )


def _read_vocabularies(locked: StagedRecipe) -> dict[int, Vocabulary]:
    """Each model's vocabulary, by its number; all must have one, and an embedding of its tokens."""
    models = [locked.numbered(number) for number in locked.own]
    found = dict(zip(locked.own, _vocabularies(models), strict=True))
    lacking = [locked.numbered(number) for number, held in found.items() if held is None]
    if lacking:
        raise ModelError(_about(model, f"{model.name} has no tokenizer.json", _SAVE) for model in lacking)
    rowless = [model for model in models if model.token_rows is None]
    if rowless:
        hint = "leave out tokenizer: for such models"
        raise MismatchError(
            _about(model, f"{model.name} has no embedding that has a row for each token", hint) for model in rowless
        )
    return {number: held for number, held in found.items() if held is not None}


def _vocabularies(models: Sequence[LockedModel]) -> list[Vocabulary | None]:
    """The models' vocabularies, equal files read once; None where a tokenizer is not of a kind that is read.

    Raises:
        ModelError: with every tokenizer that is damaged.
    """
    texts = [
        {name: text for name, text in model.tokenizer_model.texts.items() if name in vocabulary.FILES}
        for model in models
    ]
    found: list[Vocabulary | None] = []
    problems = []
    for number, model in enumerate(models):
        try:
            same = texts.index(texts[number])
            found.append(found[same] if same < number else vocabulary.read_vocabulary(texts[number]))
        except ValueError as error:
            found.append(None)
            problems.append(_about(model, f"{model.name}: {error}", _DAMAGED))
    if problems:
        raise ModelError(problems)
    return found


def _whole(locked: StagedRecipe, block: Tokenizer, known: Mapping[int, Vocabulary], source: int) -> Vocabulary:
    merged = [locked.index(ref) for ref in locked.recipe.merged] if block.source == UNION else []
    others = [(known[number], locked.numbered(number).token_rows or 0) for number in merged]
    base = known[source]
    if vocabulary.TOKENIZER in locked.numbered(source).tokenizer_model.texts:
        base = vocabulary.special_as_in(base, others)
    try:
        return vocabulary.extend_tokenizer(base, others, [row.token for row in block.tokens])
    except ValueError as error:
        hint = "name another model's tokenizer: tokenizer: {source: org/name}"
        raise RecipeError(Problem(f"{locked.numbered(source).name}: {error}", block.at, "tokenizer", hint)) from None


def disagreements(models: Iterable[LockedModel]) -> dict[ModelRef, str]:
    """The models whose rows stand for other tokens than the first one's, and how that shows.

    Raises:
        ModelError: with every tokenizer that is damaged.
    """
    all_models = tuple(models)
    if all(model.tokenizer_model.texts == all_models[0].tokenizer_model.texts for model in all_models):
        return {}
    first, *others = _vocabularies(all_models)
    told = {}
    for model, held in zip(all_models[1:], others, strict=True):
        limit = min(one.token_rows or 0 for one in (all_models[0], model))
        if first is not None and held is not None and limit and not first.agrees(held, limit):
            told[model.ref] = _difference(all_models[0], first, model, held, limit)
    return told


def _difference(one: LockedModel, mine: Vocabulary, other: LockedModel, theirs: Vocabulary, limit: int) -> str:
    """The first row of which the two have different tokens, in words."""
    pairs = ((number, mine.tokens[number : number + 1], theirs.tokens[number : number + 1]) for number in range(limit))
    number, *found = next(pair for pair in pairs if (pair[1] or (None,)) != (pair[2] or (None,)))
    here, there = (repr(held[0]) if held and held[0] is not None else "no token" for held in found)
    return f"row {number} is {here} in {one.name} and {there} in {other.name}"
