"""How the page tells of a job and of problems: words and figures, not colours.

Not here: where they stand on the page (test_page).
"""

from __future__ import annotations

import base64
import html
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import HOSTILE, obeyed
from huggingface_hub import constants
from places import ROOT, ZOO

from merger import Options, plan
from merger.card.facts import PlanSummary
from merger.cli.markdown import plan_section
from merger.cli.text import plan_text
from merger.errors import Problem
from space.page import views
from space.page.form import ShownSetting
from space.page.texts import for_the_page
from space.work import admission
from space.work.job_table import QueuedMerge

MERGER = ROOT / "merger"
JOB = QueuedMerge("id", "alice", "a: 1", "hf://alice/<b>", {}, 1_000_000, created=1.0)


def words(page: str) -> str:
    """The text of it, as a reader gets it."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_a_job_at_work() -> None:
    """Share, bytes, speed and time left are told of a job at work; what an earlier run made does not count as speed."""
    job = replace(JOB, state="running", started=time.time() - 10, kept=200_000, made=400_000)
    told = words(views.job(job, 0))
    assert "alice/&lt;b&gt; is being made. 40% · 400.0 kB of 1.0 MB · 20.0 kB/s · 30 s left" in told
    assert "nan" not in words(views.job(replace(job, made=200_000), 0))
    assert "min left" in words(views.job(replace(job, made=210_000), 0))


@pytest.mark.parametrize(
    ("changes", "ahead", "told"),
    [
        ({"state": "queued"}, 0, "waits its turn: it is next"),
        ({"state": "queued"}, 3, "waits its turn: 3 merges before it"),
        ({"state": "waiting"}, 0, "waits for you: the Space was started anew"),
        ({"state": "cancelled"}, 0, "Its finished files wait on the Hub"),
        ({"state": "done", "where": "http://hub/x", "is_new": True}, 0, "is published"),
        ({"state": "done", "where": "http://hub/x"}, 0, "was there already"),
        ({"state": "failed", "problems": ("a <b> is missing",)}, 0, "was not made. A &lt;b&gt; is missing"),
    ],
)
def test_a_job_in_each_state(changes: dict[str, object], ahead: int, told: str) -> None:
    """Each state has its sentence."""
    assert told in words(views.job(replace(JOB, **changes), ahead))


def test_what_a_search_has_found() -> None:
    """How much each number matters in words and bars, what was found with its tags as text, and all of it as a file."""
    outcome = {"importance": {"a<b>": 0.8, "c": 0.2}, "told": "| x |\n|---|\n| <i> |", "table": "trial\n0\n"}
    found = views.course(replace(JOB, to="", found="# best", picture="iVBO", outcome=outcome))
    assert "a&lt;b&gt; 80% c 20% x &lt;i&gt; All candidates as CSV Take it with the button below" in words(found)
    assert base64.b64decode(re.findall(r"data:text/csv;base64,([^\"]+)", found)[0]) == b"trial\n0\n"
    assert views.course(replace(JOB, to="")) == ""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (Problem("no room", hint="make some; now"), "error No room Make some; now"),
        (Problem("org/a is not there", hint="did you mean 'org/b'?"), "error org/a is not there Did you mean 'org/b'?"),
        (Problem("report.txt is empty", where="search"), "error search: report.txt is empty"),
        (Problem("density: 2 is much", where="models[a]"), "error models[a]: density: 2 is much"),
        (Problem("300 trials are asked for"), "error 300 trials are asked for"),
        (Problem("unknown key 'densty'", where="models[a]"), "error models[a]: Unknown key 'densty'"),
    ],
)
def test_a_problem_begins_as_a_sentence_does(said: Problem, told: str) -> None:
    """Unless it begins with a name or a number; it stands with its place, and its next step with it."""
    assert html.unescape(words(views.refusal_html([said]))) == told
    lines = html.unescape(words(views.job(replace(JOB, state="failed", problems=(str(said),)), 0)))
    assert said.where or told.removeprefix("error ") in lines


def test_a_log_is_text() -> None:
    """Lines of the log stand as they are."""
    assert views.log(replace(JOB, log=("one <i>", "two"))) == '<pre class="log" tabindex="0">one &lt;i&gt;\ntwo</pre>'


def test_words_of_others_are_escaped() -> None:
    """Markup in a recipe is shown, not obeyed."""
    told = views.problem_list(admission.check("merge_method: <img src=x onerror=alert(1)>\nmodels: [{model: a/b}]\n"))
    assert "<img" not in told
    assert "&lt;img" in told
    assert "<script" not in views.curves(ShownSetting({"<script>": (0.0, float("nan"), 1.0)}), "<script>")


def test_words_of_others_turn_nothing_and_are_no_lines_of_ours() -> None:
    """In lists of problems, in a job's name, place, log and failure, and beside a curve."""
    job = replace(JOB, state="done", to=f"hf://a/{HOSTILE}", where=HOSTILE, log=(HOSTILE,), problems=(HOSTILE,))
    recipe = f"merge_method: linear\n{json.dumps(HOSTILE)}: 1\nmodels: [{{model: {json.dumps(HOSTILE)}}}]\n"
    pages = [
        views.job(job, 0),
        views.log(job),
        views.problem_list(admission.check(recipe)),
        views.refusal_html([Problem(HOSTILE, hint=HOSTILE)]),
        views.curves(ShownSetting({HOSTILE: (0.0, 1.0)}), HOSTILE),
        views.lineage({"pictures/lineage.png": b""}, [HOSTILE]),
    ]
    for page in pages:
        assert "\\x1b" in page
        assert [each for each in obeyed(page) if "a line" not in each] == [], page


