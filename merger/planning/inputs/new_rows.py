"""Where a row for each of the result's tokens comes from, for each model.

    its own row     where the model has the token
    else            the row that the recipe names; that of the one model which has it; the base model's; the mean of
                    those that have it; and for a token that no merged model has, what `missing` says

Rows that pad the vocabulary are the base model's own where they are kept (`rows: base`), else the mean of the model's
rows. Not here: reading rows (engine.inputs.readers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from merger.errors import ModelError, Problem, RecipeError
from merger.models.tokenizer_files import split_tokens
from merger.models.vocabulary import TOKENIZER, Vocabulary
from merger.planning.inputs.rows import ALL_ROWS, Numbers, RowMap, RowPairs
from merger.planning.stage_model import StagedRecipe
from merger.recipe.blocks.tokenizer import BASE
from merger.recipe.model import Tokenizer, TokenOf, TokenRow

_SEVERAL, _ZEROS, _NOBODY = -1, -2, -3
_TOKENS_SHOWN = 8


@dataclass(frozen=True)
class _Means:
    """Rows that are means of several: which rows, of how many each, and those one after the other."""

    places: Numbers
    counts: Numbers
    tensors: Numbers
    rows: Numbers


@dataclass(frozen=True)
class Filling:
    """Finds the rows.

    Args:
        locked: the recipe and its models.
        block: the recipe's tokenizer block.
        known: each model's vocabulary, in one spelling.
        whole: the result's.
        source: the number of the model whose tokenizer the result takes.
    """

    locked: StagedRecipe
    block: Tokenizer
    known: Mapping[int, Vocabulary]
    whole: Vocabulary
    source: int

    @property
    def rows(self) -> int:
        """How many rows the result has: its tokens, and what pads them."""
        step = self.block.pad_to_multiple_of
        return -(-max(self.whole.size, self._kept.stop) // step) * step

    @property
    def cut(self) -> int:
        """How many rows the tokenizer's own model has behind its last token, if it is merged and they are not kept."""
        if self.block.rows == BASE or self.source not in self.merged:
            return 0
        return max(0, (self.locked.numbered(self.source).token_rows or 0) - self.known[self.source].size)

    @property
    def _kept(self) -> range:
        """The rows behind the result's last token that are the base model's, whose tokenizer it then is."""
        rows = self.locked.numbered(self.source).token_rows or 0
        return range(self.whole.size, rows if self.block.rows == BASE else 0)

    @cached_property
    def merged(self) -> tuple[int, ...]:
        """The numbers of the merged models."""
        return tuple(self.locked.index(ref) for ref in self.locked.recipe.merged)

    @cached_property
    def own(self) -> Numbers:
        """For each merged model, and each of the result's rows, the model's own row; -1 where it has none."""
        found = np.full((len(self.merged), self.rows), -1, dtype=np.int64)
        for place, number in enumerate(self.merged):
            found[place, : self.whole.size] = self._own(number)
        return found

    def _own(self, number: int) -> Numbers:
        """A model's rows for the result's tokens; of the source also those that belong to no token."""
        limit = self.locked.numbered(number).token_rows or 0
        found = self.known[number].rows(self.whole.tokens, limit)
        if number == self.source:
            unused = [place for place, token in enumerate(self.whole.tokens[:limit]) if token is None]
            found[unused] = unused
        return found

    @cached_property
    def _lent(self) -> tuple[Numbers, Numbers]:
        """For each row the model, and its row, that stand in where a model has none of its own."""
        counts = (self.own >= 0).sum(axis=0)
        tensors, rows = np.where(counts > 1, _SEVERAL, _NOBODY), np.full(self.rows, 0, dtype=np.int64)
        alone = np.flatnonzero(counts == 1)
        first = (self.own[:, alone] >= 0).argmax(axis=0)
        tensors[alone], rows[alone] = np.array(self.merged)[first], self.own[first, alone]
        base = self.locked.recipe.base_model or self.locked.recipe.slices[0].base_model
        if base is not None:
            number = self.locked.index(base)
            theirs = self.own[self.merged.index(number)]
            tensors[theirs >= 0], rows[theirs >= 0] = number, theirs[theirs >= 0]
        return tensors, rows

    @cached_property
    def _named(self) -> Mapping[int, tuple[int, int, bool]]:
        """What the recipe says of a row: the model, or zeros; its row there; and whether it holds for all models."""
        problems: list[Problem] = []
        found = {
            self.whole.ids[row.token]: (*_place(self, row, row.source, problems), row.force)
            for row in self.block.tokens
            if row.source is not None
        }
        if problems:
            raise RecipeError(problems)
        return found

    def map(self, number: int) -> RowMap:
        """The rows that make the result's, as this model sees them; leaves are numbers of models."""
        tensors, rows = self._single(number)
        nobody = np.flatnonzero(tensors == _NOBODY)
        tokens = nobody[nobody < self.whole.size]
        split = _subwords(self, number, tokens if self.block.missing == "subword" else tokens[:0])
        given = {"zero": tokens, "subword": split.places, "omp": self._to_pursue(tokens)}
        averaged = np.setdiff1d(nobody, given.get(self.block.missing, tokens[:0]))
        tensors[averaged], rows[averaged] = number, ALL_ROWS
        return _row_map(tensors, rows, [self._several(np.flatnonzero(tensors == _SEVERAL)), split])

    def _single(self, number: int) -> tuple[Numbers, Numbers]:
        """For each row the model and its row, where it is a single one."""
        mine = self.own[self.merged.index(number)]
        tensors, rows = (part.copy() for part in self._lent)
        tensors[mine >= 0], rows[mine >= 0] = number, mine[mine >= 0]
        kept = np.array(self._kept, dtype=np.int64)
        tensors[kept], rows[kept] = self.source, kept
        for place, (model, row, forced) in self._named.items():
            if forced or mine[place] < 0:
                tensors[place], rows[place] = model, row
        return tensors, rows

    def _several(self, places: Numbers) -> _Means:
        """The means of all models that have the token."""
        has = self.own[:, places] >= 0
        token, model = np.nonzero(has.T)
        return _Means(places, has.sum(axis=0), np.array(self.merged)[model], self.own[model, places[token]])

    def _to_pursue(self, tokens: Numbers) -> Numbers:
        """Those tokens that the tokenizer's own model has a row for."""
        return tokens[self._theirs[tokens] >= 0]

    @cached_property
    def _theirs(self) -> Numbers:
        """For each of the result's tokens the row in the tokenizer's own model, -1 where it has none."""
        return self.known[self.source].rows(self.whole.tokens, self.locked.numbered(self.source).token_rows or 0)

    def pairs(self, number: int) -> RowPairs | None:
        """For `missing: omp`, what this model and the tokenizer's have in common, and what it lacks; None: nothing."""
        tensors, _ = self._single(number)
        wanted = self._to_pursue(np.flatnonzero(tensors[: self.whole.size] == _NOBODY))
        if self.block.missing != "omp" or not len(wanted):
            return None
        mine = self.own[self.merged.index(number), : self.whole.size]
        both = np.flatnonzero((mine >= 0) & (self._theirs >= 0))
        if not len(both):
            one, other = (self.locked.numbered(each).name for each in (number, self.source))
            what = f"{one} and {other} have no token in common, so omp has nothing to go by"
            hint = "write missing: subword or mean, or take another tokenizer"
            raise RecipeError(Problem(what, self.block.at, "tokenizer.missing", hint))
        return RowPairs(mine[both], self._theirs[both], wanted, self._theirs[wanted])


