"""The bot step by step: webhooks and answers of the Hub that are not as they should be, and what is said of failures.

It runs in a process of its own beside the loopback Hub, and takes its steps when it is told; no job is ever made. Not
here: merges that are made (test_bot).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DiscussionComment, HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Client, LoopbackHub
from loopback.wire import Answer
from served import zoo
from test_bot import BOT, RECIPE, SECRET, TOKEN, asking, commented, payload
from thorough import THOROUGH
from waiting import HANGS_SECONDS

from space.bot.bot import Bot
from space.work.admission import Limits
from space.work.queue import MergeQueue
from space.work.service import Service

NOW = {"repo": "alice/model", "sha": "a" * 40}
_BOTS: list[Bot] = []


# What the child does


def begin(folder: str) -> None:
    """A bot whose queue nobody works off."""
    _BOTS[:] = [Bot(Service(MergeQueue(Path(folder), Limits())), TOKEN, SECRET)]


def hear(told: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
    """One webhook."""
    return _BOTS[0].hear(json.dumps(told).encode())


def turn(times: int = 1) -> list[dict[str, Any]]:
    """Steps with all that is open; what is known of all that was asked since the beginning."""
    for _ in range(times):
        _BOTS[0].turn()
    return _BOTS[0]._service.queue.records.find("event")


def jobs() -> list[dict[str, Any]]:
    """All that was queued, the oldest first."""
    return _BOTS[0]._service.queue.records.find("job")


def end(state: str, *problems: str) -> None:
    """The end of whatever is queued."""
    jobs = _BOTS[0]._service.queue.jobs
    for job in jobs.open():
        jobs.change(job.id, state=state, problems=problems, where="there", is_new=True)


def tired() -> None:
    """What waits for a while has waited."""
    for event in _BOTS[0]._events.open():
        _BOTS[0]._events.change(event, again=0.0)


# The scene


@dataclass(frozen=True)
class Scene:
    """A Hub, and a bot beside it."""

    hub: LoopbackHub
    client: Client

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.client(function, *arguments, timeout=HANGS_SECONDS)

    def push(self, repo: str, recipe: str, **files: str) -> dict[str, Any]:
        """A commit to main, and its webhook."""
        old = self.hub.head(repo)
        found = {"merge.yaml": recipe, **{name.replace("_", "."): text for name, text in files.items()}}
        new = self.hub.commit(repo, {name: text.encode() for name, text in found.items() if text})
        moved = [{"ref": "refs/heads/main", "oldSha": old, "newSha": new}]
        return payload(repo, "repo.content", "update", updatedRefs=moved)

    def comment(self, user: str, repo: str, text: str) -> tuple[int, dict[str, Any]]:
        """A comment in a discussion of its own, and its webhook."""
        api = HfApi(endpoint=self.hub.url, token=f"hf_token_of_{user}")
        num = api.create_discussion(repo, "a question", description="hello").num
        return num, commented(repo, num, api.comment_discussion(repo, num, text).id, text)

    def said(self, repo: str) -> list[str]:
        """All that the bot has said there."""
        api = HfApi(endpoint=self.hub.url, token="hf_token_of_alice")
        talks = [api.get_discussion_details(repo, item.num).events for item in self.hub.discussions(repo)]
        comments = [event for events in talks for event in events if isinstance(event, DiscussionComment)]
        return [event.content for event in comments if event.author == BOT]


@pytest.fixture(scope="module")
def child(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    zoo(served)
    served.add_user(BOT, token=TOKEN, orgs=["alice"])
    served.add_user("eve", token="hf_token_of_eve")
    with Client(served.env(tmp_path_factory.mktemp("home"), "hf_of_the_space_itself")) as client:
        yield client


@pytest.fixture
def scene(served: LoopbackHub, child: Client, tmp_path: Path) -> Iterator[Scene]:
    """A new bot."""
    child(begin, str(tmp_path))
    yield Scene(served, child)
    served.clear_faults()


@pytest.fixture
def repo(scene: Scene, request: pytest.FixtureRequest) -> str:
    """A repo of alice's."""
    name = f"alice/r{abs(hash(request.node.nodeid)) % 10**9}"
    scene.hub.add_model(name, {"README.md": b"mine\n"})
    return name


# In order


