"""Adapters that were trained after tokens were added bring their model an embedding, a head and a tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from architectures.cases import CASES as CLASSES
from calls import Command
from loopback import LoopbackHub
from merging import merged
from safetensors.torch import load, load_file, save_file
from thorough import thorough_only
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import BASE, model, rows

from merger.cli.commands import main

pytest.importorskip("peft")

ADDED = ["<|im_start|>", "<|im_end|>"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
AS_IT_WAS: Mapping[str, Any] = {}
WHOLE: Mapping[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
ONE_WHOLE: Mapping[str, Any] = {"modules_to_save": ["embed_tokens"]}
ROWS_OF_BOTH = {"trainable_token_indices": {"embed_tokens": [3, len(BASE) + 1], "lm_head": [len(BASE)]}}
CASES: Mapping[str, tuple[bool, Mapping[str, Any], bool]] = {  # tied before; how it is trained; tied afterwards
    "not trained": (False, AS_IT_WAS, False),
    "trained whole": (False, WHOLE, False),
    "trained by a product": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
    "single rows trained": (False, {"trainable_token_indices": [3, len(BASE), len(BASE) + 1]}, False),
    "single rows of both trained": (False, ROWS_OF_BOTH, False),
    "tied, single rows trained": (True, {"trainable_token_indices": [len(BASE) + 1, 3]}, True),
    "tied, not trained": (True, AS_IT_WAS, True),
    "tied, trained whole": (True, WHOLE, False),
    "tied, the embedding trained whole": (True, ONE_WHOLE, False),
    "tied, trained whole as one": (True, {**ONE_WHOLE, "ensure_weight_tying": True}, True),
    "tied, trained by a product": (True, {"target_modules": ["q_proj", "embed_tokens"]}, True),
}


def grown(folder: Path, base: Path, **config: Any) -> Mapping[str, Tensor]:
    """An adapter of a model that was given two tokens first, with its tokenizer; and what PEFT makes of both."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        resized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        resized.resize_token_embeddings(len(tokenizer))
        peft = get_peft_model(resized, LoraConfig(**{"target_modules": ["q_proj"], "r": 4, **config}))
        for name, tensor in peft.state_dict().items():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
        peft.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        whole = peft.merge_and_unload()
        whole.save_pretrained(folder.parent / f"{folder.name}-merged")
    return load_file(folder.parent / f"{folder.name}-merged/model.safetensors")


def passthrough(reference: str, more: str = "") -> str:
    return f"merge_method: passthrough\nmodels: [{{model: {reference}}}]\n{more}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_model_takes_its_adapters_embedding_head_and_tokenizer(case: str, tmp_path: Path) -> None:
    """What PEFT makes of the resized model, a head of its own too; transformers loads it with the adapter's tokens."""
    tied, trained, tied_afterwards = CASES[case]
    base = model(tmp_path / "base", 1, tied=tied)
    expected = grown(tmp_path / "lora", base, **trained)
    merged(passthrough(f"{base}+{tmp_path / 'lora'}"), tmp_path / "out")
    found = tiny.read(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=4e-7, atol=4e-8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<|im_start|>the<|im_end|>").input_ids == [len(BASE), BASE.index("the"), len(BASE) + 1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is tied_afterwards
    assert loaded.config.vocab_size == len(loaded.get_input_embeddings().weight) == len(BASE) + 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["union", "base", "lora"])
def test_a_tokenizer_block_sees_an_adapters_tokens(source: str, tmp_path: Path) -> None:
    """A base model and a task vector with two tokens more: united, left out, or all of the adapter's."""
    base = model(tmp_path / "base", 1)
    expected = grown(tmp_path / "lora", base, **WHOLE)
    tuned = f"{base}+{tmp_path / 'lora'}"
    block = f"tokenizer_source: {tuned if source == 'lora' else source}"
    recipe = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {tuned}}}]\n{block}\n"
    merged(recipe + "parameters: {weight: 0.5}\n", tmp_path / "out")
    found, before = rows(tmp_path / "out"), rows(base)
    assert set(found) == {*BASE, *(ADDED if source != "base" else ())}
    for number, token in enumerate(BASE):
        torch.testing.assert_close(found[token], (before[token] + expected[EMBEDDING][number]) / 2)
    for number, token in enumerate(ADDED if source != "base" else ()):
        torch.testing.assert_close(found[token], expected[EMBEDDING][len(BASE) + number])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == len(found)


