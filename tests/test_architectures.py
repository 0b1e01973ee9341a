"""Models of many classes, written by transformers, merged and stacked by us, and loaded by transformers again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers.utils import logging as transformers_logging

from merger import run
from merger.errors import MergerError

SMALL: Mapping[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 40,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
DEEPSEEK = {
    **SMALL, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 4, "q_lora_rank": 4,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip
JAMBA = {
    **SMALL, "num_key_value_heads": 2, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A class of models, and what of its small config must differ from a Llama's.

    Args:
        config: the config's class; `model`: the model's.
        settings: what the config is made with.
        refused: the words with which other layers than its own are refused; None where they can be had.
    """

    config: str
    model: str
    settings: Mapping[str, Any]
    refused: str | None = None

    def make(self) -> transformers.PretrainedConfig:
        settings = dict(self.settings)
        if "vision_config" in settings:
            settings["vision_config"] = transformers.CLIPVisionConfig(**settings["vision_config"])
            settings["text_config"] = transformers.LlamaConfig(**settings["text_config"])
        return getattr(transformers, self.config)(**settings)


SEVERAL = "stacks of layers"
CASES = {
    "llama": Case("LlamaConfig", "LlamaForCausalLM", DECODER),
    "llama-tied": Case("LlamaConfig", "LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "mistral": Case("MistralConfig", "MistralForCausalLM", DECODER),
    "qwen2": Case("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": Case("Qwen3Config", "Qwen3ForCausalLM", DECODER),
    "qwen3-moe": Case("Qwen3MoeConfig", "Qwen3MoeForCausalLM",
                      {**DECODER, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                       "mlp_only_layers": [1]}),
    "mixtral": Case("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 3}),
    "gemma2": Case("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, "sliding_window": 8}),
    "gemma3": Case("Gemma3TextConfig", "Gemma3ForCausalLM",
                   {**DECODER, "sliding_window": 8, "sliding_window_pattern": 2}),
    "phi3": Case("Phi3Config", "Phi3ForCausalLM", DECODER),
    "gpt2": Case("GPT2Config", "GPT2LMHeadModel",
                 {"n_embd": 16, "n_layer": 4, "n_head": 4, "vocab_size": 40, "n_positions": 64,
                  "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-neox": Case("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "olmo2": Case("Olmo2Config", "Olmo2ForCausalLM", DECODER),
    "bert": Case("BertConfig", "BertForMaskedLM", SMALL),
    "roberta": Case("RobertaConfig", "RobertaForSequenceClassification", SMALL),
    "mamba": Case("MambaConfig", "MambaForCausalLM",
                  {"hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 40, "state_size": 4, "time_step_rank": 2,
                   "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "deepseek-v3": Case("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK),
    "jamba": Case("JambaConfig", "JambaForCausalLM", JAMBA, "attn_layer_period: 2"),
    "t5": Case("T5Config", "T5ForConditionalGeneration",
               {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 4, "num_heads": 4, "vocab_size": 40}, SEVERAL),
    "llava": Case("LlavaConfig", "LlavaForConditionalGeneration",
                  {"vision_config": VISION, "text_config": DECODER, "image_token_index": 39}, SEVERAL),
}  # fmt: skip
every_class = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Saving and loading a few hundred models draws no progress bars."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each class, made when first asked for, the folders of two models with nothing in common."""
    root = tmp_path_factory.mktemp("parents")

    class Made(dict[str, tuple[Path, Path]]):
        def __missing__(self, name: str) -> tuple[Path, Path]:
            self[name] = (_save(CASES[name], root / f"{name}-a", 1), _save(CASES[name], root / f"{name}-b", 2))
            return self[name]

    return Made()


def _save(case: Case, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = getattr(transformers, case.model)(case.make())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def _merge(recipe: str, out: Path) -> dict[str, torch.Tensor]:
    path = out.with_suffix(".yaml")
    path.write_text(recipe)
    options = run.Options(to=str(out), threads=1)
    planned, store = run.plan(run.read(path), options)
    for _ in run.run(planned, store, options):
        pass
    return tiny.read(out)


def _load(case: Case, folder: Path) -> transformers.PreTrainedModel:
    """The model as transformers loads it, once it has found no fault with any name or shape."""
    model, found = getattr(transformers, case.model).from_pretrained(folder, output_loading_info=True)
    assert {kind: names for kind, names in found.items() if names} == {}
    return model


def _stack(one: Path, other: Path) -> str:
    return f"""
merge_method: passthrough
slices:
  - sources: [{{model: {one}, layer_range: [0, 2]}}]
  - sources: [{{model: {other}, layer_range: [1, 4]}}]
"""


@every_class
def test_a_linear_merge_is_the_mean_of_every_tensor_and_loads(
    name: str, parents: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Half of each: no tensor is lost, added or renamed, each is the mean, and the class loads them all."""
    one, other = parents[name]
    weights = "".join(f"  - {{model: {model}, parameters: {{weight: 0.5}}}}\n" for model in (one, other))
    merged = _merge(f"merge_method: linear\nmodels:\n{weights}", tmp_path / "merged")
    first, second = tiny.read(one), tiny.read(other)
    assert set(merged) == set(first) == set(second)
    for tensor, found in merged.items():
        expected = (first[tensor].double() + second[tensor].double()) / 2
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-8), tensor
    _load(CASES[name], tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text()) == json.loads((one / "config.json").read_text())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused is None])
def test_a_stack_of_five_layers_of_two_models_loads_and_runs(
    name: str, parents: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Layers 0-1 of one and 1-3 of the other: the class takes the config, finds each tensor it wants, and computes."""
    one, other = parents[name]
    stacked = _merge(_stack(one, other), tmp_path / "stacked")
    model = _load(CASES[name], tmp_path / "stacked")
    assert model.config.num_hidden_layers == 5
    assert stacked.keys() == _expected(one, other).keys()
    for tensor, expected in _expected(one, other).items():
        assert torch.equal(stacked[tensor], expected), tensor
    ours, firsts = _logits(model), _logits(_load(CASES[name], one))
    assert ours.shape == firsts.shape
    assert torch.isfinite(ours).all()
    assert not torch.allclose(ours, firsts, atol=1e-3)


def _logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 7, 3, 20, 11, 5]])).logits


def _expected(one: Path, other: Path) -> dict[str, torch.Tensor]:
    """The stack, made by hand: whose layer is where, the embeddings of `one`, the rest of `other`."""
    first, second = tiny.read(one), tiny.read(other)
    before = ("embed_tokens", "embed_in", "embeddings", "wte", "wpe")
    stacked = {name: (first if any(word in name for word in before) else second)[name] for name in first}
    stacked = {name: tensor for name, tensor in stacked.items() if _layer(name) is None}
    for new, (model, layer) in enumerate([(first, 0), (first, 1), (second, 1), (second, 2), (second, 3)]):
        stacked |= {_renumbered(name, new): tensor for name, tensor in model.items() if _layer(name) == layer}
    return stacked


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _renumbered(name: str, layer: int) -> str:
    parts = name.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join([*parts[:place], str(layer), *parts[place + 1 :]])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused is not None])
def test_other_layers_than_a_config_can_tell_of_are_refused(
    name: str, parents: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """A model that no config.json describes is not written: the sentence says why."""
    one, other = parents[name]
    with pytest.raises(MergerError, match=CASES[name].refused):
        _merge(_stack(one, other), tmp_path / "stacked")
    assert not (tmp_path / "stacked").exists()


def test_layers_in_a_period_may_be_stacked_by_whole_periods(
    parents: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Jamba's attention comes in every second layer: two, two and two more keep to that, and load."""
    one, other = parents["jamba"]
    ranges = [(one, 0, 2), (other, 0, 2), (one, 2, 4)]
    sources = "".join(f"  - sources: [{{model: {m}, layer_range: [{a}, {b}]}}]\n" for m, a, b in ranges)
    _merge(f"merge_method: passthrough\nslices:\n{sources}", tmp_path / "stacked")
    assert _load(CASES["jamba"], tmp_path / "stacked").config.num_hidden_layers == 6


@pytest.mark.parametrize(("name", "stacks"), [
    ("t5", ("encoder.block", "decoder.block")),
    ("llava", ("language_model.model.layers", "vision_tower.encoder.layers")),
])  # fmt: skip
def test_modules_merge_one_stack_and_copy_the_others(
    name: str, stacks: tuple[str, str], parents: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """`modules:` with one stack: that is the mean of both models, all else is the first model's."""
    one, other = parents[name]
    recipe = f"merge_method: linear\nmodules:\n  {stacks[0]}:\n    models: [{{model: {one}}}, {{model: {other}}}]\n"
    merged = _merge(recipe, tmp_path / "merged")
    first, second = tiny.read(one), tiny.read(other)
    assert set(merged) == set(first)
    for tensor, found in merged.items():
        mean = (first[tensor] + second[tensor]) / 2
        assert torch.allclose(found, mean if tensor.startswith(stacks[0]) else first[tensor]), tensor
    _load(CASES[name], tmp_path / "merged")
