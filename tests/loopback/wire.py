"""What a handler is given and what it gives back: Context, Exchange, Route, Answer. No sockets (see server.py).

What the answers say is decided in api.py, commits.py, lfs.py and discussions.py.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote

from .blobs import CHUNK
from .journal import Faults, Journal, Request
from .repos import HubError, Repo, User, World
from .rights import open_repo

_BURST_SECONDS = 0.05
"""What a link has not carried for a moment it makes up for: threads wake late."""


class Pace:
    """One way of the link, which all connections share: bytes pass no faster than at its rate. None: at any.

    `log` has the moment (of `time.monotonic`) and the size of all that passed at a rate.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.log: list[tuple[float, int]] = []
        self._rate, self._free, self._lock = rate, 0.0, threading.Lock()

    @property
    def is_limited(self) -> bool:
        """Whether it has a rate."""
        return self._rate is not None

    def passed(self, size: int) -> None:
        """Wait until so many more bytes may have passed."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free = until = max(self._free, now - _BURST_SECONDS) + size / self._rate
            self.log.append((until, size))
        time.sleep(max(0.0, until - now))


@dataclass
class Context:
    """What a handler may reach: the state, the two origins' addresses and the settings that tests turn."""

    world: World
    root: Path
    url: str = ""
    cdn: str = ""
    url_lifetime: float = 3600.0
    latency: float = 0.0
    down: Pace = field(default_factory=Pace)
    up: Pace = field(default_factory=Pace)
    secret: bytes = b"loopback"
    xet: Path | None = None
    journal: Journal = field(default_factory=Journal)
    faults: Faults = field(default_factory=Faults)

    def repo(self, x: "Exchange", right: str) -> Repo:
        """The repo that the request names, if its user has the right."""
        return open_repo(self.world, x.key, x.user, right)


@dataclass(frozen=True)
class FilePart:
    """A run of bytes of a file on disk, sent without being read into memory."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Answer:
    """A finished answer, not yet sent."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | FilePart = b""

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return self.body.length if isinstance(self.body, FilePart) else len(self.body)


Handle = Callable[[Context, "Exchange"], Answer]

MACROS = {
    "{repo}": "(?P<type>models|datasets|spaces|kernels)/(?P<ns>[^/]+)/(?P<name>[^/]+)",
    "{web}": "(?P<type>datasets/|spaces/|kernels/|)(?P<ns>[^/]+)/(?P<name>[^/]+?)",
}


@dataclass(frozen=True)
class Route:
    """A line of the routing table. In the template `{word}` is one quoted segment, `{word*}` is the rest of the path.

    A locked route runs alone; an unlocked one (it reads a long body) takes the world's lock itself.
    """

    method: str
    template: str
    handle: Handle
    locked: bool = True

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The template as an expression over the raw path: a quoted slash is no slash."""
        parts = re.split(r"(\{\w+\*?\})", self.template)
        return re.compile("".join(_piece(part) for part in parts))

    def match(self, method: str, path: str) -> dict[str, str] | None:
        """The unquoted parts of the path, when this is the route. A HEAD is a GET whose body stays at home."""
        found = self.pattern.fullmatch(path) if method.replace("HEAD", "GET") == self.method else None
        return {key: unquote(value or "") for key, value in found.groupdict().items()} if found else None


def _piece(part: str) -> str:
    if part in MACROS:
        return MACROS[part]
    if not part.startswith("{"):
        return re.escape(part)
    return f"(?P<{part[1:-2]}>.+)" if part.endswith("*}") else f"(?P<{part[1:-1]}>[^/]+)"


class Exchange:
    """A request on its way in."""

    def __init__(self, method: str, target: str, headers: Mapping[str, str], body: "Body", host: str) -> None:
        self.method, self.headers, self.body, self.host = method, headers, body, host
        self.path, _, self.query = target.partition("?")
        self.params = parse_qs(self.query, keep_blank_values=True)
        self.args: dict[str, str] = {}
        self.user: User | None = None

    @property
    def key(self) -> str:
        """The repo's key: a model's has no prefix, whichever way the path spells the type."""
        kind = self.args["type"].strip("/")
        name = f"{self.args['ns']}/{self.args['name']}"
        return name if kind in ("models", "") else f"{kind}/{name}"

    def param(self, name: str, default: str = "") -> str:
        """A query parameter."""
        return self.params.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        """A query parameter that is yes or no."""
        return self.param(name).lower() in ("1", "true")

    def json(self) -> Any:
        """The body as JSON; an empty body is an empty object."""
        try:
            return json.loads(self.body.read() or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from error

    def request(self, status: int | None = None, sent: int = 0) -> Request:
        """The log's entry."""
        seen = self.headers.get("Authorization") is not None
        name = self.user.name if self.user else None
        wanted, received = self.headers.get("Range"), self.body.received
        return Request(self.method, self.path, self.query, wanted, seen, self.host, status, sent, received, name)


