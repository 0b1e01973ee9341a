"""How a plan's shards are shared among parts: laws over drawn sizes, with one share worked by hand."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from merger.models.checkpoint import TensorInfo
from merger.planning.inputs.base import Job, Operand, Stored
from merger.planning.shards import Part, Shard, share

SIZES = st.lists(st.tuples(st.integers(0, 5_000), st.integers(1, 4)), max_size=24)
"""For each shard the entries of its one tensor, and how many models it is made of."""


def shards(sizes: Sequence[tuple[int, int]]) -> tuple[Shard, ...]:
    """Shards of one float32 tensor each."""
    made = []
    for number, (entries, models) in enumerate(sizes):
        tensor = TensorInfo("t", "F32", (entries,), "f", 0, 4 * entries)
        inputs = tuple(Operand(Stored(model, tensor)) for model in range(models))
        made.append(Shard(f"model-{number:05d}", (Job("t", "F32", (entries,), "linear", inputs),)))
    return tuple(made)


def work(held: Sequence[Shard]) -> int:
    """Bytes written and read, of shards as made above."""
    return sum(4 * job.entries * (1 + len(job.inputs)) for shard in held for job in shard.jobs)


@given(SIZES, st.integers(1, 9))
def test_every_shard_is_in_exactly_one_part(sizes: list[tuple[int, int]], count: int) -> None:
    """The parts together are the plan, none has what another has, and each keeps the plan's order."""
    plan = shards(sizes)
    parts = [share(plan, Part(number, count)) for number in range(1, count + 1)]
    names = [shard.name for part in parts for shard in part]
    assert sorted(names) == [shard.name for shard in plan]
    assert all([shard.name for shard in part] == sorted(shard.name for shard in part) for part in parts)


@given(SIZES, st.integers(1, 9))
def test_parts_differ_by_less_than_a_shard(sizes: list[tuple[int, int]], count: int) -> None:
    """Without its smallest shard, no part has more to read and write than any other part."""
    plan = shards(sizes)
    parts = [share(plan, Part(number, count)) for number in range(1, count + 1)]
    least = min(work(part) for part in parts)
    assert all(work(part) - min((work([shard]) for shard in part), default=0) <= least for part in parts)


@given(SIZES, st.integers(1, 9))
def test_a_share_is_the_same_on_every_machine(sizes: list[tuple[int, int]], count: int) -> None:
    """It hangs on the sizes alone: shards of other names and equal sizes are shared in the same places."""
    plan, other = shards(sizes), tuple(Shard(f"x{shard.name}", shard.jobs) for shard in shards(sizes))
    for number in range(1, count + 1):
        mine = share(plan, Part(number, count))
        assert [f"x{shard.name}" for shard in mine] == [shard.name for shard in share(other, Part(number, count))]


def test_the_largest_shard_goes_first_to_whom_has_least() -> None:
    """8, 7, 6, 5 and 4 on two parts: 8 + 5 + 4 and 7 + 6; by their number it would be 18 and 12."""
    plan = shards([(5, 1), (8, 1), (4, 1), (7, 1), (6, 1)])
    sizes = [[shard.jobs[0].entries for shard in share(plan, Part(number, 2))] for number in (1, 2)]
    assert sizes == [[5, 8, 4], [7, 6]]
    assert share(plan, None) == plan
