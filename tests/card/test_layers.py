"""What the card's plots show, in numbers: distances from the parents and parameters in force, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

import merger
from merger.card.relations import OUTSIDE, Parameter, parameters, tracks
from merger.engine.execute import Observed
from merger.methods.registry import methods
from merger.planning.geometry import Geometry
from merger.planning.plan import Plan

STACK = "model.layers"
TASK = """\
merge_method: task_arithmetic
base_model: {0}/base
models: [{{model: {0}/one, parameters: {{weight: 0.75}}}}, {{model: {0}/two, parameters: {{weight: 0.5}}}}]
"""


def merged(tmp_path: Path, text: str) -> tuple[Plan, dict[str, Geometry]]:
    """A merge of three models in float32, and what was seen on the way."""
    for seed, name in enumerate(("base", "one", "two")):
        tiny.model(tmp_path / name, seed, dtype=torch.float32)
    (tmp_path / "mine.yaml").write_text(text.format(tmp_path))
    events: list[object] = []
    merger.merge(tmp_path / "mine.yaml", str(tmp_path / "out"), on_event=events.append)
    seen = {event.job.name: event.geometry for event in events if isinstance(event, Observed)}
    return merger.plan(tmp_path / "mine.yaml"), seen


def flat(folder: Path, within: str) -> Tensor:
    """The entries of all tensors whose name holds `within`, in float64."""
    return torch.cat([tensor.double().flatten() for name, tensor in tiny.read(folder).items() if within in name])


def test_distance_cosine_and_conflicts_are_those_of_the_files(tmp_path: Path) -> None:
    """Of the tensors as they lie on the disk, read and compared by torch alone."""
    found = {track.parent: track.layers for track in tracks(*merged(tmp_path, TASK))}
    assert list(found) == ["one", "two", "base"]
    base, out = flat(tmp_path / "base", "layers.1."), flat(tmp_path / "out", "layers.1.")
    for name in ("one", "two"):
        parent, seen = flat(tmp_path / name, "layers.1."), found[name][STACK, 1]
        assert seen.distance == pytest.approx(float((out - parent).norm() / parent.norm()), rel=1e-5)
        assert seen.cosine == pytest.approx(float(torch.cosine_similarity(out - base, parent - base, dim=0)), rel=1e-5)
        against = ((out - base) * (parent - base) < 0).double().mean()
        assert seen.conflict == pytest.approx(float(against), abs=1e-3)
    to_base = found["base"][STACK, 1]
    assert to_base.distance == pytest.approx(float((out - base).norm() / base.norm()), rel=1e-5)
    assert (to_base.cosine, to_base.conflict) == (None, None)


def test_without_a_base_whole_tensors_are_compared(tmp_path: Path) -> None:
    """Also of what lies outside of the layers."""
    text = "merge_method: linear\nmodels: [{{model: {0}/one}}, {{model: {0}/two}}]\nparameters: {{weight: 1}}\n"
    one, two = tracks(*merged(tmp_path, text))
    assert set(one.layers) == set(two.layers) == {OUTSIDE, (STACK, 0), (STACK, 1)}
    parent, out = flat(tmp_path / "one", "layers.0."), flat(tmp_path / "out", "layers.0.")
    assert one.layers[STACK, 0].cosine == pytest.approx(float(torch.cosine_similarity(out, parent, dim=0)), rel=1e-5)


def test_copies_are_no_distance(tmp_path: Path) -> None:
    """A stack of layers that are taken as they are has nothing to measure."""
    text = (
        "merge_method: passthrough\nslices:\n- sources: [{{model: {0}/one, layer_range: [0, 2]}}]\n"
        "- sources: [{{model: {0}/two, layer_range: [1, 2]}}]\n"
    )
    assert tracks(*merged(tmp_path, text)) == []


def in_force(tmp_path: Path, text: str, layers: int = 3) -> dict[str, Parameter]:
    """The parameters of a recipe over models of that many layers."""
    for seed, name in enumerate(("base", "one", "two")):
        tiny.model(tmp_path / name, seed, layers=layers)
    (tmp_path / "mine.yaml").write_text(text.format(tmp_path))
    planned = merger.plan(tmp_path / "mine.yaml")
    return {parameter.name: parameter for parameter in parameters(planned, methods())}


def test_what_is_the_same_everywhere_is_said_in_words(tmp_path: Path) -> None:
    """One number, or one for each parent; a flag as yes or no."""
    found = in_force(tmp_path, TASK)
    assert {name: parameter.words for name, parameter in found.items()} == {
        "weight": "0.75 for one, 0.5 for two", "normalize": "false", "lambda": "1",
    }  # fmt: skip


def test_gradients_and_filters_become_lines(tmp_path: Path) -> None:
    """A line for each group of kinds with the same values; what is outside of the layers joins one that it fits."""
    text = """\
