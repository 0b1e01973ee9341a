"""What methods on singular values make of stacks of experts and kernels: what they make of the matrices by themselves.

Not here: which tensor is what (checkpoints), and the methods' values (methods).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import merged
from safetensors.torch import load_file
from torch import Tensor

from merger.engine.runner import blocks
from merger.methods.registry import methods
from merger.planning.budget import thread_memory
from merger.planning.jobs.blocks import COPY_BYTES
from merger.planning.plan import Plan

OWN = {"knots": {"density": 0.5}}
ALL = sorted(name for name, method in methods().items() if method.unit == "matrix" and not method.statistics)
LAYER = "model.layers.0."
STACK = f"{LAYER}mlp.experts.gate_up_proj"
SAME = {
    STACK: lambda stack: {f"{LAYER}mlp.experts.{number}.w1.weight": part for number, part in enumerate(stack)},
    "patch_embed.proj.weight": lambda kernel: {"patch_embed.linear.weight": kernel.flatten(1)},
    f"{LAYER}mixer.conv1d.weight": lambda kernel: {f"{LAYER}mixer.flat.weight": kernel.flatten(1)},
}
"""Tensors of more than two dimensions, and the matrices that are to be the same."""

sizes = st.integers(1, 9)
shapes = st.tuples(
    st.tuples(st.integers(1, 4), sizes, sizes),
    st.tuples(sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(sizes, st.integers(1, 3), st.integers(1, 4)),
)


def model(folder: Path, seed: int, of: Sequence[Sequence[int]]) -> Path:
    """A model that holds each tensor in both ways."""
    draw = torch.Generator().manual_seed(seed)
    held = dict[str, Tensor]()
    for name, shape in zip(SAME, of, strict=True):
        held[name] = torch.randn(*shape, generator=draw)
        held |= {other: matrix.clone() for other, matrix in SAME[name](held[name]).items()}
    return tiny.write(folder, held)


def made(
    method: str, of: Sequence[Sequence[int]], folder: Path, spectral: bool = True
) -> tuple[Plan, dict[str, Tensor]]:
    """The merge of two such models over a third."""
    base, one, other = (model(folder / name, seed, of) for seed, name in enumerate(("base", "one", "other")))
    recipe = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(one)}, {"model": str(other)}],
        "parameters": {"spectral": spectral, **OWN.get(method, {})},
    }
    planned = merged(json.dumps(recipe), folder / "out")
    return planned, load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("method", ALL)
@settings(max_examples=8, deadline=None)
@given(of=shapes)
def test_a_stack_and_a_kernel_are_merged_as_their_matrices_are(
    method: str, spectral: bool, of: tuple[tuple[int, ...], ...]
) -> None:
    """To the bit: each expert as if it were a tensor of its own, a kernel as its first dimension against the others."""
    with TemporaryDirectory() as folder:
        _, found = made(method, of, Path(folder), spectral)
    for name, shape in zip(SAME, of, strict=True):
        assert found[name].shape == shape
        for other, matrix in SAME[name](found[name]).items():
            assert torch.equal(found[other], matrix), (name, other)


@pytest.mark.parametrize("method", ALL)
def test_a_stack_takes_the_memory_of_one_expert(method: str, tmp_path: Path) -> None:
    """A block of it is an expert, and the plan counts on no more."""
    planned, _ = made(method, [(40, 8, 6), (8, 3, 2, 2), (8, 1, 4)], tmp_path)
    jobs, table = {job.name: job for job in planned.jobs}, methods()
    stack, alone = jobs[STACK], jobs[f"{LAYER}mlp.experts.0.w1.weight"]
    assert [block.stop - block.start for block in blocks(stack, table[method])] == [math.prod(alone.shape)] * 40
    assert thread_memory(stack, table) == thread_memory(alone, table)


def test_a_matrix_that_is_larger_than_the_ring_of_buffers_has_one_of_its_own(tmp_path: Path) -> None:
    """Buffers are as large as a copy's block; a block that is a whole matrix may be larger."""
    size = math.isqrt(COPY_BYTES // 4) + 8
    drawn = [torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    base, one = (tiny.write(tmp_path / str(seed), {LAYER + "w": held}) for seed, held in enumerate(drawn))
    recipe = {"merge_method": "iso_c", "base_model": str(base), "models": [{"model": str(one)}]}
    merged(json.dumps({**recipe, "parameters": {"spectral": False}}), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[LAYER + "w"]
    torch.testing.assert_close(found, drawn[1], rtol=1e-5, atol=1e-5)
