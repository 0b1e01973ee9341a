"""Nothing a model holds is lost in silence: each tensor is merged, copied or left out, and the plan says which."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from merger.errors import MismatchError
from merger.methods.registry import methods
from merger.planning.jobs.make import make_jobs
from merger.planning.unused_tensors import find_unused

from .models import Tensors, llama, model, planned, staged, write

EXTRAS: Tensors = {
    "v_head.weight": ("F32", (1, 8)),
    "score.weight": ("BF16", (2, 8)),
    "model.embed_positions.weight": ("BF16", (4, 8)),
    "position_ids": ("I64", (1, 16)),
    "model.rotary_emb.inv_freq": ("F32", (4,)),
    "model.norm.num_batches_tracked": ("I64", ()),
    "embed_out.weight": ("BF16", (20, 8)),
    "model.layers.0.self_attn.q_norm.weight": ("BF16", (4,)),
    "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,)),
    "model.layers.1.self_attn.rotary_emb.inv_freq": ("F32", (4,)),
    "model.layers.1.mlp.mask": ("BOOL", (4,)),
    "mtp.layers.0.norm.weight": ("BF16", (8,)),
    "vision.blocks.0.norm1.weight": ("F16", (8,)),
    "vision.blocks.1.norm1.weight": ("F16", (8,)),
    "vision.blocks.0.norm2.weight": ("F16", (8,)),
}
METHODS = ("linear", "task_arithmetic", "slerp", "ties")


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A Llama-like model, often with some tensors more, at times with some less or one of another shape."""
    held = llama(draw(st.sampled_from([2, 2, 2, 3])), dtype=draw(st.sampled_from(["BF16", "F32"])))
    for name in draw(st.lists(st.sampled_from(sorted(EXTRAS)), unique=True, max_size=4)):
        held[name] = EXTRAS[name]
    if draw(st.integers(0, 2)) == 0:
        for name in draw(st.lists(st.sampled_from(sorted(held)), unique=True, max_size=2)):
            del held[name]
    if draw(st.integers(0, 5)) == 0:
        held[draw(st.sampled_from(sorted(held)))] = (draw(st.sampled_from(["BF16", "F8_E4M3", "I32"])), (3,))
    if draw(st.booleans()):
        held.pop("lm_head.weight", None)
    return held


def recipe(one: str, other: str, method: str) -> str:
    base = "" if method == "linear" else f"base_model: {one}\n"
    parameters = "parameters: {t: 0.5}\n" if method == "slerp" else ""
    return f"merge_method: {method}\n{base}{parameters}models: [{{model: {one}}}, {{model: {other}}}]\n"


tied = st.sampled_from([True, False, None])


