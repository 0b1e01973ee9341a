"""Adapters that are damaged, of another kind or of another model are refused: place, sentence, next step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merger.cli.commands import main

GOLDEN = Path(__file__).parents[1] / "golden" / "adapters.txt"
RECIPE = """\
merge_method: passthrough
models:
  - model: ./base+./lora
"""
Q = "base_model.model.model.layers.0.self_attn.q_proj"
Damage = Callable[[Path, dict[str, Any], dict[str, Tensor]], None]


def config(**changed: Any) -> Damage:
    return lambda folder, settings, tensors: settings.update(changed)


def tensors(**changed: Tensor | None) -> Damage:
    """Tensors by the end of their names; None takes them out."""

    def damage(folder: Path, settings: dict[str, Any], held: dict[str, Tensor]) -> None:
        for end, tensor in changed.items():
            for name in [name for name in held if name.endswith(end)] or [f"base_model.model.{end}"]:
                held.pop(name, None)
                if tensor is not None:
                    held[name] = tensor

    return damage


def without(file: str, put: str = "") -> Damage:
    def damage(folder: Path, settings: dict[str, Any], held: dict[str, Tensor]) -> None:
        (folder / file).unlink()
        if put:
            (folder / put).write_bytes(b"")

    return damage


def text(content: str) -> Damage:
    return lambda folder, settings, held: (folder / "adapter_config.json").write_text(content) and None


def cut(folder: Path, settings: dict[str, Any], held: dict[str, Tensor]) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def rows_of_tokens(numbers: object) -> Damage:
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"

    def damage(folder: Path, settings: dict[str, Any], held: dict[str, Tensor]) -> None:
        tensors(**{name: torch.ones(2, 16), **NO_PRODUCT})(folder, settings, held)
        settings["trainable_token_indices"] = numbers

    return damage


def two_towers(folder: Path, settings: dict[str, Any], held: dict[str, Tensor]) -> None:
    twice = {name.replace("model.layers", f"{tower}.layers"): tensor.clone() for tower in
             ("text_model.encoder", "vision_model.encoder") for name, tensor in tiny.tensors().items()}  # fmt: skip
    tiny.write(folder.parent / "base", twice)
    q = {name.replace("model.model.layers", "model.encoder.layers"): tensor for name, tensor in held.items()
         if "q_proj" in name}  # fmt: skip
    held.clear()
    held.update(q)


NO_PRODUCT = {"embed_tokens.lora_embedding_A": None, "embed_tokens.lora_embedding_B": None}
CASES: Mapping[str, Damage] = {
    "no adapter_config.json": without("adapter_config.json"),
    "no tensors": without("adapter_model.safetensors"),
    "pickled": without("adapter_model.safetensors", "adapter_model.bin"),
    "no JSON": text("{"),
    "no JSON object": text("[]"),
    "cut short": cut,
    "another kind": config(peft_type="IA3"),
    "no kind": config(peft_type=None),
    "rank that is none": config(r="8"),
    "alpha that is none": config(lora_alpha=None),
    "pattern that is none": config(rank_pattern={"(": 4}),
    "repeated layers": config(layer_replication=[[0, 1], [0, 2]]),
    "rows of tokens that are not there": config(trainable_token_indices=[1, 2]),
    "rows of tokens without their numbers": rows_of_tokens("1, 2"),
    "more numbers than rows of tokens": rows_of_tokens([1, 2, 3]),
    "rows of tokens beyond the model's": rows_of_tokens([1, 99]),
    "a start that changes the model": config(init_lora_weights="pissa_niter_4"),
    "another rank": config(rank_pattern={"q_proj": 3}),
    "DoRA without magnitudes": config(use_dora=True),
    "A without B": tensors(**{"0.self_attn.q_proj.lora_B.weight": None}),
    "B without A": tensors(**{"0.self_attn.q_proj.lora_A.weight": None}),
    "a matrix that does not fit": tensors(**{"0.self_attn.q_proj.lora_B.weight": torch.ones(18, 4)}),
    "a convolution": tensors(**{
        "0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16, 1),
        "0.self_attn.q_proj.lora_B.weight": torch.ones(16, 4, 1),
    }),
    "whole numbers": tensors(**{"0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}),
    "a whole tensor of another size": tensors(**{"model.norm.weight": torch.ones(17)}),
    "tensors of another model": tensors(**{
        f"model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
        for layer in (7, 8) for part, shape in {"A": (4, 16), "B": (16, 4)}.items()
    }),
    "a tensor that may be either of two": two_towers,
    "two tensors that may be one": tensors(**{
        f"language_model.layers.1.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
        for part, shape in {"A": (4, 16), "B": (16, 4)}.items()
    }),
    "an unknown tensor": tensors(**{"model.layers.0.router.bias": torch.ones(3)}),
    "rows of tokens that nobody tells": tensors(**{
        "model.embed_tokens.weight": torch.ones(42, 16), "lm_head.weight": torch.ones(42, 16), **NO_PRODUCT,
    }),
    "more rows than the head has": tensors(**{"model.embed_tokens.weight": torch.ones(42, 16), **NO_PRODUCT}),
    "rows of another width": tensors(**{"model.embed_tokens.weight": torch.ones(40, 8), **NO_PRODUCT}),
    "a product for more tokens": tensors(**{
        "lm_head.lora_A.weight": torch.ones(4, 16), "lm_head.lora_B.weight": torch.ones(42, 4),
    }),
}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model ./base, a sound adapter ./lora of it, and a recipe."""
    monkeypatch.chdir(tmp_path)
    tiny.lora(tmp_path / "lora", tiny.model(tmp_path / "base"), rank=4)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    code = main(["plan", "mine.yaml"])
    told = capsys.readouterr()
    assert told.out == ""
    return f"exit code {code}\n{told.err}"


