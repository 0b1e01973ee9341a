"""What tests of the package take for granted of the loopback Hub: that it refuses, counts, waits and logs.

All else of it is seen by those that publish, read and talk through the real client: tests/stores and tests/space.
"""

import hashlib
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pytest
from calls import WRITER
from loopback import Client, LoopbackHub
from waiting import HANGS_SECONDS, until

SHARD = bytes(range(256)) * 8
FILES = {"config.json": b"{}", "model.safetensors": SHARD, "sub/notes.txt": b"a note"}


@pytest.fixture
def repo(request: pytest.FixtureRequest, hub: LoopbackHub) -> str:
    """A model that no other test uses."""
    hub.add_model(f"org/{request.node.name}", FILES)
    hub.clear_log()
    return f"org/{request.node.name}"


class Still(HTTPRedirectHandler):
    """Redirects are looked at, not followed."""

    def redirect_request(self, *args: object) -> None:
        return None


def ask(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    wanted = Request(url, body, headers, method=method)
    try:
        with build_opener(Still).open(wanted, timeout=HANGS_SECONDS) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except HTTPError as answer:
        with answer:
            return answer.code, dict(answer.headers), answer.read()


def commit_lines(hub: LoopbackHub, repo: str, lines: list[dict[str, object]], parent: str = "") -> tuple[int, str]:
    header = {"key": "header", "value": {"summary": "by hand", "parentCommit": parent or None}}
    body = "\n".join(json.dumps(line) for line in [header, *lines]).encode()
    url = f"{hub.url}/api/models/{repo}/commit/main"
    status, _, text = ask(url, "POST", body, Authorization=f"Bearer {WRITER}")
    return status, text.decode()


def lfs_line(path: str, oid: str) -> dict[str, object]:
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid}}


def signed_url(hub: LoopbackHub, repo: str, path: str = "model.safetensors") -> str:
    status, headers, _ = ask(f"{hub.url}/{repo}/resolve/main/{path}", "HEAD", Authorization=f"Bearer {WRITER}")
    assert status == 302
    return headers["Location"]


def history(repo: str) -> list[tuple[str, str]]:
    from huggingface_hub import HfApi

    return [(item.commit_id, item.title) for item in HfApi().list_repo_commits(repo)]


def test_wrong_bytes_are_refused(hub: LoopbackHub, repo: str) -> None:
    """An upload of other bytes than were announced is none; nor may a commit name what another repo has."""
    oid = hashlib.sha256(b"right").hexdigest()
    body = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": 5}]}).encode()
    answer = ask(f"{hub.url}/{repo}.git/info/lfs/objects/batch", "POST", body, Authorization=f"Bearer {WRITER}")[2]
    href = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
    assert ask(href, "PUT", b"wrong")[0] == 400
    assert commit_lines(hub, repo, [lfs_line("m", oid)])[0] == 400
    assert ask(href, "PUT", b"right")[0] == 200
    assert commit_lines(hub, repo, [lfs_line("m", oid)])[0] == 200
    assert hub.read(repo, "m") == b"right"
    hub.add_model(f"{repo}-other", {"model.safetensors": SHARD[1:]})
    theirs = commit_lines(hub, repo, [lfs_line("n", hashlib.sha256(SHARD[1:]).hexdigest())])
    assert (theirs[0], "does not exist" in theirs[1]) == (400, True)


def test_a_repo_is_made_once(hub: LoopbackHub) -> None:
    """The second time is a conflict, which the client takes for success only where it was told to."""
    body = json.dumps({"name": "made-once", "organization": "org"}).encode()
    made = [ask(f"{hub.url}/api/repos/create", "POST", body, Authorization=f"Bearer {WRITER}")[0] for _ in range(2)]
    assert made == [200, 409]
    assert list(hub.files("org/made-once")) == [".gitattributes"]


