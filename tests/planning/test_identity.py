"""What names a plan: the words that its hash is made of, which stay whatever fields are called.

Not here: locks as wholes (test_formats).
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from merger.models.checkpoint import TensorInfo
from merger.planning.inputs.base import Input, Job, Operand, StageTensor, Stored, unpack
from merger.planning.inputs.derived import Constant, Dequantised, Drawn, Mean, Noised, Packed, Routed, Stacked
from merger.planning.inputs.low_rank import (
    Added,
    Difference,
    ExpertColumns,
    ExpertsLowRank,
    Factor,
    LowRank,
    MergedDeltas,
    Transposed,
)
from merger.planning.inputs.rows import Pursuit, RowMap, RowPairs, Rows

T = TensorInfo("a", "F32", (4, 2), "f.safetensors", 0, 32)
ONE = Stored(1, T)
TENSOR = '{"dtype": "F32", "file": "f.safetensors", "name": "a", "shape": [4, 2], "start": 0, "stop": 32}'
STORED = f'{{"model": 1, "tensor": {TENSOR}}}'
JOB = Job("b", "BF16", (4, 2), "linear", (Operand(ONE, {"weight": 0.5}, 2),), None, {"normalize": 1.0}, "so")
NUMBERS = np.arange(3)
NOISE = Drawn((4, 2), "normal", 0.1, 7, "b")
LOW = LowRank(ONE, ONE, ONE, 2.0, True)
ROWS = Rows((ONE,), RowMap(np.arange(4), np.zeros(3, np.int64), NUMBERS))
MADE = StageTensor(3, "b", 7, JOB)
PAIRS = RowPairs(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
DIFFERENCE = f'{{"minuend": {STORED}, "subtrahend": {STORED}}}'
DRAWN = '{"law": "normal", "seed": 7, "size": [4, 2], "spread": 0.1, "stream": "b"}'
ENCODED: list[tuple[Input, str]] = [
    (ONE, STORED),
    (MADE, '{"name": "b", "seed": 7, "stage": 3}'),
    (
        Dequantised(ONE, ONE, (1, 2), "BF16"),
        f'{{"block": [1, 2], "dtype": "BF16", "numbers": {STORED}, "scales": {STORED}}}',
    ),
    (
        Packed("MXFP4", (("codes", ONE), ("scales", ONE)), (2, 4), (("group", 32),), "BF16"),
        f'{{"dtype": "BF16", "form": "MXFP4", "parts": [{STORED}, {STORED}], "roles": ["codes", "scales"], '
        '"settings": {"group": 32}, "size": [2, 4]}',
    ),
    (Stacked((ONE,), ((0, 1),), 1, 2), f'{{"axis": 1, "givers": [{STORED}], "share": 2, "taken": [[0, 1]]}}'),
    (Mean((ONE, ONE), (0.25, 0.75)), f'{{"factors": [0.25, 0.75], "terms": [{STORED}, {STORED}]}}'),
    (NOISE, DRAWN),
    (Noised(ONE, NOISE), f'{{"noise": {DRAWN}, "quiet": {STORED}}}'),
    (Constant((4, 2), "F16"), '{"like": "F16", "zeros": [4, 2]}'),
    (Routed("hidden", 1, 2, ((("p",), ()),)), '{"layer": 1, "mode": "hidden", "prompts": [[["p"], []]], "width": 2}'),
    (
        LOW,
        f'{{"a": {STORED}, "b": {STORED}, "magnitude": null, "of": {STORED}, "scale": 2.0, "turned": true}}',
    ),
    (Transposed(ONE), f'{{"transpose": {STORED}}}'),
    (ExpertColumns(ONE, 1, 2), f'{{"expert": 1, "experts": 2, "of": {STORED}}}'),
    (
        ExpertsLowRank(ONE, ONE, ONE, 2.0, True),
        f'{{"a": {STORED}, "b": {STORED}, "experts": 4, "of": {STORED}, "scale": 2.0, "turned": true}}',
    ),
    (Added(ONE, ONE, 2.0), f'{{"plus": {STORED}, "scale": 2.0, "to": {STORED}}}'),
    (Difference(ONE, ONE), DIFFERENCE),
    (
        MergedDeltas((Constant((4, 2), "F16"),), "ties", (("density", 0.5),), None, "full", 3),
        '{"arguments": [["density", 0.5]], "blocks": 3, "deltas": [{"like": "F16", "zeros": [4, 2]}], '
        '"method": "ties", "random": null, "space": "full"}',
    ),
    (
        Factor(Difference(ONE, ONE), 2, "B", 1.5, False, True),
        f'{{"part": "B", "product": {DIFFERENCE}, "rank": 2, "scale": 1.5, "spread": true, "turned": false}}',
    ),
    (ROWS, f'{{"map": "{ROWS.map.digest}", "parts": [{STORED}]}}'),
    (
        Pursuit(ROWS, ONE, PAIRS, 3),
        f'{{"donor": {STORED}, "k": 3, "known": {{"map": "{ROWS.map.digest}", "parts": [{STORED}]}}, '
        f'"pairs": "{PAIRS.digest}"}}',
    ),
]
every_kind = pytest.mark.parametrize(("source", "words"), ENCODED, ids=[source.kind for source, _ in ENCODED])


def plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=lambda inner: inner.encode())


@every_kind
def test_the_words_of_a_kind_stay(source: Input, words: str) -> None:
    """A plan that was published is found again by them."""
    assert plain(source) == words


def test_the_words_of_a_job_stay() -> None:
    """With its inputs, and the digests of their rows, which are of 64 bits little-endian."""
    given = f'{{"named": 2, "settings": {{"weight": 0.5}}, "source": {STORED}}}'
    assert plain(JOB) == (
        f'{{"base": null, "dtype": "BF16", "inputs": [{given}], '
        '"method": "linear", "name": "b", "settings": {"normalize": 1.0}, "shape": [4, 2], "why": "so"}'
    )
    assert PAIRS.digest == RowPairs(*4 * [NUMBERS.astype(">i4").astype(np.int64)]).digest
    assert PAIRS.digest[:16] == "f8db38627ba3329e"


def kinds(of: type[Input] = Input) -> list[type[Input]]:
    return [kind for each in of.__subclasses__() for kind in (each, *kinds(each))]


def test_no_two_kinds_are_one() -> None:
    """Each has a word of its own, and no two the same keys: equal plain data are equal sources."""
    assert sorted(source.kind for source, _ in ENCODED) == sorted(kind.kind for kind in kinds())
    assert len({kind.kind for kind in kinds()}) == len(kinds())
    assert not [pair for pair in combinations([set(source.encode()) for source, _ in ENCODED], 2) if pair[0] == pair[1]]


@every_kind
def test_all_that_is_encoded_of_sources_are_children(source: Input, words: str) -> None:
    """So that who walks the children finds all that is read; a stage's tensor is walked by its own job."""
    said = [value if isinstance(value, tuple) else (value,) for value in source.encode().values()]
    assert [value for values in said for value in values if isinstance(value, Input)] == list(source.children)
    assert all(isinstance(end, Stored | StageTensor) for end in unpack(source))
