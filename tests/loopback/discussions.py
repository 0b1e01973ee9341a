"""Discussions and pull requests, kept small: open, look, comment, rename, close, merge. No reviews, no diffs."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from .repos import Discussion, Entry, HubError, Repo
from .rights import is_member, need_write_token
from .wire import Answer, Context, Exchange, Route, reply

PAGE = 10


def open_discussion(repo: Repo, author: str, title: str, text: str, fork: str | None, status: str) -> Discussion:
    """The next number, with its first comment."""
    num = len(repo.discussions) + 1
    found = Discussion(num, title, author, status, datetime.now(UTC), fork=fork)
    repo.discussions[num] = found
    if text:
        _comment(found, author, text)
    return found


def open_pull_request(repo: Repo, author: str, title: str, text: str, fork: str, status: str = "open") -> Discussion:
    """A pull request whose reference stands where it forked off."""
    found = open_discussion(repo, author, title, text, fork, status)
    repo.refs[found.ref] = fork
    return found


def create(context: Context, x: Exchange) -> Answer:
    """A discussion, or a pull request that is a draft until somebody opens it."""
    repo = context.repo(x, "contribute")
    asked, author = x.json(), x.user.name if x.user else ""
    title, text = asked["title"], asked.get("description", "")
    if asked.get("pullRequest"):
        made = open_pull_request(repo, author, title, text, repo.resolve("main").sha, "draft")
    else:
        made = open_discussion(repo, author, title, text, None, "open")
    return reply({"num": made.num, "url": f"{context.url}/{repo.key}/discussions/{made.num}"})


def listing(context: Context, x: Exchange) -> Answer:
    """Discussions, newest first, in pages."""
    repo = context.repo(x, "read")
    found = [item for item in reversed(repo.discussions.values()) if _wanted(x, item)]
    start = int(x.param("p", "0")) * PAGE
    page = [_brief(repo, item) for item in found[start : start + PAGE]]
    return reply({"discussions": page, "count": len(found), "start": start})


def _wanted(x: Exchange, item: Discussion) -> bool:
    kind = "pull_request" if item.fork else "discussion"
    status = "open" if item.status in ("open", "draft") else "closed"
    return (
        x.param("type", "all") in ("all", kind)
        and x.param("status", "all") in ("all", status)
        and x.param("author", item.author) == item.author
    )


def detail(context: Context, x: Exchange) -> Answer:
    """One discussion with all that happened in it."""
    repo, item = _find(context, x, "read")
    more: dict[str, Any] = {"events": _events(repo, item)}
    if item.fork:
        changes = {"base": item.base} | ({"mergeCommitId": item.merged} if item.merged else {})
        more |= {"changes": changes, "filesWithConflicts": sorted(_conflicts(repo, item)), "diff": ""}
    return reply(_brief(repo, item) | more)


def _brief(repo: Repo, item: Discussion) -> dict[str, Any]:
    return {
        "num": item.num,
        "title": item.title,
        "author": {"name": item.author},
        "createdAt": _stamp(item.created),
        "status": item.status,
        "repo": {"name": repo.id, "type": repo.type},
        "isPullRequest": item.fork is not None,
    }


def _events(repo: Repo, item: Discussion) -> list[dict[str, Any]]:
    if item.fork is None:
        return list(item.events)
    before = {old.sha for old in repo.log(item.fork)}
    ours = [new for new in repo.log(item.ref) if new.sha not in before]
    pushed = [_event("commit", new.author, new.date, {"subject": new.title, "oid": new.sha}) for new in ours]
    return sorted([*item.events, *pushed], key=lambda event: str(event["createdAt"]))


def comment(context: Context, x: Exchange) -> Answer:
    """Say something."""
    _, item = _find(context, x, "read")
    need_write_token(x.user)
    return reply({"newMessage": _comment(item, _name(x), x.json()["comment"])})


def status(context: Context, x: Exchange) -> Answer:
    """Open or close; to open a draft is to publish it."""
    _, item = _owned(context, x)
    asked = x.json()
    if item.status == "merged":
        raise HubError(400, "This pull request is merged")
    if asked.get("comment"):
        _comment(item, _name(x), asked["comment"])
    return reply({"newStatus": _set_status(item, _name(x), asked["status"])})


def rename(context: Context, x: Exchange) -> Answer:
    """Give it another title."""
    _, item = _owned(context, x)
    old, item.title = item.title, x.json()["title"]
    return reply({"newTitle": _note(item, "title-change", _name(x), {"from": old, "to": item.title})})


def merge(context: Context, x: Exchange) -> Answer:
    """Put the pull request's changes on top of its base, unless both changed the same file."""
    repo, item = _find(context, x, "write")
    if item.fork is None or item.status != "open":
        raise HubError(400, f"This pull request cannot be merged: it is {item.status}")
    if conflicts := _conflicts(repo, item):
        raise HubError(409, f"Merge conflict in {', '.join(sorted(conflicts))}")
    tree, theirs = dict(repo.resolve(item.base).tree), repo.resolve(item.ref).tree
    for path in _changed(repo, item.fork, item.ref):
        _replace(tree, path, theirs.get(path))
    if text := x.json().get("comment"):
        _comment(item, _name(x), text)
    title = f"{item.title} (#{item.num})"
    item.merged = repo.write(item.base, tree, title, "", _name(x)).sha
    _set_status(item, _name(x), "merged")
    return reply({"mergeCommitId": item.merged})


