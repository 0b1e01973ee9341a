"""One class of models put to the trial: merged, and stacked, and each time loaded by transformers.

Not here: which classes (cases), and the page (page).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import merging
import tiny
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, ModuleList

from architectures.cases import Case
from merger.errors import MergerError
from merger.models.architecture import Architecture


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
    """Two models of a class that have nothing in common, and their tensors as saved; the first one as it was made."""

    case: Case
    folders: tuple[Path, Path]
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]]
    first: transformers.PreTrainedModel
    computed: Tensor

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.tensors[0], _config(self.folders[0]))


def tried(case: Case, folder: Path) -> Row:
    """Everything that is tried with a class; models are written below `folder`.

    Raises:
        AssertionError: a tensor is lost, added, renamed, re-initialised or wrong, or the model computes otherwise.
    """
    pair = _pair(case, folder)
    _linear(pair, folder / "linear")
    stacks = pair.architecture.stacks
    told = {stack: _stacked(pair, stack, folder / f"stacked-{number}") for number, stack in enumerate(stacks)}
    return Row(case.model, told, len(pair.tensors[0]))


def _pair(case: Case, folder: Path) -> _Pair:
    """The first as transformers saves it, the other with other numbers in every tensor that is trained."""
    one, other = folder / "one", folder / "other"
    made = case.make(1)
    made.save_pretrained(one)
    first = {**tiny.read(one), **_behind(case, tiny.read(one))}
    draw = torch.Generator().manual_seed(2)
    second = {name: _redrawn(tensor, draw) for name, tensor in first.items()}
    shutil.copytree(one, other)
    for place, held in ((one, first), (other, second)):
        save_file(held, place / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        return _Pair(case, (one, other), (first, second), made, made(**case.inputs())[0])


def _redrawn(tensor: Tensor, draw: torch.Generator) -> Tensor:
    moved = 0.1 * torch.randn(tensor.shape, generator=draw)
    return tensor + moved.to(tensor.dtype) if tensor.is_floating_point() else tensor


def _behind(case: Case, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer of multi-token prediction: built as the last one, with a projection before it."""
    last = "model.layers.3."
    roles = {name.removeprefix(last): tensor for name, tensor in held.items() if name.startswith(last)}
    more = {"eh_proj.weight": torch.ones(16, 32), **roles}
    return {f"{case.behind}.{role}": tensor.clone() for role, tensor in more.items()} if case.behind else {}


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
    before = _config(pair.folders[0])
    assert _config(out) == (before if pair.case.behind else _without_prediction(before))


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
    behind = f"{stack}.{architecture.stacks[stack]}."
    rest = {name.replace(behind, f"{stack}.{len(layers)}."): name for name in held[pair.folders[0]]
            if architecture.place(name).stack != stack}  # fmt: skip
    assert set(merged) == whole | rest.keys()
    for name, old in rest.items():
        of_all = _of_all_layers(old, merged[name], pair.tensors[0][old], layers)
        assert any(torch.equal(merged[name], each) for each in (of_all, *(held[old] for held in pair.tensors))), name
    loaded = load(pair.case, out)
    check_built(pair.first, loaded, [old for _, old in layers])
    with torch.no_grad():
        ours = loaded(**pair.case.inputs())[0]
    assert torch.isfinite(ours).all()
    assert not torch.allclose(ours, pair.computed, atol=1e-3)


def check_built(before: Module, after: Module, layers: Sequence[int]) -> None:
    """Each layer of the model is built as the one it was taken from: of the same parts and words, its number apart.

    Args:
        before: a model; `after`: that of which one stack has the layers with these numbers in the first.
    """
    lists = {path: (module, after.get_submodule(path)) for path, module in before.named_modules()
             if isinstance(module, ModuleList)}  # fmt: skip
    grown = {path: (old, new) for path, (old, new) in lists.items() if len(new) == len(layers) != len(old)}
    assert grown
    for path, (old, new) in grown.items():
        for place, layer in enumerate(layers):
            expected, found = _traits(old[layer]), _traits(new[place])
            assert expected.keys() == found.keys()
            for name, value in found.items():
                assert value == expected[name] or (value, expected[name]) == (place, layer), (path, place, name, value)
    listed, counts = dict(_lists(before.config.to_dict())), {len(old) for old, _ in grown.values()}
    for key, found in _lists(after.config.to_dict()):
        if len(found) == len(layers) and len(listed.get(key, ())) in counts and found != list(range(len(layers))):
            assert found == [listed[key][layer] for layer in layers], key


def _traits(layer: Module) -> dict[str, Any]:
    """What a layer is made of: its parts' classes, and the words and numbers that they hold, but for training."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[name] = type(module)
        found |= {f"{name}.{key}": value for key, value in vars(module).items()
                  if isinstance(value, bool | int | float | str | None) and key != "drop_prob"}  # fmt: skip
    return found


def _lists(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """A config's lists, and those of its parts."""
    for key, value in config.items():
        if isinstance(value, list):
            yield f"{path}{key}", value
        elif isinstance(value, dict):
            yield from _lists(value, f"{path}{key}.")


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
    """The model as transformers loads it, once it has found no fault with any name or shape.

    What lies in the place that the config gives to layers of multi-token prediction is for other programs.
    """
    model, found = getattr(transformers, case.model).from_pretrained(folder, output_loading_info=True)
    config = _config(folder)
    behind = case.behind and case.behind.replace("layers.4", f"layers.{config['num_hidden_layers']}")
    found["unexpected_keys"] = [name for name in found["unexpected_keys"] if not name.startswith(f"{behind}.")]
    assert {kind: names for kind, names in found.items() if names} == {}
    return model.eval()


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def _without_prediction(config: dict[str, Any]) -> dict[str, Any]:
    """transformers saves none of a model's layers of multi-token prediction, and counts them in its config."""
    counted = config.keys() & {"num_nextn_predict_layers", "mtp_num_hidden_layers"}
    return {**config, **dict.fromkeys(counted, 0)}
