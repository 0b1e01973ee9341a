"""Checkpoints that the benchmarks make for themselves, and reading them back. Not here: what is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BILLIONS = {
    "0.5B": {"layers": 16, "hidden": 1280, "middle": 4864, "vocab": 32000, "heads": 20},
    "1.2B": {"layers": 22, "hidden": 2048, "middle": 5632, "vocab": 32000, "heads": 32},
}
_FILE_BYTES = 1_000_000_000


def shapes(layers: int, hidden: int, middle: int, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a Llama's tensors."""
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(layers):
        here = f"model.layers.{layer}"
        yield f"{here}.input_layernorm.weight", (hidden,)
        yield f"{here}.mlp.down_proj.weight", (hidden, middle)
        yield f"{here}.mlp.gate_proj.weight", (middle, hidden)
        yield f"{here}.mlp.up_proj.weight", (middle, hidden)
        yield f"{here}.post_attention_layernorm.weight", (hidden,)
        for name in ("k", "o", "q", "v"):
            yield f"{here}.self_attn.{name}_proj.weight", (hidden, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def family(root: Path, size: str, count: int) -> list[Path]:
    """A base and `count` fine-tunes of it in bfloat16, of a size of `BILLIONS`; kept if they are there already."""
    return [member(root / f"{size}-{n}", n, torch.bfloat16, **BILLIONS[size]) for n in range(count + 1)]


def small(root: Path, count: int) -> list[Path]:
    """The same with two layers as wide as those of a model of a billion parameters, and not many tokens."""
    shape = {"layers": 2, "hidden": 2048, "middle": 5632, "vocab": 4000, "heads": 32}
    return [member(root / f"small-{n}", n, torch.bfloat16, **shape) for n in range(count + 1)]


def tiny(root: Path, dtype: torch.dtype = torch.float32, unit: float = 1.0) -> list[Path]:
    """A base and two fine-tunes of four layers, all entries multiplied by `unit`."""
    shape = {"layers": 4, "hidden": 64, "middle": 160, "vocab": 256, "heads": 4}
    return [member(root / f"tiny-{n}", n, dtype, unit=unit, **shape) for n in range(3)]


def member(folder: Path, number: int, dtype: torch.dtype, heads: int, unit: float = 1.0, **shape: int) -> Path:
    """The base (0) is drawn with deviation 0.02; a fine-tune adds a delta of a twentieth of that, heavy-tailed."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    for index, (name, size) in enumerate(shapes(**shape)):
        held[name] = _drawn(index, number, size).mul_(unit).to(dtype)
        if sum(tensor.nbytes for tensor in held.values()) >= _FILE_BYTES:
            _save(folder, held, weight_map)
    _save(folder, held, weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_config(heads, dtype, **shape)))
    return folder


def _drawn(index: int, number: int, size: Sequence[int]) -> Tensor:
    base = torch.randn(size, generator=torch.Generator().manual_seed(index)).mul_(0.02)
    if number == 0:
        return base
    draw = torch.Generator().manual_seed(1_000_003 * number + index)
    delta = torch.randn(size, generator=draw)
    return base.add_(delta.mul_(delta.abs()), alpha=0.001)


def _save(folder: Path, held: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    name = f"part-{len(set(weight_map.values())) + 1:05d}.safetensors"
    if held:
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
        held.clear()


def _config(heads: int, dtype: torch.dtype, layers: int, hidden: int, middle: int, vocab: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": middle, "vocab_size": vocab, "num_hidden_layers": layers}
    return {**CONFIG, **sizes, "num_attention_heads": heads, "num_key_value_heads": heads,
            "torch_dtype": str(dtype).removeprefix("torch.")}  # fmt: skip


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