class Body:
    """A request's body, read once, in pieces; it may come with a length or in chunks."""

    def __init__(self, file: BinaryIO, headers: Mapping[str, str], pace: Pace) -> None:
        self._chunks = self._read(file, headers)
        self._pace = pace
        self.received = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.received += len(chunk)
            self._pace.passed(len(chunk))
            yield chunk

    def read(self) -> bytes:
        """All that is left."""
        return b"".join(self)

    def drain(self) -> None:
        """Read to the end: on a connection that is kept alive the next request begins there."""
        for _ in self:
            pass

    def _read(self, file: BinaryIO, headers: Mapping[str, str]) -> Iterator[bytes]:
        if headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from _exactly(file, int(headers.get("Content-Length") or 0))
            return
        while size := int(file.readline().split(b";")[0], 16):
            yield from _exactly(file, size)
            file.readline()
        while file.readline().strip():
            pass


def _exactly(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            raise ConnectionError("the client went away in the middle of a body")
        size -= len(chunk)
        yield chunk


class Loaded(Body):
    """A body already in memory: it is read before the lock is taken, so a slow client holds up nobody."""

    def __init__(self, body: Body) -> None:
        data = body.read()
        self._chunks, self._pace = iter([data]), Pace()
        self.received = body.received - len(data)  # __iter__ counts it again


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer in JSON."""
    body = json.dumps(value).encode()
    return Answer(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, body)


def moved(world: World, x: Exchange) -> Answer | None:
    """Where a renamed repo is now: the same address with its new name, without the host, as the Hub writes it."""
    new = world.renamed.get(x.key) if "ns" in x.args else None
    if new is None:
        return None
    place = x.path.replace(f"/{x.args['ns']}/{x.args['name']}", "/" + "/".join(new.split("/")[-2:]), 1)
    place += f"?{x.query}" if x.query else ""
    return Answer(307, {"Location": place}, f"Temporary Redirect. Redirecting to {place}".encode())


def refusal(error: HubError) -> Answer:
    """An error as the Hub words it: in the body and in the headers that the client looks at."""
    headers = {"X-Error-Message": error.message.encode("ascii", "replace").decode().replace("\n", " "), **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return reply({"error": error.message}, error.status, headers)


def ranged(path: Path, size: int, wanted: str | None, headers: Mapping[str, str]) -> Answer:
    """A file or the one range of it that was asked for. Several ranges, or nonsense, get the whole, as from S3."""
    headers = {"Accept-Ranges": "bytes", **headers}
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (wanted or "").strip())
    if not found or not any(found.groups()):
        return Answer(200, headers, FilePart(path, 0, size))
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if first and last and int(last) < start:
        return Answer(200, headers, FilePart(path, 0, size))
    if start >= size:
        return Answer(416, {**headers, "Content-Range": f"bytes */{size}"}, b"The requested range is not satisfiable")
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Answer(206, headers, FilePart(path, start, end + 1 - start))
