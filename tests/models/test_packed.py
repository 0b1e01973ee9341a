"""Tensors that are stored in packed formats are merged as what their library reads from them.

Each format has its row in CASES: tensors as they are stored, and what they stand for by a straight computation, which
is compared with the format's own library where that is installed. Not here: numbers of eight bits with scales, and what
is refused (test_quantised).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import LoopbackHub
from merging import merged
from numpy.typing import NDArray
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from merger.engine.inputs.readers import load_input
from merger.errors import ModelError
from merger.planning.inputs.base import Input, Stored
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

if TYPE_CHECKING:
    from conftest import Command

Tensors = dict[str, Tensor]
Draw = torch.Generator
GRID = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
FOURS = torch.cat([GRID, -GRID])
MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"


def codes(draw: Draw, *shape: int, below: int = 16) -> Tensor:
    """Random ones of four bits, or others."""
    return torch.randint(0, below, shape, generator=draw)


def paired(numbers: Tensor) -> Tensor:
    """Two codes a byte, the first one in the low half."""
    return (numbers[..., 0::2] | numbers[..., 1::2] << 4).to(torch.uint8)


@dataclass(frozen=True)
class Case:
    """A format.

    Args:
        make: the stored tensors by their names, and what they stand for.
        tensor: the name of that.
        said: what the config says.
        dtype: the model's.
        shapes: how many rows and columns it is tried with.
    """

    make: Callable[[Draw, int, int], tuple[Tensors, Tensor]]
    tensor: str = NAME
    said: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    shapes: tuple[tuple[int, int], ...] = ((32, 64), (96, 160))


# ---- the formats ----------------------------------------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def mxfp4(
    draw: Draw, rows: int, columns: int, name: str = EXPERTS, least: int = 0, below: int = 253
) -> tuple[Tensors, Tensor]:
    """Two experts; scales of every power of two that bfloat16 has beside the numbers."""
    numbers = codes(draw, 2, columns, rows // 32, 32)
    scales = torch.randint(least, below, numbers.shape[:-1], generator=draw)
    values = FOURS[numbers].double() * 2.0 ** (scales.double() - 127)[..., None]
    stored = {f"{name}_blocks": paired(numbers), f"{name}_scales": scales.to(torch.uint8)}
    return stored, values.flatten(2).transpose(1, 2).float().contiguous()


def nvfp4(draw: Draw, rows: int, columns: int) -> tuple[Tensors, Tensor]:
    """A scale for 16 numbers of a row, and one for all."""
    numbers, scales = codes(draw, rows, columns // 16, 16), eighths(draw, rows, columns // 16)
    values = (FOURS[numbers] + 0) * (scales.float() * NVFP4_WHOLE)[..., None]
    stored = {
        f"{NAME}": paired(numbers).flatten(1),
        f"{NAME}_scale": scales,
        f"{NAME}_scale_2": torch.tensor(NVFP4_WHOLE),
    }
    return stored, values.flatten(1).bfloat16().float()


NVFP4_WHOLE = 0.0023


def eighths(draw: Draw, *shape: int) -> Tensor:
    """Every number that float8 has but its NaN."""
    bits = torch.randint(0, 254, shape, generator=draw)
    return (bits + bits // 127).to(torch.uint8).view(torch.float8_e4m3fn)


def nvfp4_of_compressed_tensors(draw: Draw, rows: int, columns: int) -> tuple[Tensors, Tensor]:
    """The scale of all is what the others go through."""
    numbers, scales = codes(draw, rows, columns // 16, 16), eighths(draw, rows, columns // 16)
    whole = torch.tensor([731.3])
    values = FOURS[numbers] * (scales.float() / whole)[..., None]
    stored = {"_packed": paired(numbers).flatten(1), "_scale": scales, "_global_scale": whole}
    return {NAME + end: tensor for end, tensor in stored.items()}, values.flatten(1).bfloat16().float()


def mxfp4_of_compressed_tensors(draw: Draw, rows: int, columns: int) -> tuple[Tensors, Tensor]:
    """Rows as they are."""
    numbers, scales = codes(draw, rows, columns // 32, 32), codes(draw, rows, columns // 32, below=253)
    values = FOURS[numbers].double() * 2.0 ** (scales.double() - 127)[..., None]
    stored = {f"{NAME}_packed": paired(numbers).flatten(1), f"{NAME}_scale": scales.to(torch.uint8)}
    return stored, values.flatten(1).float()


def words(numbers: Tensor, bits: int) -> Tensor:
    """Codes in words of 32 bits along the last axis, the first in the lowest bits; what is missing is 0."""
    each = 32 // bits
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[-1] % each)).unflatten(-1, (-1, each))
    found = (padded << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(found < 1 << 31, found, found - (1 << 32)).to(torch.int32)


def scales_of(draw: Draw, dtype: torch.dtype, *shape: int) -> Tensor:
    """Of both signs."""
    return (torch.randn(shape, generator=draw) * 0.01).to(dtype)


def pack_quantized(
    draw: Draw, rows: int, columns: int, bits: int = 4, groups: int = 2, zeros: bool = False, order: bool = False
) -> tuple[Tensors, Tensor]:
    """Rows of words; zero points are packed down their columns; an order gives each column its group."""
    numbers, scales = codes(draw, rows, columns, below=1 << bits), scales_of(draw, torch.bfloat16, rows, groups)
    zero = codes(draw, rows, groups, below=1 << bits) if zeros else torch.full((rows, groups), 1 << (bits - 1))
    group = torch.arange(columns) * groups // columns
    group = group[torch.randperm(columns, generator=draw)] if order else group
    values = (numbers - zero[:, group]).bfloat16() * scales[:, group]
    stored = {"_packed": words(numbers, bits), "_scale": scales, "_shape": torch.tensor([rows, columns])}
    stored |= {"_zero_point": words(zero.T, bits).T.contiguous()} if zeros else {}
    stored |= {"_g_idx": group.to(torch.int32)} if order else {}
    return {NAME + end: tensor for end, tensor in stored.items()}, values.float()


def gptq(
    draw: Draw, rows: int, columns: int, bits: int = 4, groups: int = 4, order: bool = False, less: int = 1
) -> tuple[Tensors, Tensor]:
    """Stored is the transpose; a zero point is one more than what is stored of it, but in version 2."""
    numbers, scales = codes(draw, rows, columns, below=1 << bits), scales_of(draw, torch.float16, groups, rows)
    zero = codes(draw, groups, rows, below=(1 << bits) - 1) + less
    group = torch.arange(columns) * groups // columns
    group = group[torch.randperm(columns, generator=draw)] if order else group
    values = scales[group] * (numbers.T - zero[group])
    stored = {".qweight": words(numbers, bits).T.contiguous(), ".qzeros": words(zero - less, bits), ".scales": scales}
    stored |= {".g_idx": group.to(torch.int32)}
    return {MODULE + end: tensor for end, tensor in stored.items()}, values.T.float().contiguous()


def awq(draw: Draw, rows: int, columns: int, groups: int = 2) -> tuple[Tensors, Tensor]:
    """Stored is the transpose, eight rows of it in a word in an order of their own."""
    numbers, scales = codes(draw, columns, rows), scales_of(draw, torch.float16, groups, rows)
    zero = codes(draw, groups, rows)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    values = (numbers - zero.repeat_interleave(columns // groups, 0)) * scales.repeat_interleave(columns // groups, 0)
    ordered = [words(each.unflatten(1, (-1, 8))[..., order].flatten(1), 4) for each in (numbers, zero)]
    return {
        f"{MODULE}.qweight": ordered[0],
        f"{MODULE}.qzeros": ordered[1],
        f"{MODULE}.scales": scales,
    }, values.T.float().contiguous()


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
FP4 = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)


def four_bits(
    draw: Draw, rows: int, columns: int, kind: str = "nf4", dtype: str = "bfloat16", block: int = 64, nested: int = 0
) -> tuple[Tensors, Tensor]:
    """Blocks that go on from row to row; with nested ones scales of eight bits that have scales themselves.

    bitsandbytes quantises so everywhere. Its kernels for the CPU begin a block with each row, which is the same where
    rows are whole blocks.
    """
    count = rows * columns
    numbers, table = codes(draw, count), torch.tensor(NF4 if kind == "nf4" else [*FP4, 0.0, *(-one for one in FP4[1:])])
    scales = torch.rand(-(-count // block), generator=draw)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [rows, columns]}
    stored = {".absmax": scales, ".quant_map": table}
    if nested:
        small, inner = codes(draw, len(scales), below=256), torch.linspace(-1, 1, 256)
        outer = torch.rand(-(-len(scales) // nested), generator=draw)
        scales = inner[small] * outer.repeat_interleave(nested)[: len(scales)] + torch.tensor(0.6180339)
        stored = {
            ".absmax": small.to(torch.uint8),
            ".nested_absmax": outer,
            ".nested_quant_map": inner,
            ".quant_map": table,
        }
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.6180339}
    values = table[numbers] * scales.repeat_interleave(block)[:count]
    numbers = torch.nn.functional.pad(numbers, (0, count % 2))
    stored[f".quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    packed = {"": (numbers[0::2] << 4 | numbers[1::2]).to(torch.uint8).view(-1, 1), **stored}
    held = {NAME + end: tensor for end, tensor in packed.items()}
    return held, values.view(rows, columns).to(getattr(torch, dtype)).float()


def eight_bits(draw: Draw, rows: int, columns: int) -> tuple[Tensors, Tensor]:
    """The largest of each row beside its numbers."""
    numbers, largest = codes(draw, rows, columns, below=255) - 127, torch.rand(rows, generator=draw)
    values = numbers.float() * largest[:, None] * 7.874015718698502e-3
    return {
        NAME: numbers.to(torch.int8),
        f"{MODULE}.SCB": largest,
        f"{MODULE}.weight_format": torch.tensor(0).byte(),
    }, values


CT = {"quant_method": "compressed-tensors"}
BNB = {"quant_method": "bitsandbytes"}


def ct(bits: int, **weights: Any) -> dict[str, Any]:
    """What a config says of one scheme."""
    return {**CT, "config_groups": {"group_0": {"weights": {"num_bits": bits, "type": "int", **weights}}}}


HALF = {"dtype": "float16"}
CASES: Mapping[str, Case] = {
    "MXFP4": Case(mxfp4, EXPERTS, {"quant_method": "mxfp4"}, shapes=((32, 48), (96, 40), (64, 9000))),
    "NVFP4": Case(nvfp4, said={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "NVFP4 of compressed-tensors": Case(nvfp4_of_compressed_tensors, said=CT),
    "MXFP4 of compressed-tensors": Case(mxfp4_of_compressed_tensors, said=CT),
    "pack-quantized": Case(pack_quantized, said=ct(4, strategy="group", group_size=32), shapes=((20, 64),)),
    "pack-quantized, zero points": Case(partial(pack_quantized, zeros=True, groups=5), shapes=((20, 160), (23, 160)),
                                        said=ct(4, strategy="group", group_size=32)),
    "pack-quantized, an order": Case(partial(pack_quantized, zeros=True, order=True),
                                     said=ct(4, strategy="group", group_size=32), shapes=((20, 64),)),
    "pack-quantized, 8 bits by rows": Case(partial(pack_quantized, bits=8, groups=1), shapes=((9, 64), (11, 40000)),
                                           said=ct(8, strategy="channel")),
    "pack-quantized, 2 bits": Case(partial(pack_quantized, bits=2, zeros=True), shapes=((20, 64),),
                                   said=ct(2, strategy="group", group_size=32)),
    "GPTQ": Case(gptq, said={"quant_method": "gptq", "bits": 4}, **HALF, shapes=((32, 64), (20, 64), (9000, 32))),
    "GPTQ, an order": Case(partial(gptq, order=True), said={"quant_method": "gptq"}, **HALF),
    "GPTQ, 8 bits": Case(partial(gptq, bits=8), said={"quant_method": "gptq"}, **HALF, shapes=((32, 64), (21, 64))),
    "GPTQ, version 2": Case(partial(gptq, less=0), said={"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
                            **HALF),
    "bitsandbytes nf4": Case(four_bits, said=BNB, shapes=((16, 64), (13, 70), (9, 70000))),
    "bitsandbytes nf4, nested": Case(partial(four_bits, nested=32), said=BNB, shapes=((64, 64), (33, 70))),
    "bitsandbytes nf4, half": Case(partial(four_bits, nested=32, dtype="float16", block=128), said=BNB, **HALF,
                                   shapes=((64, 128), (33, 270))),
    "bitsandbytes fp4": Case(partial(four_bits, kind="fp4", dtype="float32"), said=BNB, dtype="float32"),
    "bitsandbytes int8": Case(eight_bits, said=BNB, dtype="float32"),
    "AWQ": Case(awq, said={"quant_method": "awq", "version": "gemm"}, **HALF, shapes=((32, 64), (40000, 16))),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)
"""Rows may be shorter than what is read at once, or longer than what a read skips."""


# ---- what is read ---------------------------------------------------------------------------------------------------


def written(case: Case, folder: Path, rows: int, columns: int) -> tuple[Path, Tensor]:
    """A model with one tensor in the format, and what that stands for."""
    stored, values = case.make(Draw().manual_seed(rows), rows, columns)
    held = {"model.norm.weight": torch.ones(columns, dtype=torch.bfloat16), **stored}
    return tiny.write(folder, held, torch_dtype=case.dtype, quantization_config=case.said), values


def passed(model: Path, dtype: str = "float32") -> str:
    """A recipe that hands on what it reads."""
    return f"merge_method: passthrough\ndtype: {dtype}\nmodels: [{{model: {model}}}]\n"


@every_case
def test_a_packed_tensor_is_read_as_what_it_stands_for(case: str, tmp_path: Path) -> None:
    """Bit for bit, in float32; the config no longer speaks of it, and the plan says what the numbers come from."""
    of = CASES[case]
    for number, shape in enumerate(of.shapes):
        model, values = written(of, tmp_path / f"{number}", *shape)
        planned = merged(passed(model), tmp_path / f"out-{number}")
        found = tiny.read(tmp_path / f"out-{number}")
        assert found.keys() == {"model.norm.weight", of.tensor}
        assert found[of.tensor].numpy().tobytes() == values.numpy().tobytes()
        assert "quantization_config" not in json.loads((tmp_path / f"out-{number}/config.json").read_text())
        form = case.partition(",")[0]
        assert planned.notes == (f"read back from few bits: {number} ({form}); "
                                 "what is made of them carries the error of their quantisation",)  # fmt: skip
        assert not planned.left_out


class Files:
    """The stored tensors of one model's file, in place of a job's; `read` counts the bytes."""

    def __init__(self, file: Path) -> None:
        self._bytes, self.read = file.read_bytes(), 0

    def raw(self, leaf: Stored, start: int, stop: int) -> NDArray[np.uint8]:
        assert 0 <= start <= stop <= leaf.tensor.nbytes
        self.read += stop - start
        return np.frombuffer(self._bytes, np.uint8, stop - start, leaf.tensor.start + start)


def planned_input(folder: Path, model: Path, name: str) -> Input:
    (folder / "mine.yaml").write_text(passed(model))
    found, _ = plan(read_recipe(folder / "mine.yaml"), Options())
    return next(job.inputs[0].source for job in found.jobs if job.name == name)


@every_case
def test_any_part_read_alone_is_that_of_the_whole(case: str, tmp_path: Path) -> None:
    """Blocks may begin and end within rows, within groups, and in different matrices."""
    model, values = written(CASES[case], tmp_path / "model", *CASES[case].shapes[-1])
    source = planned_input(tmp_path, model, CASES[case].tensor)
    files: Any = Files(model / "model.safetensors")
    load = partial(load_input, source, tensors=files)
    count = values.numel()

    @settings(deadline=None, max_examples=40)
    @given(st.tuples(st.integers(0, count), st.integers(0, count)))
    def check(ends: tuple[int, int]) -> None:
        start, stop = sorted(ends)
        read = load(start, stop, np.empty(stop - start, np.float32))
        assert np.array_equal(read, values.flatten().numpy()[start:stop])

    check()


def test_only_the_groups_of_the_rows_are_read(tmp_path: Path) -> None:
    """Of columns that are too long to read on to the next one: of 64 groups the one that a block needs."""
    model, values = written(CASES["MXFP4"], tmp_path / "model", 32 * 1100, 3)
    source = planned_input(tmp_path, model, EXPERTS)
    files: Any = Files(model / "model.safetensors")
    rows = load_input(source, 32 * 3, 64 * 3, np.empty(32 * 3, np.float32), files)
    assert np.array_equal(rows, values[0, 32:64].flatten())
    assert files.read < 3 * 16 + 3 * 1100 + 1


DAMAGED: Mapping[str, tuple[str, str, Tensor, str]] = {
    "groups that are not there": ("GPTQ", ".g_idx", torch.full((64,), 4, dtype=torch.int32),
                                  f"{NAME} is of 4 groups, and its g_idx names 4 to 4"),
    "columns that codes were added to": ("pack-quantized, 8 bits by rows", ".weight_shape", torch.tensor([9, 62]),
                                         f"{NAME} is [9, 62] by its weight_shape, and there are codes for [9, 64]"),
    "an order of one kind of GPU": ("bitsandbytes int8", ".weight_format", torch.tensor(1).byte(),
                                    f"{NAME} has its numbers in an order for one kind of GPU (weight_format)"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_only_bytes_tell_is_checked_where_they_are_read(damage: str, tmp_path: Path) -> None:
    """A sentence about the tensor, whichever format it has."""
    case, ending, instead, sentence = DAMAGED[damage]
    of = CASES[case]
    stored, _ = of.make(Draw().manual_seed(1), *of.shapes[0])
    held = {"model.norm.weight": torch.ones(1), **stored, MODULE + ending: instead}
    model = tiny.write(tmp_path / "one", held, quantization_config=of.said)
    with pytest.raises(ModelError) as caught:
        merged(passed(model), tmp_path / "out")
    assert [problem.what for problem in caught.value.problems] == [sentence]


def test_an_order_of_nothing_but_minus_one_is_none(tmp_path: Path) -> None:
    """So llm-compressor wrote it where groups are runs of columns."""
    of = CASES["pack-quantized"]
    stored, values = of.make(Draw().manual_seed(1), *of.shapes[0])
    stored |= {f"{NAME}_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    merged(passed(tiny.write(tmp_path / "one", stored, quantization_config=of.said)), tmp_path / "out")
    assert torch.equal(tiny.read(tmp_path / "out")[NAME], values)


def test_packed_tensors_come_from_the_hub_once(served: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """Though rows are read whole, and rows of a transposed tensor from all over it."""
    case = CASES["AWQ"]
    model, _ = written(case, tmp_path / "one", 4096, 512)
    served.add_model("org/one", model)
    recipe = "merge_method: ties\nbase_model: {0}\ndtype: float32\nmodels: [{{model: {0}}}, {{model: {0}}}]\n"
    (tmp_path / "mine.yaml").write_text(recipe.format("org/one"))
    served.clear_log()
    done = command("run", "mine.yaml", "--to", "out", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    merged(recipe.format(model), tmp_path / "local")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "local/model.safetensors").read_bytes()
    sent = sum(r.sent for r in served.log if r.host == "cdn" and r.method == "GET")
    assert sent <= (model / "model.safetensors").stat().st_size


def test_an_adapter_is_added_to_what_is_read_back(tmp_path: Path) -> None:
    """As after QLoRA: W + B A is of the numbers that the codes stand for."""
    stored, values = four_bits(Draw().manual_seed(1), 24, 16, dtype="float32", nested=32)
    held = tiny.tensors(dtype=torch.float32)
    plain = tiny.write(tmp_path / "plain", held | {NAME: values})
    packed = tiny.write(tmp_path / "packed", held | stored, quantization_config=BNB)
    lora = tiny.lora(tmp_path / "lora", plain, rank=2)
    for model in (plain, packed):
        merged(passed(Path(f"{model}+{lora}")), tmp_path / f"out-{model.name}")
    found, expected = tiny.read(tmp_path / "out-packed"), tiny.read(tmp_path / "out-plain")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found[NAME], values)


def test_gpt_oss_merges_as_published_with_its_fine_tune(tmp_path: Path) -> None:
    """The result is that of a merge with what transformers reads, and transformers loads it."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = GptOssConfig(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=40, num_local_experts=2)
    tuned, plain = GptOssForCausalLM(config).bfloat16(), GptOssForCausalLM(config).bfloat16()
    held, packed = plain.state_dict(), Tensors()
    for name in [name for name in held if name.endswith("_proj") and "experts" in name]:
        rows, columns = held[name].shape[1:]
        stored, values = mxfp4(Draw().manual_seed(rows), rows, columns, name, 120, 128)
        packed |= stored
        held[name].copy_(values)
    plain.save_pretrained(tmp_path / "plain")
    tuned.save_pretrained(tmp_path / "tuned")
    kept = {name: tensor for name, tensor in held.items() if f"{name}_blocks" not in packed}
    written = {**json.loads((tmp_path / "plain/config.json").read_text())}
    tiny.write(tmp_path / "packed", {**kept, **packed}, config=written, quantization_config={"quant_method": "mxfp4"})
    for one, out in (("plain", "expected"), ("packed", "out")):
        models = f"[{{model: {tmp_path / one}}}, {{model: {tmp_path}/tuned}}]"
        merged(f"merge_method: linear\ndtype: bfloat16\nmodels: {models}\n", tmp_path / out)
    found, expected = tiny.read(tmp_path / "out"), tiny.read(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model, told = GptOssForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert not hasattr(model.config, "quantization_config")


# ---- as their libraries read them -----------------------------------------------------------------------------------


def by_transformers(stored: Tensors) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(*stored.values(), dtype=torch.bfloat16)


def by_modelopt(stored: Tensors) -> Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    packed, scale, whole = stored.values()
    tensor = NVFP4QTensor((packed.shape[0], packed.shape[1] * 2), torch.bfloat16, packed)
    return tensor.dequantize(scale=scale, double_scale=whole, block_sizes={-1: 16})


def by_compressed_tensors(stored: Tensors, form: str, **weights: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    held = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in stored.items()}
    return BaseCompressor.get_value_from_registry(form).decompress(held, scheme)["weight"]


def by_gptqmodel(stored: Tensors, bits: int = 4, desc_act: bool = False, added: int = 1) -> Tensor:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    held = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in stored.items()}
    rows, columns = held["scales"].shape[1], len(held["g_idx"])
    size = columns // len(held["scales"])
    layer = TorchLinear(bits, size, False, desc_act, columns, rows, bias=False)
    layer.load_state_dict(held, strict=False)
    layer.post_init()
    if added:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    return layer.dequantize_weight().T


