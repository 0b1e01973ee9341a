"""What each stage of one merge takes of the cores, added up over its threads.

`python benchmarks/stages.py METHOD THREADS` on the checkpoints of speed.py (`--work`).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import speed

from merger.engine import runner as blocks
from merger.models.formats.safetensors import ShardWriter
from merger.run.options import Options
from merger.run.pipeline import merge
from merger.run.prepare import plan, read_recipe
from merger.stores.folder import FolderReader

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


def main() -> int:
    """Merge once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=speed.SETTINGS)
    parser.add_argument("threads", type=int)
    parser.add_argument("--work", type=Path, default=speed.ROOT / "benchmarks" / ".work")
    parser.add_argument("--size", default="0.5B", choices=models.BILLIONS)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    recipe = given.work / "recipe.yaml"
    speed.recipe(given.method, models.family(given.work, given.size, 3), recipe)
    options = Options(to=str(given.work / "ours"), threads=given.threads, force=True)
    planned, store = plan(read_recipe(recipe), options)
    timed(FolderReader, "read", "reading")
    timed(blocks.Work, "prepare", "measuring, with its reading")
    timed(blocks.Work, "make", "making blocks, with their reading")
    timed(ShardWriter, "write", "hashing and writing")
    start, used = time.perf_counter(), time.process_time()
    merge(planned, store, options)
    wall, used = time.perf_counter() - start, time.process_time() - used
    print(f"{given.method}, {given.threads} threads: {wall:.2f} s, of the cores {used:.2f} s")
    for stage, seconds in SECONDS.items():
        print(f"{stage:35} {seconds:6.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
