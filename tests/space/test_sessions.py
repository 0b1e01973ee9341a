"""What a browser's cookie holds, signing in and out by real HTTP, and what goes wrong on the way.

Not here: other sites (test_door), and the page in a browser (test_page).
"""

from __future__ import annotations

import re
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from loopback import LoopbackHub
from served import SECRET, ServedSpace
from waiting import HANGS_SECONDS, until

from space.entry.sessions import Table

HOST = "alice-merger.hf.space"
COOKIE = "__Host-merger"
ZOO = "merge_method: linear\nmodels:\n  - model: maker/merger-zoo-kjv\n  - model: maker/merger-zoo-python\n"
RECIPE = f"{ZOO}parameters: {{weight: 1}}\npublish: {{repo: alice/by-http}}\n"


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """The Space has its name on the Hub."""
    return {"SPACE_HOST": HOST}


class Browser:
    """As much of one as signing in takes: it goes where it is sent, and keeps the Space's cookie and all answers."""

    def __init__(self, space: ServedSpace) -> None:
        self.space, self.cookie, self.set, self.seen = space, "", [], ""

    def get(self, path: str, **how: Any) -> httpx.Response:
        """One answer of the Space's, asked by its own page."""
        return self._kept("GET", path, {"sec-fetch-site": "same-origin", "sec-fetch-mode": "navigate"}, **how)

    def post(self, path: str, about: dict[str, Any]) -> httpx.Response:
        """A question of the page's script."""
        return self._kept("POST", path, {"Origin": f"https://{HOST}"}, json=about)

    def _kept(self, method: str, path: str, headers: dict[str, str], **how: Any) -> httpx.Response:
        headers |= {"Host": HOST, "X-Forwarded-Proto": "https"}
        headers |= {"Cookie": f"{COOKIE}={self.cookie}"} if self.cookie else {}
        found = httpx.request(method, self.space.url + path, headers=headers, timeout=HANGS_SECONDS, **how)
        for line in found.headers.get_list("set-cookie"):
            self.set.append(line)
            self.cookie = line.split(";")[0].removeprefix(f"{COOKIE}=")
        self.seen += f"{found.headers}\n{found.text}\n"
        return found

    def begin(self) -> dict[str, str]:
        """To the Hub's page; what it is asked there."""
        to = self.get("/login/huggingface").headers["location"]
        return {name: values[0] for name, values in parse_qs(urlsplit(to).query).items()}

    def back(self, hub: LoopbackHub, asked: dict[str, str], answer: str = "allow") -> httpx.Response:
        """The Hub's answer, as it comes back to the Space."""
        to = httpx.get(f"{hub.url}/oauth/{answer}", params={**asked, "user": "alice"}).headers["location"]
        assert to.startswith(f"https://{HOST}/login/callback?")
        return self.get(to.removeprefix(f"https://{HOST}"))

    def sign_in(self, hub: LoopbackHub) -> None:
        """All of it."""
        assert self.back(hub, self.begin()).status_code == 307

    def event(self, about: str, data: list[Any]) -> str:
        """What an event of the page comes to: the button of an id, or a function of a name."""
        config = self.get("/config").json()
        ids = {part["id"] for part in config["components"] if part["props"].get("elem_id") == about}
        found = next(
            each
            for each in config["dependencies"]
            if each["api_name"] == about or ids & {target[0] for target in each["targets"]}
        )
        session = f"s{time.monotonic_ns()}"
        self.post("/gradio_api/queue/join", {"data": data, "fn_index": found["id"], "session_hash": session})
        return self.get(f"/gradio_api/queue/data?session_hash={session}").text

    @property
    def user(self) -> str | None:
        """Who is signed in, as the page says it."""
        told = re.search(r"Logout \((\w+)\)", self.event("_check_login_status", []))
        return told[1] if told else None


def copied(browser: Browser) -> Browser:
    """Somebody else who has the cookie."""
    found = Browser(browser.space)
    found.cookie = browser.cookie
    return found


def test_signing_out_ends_the_session(space: ServedSpace, hub: LoopbackHub) -> None:
    """On the server: a copy of the cookie that was made before names nothing afterwards."""
    alice = Browser(space)
    assert alice.user is None
    alice.sign_in(hub)
    thief = copied(alice)
    assert (alice.user, thief.user) == ("alice", "alice")
    assert alice.get("/logout").headers["location"] == "/"
    assert (alice.user, thief.user, alice.cookie) == (None, None, "")


def test_a_session_has_a_new_name_once_somebody_is_signed_in(space: ServedSpace, hub: LoopbackHub) -> None:
    """Who planted the name before has nothing; each change brings another one, of 32 drawn bytes."""
    alice = Browser(space)
    asked = alice.begin()
    planted = copied(alice)
    alice.back(hub, asked)
    assert (planted.user, alice.user) == (None, "alice")
    assert planted.cookie != alice.cookie
    flags = "; Path=/; HttpOnly; Secure; SameSite=None; Partitioned"
    assert all(re.fullmatch(rf"{COOKIE}=[\w-]{{43}}{flags}", line) for line in alice.set)


