"""What a search gains on trained models: on texts that no training and no trial has seen, with intervals.

`python benchmarks/search_gain.py` cuts the zoo's held-out texts in two, searches task arithmetic, the same with one
number for both fine-tunes, with a gradient over the layers, and TIES on one half, and writes what the found recipes
score on the other half into docs/search.md, beside the recipe before the search and the parents. Not here: how fast
that is (search).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search import arguments, publish
from side_by_side import ZOO

from merger.run.options import Options
from merger.run.prepare import parse_text
from merger.searching.objectives import Scored, gain
from merger.searching.search import Effort, Study, Tried, search

_PIECE = 2000
"""Characters of a document: both texts are cut into such, and every second one goes into the other half."""

RECIPES: Mapping[str, tuple[str, Sequence[str]]] = {
    "one number": ("task_arithmetic", ["weight: {search: [0, 1.5], start: 0.5, name: w}", "weight: {search: w}"]),
    "task arithmetic": ("task_arithmetic", ["weight: {search: [0, 1.5], start: 0.5}"] * 2),
    "with a gradient": ("task_arithmetic", ["weight: {search: [0, 1.5], start: 0.5, anchors: 3}"] * 2),
    "TIES": ("ties", ["weight: {search: [0, 1.5], start: 0.5}, density: {search: [0.1, 1], start: 0.5}"] * 2),
}
"""The method, and what stands with each fine-tune; before the search numbers are 0.5."""


@dataclass(frozen=True)
class Found:
    """A study of one recipe, what the report says of each model, and of the found one on the half that was searched."""

    study: Study
    scores: Mapping[str, Scored]
    searched: float


def halves(folder: Path, characters: int) -> list[Path]:
    """The two halves as JSON lines; of each text at most so many characters go into one."""
    pieces: list[list[str]] = [[], []]
    for name in ("kjv", "python"):
        text = (ZOO[0].parent / name / "heldout.txt").read_text("utf-8")[: 2 * characters]
        for number, start in enumerate(range(0, len(text), _PIECE)):
            pieces[number % 2].append(text[start : start + _PIECE])
    paths = [folder / "searched.jsonl", folder / "report.jsonl"]
    for path, of in zip(paths, pieces, strict=True):
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in of), "utf-8")
    return paths


def find(name: str, halved: Sequence[Path], trials: int, seed: int) -> Found:
    """Search a recipe."""
    method, own = RECIPES[name]
    listed = "".join(
        f"  - model: {parent}\n    parameters: {{{of}}}\n" for parent, of in zip(ZOO[1:], own, strict=True)
    )
    block = f"search:\n  seed: {seed}\n  objectives: [{{loss: {halved[0]}}}]\n  report: [{{loss: {halved[1]}}}]\n"
    text = f"merge_method: {method}\nbase_model: {ZOO[0]}\nmodels:\n{listed}dtype: float32\n{block}"
    study = search(parse_text(text, name), Options(), Effort(trials=trials), _tell)
    (standing,) = study.report
    return Found(study, standing.scores, study.best[0].scores[0])


def _tell(event: object) -> None:
    if isinstance(event, Tried) and event.is_best:
        print(f"trial {event.trial.number}: {event.trial.scores} {dict(event.trial.drawn)}", flush=True)


def table(found: Mapping[str, Found]) -> str:
    """A row for each recipe, with the gains over the others on the half that no trial has seen."""
    others = list(next(iter(found.values())).scores)[1:]
    gained = [f"gain over {name}" for name in (*others, "one number")]
    heads = ["recipe", "loss where it was searched", "loss on the other half", *gained]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    (single, *_) = found["one number"].scores.values()
    for name, of in found.items():
        mine, *others = of.scores.values()
        gains = [_told(mine, other) for other in (*others, *([single] if name != "one number" else []))]
        cells = [name, f"{of.searched:.4f}", f"{mine.value:.4f}", *gains]
        rows.append(f"| {' | '.join([*cells, *[''] * (len(heads) - len(cells))])} |")
    return "\n".join(rows)


def _told(mine: Scored, other: Scored) -> str:
    by = gain(mine, other, higher=False)
    return f"{by.value:+.4f} ({by.low:+.4f} to {by.high:+.4f}){', within noise' if by.within_noise else ''}"


def numbers(found: Mapping[str, Found]) -> str:
    """What was found, in a list."""
    told = ({name: ", ".join(f"{key} {value}" for key, value in of.study.values.items())} for name, of in found.items())
    return "\n".join(f"- {name}: {values}" for each in told for name, values in each.items())


def main() -> int:
    """Search and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=60, help="of each recipe")
    parser.add_argument("--characters", type=int, default=16_000, help="of each text in a half")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        halved = halves(Path(folder), options.characters)
        found = {name: find(name, halved, options.trials, options.seed) for name in RECIPES}
        items = len(next(iter(found["TIES"].scores.values())).items)
    told = (f"{options.trials} trials each, seed {options.seed}; losses in nats a token, of {items} windows there; "
            "gains with 95 % intervals of a paired bootstrap over the windows.")  # fmt: skip
    publish("gain", f"{told}\n\n{table(found)}\n\n{numbers(found)}", options.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
