"""The shared pieces: the exact k-th magnitude, masks by counter, sums, election."""

from __future__ import annotations

import math
import operator
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merger.methods.steps import select as _select
from merger.methods.steps.arithmetic import dots, magnitude_sum, per_model
from merger.methods.steps.intrinsics import threefry_words
from merger.methods.steps.random import Rng, draw_words, likely
from merger.methods.steps.select import kth_magnitudes, magnitudes_at
from merger.methods.steps.votes import band, consensus, trim

from .cases import Blocks

MANY = 2_300_000  # more than a small tensor, which is its own sample


def sorted_answer(entries: np.ndarray[Any, Any], density: float) -> float:
    """The k-th largest magnitude by a sort of the bit patterns (float comparisons might flush denormals)."""
    bits = np.sort(entries.view(np.uint32) & np.uint32(0x7FFFFFFF))
    return float(bits[-max(1, int(density * bits.size))].view(np.float32))


def in_blocks(entries: np.ndarray[Any, Any], size: int = 262_144) -> Blocks:
    """One model's tensor, cut as the engine cuts it."""
    return Blocks([torch.from_numpy(entries)], [*range(0, entries.size, size), entries.size])


def drawn(kind: str, entries: int = MANY) -> np.ndarray[Any, Any]:
    """Float32 entries of a kind that is hard on a search."""
    draw = np.random.Generator(np.random.PCG64(7))
    normal = draw.standard_normal(entries, dtype=np.float32)
    columns = np.resize(np.exp(np.arange(512) / 20), entries).astype(np.float32)
    sampled = np.zeros(entries, bool)
    for start, stop in _select.sample_spans(entries):
        sampled[start:stop] = True
    made = {
        "normal": normal,
        "all equal": np.full(entries, 0.25, np.float32),
        "all zero": np.zeros(entries, np.float32),
        "60 % zeros": normal * (draw.random(entries) < 0.4),
        "two values": np.where(draw.random(entries) < 0.5, 1.0, -2.0),
        "two neighbours": np.where(draw.random(entries) < 0.5, 1.0, np.nextafter(np.float32(1), np.float32(2))),
        "denormals": np.floor(np.abs(normal) * 1000) * 1e-44,
        "every exponent": draw.integers(0, 0x7F7FFFFF, entries, dtype=np.uint32).view(np.float32),
        "ascending": np.arange(entries) / 7,
        "block by block": normal * np.repeat(10.0 ** np.arange(-12, 12), -(-entries // 24))[:entries],
        "unlike columns": normal * columns,
        "sample misled": np.where(sampled, 1e-9, normal),
        "sample misled the other way": np.where(sampled, 1e9, normal),
        "infinities": np.where(draw.random(entries) < 0.01, np.inf, normal),
    }
    return made[kind].astype(np.float32)


KINDS = [
    "normal", "all equal", "all zero", "60 % zeros", "two values", "two neighbours", "denormals", "every exponent",
    "ascending", "block by block", "unlike columns", "sample misled", "sample misled the other way", "infinities",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kth_magnitude_is_that_of_a_sort(kind: str) -> None:
    """Whatever the distribution, the threshold is the sort's, to the bit, at common densities and at the extremes."""
    entries = drawn(kind)
    ordered = np.sort(entries.view(np.uint32) & np.uint32(0x7FFFFFFF)).view(np.float32)
    densities = [1e-9, 0.1, 0.4, 0.5, 0.99, 1 - 1e-9]
    blocks = [torch.from_numpy(entries)] * len(densities)
    found = kth_magnitudes(Blocks(blocks, in_blocks(entries).edges), densities)
    assert list(found) == [float(ordered[-max(1, int(density * MANY))]) for density in densities]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1).filter(lambda bits: (bits >> 23) & 0xFF < 0xFF), min_size=1, max_size=60),
    density=st.floats(0, 1, exclude_min=True, exclude_max=True),
    cut=st.integers(0, 60),
)
def test_kth_magnitude_of_any_small_tensor(bits: list[int], density: float, cut: int) -> None:
    """Any finite bit patterns, any density, cut anywhere: the threshold is the sort's."""
    entries = np.array(bits, np.uint32).view(np.float32)
    blocks = Blocks([torch.from_numpy(entries)], [0, min(cut, entries.size), entries.size])
    assert kth_magnitudes(blocks, [density]) == (sorted_answer(entries, density),)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_stage_of_the_search_is_exact(data: st.DataObject) -> None:
    """A bracket drawn at random, right or wrong, leads to the sort's answer by the stages that follow it."""
    values = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=200))
    spread = data.draw(st.sampled_from([1, 1000, 7_000_000]))
    entries = np.array(values, np.uint32) * np.uint32(spread)
    rank = data.draw(st.integers(1, entries.size))
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, 301 * spread)] * 2)))
    room = data.draw(st.sampled_from([0, _select.RUN + 3, 1000]))
    search: Any = _select._Count(rank, low, high, room=np.empty(room, np.uint32))
    passes = 0
    while not isinstance(search, int):
        search.feed(entries.view(np.float32))
        search = search.outcome()
        passes += 1
    assert search == int(np.sort(entries)[-rank])
    assert passes <= 3