def _replace(tree: dict[str, Entry], path: str, entry: Entry | None) -> None:
    if entry is None:
        tree.pop(path, None)
    else:
        tree[path] = entry


def _changed(repo: Repo, old: str, new: str) -> set[str]:
    before, after = repo.resolve(old).tree, repo.resolve(new).tree
    return {path for path in {*before, *after} if before.get(path) != after.get(path)}


def _conflicts(repo: Repo, item: Discussion) -> set[str]:
    if item.fork is None or item.merged:
        return set()
    both = _changed(repo, item.fork, item.ref) & _changed(repo, item.fork, item.base)
    return both & _changed(repo, item.ref, item.base)


def _find(context: Context, x: Exchange, right: str) -> tuple[Repo, Discussion]:
    repo = context.repo(x, right)
    item = repo.discussions.get(int(x.args["num"]))
    if item is None:
        raise HubError(404, "Discussion not found")
    return repo, item


def _owned(context: Context, x: Exchange) -> tuple[Repo, Discussion]:
    repo, item = _find(context, x, "read")
    need_write_token(x.user)
    if item.author != _name(x) and not is_member(repo, x.user):
        raise HubError(403, "Only the author or the repo's owner may do this")
    return repo, item


def _name(x: Exchange) -> str:
    return x.user.name if x.user else ""


def _comment(item: Discussion, author: str, text: str) -> dict[str, Any]:
    latest = {"raw": text, "html": text, "updatedAt": _stamp(datetime.now(UTC)), "author": {"name": author}}
    return _note(item, "comment", author, {"edited": False, "hidden": False, "latest": latest, "history": []})


def _set_status(item: Discussion, author: str, status: str) -> dict[str, Any]:
    item.status = status
    return _note(item, "status-change", author, {"status": status})


def _note(item: Discussion, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    event = _event(kind, author, datetime.now(UTC), data, f"{item.num:08x}{len(item.events):08x}")
    item.events.append(event)
    return event


def _event(kind: str, author: str, date: datetime, data: dict[str, Any], name: str = "") -> dict[str, Any]:
    return {
        "id": name or str(data["oid"])[:16],
        "type": kind,
        "createdAt": _stamp(date),
        "author": {"name": author},
        "data": data,
    }


def _stamp(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def routes() -> Iterable[Route]:
    """This room's part of the table."""
    yield Route("GET", "/api/{repo}/discussions", listing)
    yield Route("POST", "/api/{repo}/discussions", create)
    yield Route("GET", "/api/{repo}/discussions/{num}", detail)
    yield Route("POST", "/api/{repo}/discussions/{num}/comment", comment)
    yield Route("POST", "/api/{repo}/discussions/{num}/status", status)
    yield Route("POST", "/api/{repo}/discussions/{num}/title", rename)
    yield Route("POST", "/api/{repo}/discussions/{num}/merge", merge)
