"""The loopback Hub answers the real client as the Hub would. Tests of the test double, not of the package.

The functions before the tests run in a child process (see loopback/client.py): they are plain uses of huggingface_hub.
"""

import hashlib
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pytest
from loopback import Client, ClientError, LoopbackHub
from waiting import HANGS_SECONDS, until

ALICE, BOB, READER = "hf_alice_test", "hf_bob_test", "hf_reader_test"
SHARD = bytes(range(256)) * 8
CONFIG = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": SHARD, "sub/notes.txt": b"a note"}
CARD = "---\nlicense: mit\nbase_model: [org/a, org/b]\nbase_model_relation: merge\n---\n# merged\n"
NAMES = count()


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add_user("alice", token=ALICE, orgs=("org",))
        hub.add_user("alice", token=READER, role="read", orgs=("org",))
        hub.add_user("bob", token=BOB)
        yield hub


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.env(tmp_path_factory.mktemp("home"), ALICE)) as client:
        yield client


@pytest.fixture(autouse=True)
def calm(hub: LoopbackHub) -> Iterator[None]:
    hub.clear_log()
    yield
    hub.clear_faults()
    hub.latency(0)
    hub.url_lifetime(3600)
    hub.page_size(1000)
    hub.multipart(None)


@pytest.fixture
def repo() -> str:
    """A name that no other test uses."""
    return f"org/model-{next(NAMES)}"


# What the child runs


def create(repo: str, exist_ok: bool = False) -> str:
    from huggingface_hub import HfApi

    return HfApi().create_repo(repo, exist_ok=exist_ok).repo_id


def who(token: str) -> tuple[str, str, list[str]]:
    from huggingface_hub import HfApi

    me = HfApi().whoami(token=token)
    return me["name"], me["auth"]["accessToken"]["role"], [org["name"] for org in me["orgs"]]


def upload(repo: str, files: dict[str, bytes], token: str | None = None, **options: object) -> dict[str, object]:
    from huggingface_hub import CommitOperationAdd, HfApi

    api, adds = HfApi(token=token), [CommitOperationAdd(path, data) for path, data in files.items()]
    revision, pull = options.get("revision"), options.get("create_pr")
    api.preupload_lfs_files(repo, adds, revision=revision, create_pr=pull)
    made = api.create_commit(repo, adds, commit_message="two shards", **options)
    return {"sha": made.oid, "url": str(made.commit_url), "pull": made.pr_num, "repo": made.repo_url.repo_id}


def upload_with(repo: str, files: dict[str, bytes], options: dict[str, object], token: str | None = None) -> object:
    return upload(repo, files, token, **options)


def upload_file_from_disk(repo: str, path: str, name: str) -> None:
    from huggingface_hub import HfApi

    HfApi().upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repo)


def stage_and_publish(repo: str, branch: str, shard: bytes) -> tuple[str, str]:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi

    api, name = HfApi(), "model-00001-of-00001.safetensors"
    head = api.model_info(repo).sha
    api.create_branch(repo, branch=branch)
    api.create_commit(repo, [CommitOperationAdd(name, shard)], commit_message="a shard", revision=branch)
    copy = CommitOperationCopy(name, name, src_revision=branch)
    card = CommitOperationAdd("README.md", CARD.encode())
    made = api.create_commit(repo, [copy, card], commit_message="publish abc", parent_commit=head)
    listed = [item.path for item in api.list_repo_tree(repo, revision=branch)]
    api.delete_branch(repo, branch=branch)
    return made.oid, str(listed)


def delete_and_tag(repo: str) -> dict[str, list[str]]:
    from huggingface_hub import CommitOperationDelete, HfApi

    api = HfApi()
    api.create_tag(repo, tag="v1", tag_message="before")
    gone = [CommitOperationDelete("sub/"), CommitOperationDelete("config.json")]
    api.create_commit(repo, gone, commit_message="less")
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    return {"now": sorted(api.list_repo_files(repo)), "tags": [tag.name for tag in refs.tags]}


