"""Publishing on the Hub: shards by a staging branch, one commit on main, and main untouched whatever goes wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from calls import READER, WRITER
from loopback import Client, ClientError, LoopbackHub, Request
from loopback.wire import Answer
from waiting import HANGS_SECONDS, until

from merger.models.formats.safetensors import WrittenShard
from merger.safety.numbers import size as told_size

IDENTITY = "0123456789abcdef" * 4
BRANCH, TITLE = "merge-staging/0123456789abcdef", "Merge of a, b [0123456789abcdef]"
SHARDS = {"model-00001-of-00002.safetensors": b"first" * 400, "model-00002-of-00002.safetensors": b"second" * 400}
CARD = b"---\nlicense: mit\n---\n# merged\n"
OUTPUT = [
    {"file": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in SHARDS.items()
]
LOCK = f"plan: {IDENTITY}\nidentity: {IDENTITY}\noutput: {json.dumps(OUTPUT)}\n".encode()
FILES = {
    "README.md": CARD,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "config.json": b'{"new": true}',
    "merger.lock.yaml": LOCK,
    "recipe.yaml": b"merge_method: linear\n",
}
NAMES = count()


@pytest.fixture
def repo() -> str:
    """A name that no other test uses."""
    return f"org/merge-{next(NAMES)}"


@pytest.fixture(scope="module")
def client(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A child whose client has Xet, though the Hub has none."""
    with Client({**served.env(tmp_path_factory.mktemp("home"), WRITER), "HF_HUB_DISABLE_XET": "0"}) as child:
        yield child


# What the child runs


def publish(repo: str, files: dict[str, bytes] | None = None, upto: str = "finish", **options: Any) -> tuple[str, Any]:
    """The line's calls up to one of them, without a pause; what failed is abandoned, as in a run."""
    return paused(repo, files, upto, **options)[0]


def paused(
    repo: str, files: dict[str, bytes] | None = None, upto: str = "finish", **options: Any
) -> tuple[tuple[str, Any], list[float]]:
    """The same, and the pauses that it would have made."""
    pauses: list[float] = []
    with patch("time.sleep", pauses.append):
        return _published(repo, files, upto, **options), pauses


def _published(repo: str, files: dict[str, bytes] | None, upto: str, **options: Any) -> tuple[str, Any]:
    from merger.stores.hub.staging import HubRepo
    from merger.stores.ports import Published

    place, wanted = HubRepo(repo, **options), FILES if files is None else files
    session = place.open(IDENTITY)
    if isinstance(session, Published):
        return session.where, session.commit
    try:
        place.check_card(wanted["README.md"].decode())
        session.reserve(1)
        for name, data in SHARDS.items() if upto != "prepare" else ():
            with session.open(name) as file:
                file.write(data)
            session.take(WrittenShard(name, len(data), hashlib.sha256(data).hexdigest()), "seen")
        if upto != "finish":
            session._uploads.settle()
            return "", sorted(path.name for path in session._uploads._scratch.folder().glob("*.safetensors"))
        done = session.finish(wanted, "Merge of a, b")
        return done.where, done.commit
    finally:
        folder = session._uploads._scratch._folder
        session.leave()
        assert folder is None or not folder.exists()


def publish_with(repo: str, options: dict[str, Any]) -> tuple[str, Any]:
    return publish(repo, **options)


def publish_on_a_full_disk(repo: str) -> None:
    usage = SimpleNamespace(free=0)
    with patch("merger.stores.hub.staging.shutil.disk_usage", lambda path: usage):
        publish(repo)


@pytest.fixture
def refused(client: Client) -> Callable[..., str]:
    """Publish, and return the sentence of the refusal that must follow."""

    def call(*arguments: Any, kind: str = "UploadError") -> str:
        with pytest.raises(ClientError) as refusal:
            client(*arguments)
        assert kind in refusal.value.kinds, str(refusal.value)
        assert "hf_" not in str(refusal.value)
        assert "\n    " in str(refusal.value)  # there is a next step
        return str(refusal.value)

    return call


Refused = Callable[..., str]


def commits_to(branch: str) -> Callable[[Request], bool]:
    return lambda r: r.method == "POST" and r.path.endswith(f"/commit/{branch.replace('/', '%2F')}")


def uploads(hub: LoopbackHub) -> list[Request]:
    return [r for r in hub.log if r.method == "PUT"]


def deletes_of_branches(request: Request) -> bool:
    return request.method == "DELETE" and "/branch/" in request.path


# How it goes


