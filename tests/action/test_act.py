"""action.yml in the real runner program, act, without Docker: against a loopback Hub and a loopback GitHub.

What needs no runner is tested in test_action. The actions that set up Python and keep wheels are not fetched here: the
input `install: false` takes the Python that is there, and stand-ins answer to their names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import vocabularies
import yaml
from actions import NOTHING, Checkout, environment, pull_request, push
from calls import WRITER
from loopback import LoopbackGitHub, LoopbackHub
from loopback.github import IDENTITY, READ_ONLY, TOKEN
from places import REPOSITORY, ROOT
from thorough import thorough_only
from waiting import HANGS_SECONDS
from watching import Watch, watching

ACT = shutil.which("act", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
pytestmark = pytest.mark.skipif(ACT is None, reason="act is not there: it comes with the test group on Linux, x86_64")

RECIPE = """\
merge_method: linear
models:
  - model: org/one
  - model: org/two
parameters: {weight: 0.5}
publish: {repo: org/merged, license: apache-2.0}
"""
SEARCHED = """\
merge_method: linear
models:
  - {model: org/first, parameters: {weight: {search: [0, 1]}}}
  - {model: org/second, parameters: {weight: 0.5}}
dtype: float32
publish: {license: apache-2.0}
search: {trials: 2, objectives: [{loss: ./search.txt}], report: [{loss: ./report.txt}]}
"""
RUNNERS = ("act", "bash", "dash", "sh")
"""What starts our step holds its inputs: that is GitHub's runner and its shell, and nothing of ours."""

WRONG = RECIPE.replace("  - model: org/two", "  - modl: org/two")
WORKFLOW = """\
on: [push, pull_request]
jobs:
  merge:
    runs-on: ubuntu-latest
    permissions: {contents: write, pull-requests: write, id-token: write}
    steps:
      - uses: actions/checkout@v6
      - uses: org/merger@v1
        id: merge
        with:
          install: "false"
          hf-token: ${{ secrets.HF_TOKEN }}
          recipe: ${{ vars.RECIPE || 'merges/*.yaml' }}
          commit-lock: ${{ vars.LOCK || 'false' }}
      - if: always()
        shell: bash
        env: {TOLD: "${{ toJSON(steps.merge.outputs) }}", TO: "${{ vars.TOLD }}"}
        run: echo "$TOLD" > "$TO"
"""
PYTHON = """\
#!/bin/sh
# The Python that is there, and afterwards a copy of the step's summary, which no later step can see.
"{python}" "$@"
code=$?
cp "$GITHUB_STEP_SUMMARY" "{summary}"
exit $code
"""


@dataclass(frozen=True)
class Ran:
    """A workflow that has ended."""

    code: int
    log: str
    outputs: dict[str, str]
    summary: str
    watch: Watch


Runner = Callable[..., Ran]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with two models, and a user who may write beside them."""
    root = tmp_path_factory.mktemp("parents")
    with LoopbackHub() as hub:
        hub.add_user("alice", token=WRITER, orgs=("org",))
        tiny.models(root, "one", "two", hub=hub)
        yield hub


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What GitHub would have of this repository: act reads all that lies in the folder into memory, .venv as well."""
    place = tmp_path_factory.mktemp("repository")
    line = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    return place


@pytest.fixture
def clone(tmp_path: Path) -> Checkout:
    """A repository with the workflow, and with files called like modules that the Action imports."""
    made = Checkout(tmp_path / "clone")
    trap = f"open({str(tmp_path / 'trapped')!r}, 'w')"
    made.commit({".github/workflows/merge.yaml": WORKFLOW, "yaml.py": trap, "merger/__init__.py": trap})
    made.git("remote", "add", "origin", "https://github.com/org/recipes")
    return made