OLD, MIDDLE, NEW = RECIPE, RECIPE.replace("0.5", "0.25"), RECIPE.replace("0.5", "0.75")


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2], [0], [0, 0, 2, 2, 1]])
def test_whatever_webhook_comes_first_main_is_merged_once(order: list[int], scene: Scene, repo: str) -> None:
    """One that comes late, after the merge, is of an older commit and comes to nothing."""
    told = [scene.push(repo, recipe) for recipe in (OLD, MIDDLE, NEW)]
    for number in order:
        assert scene(hear, told[number])[0] == 200
    scene(turn, 3)
    assert [job["recipe"] for job in scene(jobs)] == [NEW]
    scene(end, "done")
    for number in (0, 1, 2):
        scene(hear, told[number])
    events = scene(turn, 3)
    assert {event["state"] for event in events} == {"over"}
    assert len(scene(jobs)) == 1
    assert ["Published: there" in said for said in scene.said(repo)] == [False, True]


def test_one_merge_at_a_time_for_a_repo(scene: Scene, repo: str) -> None:
    """Two commits that come while one is merged are one merge after it; a comment's waits too, and is told so once."""
    scene(hear, scene.push(repo, OLD))
    scene(turn)
    for recipe in (MIDDLE, NEW):
        scene(hear, scene.push(repo, recipe))
    _, asked = scene.comment("alice", repo, asking("merge"))
    scene(hear, asked)
    scene(turn, 3)
    assert [job["recipe"] for job in scene(jobs)] == [OLD]
    waiting = [said for said in scene.said(repo) if "is under way" in said]
    assert len(waiting) == 1
    scene(end, "done")
    scene(turn, 2)
    assert [job["recipe"] for job in scene(jobs)] == [OLD, NEW]
    scene(end, "done")
    scene(turn, 2)
    scene(end, "done")
    assert {event["state"] for event in scene(turn)} == {"over"}
    assert [job["recipe"] for job in scene(jobs)] == [OLD, NEW, RECIPE]


def test_a_commit_that_leaves_merge_yaml_alone_events_for_nothing(scene: Scene, repo: str) -> None:
    """Also where nobody has ever told of the file that lies there."""
    scene.push(repo, OLD)
    scene(hear, scene.push(repo, "", notes_txt="mine"))
    assert [event["state"] for event in scene(turn, 2)] == ["over"]
    assert (scene(jobs), scene.said(repo)) == ([], [])


def test_what_the_queue_has_no_room_for_is_tried_again(scene: Scene, repo: str) -> None:
    """It is said once that it waits."""
    for number in range(Limits.jobs_each):
        other = f"{repo}-{number}"
        scene.hub.add_model(other, {"README.md": b"mine\n"})
        scene(hear, scene.push(other, RECIPE))
    scene(turn)
    scene(hear, scene.push(repo, RECIPE))
    for _ in range(2):
        assert scene(turn)[-1]["state"] == "waits"
        scene(tired)
    assert len(scene.said(repo)) == 1
    assert "is the limit" in scene.said(repo)[0]
    scene(end, "done")
    assert scene(turn)[-1]["state"] == "job"
    scene(end, "done")
    scene(turn)
    assert "Published: there" in scene.said(repo)[-1]


# What is not as it should be


Spoil = Callable[[Any], Any]


def without_authors(found: Any) -> Any:
    return [commit | {"authors": []} for commit in found]


def test_a_commit_without_authors_is_the_owners(scene: Scene, repo: str) -> None:
    """Who may not write there has none on main."""
    scene.hub.fail(lambda request: "/commits/" in request.path, spoil=_spoilt(without_authors), times=9)
    scene(hear, scene.push(repo, RECIPE))
    assert [event["state"] for event in scene(turn)] == ["job"]
    assert [job["owner"] for job in scene(jobs)] == ["@alice"]


def test_a_failed_job_is_told_though_its_beginning_could_not_be(scene: Scene, repo: str) -> None:
    """A discussion is opened for it if there is none yet."""
    scene.hub.fail(lambda request: request.method == "POST" and request.path.endswith("/discussions"), times=1)
    scene(hear, scene.push(repo, RECIPE))
    scene(turn)
    assert scene.said(repo) == []
    scene(end, "failed", "the disk is full")
    scene(turn)
    (said,) = scene.said(repo)
    assert "The merge has failed" in said
    assert "the disk is full" in said


def test_a_hub_that_refuses_for_long_is_told_of(scene: Scene, repo: str) -> None:
    """Once it is known that it asks us; the step is taken some times before."""
    scene.hub.fail(lambda request: "/zoo" in request.path or "/revision/main" in request.path, times=99)
    scene(hear, scene.push(repo, RECIPE))
    assert [event["state"] for event in scene(turn, 12)] == ["over"]
    assert scene.said(repo) == []


