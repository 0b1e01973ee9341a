"""Statistics of small models, drawn and not measured, for tests of what is made of them. Not here: measuring."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from merger.lock.parents import Parent
from merger.lock.statistics import Statistics, statistic_name
from merger.methods.registry import Statistic
from merger.stores.ports import FileInfo

KINDS: tuple[Statistic, ...] = ("fisher", "gram", "activations")
"""Those that methods of ours ask for."""


def drawn(held: Mapping[str, Tensor], kind: Statistic, seed: int) -> dict[str, Tensor]:
    """Squares for each tensor, or for the matrices of layers products or magnitudes of drawn inputs."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "fisher":
        return {name: torch.randn(tensor.shape, generator=draw) ** 2 for name, tensor in held.items()}
    matrices = {name: each.shape[1] for name, each in held.items() if each.ndim == 2 and ".layers." in name}
    inputs = {statistic_name(kind, name): torch.randn(40, width, generator=draw) for name, width in matrices.items()}
    return {name: fed.T @ fed if kind == "gram" else fed.abs().mean(0) for name, fed in inputs.items()}


def write(folder: Path, model: Path, kind: Statistic, seed: int = 0, **changed: Any) -> Path:
    """Statistics of a model in a folder, and the lock; `changed` is what that says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(drawn(tiny.read(model), kind, seed), folder / "model.safetensors")
    files = sorted(model.glob("*.safetensors"))
    parent = Parent(model.name, None, None, {each.name: _info(each) for each in files})
    said = Statistics(kind, 1000, 10, "texts.txt", "ab" * 32, 0, "cd" * 32, (parent,))
    (folder / "merger.lock.yaml").write_text(replace(said, **changed).text())
    return folder


def _info(file: Path) -> FileInfo:
    data = file.read_bytes()
    return FileInfo(len(data), hashlib.sha256(data).hexdigest())
