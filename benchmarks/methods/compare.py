"""All methods on the same models and tasks: what is lost and gained, with intervals, seconds and memory.

    python benchmarks/methods/compare.py --in FOLDER [--page]

FOLDER is specialists.py's, or holds what another recipe of a comparison names. Each merge is a line of
`FOLDER/compared.jsonl`, and is not made again. `--page` writes docs/which-method.md. Not here: training (specialists).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from merger.errors import MergerError
from merger.methods.registry import Method, methods
from merger.run.options import Options
from merger.run.prepare import parse_text, plan
from merger.searching.candidates import Candidates
from merger.searching.objectives import Scorer, scorers
from merger.searching.search import Effort, search
from merger.statistics.kept import find_kept, measure_awaited

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "which-method.md"
FED_BY_MERGE = {"regmean_plus_plus": "regmean"}
"""Methods whose statistics are of what the merge's own layers are fed, under the names of their papers."""
_RESAMPLED = 2000
_BLOCK, _MIXED = 4096, 1 << 17
"""Characters of each task's text: those in a row, and those that are measured on for the base at most."""


@dataclass(frozen=True)
class Comparison:
    """A recipe of a comparison, and the folder that its paths are relative to."""

    folder: Path
    told: Mapping[str, Any]

    def model(self, task: str | None) -> str:
        """The specialist of a task; of none the base."""
        path = self.told["base"] if task is None else self.told["models"][task]
        return str(self.folder / path) if path.startswith(".") else path

    def statistics(self, task: str | None, kind: str) -> Path:
        """Where those of a specialist, or the base, are; measured on its own text if not there yet."""
        folder = self.folder / f"{task or 'base'}-{kind}"
        if not folder.exists():
            text = self._train(task) if task else self._mixed()
            command = ["measure", self.model(task), "--kind", kind, "--data", str(text), "--length", "128"]
            subprocess.run([sys.executable, "-m", "merger", *command, "--to", str(folder)], check=True)
        return folder

    def _known(self, name: str, method: Method, task: str | None) -> Any:
        if name in FED_BY_MERGE and task:
            return {"measure": str(self._train(task)), "length": 128, "merged": True}
        return str(self.statistics(task, str(method.statistics)))

    def _train(self, task: str) -> Path:
        return (self.folder / self.told["train"].format(task=task)).resolve()

    def _mixed(self) -> Path:
        """A text of all tasks in turn: what the base model was trained on."""
        texts = [self._train(task).read_text("utf-8") for task in self.told["models"]]
        lines = (text[start : start + _BLOCK] for start in range(0, _MIXED, _BLOCK) for text in texts)
        mixed = self.folder / "mixed.jsonl"
        mixed.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
        return mixed

    def text(self, split: str, task: str) -> dict[str, Any]:
        """The objective of a task."""
        return {"loss": str((self.folder / self.told[split].format(task=task)).resolve()), **self._limit(split)}

    def _limit(self, split: str) -> dict[str, int]:
        return {"limit": self.told["limits"][split]} if split in self.told.get("limits", {}) else {}

    def recipe(self, name: str, subset: Sequence[str], searched: bool) -> str | None:
        """The method on these specialists; None where it takes another number of models."""
        method = methods()[FED_BY_MERGE.get(name, name)]
        least, most = method.models
        own = [self.model(task) for task in subset]
        base = {"first": own[0], "subtracted": self.model(None)}.get(method.base)
        if len(own) < least or (most is not None and len(own) > most):
            return None
        settings = self.told["settings"].get(method.name, {})
        rows = [
            {"model": self.model(task)}
            | ({"statistics": self._known(name, method, task)} if method.asks(not task) else {})
            for task in [*subset, *([None] if method.of_base else [])]
        ]
        content: dict[str, Any] = {"merge_method": method.name, "models": rows}
        content |= {"base_model": base} if base else {}
        if searched:
            settings = {**settings, **self.told["searched"][method.name]}
            aims = [{**self.text("search", task), "weight": 1} for task in subset]
            content["search"] = {"trials": self.told["trials"], "seed": 0, "prune": False, "objectives": aims}
        content |= {"parameters": settings} if settings else {}
        return yaml.safe_dump(content | {"dtype": self.told["dtype"]}, sort_keys=False)