def damaged(folder: Path, damage: Damage) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    held = load_file(folder / "adapter_model.safetensors")
    before = (dict(settings), dict(held))
    damage(folder, settings, held)
    if settings != before[0]:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    if held.keys() != before[1].keys() or any(held[name] is not before[1][name] for name in held):
        save_file(held, folder / "adapter_model.safetensors")


def golden(file: Path = GOLDEN) -> dict[str, str]:
    parts = file.read_text().split("## ")[1:]
    return {head: body.strip() for head, _, body in (part.partition("\n") for part in parts)}


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_adapter_is_refused_word_for_word(
    case: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code, the place of the model in the recipe, what is wrong, what to do."""
    damaged(pair / "lora", CASES[case])
    assert refused(capsys).strip() == golden()[case]


def test_each_case_has_its_words() -> None:
    """No more and no fewer than the cases."""
    assert list(golden()) == list(CASES)


def test_a_sound_adapter_is_not_refused(pair: Path) -> None:
    """The cases are wrong for what each changes."""
    assert main(["plan", "mine.yaml"]) == 0


def test_an_adapter_in_the_place_of_a_model_is_told(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With how to add it to its model."""
    (pair / "mine.yaml").write_text(RECIPE.replace("./base+", ""))
    assert refused(capsys) == (
        "exit code 3\nmine.yaml:3:12: models[./lora]: is a LoRA adapter, not a model\n"
        "    add it to its model: org/model+lora; or list adapters under adapters: to merge them\n"
    )


def whole_norm(folder: Path) -> None:
    damaged(folder, tensors(**{"model.norm.weight": torch.ones(16)}))


def other_shape(folder: Path) -> None:
    damaged(folder, tensors(**{"0.self_attn.q_proj.lora_B.weight": torch.ones(18, 4)}))


def embedding_as_matrix(folder: Path) -> None:
    damaged(folder, tensors(**{
        "embed_tokens.lora_embedding_A": None, "embed_tokens.lora_embedding_B": None,
        "model.embed_tokens.lora_A.weight": torch.ones(4, 40), "model.embed_tokens.lora_B.weight": torch.ones(16, 4),
    }))  # fmt: skip


def by_another_class(folder: Path) -> None:
    def rename(folder: Path, settings: dict[str, Any], held: dict[str, Tensor]) -> None:
        for name in list(held):
            held[name.replace("model.model.", "model.model.language_model.")] = held.pop(name)

    damaged(folder, rename)


def a_model(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny.model(folder)


MERGES: Mapping[str, Callable[[Path], None]] = {
    "a tensor held whole": whole_norm,
    "another shape": other_shape,
    "another kind of module": embedding_as_matrix,
    "names of another class": by_another_class,
    "a model among adapters": a_model,
}


@pytest.mark.parametrize("case", MERGES)
def test_adapters_that_cannot_be_merged_are_refused_word_for_word(
    case: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the place of the one that does not fit."""
    tiny.lora(pair / "other", pair / "base", rank=4)
    MERGES[case](pair / "other")
    (pair / "mine.yaml").write_text("merge_method: linear\nadapters:\n  - model: ./lora\n  - model: ./other\n")
    assert refused(capsys).strip() == golden(GOLDEN.with_name("merged-adapters.txt"))[case]
