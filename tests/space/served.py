"""The Space as a process of its own beside the loopback Hub, as a test starts, kills and starts it again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from loopback import LoopbackHub, Request
from places import ROOT, ZOO
from waiting import HANGS_SECONDS, until

SCOPES = "openid profile contribute-repos gated-repos"
SECRET = "the-secret-of-the-application"


def zoo(hub: LoopbackHub) -> None:
    """The small models where the Space's first recipe looks for them; users to sign in as."""
    for name in ("base", "kjv", "python"):
        hub.add_model(f"maker/merger-zoo-{name}", ZOO / name)
    for name in ("alice", "bob"):
        hub.add_user(name, token=f"hf_token_of_{name}")


def staged(request: Request) -> bool:
    """A shard is put on its staging branch."""
    return request.method == "POST" and "/commit/merge-staging" in request.path


def halted(hub: LoopbackHub) -> tuple[threading.Event, threading.Event]:
    """The next merge stands still where its first shard is staged: set when it is there, and to let it go on."""
    reached, go = threading.Event(), threading.Event()
    hub.fail(lambda request: staged(request) and bool(reached.set() or True), status=None, stall=go)
    return reached, go


class ServedSpace:
    """The process, and its address."""

    def __init__(
        self,
        hub: LoopbackHub,
        folder: Path,
        settings: Mapping[str, str] | None = None,
        root: Path = ROOT,
        line: Sequence[str] = ("-m", "space"),
    ) -> None:
        self._hub, self.folder, self._settings = hub, folder, dict(settings or {})
        self._root, self._line = root, line
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("ab") as log:
            line = [sys.executable, *self._line]
            self.process = subprocess.Popen(line, cwd=self._root, env=self._environment(), stdout=log, stderr=log)
        until(lambda: _answers(self.url) or self.process.poll() is not None, self.log)
        assert self.process.poll() is None, self.log()

    def kill(self) -> None:
        """End it as a machine does that loses its power."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        """All that it has printed."""
        return (self.folder / "log.txt").read_text("utf-8", "replace")

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "OAUTH_", "GRADIO_"))}
        kept.pop("SPACE_HOST", None)
        signing_in = {
            "SYSTEM": "spaces",
            "SPACE_ID": "maker/merger",
            "OAUTH_CLIENT_ID": "merger-space",
            "OAUTH_CLIENT_SECRET": SECRET,
            "OAUTH_SCOPES": SCOPES,
            "OPENID_PROVIDER_URL": self._hub.url,
        }
        here = {
            "MERGER_SPACE_DATA": str(self.folder / "data"),
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(self.port),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        return {
            **kept,
            **self._hub.env(self.folder / "home", "hf_of_the_space_itself"),
            **signing_in,
            **here,
            **self._settings,
        }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=HANGS_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
