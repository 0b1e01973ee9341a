"""What a merge of quantised models costs, and writing GGUF, in nanoseconds an entry beside bfloat16's.

`python benchmarks/forms.py` writes the last part of docs/speed.md. What is made is hashed and dropped, as in growth.
Not here: whether the numbers are right (tests/models), and the steps by themselves (steps).
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import growth
import models
import numpy as np
import speed
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from merger.models.gguf.layout import KINDS

MARK = "<!-- forms -->"
SIDE = 4096
_NAME = "model.layers.{}.mlp.up_proj"
_ITEM = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1}

Draw = np.random.Generator
Part = tuple[str, str, tuple[int, ...], Any]
"""The end of a stored tensor's name, its dtype, its shape and its numbers, which only have to have its bytes."""


def codes(draw: Draw, *shape: int) -> Any:
    """Random bytes."""
    return draw.integers(0, 256, shape, np.uint8)


def eighths(draw: Draw, *shape: int) -> Any:
    """Float8 without its NaN."""
    return codes(draw, *shape) & 0xBF


def scales(draw: Draw, *shape: int) -> Any:
    """Float32 about a hundredth."""
    return draw.random(shape, np.float32) * np.float32(0.01)


def halves(draw: Draw, *shape: int) -> Any:
    """The same in float16."""
    return scales(draw, *shape).astype(np.float16)


