"""Whatever goes wrong in a run, the destination stays whole, and the same command finishes what is left to do.

Here some cases of each row of docs/reliability.md are tried; all of them, which takes some minutes, with
RELIABILITY=all in the environment (`make reliability`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
from reliability import page, trial
from reliability.rows import ROWS, Row
from reliability.scene import Scene
from thorough import THOROUGH

A_FEW = 1
"""Cases of a row that `make test` tries."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The Hub, the parents and the process that forks runs."""
    with Scene(tmp_path_factory.mktemp("reliability")) as stage:
        yield stage


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.table}: {row.what}".replace(" ", "-") for row in ROWS])
def test_a_disturbed_run_ends_as_the_page_says_and_the_next_one_finishes(row: Row, scene: Scene) -> None:
    """Exit code and sentence, a destination that is never half-written, and in the end the bytes of a quiet run."""
    cases = islice(row.cases(scene, THOROUGH), None if THOROUGH else A_FEW)
    complaints = [complaint for case in cases for complaint in trial.tried(scene, row, case)]
    if trial.NO_DISK in complaints:
        pytest.skip(trial.NO_DISK)
    assert not complaints, "\n".join(complaints)


def test_the_page_says_what_is_tried() -> None:
    """docs/reliability.md is written from the rows: `make tables` does it."""
    assert page.PAGE.read_text("utf-8") == page.text(ROWS)
