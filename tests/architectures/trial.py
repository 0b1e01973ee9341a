"""One class of models put to the trial: merged, merged with itself, stacked, and each time loaded by transformers.

Not here: which classes (cases), and the page (page).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import merging
import tiny
import torch
import transformers
from torch import Tensor

from architectures.cases import Case
from merger.checkpoints.architecture import Architecture
from merger.errors import MergerError


@dataclass(frozen=True)
class Row:
    """What came of a class.

    Args:
        model: the class's name.
        stacks: its stacks of layers, each with what came of changing its number of layers.
        tensors: how many tensors its file holds.
    """

    model: str
    stacks: Mapping[str, str]
    tensors: int


@dataclass(frozen=True)
class _Pair:
    """Two models of a class that have nothing in common, and their tensors as saved."""

    case: Case
    folders: tuple[Path, Path]
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]]

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.tensors[0])


def tried(case: Case, folder: Path) -> Row:
    """Everything that is tried with a class; models are written below `folder`.

    Raises:
        AssertionError: a tensor is lost, added, renamed, re-initialised or wrong, or the model computes otherwise.
    """
    pair = _pair(case, folder)
    _linear(pair, folder / "linear")
    _itself(pair, folder / "itself")
    stacks = pair.architecture.stacks
    told = {stack: _stacked(pair, stack, folder / f"stacked-{number}") for number, stack in enumerate(stacks)}
    return Row(case.model, told, len(pair.tensors[0]))


def _pair(case: Case, folder: Path) -> _Pair:
    one, other = folder / "one", folder / "other"
    for place, seed in ((one, 1), (other, 2)):
        case.make(seed).save_pretrained(place)
    return _Pair(case, (one, other), (tiny.read(one), tiny.read(other)))


def _linear(pair: _Pair, out: Path) -> None:
    """Each tensor is the mean of both, and the class loads them all under an unchanged config."""
    merged = merge(_mean(pair.folders), out)
    first, second = pair.tensors
    assert set(merged) == set(first)
    for name, found in merged.items():
        mean = (first[name].double() + second[name].double()) / 2
        expected = mean if first[name].is_floating_point() else first[name].double()
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-8), name
    load(pair.case, out)
    assert _config(out) == _without_prediction(_config(pair.folders[0]))


def _itself(pair: _Pair, out: Path) -> None:
    """A model merged with itself computes what the model computes, to the bit."""
    one = pair.folders[0]
    copy = out.parent / "copy"
    copy.symlink_to(one)
    merge(_mean((one, copy)), out)
    assert torch.equal(_computed(pair.case, out), _computed(pair.case, one))


def _stacked(pair: _Pair, stack: str, out: Path) -> str:
    """What became of the stack with other layers: how many it has now, or why that was refused."""
    count = pair.architecture.stacks[stack]
    if count < 2:
        return "one layer"
    first, second = pair.folders
    half = count // 2
    tries = {
        count + 1: [(first, 0, 2), (second, 1, count)],
        count + half: [(first, 0, half), (second, 0, half), (first, half, count)],
    }
    refused = ""
    for layers, ranges in tries.items():
        try:
            merged = merge(_recipe(pair, stack, ranges), out)
        except MergerError as error:
            refused = refused or f"refused: {error.problems[0].what.partition(': ')[2]}"
            continue
        _check(pair, stack, ranges, merged, out)
        return f"{layers} of {count}" + (f"; {count + 1} {refused}" if refused else "")
    return refused


def _check(
    pair: _Pair, stack: str, ranges: Sequence[tuple[Path, int, int]], merged: Mapping[str, Tensor], out: Path
) -> None:
    """Each layer is the one that was asked for, all else one model's; and the class loads it, and computes."""
    held = dict(zip(pair.folders, pair.tensors, strict=True))
    layers = [(held[model], layer) for model, start, end in ranges for layer in range(start, end)]
    architecture, whole = pair.architecture, set[str]()
    for new, (tensors, old) in enumerate(layers):
        for name in tensors:
            place = architecture.place(name)
            if (place.stack, place.layer) == (stack, old):
                whole.add(place.at_layer(new))
                assert torch.equal(merged[place.at_layer(new)], tensors[name]), name
    rest = {name for name in held[pair.folders[0]] if architecture.place(name).stack != stack}
    assert set(merged) == whole | rest
    for name in rest:
        of_all = _of_all_layers(name, merged[name], pair.tensors[0][name], layers)
        assert any(torch.equal(merged[name], each) for each in (of_all, *(held[name] for held in pair.tensors))), name
    assert Architecture(merged).stacks[stack] == len(layers)
    ours = _computed(pair.case, out)
    assert torch.isfinite(ours).all()
    assert not torch.allclose(ours, _computed(pair.case, pair.folders[0]), atol=1e-3)


def _of_all_layers(
    name: str, merged: Tensor, one: Tensor, layers: Sequence[tuple[Mapping[str, Tensor], int]]
) -> Tensor:
    """A tensor with something of every layer along the axis that has grown, as these layers have it."""
    grown = [axis for axis, (now, then) in enumerate(zip(merged.shape, one.shape, strict=True)) if now != then]
    if not grown:
        return one
    share = merged.shape[grown[0]] // len(layers)
    return torch.cat([held[name].split(share, grown[0])[layer] for held, layer in layers], grown[0])


# ---- recipes ---------------------------------------------------------------------------------------------------------


def _mean(folders: Sequence[Path]) -> str:
    models = "".join(f"  - {{model: {folder}, parameters: {{weight: 0.5}}}}\n" for folder in folders)
    return f"merge_method: linear\nmodels:\n{models}"


def _recipe(pair: _Pair, stack: str, ranges: Sequence[tuple[Path, int, int]]) -> str:
    slices = "".join(f"      - sources: [{{model: {model}, layer_range: [{a}, {b}]}}]\n" for model, a, b in ranges)
    name = stack if len(pair.architecture.stacks) > 1 else "default"
    return f"merge_method: passthrough\nmodules:\n  {name}:\n    slices:\n{slices}"


def merge(recipe: str, out: Path) -> dict[str, Tensor]:
    """The tensors that a recipe makes, in `out`."""
    merging.merged(recipe, out)
    return tiny.read(out)


# ---- transformers ----------------------------------------------------------------------------------------------------


def load(case: Case, folder: Path) -> transformers.PreTrainedModel:
    """The model as transformers loads it, once it has found no fault with any name or shape."""
    model, found = getattr(transformers, case.model).from_pretrained(folder, output_loading_info=True)
    assert {kind: names for kind, names in found.items() if names} == {}
    return model.eval()


def _computed(case: Case, folder: Path) -> Tensor:
    """What the model in a folder makes of the class's inputs."""
    with torch.no_grad():
        return load(case, folder)(**case.inputs())[0]


def _config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def _without_prediction(config: dict[str, object]) -> dict[str, object]:
    """transformers saves none of a model's layers of multi-token prediction, and counts them in its config."""
    counted = config.keys() & {"num_nextn_predict_layers", "mtp_num_hidden_layers"}
    return {**config, **dict.fromkeys(counted, 0)}
