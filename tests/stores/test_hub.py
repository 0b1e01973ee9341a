"""Models on the Hub as a store sees them: pinned to a commit, read in parts, refused in sentences."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from loopback import Client, ClientError, LoopbackGitHub, LoopbackHub, Request
from loopback.github import IDENTITY
from loopback.wire import Answer

from merger.stores.hub import http
from merger.stores.ports import Located, Ticket

BYTES = bytes(n % 251 for n in range(10_000))
FILES = {
    "config.json": b'{"model_type": "x"}',
    "model.safetensors": BYTES,
    "templates/a.jinja": b"{{ a }}",
    "e.txt": b"",
}
REPO = "org/model"


@pytest.fixture(scope="module", autouse=True)
def commit(served: LoopbackHub) -> str:
    """A public model, a private one and two that ask for consent."""
    served.add_model("org/hidden", FILES, private=True)
    served.add_model("other/gated", FILES, gated="manual")
    served.add_model("other/granted", FILES, gated="auto")
    served.grant("other/granted", "alice")
    return served.add_model(REPO, FILES)


# What the child runs


def locate(repo: str, revision: str | None = None, token: str | None = None) -> Located:
    from merger.stores.hub.store import HubStore

    with patch.object(http, "time", SimpleNamespace(sleep=lambda seconds: None)):
        return HubStore(token).locate(repo, revision)


def names(repo: str) -> list[str]:
    from merger.stores.hub.store import HubStore

    return HubStore().names(f"{repo}/folder", False)


def fetch(repo: str, file: str, start: int = 0, stop: int | None = None, token: str | None = None) -> bytes:
    from merger.stores.hub.store import HubStore

    store = HubStore(token)
    with patch("time.sleep", lambda seconds: None):
        return store.fetch(store.locate(repo, None), file, start, stop)


def read(repo: str, parts: list[tuple[int, int]]) -> list[bytes]:
    from merger.stores.hub.store import HubStore

    store = HubStore()
    model = store.locate(repo, None)
    reader = store.reader([Ticket(model, "model.safetensors", *part) for part in parts], 1 << 20)
    found = []
    for number, (start, stop) in enumerate(parts):
        found.append(bytearray(stop - start))
        reader.read(number, 0, memoryview(found[-1]))
    reader.close()
    return [bytes(data) for data in found]


def locate_at(endpoint: str, repo: str) -> Located:
    """With an endpoint of its own: the child is already bound to its Hub."""
    from huggingface_hub import HfApi, constants

    from merger.stores.hub.store import HubStore

    store = HubStore()
    store._api = HfApi(endpoint=endpoint)
    with (
        patch.object(http, "time", SimpleNamespace(sleep=lambda seconds: None)),
        patch.object(constants, "ENDPOINT", endpoint),
    ):
        return store.locate(repo, None)


def locate_offline(repo: str) -> Located:
    from huggingface_hub import close_session, constants

    close_session()
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        try:
            return locate(repo)
        finally:
            close_session()


def of_dataset(repo: str, file: str) -> bytes:
    from merger.stores.hub.store import hub_file

    with patch("time.sleep", lambda seconds: None):
        return hub_file(repo, file, None, False, None)


def trusted(repo: str, settings: dict[str, str]) -> str:
    """The token of a job with these settings, which are gone afterwards."""
    from huggingface_hub.utils import _auth

    from merger.stores.hub.store import trusted_publisher

    before = dict(os.environ)
    os.environ |= settings
    try:
        with patch.object(http, "time", SimpleNamespace(sleep=lambda seconds: None)):
            return trusted_publisher(repo)
    finally:
        os.environ.clear()
        os.environ |= before
        _auth._OIDC_TOKEN_CACHE = None


# The tests


def test_a_model_is_pinned_to_the_commit_that_its_name_means_now(hub: LoopbackHub, client: Client, commit: str) -> None:
    """Branch, tag or nothing: what comes back is the commit, with each file's size and, where known, SHA-256."""
    later = hub.commit(REPO, {"config.json": b"{}"}, revision="main")
    hub.branch(REPO, "old", start=commit)
    now, then = client(locate, REPO), client(locate, REPO, "old")
    assert (now.name, now.where, now.commit, then.commit) == (REPO, REPO, later, commit)
    assert {name: info.size for name, info in then.files.items()} == {name: len(data) for name, data in FILES.items()}
    assert set(client(names, REPO)) == {"main", "old"}
    sha256 = {name: info.sha256 for name, info in then.files.items() if info.sha256}
    assert sha256 == {"model.safetensors": hub.tree(REPO, commit)["model.safetensors"].sha256}


