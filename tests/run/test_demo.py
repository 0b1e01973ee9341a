"""What README's first command shows holds: merges of the trained zoo are better on average than what they are made of.

Not here: a ranking of methods; on models this small the differences between them are noise.
"""

from __future__ import annotations

from pathlib import Path

import demo
import pytest
from places import ROOT
from transformers import AutoModelForCausalLM

from merger.run.options import Options
from merger.run.pipeline import merge
from merger.run.prepare import plan, read_recipe

RECIPES = ROOT / "examples" / "recipes"
EXAMPLES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The result of every recipe in examples/recipes/, by the recipe's name."""
    root = tmp_path_factory.mktemp("merges")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # paths in recipes are relative to the working directory
        return {name: _merged(name, root / name) for name in EXAMPLES}


def _merged(name: str, to: Path) -> Path:
    options = Options(to=str(to))
    planned, store = plan(read_recipe(Path("examples/recipes") / f"{name}.yaml"), options)
    merge(planned, store, options)
    return to


@pytest.fixture(scope="module")
def parents() -> dict[str, dict[str, float]]:
    """The held-out losses of the zoo's fine-tunes."""
    return {name: demo.losses(demo.ZOO / name) for name in demo.TEXTS}


def test_each_fine_tune_knows_its_own_text_best(parents: dict[str, dict[str, float]]) -> None:
    """kjv is the better one on kjv, python on python."""
    assert parents["kjv"]["kjv"] < parents["python"]["kjv"]
    assert parents["python"]["python"] < parents["kjv"]["python"]


@pytest.mark.parametrize("name", ["linear", "task-arithmetic"])
def test_a_merge_is_better_on_average(name: str, merges: dict[str, Path], parents: dict[str, dict[str, float]]) -> None:
    """Its mean loss over both texts is lower than either fine-tune's, while each stays best on its own text."""
    measured = parents | {"merge": demo.losses(merges[name])}
    assert demo.verdict(measured) == 0
    for text in demo.TEXTS:
        assert min(measured, key=lambda row: measured[row][text]) == text


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_loads(name: str, merges: dict[str, Path]) -> None:
    """transformers finds all it looks for in the result and knows every tensor there, and the model writes on."""
    _, report = AutoModelForCausalLM.from_pretrained(merges[name], output_loading_info=True)
    assert not any(report.values()), report
    assert len(demo.continued(merges[name], "And the LORD said")) > len("And the LORD said")


def test_the_verdict_can_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """A merge that is worse than a fine-tune is told as a sentence and an exit code."""
    numbers = {"kjv": (3.0, 5.0), "python": (5.0, 4.0), "merge": (4.0, 4.2)}
    rows = {name: dict(zip(demo.TEXTS, pair, strict=True)) for name, pair in numbers.items()}
    assert demo.verdict(rows) == 1
    assert "no better on average than kjv." in capsys.readouterr().err


def test_the_table_lines_up() -> None:
    """A row for each model, the numbers under their texts, the mean last."""
    assert demo.table({"merge": {"kjv": 3.9847, "python": 4.4722}}).splitlines() == [
        "model         kjv   python     mean",
        "merge       3.985    4.472    4.228",
    ]
