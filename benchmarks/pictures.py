"""What the card's pictures cost a merge: looking at each block on its way, and drawing at the end.

`python benchmarks/pictures.py` merges three models of two wide layers with one thread, each method five times, and
prints the medians. Seconds are those of the processor, which do not count what other programs take. The share does not
depend on the number of layers.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import models
import speed

from merger.engine import runner as blocks
from merger.run import pipeline as line
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")
RUNS = 5
SECONDS: defaultdict[str, float] = defaultdict(float)


def timed(owner: Any, name: str, stage: str) -> None:
    """Add the time of each call to its stage."""
    real: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **others: Any) -> Any:
        start = time.thread_time()
        try:
            return real(*arguments, **others)
        finally:
            SECONDS[stage] += time.thread_time() - start

    setattr(owner, name, call)


def merged(recipe: Path, to: Path) -> dict[str, float]:
    """One merge: the seconds of its loop, and those of looking and of drawing."""
    SECONDS.clear()
    options = Options(to=str(to), threads=1, force=True)
    planned, store = plan(read_recipe(recipe), options)
    start = time.process_time()
    line.merge(planned, store, options)
    whole = time.process_time() - start
    return {**SECONDS, "loop": whole - SECONDS["drawing"]}


def main() -> int:
    """Merge and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=speed.ROOT / "benchmarks" / ".work")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    recipe, family = given.work / "recipe.yaml", models.small(given.work, 3)
    timed(blocks, "observe", "looking")
    timed(line, "_parts", "drawing")
    print("| method | the loop, seconds | looking | share | drawing, seconds |\n|---|---|---|---|---|")
    for method in METHODS:
        speed.recipe(method, family, recipe)
        runs = [merged(recipe, given.work / "ours") for _ in range(RUNS)]
        loop, looking, drawing = (median(found[stage] for found in runs) for stage in ("loop", "looking", "drawing"))
        print(f"| {method} | {loop:.2f} | {looking:.3f} | {looking / loop:.1%} | {drawing:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
