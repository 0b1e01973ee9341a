"""Bodies that are too long for the Space are refused by their length, or as soon as they become too long.

Not here: that the served Space asks (test_door).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from merger.safety.limits import BODY
from space.entry.body_limit import BodyLimit


class Behind:
    """An application that reads its body whole, and says how long it is."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        body = await Request(scope, receive).body()
        response: Response = PlainTextResponse(str(len(body)))
        await response(scope, receive, send)


def answered(app: Behind, parts: Iterable[bytes], headers: Mapping[str, str]) -> httpx.Response:
    async def stream() -> Iterator[bytes]:  # type: ignore[misc]
        for part in parts:
            yield part

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(BodyLimit(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/any", content=stream(), headers=headers)

    return asyncio.run(ask())


PIECE = b"x" * 50_000


@pytest.mark.parametrize(("pieces", "stated", "status", "text"), [
    (0, None, 200, "0"), (1, None, 200, "50000"), (20, None, 200, "1000000"), (20, BODY.most, 200, "1000000"),
    (21, None, 413, None), (4_000, None, 413, None), (1, BODY.most + 1, 413, None), (1, 10**30, 413, None),
])  # fmt: skip
def test_a_body_is_as_long_as_is_read_or_the_application_is_not_asked(
    pieces: int, stated: int | None, status: int, text: str | None
) -> None:
    """Whether its length is stated or only shows."""
    app, sent = Behind(), []

    def parts() -> Iterator[bytes]:
        for _ in range(pieces):
            sent.append(1)
            yield PIECE

    found = answered(app, parts(), {} if stated is None else {"Content-Length": str(stated)})
    assert found.status_code == status
    assert app.asked == (status == 200)
    assert len(sent) <= 21 + 200  # and a while of what is taken in and forgotten
    if text is not None:
        assert found.text == text
    else:
        assert found.json() == {"error": "a request has 1.0 MB at most"}
