"""Slices and modules as they meet the models: which layer of which model becomes which, and the config's layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from merger.errors import MergerError, MismatchError, RecipeError

from .models import jobs, llama, model, planned, sources, write

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def test_a_stack_of_two_deep_models(tmp_path: Path) -> None:
    """24 layers of one and the last 20 of the other: every tensor of every layer, lists and count in the config."""
    types = [f"type-{layer}" for layer in range(40)]
    one, other = (
        write(tmp_path / name, llama(40), num_hidden_layers=40, layer_types=[f"{name}-{kind}" for kind in types],
              mlp_only_layers=[3, 30], tie_word_embeddings=False, vocab_size=40)
        for name in ("one", "other")
    )  # fmt: skip
    found = planned(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {one}, layer_range: [0, 24]}}]
  - sources: [{{model: {other}, layer_range: [20, 40]}}]
""")
    origin = {(job.name): sources(job) for job in found.jobs}
    expected = {EMBEDDING: [(0, EMBEDDING)], NORM: [(1, NORM)], HEAD: [(1, HEAD)]}
    roles = [name.removeprefix("model.layers.0.") for name in llama(1) if "layers" in name]
    for layer in range(44):
        number, theirs = (0, layer) if layer < 24 else (1, layer - 4)
        for role in roles:
            expected[f"model.layers.{layer}.{role}"] = [(number, f"model.layers.{theirs}.{role}")]
    assert origin == expected
    assert all(job.is_copy for job in found.jobs)
    assert found.config == {
        "num_hidden_layers": 44,
        "layer_types": [f"one-{kind}" for kind in types[:24]] + [f"other-{kind}" for kind in types[20:]],
        "mlp_only_layers": [3, 34],
        "tie_word_embeddings": False,
        "vocab_size": 40,
    }


def test_layers_come_in_the_order_of_embedding_layers_norm_head(tmp_path: Path) -> None:
    """As a loader reads them."""
    names = list(jobs(f"merge_method: linear\nmodels: [{{model: {model(tmp_path / 'one', layers=11)}}}]"))
    layers = [int(name.split(".")[2]) for name in names if "layers" in name]
    assert layers == sorted(layers)
    assert (names[0], names[-2:]) == (EMBEDDING, [NORM, HEAD])


def test_a_layer_may_be_taken_again_and_again(tmp_path: Path) -> None:
    """Overlapping, repeated and backward slices."""
    one = model(tmp_path / "one", layers=4)
    ranges = [(0, 3), (1, 4), (0, 1), (0, 1)]
    slices = "".join(f"  - sources: [{{model: {one}, layer_range: [{a}, {b}]}}]\n" for a, b in ranges)
    found = planned(f"merge_method: passthrough\nslices:\n{slices}")
    norm = "model.layers.{}.input_layernorm.weight"
    origin = {job.name: job.reads[0].tensor.name for job in found.jobs}
    assert [origin[norm.format(layer)] for layer in range(8)] == [norm.format(n) for n in (0, 1, 2, 1, 2, 3, 0, 0)]
    assert found.config["num_hidden_layers"] == 8


def test_each_slice_may_have_its_own_method_and_base(tmp_path: Path) -> None:
    """The base of a slice is the one that is named in it; embedding and head go with the slices beside them."""
    one, other = model(tmp_path / "one", layers=4), model(tmp_path / "other", layers=4)
    both = "sources: [{{model: {0}, layer_range: [{2}, {3}]}}, {{model: {1}, layer_range: [{2}, {3}]}}]"
    found = jobs(f"""
merge_method: linear
slices:
  - {both.format(one, other, 0, 1)}
    merge_method: slerp
    base_model: {other}
    parameters: {{t: 0.25}}
  - {both.format(one, other, 1, 2)}
  - sources: [{{model: {other}, layer_range: [2, 3]}}]
    merge_method: passthrough
  - {both.format(one, other, 3, 4)}
    merge_method: task_arithmetic
    base_model: {one}
""")
    norms = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)]
    names = [EMBEDDING, *norms, NORM, HEAD]
    methods = ["slerp", "slerp", "linear", "passthrough", "task_arithmetic", "task_arithmetic", "task_arithmetic"]
    assert [found[name].method for name in names] == methods
    models = [[entry.model for entry in found[name].reads] for name in names]
    assert models == [[1, 0], [1, 0], [0, 1], [1], [1, 0], [1, 0], [1, 0]]
    assert found[HEAD].base is not None
    assert found[HEAD].base.model == 0


def test_another_depth_is_refused_with_both_counts(tmp_path: Path) -> None:
    """The models form takes all layers of all models, so they must be equally many."""
    one, other = model(tmp_path / "one", layers=2), model(tmp_path / "other", layers=3)
    with pytest.raises(MismatchError) as caught:
        planned(f"merge_method: linear\nmodels: [{{model: {one}}}, {{model: {other}}}]")
    (problem,) = caught.value.problems
    assert problem.what == "different numbers of layers in model.layers: one has 2, other has 3"
    assert problem.hint == "choose layers of equal number with slices: and layer_range"
    assert problem.at is not None


