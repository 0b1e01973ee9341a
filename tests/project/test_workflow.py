"""The reusable workflow of parts, read as text: what linters do not look at. Not here: running it."""

from __future__ import annotations

import re
from typing import Any

import yaml
from places import PROJECT, ROOT

from merger.runtime import requirement

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/merge-parts.yml").read_text())
STEPS: list[dict[str, Any]] = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_the_workflow_installs_the_package_it_belongs_to() -> None:
    """Who calls a version of the workflow gets that version of the command."""
    default = WORKFLOW[True]["workflow_call"]["inputs"]["package"]["default"]  # YAML reads the key `on` as true
    assert default == requirement(version=PROJECT["version"])


def test_no_input_is_written_into_a_command() -> None:
    """Inputs reach the shell as variables, in quotes, so that none is a command."""
    lines = [step["run"] for step in STEPS if "run" in step]
    assert len(lines) == 5
    assert not [line for line in lines if "${{" in line]
    unquoted = [word for line in lines for word in re.findall(r'(?<!["/])\$\S+', line)]
    assert unquoted == ["${MAX_MEMORY:+--max-memory"]


def test_actions_of_others_are_pinned_and_see_no_token() -> None:
    """By a commit, which nobody can move; and only the steps of merger itself are given the token."""
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name) for name in used)
    assert [step["run"].split()[1] for step in STEPS if "HF_TOKEN" in step.get("env", {})] == ["run", "publish"]
