"""What the Space does not take from strangers, and what is too big for it: each with a sentence and a place."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import tiny
from loopback import Client, ClientError, LoopbackHub
from naming import PLACES

from merger.errors import MergerError
from merger.recipe import model
from merger.safety.limits import ALL_TENSORS, SPACE_TENSORS, Limit
from space.work import admission
from space.work.admission import Limits

TWO = "merge_method: linear\nmodels:\n  - model: {}\n  - model: org/b\nparameters: {{weight: 1}}\n"
STRANGE = [
    "./examples/zoo/base", "../../etc/passwd", "/etc/passwd", "~/model", "file:///etc/passwd",
    "http://127.0.0.1/model", "https://example.org/model", "$HOME/model", "${HF_TOKEN}/model", "org/..", "merger",
    "org/name/more", "'org/name\\n'", "org/näme", "C:/model",
]  # fmt: skip


def refused(text: str) -> str:
    return "\n".join(map(str, admission.check(text).problems))


@pytest.mark.parametrize("name", STRANGE)
def test_a_model_is_on_the_hub(name: str) -> None:
    """A path, another scheme, a variable of the environment or half a name is no model here; its line is told."""
    told = refused(TWO.format(name))
    assert told.startswith("recipe.yaml:3:12: ")
    assert "is no model on the Hub\n    only models on the Hub can be merged here" in told


@pytest.mark.parametrize("name", ["./run/checkpoint-*", "../*", "/tmp/*/model", "org/*"])
def test_no_folders_are_looked_for(name: str) -> None:
    """Neither is what a pattern of them would find."""
    assert "is no model on the Hub" in refused(TWO.format(f"'{name}'\n    average: uniform"))


@pytest.mark.parametrize("revision", ["../main", "a/../../b", "main?x=1", "-x"])
def test_a_revision_is_one(revision: str) -> None:
    """What stands behind the @ leads nowhere else."""
    assert f"'{revision}' is no branch, tag or commit" in refused(TWO.format(f"org/a@{revision}"))


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_recipe_names_a_model(place: str) -> None:
    """It is on the Hub, or the recipe is refused at that place; a stage's own name is no model."""
    assert refused(PLACES[place].replace("MODEL", "org/c")) == ""
    told = refused(PLACES[place].replace("MODEL", "../secret"))
    assert re.search(r"^recipe.yaml:[1-9]\d*:\d+: .*'../secret' is no model on the Hub$", told, re.MULTILINE)


WORDS = {"Slice.method", "Module.name", "Lora.include", "Lora.exclude", "Taken.filter", "TokenOf.token"}
WORDS |= {
    "TokenRow.token",
    "Tokenizer.missing",
    "Tokenizer.rows",
    "ChatTemplate.text",
    "Mixture.gate_mode",
    "Mixture.architecture",
}
WORDS |= {"Expert.positive_prompts", "Expert.negative_prompts", "Recipe.path", "Recipe.text", "Recipe.name"}
WORDS |= {"Recipe.dtype", "Publish.repo", "Publish.license", "Publish.license_name", "Publish.license_link"}
WORDS |= {
    "Rule.filter",
    "Checkpoints.match",
    "Checkpoints.by",
    "Publish.license_override",
    "Publish.gguf",
    "Publish.fp8",
    "Publish.left_out",
    "TokenRow.source",
    "Tokenizer.source",
}
PLACED = {"ModelRef.path", "ModelRef.revision", "Publish.template"}
REFUSED = {"Perplexity.text", "Evaluate.tasks", "Evaluate.dtype"}
REFUSED |= {"Measure.path", "Measure.revision", "Measure.kind", "Measure.measure"}


def test_no_word_of_the_language_was_forgotten() -> None:
    """Each text that a recipe may hold is a word and opens nothing, or is looked at, or is refused with its block."""
    found = {
        f"{kind.__name__}.{field.name}"
        for kind in vars(model).values()
        if is_dataclass(kind) and kind.__module__ == model.__name__
        for field in fields(kind)
        if re.search(r"\bstr\b", str(field.type))
    }
    assert found == WORDS | PLACED | REFUSED


@pytest.mark.parametrize("block", ["{perplexity: {text: /etc/passwd}}", "{tasks: [./mine.yaml]}"])
def test_nothing_is_measured(block: str) -> None:
    """A text or a task may be a file of the machine, and a task's file may run code."""
    told = refused(TWO.format("org/a") + f"evaluate: {block}\n")
    assert told.startswith("recipe.yaml:6:")
    assert "evaluate: the Space measures nothing\n" in told


def test_no_templates() -> None:
    """A card's template is a file of the machine, so there is none here."""
    told = refused(TWO.format("org/a") + "publish: {repo: org/c, template: /etc/passwd}\n")
    assert told.startswith("recipe.yaml:6:34: publish.template: the Space takes no templates")


