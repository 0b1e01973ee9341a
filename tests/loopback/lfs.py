"""Large files, both ways: resolve and its redirect, the LFS batch, and the second origin that holds the bytes.

The second origin plays the CDN and the object store: it knows no users, only signed URLs that expire. No xet.
"""

import hashlib
import hmac
import json
import re
import time
from collections.abc import Iterable
from urllib.parse import quote, urlencode

from .blobs import Blob
from .commits import writable
from .repos import HubError, Repo, World
from .rights import open_repo
from .wire import Answer, Context, Exchange, Route, ranged, reply


def resolve(context: Context, x: Exchange) -> Answer:
    """A file's bytes, or the way to them."""
    repo = context.repo(x, "files")
    commit, entry = repo.entry(x.args["rev"], x.args["path"])
    headers = {"X-Repo-Commit": commit.sha, "Content-Disposition": _disposition(x.args["path"])}
    if not entry.lfs:
        headers |= {"ETag": f'"{entry.oid}"', "Content-Type": "text/plain; charset=utf-8"}
        return ranged(context.world.blobs.path(entry.sha256), entry.size, x.headers.get("Range"), headers)
    place = signed(context, context.cdn, "GET", f"/repos/{_long(repo)}/{entry.sha256}", {"as": x.args["path"]})
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size), "Location": place}
    return Answer(302, headers, f"Found. Redirecting to {place}".encode())


def _disposition(path: str) -> str:
    name = path.split("/")[-1]
    return f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";"


def _long(repo: Repo) -> str:
    """The repo's key with its type always in front, as URLs of the second origin have it."""
    return f"{repo.type}s/{repo.id}"


def batch(context: Context, x: Exchange) -> Answer:
    """Where to upload each object; an object that the repo has gets no `actions`."""
    asked = x.json()
    repo = writable(context, x, (asked.get("ref") or {}).get("name"))
    objects = [_object(context, repo, item["oid"], item["size"]) for item in asked["objects"]]
    return reply({"transfer": "basic", "objects": objects})


def _object(context: Context, repo: Repo, oid: str, size: int) -> dict[str, object]:
    if not re.fullmatch("[0-9a-f]{64}", oid):
        return {"oid": oid, "size": size, "error": {"code": 422, "message": "Invalid oid"}}
    if oid in repo.lfs:
        return {"oid": oid, "size": size}
    verify = {"href": f"{context.url}/{repo.key}.git/info/lfs/objects/verify"}
    place = f"/uploads/{_long(repo)}/{oid}"
    upload = {"href": signed(context, context.cdn, "PUT", place, {})}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


def verify(context: Context, x: Exchange) -> Answer:
    """Whether an upload has arrived."""
    asked = x.json()
    repo = open_repo(context.world, x.key, x.user, "contribute")
    if asked["oid"] not in repo.lfs:
        raise HubError(404, f"LFS object {asked['oid']} does not exist")
    if context.world.blobs.path(asked["oid"]).stat().st_size != asked["size"]:
        raise HubError(422, "The size of the LFS object is another")
    return reply({})


def put(context: Context, x: Exchange) -> Answer:
    """An object arrives. Unlocked: uploads run side by side."""
    _check_signature(context, x)
    blob = context.world.blobs.put(x.body)
    _register(context.world, x, blob)
    return Answer(200, {"ETag": f'"{blob.sha256[:32]}"'})


def _register(world: World, x: Exchange, blob: Blob) -> None:
    if blob.sha256 != x.args["oid"]:
        raise HubError(400, f"The bytes' sha256 is {blob.sha256}, not {x.args['oid']}")
    with world.lock:
        if x.key not in world.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        world.repos[x.key].lfs.add(blob.sha256)


def download(context: Context, x: Exchange) -> Answer:
    """A large file's bytes, or a range of them, for whoever has the URL while it lasts."""
    _check_signature(context, x)
    oid = x.args["oid"]
    path = context.world.blobs.path(oid)
    headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
    headers["Content-Disposition"] = _disposition(x.param("as"))
    return ranged(path, path.stat().st_size, x.headers.get("Range"), headers)


def signed(context: Context, origin: str, method: str, path: str, params: dict[str, str]) -> str:
    """An address that works for one verb and for a while."""
    params = params | {"Expires": f"{time.time() + context.url_lifetime:.3f}"}
    return f"{origin}{path}?{urlencode(params | {'Signature': _signature(context, method, path, params)})}"


def _signature(context: Context, method: str, path: str, params: dict[str, str]) -> str:
    text = json.dumps([method, path, sorted(params.items())]).encode()
    return hmac.new(context.secret, text, hashlib.sha256).hexdigest()


def _check_signature(context: Context, x: Exchange) -> None:
    params = {key: values[0] for key, values in x.params.items()}
    given, method = params.pop("Signature", ""), x.method.replace("HEAD", "GET")
    if not hmac.compare_digest(given, _signature(context, method, x.path, params)):
        raise HubError(403, "SignatureDoesNotMatch")
    if float(params["Expires"]) <= time.time():
        raise HubError(403, "AccessDenied: Request has expired")


def routes() -> Iterable[Route]:
    """This room's part of the Hub's table."""
    yield Route("POST", "/{web}.git/info/lfs/objects/batch", batch)
    yield Route("POST", "/{web}.git/info/lfs/objects/verify", verify)
    yield Route("GET", "/{web}/resolve/{rev}/{path*}", resolve)


def cdn_routes() -> Iterable[Route]:
    """All that the second origin answers."""
    yield Route("GET", "/repos/{repo}/{oid}", download, locked=False)
    yield Route("PUT", "/uploads/{repo}/{oid}", put, locked=False)
