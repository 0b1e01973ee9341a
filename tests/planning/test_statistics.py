"""Statistics beside a model: what is made of them, whose they have to be, and what is said of those that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured
import pytest
import tiny
import torch
from merging import merged
from safetensors.torch import load_file, save_file
from torch import Tensor

from merger.errors import MergerError
from merger.lock.statistics import statistic_name
from merger.methods.registry import Statistic

NAMES = ("one", "two", "three")
RECIPE = """\
merge_method: {method}
parameters: {{{parameters}}}
models:
  - {{model: {root}/one, statistics: {root}/one-{kind}, parameters: {{weight: 2}}}}
  - {{model: {root}/two, statistics: {root}/two-{kind}}}
  - {{model: {root}/three, statistics: {root}/three-{kind}}}
"""
KINDS: dict[str, Statistic] = {"fisher": "fisher", "regmean": "gram"}
WEIGHTS = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three small models, each with statistics of each kind beside it."""
    for seed, name in enumerate(NAMES):
        tiny.write(tmp_path / name, tiny.tensors(seed, dtype=torch.float32))
        for kind in measured.KINDS:
            measured.write(tmp_path / f"{name}-{kind}", tmp_path / name, kind, seed)
    return tmp_path


def recipe(root: Path, method: str, parameters: str = "") -> str:
    """The merge of the three by a method."""
    return RECIPE.format(method=method, kind=KINDS[method], root=root, parameters=parameters)


def by_fisher(tensors: list[Tensor], known: list[Tensor]) -> Tensor:
    """The formula, in float64."""
    shares = [number * each for number, each in zip(WEIGHTS, known, strict=True)]
    return sum(share * tensor for share, tensor in zip(shares, tensors, strict=True)) / sum(shares)  # type: ignore


def by_regmean(tensors: list[Tensor], known: list[Tensor]) -> Tensor:
    """The formula, in float64, alpha 0.9; the mean of what is no linear layer."""
    if not known:
        return sum(number * tensor for number, tensor in zip(WEIGHTS, tensors, strict=True)) / 4  # type: ignore
    grams = [number * (0.9 * g + 0.1 * g.diag().diag()) for number, g in zip(WEIGHTS, known, strict=True)]
    total = sum(tensor @ gram for tensor, gram in zip(tensors, grams, strict=True))
    return torch.linalg.solve(sum(grams), total.T).T  # type: ignore


@pytest.mark.parametrize(("method", "formula"), [("fisher", by_fisher), ("regmean", by_regmean)])
def test_a_merge_is_the_papers_formula_in_float64(
    method: str, formula: Callable[[list[Tensor], list[Tensor]], Tensor], root: Path
) -> None:
    """Of three models with other weights; plan and card say what was measured on, the lock lists the statistics."""
    planned, kind = merged(recipe(root, method), root / "out"), KINDS[method]
    models = [tiny.read(root / name) for name in NAMES]
    known = [load_file(root / f"{name}-{kind}" / "model.safetensors") for name in NAMES]
    for name, made in tiny.read(root / "out").items():
        own = statistic_name(kind, name)
        found = [each[own].double() for each in known if own in each]
        expected = formula([model[name].double() for model in models], found)
        torch.testing.assert_close(made, expected.float(), rtol=1e-5, atol=1e-6)
    assert f"{kind} of one, measured on 1,000 tokens of texts.txt" in planned.notes
    assert f"one-{kind}" in (root / "out" / "merger.lock.yaml").read_text()


BY_AIM = """\
merge_method: aim
base_model: {root}/three
parameters: {{omega: 0.25}}
models: [{{model: {root}/one, parameters: {{weight: 2}}}}, {{model: {root}/two}}, {row}]
"""


