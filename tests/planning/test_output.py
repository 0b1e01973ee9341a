"""The output's head, dtype and config.json, as they follow from the models'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures.cases import CASES as CLASSES
from merging import merged

from .models import Tensors, jobs, llama, model, planned, sources, write

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def linear(*models: str, more: str = "") -> str:
    return "merge_method: linear\n" + more + "models:\n" + "".join(f"  - {{model: {path}}}\n" for path in models)


# ---- head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_tied", [True, None])
def test_a_tied_and_an_untied_model_give_an_untied_one(tmp_path: Path, one_tied: bool | None) -> None:
    """The tied one's embedding stands for its head; the config says false, else loaders would drop the head."""
    one, other = model(tmp_path / "one", tied=one_tied, head=False), model(tmp_path / "other")
    found = planned(linear(one, other))
    origin = {job.name: sources(job) for job in found.jobs}
    assert origin[HEAD] == [(0, EMBEDDING), (1, HEAD)]
    assert origin[EMBEDDING] == [(0, EMBEDDING), (1, EMBEDDING)]
    assert found.config["tie_word_embeddings"] is False
    assert found.left_out == ()


def test_an_untied_base_and_a_tied_model_give_an_untied_one(tmp_path: Path) -> None:
    """The other way round."""
    one, other = model(tmp_path / "one"), model(tmp_path / "other", tied=True)
    found = planned(linear(one, other))
    assert {job.name: sources(job) for job in found.jobs}[HEAD] == [(0, HEAD), (1, EMBEDDING)]
    assert found.config["tie_word_embeddings"] is False


def test_models_that_are_tied_everywhere_stay_so(tmp_path: Path) -> None:
    """No head is written, even where a file holds one, and the config is as it was."""
    one, other = model(tmp_path / "one", tied=True), model(tmp_path / "other", tied=True, head=True)
    found = planned(linear(one, other))
    assert HEAD not in {job.name for job in found.jobs}
    assert found.config["tie_word_embeddings"] is True
    assert [(item.model, item.tensor) for item in found.left_out] == [(1, HEAD)]


def test_a_head_that_is_the_only_embedding_is_kept(tmp_path: Path) -> None:
    """Of two tied tensors a file may hold the head alone; without it nothing would be left."""
    held = {name: value for name, value in llama().items() if name != EMBEDDING}
    one, other = (write(tmp_path / name, held, tie_word_embeddings=True) for name in ("one", "other"))
    found = planned(linear(one, other))
    assert {job.name: sources(job) for job in found.jobs}[HEAD] == [(0, HEAD), (1, HEAD)]
    assert found.config["tie_word_embeddings"] is True
    assert found.left_out == ()


def test_models_that_say_nothing_and_hold_no_head_get_none(tmp_path: Path) -> None:
    """Their class ties by itself; the config goes on saying nothing."""
    one, other = (model(tmp_path / name, tied=None, head=False) for name in ("one", "other"))
    found = planned(linear(one, other))
    assert HEAD not in {job.name for job in found.jobs}
    assert "tie_word_embeddings" not in found.config


def test_a_stack_of_a_tied_and_an_untied_model_has_the_last_ones_head(tmp_path: Path) -> None:
    """Embedding of the first, head of the last; where the last is tied its embedding is the head."""
    one, other = model(tmp_path / "one", tied=True), model(tmp_path / "other")
    stack = "merge_method: passthrough\nslices:\n" + 2 * "  - sources: [{{model: {}, layer_range: [0, 2]}}]\n"
    assert {name: sources(job) for name, job in jobs(stack.format(one, other)).items()}[HEAD] == [(1, HEAD)]
    found = {name: sources(job) for name, job in jobs(stack.format(other, one)).items()}
    assert (found[EMBEDDING], found[HEAD]) == ([(0, EMBEDDING)], [(1, EMBEDDING)])


def test_a_base_model_that_is_not_read_unties_nothing(tmp_path: Path) -> None:
    """Its head is no part of a method that takes no base."""
    one, base = model(tmp_path / "one", tied=True), model(tmp_path / "base")
    found = planned(f"merge_method: passthrough\nbase_model: {base}\nmodels: [{{model: {one}}}]")
    assert HEAD not in {job.name for job in found.jobs}


# ---- dtype ----------------------------------------------------------------------------------------------------------


def dtypes(recipe: str) -> set[str]:
    return {job.dtype for job in jobs(recipe).values()}


def test_the_dtype_is_the_base_models(tmp_path: Path) -> None:
    """Whichever place it has among the models."""
    one, other = model(tmp_path / "one", dtype="F32"), model(tmp_path / "other", dtype="F16")
    recipe = f"merge_method: task_arithmetic\nbase_model: {other}\nmodels: [{{model: {one}}}]"
    assert dtypes(recipe) == {"F16"}
    assert planned(recipe).config["torch_dtype"] == "float16"


