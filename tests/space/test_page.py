"""The page in a real browser: signing in by the real OpenID flow, form and text, plan, merge, jobs of one's own.

Not here: what the form does to a text (test_form), the queue by itself (test_jobs) and the API (test_api).
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from loopback import LoopbackHub, Request
from places import REPOSITORY, ZOO
from served import SCOPES, SECRET, ServedSpace, halted, staged
from thorough import thorough_only
from waiting import HANGS_SECONDS, until

if TYPE_CHECKING:
    from conftest import Visit, Visitor

FIRST = "merger-zoo-kjv-python-task-arithmetic"


def published(hub: LoopbackHub, repo: str) -> dict[str, str]:
    """The weights of a repo by file."""
    return {name: entry.sha256 for name, entry in hub.tree(repo).items() if name.endswith(".safetensors")}


def named(visitor: Visitor, repo: str) -> None:
    """Publish to another repo than the form says."""
    box = visitor.page.locator("#repo input, #repo textarea").first
    box.press("Control+a")
    box.press_sequentially(repo, delay=5)
    visitor.until(lambda: f"repo: {repo}\n" in visitor.recipe())


def test_a_first_visit(visit: Visit, hub: LoopbackHub, space: ServedSpace) -> None:
    """From opening the page to a published merge in three clicks; the link leads to the repo."""
    alice = visit(fresh=True)
    alice.sign_in("alice")
    alice.click("button", "Merge and publish")
    alice.job("done")
    assert alice.clicks <= 5
    assert len(published(hub, f"alice/{FIRST}")) == 3
    assert alice.page.get_by_role("link", name="open it on the Hub").get_attribute("href") == f"{hub.url}/alice/{FIRST}"
    with alice.context.expect_page() as opened:
        alice.click("link", "open it on the Hub")
    assert opened.value.url == f"{hub.url}/alice/{FIRST}"
    assert hub.openid.grants.scopes[-1] == SCOPES
    assert "hf_oauth_" not in space.log()
    assert SECRET not in space.log()


def test_a_recipe_by_the_form(visit: Visit) -> None:
    """Models found on the Hub, a method and its numbers become a recipe, whose plan tells models, sizes and card."""
    visitor = visit()
    visitor.choose("method", "TIES", "TIES · task vectors", exact=True)
    visitor.until(lambda: "merge_method: ties" in visitor.recipe())
    density = visitor.page.get_by_label("number input for density").first
    density.fill("0.4")
    density.press("Tab")
    visitor.until(lambda: "density: 0.4" in visitor.recipe())
    visitor.page.get_by_role("button", name="Remove maker/merger-zoo-python").or_(
        visitor.page.locator("#models .token-remove").nth(1)
    ).first.click()
    visitor.until(lambda: "zoo-python" not in visitor.recipe())
    visitor.choose("models", "zoo-pyt", "maker/merger-zoo-python")
    visitor.until(lambda: visitor.recipe().count("- model:") == 2)
    visitor.page.keyboard.press("Escape")
    visitor.page.get_by_role("button", name="Plan").click()
    table = visitor.page.locator("#table")
    table.get_by_text("about 1 min").wait_for()
    told = table.inner_text()
    assert "maker/merger-zoo-base" in told
    assert "apache-2.0" in told
    assert "2.7 MB in 3 files" in told
    lineage = visitor.page.locator("#lineage img")
    visitor.until(lambda: lineage.evaluate("picture => picture.naturalWidth") > 100)
    assert "made of maker/merger-zoo-kjv, maker/merger-zoo-python, maker/merger-zoo-base" in str(
        lineage.get_attribute("alt")
    )
    visitor.page.get_by_role("button", name="Preview of the model card").click()
    visitor.page.locator("#card").get_by_text("TIES", exact=False).first.wait_for()


def test_by_keyboard(visit: Visit) -> None:
    """Every step can be made without a mouse: from the first field by Tab to the buttons, which answer to Enter."""
    visitor = visit()
    visitor.page.locator("#private input").focus()
    reached: list[str] = []
    for _ in range(12):
        visitor.page.keyboard.press("Escape")  # in the editor a Tab indents, unless Escape is pressed before
        visitor.page.keyboard.press("Tab")
        reached.append(str(visitor.page.evaluate("document.activeElement.id")))
        if reached[-1] == "plan":
            break
    assert reached[-1] == "plan", reached
    visitor.page.keyboard.press("Enter")
    visitor.page.locator("#table").get_by_text("about 1 min").wait_for()
    assert visitor.page.locator("#problems").get_attribute("aria-live") == "polite"


def test_an_error_at_its_line(visit: Visit) -> None:
    """What is typed wrong is told at once, with its line, its next step and a mark; what is mended is quiet again."""
    visitor = visit()
    good, editor = visitor.recipe(), visitor.page.locator("#recipe")
    stood = editor.bounding_box()
    visitor.write(good.replace("weight: 0.85", "wieght: 0.85", 1))
    problem = visitor.page.locator("#problems li.error")
    problem.wait_for()
    assert editor.bounding_box() == stood  # the page does not jump at the first keystroke
    assert problem.inner_text().replace("\n", " ").endswith("Unknown key 'wieght' Did you mean 'weight'?")
    assert "line 5" in problem.inner_text()
    fifth = visitor.page.locator("#recipe .cm-line").nth(4)
    assert fifth.evaluate("line => getComputedStyle(line).boxShadow") != "none"
    visitor.write(good.replace("weight: 0.85", "weight: 0.3", 1))
    visitor.page.get_by_text("No problem found").wait_for()
    number = visitor.page.get_by_label("number input for weight").first
    visitor.until(lambda: number.input_value() == "0.3")


def test_a_curve_over_the_layers(visit: Visit) -> None:
    """A list of numbers is drawn; a point that is dragged, or moved by keys, changes its number where it stands."""
    visitor = visit()
    visitor.write(visitor.recipe().replace("weight: 0.85", "weight: [0, 0.5, 1]  # mine", 1))
    curve = visitor.page.get_by_role("group", name="weight of maker/merger-zoo-kjv from the first layer to the last")
    curve.wait_for()
    assert "all: 0, 0.5, 1" in str(curve.get_attribute("aria-label"))
    point = visitor.page.get_by_role("slider", name="weight of maker/merger-zoo-kjv, point 2 of 3")
    height = float(curve.evaluate("svg => svg.getBoundingClientRect().height"))
    point.hover()
    visitor.page.mouse.down()
    at = point.bounding_box()
    assert at is not None
    x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
    visitor.page.mouse.move(x, y - height * 48 / 64 / 4, steps=3)  # a quarter of 0 to 2
    visitor.page.mouse.up()
    visitor.until(lambda: "weight: [0, 1, 1] " in visitor.recipe())
    visitor.page.keyboard.press("ArrowUp")
    visitor.page.keyboard.press("PageDown")
    visitor.until(lambda: "weight: [0, 0.91, 1] " in visitor.recipe())
    visitor.page.keyboard.press("End")  # the point drawn anew is still the one that the keys move
    visitor.until(lambda: "weight: [0, 2, 1] " in visitor.recipe() and "# mine" in visitor.recipe())
    assert visitor.page.locator(".line input, .line textarea").first.input_value() == "0, 2, 1"


def test_nobody_is_signed_in(visit: Visit) -> None:
    """Who is not signed in may plan; asked to merge, the page says who is missing."""
    visitor = visit()
    visitor.page.get_by_role("button", name="Merge and publish").click()
    visitor.page.locator("#refused").get_by_text("nobody is signed in").wait_for()


def test_a_refusal_goes_with_its_cause(visit: Visit) -> None:
    """What was refused is quiet once the recipe is another, and a plan of before says so; no word is of a terminal."""
    visitor = visit()
    good = visitor.recipe()
    visitor.click("button", "Plan")
    visitor.page.locator("#table").get_by_text("about 1 min").wait_for()
    visitor.write(good.replace("zoo-kjv", "zoo-nothing", 1))
    visitor.until(lambda: "of-before" in str(visitor.page.locator("#planned").get_attribute("class")))
    visitor.click("button", "Plan")
    refused = visitor.page.locator("#refused")
    refused.get_by_text("a private model needs you to be signed in").wait_for()
    assert not re.search(r"HF_TOKEN|folder|--\w", refused.inner_text())
    visitor.write(good)
    refused.wait_for(state="hidden")


@thorough_only
def test_nothing_typed_is_lost(visit: Visit, hub: LoopbackHub) -> None:
    """A recipe is there after a reload and after signing in; a link brings it to others, and that of a repo, too."""
    alice = visit(fresh=True)
    typed = alice.recipe().replace("weight: 0.85", "weight: 0.31 # mine", 1).strip()
    alice.write(typed)
    alice.until(lambda: alice.page.evaluate("localStorage.getItem('merger-recipe')").strip() == typed)
    alice.open()
    alice.until(lambda: alice.recipe().strip() == typed)
    alice.until(lambda: alice.page.get_by_label("number input for weight").first.input_value() == "0.31")
    alice.sign_in("alice")
    assert "weight: 0.31 # mine" in alice.recipe()
    visitor = visit()
    visitor.open(f"/?recipe={quote(typed)}")
    visitor.until(lambda: visitor.recipe().strip() == typed)
    assert visitor.page.url == f"{visitor.url}/"
    hub.add_model("maker/made", {"recipe.yaml": f"# made\n{typed}\npublish:\n  repo: maker/made\n".encode()})
    visitor.open("/?from=maker/made")
    visitor.until(lambda: visitor.recipe().strip() == f"# made\n{typed}")
    visitor.open("/?from=maker/nothing")
    visitor.page.locator("#refused").get_by_text("there is no recipe in maker/nothing").wait_for()


def reach(visitor: Visitor, selector: str) -> None:
    """Press Tab until the focus is there; in the editor a Tab indents, unless Escape is pressed before."""
    keys, reached = visitor.page.keyboard, list[str]()
    for _ in range(60):
        keys.press("Escape")
        keys.press("Tab")
        reached.append(str(visitor.page.evaluate("document.activeElement.outerHTML.slice(0, 90)")))
        if visitor.page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"no way to {selector}: {reached}")


@thorough_only
def test_the_whole_way_by_keyboard(visit: Visit, hub: LoopbackHub) -> None:
    """Signing in, editing, planning, merging and opening the result, without a mouse and in the order of the page."""
    alice = visit(fresh=True)
    keys = alice.page.keyboard
    reach(alice, "#top button, #top a")
    keys.press("Enter")
    alice.page.get_by_role("link", name="Authorize as alice").wait_for()
    reach(alice, "a[href*=alice]")
    keys.press("Enter")
    alice.page.get_by_role("button", name="Logout (alice)").wait_for()
    alice.until(lambda: "repo: alice/" in alice.recipe())
    reach(alice, "#recipe .cm-content")
    keys.press("Control+a")
    keys.insert_text(alice.recipe().replace(f"alice/{FIRST}", "alice/by-keys"))
    alice.until(lambda: alice.page.locator("#repo input, #repo textarea").first.input_value() == "alice/by-keys")
    reach(alice, "#plan")
    keys.press("Enter")
    alice.page.locator("#table").get_by_text("about 1 min").wait_for()
    reach(alice, "#merge")
    keys.press("Enter")
    alice.page.locator("#job .state.done").get_by_text("alice/by-keys").wait_for()
    reach(alice, "#job a[href$='/alice/by-keys']")
    with alice.context.expect_page() as opened:
        keys.press("Enter")
    assert opened.value.url == f"{hub.url}/alice/by-keys"
    reach(alice, "#job a[href^='/merges/']")


@thorough_only
def test_a_repo_that_holds_a_model(visit: Visit, hub: LoopbackHub, space: ServedSpace) -> None:
    """Plan tells it with what can be done: a new name, a pull request, or a commit in its place; no job fails of it."""
    alice = visit("alice")
    named(alice, "alice/taken")
    alice.click("button", "Merge and publish")
    alice.page.locator("#job .state.done").get_by_text("alice/taken").wait_for()
    alice.write(alice.recipe().replace("weight: 0.85", "weight: 0.31", 1))
    alice.click("button", "Plan")
    alice.page.locator("#refused").get_by_text("alice/taken already holds a model").wait_for()
    alice.page.locator("#table").get_by_text("about 1 min").wait_for()
    alice.click("radio", "Publish under a new name")
    alice.until(lambda: "repo: alice/taken-2\n" in alice.recipe())
    alice.page.locator("#onto").wait_for(state="hidden")
    named(alice, "alice/taken")
    alice.click("button", "Merge and publish")
    alice.click("radio", "Replace it by a new commit")
    alice.click("button", "Merge and publish")
    alice.until(lambda: len([each for each in hub.commits("alice/taken") if each.title.startswith("Merge")]) == 2)
    alice.job("done")
    own = str(alice.page.get_by_role("link", name="This merge has a page of its own").get_attribute("href"))
    bob = visit(fresh=True)
    bob.page.goto(space.url + own)
    told = bob.page.locator("main").inner_text()
    for words in (
        "is published",
        "asked for",
        "AutoModelForCausalLM",
        "Its model card",
        "made model-00001",
    ):
        assert words in told
    assert "transformers chat" not in told  # it has no chat template
    bob.page.get_by_role("link", name="Open this recipe in the Space").click()
    bob.ready()
    bob.until(lambda: "repo: alice/taken\n" in bob.recipe())
    main = published(hub, "alice/taken")
    alice.write(alice.recipe().replace("weight: 0.31", "weight: 0.32", 1))
    alice.click("button", "Plan")
    alice.click("radio", "Open a pull request on it")
    alice.click("button", "Merge and publish")
    link = alice.page.get_by_role("link", name="open it on the Hub")
    alice.until(lambda: "/alice/taken/discussions/" in str(link.get_attribute("href")))
    (pull,) = hub.discussions("alice/taken")
    assert (pull.status, str(link.get_attribute("href")).rpartition("/")[2]) == ("open", str(pull.num))
    assert published(hub, "alice/taken") == main
    offered = hub.files("alice/taken", f"refs/pr/{pull.num}")
    assert b"weight: 0.32" in offered["recipe.yaml"]
    assert sorted(name for name in offered if name.endswith(".safetensors")) == sorted(main)


def test_the_tab_is_closed(visit: Visit, hub: LoopbackHub) -> None:
    """A merge goes on without its page, and is found when its owner is back."""
    reached, go = halted(hub)
    alice = visit("alice")
    named(alice, "alice/closed")
    alice.click("button", "Merge and publish")
    alice.job("running")
    assert reached.wait(HANGS_SECONDS)
    alice.page.close()
    go.set()
    until(lambda: hub.exists("alice/closed") and published(hub, "alice/closed"))
    alice.page = alice.context.new_page()
    alice.open()
    alice.job("done")
    assert "alice/closed" in alice.page.locator("#job .state").inner_text()
    assert alice.page.get_by_role("radio", name="alice/closed: published").is_checked()


def test_cancelling(visit: Visit, hub: LoopbackHub) -> None:
    """A merge at work is cancelled by its owner; main stays as it was, and the recipe can be taken again."""
    reached, go = halted(hub)
    alice = visit("alice")
    named(alice, "alice/cancelled")
    alice.click("button", "Merge and publish")
    assert reached.wait(HANGS_SECONDS)
    alice.page.get_by_role("button", name="Cancel this merge").click()
    alice.job("cancelled")
    go.set()
    assert [commit.title for commit in hub.commits("alice/cancelled")] == ["initial commit"]
    alice.write("models: []\n")
    alice.page.get_by_role("button", name="Show its recipe").click()
    alice.until(lambda: "repo: alice/cancelled" in alice.recipe())


def test_another_user(visit: Visit, hub: LoopbackHub) -> None:
    """A second user sees nothing of the first, and cannot stop their merge by its name either."""
    reached, go = halted(hub)
    alice = visit("alice")
    named(alice, "alice/hers")
    alice.click("button", "Merge and publish")
    assert reached.wait(HANGS_SECONDS)
    hers = alice.page.get_by_role("radio", name="alice/hers").get_attribute("value")
    bob = visit("bob")
    bob.page.get_by_text("You have no merges here yet.").wait_for()
    assert "alice" not in bob.page.locator("body").inner_text()
    told = bob.page.evaluate(FORGED, hers)
    assert "alice" not in told
    assert '"success":false' in told.replace(" ", "")
    go.set()
    alice.job("done")


FORGED = """
async id => {
  const config = await (await fetch('/config')).json();
  const cancel = config.components.find(part => part.props.elem_id === 'cancel').id;
  const event = config.dependencies.find(each => each.targets.some(target => target[0] === cancel));
  const session_hash = 'forged' + Math.random();
  const body = {data: [id], fn_index: event.id, session_hash, trigger_id: cancel, event_data: null};
  const headers = {'Content-Type': 'application/json'};
  await fetch('/gradio_api/queue/join', {method: 'POST', headers, body: JSON.stringify(body)});
  return await (await fetch('/gradio_api/queue/data?session_hash=' + session_hash)).text();
}
"""


@thorough_only
def test_a_killed_space(visit: Visit, hub: LoopbackHub, space: ServedSpace, signed_in: dict[str, Any]) -> None:
    """Killed in the middle of a merge and started again, it goes on when the owner signs in, to the same bytes."""
    reached, go, seen = threading.Event(), threading.Event(), []

    def second(request: Request) -> bool:
        seen.extend([request] if staged(request) else [])
        return staged(request) and len(seen) == 2 and bool(reached.set() or True)

    hub.fail(second, status=None, stall=go)
    alice = visit("alice")
    named(alice, "alice/killed")
    alice.click("button", "Merge and publish")
    assert reached.wait(HANGS_SECONDS)
    space.kill()
    signed_in.clear()  # its sessions were in its memory
    go.set()
    assert published(hub, "alice/killed") == {}
    hub.clear_log()
    space.start()
    alice.open()
    alice.sign_in("alice")
    alice.job("done")
    assert "from an earlier run" in alice.page.locator("#log .log").inner_text()
    assert len([request for request in hub.log if staged(request)]) == 2
    if not hub.exists(f"alice/{FIRST}"):  # else the first visit made it, undisturbed
        named(alice, f"alice/{FIRST}")
        alice.click("button", "Merge and publish")
        alice.page.locator("#job .state.done").get_by_text(f"alice/{FIRST}").wait_for()
    assert published(hub, "alice/killed") == published(hub, f"alice/{FIRST}") != {}


def test_too_big_for_here(visit: Visit) -> None:
    """What is too big is refused by its plan, with a workflow for the Action to copy, and the command for Jobs."""
    visitor = visit()
    layers = "  - sources: [{model: maker/merger-zoo-kjv, layer_range: [0, 6]}]\n"
    visitor.write("merge_method: passthrough\nslices:\n" + 12 * layers)
    visitor.page.get_by_role("button", name="Plan").click()
    visitor.page.locator("#refused").get_by_text("too big for this Space").wait_for()
    assert f"uses: {REPOSITORY}@v1" in visitor.page.locator("#too-big .cm-content").inner_text()
    told = visitor.page.locator("#too-big").inner_text()
    assert "merger run mine.yaml --engine jobs --parts 4" in told
    assert "No button here starts them" in told


FITS = """
width => {
  const right = document.querySelector('#merge').getBoundingClientRect().right;
  const cut = [...document.querySelectorAll('#table, #table table, #problems, #lineage')]
    .some(part => part.scrollWidth > part.clientWidth + 1 || part.getBoundingClientRect().right > width);
  return width - 40 <= right && right <= width - 12 && document.documentElement.scrollWidth <= width && !cut;
}
"""
STILL = """
() => !document.querySelector('.pending')
  && !document.getAnimations().some(each => each instanceof CSSTransition && each.playState === 'running')
