"""What other tools take of this repository: `hf`'s extension, a uv script for jobs, a skill, a hook of pre-commit.

The real client runs the extension and reads the script. Not here: what it fetches from GitHub, which no test reaches.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from huggingface_hub.cli._uv_script_header import load_uv_script
from huggingface_hub.cli.extensions import MANIFEST_FILENAME, ExtensionManifest
from places import PROJECT, REPOSITORY, ROOT
from thorough import thorough_only

from merger.cli.arguments import parse_arguments
from merger.errors import RecipeError
from merger.runtime import requirement

HERE = ROOT / "integrations"
SCRIPT = HERE / "merge.py"
EXTENSION = tomllib.loads((HERE / "hf-merge" / "pyproject.toml").read_text("utf-8"))["project"]
SKILL = (HERE / "merge-models" / "SKILL.md").read_text("utf-8")
RECIPE = "examples/recipes/linear.yaml"


def test_hf_merge_runs_the_command(tmp_path: Path) -> None:
    """The extension lies where the client installs it, with the one script that its package brings."""
    ((name, target),) = EXTENSION["scripts"].items()
    module, _, function = target.partition(":")
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / name
    script = folder / "venv" / "bin" / name
    script.parent.mkdir(parents=True)
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    script.chmod(0o755)
    ExtensionManifest("org", name, f"org/{name}", "merge", str(script), "python", datetime.now(UTC)).save(folder)
    assert (folder / MANIFEST_FILENAME).is_file()
    env = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "huggingface_hub.cli.hf", "merge", "check", RECIPE]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{RECIPE}: well formed (linear; 2 models)\n"), done.stderr


def test_all_of_them_install_the_package_from_one_place() -> None:
    """As the package itself says."""
    with load_uv_script(str(SCRIPT)) as source:
        header = source.header
    assert header is not None
    assert (header.secrets, header.flavor, header.timeout) == (["HF_TOKEN"], "cpu-upgrade", "6h")
    asked = re.search(r'^# dependencies = \["(.*)"\]$', SCRIPT.read_text("utf-8"), re.MULTILINE)
    assert asked is not None
    assert {asked[1], *EXTENSION["dependencies"]} == {requirement()}
    assert f"pip install '{requirement()}'" in SKILL
    assert (
        requirement() == f"hub-merger @ https://github.com/{REPOSITORY}/archive/HEAD.zip"
        or "Download" in PROJECT["urls"]
    )


SEARCH = (ROOT / "docs" / "search.md").read_text("utf-8").partition("```bash\nhf jobs ")[2].partition("```")[0]
JOBS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "the script": (
        ["uv", "run", str(SCRIPT), "run", RECIPE, "--to", "hf://org/made"],
        ("flavor cpu-upgrade (from script)", "timeout 6h (from script)", "secrets HF_TOKEN=*** (from script)",
         f"args run {RECIPE} --to hf://org/made"),
    ),
    "a worker of a search": (
        shlex.split(SEARCH.replace("\\\n", "")),
        ("image python:3.12", "flavor a10g-small", "timeout 6h", "secrets HF_TOKEN=***", "PGPASSWORD=***"),
    ),
}  # fmt: skip


@thorough_only
@pytest.mark.parametrize("kind", JOBS)
def test_hf_jobs_takes_what_we_say(kind: str) -> None:
    """With its hardware, time and secrets; a dry run, for nothing here runs the Hub's jobs."""
    words, wanted = JOBS[kind]
    line = [sys.executable, "-m", "huggingface_hub.cli.hf", "jobs", *words]
    line.insert(line.index("run", 4) + 1, "--dry-run")
    env = {**os.environ, "HF_TOKEN": "hf_x", "PGPASSWORD": "x"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {re.sub(r" +", " ", line).strip() for line in done.stdout.splitlines()} >= set(wanted)


def test_a_job_of_a_search_is_a_command_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What docs/search.md has the job install and run, in one line of its shell."""
    install, fetch, ours = (shlex.split(each) for each in JOBS["a worker of a search"][0][-1].split("&&"))
    assert install == ["pip", "install", "-q", requirement("search,postgres")] or "Download" in PROJECT["urls"]
    assert fetch[:2] == ["hf", "download"]
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert ours.pop(0) == "merger"
    assert parse_arguments(ours).join


def test_the_script_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its arguments are the command's."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "check", RECIPE])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT))
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{RECIPE}: well formed (linear; 2 models)\n")


def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    """As argcomplete asks for them."""
    pytest.importorskip("argcomplete")

    def completed(line: str) -> list[str]:
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        env = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "told")}
        subprocess.run([sys.executable, "-m", "merger"], cwd=ROOT, env=env, check=True)
        return sorted((tmp_path / "told").read_text().split())

    assert completed("merger p") == ["plan", "publish"]
    assert completed("merger run mine.yaml --max") == ["--max-disk", "--max-memory"]


def understood(line: str) -> bool:
    """Whether the command takes a line of a document."""
    try:
        parse_arguments(shlex.split(line, comments=True)[1:])
    except RecipeError:
        return False
    return True


LINES = sorted({line for line in re.findall(r"`(merger [a-z][^`\n]*)`", SKILL) if "--json" not in line})


@pytest.mark.parametrize("line", LINES)
def test_each_command_of_the_skill_is_one(line: str) -> None:
    """With the options that it names; one that is no command is none."""
    assert understood(line)
    assert not understood(line.replace("merger ", "merger un-"))


def test_the_skill_says_when_it_is_wanted() -> None:
    """A skill's folder has its name, and its front matter is what agents choose by."""
    front = yaml.safe_load(SKILL.split("---\n")[1])
    assert front.keys() == {"name", "description"}
    assert front["name"] == "merge-models"
    assert len(front["description"]) < 1024


def test_the_hook_checks_recipes() -> None:
    """Those of merges/, and no lock files."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert understood(f"{hook['entry']} {RECIPE}")
    names = ("merges/a.yaml", "merges/more/b.yml", "merges/a.lock.yaml", "docs/c.yaml")
    taken = [name for name in names if re.search(hook["files"], name) and not re.search(hook["exclude"], name)]
    assert taken == ["merges/a.yaml", "merges/more/b.yml"]