def test_layers_beyond_a_models_last_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    """Every such range at once, with the number of layers there are."""
    one = model(tmp_path / "one", layers=3)
    with pytest.raises(RecipeError) as caught:
        planned(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {one}, layer_range: [0, 4]}}]
  - sources: [{{model: {one}, layer_range: [0, 3]}}]
  - sources: [{{model: {one}, layer_range: [7, 9]}}]
""")
    problems = caught.value.problems
    assert [problem.at and problem.at.line for problem in problems] == [4, 6]
    assert problems[0].what == "[0, 4] ends beyond one, which has 3 layers"
    assert problems[1].hint == "its last layer is 2: end at 3 or before"


def test_a_depth_that_the_config_does_not_speak_of_is_refused(tmp_path: Path) -> None:
    """A checkpoint with a layer more than config.json counts cannot be made deeper; as it is, it can be merged."""
    one = write(tmp_path / "one", llama(4), num_hidden_layers=3)
    stack = "merge_method: passthrough\nslices:\n" + f"  - sources: [{{model: {one}, layer_range: [0, 4]}}]\n" * 2
    with pytest.raises(RecipeError, match=r"one: config\.json does not say that there are 4 layers"):
        planned(stack)
    assert planned(f"merge_method: linear\nmodels: [{{model: {one}}}]").config == {"num_hidden_layers": 3}


# ---- several stacks -------------------------------------------------------------------------------------------------


def two_stacks(folder: Path) -> str:
    """A seer: a vision tower of two layers, a language model of three, a projector between them."""
    vision = {f"vision.blocks.{layer}.norm.{part}": ("BF16", (8,)) for layer in range(2) for part in ("weight", "bias")}
    return write(folder, {**vision, "projector.weight": ("BF16", (8, 8)), **llama(3)}, text_config={})


def test_every_module_is_merged_by_the_models_form(tmp_path: Path) -> None:
    """Each stack keeps its own numbers of layers, from zero."""
    one, other = two_stacks(tmp_path / "one"), two_stacks(tmp_path / "other")
    found = jobs(f"merge_method: linear\nmodels: [{{model: {one}}}, {{model: {other}}}]")
    assert {name: sources(job) for name, job in found.items()} == {
        name: [(0, name), (1, name)]
        for name in (*llama(3), "projector.weight", "vision.blocks.0.norm.weight", "vision.blocks.0.norm.bias",
                     "vision.blocks.1.norm.weight", "vision.blocks.1.norm.bias")
    }  # fmt: skip


def test_a_module_that_the_recipe_does_not_name_is_copied(tmp_path: Path) -> None:
    """From the first model, and the plan says so; mergekit leaves it out."""
    one, other = two_stacks(tmp_path / "one"), two_stacks(tmp_path / "other")
    found = planned(f"""
merge_method: linear
dtype: float32
modules:
  model.layers: {{models: [{{model: {one}}}, {{model: {other}}}]}}
""")
    assert {job.name for job in found.jobs} == {*llama(3), "projector.weight"} | {
        f"vision.blocks.{layer}.norm.{part}" for layer in range(2) for part in ("weight", "bias")
    }
    for job in found.jobs:
        module = "vision.blocks" if "vision" in job.name else "default"
        why = None if "model.layers" in job.name else f"the recipe does not name the module {module}"
        assert (job.why, job.dtype) == (why, "F32")
        assert sources(job) == [(0, job.name)] + ([(1, job.name)] if why is None else [])


@pytest.mark.parametrize(("recipe", "words"), [
    ("slices: [{{sources: [{{model: {0}, layer_range: [0, 2]}}]}}]",
     "one has 2 stacks of layers (vision.blocks, model.layers), so it is not clear which a layer_range means"),
    ("modules: {{model.layer: {{models: [{{model: {0}}}]}}}}", "one has no module 'model.layer'"),
    ("modules: {{model.layers: {{slices: [{{sources: [{{model: {0}, layer_range: [0, 2]}}]}}]}}}}",
     "one: config.json does not say that there are 3 layers, so it cannot be told 2"),
])  # fmt: skip
def test_what_several_stacks_do_not_allow_is_said(tmp_path: Path, recipe: str, words: str) -> None:
    """Which stack is meant, which modules there are, and that a config tells of each."""
    one = two_stacks(tmp_path / "one")
    with pytest.raises(MergerError) as caught:
        planned("merge_method: passthrough\n" + recipe.format(one))
    (problem,) = caught.value.problems
    assert problem.what == words
    assert problem.hint
    assert problem.at is not None


def test_layers_of_the_module_without_layers_are_refused(tmp_path: Path) -> None:
    """`default` beside stacks holds what is in none of them."""
    one = two_stacks(tmp_path / "one")
    default = f"{{slices: [{{sources: [{{model: {one}, layer_range: [0, 2]}}]}}]}}"
    with pytest.raises(RecipeError, match="the module default has no layers"):
        planned(f"merge_method: passthrough\nmodules: {{default: {default}}}")
