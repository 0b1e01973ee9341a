"""Commands in processes that are forked from one with the slow imports done: 50 ms in place of 2 s of a core each.

`run` and `start` take what `subprocess` takes, for a line that begins with this Python. All is as in a process of its
own but the imports, Python's hash seed, the memory it begins with and that modules are not taken apart at the end: who
tests those starts a real one. The Hub's client is not among the imports, for it reads its settings from the environment
when it is imported.
"""

from __future__ import annotations

import atexit
import base64
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import patch

from places import ROOT
from waiting import HANGS_SECONDS

IMPORTED = (
    "merger.cli.commands", "merger.cli.text", "merger.run.pipeline", "merger.engine.execute",
    "merger.engine.inputs.readers", "merger.card.pictures.movement",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "httpx2", "urllib3",
    "safetensors.torch", "tokenizers", "tqdm", "anyio", "filelock", "h11", "httpcore2", "merger.card.templates",
)  # fmt: skip
NOT_IMPORTED = "huggingface_hub"
MOST_BYTES = 1 << 18
BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
"""A picture of one point."""


class Forked:
    """A process under way, as `subprocess.Popen` shows it."""

    def __init__(self, line: Sequence[str], cwd: str | os.PathLike[str], env: Mapping[str, str]) -> None:
        self.args = list(line)
        self.returncode: int | None = None
        (out, its_out), (err, its_err), (self._news, its_news) = os.pipe(), os.pipe(), os.pipe()
        order = json.dumps({"line": self.args[1:], "cwd": os.fspath(cwd), "env": dict(env)}).encode()
        socket.send_fds(_desk(), [order], [its_out, its_err, its_news])
        for its in (its_out, its_err, its_news):
            os.close(its)
        self.stdout, self.stderr = os.fdopen(out, encoding="utf-8"), os.fdopen(err, encoding="utf-8")
        self.pid = self._told(HANGS_SECONDS)

    def _told(self, timeout: float | None) -> int:
        if not select.select([self._news], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return int(os.read(self._news, 8))

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it; None while it lives."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, once it has ended."""
        if self.returncode is None:
            self.returncode = self._told(timeout)
            os.close(self._news)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To it, if it is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it still says, until it has ended."""
        if self.stdout.closed:
            return "", ""
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            said = [pool.submit(file.read) for file in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return said[0].result(), said[1].result()


def start(line: Sequence[str], *, cwd: str | os.PathLike[str] = ".", env: Mapping[str, str] | None = None) -> Forked:
    """Begin it."""
    return Forked(line, os.path.abspath(cwd), os.environ if env is None else env)


def run(
    line: Sequence[str],
    *,
    cwd: str | os.PathLike[str] = ".",
    env: Mapping[str, str] | None = None,
    timeout: float = HANGS_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Wait for its end."""
    process = start(line, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


@cache
def _desk() -> socket.socket:
    """Where the process that forks takes orders; it ends with this one."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")])
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # a process with threads forks badly
    with its:
        line = [sys.executable, __file__]
        process = subprocess.Popen(line, stdin=its.fileno(), env={**os.environ, **one, "PYTHONPATH": paths})

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# In the process that forks, and in those it forks


def main() -> None:
    """Fork until no order can come any more."""
    for name in IMPORTED:
        if name != "safetensors.torch" or importlib.util.find_spec("torch"):
            importlib.import_module(name)
    importlib.import_module("merger.methods.steps.step").compile_steps()
    importlib.import_module("merger.methods.registry").methods()
    templates = importlib.import_module("merger.card.templates")
    for name in templates._ours():
        templates._with_ours().get_template(name)
    blank_pictures().start()
    importlib.import_module("merger.card.pictures.canvas").warm_fonts()
    assert NOT_IMPORTED not in sys.modules
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as desk:
        while True:
            order, files, _, _ = socket.recv_fds(desk, MOST_BYTES, 3)
            if not order:
                return
            if os.fork() == 0:
                desk.close()
                _keep(json.loads(order), *files)
            for file in files:
                os.close(file)


def blank_pictures() -> Any:
    """A patch: cards have empty pictures, for to draw them takes longer than all else in a run.

    Who tests pictures has them drawn: tests/card, and whatever runs in a process of its own that is not forked here.
    """
    return patch("merger.card.pictures.canvas._draw_png", _blank)


def _blank(figure: Any, dots: int) -> bytes:
    return BLANK + bytes([len(figure.axes)])  # no two are one file


def _keep(order: Mapping[str, Any], out: int, err: int, news: int) -> NoReturn:
    """Fork it, wait for it, and tell of its beginning and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.close(news)
        _become(order, out, err)
    os.close(out)
    os.close(err)
    os.write(news, f"{child:8}".encode())
    _, status = os.waitpid(child, 0)
    os.write(news, f"{os.waitstatus_to_exitcode(status):8}".encode())
    os._exit(0)


def _become(order: Mapping[str, Any], out: int, err: int) -> NoReturn:
    for place, file in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(file, place)
        os.close(file)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    tempfile.tempdir = None
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    how, what, *arguments = order["line"]
    sys.argv = [what if how == "-m" else how, *arguments]
    sys.orig_argv = [sys.executable, *order["line"]]  # what replaces itself by exec begins as it was begun
    code: object = 0
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            own = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), vars(own))
    except SystemExit as end:
        code = end.code
    _leave(code)


def _leave(code: object) -> NoReturn:
    """As any Python ends, but that it does not take its modules apart: that takes longer than most commands."""
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
