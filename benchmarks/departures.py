"""Recipes on which we do another thing than mergekit on purpose, and what each of the two makes of them.

Not here: why (the methods' docstrings, docs/mergekit.md), and where the two agree (parity).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree
from typing import Any, Literal

import torch
from models import read
from safetensors.torch import save_file
from side_by_side import ours, theirs
from torch import Tensor

from merger.errors import MergerError

Change = Callable[[Tensor, Tensor], Tensor]
"""From the base's tensor and a fine-tune's to what stands in for the fine-tune's."""


@dataclass(frozen=True)
class Departure:
    """A method, what its models are, the settings of each and its own, and of what norm the result is told.

    Args:
        method: the merge method.
        told: the recipe in words.
        changes: what the fine-tune becomes, for each model.
        settings: the method's own settings.
        each: the settings of each model.
        norm: of the merged tensors, or of their difference from the base's.
        base: whether the recipe names the base model.
    """

    method: str
    told: str
    changes: Sequence[Change]
    settings: Mapping[str, Any] = field(default_factory=dict)
    each: Sequence[Mapping[str, Any]] = ({}, {}, {})
    norm: Literal["whole", "change"] = "change"
    base: bool = True


def tuned(scale: float = 1.0) -> Change:
    """The fine-tune, its change multiplied by a number."""
    return lambda base, tune: base + scale * (tune - base)


def times(factor: float) -> Change:
    """The base, multiplied by a number."""
    return lambda base, tune: factor * base


ALL: Sequence[Departure] = (
    Departure("linear", "weights 1 and -1", (tuned(), tuned()), each=({"weight": 1}, {"weight": -1}), base=False),
    Departure("slerp", "a model and its negative, t: 0.5", (times(-1),), {"t": 0.5}, norm="whole"),
    Departure("slerp", "a model and zeros, t: 0.5", (times(0),), {"t": 0.5}, norm="whole"),
    Departure("nuslerp", "a model and its negative", (times(1), times(-1)), {"weight": 1}, norm="whole", base=False),
    Departure("multislerp", "three models that changed nothing", (times(1),) * 3, {"weight": 1}, norm="whole"),
    Departure("breadcrumbs", "density: 0.00001, less than an entry", (tuned(),), {"weight": 1, "density": 1e-5}),
    Departure("della", "density: 0.9, epsilon as it is", (tuned(),), {"weight": 1, "density": 0.9}),
    Departure("sce", "a change at a tenth and three tenths of its size", (tuned(0.1), tuned(0.3))),
    Departure("sce", "select_topk: 0.00001, less than an entry", (tuned(), tuned(0.5)), {"select_topk": 1e-5}),
    Departure("model_stock", "a change, and its opposite twice", (tuned(), tuned(-1), tuned(-1))),
    Departure("model_stock", "one change twice, at a ten-thousandth of its size", (tuned(1e-4), tuned(1e-4))),
    Departure("nearswap", "a model less than 0.0000005 away, t: 0.0000005", (tuned(1e-5),), {"t": 5e-7}),
)


def rows(parents: Sequence[Path], work: Path, only: Sequence[str] | None = None) -> Iterator[str]:
    """A row for each departure."""
    for place, departure in enumerate(ALL):
        if not only or departure.method in only:
            given = [parents[0], *_changed(departure, parents, work / str(place))]
            recipe = _recipe(departure, given)
            told = [_told(departure, given, work / str(place), recipe, run) for run in (theirs, _ours)]
            line = f"| {departure.method}: {departure.told} | {' | '.join(told)} |"
            print(line, flush=True)
            yield line


def _changed(departure: Departure, parents: Sequence[Path], work: Path) -> Iterator[Path]:
    """The fine-tunes' folders, with changed tensors."""
    base = read(parents[0])
    for place, change in enumerate(departure.changes):
        folder = copytree(parents[1], work / f"model-{place}", ignore=lambda *_: ["part-00001.safetensors"])
        held = {name: change(base[name], tensor).contiguous() for name, tensor in read(parents[1]).items()}
        save_file(held, folder / "part-00001.safetensors", metadata={"format": "pt"})
        yield folder


def _recipe(departure: Departure, parents: Sequence[Path]) -> dict[str, Any]:
    listed = [
        {"model": str(folder), "parameters": dict(own)}
        for folder, own in zip(parents[1:], departure.each, strict=False)
    ]
    made: dict[str, Any] = {"merge_method": departure.method, "models": listed, "dtype": "float32"}
    if departure.base:
        made["base_model"] = str(parents[0])
    return made | ({"parameters": dict(departure.settings)} if departure.settings else {})


def _ours(recipe: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    return ours(recipe, folder)[1]


def _told(
    departure: Departure, parents: Sequence[Path], folder: Path, recipe: Mapping[str, Any], run: Callable[..., Any]
) -> str:
    """What comes out, in a few words."""
    try:
        made = _joined(run(recipe, folder))
    except MergerError as error:
        return f"refused: {error.problems[0].what}"
    except RuntimeError as error:
        return f"fails: {str(error).strip().splitlines()[-1].split('. ')[0]}"
    if not made.isfinite().all():
        return f"{100 * float((~made.isfinite()).float().mean()):.0f} % of the entries are not finite"
    base = _joined(read(parents[0]))
    if departure.norm == "whole":
        return f"norm {float(made.norm() / base.norm()):.4f}"
    return f"norm of the change {float((made - base).norm() / (_joined(read(parents[1])) - base).norm()):.4f}"


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries of a model, in float64."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
