"""Every method side by side with mergekit on the same recipes: how far apart, and who is closer to the formula.

`python benchmarks/parity.py` writes docs/parity.md: for each deterministic method the largest difference in float32, on
tiny models and on the zoo, with gradients and filters; for each random one the distribution over seeds; and what both
do where we depart on purpose. Not here: bfloat16 (precision), time and memory (speed).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import departures
import formula
import mergekit_env
import models
import numpy as np
from numpy.typing import NDArray
from side_by_side import FIELD, FURTHER, RANDOM, ZOO, Setup, ours, theirs
from torch import Tensor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parity.md"
BEYOND = 1e-6  # of a tensor's largest entry: what float32 arithmetic in another order may come to

REASONS: Mapping[str, Sequence[str]] = {
    "Norms and angles are float64 here and float32 there.": ("slerp", "nuslerp", "multislerp", "karcher"),
    "Entries equal to a threshold stay together here; there a sort keeps some of them. With rescale the factor of the "
    "tensor follows.": ("ties", "breadcrumbs", "breadcrumbs_ties"),
    "All models weigh the same there where their mean squares add up to less than 1e-6; entries of equal variance are "
    "selected or left together here.": ("sce",),
    "A negative cosine counts as 0 here; a product of norms below 1e-6 is raised to that there.": ("model_stock",),
    "The divergences of rows are float64 here; in float32, as there, those of rows that are close are mostly rounding. "
    "At a hundred times the size they are not.": ("arcee_fusion",),
}
"""Why entries are further apart than rounding, and in which methods; the page numbers them."""
TRIMMING = ("ties", "breadcrumbs", "breadcrumbs_ties")


@dataclass(frozen=True)
class Apart:
    """How far two merges are apart over all their tensors.

    Args:
        absolute: the largest difference.
        relative: the largest as a share of its tensor's largest entry.
        entries: how many entries are further apart than `BEYOND` of that.
        tensors: in how many tensors.
        level: how many of the entries stand exactly at a threshold of their method.
    """

    absolute: float = 0.0
    relative: float = 0.0
    entries: int = 0
    tensors: int = 0
    level: int = 0

    def __add__(self, other: Apart) -> Apart:
        return Apart(
            max(self.absolute, other.absolute),
            max(self.relative, other.relative),
            self.entries + other.entries,
            self.tensors + other.tensors,
            self.level + other.level,
        )

    def told(self, method: str) -> str:
        """The entries beyond rounding, and the number of the reason."""
        if not self.entries:
            return "none"
        level = "all" if self.level == self.entries else f"{self.level:,}"
        told = f", {level} equal to a threshold" if method in TRIMMING else ""
        number = [method in methods for methods in REASONS.values()].index(True) + 1
        return f"{self.entries:,} in {self.tensors} tensor{'s' * (self.tensors > 1)}{told} [{number}]"


def apart(difference: NDArray[np.float64], largest: float, level: NDArray[np.bool_]) -> Apart:
    """How far one tensor is from another."""
    beyond = difference > BEYOND * largest
    count = int(beyond.sum())
    most = float(difference.max())
    return Apart(most, most / largest, count, int(count > 0), int((beyond & level).sum()))


def at_threshold(wanted: formula.Wanted) -> NDArray[np.bool_]:
    """Which entries equal, in some model, the least or the largest magnitude that a trimming method keeps."""
    found = np.zeros(wanted.job.shape, bool)
    settings = [wanted.arguments.get(name, [0.0] * len(wanted.tensors)) for name in ("density", "gamma")]
    for tensor, density, gamma in zip(wanted.tensors, *settings, strict=True):
        magnitudes = np.abs(tensor.astype(np.float32))
        ordered = np.sort(magnitudes, axis=None)[::-1]
        kept = max(1, int(density * ordered.size))
        outliers = min(int(gamma * ordered.size), ordered.size - kept)
        found |= np.isin(magnitudes, ordered[[outliers, outliers + kept - 1]])
    return found


def row(setup: Setup, kind: str, parents: Sequence[Path], folder: Path) -> str:
    """A row of the table: the two from each other, and each from the formula."""
    recipe = setup.recipe(parents, "float32")
    (planned, mine), other = ours(recipe, folder), theirs(recipe, folder)
    if set(mine) != set(other):
        raise RuntimeError(f"different tensors: {sorted(set(mine) ^ set(other))}")
    between, us, them = Apart(), Apart(), Apart()
    for wanted in formula.wanted(planned):
        name = wanted.job.name
        largest, level = max(float(np.abs(wanted.right[0]).max()), 1e-30), at_threshold(wanted)
        between += apart(np.abs(mine[name].double().numpy() - other[name].double().numpy()), largest, level)
        us += apart(wanted.apart(mine[name]), largest, level)
        them += apart(wanted.apart(other[name]), largest, level)
    cells = [setup.method, setup.told, kind, f"{between.absolute:.1e}", f"{between.relative:.1e}"]
    cells += [f"{us.relative:.1e}", f"{them.relative:.1e}", between.told(setup.method)]
    print(" | ".join(cells), flush=True)
    return f"| {' | '.join(cells)} |"


def deterministic(setups: Sequence[Setup], parents: Mapping[str, Sequence[Path]], work: Path) -> Iterator[str]:
    """A row for each method, its settings and what is merged; then the reasons."""
    for place, setup in enumerate(setups):
        for kind in setup.kinds:
            yield row(setup, kind, parents[kind], work / f"{place}-{kind}")
    yield ""
    yield from (f"{number}. {reason}" for number, reason in enumerate(REASONS, 1))


def drawn(setup: Setup, work: Path, seeds: int) -> Iterator[str]:
    """A row for each of the two: the mean over seeds of what they make of the zoo."""
    recipe = setup.recipe(ZOO, "float32")
    whole = Setup("task_arithmetic", "sparse", {}).recipe(ZOO, "float32")
    one = Setup(setup.method, "single", setup.settings).recipe(ZOO, "float32")
    base, full = models.read(ZOO[0]), ours(whole, work / "whole")[1]
    for name, merge in (("ours", lambda *given: ours(*given)[1]), ("mergekit", theirs)):
        alone = [merge(one, work / f"one-{seed}", seed) for seed in range(seeds)]
        kept = np.mean([kept_shares(made, base, models.read(ZOO[1])) for made in alone], axis=0)
        both = [merge(recipe, work / f"both-{seed}", seed) for seed in range(seeds)]
        cells = [f"{value:.4f}" for value in (*kept, *moments(both, base, full))]
        print(setup.method, name, *cells, flush=True)
        yield f"| {setup.method} | {name} | {' | '.join(cells)} |"


def kept_shares(made: Mapping[str, Tensor], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> list[float]:
    """The share that a merge moved of what a fine-tune changed; of each row's larger half; of the other."""
    found = np.zeros((2, 2))
    for name, tensor in made.items():
        delta = np.atleast_2d((tuned[name].float() - base[name].float()).abs().numpy())
        moved = np.atleast_2d((tensor != base[name].float()).numpy())
        larger = delta > np.median(delta, axis=1, keepdims=True)
        for half, mask in enumerate((larger, ~larger)):
            found[half] += moved[mask & (delta > 0)].sum(), (mask & (delta > 0)).sum()
    shares = found[:, 0] / found[:, 1]
    return [float(found[:, 0].sum() / found[:, 1].sum()), *shares.tolist()]