"""
UNNAMED = """
() => [...document.querySelectorAll('input, textarea, select, button, [role=textbox]')]
  .filter(part => part.offsetParent !== null)
  .filter(part => !(part.labels && part.labels.length) && !part.innerText.trim()
    && !part.getAttribute('aria-label') && !part.getAttribute('title') && !part.getAttribute('aria-labelledby'))
  .map(part => part.outerHTML.slice(0, 200))
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_looks(visit: Visit, dark: bool) -> None:
    """At both widths nothing sticks out to the side, and all that can be worked has a name to read out."""
    visitor = visit(dark=dark)
    visitor.page.get_by_role("button", name="Plan").click()
    visitor.page.locator("#table").get_by_text("about 1 min").wait_for()
    for width in (390, 1280):
        visitor.page.set_viewport_size({"width": width, "height": 900})
        visitor.page.wait_for_function(FITS, arg=width)
        assert visitor.page.evaluate(UNNAMED) == []
        bar = visitor.page.locator("#merge").bounding_box()
        assert bar is not None
        assert width > 640 or bar["y"] > 800  # the main action is at hand wherever the page is scrolled to
        visitor.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        last = visitor.page.locator("footer").bounding_box()
        assert last is not None
        assert width > 640 or last["y"] + last["height"] < bar["y"]  # and covers nothing
    assert visitor.page.evaluate("document.documentElement.lang") == "en"


