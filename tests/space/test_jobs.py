"""The queue of the Space and its workers: real processes that run real merges against the loopback Hub.

Not here: the page and a killed Space (test_page), and twenty users at once (test_api).
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tiny
import vocabularies
import waiting
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import LoopbackHub, Request
from served import halted, staged
from test_searches import SEARCHED, TEXTS
from thorough import thorough_only
from waiting import HANGS_SECONDS

from merger.run.options import Options
from merger.run.pipeline import merge
from merger.run.prepare import parse_text, plan, read_recipe
from space.hub import _reach
from space.work.admission import Limits
from space.work.forkserver import ForkServer
from space.work.job_table import OVER, How, JobError, QueuedMerge, Reach
from space.work.queue import MergeQueue, Token, _outcome

ALICE, BOB = Token("hf_alice_secret"), Token("hf_bob_secret")
RECIPE = tiny.TIES_RECIPE.format(base="org/base", one="org/one", two="org/two")
SMALL = Limits(shard_size=3_000)
MakeQueue = Callable[..., MergeQueue]


@pytest.fixture(scope="module")
def parents(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two others on the Hub; the users alice and bob."""
    root = tmp_path_factory.mktemp("parents")
    made = tiny.models(root, "base", "one", "two")
    for name, folder in made.items():
        served.add_model(f"org/{name}", folder)
    served.add_user("alice", ALICE.value)
    served.add_user("bob", BOB.value)
    return made


