"""The command called in a process that is there, such as a `Client`'s: starting one takes seconds. No tests here."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WRITER, READER = "hf_writer_of_org", "hf_reader_of_org"
"""Tokens of the loopback Hub: alice's, who is of org, to write and to read."""

Command = Callable[..., subprocess.CompletedProcess[str]]
"""The real command in a process of its own: the fixture `command`."""


@dataclass(frozen=True)
class Said:
    """What a command has said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """What it printed with --json."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def called(arguments: Sequence[str]) -> Said:
    """Call the command with these arguments."""
    from merger.cli.commands import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return Said(code, out.getvalue(), err.getvalue())