def download(repo: str, path: str, revision: str | None = None, token: str | bool | None = None) -> bytes:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, path, revision=revision, token=token)).read_bytes()


def snapshot(repo: str) -> dict[str, bytes]:
    from huggingface_hub import snapshot_download

    root = Path(snapshot_download(repo, max_workers=4))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def info(repo: str, expand: list[str] | None = None, token: str | bool | None = None) -> dict[str, object]:
    from huggingface_hub import HfApi

    found = HfApi().model_info(repo, expand=expand, files_metadata=not expand, token=token)
    sizes = {item.rfilename: (item.size, bool(item.lfs)) for item in found.siblings or []}
    return {"sha": found.sha, "gated": found.gated, "sizes": sizes, "base": found.base_models, "tags": found.tags}


def listing(repo: str, recursive: bool = True, expand: bool = False) -> list[tuple[str, str]]:
    from huggingface_hub import HfApi

    items = HfApi().list_repo_tree(repo, recursive=recursive, expand=expand)
    return [(type(item).__name__, item.path) for item in items]


def history(repo: str) -> list[tuple[str, str]]:
    from huggingface_hub import HfApi

    return [(item.commit_id, item.title) for item in HfApi().list_repo_commits(repo)]


def paths(repo: str, wanted: list[str]) -> list[tuple[str, str | None]]:
    from huggingface_hub import HfApi

    found = HfApi().get_paths_info(repo, wanted)
    return [(item.path, item.lfs.sha256 if getattr(item, "lfs", None) else None) for item in found]


def talk(repo: str) -> dict[str, object]:
    from huggingface_hub import HfApi

    api = HfApi(token=BOB)
    opened = api.create_discussion(repo, "a question", description="does it merge?")
    said = api.comment_discussion(repo, opened.num, "it does")
    closed = api.change_discussion_status(repo, opened.num, "closed", comment="thanks")
    kinds = [event.type for event in api.get_discussion_details(repo, opened.num).events]
    return {"said": said.content, "closed": closed.new_status, "kinds": kinds}


def merge_pull_request(repo: str, num: int) -> dict[str, object]:
    from huggingface_hub import HfApi

    api = HfApi()
    before = api.get_discussion_details(repo, num)
    api.merge_pull_request(repo, num)
    after = api.get_discussion_details(repo, num)
    listed = [(item.num, item.status) for item in api.get_repo_discussions(repo, discussion_type="pull_request")]
    kinds = [event.type for event in before.events]
    seen = {"ref": before.git_reference, "kinds": kinds, "listed": listed}
    return seen | {"oid": after.merge_commit_oid, "status": after.status}


def header_counts(repo: str) -> dict[str, int]:
    from huggingface_hub import HfApi

    return dict(HfApi().get_safetensors_metadata(repo).parameter_count)


def llama(repo: str) -> tuple[str, int]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(repo)
    return config.model_type, config.hidden_size


# What a test does without the client


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
    status, _, text = ask(url, "POST", body, Authorization=f"Bearer {ALICE}")
    return status, text.decode()


def lfs_line(path: str, oid: str) -> dict[str, object]:
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid}}


def signed_url(hub: LoopbackHub, repo: str, path: str = "model.safetensors") -> str:
    status, headers, _ = ask(f"{hub.url}/{repo}/resolve/main/{path}", "HEAD", Authorization=f"Bearer {ALICE}")
    assert status == 302
    return headers["Location"]


# Repos and users


