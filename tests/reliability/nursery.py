"""A process that has imported everything, and forks a child for each run of the command: 20 ms in place of 2 s.

Its first line of input is a command to warm up with; then it reads an order (JSON) a line, and answers with two lines:
the child's process id, then its exit code. In the child pauses pass quickly, and it may be told to kill itself at a
change of the file system. Not here: what is ordered (scene).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from itertools import count
from typing import Any

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
HURRY = 0.002
"""A pause of a second takes two thousandths: what is tried is what is done after it, not how long it is."""


def main() -> None:
    """Serve until the input ends."""
    importlib.import_module("merger.cli.commands")
    for name in ("cli.text", "run.pipeline", "engine.execute", "engine.geometry", "stores.hub.staging"):
        importlib.import_module(f"merger.{name}")
    importlib.import_module("forks").blank_pictures().start()
    _warm_up(json.loads(sys.stdin.readline()))
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _obey(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _warm_up(line: list[str]) -> None:
    """Run a command here: what Python and torch do when they do something for the first time is then done."""
    code = importlib.import_module("merger.cli.commands").main(line)
    assert (code, threading.active_count()) == (0, 1)


def _obey(order: dict[str, Any]) -> None:
    """Become the command; never returns."""
    code = 70
    try:
        _settle_in(order)
        code = importlib.import_module("merger.cli.commands").main(order["line"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # as at the end of any Python: its threads are waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _settle_in(order: dict[str, Any]) -> None:
    os.chdir(order["folder"])
    for place, name in enumerate((os.devnull, order["out"], order["err"])):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, place)
        os.close(opened)
    os.environ["TMPDIR"] = order["temporary"]
    tempfile.tempdir = None
    patience = importlib.import_module("merger.stores.hub.http")
    if order["timeout"]:
        patience.TIMEOUT_SECONDS = patience.ANSWER_SECONDS = order["timeout"]
    real = time.sleep
    time.sleep = lambda seconds: real(seconds * HURRY)
    _watch(order["folder"], order["temporary"], order["dies_at"])


def _watch(folder: str, temporary: str, dies_at: int | None) -> None:
    """Count each change of the file system in the run's folders, and each block written; before one of them, die.

    With -1 it lives, and tells of each.
    """
    seen = count()

    def change(what: str) -> None:
        if next(seen) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if dies_at == -1:
            os.write(2, f"\nchange: {what}\n".encode())  # a line of its own, wherever another thread is with its words

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and _changes(event, arguments, (folder, temporary)):
            change(f"{event} {os.path.relpath(arguments[0], folder)}")

    if dies_at is not None:
        sys.addaudithook(hook)
        _before_each_write(change)


def _changes(event: str, arguments: tuple[Any, ...], places: tuple[str, str]) -> bool:
    """A file without a name is none: it is gone with its process, and how many there are differs from run to run."""
    path = arguments[0]
    if not isinstance(path, (str, os.PathLike)) or not os.path.abspath(path).startswith(places):
        return False
    if event == "open":
        return not os.path.isdir(path) and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    return True


def _before_each_write(change: Callable[[str], None]) -> None:
    shard = importlib.import_module("merger.models.formats.safetensors")
    real = shard.ShardWriter.write

    def write(self: Any, data: memoryview) -> None:
        change("write")
        real(self, data)

    shard.ShardWriter.write = write


if __name__ == "__main__":
    main()