@pytest.fixture
def runner(clone: Checkout, served: LoopbackHub, github: LoopbackGitHub, repository: Path, tmp_path: Path) -> Runner:
    """Run the workflow for an event: `runner("push", payload, env={...}, secrets={...})`."""
    stand_in = tmp_path / "stand-in"
    stand_in.mkdir()
    python, summary = stand_in / "python", tmp_path / "summary"
    python.write_text(PYTHON.format(python=sys.executable, summary=summary))
    python.chmod(0o755)
    nothing = {"using": "composite", "steps": [{"run": "true", "shell": "bash"}]}
    (stand_in / "action.yml").write_text(yaml.safe_dump({"name": "stand-in", "runs": nothing}))

    def run(
        event: str,
        payload: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        hf_token: str = "",
        token: str = TOKEN,
        variables: Mapping[str, str] | None = None,
    ) -> Ran:
        told = tmp_path / "told"
        (tmp_path / "event.json").write_text(json.dumps(payload))
        line = [str(ACT), event, "-P", "ubuntu-latest=-self-hosted", "--no-cache-server", "--action-offline-mode"]
        line += ["--eventpath", str(tmp_path / "event.json"), "--concurrent-jobs", "2"]
        for owner in ("org", REPOSITORY.split("/")[0]):
            line += ["--local-repository", f"{owner}/merger@v1={repository}"]
        for used in others():
            line += ["--local-repository", f"{used}={stand_in}"]
        for name, value in {"HF_TOKEN": hf_token, "GITHUB_TOKEN": token}.items():
            line += ["-s", f"{name}={value}"]
        for name, value in {"TOLD": str(told), **(variables or {})}.items():
            line += ["--var", f"{name}={value}"]
        settings = {
            **served.env(tmp_path / "home"),
            "GITHUB_API_URL": github.url,
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **(env or {}),
        }
        settings.pop("HF_TOKEN")
        for name, value in settings.items():
            line += ["--env", f"{name}={value}"]
        path = os.pathsep.join([str(stand_in), os.environ["PATH"]])
        outside = {"PATH": path, "HOME": str(tmp_path / "home"), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        with watching(served, tmp_path, *RUNNERS) as watch:
            done = subprocess.run(
                line, cwd=clone.root, env=outside, capture_output=True, text=True, timeout=HANGS_SECONDS, check=False
            )
        outputs = json.loads(told.read_text()) if told.exists() else {}
        words = summary.read_text() if summary.exists() else ""
        ran = Ran(done.returncode, done.stdout + done.stderr, outputs, words, watch)
        assert leaking(ran, github, tmp_path, [hf_token, token, IDENTITY, "hf_jwt_"]) == []
        return ran

    return run


def leaking(ran: Ran, github: LoopbackGitHub, folder: Path, tokens: list[str]) -> list[object]:
    """Where one of these tokens can be read after a workflow: by other processes, in its log, in what it has left."""
    texts: dict[object, str] = {"the log": ran.log, "the summary": ran.summary, "the outputs": str(ran.outputs)}
    texts |= {"GitHub's comments": str(github.comments), "GitHub's files": str(github.files)}
    acts = folder / "home" / ".cache" / "act"  # the runner's own, with a copy of these tests
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(acts)]
    texts |= {path: path.read_bytes().decode("utf-8", "replace") for path in files}
    found: list[object] = [where for where, text in texts.items() if any(each in text for each in tokens if each)]
    return found + list(ran.watch.holders(*tokens))


def others() -> list[str]:
    """The actions of others that action.yml uses."""
    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    return [step["uses"] for step in steps if "uses" in step]


def merges(hub: LoopbackHub, repo: str) -> list[str]:
    """The titles of the commits on main that merges made."""
    return [commit.title for commit in hub.commits(repo) if commit.title.startswith("Merge of")]


