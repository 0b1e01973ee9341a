"""Every method side by side with mergekit on the same recipes: how far apart, and who is closer to the formula.

`python benchmarks/parity.py` writes docs/parity.md: for each deterministic method the largest difference in float32, on
tiny models and on the zoo, with gradients and filters; for each random one the distribution over seeds; and the share
of entries that come out correctly rounded in bfloat16. Not here: time and memory (speed.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mergekit_env
import models
import numpy as np
import torch
import yaml
from torch import Tensor

from merger.methods.registry import Method, methods

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "parity.md"
ZOO = ROOT / "examples" / "zoo"

GRADIENT = [0.2, 0.9, 0.5]
FILTERED = [{"filter": "mlp", "value": [0.3, 0.8]}, {"filter": "self_attn", "value": 0.6}, {"value": 0.4}]
MODELS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "weighted": [{"weight": FILTERED}, {"weight": GRADIENT}],
    "sparse": [{"weight": FILTERED, "density": 0.6}, {"weight": GRADIENT, "density": [0.3, 0.8]}],
    "plain": [{}, {}],
    "one": [{}],
}


@dataclass(frozen=True)
class Setup:
    """How a method is compared: the settings of its models, and its own."""

    models: str
    settings: Mapping[str, Any]


SETUPS: Mapping[str, Setup] = {
    "linear": Setup("weighted", {}),
    "slerp": Setup("one", {"t": FILTERED}),
    "nuslerp": Setup("weighted", {}),
    "multislerp": Setup("weighted", {}),
    "karcher": Setup("plain", {}),
    "task_arithmetic": Setup("weighted", {"lambda": 0.9}),
    "ties": Setup("sparse", {"lambda": 0.9}),
    "breadcrumbs": Setup("sparse", {"gamma": 0.05}),
    "breadcrumbs_ties": Setup("sparse", {"gamma": 0.05}),
    "sce": Setup("plain", {"select_topk": 0.5}),
    "ram": Setup("plain", {}),
    "ramplus_tl": Setup("plain", {}),
    "model_stock": Setup("plain", {}),
    "nearswap": Setup("one", {"t": 0.001}),
    "arcee_fusion": Setup("one", {}),
    "passthrough": Setup("none", {"scale": 0.5}),
}
RANDOM: Mapping[str, Setup] = {
    name: Setup("sparse", {"normalize": False, **extra})
    for name, extra in {
        "dare_linear": {},
        "dare_ties": {},
        "della_linear": {"epsilon": 0.1},
        "della": {"epsilon": 0.1},
    }.items()
}
WITHOUT_BASE = ("linear", "nuslerp", "multislerp", "karcher", "passthrough")


def recipe(method: str, setup: Setup, parents: Sequence[Path], dtype: str) -> dict[str, Any]:
    """The recipe that both programs are given; parents[0] is the base."""
    if setup.models == "none":
        listed = [{"model": str(parents[1])}]
    else:
        own = MODELS[setup.models]
        listed = [
            {"model": str(parent), "parameters": dict(settings)} if settings else {"model": str(parent)}
            for parent, settings in zip(parents[1:], own, strict=False)
        ]
    made: dict[str, Any] = {"merge_method": method, "models": listed, "dtype": dtype}
    if method not in WITHOUT_BASE:
        made["base_model"] = str(parents[0])
    if setup.settings:
        made["parameters"] = dict(setup.settings)
    return made


def both(made: Mapping[str, Any], folder: Path, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What we and mergekit make of a recipe."""
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(made), sort_keys=False))
    command = [sys.executable, "-m", "merger", "run", str(path), "--to", str(folder / "ours"), "--quiet"]
    subprocess.run([*command, "--seed", str(seed)], check=True)
    mergekit_env.merge(path, folder / "theirs", seed)
    return models.read(folder / "ours"), models.read(folder / "theirs")


@dataclass(frozen=True)
class Apart:
    """The largest difference over all tensors, absolute and as a share of the tensor's largest entry; and how many
    entries differ by more than a millionth of their tensor's largest."""

    absolute: float
    relative: float
    tensor: str
    entries: int
    total: int


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Apart:
    """How far two merges are apart; both must hold the same tensors."""
    if set(ours) != set(theirs):
        raise RuntimeError(f"different tensors: {sorted(set(ours) ^ set(theirs))}")
    found, beyond = [], 0
    for name, mine in ours.items():
        difference = (mine.double() - theirs[name].double()).abs()
        largest = max(float(theirs[name].abs().max()), 1e-30)
        beyond += int((difference > 1e-6 * largest).sum())
        found.append((float(difference.max()) / largest, float(difference.max()), name))
    relative, _, name = max(found)
    total = sum(tensor.numel() for tensor in ours.values())
    return Apart(max(absolute for _, absolute, _ in found), relative, name, beyond, total)


