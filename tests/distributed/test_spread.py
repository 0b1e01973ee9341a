"""Merges whose parts Hub jobs make: the requests as the real client sends them, and what the jobs do, run for real.

The jobs are processes of the loopback Hub; nothing here was ever asked of Hugging Face.
"""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import sys
from pathlib import Path

import forks
import pytest
import tiny
from calls import WRITER, Command
from loopback import LoopbackHub
from loopback.jobs import Job
from thorough import thorough_only
from waiting import HANGS_SECONDS, until

from merger.errors import ModelError, PartError, Problem, Span
from merger.runtime import install_command

SHARD = ("--shard-size", "4kB")
RECIPE = """\
# It's "quoted" $HOME `date` ünd so weiter
merge_method: linear
models:
  - model: org/one
    parameters: {weight: 0.6}
  - model: org/two
    parameters: {weight: 0.5}
publish: {license: apache-2.0}
"""


@pytest.fixture(scope="module")
def at(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose models are on the Hub."""
    root = tmp_path_factory.mktemp("spread")
    tiny.models(root, "one", "two", hub=served)
    (root / "mine.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def whole(at: Path, served: LoopbackHub, command: Command) -> dict[str, str]:
    """The files of a single run, by their sha256."""
    done = command("run", "mine.yaml", "--to", "whole", *SHARD, cwd=at, hub=served)
    assert done.returncode == 0, done.stderr
    return digests({item.name: item.read_bytes() for item in (at / "whole").iterdir() if item.is_file()})


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items() if name.endswith(".safetensors")}


def test_an_error_keeps_its_problems_from_process_to_process() -> None:
    """A refusal of another machine is told here as it was there, with its places and next steps."""
    import pickle

    problems = (Problem("a", Span("r.yaml", 3, 1), "here", "do this"), Problem("b"))
    again = pickle.loads(pickle.dumps(ModelError(problems)))
    assert (type(again), again.problems, str(again)) == (ModelError, problems, str(ModelError(problems)))


# Hub jobs


def started(hub: LoopbackHub, to: str) -> list[Job]:
    """The jobs that were to make this repo."""
    return [job for job in hub.jobs.all.values() if f"--to=hf://{to}" in job.asked["command"]]


def part_of(job: Job) -> str:
    return next(word.removeprefix("--part=") for word in job.asked["command"] if word.startswith("--part="))


def is_as_asked(job: Job, part: str, to: str) -> None:
    """Image, command, hardware, time and token stand where they belong, and nothing else does."""
    asked = dict(job.asked)
    assert asked.pop("labels")["name"].endswith(f"-part-{part.replace('/', '-of-')}")
    shell, flag, script, *arguments = asked.pop("command")
    environment = asked.pop("environment")
    assert asked == {
        "arguments": [], "dockerImage": "python:3.12-slim", "flavor": "cpu-upgrade", "timeoutSeconds": 5400,
        "secrets": {"HF_TOKEN": WRITER},
    }  # fmt: skip
    assert (shell, flag) == ("sh", "-c")
    assert 'pip install --quiet --root-user-action=ignore "$MERGER_PACKAGE"' in script
    options = [f"--to=hf://{to}", f"--part={part}", "--seed=-5", "--shard-size=4000", "--device=cpu"]
    assert arguments == ["merger", *options]
    assert base64.b64decode(environment.pop("MERGER_RECIPE")).decode() == RECIPE
    assert environment.keys() == {"HF_ENDPOINT", "MERGER_PACKAGE"}


@thorough_only
def test_hub_jobs_make_the_model_of_a_single_run(
    at: Path, whole: dict[str, str], command: Command, hub: LoopbackHub
) -> None:
    """One fails and is named with its page; the same command starts only that one, and publishes in one commit."""
    line = ("run", "mine.yaml", "--to", "hf://org/jobs", *SHARD, "--engine", "jobs", "--parts", "2")
    line += ("--flavor", "cpu-upgrade", "--timeout", "90m", "--seed=-5")
    hub.fail(lambda request: "/commit/merge-staging" in request.path, status=403)
    done = command(*line, cwd=at, hub=hub)
    assert len(started(hub, "org/jobs")) == 2, done.stderr
    first, second = started(hub, "org/jobs")
    is_as_asked(first, "1/2", "org/jobs")
    is_as_asked(second, "2/2", "org/jobs")
    failed, other = (first, second) if first.stage == "ERROR" else (second, first)
    assert (failed.stage, other.stage, done.returncode) == ("ERROR", "COMPLETED", PartError.exit_code)
    page = f"{hub.url}/jobs/alice/{failed.number}"
    assert f"part {part_of(failed)}: its Hub job ended as ERROR\n    {page} has its log" in done.stderr
    assert f"part {part_of(failed)} is started: {page}" in done.stderr
    assert f"part {part_of(other)} is made: " in done.stderr
    assert not digests(hub.files("org/jobs"))
    again = command(*line, cwd=at, hub=hub)
    assert again.returncode == 0, again.stderr
    assert [part_of(job) for job in started(hub, "org/jobs")] == ["1/2", "2/2", part_of(failed)]
    assert digests(hub.files("org/jobs")) == whole
    assert len(hub.commits("org/jobs")) == 2
    third = command(*line, cwd=at, hub=hub)
    assert "nothing to do" in third.stdout
    assert len(started(hub, "org/jobs")) == 3
    told = [text for run in (done, again, third) for text in (run.stdout, run.stderr)]
    told += [job.log.read_text() for job in started(hub, "org/jobs")]
    assert not [text for text in told if WRITER in text or "Traceback" in text]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (402, "this account has no credit for Hub jobs"),
        (403, "our token may not start Hub jobs"),
        (503, "the Hub refuses the job (HTTP 503"),
        (None, "the Hub cannot be reached"),
    ],
)
def test_a_hub_job_that_is_not_started_is_asked_for_once(
    status: int | None, words: str, at: Path, command: Command, hub: LoopbackHub
) -> None:
    """It would cost twice if only the answer was lost; those started before it are cancelled."""
    to = f"org/refused-{status}"
    before = len(hub.jobs.all)
    hub.fail(lambda request: request.method == "POST" and request.path == "/api/jobs/alice", status, times=9)
    done = command("run", "mine.yaml", "--to", f"hf://{to}", "--engine", "jobs", "--parts", "2", cwd=at, hub=hub)
    assert done.returncode == 8
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    asked = [request for request in hub.log if request.path == "/api/jobs/alice"]
    assert (len(asked), len(hub.jobs.all)) == (1, before)


@pytest.mark.parametrize(("refused", "stage"), [(2, "CANCELED"), (9, "RUNNING")])
def test_an_interrupted_run_cancels_its_hub_jobs(
    refused: int, stage: str, at: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    """Ctrl-C ends what costs money, through a network that fails now and then; what it cannot end it names."""
    hub.fail(lambda request: request.path.endswith("/cancel"), None, times=refused)
    asked = {"Retry-After": "60"}  # so the job is there for a while
    hub.fail(lambda request: "/commit/merge-staging" in request.path, times=99, headers=asked)
    down = hub.fail(lambda request: request.method == "GET" and "/api/jobs/" in request.path, None, times=3)
    line = [sys.executable, "-m", "merger", "run", "mine.yaml", "--to", f"hf://org/stopped-{refused}", *SHARD]
    env = {**os.environ, **hub.env(tmp_path, WRITER)}
    process = forks.start([*line, "--engine", "jobs", "--parts", "1"], cwd=at, env=env)
    for text in process.stderr:
        if "part 1/1 is started" in text:
            break
    until(lambda: not down.left or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=HANGS_SECONDS)
    assert process.returncode == 130, said
    assert [job.stage for job in started(hub, f"org/stopped-{refused}")] == [stage]
    assert ("could not be cancelled, and may cost money" in said) == (stage == "RUNNING")


# Either engine


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--engine", "ray"), "--engine and --parts go together"),
        (("--parts", "3"), "--engine and --parts go together"),
        (("--engine", "jobs", "--parts", "0"), "'0' is no whole number from 1 to 100,000"),
        (("--engine", "jobs", "--parts", "2", "--timeout", "soon"), "'soon' is no duration; write for example"),
        (("--engine", "jobs", "--parts", "2", "--part", "1/2"), "not allowed with argument"),
    ],
)
def test_engines_and_parts_are_given_together(
    arguments: tuple[str, ...], words: str, at: Path, command: Command, hub: LoopbackHub
) -> None:
    """Anything else is refused before the models are asked for."""
    done = command("run", "mine.yaml", "--to", "hf://org/never", *arguments, cwd=at, hub=hub)
    assert (done.returncode, len(hub.log)) == (2, 0)
    assert words in done.stderr


def test_without_ray_it_is_said_how_to_get_it(at: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """No traceback of an import."""
    hidden = "import sys; sys.modules['ray'] = None; from merger.cli.commands import main; sys.exit(main(sys.argv[1:]))"
    line = ("run", "mine.yaml", "--to", "hf://org/none", "--engine", "ray", "--parts", "2", "--quiet")
    env = {**os.environ, **hub.env(tmp_path, WRITER)}
    done = forks.run([sys.executable, "-c", hidden, *line], cwd=at, env=env)
    said = f"Ray is not installed here\n    {install_command('ray')}\n"
    assert (done.returncode, done.stderr) == (8, said)


@pytest.mark.parametrize("engine", ["ray", "jobs"])
def test_folders_are_no_place_for_other_machines(
    engine: str, at: Path, tmp_path: Path, command: Command, hub: LoopbackHub
) -> None:
    """A parent or a destination that only this machine has is refused, with all of them at once."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.replace("org/one", str(at / "one")))
    done = command("run", "mine.yaml", "--to", "out", "--engine", engine, "--parts", "2", cwd=tmp_path, hub=hub)
    assert done.returncode == 2
    assert f"mine.yaml:4:12: the folder {at / 'one'} is on this machine alone" in done.stderr
    assert "the folder out is on this machine alone\n    give --to hf://owner/name" in done.stderr