def test_one_commit_on_main_made_of_copies(hub: LoopbackHub, client: Client, repo: str) -> None:
    """The shards go up once, to the branch; main sees one commit that copies them, and the branch is gone."""
    where, commit = client(publish, repo)
    assert (where, commit) == (f"{hub.url}/{repo}", hub.head(repo))
    assert [found.title for found in hub.commits(repo)] == [TITLE, "initial commit"]
    assert set(hub.commits(repo)[0].files) == {*SHARDS, *FILES}
    assert hub.files(repo) == {**SHARDS, **FILES, ".gitattributes": hub.read(repo, ".gitattributes")}
    assert sorted(r.received for r in uploads(hub)) == sorted(map(len, SHARDS.values()))
    assert list(hub.branches(repo)) == ["main"]


def test_a_shard_is_off_this_disk_once_it_is_on_the_branch(hub: LoopbackHub, client: Client, repo: str) -> None:
    """What is published in the end never needs to lie here all at once."""
    assert client(publish, repo, None, "take") == ("", [])
    staged = hub.files(repo, BRANCH)
    assert {name: staged[name] for name in SHARDS} == SHARDS
    assert hub.files(repo).keys() == {".gitattributes"}


def test_two_shards_travel_at_once_by_lfs(hub: LoopbackHub, client: Client, repo: str) -> None:
    """Each has arrived before the other one's answer goes out: with one at a time the first would wait for ever."""
    both = Barrier(2)

    def meet(answer: Answer) -> Answer:
        both.wait(HANGS_SECONDS)
        return answer

    fault = hub.fail(lambda r: r.method == "PUT", spoil=meet, times=2)
    client(publish, repo)
    assert (fault.left, both.broken) == (0, False)
    assert hub.files(repo).items() >= SHARDS.items()


def third_shard(repo: str) -> list[str]:
    """Which files lie here when a third shard can be opened at last."""
    from merger.stores.hub.staging import HubRepo

    session: Any = HubRepo(repo).open(IDENTITY)
    for name in ("one.safetensors", "two.safetensors"):
        with session.open(name) as file:
            file.write(name.encode())
        session.take(WrittenShard(name, len(name), hashlib.sha256(name.encode()).hexdigest()))
    session.open("three.safetensors").close()
    there = sorted(path.name for path in session._uploads._scratch.folder().glob("[!.]*"))
    session.leave()
    return there


def test_a_third_shard_waits_until_one_of_two_is_off_this_disk(hub: LoopbackHub, client: Client, repo: str) -> None:
    """However slow both uploads are, there are never more than two files here."""

    def slowly(answer: Answer) -> Answer:
        time.sleep(0.3)
        return answer

    fault = hub.fail(lambda r: r.method == "PUT", spoil=slowly, times=2)
    there = client(third_shard, repo)
    assert fault.left == 0
    assert "three.safetensors" in there
    assert len(there) <= 2