class SharedForkServer(ForkServer):
    """One fork server after another takes longer than all these merges: this one outlives who closes it."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def forkserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """For all queues of this file; it begins with the environment of the first."""
    shared = SharedForkServer(tmp_path_factory.mktemp("forkserver"))
    yield shared
    ForkServer.close(shared)


@pytest.fixture
def make_queue(
    parents: dict[str, Path], hub: LoopbackHub, forkserver: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeQueue]:
    """Makes a queue in the test's folder, with its workers at work."""
    for name, value in hub.env(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_space_itself")
    made: list[MergeQueue] = []

    def make(limits: Limits = SMALL, start: bool = True) -> MergeQueue:
        made.append(MergeQueue(tmp_path / "data", limits, forkserver))
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.stop()


def submit(queue: MergeQueue, owner: str, name: str, token: Token | None = None) -> QueuedMerge:
    token = token or {"alice": ALICE, "bob": BOB}[owner]
    return queue.submit(owner, token, RECIPE, f"hf://{owner}/{name}", {}, 30_000)


def until(queue: MergeQueue, job: QueuedMerge, *states: str) -> QueuedMerge:
    """The job once it is in one of the states; any that is over ends the waiting."""
    now = waiting.until(lambda: (each := queue.job(job.owner, job.id)).state in states + OVER and each)
    assert isinstance(now, QueuedMerge)
    assert now.state in states, now
    return now


def only_worker(queue: MergeQueue) -> int:
    """The one process that is at work."""
    pid = waiting.until(lambda: queue._workers._forkserver._process).pid
    those = Path(f"/proc/{pid}/task/{pid}/children")
    return int(waiting.until(lambda: len(found := those.read_text().split()) == 1 and found[0]))


def is_gone(pid: int) -> bool:
    """That a process ends."""
    return waiting.until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_job_publishes_what_a_run_makes(
    make_queue: MakeQueue, hub: LoopbackHub, parents: dict[str, Path], tmp_path: Path
) -> None:
    """The published bytes are those of a run of the same recipe on folders, and the job tells of it."""
    queue = make_queue(Limits())
    job = until(queue, submit(queue, "alice", "whole"), "done")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(tiny.TIES_RECIPE.format(**parents))
    options = Options(to=str(tmp_path / "out"))
    last = merge(*plan(read_recipe(recipe), options), options)
    assert hub.tree("alice/whole")["model.safetensors"].sha256 == last.shards[0].sha256
    assert job.where == f"{hub.url}/alice/whole"
    assert job.commit == hub.head("alice/whole")
    assert job.made == job.total == 30_000
    assert any(line.startswith("made model.safetensors") for line in job.log)
    assert hub.commits("alice/whole")[0].author == "alice"


def test_the_commits_of_the_plan_are_merged(make_queue: MakeQueue, hub: LoopbackHub, parents: dict[str, Path]) -> None:
    """A model that changes between plan and turn is merged as it was planned."""
    commit = hub.head("org/two")
    queue = make_queue(start=False)
    job = queue.submit("alice", ALICE, RECIPE, "hf://alice/pinned", {"org/two": commit}, 30_000)
    hub.commit("org/two", {"model.safetensors": parents["base"] / "model.safetensors"})
    queue.start()
    until(queue, job, "done")
    assert f"commit: {commit}" in hub.read("alice/pinned", "merger.lock.yaml").decode()
    hub.commit("org/two", {"model.safetensors": parents["two"] / "model.safetensors"})


def test_users_take_turns(make_queue: MakeQueue) -> None:
    """Who asks for three merges waits for those who ask for one, and everybody is told how many come before."""
    queue = make_queue(start=False)
    jobs = [submit(queue, "alice", f"turn{number}") for number in range(3)] + [submit(queue, "bob", "turn")]
    assert [queue.ahead(queue.job(job.owner, job.id)) for job in jobs] == [0, 2, 3, 1]
    queue.start()
    ended = [until(queue, job, "done") for job in jobs]
    assert [job.to for job in sorted(ended, key=lambda job: job.started)] == [
        "hf://alice/turn0", "hf://bob/turn", "hf://alice/turn1", "hf://alice/turn2"
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(owners=st.lists(st.sampled_from("abc"), min_size=1, max_size=9), data=st.data())
def test_a_round_has_one_job_of_each_owner(owners: list[str], data: st.DataObject) -> None:
    """First the first jobs of all, by age, then the second ones, as they are told; who comes late is in the round."""
    begun = data.draw(st.integers(0, len(owners)))
    rounds = [owners[:number].count(owner) for number, owner in enumerate(owners)]
    with TemporaryDirectory() as folder:
        queue = MergeQueue(Path(folder), Limits(jobs_each=9))
        jobs = [submit(queue, owner, f"{number}", ALICE) for number, owner in enumerate(owners)]
        told = {queue.ahead(job): job.id for job in jobs}
        turns = [queue._next_turn()[0].id for _ in range(begun)]
        late = submit(queue, "late", "x", ALICE)
        assert queue.ahead(late) >= begun
        turns += [queue._next_turn()[0].id for _ in range(len(jobs) + 1 - begun)]
        queue.stop()
    now = sorted(rounds)[begun - 1] if begun else 0
    in_order = sorted(zip([*rounds, now], [*jobs, late], strict=True), key=lambda pair: pair[0])
    assert turns == [job.id for _, job in in_order]
    assert [id for id in turns if id != late.id] == [told[place] for place in range(len(jobs))]
    assert queue._next_turn() is None


def test_a_job_that_cannot_be_begun_fails_and_the_next_one_goes_on(make_queue: MakeQueue) -> None:
    """Whatever goes wrong beside its worker ends that job alone, and it says so."""
    queue = make_queue(start=False)
    jobs = [submit(queue, "alice", name) for name in ("unlucky", "lucky")]
    (queue._workers._folder / jobs[0].id).write_bytes(b"in the way of its folder")
    queue.start()
    assert "ended without a word" in until(queue, jobs[0], "failed").problems[0]
    until(queue, jobs[1], "done")


def test_a_stopped_space_goes_on_once_the_owner_is_back(make_queue: MakeQueue, hub: LoopbackHub) -> None:
    """After a restart the job is there and waits; with its owner it goes on from the staging branch."""
    reached, go = threading.Event(), threading.Event()
    seen: list[Request] = []

    def third(request: Request) -> bool:
        seen.extend([request] if staged(request) else [])
        return len(seen) == 3 and bool(reached.set() or True)

    hub.fail(third, status=None, stall=go)
    first = make_queue()
    job = submit(first, "alice", "later")
    assert reached.wait(HANGS_SECONDS)
    first.stop()
    go.set()
    kept = [
        name for branch in hub.branches("alice/later") if branch != "main" for name in hub.tree("alice/later", branch)
    ]
    assert any(name.endswith(".safetensors") for name in kept)
    hub.clear_log()
    second = make_queue()
    assert until(second, job, "waiting").owner == "alice"
    until(second, submit(second, "bob", "meanwhile"), "done")
    assert second.job("alice", job.id).state == "waiting"
    hub.clear_log()
    second.register_token("alice", ALICE)
    ended = until(second, job, "done")
    assert ended.kept > 0
    made = [name for name in hub.tree("alice/later") if name.endswith(".safetensors")]
    assert 0 < len([request for request in hub.log if staged(request)]) < len(made)


def test_cancelling(make_queue: MakeQueue, hub: LoopbackHub) -> None:
    """A job that waits its turn is cancelled at once, one at work ends within a moment; main stays as it was."""
    reached, go = halted(hub)
    queue = make_queue()
    running = submit(queue, "alice", "stopped")
    queued = submit(queue, "alice", "never")
    assert reached.wait(HANGS_SECONDS)
    assert queue.cancel("alice", queued.id).state == "cancelled"
    pid = only_worker(queue)
    assert queue.cancel("alice", running.id).state == "cancelled"
    assert is_gone(pid)
    go.set()
    assert [commit.title for commit in hub.commits("alice/stopped")] == ["initial commit"]
    assert not hub.exists("alice/never")
    assert until(queue, submit(queue, "alice", "next"), "done")


def test_a_job_that_is_cancelled_while_its_worker_begins_makes_nothing(make_queue: MakeQueue, hub: LoopbackHub) -> None:
    """Between its turn and its worker there is nobody to be ended yet: the worker is, as soon as it is there."""
    queue = make_queue(start=False)
    job = submit(queue, "alice", "sudden")
    fork = queue._workers._forkserver.fork

    def cancel_first(folder: Path) -> socket.socket:
        queue.cancel("alice", job.id)
        return fork(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue._workers._forkserver, "fork", cancel_first)
        queue.start()
        waiting.until(lambda: queue.job("alice", job.id).is_over)
    until(queue, submit(queue, "alice", "next"), "done")
    assert not hub.exists("alice/sudden")


def test_another_users_job(make_queue: MakeQueue) -> None:
    """Another user's job can be neither seen nor cancelled, in the words for a job that is not there."""
    queue = make_queue(start=False)
    job = submit(queue, "alice", "mine")
    for ask in (queue.job, queue.cancel):
        for id in (job.id, "x"):
            with pytest.raises(JobError, match=f"you have no job '{id}'\n    your jobs are listed"):
                ask("bob", id)
    assert queue.job("alice", job.id).state == "queued"


def test_limits_of_the_queue(make_queue: MakeQueue) -> None:
    """A user may have so many jobs that are not over, one for each destination; the queue holds so many in all."""
    queue = make_queue(Limits(jobs_each=2, jobs=3), start=False)
    first = submit(queue, "alice", "a")
    with pytest.raises(JobError, match="hf://alice/a is not over yet"):
        submit(queue, "alice", "a")
    submit(queue, "alice", "b")
    with pytest.raises(JobError, match="you have 2 jobs that are not over, and 2 is the limit"):
        submit(queue, "alice", "c")
    submit(queue, "bob", "a")
    with pytest.raises(JobError, match="the queue of this Space is full"):
        submit(queue, "bob", "b")
    queue.cancel("alice", first.id)
    assert submit(queue, "alice", "c").state == "queued"


def test_a_refusal_is_told(make_queue: MakeQueue) -> None:
    """What a run refuses stands in the job, word by word."""
    queue = make_queue()
    job = queue.submit("alice", ALICE, RECIPE.replace("org/two", "org/gone"), "hf://alice/refused", {}, 1)
    job = until(queue, job, "failed")
    assert "there is no model org/gone on the Hub that we may read" in job.problems[0]


def test_no_token_is_kept(make_queue: MakeQueue, hub: LoopbackHub, tmp_path: Path) -> None:
    """A token is in no file, in no argument and in no environment; when its owner's jobs are over it is forgotten."""
    reached, go = halted(hub)
    queue = make_queue()
    job = submit(queue, "alice", "secret")
    assert reached.wait(HANGS_SECONDS)
    process = Path(f"/proc/{only_worker(queue)}")
    told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    files = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert queue._tokens == {job.id: ALICE}
    assert not any(secret in text for text in (told, *files) for secret in (b"hf_alice_secret", b"hf_of_the_space"))
    assert b"alice/secret" in b"".join(files)
    go.set()
    until(queue, job, "done")
    waiting.until(lambda: queue._tokens == {})
    assert "hf_alice" not in repr(ALICE)


def test_a_fork_server_that_is_killed(make_queue: MakeQueue) -> None:
    """When the process that forks the workers is killed, the next job has a new one."""
    queue = make_queue()
    until(queue, submit(queue, "alice", "before"), "done")
    assert queue._workers._forkserver._process is not None
    queue._workers._forkserver._process.kill()
    until(queue, submit(queue, "alice", "after"), "done")


def test_a_worker_that_is_killed(make_queue: MakeQueue, hub: LoopbackHub) -> None:
    """A worker that ends without a word, for want of memory say, leaves a job that has failed and says so."""
    reached, go = halted(hub)
    queue = make_queue()
    job = submit(queue, "alice", "starved")
    assert reached.wait(HANGS_SECONDS)
    os.kill(only_worker(queue), signal.SIGKILL)
    go.set()
    assert "ended without a word" in until(queue, job, "failed").problems[0]


def test_a_token_that_ends(make_queue: MakeQueue) -> None:
    """A job is not begun with a token that ends in a moment: it waits for its owner to sign in again."""
    queue = make_queue()
    job = submit(queue, "alice", "late", Token(ALICE.value, time.time() + 5))
    until(queue, job, "waiting")
    queue.register_token("alice", ALICE)
    until(queue, job, "done")


PUBLISHED = {"where": "there", "commit": "c0ffee", "is_new": True, "card": "", "doubts": ["odd"]}
OUTCOMES: list[tuple[Token, dict[str, Any], dict[str, Any]]] = [
    # the token, what the worker told, and some of what the job is then
    (ALICE, PUBLISHED, {"state": "done", "made": 9, "log": ("warning: odd",), "commit": "c0ffee"}),
    (Token("hf_past", 1.0), PUBLISHED, {"state": "done", "where": "there"}),
    (ALICE, {"failed": ["for a reason"]}, {"state": "failed", "problems": ("for a reason",)}),
    (ALICE, {}, {"state": "failed"}),
    (Token("hf_past", 1.0), {"failed": ["the Hub refused"]}, {"state": "waiting"}),
]


@pytest.mark.parametrize(("token", "told", "then"), OUTCOMES)
def test_what_becomes_of_a_job(token: Token, told: dict[str, Any], then: dict[str, Any]) -> None:
    """What its worker told decides, and where that is no result, whether its token ended meanwhile."""
    outcome = _outcome(QueuedMerge("a", "alice", RECIPE, "hf://alice/a", {}, 9), token, told)
    assert {name: outcome[name] for name in then} == then
    assert ("ended" in outcome) is (outcome["state"] in OVER)


def test_old_jobs_go(make_queue: MakeQueue) -> None:
    """Of one owner's jobs that are over the last twenty are kept, also on disk."""
    queue = make_queue(start=False)
    jobs = [queue.cancel("alice", submit(queue, "alice", f"old{number}").id) for number in range(25)]
    assert [job.id for job in queue.jobs.of("alice")] == [job.id for job in jobs[5:]]
    again = make_queue(start=False)
    assert again.jobs.of("alice") == queue.jobs.of("alice")


def test_a_worker_ends_with_its_queue(make_queue: MakeQueue, hub: LoopbackHub) -> None:
    """When the queue's end of its socket is gone, by a kill say, a worker is gone."""
    reached, go = halted(hub)
    queue = make_queue()
    job = submit(queue, "alice", "orphan")
    assert reached.wait(HANGS_SECONDS)
    pid = only_worker(queue)
    queue._workers._at_work[job.id].shutdown(socket.SHUT_WR)
    assert is_gone(pid)
    go.set()


def test_a_worker_ends_with_a_queue_that_never_listened(
    make_queue: MakeQueue, hub: LoopbackHub, tmp_path: Path
) -> None:
    """A queue that is killed before it has read all it was told leaves no end of a text, but a broken connection."""
    reached, go = halted(hub)
    queue = make_queue(start=False)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    asked = {"to": "hf://alice/unheard", "token": ALICE.value, **vars(How()), **queue.limits.for_a_job()}
    ours = queue._workers._forkserver.fork(tmp_path)
    ours.sendall(json.dumps(asked).encode() + b"\n")
    assert reached.wait(HANGS_SECONDS)
    pid = only_worker(queue)
    assert ours.recv(1, socket.MSG_PEEK)
    ours.close()
    assert is_gone(pid)
    go.set()


LATER = 9e9
READS, SOME = Token("hf_reads", reach=Reach.READS), Token("hf_some", reach=Reach.SOME)
SHORT, LONG, FORGOTTEN = Token("hf_short", LATER - 1), Token("hf_long", LATER), Token("hf_past", 1.0)
TAKEN = [
    # what the job has, what its owner comes with, what it has then
    (ALICE, READS, ALICE),
    (ALICE, SOME, ALICE),
    (ALICE, LONG, ALICE),
    (ALICE, Token("hf_other"), ALICE),
    (SHORT, LONG, LONG),
    (LONG, SHORT, LONG),
    (SHORT, SOME, SHORT),
    (SHORT, READS, SHORT),
    (SOME, ALICE, SOME),
    (FORGOTTEN, SHORT, SHORT),
    (FORGOTTEN, SOME, SOME),
    (FORGOTTEN, READS, FORGOTTEN),
    (FORGOTTEN, Token("hf_past", 2.0), FORGOTTEN),
]


@pytest.mark.parametrize(("has", "comes", "then"), TAKEN)
def test_a_better_token_stays(make_queue: MakeQueue, has: Token, comes: Token, then: Token) -> None:
    """A job's token gives way to one that may write as much and lasts longer, or where it is good no more."""
    queue = make_queue(start=False)
    job = submit(queue, "alice", "kept", has)
    queue.register_token("alice", comes)
    assert queue._tokens == {job.id: then}


def test_each_job_has_its_own_token(make_queue: MakeQueue) -> None:
    """A second merge brings a second token, which is not the first one's; each is forgotten with its job."""
    queue = make_queue(start=False)
    first = submit(queue, "alice", "first", LONG)
    second = submit(queue, "alice", "second", SHORT)
    assert queue._tokens == {first.id: LONG, second.id: SHORT}
    queue.cancel("alice", first.id)
    assert queue._tokens == {second.id: SHORT}


def test_a_token_that_only_reads_begins_nothing(make_queue: MakeQueue) -> None:
    """It is refused before anything is queued, and a job that waits for its owner goes on waiting."""
    queue = make_queue(start=False)
    with pytest.raises(JobError, match="this token only reads\n    send one that may write"):
        submit(queue, "alice", "read", READS)
    assert queue.jobs.of("alice") == []
    job = submit(queue, "alice", "written", FORGOTTEN)
    queue.start()
    until(queue, job, "waiting")
    queue.register_token("alice", READS)
    assert queue.job("alice", job.id).state == "waiting"
    queue.register_token("alice", ALICE)
    until(queue, job, "done")


FINE = {"role": "fineGrained", "fineGrained": {"global": ["discussion.write"], "scoped": []}}
NARROW = {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "a"}, "permissions": ["repo.write"]}]}}
READING = {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {}, "permissions": ["repo.content.read"]}]}}