def test_files_and_parts_of_files_are_fetched(client: Client) -> None:
    """Small files whole, large ones in part, an empty one without asking."""
    assert client(fetch, REPO, "templates/a.jinja") == FILES["templates/a.jinja"]
    assert client(fetch, REPO, "model.safetensors", 100, 5000) == BYTES[100:5000]
    assert client(fetch, REPO, "e.txt") == b""


def test_a_reader_hands_out_the_bytes_of_its_tickets(client: Client) -> None:
    """In any order of places."""
    parts = [(9000, 10_000), (0, 8), (8, 4000)]
    assert client(read, REPO, parts) == [BYTES[start:stop] for start, stop in parts]


def test_a_passing_trouble_of_the_hub_does_not_stop_a_run(hub: LoopbackHub, client: Client) -> None:
    """A 503 before the first answer is waited out."""
    fault = hub.fail(lambda r: r.path.startswith("/api/models/"), status=503, times=3)
    assert client(locate, REPO).where == REPO
    assert fault.left == 0


@pytest.mark.parametrize(
    ("ask", "words", "step"),
    [
        ((locate, "org/no-such"), "there is no model org/no-such on the Hub that we may read", "spelling"),
        ((locate, "org/hidden", None, "hf_nobody"), "the Hub does not accept our token for org/hidden", "HF_TOKEN"),
        ((locate, REPO, "v9"), f"{REPO} has no revision 'v9'", f"/{REPO}/commits/main"),
        ((locate, "no such/name"), "'no such/name' is no model's name", "owner/name"),
        ((fetch, "other/gated", "config.json"), "other/gated is gated and this account has no access", "accept its"),
        ((locate_at, "http://127.0.0.1:9", REPO), f"the Hub cannot be reached for {REPO} (ConnectError)", "network"),
        ((locate_offline, REPO), f"the Hub may not be asked for {REPO}: HF_HUB_OFFLINE is set", "unset"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_a_sentence_with_a_next_step(
    ask: tuple[object, ...], words: str, step: str, client: Client
) -> None:
    """Missing, private, gated, misnamed, out of reach: each is its own sentence, and none holds a token."""
    with pytest.raises(ClientError) as refusal:
        client(*ask)
    assert "ModelError" in refusal.value.kinds
    said, hint = str(refusal.value).split("\n    ")
    assert said == words
    assert step in hint
    assert "hf_" not in str(refusal.value)


def test_who_has_access_reads_gated_and_private_models(client: Client) -> None:
    """The token of the environment is used for both."""
    assert client(fetch, "other/granted", "config.json") == FILES["config.json"]
    assert client(fetch, "org/hidden", "model.safetensors", 1, 4) == BYTES[1:4]


def test_a_trouble_that_stays_is_a_refusal(hub: LoopbackHub, client: Client) -> None:
    """After a few tries the status is named."""
    hub.fail(lambda r: r.path.startswith("/api/models/"), status=502, times=100)
    with pytest.raises(ClientError, match=r"does not answer for org/model \(HTTP 502\)\n    try again later"):
        client(locate, REPO)


def test_a_renamed_model_is_found_under_its_new_name(hub: LoopbackHub, client: Client) -> None:
    """By the former one, which is told; its files and folders are read there."""
    commit = hub.add_model("org/former", {**FILES, "sub/config.json": b"{}"})
    hub.rename("org/former", "org/latter")
    found = client(locate, "org/former", commit)
    assert (found.name, found.where, found.commit, found.moved) == ("org/latter", "org/latter", commit, "org/former")
    assert client(locate, "org/latter").moved is None
    within = client(locate, "org/former/sub")
    assert (within.name, within.where, within.inside, list(within.files)) == (
        "org/latter/sub", "org/latter", "sub/", ["config.json"],
    )  # fmt: skip
    assert client(fetch, "org/former", "model.safetensors") == BYTES


# What is no answer

PAGE = b"<!doctype html><title>Sign in to the network</title>"
NO_ANSWERS: dict[str, tuple[int, bytes]] = {
    "a page": (200, PAGE),
    "nothing": (200, b""),
    "no values": (200, b"{}"),
    "a list": (200, b"[7]"),
    "null": (200, b"null"),
    "a text": (200, b'"text"'),
    "not Unicode": (200, b"\xff\xfe"),
    "a number for files": (200, b'{"id": 7, "siblings": 7}'),
    "500": (500, PAGE),
    "503": (503, b"{}"),
}
ASKS: dict[str, tuple[Callable[[Request], bool], tuple[Any, ...]]] = {
    "the model": (lambda r: r.path.startswith("/api/models/"), (locate, REPO)),
    "a file's place": (lambda r: r.method == "HEAD", (fetch, REPO, "templates/a.jinja")),
    "a file": (lambda r: r.method == "GET" and "/resolve/" in r.path, (fetch, REPO, "templates/a.jinja")),
    "a text's size": (lambda r: r.path.endswith("/paths-info/main"), (of_dataset, REPO, "e.txt")),
}


def spoiled(answer: tuple[int, bytes]) -> Callable[[Answer], Answer]:
    return lambda _: Answer(answer[0], {"Content-Type": "application/json"}, answer[1])


# an answer to HEAD has no body that could be wrong
CASES = [(ask, answer) for ask in ASKS for answer in NO_ANSWERS if ask != "a file's place" or answer.isdigit()]


@pytest.mark.parametrize(("ask", "answer"), CASES)
def test_what_is_no_answer_of_the_hubs_is_told(ask: str, answer: str, hub: LoopbackHub, client: Client) -> None:
    """Whatever comes in place of an answer, and stays: a sentence with a next step."""
    match, call = ASKS[ask]
    hub.fail(match, spoil=spoiled(NO_ANSWERS[answer]), times=10**6)
    with pytest.raises(ClientError, match="\n    ") as refusal:
        client(*call)
    assert "ModelError" in refusal.value.kinds, str(refusal.value)


# Trusted publishing

OIDC: dict[str, str] = {"GitHub": "GET /identity", "the Hub": "POST /oauth/token"}
OIDC_ANSWERS = {name: answer for name, answer in NO_ANSWERS.items() if "files" not in name} | {
    "a null value": (200, b'{"access_token": null}'),
    "a number": (200, b'{"access_token": 7}'),
    "a lifetime that is none": (200, b'{"access_token": "x", "expires_in": "soon"}'),
}
KEPT = ("a null value", "a number", "a lifetime that is none")
"""Tokens that the client would keep for an hour: it is not asked again."""


@pytest.fixture
def job(hub: LoopbackHub, github: LoopbackGitHub) -> dict[str, str]:
    """The environment of a job that the repo trusts."""
    hub.trust(REPO, github.repository)
    return {
        "HF_TOKEN": "",
        "GITHUB_ACTIONS": "true",
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{github.url}/identity",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": IDENTITY,
    }


def goes_wrong(whose: str, answer: tuple[int, bytes], times: int, hub: LoopbackHub, github: LoopbackGitHub) -> None:
    if whose == "GitHub":
        github.strange = [(OIDC[whose], *answer)] * times
    else:
        hub.fail(lambda r: r.path == "/oauth/token", spoil=spoiled(answer), times=times)


@pytest.mark.parametrize(("whose", "answer"), [
    *((whose, answer) for whose in OIDC for answer in OIDC_ANSWERS if answer not in KEPT),
    *(("the Hub", answer) for answer in KEPT),
])  # fmt: skip
def test_a_token_of_trusted_publishing_is_asked_for_again(
    whose: str, answer: str, hub: LoopbackHub, github: LoopbackGitHub, job: dict[str, str], client: Client
) -> None:
    """What is no answer, or speaks of passing trouble, may come a few times; what stays is told for what it is."""
    if answer not in KEPT:
        goes_wrong(whose, OIDC_ANSWERS[answer], http.TRIES - 1, hub, github)
        assert client(trusted, REPO, job).startswith("hf_jwt_")
    goes_wrong(whose, OIDC_ANSWERS[answer], http.TRIES, hub, github)
    with pytest.raises(ClientError) as refusal:
        client(trusted, REPO, job)
    said = str(refusal.value)
    assert "UploadError" in refusal.value.kinds
    assert said.startswith(f"the Hub gives this job no token for {REPO}: ")
    trouble = f"GitHub or the Hub is in trouble (HTTP {answer})\n    run the job again later"
    assert (trouble if answer.isdigit() else "is none of the Hub's or GitHub's\n    does a proxy") in said
    assert "trusted publisher" not in said


def test_a_job_that_is_not_trusted_is_told_what_it_takes(
    hub: LoopbackHub, github: LoopbackGitHub, job: dict[str, str], client: Client
) -> None:
    """A refusal is not trouble: it is asked for once."""
    hub.trust(REPO, "org/others")
    with pytest.raises(
        ClientError, match=r"no token for org/model \(HTTP 403\)\n    the repo has to exist, and to name"
    ):
        client(trusted, REPO, job)
    assert len([request for request in hub.log if request.path == "/oauth/token"]) == 1