@pytest.mark.parametrize("kind", ["normal", "60 % zeros", "two neighbours", "sample misled", "unlike columns"])
def test_search_takes_few_passes(kind: str) -> None:
    """Two passes as a rule, four at worst."""

    class Counted:
        passes = 0
        entries = MANY

        def __iter__(self) -> Any:
            self.passes += 1
            return iter(blocks)

    blocks, counted = list(in_blocks(drawn(kind))), Counted()
    kth_magnitudes(counted, [0.4])
    assert counted.passes <= (4 if kind == "sample misled" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_several_ranks_are_found_in_the_same_passes(kind: str) -> None:
    """Ranks of one tensor, also the same one twice, are all exact, and take no more passes than one of them."""
    entries = drawn(kind)
    ordered = np.sort(entries.view(np.uint32) & np.uint32(0x7FFFFFFF))[::-1].view(np.float32)
    ranks = [1, 23_001, 23_001, 943_000, MANY]
    found = magnitudes_at(in_blocks(entries), {0: lambda seen: [min(rank, seen) for rank in ranks]})
    assert list(found[0]) == [float(ordered[rank - 1]) for rank in ranks]


def test_densities_0_and_1_read_nothing() -> None:
    """No block is asked for where the threshold is known beforehand."""
    assert kth_magnitudes(iter(()), [1.0, 0.0, 1.5]) == (0.0, math.inf, 0.0)


def test_search_holds_little_memory() -> None:
    """The search in 12 million entries (46 MiB) holds less than 20 MiB, the most it ever asks for a model."""
    entries = drawn("normal", 12_000_000)
    blocks = [[torch.from_numpy(entries[start : start + 65_536])] for start in range(0, entries.size, 65_536)]
    kth_magnitudes(blocks[:2], [0.5])
    tracemalloc.start()
    kth_magnitudes(blocks, [0.5])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_trim_keeps_what_reaches_the_threshold() -> None:
    """Entries equal to the threshold stay, also the smallest of denormals; infinity keeps none; 0 keeps all."""
    tiny = float(np.float32(1e-45))
    delta = np.float32([tiny, -tiny, 0.0, 0.5, -0.5, 0.4999])
    assert trim(delta, 0.5).tolist() == [0, 0, 0, 0.5, -0.5, 0]
    assert trim(delta, tiny).tolist() == delta.tolist()
    assert not trim(delta, math.inf).any()
    assert trim(delta, 0.0).tolist() == delta.tolist()


def test_band_keeps_what_lies_between() -> None:
    """Both ends belong to the band; a floor of infinity keeps none, one of 0 all up to the ceiling."""
    delta = np.float32([5.0, -4.0, 3.0, -2.0, 1.0, 0.0])
    assert band(delta, 2, 4).tolist() == [0, -4, 3, -2, 0, 0]
    assert band(delta, 0, 3).tolist() == [0, 0, 3, -2, 1, 0]
    assert band(delta, 0, math.inf).tolist() == delta.tolist()
    assert not band(delta, math.inf, math.inf).any()


# Masks


def test_first_draws_are_fixed() -> None:
    """The draws are these for ever, on any machine: a published merge can be made again."""
    assert Rng(0).draws(0, 8).tolist() == [40015, 4388, 48132, 3159, 30929, 12170, 37643, 10190]
    far = Rng(42, "model.layers.0.mlp.up_proj.weight", 12_345)
    assert far.draws(1, 8).tolist() == [44187, 44543, 55119, 7658, 28329, 53150, 21659, 11622]
    assert far.words(1, 2, "duel").tolist() == [2633050269, 2792357084]
    assert far.bits(1, np.arange(2), "rest").tolist() == [16362516317094645303, 908388283420218091]


ZEROS, ONES, PI = [0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (ZEROS, ZEROS, "9c6ca96a e17eae66 fc10ecd4 5256a7d8"),
        (ONES, ONES, "2a881696 57012287 f6c7446e a16a6732"),
        (PI, [0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89], "59cd1dbb b8879579 86b5d00c ac8b6d84"),
    ],
)
def test_threefry_is_the_published_one(counter: list[int], key: list[int], words: str) -> None:
    """The known answers that come with Random123 (Salmon et al., 2011) for Threefry4x32 with 20 rounds."""

    def turned(x: int, by: int) -> int:
        return (x << by | x >> 32 - by) & 0xFFFFFFFF

    found = threefry_words(counter, key, lambda x, y: x + y & 0xFFFFFFFF, operator.xor, turned)
    assert " ".join(f"{word:08x}" for word in found) == words


