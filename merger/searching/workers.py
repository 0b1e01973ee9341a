"""Several processes that work on one study. Not here: what each of them does (search)."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def workers(count: int, arguments: Sequence[str]) -> Iterator[None]:
    """Let so many more processes try candidates; those that are still at it at the end are ended.

    Args:
        count: how many.
        arguments: what the command is given in each of them.
    """
    line = [sys.executable, "-P", "-m", "merger", "search", *arguments, "--join", "--quiet"]
    started = [subprocess.Popen(line, stdin=subprocess.DEVNULL) for _ in range(count)]
    # one that is killed is gone for the others as soon as somebody has asked for its end
    watchers = [threading.Thread(target=process.wait, daemon=True) for process in started]
    for watcher in watchers:
        watcher.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for watcher in watchers:
            watcher.join()