def brain(draw: Draw, *shape: int) -> Any:
    """Normal numbers in bfloat16."""
    return (draw.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@dataclass(frozen=True)
class Form:
    """How a matrix of SIDE rows and columns is stored.

    Args:
        make: its stored tensors.
        said: what config.json says of them.
    """

    make: Callable[[Draw], Sequence[Part]]
    said: Mapping[str, Any] = field(default_factory=dict)


N, G = SIDE, SIDE // 128
_CT = {"quant_method": "compressed-tensors"}
_PACK = {**_CT, "config_groups": {"group_0": {"weights": {
    "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}}}  # fmt: skip


def fours(kind: str) -> Form:
    """Four bits of bitsandbytes."""
    state = json.dumps({"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [N, N]}).encode()
    return Form(
        lambda draw: [(".weight", "U8", (N * N // 2, 1), codes(draw, N * N // 2)),
                      (".weight.absmax", "F32", (N * N // 64,), scales(draw, N * N // 64)),
                      (".weight.quant_map", "F32", (16,), np.linspace(-1, 1, 16, dtype=np.float32)),
                      (f".weight.quant_state.bitsandbytes__{kind}", "U8", (len(state),),
                       np.frombuffer(state, np.uint8))],
        {"quant_method": "bitsandbytes"})  # fmt: skip


FORMS: Mapping[str, Form] = {
    "bfloat16": Form(lambda draw: [(".weight", "BF16", (N, N), brain(draw, N, N))]),
    "fp8, blocks of 128 x 128": Form(
        lambda draw: [(".weight", "F8_E4M3", (N, N), eighths(draw, N, N)),
                      (".weight_scale_inv", "F32", (G, G), scales(draw, G, G))],
        {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "MXFP4": Form(
        lambda draw: [("_blocks", "U8", (2, N, N // 64, 16), codes(draw, 2, N, N // 64, 16)),
                      ("_scales", "U8", (2, N, N // 64), codes(draw, 2, N, N // 64) // 8 + 100)],
        {"quant_method": "mxfp4"}),
    "NVFP4": Form(
        lambda draw: [(".weight", "U8", (N, N // 2), codes(draw, N, N // 2)),
                      (".weight_scale", "F8_E4M3", (N, N // 16), eighths(draw, N, N // 16)),
                      (".weight_scale_2", "F32", (), scales(draw))],
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "pack-quantized, 4 bits": Form(
        lambda draw: [(".weight_packed", "I32", (N, N // 8), codes(draw, N, N // 2)),
                      (".weight_scale", "BF16", (N, G), brain(draw, N, G)),
                      (".weight_shape", "I64", (2,), np.array([N, N], np.int64))], _PACK),
    "GPTQ, 4 bits": Form(
        lambda draw: [(".qweight", "I32", (N // 8, N), codes(draw, N // 2, N)),
                      (".qzeros", "I32", (G, N // 8), codes(draw, G, N // 2)),
                      (".scales", "F16", (G, N), halves(draw, G, N))],
        {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "AWQ": Form(
        lambda draw: [(".qweight", "I32", (N, N // 8), codes(draw, N, N // 2)),
                      (".qzeros", "I32", (G, N // 8), codes(draw, G, N // 2)),
                      (".scales", "F16", (G, N), halves(draw, G, N))],
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}),
    "bitsandbytes nf4": fours("nf4"),
    "bitsandbytes fp4": fours("fp4"),
    "bitsandbytes int8": Form(
        lambda draw: [(".weight", "I8", (N, N), codes(draw, N, N)), (".SCB", "F32", (N,), scales(draw, N))],
        {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}  # fmt: skip


def save(folder: Path, tensors: Mapping[str, Part], config: Mapping[str, Any]) -> Path:
    """A checkpoint of one file, kept if it is there already."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    header, end = dict[str, Any](), 0
    for name, (_, dtype, shape, numbers) in tensors.items():
        assert numbers.nbytes == _ITEM[dtype] * int(np.prod(shape)), name
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + numbers.nbytes]}
        end += numbers.nbytes
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for *_, numbers in tensors.values():
            out.write(numbers.tobytes())
    (folder / "config.json").write_text(json.dumps({**models.CONFIG, "torch_dtype": "bfloat16", **config}))
    return folder


def stored(work: Path, title: str, matrices: int, seed: int) -> Path:
    """A checkpoint of so many matrices in a form: the same one over and over, for what it holds costs nothing."""
    form, name = FORMS[title], "model.layers.{}.mlp.experts.gate_up_proj" if title == "MXFP4" else _NAME
    parts = form.make(np.random.default_rng(seed))
    tensors = {name.format(number) + part[0]: part for number in range(matrices) for part in parts}
    said = {"quantization_config": form.said} if form.said else {}
    key = "".join(letter for letter in title if letter.isalnum())
    return save(work / f"form-{key}-{matrices}-{seed}", tensors, {"num_hidden_layers": matrices, **said})


def llama(work: Path, layers: int, seed: int) -> Path:
    """A Llama in bfloat16 with a tokenizer, of which GGUF can be made."""
    tokens, folder = 256, work / f"form-llama-{layers}-{seed}"
    draw = np.random.default_rng(seed)
    sizes = {"hidden": 4096, "middle": 11008, "vocab": tokens}
    held = {name: ("", "BF16", shape, brain(draw, *shape)) for name, shape in models.shapes(layers=layers, **sizes)}
    save(folder, held, {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers,
                        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": tokens})  # fmt: skip
    its = Tokenizer(
        BPE({letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    its.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    its.save(str(folder / "tokenizer.json"))
    return folder


def of_gguf(work: Path, kind: str, matrices: int, seed: int) -> Path:
    """Such matrices in a GGUF file: random blocks, whose scales are a hundredth."""
    folder, (together, nbytes) = work / f"form-gguf-{kind}-{matrices}-{seed}", gguf.GGML_QUANT_SIZES[KINDS_IN[kind]]
    if (folder / "model.gguf").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    blocks = codes(np.random.default_rng(seed), SIDE * SIDE // together, nbytes)
    blocks[:, : SCALE_BYTES[kind]].view(np.float16)[:] = 0.01
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(matrices)
    writer.add_embedding_length(SIDE)
    writer.add_head_count(32)
    writer.add_feed_forward_length(SIDE)
    writer.add_context_length(4096)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<s>"])
    writer.add_token_scores([0.0])
    writer.add_token_types([3])
    writer.add_tensor("token_embd.weight", np.zeros((1, SIDE), np.float32))
    for number in range(matrices):
        writer.add_tensor(f"blk.{number}.ffn_up.weight", blocks.reshape(SIDE, -1), raw_dtype=KINDS_IN[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


KINDS_IN = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_K": gguf.GGMLQuantizationType.Q4_K}
SCALE_BYTES = {"Q8_0": 2, "Q4_K": 4}


def rows(work: Path, matrices: int, layers: int, runs: int) -> Iterator[str]:
    """The two tables, one measured line after the other."""
    plain = 0.0

    def line(title: str, parents: Sequence[Path], entries: int, publish: Mapping[str, Any]) -> str:
        nonlocal plain
        made = {
            "merge_method": "linear", "dtype": "bfloat16", **({"publish": publish} if publish else {}),
            "models": [{"model": str(parent), "parameters": {"weight": 0.5}} for parent in parents],
        }  # fmt: skip
        cores = os.cpu_count() or 1
        best = min((growth.measure(work, made, cores) for _ in range(runs)), key=lambda found: found["cores"])
        each = 1e9 * best["cores"] / entries
        plain = plain or each
        sizes = [max(file.stat().st_size for file in parent.iterdir()) for parent in parents]
        return (
            f"| {title} | {sum(sizes) / len(sizes) / entries:.2f} | {best['loop']:.2f} s | {best['cores']:.2f} s "
            f"| {each:.1f} ns | {each - plain:+.1f} ns | {best['memory'] / 1e6:.0f} MB "
            f"| {best['planned'] / 1e6:.0f} MB |"
        )

    for title in FORMS:
        yield line(title, [stored(work, title, matrices, seed) for seed in (0, 1)], matrices * SIDE**2, {})
    for kind in KINDS_IN:
        yield line(f"GGUF {kind}", [of_gguf(work, kind, matrices, seed) for seed in (0, 1)], matrices * SIDE**2, {})
    plain = 0.0
    parents = [llama(work, layers, seed) for seed in (0, 1)]
    entries = sum(int(np.prod(shape)) for _, shape in models.shapes(layers, 4096, 11008, 256))
    yield line("to safetensors in bfloat16", parents, entries, {})
    for kind in KINDS:
        yield line(f"to GGUF in {kind}", parents, entries, {"gguf": [kind], "safetensors": False})
    yield line("to safetensors, and GGUF in Q8_0 beside", parents, entries, {"gguf": ["Q8_0"]})


def main() -> int:
    """Measure and write the page's last part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=speed.ROOT / "benchmarks" / ".work", help="where checkpoints are kept"
    )
    parser.add_argument("--matrices", type=int, default=24, help="of 4096 x 4096 in a quantised model")
    parser.add_argument("--layers", type=int, default=2, help="of the Llama that GGUF is made of; one has 0.2 billion")
    parser.add_argument("--runs", type=int, default=2, help="of which the one counts that took least of the cores")
    parser.add_argument("--show", action="store_true", help="print the lines, and leave the page as it is")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    load, lines = os.getloadavg()[0], []
    for row in rows(options.work, options.matrices, options.layers, options.runs):
        print(row, flush=True)
        lines.append(row)
    if not options.show:
        growth.replace_part(MARK, [HEAD.format(load=load, runs=options.runs), *lines])
    return 0


HEAD = """## Other forms, in and out

Generated by `python benchmarks/forms.py` on the same kind of machine, the best of {runs}, the load {load:.1f}
before: the loop of a linear merge of two models to bfloat16 whose result is hashed and dropped. *bytes*: what is stored
for an entry. *an entry*: seconds of all threads together by entry of the result; *beside*: the same less that of
bfloat16, so the reading back of both models, or the writing in the other type. *memory*: the process's peak resident
size, and what the plan allows for.

| models stored in, or result written | bytes | loop | cores | an entry | beside | memory | planned |
|---|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    raise SystemExit(main())