def _spoilt(change: Spoil) -> Callable[[Answer], Answer]:
    def spoil(answer: Answer) -> Answer:
        assert isinstance(answer.body, bytes)
        headers = {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}
        return Answer(answer.status, headers, json.dumps(change(json.loads(answer.body))).encode())

    return spoil


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within a value of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


GONE = object()
ODD: list[Any] = [GONE, None, 0, -1, 10**30, 1.5, True, "", "x", "\x00\ud800", [], [None], {}, {"x": []}, [["x"]]]


def changed(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    """The value with something else, or nothing, at a place."""
    if not path:
        return None if odd is GONE else odd
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if odd is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = odd
    return found


ANSWERS = {
    "the comment's discussion": r"/discussions/\d+$",
    "main": r"/api/models/alice/[^/]+/revision/main$",
    "merge.yaml": r"/paths-info/",
    "the commits": r"/commits/",
    "the discussion that is opened": r"/discussions$",
    "the members": r"/organizations/",
}


@pytest.mark.parametrize("pattern", ANSWERS.values(), ids=ANSWERS.keys())
@settings(max_examples=40 if THOROUGH else 4, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_odd_answer_of_the_hubs_ends_in_a_state_and_what_asks_us_in_words(
    pattern: str, served: LoopbackHub, child: Client, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any field of it may be missing, or be something else; nothing is left open, and the bot goes on."""
    scene = Scene(served, child)
    scene(begin, str(tmp_path_factory.mktemp("bot")))
    repo = f"alice/odd{len(served.world.repos)}"
    served.add_model(repo, {"README.md": b"mine\n"})
    told = scene.push(repo, RECIPE)
    _, asked = scene.comment("eve" if "organ" in pattern else "alice", repo, asking("merge"))
    odd = data.draw(st.sampled_from(range(len(ODD))))
    number = data.draw(st.integers(0, 10**6))

    def spoil(found: Any) -> Any:
        ways = list(places(found))
        return changed(found, ways[number % len(ways)], ODD[odd])

    served.fail(lambda request: bool(re.search(pattern, request.path)), spoil=_spoilt(spoil), times=999)
    try:
        for each in (told, asked):
            assert scene(hear, each)[0] == 200
        scene(turn, 13)
    finally:
        served.clear_faults()
    for _ in range(3):
        scene(end, "failed", "for a reason")
        scene(tired)
        scene(turn, 3)
    events = scene(turn)
    assert {event["state"] for event in events} == {"over"}
    if any(event["is_meant"] for event in events):
        assert scene.said(repo)


BODIES = st.one_of(
    st.binary(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    ).map(lambda value: json.dumps(value).encode()),
)
WHOLE = [
    commented(NOW["repo"], 7, "0" * 16, "@mergebot plan"),
    payload(
        NOW["repo"],
        "repo.content",
        "update",
        updatedRefs=[{"ref": "refs/heads/main", "oldSha": "0" * 40, "newSha": NOW["sha"]}],
    ),
]


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Bot:
    """A bot in this process."""
    return Bot(Service(MergeQueue(tmp_path_factory.mktemp("listening"), Limits())), TOKEN, SECRET)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_webhook_has_a_status(listening: Bot, data: st.DataObject) -> None:
    """Whatever it holds; what is noted of it is a repo's name and what may stand in an address."""
    body = data.draw(BODIES)
    if data.draw(st.booleans()):
        whole = data.draw(st.sampled_from(WHOLE))
        way = data.draw(st.sampled_from(list(places(whole))))
        body = json.dumps(changed(whole, way, data.draw(st.sampled_from(ODD)))).encode()
    status, told = listening.hear(body)
    assert (status, list(told)) in [(200, ["state"]), (400, ["error"])]
    for event in listening._events.open()[-1:]:
        assert re.fullmatch(r"[\w./-]+(/\d{1,10}/[\w-]{1,64}|@[0-9a-f]{40})", event.key, re.ASCII), event
        assert re.fullmatch(r"([0-9a-f]{40})?", event.old), event


@pytest.mark.parametrize("whole", WHOLE)
def test_a_whole_webhook_is_heard(whole: dict[str, Any], listening: Bot) -> None:
    """So that what is changed above was something."""
    assert listening.hear(json.dumps(whole).encode())[1]["state"] in ("heard", "known already")
