"""Parts of one model put into another: by filters (`tensors:`), and by the names of stacks (`modules:`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import vocabularies
from architectures.cases import CASES
from architectures.trial import load, merge
from transformers.utils import logging

from merger.errors import MergerError
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

logging.disable_progress_bar()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of two layers, the last one with its head tied; and one of four layers."""
    root = tmp_path_factory.mktemp("models")
    made = tiny.models(root, "chat", "coder")
    made["deep"] = tiny.model(root / "deep", 5, layers=4)
    tied = tiny.tensors(6)
    del tied["lm_head.weight"]
    made["tied"] = tiny.write(root / "tied", tied, tie_word_embeddings=True)
    return made


def recipe(text: str, models: dict[str, Path]) -> str:
    for name, folder in models.items():
        text = text.replace(f"%{name}", str(folder))
    return text


def test_attention_comes_from_another_model(models: dict[str, Path], tmp_path: Path) -> None:
    """Each tensor whose name contains the filter is that model's, byte for byte; all else is merged as before."""
    linear = "merge_method: linear\nmodels: [{model: %chat}, {model: %third}]\n"
    models = {**models, "third": tiny.model(tmp_path / "third", 7)}
    plain = merge(recipe(linear, models), tmp_path / "plain")
    mixed = merge(recipe(linear + "tensors: [{filter: self_attn, model: %coder}]\n", models), tmp_path / "mixed")
    coder = tiny.read(models["coder"])
    assert set(mixed) == set(plain)
    for name, tensor in mixed.items():
        assert torch.equal(tensor, coder[name] if "self_attn" in name else plain[name]), name


def test_the_first_rule_that_matches_counts_and_a_stage_may_give(models: dict[str, Path], tmp_path: Path) -> None:
    """q_proj is left with the model itself, the rest of the attention comes from what a stage makes; in float32."""
    text = (
        "name: half\nmerge_method: linear\nmodels: [{model: %chat}, {model: %coder}]\n---\n"
        "merge_method: passthrough\ndtype: float32\nmodels: [{model: %chat}]\ntensors:\n"
        "- {filter: q_proj, model: %chat}\n- {filter: self_attn, model: half}\n"
    )
    mixed, half = merge(recipe(text, models), tmp_path / "out"), tmp_path / "half"
    merged = merge(recipe("merge_method: linear\nmodels: [{model: %chat}, {model: %coder}]\n", models), half)
    chat = tiny.read(models["chat"])
    for name, tensor in mixed.items():
        expected = merged[name] if "self_attn" in name and "q_proj" not in name else chat[name]
        assert torch.equal(tensor, expected.float()), name