@thorough_only
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(visit: Visit, dark: bool) -> None:
    """By WCAG 2.2's rules up to AA: the page as it opens, with a mistake, a refusal, a plan, a merge; both widths."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    visitor = visit(dark=dark)
    good = visitor.recipe()

    def found() -> list[str]:
        rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
        told = []
        for width in (1280, 390):
            visitor.page.set_viewport_size({"width": width, "height": 900})
            visitor.page.wait_for_function(STILL)
            for each in axe.run(visitor.page, options=rules).response["violations"]:
                told += [f"{width} {each['id']}: {node['html'][:150]} {node['any']}"[:600] for node in each["nodes"]]
        return told

    assert found() == []
    visitor.write(good.replace("weight: 0.85", "wieght: 0.85", 1))
    visitor.page.locator("#problems li.error").wait_for()
    assert found() == []
    visitor.write(good.replace("weight: 0.85", "weight: [0, 0.5, 1]", 1))
    visitor.page.get_by_role("slider", name="weight of maker/merger-zoo-kjv, point 2 of 3").wait_for()
    assert found() == []
    visitor.write(good)
    visitor.page.get_by_text("No problem found").wait_for()
    visitor.click("button", "Merge and publish")
    visitor.page.locator("#refused").get_by_text("nobody is signed in").wait_for()
    assert found() == []
    visitor.sign_in("alice")
    named(visitor, f"alice/axe-{dark}")
    visitor.click("button", "Merge and publish")
    visitor.job("done")
    visitor.click("button", "Plan")
    visitor.page.locator("#table").get_by_text("about 1 min").wait_for()
    assert found() == []
    visitor.page.goto(visitor.url + str(visitor.page.locator("#job a[href^='/merges/']").get_attribute("href")))
    assert found() == []


@thorough_only
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_search(visit: Visit, dark: bool) -> None:
    """By keyboard: planned, begun, there after a reload, stopped, its best taken, and not for others."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    visitor = visit("bob" if dark else "alice", dark=dark)
    text = re.sub(r"weight: [\d.]+", "weight: {search: [0, 1.2], start: 0.5}", visitor.recipe())
    visitor.write(f"{text}search:\n  trials: 100\n  prune: false\n  objectives: [{{loss: search.txt}}]\n")
    page = visitor.page
    page.get_by_text("left open for a search").first.wait_for()
    page.get_by_role("tab", name="Merge").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_role("tab", name="Search").press("Enter")
    page.locator("#search-text textarea").fill((ZOO / "kjv" / "heldout.txt").read_text("utf-8")[:6000])
    page.locator("#search-plan").press("Enter")
    page.locator("#search-planned").get_by_text("100 candidates (tpe)").wait_for()
    page.locator("#search-begin").press("Enter")
    page.locator("#search-job .state.running").wait_for()
    page.locator("#search-job img").wait_for()
    visitor.open()
    page.get_by_role("tab", name="Search").click()
    page.locator("#search-job img").wait_for()
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function(STILL)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(UNNAMED) == []
        told = axe.run(page, options=rules).response["violations"]
        assert [f"{each['id']}: {node['html'][:150]}" for each in told for node in each["nodes"]] == []
    page.locator("#search-job ul.shares progress").first.wait_for()
    with page.expect_download() as got:
        page.get_by_text("All candidates as CSV").press("Enter")
    assert Path(got.value.path()).read_text("utf-8").startswith("trial,state,models[")
    page.locator("#search-cancel").press("Enter")
    page.locator("#search-job .state.cancelled").wait_for()
    visitor.until(lambda: "Found by merger search in recipe.yaml" in visitor.recipe())
    assert "{search:" not in visitor.recipe()
    stranger = visit("alice" if dark else "bob", dark=dark)
    stranger.page.get_by_role("tab", name="Search").click()
    stranger.page.locator("#search-job").get_by_text("was stopped" if dark else "You have no searches").wait_for()
    assert stranger.page.locator("#search-jobs input").count() == dark  # the dark one's stranger has one of her own