@pytest.mark.filterwarnings("ignore")
def test_without_a_tokenizer_block_an_adapters_tokens_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first row that stands for different tokens, and which block to add."""
    base = model(tmp_path / "base", 1)
    grown(tmp_path / "lora", base, **WHOLE)
    recipe = f"merge_method: linear\nmodels: [{{model: {base}}}, {{model: {base}+{tmp_path / 'lora'}}}]\n"
    (tmp_path / "mine.yaml").write_text(recipe + "parameters: {weight: 1}\n")
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 4
    told = capsys.readouterr().err
    assert "lm_head.weight is 36x16 in base, but 38x16 in base+lora" in told
    assert "add tokenizer: {source: union}" in told


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_more_rows_brings_its_tokenizer_too(tmp_path: Path) -> None:
    """Where a spare row was trained as a token; without a tokenizer beside it, the model's is taken."""
    base = model(tmp_path / "base", 1, rows=len(BASE) + 2)
    grown(tmp_path / "lora", base, **WHOLE)
    for number, expected in enumerate((len(BASE) + 2, len(BASE))):
        merged(passthrough(f"{base}+{tmp_path / 'lora'}"), tmp_path / f"out-{number}")
        assert len(AutoTokenizer.from_pretrained(tmp_path / f"out-{number}")) == expected
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "lora" / name).unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_single_rows_of_a_model_that_had_spare_ones(tied: bool, tmp_path: Path) -> None:
    """The model's own embedding with these rows in place of its, and no other changed."""
    base = model(tmp_path / "base", 1, rows=len(BASE) + 2, tied=tied)
    numbers = [len(BASE) + 1, 4]
    expected = grown(tmp_path / "lora", base, trainable_token_indices=numbers)
    merged(passthrough(f"{base}+{tmp_path / 'lora'}"), tmp_path / "out")
    found, before = tiny.read(tmp_path / "out")[EMBEDDING], tiny.read(base)[EMBEDDING]
    assert torch.equal(found, expected[EMBEDDING])
    assert sorted(numbers) == [row for row in range(len(found)) if not torch.equal(found[row], before[row])]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<|im_end|>").input_ids == [len(BASE) + 1]


@pytest.mark.filterwarnings("ignore")
def test_a_tied_model_whose_files_hold_a_head_all_the_same_takes_the_adapters(tmp_path: Path) -> None:
    """The stored head is nobody's; the trained one is the result's, and its config says that there is one."""
    base = model(tmp_path / "base", 1, rows=len(BASE) + 2, tied=True)
    expected = grown(tmp_path / "lora", base, **WHOLE)
    stale = {**tiny.read(base), HEAD: torch.ones(len(BASE) + 2, 16)}
    tiny.write(base, stale, vocab_size=len(BASE) + 2, tie_word_embeddings=True)
    merged(passthrough(f"{base}+{tmp_path / 'lora'}"), tmp_path / "out")
    assert torch.equal(tiny.read(tmp_path / "out")[HEAD], expected[HEAD])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.filterwarnings("ignore")
