"""The door: whose requests come in at all. The Space's own page, the Hub's frame around it, and programs.

A browser sends a visitor's cookie with whatever any site asks for, so a request of another site's is refused before
anything looks at it. Only the front is open to links from elsewhere. Not here: who is signed in (sessions).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import partial
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

FRONT = re.compile(r"/|/login/callback|/merges/[\w-]+", re.ASCII)
"""What a link from elsewhere may lead to: the page, a merge's own page, which changes nothing, and the Hub's way back,
which brings a state that is checked."""

_STRANGE = "Another site asked for this in a visitor's name, and only the Space's own page may: do it there."
_UNKNOWN = "This Space is not known by that name. Its owner can add the name to MERGER_SPACE_HOSTS."

log = logging.getLogger("space.entry.door")


def own_origins(environment: Mapping[str, str]) -> frozenset[str]:
    """Where the Space's page is served, as the Hub says it; none on somebody's own machine.

    Names with commas between them, in SPACE_HOST (the Hub's) and MERGER_SPACE_HOSTS (the owner's); https unless they
    say otherwise.
    """
    named = ",".join(environment.get(name, "") for name in ("SPACE_HOST", "MERGER_SPACE_HOSTS")).lower().split(",")
    found = [name.strip().rstrip("/") for name in named if name.strip()]
    return frozenset(name if "://" in name else f"https://{name}" for name in found)


class Door:
    """Refuses what another site asks for (403), and tells browsers that only the Hub may frame the page.

    Args:
        app: what is behind it.
        own: the Space's own origins; empty: it is served on this machine, and its origin is the host that is asked.
        hub: the Hub's address.
    """

    def __init__(self, app: ASGIApp, own: frozenset[str], hub: str) -> None:
        self._app, self._own, self._hub = app, own, _origin(hub)
        self._names = {urlsplit(origin).hostname for origin in own}
        self._has_told = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._find_refusal(scope, headers)
        if refused is None:
            await self._app(scope, receive, partial(self._send, send, self._origins(headers)))
        elif scope["type"] == "websocket":
            await WebSocketClose(1008)(scope, receive, send)
        else:
            await _answer(refused, headers)(scope, receive, send)

    def _find_refusal(self, scope: Scope, headers: Headers) -> str | None:
        """Why it does not come in."""
        ours = self._origins(headers)
        if any(origin not in ours for origin in headers.getlist("origin")):
            return _STRANGE
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and FRONT.fullmatch(scope["path"]):
            return None
        if not all(self._knows(host) for host in headers.getlist("host")):
            self._tell(headers["host"])
            return _UNKNOWN
        return None if _is_from(headers, ours) else _STRANGE

    def _origins(self, headers: Headers) -> frozenset[str]:
        """The origins that may ask."""
        if self._own:
            return self._own | {self._hub}
        host = headers.get("host", "").lower()
        return frozenset({f"http://{host}", f"https://{host}"}) if self._knows(host) else frozenset()

    def _knows(self, host: str) -> bool:
        """Whether a page under this name is ours: a number is nobody's name, so no other site's page is under it."""
        name = urlsplit(f"//{host}").hostname or ""
        return name in self._names or name == "localhost" or _is_number(name)

    def _tell(self, host: str) -> None:
        if not self._has_told:
            self._has_told = True
            log.warning("refused: the host %r is none of the Space's; others are refused without a word", host[:100])

    async def _send(self, send: Send, ours: frozenset[str], message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("access-control-allow-origin") not in (None, *ours):
                del headers["access-control-allow-origin"]
            headers.append("Content-Security-Policy", f"frame-ancestors 'self' {self._hub}")
        await send(message)


def page(status: int, says: str, ways: Mapping[str, str]) -> Response:
    """A page of one sentence of ours, and ways to go on: addresses by their words."""
    links = " ".join(f'<a href="{address}" style="margin-right:1em">{words}</a>' for words, address in ways.items())
    body = f'<main style="font-family:system-ui;max-width:36em;margin:4em auto"><p>{says}</p><p>{links}</p></main>'
    head = '<!doctype html><html lang="en"><title>Merger</title><meta name="viewport" content="width=device-width">'
    policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Cache-Control": "no-store"}
    return HTMLResponse(f"{head}{body}</html>", status, policy)


def _answer(says: str, headers: Headers) -> Response:
    is_read = headers.get("sec-fetch-mode") == "navigate"
    return page(403, says, {"To the Space": "/"}) if is_read else PlainTextResponse(says + "\n", 403)


def _is_from(headers: Headers, ours: frozenset[str]) -> bool:
    """Whether it comes from our page, or from no page at all: a program, an address that somebody typed."""
    if "origin" in headers:
        return True
    site, referer = headers.get("sec-fetch-site"), headers.get("referer")
    if site is not None:
        return site in ("same-origin", "none")
    return referer is None or _origin(referer) in ours


def _origin(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _is_number(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False