def test_large_recipes_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of too many bytes, or with thousands of models, is refused before anything reads it."""
    monkeypatch.setattr(admission, "parse_text", lambda *_: pytest.fail("it was parsed"))
    assert "the recipe has 70.1 kB, and this Space reads 64.0 kB at most" in refused("# " + "é" * 34_999 + "x")
    assert "names models 5,000 times" in refused("models:\n" + "- {model: a}\n" * 2_500 + "- model: a\n" * 2_500)


def test_as_many_models_as_there_is_room_for() -> None:
    """Sixteen models are merged, seventeen are not."""
    names = [f"  - model: org/m{number}\n" for number in range(16)]
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
    assert refused(text + "".join(names)) == ""
    assert "names 17 models, and this Space merges 16 at most" in refused(text + "".join(names) + "  - model: org/z\n")


@pytest.mark.parametrize(
    "text", ["", "a: [", "x: &a [*a]\n", "models: !!python/object/apply:os.system ['true']\n", "\x00"]
)
def test_what_is_no_recipe(text: str) -> None:
    """Whatever is typed, there is a sentence for it and no exception."""
    assert admission.check(text).problems


# ---- with a Hub -----------------------------------------------------------------------------------------------------


def planned(text: str, token: str | None, limits: Limits) -> str:
    return admission.plan_recipe(admission.parse_recipe(text), admission.options(token, limits), limits)[0].hash


@pytest.fixture(scope="module")
def models(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A public model, a private one, and one that is called like a folder of this project."""
    folder = tmp_path_factory.mktemp("models")
    served.add_model("org/b", tiny.model(folder / "b", 1))
    served.add_model("org/hidden", tiny.model(folder / "hidden", 2), private=True)
    served.add_model("merger/planning", tiny.model(folder / "plan", 3))


@pytest.mark.usefixtures("models")
def test_a_private_model_needs_its_owner(client: Client) -> None:
    """Without a token a private model is not there, whatever token the Space itself has in its environment."""
    text = TWO.format("org/hidden")
    with pytest.raises(ClientError, match="there is no model org/hidden on the Hub that we may read"):
        client(planned, text, None, Limits())
    assert client(planned, text, "hf_reader_of_org", Limits())


@pytest.mark.usefixtures("models")
def test_a_folder_of_that_name(client: Client) -> None:
    """A model on the Hub is meant even where the Space has a folder of the same name."""
    assert Path("merger/planning").is_dir()
    assert client(planned, TWO.format("merger/planning"), None, Limits())


def planned_with_few(text: str) -> None:
    admission.plan_recipe(
        admission.parse_recipe(text),
        replace(admission.options(None, Limits()), tensors=Limit("all", 3, "", "x")),
        Limits(),
    )


@pytest.mark.usefixtures("models")
def test_headers_fill_no_page(client: Client) -> None:
    """All models' headers together tell of fewer tensors than on a machine of one's own, or the plan is refused."""
    assert admission.options(None, Limits()).tensors == SPACE_TENSORS
    assert SPACE_TENSORS.most < ALL_TENSORS.most
    with pytest.raises(ClientError, match="at most 3 are read"):
        client(planned_with_few, TWO.format("org/b@main"))


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (Limits(memory=100_000_000), "of memory, and 100.0 MB are allowed"),
        (Limits(disk=1_000), "of disk at once, and 1.0 kB are allowed"),
        (Limits(traffic=10_000), "and this Space moves 10.0 kB a merge at most"),
    ],
)
def test_too_big(client: Client, limits: Limits, what: str) -> None:
    """More memory, disk or traffic than the Space has for one merge is refused by the plan, and says where to go."""
    with pytest.raises(ClientError, match=what) as told:
        client(planned, TWO.format("org/b@main"), None, limits)
    assert "TooBigError" in told.value.kinds
    assert "the GitHub Action or your own machine can make it" in str(told.value)


def test_limits_of_this_machine(tmp_path: Path) -> None:
    """Workers share what the variables allow, or what is left on the machine; the page keeps a gigabyte."""
    given = {"MERGER_SPACE_MEMORY": "16GB", "MERGER_SPACE_DISK": "50GB", "MERGER_SPACE_JOBS_EACH": "5"}
    limits = Limits.here(tmp_path, given)
    assert (limits.workers, limits.memory, limits.disk, limits.jobs_each) == (2, 7_500_000_000, 25_000_000_000, 5)
    assert Limits.here(tmp_path, {**given, "MERGER_SPACE_WORKERS": "1"}).memory == 15_000_000_000
    assert Limits.here(tmp_path, {}).disk is not None
    with pytest.raises(ValueError, match="is no size"):
        Limits.here(tmp_path, {"MERGER_SPACE_DISK": "much"})


def test_a_refusal_has_an_exit_code() -> None:
    """Each refusal of the Space is one of the errors that the rest of the project knows."""
    assert issubclass(admission.TooBigError, MergerError)
    assert admission.TooBigError.exit_code == 5
