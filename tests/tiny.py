"""Small checkpoints for tests, written by the safetensors library, not by ours. Not here: trained models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from loopback import LoopbackHub

CONFIG: Mapping[str, Any] = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 40, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
    "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TIES_RECIPE = """\
merge_method: ties
base_model: {base}
models:
  - model: {one}
    parameters: {{weight: 0.6, density: 0.5}}
  - model: {two}
    parameters: {{weight: 0.5, density: 0.7}}
publish: {{license: apache-2.0}}
"""
"""A recipe that reads each tensor more than once, of the models `base`, `one` and `two`."""


def tensors(
    seed: int = 0,
    layers: int = 2,
    hidden: int = 16,
    middle: int = 24,
    vocab: int = 40,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The tensors of a small Mistral, drawn from `seed`; models of other seeds differ everywhere."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        here = f"model.layers.{layer}"
        shapes |= {
            f"{here}.input_layernorm.weight": (hidden,),
            f"{here}.mlp.down_proj.weight": (hidden, middle),
            f"{here}.mlp.gate_proj.weight": (middle, hidden),
            f"{here}.mlp.up_proj.weight": (middle, hidden),
            f"{here}.post_attention_layernorm.weight": (hidden,),
            f"{here}.self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{here}.self_attn.o_proj.weight": (hidden, hidden),
            f"{here}.self_attn.q_proj.weight": (hidden, hidden),
            f"{here}.self_attn.v_proj.weight": (hidden // 2, hidden),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: (torch.randn(shape, generator=draw) * 0.1 + 0.02).to(dtype) for name, shape in shapes.items()}


def write(
    folder: Path, held: Mapping[str, Tensor], files: int = 1, config: Mapping[str, Any] | None = None, **changed: Any
) -> Path:
    """Write a model folder of one safetensors file, or of several with an index; `changed` goes into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = len({name.split(".")[2] for name in held if name.startswith("model.layers.")})
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
    dtype = names.get(next(iter(held.values())).dtype, "float32")
    settled = {**(CONFIG if config is None else config), "num_hidden_layers": layers, "torch_dtype": dtype, **changed}
    (folder / "config.json").write_text(json.dumps(settled, indent=2))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    if files == 1:
        save_file(dict(held), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {key: held[key] for index, key in enumerate(held) if index % files == number}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in held.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def model(folder: Path, seed: int = 0, files: int = 1, **shape: Any) -> Path:
    """A small Mistral drawn from `seed`, written to `folder`."""
    held = tensors(seed, **shape)
    hidden, vocab = held["model.embed_tokens.weight"].shape[1], held["model.embed_tokens.weight"].shape[0]
    return write(folder, held, files, hidden_size=hidden, vocab_size=vocab, head_dim=hidden // 4,
                 intermediate_size=held["model.layers.0.mlp.up_proj.weight"].shape[0])  # fmt: skip


def models(root: Path, *names: str, hub: LoopbackHub | None = None) -> dict[str, Path]:
    """A small Mistral by each of these names, no two alike; in org/ on the Hub, too, if one is given."""
    made = {name: model(root / name, seed) for seed, name in enumerate(names)}
    for name, folder in made.items() if hub else ():
        hub.add_model(f"org/{name}", folder)
    return made


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, read by the safetensors library."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def lora(folder: Path, of: Path, rank: int = 64, seed: int = 7) -> Path:
    """An adapter of a small Mistral, for all of its matrices but the head, in the layout of PEFT."""
    draw, held = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, tensor in read(of).items():
        if tensor.dim() < 2 or name == "lm_head.weight":
            continue
        module, (rows, columns) = f"base_model.model.{name.removesuffix('.weight')}", tensor.shape
        embedding = "embed_tokens" in name
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        shapes = ((rank, rows), (columns, rank)) if embedding else ((rank, columns), (rows, rank))
        for part, shape in zip((first, second), shapes, strict=True):
            held[f"{module}.{part}"] = (torch.randn(shape, generator=draw) * 0.02).bfloat16()
    folder.mkdir(parents=True)
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": of.name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
