"""Whether what is to be merged fits: tensors of one job, shares of layers, vocabularies; and what is said where not.

Not here: slices and layer ranges (slices).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from merger.models.architecture import is_embedding, is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.models.side_files import module_of
from merger.planning.inputs.base import Input
from merger.planning.inputs.derived import Stacked
from merger.planning.inputs.shares import Shares, shares
from merger.planning.jobs.common import Making, shape_text
from merger.planning.slices import Cut
from merger.planning.tokens import disagreements

_MISMATCHES_SHOWN = 3
_VOCABULARIES = ("/tokenizer.json", "/vocab.txt", "/vocab.json", ".model")
_ONE_KIND = "only models of one architecture and of equal sizes can be merged"
ONE_VOCABULARY = (
    "add tokenizer: {source: union} for the tokens of all models, or tokenizer: {source: base} for those of one"
)
_AND_ITS_ROWS = f"{ONE_VOCABULARY}; tokenizer: {{source: base, rows: base}} has as many rows as the base"


class Fit:
    """Whether the tensors of one job fit each other; of what does not, the first few times are told."""

    def __init__(self, making: Making) -> None:
        self._making = making
        self._shown: Counter[tuple[int, int]] = Counter()
        self._strangers: set[int] = set()

    def tell_missing(self, piece: Cut, names: Sequence[str], found: Sequence[TensorInfo | None]) -> None:
        """A part has no such tensor."""
        missing = next(number for number, tensor in enumerate(found) if tensor is None)
        part, leader = piece.parts[missing], piece.parts[piece.leader]
        if self._is_news(part.number, leader.number):
            what = f"{part.model.name} has no tensor {names[missing]}, which {leader.model.name} has"
            self._making.findings.about_part(what, part, "are they of one architecture, and saved in full?")

    def holds(self, piece: Cut, tensors: Sequence[TensorInfo], sources: Sequence[Input]) -> bool:
        """Whether shapes are equal and dtypes can be merged; a problem if not."""
        leading = tensors[piece.leader]
        for part, tensor, source in zip(piece.parts, tensors, sources, strict=True):
            if source.shape != sources[piece.leader].shape:
                if self._is_news(part.number, piece.parts[piece.leader].number):
                    self._tell_shapes(piece, part.number, tensor, leading)
                return False
            if tensor.dtype not in FLOATS:
                what = f"{part.model.name}: {tensor.name} is stored as {tensor.dtype}"
                hint = "such numbers are not merged: use the model's bfloat16, float16 or float32 version"
                self._making.findings.about_part(what, part, hint)
                return False
        return True

    def _tell_shapes(self, piece: Cut, number: int, tensor: TensorInfo, leading: TensorInfo) -> None:
        part = next(part for part in piece.parts if part.number == number)
        mine = f"{shape_text(leading)} in {piece.parts[piece.leader].model.name}"
        hint = "only tensors of one shape can be merged"
        if (is_embedding(tensor.name) or is_head(tensor.name)) and tensor.shape[1:] == leading.shape[1:]:
            if number in self._strangers:
                return
            hint = _AND_ITS_ROWS
        what = f"{tensor.name} is {mine}, but {shape_text(tensor)} in {part.model.name}"
        self._making.findings.about_part(what, part, hint)

    def tell_vocabularies(self, first: Cut, last: Cut) -> None:
        """Without a tokenizer block each row of embedding and head must be the same token's in all models."""
        givers = {part.number: part for piece in (first, last) for part in piece.parts}
        config_model = self._making.locked.config_model
        for part in givers.values():
            spoken = [name for name in part.model.pipeline if module_of(name) and name.endswith(_VOCABULARIES)]
            if others := [name for name in spoken if part.model.differs_in(name, config_model)]:
                what = f"{', '.join(others)} differs from that of {config_model.name}"
                hint = "a row must be the same token's in both: save both with one tokenizer"
                self._making.findings.about_part(what, part, hint)
        if self._making.tokens is None:
            told = disagreements([self._making.locked.config_model, *(part.model for part in givers.values())])
            for part in givers.values():
                if part.model.ref in told:
                    self._strangers.add(part.number)
                    what = f"the vocabularies differ: {told[part.model.ref]}"
                    self._making.findings.about_part(what, part, ONE_VOCABULARY)

    def _is_news(self, one: int, other: int) -> bool:
        """Whether this is among the first few mismatches of two models: one fault tends to show in every layer."""
        self._shown[one, other] += 1
        return self._shown[one, other] <= _MISMATCHES_SHOWN


def layers_of(making: Making, cuts: Sequence[Cut], place: int, name: str, found: Shares) -> Stacked | None:
    """The shares of the layers that the sources of this place give; None, and a problem, where they do not fit."""
    taken = [(piece.parts[place], piece.starts[place] + step) for piece in cuts for step in range(piece.layers)]
    givers = list({part.number: part for part, _ in taken}.values())
    held = [part.model.checkpoint.tensors.get(name) for part in givers]
    rest = {(*tensor.shape[: found.axis], *tensor.shape[found.axis + 1 :]) for tensor in held if tensor is not None}
    for part, tensor in zip(givers, held, strict=True):
        if tensor is None or shares(part.model, tensor) != found or len(rest) > 1:
            shapes = " and ".join(shape_text(tensor) for tensor in held if tensor is not None)
            making.findings.about_part(f"{name} does not fit in all models: {shapes}", part, _ONE_KIND)
            return None
        by_token = making.tokens is None and part.model.by_token(tensor)
        if by_token and (told := disagreements([making.locked.config_model, part.model])):
            what = f"the vocabularies differ: {told[part.model.ref]}"
            making.findings.about_part(what, part, ONE_VOCABULARY)
            return None
    numbers = [part.number for part in givers]
    sources = tuple(making.source(*each, name) for each in zip(numbers, held, strict=True))  # type: ignore[arg-type]
    order = tuple((numbers.index(part.number), layer) for part, layer in taken)
    return Stacked(sources, order, found.axis, found.size or 0)


def tell_unshared(making: Making, unshared: Mapping[tuple[str, bool], Sequence[str]]) -> None:
    """A tensor that holds something of all layers must be that of the layers which are taken."""
    for (stack, known), names in unshared.items():
        if known:
            what = f"one tensor holds something for every layer of {stack}, and the recipe makes its parts unlike"
            hint = "give all slices one method, as many models and the same parameters"
        else:
            what = f"how the size depends on the layers of {stack} is not known here"
            hint = "take all layers of the models, in their order"
        at = making.locked.recipe.slices[0].at
        making.findings.about_recipe(f"{', '.join(names)}: {what}", at, "slices", hint)
