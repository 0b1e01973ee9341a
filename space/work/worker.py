"""The process in which one job's merge is made, or its search.

It is told what to do by a socket, and tells how far it is by lines. It works in a folder of its own that holds
recipe.yaml, its lock file, and the texts of a search. The token comes by the socket alone, which stays open for as long
as the queue lives: when that ends, by whatever cause, so does the worker, and what it had finished waits on the Hub.
Not here: when to begin (queue), the fork (forkserver), and the search (search).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from merger.cli.text import Progress, show
from merger.errors import MergerError
from merger.run.options import Options
from merger.run.pipeline import Resumed, merge
from merger.run.prepare import plan, read_recipe
from merger.runtime import tell_limits
from merger.safety import secrets
from space.work.search import run_search

if TYPE_CHECKING:
    from merger.run.pipeline import Event

RECIPE = "recipe.yaml"
_SECONDS = 0.2


class ProgressPipe(Progress):
    """Tells the queue how far it is, a few times a second."""

    def __init__(self, total: int, out: TextIO) -> None:
        super().__init__(total, out)
        self._out, self._last, self._bytes = out, 0.0, 0

    def add(self, nbytes: int) -> None:
        self._bytes += nbytes
        if time.monotonic() - self._last > _SECONDS:
            self._last = time.monotonic()
            self.tell(made=self._bytes)

    def say(self, line: str) -> None:
        self.tell(made=self._bytes, say=line)

    def tell(self, **what: Any) -> None:
        """One line."""
        print(json.dumps(what), file=self._out, flush=True)


def run_job(queue: socket.socket, folder: Path) -> NoReturn:
    """Make the merge that the queue describes, and end the process, whatever happens.

    Args:
        queue: where the description comes from, and where the lines go.
        folder: the worker's own; the recipe and its lock file are in it.
    """
    code = 1
    try:
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        os.environ |= {"TMPDIR": str(folder), "HF_XET_CACHE": str(folder / "xet")}
        orders, out = queue.makefile("r"), secrets.sieve(queue.makefile("w"))
        sys.stderr = secrets.sieve(sys.stderr, ends=False)
        asked = json.loads(orders.readline())
        threading.Thread(target=_end_with, args=(orders,), daemon=True).start()
        code = _answer(asked, out)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _end_with(orders: TextIO) -> None:
    try:
        orders.read()
    finally:  # a queue that was killed before it read all it was told resets the connection
        os._exit(1)


def _answer(asked: dict[str, Any], out: TextIO) -> int:
    try:
        with tell_limits():
            (_make if asked["to"] else _search)(asked, out)
    except MergerError as error:
        return _tell_failure(error, out)
    return 0


def _tell_failure(error: MergerError, out: TextIO) -> int:
    try:
        print(json.dumps({"failed": [str(problem) for problem in error.problems]}), file=out, flush=True)
    except secrets.LeakError as leak:
        return _tell_failure(leak, out)
    return error.exit_code


def _options(asked: dict[str, Any], root: Path | None = None) -> Options:
    return Options(
        to=asked["to"] or None,
        max_memory=asked["memory"],
        max_disk=asked["disk"],
        threads=asked["threads"],
        shard_size=asked["shard_size"],
        cache=False,
        root=root,
        force=asked["force"],
        create_pr=asked["create_pr"],
        read_token=False if asked["is_public"] else asked["token"],
        write_token=asked["token"],
    )


def _search(asked: dict[str, Any], out: TextIO) -> None:
    progress = ProgressPipe(0, out)
    options = _options(asked, Path.cwd())
    run_search(read_recipe(Path(RECIPE)), options, asked["minutes"], Path(asked["study"]), progress.tell)
    progress.tell(where="", commit="", is_new=True, card="", doubts=[])


def _make(asked: dict[str, Any], out: TextIO) -> None:
    options = _options(asked)
    planned, store = plan(read_recipe(Path(RECIPE)), options)
    progress = ProgressPipe(planned.nbytes, out)

    def tell(event: Event) -> None:
        if isinstance(event, Resumed):
            progress.tell(kept=planned.size * event.shards // event.of)
        show(event, progress)

    result = merge(planned, store, options, tell)
    about = {"where": result.where, "commit": result.commit or "", "is_new": result.is_new, "card": result.card}
    progress.tell(**about, doubts=result.doubts)
