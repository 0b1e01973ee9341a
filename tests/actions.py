"""A repository of recipes as a job of the Action finds it: history, events, environment. No tests here."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTHING = "0" * 40
REPOSITORY = "org/recipes"
_GIT = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@localhost", "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@localhost", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull,
}  # fmt: skip


class Checkout:
    """A clone with recipes in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> str:
        """What git prints."""
        line = ["git", "-C", str(self.root), *arguments]
        done = subprocess.run(line, env=os.environ | _GIT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, files: Mapping[str, str | None]) -> str:
        """Write files (None removes one) and commit them; returns the commit."""
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if text is None else path.write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "a change")
        return self.git("rev-parse", "HEAD")


def push(before: str, after: str, **more: Any) -> dict[str, Any]:
    """The payload of a push to main."""
    repository = {"full_name": REPOSITORY, "default_branch": "main"}
    return {"ref": "refs/heads/main", "before": before, "after": after, "repository": repository} | more


def pull_request(base: str, head: str, head_repo: str | None = REPOSITORY, number: int = 7) -> dict[str, Any]:
    """The payload of a pull request; `head_repo` is None for one whose repository is gone."""
    source = {"sha": head, "ref": "change", "repo": None if head_repo is None else {"full_name": head_repo}}
    target = {"sha": base, "ref": "main", "repo": {"full_name": REPOSITORY}}
    pull = {"number": number, "base": target, "head": source}
    return {"action": "opened", "number": number, "pull_request": pull, "repository": {"full_name": REPOSITORY}}


def environment(place: Path, root: Path, event: str, payload: Mapping[str, Any], api: str = "") -> dict[str, str]:
    """What GitHub puts into a job's environment, as far as the Action reads it."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "event.json").write_text(json.dumps(payload))
    return {
        "GITHUB_WORKSPACE": str(root), "GITHUB_EVENT_NAME": event, "GITHUB_EVENT_PATH": str(place / "event.json"),
        "GITHUB_REPOSITORY": REPOSITORY, "GITHUB_API_URL": api, "GITHUB_OUTPUT": str(place / "output"),
        "GITHUB_STEP_SUMMARY": str(place / "summary"), "RUNNER_TEMP": str(place), "GITHUB_REF": "refs/heads/main",
    }  # fmt: skip


def outputs(text: str) -> dict[str, str]:
    """What GitHub reads from the file of a step's outputs."""
    found: dict[str, str] = {}
    lines = iter(text.splitlines())
    for line in lines:
        name, end = line.split("<<", 1)
        values = []
        for value in lines:
            if value == end:
                break
            values.append(value)
        found[name] = "\n".join(values)
    return found


def commands(log: str) -> list[str]:
    """The lines of a log that GitHub would take for commands, once what stops them is honoured."""
    found: list[str] = []
    word = None
    for line in log.splitlines():
        if word is not None:
            word = None if line.strip() == f"::{word}::" else word
        elif stop := re.match(r"\s*::stop-commands::(.+)", line):
            word = stop[1]
        elif line.lstrip().startswith("::") or "##[" in line:
            found.append(line)
    return found
