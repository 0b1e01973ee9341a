"""How the parents relate: measured on the way, told in card and plan, with doubts where a merge means little."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from places import ZOO
from torch import Tensor

import merger
from merger.cli.commands import main
from merger.engine.execute import Observed
from merger.engine.geometry import BlockSample
from merger.methods.steps.step import Array
from merger.planning.geometry import Geometry, dump_geometry, load_geometry, total_geometry
from merger.run.look import sample_geometry, sampled_doubts
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def observe(inputs: Sequence[Array], result: Array, start: int, entries: int, base: Array | None = None) -> Geometry:
    """The geometry of a block that is there as a whole."""
    sample = BlockSample(start, start + inputs[0].size, entries)
    sample.take(start, [*inputs, result, *(() if base is None else (base,))])
    return sample.geometry(len(inputs), base is not None)


def normal(draw: np.random.Generator, entries: int) -> Array:
    """Normal entries."""
    return draw.standard_normal(entries, np.float32)


def test_geometry_is_that_of_the_vectors() -> None:
    """Norms, cosines and the share of entries with both signs, by hand."""
    one, other = np.float32([3.0, 4.0, 0.0, 0.0]), np.float32([4.0, -3.0, 0.0, 5.0])
    seen = observe([one, other], one + other, 0, 4)
    assert (seen.norm(0), seen.norm(1), seen.norm(-1)) == (5.0, 50**0.5, 75**0.5)
    assert seen.cosine(0, 1) == 0.0
    assert seen.cosines() == [0.0]
    assert seen.opposition() == 1 / 3
    assert total_geometry([seen, seen]).norm(0) == 50**0.5


def test_geometry_tells_how_the_result_lies_to_each_input_and_to_the_base() -> None:
    """In how many entries they have opposite signs, of how many that are not zero; and the base's products."""
    one, other = np.float32([3.0, -4.0, 0.0, 1.0]), np.float32([0.0, -3.0, 2.0, 5.0])
    result, base = np.float32([-1.0, -1.0, -1.0, 0.0]), np.float32([1.0, 2.0, 0.0, 0.0])
    seen = observe([one, other], result, 0, 4, base)
    assert (seen.against, seen.moved) == ((1, 1), (3, 3))
    assert seen.base == (-5.0, -6.0, -3.0, 5.0)
    assert total_geometry([seen, seen]).against == (2, 2)
    assert total_geometry([seen, seen]).base == (-10.0, -12.0, -6.0, 10.0)
    assert observe([one, other], result, 0, 4).base == ()


def test_a_zero_vector_has_no_angle() -> None:
    """It is neither like nor unlike any other."""
    assert Geometry(((0.0, 0.0), (0.0, 1.0)), 0, 1).cosine(0, 1) is None


def test_what_is_noted_gives_the_very_same_numbers_back() -> None:
    """So that the card of a resumed run is that of an undisturbed one, to the last digit."""
    draw = np.random.default_rng(4)
    seen = {
        name: observe([normal(draw, 50)], np.ones(50, np.float32), 0, 50, base)
        for name, base in (("b", None), ("a", normal(draw, 50)))
    }
    assert load_geometry(dump_geometry(seen)) == seen
    assert list(load_geometry(dump_geometry(seen))) == ["b", "a"]


