"""The Action's side of the line, in this process: which recipes an event is about, what is done, and what is told.

Git, files and GitHub's API over HTTP are real; models are folders. Not here: action.yml and its runner (test_act).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import vocabularies
from actions import NOTHING, Checkout, commands, environment, outputs, pull_request, push
from hostile import HOSTILE, obeyed
from loopback import LoopbackGitHub
from loopback.github import READ_ONLY, TOKEN
from thorough import thorough_only

from merger.action import github, job, line, search
from merger.action import step as process
from merger.action.github import Event, GitHubApi, GitHubError
from merger.action.inputs import Inputs
from merger.cli import markdown
from merger.errors import RecipeError
from merger.run.prepare import parse_text
from merger.searching.effort import Effort

LINEAR = "merge_method: linear\nmodels:\n  - model: {one}\n  - model: {two}\nparameters: {{weight: 0.5}}\n"
TEXT = "a b c d e f g h\n" * 40
WRONG = "merge_method: linear\nmodels:\n  - modl: ./one\n  - model: ./two\n    parameters: {weight: big}\n"


@dataclass(frozen=True)
class Told:
    """A step that has ended."""

    code: int
    log: str
    outputs: Mapping[str, str]
    summary: str

    @property
    def commands(self) -> list[str]:
        """What GitHub would do at a word of the log."""
        return commands(self.log)


Step = Callable[..., Told]


@pytest.fixture
def parents(clone: Checkout) -> dict[str, Path]:
    """Two models in the clone, which git does not know."""
    return tiny.models(clone.root / "models", "one", "two")


@pytest.fixture
def recipe(parents: dict[str, Path]) -> str:
    """A recipe of the two."""
    return LINEAR.format(**parents)


@pytest.fixture
def clone(tmp_path: Path) -> Checkout:
    """A clone with one commit."""
    made = Checkout(tmp_path / "clone")
    made.commit({"README.md": "recipes"})
    return made


@pytest.fixture
def hosted() -> Iterator[LoopbackGitHub]:
    """GitHub."""
    with LoopbackGitHub() as server:
        yield server


@pytest.fixture
def step(clone: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Step:
    """The step `python -m merger.action.step` for an event, with the inputs by their names in action.yml."""

    def run(event: str, payload: Mapping[str, Any], api: str = "", **given: str) -> Told:
        place = tmp_path / "runner"
        shutil.rmtree(place, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.chdir(clone.root)
            inputs = {"recipe": "merges/*.yaml", "github_token": TOKEN, **given}
            settings = {f"INPUT_{name.upper()}": text for name, text in inputs.items()}
            for name, value in (environment(place, clone.root, event, payload, api) | settings).items():
                patch.setenv(name, value)
            capsys.readouterr()
            code = process.main()
        files = {name: (place / name).read_text() if (place / name).exists() else "" for name in ("output", "summary")}
        return Told(code, capsys.readouterr().out, outputs(files["output"]), files["summary"])

    return run


def inputs(clone: Checkout, **given: str) -> Inputs:
    """The inputs of a job in this clone."""
    settings = {f"INPUT_{name.upper()}": text for name, text in ({"recipe": "merges/*.yaml"} | given).items()}
    return Inputs.take({"GITHUB_WORKSPACE": str(clone.root), **settings})


def about(clone: Checkout, event: Event, api: str = "http://127.0.0.1:9", **given: str) -> list[str]:
    """The recipes that an event is about; without an address of GitHub, git has to know."""
    found = job.recipes(inputs(clone, **given), event, clone.root, GitHubApi(api, "org/recipes", TOKEN))
    return [path.as_posix() for path in found]


# Which recipes


CHANGES: list[tuple[str, dict[str, str | None], list[str]]] = [
    ("added", {"merges/new.yaml": "new"}, ["merges/new.yaml"]),
    ("changed", {"merges/old.yaml": "changed"}, ["merges/old.yaml"]),
    ("several", {"merges/old.yaml": "changed", "merges/new.yaml": "new"}, ["merges/new.yaml", "merges/old.yaml"]),
    ("deleted", {"merges/old.yaml": None}, []),
    ("renamed", {"merges/old.yaml": None, "merges/name.yaml": "old"}, ["merges/name.yaml"]),
    ("elsewhere", {"other/new.yaml": "new", "merges/new.txt": "new"}, []),
    ("its lock", {"merges/old.lock.yaml": "lock"}, ["merges/old.yaml"]),
    ("a lock alone", {"merges/alone.lock.yaml": "lock"}, []),
    ("a name with a newline", {"merges/a\nb.yaml": "new"}, ["merges/a\nb.yaml"]),
]


@pytest.mark.parametrize(("files", "found"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_a_push_is_about_the_recipes_it_added_or_changed(
    files: dict[str, str | None], found: list[str], clone: Checkout
) -> None:
    """Renamed ones under their new name, deleted ones not at all, a lock file for its recipe."""
    before = clone.commit({"merges/old.yaml": "old", "merges/quiet.yaml": "quiet"})
    after = clone.commit(files)
    assert about(clone, Event("push", push(before, after))) == found


def test_a_push_of_several_commits_is_one_change(clone: Checkout) -> None:
    """What a later commit took back is not changed."""
    before = clone.commit({"merges/old.yaml": "old"})
    clone.commit({"merges/old.yaml": "changed", "merges/new.yaml": "new"})
    after = clone.commit({"merges/old.yaml": "old"})
    assert about(clone, Event("push", push(before, after))) == ["merges/new.yaml"]


def test_a_forced_push_is_compared_with_what_was_there(clone: Checkout) -> None:
    """Even though the old commit is no ancestor of the new one."""
    start = clone.commit({"merges/both.yaml": "both"})
    before = clone.commit({"merges/both.yaml": "first try"})
    clone.git("reset", "-q", "--hard", start)
    after = clone.commit({"merges/both.yaml": "second try", "merges/new.yaml": "new"})
    assert about(clone, Event("push", push(before, after, forced=True))) == ["merges/both.yaml", "merges/new.yaml"]


def test_the_first_push_to_main_is_about_all_recipes(clone: Checkout) -> None:
    """There is nothing that it could be compared with."""
    after = clone.commit({"merges/a.yaml": "a", "merges/b.yaml": "b"})
    assert about(clone, Event("push", push(NOTHING, after))) == ["merges/a.yaml", "merges/b.yaml"]


def test_the_first_push_of_a_branch_is_compared_with_main(clone: Checkout, hosted: LoopbackGitHub) -> None:
    """By git where the clone knows main, else by GitHub."""
    clone.commit({"merges/old.yaml": "old"})
    clone.git("update-ref", "refs/remotes/origin/main", "HEAD")
    after = clone.commit({"merges/new.yaml": "new"})
    event = Event("push", push(NOTHING, after, ref="refs/heads/a/b"))
    assert about(clone, event) == ["merges/new.yaml"]
    clone.git("update-ref", "-d", "refs/remotes/origin/main")
    hosted.compared[f"main...{after}"] = [{"filename": "merges/new.yaml", "status": "added"}]
    assert about(clone, event, hosted.url) == ["merges/new.yaml"]


def test_a_branch_that_was_deleted_is_about_nothing(clone: Checkout) -> None:
    """Though all its recipes are gone."""
    before = clone.commit({"merges/a.yaml": "a"})
    assert about(clone, Event("push", push(before, NOTHING, deleted=True))) == []


def test_a_clone_of_one_commit_asks_github_what_changed(clone: Checkout, hosted: LoopbackGitHub) -> None:
    """What actions/checkout makes: the commit before is not there."""
    after = clone.commit({"merges/a.yaml": "a", "merges/b.yaml": "b"})
    event = Event("push", push("1" * 40, after))
    changes = [{"filename": "merges/a.yaml", "status": "renamed"}, {"filename": "merges/b.yaml", "status": "removed"}]
    hosted.compared[f"{'1' * 40}...{after}"] = changes
    assert about(clone, event, hosted.url) == ["merges/a.yaml"]
    hosted.compared[f"{'1' * 40}...{after}"] = changes * 150
    assert about(clone, event, hosted.url) == ["merges/a.yaml", "merges/b.yaml"], "300 files are all that GitHub names"


def test_a_pull_request_in_a_clone_of_one_commit_is_asked_of_github(clone: Checkout, hosted: LoopbackGitHub) -> None:
    """Page by page; a fork's commit may be in no clone at all."""
    clone.commit({"merges/a.yaml": "a", "merges/b.yaml": "b", "merges/c.yaml": "c"})
    changes = [("a.yaml", "modified"), ("x.yaml", "removed"), ("c.yaml", "renamed")]
    hosted.compared["pull 7"] = [{"filename": f"merges/{name}", "status": status} for name, status in changes]
    hosted.page = 2
    event = Event("pull_request", pull_request("1" * 40, "2" * 40, "stranger/recipes"))
    assert about(clone, event, hosted.url) == ["merges/a.yaml", "merges/c.yaml"]