def test_without_a_base_the_dtype_is_the_first_models(tmp_path: Path) -> None:
    """The first in the recipe."""
    one, other = model(tmp_path / "one", dtype="F32"), model(tmp_path / "other", dtype="BF16")
    assert dtypes(linear(one, other)) == {"F32"}
    assert dtypes(linear(other, one)) == {"BF16"}
    assert planned(linear(other, one)).config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("said", "dtype"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_the_recipes_dtype_goes_before_all(tmp_path: Path, said: str, dtype: str) -> None:
    """In the tensors and in the config."""
    one, other = model(tmp_path / "one", dtype="F16"), model(tmp_path / "other", dtype="F16")
    recipe = linear(one, other, more=f"dtype: {said}\n")
    assert dtypes(recipe) == {dtype}
    assert planned(recipe).config["torch_dtype"] == said


def test_a_stack_of_models_of_different_dtypes_has_one_dtype(tmp_path: Path) -> None:
    """The first model's, also in layers that it does not have; only those are converted."""
    one, other = model(tmp_path / "one", layers=2, dtype="BF16"), model(tmp_path / "other", layers=6, dtype="F16")
    found = jobs(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {one}, layer_range: [0, 2]}}]
  - sources: [{{model: {other}, layer_range: [2, 6]}}]
""")
    assert {job.dtype for job in found.values()} == {"BF16"}
    assert [found[f"model.layers.{layer}.mlp.up_proj.weight"].is_copy for layer in (0, 1, 2, 5)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_a_model_with_norms_in_another_dtype_keeps_them_so(tmp_path: Path) -> None:
    """The dtype follows tensor by tensor, unless the recipe names one."""
    held: Tensors = {name: ("F32" if "norm" in name else "BF16", shape) for name, (_, shape) in llama().items()}
    one, other = write(tmp_path / "one", held), model(tmp_path / "other", dtype="F16")
    found = jobs(linear(one, other))
    assert {name: job.dtype for name, job in found.items()} == {name: dtype for name, (dtype, _) in held.items()}
    assert dtypes(linear(one, other, more="dtype: bfloat16\n")) == {"BF16"}


def test_what_is_copied_takes_the_recipes_dtype_unless_it_is_no_trained_number(tmp_path: Path) -> None:
    """Positions stay whole numbers, frequencies keep their precision; a value head is a tensor like any other."""
    extra: Tensors = {"v_head.weight": ("F32", (1, 8)), "rotary_emb.inv_freq": ("F32", (4,)), "steps": ("I64", ())}
    one, other = write(tmp_path / "one", {**llama(), **extra}), model(tmp_path / "other")
    found = jobs(linear(one, other, more="dtype: float16\n"))
    assert {name: found[name].dtype for name in extra} == {
        "v_head.weight": "F16", "rotary_emb.inv_freq": "F32", "steps": "I64",
    }  # fmt: skip
    assert {name: found[name].is_copy for name in extra} == {
        "v_head.weight": False, "rotary_emb.inv_freq": True, "steps": True,
    }  # fmt: skip


# ---- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "expected"), [("", 1111), ("base_model: {1}\n", 2222)])
def test_the_config_is_the_base_models_else_the_first_ones(tmp_path: Path, base: str, expected: int) -> None:
    """Whether or not the method reads a base; without an edit it is the same to the last key."""
    configs: list[dict[str, Any]] = [
        {"num_hidden_layers": 2, "max_position_embeddings": length, "nested": {"b": [1], "a": None}}
        for length in (1111, 2222)
    ]
    paths = [write(tmp_path / name, llama(), **config) for name, config in zip("ab", configs, strict=True)]
    found = planned(linear(*paths, more=base.format(*paths)))
    assert found.config == configs[expected // 2222]
    assert list(found.config) == list(configs[0])


def test_side_files_are_the_donors(tmp_path: Path) -> None:
    """Tokenizer and template go along; readmes, weights and code that the config does not refer to do not."""
    one, base = model(tmp_path / "one"), model(tmp_path / "base")
    names = ("tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json", "chat_template.jinja", "README.md",
             "generation_config.json", "modeling_own.py", "pytorch_model.bin", "training_args.bin",
             "preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json", "added_tokens.json",
             "notes.txt")  # fmt: skip
    for name in names:
        (tmp_path / "base" / name).write_text("{}" if name != "tokenizer.json" else '{"model": {"vocab": {}}}')
    (tmp_path / "one" / "spiece.model").write_text("")
    found = planned(f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {one}}}]")
    left = {"README.md", "modeling_own.py", "pytorch_model.bin", "training_args.bin", "notes.txt"}
    assert set(found.texts.taken) == set(names) - left


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cut", "limit"),
    [
        ("Llama", 20_000, 20_000), ("Llama", 6_000, 6_000), ("Llama", 2_000, 2_000), ("Llama", 2_000, 20_000),
        ("Qwen 3 MoE", 6_000, 6_000), ("Gemma 2", 6_000, 6_000), ("DeepSeek V3", 6_000, 6_000),
        ("Mixtral", 20_000, 20_000), ("Mixtral", 6_000, 6_000), ("Mixtral", 2_000, 6_000),
    ],
)  # fmt: skip
def test_a_model_in_several_files_comes_out_in_files_of_the_same_names_and_tensors(
    name: str, cut: int, limit: int, tmp_path: Path
) -> None:
    """As transformers cuts them, bytes included: what is small and comes late fits into no earlier file.

    Mixtral's experts are one tensor in memory, and all of its parts go where the first does, however large that makes
    the file.
    """
    CLASSES[name].make(seed=1).save_pretrained(tmp_path / "one", max_shard_size=cut)
    recipe = f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/one}}]\n"
    found = merged(recipe, tmp_path / "out", shard_size=limit)
    one, out = (
        {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
        for folder in (tmp_path / "one", tmp_path / "out")
    )
    assert len(one) > 1
    assert out == one
    first, second = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("one", "out")
    )
    assert second["weight_map"] == first["weight_map"]
    assert second["metadata"]["total_size"] == sum(job.nbytes for job in found.jobs)