@pytest.mark.parametrize("entries", [400_000, 5_000_000])
def test_the_sample_of_a_large_tensor_does_not_depend_on_its_blocks(entries: int) -> None:
    """The same entries are looked at however the tensor is cut, and they say what all say."""
    draw = np.random.default_rng(3)
    one, other = (normal(draw, entries) for _ in range(2))
    mixed = np.float32(0.6) * one + np.float32(0.8) * other
    whole = observe([one, mixed], mixed, 0, entries)
    cuts = [0, 131_072, 262_144, entries // 3 * 2, entries]
    parts = [observe([one[a:b], mixed[a:b]], mixed[a:b], a, entries) for a, b in pairwise(cuts)]
    assert total_geometry(parts).sampled == whole.sampled > 3_000
    assert total_geometry(parts).cosine(0, 1) == pytest.approx(whole.cosine(0, 1), abs=1e-12)
    assert whole.cosine(0, 1) == pytest.approx(0.6, abs=0.04)


def merged(tmp_path: Path, method: str, one: Edit, other: Edit, base: bool = True) -> tuple[str, tuple[str, ...]]:
    """The card and the doubts of a merge of two edits of one model."""
    held = tiny.tensors(0, dtype=torch.float32)
    tiny.write(tmp_path / "base", held)
    tiny.write(tmp_path / "one", one(held))
    tiny.write(tmp_path / "other", other(held))
    lines = [f"merge_method: {method}", f"base_model: {tmp_path}/base" if base else "", "models:"]
    lines += [f"- model: {tmp_path}/{name}\n  parameters: {{weight: 0.5}}" for name in ("one", "other")]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    done = merger.merge(tmp_path / "mine.yaml", str(tmp_path / "out"))
    return (tmp_path / "out/README.md").read_text(), done.doubts


def moved(seed: int, by: float = 0.01) -> Edit:
    def edit(held: dict[str, Tensor]) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {name: tensor + by * torch.randn(tensor.shape, generator=draw) for name, tensor in held.items()}

    return edit


def test_ordinary_fine_tunes_raise_no_doubt(tmp_path: Path) -> None:
    """Deltas at right angles are what two tasks look like; the card has a row for each layer."""
    card, doubts = merged(tmp_path, "task_arithmetic", moved(1), moved(2))
    assert doubts == ()
    assert "- **Between " in card
    assert "| layer 0 | " in card
    assert "| layer 1 | " in card
    assert "Doubtful" not in card


@pytest.mark.parametrize(("method", "one", "other", "sentence"), [
    ("task_arithmetic", moved(1), moved(1, -0.01), "moved away from the base in opposite directions"),
    ("task_arithmetic", moved(1), moved(1), "are as good as the same: their merge is either of them"),
    ("ties", dict, moved(2), "one is the base model in all that was compared: it adds nothing"),
], ids=["opposite", "same", "base"])  # fmt: skip
def test_a_merge_that_means_little_is_doubted(
    method: str, one: Edit, other: Edit, sentence: str, tmp_path: Path
) -> None:
    """In a sentence with the number, after the run and in the card."""
    card, doubts = merged(tmp_path, method, one, other)
    assert any(sentence in doubt for doubt in doubts)
    assert sentence in card
    assert "**Doubtful:**" in card


def strange(seed: int) -> Edit:
    """Initialised apart: matrices at right angles, and norms near one as everywhere."""

    def edit(held: dict[str, Tensor]) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {
            name: tensor if tensor.dim() < 2 else 0.1 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in held.items()
        }

    return edit


def scaled(by: float) -> Edit:
    return lambda held: {name: by * tensor for name, tensor in held.items()}


def then(first: Edit, second: Edit) -> Edit:
    return lambda held: second(first(held))


LINEAR, ADDED = "linear", "task_arithmetic"

CASES: dict[str, tuple[str, Edit, tuple[Edit, ...], str | None]] = {
    "fine-tunes": (ADDED, dict, (moved(1), moved(2)), None),
    "fine-tunes that are averaged": (LINEAR, dict, (moved(1), moved(2)), None),
    "fine-tunes that moved a ten-thousandth": (LINEAR, dict, (moved(1, 1e-5), moved(2, 1e-5)), None),
    "one moved fifteen times as far": (ADDED, dict, (moved(1), moved(2, 0.15)), None),
    "parents a tenth apart in size": (LINEAR, dict, (moved(1), scaled(1.1)), None),
    "three of one family": (LINEAR, dict, (moved(1), moved(2), moved(3)), None),
    "one parent alone": (ADDED, dict, (moved(1),), None),
    "strangers": (LINEAR, dict, (dict, strange(2)), "m0 and m1 (cosine 0.0"),
    "a stranger among three": (LINEAR, dict, (moved(1), strange(2), moved(3)), "m0 and m1 (cosine 0.0"),
    "another base": (ADDED, strange(9), (moved(1), moved(2)), "m0 and m1 have no ancestor in common with the base"),
    "one of another base": (ADDED, dict, (moved(1), strange(2)), "m1 has no ancestor in common with the base"),
    "the base itself": (ADDED, dict, (dict, moved(2)), "m0 is the base model in all that was compared"),
    "the base alone": (ADDED, dict, (dict,), "m0 is the base model in all that was compared"),
    "one fine-tune twice": (ADDED, dict, (moved(1), moved(1)), "m0 and m1 (cosine 1.0000) are as good as the same"),
    "one model twice": (LINEAR, dict, (dict, dict), "m0 and m1 (cosine 1.0000) are as good as the same"),
    "undone": (ADDED, dict, (moved(1), moved(1, -0.01)), "m0 and m1 (cosine -1.00) moved away from the base"),
    "one moved thirty times as far": (ADDED, dict, (moved(1), moved(2, 0.3)), "times) changed the base by"),
    "one of twice the size": (LINEAR, dict, (moved(1), scaled(2.0)), "m0 and m1 (2.0 times) are of unequal size"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sample_tells_what_speaks_against_a_merge(
    case: tuple[str, Edit, tuple[Edit, ...], str | None], tmp_path: Path
) -> None:
    """Before anything is made, in one sentence with the number; nothing where nothing does."""
    method, base, edits, sentence = case
    held = strange(0)(tiny.tensors(0, dtype=torch.float32))
    tiny.write(tmp_path / "base", base(held))
    for number, edit in enumerate(edits):
        tiny.write(tmp_path / f"m{number}", edit(held))
    named = ", ".join(f"{{model: {tmp_path}/m{number}}}" for number in range(len(edits)))
    of = f"base_model: {tmp_path}/base\nparameters: {{weight: 0.5}}\n" if method == ADDED else ""
    (tmp_path / "mine.yaml").write_text(f"merge_method: {method}\n{of}models: [{named}]\n")
    found = sampled_doubts(*plan(read_recipe(tmp_path / "mine.yaml"), Options()))
    assert [sentence is not None and sentence in doubt for doubt in found] == [True] * (sentence is not None)


def test_threads_do_not_change_what_is_seen(tmp_path: Path) -> None:
    """One thread or three: the same numbers for every tensor."""
    (tmp_path / "mine.yaml").write_text(
        f"merge_method: ties\nbase_model: {ZOO}/base\n"
        f"models: [{{model: {ZOO}/kjv}}, {{model: {ZOO}/python}}]\nparameters: {{density: 0.5}}\n"
    )
    seen = []
    for threads in (1, 3):
        events: list[object] = []
        to, options = str(tmp_path / f"out{threads}"), Options(threads=threads)
        result = merger.merge(tmp_path / "mine.yaml", to, options=options, on_event=events.append)
        seen.append({event.job.name: event.geometry for event in events if isinstance(event, Observed)})
        assert result.doubts == ()
    assert seen[0] == seen[1]
    assert len(seen[0]) > 10


def test_a_sample_is_of_all_kinds_of_matrices_and_takes_few_ranges(tmp_path: Path) -> None:
    """Of many parents fewer tensors are read: it is there within seconds, whatever a recipe names."""
    many = [str(tmp_path / f"m{number}") for number in range(50)]
    for name in many:
        tiny.write(Path(name), tiny.tensors(0))
    for models, tensors, kinds in (([f"{ZOO}/{name}" for name in ("base", "kjv", "python")], 32, 8), (many, 3, 3)):
        named = [{"model": name} for name in models]
        (tmp_path / "mine.yaml").write_text(f"merge_method: linear\nmodels: {named}\n")
        seen = dict(sample_geometry(*plan(read_recipe(tmp_path / "mine.yaml"), Options())))
        assert (len(seen), len({re.sub(r"\d+", "N", name) for name in seen})) == (tensors, kinds)


def test_a_sample_tells_what_the_parents_changed_of_the_base(tmp_path: Path) -> None:
    """As of the whole tensors, where they are no larger than what is read of each."""
    (tmp_path / "mine.yaml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {ZOO}/base\n"
        f"models: [{{model: {ZOO}/kjv}}, {{model: {ZOO}/python}}]\nparameters: {{weight: 0.5}}\n"
    )
    base, *parents = ({name: each.float().numpy() for name, each in tiny.read(ZOO / of).items()}
                      for of in ("base", "kjv", "python"))  # fmt: skip
    sampled = dict(sample_geometry(*plan(read_recipe(tmp_path / "mine.yaml"), Options())))
    small = {name: seen for name, seen in sampled.items() if base[name].size < 16_384}
    assert len(small) > 5
    for name, seen in small.items():
        deltas = [parent[name] - base[name] for parent in parents]
        whole = observe(deltas, np.zeros_like(base[name]), 0, base[name].size, base[name])
        np.testing.assert_allclose(seen.products, whole.products, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(seen.base, whole.base, rtol=1e-6, err_msg=name)
        assert (seen.opposed, seen.sampled) == (whole.opposed, whole.sampled)


def test_plan_and_run_look_at_the_parents_unless_told_not_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is merged: warnings by default, all rows where that is asked for."""
    held, recipe = strange(0)(tiny.tensors(0)), tmp_path / "strange.yaml"
    for number in range(2):
        tiny.write(tmp_path / f"m{number}", strange(number)(held))
    named = ", ".join(f"{{model: {tmp_path}/m{number}}}" for number in range(2))
    recipe.write_text(f"merge_method: linear\nmodels: [{named}]\n")
    sentence = "warning: m0 and m1 (cosine 0.0"
    for words, told in (([], 1), (["--no-look"], 0), (["--look"], 1)):
        assert main(["plan", str(recipe), *words]) == 0
        assert capsys.readouterr().out.count(sentence) == told
    for words, told in (([], 1), (["--no-look"], 0)):
        assert main(["run", str(recipe), "--to", f"{tmp_path}/out{told}", *words]) == 0
        assert capsys.readouterr().err.partition("made")[0].count(sentence) == told


def test_plan_looks_at_the_parents_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample is read before anything is merged; a model named twice is seen without."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {ZOO}/kjv}}, {{model: {ZOO}/python}}]\n")
    assert main(["plan", str(recipe), "--look"]) == 0
    said = capsys.readouterr().out
    assert "kjv and python: cosine 0.9" in said
    assert "layer 0: cosine" in said
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {ZOO}/kjv}}, {{model: {ZOO}/kjv/}}]\n")
    assert main(["plan", str(recipe)]) == 0