def test_of_a_stack_each_layer_takes_its_own_number(models: dict[str, Path], tmp_path: Path) -> None:
    """A layer takes the tensors of the layer that it is a copy of, wherever it stands in the result."""
    text = (
        "merge_method: passthrough\nslices:\n- sources: [{model: %chat, layer_range: [0, 2]}]\n"
        "- sources: [{model: %chat, layer_range: [1, 2]}]\ntensors: [{filter: mlp, model: %coder}]\n"
    )
    mixed, coder = merge(recipe(text, models), tmp_path / "out"), tiny.read(models["coder"])
    for new, old in enumerate((0, 1, 1)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(mixed[name.format(new)], coder[name.format(old)])


def test_a_head_taken_from_another_model_unties_the_result(models: dict[str, Path], tmp_path: Path) -> None:
    """The tied model gets a head of its own, and its config says so."""
    text = "merge_method: passthrough\nmodels: [{model: %tied}]\ntensors: [{filter: lm_head, model: %coder}]\n"
    mixed = merge(recipe(text, models), tmp_path / "out")
    assert torch.equal(mixed["lm_head.weight"], tiny.read(models["coder"])["lm_head.weight"])
    assert '"tie_word_embeddings": false' in (tmp_path / "out/config.json").read_text()


@pytest.mark.parametrize(("name", "tower", "text"), [
    ("Qwen 2.5 VL", "visual.", "model."), ("LLaVA", "vision_tower.", "language_model."),
    ("Gemma 3", "vision_tower.", "language_model."),
])  # fmt: skip
def test_the_eyes_of_one_model_and_the_language_of_another(name: str, tower: str, text: str, tmp_path: Path) -> None:
    """By filters, or by the stacks' names: each half is its model's, and the class loads and computes both alike."""
    case = CASES[name]
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seed in ((one, 1), (other, 2)):
        case.make(seed).save_pretrained(folder)
    filters = f"merge_method: passthrough\nmodels: [{{model: {one}}}]\ntensors: [{{filter: {tower}, model: {other}}}]\n"
    mixed = merge(filters, tmp_path / "mixed")
    first, second = tiny.read(one), tiny.read(other)
    assert any(key.startswith(text) for key in mixed)
    for key, tensor in mixed.items():
        assert torch.equal(tensor, (second if tower in key else first)[key]), key
    with torch.no_grad():
        assert torch.isfinite(load(case, tmp_path / "mixed")(**case.inputs())[0]).all()


def test_layers_of_encoder_and_decoder_change_in_one_recipe(tmp_path: Path) -> None:
    """Two stacks, each with another number of layers, what is outside of them merged."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seed in ((one, 1), (other, 2)):
        CASES["Whisper"].make(seed).save_pretrained(folder)

    def stack(name: str, *ranges: tuple[Path, int, int]) -> str:
        slices = ", ".join(f"{{sources: [{{model: {m}, layer_range: [{a}, {b}]}}]}}" for m, a, b in ranges)
        return f"  {name}: {{slices: [{slices}]}}\n"

    text = "merge_method: passthrough\nmodules:\n" + stack("model.encoder.layers", (one, 0, 3), (other, 1, 4))
    text += stack("model.decoder.layers", (other, 0, 2)) + f"  default: {{models: [{{model: {one}}}]}}\n"
    merge(text, tmp_path / "out")
    config = load(CASES["Whisper"], tmp_path / "out").config
    assert (config.encoder_layers, config.decoder_layers) == (6, 2)


@pytest.mark.parametrize(("rule", "sentence"), [
    ("{filter: self_atn, model: %coder}", "no tensor's name contains 'self_atn', or rules above it speak about all"),
    ("{filter: mlp, model: %deep}, {filter: up_proj, model: %coder}", "no tensor's name contains 'up_proj', or rules"),
    ("{filter: mlp, model: %small}", "model.layers.0.mlp.down_proj.weight is 16x24 in chat, but 16x8 in small"),
    ("{filter: layers.1, model: %short}", "short has no tensor model.layers.1.input_layernorm.weight"),
    ("{filter: embed, model: %other}", "model.embed_tokens.weight is 40x16 in chat, but 37x16 in other"),
])  # fmt: skip
def test_what_cannot_be_taken_is_refused(rule: str, sentence: str, models: dict[str, Path], tmp_path: Path) -> None:
    """A filter that nothing matches, and tensors that are not there or do not fit: at the rule's place."""
    models = {
        **models,
        "small": tiny.model(tmp_path / "small", 1, middle=8),
        "short": tiny.model(tmp_path / "short", 1, layers=1),
        "other": vocabularies.model(tmp_path / "other", 1, ["<a>"]),
    }
    (tmp_path / "mine.yaml").write_text(
        recipe(f"merge_method: passthrough\nmodels: [{{model: %chat}}]\ntensors: [{rule}]\n", models)
    )
    with pytest.raises(MergerError) as caught:
        plan(read_recipe(tmp_path / "mine.yaml"), Options())
    problem = caught.value.problems[-1]
    assert problem.what.startswith(sentence)
    assert problem.at is not None
    assert (problem.at.line, problem.hint is not None) == (3, True)


def test_an_embedding_of_another_vocabulary_is_refused_or_follows_the_tokenizer(tmp_path: Path) -> None:
    """Equal shapes are not enough: without a tokenizer block the rows must be the same tokens'."""
    one = vocabularies.model(tmp_path / "one", 1, ["<a>"])
    other = vocabularies.model(tmp_path / "other", 2, ["<b>"])
    text = f"merge_method: passthrough\nmodels: [{{model: {one}}}]\ntensors: [{{filter: embed, model: {other}}}]\n"
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(MergerError, match=r"the vocabularies differ: row \d+ is '<a>' in one and '<b>' in other"):
        plan(read_recipe(tmp_path / "mine.yaml"), Options())
    merge(text + "tokenizer: {source: union}\n", tmp_path / "out")
    found, theirs = vocabularies.rows(tmp_path / "out"), vocabularies.rows(other)
    assert set(found) == {*theirs, "<a>"}
    assert all(torch.equal(found[token], row) for token, row in theirs.items())
