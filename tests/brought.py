"""What people bring that is no model as it stands. No tests here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file


def pointer(path: Path) -> None:
    """What a clone without Git LFS has in a file's place."""
    oid = hashlib.sha256(path.name.encode()).hexdigest()
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 4988025760\n")


def cloned(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tiny.model(folder)
        (folder / "tokenizer.json").write_text("{}")
        for name in names:
            pointer(folder / name)

    return make


def pickled_clone(folder: Path) -> None:
    tiny.model(folder)
    (folder / "model.safetensors").unlink()
    pointer(folder / "pytorch_model.bin")


def of_mlx(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "dora", "num_layers": 2}))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(16, 4)}, folder / "adapters.safetensors")


def of_gguf(folder: Path, *more: str) -> None:
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(20))


def of_gguf_with_config(folder: Path) -> None:
    of_gguf(folder)
    (folder / "config.json").write_text(json.dumps(dict(tiny.CONFIG)))
