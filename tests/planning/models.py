"""Models of which only the headers are written: their tensors are holes in the file. Not here: any arithmetic."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merger.lock.lock import lock
from merger.lock.locked import LockedRecipe
from merger.methods.registry import methods
from merger.models.checkpoint import ITEM_BYTES
from merger.planning.budget import Budget
from merger.planning.inputs.base import Job
from merger.planning.jobs.common import JobSet
from merger.planning.jobs.make import make_jobs
from merger.planning.plan import Plan, make_plan
from merger.planning.stage_model import StagedRecipe
from merger.recipe.parse import parse
from merger.stores.folder import FolderStore
from merger.stores.ports import Store

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Names to dtypes, as safetensors writes them, and shapes."""

DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def llama(
    layers: int = 2, hidden: int = 8, vocab: int = 20, dtype: str = "BF16", head: bool = True
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama-like model, nine in each layer."""
    square, wide = (hidden, hidden), (2 * hidden, hidden)
    roles = {
        "input_layernorm.weight": (hidden,), "mlp.down_proj.weight": (hidden, 2 * hidden), "mlp.gate_proj.weight": wide,
        "mlp.up_proj.weight": wide, "post_attention_layernorm.weight": (hidden,), "self_attn.k_proj.weight": square,
        "self_attn.o_proj.weight": square, "self_attn.q_proj.weight": square, "self_attn.v_proj.weight": square,
    }  # fmt: skip
    shapes = {f"model.layers.{layer}.{role}": shape for layer in range(layers) for role, shape in roles.items()}
    shapes = {"model.embed_tokens.weight": (vocab, hidden), **shapes, "model.norm.weight": (hidden,)}
    if head:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {name: (dtype, shape) for name, shape in shapes.items()}


def write(folder: Path, held: Tensors, **config: Any) -> str:
    """A model folder with these tensors; the path, for recipes."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in held.items():
        size = ITEM_BYTES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def model(folder: Path, layers: int = 2, tied: bool | None = False, head: bool | None = None, **shape: Any) -> str:
    """A Llama-like model; a tied one says so and has no head, unless `head` says otherwise; None: it says nothing."""
    held = llama(layers, head=not tied if head is None else head, **shape)
    said = {} if tied is None else {"tie_word_embeddings": tied}
    dtype = DTYPE_NAMES[next(iter(held.values()))[0]]
    return write(folder, held, model_type="llama", num_hidden_layers=layers, torch_dtype=dtype, **said)


def locked(recipe: str, store: Store | None = None) -> LockedRecipe:
    """The recipe with its models, as `merger check` would have it."""
    return lock(parse(recipe, "recipe.yaml", methods()), store or FolderStore())


def staged(recipe: str, store: Store | None = None) -> StagedRecipe:
    """The same as a plan begins with, without stages."""
    found = locked(recipe, store)
    return StagedRecipe(found.recipe, found.models)


def making(recipe: str, store: Store | None = None) -> JobSet:
    return make_jobs(staged(recipe, store), methods())


def planned(recipe: str, store: Store | None = None, seed: int | None = None, **budget: Any) -> Plan:
    return make_plan(locked(recipe, store), methods(), Budget(**budget), seed)


def jobs(recipe: str) -> dict[str, Job]:
    """The jobs by the names of the tensors they make, each of which is made once."""
    made = making(recipe).jobs
    found = {job.name: job for job in made}
    assert len(found) == len(made)
    return found


def sources(job: Job) -> list[tuple[int, str]]:
    """What goes into a job: the models' numbers and the tensors' names."""
    return [(entry.model, entry.tensor.name) for entry in job.reads]
