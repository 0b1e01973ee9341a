"""Finds a model's tensors under the names that another class of models gives them: by layer, role and tower.

A class with a vision tower, its language model's own class, and the files as they were published put other words around
one and the same stack of layers. Not here: what is done with a tensor that was found (adapter).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from merger.models.architecture import is_embedding, parse_place

_TOWER = re.compile(
    r"(?:(?P<reads>language|text|llm)|(?P<sees>vision|visual|image|vit)|(?P<hears>audio|speech))"
    r"(?:_(?:model|tower|encoder|backbone))?"
)
_SIDE = frozenset(("encoder", "decoder", "text_encoder", "text_decoder"))
_SAYS_NOTHING = "model"
_PREFIX = 3
"""As many words a class may put before the names of another's."""

_MOST = 64
"""Where more modules are alike by their names, none of them is meant; real models have a handful."""

Shape = tuple[int, ...]
_Part = tuple[int | None, str]
"""The layer of a tensor, if it is in a stack, and its role."""
_Place = tuple[str, str | None, bool]
"""A module's place, its sense, and whether that is the whole place, without first words that were left out."""


@dataclass(frozen=True)
class _Module:
    """A stack of layers, or a module that is in none.

    Args:
        words: its name.
        sense: what its tower does (reads, sees, hears), as far as that can be told.
        in_tower: whether its name says that.
        place: the rest of the name: of a tower what follows it, else all of it.
        parts: the names of its tensors and their shapes.
    """

    words: frozenset[str]
    sense: str | None
    in_tower: bool
    place: str
    parts: dict[_Part, tuple[str, Shape | None]]

    @property
    def shorter(self) -> Iterator[str]:
        """Its place in classes that lack the first words of its name; a tower's words, and a side's, are all needed."""
        words = self.place.split(".")
        for dropped in range(1, 1 if self.in_tower else min(len(words), _PREFIX + 1)):
            if not _SIDE.intersection(words) or _SIDE.intersection(words[dropped:]):
                yield ".".join(words[dropped:])

    def holds(self, other: _Module) -> bool:
        """Whether each of another's tensors is there, and of its size, whichever way round."""
        return all(
            part in self.parts and (shape is None or sorted(shape) == sorted(self.parts[part][1] or ()))
            for part, (_, shape) in other.parts.items()
        )


def counterparts(wanted: Mapping[str, Shape | None], held: Mapping[str, Shape]) -> Mapping[str, Sequence[str]]:
    """The names in a model's files of tensors that another class calls otherwise: one, none, or several it could be.

    A module is found by its whole name; else by what its name says after the tower, be it `language_model.model` or
    nothing at all, and never in a tower of another sense. Of several those with most words in common are taken, and of
    these those that hold all that is wanted of the module.

    Args:
        wanted: the other class's names and the tensors' shapes, None where these need not be the model's.
        held: the tensors in the files.
    """
    theirs, ours = _modules(wanted), _modules(held)
    places: dict[_Place, list[_Module]] = defaultdict(list)
    for module in ours.values():
        places[module.place, module.sense, True].append(module)
        for place in module.shorter:
            places[place, module.sense, False].append(module)
    found: dict[str, Sequence[str]] = {}
    for path, module in theirs.items():
        homes = [ours[path]] if path in ours else _homes(module, places)
        for part, (name, _) in module.parts.items():
            found[name] = [home.parts[part][0] for home in homes if part in home.parts]
    return found


def sees_or_hears(name: str) -> bool:
    """Whether a tensor belongs to a tower for pictures or sounds."""
    told = (_TOWER.fullmatch(word) for word in name.split("."))
    return any(found.lastgroup != "reads" for found in told if found)


def _homes(module: _Module, places: Mapping[_Place, Sequence[_Module]]) -> Sequence[_Module]:
    """The model's modules that may be this one."""
    alike = list(islice(_alike(module, places), _MOST + 1))
    if not 0 < len(alike) <= _MOST:
        return []
    nearness = [(other.place == module.place, len(other.words & module.words)) for other in alike]
    nearest = [other for other, near in zip(alike, nearness, strict=True) if near == max(nearness)]
    return nearest if len(nearest) == 1 else [other for other in nearest if other.holds(module)]


def _alike(module: _Module, places: Mapping[_Place, Sequence[_Module]]) -> Iterator[_Module]:
    """The modules in the same place, in no tower of another sense; with the first words of one name left out, too."""
    for sense in (module.sense, None) if module.sense else (*_TOWER.groupindex, None):
        yield from places.get((module.place, sense, True), ())
        yield from places.get((module.place, sense, False), ())
        for place in module.shorter:
            yield from places.get((place, sense, True), ())


def _modules(tensors: Mapping[str, Shape | None]) -> dict[str, _Module]:
    """Stacks, and modules outside of them, by their names."""
    parts: dict[str, dict[_Part, tuple[str, Shape | None]]] = defaultdict(dict)
    for name, shape in tensors.items():
        told = parse_place(name)
        path, _, role = name.rpartition(".") if told.stack is None else (told.stack, "", told.role)
        parts[path][told.layer, role] = (name, shape)
    readers = {path.rpartition(".")[0] for path in parts if is_embedding(f"{path}.weight")}
    return {path: _module(path, of, path.rpartition(".")[0] in readers) for path, of in parts.items()}


def _module(path: str, parts: dict[_Part, tuple[str, Shape | None]], reads: bool) -> _Module:
    """What a module's name says; `reads` is whether a token embedding lies beside it."""
    words = path.split(".")
    towers = [(at, found.lastgroup) for at, word in enumerate(words, 1) if (found := _TOWER.fullmatch(word))]
    start, sense = towers[-1] if towers else (0, "reads" if reads else None)
    place = ".".join(word for word in words[start:] if word != _SAYS_NOTHING)
    return _Module(frozenset(words), sense, bool(towers), place, parts)