def test_where_nobody_knows_what_changed_the_next_step_is_said(clone: Checkout, hosted: LoopbackGitHub) -> None:
    """Nothing is guessed."""
    after = clone.commit({"merges/a.yaml": "a"})
    with pytest.raises(GitHubError, match="fetch-depth: 0"):
        about(clone, Event("push", push("1" * 40, after)), hosted.url)


def test_a_pull_request_is_about_what_it_changed_since_it_parted(clone: Checkout) -> None:
    """Not about what main has changed meanwhile."""
    start = clone.commit({"merges/old.yaml": "old", "merges/ours.yaml": "ours"})
    base = clone.commit({"merges/ours.yaml": "moved on"})
    clone.git("reset", "-q", "--hard", start)
    head = clone.commit({"merges/old.yaml": "theirs"})
    assert about(clone, Event("pull_request", pull_request(base, head))) == ["merges/old.yaml"]


def test_any_mode_but_auto_is_about_all_that_is_named(clone: Checkout) -> None:
    """Several names, one a line; a job of a matrix must not depend on what changed."""
    before = clone.commit({"merges/a.yaml": "a", "merges/b.yaml": "b", "c.txt": "c", "merges/a.lock.yaml": "lock"})
    event = Event("push", push(before, clone.commit({})))
    assert about(clone, event, mode="plan") == ["merges/a.yaml", "merges/b.yaml"]
    assert about(clone, event, mode="run", recipe="c.txt\n ./merges/b.yaml\nmerges/b.yaml") == [
        "c.txt",
        "merges/b.yaml",
    ]
    assert about(clone, Event("workflow_dispatch", {}), recipe="**/a.yaml") == ["merges/a.yaml"]
    with pytest.raises(RecipeError, match=r"there is no file 'merges/c\.yaml'"):
        about(clone, event, mode="run", recipe="merges/c.yaml")


def test_recipes_are_relative_to_the_working_directory(clone: Checkout) -> None:
    """A change elsewhere of the same name is not theirs."""
    before = clone.commit({"deep/merges/a.yaml": "a", "deep/merges/b.yaml": "b"})
    after = clone.commit({"deep/merges/a.yaml": "changed", "merges/b.yaml": "changed"})
    assert about(clone, Event("push", push(before, after)), working_directory="deep") == ["merges/a.yaml"]


