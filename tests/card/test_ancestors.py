"""The card tells where a merge's parents come from, whatever has become of their own parents since."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import tiny
import yaml
from calls import Command
from loopback import LoopbackHub
from thorough import thorough_only
from waiting import HANGS_SECONDS

from merger.card.ancestors import GENERATIONS, Family, Member, family
from merger.errors import GatedError, MissingError, ModelError, Problem
from merger.methods.registry import methods
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe
from merger.stores.ports import FileInfo, Located


def with_card(folder: Path, **metadata: Any) -> Path:
    """The model's folder with a card of this metadata."""
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A model\n")
    return folder


def card(**metadata: Any) -> dict[str, bytes]:
    """The files of a repo that holds nothing but a card."""
    return {"README.md": f"---\n{yaml.safe_dump(metadata)}---\n# A model\n".encode()}


def merged(command: Command, hub: LoopbackHub, folder: Path, to: str, recipe: str) -> str:
    """Run a recipe, publish it, and return its card."""
    (folder / "mine.yaml").write_text(recipe)
    done = command("run", "mine.yaml", "--to", f"hf://{to}", "--quiet", cwd=folder, hub=hub)
    assert done.returncode == 0, done.stderr
    return hub.read(to, "README.md").decode()


def tree(text: str) -> str:
    """The card's lineage with the letter C for each commit."""
    found = re.search(r"## Lineage\n.*?```text\n(.*?)\n```", text, re.DOTALL)
    assert found
    return re.sub(r"@ [0-9a-f]{12}", "@ C", found[1])


SLERP = "merge_method: slerp\nbase_model: {0}\nmodels: [{{model: {0}}}, {{model: {1}}}]\nparameters: {{t: 0.5}}\n"
LINEAR = "merge_method: linear\nmodels: [{{model: {0}}}, {{model: {1}}}]\nparameters: {{weight: 1}}\n"