merge_method: slerp
base_model: {0}/one
models: [{{model: {0}/one}}, {{model: {0}/two}}]
parameters:
  t: [{{filter: self_attn, value: [0, 1]}}, {{filter: up_proj, value: 0.25}}, {{value: 0.5}}]
"""
    found = in_force(tmp_path, text)["t"]
    assert found.words is None
    lines = {line.label: [line.values.get((STACK, layer)) for layer in range(3)] for line in found.lines}
    assert lines == {
        "input_layernorm, mlp.down_proj and 2 more": [0.5, 0.5, 0.5],
        "mlp.up_proj": [0.25, 0.25, 0.25],
        "self_attn": [0.0, 0.5, 1.0],
    }
    assert [line.values.get(OUTSIDE) for line in found.lines] == [0.5, None, None]


@pytest.mark.parametrize(("value", "course"), [
    ("[1, 0.5]", "1 to 0.5"),
    ("[0.5, 1]", "0.5 to 1"),
    ("[0, 1, 0]", "0 to 1 to 0"),
    ("0.3", "0.3"),
    ("[{{filter: mlp, value: [1, 0]}}, {{value: 0.5}}]",
     "0.5 (input_layernorm, post_attention_layernorm, self_attn); 1 to 0 (mlp)"),
])  # fmt: skip
def test_numbers_keep_their_order(value: str, course: str, tmp_path: Path) -> None:
    """From the first layer to the last, named where they turn."""
    text = "merge_method: slerp\nbase_model: {0}/one\nmodels: [{{model: {0}/one}}, {{model: {0}/two}}]\n"
    assert in_force(tmp_path, f"{text}parameters: {{{{t: {value}}}}}\n")["t"].course("") == course


def test_a_number_for_each_parent_is_a_line_for_each(tmp_path: Path) -> None:
    """Named by the parent, and where kinds differ by the kind as well."""
    text = """\
merge_method: ties
base_model: {0}/base
models:
- model: {0}/one
  parameters: {{weight: [0, 1], density: 0.5}}
- model: {0}/two
  parameters: {{weight: [{{filter: mlp, value: 0.2}}, {{value: 0.4}}], density: 0.5}}
"""
    found = in_force(tmp_path, text)
    assert [line.label for line in found["weight"].lines] == [
        "one", "two: input_layernorm, post_attention_layernorm, self_attn", "two: mlp",
    ]  # fmt: skip
    assert found["density"].words == "0.5"


def test_slices_leave_gaps(tmp_path: Path) -> None:
    """A parameter that is in force in some layers has values there and nowhere else."""
    source = "sources: [{{model: {0}/one, layer_range: [{1}, {2}]}}, {{model: {0}/two, layer_range: [{1}, {2}]}}]"
    first, second = (source.replace("{1}", str(a)).replace("{2}", str(b)) for a, b in ((0, 1), (1, 3)))
    text = (
        f"slices:\n- {first}\n  merge_method: linear\n  parameters: {{{{weight: 1}}}}\n"
        f"- {second}\n  merge_method: slerp\n  base_model: {{0}}/one\n  parameters: {{{{t: [0.2, 0.6]}}}}\n"
    )
    found = in_force(tmp_path, text)
    assert set(found) == {"weight", "normalize", "t"}
    (line,) = found["t"].lines
    assert {layer: round(value, 9) for layer, value in line.values.items() if layer != OUTSIDE} == {
        (STACK, 1): 0.2, (STACK, 2): 0.6,
    }  # fmt: skip