def test_no_word_of_a_terminal() -> None:
    """Whatever next step the Hub's rooms, recipe, lock and plan have, the page tells it without options and tokens."""
    rooms = [path for wing in ("stores/hub", "recipe", "lock", "planning") for path in (MERGER / wing).rglob("*.py")]
    hints = {hint for path in rooms for hint in re.findall(r'[Hh]int ?=? ?f?"([^"\n]+)"', path.read_text("utf-8"))}
    assert len(hints) > 50
    found = {hint: for_the_page(hint) for hint in hints}
    # what is too big has a sentence of the Space's own
    strange = re.compile(r"HF_(TOKEN|ENDPOINT)|(?<!\.)\./|--(?!max-memory|stream|shard-size)[a-z]")
    assert {hint: told for hint, told in found.items() if strange.search(told)} == {}


@pytest.mark.parametrize(
    ("to", "told", "here"),
    [
        (None, "2.7 MB for a folder, 2.0 MB for the Hub", "2.0 MB"),
        ("hf://you/merged", "2.0 MB", "2.0 MB"),
        ("./out", "2.7 MB", "2.7 MB"),
    ],
)
def test_the_disk_of_where_a_merge_goes(tmp_path: Path, to: str | None, told: str, here: str) -> None:
    """As long as that is not said a plan tells both, and the page, which knows no folders, the Hub's."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {ZOO}/kjv}}, {{model: {ZOO}/python}}]\n")
    found = PlanSummary(plan(recipe, options=Options(shard_size=1_000_000)), to)
    assert f"disk    {told}\n" in plan_text(found)
    assert f"| disk | {told} |" in plan_section(found)
    assert f"| disk | {here} |" in for_the_page(plan_section(found))


def test_links_of_a_card_lead_to_the_hub() -> None:
    """A card's own links are the Hub's, and stand on another server here; its pictures are in it."""
    told = views.card_text({"README.md": b"[a](/org/a) ![p](pictures/x.png) [b](https://b/)", "pictures/x.png": b"1"})
    assert told == f"[a]({constants.ENDPOINT}/org/a) ![p](data:image/png;base64,MQ==) [b](https://b/)"