def test_aim_is_weighed_by_what_the_base_is_fed(root: Path) -> None:
    """In float64, of the base's statistics alone; a base without them is refused, whether it has a row or not."""
    row = f"{{model: {root}/three, statistics: {root}/three-activations}}"
    planned = merged(BY_AIM.format(root=root, row=row), root / "out")
    one, two, base = (tiny.read(root / name) for name in NAMES)
    fed = load_file(root / "three-activations" / "model.safetensors")
    for name, made in tiny.read(root / "out").items():
        known = fed.get(statistic_name("activations", name), torch.zeros(1)).double()
        kept = 1 - 0.75 * known / known.max().clamp(min=1e-9)
        expected = base[name] + kept * (2 * (one[name].double() - base[name]) + two[name] - base[name])
        torch.testing.assert_close(made, expected.float(), rtol=1e-5, atol=1e-6)
    assert [note for note in planned.notes if "activations of three" in note]
    for without in (f"{{model: {root}/three}}", f"{{model: {root}/two}}"):
        with pytest.raises(MergerError, match=r"what was measured of the base model, and .*three has no statistics"):
            merged(BY_AIM.format(root=root, row=without), root / "other")
    with pytest.raises(MergerError, match="aim asks for activations, and three-gram holds gram"):
        merged(BY_AIM.format(root=root, row=row.replace("activations", "gram")), root / "other")


def replaced(folder: Path, name: str, made: Callable[[Tensor], Tensor | None]) -> None:
    """Statistics with another tensor of this name, or none."""
    held = load_file(folder / "model.safetensors")
    tensor = made(held.pop(name))
    save_file(held if tensor is None else held | {name: tensor}, folder / "model.safetensors")