def test_what_is_staged_already_is_not_sent_again(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A run that was killed left its shards on the branch: the next one commits them without an upload."""
    client(publish, repo, None, "take")
    hub.clear_log()
    client(publish, repo)
    assert uploads(hub) == []
    assert [found.title for found in hub.commits(repo)] == [TITLE, "initial commit"]


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repo_is_as_private_as_the_recipe_says(
    hub: LoopbackHub, client: Client, repo: str, private: bool
) -> None:
    """From its first moment."""
    client(publish_with, repo, {"private": private})
    assert hub.world.repos[repo].private is private


def test_a_pull_request_in_place_of_a_commit(hub: LoopbackHub, client: Client, repo: str) -> None:
    """With create_pr main stays as it is and the whole model stands in one pull request."""
    hub.add_model(repo, {"README.md": b"# mine\n"})
    before = hub.head(repo)
    where, _ = client(publish_with, repo, {"create_pr": True})
    (pull,) = hub.discussions(repo)
    assert (where, pull.title, hub.head(repo)) == (f"{hub.url}/{repo}/discussions/{pull.num}", TITLE, before)
    assert hub.files(repo, f"refs/pr/{pull.num}") == {**SHARDS, **FILES}
    assert list(hub.branches(repo)) == ["main"]


def test_a_pull_request_says_what_it_is(hub: LoopbackHub, client: Client, repo: str) -> None:
    """Which plan, what lies beside the tensors, and how to look whether they are what they should be."""
    client(publish_with, repo, {"create_pr": True})
    said = words_of(hub, repo, 1)
    size = sum(map(len, SHARDS.values()))
    for words in (IDENTITY, f"2 files of tensors, {told_size(size)}", "`recipe.yaml`", "`merger.lock.yaml`",
                  f"merger verify hf://{repo}@refs/pr/N"):  # fmt: skip
        assert words in said


def words_of(hub: LoopbackHub, repo: str, number: int) -> str:
    """All comments on a pull request."""
    events: list[Any] = hub.discussions(repo)[number - 1].events
    return "\n".join(event["data"]["latest"]["raw"] for event in events if event["type"] == "comment")


# Whose pull request

STRANGE_LOCK = LOCK.replace(IDENTITY.encode(), b"f" * 64)
OTHERS: dict[str, tuple[str, dict[str, bytes]]] = {
    "a stranger's, empty": ("bob", {}),
    "a stranger's, with our lock": ("bob", {"merger.lock.yaml": LOCK}),
    "a stranger's copy of ours": ("bob", {**SHARDS, **FILES}),
    "ours, empty": ("alice", {}),
    "ours, without a shard": ("alice", {**FILES, next(iter(SHARDS)): SHARDS[next(iter(SHARDS))]}),
    "ours, with another shard": ("alice", {**SHARDS, **FILES, next(iter(SHARDS)): b"other"}),
    "ours, of another merge": ("alice", {**SHARDS, **FILES, "merger.lock.yaml": STRANGE_LOCK}),
    "ours, with what is no lock": ("alice", {**SHARDS, **FILES, "merger.lock.yaml": b"- [: {"}),
}
"""Pull requests under our title: who opened them, and what they bring."""


@pytest.mark.parametrize("theirs", OTHERS)
def test_what_only_looks_like_our_pull_request_is_not_taken_for_it(
    theirs: str, hub: LoopbackHub, client: Client, repo: str
) -> None:
    """Author and content count, not the title: the model is made and asked for all the same."""
    author, brought = OTHERS[theirs]
    hub.add_model(repo, {"README.md": b"# mine\n"})
    assert hub.ask(repo, author, TITLE, brought) == 1
    where, _ = client(publish_with, repo, {"create_pr": True})
    assert where == f"{hub.url}/{repo}/discussions/2"
    assert hub.files(repo, "refs/pr/2") == {**SHARDS, **FILES}
    assert [item.status for item in hub.discussions(repo)] == ["open", "open"]


@pytest.mark.parametrize("force", [False, True])
def test_what_was_asked_for_is_not_asked_for_twice(hub: LoopbackHub, client: Client, repo: str, force: bool) -> None:
    """Not by --force either: that is for another model on main."""
    hub.add_model(repo, OLD if force else {"README.md": b"# mine\n"})
    first = client(publish_with, repo, {"create_pr": True, "force": force})
    hub.clear_log()
    again = client(publish_with, repo, {"create_pr": True, "force": force})
    assert (again[0], len(hub.discussions(repo)), uploads(hub)) == (first[0], 1, [])
    assert list(hub.branches(repo)) == ["main"]


def merge_pull(repo: str, number: int) -> None:
    from huggingface_hub import HfApi

    HfApi().merge_pull_request(repo, number)


@pytest.mark.parametrize("create_pr", [True, False])
def test_what_was_merged_is_there_already(hub: LoopbackHub, client: Client, repo: str, create_pr: bool) -> None:
    """The same run finds its result on main, and names the commit that brought it."""
    client(publish_with, repo, {"create_pr": True})
    client(merge_pull, repo, 1)
    merged = hub.head(repo)
    hub.commit(repo, {"README.md": b"# by hand\n"}, "another card")
    assert client(publish_with, repo, {"create_pr": create_pr}) == (f"{hub.url}/{repo}", merged)
    assert len(hub.discussions(repo)) == 1


@pytest.fixture(scope="module")
def rival(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Another child, which runs the same merge."""
    with Client(served.env(tmp_path_factory.mktemp("rival"), WRITER)) as child:
        yield child


def looks_at_pulls(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith("/discussions")


def test_of_two_equal_requests_of_one_moment_the_later_is_taken_back(
    hub: LoopbackHub, client: Client, rival: Client, repo: str
) -> None:
    """Each run looked, saw nothing, and asked."""
    hub.add_model(repo, {"README.md": b"# mine\n"})
    looks = count()

    def meanwhile(answer: Answer) -> Answer:
        if next(looks) == 1:  # the look before the commit
            hub.fail(deletes_of_branches, status=403)
            with pytest.raises(ClientError, match="is made"):
                rival(publish_with, repo, {"create_pr": True})
        return answer

    hub.fail(looks_at_pulls, spoil=meanwhile, times=2)
    where, _ = client(publish_with, repo, {"create_pr": True})
    assert where == f"{hub.url}/{repo}/discussions/1"
    assert [item.status for item in hub.discussions(repo)] == ["open", "closed"]
    assert f"Equal to {where}" in words_of(hub, repo, 2)


# Two runs of one merge at the same time

QUOTED, LAST = BRANCH.replace("/", "%2F"), "shards are to be copied"
MOMENTS: dict[str, Callable[[Request], bool]] = {
    "the branch is looked at": lambda r: r.method == "GET" and r.path.endswith(f"/commits/{QUOTED}"),
    "a shard is announced": lambda r: r.path.endswith(f"/preupload/{QUOTED}"),
    "a shard is staged": lambda r: r.path.endswith(f"/commit/{QUOTED}"),
    LAST: lambda r: r.path.endswith(f"/paths-info/{QUOTED}"),
    "files are announced": lambda r: r.path.endswith("/preupload/main"),
}


# once shards are copied, the later pull request is made, and taken back
LOSSES = [
    (moment, create_pr) for moment in MOMENTS for create_pr in (False, True) if (moment, create_pr) != (LAST, True)
]


@pytest.mark.parametrize(("moment", "create_pr"), LOSSES)
def test_the_loser_of_two_runs_at_once_is_told_so(
    moment: str, create_pr: bool, hub: LoopbackHub, rival: Client, refused: Refused, repo: str
) -> None:
    """Not that its token may not write: the other one has made what it wanted to make."""

    def meanwhile(answer: Answer) -> Answer:
        rival(publish_with, repo, {"create_pr": create_pr})
        return answer

    fault = hub.fail(MOMENTS[moment], spoil=meanwhile)
    said = refused(publish_with, repo, {"create_pr": create_pr})
    where = f"{hub.url}/{repo}" + "/discussions/1" * create_pr
    assert f"another run of this merge was faster: {where} is made\n    nothing is left to do" in said
    assert (fault.left, len(hub.discussions(repo))) == (0, int(create_pr))


def test_a_staging_branch_that_went_away_is_told(hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """merger clean was called while a run was at work."""

    def meanwhile(answer: Answer) -> Answer:
        hub.world.repos[repo].unpoint(f"refs/heads/{BRANCH}")
        return answer

    hub.fail(MOMENTS["a shard is announced"], spoil=meanwhile)
    assert f"the branch {BRANCH} of {repo} is gone" in refused(publish, repo)


def publish_without_threads(repo: str) -> None:
    """Each thread's stack would be larger than the address space."""
    import threading

    from merger.runtime import tell_limits

    before = threading.stack_size(1 << 47)
    try:
        with tell_limits():
            publish(repo)
    finally:
        threading.stack_size(before)


def test_an_upload_whose_thread_cannot_start_is_told(hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """Nothing hangs, and main is as it was."""
    assert "can't start new thread" in refused(publish_without_threads, repo, kind="BudgetError")
    assert [found.title for found in hub.commits(repo)] == ["initial commit"]


# Repos of others


@pytest.fixture
def theirs(hub: LoopbackHub) -> str:
    """A repo that alice may not write to."""
    name = f"carol/theirs-{next(NAMES)}"
    hub.add_model(name, {"README.md": b"# mine\n", "chat_template.jinja": b"old"})
    return name


def test_who_may_not_write_may_ask(hub: LoopbackHub, client: Client, theirs: str) -> None:
    """The whole model stands in one pull request, a draft until all of it is there; main and branches are as before."""
    before = hub.head(theirs)
    where, _ = client(publish_with, theirs, {"create_pr": True})
    (pull,) = hub.discussions(theirs)
    assert (where, pull.title, pull.status) == (f"{hub.url}/{theirs}/discussions/1", TITLE, "open")
    assert hub.files(theirs, pull.ref) == {**SHARDS, **FILES}
    assert (hub.head(theirs), list(hub.branches(theirs))) == (before, ["main"])
    assert IDENTITY in words_of(hub, theirs, 1)
    hub.clear_log()
    assert client(publish_with, theirs, {"create_pr": True})[0] == where
    assert (uploads(hub), len(hub.discussions(theirs))) == ([], 1)


def left(repo: str, remove: bool = False) -> list[tuple[str, int]]:
    from merger.stores.hub.staging import HubRepo

    found = HubRepo(repo).leftovers()
    for leftover in found if remove else ():
        HubRepo(repo).clean(leftover)
    return [(leftover.where, leftover.shards) for leftover in found]


def test_a_run_goes_on_from_its_draft(hub: LoopbackHub, client: Client, theirs: str) -> None:
    """What was sent is not sent again, and there is one pull request in the end."""
    client(publish_with, theirs, {"create_pr": True, "upto": "take"})
    assert [item.status for item in hub.discussions(theirs)] == ["draft"]
    assert client(left, theirs) == [("refs/pr/1", 2)]
    hub.clear_log()
    client(publish_with, theirs, {"create_pr": True})
    assert (uploads(hub), [item.status for item in hub.discussions(theirs)]) == ([], ["open"])
    assert hub.files(theirs, "refs/pr/1") == {**SHARDS, **FILES}
    assert client(left, theirs) == []


def test_a_draft_that_is_given_up_is_closed(hub: LoopbackHub, client: Client, theirs: str) -> None:
    """As merger clean does."""
    client(publish_with, theirs, {"create_pr": True, "upto": "take"})
    assert client(left, theirs, True) == [("refs/pr/1", 2)]
    assert (client(left, theirs), [item.status for item in hub.discussions(theirs)]) == ([], ["closed"])


def test_who_may_only_read_is_told_what_it_takes_to_ask(refused: Refused, theirs: str) -> None:
    """And who does not ask for a pull request, that the token may not write."""
    said = refused(publish_with, theirs, {"create_pr": True, "token": READER})
    assert f"we may not open a pull request on {theirs}" in said
    assert f"we may not write to {theirs}" in refused(publish, theirs)


# Trusted publishing

_SESSION: list[Any] = []


def resume_as_publisher(repo: str, identity: str) -> None:
    """Go on from what an earlier run has staged, with a token for this repo alone."""
    from merger.stores.hub.staging import HubRepo
    from merger.stores.hub.store import trusted_publisher

    os.environ["HF_OIDC_ID_TOKEN"] = identity
    os.environ.pop("HF_TOKEN")
    trusted_publisher(repo)
    _SESSION[:] = [HubRepo(repo).open(IDENTITY)]


def end_an_hour_later(folder: str) -> list[str]:
    """All that a run reads and writes at its end."""
    from huggingface_hub.utils import _auth

    assert _auth._OIDC_TOKEN_CACHE is not None
    _auth._OIDC_TOKEN_CACHE["expires_at"] = 0.0
    (session,) = _SESSION
    notes = list(session.notes())
    session.export(Path(folder))
    session.finish(FILES, "Merge of a, b")
    return notes


def test_a_run_may_last_longer_than_its_token(hub: LoopbackHub, client: Client, repo: str, tmp_path: Path) -> None:
    """Every request is made with the token of its moment: none of the last ones with one that has expired."""
    client(publish, repo, None, "take")
    hub.trust(repo, "org/recipes")
    claims = json.dumps({"aud": hub.url, "repository": "org/recipes"}).encode()
    identity = f"e30.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.unsigned"
    with Client({**hub.env(tmp_path, WRITER)}) as job:
        job(resume_as_publisher, repo, identity)
        hub.expire_publishers()
        hub.clear_log()
        assert job(end_an_hour_later, str(tmp_path)) == ["seen"] * len(SHARDS)
    asked = [request for request in hub.log if request.host == "hub" and request.authorization]
    assert {request.user for request in asked} == {f"publisher of {repo}"}
    assert not [request for request in hub.log if request.status == 401]
    assert {name: (tmp_path / name).read_bytes() for name in SHARDS} == SHARDS
    assert hub.files(repo).items() >= {**SHARDS, **FILES}.items()


# What is refused before anything is sent


def test_a_token_that_may_not_write_is_refused_before_any_tensor(hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """A read token for a repo that is there, and for one that is not."""
    hub.add_model(repo, {"README.md": b"# mine\n"})
    for name in (repo, "org/brand-new"):
        said = refused(publish_with, name, {"token": READER, "upto": "prepare"})
        assert f"we may not write to {name}" in said
        assert "write access" in said
    assert not hub.exists("org/brand-new")
    assert list(hub.branches(repo)) == ["main"]


def test_an_unknown_token_is_refused(refused: Refused, repo: str) -> None:
    """The next step is HF_TOKEN."""
    said = refused(publish_with, repo, {"token": "hf_nobody", "upto": "prepare"})
    assert "the Hub does not know our token" in said
    assert "set HF_TOKEN" in said


OLD = {
    "config.json": b'{"old": true}', "model-00001-of-00003.safetensors": b"o" * 99, "pytorch_model.bin": b"pickled",
    "tokenizer.json": b'{"old": true}', "chat_template.jinja": b"old", "README.md": b"# old\n", "eval.md": b"a table",
}  # fmt: skip


def test_another_model_is_replaced_only_by_force_and_in_the_one_commit(
    hub: LoopbackHub, client: Client, refused: Refused, repo: str
) -> None:
    """Its shards, index and tokenizer go in the commit that brings ours; what is no part of a model stays."""
    hub.add_model(repo, OLD)
    before = hub.head(repo)
    said = refused(publish_with, repo, {"upto": "prepare"})
    assert f"{repo} already holds a model (config.json)" in said
    assert "--force" in said
    assert (hub.head(repo), list(hub.branches(repo))) == (before, ["main"])
    client(publish_with, repo, {"force": True})
    assert [found.title for found in hub.commits(repo)] == [TITLE, "initial commit"]
    assert hub.files(repo) == {**SHARDS, **FILES, "eval.md": b"a table"}


def test_a_repo_with_a_card_only_is_free(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A repo made by hand on the web, with a card and a picture, can be filled."""
    hub.add_model(repo, {"README.md": b"# mine\n", "tokenizer_config.json": b"{}", "logo.png": b"png"})
    client(publish, repo)
    assert hub.files(repo) == {**SHARDS, **FILES, "logo.png": b"png"}


def test_what_shall_be_private_is_not_put_into_a_public_repo(hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """A repo that is there already keeps its own visibility, so the recipe's wish would be lost in silence."""
    hub.add_model(repo, {"README.md": b"# mine\n"})
    assert "is there already and public" in refused(publish_with, repo, {"private": True, "upto": "prepare"})


@pytest.mark.parametrize("name", ["alone", "a/b/c", "org/", "org/na me", "datasets/org/name", "org/..", "org/name\n"])
def test_what_is_no_repos_name_is_refused_before_the_hub_is_asked(
    hub: LoopbackHub, refused: Refused, name: str
) -> None:
    """Else a repo of another name would be made."""
    assert "is no repo's name on the Hub\n    write it as its address" in refused(
        publish_with, name, {"upto": "prepare"}
    )
    assert [r for r in hub.log if r.path.startswith("/api/repos")] == []


def test_too_little_disk_is_refused_before_a_tensor_is_made(hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """With the numbers, and where to find more."""
    said = refused(publish_on_a_full_disk, repo, kind="BudgetError")
    assert "the work needs 1 B of disk, and 0 B are free" in said
    assert "TMPDIR" in said
    assert not uploads(hub)


# What goes wrong on the way


@pytest.mark.parametrize("status", [None, 500, 504], ids=["dropped", "500", "504"])
@pytest.mark.parametrize("pull", [False, True], ids=["commit", "pull request"])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: LoopbackHub, client: Client, repo: str, status: int | None, pull: bool
) -> None:
    """The history is looked at before anything is tried again, and what is found there is taken as the answer."""
    fault = hub.fail(commits_to("main"), status=status, after_handling=True)
    where, commit = client(publish_with, repo, {"create_pr": pull})
    assert fault.left == 0
    assert len([r for r in hub.log if commits_to("main")(r)]) == 1
    revision = "refs/pr/1" if pull else "main"
    assert [found.title for found in hub.commits(repo, revision)] == [TITLE, "initial commit"]
    assert (where, commit) == (f"{hub.url}/{repo}" + "/discussions/1" * pull, hub.head(repo, revision))
    assert len(hub.discussions(repo)) == int(pull)


@pytest.mark.parametrize("status", [None, 429, 503], ids=["dropped", "429", "503"])
@pytest.mark.parametrize("branch", ["main", BRANCH])
def test_a_commit_that_was_not_made_is_tried_again(
    hub: LoopbackHub, client: Client, repo: str, status: int | None, branch: str
) -> None:
    """One dropped connection does not throw away hours of work."""
    fault = hub.fail(commits_to(branch), status=status, times=2)
    client(publish, repo)
    assert fault.left == 0
    assert [found.title for found in hub.commits(repo)] == [TITLE, "initial commit"]
    assert hub.files(repo).items() >= {**SHARDS, **FILES}.items()


ENDPOINTS = {
    "create the repo": ("POST", r"/api/repos/create"),
    "look at the repo": ("GET", r"/api/models/[^/]+/[^/]+"),
    "look at a revision": ("GET", r"/api/models/.+/revision/.+"),
    "look at the history": ("GET", r"/api/models/.+/commits/.+"),
    "ask for Xet": ("GET", r"/api/models/.+/xet-write-token/.+"),
    "make the branch": ("POST", r"/api/models/.+/branch/.+"),
    "check the card": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", r"/api/models/.+/preupload/.+"),
    "ask where to upload": ("POST", r"/.+\.git/info/lfs/objects/batch"),
    "upload": ("PUT", r"/uploads/.+"),
    "verify the upload": ("POST", r"/.+\.git/info/lfs/objects/verify"),
    "look at the staged files": ("POST", r"/api/models/.+/paths-info/.+"),
    "commit": ("POST", r"/api/models/.+/commit/.+"),
    "remove the branch": ("DELETE", r"/api/models/.+/branch/.+"),
}
"""All that a run asks a Hub without Xet for."""


def at(endpoint: str) -> Callable[[Request], bool]:
    method, path = ENDPOINTS[endpoint]
    return lambda request: request.method == method and re.fullmatch(path, request.path) is not None


def test_no_endpoint_that_a_run_uses_is_missing_above(hub: LoopbackHub, client: Client, repo: str) -> None:
    """Else the faults below would leave it out."""
    client(publish, repo)
    seen = [request for request in hub.log if request.path != "/api/agent-harnesses"]
    assert [request for request in seen if not any(at(name)(request) for name in ENDPOINTS)] == []
    assert [name for name in ENDPOINTS if not any(map(at(name), seen))] == []


@pytest.mark.parametrize("is_lost", [False, True], ids=["refused", "lost"])
@pytest.mark.parametrize("status", [500, None], ids=["500", "dropped"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_trouble_at_any_endpoint_passes(
    endpoint: str, status: int | None, is_lost: bool, hub: LoopbackHub, client: Client, repo: str
) -> None:
    """An answer of 500, or none, whether the work was done or not: the model is published, once."""
    fault = hub.fail(at(endpoint), status=status, after_handling=is_lost)
    client(publish, repo)
    assert fault.left == 0
    assert [found.title for found in hub.commits(repo)] == [TITLE, "initial commit"]
    assert hub.files(repo).items() >= {**SHARDS, **FILES}.items()
    assert list(hub.branches(repo)) == ["main"]


NO_ANSWERS = {
    "a page": Answer(200, {"Content-Type": "text/html"}, b"<!doctype html><title>Sign in to the network</title>"),
    "no values": Answer(200, {"Content-Type": "application/json"}, b"{}"),
    "a list": Answer(200, {"Content-Type": "application/json"}, b"[7]"),
}
"""What says that all is well, and is no answer of the Hub's."""


@pytest.mark.parametrize("answer", NO_ANSWERS)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_is_no_answer_of_the_hubs_is_asked_for_again(
    endpoint: str, answer: str, hub: LoopbackHub, client: Client, repo: str
) -> None:
    """A proxy or the page of a network stands in between for a moment: the model is published, once."""
    fault = hub.fail(at(endpoint), spoil=lambda _: NO_ANSWERS[answer])
    client(publish, repo)
    assert fault.left == 0
    assert [found.title for found in hub.commits(repo)] == [TITLE, "initial commit"]
    assert hub.files(repo).items() >= {**SHARDS, **FILES}.items()


READ = ("look at the repo", "look at a revision", "look at the history", "preupload", "ask where to upload",
        "look at the staged files")  # fmt: skip
"""Of the other answers nothing is looked at but the status; or what was done is found to be done."""


@pytest.mark.parametrize("endpoint", READ)
def test_what_is_no_answer_of_the_hubs_is_told_where_it_stays(
    endpoint: str, hub: LoopbackHub, refused: Refused, repo: str
) -> None:
    """No traceback, and no word of rights that are missing."""
    hub.fail(at(endpoint), spoil=lambda _: NO_ANSWERS["a page"], times=10**6)
    assert f"{repo} cannot be written: an answer is none of the Hub's" in refused(publish, repo)


@pytest.mark.parametrize("endpoint", [name for name in ENDPOINTS if name != "check the card"])
def test_a_hub_that_asks_for_patience_is_given_it(endpoint: str, hub: LoopbackHub, client: Client, repo: str) -> None:
    """429 with Retry-After: the next try comes no sooner than that."""
    fault = hub.fail(at(endpoint), status=429, headers={"Retry-After": "17"})
    _, pauses = client(paused, repo)
    assert fault.left == 0
    assert any(17 <= pause < 20 for pause in pauses), pauses


NOT_FATAL = ("verify the upload", "remove the branch")
"""What was sent is found to be there when it is sent again; and the branch is removed when all is done."""


@pytest.mark.parametrize("endpoint", [name for name in ENDPOINTS if name not in NOT_FATAL])
def test_trouble_that_stays_is_a_sentence_and_main_is_as_it_was(
    endpoint: str, hub: LoopbackHub, refused: Refused, repo: str
) -> None:
    """503 for ever: the refusal says to try again later."""
    hub.add_model(repo, {"notes.md": b"mine"})
    before = hub.head(repo)
    hub.fail(at(endpoint), status=503, times=10**6)
    said = refused(publish, repo)
    assert f"the Hub refuses to write {repo} (HTTP 503" in said
    assert "try again later" in said
    assert hub.head(repo) == before


@pytest.mark.parametrize("holds_a_model", [False, True], ids=["empty", "with a model"])
def test_a_repo_that_somebody_makes_meanwhile_is_treated_as_one_that_was_there(
    holds_a_model: bool, hub: LoopbackHub, client: Client, refused: Refused, repo: str
) -> None:
    """Between our look and our creating it: an empty one is filled, another's model is not replaced."""

    def meanwhile(request: Request) -> bool:
        if request.path == "/api/repos/create" and not hub.exists(repo):
            hub.add_model(repo, OLD if holds_a_model else {"README.md": b"# theirs\n"})
        return False

    hub.fail(meanwhile)
    if holds_a_model:
        assert "already holds a model" in refused(publish, repo)
        assert hub.files(repo) == OLD
    else:
        client(publish, repo)
        assert hub.files(repo) == {**SHARDS, **FILES}


def test_an_upload_that_fails_leaves_main_untouched(hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """The refusal names the repo and the status; main has the commit it had."""
    hub.add_model(repo, OLD)
    before = hub.head(repo)
    hub.fail(lambda r: r.method == "PUT", status=400, times=100)
    said = refused(publish_with, repo, {"force": True})
    assert f"the Hub refuses to write {repo} (HTTP 400" in said
    assert "try again later" not in said
    assert hub.head(repo) == before


def test_a_run_that_is_killed_leaves_main_untouched_and_the_next_one_finishes(
    hub: LoopbackHub, repo: str, tmp_path: Path
) -> None:
    """Killed while its second shard is on its way: nothing shows on main, and neither branch nor folder is left."""
    hub.add_model(repo, {"README.md": b"# mine\n"})
    before, seen = hub.head(repo), count()
    line = [sys.executable, "-c", f"import test_staging; test_staging.publish({repo!r})"]
    path = os.pathsep.join(sys.path)
    env = {**os.environ, **hub.env(tmp_path, WRITER), "PYTHONPATH": path, "TMPDIR": str(tmp_path)}

    def shards() -> list[Path]:
        return list(tmp_path.glob("merger-*/*.safetensors"))

    def second(request: Request) -> bool:
        """The first shard is on the branch by then; its file goes at the same moment."""
        if not commits_to(BRANCH)(request) or next(seen) != 1:
            return False
        until(lambda: len(shards()) <= 1)
        return other.kill() is None

    fault = hub.fail(second)
    other = subprocess.Popen(line, env=env, stderr=subprocess.PIPE)
    try:
        assert other.wait(HANGS_SECONDS) == -signal.SIGKILL, other.stderr.read() if other.stderr else ""
    finally:
        other.kill()
        other.communicate()
    assert (fault.left, hub.head(repo)) == (0, before)
    assert BRANCH in hub.branches(repo)
    assert len(shards()) == 1
    subprocess.run(line, env=env, check=True)
    assert list(tmp_path.glob("merger-*")) == []
    assert [found.title for found in hub.commits(repo)] == [TITLE, "initial commit"]
    assert hub.files(repo) == {**SHARDS, **FILES}
    assert list(hub.branches(repo)) == ["main"]


def test_a_main_that_moved_is_not_overwritten(hub: LoopbackHub, refused: Refused, client: Client, repo: str) -> None:
    """Somebody committed while the merge was made: that is said, and their commit stands."""
    hub.add_model(repo, {"README.md": b"# mine\n"})

    def meanwhile(request: Request) -> bool:
        if commits_to(BRANCH)(request) and len(hub.commits(repo)) == 1:
            hub.commit(repo, {"notes.md": b"mine"}, "meanwhile")
        return False

    hub.fail(meanwhile)
    said = refused(publish, repo)
    assert f"main of {repo} moved while the merge was made" in said
    assert "create_pr" in said
    assert [found.title for found in hub.commits(repo)] == ["meanwhile", "initial commit"]
    assert BRANCH in hub.branches(repo)


def test_a_card_that_the_hub_refuses_is_no_traceback(hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """The Hub's own words are passed on, before a shard is made."""
    said = refused(publish, repo, {**FILES, "README.md": b"---\nbase_model_relation: cousin\n---\n"})
    assert "base_model_relation" in said
    assert "must be one of" in said
    assert not uploads(hub)
    assert [found.title for found in hub.commits(repo)] == ["initial commit"]


@pytest.mark.parametrize("card", [b"---\n- a list\n---\n", b"---\n1: number\n---\n", b"---\na: [\n---\n"])
def test_a_card_that_is_no_card_is_no_traceback(card: bytes, hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """A template of the recipe's own may make anything."""
    assert f"the Hub refuses the card of {repo}: " in refused(publish, repo, {**FILES, "README.md": card})
    assert not uploads(hub)


def test_a_hub_that_cannot_check_the_card_is_no_obstacle(hub: LoopbackHub, client: Client, repo: str) -> None:
    """The commit asks again."""
    fault = hub.fail(at("check the card"), status=503)
    client(publish, repo, None, "prepare")
    assert fault.left == 0


def test_what_stands_on_main_must_be_what_was_made(hub: LoopbackHub, refused: Refused, repo: str) -> None:
    """If a shard on main has another SHA-256, that is said, and the staging branch is kept."""
    name = next(iter(SHARDS))

    def tamper(request: Request) -> bool:
        if request.path.endswith("/preupload/main") and name in hub.tree(repo, BRANCH):
            hub.commit(repo, {name: b"other"}, "tampered with", revision=BRANCH)
        return False

    hub.fail(tamper)
    said = refused(publish, repo, kind="VerificationError")
    assert f"{name} on main is not the file that was made" in said
    assert BRANCH in hub.branches(repo)


def test_a_staging_branch_that_cannot_be_removed_is_told_after_the_model_stands(
    hub: LoopbackHub, refused: Refused, repo: str
) -> None:
    """The sentence says first that the model is published."""
    hub.fail(deletes_of_branches, status=403)
    said = refused(publish, repo)
    assert f"{hub.url}/{repo} is made (commit {hub.head(repo)}), but what follows went wrong" in said
    assert hub.files(repo).items() >= {**SHARDS, **FILES}.items()