@pytest.mark.parametrize("name", ["../outside.yaml", "/etc/passwd", "../*.yaml", "merges/link.yaml"])
def test_no_name_leads_out_of_the_repository(name: str, clone: Checkout, tmp_path: Path) -> None:
    """Neither a path nor a link: what is wrong with a recipe is told with its words."""
    (tmp_path / "outside.yaml").write_text("secret: 1")
    (clone.root / "merges").mkdir()
    (clone.root / "merges" / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    with pytest.raises(RecipeError, match="outside of this repository"):
        about(clone, Event("workflow_dispatch", {}), recipe=name)


# What is done with them


@pytest.mark.parametrize(
    ("event", "mode"),
    [("push", "run"), ("workflow_dispatch", "run"), ("schedule", "run"), ("issue_comment", "plan"), ("", "plan")],
)
def test_an_event_decides_between_plan_and_run(event: str, mode: str, clone: Checkout) -> None:
    """What only those who may write can start is run."""
    assert job.mode_of(inputs(clone), Event(event, {})) == mode


OWN, FORK, GONE = "org/recipes", "stranger/recipes", None
REPO = {"repository": {"full_name": OWN}}


def pulled(head: str | None) -> dict[str, Any]:
    """A pull request from that repository, which may be gone."""
    return pull_request("1" * 40, "2" * 40, head)


def after(head: str | None) -> dict[str, Any]:
    """The end of another workflow, that ran for a commit of that repository."""
    return {"workflow_run": {"head_repository": head and {"full_name": head}}, **REPO}


RUNS, PLANS, WITHOUT = "runs", "plans", "plans without a token"
EVENTS: list[tuple[str, dict[str, Any], str]] = [
    *((name, dict[str, Any](), RUNS) for name in ("", "push", "schedule", "workflow_dispatch", "repository_dispatch")),
    *((name, dict[str, Any](), RUNS) for name in ("merge_group", "release", "create")),
    ("pull_request", pulled(OWN), RUNS),
    ("pull_request", pulled(FORK), WITHOUT),
    ("pull_request", pulled(GONE), WITHOUT),
    ("pull_request_target", pulled(OWN), PLANS),
    ("pull_request_target", pulled(FORK), WITHOUT),
    ("pull_request_target", pulled(GONE), WITHOUT),
    ("pull_request_review", pulled(OWN), PLANS),
    ("pull_request_review", pulled(FORK), WITHOUT),
    ("pull_request_review_comment", pulled(FORK), WITHOUT),
    ("workflow_run", after(OWN), PLANS),
    ("workflow_run", after(FORK), WITHOUT),
    ("workflow_run", after(GONE), WITHOUT),
    *((name, REPO, WITHOUT) for name in ("issue_comment", "issues", "discussion", "discussion_comment", "gollum")),
    *((name, REPO, WITHOUT) for name in ("fork", "watch", "check_suite", "status", "an_event_of_tomorrow")),
    *((name, {}, WITHOUT) for name in ("pull_request", "pull_request_target", "workflow_run", "issue_comment")),
    ("pull_request", {"pull_request": [7], "repository": "org"}, WITHOUT),
]
NAMED = [f"{name or 'no event'}-{kind}-{number}" for number, (name, _, kind) in enumerate(EVENTS)]


@pytest.mark.parametrize(("event", "payload", "kind"), EVENTS, ids=NAMED)
def test_what_strangers_have_a_hand_in_is_never_run_and_read_without_a_token(
    event: str, payload: dict[str, Any], kind: str, clone: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the workflow says; an event that nobody here has heard of is a stranger's."""
    found = Event(event, payload)
    if kind != RUNS:
        assert job.mode_of(inputs(clone), found) == "plan"
    for mode in ("run", "publish", "search"):
        if kind == RUNS:
            assert job.mode_of(inputs(clone, mode=mode), found) == mode
        else:
            with pytest.raises(RecipeError, match=f"input mode: {mode} is not for this event, {event}: "):
                job.mode_of(inputs(clone, mode=mode), found)
    for mode in ("plan", "check"):
        assert job.mode_of(inputs(clone, mode=mode), found) == mode
    given = inputs(clone, mode="plan", hf_token="hf_writes", hf_read_token="hf_reads")
    with monkeypatch.context() as patch:
        patch.setattr(Event, "read", lambda environment: found)
        run = job.ActionRun(given, {"GITHUB_WORKSPACE": str(clone.root)}, github.Log(sys.stdout))
    recipe = parse_text(LINEAR.format(one="org/one", two="org/two"), "recipe.yaml")
    assert line.options_of(run, recipe).read_token == (False if kind == WITHOUT else "hf_reads")


@pytest.mark.parametrize("head", [FORK, GONE, OWN])
def test_a_pull_request_is_planned_and_a_strangers_never_run(head: str | None, clone: Checkout, step: Step) -> None:
    """With a sentence and a next step, before any recipe is looked at."""
    clone.commit({"merges/mine.yaml": WRONG})
    told = step("pull_request_target", pulled(head), mode="run")
    assert (told.code, told.outputs) == (2, {"state": "failed"})
    (error,) = [line for line in told.commands if line.startswith("::error")]
    why = "strangers can start it" if head == OWN else "its recipes may be a stranger's"
    assert f"mode: run is not for this event, pull_request_target: {why}%0A    leave mode out" in error


def test_a_push_is_merged_and_a_job_run_again_makes_nothing_new(clone: Checkout, step: Step, recipe: str) -> None:
    """Outputs, summary and report say where the model is, both times."""
    after = clone.commit({"merges/mine.yaml": recipe})
    first = step("push", push(NOTHING, after), to="./out")
    assert (first.code, first.outputs["state"]) == (0, "published"), first.log
    made = (clone.root / "out" / "model.safetensors").stat()
    again = step("push", push(NOTHING, after), to="./out")
    assert (again.code, again.outputs["state"]) == (0, "unchanged"), again.log
    assert (clone.root / "out" / "model.safetensors").stat() == made
    for told in (first, again):
        assert told.outputs["repo-url"] == str(clone.root / "out")
        assert told.outputs["plan-hash"] == first.outputs["plan-hash"]
        assert len(told.outputs["plan-hash"]) == 64
        assert str(clone.root / "out") in told.summary
        assert "| `one` | local folder |" in told.summary
        (reported,) = json.loads(Path(told.outputs["report"]).read_text()) if told is again else [{"recipe": ""}]
    assert (reported["recipe"], reported["state"], reported["plan"]["seed"]) == ("merges/mine.yaml", "unchanged", 0)
    assert "> # out\n" in first.summary
    assert "> **It was not measured**" in first.summary
    assert "<summary>The card</summary>\n\n## Use it" in first.summary
    assert "::group::run merges/mine.yaml" in first.commands


SEARCHED = """\
merge_method: linear
models:
  - model: {one}
    parameters: {{weight: {{search: [0, 1]}}}}
  - model: {two}
dtype: float32
parameters: {{weight: 0.5}}
search: {{trials: 2, objectives: [{{loss: ./search.txt}}], report: [{{loss: ./report.txt}}]}}
"""


@thorough_only
def test_a_search_goes_on_in_the_next_run_and_ends_in_a_pull_request_and_a_model(
    clone: Checkout, step: Step, hosted: LoopbackGitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study lies in a branch of its own; a run whose minutes are over says what is best so far."""
    models = {name: vocabularies.model(clone.root / "models" / name, seed) for seed, name in enumerate(("one", "two"))}
    text, texts = SEARCHED.format(**models), {"search.txt": TEXT, "report.txt": TEXT[::-1]}
    commit = clone.commit({"merges/mine.yaml": text, **texts})
    monkeypatch.setenv("GITHUB_SHA", commit)
    first = step("workflow_dispatch", {}, hosted.url, mode="search")
    assert (first.code, first.outputs["state"]) == (0, "searched"), first.log
    ((branch, begun),) = hosted.branches.items()
    assert (begun, branch[:12]) == (commit, "search/mine-")
    assert [(pull["head"], pull["base"]) for pull in hosted.pulls] == [(branch, "main")]
    found = hosted.files["merges/mine.best.yaml"].decode()
    assert "search:" not in found
    assert hosted.files["merges/mine.search/trials.csv"].count(b"\n") == 3
    assert "| `models[one].weight` | `0 to 1` |" in first.summary
    assert f"/org/recipes/raw/{branch}/merges/mine.search/pictures/search-progress.png)" in first.summary

    def forget() -> None:
        shutil.rmtree(clone.root / "merges" / "mine.search")
        (clone.root / "merges" / "mine.best.yaml").unlink()

    forget()
    clone.commit({"merges/mine.yaml": text.replace("trials: 2", "trials: 4")})
    with monkeypatch.context() as patch:
        patch.setattr(search, "Effort", lambda minutes, join: Effort(minutes=0.0, join=join))
        stopped = step("workflow_dispatch", {}, hosted.url, mode="search")
    assert (stopped.code, stopped.outputs["state"]) == (0, "stopped"), stopped.log
    assert "the minutes are over" in stopped.summary
    forget()
    ended = step("workflow_dispatch", {}, hosted.url, mode="search", to="./out")
    assert (ended.code, ended.outputs["state"]) == (0, "published"), ended.log
    assert hosted.files["merges/mine.search/trials.csv"].count(b"\n") == 5
    assert hosted.files["merges/mine.search/trials.csv"].startswith(
        b"\n".join((first.summary.split("```csv\n")[1]).encode().split(b"\n")[:3])
    )
    assert "found by 4 trials" in (clone.root / "out" / "README.md").read_text()
    assert len(hosted.pulls) == 1


def test_what_is_not_searched_by_the_action(clone: Checkout, step: Step, hosted: LoopbackGitHub) -> None:
    """A recipe that leaves numbers open is planned in mode auto; parts of a search share a database."""
    models = {name: vocabularies.model(clone.root / "models" / name, seed) for seed, name in enumerate(("one", "two"))}
    text = SEARCHED.format(**models)
    after = clone.commit({"merges/mine.yaml": text, "search.txt": TEXT, "report.txt": TEXT[::-1]})
    assert step("push", push(NOTHING, after)).outputs["state"] == "planned"
    assert "numbers" in step("push", push(NOTHING, after), mode="run", to="./out").log
    parts = step("push", push(NOTHING, after), hosted.url, mode="search", part="2/2")
    assert (parts.code, "input part: no other job sees" in parts.log) == (2, True), parts.log
    clone.commit({"merges/mine.yaml": text.replace("loss: ./search.txt", "function: mine:score")})
    told = step("push", push(NOTHING, after), hosted.url, mode="search")
    assert (told.code, "functions are run for one's own recipes alone" in told.log) == (2, True), told.log
    shared = text.replace("trials: 2,", f"trials: 2, storage: 'sqlite:///{clone.root}/study.db',")
    clone.commit({"merges/mine.yaml": shared})
    joined = step("push", push(NOTHING, after), hosted.url, mode="search", part="2/2")
    assert (joined.code, joined.outputs["state"]) == (0, "part"), joined.log
    led = step("push", push(NOTHING, after), hosted.url, mode="search", part="1/2")
    assert (led.code, led.outputs["state"]) == (0, "searched"), led.log
    assert "found by 2 trials" in led.summary


def test_one_destination_is_not_for_several_recipes(clone: Checkout, step: Step, recipe: str) -> None:
    """The second would replace the first."""
    after = clone.commit({"merges/a.yaml": recipe, "merges/b.yaml": recipe})
    told = step("push", push(NOTHING, after), to="./out")
    assert (told.code, told.outputs) == (2, {"state": "failed"})
    assert "several recipes: merges/a.yaml, merges/b.yaml" in told.log


def test_what_is_wrong_is_said_at_its_lines_and_keeps_no_other_waiting(
    clone: Checkout, step: Step, recipe: str
) -> None:
    """All problems of a recipe are annotations; the other recipe is planned; the step fails as the command does."""
    after = clone.commit({"deep/merges/a.yaml": WRONG, "deep/merges/b.yaml": recipe})
    told = step("push", push(NOTHING, after), mode="plan", working_directory="deep")
    assert told.code == 2
    errors = [line for line in told.commands if line.startswith("::error ")]
    assert [line.split("::")[1].split(",title")[0] for line in errors] == [
        "error file=deep/merges/a.yaml,line=3,col=5",
        "error file=deep/merges/a.yaml,line=5,col=26",
    ]
    assert "unknown key 'modl'%0A    did you mean 'model'?" in errors[0]
    assert told.outputs["state"] == "planned", "that of the last recipe"
    assert "### `deep/merges/a.yaml`: failed" in told.summary
    assert "### `deep/merges/b.yaml`: planned" in told.summary


def test_all_that_is_wrong_with_the_inputs_is_said_at_once(step: Step) -> None:
    """With the names that the workflow gave them."""
    given = {"mode": "pln", "max_memory": "much", "gguf": "Q4_K", "part": "3/2", "time_limit": "0", "force": "maybe"}
    told = step("push", {}, working_directory="../x", **given)
    assert (told.code, told.outputs) == (2, {"state": "failed"})
    wrong = [line.split("::input ")[1].split(":")[0] for line in told.commands if line.startswith("::error")]
    assert wrong == ["mode", "working-directory", "max-memory", "gguf", "force", "part", "time-limit"]


def test_a_push_that_changes_no_recipe_says_so(clone: Checkout, step: Step) -> None:
    """And is no failure."""
    before = clone.commit({"merges/a.yaml": WRONG})
    told = step("push", push(before, clone.commit({"other": "change"})))
    assert (told.code, told.outputs["state"], told.outputs["matrix"]) == (0, "none", "[]")
    assert any("no recipe was added or changed" in line for line in told.commands)


def test_publishing_without_any_token_is_refused_before_a_model_is_looked_at(
    clone: Checkout, step: Step, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both ways to give one."""
    for name in ("HF_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL"):
        monkeypatch.delenv(name, raising=False)
    after = clone.commit({"merges/a.yaml": recipe})
    told = step("push", push(NOTHING, after), to="hf://org/out")
    assert told.code == 6
    assert "no token to publish hf://org/out with%0A    give hf-token, or let the job" in told.log


def test_a_run_that_nears_the_time_limit_stops_after_a_file_and_goes_on_when_run_again(
    clone: Checkout, step: Step, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails with a code of its own, since there is no model yet; the next run makes only what is missing."""
    after = clone.commit({"merges/mine.yaml": recipe})
    given = {"to": "./out", "shard_size": "2kB"}
    with monkeypatch.context() as patch:
        patch.setattr(line.Watch, "__init__", _hurried(line.Watch.__init__))
        stopped = step("push", push(NOTHING, after), time_limit="1", **given)
    assert (stopped.code, stopped.outputs["state"], stopped.outputs["repo-url"]) == (75, "stopped", "")
    assert any(line.startswith("::warning") and "run the job again" in line for line in stopped.commands)
    assert not (clone.root / "out").exists()
    again = step("push", push(NOTHING, after), time_limit="60", **given)
    assert (again.code, again.outputs["state"]) == (0, "published")
    files = len(list((clone.root / "out").glob("*.safetensors")))
    assert (stopped.log.count("made model-"), again.log.count("made model-")) == (1, files - 1)
    assert f"1 of {files} files are there from an earlier run" in again.log


def _hurried(real: Callable[..., None]) -> Callable[..., None]:
    """A watch that has no time for a second file."""

    def begin(self: line.Watch, deadline: float | None) -> None:
        assert deadline is not None
        assert 0 < deadline - time.monotonic() <= 60
        real(self, time.monotonic() + 1e-3)

    return begin


def test_a_watch_leaves_time_for_the_last_file_and_lets_a_run_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """After files of 10 and 20 seconds it wants 40 more, once a third is begun; what is late already stops at once."""
    now = [0.0]
    monkeypatch.setattr(line.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(line.text, "file_done", lambda event: event == "file")

    def is_up(watch: line.Watch, event: Any) -> bool:
        try:
            watch.look(event)
        except line.TimeIsUpError:
            return True
        return False

    def told(deadline: float | None, *events: tuple[object, float]) -> list[bool]:
        now[0] = 0.0
        watch, found = line.Watch(deadline), []
        for event, now[0] in events:
            found.append(is_up(watch, event))
        return found

    files: list[tuple[object, float]] = [("bytes", 5), ("file", 10), ("bytes", 15), ("file", 30)]
    assert told(70, *files, ("bytes", 31)) == [False] * 5
    assert told(69, *files, ("bytes", 31)) == [False] * 4 + [True]
    assert told(29, *files[:3]) == [False, False, True]
    assert told(-1, (line.Ready(), 0), (line.Resumed(1, 2), 1), ("bytes", 2)) == [False, False, True]
    assert told(None, *files, ("bytes", 10**6)) == [False] * 5


def test_parts_make_the_model_of_a_single_run(clone: Checkout, step: Step, recipe: str) -> None:
    """Each makes its share, mode publish the whole of them, byte for byte; before that there is no model."""
    event = push(NOTHING, clone.commit({"merges/mine.yaml": recipe}))
    given = {"to": "./out", "shard_size": "2kB"}
    early = step("push", event, mode="publish", **given)
    assert (early.code, early.outputs["state"]) == (6, "failed")
    for part in ("1/2", "2/2"):
        told = step("push", event, mode="run", part=part, **given)
        assert (told.code, told.outputs["state"], told.outputs["commit"]) == (0, "part", ""), told.log
        assert f"Part {part} is made" in told.summary
    assert not (clone.root / "out").exists()
    last = step("push", event, mode="publish", **given)
    assert (last.code, last.outputs["state"]) == (0, "published"), last.log
    assert "made model-" not in last.log
    assert step("push", event, mode="run", **(given | {"to": "./whole"})).code == 0
    found = {path.name: path.read_bytes() for path in (clone.root / "out").glob("*.safetensors")}
    assert found == {path.name: path.read_bytes() for path in (clone.root / "whole").glob("*.safetensors")}
    assert len(found) > 2


# Comments


def comments(hosted: LoopbackGitHub) -> list[str]:
    return [str(comment["body"]) for comment in hosted.comments.get(7, [])]


def test_a_pull_requests_plan_is_one_comment_kept_up_to_date(
    clone: Checkout, step: Step, recipe: str, hosted: LoopbackGitHub
) -> None:
    """Found again among those of others, on a later page too; a mended recipe's error goes, the comment stays."""
    base = clone.commit({})
    hosted.comments[7], hosted.page = [{"id": number, "body": f"comment {number}"} for number in (1, 2, 3)], 2
    head = clone.commit({"merges/mine.yaml": WRONG})
    first = step("pull_request", pull_request(base, head), hosted.url)
    assert first.code == 2
    assert len(comments(hosted)) == 4
    assert "unknown key 'modl'" in comments(hosted)[-1]
    head = clone.commit({"merges/mine.yaml": recipe})
    second = step("pull_request", pull_request(base, head), hosted.url)
    assert (second.code, second.outputs["state"]) == (0, "planned")
    assert comments(hosted)[:3] == ["comment 1", "comment 2", "comment 3"]
    (body,) = comments(hosted)[3:]
    assert body.startswith("<!-- merger ")
    assert "unknown key" not in body
    for word in (
        "| `one` | local folder | not stated |",
        "`linear` (21 tensors)",
        "| memory |",
        "| time | about 1 min",
        "have no ancestor in common: their mean is neither of them",
        ", 2 warnings.",
    ):
        assert word in body
    head = clone.commit({"merges/mine.yaml": None})
    assert step("pull_request", pull_request(base, head), hosted.url).code == 0
    assert "changes no recipe any more" in comments(hosted)[3]
    assert len(comments(hosted)) == 4


CHANGES_OF_PLANS = {
    "a weight": ("weight: 0.5", "weight: [1, 0.25]", ["| `weight` of `one` | 0.5 | 1 to 0.25 |"]),
    "a method": ("linear", "slerp", ["| method | `linear` (21 tensors) | "]),
    "words": ("merge_method", "# a word\nmerge_method", ["**Changed:** nothing of what is made."]),
    "the seed": ("merge_method", "seed: 3\nmerge_method", ["**Changed:** the seed of what is made."]),
}


@pytest.mark.parametrize("name", [*CHANGES_OF_PLANS, "new", "wrong before", "asked of GitHub"])
def test_a_comment_says_first_what_a_recipe_comes_to_and_what_changed(
    name: str, clone: Checkout, step: Step, recipe: str, hosted: LoopbackGitHub
) -> None:
    """One line for the recipe, then the rows of the plan that are others than on main; the rest is folded."""
    old, new, said = CHANGES_OF_PLANS.get(name, ("", "", []))
    if name == "new":
        base, said = clone.commit({}), ["**New:** there is no such recipe yet."]
    elif name == "wrong before":
        base, said = clone.commit({"merges/mine.yaml": WRONG}), ["cannot be planned", "unknown key 'modl'"]
    else:
        base = clone.commit({"merges/mine.yaml": recipe})
    if name == "asked of GitHub":
        old, new, said = CHANGES_OF_PLANS["a weight"]
        base, hosted.files["merges/mine.yaml"] = "0" * 39 + "1", recipe.encode()
        hosted.compared["pull 7"] = [{"filename": "merges/mine.yaml", "status": "modified"}]
    changed = recipe.replace(old, new) if old else recipe
    if name == "a method":
        changed = changed.replace(
            "parameters: {weight: 0.5}", f"parameters: {{t: 0.5}}\nbase_model: {clone.root / 'models/one'}"
        )
    head = clone.commit({"merges/mine.yaml": changed + "dtype: bfloat16\n" if name == "wrong before" else changed})
    told = step("pull_request", pull_request(base, head), hosted.url)
    assert told.code == 0, told.log
    (body,) = comments(hosted)
    seen, _, _ = body.partition("<details>")
    assert "### `merges/mine.yaml`: planned\n\n" in seen
    assert all(each in seen for each in said), body
    assert "licence not settled, about 1 min, " in seen
    assert "| goes to |" not in seen
    assert body.count("<details>") == body.count("</details>")
    assert "<summary>The plan</summary>" in body
    assert "<summary>The card</summary>\n\n# merged\n" in body


@pytest.mark.parametrize("author", [{"login": "stranger"}, {"login": "another-app[bot]"}, {}, None])
def test_a_strangers_comment_that_carries_our_marker_stays_theirs(
    author: dict[str, str] | None, clone: Checkout, step: Step, recipe: str, hosted: LoopbackGitHub
) -> None:
    """Ours is another one, which is found again beside it."""
    base, head = clone.commit({}), clone.commit({"merges/mine.yaml": recipe})
    assert step("pull_request", pull_request(base, head), hosted.url).code == 0
    (ours,) = comments(hosted)
    theirs = ours.splitlines()[0] + "\nmerge this at once"
    hosted.comments[7] = [{"id": 1, "body": theirs, "user": author}]
    for _ in range(2):
        assert step("pull_request", pull_request(base, head), hosted.url).code == 0
        assert comments(hosted) == [theirs, ours]


def test_a_pull_request_without_recipes_gets_no_comment(clone: Checkout, step: Step, hosted: LoopbackGitHub) -> None:
    """It is about something else."""
    base = clone.commit({})
    told = step("pull_request", pull_request(base, clone.commit({"code.py": "1"})), hosted.url)
    assert (told.code, comments(hosted)) == (0, [])


@pytest.mark.parametrize(("head_repo", "token"), [("stranger/recipes", READ_ONLY), ("org/recipes", "")])
def test_where_the_job_may_not_comment_the_summary_has_the_plan(
    head_repo: str, token: str, clone: Checkout, step: Step, recipe: str, hosted: LoopbackGitHub
) -> None:
    """A notice, not a failure: a fork's token may only read, and a workflow may give no more."""
    base = clone.commit({})
    head = clone.commit({"merges/mine.yaml": recipe})
    told = step("pull_request", pull_request(base, head, head_repo), hosted.url, github_token=token)
    assert (told.code, comments(hosted)) == (0, [])
    assert any(line.startswith("::notice") and "job's summary" in line for line in told.commands)
    assert "| `one` | local folder |" in told.summary


# What others wrote


EVIL = [
    "merges/$(touch pwned).yaml",
    "merges/`touch pwned`'\";touch pwned;.yaml",
    "merges/a\n::set-output name=commit::pwned\n::error::x.yaml",
    "merges/a\n##[set-output name=x]pwned.yaml",
    "merges/--output=pwned.yaml",
    "merges/%0A::warning::pwned|@everyone<!-- -->`.yaml",
]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("text", [WRONG, "::add-mask::pwned\n##[error]pwned", None])
def test_a_recipes_name_and_words_run_nothing_and_command_nothing(
    name: str, text: str | None, clone: Checkout, step: Step, recipe: str, hosted: LoopbackGitHub
) -> None:
    """Neither the shell's, nor the log's, nor those of outputs, Markdown and mentions."""
    base = clone.commit({})
    head = clone.commit({name: text or recipe})
    told = step("pull_request", pull_request(base, head, number=7), hosted.url)
    assert told.code == (0 if text is None else 2), told.log
    assert not list(clone.root.rglob("pwned"))
    assert not Path("pwned").exists()
    allowed = ("::add-mask::ghs_", "::group::", "::endgroup::", "::error file=merges/", "::stop-commands::")
    assert [line for line in told.commands if not line.startswith(allowed)] == []
    assert set(told.outputs) == {"state", "repo-url", "repo-id", "commit", "plan-hash", "matrix", "report"}
    assert told.outputs["commit"] == ""
    (body,) = comments(hosted)
    titles = [line for line in body.splitlines() if line.startswith("### ")]
    assert titles == [f"### {markdown.code(name)}: {told.outputs['state']}"]


@pytest.mark.parametrize("text", [WRONG, json.dumps({HOSTILE: HOSTILE, "models": [HOSTILE]}), None])
def test_what_strangers_write_is_shown_and_obeyed_by_nobody(
    text: str | None, clone: Checkout, step: Step, recipe: str, hosted: LoopbackGitHub
) -> None:
    """In the name of a recipe's file and in it: log, summary and comment hold no sign that is not one of ours."""
    base = clone.commit({})
    head = clone.commit({f"merges/{HOSTILE}.yaml": text or recipe})
    told = step("pull_request", pull_request(base, head, number=7), hosted.url)
    (body,) = comments(hosted)
    ours = [line for line in told.log.splitlines() if line.startswith("::")]  # Log's: see above
    rest = "\n".join(line for line in told.log.splitlines() if not line.startswith("::"))
    assert obeyed(rest) == []
    assert r"\x1b" in "".join(ours)
    assert obeyed("".join(ours).replace("::", "").replace("##[", "")) == []
    for shown in (told.summary, body):
        assert r"\x1b" in shown
        assert obeyed(shown.replace("##[", "")) == []  # they are no logs


@pytest.mark.parametrize(
    ("ref", "given"),
    [
        ("refs/heads/$(touch pwned)", {"to": "$(touch pwned)"}),
        ("refs/heads/x';touch pwned;'", {"to": "hf://../../pwned"}),
        ("refs/heads/x", {"to": "hf://org/a\n::set-output name=commit::pwned"}),
        ("refs/heads/x", {"recipe": "merges/a.yaml\n$(touch pwned)\n`touch pwned`\n--help"}),
        ("refs/heads/x", {"recipe": "$(touch pwned)" * 500}),
        ("refs/heads/x", {"mode": "run\n::error::pwned"}),
        ("refs/heads/x", {"max_memory": "1GB; touch pwned"}),
        ("refs/heads/x", {"working_directory": "../../$(touch pwned)"}),
    ],
)
def test_an_input_or_a_branch_is_a_word_and_nothing_more(
    ref: str, given: dict[str, str], clone: Checkout, step: Step, recipe: str
) -> None:
    """Whatever it says is refused in a sentence, or is a name."""
    after = clone.commit({"merges/a.yaml": recipe})
    told = step("push", push(NOTHING, after, ref=ref), **({"mode": "plan"} | given))
    assert not list(clone.root.rglob("pwned"))
    assert not [line for line in told.commands if line.startswith(("::set-output", "::error::pwned"))]
    assert told.outputs.get("commit", "") == ""
    assert "Traceback" not in told.log


def test_tokens_are_masked_and_stand_nowhere_else(
    clone: Checkout, step: Step, recipe: str, hosted: LoopbackGitHub
) -> None:
    """Not in log, summary, outputs, comment or report."""
    base = clone.commit({})
    head = clone.commit({"merges/mine.yaml": recipe})
    tokens = {"hf_token": "hf_secret_writer", "hf_read_token": "hf_secret_reader", "github_token": TOKEN}
    told = step("pull_request", pull_request(base, head), hosted.url, **tokens)
    assert [line for line in told.commands if "add-mask" in line] == [f"::add-mask::{each}" for each in tokens.values()]
    unmasked = [line for line in told.log.splitlines() if not line.startswith("::add-mask::")]
    texts = [*unmasked, told.summary, *told.outputs.values(), *comments(hosted)]
    texts.append(Path(told.outputs["report"]).read_text())
    assert not [text for text in texts for token in tokens.values() if token in text]


LEAKY: dict[str, Callable[[str, str], tuple[dict[str, str | None], str]]] = {
    "a comment of the recipe": lambda recipe, token: ({"merges/a.yaml": f"# {token}\n{recipe}"}, "merges/a.yaml"),
    "an unknown key": lambda recipe, token: ({"merges/a.yaml": f"{token}: 1\n{recipe}"}, "merges/a.yaml"),
    "a model's name": lambda recipe, token: (
        {"merges/a.yaml": recipe.replace("parameters", f"  - model: ./{token}\nparameters")}, "merges/a.yaml"),
    "the recipe's name": lambda recipe, token: ({f"merges/{token}.yaml": recipe}, f"merges/{token}.yaml"),
    "a licence": lambda recipe, token: (
        {"merges/a.yaml": f"{recipe}publish: {{license: '{token}'}}\n"}, "merges/a.yaml"),
    "a template": lambda recipe, token: (
        {"merges/a.yaml": f"{recipe}publish: {{template: own.md}}\n", "own.md": f"see {token}"}, "merges/a.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("event", ["push", "pull_request"])
@pytest.mark.parametrize("way", LEAKY)
@pytest.mark.parametrize("whose", ["hf_token", "hf_read_token", "github_token"])
def test_a_token_in_what_a_job_reads_goes_nowhere(
    whose: str, way: str, event: str, clone: Checkout, step: Step, recipe: str, hosted: LoopbackGitHub
) -> None:
    """Not into log, summary, outputs, report, comment, or the result: what would hold it is refused, or dropped."""
    token = TOKEN if whose == "github_token" else "hf_secret_of_the_job"
    base = clone.commit({})
    files, name = LEAKY[way](recipe, token)
    head = clone.commit(files)
    payload = push(base, head) if event == "push" else pull_request(base, head)
    told = step(event, payload, hosted.url, **{whose: token, "recipe": name.replace(token, "*"), "to": "./out"})
    if event == "push" or way not in ("a comment of the recipe", "a template"):  # a plan does not show these
        assert (told.code, told.outputs["state"]) == (6, "failed"), told.log
    shown = [line for line in told.log.splitlines() if not line.startswith("::add-mask::")]
    report = Path(told.outputs["report"]).read_text() if told.outputs.get("report") else ""
    made = [path.read_bytes().decode("utf-8", "replace") for path in clone.root.glob("out/*")]
    texts = [*shown, told.summary, *told.outputs.values(), *comments(hosted), report, *made]
    assert [text for text in texts if token in text] == []


def test_a_long_text_is_cut_at_a_line_and_says_so() -> None:
    """GitHub refuses longer ones."""
    assert github.cut_at_line("one\ntwo\nthree", 8) == "one\ntwo\n\n(the rest is in the job's log)"
    assert github.cut_at_line("one\ntwo", 7) == "one\ntwo"


WORDS = {
    "a model outside": ("./models/one", "../elsewhere", 3),
    "a model by a link": ("./models/one", "./outward", 3),
    "the environment as a template": ("parameters:", "publish: {template: /proc/self/environ}\nparameters:", 2),
    "a template by a link": ("parameters:", "publish: {template: ./outward/secret.md}\nparameters:", 2),
    "a text outside": ("parameters:", "evaluate: {perplexity: {text: ../elsewhere/secret.md}}\nparameters:", 2),
    "a task outside": ("parameters:", "evaluate: {tasks: [/etc/task.yaml]}\nparameters:", 2),
}


@pytest.mark.parametrize("kind", WORDS)
def test_a_recipe_names_nothing_of_the_runner_but_the_repository(
    kind: str, clone: Checkout, step: Step, parents: dict[str, Path]
) -> None:
    """After all links; the refusal stands at its line and tells nothing of what is there."""
    tiny.model(clone.root.parent / "elsewhere", 3)
    (clone.root.parent / "elsewhere/secret.md").write_text("not-a-real-secret")
    (clone.root / "outward").symlink_to("../elsewhere")
    old, new, code = WORDS[kind]
    text = LINEAR.format(one="./models/one", two="./models/two").replace(old, new)
    after = clone.commit({"merges/mine.yaml": text})
    done = step("push", push(NOTHING, after), mode="plan")
    assert done.code == code, done.log
    assert "is outside of clone, and its recipes name nothing else of the machine" in done.log
    assert "not-a-real-secret" not in done.log + done.summary
    assert any(line.startswith("::error file=merges/mine.yaml,line=") for line in done.commands)


def test_a_matrix_has_as_many_parts_as_bytes_ask_for_but_no_more_than_files(
    clone: Checkout, step: Step, recipe: str
) -> None:
    """For the jobs of a big merge."""
    after = clone.commit({"merges/mine.yaml": recipe})
    event = push(NOTHING, after)
    whole = step("push", event, mode="plan").outputs["matrix"]
    three = step("push", event, mode="plan", shard_size="2kB", part_size="13kB").outputs["matrix"]
    many = step("push", event, mode="plan", shard_size="6kB", part_size="1kB").outputs["matrix"]
    assert (whole, three, many) == ('["1/1"]', '["1/3", "2/3", "3/3"]', '["1/2", "2/2"]')
