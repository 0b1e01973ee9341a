"""Which entries of a merge are compared: within their share of the bytes, in the tensors, and drawn by the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merger.methods.registry import methods
from merger.planning.plan import Plan
from merger.verification.sample import MOST_BYTES, MOST_TENSORS, SHARE, draw, whole_tensor

from .models import model, planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of models: of tensors with 256 to 131,072 entries, of huge ones, and of a hundred layers."""
    root = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        model(root / name, layers=3, hidden=256, vocab=500)
    for name in ("huge", "huger"):
        model(root / name, layers=3, hidden=16_384, vocab=100_000)
    for name in ("deep", "deeper"):
        model(root / name, layers=100, hidden=64)
    return root


def merge(folder: Path, method: str, *names: str) -> Plan:
    """The plan of a merge of some of the models."""
    listed = "".join(f"  - model: {folder / name}\n" for name in names)
    return planned(f"merge_method: {method}\nbase_model: {folder / names[0]}\nmodels:\n{listed}", shard_bytes=500_000)


def cost(plan: Plan) -> int:
    """What it takes to compare everything."""
    return sum(whole_tensor(shard.name, job).cost for shard in plan.shards for job in shard.jobs)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 2**32), method=st.sampled_from(["task_arithmetic", "ties", "della", "tsvm"]))
def test_a_sample_keeps_within_its_share(seed: int, method: str, folder: Path) -> None:
    """Every tensor is taken or said to be left out; pieces lie in their tensors; the same seed, the same sample."""
    plan = merge(folder, method, "one", "two")
    sample = draw(plan, methods(), seed)
    assert sample == draw(plan, methods(), seed)
    assert sum(piece.cost for piece in sample.pieces) <= SHARE * cost(plan)
    names = [piece.job.name for piece in sample.pieces]
    assert sorted([*names, *sample.left_out]) == sorted(job.name for job in plan.jobs)
    for piece in sample.pieces:
        assert 0 <= piece.start < piece.stop <= piece.job.entries
        assert piece.cost == piece.nbytes * (len(piece.job.reads) + 1)
        assert piece.file in {shard.name for shard in plan.shards if piece.job in shard.jobs}


def test_where_entries_stand_alone_some_of_each_tensor_are_taken(folder: Path) -> None:
    """Of a method that has to read its inputs in full, as many whole tensors as fit."""
    assert draw(merge(folder, "task_arithmetic", "one", "two"), methods(), 1).left_out == ()
    sample = draw(merge(folder, "ties", "one", "two"), methods(), 1)
    assert all(piece.is_whole for piece in sample.pieces)
    assert sample.left_out


def test_each_entry_can_be_drawn(folder: Path) -> None:
    """The first and the last one of a large tensor too."""
    plan = merge(folder, "linear", "one", "two")
    drawn = [piece for seed in range(1000) for piece in draw(plan, methods(), seed).pieces]
    pieces = [piece for piece in drawn if piece.job.name == "model.layers.1.self_attn.q_proj.weight"]
    assert min(piece.start for piece in pieces) == 0
    assert max(piece.stop for piece in pieces) == pieces[0].job.entries


def test_of_a_huge_merge_no_more_than_a_gigabyte_is_read(folder: Path) -> None:
    """However much two per cent of it are."""
    plan = merge(folder, "ties", "huge", "huger")
    assert SHARE * cost(plan) > MOST_BYTES
    sample = draw(plan, methods(), 1)
    assert sample.pieces
    assert sum(piece.cost for piece in sample.pieces) <= MOST_BYTES


def test_of_many_tensors_not_every_one_is_taken(folder: Path) -> None:
    """Each takes some requests."""
    sample = draw(merge(folder, "linear", "deep", "deeper"), methods(), 1)
    assert (len(sample.pieces), len(sample.left_out)) == (MOST_TENSORS, 903 - MOST_TENSORS)


@pytest.mark.parametrize("count", [1, 5, 1000])
def test_so_many_tensors_are_taken_in_full(count: int, folder: Path) -> None:
    """Each at most once."""
    plan = merge(folder, "ties", "one", "two")
    sample = draw(plan, methods(), 3, count)
    assert len({piece.job.name for piece in sample.pieces}) == len(sample.pieces) == min(count, len(plan.jobs))
    assert all(piece.is_whole for piece in sample.pieces)
