"""`merger doctor`: a line for each thing a merge needs, a next step for each lack, and an exit code.

Not here: how memory and cores are found (tests/project/test_machine).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from calls import READER, WRITER, Said, called
from loopback import Client, LoopbackHub

from merger import runtime, system
from merger.cli.text import finding_text
from merger.run import doctor


def looked(environment: Mapping[str, str]) -> Said:
    """What it says in a process with these variables beside its own."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        return called(["doctor"])
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.parametrize(("token", "code", "told"), [
    (WRITER, 0, "token      there, of alice\n"),
    (READER, 0, "token      there, of alice\n             to publish, make a token that may write\n"),
    ("", 0, "token      none: public models can be read\n             to publish: hf auth login, or set HF_TOKEN\n"),
    ("hf_nobody_has_this", 3,
     "does not accept our token for this account\n             set HF_TOKEN anew, or unset it\n"),
])  # fmt: skip
def test_it_tells_whether_there_is_a_token_and_never_which(
    token: str, code: int, told: str, client: Client, hub: LoopbackHub
) -> None:
    """Of whom it is, and whether it may write; one that the Hub refuses is a lack."""
    said = client(looked, {"HF_TOKEN": token})
    assert (said.code, said.err) == (code, "")
    assert told in said.out
    assert (f"hub        {hub.url} answers\n" in said.out) == (code == 0)
    assert not token or token not in said.out


def test_each_line_is_a_word_and_what_was_found(client: Client) -> None:
    """In one order, whatever the machine."""
    lines = client(looked, {"HF_TOKEN": WRITER}).out.splitlines()
    words = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert words == [
        "package", "python", "cores", "memory", "folder", "temporary", "extras", "steps", "system", "hub", "token",
    ]  # fmt: skip


def test_what_lacks_has_a_next_step_and_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory is 5, as it is for a merge."""
    monkeypatch.setattr(system, "free_memory", lambda: 1000)
    found = next(finding for finding in doctor.examine() if finding.what == "memory")
    assert (found.found, found.exit_code) == ("1.0 kB free", 5)
    assert "end other programs" in finding_text(found).splitlines()[1]


def test_extras_that_are_missing_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra is there when all its packages are."""
    needs = ["numpy", "numpy>=1; extra == 'one'", "numpy; extra == 'two'", "no-such-package>=2; extra == 'two'"]
    monkeypatch.setattr(doctor, "requires", lambda package: needs)
    found = next(finding for finding in doctor.examine() if finding.what == "extras")
    assert (found.found, found.hint) == ("one", f"for two: {runtime.install_command('two')}")


def test_steps_are_counted_before_any_was_taken() -> None:
    """In a process that has made none yet, where some of them are not even imported."""
    code = (
        "from merger.methods.registry import methods; from merger.methods.steps import step; methods(); "
        "before = step.kept_steps(); print(before == step.kept_steps(), len(step.STEPS) > 25)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_compiled_steps_are_counted(tmp_path: Path, client: Client) -> None:
    """All that a machine keeps, of all there are; none of them where nothing was merged yet."""
    said = client(looked, {"HF_TOKEN": WRITER}).out
    kept, of = map(int, re.search(r"steps +(\d+) of (\d+) compiled before", said).groups())  # type: ignore[union-attr]
    assert 0 <= kept <= of
    assert of > 20
