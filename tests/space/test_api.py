"""What programs call: by gradio_client, by a real MCP client, with a token in a header, and twenty of them at once."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from gradio_client import Client
from loopback import LoopbackHub
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from served import ROOT, ServedSpace, halted
from thorough import thorough_only
from waiting import HANGS_SECONDS, until

CROWD = 20
PAGE_BYTES = 1_000_000_000
RECIPE = tiny.TIES_RECIPE.format(base="org/base", one="org/one", two="org/two")
NAMES = {"methods", "check", "plan", "merge", "job", "cancel"}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def space(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedSpace]:
    """A Space with two workers, twenty users and three small models."""
    root = tmp_path_factory.mktemp("models")
    tiny.models(root, "base", "one", "two", hub=served)
    for number in range(CROWD):
        served.add_user(f"user{number}", token=f"hf_user{number}")
    settings = {"MERGER_SPACE_WORKERS": "2", "MERGER_SPACE_MEMORY": "5GB"}
    found = ServedSpace(served, tmp_path_factory.mktemp("space"), settings)
    found.start()
    yield found
    found.kill()


def client(space: ServedSpace, user: str | None = None) -> Client:
    headers = {"Authorization": f"Bearer hf_{user}"} if user else None
    return Client(space.url, headers=headers, verbose=False, analytics_enabled=False)


def ended(caller: Client, job: dict[str, Any]) -> dict[str, Any]:
    """A job's last word."""
    found: dict[str, Any] = {}

    def is_over() -> bool:
        found.update(caller.predict(job["id"], api_name="/job"))
        return found["state"] not in ("queued", "running")

    until(is_over, lambda: found, pause=1.0)
    return found


def test_what_is_offered(space: ServedSpace) -> None:
    """Programs see these functions and none of the page's own events."""
    about = client(space).view_api(return_format="dict", print_info=False)
    assert {name.strip("/") for name in about["named_endpoints"]} == NAMES
    assert about["unnamed_endpoints"] == {}


def test_asking_without_a_token(space: ServedSpace) -> None:
    """Methods, check and plan answer anybody; merge and jobs say whose token is missing."""
    caller = client(space)
    assert caller.predict("", api_name="/methods")["ties"].startswith("The largest entries")
    assert "density" in caller.predict("ties", api_name="/methods")["text"]
    checked = caller.predict(RECIPE.replace("density", "densty"), api_name="/check")
    assert checked["ok"] is False
    assert checked["problems"][0]["line"] == 5
    planned = caller.predict(RECIPE, api_name="/plan")
    assert planned["ok"]
    assert planned["models"][0]["model"] == "org/one"
    assert "memory" in planned["text"]
    for told in (caller.predict(RECIPE, "org/x", api_name="/merge"), caller.predict("x", api_name="/job")):
        assert told["problems"][0]["what"] == "there is no token"


def test_the_documents_example(
    space: ServedSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program in docs/space.md queues a merge and prints how it stands."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/space.md").read_text("utf-8"), re.DOTALL)
    for said, here in (("https://owner-merger.hf.space", space.url), ("hf_...", "hf_user2"), ("you/", "user2/")):
        assert said in example
        example = example.replace(said, here)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.splitlines()[-1] in ("queued", "running", "done")


def test_a_repo_that_holds_another_model(space: ServedSpace, hub: LoopbackHub) -> None:
    """It is refused before anything is queued."""
    hub.add_model("user4/taken", {"config.json": b"{}", "model.safetensors": b"1"}, owner="user4")
    told = client(space, "user4").predict(RECIPE, "user4/taken", api_name="/merge")
    assert told["exit_code"] == 6
    assert told["problems"][0]["what"] == "user4/taken already holds a model (config.json)"


def test_a_token_nobody_knows(space: ServedSpace) -> None:
    """A token that the Hub does not know is refused, and is not told again."""
    told = client(space, "stranger").predict(RECIPE, "org/x", api_name="/merge")
    assert told["problems"][0]["what"].startswith("the Hub does not say whose this token is")
    assert "hf_stranger" not in json.dumps(told) + space.log()


def test_a_script_that_only_reads_leaves_the_merge_alone(space: ServedSpace, hub: LoopbackHub) -> None:
    """It may look at its owner's merge, which goes on with the token that it was asked with; it may begin none."""
    hub.add_user("user3", token="hf_reader3", role="read")
    reached, go = halted(hub)
    writer, reader = client(space, "user3"), client(space, "reader3")
    first = writer.predict(RECIPE, "user3/first", api_name="/merge")
    second = writer.predict(RECIPE, "user3/second", api_name="/merge")
    assert reached.wait(HANGS_SECONDS)
    assert [reader.predict(job["id"], api_name="/job")["ok"] for job in (first, second)] == [True, True]
    told = reader.predict(RECIPE, "user3/third", api_name="/merge")
    assert told["problems"][0]["what"] == "this token only reads"
    go.set()
    assert [ended(writer, job)["state"] for job in (first, second)] == ["done", "done"]