def test_a_push_publishes_in_one_commit_and_the_job_run_again_nothing_new(
    clone: Checkout, served: LoopbackHub, github: LoopbackGitHub, runner: Runner, tmp_path: Path
) -> None:
    """Both say where the model is; the lock file is committed beside the recipe, and a later run goes by it."""
    after = clone.commit({"merges/mine.yaml": RECIPE})
    event = push(NOTHING, after)
    ran = runner("push", event, hf_token=WRITER, variables={"LOCK": "true"})
    assert ran.code == 0, ran.log
    assert ran.outputs["state"] == "published"
    assert merges(served, "org/merged") == [f"Merge of org/one, org/two [{ran.outputs['plan-hash'][:16]}]"]
    head = served.head("org/merged")
    assert (ran.outputs["commit"], ran.outputs["repo-id"]) == (head, "org/merged")
    assert ran.outputs["repo-url"] == f"{served.url}/org/merged"
    assert f"Published: {served.url}/org/merged at commit `{head}`" in ran.summary
    assert any(b"merger.action.step" in process.line for process in ran.watch.seen)
    assert not (tmp_path / "trapped").exists(), "a file of the repository was imported"

    lock = github.files["merges/mine.lock.yaml"].decode()
    assert served.head("org/one") in lock
    served.commit("org/one", {"README.md": b"moved on"})
    clone.commit({"merges/mine.lock.yaml": lock})
    again = runner("push", event, hf_token=WRITER)
    assert again.code == 0, again.log
    assert again.outputs == ran.outputs | {"state": "unchanged", "report": again.outputs["report"]}
    assert served.head("org/merged") == head
    assert f"already there: {served.url}/org/merged at commit `{head}`" in again.summary


def test_a_pull_request_gets_one_comment_that_is_kept_up_to_date(
    clone: Checkout, served: LoopbackHub, github: LoopbackGitHub, runner: Runner
) -> None:
    """With the models' commits; nothing is written to the Hub, and a mistake is an error at its line."""
    base = clone.commit({})
    head = clone.commit({"merges/mine.yaml": WRONG})
    wrong = runner("pull_request", pull_request(base, head))
    assert wrong.code == 1
    assert wrong.outputs["state"] == "failed"
    assert "::error file=merges/mine.yaml,line=4,col=5,title=Merger::" in wrong.log
    head = clone.commit({"merges/mine.yaml": RECIPE})
    served.clear_log()
    ran = runner("pull_request", pull_request(base, head))
    assert ran.code == 0, ran.log
    (comment,) = github.comments[7]
    for name in ("one", "two"):
        page, commit = f"{served.url}/org/{name}", served.head(f"org/{name}")
        assert f"| [`org/{name}`]({page}) | [`{commit[:12]}`]({page}/tree/{commit}) |" in comment["body"]
    assert "unknown key" not in comment["body"]
    assert not [request for request in served.log if request.method != "GET" and request.method != "HEAD"]


def test_a_forks_pull_request_is_planned_without_a_secret_and_its_names_run_nothing(
    clone: Checkout, github: LoopbackGitHub, runner: Runner, tmp_path: Path
) -> None:
    """The plan is in the job's summary; the names of its branch and of its recipe are only names."""
    base = clone.commit({})
    head = clone.commit({"merges/$(touch pwned)`touch pwned`'\";touch pwned.yaml": RECIPE})
    payload = pull_request(base, head, "stranger/recipes")
    payload["pull_request"]["head"]["ref"] = '$(touch pwned)`touch pwned`";touch pwned;"'
    ran = runner(
        "pull_request", payload, token=READ_ONLY, variables={"RECIPE": "merges/*.yaml\n$(touch pwned)\n';touch pwned;'"}
    )
    assert ran.code == 0, ran.log
    assert ran.outputs["state"] == "planned"
    assert "| [`org/one`](" in ran.summary
    assert github.comments == {}
    assert not list(tmp_path.rglob("pwned"))
    assert not (tmp_path / "trapped").exists()


