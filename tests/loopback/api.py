"""The JSON endpoints that look at repos and make or delete them, their branches. No file's bytes pass here."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, urlencode

from . import cards
from .repos import GITATTRIBUTES, Commit, Entry, HubError, Repo, folder_oid
from .rights import is_member, need_namespace
from .wire import Answer, Context, Exchange, Route, reply

TREE_PAGE, TREE_PAGE_EXPANDED = 1000, 50


def harnesses(context: Context, x: Exchange) -> Answer:
    """The coding agents the client may name in its user agent: none."""
    return reply({"standardEnvVars": [], "harnesses": {}})


def whoami(context: Context, x: Exchange) -> Answer:
    """The user behind the token."""
    if x.user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in x.user.orgs]
    token = {"displayName": "loopback", "role": x.user.role}
    name = {"name": x.user.name, "fullname": x.user.name, "email": f"{x.user.name}@localhost", "avatarUrl": ""}
    return reply({"type": "user", "id": x.user.name, **name, "orgs": orgs, "auth": {"accessToken": token}})


def members(context: Context, x: Exchange) -> Answer:
    """The users of an organisation."""
    found = sorted({user.name for user in context.world.users.values() if x.args["org"] in user.orgs})
    if not found:
        raise HubError(404, "Organization not found")
    return reply([{"user": name, "fullname": name, "avatarUrl": ""} for name in found])


def _named(x: Exchange) -> tuple[str, str, dict[str, Any]]:
    asked = x.json()
    owner = asked.get("organization") or (x.user.name if x.user else "")
    need_namespace(x.user, owner)
    kind = asked.get("type") or "model"
    name = f"{owner}/{asked['name']}"
    return owner, name if kind == "model" else f"{kind}s/{name}", asked


def create_repo(context: Context, x: Exchange) -> Answer:
    """A repo with the first commit that the Hub makes by itself."""
    owner, key, asked = _named(x)
    url = f"{context.url}/{key}"
    if key in context.world.repos:
        kind = asked.get("type") or "model"
        return reply({"error": f"You already created this {kind} repo", "url": url}, 409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repo = context.world.create(Repo(key, owner, private, made_by_app=x.user is not None and x.user.only_made))
    tree = context.world.store({".gitattributes": GITATTRIBUTES})
    repo.write("refs/heads/main", tree, "initial commit", "", "system")
    return reply({"url": url, "name": repo.id, "id": repo.id})


def delete_repo(context: Context, x: Exchange) -> Answer:
    """Gone, with its history."""
    _, key, _ = _named(x)
    if context.world.repos.pop(key, None) is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return reply({})


def validate_yaml(context: Context, x: Exchange) -> Answer:
    """What a commit with this card would be refused for."""
    errors, warnings = cards.problems(str(x.json().get("content", "")))
    body = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return reply(body, 400 if errors else 200)


def search(context: Context, x: Exchange) -> Answer:
    """The models that the user may see and whose names hold the words, in the order of their names."""
    words, limit = x.param("search").lower(), int(x.param("limit", "1000"))
    seen = [repo for repo in context.world.repos.values() if not repo.private or is_member(repo, x.user)]
    found = sorted(repo.id for repo in seen if repo.type == "model" and words in repo.id.lower())
    return reply([{"id": name, "modelId": name, "downloads": 0, "likes": 0, "tags": []} for name in found[:limit]])


def info(context: Context, x: Exchange) -> Answer:
    """A repo at a revision; `expand` asks for single properties."""
    repo = context.repo(x, "read")
    commit = repo.resolve(x.args.get("rev") or "main")
    about = _about(context, repo, commit, x.flag("blobs"))
    if wanted := x.params.get("expand") or x.params.get("expand[]"):
        about = {key: about[key] for key in ("_id", "id", *wanted) if about.get(key) is not None}
    else:
        about.pop("baseModels")  # the Hub says it only when asked
    return reply(about)


def _about(context: Context, repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    data, tensors = _card(context, commit), [e for path, e in commit.tree.items() if path.endswith(".safetensors")]
    tags = cards.tags(data) + (["safetensors"] if tensors else [])
    return {
        "_id": repo.id,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.sha,
        "lastModified": when(commit.date),
        "createdAt": when(repo.created),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "library_name": data.get("library_name"),
        "pipeline_tag": data.get("pipeline_tag"),
        "cardData": data,
        "baseModels": cards.base_models(data),
        "safetensors": cards.parameters([context.world.blobs.path(entry.sha256) for entry in tensors]),
        "siblings": [_sibling(path, entry, blobs) for path, entry in sorted(commit.tree.items())],
        "usedStorage": sum(entry.size for entry in commit.tree.values()),
    }


def _card(context: Context, commit: Commit) -> dict[str, Any]:
    entry = commit.tree.get("README.md")
    return cards.card_data(context.world.blobs.path(entry.sha256).read_text("utf-8", "replace")) if entry else {}


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return {"rfilename": path, "size": entry.size, "blobId": entry.oid} | ({"lfs": lfs} if entry.lfs else {})


def tree(context: Context, x: Exchange) -> Answer:
    """The files and folders below a path, in pages."""
    repo = context.repo(x, "read")
    commit, below = repo.resolve(x.args["rev"]), x.args.get("path", "").strip("/")
    nodes = _nodes(commit, f"{below}/" if below else "", x.flag("recursive"))
    if below and not nodes:
        raise HubError(404, f"{below} does not exist on {x.args['rev']}", "EntryNotFound")
    limit = min(int(x.param("limit", "1000000")), TREE_PAGE_EXPANDED if x.flag("expand") else TREE_PAGE)
    return _page(context, x, [_node(repo, commit, path, x.flag("expand")) for path in nodes], limit)


def _nodes(commit: Commit, prefix: str, recursive: bool) -> list[str]:
    """Paths below a prefix; a folder's ends in a slash."""
    found = set()
    for path in commit.tree:
        if path.startswith(prefix):
            parts = path.removeprefix(prefix).split("/")
            folders = [prefix + "/".join(parts[:n]) + "/" for n in range(1, len(parts))]
            found.update([*folders, path] if recursive else [*folders, path][:1])
    return sorted(found)