def moments(
    merged: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor], whole: Mapping[str, Tensor]
) -> list[float]:
    """The slope of the mean delta over seeds on the whole delta, and the mean norm over the whole delta's."""
    deltas = [np.concatenate([(one[name] - base[name].float()).flatten().numpy() for name in base]) for one in merged]
    full = np.concatenate([(whole[name] - base[name].float()).flatten().numpy() for name in base]).astype(np.float64)
    mean = np.mean(deltas, axis=0, dtype=np.float64)
    norms = np.mean([np.linalg.norm(delta) for delta in deltas]) / np.linalg.norm(full)
    return [float(mean @ full / (full @ full)), float(norms)]


def main() -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="how many seeds the random methods are run with")
    parser.add_argument("--only", nargs="*", help="methods to compare; the page is then not written")
    options = parser.parse_args()

    def chosen(setups: Sequence[Setup]) -> list[Setup]:
        return [setup for setup in setups if not options.only or setup.method in options.only]

    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        work = Path(folder)
        large = models.tiny(work / "large", unit=100)
        parents = {"tiny": models.tiny(work / "tiny"), "tiny x 100": large, "zoo": ZOO}
        lines = [HEAD, *deterministic(chosen([*FIELD, *FURTHER]), parents, work)]
        lines.append(RANDOM_HEAD.format(seeds=options.seeds))
        for setup in chosen(RANDOM):
            lines += drawn(setup, work / setup.method, options.seeds)
        lines += [DEPARTURES_HEAD, *departures.rows(parents["tiny"], work / "departures", options.only)]
    if not options.only:
        PAGE.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return 0


HEAD = f"""# How far from mergekit

Generated by `python benchmarks/parity.py`, which runs mergekit {mergekit_env.VERSION} in an environment of its own on
the same recipes. Why the two are not the same everywhere is told in [mergekit.md](mergekit.md).

## In float32

`tiny` are random models of four layers in float32, `zoo` the three trained models of examples/zoo in bfloat16; both are
merged in float32. Weights and densities are gradients over the layers and numbers by filter. "Relative" is the largest
difference as a share of its tensor's largest entry; "ours" and "mergekit's" are the same, from the formula in float64.
The last column counts the entries that are further apart than {BEYOND:.0e} of their tensor's largest, and says why.

| method | settings | models | largest difference | relative | ours | mergekit's | beyond rounding |
|---|---|---|---|---|---|---|---|"""
RANDOM_HEAD = """
## Random methods, by distribution

On the zoo, means over {seeds} seeds; mergekit and we draw different numbers, so single entries differ. "Kept" is the
share of one fine-tune's changes that stay at a density of 0.6: of all, of the larger half of each row, and of the
smaller half. The rest is of both fine-tunes, at other densities by layer: the slope of the mean change on the change
before dropping, where 1 means that what is dropped is made up for, and the norm as a share of that change's.

| method | | kept | of the larger | of the smaller | slope | norm |
|---|---|---|---|---|---|---|"""
DEPARTURES_HEAD = f"""
## Where we depart on purpose

Recipes on the tiny models, changed as the first column says; what mergekit {mergekit_env.VERSION} makes of them, and
what comes out here. A norm is that of the merge, as a share of the base model's; that of a change is of the merge less
the base, as a share of the first model's.

| recipe | mergekit | here |
|---|---|---|"""

if __name__ == "__main__":
    raise SystemExit(main())
