"""Two checkpoints are compared: which tensors each has, and how far those of both are from each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calls import Command
from loopback import LoopbackHub
from places import ZOO
from planning.models import model
from torch import Tensor
from waiting import HANGS_SECONDS

from merger.cli.reports import contrast_json, contrast_text
from merger.errors import ModelError
from merger.verification.diff import Contrast, contrast, pair


def compared(one: Path | str, other: Path | str) -> Contrast:
    """All that a comparison comes to."""
    return contrast(pair(str(one), str(other)), 2)


def written(folder: Path, **held: Tensor) -> Path:
    """A checkpoint of these tensors, whose names have dots for underlines."""
    return tiny.write(folder, {name.replace("_", "."): tensor for name, tensor in held.items()})


def test_the_numbers_are_those_of_float64(tmp_path: Path) -> None:
    """Of each tensor, and of each layer; the most different tensors come first."""
    found = contrast_json(compared(ZOO / "base", ZOO / "kjv"))
    base, kjv = (
        {name: tensor.double().flatten() for name, tensor in tiny.read(ZOO / side).items()} for side in ("base", "kjv")
    )
    assert [row["tensor"] for row in found["tensors"]] == sorted(
        base, key=lambda name: -float((base[name] - kjv[name]).norm() / base[name].norm())
    )
    for row in found["tensors"]:
        assert numbers(row) == pytest.approx(expected(base[row["tensor"]], kjv[row["tensor"]]), rel=1e-12)
    for number, row in enumerate(found["layers"]):
        names = [name for name in base if (f"layers.{number - 1}." in name if number else "layers." not in name)]
        assert row["layer"] == (f"layer {number - 1}" if number else "outside of the layers")
        wanted = expected(*(torch.cat([side[name] for name in names]) for side in (base, kjv)))
        assert numbers(row) == pytest.approx(wanted, rel=1e-12)


def numbers(row: Mapping[str, Any]) -> list[float]:
    return [row[name] for name in ("relative", "max_abs", "cosine", "differing", "entries")]


def expected(one: Tensor, other: Tensor) -> list[float]:
    apart = one - other
    cosine = one @ other / (one.norm() * other.norm())
    return [
        float(apart.norm() / one.norm()),
        float(apart.abs().max()),
        float(cosine),
        int((apart != 0).sum()),
        len(one),
    ]


def test_tensors_of_one_alone_of_two_shapes_and_of_two_dtypes(tmp_path: Path) -> None:
    """All are told by name; equal numbers of two dtypes differ in nothing but the dtype, and that is a difference."""
    one = written(tmp_path / "one", a=torch.ones(4), b=torch.ones(4), c=torch.ones(4), d=torch.ones(2, 2))
    other = written(tmp_path / "other", b=torch.ones(5), c=torch.ones(4).half(), d=torch.ones(2, 2), e=torch.ones(1))
    found = compared(one, other)
    told = contrast_json(found)
    assert (told["a"]["only"], told["b"]["only"], told["same"]) == (("a",), ("e",), False)
    assert told["shapes"] == [{"tensor": "b", "a": "F32 [4]", "b": "F32 [5]"}]
    assert {row["tensor"]: (row["dtypes"], row["differing"]) for row in told["tensors"]} == {
        "c": (("F32", "F16"), 0),
        "d": (("F32", "F32"), 0),
    }
    words = contrast_text(found)
    assert "only in A: 1 tensors, a\nonly in B: 1 tensors, e\ntwo shapes: b is F32 [4] in A, F32 [5] in B\n" in words
    assert "NOT THE SAME: 1 of 2 tensors that both have differ" in words
    assert "F32 in A, F16 in B" in words


@pytest.mark.parametrize(("one", "other", "relative", "largest", "differing"), [
    ([1.0, 0.0], [1.0, -0.0], 0.0, 0.0, 1),
    ([float("nan"), 3.0], [float("nan"), 3.0], 0.0, 0.0, 0),
    ([float("nan"), 3.0], [float("nan"), 4.0], 1 / 3, 1.0, 1),
    ([float("inf"), 3.0], [1.0, 3.0], None, None, 1),
    ([0.0, 0.0], [0.0, 1.0], None, 1.0, 1),
], ids=["signs of zero", "the same NaN", "beside NaN", "infinity", "zero"])  # fmt: skip
def test_numbers_that_are_none(
    one: list[float], other: list[float], relative: float | None, largest: float | None, differing: int, tmp_path: Path
) -> None:
    """Bits count for whether it is the same; what cannot be told in numbers is null."""
    sides = (written(tmp_path / name, a=torch.tensor(side)) for name, side in (("one", one), ("other", other)))
    (row,) = json.loads(json.dumps(contrast_json(compared(*sides)), allow_nan=False))["tensors"]
    assert (row["relative"], row["max_abs"], row["differing"]) == (pytest.approx(relative), largest, differing)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.uint16, torch.float8_e4m3fnuz]
)
def test_other_dtypes_are_compared_too(dtype: torch.dtype, tmp_path: Path) -> None:
    """By their bits at least."""
    one = written(tmp_path / "one", a=torch.tensor([0, 1, 1, 0]).to(dtype))
    other = written(tmp_path / "other", a=torch.tensor([0, 1, 0, 0]).to(dtype))
    assert compared(one, one).same
    (row,) = compared(one, other).tensors
    assert (row.distance.differing, row.distance.entries) == (1, 4)
    assert row.distance.largest == (float("inf") if dtype == torch.float8_e4m3fnuz else 1)


def test_over_the_hub_only_what_may_differ_is_read(served: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """Two revisions of a repo in two files, of which one is the same: its tensors are not read."""
    folder = tiny.model(tmp_path / "old", seed=1, files=2)
    served.add_model("org/diffed", folder)
    first = served.head("org/diffed")
    other = tiny.model(tmp_path / "new", seed=2, files=2)
    name = "model-00002-of-00002.safetensors"
    served.commit("org/diffed", {name: (other / name).read_bytes()})
    served.clear_log()
    done = command("diff", f"hf://org/diffed@{first}", "org/diffed", "--json", cwd=tmp_path, hub=served)
    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout)
    assert (told["a"]["commit"], told["b"]["commit"]) == (first, served.head("org/diffed"))
    held = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {row["tensor"] for row in told["tensors"] if row["differing"]} == {key for key in held if held[key] == name}
    raw = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    headers = [8 + int.from_bytes(each[:8], "little") for each in raw]
    assert sum(r.sent for r in served.log if r.host == "cdn") == 2 * (headers[0] + len(raw[1]))
    same = command("diff", "org/diffed", "org/diffed@main", cwd=tmp_path, hub=served)
    assert (same.returncode, same.stdout.splitlines()[-1]) == (0, f"the same: all {len(held)} tensors, bit for bit")


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Which of the two it is, and why: exit code 3."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty: has no safetensors"):
        pair(str(ZOO / "base"), str(tmp_path / "empty"))


PEAK = """
import resource, sys
import merger.verification.distance
from merger.cli.commands import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(["diff", *sys.argv[1:], "--threads", "2"])
print(code, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts in other units elsewhere")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Two models of 350 MB are compared in 100 MB of memory, beside what torch itself takes."""
    for name in ("one", "other"):
        model(tmp_path / name, layers=1, hidden=4096, vocab=1000)
    assert (tmp_path / "one/model.safetensors").stat().st_size > 3.3e8
    line = [sys.executable, "-c", PEAK, str(tmp_path / "one"), str(tmp_path / "other")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=HANGS_SECONDS)
    code, before, peak = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0
    assert (peak - before) * 1024 < 1e8
