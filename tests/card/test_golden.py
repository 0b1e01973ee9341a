"""Ten cards word for word, one a form of recipe and a family of methods; `GOLDEN=write` writes them anew.

Not here: how parents relate and what is drawn (test_relations, test_pictures): here stand given numbers.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from loopback.cards import problems
from places import ROOT

from merger import runtime
from merger.card.facts import score_facts
from merger.card.relations import Relation, Relations
from merger.card.render import render
from merger.evaluation.budget import Score
from merger.lock.lock import lock
from merger.methods.registry import methods
from merger.planning.budget import Budget
from merger.planning.plan import Plan, make_plan
from merger.recipe.parse import parse
from merger.stores.folder import FolderStore
from merger.stores.ports import Located

SCREENS = 50
"""Lines of a card without pictures that are seen before anything is opened: about two screens."""

GOLDEN = Path(__file__).with_name("golden")
COMMITS = {"org/base": "b" * 40, "org/one": "1" * 40, "org/two": "2" * 40, "org/three": "3" * 40}
CARDS = {
    "base": "license: llama3.1\nlanguage: [en]\npipeline_tag: text-generation",
    "one": "license: llama3.1\nlanguage: [en, no]\ndatasets: [org/stories]",
    "two": "license: apache-2.0\ndatasets: [org/stories, org/code]",
    "three": "license: other\nlicense_name: some-licence\nlicense_link: https://example.org/some-licence",
}
ROW = Relation("layer 0", 0.4321, 0.25, (1.0, 0.5), 0.75)
RELATIONS = Relations(
    (replace(ROW, where="org/one and org/two"),), (ROW, replace(ROW, where="outside of the layers")),
    ("org/one and org/two are as good as the same (cosine 0.9999): their merge is either of them",),
)  # fmt: skip
PARTS = {
    "related": RELATIONS,
    "lineage": "org/merged (merge by ties)\n├── org/one @ 1111 (fine-tune, llama3.1)\n└── org/two @ 2222 (apache-2.0)",
    "pictures": {
        name: {"alt": f"The {name} as a picture", "place": f"pictures/{name}.png"}
        for name in ("lineage", "settings", "movement")
    },
    "chats": True,
    **score_facts(
        [Score(None, "heldout.txt", "bits per byte", 1.21, None, False, "1,000 characters", "heldout.txt"),
         Score("org/one", "heldout.txt", "bits per byte", 1.31, None, False, "1,000 characters", "heldout.txt"),
         Score("org/two", "heldout.txt", "bits per byte", 1.5, None, False, "1,000 characters", "heldout.txt")],
        "org/merged",
    ),
}  # fmt: skip

RECIPES = {
    "linear": "merge_method: linear\nmodels:\n  - {model: org/one, parameters: {weight: 0.7}}\n"
    "  - {model: org/two, parameters: {weight: 0.3}}\n",
    "local": "# of /home/me/models/one and another\nmerge_method: slerp\nbase_model: /home/me/models/one\nmodels:\n"
    "  - model: /home/me/models/one\n  - model: '../two'\nparameters: {t: 0.5}\npublish: {license: mit}\n",
    "slices": "slices:\n  - sources:\n      - {model: org/one, layer_range: [0, 2]}\n"
    "      - {model: org/two, layer_range: [0, 2]}\nmerge_method: slerp\nbase_model: org/one\nparameters:\n  t:\n"
    "    - {filter: self_attn, value: [0, 1]}\n    - value: 0.5\ndtype: float16\n",
    "ties": "merge_method: ties\nbase_model: org/base\nmodels:\n  - model: org/one\n    parameters: "
    "{weight: 0.5, density: 0.6}\n  - model: org/two\n    parameters: {weight: [0, 1], density: 0.6}\n"
    "publish: {repo: org/Llama-merged}\n",
    "dare": "merge_method: dare_ties\nbase_model: org/base\nmodels:\n  - model: org/one\n  - model: org/two@main\n"
    "parameters: {density: 0.5, unbiased: true}\nseed: 7\n",
    "model-stock": "merge_method: model_stock\nbase_model: org/base\nmodels: [{model: org/one}, {model: org/two}]\n",
    "passthrough": "merge_method: passthrough\nslices:\n  - sources: [{model: org/one, layer_range: [0, 2]}]\n"
    "  - sources: [{model: org/two, layer_range: [0, 2]}]\n",
    "spectral": "merge_method: tsvm\nbase_model: org/base\nmodels: [{model: org/one}, {model: org/three}]\n"
    "parameters: {spectral: [{filter: embed_tokens, value: false}, {value: true}]}\n",
    "documents": "name: half\nmerge_method: linear\nmodels: [{model: org/one}, {model: org/two}]\n"
    "parameters: {weight: 1}\n---\nmerge_method: task_arithmetic\nbase_model: org/base\n"
    "models: [{model: half, parameters: {weight: 0.5}}]\npublish: {license: llama3.1, repo: org/merged}\n",
    "override": "merge_method: karcher\nmodels: [{model: org/one}, {model: ./two}]\n"
    "publish: {license: mit, license_override: we asked *both* of them}\n",
}


class Hub(FolderStore):
    """Folders of this machine that stand in for repos of the Hub at a commit, and for folders elsewhere."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def locate(self, path: str, revision: str | None) -> Located:
        folder = super().locate(str(self._folder / path.rstrip("/").split("/")[-1]), None)
        return replace(folder, name=path, where=path, commit=COMMITS[path]) if path in COMMITS else folder

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        folder = replace(model, where=str(self._folder / model.name.split("/")[-1]))
        return super().fetch(folder, file, start, stop)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small models with cards."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, metadata) in enumerate(CARDS.items()):
        (tiny.model(folder / name, seed) / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    return folder


def planned(recipe: str, root: Path) -> Plan:
    """What a recipe makes of those."""
    return make_plan(lock(parse(recipe, "recipe.yaml", methods()), Hub(root)), methods(), Budget())


def test_there_are_ten_of_all_forms() -> None:
    """No golden card is left of a recipe that is gone."""
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(RECIPES)
    assert len(RECIPES) == 10


@pytest.mark.parametrize("name", RECIPES)
def test_a_card_word_for_word(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole card; the Hub takes it, and no place on a disk stands in it."""
    made = planned(RECIPES[name], root)
    monkeypatch.setattr(runtime, "addresses", lambda: {"Repository": "https://github.com/OWNER/merger"})
    whole = name in ("ties", "documents")
    title = made.locked.recipe.publish.repo or ("merged" if name == "local" else "org/merged")
    card = render(made, methods(), title, PARTS if whole else {})
    card = card.replace(made.hash[:16], "PLAN")
    golden = GOLDEN / f"{name}.md"
    if os.environ.get("GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(card, "utf-8")
    assert card == golden.read_text("utf-8")
    assert problems(card) == ([], [])
    assert not re.search(r"/home|\.\./|/tmp|&#39;|&quot;", card)
    folded = re.sub(r"<details>.*?</details>", "", card.split("---\n", 2)[2], flags=re.DOTALL)
    assert name != "linear" or sum(map(bool, folded.splitlines())) <= SCREENS


def test_no_value_stands_in_an_attribute_of_our_templates() -> None:
    """So that apostrophes and quotes need no entities in them; templates of one's own have them."""
    for source in (ROOT / "templates").rglob("*.j2"):
        assert not re.search(r"""=\s*["'][^"'>]*\{\{|<[^>]*\{\{""", source.read_text("utf-8")), source