def test_a_product_for_tokens_in_another_order_takes_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of a product are not read one by one: refused, and done as the sentence says."""
    base, other = model(tmp_path / "base", 1), model(tmp_path / "other", 2, ["<x>"])
    expected = grown(tmp_path / "lora", base, target_modules=["q_proj", "embed_tokens", "lm_head"])
    tuned = f"{base}+{tmp_path / 'lora'}"
    recipe = "merge_method: linear\nmodels: [{model: %s}, {model: %s}]\nparameters: {weight: 1}\ntokenizer: {}\n"
    (tmp_path / "mine.yaml").write_text(recipe % (tuned, other))
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 4
    hint = "put a document before this one that merges them by passthrough, and name that"
    assert hint in capsys.readouterr().err
    staged = f"name: tuned\nmerge_method: passthrough\nmodels: [{{model: {tuned}}}]\n---\n"
    merged(staged + recipe % ("tuned", other), tmp_path / "out")
    found, theirs = rows(tmp_path / "out"), rows(other)
    for token, number in (("the", BASE.index("the")), ("<|im_end|>", len(BASE) + 1)):
        own = expected[EMBEDDING][number]
        torch.testing.assert_close(found[token], (own + theirs[token]) / 2 if token in theirs else own)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_keeps_of_the_model_is_never_taken_for_trained(tmp_path: Path) -> None:
    """Of three copies of one module, under whatever order of names, the trained one counts."""
    base = model(tmp_path / "base", 1)
    expected = grown(tmp_path / "lora", base, **WHOLE)
    file = tmp_path / "lora/adapter_model.safetensors"
    held = load_file(file)
    trained = "base_model.model.lm_head.modules_to_save.weight"
    assert held.pop("base_model.model.lm_head.weight").equal(held[trained])
    save_file(held, file)
    merged(passthrough(f"{base}+{tmp_path / 'lora'}"), tmp_path / "out")
    assert torch.equal(tiny.read(tmp_path / "out")[HEAD], expected[HEAD])


@thorough_only
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_hub_brings_its_tokens(tmp_path: Path, served: LoopbackHub, command: Command) -> None:
    """Rows and tokenizer come from its commit, which the lock file names with both; the result is verified."""
    base = model(tmp_path / "base", 1)
    expected = grown(tmp_path / "lora", base, trainable_token_indices=[3, len(BASE)])
    for name in ("base", "lora"):
        served.add_model(f"org/{name}", tmp_path / name)
    (tmp_path / "mine.yaml").write_text(passthrough("org/base+org/lora", "publish: {repo: org/out}\n"))
    done = command("run", "mine.yaml", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    for name, tensor in load(served.read("org/out", "model.safetensors")).items():
        torch.testing.assert_close(tensor, expected[name], rtol=4e-7, atol=4e-8)
    assert served.read("org/out", "tokenizer.json") == (tmp_path / "lora/tokenizer.json").read_bytes()
    lock = yaml.safe_load(served.read("org/out", "merger.lock.yaml"))
    files = {one["model"]: {item["file"] for item in one["files"]} for one in lock["models"]}
    assert {"adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files["org/lora"]
    assert command("verify", "hf://org/out", "--all", cwd=tmp_path, hub=served).returncode == 0


UNTIED: Mapping[str, tuple[Mapping[str, Any], bool]] = {  # how it is trained; tied afterwards
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "the head, and the embedding whole": ({"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, False),
    "the head and the embedding": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "both as one": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}, True),
}


def tied(family: str, folder: Path) -> Path:
    """A small model of a family, tied as the smaller published ones of it are."""
    if family == "Mistral":
        return model(folder, 1, tied=True)
    case = CLASSES[family]
    replace(case, settings={**case.settings, "tie_word_embeddings": True}).make(seed=1).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "case", "stored"),
    [
        *(("Mistral", case, stored) for case in UNTIED for stored in (True, False)),
        *((family, "the head", True) for family in ("Llama", "Gemma", "Gemma 2", "Qwen 2", "Qwen 3", "Cohere")),
        ("Gemma 2", "the head, and the embedding whole", True),
    ],
)
def test_a_product_for_a_tied_head_gives_the_model_one_of_its_own(
    family: str, case: str, stored: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model with its adapter computes; PEFT's merge gives that of a model untied before, else it changes the
    embedding too. `stored`: the adapter holds the matrices that it adds to, as PEFT saves it.
    """
    from peft import LoraConfig, get_peft_model

    trained, stays = UNTIED[case]
    base = tied(family, tmp_path / "base")
    torch.manual_seed(5)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, **trained))
    for name, tensor in peft.state_dict().items():
        if "lora_" in name or "modules_to_save" in name:
            tensor.copy_(torch.randn(tensor.shape) * 0.1)
    peft.save_pretrained(tmp_path / "lora")
    held = load_file(tmp_path / "lora/adapter_model.safetensors")
    kept = {name: tensor for name, tensor in held.items() if stored or ".base_layer." not in name}
    save_file(kept, tmp_path / "lora/adapter_model.safetensors")
    merged(passthrough(f"{base}+{tmp_path / 'lora'}"), tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.tie_word_embeddings is stays
    assert (HEAD in tiny.read(tmp_path / "out")) is not stays
    (tmp_path / "mine.yaml").write_text(passthrough(f"{base}+{tmp_path / 'lora'}"))
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 0
    note = "head: a tensor of its own, for base+lora changes it, and not the embedding that it was"
    told = capsys.readouterr().out
    assert (note in told) is not stays
    assert ("lm_head.lora_B.weight: lora: the head is the embedding" in told) is stays
    ids = torch.tensor([[1, 7, 3, 11]])
    torch.testing.assert_close(found(ids).logits, peft(ids).logits, rtol=1e-5, atol=1e-5)