def by_autoawq(stored: Tensors) -> Tensor:
    from awq.utils.packing_utils import dequantize_gemm

    qweight, qzeros, scales = stored.values()
    return dequantize_gemm(qweight, qzeros, scales, 4, len(qweight) // len(scales)).T


def by_bitsandbytes(stored: Tensors) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = {name.removeprefix(f"{NAME}."): tensor for name, tensor in stored.items() if name != NAME}
    return dequantize_4bit(stored[NAME], QuantState.from_dict(state, torch.device("cpu")))


def by_int8_of_bitsandbytes(stored: Tensors) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    numbers, largest, _ = stored.values()
    return int8_vectorwise_dequant(numbers, largest)


PACKED = partial(by_compressed_tensors, form="pack-quantized", type="int")
FLOATS = {"num_bits": 4, "type": "float"}
LIBRARIES: Mapping[str, tuple[str, Callable[[Tensors], Tensor]]] = {
    "MXFP4": ("transformers", by_transformers),
    "NVFP4": ("modelopt", by_modelopt),
    "NVFP4 of compressed-tensors": ("compressed_tensors", partial(
        by_compressed_tensors, form="nvfp4-pack-quantized", group_size=16, strategy="tensor_group", **FLOATS)),
    "MXFP4 of compressed-tensors": ("compressed_tensors", partial(
        by_compressed_tensors, form="mxfp4-pack-quantized", group_size=32, strategy="group", **FLOATS)),
    "pack-quantized": ("compressed_tensors", partial(PACKED, num_bits=4, group_size=32, strategy="group")),
    "pack-quantized, zero points": ("compressed_tensors", partial(
        PACKED, num_bits=4, group_size=32, strategy="group", symmetric=False)),
    "pack-quantized, 8 bits by rows": ("compressed_tensors", partial(PACKED, num_bits=8, strategy="channel")),
    "pack-quantized, 2 bits": ("compressed_tensors", partial(
        PACKED, num_bits=2, group_size=32, strategy="group", symmetric=False)),
    "GPTQ": ("gptqmodel", by_gptqmodel),
    "GPTQ, an order": ("gptqmodel", partial(by_gptqmodel, desc_act=True)),
    "GPTQ, 8 bits": ("gptqmodel", partial(by_gptqmodel, bits=8)),
    "GPTQ, version 2": ("gptqmodel", partial(by_gptqmodel, added=0)),
    "AWQ": ("awq", by_autoawq),
    "bitsandbytes nf4": ("bitsandbytes", by_bitsandbytes),
    "bitsandbytes nf4, nested": ("bitsandbytes", by_bitsandbytes),
    "bitsandbytes nf4, half": ("bitsandbytes", by_bitsandbytes),
    "bitsandbytes fp4": ("bitsandbytes", by_bitsandbytes),
    "bitsandbytes int8": ("bitsandbytes", by_int8_of_bitsandbytes),
}  # fmt: skip


every_library = pytest.mark.parametrize("case", LIBRARIES)


def of_first_shape(case: str) -> tuple[Tensors, bytes]:
    """The stored tensors, and what they stand for."""
    of = CASES[case]
    stored, values = of.make(Draw().manual_seed(of.shapes[0][0]), *of.shapes[0])
    return stored, values.numpy().tobytes()


@pytest.mark.filterwarnings("default")
@every_library
def test_a_library_reads_the_same(case: str) -> None:
    """Bit for bit, in the dtype in which it gives them.

    Orders of groups were read by compressed-tensors up to 0.10: there the straight computation stands alone.
    """
    library, read = LIBRARIES[case]
    pytest.importorskip(library, reason=f"{library} is not installed: make oracles")
    stored, values = of_first_shape(case)
    theirs = read(stored)
    assert theirs.dtype == getattr(torch, CASES[case].dtype)
    assert theirs.float().numpy().tobytes() == values


@every_library
def test_what_a_library_read_once_is_read_still(case: str) -> None:
    """Also where it is not installed."""
    assert hashlib.sha256(of_first_shape(case)[1]).hexdigest()[:16] == DIGESTS[case]


DIGESTS: Mapping[str, str] = {
    "MXFP4": "d4d4f7551ab5d8ec",
    "NVFP4": "39506a051541f1da",
    "NVFP4 of compressed-tensors": "17efbd613faf90d1",
    "MXFP4 of compressed-tensors": "2baef193fcabf4be",
    "pack-quantized": "05782210d31d14d8",
    "pack-quantized, zero points": "f0f0257e6d554721",
    "pack-quantized, 8 bits by rows": "29efd1cc3b11cfe2",
    "pack-quantized, 2 bits": "812ba0e359378de2",
    "GPTQ": "cee3950916097675",
    "GPTQ, an order": "a6d50a9cf70e19b0",
    "GPTQ, 8 bits": "e37bc246cc7eb902",
    "GPTQ, version 2": "91e7cf56bcfded0e",
    "AWQ": "a9b2940bfe0076c1",
    "bitsandbytes nf4": "a2c926854c07513f",
    "bitsandbytes nf4, nested": "b16d6da5831b8821",
    "bitsandbytes nf4, half": "934b21912fc9ba03",
    "bitsandbytes fp4": "b609147e25938937",
    "bitsandbytes int8": "e7ef0108c72910d2",
}
"""Of what the library read of a case's first shape, in float32."""