@thorough_only
def test_a_matrix_of_parts_makes_the_model_of_a_single_job(
    clone: Checkout, served: LoopbackHub, runner: Runner, tmp_path: Path
) -> None:
    """The workflow of docs/action.md, word for word but for the sizes: planned, made in two jobs, published in one."""
    example = (ROOT / "examples" / "workflow-parts.yml").read_text()
    here = '          install: "false"\n          shard-size: 4kB\n          part-size: 20kB\n          recipe:'
    example = example.replace("          recipe:", here)
    recipe = RECIPE.replace("org/merged", "org/parts")
    clone.commit({".github/workflows/parts.yaml": example, "merges/big.yaml": recipe})
    ran = runner("workflow_dispatch", {"inputs": {"recipe": "merges/big.yaml"}}, hf_token=WRITER)
    assert ran.code == 0, ran.log
    assert all(f"part {number}/2 is there" in ran.log for number in (1, 2))
    assert len(merges(served, "org/parts")) == 1
    single = step(served, clone, tmp_path / "single", hf_token=WRITER, shard_size="4kB", to="hf://org/single")
    assert single.returncode == 0, single.stdout
    made, whole = (served.files(repo) for repo in ("org/parts", "org/single"))
    shards = {name for name in whole if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert {name: made.get(name) for name in shards} == {name: whole[name] for name in shards}
    assert made.keys() == whole.keys()


@thorough_only
def test_every_night_a_merge_is_made_again_if_a_parent_has_moved(
    clone: Checkout, served: LoopbackHub, github: LoopbackGitHub, runner: Runner, tmp_path: Path
) -> None:
    """The workflow of examples/, word for word: nothing is made while none has, and the lock file says which has."""
    example = (ROOT / "examples" / "workflow-nightly.yml").read_text()
    example = example.replace("          hf-token:", '          install: "false"\n          hf-token:')
    recipe = RECIPE.replace("org/merged", "org/nightly").replace("org/two", "org/moving")
    clone.commit({".github/workflows/merge.yaml": example, "merges/mine.yaml": recipe})
    served.add_model("org/moving", tiny.model(tmp_path / "moving", 5))
    for merged, moves in ((1, True), (1, False), (2, True)):
        ran = runner("schedule", {}, hf_token=WRITER)
        assert ran.code == 0, ran.log
        assert len(merges(served, "org/nightly")) == merged
        lock = github.files["merges/mine.lock.yaml"].decode()
        assert (served.head("org/moving") in lock, served.head("org/one") in lock) == (True, True)
        clone.commit({"merges/mine.lock.yaml": lock})
        if not moves:
            tensors = tiny.model(tmp_path / "moved", 6) / "model.safetensors"
            served.commit("org/moving", {"model.safetensors": tensors.read_bytes()})


@thorough_only
def test_a_search_on_demand_keeps_its_study_and_offers_what_it_found(
    clone: Checkout, served: LoopbackHub, github: LoopbackGitHub, runner: Runner, tmp_path: Path
) -> None:
    """The workflow of examples/, word for word; run again it goes on from the branch, and the winner is published."""
    example = (ROOT / "examples" / "workflow-search.yml").read_text()
    example = example.replace("          mode:", '          install: "false"\n          mode:')
    for seed, name in enumerate(("first", "second")):
        served.add_model(f"org/{name}", vocabularies.model(tmp_path / name, seed))
    text = "a b c d e f g h\n" * 40
    files = {".github/workflows/merge.yaml": example, "search.txt": text, "report.txt": text[::-1]}
    for trials, to in ((2, ""), (3, "hf://org/winner")):
        clone.commit({"merges/mine.yaml": SEARCHED.replace("trials: 2", f"trials: {trials}"), **files})
        given = {"inputs": {"recipe": "merges/mine.yaml", "to": to}}
        ran = runner("workflow_dispatch", given, hf_token=WRITER)
        assert ran.code == 0, ran.log
        assert github.files["merges/mine.search/trials.csv"].count(b"\n") == 1 + trials
    assert "3 trials, of which 2 are done" in ran.log
    assert "search:" not in github.files["merges/mine.best.yaml"].decode()
    assert len(github.pulls) == 1
    assert "found by 3 trials" in served.files("org/winner")["README.md"].decode()


def test_a_job_that_the_hub_trusts_publishes_without_a_secret(
    clone: Checkout, served: LoopbackHub, github: LoopbackGitHub, runner: Runner
) -> None:
    """It trades its identity for a token that is good for that repo alone and is masked; an unknown job gets none."""
    served.add_model("org/trusting", {"README.md": b"empty so far"})
    after = clone.commit({"merges/mine.yaml": RECIPE.replace("org/merged", "org/trusting")})
    identity = {"ACTIONS_ID_TOKEN_REQUEST_URL": f"{github.url}/identity", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": IDENTITY}
    stranger = runner("push", push(NOTHING, after), env=identity)
    assert stranger.code == 1
    assert "the Hub gives this job no token for org/trusting (HTTP 403)" in stranger.log
    assert len(served.commits("org/trusting")) == 1

    served.trust("org/trusting", github.repository)
    served.clear_log()
    ran = runner("push", push(NOTHING, after), env=identity)
    assert ran.code == 0, ran.log
    assert ran.outputs["commit"] == served.head("org/trusting")
    assert len(merges(served, "org/trusting")) == 1
    assert served.commits("org/trusting")[0].author == "publisher of org/trusting"
    assert any(b"merger.action.step" in process.line for process in ran.watch.seen)
    assert not [request for request in served.log if "/org/one" in request.path and request.authorization]


# The same program without the runner, for what takes time or tokens of several users

HURRIED = """
import sys, time
from merger.action import line, step

real = line.Watch.__init__
line.Watch.__init__ = lambda watch, deadline: real(watch, time.monotonic() + 1e-3)
sys.exit(step.main())
"""


def step(hub: LoopbackHub, clone: Checkout, place: Path, *line: str, **given: str) -> subprocess.CompletedProcess[str]:
    """The step of action.yml for a workflow_dispatch."""
    settings = environment(place, clone.root, "workflow_dispatch", {})
    inputs = {f"INPUT_{name.upper()}": text for name, text in ({"recipe": "merges/*.yaml"} | given).items()}
    settings |= {**hub.env(place / "home"), **inputs, "TMPDIR": str(place)}
    line = (sys.executable, "-P", *(line or ("-m", "merger.action.step")))
    return subprocess.run(
        line,
        cwd=clone.root,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=HANGS_SECONDS,
        check=False,
    )


def test_what_a_stopped_run_has_uploaded_is_kept_for_the_next(
    clone: Checkout, served: LoopbackHub, tmp_path: Path
) -> None:
    """The file under way to the Hub when it stops included; main is touched only by the run that ends it."""
    clone.commit({"merges/mine.yaml": RECIPE.replace("org/merged", "org/slow")})
    given = {"hf_token": WRITER, "shard_size": "4kB"}
    stopped = step(served, clone, tmp_path / "runner", "-c", HURRIED, **given)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    (branch,) = set(served.branches("org/slow")) - {"main"}
    assert len([name for name in served.files("org/slow", branch) if name.endswith(".safetensors")]) == 1
    assert merges(served, "org/slow") == []
    ended = step(served, clone, tmp_path / "runner", **given)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    files = len([name for name in served.files("org/slow") if name.endswith(".safetensors")])
    assert (stopped.stdout.count("made model-"), ended.stdout.count("made model-")) == (1, files - 1)
    assert len(merges(served, "org/slow")) == 1


def test_the_readers_token_reads_and_the_writers_writes(clone: Checkout, served: LoopbackHub, tmp_path: Path) -> None:
    """A model that only the reader may see is published by one who may not see it; without a reader it is missing."""
    served.add_user("bob", token="hf_reader_bob", role="read")
    served.add_model("bob/hidden", tiny.model(tmp_path / "hidden", 3), private=True)
    recipe = RECIPE.replace("org/two", "bob/hidden").replace("org/merged", "org/apart")
    clone.commit({"merges/mine.yaml": recipe})
    alone = step(served, clone, tmp_path / "runner", hf_token=WRITER, mode="plan")
    assert alone.returncode == 3
    assert (
        "::error file=merges/mine.yaml,line=4,col=12,title=Merger::models[bob/hidden]: there is no folder"
        in alone.stdout
    )
    served.clear_log()
    done = step(served, clone, tmp_path / "runner", hf_token=WRITER, hf_read_token="hf_reader_bob")
    assert done.returncode == 0, done.stdout + done.stderr
    reads = {request.user for request in served.log if "/bob/hidden" in request.path and request.host == "hub"}
    writes = {request.user for request in served.log if "/org/apart" in request.path and request.host == "hub"}
    assert (reads, writes) == ({"bob"}, {"alice"})
