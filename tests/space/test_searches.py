"""Searches in the Space: what of them it takes, and whose they are.

Not here: the page (test_page), their workers (test_jobs), and the search itself (tests/searching).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vocabularies
from calls import WRITER
from fastapi import FastAPI
from loopback import Client, LoopbackHub
from starlette.testclient import TestClient

from merger.errors import MergerError
from space.page import merge_page
from space.work import admission
from space.work.admission import Limits
from space.work.job_table import JobError
from space.work.queue import MergeQueue, Token
from space.work.service import Service

ALICE = Token(WRITER)
SEARCHED = """\
merge_method: task_arithmetic
base_model: org/base
models:
  - {model: org/one, parameters: {weight: {search: [0, 1], start: 0.5}}}  # mine
  - {model: org/two, parameters: {weight: 0.5}}
dtype: float32
search:
  trials: 4
  objectives: [{loss: search.txt}]
  report: [{loss: report.txt}]
"""
TEXTS = {"search.txt": "a b c d e f g h\n" * 40, "report.txt": "h g f e d c b a\n" * 40}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("loss: search.txt", ""),
        ("loss: ./report.txt", ""),
        (f"loss: hf://datasets/org/texts@{COMMIT}/a.txt", ""),
        (f"accuracy: hf://datasets/org/texts@{COMMIT}/a.jsonl", ""),
        ("loss: hf://datasets/org/texts@main/a.txt", "at a commit"),
        ("loss: /etc/passwd", "neither a text"),
        ("loss: ../search.txt", "neither a text"),
        ("loss: recipe.yaml", "neither a text"),
        ("function: os:getcwd", "by no function"),
        ("task: arc_easy", "by no task"),
        ("task: ./mine.yaml", "by no task"),
    ],
)
@pytest.mark.parametrize("block", ["objectives", "report"])
def test_what_a_search_may_read(objective: str, words: str, block: str) -> None:
    """Texts that were pasted and data sets at a commit; no file, task or function, in either block, at its place."""
    old = "loss: search.txt" if block == "objectives" else "loss: report.txt"
    text = SEARCHED.replace(old, objective)
    if objective.removeprefix("loss: ./").removeprefix("loss: ") in TEXTS:
        text = text.replace("report:", "# report:")
    told = [str(problem) for problem in admission.check(text).problems]
    assert [words in each and each.startswith("recipe.yaml:") for each in told] == [True] * bool(words), told


def test_the_study_lies_in_no_place_of_the_recipes(tmp_path: Path) -> None:
    """A storage may be a file or a database of somebody's."""
    for place in (tmp_path / "study.log", "postgresql://host/name"):
        (told,) = admission.check(SEARCHED + f"  storage: {place}\n").problems
        assert "keeps a study by itself" in told.what


REFUSED: list[tuple[tuple[str, str], dict[str, str], dict[str, int], str]] = [
    (("", ""), {"report.txt": ""}, {}, "report.txt is empty"),
    (("", ""), {"search.txt": " \n"}, {}, "search.txt is empty"),
    (("", ""), {"search.txt": 200_000 * "a"}, {}, "200,000 letters"),
    (("", ""), {"search.txt": ALICE.value}, {}, "token"),
    (("", ""), {}, {"trials": 3}, "4 trials are asked for, and this Space gives 3"),
    (("trials: 4", "minutes: 30"), {}, {}, "30 minutes are asked for, and this Space gives 20"),
    (("", ""), {}, {"memory": 300_000_000}, "of memory"),
    (("{search: [0, 1], start: 0.5}", "0.5"), {}, {}, "search"),
]
"""What the recipe has in place of what, the texts and limits that are others, and what is said."""


def ask(folder: Path) -> tuple[list[str], str, int]:
    """What is said to each of these, to a merge of a recipe with open numbers, and how many jobs there are then."""
    told = list[str]()
    for number, ((old, new), texts, limits, _) in enumerate(REFUSED):
        service = Service(MergeQueue(folder / str(number), Limits(**limits)))
        told.append(_said(service.search, "alice", ALICE, SEARCHED.replace(old, new), {**TEXTS, **texts}))
    merge = _said(service.submit, "alice", ALICE, SEARCHED, "alice/made")
    service.search("alice", ALICE, SEARCHED, TEXTS)
    return told, merge, len(service.queue.jobs.open())


def _said(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except MergerError as error:
        return str(error)
    return ""


def test_what_is_refused_before_it_is_queued(
    served: LoopbackHub, client: Client, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is missing, too much or too long for here, with a sentence; and such a recipe is not merged."""
    root = tmp_path_factory.mktemp("parents")
    for seed, name in enumerate(("base", "one", "two")):
        served.add_model(f"org/{name}", vocabularies.model(root / name, seed))
    told, merge, count = client(ask, tmp_path)
    assert [each for each, (*_, words) in zip(told, REFUSED, strict=True) if words not in each] == []
    assert "leaves numbers open" in merge
    assert count == 1


def test_a_search_is_its_owners(tmp_path: Path) -> None:
    """One at a time; nobody else sees or stops it, it has no page, and its texts go with its end."""
    queue = MergeQueue(tmp_path, Limits())
    job = queue.submit("alice", ALICE, SEARCHED, "", {}, 4, texts=TEXTS)
    with pytest.raises(JobError, match="a search of yours is not over yet"):
        queue.submit("alice", ALICE, SEARCHED, "", {}, 4, texts=TEXTS)
    for call in (queue.job, queue.cancel):
        with pytest.raises(JobError, match="you have no job"):
            call("bob", job.id)
    app = FastAPI()
    merge_page.offer_pages(app, queue)
    assert TestClient(app).get(f"/merges/{job.id}").status_code == 404
    queue.jobs.progress(job.id, made=2, found="# found\n", picture="abc")
    stopped = queue.cancel("alice", job.id)
    assert (stopped.state, stopped.found, stopped.texts) == ("cancelled", "# found\n", {})
    assert MergeQueue(tmp_path, Limits()).job("alice", job.id) == stopped
