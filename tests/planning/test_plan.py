"""Shards, memory, disk and hash: what a plan says it takes, and by what it is known."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merger.errors import BudgetError
from merger.models.checkpoint import ITEM_BYTES
from merger.models.formats.safetensors import header, index
from merger.planning.budget import Budget
from merger.planning.plan import Plan
from merger.safety.numbers import DOWN, UP, parse_size, size, typed_size
from merger.stores.folder import FolderStore
from merger.stores.ports import Located

from .models import llama, model, planned, write


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe that merges two models of three layers."""
    root = tmp_path_factory.mktemp("pair")
    return linear(model(root / "one", layers=3), model(root / "other", layers=3))


def linear(*models: str, more: str = "") -> str:
    return f"merge_method: linear\n{more}models:\n" + "".join(f"  - {{model: {path}}}\n" for path in models)


# ---- shards ---------------------------------------------------------------------------------------------------------


@given(limit=st.integers(1, 5000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_shard_is_no_larger_than_the_limit_unless_it_holds_one_tensor(pair: str, limit: int) -> None:
    """Whatever the limit: each tensor once, in the same order, as many in each file as go into it."""
    whole = planned(pair)
    found = planned(pair, shard_bytes=limit)
    assert [job for shard in found.shards for job in shard.jobs] == list(whole.jobs)
    sizes = [[job.nbytes for job in shard.jobs] for shard in found.shards]
    assert all(sum(held) <= limit or len(held) == 1 for held in sizes)
    assert all(sum(held) + following[0] > limit for held, following in pairwise(sizes))
    count = len(found.shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [shard.name for shard in found.shards] == (names if count > 1 else ["model.safetensors"])


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    """And the tensors beside it go into other files."""
    one = write(tmp_path / "one", {"a": ("F32", (4,)), "b": ("F32", (100,)), "c": ("F32", (4,)), "d": ("F32", (4,))})
    found = planned(linear(one), shard_bytes=40)
    assert [[job.name for job in shard.jobs] for shard in found.shards] == [["a"], ["b"], ["c", "d"]]


def test_sizes_are_those_of_the_files(pair: str) -> None:
    """A shard's header counts, in the index's total only the tensors do."""
    found = planned(pair, shard_bytes=1000)
    for shard in found.shards:
        assert shard.size == len(header(shard.jobs)) + sum(job.nbytes for job in shard.jobs)
    assert found.size == sum(shard.size for shard in found.shards)
    assert found.entries == sum(job.entries for job in found.jobs) == 3 * 656 + 2 * 20 * 8 + 8
    weight_map = {job.name: shard.name for shard in found.shards for job in shard.jobs}
    total = sum(job.nbytes for job in found.jobs)
    assert total == 2 * found.entries
    assert json.loads(index(weight_map, total))["metadata"] == {"total_size": total}
    assert weight_map.keys() == llama(3).keys()


def test_larger_items_come_first_so_that_each_tensor_is_aligned(tmp_path: Path) -> None:
    """A loader may map the file: each tensor starts at a multiple of its own item's size."""
    held = {"a": ("U8", (3,)), "b": ("F16", (3,)), "c": ("I64", (1,)), "d": ("F32", (3,)), "e": ("BOOL", (1,)),
            "f": ("F64", ()), "g": ("BF16", (1,))}  # fmt: skip
    (shard,) = planned(linear(write(tmp_path / "one", held))).shards
    assert [job.name for job in shard.jobs] == ["c", "f", "d", "b", "g", "a", "e"]
    place = len(header(shard.jobs))
    assert place % 8 == 0
    for job in shard.jobs:
        assert place % ITEM_BYTES[job.dtype] == 0
        place += job.nbytes


def test_what_is_read_is_counted(pair: str) -> None:
    """Each input of each job once."""
    found = planned(pair)
    assert found.read_bytes == 2 * sum(job.nbytes for job in found.jobs)


# ---- memory and disk ------------------------------------------------------------------------------------------------


def scaled(root: Path, hidden: int, layers: int, method: str = "ties") -> Plan:
    paths = [model(root / f"{hidden}-{layers}-{n}", layers=layers, hidden=hidden, vocab=hidden) for n in range(3)]
    return planned(linear(*paths[1:], more=f"base_model: {paths[0]}\n").replace("linear", method), threads=2)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path, method: str) -> None:
    """A thousand times the entries: not a byte more; forty times the layers: a few kilobytes of plan a tensor."""
    small, wide, deep = (scaled(tmp_path, *size, method=method) for size in ((64, 2), (2048, 2), (64, 80)))
    assert wide.entries > 1000 * small.entries
    assert wide.peak_memory == small.peak_memory
    tensors = len(deep.jobs) - len(small.jobs) + len(deep.left_out) - len(small.left_out)
    assert 0 < deep.peak_memory - small.peak_memory <= 10_000 * tensors


def test_memory_is_spared_on_threads_before_a_plan_is_refused(pair: str) -> None:
    """As many threads as fit; the result is the same."""
    one, four = planned(pair, threads=1), planned(pair, threads=4)
    assert one.peak_memory < four.peak_memory
    squeezed = planned(pair, threads=4, memory=one.peak_memory)
    assert (squeezed.threads, squeezed.peak_memory) == (1, one.peak_memory)
    assert planned(pair, threads=4, memory=four.peak_memory).threads == 4
    assert squeezed.hash == four.hash


def test_a_plan_that_cannot_fit_is_refused_with_both_numbers(pair: str) -> None:
    """What it needs at least, and what is allowed."""
    least = planned(pair, threads=1).peak_memory
    with pytest.raises(BudgetError) as caught:
        planned(pair, threads=4, memory=least - 1)
    (problem,) = caught.value.problems
    assert problem.what == f"this merge needs {size(least, UP)} of memory, and {size(least - 1, DOWN)} are allowed"
    assert problem.hint is not None
    assert f"--max-memory to {typed_size(least, UP)}, " in problem.hint
    assert planned(pair, threads=4, memory=parse_size(typed_size(least, UP))).threads == 1
    assert caught.value.exit_code == 5


def test_a_staged_result_needs_the_disk_of_two_shards(pair: str) -> None:
    """One on its way out, one in the making; a folder needs it all."""
    found = planned(pair, shard_bytes=600)
    assert found.disk(staged=False) == found.size
    assert found.disk(staged=True) == 2 * max(shard.size for shard in found.shards) < found.size
    whole = planned(pair)
    assert whole.disk(staged=True) == whole.disk(staged=False) == whole.size


# ---- hash and JSON --------------------------------------------------------------------------------------------------


class Pinned(FolderStore):
    """Folders that claim to be at a commit."""

    def __init__(self, commit: str) -> None:
        super().__init__()
        self.commit = commit

    def locate(self, path: str, revision: str | None) -> Located:
        return replace(super().locate(path, revision), commit=self.commit)


def test_the_hash_is_that_of_what_is_made(pair: str) -> None:
    """Threads, memory and the recipe's own words have no part in it."""
    found = planned(pair)
    assert len(found.hash) == 64
    assert planned(pair).hash == found.hash
    assert planned(pair, threads=7, memory=1 << 40).hash == found.hash
    assert planned(f"# the same\n{pair}publish: {{private: true}}\n").hash == found.hash
    assert planned(pair + "parameters: {weight: 1, normalize: true}\n").hash == found.hash
    assert planned(pair, Pinned("a" * 40)).hash == planned(pair, Pinned("a" * 40)).hash


def test_the_hash_changes_with_whatever_changes_the_bytes(pair: str) -> None:
    """Seed, dtype, numbers, method, layout, commit: no two are taken for one."""
    hashes = [
        planned(pair).hash,
        planned(pair, seed=1).hash,
        planned(pair + "seed: 2\n").hash,
        planned(pair + "dtype: float32\n").hash,
        planned(pair + "parameters: {normalize: false}\n").hash,
        planned(pair + "parameters: {weight: [1, 2]}\n").hash,
        planned(pair, shard_bytes=1000).hash,
        planned(pair, Pinned("a" * 40)).hash,
        planned(pair, Pinned("b" * 40)).hash,
    ]
    assert len(set(hashes)) == len(hashes)


def test_a_seed_for_the_run_goes_before_the_recipes(pair: str) -> None:
    """And the plan is then the one of a recipe with that seed."""
    found = planned(pair + "seed: 2\n", seed=5)
    assert found.seed == 5
    assert found.hash == planned(pair + "seed: 5\n").hash


def test_a_model_that_became_another_gives_another_hash(tmp_path: Path) -> None:
    """Its config or its tensors' shapes; the folder's place has no part in it."""
    one = planned(linear(model(tmp_path / "x" / "one")))
    assert planned(linear(model(tmp_path / "y" / "one"))).hash == one.hash
    assert planned(linear(model(tmp_path / "z" / "one", hidden=12))).hash != one.hash
    assert planned(linear(write(tmp_path / "w" / "one", llama(), num_hidden_layers=2, rope_theta=5))).hash != one.hash


def test_a_plan_is_plain_data(pair: str) -> None:
    """It goes into JSON as it is, and says what was asked for."""
    found = planned(pair, shard_bytes=1000)
    data = json.loads(json.dumps(found.as_json()))
    assert data["hash"] == found.hash
    assert data["peak_memory"] == found.peak_memory
    assert data["disk"] == {"folder": found.disk(staged=False), "hub": found.disk(staged=True)}
    assert [shard["name"] for shard in data["shards"]] == [shard.name for shard in found.shards]
    first = data["shards"][0]["jobs"][0]
    assert (first["name"], first["dtype"], first["shape"]) == ("model.embed_tokens.weight", "BF16", [20, 8])
    assert [entry["source"]["tensor"]["file"] for entry in first["inputs"]] == ["model.safetensors"] * 2
    assert data["config"]["num_hidden_layers"] == 3


# ---- at size --------------------------------------------------------------------------------------------------------

PLAN_IT = """
import json, sys
from merger.methods.registry import methods
from merger.lock.lock import lock
from merger.planning.budget import Budget
from merger.planning.plan import make_plan as plan
from merger.recipe.parse import parse
from merger.stores.folder import FolderStore
found = plan(lock(parse(sys.stdin.read(), "r.yaml", methods()), FolderStore()), methods(), Budget(threads=2))
json.dumps(found.as_json())
print(json.dumps({"torch": "torch" in sys.modules, "jobs": len(found.jobs),
                  "bytes": found.size, "peak": found.peak_memory, "shards": len(found.shards)}))
"""


def test_three_models_of_seventy_billion_are_planned_in_little_memory_without_torch(tmp_path: Path) -> None:
    """80 layers, 8192 wide, 128,256 tokens: 141 GB in shards of 5 GB, made in about a gigabyte of memory."""
    wide, middle, keys, vocab = 8192, 28672, 1024, 128256
    roles = {
        "input_layernorm": (wide,), "post_attention_layernorm": (wide,), "mlp.down_proj": (wide, middle),
        "mlp.gate_proj": (middle, wide), "mlp.up_proj": (middle, wide), "self_attn.k_proj": (keys, wide),
        "self_attn.v_proj": (keys, wide), "self_attn.q_proj": (wide, wide), "self_attn.o_proj": (wide, wide),
    }  # fmt: skip
    shapes = {f"model.layers.{layer}.{role}.weight": shape for layer in range(80) for role, shape in roles.items()}
    shapes |= {
        "model.embed_tokens.weight": (vocab, wide),
        "model.norm.weight": (wide,),
        "lm_head.weight": (vocab, wide),
    }
    held = {name: ("BF16", shape) for name, shape in shapes.items()}
    paths = [write(tmp_path / name, held, num_hidden_layers=80, torch_dtype="bfloat16") for name in "abc"]
    recipe = linear(*paths[1:], more=f"base_model: {paths[0]}\n").replace("linear", "dare_ties")
    done = subprocess.run([sys.executable, "-c", PLAN_IT], input=recipe, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["jobs"] == 723
    assert 141_107_412_992 < found["bytes"] < 141_107_412_992 + 200_000
    assert found["shards"] == 30
    assert found["torch"] is False
    assert found["peak"] < 2 << 30


def test_the_budgets_defaults_are_one_thread_and_shards_of_five_gigabytes() -> None:
    """Of 10^9 bytes, as loaders count them."""
    assert Budget() == Budget(memory=None, threads=1, shard_bytes=5_000_000_000)
