"""Every method's recipe in templates/recipes/ parses, plans and runs on small models, and those that pages show parse.

Not here: what a method computes (methods), and recipes for the zoo (test_demo).
"""

from __future__ import annotations

import re
from pathlib import Path

import measured
import pytest
import tiny
import torch
from merging import merged
from places import ROOT

from merger.methods.registry import methods
from merger.run.draft import schema_line
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

RECIPES = ROOT / "templates" / "recipes"
_PAGES = "".join((ROOT / page).read_text("utf-8") for page in ("README.md", "docs/recipes.md"))
_BLOCKS = re.findall(r"^```yaml\n(.*?)^```", _PAGES, re.DOTALL | re.MULTILINE)
SHOWN = [text for text in _BLOCKS if "\njobs:\n" not in text]  # a workflow is no recipe
PLACEHOLDERS = ("org/base", "org/model-a", "org/model-b", "org/model-c")
BESIDES = {"lines": "task_arithmetic"}  # recipes of what is no method of its own, and the method they use
DEEP, SHALLOW = 32, 2
every_recipe = pytest.mark.parametrize("name", [*methods(), *BESIDES])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """A model for each placeholder, shallow, and as deep as the recipes for slices of layers expect."""
    root = tmp_path_factory.mktemp("models")
    made = {
        (placeholder, layers): tiny.model(root / f"{placeholder.replace('/', '-')}-{layers}", seed, layers=layers)
        for seed, placeholder in enumerate(PLACEHOLDERS)
        for layers in (DEEP, SHALLOW)
    }
    for (_, layers), model in made.items():
        for kind in measured.KINDS if layers == SHALLOW else ():
            measured.write(model.with_name(f"{model.name}-{kind}"), model, kind)
    return made


def placed(name: str, models: dict[tuple[str, int], Path]) -> str:
    """A recipe with folders in place of the placeholders."""
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    wanted = DEEP if "layer_range" in text else SHALLOW
    for (placeholder, layers), model in models.items():
        text = text.replace(placeholder, str(model)) if layers == wanted else text
    return text


def test_no_recipe_without_its_method() -> None:
    """The folder holds one recipe for each method, named like it, and those of what is no method; no other file."""
    names = [*methods(), *BESIDES]
    assert sorted(path.name for path in RECIPES.iterdir()) == sorted(f"{name}.yaml" for name in names)


@pytest.mark.parametrize(
    "path", [*RECIPES.iterdir(), *(ROOT / "examples" / "recipes").iterdir()], ids=lambda path: path.stem
)
def test_a_recipe_that_we_write_names_its_schema(path: Path) -> None:
    """In its first line, where editors look."""
    assert path.read_text("utf-8").startswith(schema_line())


@every_recipe
def test_a_template_reads_as_it_stands(name: str) -> None:
    """Untouched, the recipe is well formed, names its own method and only the placeholders, and warns of nothing."""
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    assert {piece.method for piece in recipe.slices} == {BESIDES.get(name, name)}
    assert {str(model) for model in recipe.models} <= set(PLACEHOLDERS)
    assert recipe.warnings == ()


@every_recipe
def test_a_template_makes_a_model(name: str, models: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    """With models in the placeholders' place it runs, and what comes out are finite tensors in the dtype it says."""
    planned = merged(placed(name, models), tmp_path / "out")
    made = tiny.read(tmp_path / "out")
    assert {name: list(tensor.shape) for name, tensor in made.items()} == {
        job.name: list(job.shape) for job in planned.jobs
    }
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in made.values())


def test_the_stack_is_deeper(models: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    """The passthrough recipe makes the 48 layers that its comment promises."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(placed("passthrough", models))
    planned, _ = plan(read_recipe(recipe), Options())
    assert planned.config["num_hidden_layers"] == 48


@pytest.mark.parametrize("text", SHOWN, ids=lambda text: text.splitlines()[0])
def test_recipes_that_are_shown_read(text: str, tmp_path: Path) -> None:
    """A recipe that README or its page shows is well formed; its piece of one is, once there are models."""
    models = "merge_method: linear\nmodels: [{model: org/a}, {model: org/b}]\n"
    whole = text if "merge_method" in text else models + text
    (tmp_path / "recipe.yaml").write_text(whole, "utf-8")
    assert read_recipe(tmp_path / "recipe.yaml").warnings == ()
