"""GitHub on 127.0.0.1, as far as a job of the Action asks it: comments, comparisons, single files, identity tokens.

A real HTTP server with real state for the real client. Not here: running workflows; that is `act`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote

TOKEN, READ_ONLY, IDENTITY = "ghs_of_the_job", "ghs_of_a_fork", "request_token_of_the_job"
ME = "github-actions[bot]"
Answer = tuple[int, Any]


class LoopbackGitHub:
    """One repository's side of the REST API; `comments` by pull request, `files` by path, `log` of all that was asked.

    `compared` holds the changed files by what is compared, ``base...head`` or ``pull 7``; `strange` the answers that
    come in place of its own, in their order, each to the next request of a method and path that fits its pattern.

    Args:
        repository: ``owner/name``.
    """

    def __init__(self, repository: str = "org/recipes") -> None:
        self.repository = repository
        self.comments: dict[int, list[dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}
        self.branches: dict[str, str] = {}
        self.pulls: list[dict[str, str]] = []
        self.compared: dict[str, list[dict[str, str]]] = {}
        self.log: list[str] = []
        self.page = 100
        self.strange: list[tuple[str, int, bytes]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method: str, target: str, content: Any, token: str) -> Answer:
        """What GitHub says."""
        path, _, query = target.partition("?")
        self.log.append(f"{method} {path}")
        asked = {key: values[0] for key, values in parse_qs(query).items()}
        for scripted in self.strange:
            if re.fullmatch(scripted[0], f"{method} {path}"):
                self.strange.remove(scripted)
                return scripted[1:]
        if path == "/identity":
            return (200, {"value": self._identity(asked["audience"])}) if token == IDENTITY else (401, {})
        if token not in (TOKEN, READ_ONLY):
            return 401, {"message": "Bad credentials"}
        if path == "/graphql":
            return 200, {"data": {"viewer": {"login": ME}}}
        if method != "GET" and token == READ_ONLY:
            return 403, {"message": "Resource not accessible by integration"}
        for pattern, handle in self._routes.items():
            if found := re.fullmatch(
                f"{method} {pattern.format(repo=f'/repos/{self.repository}')}", f"{method} {path}"
            ):
                return handle(*map(unquote, found.groups()), content, asked)
        return 404, {"message": "Not Found"}

    @property
    def _routes(self) -> dict[str, Callable[..., Answer]]:
        return {
            "{repo}/issues/([0-9]+)/comments": self._issue,
            "{repo}/issues/comments/([0-9]+)": self._comment,
            "{repo}/compare/([^/]+)": self._compare,
            "{repo}/pulls/([0-9]+)/files": self._changed,
            "{repo}/contents/(.+)": self._file,
            "{repo}/git/blobs/(.+)": self._blob,
            "{repo}/git/ref/heads/(.+)": self._branch,
            "{repo}/git/refs": self._begin,
            "{repo}/pulls": self._pulls,
        }

    def _identity(self, audience: str) -> str:
        claims = json.dumps({"aud": audience, "repository": self.repository}).encode()
        return f"e30.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.unsigned"

    def _issue(self, number: str, content: Any, asked: dict[str, str]) -> Answer:
        if content is None:
            return 200, self._paged(self.comments.get(int(number), []), asked)
        there = self.comments.setdefault(int(number), [])
        there.append({"id": 1000 * int(number) + len(there), "body": content["body"], "user": {"login": ME}})
        return 201, there[-1]

    def _comment(self, number: str, content: Any, asked: dict[str, str]) -> Answer:
        for comment in (each for there in self.comments.values() for each in there if each["id"] == int(number)):
            comment["body"] = content["body"]
            return 200, comment
        return 404, {}

    def _compare(self, ends: str, content: Any, asked: dict[str, str]) -> Answer:
        return (200, {"files": self.compared[ends]}) if ends in self.compared else (404, {})

    def _changed(self, number: str, content: Any, asked: dict[str, str]) -> Answer:
        return 200, self._paged(self.compared.get(f"pull {number}", []), asked)

    def _paged(self, items: list[Any], asked: dict[str, str]) -> list[Any]:
        start = self.page * (int(asked.get("page", "1")) - 1)
        return items[start : start + self.page]

    def _branch(self, name: str, content: Any, asked: dict[str, str]) -> Answer:
        return (200, {"object": {"sha": self.branches[name]}}) if name in self.branches else (404, {})

    def _begin(self, content: Any, asked: dict[str, str]) -> Answer:
        self.branches[content["ref"].removeprefix("refs/heads/")] = content["sha"]
        return 201, {}

    def _pulls(self, content: Any, asked: dict[str, str]) -> Answer:
        if content is None:
            return 200, [each for each in self.pulls if f"org:{each['head']}" == asked["head"]]
        self.pulls.append({**content, "html_url": f"{self.url}/pull/{len(self.pulls) + 1}"})
        return 201, self.pulls[-1]

    def _blob(self, sha: str, content: Any, asked: dict[str, str]) -> Answer:
        found = [data for data in self.files.values() if hashlib.sha1(data).hexdigest() == sha]
        return (200, {"content": base64.encodebytes(found[0]).decode()}) if found else (404, {})

    def _file(self, path: str, content: Any, asked: dict[str, str]) -> Answer:
        there = self.files.get(path)
        sha = hashlib.sha1(there or b"").hexdigest()
        if content is None and there is not None:
            in_full = {"encoding": "base64", "content": base64.encodebytes(there).decode()}
            return 200, {"sha": sha, **(in_full if len(there) < 1 << 20 else {"encoding": "none", "content": ""})}
        if content is None:
            return 404, {}
        if there is not None and content.get("sha") != sha:
            return 409, {}
        self.files[path] = base64.b64decode(content["content"])
        return 200, {}


def _handler(github: LoopbackGitHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """One connection."""

        def do_any(self) -> None:
            """Take one request."""
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, told = github.answer(self.command, self.path, json.loads(body) if body else None, token)
            raw = told if isinstance(told, bytes) else json.dumps(told).encode()
            self.send_response(status)
            if isinstance(told, list) and len(told) == github.page:
                page = int((re.search(r"[?&]page=([0-9]+)", self.path) or ["", "1"])[1])
                rest = re.sub(r"[?&]page=[0-9]+", "", self.path)
                self.send_header("Link", f'<{github.url}{rest}&page={page + 1}>; rel="next"')
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PATCH = do_PUT = do_any

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: there is a log."""

    return Handler