def in_blocks(gram: Tensor, size: int) -> Tensor:
    """What of a Gram matrix stands in blocks along the diagonal, the last one filled up with zeros."""
    filled = torch.zeros(2 * [-(-len(gram) // size) * size])
    filled[: len(gram), : len(gram)] = gram
    return torch.stack([filled[at : at + size, at : at + size] for at in range(0, len(filled), size)])


@pytest.mark.parametrize("size", [1, 5])
def test_gram_matrices_in_blocks_are_those_without_the_rest(size: int, root: Path) -> None:
    """Merged as whole ones are that hold zeros there; those of different blocks do not go together."""
    for name in NAMES:
        file = root / f"{name}-gram" / "model.safetensors"
        reduced = {key: in_blocks(gram, size) for key, gram in load_file(file).items()}
        whole = {key: torch.block_diag(*blocks)[: len(gram), : len(gram)].contiguous()
                 for (key, gram), blocks in zip(load_file(file).items(), reduced.values(), strict=True)}  # fmt: skip
        save_file(whole, file)
        save_file(reduced, root / f"{name}.safetensors")
    merged(recipe(root, "regmean"), root / "whole")
    for name in NAMES:
        (root / f"{name}.safetensors").replace(root / f"{name}-gram" / "model.safetensors")
    merged(recipe(root, "regmean"), root / "out")
    for name, made in tiny.read(root / "out").items():
        torch.testing.assert_close(made, tiny.read(root / "whole")[name], rtol=1e-5, atol=1e-6)


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], int, str]] = {
    "of another model": (
        "regmean", lambda root: measured.write(root / "one-gram", root / "two", "gram"), 4,
        "one-gram was measured of another model, two: one's model.safetensors is another file",
    ),
    "of another kind": (
        "regmean", lambda root: measured.write(root / "one-gram", root / "one", "fisher"), 4,
        "regmean asks for gram, and one-gram holds fisher",
    ),
    "of another model's size": (
        "fisher", lambda root: tiny.write(root / "one", tiny.tensors(7)), 4,
        "one-fisher was measured of another model, one: one's model.safetensors has",
    ),
    "of other shapes": (
        "fisher", lambda root: replaced(root / "two-fisher", Q, lambda held: held[:4]), 4,
        f"{Q} in ",
    ),
    "in other blocks": (
        "regmean", lambda root: replaced(root / "two-gram", Q, lambda held: in_blocks(held, 4)), 4,
        "is asked for",
    ),
    "without a tensor": (
        "fisher", lambda root: replaced(root / "two-fisher", Q, lambda held: None), 4,
        f"holds nothing of {Q}",
    ),
    "without a layer that others have": (
        "regmean", lambda root: replaced(root / "two-gram", Q, lambda held: None), 4,
        f"holds nothing of {Q}",
    ),
    "of a model with an adapter": (
        "fisher", lambda root: measured.write(root / "one-fisher", root / "one", "fisher", models=()), 4,
        "one-fisher is of ",
    ),
    "without a lock": (
        "fisher", lambda root: (root / "one-fisher" / "merger.lock.yaml").unlink(), 3,
        "has no merger.lock.yaml that says what was measured",
    ),
    "a merge": (
        "fisher", lambda root: (root / "one-fisher" / "merger.lock.yaml").write_text("format: 3\nrecipe: x\n"), 3,
        "its merger.lock.yaml is none of statistics",
    ),
    "of a later format": (
        "fisher", lambda root: measured.write(root / "one-fisher", root / "one", "fisher", format=99), 3,
        "its statistics are of a later format",
    ),
    "not positive definite": (
        "regmean", lambda root: replaced(root / "one-gram", Q, lambda held: -9 * held), 4,
        "the sum of the Gram matrices is not positive definite",
    ),
    "not finite": (
        "regmean", lambda root: replaced(root / "one-gram", Q, lambda held: held * float("nan")), 4,
        "256 entries of one-gram are NaN or infinite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_statistics_that_do_not_fit_are_refused(damage: str, root: Path) -> None:
    """Each with a sentence and the exit code of its kind; nothing is written."""
    method, wound, code, told = DAMAGES[damage]
    wound(root)
    with pytest.raises(MergerError) as caught:
        merged(recipe(root, method), root / "out")
    said = " ".join(problem.what for problem in caught.value.problems)
    assert (caught.value.exit_code, told in said) == (code, True), said
    assert not (root / "out").exists()


def test_a_recipe_names_statistics_where_they_are_asked_for(root: Path) -> None:
    """One that lacks them is refused at its place; where nothing asks for them, that is a warning."""
    text = recipe(root, "fisher").replace(f", statistics: {root}/two-fisher", "")
    with pytest.raises(MergerError) as caught:
        merged(text, root / "out")
    (problem,) = caught.value.problems
    assert "two has no statistics" in problem.what
    assert problem.at is not None
    assert problem.at.line == 5
    planned = merged(recipe(root, "fisher").replace("method: fisher", "method: linear"), root / "out")
    assert [str(each.what).endswith("here they have no effect") for each in planned.locked.recipe.warnings] == [
        True
    ] * 3


def test_adapters_have_no_statistics(root: Path) -> None:
    """A method that asks for them is refused, and does not average in silence."""
    rows = f"[{{model: {root}/one, statistics: {root}/one-fisher}}, {{model: {root}/two}}]"
    with pytest.raises(MergerError, match="adapters have no statistics"):
        merged(f"merge_method: fisher\nadapters: {rows}\n", root / "out")


def test_a_stage_may_ask_for_statistics(root: Path) -> None:
    """What it makes is merged on as any stage is; of what it makes nothing was measured."""
    merged(recipe(root, "regmean"), root / "alone")
    merged("name: first\n" + recipe(root, "regmean") + f"---\nmerge_method: linear\nmodels: [{{model: first}}, "
           f"{{model: {root}/one}}]\n", root / "out")  # fmt: skip
    first, one = tiny.read(root / "alone"), tiny.read(root / "one")
    for name, made in tiny.read(root / "out").items():
        torch.testing.assert_close(made, (first[name] + one[name]) / 2, rtol=1e-6, atol=1e-7)
    rows = f"[{{model: first, statistics: {root}/one-gram}}]"
    with pytest.raises(MergerError, match="first is made on the way, and nothing was measured of it"):
        merged(f"name: first\n{recipe(root, 'regmean')}---\nmerge_method: regmean\nmodels: {rows}\n", root / "other")


def test_a_gram_of_few_tokens_is_told(root: Path) -> None:
    """It is singular: alpha below 1 makes the sum definite, and at 1 it is refused."""
    for name in NAMES:
        measured.write(root / f"{name}-gram", root / name, "gram", tokens=5)
        replaced(root / f"{name}-gram", Q, lambda held: torch.ones_like(held))
    planned = merged(recipe(root, "regmean"), root / "out")
    assert any("fewer than the 24 inputs of a layer" in note for note in planned.notes)
    with pytest.raises(MergerError, match="write alpha below 1"):
        merged(recipe(root, "regmean", "alpha: 1"), root / "other")
