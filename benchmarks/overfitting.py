"""What a search on few texts believes, and what other texts say of it: a picture for docs/search.md.

`python benchmarks/overfitting.py` searches eight numbers on the zoo's models, once by one piece of each held-out text
and once by four of each, and has every trial scored on other pieces, too, which judge none. The picture shows, over the
trials, how much better than the recipe before the search the best so far is by either. Not here: what searches gain
(search_gain).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from search import PAGE, arguments, publish
from search_gain import halves
from side_by_side import ZOO

from merger.card.pictures.canvas import HUES, INK, WIDTH, Picture
from merger.run.options import Options
from merger.run.prepare import parse_text
from merger.searching.effort import Effort
from merger.searching.search import Tried, search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHARACTERS = 8_000
Course = Sequence[tuple[float, float]]
"""After each trial, how much better the best so far is: where it was searched, and on other texts."""


def course(texts: Path, others: Path, trials: int, seed: int) -> Course:
    """Search by some texts, with all trials scored on others."""
    listed = "".join(
        f"  - model: {parent}\n    parameters: {{weight: {{search: [0, 1.5], start: 0.5, anchors: 4}}}}\n"
        for parent in ZOO[1:]
    )
    # a guard that nothing falls short of: it is scored, and judges nothing
    block = (
        f"search:\n  seed: {seed}\n  prune: false\n  objectives: [{{loss: {texts}}}, {{loss: {others}, guard: 100}}]\n"
    )
    text = f"merge_method: task_arithmetic\nbase_model: {ZOO[0]}\nmodels:\n{listed}dtype: float32\n{block}"
    study = search(parse_text(text, texts.stem), Options(), Effort(trials=trials), _tell)
    scores = [(trial.scores[0], trial.scores[1]) for trial in study.trials if trial.state == "complete"]
    best = [min(scores[: place + 1]) for place in range(len(scores))]
    return [(scores[0][0] - here, scores[0][1] - there) for here, there in best]


def _tell(event: object) -> None:
    if isinstance(event, Tried):
        print(f"trial {event.trial.number}: {event.trial.scores}{' best' if event.is_best else ''}", flush=True)


def texts_of(folder: Path) -> tuple[Mapping[str, Path], Path]:
    """Texts to search by, by how many there are of each kind; and the others."""
    many, others = halves(folder, _CHARACTERS)
    lines = many.read_text("utf-8").splitlines(keepends=True)
    few, each = folder / "few.jsonl", len(lines) // 2
    few.write_text(lines[0] + lines[each], "utf-8")
    return {"one piece of each text": few, f"{each} pieces of each": many}, others


def paint(figure: Figure, courses: Mapping[str, Course]) -> None:
    """A panel for each search."""
    figure.set_size_inches(WIDTH, 3.0)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(courses), sharey=True)
    for panel, (name, steps) in zip(panels, courses.items(), strict=True):
        panel.step(range(len(steps)), [here for here, _ in steps], "--", where="post", color=HUES[1])
        panel.step(range(len(steps)), [there for _, there in steps], where="post", color=HUES[0])
        panel.axhline(0, color=INK, lw=0.8)
        panel.set_xlabel("trial")
        panel.set_title(f"searched by {name}", loc="left", size=9)
    panels[0].set_ylabel("nats a token better than before")
    panels[0].legend(["where it was searched", "on other texts"], loc="upper left")


def sentence(courses: Mapping[str, Course], trials: int, seed: int) -> str:
    """What was seen."""
    told = [
        f"searched by {name}, {here:.4f} nats a token where it was searched and {there:.4f} on other texts"
        for name, (*_, (here, there)) in courses.items()
    ]
    return f"Best of {trials} trials (seed {seed}), gain over the recipe before the search: {'; '.join(told)}."


def main() -> int:
    """Search twice, and write picture and sentence."""
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts, others = texts_of(Path(folder))
        courses = {name: course(path, others, options.trials, options.seed) for name, path in texts.items()}
    alt = "Gain of the best so far over the trials, where it was searched and on other texts"
    told = sentence(courses, options.trials, options.seed)
    publish("overfitting", f"![{alt}](pictures/search-overfitting.png)\n\n{told}", options.page)
    if options.page:
        picture = Picture("search-overfitting", alt, lambda figure: paint(figure, courses))
        for place, data in picture.files.items():
            (PAGE.parent / place).write_bytes(data)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
