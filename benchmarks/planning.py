"""How long `merger plan` takes for the largest open models, and what it says: memory, disk.

`python benchmarks/planning.py` plans TIES merges of three fine-tunes and their base in the layouts of Llama 3.1, each
with the real command in a process of its own. Only the files' headers are there, so no disk is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import big  # noqa: E402  a room of the tests

LAYOUTS = {
    "70B": big.LLAMA_70B,
    "405B": big.LLAMA_405B,
    "70B with four times the layers": replace(big.LLAMA_70B, num_hidden_layers=320),
}


def row(name: str, layout: big.Layout, runs: int) -> str:
    """One layout: seconds of the whole command, and what the plan says."""
    with tempfile.TemporaryDirectory() as folder:
        parents = [big.write(Path(folder) / str(number), layout) for number in range(4)]
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(big.recipe(parents))
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            command = [sys.executable, "-m", "merger", "plan", str(recipe), "--json", "--no-look"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
    found = json.loads(done.stdout)
    tensors = sum(len(shard["jobs"]) for shard in found["shards"])
    largest = max(shard["size"] for shard in found["shards"])
    return (
        f"| {name} | {tensors} | {len(found['shards'])} | {median(seconds):.2f} s "
        f"| {1e3 * median(seconds) / tensors:.2f} ms | {found['peak_memory'] / 1e9:.2f} GB "
        f"| {found['disk']['hub'] / 1e9:.1f} GB | {largest / 1e9:.1f} GB |"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of which the median counts")
    options = parser.parse_args()
    print("| layout | tensors | files | `merger plan` | each tensor | memory | disk for the Hub | largest file |")
    print("|---|---|---|---|---|---|---|---|")
    for name, layout in LAYOUTS.items():
        print(row(name, layout, options.runs), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
