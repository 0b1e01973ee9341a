"""Checkpoints in the layout of published large models, of which only the headers are written: the rest is a hole.

Sizes are real, disk is not used. Not here: models that are merged in earnest (tiny).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Layout:
    """A Llama's numbers as its config.json has them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 8
    vocab_size: int = 128_256

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors in the order of its modules."""
        hidden, middle = self.hidden_size, self.intermediate_size
        narrow = hidden // self.num_attention_heads * self.num_key_value_heads
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            here = f"model.layers.{layer}"
            yield f"{here}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{here}.self_attn.k_proj.weight", (narrow, hidden)
            yield f"{here}.self_attn.v_proj.weight", (narrow, hidden)
            yield f"{here}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{here}.mlp.gate_proj.weight", (middle, hidden)
            yield f"{here}.mlp.up_proj.weight", (middle, hidden)
            yield f"{here}.mlp.down_proj.weight", (hidden, middle)
            yield f"{here}.input_layernorm.weight", (hidden,)
            yield f"{here}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)


LLAMA_70B = Layout(8192, 28672, 80, 64)
LLAMA_405B = Layout(16384, 53248, 126, 128)


def write(folder: Path, layout: Layout) -> Path:
    """A model folder in bfloat16, cut into files of 5 GB as `save_pretrained` cuts them, each sorted by name."""
    folder.mkdir(parents=True)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in layout.shapes():
        if files[-1] and _nbytes(files[-1]) + 2 * math.prod(shape) > _FILE_BYTES:
            files.append({})
        files[-1][name] = shape
    weight_map = {}
    for number, held in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / file, dict(sorted(held.items())))
        weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False, **asdict(layout)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _nbytes(held: Mapping[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in held.values())


def _write_file(path: Path, held: Mapping[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in held.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def recipe(parents: list[Path], method: str = "ties") -> str:
    """A recipe that merges all parents but the first, which is the base model."""
    models = "".join(f"  - model: {parent}\n    parameters: {{weight: 0.3}}\n" for parent in parents[1:])
    density = "parameters: {density: 0.5}\n" if method == "ties" else ""
    return f"merge_method: {method}\nbase_model: {parents[0]}\nmodels:\n{models}{density}"