def test_create_repo_twice(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A second create is a 409 unless exist_ok says that it is all the same."""
    assert client(create, repo) == repo
    assert client(create, repo, True) == repo
    with pytest.raises(ClientError) as error:
        client(create, repo)
    assert error.value.status == 409
    assert hub.exists(repo)
    assert list(hub.files(repo)) == [".gitattributes"]


def test_whoami(client: Client) -> None:
    """A token has a name, a role and organisations; an unknown token has none of them."""
    assert client(who, READER) == ("alice", "read", ["org"])
    with pytest.raises(ClientError) as error:
        client(who, "hf_nobody")
    assert error.value.status == 401


@pytest.mark.parametrize("token", [READER, BOB])
def test_no_right_to_write(hub: LoopbackHub, client: Client, repo: str, token: str) -> None:
    """A read token, or somebody else's, gets a 403 and leaves nothing behind."""
    hub.add_model(repo, FILES)
    with pytest.raises(ClientError) as error:
        client(upload, repo, {"new.txt": b"x"}, token)
    assert error.value.status == 403
    assert len(hub.commits(repo)) == 1


# Writing


@pytest.mark.parametrize("part", [None, 1000])
def test_two_shards_in_one_commit(hub: LoopbackHub, client: Client, repo: str, part: int | None) -> None:
    """Shards uploaded ahead, whole or in parts, land in one commit; uploading them again makes no second one."""
    hub.add_model(repo, {"config.json": b"{}"})
    hub.multipart(part)
    files = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 2500 for n in (1, 2)} | {"notes.txt": b"hello"}
    made = client(upload, repo, files)
    assert hub.files(repo) == {"config.json": b"{}", **files}
    assert [commit.title for commit in hub.commits(repo)] == ["two shards", "initial commit"]
    assert (made["sha"], made["repo"]) == (hub.head(repo), repo)
    assert len([r for r in hub.log if r.method == "PUT" and r.host == "cdn"]) == (2 if part is None else 6)
    assert not any(r.authorization for r in hub.log if r.host == "cdn")
    assert client(upload, repo, files)["sha"] == made["sha"]
    assert len(hub.commits(repo)) == 2


def test_upload_file_from_disk(hub: LoopbackHub, client: Client, repo: str, tmp_path: Path) -> None:
    """A file of some megabytes streams from disk to disk, and its bytes are its sha256's."""
    hub.add_model(repo, {"config.json": b"{}"})
    data = os.urandom(3_000_000)
    (tmp_path / "big.bin").write_bytes(data)
    client(upload_file_from_disk, repo, str(tmp_path / "big.bin"), "big.bin")
    assert hub.tree(repo)["big.bin"].sha256 == hashlib.sha256(data).hexdigest()
    assert max(r.received for r in hub.log) == len(data)


def test_wrong_bytes_are_refused(hub: LoopbackHub, repo: str) -> None:
    """An upload whose bytes are not those announced is a 400 and does not count as there."""
    hub.add_model(repo, FILES)
    oid = hashlib.sha256(b"right").hexdigest()
    body = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": 5}]}).encode()
    answer = ask(f"{hub.url}/{repo}.git/info/lfs/objects/batch", "POST", body, Authorization=f"Bearer {ALICE}")[2]
    href = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
    assert ask(href, "PUT", b"wrong")[0] == 400
    assert commit_lines(hub, repo, [lfs_line("m", oid)])[0] == 400
    assert ask(href, "PUT", b"right")[0] == 200
    assert commit_lines(hub, repo, [lfs_line("m", oid)])[0] == 200
    assert hub.read(repo, "m") == b"right"


