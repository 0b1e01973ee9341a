"""Results in eight bits: the bits of the tools that publish such models, and that these load them.

Not here: reading such models (test_quantised).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import merged
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
)

from merger.errors import RecipeError
from merger.models.checkpoint import TensorInfo
from merger.models.formats.fp8 import fp8_tensor, with_fp8
from merger.run.options import Options
from merger.verification.verify import Extent, verify

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
}  # fmt: skip
RAGGED = {**LLAMA, "hidden_size": 136, "intermediate_size": 300, "head_dim": 60}
QWEN = {**LLAMA, "model_type": "qwen3"}
MOE = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}
DEEPSEEK = {
    **LLAMA, "model_type": "deepseek_v3", "num_key_value_heads": 2, "q_lora_rank": 128, "kv_lora_rank": 64,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
}  # fmt: skip
ENDINGS = {"block": "_scale_inv", "channel": "_scale"}
OF_COMPRESSED_TENSORS = "compressed-tensors is an oracle that need not be installed"


def model(folder: Path, dtype: torch.dtype = torch.bfloat16, sizes: dict[str, Any] = LLAMA) -> Path:
    """A small one with rows and a matrix of zeros, and numbers of many sizes."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 2.0 ** torch.randint(-9, 3, parameter.shape))
            if parameter.ndim > 1:
                parameter[:3] *= 0
                parameter *= "layers.1.self_attn.k_proj" not in name
    made.to(dtype).save_pretrained(folder)
    return folder


def recipe(of: Path, kind: str) -> str:
    return f"merge_method: passthrough\nmodels: [{{model: {of}}}]\npublish: {{fp8: {kind}}}\n"


def by_transformers(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its own quantiser's codes and scales, of blocks that are whole."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config()

    found = Fp8Quantize(Quantizer())._quantize_one("x.weight", weight)
    return found["x.weight"], found["x.weight_scale_inv"]


def straight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same block by block, the last ones smaller."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*(-(-side // 128) for side in weight.shape))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            codes[place], scales[i, j] = by_transformers(torch.nn.functional.pad(
                weight[place], (0, 128 - weight[place].shape[1], 0, 128 - weight[place].shape[0])))[0][
                    : weight[place].shape[0], : weight[place].shape[1]], 0  # fmt: skip
            largest = weight[place].float().abs().max()
            scales[i, j] = 1 / (448 / largest) if largest > 0 else 1
    return codes, scales