@given(tensors(), tensors(), tied, tied, st.sampled_from(METHODS), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_each_tensor_is_merged_copied_or_left_out_or_the_plan_is_refused(
    one: Tensors, other: Tensors, one_tied: bool | None, other_tied: bool | None, method: str, same: bool
) -> None:
    """Each tensor of any two models has one fate, with a reason where it is not merged; or a problem names it."""
    other = one if same else other
    with tempfile.TemporaryDirectory() as root:
        paths = [
            write(Path(root, name), held, num_hidden_layers=2, **({} if tie is None else {"tie_word_embeddings": tie}))
            for name, held, tie in (("one", one, one_tied), ("other", other, other_tied))
        ]
        found = staged(recipe(*paths, method))
    try:
        making = make_jobs(found, methods())
    except MismatchError as error:
        event("refused")
        assert not (same and one_tied is other_tied is not None) or any(d[0][:2] == "F8" for d in one.values())
        for problem in error.problems:
            assert _names_a_difference(problem.what, one, other), problem.what
        return
    event("planned")
    outputs = [job.name for job in making.jobs]
    assert len(set(outputs)) == len(outputs)
    rest = list(find_unused(found, making))
    for number, held in enumerate((one, other)):
        merged = {e.tensor.name for job in making.jobs if job.why is None for e in job.reads if e.model == number}
        copied = {e.tensor.name for job in making.jobs if job.why for e in job.reads if e.model == number}
        left = [item.tensor for item in rest if item.model == number]
        assert sorted([*merged, *copied, *left]) == sorted(held)
    assert all(item.why for item in rest)
    for job in making.jobs:
        for entry in job.reads:
            assert entry.tensor.shape == job.shape
            assert job.why or entry.tensor.dtype in ("BF16", "F32", "F16")


def _names_a_difference(sentence: str, one: Tensors, other: Tensors) -> bool:
    """Whether it names a tensor that the models do not share, or that cannot be merged, or a stack's layers."""
    words = sentence.replace(",", " ").replace(":", " ").split()
    names = [word for word in words if word in one or word in other]
    if any(one.get(name) != other.get(name) or one[name][0][:2] == "F8" for name in names):
        return True
    head_or_embedding = {"lm_head.weight", "embed_out.weight", "model.embed_tokens.weight"}
    return "layers" in sentence or bool(head_or_embedding & set(names))


# ---- one fate after the other ---------------------------------------------------------------------------------------


def fates(tmp_path: Path, one: Tensors, other: Tensors, method: str = "linear", **config: bool) -> Mapping[str, str]:
    """Of each tensor that is not merged: where it comes from, and why."""
    said = {"num_hidden_layers": 2, "tie_word_embeddings": False, **config}
    found = planned(recipe(write(tmp_path / "one", one, **said), write(tmp_path / "other", other, **said), method))
    copied = {f"one {job.name}": f"copied: {job.why}" for job in found.jobs if job.why}
    assert all(entry.model == 0 for job in found.jobs if job.why for entry in job.reads)
    left = {f"{'one' if item.model == 0 else 'other'} {item.tensor}": f"left: {item.why}" for item in found.left_out}
    return copied | left


def test_two_models_of_the_same_names_are_merged_to_the_last_tensor(tmp_path: Path) -> None:
    """Nothing is copied or left out."""
    assert fates(tmp_path, llama(), llama()) == {}


def test_constants_are_copied_from_the_first_model(tmp_path: Path) -> None:
    """Rotary frequencies, positions and counters, whether both models have them or only one."""
    held = {**llama(), "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,)), "position_ids": ("I64", (1, 16))}
    assert fates(tmp_path, held, {**llama(), "position_ids": ("I64", (1, 16))}) == {
        "one model.layers.0.self_attn.rotary_emb.inv_freq": "copied: a constant, not a trained tensor",
        "one position_ids": "copied: a constant, not a trained tensor",
        "other position_ids": "left: a constant, not a trained tensor",
    }


def test_whole_numbers_are_copied(tmp_path: Path) -> None:
    """A counter has no mean."""
    held = {**llama(), "model.steps": ("I64", ())}
    assert fates(tmp_path, held, held) == {
        "one model.steps": "copied: I64 numbers are not merged",
        "other model.steps": "left: the recipe takes this tensor from another model",
    }


def test_what_only_the_first_model_has_outside_the_layers_is_copied(tmp_path: Path) -> None:
    """A value head has nothing to be merged with."""
    held = {**llama(), "v_head.weight": ("F32", (1, 8))}
    assert fates(tmp_path, held, llama()) == {"one v_head.weight": "copied: only one has it"}


def test_what_only_another_model_has_is_left_out(tmp_path: Path) -> None:
    """The first model names the output's tensors."""
    held = {**llama(), "v_head.weight": ("F32", (1, 8)), "model.layers.1.self_attn.q_proj.bias": ("BF16", (8,))}
    why = "left: one, whose tensors name the output's, has no such tensor"
    assert fates(tmp_path, llama(), held) == {
        "other v_head.weight": why,
        "other model.layers.1.self_attn.q_proj.bias": why,
    }


def test_layers_that_the_first_model_lacks_are_in_no_layer_range_only_where_there_is_one(tmp_path: Path) -> None:
    """A recipe without layer_range is not blamed for one."""
    held = {**llama(), "tower.blocks.0.weight": ("BF16", (8, 8)), "tower.blocks.1.weight": ("BF16", (8, 8))}
    assert fates(tmp_path, llama(), held) == {
        f"other tower.blocks.{layer}.weight": "left: one has no such layer" for layer in (0, 1)
    }


def test_a_head_that_the_config_calls_the_embedding_is_left_out(tmp_path: Path) -> None:
    """Old files hold tied heads as tensors of their own; loaders pass over them."""
    why = "left: the head is the embedding, as the model's config says"
    assert fates(tmp_path, llama(), llama(), tie_word_embeddings=True) == {
        "one lm_head.weight": why,
        "other lm_head.weight": why,
    }


def test_layers_in_no_slice_are_left_out(tmp_path: Path) -> None:
    """And so are the embedding of the last model and the head of the first."""
    one, other = model(tmp_path / "one", layers=3), model(tmp_path / "other", layers=3)
    found = planned(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {one}, layer_range: [0, 2]}}]
  - sources: [{{model: {other}, layer_range: [2, 3]}}]
