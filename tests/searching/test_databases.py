"""A study in a database: a file of SQLite's, and a real PostgreSQL, which several workers share and some of them leave.

What is tried and when it ends: test_study.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from thorough import thorough_only

from merger.recipe.searched import Values
from merger.searching.trials import Step
from searching.test_study import hill, numbers, run, searched

pytestmark = thorough_only
PATH = os.pathsep.join([os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
PLACES = [shutil.which(name, path=PATH) for name in ("initdb", "pg_ctl", "createdb")]


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """The folder of the socket of a PostgreSQL that listens nowhere else; it runs as no administrator."""
    if None in PLACES or find_spec("psycopg") is None:
        pytest.skip("PostgreSQL and its driver are not here: apt-get install postgresql; pip install -e '.[postgres]'")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    user = "postgres" if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
    call = partial(subprocess.run, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    data = ("-D", folder / "data")
    call([PLACES[0], *data, "--auth=trust", "--username=postgres", "--no-sync"])
    options = f"-c listen_addresses= -c fsync=off -k {folder}"
    call([PLACES[1], *data, "-w", "-l", folder / "log", "-o", options, "start"])
    yield folder
    call([PLACES[1], *data, "-m", "immediate", "stop"])
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with nothing in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/study.db"
    folder, name = request.getfixturevalue("server"), f"d{abs(hash(str(tmp_path)))}"
    subprocess.run([PLACES[2], "-h", folder, "-U", "postgres", name], check=True)
    return f"postgresql://postgres@/{name}?host={folder}"


@pytest.mark.parametrize("at", [1, 6, 12])
def test_a_killed_search_goes_on_as_if_it_had_not_been(at: int, address: str) -> None:
    """Killed as it scores, it goes on with trials that are those of any other storage."""
    (process,) = started(address, (at,))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert numbers(run(searched(), storage=address)[0]) == numbers(run(searched())[0])


def test_several_workers_begin_at_once_and_one_is_killed(address: str) -> None:
    """All find the tables that one of them makes; no candidate is tried twice, and none is lost."""
    workers = started(address, (2, None, None))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    trials = run(searched(), storage=address)[0].trials()
    assert [trial.state for trial in trials] == ["complete"] * len(trials)
    assert 12 <= len(trials) <= 14, "of workers that see the last place at once each may take it"
    assert len({tuple(trial.drawn.values()) for trial in trials}) == len(trials)


def started(address: str, killed: tuple[int | None, ...]) -> list[multiprocessing.Process]:
    """Workers of one study, each killed as it scores its so manieth candidate."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_run_and_die, args=(address, at)) for at in killed]
    for worker in workers:
        worker.start()
    return workers


def _run_and_die(address: str, at: int | None) -> None:
    scored = list[Values]()

    def judge(values: Values, step: Step | None) -> list[float]:
        scored.append(values)
        if len(scored) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return hill(values)

    run(searched(), judge, storage=address)