def by_compressed_tensors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its own scales and codes, a scale a row."""
    pytest.importorskip("compressed_tensors", reason=OF_COMPRESSED_TENSORS)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    numbers = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    scales, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), numbers)
    scheme = QuantizationScheme(targets=["Linear"], weights=numbers)
    form = BaseCompressor.get_value_from_registry("float-quantized")
    return form.compress({"weight": weight, "weight_scale": scales}, scheme)["weight"], scales


CASES = {
    "by blocks": ("block", torch.bfloat16, LLAMA, by_transformers),
    "by blocks of float32": ("block", torch.float32, LLAMA, by_transformers),
    "by blocks that do not come out even": ("block", torch.float16, RAGGED, straight),
    "by blocks, Qwen 3 MoE": ("block", torch.bfloat16, MOE, by_transformers),
    "by blocks, Mixtral": ("block", torch.bfloat16, MIXTRAL, by_transformers),
    "by blocks, DeepSeek V3": ("block", torch.bfloat16, DEEPSEEK, straight),
    "by rows": ("channel", torch.bfloat16, RAGGED, by_compressed_tensors),
    "by rows, Qwen 3 MoE": ("channel", torch.bfloat16, MOE, by_compressed_tensors),
    "by rows, DeepSeek V3": ("channel", torch.bfloat16, DEEPSEEK, by_compressed_tensors),
    "by rows of float16": ("channel", torch.float16, LLAMA, by_compressed_tensors),
    "by rows of float32": ("channel", torch.float32, LLAMA, by_compressed_tensors),
}


@pytest.mark.parametrize("case", CASES)
def test_each_matrix_of_a_layer_has_the_bits_of_its_own_tool(tmp_path: Path, case: str) -> None:
    """Norms, embedding, head and routers stay as they are; sizes are the plan's; it is read as what it stands for."""
    kind, dtype, sizes, oracle = CASES[case]
    source = model(tmp_path / "one", dtype, sizes)
    planned = merged(recipe(source, kind), tmp_path / "out")
    there, made = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    eight = {
        name
        for name, tensor in there.items()
        if tensor.ndim == 2 and ".layers." in name and not name.endswith(".gate.weight")
    }
    assert {name + ENDINGS[kind] for name in eight} | there.keys() == made.keys()
    for name, tensor in there.items():
        if name not in eight:
            assert torch.equal(made[name], tensor), name
            continue
        codes, scales = oracle(tensor)
        assert made[name].dtype == torch.float8_e4m3fn
        assert torch.equal(made[name].view(torch.uint8), codes.view(torch.uint8)), name
        assert torch.equal(made[name + ENDINGS[kind]], scales), name
        assert made[name + ENDINGS[kind]].dtype == scales.dtype
    assert planned.files == {"model.safetensors": (tmp_path / "out" / "model.safetensors").stat().st_size}
    back = merged(recipe(tmp_path / "out", kind).partition("publish")[0], tmp_path / "back")
    assert any("read back from few bits" in note for note in back.notes)
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        if name in eight:
            scales = made[name + ENDINGS[kind]].float()
            for axis, side in enumerate(tensor.shape):
                each = side if kind == "channel" and axis else 1 if kind == "channel" else 128
                scales = scales.repeat_interleave(each, axis).narrow(axis, 0, side)
            assert torch.equal(tensor, (made[name].float() * scales).to(dtype)), name


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(kind, sizes) for kind in ENDINGS for sizes in (LLAMA, QWEN, MOE, MIXTRAL, DEEPSEEK)],
    ids=lambda each: each if isinstance(each, str) else each["model_type"],
)
def test_transformers_loads_what_is_written(tmp_path: Path, kind: str, sizes: dict[str, Any]) -> None:
    """Without a key too many or too few, as the numbers that codes and scales stand for; the head is the embedding."""
    more: dict[str, Any] = {}
    if kind == "channel":
        pytest.importorskip("compressed_tensors", reason=OF_COMPRESSED_TENSORS)
        more["quantization_config"] = CompressedTensorsConfig(run_compressed=False)
    source = model(tmp_path / "one", sizes={**sizes, "tie_word_embeddings": True})
    merged(recipe(source, kind), tmp_path / "out")
    merged(recipe(tmp_path / "out", kind).partition("publish")[0], tmp_path / "back")
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, **more)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16).state_dict()
    assert not any(told.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {name for name in plain if name in loaded.state_dict()} == plain.keys()
    for name, tensor in loaded.state_dict().items():
        if name in plain:
            assert torch.equal(tensor.bfloat16(), plain[name]), name


def test_files_are_cut_and_verified_as_others_are(tmp_path: Path) -> None:
    """Several shards with an index of codes and scales; one other byte is noticed."""
    source, out = model(tmp_path / "one"), tmp_path / "out"
    planned = merged(recipe(source, "block"), out, shard_size=300_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {name: load_file(out / name) for name in planned.files}
    assert len(shards) > 1
    assert index["weight_map"] == {key: name for name, held in shards.items() for key in held}
    assert {name: (out / name).stat().st_size for name in planned.files} == planned.files
    assert verify(str(out), Options(), Extent()).problems == ()
    damaged = next(iter(shards))
    raw = bytearray((out / damaged).read_bytes())
    raw[-1] ^= 1
    (out / damaged).write_bytes(raw)
    assert any(damaged in problem.what for problem in verify(str(out), Options(), Extent()).problems)


@pytest.mark.parametrize(
    ("config", "names", "what"),
    [
        ({"model_type": "gpt2"}, ("h.0.mlp.c_fc.weight",), "a model whose matrices have their inputs first"),
        ({"_class_name": "UNet2DConditionModel"}, ("up.0.x.weight",), "a diffusion model"),
        ({"model_type": "bert"}, ("model.norm.weight", "lm_head.weight"), "a model none of whose layers has a matrix"),
        (None, ("model.layers.0.up_proj.weight",), "a model without config.json"),
    ],
)
def test_what_has_no_such_form_is_refused(
    tmp_path: Path, config: dict[str, str] | None, names: tuple[str, ...], what: str
) -> None:
    """Where the recipe asks for it."""
    (tmp_path / "one").mkdir()
    save_file({name: torch.zeros(8, 8) for name in names}, tmp_path / "one" / "model.safetensors")
    if config is not None:
        (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError) as raised:
        merged(recipe(tmp_path / "one" / ("" if config else "model.safetensors"), "block"), tmp_path / "out")
    (problem,) = raised.value.problems
    assert what in problem.what
    assert (problem.where, problem.at and problem.at.line) == ("publish.fp8", 3)


KEPT = {
    "model.layers.0.mlp.gate.weight": True, "model.layers.0.mlp.gate_proj.weight": False,
    "model.layers.0.mlp.experts.3.w1.weight": False, "model.layers.0.block_sparse_moe.router.layer.weight": True,
    "model.layers.0.mlp.shared_expert_gate.weight": True, "model.layers.0.mlp.shared_expert.up_proj.weight": False,
    "model.layers.61.eh_proj.weight": True, "model.layers.61.shared_head.head.weight": True,
    "model.layers.61.embed_tokens.weight": True, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": False,
    "model.visual.blocks.0.attn.qkv.weight": True, "vision_tower.encoder.layers.0.fc1.weight": True,
    "model.language_model.layers.0.mlp.down_proj.weight": False, "lm_head.weight": True, "head.weight": True,
    "model.embed_tokens.weight": True, "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": True,
    "encoder.layer.0.attention.self.query.weight": False, "multi_modal_projector.linear_1.weight": True,
}  # fmt: skip


def test_modules_that_the_published_ones_leave_alone_stay() -> None:
    """Routers, heads, what looks up, what sees; the config names each of them that is a matrix."""
    found = {name: fp8_tensor(TensorInfo(name, "BF16", (8, 8), "", 0, 128), "block") for name in KEPT}
    assert {name: tensor.kind is None for name, tensor in found.items()} == KEPT
    kept = [name.removesuffix(".weight") for name, stays in KEPT.items() if stays and "embed_tokens" not in name]
    said = {kind: with_fp8({"x": 1}, found.values(), kind)["quantization_config"] for kind in ENDINGS}
    assert sorted(said["block"]["modules_to_not_convert"]) == sorted(kept) == sorted(said["channel"]["ignore"])
    assert (said["block"]["weight_block_size"], said["block"]["quant_method"]) == ([128, 128], "fp8")