def test_no_token_is_told(space: ServedSpace, hub: LoopbackHub) -> None:
    """Through signing in, a merge and signing out, no answer, header, cookie or line of the log holds a token."""
    alice = Browser(space)
    alice.sign_in(hub)
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/user"):
        alice.get(path)
    assert '"success":true' in alice.event("plan", [RECIPE]).replace(" ", "")
    merged = alice.event("merge", [RECIPE, None])
    assert "alice/by-http" in merged
    until(lambda: hub.exists("alice/by-http") and "model.safetensors" in hub.tree("alice/by-http"), space.log)
    alice.event("jobs", [None])
    alice.get("/logout")
    alice.get("/login/callback?code=x&state=y")
    tokens = {*hub.world.users, SECRET, "hf_of_the_space_itself", "eyJ"}
    assert any(token.startswith("hf_oauth_") for token in tokens)
    everything = {"answers": alice.seen, "cookies": "\n".join(alice.set), "log": space.log()}
    assert [(where, token) for where, text in everything.items() for token in tokens if token in text] == []


WRONG = {
    "a declined consent": "You did not let the Space sign you in.",
    "a wrong code": "The Hub did not confirm this sign-in.",
    "a state of nobody's": "This sign-in was not begun in this browser, or too long ago.",
    "no state": "This sign-in was not begun in this browser, or too long ago.",
    "another browser's state": "This sign-in was not begun in this browser, or too long ago.",
    "a code that was used": "This sign-in was not begun in this browser, or too long ago.",
    "a Hub that fails": "The Hub did not confirm this sign-in.",
}


def gone_wrong(case: str, alice: Browser, hub: LoopbackHub) -> httpx.Response:
    """A sign-in that goes wrong in this way."""
    asked = alice.begin()
    if case == "a declined consent":
        return alice.back(hub, asked, "deny")
    if case == "a Hub that fails":
        hub.fail(lambda request: request.path.startswith("/oauth/token"), status=500)
        return alice.back(hub, asked)
    if case == "another browser's state":
        return Browser(alice.space).back(hub, asked)
    if case == "a code that was used":
        alice.back(hub, asked)
        return alice.get(f"/login/callback?code=x&state={asked['state']}")
    query = {"a wrong code": f"code=x&state={asked['state']}", "a state of nobody's": "code=x&state=y", "no state": ""}
    return alice.get(f"/login/callback?{query[case]}")


@pytest.mark.parametrize("case", WRONG)
def test_a_sign_in_that_goes_wrong(case: str, space: ServedSpace, hub: LoopbackHub) -> None:
    """A page with a sentence, and ways on; signing in again works."""
    alice = Browser(space)
    found = gone_wrong(case, alice, hub)
    assert found.status_code == 400
    assert WRONG[case] in found.text
    assert [address for address in ("/login/huggingface", "/") if f'href="{address}"' not in found.text] == []
    alice.sign_in(hub)
    assert alice.user == "alice"
    assert "Traceback" not in space.log()


def test_a_long_address_is_not_kept(space: ServedSpace) -> None:
    """What a sign-in that was only begun takes is bounded."""
    found = Browser(space).get("/login/huggingface?_target_url=/" + 3_000 * "a")
    assert (found.status_code, "too long" in found.text, "set-cookie" in found.headers) == (400, True, False)


# ---- the table ------------------------------------------------------------------------------------------------------


def signed_in(user: str, until: float | None = None) -> dict[str, Any]:
    return {"oauth_info": {"userinfo": {"preferred_username": user}, "expires_at": until}}


def test_a_session_ends_with_its_token() -> None:
    """A name of a session that is over, or of none, is empty; so is one that was dropped."""
    table = Table()
    names = [table.put(signed_in("alice", time.time() + more)) for more in (60, -1)] + [table.put(signed_in("bob"))]
    assert [bool(table.get(name)) for name in (*names, "", "x")] == [True, False, True, False, False]
    table.drop(names[0])
    assert not table.get(names[0])


def test_what_a_request_does_to_its_copy_is_not_kept() -> None:
    """Only what is put under a new name is."""
    table = Table()
    name = table.put(signed_in("alice"))
    table.get(name).clear()
    assert table.get(name) == signed_in("alice")


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One user's many sessions end the oldest of theirs, and those who only begin crowd out nobody who is signed in."""
    monkeypatch.setattr("space.entry.sessions._MOST", 50)
    table = Table()
    alice, bobs = table.put(signed_in("alice")), [table.put(signed_in("bob")) for _ in range(30)]
    begun = [table.put({"_state_huggingface_x": number}) for number in range(60)]
    assert [bool(table.get(name)) for name in bobs] == 10 * [False] + 20 * [True]
    assert [bool(table.get(name)) for name in begun] == 10 * [False] + 50 * [True]
    assert table.get(alice) == signed_in("alice")
    others = [table.put(signed_in(f"user{number}")) for number in range(50)]
    assert not table.get(alice)
    assert all(table.get(name) for name in others)
