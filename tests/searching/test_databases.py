"""A study in a database: a file of SQLite's, and a real PostgreSQL, which several workers share and some of them leave.

What is tried and when it ends: test_study.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import Postgres, running
from thorough import thorough_only

from merger.recipe.searched import Values
from merger.searching.trials import Step
from searching.test_study import hill, numbers, run, searched

pytestmark = thorough_only


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL."""
    with running() as found:
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with nothing in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/study.db"
    found: Postgres = request.getfixturevalue("postgres")
    return found.database()


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
