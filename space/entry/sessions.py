"""Who is signed in: what the page knows of a browser, kept here in memory; the browser's cookie is a name for it.

In place of the page's own way, which puts all of it, the token included, into the cookie, where signing out cannot
reach a copy. Beside that: what cannot be signed in ends in a sentence. Not here: the sign-in itself (gradio), and
whose requests come in (door).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.sessions import Session, SessionMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from space.entry.door import page

BEGIN, RETURN = "/login/huggingface", "/login/callback"
_SIGNED_IN = "oauth_info"
_STATE = "_state_huggingface_"
_SECONDS, _SECONDS_TO_BEGIN = 8 * 3600, 600
_MOST, _MOST_EACH = 10_000, 20
_MOST_QUERY_BYTES = 2_000
_AGAIN = {"Sign in again": BEGIN, "Go on without": "/"}
_DECLINED = "You did not let the Space sign you in. Nothing was changed."
_NOT_BEGUN = "This sign-in was not begun in this browser, or too long ago. Nothing was changed."
_LONG = "This address is too long to come back to after signing in."
_FAILED = "The Hub did not confirm this sign-in. Nothing was changed."

log = logging.getLogger("space.entry.sessions")


@dataclass(frozen=True)
class _Entry:
    content: Mapping[str, Any]
    until: float

    @property
    def user(self) -> str | None:
        about = self.content.get(_SIGNED_IN)
        return None if about is None else str(about["userinfo"]["preferred_username"])


class Table:
    """What is known of browsers, by names that nobody can guess. Sign-ins that were only begun have their own room."""

    def __init__(self) -> None:
        self._rooms: tuple[dict[str, _Entry], dict[str, _Entry]] = {}, {}

    def get(self, name: str) -> Session:
        """A copy of what is known; empty where that is nothing, or was long ago."""
        found = next((room[name] for room in self._rooms if name in room), None)
        return Session({} if found is None or found.until < time.time() else found.content)

    def drop(self, name: str) -> None:
        """Forget it: whoever has the name has nothing."""
        for room in self._rooms:
            room.pop(name, None)

    def put(self, content: Mapping[str, Any]) -> str:
        """Keep it under a new name."""
        now, name = time.time(), secrets.token_urlsafe(32)
        is_begun = _SIGNED_IN not in content
        until = content.get(_SIGNED_IN, {}).get("expires_at") or now + (_SECONDS_TO_BEGIN if is_begun else _SECONDS)
        kept = _Entry(dict(content), float(until))
        room = self._rooms[is_begun]
        for old in [old for old, other in room.items() if other.until < now]:
            del room[old]
        same = [old for old, other in room.items() if other.user == kept.user and not is_begun]
        for old in same[: max(0, len(same) + 1 - _MOST_EACH)] or list(room)[: max(0, len(room) + 1 - _MOST)]:
            del room[old]
        room[name] = kept
        return name


class Sessions:
    """Gives each request its session, and a session that was changed a new name.

    Args:
        app: what is behind it.
        is_framed: it is served by https, and shown in the Hub's frame: the cookie must go along there, and is then
            kept apart from the one of the Space's own tab, and from those that other sites' pages could send.
        table: where sessions are kept.
    """

    def __init__(self, app: ASGIApp, is_framed: bool, table: Table) -> None:
        self._app, self._table = app, table
        self._cookie = "__Host-merger" if is_framed else "merger"
        self._flags = "Path=/; HttpOnly; " + ("Secure; SameSite=None; Partitioned" if is_framed else "SameSite=Lax")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        name = HTTPConnection(scope).cookies.get(self._cookie, "")
        session = scope["session"] = self._table.get(name)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start" and session.modified:
                self._table.drop(name)
                kept = f"{self._cookie}={self._table.put(session)}" if session else f"{self._cookie}=; Max-Age=0"
                MutableHeaders(scope=message).append("Set-Cookie", f"{kept}; {self._flags}")
            await send(message)

        await _answer_sign_in(self._app, scope, receive, send_named)


async def _answer_sign_in(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """The page, where a sign-in that goes wrong is told."""
    if scope["type"] != "http" or scope["path"] not in (BEGIN, RETURN):
        await app(scope, receive, send)
        return
    refused = _find_refusal(scope)
    if refused is None:
        try:
            await app(scope, receive, send)
        except Exception as error:  # the Hub's no, its silence, a token that is not its own: none is ours to mend
            log.warning("a sign-in failed (%s)", type(error).__name__)
            refused = page(400, _FAILED, _AGAIN)
    if refused is not None:
        await refused(scope, receive, send)


def _find_refusal(scope: Scope) -> Response | None:
    if len(scope["query_string"]) > _MOST_QUERY_BYTES:
        return page(400, _LONG, {"To the Space": "/"})
    if scope["path"] == BEGIN:
        return None
    asked = parse_qs(scope["query_string"].decode("latin-1"))
    state = _STATE + asked.get("state", [""])[0]
    if state not in scope["session"]:
        return page(400, _NOT_BEGUN, _AGAIN)
    if "error" in asked:
        scope["session"].pop(state)
        return page(400, _DECLINED, _AGAIN)
    return None


def install(app: FastAPI, is_framed: bool) -> Table:
    """Put these sessions in the place of those that the page would keep in its cookie.

    Raises:
        LookupError: the page has none to be replaced, and would keep the token where we do not know.
    """
    table, replaced = Table(), 0
    ours = Middleware(Sessions, is_framed=is_framed, table=table)
    for mounted in (route.app for route in app.routes if isinstance(route, Mount)):
        if isinstance(mounted, FastAPI):
            replaced += sum(map(_is_theirs, mounted.user_middleware))
            mounted.user_middleware = [ours if _is_theirs(each) else each for each in mounted.user_middleware]
    if replaced != 1:
        raise LookupError(f"the page keeps sessions in {replaced} places, not in one")
    return table


def _is_theirs(middleware: Middleware) -> bool:
    kind: Any = middleware.cls
    return kind is SessionMiddleware
