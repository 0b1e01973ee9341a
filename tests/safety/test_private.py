"""What only some may read is told to nobody else: in answers to strangers, comments, summaries, cards and plans.

One private model of bob's, whose words are looked for wherever something is told. Not here: the bot (tests/space).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny
import yaml
from actions import Checkout, environment, pull_request
from calls import Command
from loopback import Client, LoopbackGitHub, LoopbackHub
from loopback.github import TOKEN

BOB = "hf_writer_bob"
LINEAR = "merge_method: linear\nmodels: [{{model: {0}}}, {{model: {1}}}]\nparameters: {{weight: 1}}\n"
OWN, FORK = "org/recipes", "stranger/recipes"


def lock_of(*models: str) -> bytes:
    """As much of a lock file as tells of parents."""
    return yaml.safe_dump({"models": [{"model": name, "commit": "c" * 40} for name in models]}).encode()


def card(**metadata: Any) -> bytes:
    return f"---\n{yaml.safe_dump(metadata)}---\n# A model\n".encode()


def files_of(folder: Path, **more: bytes) -> dict[str, bytes | Path]:
    """A model folder's files, and others beside them."""
    beside: dict[str, bytes | Path] = {name.replace("__", "."): content for name, content in more.items()}
    return {path.name: path for path in folder.iterdir()} | beside


@dataclass(frozen=True)
class Scene:
    """A Hub with bob's models on it, a machine whose cache holds them too, and what nobody but him may know."""

    hub: LoopbackHub
    home: Path
    secrets: tuple[str, ...]

    def told(self, *texts: str) -> list[str]:
        """The secrets that stand in these texts."""
        return [secret for secret in self.secrets for text in texts if secret in text]


def cached(repos: list[str]) -> None:
    """Bring models into the cache of this machine."""
    from huggingface_hub import snapshot_download

    for repo in repos:
        snapshot_download(repo)


