"""No request's body is taken in that is longer than the Space reads: by its stated length, and counted as it comes.

Form, API, upload and webhook alike, before anything of it is parsed. Not here: what a body may say (page, api, bot).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from merger.safety.limits import BODY
from merger.safety.numbers import size

_LINGER_SECONDS, _LINGER_PARTS = 0.5, 200
"""Of 64 kB each, as the server hands them on."""


class BodyLimit:
    """The application behind it sees bodies that are whole and short, and none else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            messages = None if _read_length(scope) > BODY.most else await _read_body(receive)
            if messages is None:
                await _linger(receive)
        except ClientDisconnect:
            return
        if messages is None:
            told = {"error": f"a request has {size(BODY.most)} at most"}
            await JSONResponse(told, 413, {"Connection": "close"})(scope, receive, send)
            return
        first = iter(messages)

        async def replay() -> Message:
            return next(first, None) or await receive()

        await self._app(scope, replay, send)


def _read_length(scope: Scope) -> int:
    stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(stated) if stated.isdigit() else 0


async def _linger(receive: Receive) -> None:
    """Take in a little more and forget it: who sends a body to its end reads the answer, not a broken connection.

    Raises:
        ClientDisconnect: who asked is gone.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            for _ in range(_LINGER_PARTS):
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                if not message.get("more_body", False):
                    return


async def _read_body(receive: Receive) -> list[Message] | None:
    """The parts of a body; None: there are more bytes than are read.

    Raises:
        ClientDisconnect: who asked is gone.
    """
    messages, so_far, more = list[Message](), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        so_far += len(message.get("body", b""))
        if so_far > BODY.most:
            return None
        more = message.get("more_body", False)
        messages.append(message)
    return messages