@pytest.fixture(scope="module")
def kin(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose cards name one that is gated, one that is gone, and two that name each other."""
    root = tmp_path_factory.mktemp("kin")
    cards: Mapping[str, dict[str, Any]] = {
        "one": {"license": "apache-2.0", "base_model": "kin/gated"},
        "two": {"license": "mit", "base_model": ["kin/gone", "./secret/of/mine"], "base_model_relation": "merge"},
        "three": {"base_model": "kin/ring", "base_model_relation": "quantized"},
    }
    for seed, (name, metadata) in enumerate(cards.items()):
        served.add_model(f"kin/{name}", with_card(tiny.model(root / name, seed), **metadata))
    served.add_model("kin/gated", card(license="llama3.1", base_model="kin/eve"), gated=True)
    served.add_model("kin/eve", card(license="other", license_name="eve-licence"))
    served.add_model("kin/ring", card(license="mit", base_model="kin/three"))
    return root


@thorough_only
def test_three_generations_of_merges_over_the_hub(served: LoopbackHub, command: Command, kin: Path) -> None:
    """Each merge is told with its method and commit, a gated and a deleted ancestor and a circle in their places."""
    first = merged(command, served, kin, "org/first", SLERP.format("kin/one", "kin/two"))
    assert tree(first) == (
        "org/first (merge by slerp)\n"
        "├── kin/one @ C (fine-tune, apache-2.0)\n"
        "│   └── kin/gated @ C (fine-tune, llama3.1, gated)\n"
        "│       └── kin/eve @ C (eve-licence)\n"
        "└── kin/two @ C (merge, mit)\n"
        "    ├── kin/gone (deleted, renamed or private)\n"
        "    └── mine (local folder)"
    )
    merged(command, served, kin, "org/second", LINEAR.format("org/first", "kin/three"))
    third = merged(command, served, kin, "org/third", SLERP.format("org/second", "kin/two"))
    assert tree(third) == (
        "org/third (merge by slerp)\n"
        "├── org/second @ C (merge by linear)\n"
        "│   ├── org/first @ C (merge by slerp, apache-2.0)\n"
        "│   │   ├── kin/one @ C (fine-tune, apache-2.0)\n"
        "│   │   │   └── kin/gated @ C (fine-tune, llama3.1, gated)\n"
        "│   │   │       └── kin/eve @ C (eve-licence)\n"
        "│   │   └── kin/two @ C (merge, mit)\n"
        "│   │       ├── kin/gone (deleted, renamed or private)\n"
        "│   │       └── mine (local folder)\n"
        "│   └── kin/three @ C (quantised)\n"
        "│       └── kin/ring @ C (fine-tune, mit)\n"
        "│           └── kin/three @ C (quantised) - names itself among its ancestors\n"
        "└── kin/two @ C (merge, mit) - its parents stand above"
    )
    for name in ("first", "second"):
        assert f"org/{name} @ {served.head(f'org/{name}')[:12]}" in third


def test_one_request_tells_of_an_ancestor(served: LoopbackHub, command: Command, kin: Path) -> None:
    """Nothing is read of a model that is no merge, and of a merge its lock alone."""
    served.clear_log()
    merged(command, served, kin, "org/fourth", LINEAR.format("kin/one", "kin/three"))
    for name in ("kin/gated", "kin/eve", "kin/ring"):
        asked = [r for r in served.log if name in r.path]
        assert [r.path for r in asked] == [f"/api/models/{name}"]


def test_the_picture_lies_beside_the_card_in_one_commit(served: LoopbackHub, command: Command, kin: Path) -> None:
    """As PNG and as SVG; the card shows it with words for who does not see it."""
    text = merged(command, served, kin, "org/drawn", LINEAR.format("kin/one", "kin/two"))
    assert "![Lineage of org/drawn: 6 models, 2 of them its parents](pictures/lineage.png)" in text
    (commit, _) = served.commits("org/drawn")
    assert {"README.md", "pictures/lineage.png", "pictures/lineage.svg"} <= set(commit.files)
    assert served.read("org/drawn", "pictures/lineage.png").startswith(b"\x89PNG")
    drawn = served.read("org/drawn", "pictures/lineage.svg").decode()
    assert "kin/gated" in drawn
    assert "secret" not in drawn


def test_a_hub_in_trouble_does_not_keep_the_card_from_coming_out(
    served: LoopbackHub, command: Command, kin: Path
) -> None:
    """An ancestor that cannot be asked about is told so."""
    served.fail(lambda r: r.path == "/api/models/kin/gated", status=500, times=99)
    text = merged(command, served, kin, "org/troubled", LINEAR.format("kin/one", "kin/three"))
    served.clear_faults()
    assert "└── kin/gated (could not be read)" in tree(text)


# Without a Hub


class Cards:
    """A store of models that are nothing but what a card says."""

    def __init__(self, cards: Mapping[str, Any], wait: Event | None = None) -> None:
        self.cards, self.wait, self.asked = cards, wait, list[str]()

    def has(self, path: str) -> bool:
        return True

    def locate(self, path: str, revision: str | None) -> Located:
        self.asked.append(path)
        if self.wait is not None:
            self.wait.wait(HANGS_SECONDS)
        found = self.cards.get(path, MissingError)
        if not isinstance(found, Mapping):
            raise found(Problem("no"))
        return Located(path, path, "a" * 40, {name: FileInfo(9) for name in found.get("files", ())}, card=found)

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        content: bytes = self.cards[model.where]["files"][file]
        return content

    def reader(self, tickets: Any, budget: int) -> Any:
        raise AssertionError("no tensor is read for a lineage")


def of(tmp_path: Path, hub: Cards | None, seconds: float = HANGS_SECONDS, **metadata: Any) -> Family:
    """The family of a merge of two folders, of which one has a card of this metadata."""
    tiny.model(tmp_path / "deep" / "one", 1)
    with_card(tiny.model(tmp_path / "deep" / "two", 2), **metadata)
    (tmp_path / "mine.yaml").write_text(LINEAR.format(tmp_path / "deep" / "one", tmp_path / "deep" / "two"))
    planned, store = plan(read_recipe(tmp_path / "mine.yaml"), Options())
    return family(planned, "merged", methods(), store, hub, seconds)


def test_folders_alone_ask_nobody_and_name_no_place(tmp_path: Path) -> None:
    """Their cards' words are told, and of any path the last part at most."""
    found = of(tmp_path, None, base_model=["org/base", str(tmp_path / "deep"), "C:\\models\\old"]).tree()
    assert found == (
        "merged (merge by linear)\n"
        "├── one (local folder)\n"
        "└── two (merge, local folder)\n"
        "    ├── org/base (not looked up)\n"
        "    ├── deep (local folder)\n"
        "    └── old (local folder)"
    )
    assert str(tmp_path) not in found


def test_each_kind_of_trouble_has_its_words(tmp_path: Path) -> None:
    """Gated, gone and unreachable are three things."""
    hub = Cards({"a/gated": GatedError, "a/broken": ModelError, "a/odd": RuntimeError})
    found = of(tmp_path, hub, base_model=["a/gated", "a/gone", "a/broken", "a/odd"])
    assert [member.note for member in found.members[3:]] == [
        "gated", "deleted, renamed or private", "could not be read", "could not be read",
    ]  # fmt: skip


def test_what_no_public_card_names_is_named_where_everybody_may_read_it_alone(tmp_path: Path) -> None:
    """A folder's card is on its owner's disk: of what it names a stranger learns no more than that it is there."""
    hub = Cards({"a/open": {"base_model": "a/gone"}, "a/broken": ModelError})
    found = of(tmp_path, hub, base_model=["a/open", "a/secret", "a/broken"]).tree()
    assert found.splitlines()[3:] == [
        "    ├── a/open @ aaaaaaaaaaaa (fine-tune)",
        "    │   └── a/gone (deleted, renamed or private)",
        "    ├── a model (deleted, renamed or private)",
        "    └── a model (could not be read)",
    ]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "fine-tune"),
        ({"library_name": "peft"}, "adapter"),
        ({"library_name": "peft", "base_model_relation": "quantized"}, "quantised"),
        ({"base_model_relation": "of no kind"}, "fine-tune"),
    ],
)
def test_what_a_card_calls_its_model(said: Mapping[str, str], told: str, tmp_path: Path) -> None:
    """Its own word for it first, then what its library makes, then how many it comes from."""
    found = of(tmp_path, None, base_model="org/base", **said).tree()
    assert f"└── two ({told}, local folder)" in found


