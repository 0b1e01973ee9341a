"""Whose requests come in: each way a browser asks in another site's name is refused under a Host as on the Hub.

A table of requests against the door alone, the served Space by real HTTP, and real Chromium before TLS. Not here: what
a cookie holds (test_sessions).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import pytest
from conftest import Visitor
from gradio_client import Client
from loopback import LoopbackHub
from relay import Relay
from served import ServedSpace
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send
from thorough import thorough_only
from waiting import HANGS_SECONDS

from space.entry.door import Door, own_origins

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOST = "alice-merger.hf.space"
OWN, HUB, EVIL = f"https://{HOST}", "https://hub.example", "https://evil.example"
ON_THE_HUB = own_origins({"SPACE_HOST": f"{HOST}, merger.alice.example"})
AT_HOME: frozenset[str] = frozenset()
JOIN = "/gradio_api/queue/join"
CROSS = {"sec-fetch-site": "cross-site"}
CLICK = {**CROSS, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
HOME = "127.0.0.1:7860"


@dataclass(frozen=True)
class Asked:
    """A request, and whether it comes in."""

    method: str
    path: str
    comes_in: bool
    headers: dict[str, str]
    host: str | None = HOST
    own: frozenset[str] = ON_THE_HUB


ASKED = [
    # the Space's own page, by each of its names, and the Hub's frame
    Asked("POST", JOIN, True, {"origin": OWN, "sec-fetch-site": "same-origin", "cookie": "a=b"}),
    Asked("POST", JOIN, True, {"origin": "https://merger.alice.example"}, "merger.alice.example"),
    Asked("POST", JOIN, True, {"origin": HUB}),
    Asked("GET", "/logout", True, {"sec-fetch-site": "same-origin", "sec-fetch-mode": "navigate"}),
    Asked("GET", "/logout", True, {"sec-fetch-site": "none"}),
    Asked("GET", "/config", True, {"referer": f"{OWN}/"}),
    Asked("GET", "/assets/index.js", True, {"sec-fetch-site": "same-origin"}),
    # programs, and the Hub's servers
    Asked("POST", JOIN, True, {"authorization": "Bearer hf_x"}),
    Asked("POST", "/gradio_api/mcp/", True, {"authorization": "Bearer hf_x"}),
    Asked("POST", "/bot/webhook", True, {"x-webhook-secret": "s"}),
    Asked("GET", "/config", True, {}, "10.20.30.40:7860"),
    Asked("GET", "/config", True, {}, "[::1]:7860"),
    Asked("GET", "/config", True, {}, None),
    Asked("GET", "/", True, {}, "some-probe.internal"),
    # a link from elsewhere to the page, the page in a frame, and the way back from the Hub
    Asked("GET", "/", True, CLICK),
    Asked("HEAD", "/", True, {"referer": f"{EVIL}/"}),
    Asked("GET", "/", True, {**CLICK, "sec-fetch-dest": "iframe"}),
    Asked("GET", "/login/callback", True, CLICK),
    # other sites: fetch, form, picture, link, frame, in each way that a browser may tell of it
    *(
        Asked(method, path, False, {"origin": origin})
        for origin in (
            EVIL, "null", "", f"http://{HOST}", f"{OWN}.evil.example", f"{OWN}:8443", "https://bob-merger.hf.space",
            "http://localhost:7860", "http://127.0.0.1:7860", f"{EVIL}#{OWN}", f"https://evil.example@{HOST}",
        )
        for method, path in (("GET", "/config"), ("POST", JOIN), ("GET", "/"), ("GET", "/login/callback"))
    ),
    *(
        Asked(method, path, False, headers)
        for headers in (CROSS, CLICK, {"sec-fetch-site": "same-site"}, {"referer": f"{EVIL}/{OWN}/"})
        for method, path in (
            ("GET", "/logout"), ("GET", "/login/huggingface"), ("GET", "/config"), ("POST", JOIN), ("POST", "/"),
            ("GET", "/gradio_api/mcp/"), ("GET", "/gradio_api/queue/data"), ("POST", "/login/callback"),
        )
    ),
    Asked("OPTIONS", JOIN, False, {"origin": EVIL, "access-control-request-method": "POST"}),
    Asked("POST", "/gradio_api/mcp/", False, {"origin": EVIL, "authorization": "Bearer hf_x"}),
    Asked("POST", "/bot/webhook", False, {"origin": EVIL, "x-webhook-secret": "s"}),
    # a name that leads here and is not ours
    Asked("GET", "/config", False, {}, "evil.example"),
    Asked("POST", JOIN, False, {"origin": EVIL}, "evil.example"),
    Asked("POST", JOIN, False, {"authorization": "Bearer hf_x"}, "evil.example:7860"),
    Asked("GET", "/config", False, {"sec-fetch-site": "same-origin"}, f"{HOST}.evil.example"),
    # on somebody's own machine: the page under the host that is asked, and no other
    Asked("POST", JOIN, True, {"origin": f"http://{HOME}"}, HOME, AT_HOME),
    Asked("POST", JOIN, True, {"origin": "http://localhost:7860"}, "localhost:7860", AT_HOME),
    Asked("POST", JOIN, True, {}, HOME, AT_HOME),
    Asked("GET", "/", True, CLICK, HOME, AT_HOME),
    Asked("POST", JOIN, False, {"origin": "http://127.0.0.1:3000"}, HOME, AT_HOME),
    Asked("POST", JOIN, False, {"origin": "http://localhost:7860"}, HOME, AT_HOME),
    Asked("POST", JOIN, False, {"origin": HUB}, HOME, AT_HOME),
    Asked("GET", "/logout", False, {"sec-fetch-site": "same-site"}, HOME, AT_HOME),
    Asked("POST", JOIN, False, {"origin": "http://evil.example:7860"}, "evil.example:7860", AT_HOME),
    Asked("GET", "/config", False, {}, "evil.example:7860", AT_HOME),
    Asked("POST", JOIN, True, {"origin": "http://10.0.0.5:7860"}, "10.0.0.5:7860", AT_HOME),
    Asked("POST", JOIN, True, {"origin": "http://box:7860"}, "box:7860", own_origins({"MERGER_SPACE_HOSTS": "http://box:7860"})),
]  # fmt: skip


async def _behind(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers as the page does under a real name: whoever asks may read it."""
    origin = dict(scope["headers"]).get(b"origin", b"*").decode()
    headers = {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true"}
    await PlainTextResponse("came in", headers=headers)(scope, receive, send)


def answer(asked: Asked, kind: str = "http") -> list[Message]:
    """What the door sends."""
    sent: list[Message] = []
    host = {} if asked.host is None else {"host": asked.host}
    headers = [(name.encode(), value.encode()) for name, value in {**host, **asked.headers}.items()]
    scope = {"type": kind, "method": asked.method, "path": asked.path, "headers": headers, "query_string": b""}

    async def receive() -> Message:
        return {"type": "websocket.connect" if kind == "websocket" else "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Door(_behind, asked.own, HUB)(scope, receive, send))
    return sent


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"{asked.method} {asked.path} {asked.headers} {asked.host}")
def test_who_comes_in(asked: Asked) -> None:
    """Whatever comes in, no stranger may read the answer, and nobody but the Hub may frame it."""
    start, body = answer(asked)[:2]
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert (start["status"], body["body"] == b"came in") == ((200, True) if asked.comes_in else (403, False))
    assert headers.get("access-control-allow-origin") in (None, OWN, HUB, asked.headers.get("origin"))
    assert (headers.get("access-control-allow-origin") is not None) <= asked.comes_in
    assert "*" not in headers.get("access-control-allow-origin", "")
    if asked.comes_in:
        assert headers["content-security-policy"] == f"frame-ancestors 'self' {HUB}"


def test_a_stranger_opens_no_socket() -> None:
    """A websocket is closed before it is taken, and our own is not."""
    sent = answer(Asked("GET", JOIN, False, {"origin": EVIL}), "websocket")
    assert [message["type"] for message in sent] == ["websocket.close"]
    ours = Asked("GET", JOIN, True, {"origin": OWN})
    assert [message["type"] for message in answer(ours, "websocket")] != ["websocket.close"]


# ---- the served Space -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """The Space has its name on the Hub."""
    return {"SPACE_HOST": HOST}


STRANGE = [
    ("GET", "/config"), ("GET", "/"), ("POST", JOIN), ("OPTIONS", JOIN), ("GET", "/logout"),
    ("GET", "/login/huggingface"), ("POST", "/gradio_api/mcp/"), ("GET", "/gradio_api/info"),
    ("POST", "/gradio_api/call/merge"), ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/heartbeat/x"),
    ("POST", "/bot/webhook"), ("GET", "/no/such/page"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), STRANGE)
def test_the_space_refuses_a_stranger_first(space: ServedSpace, method: str, path: str) -> None:
    """Whatever the address, before anything looks at it; with no leave to read the answer."""
    asking = {"Host": HOST, "Origin": EVIL, "Access-Control-Request-Method": "POST", "Cookie": "__Host-merger=x"}
    found = httpx.request(method, space.url + path, headers=asking)
    assert found.status_code == 403
    assert (
        found.text
        == "Another site asked for this in a visitor's name, and only the Space's own page may: do it there.\n"
    )
    assert not [name for name in found.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/gradio_api/call/check", JOIN, "/gradio_api/upload", "/gradio_api/mcp/", "/", "/no"])
def test_the_space_refuses_a_long_body_before_it_comes(space: ServedSpace, path: str) -> None:
    """Of 60 MB it wants not one byte."""
    with socket.create_connection(("127.0.0.1", space.port), timeout=HANGS_SECONDS) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 60000000\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_the_space_answers_its_own_page_and_programs(space: ServedSpace, served: LoopbackHub) -> None:
    """Its own origin and the Hub's may read; programs ask without one, and a token in the header is theirs."""
    for origin in (OWN, served.url):
        found = httpx.get(f"{space.url}/config", headers={"Host": HOST, "Origin": origin})
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, origin)
    caller = Client(space.url, headers={"Authorization": "Bearer hf_token_of_alice"}, verbose=False)
    assert caller.predict("x", api_name="/job")["problems"][0]["what"].startswith("you have no job")
    assert httpx.get(f"{space.url}/config", headers={"Host": "evil.example"}).status_code == 403
    assert "the host 'evil.example' is none of the Space's" in space.log()


# ---- Chromium -------------------------------------------------------------------------------------------------------

ATTACK = """
async ([space, path, text]) => {
  const sent = {};
  const body = JSON.stringify({data: [text], fn_index: 0, session_hash: 'evil', event_data: null});
  const headers = {'Content-Type': 'application/json'};
  const asks = {
    cors: {method: 'POST', credentials: 'include', headers, body},
    plain: {method: 'POST', credentials: 'include', body},
    blind: {method: 'POST', credentials: 'include', mode: 'no-cors', body},
  };
  for (const [name, how] of Object.entries(asks))
    sent[name] = await fetch(space + path, how).then(answer => answer.type + answer.status, error => error.name);
  for (const asked of ['/logout', '/config', '/gradio_api/info'])
    sent[asked] = await fetch(space + asked, {credentials: 'include'}).then(a => a.status, error => error.name);
  await new Promise(done => {
    const picture = new Image();
    picture.onload = picture.onerror = done;
    picture.src = space + '/logout';
  });
  return sent;
}
"""
FRAMED = "<iframe id=space width=1000 height=900 src='{}'></iframe>"


@pytest.fixture(scope="module")
def relayed(
    launch: Callable[[list[str]], Browser], space: ServedSpace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    """A browser in which the Space has its name, before TLS as on the Hub."""
    relay = Relay(space.port, HOST, tmp_path_factory.mktemp("relay"))
    rules = f"MAP {HOST}:443 127.0.0.1:{relay.port}, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    # else the browser itself keeps a site from asking this machine, where on the Hub it is another one
    near = "--disable-features=LocalNetworkAccessChecks,PrivateNetworkAccessRespectPreflightResults"
    yield launch(["--no-sandbox", near, f"--host-resolver-rules={rules}"])
    relay.close()


@pytest.fixture
def visitor(relayed: Browser) -> Iterator[Visitor]:
    """Somebody with that browser."""
    context = relayed.new_context(ignore_https_errors=True)
    yield Visitor(context, OWN)
    context.close()


def elsewhere(visitor: Visitor, url: str, body: str = "") -> Page:
    """A page of somebody else's, in a tab of its own."""
    html = f"<!doctype html><title>elsewhere</title>{body}"
    visitor.context.route(f"{url}/**", lambda route: route.fulfill(body=html, content_type="text/html"))
    page = visitor.context.new_page()
    page.goto(f"{url}/page")
    return page


def is_signed_in(visitor: Visitor, user: str) -> None:
    """The page says so, asked again."""
    visitor.open()
    visitor.page.get_by_role("button", name=f"Logout ({user})").wait_for()


def test_another_site_acts_for_nobody(visitor: Visitor, hub: LoopbackHub, space: ServedSpace) -> None:
    """It reads nothing, queues nothing and signs nobody out: not by script, form, picture, link or frame."""
    visitor.open()
    visitor.sign_in("alice")
    (cookie,) = visitor.context.cookies(OWN)
    assert (cookie["name"], cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (
        "__Host-merger", True, True, "None"
    )  # fmt: skip
    evil = elsewhere(visitor, EVIL)
    sent = evil.evaluate(ATTACK, [OWN, JOIN, "merge_method: linear"])
    assert sent == {
        "cors": "TypeError", "plain": "TypeError", "blind": "opaque0",
        "/logout": "TypeError", "/config": "TypeError", "/gradio_api/info": "TypeError",
    }  # fmt: skip
    for path in ("/logout", "/login/huggingface"):
        form = elsewhere(
            visitor, EVIL, f"<form action='{OWN}{path}'><button>go</button></form><a href='{OWN}{path}'>to</a>"
        )
        with form.expect_navigation():
            form.get_by_role("button" if path == "/logout" else "link").click()
        assert "Another site asked for this in a visitor's name" in form.locator("body").inner_text()
    framing = elsewhere(visitor, EVIL, FRAMED.format(OWN))
    assert framing.frame_locator("#space").get_by_role("button").count() == 0
    is_signed_in(visitor, "alice")
    assert hub.exists("alice/anything") is False
    assert [request for request in hub.log if request.path.startswith("/api/repos/create")] == []
    assert visitor.context.cookies(OWN) == [cookie]


@thorough_only
def test_a_link_from_elsewhere_leads_to_the_page(visitor: Visitor) -> None:
    """And whoever is signed in still is."""
    visitor.open()
    visitor.sign_in("alice")
    evil = elsewhere(visitor, EVIL, f"<a href='{OWN}/'>Merger</a>")
    evil.get_by_role("link").click()
    evil.get_by_role("button", name="Logout (alice)").wait_for()


def test_the_hubs_frame(visitor: Visitor, hub: LoopbackHub) -> None:
    """In the Hub's page the Space is shown, signs in, plans, and signs out."""
    page = elsewhere(visitor, f"{hub.url}/spaces", FRAMED.format(OWN))
    frame = page.frame_locator("#space")
    frame.get_by_role("button", name="Sign in with Hugging Face").click()
    frame.get_by_role("link", name="Authorize as alice").click()
    frame.get_by_role("button", name="Logout (alice)").wait_for()
    frame.get_by_role("button", name="Plan").click()
    frame.locator("#table").get_by_text("about 1 min").wait_for()
    frame.get_by_role("button", name="Logout (alice)").click()
    frame.get_by_role("button", name="Sign in with Hugging Face").wait_for()