def test_words_are_threefrys() -> None:
    """What is drawn are its words: of the first counter all zeros with the key of zeros those published for them."""
    made = np.empty(4 * 16, np.uint32)
    draw_words(made, np.zeros(4, np.uint32), 0)
    assert [f"{word:08x}" for word in made[::16]] == ["9c6ca96a", "e17eae66", "fc10ecd4", "5256a7d8"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(start=st.integers(0, 10_000), count=st.integers(1, 300), cut=st.integers(0, 300))
def test_draws_do_not_depend_on_the_split(start: int, count: int, cut: int) -> None:
    """A draw belongs to an entry: any window on the stream shows the same."""
    rng, cut = Rng(3, "a"), min(cut, count)
    whole = rng.draws(1, start + count)[start:]
    parts = np.concatenate([rng.at(start).draws(1, cut), rng.at(start + cut).draws(1, count - cut)])
    assert np.array_equal(whole, parts)


def test_draws_far_into_a_tensor() -> None:
    """Positions beyond 2³² are reached as fast as the first, and show other draws."""
    far = Rng(3, "a", 2**33).draws(0, 40)
    assert np.array_equal(far[3:], Rng(3, "a", 2**33 + 3).draws(0, 37))
    assert not np.array_equal(far, Rng(3, "a").draws(0, 40))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_mask_keeps_its_share(density: float) -> None:
    """The share of entries kept is within five standard deviations of the density, in every quarter of the tensor."""
    for quarter in Rng(11, "w").mask(0, 400_000, density).reshape(4, -1):
        sigma = math.sqrt(density * (1 - density) * quarter.size)
        assert abs(int(quarter.sum()) - density * quarter.size) < 5 * sigma


def test_mask_of_density_0_and_1() -> None:
    """Density 0 keeps nothing, 1 all."""
    assert not Rng(1).mask(0, 1000, 0.0).any()
    assert Rng(1).mask(0, 1000, 1.0).all()


@pytest.mark.parametrize(
    ("density", "least"), [(1 / 256, 256), (0.3, 19_661), (0.3 + 2**-20, 19_661), (1e-9, 1), (1 - 1e-9, 65_535)]
)
def test_mask_has_the_nearest_probability(density: float, least: int) -> None:
    """An entry stays if its draw, one of 65,536, is below the density; never and always are for 0 and 1 alone."""
    rng = Rng(3, "w")
    kept = rng.mask(1, 200_000, density)
    assert np.array_equal(kept, rng.draws(1, 200_000) < least)
    assert likely(density) == least / 65_536


def test_masks_of_two_shares_are_nested() -> None:
    """What is below a share is below a larger one: the draws are the same."""
    low, high, none, all_ = (Rng(3, "w").mask(0, 10_000, share) for share in (0.3, 0.31, 0.0, 1.0))
    assert (low <= high).all()
    assert 0 < int((high & ~low).sum()) < 300
    assert all_.all()
    assert not none.any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(start=st.integers(0, 10_000), count=st.integers(1, 300), cut=st.integers(0, 300), share=st.floats(0, 1))
def test_masks_do_not_depend_on_the_split(start: int, count: int, cut: int, share: float) -> None:
    """A mask belongs to the entries, its second looks too: any window shows the same."""
    rng, cut = Rng(3, "a", start), min(cut, count)
    whole = rng.mask(1, count, share)
    parts = [rng.mask(1, cut, share), rng.at(start + cut).mask(1, count - cut, share)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_bits_are_even() -> None:
    """Each of the 64 bits is set for half of the entries, and two uses of an entry are strangers."""
    bits = Rng(5, "w").bits(0, np.arange(100_000), "duel")
    other = Rng(5, "w").bits(0, np.arange(100_000), "rest")
    for shift in range(64):
        place = np.uint64(shift)
        for counted in (bits >> place & np.uint64(1), (bits ^ other) >> place & np.uint64(1)):
            assert abs(int(counted.sum()) - 50_000) < 5 * math.sqrt(25_000)


def test_streams_are_distinct() -> None:
    """Another seed, tensor or model gives draws that agree with these no more often than chance."""
    streams = [
        Rng(1, "a").draws(0, 50_000), Rng(2, "a").draws(0, 50_000), Rng(1, "b").draws(0, 50_000),
        Rng(1, "a").draws(1, 50_000), Rng(1, "a").draws(10, 50_000), Rng(11, "a").draws(0, 50_000),
    ]  # fmt: skip
    for place, one in enumerate(streams):
        for other in streams[:place]:
            agree = float(np.mean((one < 2**15) == (other < 2**15)))
            assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(50_000)


def test_draws_do_not_depend_on_threads() -> None:
    """Threads that draw at once get what one thread gets."""
    rng = Rng(5, "w")
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: rng.at(start).draws(0, 10_000), range(0, 200_000, 10_000)))
    assert np.array_equal(np.concatenate(parts), rng.draws(0, 200_000))


