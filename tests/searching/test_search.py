"""A search from its recipe to a merge whose card tells of it, and what is refused on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import vocabularies
from calls import Command
from loopback import LoopbackHub
from thorough import thorough_only

import merger
from merger.cli.commands import main
from merger.errors import EvaluationError, RecipeError
from merger.planning.lockfile import read_lock
from merger.run.prepare import read_recipe
from merger.searching.effort import Effort
from merger.searching.search import START, Searching, Tried, write_study

TEXT = "a b c d e f g h\n" * 40
RECIPE = """\
# mine
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {one}, parameters: {{weight: {{search: [0, 1], start: 0.5}}}}}}
  - {{model: {two}, parameters: {{weight: {{search: [0, 1]}}}}}}
dtype: float32
search:
  trials: 4
  objectives:
    - loss: {texts}/search.txt
  report:
    - loss: {texts}/report.txt
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A base, two models and two texts."""
    root = tmp_path_factory.mktemp("searched")
    (root / "search.txt").write_text(TEXT)
    (root / "report.txt").write_text(TEXT[::-1])
    models = {name: vocabularies.model(root / name, seed) for seed, name in enumerate(("base", "one", "two"))}
    return {**models, "texts": root}


@pytest.fixture
def recipe(tmp_path: Path, places: Mapping[str, Path]) -> Path:
    """The file of a searched recipe."""
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.format(**places))
    return path


def test_the_found_recipe_is_merged_and_its_card_tells_of_the_search(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command tries, writes what it found, and merges it; rendered again the card is the same, and it verifies."""
    to = tmp_path / "out"
    assert main(["search", str(recipe), "--top", "2", "--to", str(to)]) == 0
    told = capsys.readouterr()
    assert "4 trials are done: " in told.out
    assert "searching 2 numbers by tpe, 4 trials; scored in float32" in told.err
    best = recipe.with_name("mine.best.yaml")
    assert "search:" not in best.read_text()
    there = sorted(path.name for path in tmp_path.iterdir())
    found = [f"mine.best{place}.{ends}" for place in ("-2", "") for ends in ("lock.yaml", "yaml")]
    assert there == [*found, "mine.search", "mine.yaml", "out"]
    assert (to / "recipe.yaml").read_text() == best.read_text()
    assert (to / "merger.search.csv").read_text() == (tmp_path / "mine.search/trials.csv").read_text()
    facts = json.loads((to / "merger.search.json").read_text())
    card = (to / "README.md").read_text()
    assert [row[0] for row in facts["numbers"]] == ["models[one].weight", "models[two].weight"]
    assert facts["columns"] == ["measured", "this model", START, "one", "two", "base"]
    assert all(score in card for score in facts["rows"][0][1:])
    assert str(tmp_path) not in card
    assert all((to / picture["place"]).is_file() for picture in facts["pictures"])
    assert merger.verify(str(to), everything=True).passed
    (to / "README.md").write_text("another\n")
    assert main(["card", str(to)]) == 0
    assert (to / "README.md").read_text() == card


def test_what_was_scored_is_what_is_merged(recipe: Path, tmp_path: Path) -> None:
    """A study goes on where it ended; its best recipe makes the very plan that was scored."""
    events: list[object] = []
    study = merger.search(str(recipe), Effort(trials=2), on_event=events.append)
    assert [type(event) for event in events[:3]] == [Searching, Tried, Tried]
    more = merger.search(str(recipe), Effort(trials=3))
    assert more.trials[:2] == study.trials
    assert len(more.trials) == 3
    (found, *_) = write_study(more)
    assert merger.plan(str(found)).size > 0
    values = [source.parameters["weight"].rules[0].values for source in read_recipe(found).slices[0].sources[:2]]
    assert values == [(value,) for value in more.values.values()]
    (row,) = more.report
    assert len({score.value for score in row.scores.values()}) == 5, "each model has a score of its own"


