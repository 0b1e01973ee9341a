"""Models that are stored in eight bits with scales are merged as what they stand for; what is not read is refused.

Not here: packed formats that are read (test_packed).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from loopback import LoopbackHub
from merging import merged
from torch import Tensor
from transformers import AutoModelForCausalLM

from merger.errors import ModelError
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

if TYPE_CHECKING:
    from conftest import Command

FP8 = torch.float8_e4m3fn
BLOCK = [5, 7]
"""Divides no side of the tensors below."""

Tensors = dict[str, Tensor]


def by_blocks(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales, and what they stand for: a scale for each 5 rows and 7 columns."""
    rows, columns = (-(-side // of) for side, of in zip(tensor.shape, BLOCK, strict=True))
    scales = 0.01 + torch.rand(rows, columns)
    spread = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: tensor.shape[0], : tensor.shape[1]]
    return _stored(tensor, scales, spread)


def by_rows(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A scale for each row."""
    scales = 0.01 + torch.rand(tensor.shape[0], 1)
    return _stored(tensor, scales, scales)


def whole(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One scale, in bfloat16."""
    scale = torch.tensor(0.037, dtype=torch.bfloat16)
    return _stored(tensor, scale, scale.float())


def integers(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers of eight bits, a scale for each row."""
    scales = tensor.float().abs().amax(1, keepdim=True) / 127
    numbers = (tensor / scales).round().to(torch.int8)
    return numbers, scales, numbers.float() * scales


def _stored(tensor: Tensor, scales: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    numbers = (tensor.float() / spread).to(FP8)
    return numbers, scales, numbers.float() * spread


WAYS: Mapping[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], str, Mapping[str, Any]]] = {
    "fp8 by blocks": (by_blocks, "_scale_inv", {"quant_method": "fp8", "weight_block_size": BLOCK}),
    "fp8 by blocks, compressed-tensors": (by_blocks, "_scale", {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"block_structure": BLOCK, "strategy": "block"}}},
    }),
    "fp8 by rows": (by_rows, "_scale", {"quant_method": "fbgemm_fp8"}),
    "fp8 by tensors": (whole, "_scale", {"quant_method": "modelopt"}),
    "int8 by rows": (integers, "_scale", {"quant_method": "compressed-tensors"}),
}  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS)


def quantised(folder: Path, way: str, seed: int, **shape: int) -> tuple[Path, Path]:
    """A model whose projections are quantised, and the same model in float32."""
    make, ending, said = WAYS[way]
    torch.manual_seed(seed)
    plain, stored = Tensors(), Tensors()
    for name, tensor in tiny.tensors(seed, **shape).items():
        plain[name] = stored[name] = tensor
        if "_proj" in name:
            numbers, scales, read_back = make(tensor)
            stored |= {name: numbers, name + ending: scales, name.replace("weight", "input_scale"): torch.ones(())}
            plain[name] = read_back
    sizes = {"vocab_size": len(plain["lm_head.weight"]), "hidden_size": plain["lm_head.weight"].shape[1]}
    tiny.write(folder / "stored", stored, quantization_config=said, **sizes)
    tiny.write(folder / "plain", plain, **sizes)
    return folder / "stored", folder / "plain"


def ties(one: object, other: object, base: object) -> str:
    """A method that measures whole tensors, and is not linear."""
    models = f"[{{model: {one}}}, {{model: {other}}}]"
    return f"merge_method: ties\nbase_model: {base}\ndtype: float32\nmodels: {models}\nparameters: {{density: 0.6}}\n"


@every_way
def test_a_quantised_model_merges_as_what_it_stands_for(way: str, tmp_path: Path) -> None:
    """The tensors are those of a merge of the model that was read back; the config knows of no quantisation."""
    one, two, base = (quantised(tmp_path / str(seed), way, seed) for seed in range(3))
    planned = merged(ties(one[0], two[1], base[0]), tmp_path / "out")
    merged(ties(one[1], two[1], base[1]), tmp_path / "expected")
    found, expected = tiny.read(tmp_path / "out"), tiny.read(tmp_path / "expected")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert {(left.model, left.why) for left in planned.left_out} == {
        (number, "only a quantised model has a use for it") for number in (0, 2)
    }


@every_way
def test_tensors_that_are_longer_than_a_block_are_read_back_in_parts(way: str, tmp_path: Path) -> None:
    """Blocks that begin and end within rows, and within blocks of scales."""
    stored, plain = quantised(tmp_path, way, 0, layers=1, hidden=44, middle=13_000)
    for place, model in (("out", stored), ("expected", plain)):
        merged(f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: {model}}}]\n", tmp_path / place)
    found, expected = tiny.read(tmp_path / "out"), tiny.read(tmp_path / "expected")
    assert max(tensor.numel() for name, tensor in found.items() if "_proj" in name) > 1 << 19
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_result_has_the_dtype_of_the_model_before_it_was_quantised(tmp_path: Path) -> None:
    """Its config says which; transformers loads the merge as it would load any other."""
    stored, plain = quantised(tmp_path, "fp8 by blocks", 0)
    merged(f"merge_method: linear\nmodels: [{{model: {stored}}}, {{model: {plain}}}]\n", tmp_path / "out")
    assert {tensor.dtype for tensor in tiny.read(tmp_path / "out").values()} == {torch.bfloat16}
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert model.dtype == torch.bfloat16


def test_numbers_and_scales_come_from_the_hub_by_range(served: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """Scales are read once, and what comes out is what comes out of folders."""
    one, two, base = (quantised(tmp_path / str(seed), "fp8 by blocks", seed)[0] for seed in range(3))
    for name, folder in (("one", one), ("two", two), ("base", base)):
        served.add_model(f"org/{name}", folder)
    (tmp_path / "mine.yaml").write_text(ties("org/one", "org/two", "org/base"))
    served.clear_log()
    done = command("run", "mine.yaml", "--to", "out", "--no-look", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    merged(ties(one, two, base), tmp_path / "local")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "local/model.safetensors").read_bytes()
    sent = sum(r.sent for r in served.log if r.host == "cdn" and r.method == "GET")
    assert sent <= sum((folder / "model.safetensors").stat().st_size for folder in (one, two, base))


NAME = "model.layers.0.mlp.up_proj.weight"
PACKED: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any] | None, str]] = {
    "GPTQ by its config": ({}, {"quant_method": "gptq"}, "is quantised by GPTQ; its stored numbers must not"),
    "AWQ by its tensors": ({NAME.replace("weight", "qweight"): torch.ones(2, 2, dtype=torch.int32)}, None,
                           "is quantised by GPTQ or AWQ; its stored numbers must not"),
    "bitsandbytes": ({NAME + ".absmax": torch.ones(2)}, {"quant_method": "bitsandbytes"},
                     "is quantised by bitsandbytes; its stored numbers must not"),
    "MXFP4": ({"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.ones(2, dtype=torch.uint8),
               "model.layers.0.mlp.experts.gate_up_proj_scales": torch.ones(2, dtype=torch.uint8)},
              {"quant_method": "mxfp4"}, "stores model.layers.0.mlp.experts.gate_up_proj as [2] of U8 with scales [2]"),
    "NVFP4 of other groups": ({NAME: torch.ones(24, 8, dtype=torch.uint8), NAME + "_scale": torch.ones(24, 2).to(FP8),
                               NAME + "_scale_2": torch.tensor(1.0)}, {"quant_method": "modelopt"},
                              f"stores {NAME} as [24, 8] of U8 with scales [24, 2] of F8_E4M3 and whole [] of F32"),
    "NVFP4 of scaled inputs": ({NAME: torch.ones(24, 8, dtype=torch.uint8), NAME + "_scale": torch.ones(24, 1).to(FP8),
                                NAME + "_scale_2": torch.tensor(1.0),
                                NAME.replace("weight", "pre_quant_scale"): torch.ones(16)},
                               {"quant_method": "modelopt"}, "is quantised by ModelOpt with scaled inputs; its stored"),
    "AWQ of another order": ({NAME.replace("weight", "qweight"): torch.ones(24, 2, dtype=torch.int32),
                              NAME.replace("weight", "qzeros"): torch.ones(1, 3, dtype=torch.int32),
                              NAME.replace("weight", "scales"): torch.ones(1, 24)},
                             {"quant_method": "awq", "version": "gemv"},
                             f"stores {NAME} as [24, 2] of I32 with zeros [1, 3] of I32 and scales [1, 24] of F32"),
    "a scheme that is not the tensor's": ({NAME + "_packed": torch.ones(24, 2, dtype=torch.int32),
                                           NAME + "_scale": torch.ones(24, 1)},
                                          {"quant_method": "compressed-tensors", "config_groups": {
                                              "group_0": {"weights": {"num_bits": 8, "group_size": 16,
                                                                      "strategy": "group"}}}},
                                          f"stores {NAME} as [24, 2] of I32 with scales [24, 1] of F32"),
    "a state that is no JSON": ({NAME: torch.ones(192, 1, dtype=torch.uint8), NAME + ".absmax": torch.ones(6),
                                 NAME + ".quant_map": torch.ones(16),
                                 NAME + ".quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)},
                                {"quant_method": "bitsandbytes"}, f"stores {NAME} as [192, 1] of U8 with scales [6]"),
    "a state of another shape": ({NAME: torch.ones(192, 1, dtype=torch.uint8), NAME + ".absmax": torch.ones(6),
                                  NAME + ".quant_map": torch.ones(16),
                                  NAME + ".quant_state.bitsandbytes__nf4": torch.tensor(list(
                                      b'{"shape": [24, 20], "blocksize": 64, "dtype": "float16"}'), dtype=torch.uint8)},
                                 {"quant_method": "bitsandbytes"}, f"stores {NAME} as [192, 1] of U8 with scales [6]"),
    "packed and as it is": ({NAME: torch.ones(24, 16), NAME + "_blocks": torch.ones(2, 4, 1, 16, dtype=torch.uint8),
                             NAME + "_scales": torch.ones(2, 4, 1, dtype=torch.uint8)}, {"quant_method": "mxfp4"},
                            f"holds {NAME} twice: as it is, and in MXFP4"),
    "codes of three bits": ({NAME.replace("weight", "qweight"): torch.ones(6, 32, dtype=torch.int32),
                             NAME.replace("weight", "qzeros"): torch.ones(1, 3, dtype=torch.int32),
                             NAME.replace("weight", "scales"): torch.ones(1, 32)},
                            {"quant_method": "gptq", "bits": 3},
                            f"stores {NAME} as [6, 32] of I32 with zeros [1, 3] of I32 and scales [1, 32] of F32"),
    "AQLM": ({NAME.replace("weight", "codebooks"): torch.ones(1, 256, 1, 8)}, {"quant_method": "aqlm"},
             "is quantised by AQLM; its stored numbers must not"),
    "HQQ": ({NAME.replace("weight", "W_q"): torch.ones(12, 16, dtype=torch.uint8)}, {"quant_method": "hqq"},
            "is quantised by HQQ; its stored numbers must not"),
    "sparse bit masks": ({NAME.replace("weight", "bitmask"): torch.ones(24, 2, dtype=torch.uint8)},
                         {"quant_method": "compressed-tensors"}, "is quantised by sparse bit masks; its stored"),
    "rotated weights": ({}, {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}},
                        "is quantised by a method that rotates weights (transform_config); its stored"),
    "NVFP4 that its config does not tell": ({NAME: torch.ones(24, 8, dtype=torch.uint8), NAME + "_scale_2":
                                             torch.tensor(1.0)}, None, "is quantised by NVFP4; its stored numbers"),
    "MLX": ({NAME: torch.ones(24, 2, dtype=torch.uint32), NAME.replace("weight", "scales"): torch.ones(24, 1),
             NAME.replace("weight", "biases"): torch.ones(24, 1)}, None, "is quantised by MLX; its stored numbers"),
    "packed into words": ({NAME + "_packed": torch.ones(2, dtype=torch.int32)}, {"quant_method": "compressed-tensors"},
                          "is quantised by packed numbers; its stored numbers must not"),
    "a method nobody knows": ({}, {"quant_method": "own"}, "is quantised by own; its stored numbers must not"),
    "zero points": ({NAME: torch.ones(24, 16, dtype=torch.int8), NAME + "_scale": torch.ones(24, 1),
                     NAME + "_zero_point": torch.ones(24, 1, dtype=torch.int8)}, {"quant_method": "compressed-tensors"},
                    "is quantised by a method with zero points; its stored numbers must not"),
    "zero points of floats": ({NAME + "_packed": torch.ones(24, 16, dtype=torch.uint8), NAME + "_scale":
                               torch.ones(24, 1, dtype=torch.uint8), NAME + "_zero_point": torch.ones(24, 1)},
                              {"quant_method": "compressed-tensors"}, "is quantised by a method with zero points; its"),
    "fp8 without scales": ({NAME: torch.ones(24, 16).to(FP8)}, {"quant_method": "fp8"},
                           f"stores {NAME} as F8_E4M3 without scales beside it"),
    "scales of another shape": ({NAME: torch.ones(24, 16).to(FP8), NAME + "_scale_inv": torch.ones(5, 5)},
                                {"quant_method": "fp8", "weight_block_size": [8, 8]},
                                f"stores {NAME} as [24, 16] of F8_E4M3 with scales [5, 5] of F32, which is not read"),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_what_cannot_be_read_back_is_refused(case: str, tmp_path: Path) -> None:
    """At the place where the recipe names the model, with what to merge instead; never merged as it is stored."""
    tensors, said, sentence = PACKED[case]
    changed = {} if said is None else {"quantization_config": said}
    others = {name: tensor for name, tensor in tiny.tensors().items() if name != NAME}
    tiny.write(tmp_path / "one", others | dict(tensors), **changed)
    (tmp_path / "mine.yaml").write_text(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/one}}]\n")
    with pytest.raises(ModelError) as caught:
        plan(read_recipe(tmp_path / "mine.yaml"), Options())
    (problem,) = caught.value.problems
    assert problem.what.startswith(sentence)
    assert problem.at is not None
    assert "merge" in (problem.hint or "")