def test_refusals_are_answers(space: ServedSpace) -> None:
    """What a plan refuses comes back as data, with the exit code of the command."""
    told = client(space, "user0").predict(RECIPE.replace("org/two", "./two"), "", api_name="/merge")
    assert (told["ok"], told["exit_code"]) == (False, 2)
    assert "is no model on the Hub" in told["problems"][0]["what"]
    for name in ("user0/..", "user0/a--b", "user0/a.git", "user0/" + 97 * "a"):
        told = client(space, "user0").predict(RECIPE, name, api_name="/merge")
        assert (told["exit_code"], told["problems"][0]["what"]) == (2, f"{name!r} is no repo's name on the Hub")
    assert "where shall the result go?" in json.dumps(client(space, "user0").predict(RECIPE, "", api_name="/merge"))


def test_mcp(space: ServedSpace, hub: LoopbackHub) -> None:
    """A model with tools checks, plans, and merges with the token in its header; it is offered nothing else."""

    async def talk() -> tuple[set[str], list[dict[str, Any]]]:
        url, headers = f"{space.url}/gradio_api/mcp/", {"Authorization": "Bearer hf_user1"}
        async with (
            streamablehttp_client(url, headers=headers) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            names = {tool.name for tool in (await session.list_tools()).tools}
            prefix = next(name for name in names if name.endswith("check")).removesuffix("check")
            asked = [
                ("check", {"recipe": RECIPE}),
                ("plan", {"recipe": RECIPE}),
                ("merge", {"recipe": RECIPE, "to": "user1/mcp"}),
            ]
            told = [await session.call_tool(prefix + name, given) for name, given in asked]
            return {name.removeprefix(prefix) for name in names}, [
                ast.literal_eval(one.content[0].text) for one in told
            ]

    names, (checked, planned, merged) = asyncio.run(talk())
    assert names == NAMES
    assert checked["ok"]
    assert planned["size"] > 0
    assert merged["state"] in ("queued", "running")
    assert ended(client(space, "user1"), merged)["state"] == "done"
    assert hub.commits("user1/mcp")[0].author == "user1"


@pytest.mark.parametrize("path", ["space/app.py", "/etc/passwd", "data/jobs.db", "../merger/run/pipeline.py"])
def test_no_file_is_given_out(space: ServedSpace, path: str) -> None:
    """The server gives out none of the machine's files."""
    place = str(space.folder / path) if path.startswith("data") else path
    assert httpx.get(f"{space.url}/gradio_api/file={place}").status_code in (403, 404)


def test_no_file_is_taken(space: ServedSpace) -> None:
    """Nobody can fill the disk with uploads."""
    sent = httpx.post(f"{space.url}/gradio_api/upload", files={"files": ("big.bin", b"x" * 100_000)})
    assert sent.status_code == 413


def test_a_strange_site_may_not_ask(space: ServedSpace) -> None:
    """Another site's page gets no leave to read what this one answers."""
    found = httpx.get(f"{space.url}/config", headers={"Origin": "https://example.org", "Cookie": "session=x"})
    assert (found.status_code, "access-control-allow-origin" in found.headers) == (403, False)


def tree(pid: int) -> list[int]:
    """A process and those below it."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        below = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(found for child in below for found in tree(int(child)))]


def resident(pid: int) -> int:
    """Bytes of memory that a process has, shared pages included."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


@thorough_only
def test_twenty_at_once(space: ServedSpace, hub: LoopbackHub) -> None:
    """Twenty users submit at once: each is served or told their place, sees their own merge alone, and none is lost."""
    assert space.process is not None
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            most[0] = max(most[0], sum(map(resident, tree(space.process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(CROWD) as threads:
        callers = list(threads.map(lambda number: client(space, f"user{number}"), range(CROWD)))
        began = time.monotonic()
        jobs = list(
            threads.map(
                lambda one: one[1].predict(RECIPE, f"user{one[0]}/crowd", api_name="/merge"), enumerate(callers)
            )
        )
        submitted = time.monotonic() - began
        assert all(job["ok"] and job["state"] in ("queued", "running") for job in jobs), jobs
        assert any(job["ahead"] >= 5 for job in jobs)
        strange = [caller.predict(jobs[number - 1]["id"], api_name="/job") for number, caller in enumerate(callers[:5])]
        strange += [
            caller.predict(jobs[number - 1]["id"], api_name="/cancel") for number, caller in enumerate(callers[:5])
        ]
        last = list(threads.map(lambda one: ended(*one), zip(callers, jobs, strict=True)))
    stop.set()
    watcher.join()
    took = time.monotonic() - began
    assert all(told["problems"][0]["what"].startswith("you have no job") for told in strange)
    assert [job["state"] for job in last] == ["done"] * CROWD
    assert len({job["id"] for job in last}) == CROWD
    made = {hub.tree(f"user{number}/crowd")["model.safetensors"].sha256 for number in range(CROWD)}
    assert len(made) == 1
    planned = callers[0].predict(RECIPE, api_name="/plan")["peak_memory"]
    figures = f"{most[0] / 1e6:.0f} MB at most, {(PAGE_BYTES + 2 * planned) / 1e6:.0f} MB allowed"
    print(f"submitted in {submitted:.1f} s, all done in {took:.1f} s, {figures}")
    assert most[0] < PAGE_BYTES + 2 * planned
    assert "Traceback" not in space.log()
    assert "hf_user" not in space.log()