@pytest.fixture(scope="module")
def scene(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """bob/priv is private, as are the models that its card and lock name; a stranger's public card names bob/priv."""
    root = tmp_path_factory.mktemp("models")
    served.add_user("bob", token=BOB)
    one, two = tiny.model(root / "one", 1), tiny.model(root / "two", 2)
    own = tiny.write(root / "own", {**tiny.tensors(3), "model.unheard_of": tiny.tensors(3)["model.norm.weight"]})
    named = {"README__md": card(license="mit", base_model="bob/older"), "merger__lock__yaml": lock_of("bob/oldest")}
    served.add_model("pub/one", one)
    served.add_model("pub/tells", files_of(two, README__md=card(license="mit", base_model="bob/priv")))
    served.add_model("pub/walled", files_of(two, merger__lock__yaml=lock_of("bob/hinted")), gated=True)
    served.grant("pub/walled", "bob")
    commit = served.add_model("bob/priv", files_of(two, **named), private=True)
    odd = served.add_model("bob/odd", own, private=True)
    served.add_model("bob/older", {"README.md": card(base_model="bob/eldest")}, private=True)
    home = tmp_path_factory.mktemp("home")
    with Client(served.env(home, BOB)) as client:
        client(cached, ["bob/priv", "bob/odd", "pub/walled"])
    named_there = ("bob/older", "bob/oldest", "bob/eldest", "bob/hinted")
    return Scene(served, home, (commit[:12], odd[:12], *named_there, "unheard_of"))


# The Action


def followed(head: str) -> dict[str, Any]:
    """The end of another workflow, for a commit of that repository."""
    return {"workflow_run": {"head_repository": {"full_name": head}}, "repository": {"full_name": OWN}}


STRANGERS: list[tuple[str, Mapping[str, Any]]] = [
    ("pull_request", pull_request("1" * 40, "2" * 40, FORK)),
    ("pull_request_target", pull_request("1" * 40, "2" * 40, FORK)),
    ("pull_request_target", pull_request("1" * 40, "2" * 40, None)),
    ("pull_request_review", pull_request("1" * 40, "2" * 40, FORK)),
    ("workflow_run", followed(FORK)),
    ("issue_comment", {"issue": {"number": 7, "pull_request": {}}, "repository": {"full_name": OWN}}),
]


def step(
    scene: Scene, github: LoopbackGitHub, place: Path, recipes: list[str], event: str, payload: Mapping[str, Any]
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The step of action.yml with bob's tokens and whatever they brought into the cache; and all that it has told."""
    clone = Checkout(place / "clone")
    clone.commit({f"merges/{number}.yaml": recipe for number, recipe in enumerate(recipes)})
    settings = environment(place / "runner", clone.root, event, payload, github.url) | scene.hub.env(scene.home, BOB)
    inputs = {"recipe": "merges/*.yaml", "mode": "plan", "hf_token": BOB, "hf_read_token": BOB, "github_token": TOKEN}
    settings |= {f"INPUT_{name.upper()}": text for name, text in inputs.items()}
    line = [sys.executable, "-m", "merger.action.step"]
    done = forks.run(line, cwd=clone.root, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **settings})
    told = [path.read_text() for path in (place / "runner").iterdir() if path.name != "event.json"]
    comments = [str(each["body"]) for there in github.comments.values() for each in there]
    return done, [done.stdout, done.stderr, *told, *comments]


@pytest.mark.parametrize(("event", "payload"), STRANGERS)
def test_a_strangers_recipe_is_planned_with_what_everybody_may_read(
    event: str, payload: Mapping[str, Any], scene: Scene, github: LoopbackGitHub, tmp_path: Path
) -> None:
    """Neither the workflow's tokens, nor the environment's, nor the machine's cache read for them."""
    scene.hub.clear_log()
    closed = ["bob/priv", "bob/odd", "pub/walled"]
    done, told = step(scene, github, tmp_path, [LINEAR.format("pub/one", model) for model in closed], event, payload)
    assert done.returncode == 3, done.stdout + done.stderr
    assert {request.user for request in scene.hub.log} == {None}
    assert scene.told(*told) == []
    for model in closed:
        assert re.search(rf"no model {model} on the Hub|{model} is gated", done.stdout)


def test_a_recipe_of_the_repositorys_own_is_planned_with_its_token(
    scene: Scene, github: LoopbackGitHub, tmp_path: Path
) -> None:
    """What the tests beside this one look for is told to those who may know it, with a warning."""
    payload = pull_request("1" * 40, "2" * 40, OWN)
    done, told = step(scene, github, tmp_path, [LINEAR.format("pub/one", "bob/priv")], "pull_request", payload)
    assert done.returncode == 0, done.stdout + done.stderr
    assert scene.told(*told)
    assert "**Warning:** bob/priv is private, and the result is public" in github.comments[7][0]["body"]


# Cards


def published(
    scene: Scene, command: Command, folder: Path, to: str, recipe: str
) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Run by bob; all that is published, and what was said."""
    (folder / "mine.yaml").write_text(recipe)
    done = command("run", "mine.yaml", "--to", f"hf://{to}", cwd=folder, hub=scene.hub, token=BOB)
    assert done.returncode == 0, done.stderr
    text = [content.decode() for name, content in scene.hub.files(to).items() if name.endswith((".md", ".svg"))]
    return "\n".join(text), done


def test_a_strangers_card_brings_nobodys_private_model_to_light(scene: Scene, command: Command, tmp_path: Path) -> None:
    """It is named, as the public card names it, and nothing that it names itself; nobody asks with a token."""
    scene.hub.clear_log()
    text, _ = published(scene, command, tmp_path, "bob/first", LINEAR.format("pub/one", "pub/tells"))
    assert "└── bob/priv (deleted, renamed or private)" in text
    assert scene.told(text) == []
    assert {request.user for request in scene.hub.log if "bob/priv" in request.path} == {None}


@pytest.mark.parametrize("parent", ["bob/priv", "pub/walled"])
def test_a_public_card_tells_no_more_of_a_parent_than_the_recipe_does(
    parent: str, scene: Scene, command: Command, tmp_path: Path
) -> None:
    """Neither what its private card names, nor what a record in its files does, that are not for everybody."""
    to = f"bob/of-{parent.replace('/', '-')}"
    text, done = published(scene, command, tmp_path, to, LINEAR.format("pub/one", parent))
    commit = scene.hub.head(parent)[:12]
    kind = "mit, private" if parent == "bob/priv" else "gated"
    assert f"└── {parent} @ {commit} ({kind})" in text
    assert [secret for secret in scene.told(text) if secret != commit] == []
    warning = "warning: bob/priv is private, and the result is public"
    assert (warning in done.stderr, warning in done.stdout) == (parent == "bob/priv",) * 2


def test_a_private_card_tells_what_its_readers_know(scene: Scene, command: Command, tmp_path: Path) -> None:
    """And nothing is warned of."""
    recipe = LINEAR.format("pub/one", "bob/priv") + "publish: {private: true}\n"
    text, done = published(scene, command, tmp_path, "bob/within", recipe)
    assert "bob/oldest" in text
    assert "is private" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("to", "publish", "is_warned"),
    [
        ([], "", True),
        (["--to", "hf://bob/new"], "", True),
        (["--to", "./out"], "", False),
        ([], "publish: {repo: bob/new}\n", True),
        ([], "publish: {repo: bob/new, private: true}\n", False),
    ],
)
def test_the_plan_says_which_models_would_be_told_of(
    to: list[str], publish: str, is_warned: bool, scene: Scene, command: Command, tmp_path: Path
) -> None:
    """In words and as JSON, before anything is published."""
    (tmp_path / "mine.yaml").write_text(LINEAR.format("pub/one", "bob/priv") + publish)
    said = [
        command("plan", "mine.yaml", *to, *form, cwd=tmp_path, hub=scene.hub, token=BOB) for form in ([], ["--json"])
    ]
    assert [done.returncode for done in said] == [0, 0], said[0].stderr
    warnings = json.loads(said[1].stdout)["warnings"]
    assert len([words for words in warnings if "is private" in words]) == is_warned
    assert ("warning: bob/priv is private" in said[0].stdout) is is_warned


# The Space's service


def service_says(folder: str, recipe: str, tokens: list[str | None]) -> list[str]:
    """What each of these callers is told of the recipe, by one service, one after the other."""
    from merger.cli import markdown
    from merger.errors import MergerError
    from space.work.admission import Limits
    from space.work.queue import MergeQueue
    from space.work.service import Service

    service, found = Service(MergeQueue(Path(folder), Limits())), []
    for token in tokens:
        try:
            planned = service.plan(recipe, token)
            files = [content.decode("utf-8", "replace") for content in planned.card().values()]
            found.append("\n".join([markdown.plan_section(planned.summary()), *files]))
        except MergerError as error:
            found.append("\n".join(map(str, error.problems)))
    return found


def test_the_service_tells_each_what_they_may_read(scene: Scene, tmp_path: Path) -> None:
    """Neither what it told another before, nor what the Space's own token or cache may have."""
    scene.hub.add_user("eve", token="hf_token_of_eve")
    with Client(scene.hub.env(scene.home, BOB)) as client:
        tokens = [BOB, None, "hf_token_of_eve"]
        bob, *others = client(service_says, str(tmp_path / "space"), LINEAR.format("pub/one", "bob/priv"), tokens)
    assert scene.hub.head("bob/priv")[:12] in bob
    assert "bob/priv is private, and the result is public" in bob
    assert "bob/older" not in bob, "the card that is shown is the card that will be published"
    for said in others:
        assert "there is no model bob/priv on the Hub that we may read" in said
        assert scene.told(said) == []


def beginning(repo: str, token: str | bool) -> str:
    """The first bytes of a model's weights, as a plan reads them; or why not."""
    from merger.errors import ModelError
    from merger.stores.resolve import stores

    library = stores([repo], True, token)
    try:
        return library.fetch(library.locate(repo, None), "model.safetensors", 8, 9).decode()
    except ModelError as error:
        return str(error)


def test_what_a_token_brought_into_the_cache_is_read_with_a_token_alone(scene: Scene) -> None:
    """A gated model may be found by everybody, and its files lie on this machine: they are read for one who may."""
    with Client(scene.hub.env(scene.home, BOB)) as client:
        assert client(beginning, "pub/walled", BOB) == "{"
        assert "pub/walled is gated" in client(beginning, "pub/walled", False)
