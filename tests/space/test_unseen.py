"""The secrets of the Space and of those who use it: in memory and on the wire, whoever asks for whatever in which way.

Not here: the cookie and who may ask (test_api, test_page).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
from gradio_client import Client
from loopback import LoopbackHub
from served import SECRET, ServedSpace, halted
from test_bot import BOT, Hooks, asking, payload
from waiting import until
from watching import Watch, watching

ALICE, OWN, BOTS, HOOK = "hf_token_of_alice", "hf_of_the_space_itself", "hf_token_of_the_bot", "what-only-the-hub-knows"
OTHER = "of-no-use-to-the-space"
SECRETS = (SECRET, ALICE, OWN, BOTS, HOOK, OTHER)
RECIPE = tiny.TIES_RECIPE.format(base="org/base", one="org/one", two="org/two")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def space(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedSpace]:
    """A Space with a bot, under the name that it has on the Hub, and with a secret that somebody left there."""
    root = tmp_path_factory.mktemp("models")
    tiny.models(root, "base", "one", "two", hub=served)
    served.add_model("alice/asked", {"README.md": b"mine\n"})
    for user, token in (("alice", ALICE), ("eve", "hf_token_of_eve"), (BOT, BOTS)):
        served.add_user(user, token=token, orgs=["alice"] if user == BOT else [])
    settings = {"MERGER_BOT_TOKEN": BOTS, "MERGER_BOT_SECRET": HOOK, "AWS_SECRET_ACCESS_KEY": OTHER}
    found = ServedSpace(served, tmp_path_factory.mktemp("space"), {**settings, "MERGER_SPACE_SHARD_SIZE": "4kB"})
    found.start()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def watch(space: ServedSpace, served: LoopbackHub) -> Iterator[Watch]:
    """All processes of the Space, at every request to the Hub."""
    with watching(served, space.folder) as found:
        yield found


@pytest.fixture
def caller(space: ServedSpace) -> Client:
    """Alice's program."""
    headers = {"Authorization": f"Bearer {ALICE}"}
    return Client(space.url, headers=headers, verbose=False, analytics_enabled=False)


def shown(space: ServedSpace, watch: Watch) -> list[object]:
    """Where one of the secrets can be read now: in a file of the Space's, its log among them, or by a process."""
    watch.look()
    kept = {path: path.read_bytes() for path in space.folder.rglob("*") if path.is_file()}
    found: list[object] = [path for path, content in kept.items() if any(each.encode() in content for each in SECRETS)]
    return found + list(watch.holders(*SECRETS))


def state(caller: Client, id: str) -> str:
    """How a job is."""
    return str(caller.predict(id, api_name="/job")["state"])


def test_a_merge_under_way_shows_no_secret(
    space: ServedSpace, served: LoopbackHub, watch: Watch, caller: Client
) -> None:
    """Not in the page's process, the one that forks the workers, or the worker, while it writes; nor afterwards."""
    reached, go = halted(served)
    job = caller.predict(RECIPE, "alice/merged", api_name="/merge")
    assert job["ok"], job
    until(lambda: reached.is_set() or state(caller, job["id"]) not in ("queued", "running"))
    assert reached.is_set(), caller.predict(job["id"], api_name="/job")
    assert shown(space, watch) == []
    go.set()
    until(lambda: state(caller, job["id"]) == "done")
    told = caller.predict(job["id"], api_name="/job")
    assert told["where"].endswith("/alice/merged")
    assert shown(space, watch) == []
    lines = [process.line for process in watch.seen]
    assert [line.count(b"-m\0space\0") for line in lines].count(1) == 1
    assert [line.count(b"-m\0space.work.forkserver\0") for line in lines].count(1) >= 2  # one forks, the other works
    assert ALICE not in str(told)


@pytest.mark.parametrize("name", ["/merge", "/plan"])
@pytest.mark.parametrize(
    "recipe",
    [f"# {ALICE}\n{RECIPE}", RECIPE.replace("org/two", f"org/{ALICE}"), RECIPE.replace("apache-2.0", f"'{ALICE}'")],
    ids=["comment", "model", "licence"],
)
def test_a_recipe_with_the_callers_token_goes_nowhere(
    name: str, recipe: str, space: ServedSpace, served: LoopbackHub, watch: Watch, caller: Client
) -> None:
    """It is refused before it is queued, kept or published, by what it holds or by what it names."""
    told = caller.predict(recipe, *(["alice/told"] if name == "/merge" else []), api_name=name)
    assert not told["ok"]
    assert not served.exists("alice/told")
    assert shown(space, watch) == []


def test_the_bot_says_and_shows_no_secret(space: ServedSpace, served: LoopbackHub, watch: Watch) -> None:
    """Asked by a comment, by a commit with its own token in it, or by a webhook that knows no secret."""
    hooks = Hooks(space, served)
    num = hooks.comment("eve", "alice/asked", asking("plan", RECIPE))
    hooks.until("alice/asked", num, "| method |")
    num = hooks.comment("eve", "alice/asked", asking("plan", f"# {BOTS}\n{RECIPE}"))
    assert "the recipe holds a token in use" in hooks.until("alice/asked", num, "Not merged")
    assert hooks.send(hooks.push("alice/asked", {"merge.yaml": f"# {BOTS}\n{RECIPE}"}))[0] == 200
    opened = until(lambda: [pull for pull in served.discussions("alice/asked") if "merge.yaml" in pull.title])
    assert "the recipe holds a token in use" in hooks.until("alice/asked", opened[0].num, "not merged")
    assert hooks.send(payload("alice/asked", "repo.content", "update"), secret=f"{HOOK}x")[0] == 403
    said = [text for each in hooks.api("eve").get_repo_discussions("alice/asked")
            for text in hooks.said("alice/asked", each.num)]  # fmt: skip
    assert len(said) >= 3
    assert not [text for text in said for each in SECRETS if each in text]
    assert shown(space, watch) == []
