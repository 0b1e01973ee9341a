"""Secrets of the environment: which they are, and a process that begins anew without them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from places import ROOT

from merger.safety.environment import OURS, is_secret, public

LOOKS = """\
import json, os, sys
from merger.safety.environment import hand_over
hand_over()
first = open("/proc/self/environ", "rb").read().decode()
about = {"first": first, "now": dict(os.environ), "line": sys.argv, "open": sorted(os.listdir("/proc/self/fd"))}
print(json.dumps({**about, "prefix": sys.prefix, "flags": [sys.flags.safe_path, sys.flags.utf8_mode]}))
"""


@pytest.mark.parametrize(
    "name", [*OURS, "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "ACTIONS_RUNTIME_TOKEN", "db_password"]
)
def test_a_secret_is_known_by_the_last_word_of_its_name(name: str) -> None:
    """A child gets none."""
    assert is_secret(name, "0123456789")
    assert public({name: "0123456789", "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_TOKEN_PATH", "/home/me/token"), ("TOKENIZERS_PARALLELISM", "false-or-true"),
     ("OAUTH_CLIENT_ID", "merger-space"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), ("ACTIONS_ID_TOKEN_REQUEST_URL", "http://127.0.0.1"),
     ("HF_TOKEN", "")],
)  # fmt: skip
def test_what_only_speaks_of_a_secret_is_none(name: str, value: str) -> None:
    """A child needs it."""
    assert public({name: value}) == {name: value}


def started(**secrets: str) -> dict[str, object]:
    """What a program sees that hands its secrets over to itself."""
    environment = {**public(), "PYTHONPATH": str(ROOT), "KEPT": "as it is", **secrets}
    line = [sys.executable, "-P", "-X", "utf8", "-c", LOOKS, "a word", "$(more)"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_process_that_hands_over_its_secrets_shows_none_in_proc() -> None:
    """It has those that it uses, and lets go of the others; its arguments, its Python and all else are as before."""
    secrets = {name: f"the value of {name}" for name in OURS}
    plain, found = started(), started(**secrets, AWS_SECRET_ACCESS_KEY="of no use here")
    assert "the value of" not in str(found["first"])
    assert found["now"] == {**dict(plain["now"]), **secrets}  # type: ignore[call-overload]
    assert "KEPT=as it is" in str(found["first"])
    for same in ("line", "prefix", "flags", "open"):
        assert found[same] == plain[same]


def test_a_secret_that_no_pipe_holds_is_refused_in_a_sentence() -> None:
    """No process waits for ever for somebody to read it."""
    environment = {**public(), "PYTHONPATH": str(ROOT), "HF_TOKEN": "a" * 100_000}
    done = subprocess.run([sys.executable, "-c", LOOKS], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "the secrets of the environment are too large\n")