def deterministic(built: Mapping[str, Method], parents: Mapping[str, Sequence[Path]], work: Path) -> Iterator[str]:
    """A row of the table for each method and set of models."""
    yield "| method | models | largest difference | as a share of the tensor's largest entry | beyond rounding |"
    yield "|---|---|---|---|---|"
    for method, setup in SETUPS.items():
        if method not in built:
            continue
        for kind, folders in parents.items():
            ours, theirs = both(recipe(method, setup, folders, "float32"), work / f"{method}-{kind}")
            found = apart(ours, theirs)
            beyond = f"{found.entries:,} of {found.total:,}"
            print(f"{method:18} {kind:5} {found.absolute:.1e} {found.relative:.1e} {beyond} {found.tensor}", flush=True)
            yield f"| {method} | {kind} | {found.absolute:.1e} | {found.relative:.1e} | {beyond} |"


def distributions(built: Mapping[str, Method], folders: Sequence[Path], work: Path, seeds: int) -> Iterator[str]:
    """For each random method: share of entries that moved, mean of the delta against its expectation, norm."""
    base = models.read(folders[0])
    yield "| method | | entries moved | expected delta (slope) | norm of the delta |"
    yield "|---|---|---|---|---|"
    for method, setup in RANDOM.items():
        if method not in built:
            continue
        found = [both(recipe(method, setup, folders, "float32"), work / f"{method}-{n}", n) for n in range(seeds)]
        whole = both(recipe("task_arithmetic", setup, folders, "float32"), work / f"{method}-whole")[0]
        for name, side in (("ours", 0), ("mergekit", 1)):
            row = " | ".join(f"{value:.4f}" for value in moments([pair[side] for pair in found], base, whole))
            print(f"{method:18} {name:9} {row}", flush=True)
            yield f"| {method} | {name} | {row} |"


def moments(
    merged: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor], whole: Mapping[str, Tensor]
) -> list[float]:
    """Means over seeds: share moved, slope of the mean delta on the whole delta, norm over the whole delta's norm."""
    deltas = [np.concatenate([(one[n] - base[n].float()).flatten().numpy() for n in base]) for one in merged]
    full = np.concatenate([(whole[n] - base[n].float()).flatten().numpy() for n in base]).astype(np.float64)
    mean = np.mean(deltas, axis=0, dtype=np.float64)
    moved = np.mean([np.mean(delta != 0) for delta in deltas])
    norms = np.mean([np.linalg.norm(delta) for delta in deltas]) / np.linalg.norm(full)
    return [float(moved), float(mean @ full / (full @ full)), float(norms)]


def main() -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds the random methods are run with")
    parser.add_argument("--only", nargs="*", help="methods to compare; the page is then not written")
    options = parser.parse_args()
    built = {name: method for name, method in methods().items() if not options.only or name in options.only}
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        work = Path(folder)
        parents = {"tiny": models.tiny(work / "tiny"), "zoo": [ZOO / name for name in ("base", "kjv", "python")]}
        rows = list(deterministic(built, parents, work))
        drawn = list(distributions(built, parents["zoo"], work, options.seeds))
    if not options.only:
        PAGE.write_text("\n".join([HEAD, *rows, RANDOM_HEAD, *drawn, ""]), encoding="utf-8")
    return 0


HEAD = f"""# How far from mergekit

Generated by `python benchmarks/parity.py`, which runs mergekit {mergekit_env.VERSION} in an environment of its own on
the same recipes: weights and densities as gradients over the layers and by filter, output in float32. `tiny` are random
models of four layers in float32, `zoo` the three trained models of examples/zoo in bfloat16. The last column counts the
entries that differ by more than a millionth of their tensor's largest. Differences beyond float32's rounding are
explained where [methods.md](methods.md) says how a method departs from mergekit.
"""
RANDOM_HEAD = """
## Random methods, by distribution

On the zoo, means over the seeds. The slope is that of the mean delta on the delta before dropping: 1 means that the
dropped entries are made up for. mergekit and we draw different numbers, so single entries differ.
"""

if __name__ == "__main__":
    torch.set_num_threads(2)
    raise SystemExit(main())