def test_no_answer_in_time(tmp_path: Path) -> None:
    """A Hub that is slow costs the time that is allowed, and no more."""
    never = Event()
    found = of(tmp_path, Cards({"a/slow": {}}, wait=never), seconds=0.2, base_model="a/slow")
    assert found.members[3].note == "no answer in time"
    never.set()


def test_the_end_of_a_long_line(tmp_path: Path) -> None:
    """So many generations are looked up, and the next one is named."""
    hub = Cards({f"a/{age}": {"base_model": f"a/{age + 1}"} for age in range(100)})
    found = of(tmp_path, hub, base_model="a/0")
    assert hub.asked == [f"a/{age}" for age in range(GENERATIONS - 1)]
    assert found.members[-1] == Member(f"a/{GENERATIONS - 1}", note="not looked up: too far back")


def test_a_merge_by_mergekit_tells_its_method(tmp_path: Path) -> None:
    """By the recipe that it leaves beside its result, which also names parents that a card does not."""
    recipe = b"merge_method: ties\nslices:\n- sources:\n  - model: a/one\n  - model: /home/me/two\nbase_model: a/one\n"
    found = of(tmp_path, Cards({"a/kit": {"files": {"mergekit_config.yml": recipe}}}), base_model="a/kit")
    assert found.members[3].made == "merge by ties"
    assert [found.members[place].name for place in found.members[3].parents] == ["a/one", "two"]


@pytest.mark.parametrize("lock", [b"[", b"models: 3", b"models: [{commit: 1}]", b"- &a [*a]", b"\xff\xfe", b"{" * 5000])
def test_a_record_that_cannot_be_understood_counts_as_none(lock: bytes, tmp_path: Path) -> None:
    """A strange file beside a strange model is no reason for anything to fail."""
    hub = Cards({"a/odd": {"files": {"merger.lock.yaml": lock}, "license": ["x"], "tags": "y"}})
    found = of(tmp_path, hub, base_model="a/odd").members
    assert (found[3].name, found[3].licence) == ("a/odd", None)


def test_words_of_others_stay_on_one_line_each(tmp_path: Path) -> None:
    """Neither a licence nor a name can add a line to the tree, or turn its letters round."""
    found = of(tmp_path, None, license="mit\n└── fake\u202e", base_model="x\n└── y").tree()
    assert "two (fine-tune, mit └── fake, local folder)" in found
    assert len(found.splitlines()) == 4