def main() -> int:
    """Merge, score and print what is not known yet, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in", dest="folder", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=HERE / "specialists.yaml")
    parser.add_argument("--page", action="store_true", help="write docs/which-method.md")
    given = parser.parse_args()
    comparison = Comparison(given.folder.resolve(), yaml.safe_load(given.recipe.read_text("utf-8")))
    kept = given.folder / "compared.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {(row["method"], row["searched"], tuple(row["subset"])) for row in rows}
    aims = [comparison.text("report", task) for task in comparison.told["models"]]
    judges = scorers(parse_text(_judging(comparison, aims), "judging.yaml").search.objectives, comparison.folder)
    with kept.open("a") as out:
        for key in _wanted(comparison):
            if key not in known and (row := _compare(comparison, judges, *key)) is not None:
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
                print(key, {task: round(float(np.mean(items)), 4) for task, items in row["items"].items()}, flush=True)
    table = "\n".join([*_table(rows, comparison), *_by_task(rows, comparison)])
    print(table)
    if given.page:
        text = PAGE.read_text("utf-8") if PAGE.exists() else "# Which method\n\n<!-- compared -->\n"
        PAGE.write_text(text.split("<!-- compared -->")[0] + f"<!-- compared -->\n\n{table}\n", "utf-8")
    return 0


def _judging(comparison: Comparison, aims: Sequence[Mapping[str, Any]]) -> str:
    """A recipe whose objectives are the reports of all tasks."""
    weighed = [{**aim, "weight": 1} for aim in aims]
    return yaml.safe_dump({
        "merge_method": "linear",
        "models": [{"model": comparison.model(None)}],
        "parameters": {"weight": {"search": [0, 1]}},
        "search": {"objectives": weighed},
    })  # fmt: skip


def _wanted(comparison: Comparison) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    tasks = list(comparison.told["models"])
    yield from (("", False, (task,)) for task in tasks)
    yield "", False, ()
    for subset in comparison.told["subsets"]:
        yield from ((name, False, tuple(subset)) for name in [*methods(), *FED_BY_MERGE])
        yield from ((name, True, tuple(subset)) for name in comparison.told["searched"])


def _compare(
    comparison: Comparison, judges: Sequence[Scorer], name: str, searched: bool, subset: tuple[str, ...]
) -> dict[str, Any] | None:
    """What one merge, or a model alone, makes of each task; None where the method takes another number of models."""
    if name:
        text = comparison.recipe(name, subset, searched)
    else:
        alone = {"model": comparison.model(subset[0] if subset else None)}
        text = yaml.safe_dump({"merge_method": "passthrough", "models": [alone], "dtype": comparison.told["dtype"]})
    if text is None:
        return None
    began = time.perf_counter()
    try:
        if searched:
            text = search(parse_text(text, "searched.yaml"), Options(), Effort()).recipe_text()
        options, awaited = find_kept(recipe := parse_text(text, "compared.yaml"), Options())
        measure_awaited(awaited)
        planned, store = plan(recipe, options)
        with Candidates(planned, store) as made:
            seconds, items = made.spent.merging, [each.items.tolist() for each in made.score(judges)]
    except MergerError as error:
        print(f"{name} of {', '.join(subset)}: {error}", file=sys.stderr)
        return None
    return {
        "method": name,
        "searched": searched,
        "subset": subset,
        "items": {task: [round(item, 5) for item in of]
                  for task, of in zip(comparison.told["models"], items, strict=True)},
        "seconds": round(seconds, 3),
        "whole": round(time.perf_counter() - began, 1),
        "memory": planned.peak_memory,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "recipe": text,
    }  # fmt: skip


# ---- the table ------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Mapping[str, Any]], comparison: Comparison) -> Iterator[str]:
    """A line a method: what it gains over the base on the tasks of its models, the best first."""
    alone = {row["subset"][0] if row["subset"] else None: row["items"] for row in rows if not row["method"]}
    groups: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"]:
            groups.setdefault((row["method"], row["searched"]), []).append(row)
    lines = []
    for key, made in groups.items():
        gains = [_gains(row, alone[None]) for row in made]
        tasks = [float(np.mean(pair)) for gain in gains for pair in gain.values()]
        few = [gain for gain in gains if len(gain) == 2]
        many = [gain for gain in gains if len(gain) > 2]
        seconds = [row["whole" if row["searched"] else "seconds"] for row in made]
        lines.append((_interval(many or few)[1] + (0 if many else -100), (
            f"| {_label(*key)} | {_told(few)} | {_told(many)} | {sum(task > 0 for task in tasks)} of {len(tasks)} "
            f"| {min(tasks):+.3f} | {np.mean(seconds):.2f} s | {max(row['memory'] for row in made) / 1e6:.0f} MB |"
        )))  # fmt: skip
    yield "| method | two models | three to five | tasks that gained | the worst task | seconds | memory |"
    yield "|---|---|---|---|---|---|---|"
    yield from (line for _, line in sorted(lines, reverse=True))


def _told(gains: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> str:
    if not gains:
        return ""
    low, mean, high = _interval(gains)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _by_task(rows: Sequence[Mapping[str, Any]], comparison: Comparison) -> Iterator[str]:
    """A folded table a subset: the loss of each merge on every task, with the sign of its change from the base."""
    tasks = list(comparison.told["models"])
    unmerged = next(row["items"] for row in rows if not row["method"] and not row["subset"])
    for subset in comparison.told["subsets"]:
        yield from ("", f"<details><summary>{', '.join(subset)}</summary>", "")
        yield f"| method | {' | '.join(f'**{task}**' if task in subset else task for task in tasks)} |"
        yield "|---" * (len(tasks) + 1) + "|"
        yield f"| the base | {' | '.join(f'{np.mean(unmerged[task]):.3f}' for task in tasks)} |"
        for row in sorted(rows, key=lambda row: (row["method"], row["searched"])):
            if row["subset"] == subset and row["method"]:
                cells = (_cell(row["items"][task], unmerged[task]) for task in tasks)
                yield f"| {_label(row['method'], row['searched'])} | {' | '.join(cells)} |"
        yield from ("", "</details>")


def _cell(found: Sequence[float], before: Sequence[float]) -> str:
    """The loss, and whether it is lower (+) or higher (-) than before in 19 of 20 draws of the windows."""
    low, _, high = _interval([{"": _pair(found, before)}])
    return f"{np.mean(found):.3f} {'+' if low > 0 else '-' if high < 0 else '·'}"


def _label(name: str, searched: bool) -> str:
    return f"{name}, searched" if searched else name


def _gains(row: Mapping[str, Any], base: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray[Any, Any]]:
    return {task: _pair(row["items"][task], base[task]) for task in row["subset"]}


def _pair(found: Sequence[float], base: Sequence[float]) -> np.ndarray[Any, Any]:
    """By how much the loss of each window is lower than the base's."""
    return np.array(base) - np.array(found)


def _interval(gains: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> tuple[float, float, float]:
    """The mean over merges and tasks, between the ends of a bootstrap over the windows of each task.

    All merges are seen on the same windows, for what is hard for one is hard for the others.
    """
    draw, windows = np.random.default_rng(0), {task: len(pair) for gain in gains for task, pair in gain.items()}
    drawn = {task: draw.integers(number, size=(_RESAMPLED, number)) for task, number in windows.items()}
    means = np.array([pair[drawn[task]].mean(axis=1) for gain in gains for task, pair in gain.items()])
    low, high = np.quantile(means.mean(axis=0), [0.025, 0.975])
    return float(low), float(np.mean([pair.mean() for gain in gains for pair in gain.values()])), float(high)


if __name__ == "__main__":
    sys.exit(main())