def test_stale_parent_is_412(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A commit on a parent that is no longer the head is refused in the Hub's words; a short head will do."""
    old = hub.add_model(repo, {"a.txt": b"1"})
    head = hub.commit(repo, {"a.txt": b"2"})
    with pytest.raises(ClientError, match=r"A commit has happened since\. Please refresh and try again\.") as error:
        client(upload_with, repo, {"b.txt": b"x"}, {"parent_commit": old})
    assert error.value.status == 412
    client(upload_with, repo, {"b.txt": b"x"}, {"parent_commit": head[:7]})
    assert hub.commits(repo)[0].parent == head


def test_staging_branch_then_one_commit(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A shard committed to a staging branch is copied to main without travelling again, in one commit with the card."""
    hub.add_model(repo, {"config.json": b"{}"})
    sha, listed = client(stage_and_publish, repo, "merge-staging/abc", SHARD)
    newest, first = hub.commits(repo)
    assert (newest.sha, newest.parent, newest.title) == (sha, first.sha, "publish abc")
    assert newest.files == ("README.md", "model-00001-of-00001.safetensors")
    assert "model-00001-of-00001.safetensors" in listed
    assert hub.read(repo, "model-00001-of-00001.safetensors") == SHARD
    assert len([r for r in hub.log if r.method == "PUT"]) == 1
    assert list(hub.branches(repo)) == ["main"]


def test_missing_lfs_object_is_400(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A commit that names bytes the repo does not have, swept away or another repo's, is refused as a whole."""
    hub.add_model(repo, {"a.txt": b"1"})
    hub.add_model(f"{repo}-other", {"model.safetensors": SHARD})
    hub.fail(lambda r: "/commit/" in r.path, status=418)
    with pytest.raises(ClientError):
        client(upload, repo, {"model.safetensors": SHARD, "b.txt": b"x"})
    hub.collect_garbage(repo)
    oid = hashlib.sha256(SHARD).hexdigest()
    status, text = commit_lines(hub, repo, [{"key": "file", "value": {"path": "b.txt"}}, lfs_line("m", oid)])
    assert (status, "does not exist" in text) == (400, True)
    assert list(hub.files(repo)) == ["a.txt"]


def test_delete_and_tag(hub: LoopbackHub, client: Client, repo: str) -> None:
    """Files and folders go; a tag keeps what was."""
    hub.add_model(repo, FILES)
    assert client(delete_and_tag, repo) == {"now": ["model.safetensors"], "tags": ["v1"]}
    assert hub.files(repo, "v1") == FILES


@pytest.mark.parametrize("head", ["a: [1", "license: [1]", "base_model: {a: b}", "base_model_relation: soup", "- a"])
def test_faulty_card(hub: LoopbackHub, client: Client, repo: str, head: str) -> None:
    """A card is refused, before any upload, for YAML that is none and for keys of the wrong type."""
    hub.add_model(repo, FILES)
    with pytest.raises(ClientError, match=r"Invalid metadata in README.md\.\n- "):
        client(upload, repo, {"README.md": f"---\n{head}\n---\n# merged\n".encode(), "model-2.safetensors": SHARD})
    client(upload, repo, {"README.md": CARD.encode()})
    assert hub.read(repo, "README.md").decode() == CARD


def test_pull_request(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A stranger's commit with create_pr becomes refs/pr/1, which the owner merges."""
    hub.add_model(repo, FILES)
    made = client(upload_with, repo, {"model-2.safetensors": SHARD[:99]}, {"create_pr": True}, BOB)
    assert made["pull"] == 1
    assert "model-2.safetensors" not in hub.tree(repo)
    merged = client(merge_pull_request, repo, 1)
    assert (merged["ref"], merged["kinds"], merged["status"]) == ("refs/pr/1", ["commit"], "merged")
    assert merged["oid"] == hub.head(repo)
    assert merged["listed"] == [(1, "merged")]
    assert hub.read(repo, "model-2.safetensors") == SHARD[:99]


def test_discussion(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A discussion is opened, commented on and closed."""
    hub.add_model(repo, FILES)
    said = client(talk, repo)
    assert said == {"said": "it does", "closed": "closed", "kinds": ["comment", "comment", "comment", "status-change"]}
    assert [item.status for item in hub.discussions(repo)] == ["closed"]


# Reading


def test_downloads(hub: LoopbackHub, client: Client, repo: str) -> None:
    """One file or a whole snapshot comes down as it is; the token never reaches the second origin."""
    hub.add_model(repo, FILES, private=True)
    assert client(download, repo, "model.safetensors") == SHARD
    assert client(download, repo, "config.json", hub.head(repo)) == FILES["config.json"]
    assert client(snapshot, repo) == FILES
    cdn = [r for r in hub.log if r.host == "cdn"]
    assert cdn
    assert not any(r.authorization for r in cdn)
    assert {r.user for r in hub.log if r.host == "hub" and r.authorization} == {"alice"}


def test_a_folder_is_a_model(hub: LoopbackHub, client: Client, repo: str, tmp_path: Path) -> None:
    """add_model takes a folder with all below it."""
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    hub.add_model(repo, tmp_path)
    assert client(snapshot, repo) == FILES


def test_range_through_the_redirect(hub: LoopbackHub, repo: str) -> None:
    """HEAD gives the signed URL and what the file is; ranges of that URL are exact, and 416 beyond the end."""
    hub.add_model(repo, FILES)
    status, headers, body = ask(f"{hub.url}/{repo}/resolve/main/model.safetensors", "HEAD")
    assert (status, body, headers["X-Linked-Size"]) == (302, b"", str(len(SHARD)))
    assert headers["X-Linked-Etag"] == f'"{hashlib.sha256(SHARD).hexdigest()}"'
    assert headers["X-Repo-Commit"] == hub.head(repo)
    place = headers["Location"]
    assert place.startswith(hub.cdn_url)
    status, headers, body = ask(place, Range="bytes=10-19")
    assert (status, headers["Content-Range"], body) == (206, f"bytes 10-19/{len(SHARD)}", SHARD[10:20])
    assert ask(place, Range="bytes=2040-9999")[2] == SHARD[2040:]
    assert ask(place, Range="bytes=-5")[2] == SHARD[-5:]
    assert ask(place)[::2] == (200, SHARD)
    status, headers, _ = ask(place, Range=f"bytes={len(SHARD)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(SHARD)}")
    assert [r.sent for r in hub.log if r.host == "cdn" and r.status == 206] == [10, 8, 5]


def test_small_file_is_served_directly(hub: LoopbackHub, repo: str) -> None:
    """A file that git holds comes from the Hub itself, with git's name as its ETag, whole or by range."""
    hub.add_model(repo, FILES)
    status, headers, body = ask(f"{hub.url}/{repo}/resolve/main/sub/notes.txt")
    assert (status, body, headers["ETag"]) == (200, b"a note", f'"{hub.tree(repo)["sub/notes.txt"].oid}"')
    assert ask(f"{hub.url}/{repo}/resolve/main/sub/notes.txt", Range="bytes=2-")[2] == b"note"


def test_signed_urls_expire(hub: LoopbackHub, repo: str) -> None:
    """A signed URL is 403 once its time is up, once it was revoked, or when it was tampered with."""
    hub.add_model(repo, FILES)
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
    hub.add_model(repo, FILES)
    ask(signed_url(hub, repo), Authorization=f"Bearer {ALICE}")
    assert [r.authorization for r in hub.log if r.host == "cdn"] == [True]


@pytest.mark.parametrize(
    ("path", "revision", "kind"),
    [
        ("none.txt", "main", "RemoteEntryNotFoundError"),
        ("config.json", "nowhere", "RevisionNotFoundError"),
    ],
)
def test_missing_things(hub: LoopbackHub, client: Client, repo: str, path: str, revision: str, kind: str) -> None:
    """A missing file and a missing revision are told apart."""
    hub.add_model(repo, FILES)
    with pytest.raises(ClientError) as error:
        client(download, repo, path, revision)
    assert kind in error.value.kinds


@pytest.mark.parametrize(("token", "status"), [(BOB, 404), (False, 401)])
def test_private_repo(hub: LoopbackHub, client: Client, repo: str, token: str | bool, status: int) -> None:
    """Without the right to it, a private repo is as good as missing."""
    hub.add_model(repo, FILES, private=True)
    for name in (repo, f"{repo}-none"):
        with pytest.raises(ClientError) as error:
            client(info, name, None, token)
        assert ("RepositoryNotFoundError" in error.value.kinds, error.value.status) == (True, status)


@pytest.mark.parametrize(("token", "status"), [(BOB, 403), (False, 401)])
def test_gated_repo(hub: LoopbackHub, client: Client, repo: str, token: str | bool, status: int) -> None:
    """A gated repo shows its listing but not its files, until access is granted."""
    hub.add_model(repo, FILES, gated="manual")
    assert client(info, repo, None, token)["gated"] == "manual"
    with pytest.raises(ClientError) as error:
        client(download, repo, "config.json", None, token)
    assert ("GatedRepoError" in error.value.kinds, error.value.status) == (True, status)
    hub.grant(repo, "bob")
    assert client(download, repo, "config.json", None, BOB) == FILES["config.json"]


def test_info(hub: LoopbackHub, client: Client, repo: str) -> None:
    """model_info knows sizes and LFS, and what it is asked to expand."""
    hub.add_model(repo, {**FILES, "README.md": CARD.encode()})
    found = client(info, repo)
    assert found["sha"] == hub.head(repo)
    assert found["sizes"]["model.safetensors"] == (len(SHARD), True)
    assert found["sizes"]["sub/notes.txt"] == (6, False)
    assert {"license:mit", "base_model:merge:org/a"} <= set(found["tags"])
    assert client(info, repo, ["baseModels", "gated"])["base"]["relation"] == "merge"


def test_paged_tree(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A tree longer than a page comes page by page, folders included; paths-info leaves out what is not there."""
    hub.add_model(repo, {f"folder/{n:02d}.txt": b"%d" % n for n in range(25)} | FILES)
    hub.page_size(10)
    found = client(listing, repo)
    assert len(found) == len(set(found)) == 30
    assert ("RepoFolder", "folder") in found
    assert len([r for r in hub.log if "/tree/" in r.path]) == 3
    assert client(listing, repo, False) == [
        ("RepoFile", "config.json"),
        ("RepoFolder", "folder"),
        ("RepoFile", "model.safetensors"),
        ("RepoFolder", "sub"),
    ]
    oid = hashlib.sha256(SHARD).hexdigest()
    assert client(paths, repo, ["folder/03.txt", "model.safetensors", "none"]) == [
        ("folder/03.txt", None),
        ("model.safetensors", oid),
    ]


def test_history_is_paged(hub: LoopbackHub, client: Client, repo: str) -> None:
    """All commits are listed, newest first, however many there are."""
    made = [hub.add_model(repo, FILES)] + [hub.commit(repo, {"n": b"%d" % n}, f"number {n}") for n in range(60)]
    found = client(history, repo)
    assert [sha for sha, _ in found] == made[::-1]
    assert found[0][1] == "number 59"
    assert len(hub.log) >= 2


# Faults


def test_refused_once(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A scripted 503 is met once; the client tries again and gets through."""
    hub.add_model(repo, FILES)
    fault = hub.fail(lambda r: "/tree/" in r.path, status=503, headers={"Retry-After": "0"})
    assert len(client(listing, repo)) == 4
    assert fault.left == 0
    assert [r.status for r in hub.log if "/tree/" in r.path] == [503, 200]


@pytest.mark.parametrize(("status", "kind"), [(None, "RemoteProtocolError"), (500, "HfHubHTTPError")])
def test_lost_answer(hub: LoopbackHub, client: Client, repo: str, status: int | None, kind: str) -> None:
    """A commit can happen although its answer is lost; the client does not try it again."""
    hub.add_model(repo, FILES)
    hub.fail(lambda r: "/commit/" in r.path, status=status, after_handling=True)
    with pytest.raises(ClientError) as error:
        client(upload, repo, {"new.txt": b"x"})
    assert kind in error.value.kinds
    assert [commit.title for commit in hub.commits(repo)] == ["two shards", "initial commit"]
    assert [r.status for r in hub.log if "/commit/" in r.path] == [status]


def test_dropped_before_handling(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A connection dropped before the request is handled changes nothing."""
    hub.add_model(repo, FILES)
    hub.fail(lambda r: "/commit/" in r.path, status=None)
    with pytest.raises(ClientError):
        client(upload, repo, {"new.txt": b"x"})
    assert len(hub.commits(repo)) == 1


def test_cut_body(hub: LoopbackHub, client: Client, repo: str) -> None:
    """A body that breaks off has the true length in its header; the client notices and fetches the rest."""
    hub.add_model(repo, FILES)
    hub.fail(lambda r: r.host == "cdn", cut_body_at=100)
    with pytest.raises(http.client.IncompleteRead) as error:
        ask(signed_url(hub, repo))
    assert error.value.partial == SHARD[:100]
    hub.fail(lambda r: r.host == "cdn", cut_body_at=100)
    assert client(download, repo, "model.safetensors") == SHARD
    assert [r.sent for r in hub.log if r.host == "cdn"][:2] == [100, 100]


def model_name(repo: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().model_info(repo).id)


def test_renamed(hub: LoopbackHub, client: Client, repo: str) -> None:
    """307 to the new name, without the host, as the Hub writes it; until somebody takes the former one."""
    hub.add_model(repo, FILES)
    hub.rename(repo, f"{repo}-new")
    assert client(model_name, repo) == f"{repo}-new"
    assert [(r.status, r.path) for r in hub.log if "/api/models/" in r.path] == [
        (307, f"/api/models/{repo}"), (200, f"/api/models/{repo}-new"),
    ]  # fmt: skip
    assert hub.exists(f"{repo}-new")
    assert not hub.exists(repo)
    hub.add_model(repo, {"config.json": b"{}"})
    assert client(model_name, repo) == repo


def test_latency(hub: LoopbackHub) -> None:
    """Every request waits as long as it is told to."""
    hub.latency(0.2)
    start = time.perf_counter()
    ask(f"{hub.url}/api/agent-harnesses")
    assert time.perf_counter() - start >= 0.2


def test_the_links_rate_is_shared_by_its_connections(hub: LoopbackHub, repo: str) -> None:
    """Two downloads at once take as long as their bytes do at the rate, but for a moment that it makes up for."""
    hub.add_model(repo, {"model.safetensors": SHARD})
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


# Threads


def test_many_threads(hub: LoopbackHub, repo: str) -> None:
    """Readers and writers at once see only whole commits, and every request is in the log."""
    hub.add_model(repo, {"model.safetensors": SHARD})
    url = f"{hub.url}/api/models/{repo}"

    def work(n: int) -> int:
        hub.commit(repo, {f"{n}/a.txt": b"a", f"{n}/b.txt": b"b"})
        assert ask(signed_url(hub, repo))[2] == SHARD
        return len(json.loads(ask(url)[2])["siblings"])

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(work, range(48)))
    assert all(count % 2 == 1 for count in counts)
    assert (len(hub.commits(repo)), len(hub.tree(repo))) == (49, 97)
    assert len(hub.log) == 3 * 48


def test_one_winner(hub: LoopbackHub, repo: str) -> None:
    """Of many commits on the same parent at once, one is made and the rest are stale."""
    head = hub.add_model(repo, FILES)
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


def test_safetensors_metadata(hub: LoopbackHub, client: Client, repo: str) -> None:
    """The client reads a shard's header by range, and the listing counts its numbers."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}).encode()
    hub.add_model(repo, {"model.safetensors": len(header).to_bytes(8, "little") + header + bytes(32)})
    assert client(header_counts, repo) == {"F32": 8}


def test_transformers_reads_a_config(hub: LoopbackHub, client: Client, repo: str) -> None:
    """transformers' from_pretrained finds a tiny llama here."""
    pytest.importorskip("transformers")
    hub.add_model(repo, FILES)
    assert client(llama, repo) == ("llama", 16)
