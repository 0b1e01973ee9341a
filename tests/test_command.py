"""The command: quick to answer, plain in what it says, and exact in what it returns."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import tiny

from merger.cli import main
from merger.methods.registry import methods

RECIPE = """\
merge_method: linear
models:
  - model: {one}
    parameters: {{weight: 0.5}}
  - model: {other}
    parameters: {{weight: 0.5, density: 0.5}}
publish: {{license: mit}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over two small models, with one harmless slip in it."""
    root = tmp_path_factory.mktemp("command")
    path = root / "mine.yaml"
    path.write_text(RECIPE.format(one=tiny.model(root / "one", 1), other=tiny.model(root / "other", 2)))
    return path


HELP = """
import atexit, sys
before = set(sys.modules)
atexit.register(lambda: print(*{name.partition(".")[0] for name in set(sys.modules) - before}, file=sys.stderr))
from merger.cli import main
main(["--help"])
"""


def test_help_imports_nothing_of_others() -> None:
    """So --help answers at once."""
    answer = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    assert set(answer.stderr.split()) <= {"merger", *sys.stdlib_module_names}


HEAVY = """
import json, sys
from merger.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as done:
    code = done.code
heavy = [name for name in ("torch", "huggingface_hub", "transformers", "matplotlib") if name in sys.modules]
print(json.dumps([code, heavy]), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [["--help"], ["check"], ["plan"], ["plan", "--json"], ["methods"], ["schema"]])
def test_no_torch_before_tensors(command: list[str], recipe: Path) -> None:
    """Checking and planning local models, help, methods and schema import none of what is slow to import."""
    arguments = [*command, str(recipe)] if command[0] in ("check", "plan") else command
    answer = subprocess.run([sys.executable, "-c", HEAVY, *arguments], check=True, capture_output=True, text=True)
    assert json.loads(answer.stderr.splitlines()[-1]) == [0, []]


def test_check_says_what_it_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check names method and models, and warns of what has no effect, at its place."""
    assert main(["check", str(recipe)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{recipe}: well formed (linear; 2 models)\n"
    assert f"warning: {recipe}:6:31: " in said.err
    assert "density has no meaning for linear" in said.err


def test_check_looks_at_every_file(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad recipe does not hide the next one, and its exit code counts."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("merge_method: linaer\nmodels: [{model: org/a}]\n")
    assert main(["check", str(bad), str(recipe), str(tmp_path / "none.yaml")]) == 2
    said = capsys.readouterr()
    assert "well formed" in said.out
    assert "did you mean 'linear'?" in said.err
    assert "none.yaml: cannot be read" in said.err


def test_plan_accounts_for_everything(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan shows the models, what is made, what it reads and takes, without writing anything."""
    before = sorted(recipe.parent.iterdir())
    assert main(["plan", str(recipe)]) == 0
    said = capsys.readouterr().out
    for line in ("makes   21 tensors (linear 21)", "reads   ", "memory  ", "disk    ", "plan    "):
        assert line in said
    assert sorted(recipe.parent.iterdir()) == before


def test_plan_as_json_names_every_tensor(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan --json holds each job with its inputs and numbers."""
    assert main(["plan", str(recipe), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    jobs = {job["name"]: job for shard in planned["shards"] for job in shard["jobs"]}
    assert set(jobs) == set(tiny.tensors(0))
    assert [entry["settings"] for entry in jobs["lm_head.weight"]["inputs"]] == [{"weight": 0.5}, {"weight": 0.5}]


def test_run_as_json_tells_what_was_written(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """run --json ends with the place, the plan and each shard's checksum."""
    assert main(["run", str(recipe), "--to", str(tmp_path / "out"), "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["where"] == str(tmp_path / "out")
    assert [shard["name"] for shard in told["shards"]] == ["model.safetensors"]
    assert said.err == ""


def test_a_refusal_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json a refusal's problems are data on stdout, and its exit code is the command's."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("merge_method: linaer\nmodels: [{model: org/a}]\n")
    assert main(["plan", str(bad), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 2
    assert told["problems"][0]["at"] == {"path": str(bad), "line": 1, "column": 15}


def test_run_needs_a_destination(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --to and publish.repo the refusal says what to write."""
    assert main(["run", str(recipe)]) == 2
    assert "give --to FOLDER or --to hf://owner/name" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "4XB", "lots", "-1GB"])
def test_a_size_that_is_none(size: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A size that cannot be read is refused with an example."""
    with pytest.raises(SystemExit) as refused:
        main(["plan", str(recipe), f"--max-memory={size}"])
    assert refused.value.code == 2
    assert "write for example 500MB, 4GB or 4GiB" in capsys.readouterr().err


def test_methods_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """methods has a line for each; methods NAME tells parameters with bounds, defaults and the paper."""
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(methods())
    assert main(["methods", "ties"]) == 0
    told = capsys.readouterr().out
    assert "density (a number for each model, 0 to 1, default 1.0): share of entries kept" in told
    assert "https://arxiv.org/abs/2306.01708" in told
    assert main(["methods", "tie"]) == 2
    assert "did you mean 'ties'?" in capsys.readouterr().err


def test_a_terminal_shows_a_bar(recipe: Path, tmp_path: Path) -> None:
    """On a terminal run shows a bar with bytes; in a log it shows plain lines and no control characters."""
    command = [sys.executable, "-m", "merger", "run", str(recipe), "--to", str(tmp_path / "out"), "--force"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    logged = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "\rmerging: 100%" in shown
    assert "\r" not in logged
    assert "made model.safetensors (" in logged