def test_small_file_is_served_directly(hub: LoopbackHub, repo: str) -> None:
    """A file that git holds comes from the Hub itself, with git's name as its ETag, whole or by range."""
    status, headers, body = ask(f"{hub.url}/{repo}/resolve/main/sub/notes.txt")
    assert (status, body, headers["ETag"]) == (200, b"a note", f'"{hub.tree(repo)["sub/notes.txt"].oid}"')
    assert ask(f"{hub.url}/{repo}/resolve/main/sub/notes.txt", Range="bytes=2-")[2] == b"note"


def test_signed_urls_expire(hub: LoopbackHub, repo: str) -> None:
    """A signed URL is 403 once its time is up, once it was revoked, or when it was tampered with."""
    hub.url_lifetime(-1)
    assert ask(signed_url(hub, repo))[0] == 403
    hub.url_lifetime(60)
    place = signed_url(hub, repo)
    assert ask(place)[0] == 200
    assert ask(place.replace("Expires=", "Expires=9"))[0] == 403
    hub.expire_urls()
    assert ask(place)[0] == 403
    assert ask(signed_url(hub, repo))[0] == 200


def test_second_origin_tells_on_tokens(hub: LoopbackHub, repo: str) -> None:
    """A request that carries a token to the second origin is seen in the log."""
    ask(signed_url(hub, repo), Authorization=f"Bearer {WRITER}")
    assert [r.authorization for r in hub.log if r.host == "cdn"] == [True]


def test_history_is_paged(hub: LoopbackHub, client: Client, repo: str) -> None:
    """All commits are listed, newest first, however many there are."""
    made = [hub.head(repo)] + [hub.commit(repo, {"n": b"%d" % n}, f"number {n}") for n in range(60)]
    found = client(history, repo)
    assert [sha for sha, _ in found] == made[::-1]
    assert found[0][1] == "number 59"
    assert len(hub.log) >= 2


def test_latency(hub: LoopbackHub) -> None:
    """Every request waits as long as it is told to."""
    hub.latency(0.2)
    start = time.perf_counter()
    ask(f"{hub.url}/api/agent-harnesses")
    hub.latency(0)
    assert time.perf_counter() - start >= 0.2


def test_the_links_rate_is_shared_by_its_connections(hub: LoopbackHub, repo: str) -> None:
    """Two downloads at once take as long as their bytes do at the rate, but for a moment that it makes up for."""
    url = signed_url(hub, repo)
    hub.rate(2 * len(SHARD) / 0.3)
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: ask(url)[2], range(2)))
    seconds, passed = time.monotonic() - start, sum(size for _, size in hub.context.down.log)
    hub.rate(None)
    assert answers == [SHARD, SHARD]
    assert seconds >= 0.2
    assert passed == 2 * len(SHARD)


def test_many_threads(hub: LoopbackHub, repo: str) -> None:
    """Readers and writers at once see only whole commits, and every request is in the log."""
    url = f"{hub.url}/api/models/{repo}"

    def work(n: int) -> int:
        hub.commit(repo, {f"{n}/a.txt": b"a", f"{n}/b.txt": b"b"})
        assert ask(signed_url(hub, repo))[2] == SHARD
        return len(json.loads(ask(url)[2])["siblings"])

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(work, range(48)))
    assert all(count % 2 == 1 for count in counts)
    assert (len(hub.commits(repo)), len(hub.tree(repo))) == (49, 99)
    assert len(hub.log) == 3 * 48


def test_one_winner(hub: LoopbackHub, repo: str) -> None:
    """Of many commits on the same parent at once, one is made and the rest are stale."""
    head = hub.head(repo)
    line = {"key": "file", "value": {"path": "b.txt", "content": "x"}}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: commit_lines(hub, repo, [line], head)[0], range(16)))
    assert sorted(answers) == [200] + [412] * 15
    assert len(hub.commits(repo)) == 2


def test_close_lets_go() -> None:
    """After close, no thread of the server is left and its folder is gone, idle connections or not."""
    before = set(threading.enumerate())
    with LoopbackHub() as other:
        link = http.client.HTTPConnection(urlsplit(other.url).netloc)
        link.request("GET", "/api/agent-harnesses")
        link.getresponse().read()
    link.close()
    until(lambda: set(threading.enumerate()) <= before, threading.enumerate)
    assert not other.root.exists()