""")
    left = {(item.model, item.tensor): item.why for item in found.left_out}
    assert {why for (_, name), why in left.items() if "layers" in name} == {"its layer is in no layer_range"}
    assert {key for key in left if "layers" not in key[1]} == {
        (0, "model.norm.weight"), (0, "lm_head.weight"), (1, "model.embed_tokens.weight"),
    }  # fmt: skip
    assert len([name for _, name in left if "layers" in name]) == 9 + 18


def test_a_base_model_that_the_method_does_not_take_is_left_out_whole(tmp_path: Path) -> None:
    """It still gives the config."""
    one, base = model(tmp_path / "one"), model(tmp_path / "base")
    found = planned(f"merge_method: passthrough\nbase_model: {base}\nmodels: [{{model: {one}}}]\n")
    assert {item.why for item in found.left_out} == {"the method takes no base model, so this one gives no tensors"}
    assert {item.tensor for item in found.left_out} == set(llama())


@pytest.mark.parametrize(("role", "words"), [
    ("model.layers.1.mlp.up_proj.weight", "other has no tensor model.layers.1.mlp.up_proj.weight, which one has"),
])  # fmt: skip
def test_a_layer_that_lacks_a_tensor_is_refused(tmp_path: Path, role: str, words: str) -> None:
    """A layer of one model without its counterpart is no layer of the same architecture."""
    held = {name: value for name, value in llama().items() if name != role}
    with pytest.raises(MismatchError) as caught:
        fates(tmp_path, llama(), held)
    assert [problem.what for problem in caught.value.problems] == [words]


def test_other_shapes_are_refused_with_both_models_and_both_shapes(tmp_path: Path) -> None:
    """The first few of them, at the model that differs; a vocabulary is called one."""
    with pytest.raises(MismatchError) as caught:
        fates(tmp_path, llama(), llama(vocab=21))
    assert [(problem.what, problem.hint) for problem in caught.value.problems] == [
        (f"{name} is 20x8 in one, but 21x8 in other",
         "add tokenizer: {source: union} for the tokens of all models, or tokenizer: {source: base} for those of one; "
         "tokenizer: {source: base, rows: base} has as many rows as the base")
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    ]  # fmt: skip
    assert all(problem.at is not None and problem.at.line == 2 for problem in caught.value.problems)


def test_many_mismatches_of_two_models_are_told_a_few_times(tmp_path: Path) -> None:
    """One fault shows in every layer; three are enough to see it."""
    with pytest.raises(MismatchError) as caught:
        fates(tmp_path, llama(layers=2), llama(layers=2, hidden=12))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_numbers_of_eight_bits_are_refused(tmp_path: Path, dtype: str) -> None:
    """They mean something only together with their scales."""
    held = {**llama(), "model.layers.0.mlp.up_proj.weight": (dtype, (16, 8))}
    with pytest.raises(MismatchError, match=f"one: model.layers.0.mlp.up_proj.weight is stored as {dtype}"):
        fates(tmp_path, held, held)
