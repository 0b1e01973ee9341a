"""Trials of a search, side by side with mergekit's way: merge to disk, load with transformers, evaluate alike.

`python benchmarks/search.py` tries the same numbers in both ways in turn, on the trained zoo and on bfloat16
checkpoints of 0.1 billion parameters that it makes, and writes a table into docs/search.md. mergekit is measured kept
in one process of its own environment, whose imports and first merge are not counted, and as its command. Not here:
what a search finds (search_gain).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, Self

import mergekit_env
import models
import torch
import yaml
from side_by_side import ZOO
from speed import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from merger.methods.registry import methods
from merger.planning.plan import make_plan
from merger.recipe.parse import parse
from merger.recipe.searched import Objective
from merger.run.options import Options, budget_of
from merger.run.prepare import parse_text, plan
from merger.searching.candidates import Candidates, arithmetic_of
from merger.searching.objectives import scorers

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "search.md"
SMALL = {"layers": 12, "hidden": 768, "middle": 2048, "vocab": 32000, "heads": 12}
METHODS = ("task_arithmetic", "ties")
_ALONE = 3
_DRIVER = """
import os, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from mergekit.scripts.run_yaml import main
for line in sys.stdin:
    main(line.rstrip("\\n").split("\\t"), standalone_mode=False)
    print("done", file=answer, flush=True)
"""


class Mergekit:
    """Its command, again and again in one process that has imported all it needs."""

    def __init__(self) -> None:
        python = mergekit_env.command().with_name("python")
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [python, "-c", _DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=offline,
        )  # fmt: skip

    def merge(self, recipe: Path, out: Path) -> None:
        """Merge a recipe into a folder."""
        asked, told = self._process.stdin, self._process.stdout
        assert asked is not None
        assert told is not None
        print(*mergekit_env.arguments(recipe, out)[1:], sep="\t", file=asked, flush=True)
        if told.readline() != "done\n":
            raise RuntimeError(f"mergekit failed on {recipe}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Trial:
    """Seconds of a trial: all of it, planning, merging (of theirs with writing), loading, evaluating; and its loss."""

    whole: float
    planning: float
    merging: float
    loading: float
    evaluating: float
    loss: float


@dataclass(frozen=True)
class Setup:
    """What is searched: base and two fine-tunes, whose tokenizer is theirs, and what a candidate is judged by."""

    name: str
    parents: Sequence[Path]
    tokenizer: Path
    dtype: str
    objectives: Sequence[Objective]

    def recipe(self, method: str, numbers: Sequence[float]) -> str:
        """With a weight of each fine-tune, and of TIES one density."""
        own = {"density": numbers[2]} if method == "ties" else {}
        listed = [{"model": str(parent), "parameters": {"weight": weight, **own}}
                  for parent, weight in zip(self.parents[1:], numbers, strict=False)]  # fmt: skip
        made = {"merge_method": method, "base_model": str(self.parents[0]), "models": listed, "dtype": self.dtype}
        return yaml.safe_dump(made, sort_keys=False)


def ours(setup: Setup, method: str, drawn: Iterator[Sequence[float]]) -> Iterator[Trial]:
    """One trial after the other; the first is what the model is laid out by, and not counted."""
    options = Options(threads=os.cpu_count() or 1)
    planned, store = plan(parse_text(setup.recipe(method, next(drawn)), "recipe"), options)
    judged, locked = scorers(setup.objectives, ROOT), planned.locked
    with Candidates(planned, store, arithmetic=arithmetic_of(planned, options.device)) as candidates:
        candidates.score(judged)
        for numbers in drawn:
            start = time.perf_counter()
            recipe = parse(setup.recipe(method, numbers), "recipe", methods())
            planned = make_plan(replace(locked, recipe=recipe), methods(), budget_of(recipe, options))
            ready = time.perf_counter()
            candidates.make(planned)
            loss = sum(score.value for score in candidates.score(judged)) / len(judged)
            whole, spent = time.perf_counter() - start, candidates.spent
            yield Trial(whole, ready - start, spent.merging, 0.0, spent.evaluating, loss)


def theirs(setup: Setup, method: str, drawn: Iterator[Sequence[float]], work: Path) -> Iterator[Trial]:
    """The same numbers by way of the disk."""
    tokenizer, judged = AutoTokenizer.from_pretrained(setup.tokenizer), scorers(setup.objectives, ROOT)
    path, out = work / "recipe.yaml", work / "merged"
    with Mergekit() as mergekit:
        for place, numbers in enumerate(drawn):
            start = time.perf_counter()
            path.write_text(setup.recipe(method, numbers))
            mergekit.merge(path, out)
            merged = time.perf_counter()
            model = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, setup.dtype)).eval()
            loaded = time.perf_counter()
            loss = sum(scorer.score(model, tokenizer).value for scorer in judged) / len(judged)
            end = time.perf_counter()
            shutil.rmtree(out)
            if place:
                yield Trial(end - start, 0.0, merged - start, loaded - merged, end - loaded, loss)


def draws(count: int) -> list[Sequence[float]]:
    """The numbers of all trials, and of one before them."""
    draw = random.Random(0)
    return [[round(draw.uniform(0.2, 1.0), 3) for _ in range(3)] for _ in range(count + 1)]


def measure(setup: Setup, method: str, trials: int, work: Path) -> dict[str, str]:
    """Both ways in turn, and the medians of each, as a row of the table."""
    numbers = draws(trials)
    pairs = list(zip(ours(setup, method, iter(numbers)), theirs(setup, method, iter(numbers), work), strict=True))
    apart = max(abs(here.loss - there.loss) for here, there in pairs)
    here, there = (_medians([pair[side] for pair in pairs]) for side in (0, 1))
    rest, theirs_rest = here.whole - here.evaluating, there.whole - there.evaluating
    alone = _alone(setup, method, numbers[1 : 1 + _ALONE], work)
    return {
        "model": setup.name,
        "method": method,
        "planning": f"{1e3 * here.planning:.0f} ms",
        "merging": f"{1e3 * here.merging:.0f} ms, {here.merging / here.whole:.1%} of a trial",
        "evaluating": f"{here.evaluating:.2f} s, {here.evaluating / here.whole:.1%}",
        "trials an hour": f"{3600 / here.whole:,.0f}",
        "mergekit, kept in memory, merges in": f"{there.merging:.2f} s",
        "which transformers loads in": f"{there.loading:.2f} s",
        "its trials an hour": f"{3600 / there.whole:,.0f}: ours {there.whole / here.whole:.1f}x",
        "all but evaluating": f"{theirs_rest / rest:.0f}x faster",
        "mergekit's command merges in": f"{alone:.1f} s",
        "trials an hour by it": f"{3600 / (there.whole - there.merging + alone):,.0f}: ours "
        f"{(there.whole - there.merging + alone) / here.whole:.1f}x",
        "all but evaluating, by it": f"{(theirs_rest - there.merging + alone) / rest:.0f}x faster",
        "losses differ by at most": f"{apart:.0e}",
    }


def _alone(setup: Setup, method: str, drawn: Sequence[Sequence[float]], work: Path) -> float:
    """Seconds of mergekit's command, the median of a few."""
    path, found = work / "recipe.yaml", list[float]()
    for numbers in drawn:
        path.write_text(setup.recipe(method, numbers))
        start = time.perf_counter()
        mergekit_env.merge(path, work / "merged")
        found.append(time.perf_counter() - start)
        shutil.rmtree(work / "merged")
    return median(found)


