"""A loopback Hub for each file of tests, with two users, and a child process that runs the real client against it."""

import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

from calls import READER, WRITER, Command

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # the tests run side by side

import forks
import pytest
from hypothesis import HealthCheck, settings
from loopback import Client, LoopbackGitHub, LoopbackHub
from waiting import HANGS_SECONDS

# A shell that begins this in the background has it ignore Ctrl-C, and so would all that the tests begin.
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_TORCH = find_spec("torch") is not None

# A busy machine is slow: no law is about time.
settings.register_profile("merger", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("merger")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Where torch is not (make light), a file of tests that imports it, or what takes it, is passed over."""
    report = yield
    missing = re.search(r"No module named '\w+", str(report.longrepr or ""))
    if report.failed and missing and not HAS_TORCH:
        report.outcome, report.longrepr = "skipped", (report.nodeid, 0, f"Skipped: {missing[0]}'")
    return report


def pytest_collection_finish() -> None:
    """What is imported by now lives to the end: who looks for garbage need not look there."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cards have blank ones, but where they are tested."""
    with nullcontext() if request.path.parent.name == "card" else forks.blank_pictures():
        yield


@pytest.fixture(scope="module")
def served() -> Iterator[LoopbackHub]:
    """A Hub with the user alice of the organisation org: one token that may write, one that may only read."""
    with LoopbackHub() as hub:
        hub.add_user("alice", token=WRITER, orgs=("org",))
        hub.add_user("alice", token=READER, role="read", orgs=("org",))
        yield hub


@pytest.fixture
def hub(served: LoopbackHub) -> Iterator[LoopbackHub]:
    """The file's Hub with an empty log and, afterwards, no faults left over."""
    served.clear_log()
    yield served
    served.clear_faults()
    served.url_lifetime(3600)


@pytest.fixture
def github() -> Iterator[LoopbackGitHub]:
    """GitHub."""
    with LoopbackGitHub() as server:
        yield server


@pytest.fixture(scope="module")
def client(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A child with the writer's token in its environment."""
    with Client(served.env(tmp_path_factory.mktemp("home"), WRITER)) as child:
        yield child


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The real command in a process of its own: `command("plan", "recipe.yaml", cwd=..., hub=...)`.

    It is forked, unless the arguments must stand in the system's list of processes.
    """

    def run(
        *arguments: str,
        cwd: Path,
        hub: LoopbackHub,
        token: str = WRITER,
        env: Mapping[str, str] | None = None,
        forked: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        home = tmp_path_factory.mktemp("home")
        environment = {**os.environ, **hub.env(home, token), "TMPDIR": str(home), **(env or {})}
        line = [sys.executable, "-m", "merger", *arguments]
        if forked:
            return forks.run(line, cwd=cwd, env=environment)
        return subprocess.run(
            line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS_SECONDS, check=False
        )

    return run
