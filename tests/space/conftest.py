"""A Space beside a Hub for each file of tests, and browsers that may reach nothing but this machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi
import pytest
from loopback import LoopbackHub
from served import ServedSpace, zoo
from waiting import HANGS_SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ALONE = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
Visit = Callable[..., "Visitor"]


@pytest.fixture(scope="package", autouse=True)
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All is plain HTTP here, and each client reads whom to trust for TLS anew: let that be one, not 150."""
    first = Path(certifi.where()).read_text("utf-8").partition("-----END CERTIFICATE-----\n")
    place = tmp_path_factory.mktemp("tls") / "one.pem"
    place.write_text(first[0] + first[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(place))
        yield


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """Of the Space's environment; a file of tests may have others.

    It makes files of a megabyte, so that a merge of the zoo has three, and moves 20 MB a merge at most; one of the zoo
    reads and writes 11.
    """
    return {"MERGER_SPACE_SHARD_SIZE": "1MB", "MERGER_SPACE_TRAFFIC": "20MB"}


@pytest.fixture(scope="module")
def space(
    served: LoopbackHub, variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedSpace]:
    """A Space in a process of its own, and the zoo on its Hub."""
    zoo(served)
    found = ServedSpace(served, tmp_path_factory.mktemp("space"), variables)
    found.start()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[[list[str]], Browser]]:
    """Starts the Chromium of this machine, such as Debian's, with arguments; all end with a file of tests.

    As long as Playwright is there, its loop counts as running, and no test can run another one in this thread.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested where playwright is installed")
    if CHROMIUM is None:
        pytest.skip("the page is tested where there is Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        started: list[Browser] = []

        def browser(arguments: list[str]) -> Browser:
            started.append(running.chromium.launch(executable_path=CHROMIUM, args=arguments))
            return started[-1]

        yield browser
        for each in started:
            each.close()


@pytest.fixture(scope="module")
def browser(launch: Callable[[list[str]], Browser]) -> Browser:
    """A browser that knows no other machine."""
    return launch(ALONE)


class Visitor:
    """Somebody with a browser of their own."""

    def __init__(self, context: BrowserContext, url: str, stays: bool = False, forgets: bool = True) -> None:
        self.context, self.url, self.stays, self.clicks = context, url, stays, 0
        self.outside: list[str] = []
        if forgets:
            context.add_init_script("localStorage.clear()")  # else it begins with what the last test left
        context.set_default_timeout(1000 * HANGS_SECONDS)
        context.on("dialog", lambda dialog: dialog.accept())  # "leave this page?", once somebody has typed in it
        context.on("request", self._look)  # a route would switch the browser's cache off
        self.page = context.new_page()

    def _look(self, request: Any) -> None:
        """The browser reaches no other machine, but tries must not go unseen."""
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:", self.url)):
            self.outside.append(request.url)

    def open(self, query: str = "") -> Page:
        """Open the page anew, in a new tab if there is none, and wait until it can be worked with."""
        if self.page.is_closed():
            self.page = self.context.new_page()
        self.page.goto(self.url + query)
        self.ready()
        return self.page

    def ready(self) -> None:
        """Wait until the form is there."""
        self.page.get_by_role("button", name="Merge and publish").wait_for()
        self.page.get_by_label("number input for lambda").or_(
            self.page.get_by_text("stand in the text")
        ).first.wait_for()

    def click(self, role: Any, name: str) -> None:
        """One click."""
        self.clicks += 1
        self.page.get_by_role(role, name=name).first.click()

    def sign_in(self, user: str) -> None:
        """Two clicks: here, and at the Hub; a recipe that names no repo is then named after them."""
        self.click("button", "Sign in with Hugging Face")
        self.click("link", f"Authorize as {user}")
        self.page.get_by_role("button", name=f"Logout ({user})").wait_for()
        self.until(lambda: f"repo: {user}/" in self.recipe())

    def recipe(self) -> str:
        """The text in the editor."""
        lines = self.page.locator("#recipe .cm-line").all_inner_texts()
        return "\n".join(line.strip("\n") for line in lines) + "\n"

    def write(self, text: str) -> None:
        """Put a text into the editor, as somebody who pastes it."""
        self.page.locator("#recipe .cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(text)

    def choose(self, field: str, words: str, option: str, exact: bool = False) -> None:
        """Type into a field and take what it offers."""
        box = self.page.locator(f"#{field} input").first
        box.click()
        box.press("Control+a")
        box.press_sequentially(words, delay=20)
        self.page.get_by_role("option", name=option, exact=exact).first.click()

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that is about to be; the page goes on meanwhile."""
        end = time.monotonic() + HANGS_SECONDS
        while not holds():
            assert time.monotonic() < end, self.page.locator("body").inner_text()
            self.page.wait_for_timeout(50)

    def job(self, state: str) -> None:
        """Wait until the job that is shown is in this state."""
        self.page.locator(f"#job .state.{state}").wait_for()


@pytest.fixture(scope="module")
def signed_in() -> dict[str, Any]:
    """The cookies of who has signed in once."""
    return {}


@pytest.fixture(scope="module")
def stranger(browser: Browser, space: ServedSpace) -> Iterator[Visitor]:
    """Somebody who never signs in, with a tab that stays: to open the page anew in it takes half of the work."""
    visitor = Visitor(browser.new_context(viewport={"width": 1280, "height": 900}), space.url, stays=True)
    yield visitor
    visitor.context.close()


@pytest.fixture
def visit(
    browser: Browser, space: ServedSpace, signed_in: dict[str, Any], request: pytest.FixtureRequest
) -> Iterator[Visit]:
    """Makes visitors, signed in as a user if need be; afterwards none of their pages has asked another machine."""
    made: list[Visitor] = []

    def visitor(user: str | None = None, dark: bool = False, fresh: bool = False) -> Visitor:
        if user is None and not dark and not fresh:
            made.append(request.getfixturevalue("stranger"))
            made[-1].page.set_viewport_size({"width": 1280, "height": 900})
            made[-1].open()
            return made[-1]
        scheme: Any = "dark" if dark else "light"
        size: Any = {"width": 1280, "height": 900}
        known = signed_in.get(user or "")
        context = browser.new_context(viewport=size, color_scheme=scheme, storage_state=known)
        made.append(Visitor(context, space.url, forgets=not fresh))
        made[-1].open()
        if user and known is None:
            made[-1].sign_in(user)
            signed_in[user] = made[-1].context.storage_state()
        elif user:
            made[-1].until(lambda: f"repo: {user}/" in made[-1].recipe())
        return made[-1]

    yield visitor
    for each in made:
        if not each.stays:
            each.context.close()
    assert [address for each in made for address in each.outside] == []
