"""Writing: preupload (how is each file to travel?) and the commit itself. The LFS objects travel elsewhere: lfs.py."""

import base64
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from . import cards
from .blobs import Blob
from .discussions import open_pull_request
from .repos import LFS_THRESHOLD, Entry, HubError, Repo, is_lfs, lfs_entry
from .rights import open_repo
from .wire import Answer, Context, Exchange, Route, reply

STALE = "A commit has happened since. Please refresh and try again."
NO_OBJECT = "Your push was rejected because an LFS pointer pointed to a file that does not exist."


def writable(context: Context, x: Exchange, revision: str | None) -> Repo:
    """The repo, if the user may commit there. Anyone with a write token may open a pull request or add to one."""
    foreign = revision is None or revision.startswith("refs/pr/") or x.flag("create_pr")
    return open_repo(context.world, x.key, x.user, "contribute" if foreign else "write")


def preupload(context: Context, x: Exchange) -> Answer:
    """For each file: LFS or not, ignored or not, and what is at its path now."""
    repo = writable(context, x, x.args["rev"])
    tree, asked = repo.resolve(x.args["rev"]).tree, x.json()
    ignored = asked.get("gitIgnore", "").split()
    return reply({"files": [_mode(tree.get(file["path"]), file, ignored) for file in asked["files"]]})


def _mode(there: Entry | None, file: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    path = file["path"]
    lfs = is_lfs(path, file["size"], base64.b64decode(file.get("sample", "")))
    ignore = any(fnmatch(path, rule) or fnmatch(path.split("/")[-1], rule) for rule in ignored)
    mode = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignore}
    return mode | ({"oid": there.sha256 if there.lfs else there.oid} if there else {})


def commit(context: Context, x: Exchange) -> Answer:
    """One commit out of lines of JSON: a header, then the changes in order; all of them or none."""
    revision, pull = x.args["rev"], x.flag("create_pr")
    repo = writable(context, x, revision)
    header, changes = _lines(x)
    start = _start(repo, revision, header.get("parentCommit"), pull)
    tree = dict(repo.resolve(start).tree)
    for change in changes:
        _apply(context, repo, tree, change)
    author = x.user.name if x.user else "anonymous"
    title, message = header["summary"], header.get("description", "")
    request = open_pull_request(repo, author, title, message, repo.resolve(start).sha) if pull else None
    ref = request.ref if request else repo.ref(revision)
    made = repo.write(str(ref), tree, title, message, author)
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{context.url}/{repo.key}/commit/{made.sha}"}
    if request:
        answer["pullRequestUrl"] = f"{context.url}/{repo.key}/discussions/{request.num}"
    return reply(answer | {"hookOutput": ""})


def _lines(x: Exchange) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        lines = [json.loads(line) for line in x.body.read().splitlines() if line.strip()]
    except ValueError as error:
        raise HubError(400, f"Invalid NDJSON: {error}") from error
    if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
        raise HubError(400, "The first line must be a header with a summary")
    return lines[0]["value"], lines[1:]


def _start(repo: Repo, revision: str, parent: str | None, pull: bool) -> str:
    """The commit to build on. A pull request may start anywhere in the past, a branch only at its head."""
    head = repo.resolve(revision).sha
    if pull:
        return parent or head
    if not (repo.ref(revision) or "").startswith(("refs/heads/", "refs/pr/")):
        raise HubError(400, f"{revision} is not a branch: commits go on top of branches")
    if parent and not head.startswith(parent):
        raise HubError(412, STALE)
    return head


def _apply(context: Context, repo: Repo, tree: dict[str, Entry], change: dict[str, Any]) -> None:
    key, value = change["key"], change["value"]
    if key == "file":
        tree[value["path"]] = _regular(context, value)
    elif key == "lfsFile":
        tree[value["path"]] = _large(context, repo, value)
    elif key == "deletedFile":
        _delete(tree, [value["path"]] if value["path"] in tree else [], "file")
    elif key == "deletedFolder":
        _delete(tree, [path for path in tree if path.startswith(value["path"].rstrip("/") + "/")], "folder")
    else:
        raise HubError(400, f"Unknown line in a commit: {key}")


def _regular(context: Context, value: dict[str, Any]) -> Entry:
    text = value.get("content", "")
    content = base64.b64decode(text) if value.get("encoding") == "base64" else text.encode()
    if len(content) >= LFS_THRESHOLD:
        raise HubError(400, "Your push was rejected because it contains files larger than 10 MiB. Please use LFS.")
    if value["path"] == "README.md" and (errors := cards.problems(content.decode("utf-8", "replace"))[0]):
        raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    return context.world.regular_entry(context.world.blobs.put([content]))


def _large(context: Context, repo: Repo, value: dict[str, Any]) -> Entry:
    """An object that this repo has: just uploaded, or in another commit (then it is a copy, and no bytes travel)."""
    oid = value["oid"]
    if oid not in repo.lfs:
        if context.xet is None:
            raise HubError(400, f"{NO_OBJECT} Missing: {value['path']} ({oid})")
        repo.xet[oid] = value["size"]
    return lfs_entry(Blob(oid, repo.xet.get(oid) or context.world.blobs.path(oid).stat().st_size))


def _delete(tree: dict[str, Entry], paths: list[str], kind: str) -> None:
    if not paths:
        raise HubError(404, f"A {kind} with this name doesn't exist", "EntryNotFound")
    for path in paths:
        del tree[path]


def routes() -> Iterable[Route]:
    """This room's part of the table."""
    yield Route("POST", "/api/{repo}/preupload/{rev}", preupload)
    yield Route("POST", "/api/{repo}/commit/{rev}", commit)