# Sums and election


def test_sums_are_those_of_exact_arithmetic() -> None:
    """Sums of magnitudes and products are within float64's rounding of the exact ones, over several chunks."""
    one = drawn("normal", 200_001)
    other = np.flip(one) + 1
    assert math.isclose(magnitude_sum(one), math.fsum(np.abs(one).tolist()), rel_tol=1e-12)
    pairs = ((one, one), (one, other), (other, other))
    exact = [math.fsum((a.astype(float) * b.astype(float)).tolist()) for a, b in pairs]
    assert all(math.isclose(*pair, rel_tol=1e-12) for pair in zip(dots([one, other]), exact, strict=True))


def test_a_sum_of_zero_elects_plus() -> None:
    """Terms that cancel exactly elect plus; where all are zero the result is zero."""
    terms = [np.float32([3.0, 0.0]), np.float32([-3.0, 0.0])]
    assert consensus(terms, [1, 1], True).tolist() == [3, 0]


def test_one_number_serves_all_models() -> None:
    """A number is repeated for every model; a list must have one for each."""
    assert per_model(2, 3) == [2.0, 2.0, 2.0]
    assert per_model((1, 2), 2) == [1.0, 2.0]
    with pytest.raises(ValueError, match="2 numbers were given for 3 models"):
        per_model([1, 2], 3)


def test_other_dtypes_are_refused_where_bits_are_read() -> None:
    """A float16 or float64 tensor is an error, not a wrong threshold."""
    with pytest.raises(TypeError, match="float32"):
        kth_magnitudes([[torch.zeros(4, dtype=torch.float64)]], [0.5])
