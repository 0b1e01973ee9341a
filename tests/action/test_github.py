"""GitHub's REST API as the Action asks it: what is no answer of GitHub's, or passing trouble, over real sockets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from loopback import LoopbackGitHub
from loopback.github import TOKEN

from merger.action.github import GitHubApi, GitHubError
from merger.stores.hub import http

PAGE = b"<!doctype html><title>Sign in to the network</title>"
FILES = [{"filename": "a.yaml", "status": "added"}, {"filename": "b.yaml", "status": "removed"}]
Call = Callable[[GitHubApi], object]


def made(api: GitHubApi) -> object:
    """A branch with a file that is not quite small, and its pull request."""
    api.make_branch("search/a", "1" * 40)
    api.commit_file("a.lock.yaml", b"new", "Lock", "search/a")
    return api.open_pull("search/a", "main", "Found", "the numbers")


CALLS: dict[str, tuple[str, Call]] = {
    "compare": ("GET .*/compare/.*", lambda api: api.compared("main", "new")),
    "files of a pull request": ("GET .*/pulls/7/files", lambda api: api.files_of(7)),
    "look at comments": ("GET .*/issues/7/comments", lambda api: api.keep_comment(7, "<!-- ours -->", "the plan")),
    "write a comment": ("POST .*/issues/7/comments", lambda api: api.keep_comment(7, "<!-- ours -->", "the plan")),
    "look at a file": ("GET .*/contents/.*", lambda api: api.commit_file("a.lock.yaml", b"new", "Lock", "main")),
    "commit a file": ("PUT .*/contents/.*", lambda api: api.commit_file("a.lock.yaml", b"new", "Lock", "main")),
    "look at a branch": ("GET .*/git/ref/.*", lambda api: made(api)),
    "begin a branch": ("POST .*/git/refs", lambda api: made(api)),
    "look at pull requests": ("GET .*/pulls", lambda api: made(api)),
    "open a pull request": ("POST .*/pulls", lambda api: made(api)),
}
"""Each request that there is, and the call that makes it."""

PASSING = {"500": (500, b"{}"), "503 with a page": (503, PAGE), "a page": (200, PAGE), "nothing": (200, b"")}
NO_ANSWERS = {
    **{f"{name}, for good": answer for name, answer in PASSING.items()},
    "text": (200, b'"text"'),
    "a list of numbers": (200, b"[1, 2]"),
    "no fields": (200, b'[{"status": "added"}, {"body": "<!-- ours -->", "user": 7}]'),
    "not Unicode": (200, b"\xff\xfe\x00"),
    "a number for content": (200, b'{"content": 7, "sha": "1f"}'),
    "a number for files": (200, b'{"files": 7}'),
}
READING = ("compare", "files of a pull request", "look at comments", "look at a file")


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackGitHub]:
    """A GitHub with one file and two changes; nobody waits between tries."""
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=lambda seconds: None))
    with LoopbackGitHub() as server:
        server.files["a.lock.yaml"] = b"old"
        server.compared |= {"main...new": FILES, "pull 7": FILES}
        yield server


@pytest.fixture
def api(github: LoopbackGitHub) -> GitHubApi:
    return GitHubApi(github.url, github.repository, TOKEN)


@pytest.mark.parametrize("answer", PASSING)
@pytest.mark.parametrize("call", CALLS)
def test_passing_trouble_is_asked_through(call: str, answer: str, github: LoopbackGitHub, api: GitHubApi) -> None:
    """Three times no answer of GitHub's, then one: what was to be done is done, once."""
    place, ask = CALLS[call]
    github.strange = [(place, *PASSING[answer])] * 3
    found = ask(api)
    assert github.strange == []
    if "compare" in call or "files" in call:
        assert found == {"a.yaml"}
    elif "comment" in call:
        assert [comment["body"] for comment in github.comments[7]] == ["<!-- ours -->\nthe plan"]
    elif "branch" in call or "pull request" in call:
        assert github.branches == {"search/a": "1" * 40}
        assert [pull["title"] for pull in github.pulls] == ["Found"]
    else:
        assert github.files["a.lock.yaml"] == b"new"


@pytest.mark.parametrize("answer", NO_ANSWERS)
@pytest.mark.parametrize("call", READING)
def test_what_is_no_answer_of_githubs_is_told(call: str, answer: str, github: LoopbackGitHub, api: GitHubApi) -> None:
    """A sentence with a next step, whatever comes in place of an answer, and never a traceback."""
    place, ask = CALLS[call]
    github.strange = [(place, *NO_ANSWERS[answer])] * http.TRIES
    with pytest.raises(GitHubError) as refusal:
        ask(api)
    (problem,) = refusal.value.problems
    assert ("GitHub is in trouble" in problem.what) != ("an answer is none of GitHub's" in problem.what)
    assert problem.hint
    assert TOKEN not in str(refusal.value)


def test_a_refusal_is_no_trouble(github: LoopbackGitHub, api: GitHubApi) -> None:
    """It is asked once."""
    github.strange = [("GET .*/pulls/7/files", 403, json.dumps({"message": "no"}).encode())]
    with pytest.raises(GitHubError, match=r"GitHub refuses GET pulls/7/files \(HTTP 403\)"):
        api.files_of(7)
    assert len(github.log) == 1