@pytest.mark.parametrize(("said", "reach"), [
    ({"role": "write"}, Reach.ALL), ({}, Reach.ALL), ({"role": "read"}, Reach.READS), (FINE, Reach.SOME),
    (NARROW, Reach.SOME), (READING, Reach.READS), ({"role": "fineGrained"}, Reach.READS),
])  # fmt: skip
def test_what_a_token_may_write(said: dict[str, Any], reach: Reach) -> None:
    """As the Hub says it; an app's token has no role there."""
    assert _reach(said) == reach


@thorough_only
def test_a_search_finds_numbers_within_its_minutes(
    make_queue: MakeQueue, hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Best recipe, picture and comparison come back, and nothing is published; one without time ends."""
    root = tmp_path_factory.mktemp("searched")
    for seed, name in enumerate(("w-base", "w-one", "w-two")):
        hub.add_model(f"org/{name}", vocabularies.model(root / name, seed))
    text = SEARCHED.replace("org/", "org/w-")
    queue = make_queue(Limits())
    job = until(queue, queue.submit("alice", ALICE, text, "", {}, 4, texts=TEXTS), "done")
    assert (job.made, job.texts, job.where) == (4, {}, "")
    assert base64.b64decode(job.picture).startswith(b"\x89PNG")
    assert parse_text(job.found, "found").search is None
    assert "# mine" in job.found
    assert "than the recipe before the search" in job.outcome["told"]
    assert len(job.outcome["table"].splitlines()) == 5
    assert not any("/commit" in request.path for request in hub.log)
    queue.stop()
    short = make_queue(Limits(minutes=0))
    job = until(short, short.submit("alice", ALICE, text, "", {}, 4, texts=TEXTS), "failed")
    assert any("the minutes" in problem or "could be used" in problem for problem in job.problems), job.problems


@thorough_only
def test_a_search_goes_on_where_the_space_was_stopped(
    make_queue: MakeQueue, hub: LoopbackHub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With its owner back it tries what is left, tells the best so far at once, and leaves nothing of its study."""
    root = tmp_path_factory.mktemp("searched")
    for seed, name in enumerate(("g-base", "g-one", "g-two")):
        hub.add_model(f"org/{name}", vocabularies.model(root / name, seed))
    text = SEARCHED.replace("org/", "org/g-").replace("trials: 4", "trials: 16\n  prune: false")
    queue = make_queue(Limits())
    job = queue.submit("alice", ALICE, text, "", {}, 16, texts=TEXTS)
    waiting.until(lambda: queue.job("alice", job.id).made >= 3, str)
    queue.stop()
    (study,) = tmp_path.rglob("studies/*.log")
    queue = make_queue(Limits())
    assert queue.job("alice", job.id).state == "waiting"
    queue.register_token("alice", ALICE)
    job = until(queue, job, "done")
    kept = int(re.findall(r"goes on behind (\d+) trials", "\n".join(job.log))[0])
    assert 3 <= kept < 16
    assert (job.made, job.kept) == (16, kept)
    assert [line.split(",")[0] for line in job.outcome["table"].splitlines()[1:]] == [str(each) for each in range(16)]
    assert list(job.outcome["importance"]) == ["models[org/g-one].weight"]
    waiting.until(lambda: not study.exists(), str)