def _place(filling: Filling, row: TokenRow, source: TokenOf | str, problems: list[Problem]) -> tuple[int, int]:
    if not isinstance(source, TokenOf):
        return _ZEROS, 0
    number = filling.locked.index(source.model)
    model, held = filling.locked.numbered(number), filling.known[number]
    token = row.token if source.token is None else source.token
    found = held.ids.get(token, -1) if source.id is None else source.id
    if 0 <= found < (model.token_rows or 0):
        return number, found
    named = f"token {token!r}" if source.id is None else f"row {source.id}"
    what = f"{model.name} has no {named}" + ("" if found < 0 else f": its embedding has {model.token_rows:,} rows")
    added = ", ".join(list(held.added)[:_TOKENS_SHOWN]) or "none"
    hint = f"its added tokens: {added}" if found < 0 else "name a token by its text: token: TOKEN"
    problems.append(Problem(what, row.at, f"tokenizer.tokens.{row.token}", hint))
    return _ZEROS, 0


def _subwords(filling: Filling, number: int, places: Numbers) -> _Means:
    """The means of the pieces that the model's own tokenizer splits the tokens into."""
    model = filling.locked.numbered(number)
    text = model.tokenizer_model.texts.get(TOKENIZER)
    if not len(places):
        return _Means(places, places, places, places)
    if text is None:
        what = f"{model.name} has no {TOKENIZER} to split tokens by"
        raise ModelError(Problem(what, filling.block.at, "tokenizer.missing", "write missing: mean"))
    try:
        found = split_tokens(text, [filling.whole.tokens[place] or "" for place in places], filling.whole.spelling)
    except ValueError as error:
        what = f"{model.name}: {error}"
        raise ModelError(Problem(what, filling.block.at, "tokenizer.missing", "write missing: mean")) from None
    kept = [[row for row in of if row < (model.token_rows or 0)] for of in found]
    counts = np.array([len(of) for of in kept])
    rows = np.array([row for of in kept for row in of], dtype=np.int64)
    return _Means(places[counts > 0], counts[counts > 0], np.full(len(rows), number), rows)


def _row_map(tensors: Numbers, rows: Numbers, means: Sequence[_Means]) -> RowMap:
    """The map of single rows, where a tensor's number is given, and of means."""
    counts = np.where(tensors >= 0, 1, 0)
    for mean in means:
        counts[mean.places] = mean.counts
    starts = np.concatenate([[0], np.cumsum(counts)])
    all_tensors, all_rows = (np.empty(starts[-1], dtype=np.int64) for _ in range(2))
    single = tensors >= 0
    all_tensors[starts[:-1][single]], all_rows[starts[:-1][single]] = tensors[single], rows[single]
    for mean in means:
        within = np.arange(len(mean.rows)) - np.repeat(np.cumsum(mean.counts) - mean.counts, mean.counts)
        at = np.repeat(starts[mean.places], mean.counts) + within
        all_tensors[at], all_rows[at] = mean.tensors, mean.rows
    return RowMap(starts, all_tensors, all_rows)