def _medians(trials: Sequence[Trial]) -> Trial:
    return Trial(*(median(getattr(trial, field.name) for trial in trials) for field in fields(Trial)))


def setups(work: Path, wanted: Sequence[str]) -> Iterator[Setup]:
    """The zoo, judged by half of both held-out texts; and larger models that know nothing, by a few windows."""
    texts = []
    for name in ("kjv", "python"):
        text = (ZOO[0].parent / name / "heldout.txt").read_text("utf-8")
        texts.append(work / f"{name}.txt")
        texts[-1].write_text(text[: len(text) // 2], "utf-8")
    objectives = [Objective("loss", str(text)) for text in texts]
    if "zoo" in wanted:
        yield Setup("zoo (1.4 M)", ZOO, ZOO[0], "float32", objectives)
    if "0.1B" in wanted:
        parents = [models.member(work / f"0.1B-{n}", n, torch.bfloat16, **SMALL) for n in range(3)]
        for parent in parents:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ZOO[0] / file, parent)
        yield Setup("0.1 B", parents, ZOO[0], "bfloat16", [Objective("loss", str(texts[0]), limit=1000)])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, turned: there are more columns than a page is wide."""
    heads = [f"| | {' | '.join(row['model'] + ', ' + row['method'] for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    keys = [key for key in rows[0] if key not in ("model", "method")]
    return "\n".join([*heads, *(f"| {key} | {' | '.join(row[key] for row in rows)} |" for key in keys)])


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Those that all measurements of searching take."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--no-page", dest="page", action="store_false", help="print what was found alone")
    return parser


def publish(name: str, text: str, page: bool) -> None:
    """Print a text, and put it between the page's two marks of this name."""
    print(text)
    if not page:
        return
    before, start, rest = PAGE.read_text("utf-8").partition(f"<!-- {name}:start -->")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    if not end:
        raise RuntimeError(f"{PAGE.name} has no place for {name}")
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def main() -> int:
    """Measure and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="where checkpoints are kept; by default nowhere")
    parser.add_argument("--models", nargs="*", default=["zoo", "0.1B"], choices=("zoo", "0.1B"))
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--trials", type=int, default=7, help="of each way, of which medians count")
    options = parser.parse_args()
    before, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for setup in setups(work, options.models):
            for method in options.methods:
                rows.append(measure(setup, method, options.trials, work))
                print(rows[-1], flush=True)
    told = f"Medians of {options.trials} trials on a machine with {machine()}; load {before:.1f} before."
    publish("speed", f"{told}\n\n{table(rows)}", options.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