def test_a_study_keeps_the_arithmetic_that_it_began_with(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for bfloat16 scores in float32, and so does one that has them and goes on."""
    recipe.write_text(recipe.read_text().replace("dtype: float32", "dtype: bfloat16"))
    found = list[tuple[str, list[float]]]()
    for able, kept, trials in ((True, "a.log", 1), (False, "b.log", 2), (False, "c.log", 1), (True, "c.log", 2)):
        monkeypatch.setattr("merger.searching.candidates.computes_in", lambda dtype, able=able: able)
        events: list[object] = []
        study = merger.search(str(recipe), Effort(trials, storage=str(recipe.with_name(kept))), on_event=events.append)
        assert isinstance(events[0], Searching)
        found.append((events[0].arithmetic, [trial.scores[0] for trial in study.trials]))
    native, alike, _, again = found
    assert (native[0], alike[0]) == ("bfloat16", "float32")
    assert again == alike
    assert native[1] != alike[1][:1]
    assert native[1] == pytest.approx(alike[1][:1], abs=0.02)


@thorough_only
def test_a_parent_that_moves_after_the_search_changes_nothing(
    places: Mapping[str, Path], served: LoopbackHub, command: Command, tmp_path: Path
) -> None:
    """Each of the best recipes has its lock beside it: merged by recipe or lock, the bytes are those of before."""
    names = ("base", "one", "two")
    for name in names:
        served.add_model(f"org/{name}", places[name])
    on_hub = {name: f"org/{name}" for name in names}
    (tmp_path / "mine.yaml").write_text(RECIPE.format(**on_hub, texts=places["texts"]))

    def merged(recipe: str, to: str) -> bytes:
        done = command("run", recipe, "--to", to, cwd=tmp_path, hub=served)
        assert done.returncode == 0, done.stderr
        return (tmp_path / to / "model.safetensors").read_bytes()

    done = command("search", "mine.yaml", "--top", "3", "--to", "at-once", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    best = ["mine.best", "mine.best-2", "mine.best-3"]
    before = [merged(f"{name}.yaml", name) for name in best]
    commit = served.head("org/two")
    served.commit("org/two", {"model.safetensors": places["one"] / "model.safetensors"})
    assert [merged(f"{name}.yaml", f"{name}-after") for name in best] == before
    assert merged("mine.best.lock.yaml", "by-its-lock") == before[0]
    assert (tmp_path / "at-once/model.safetensors").read_bytes() == before[0]
    assert len(set(before)) == 3
    held = [read_lock((tmp_path / f"{name}.lock.yaml").read_text(), name) for name in best]
    assert {lock.pins["org/two"].commit for lock in held} == {commit}
    (tmp_path / "mine.best.lock.yaml").unlink()
    assert merged("mine.best.yaml", "without-its-lock") != before[0]


def test_a_searched_recipe_is_checked_and_planned_but_not_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check and plan tell what is searched; a run says who finds the numbers."""
    assert main(["check", str(recipe)]) == 0
    assert "2 numbers are searched" in capsys.readouterr().out
    assert main(["plan", str(recipe)]) == 0
    assert "first   4 candidates (tpe), judged by loss of search.txt" in capsys.readouterr().out
    assert main(["run", str(recipe), "--to", str(tmp_path / "out")]) == RecipeError.exit_code
    assert "merger search finds its numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("search.txt", "nowhere.txt", RecipeError, "nowhere.txt"),
        ("loss: {texts}/search.txt", "function: nowhere:score", RecipeError, "cannot be imported"),
        ("loss: {texts}/search.txt", "function: math:sqrt", EvaluationError, "none of 4 candidates could be used"),
        ("loss: {texts}/search.txt", "loss: {texts}", RecipeError, "search.objectives"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    tmp_path: Path, places: Mapping[str, Path], old: str, new: str, error: type[Exception], words: str
) -> None:
    """A source that is not there, at its place; a function that fails at each trial; and a recipe with nothing open."""
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.replace(old, new).format(**places))
    with pytest.raises(error, match=words):
        merger.search(str(path))


@pytest.mark.parametrize("place", ["me:s3cret@nowhere.invalid/study", "nowhere.invalid/study?user=me&password=s3cret"])
def test_a_password_is_neither_told_nor_handed_on(place: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An address goes to other processes' lines, and into errors."""
    found = main(["search", str(recipe), "--storage", f"postgresql://{place}", "--workers", "2"])
    said = capsys.readouterr()
    assert found == RecipeError.exit_code
    assert "PGPASSWORD" in said.err
    assert "s3cret" not in said.err + said.out