def _node(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    last = {"lastCommit": _last_commit(repo, commit, path)} if expand else {}
    if path.endswith("/"):
        inside = [item for item in commit.tree.items() if item[0].startswith(path)]
        return {"type": "directory", "path": path.rstrip("/"), "oid": folder_oid(inside), "size": 0, **last}
    entry = commit.tree[path]
    lfs = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    node = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    return {**node, **({"lfs": lfs} if entry.lfs else {}), **last}


def _last_commit(repo: Repo, commit: Commit, path: str) -> dict[str, str]:
    def touches(other: Commit) -> bool:
        return any(name == path or (path.endswith("/") and name.startswith(path)) for name in other.files)

    found = next(other for other in repo.log(commit.sha) if touches(other))
    return {"id": found.sha, "title": found.title, "date": when(found.date)}


def _page(context: Context, x: Exchange, items: list[Any], limit: int) -> Answer:
    """One page, and the address of the next in the Link header."""
    start = int(x.param("cursor", "0"))
    page, end = items[start : start + limit], start + limit
    if end >= len(items):
        return reply(page)
    query = urlencode({key: values[0] for key, values in x.params.items()} | {"cursor": str(end)})
    return reply(page, headers={"Link": f'<{context.url}{x.path}?{query}>; rel="next"'})


def paths_info(context: Context, x: Exchange) -> Answer:
    """What is at these paths. Those with nothing there are left out, without an error."""
    repo = context.repo(x, "read")
    commit = repo.resolve(x.args["rev"])
    asked = _form(x)
    expand = str(asked.get("expand", ["false"])[0]).lower() == "true"
    nodes = [_at(commit, path.strip("/")) for path in asked.get("paths", [])]
    return reply([_node(repo, commit, node, expand) for node in nodes if node])


def _form(x: Exchange) -> dict[str, list[Any]]:
    if "json" in x.headers.get("Content-Type", ""):
        return {key: value if isinstance(value, list) else [value] for key, value in x.json().items()}
    return dict(parse_qs(x.body.read().decode()))


def _at(commit: Commit, path: str) -> str:
    if path in commit.tree:
        return path
    return f"{path}/" if any(name.startswith(f"{path}/") for name in commit.tree) else ""


def refs(context: Context, x: Exchange) -> Answer:
    """Branches and tags; pull requests when asked for."""
    repo = context.repo(x, "read")
    found = {"branches": _refs(repo, "refs/heads/"), "converts": [], "tags": _refs(repo, "refs/tags/")}
    if x.flag("include_prs"):
        found["pullRequests"] = _refs(repo, "refs/pr/")
    return reply(found)


def _refs(repo: Repo, prefix: str) -> list[dict[str, str]]:
    found = repo.named(prefix).items()
    return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in found]


def commits(context: Context, x: Exchange) -> Answer:
    """The history, newest first, in pages."""
    repo = context.repo(x, "read")
    formatted = "formatted" in x.params.get("expand[]", [])
    found = [_commit(commit, formatted) for commit in repo.log(x.args["rev"])]
    return _page(context, x, found, int(x.param("limit", "50")))


def _commit(commit: Commit, formatted: bool) -> dict[str, Any]:
    words = {"title": commit.title, "message": commit.message}
    authors = [{"user": commit.author}]
    about = {"id": commit.sha, **words, "date": when(commit.date), "authors": authors}
    return {**about, "formatted": words} if formatted else about


def create_branch(context: Context, x: Exchange) -> Answer:
    """A branch at a revision, or at main's head."""
    repo = context.repo(x, "write")
    start = repo.resolve(x.json().get("startingPoint") or "main")
    repo.point(f"refs/heads/{x.args['branch']}", start.sha)
    return reply({})


def delete_branch(context: Context, x: Exchange) -> Answer:
    """A branch's end."""
    context.repo(x, "write").unpoint(f"refs/heads/{x.args['branch']}")
    return reply({})


def auth_check(context: Context, x: Exchange) -> Answer:
    """Whether the files may be read, or the repo written to."""
    context.repo(x, "write" if x.path.endswith("/write") else "files")
    return reply({})


def when(date: datetime) -> str:
    """A time as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03d}Z"


def routes() -> Iterable[Route]:
    """This room's part of the table."""
    yield Route("GET", "/api/agent-harnesses", harnesses)
    yield Route("GET", "/api/whoami-v2", whoami)
    yield Route("GET", "/api/organizations/{org}/members", members)
    yield Route("POST", "/api/repos/create", create_repo)
    yield Route("DELETE", "/api/repos/delete", delete_repo)
    yield Route("POST", "/api/validate-yaml", validate_yaml)
    yield Route("GET", "/api/models", search)
    yield Route("GET", "/api/{repo}", info)
    yield Route("GET", "/api/{repo}/revision/{rev}", info)
    yield Route("GET", "/api/{repo}/tree/{rev}", tree)
    yield Route("GET", "/api/{repo}/tree/{rev}/{path*}", tree)
    yield Route("POST", "/api/{repo}/paths-info/{rev}", paths_info)
    yield Route("GET", "/api/{repo}/refs", refs)
    yield Route("GET", "/api/{repo}/commits/{rev}", commits)
    yield Route("POST", "/api/{repo}/branch/{branch}", create_branch)
    yield Route("DELETE", "/api/{repo}/branch/{branch}", delete_branch)
    yield Route("GET", "/api/{repo}/auth-check", auth_check)
    yield Route("GET", "/api/{repo}/auth-check/write", auth_check)
