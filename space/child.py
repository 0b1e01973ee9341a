"""The child process in which one job's merge is made: reads what to do from its input, tells of it line by line.

It works in a folder of its own that holds recipe.yaml and its lock file. The token comes by the input alone. The input
stays open for as long as the worker lives: when that ends, by whatever cause, so does the child, and what it had
finished waits on the Hub. Not here: when to begin (keeper).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from merger import console
from merger.errors import MergerError
from merger.run import Done, Options, Resumed, plan, read, run

RECIPE = "recipe.yaml"
_SECONDS = 0.2


class _Teller(console.Progress):
    """Tells the worker how far it is, a few times a second."""

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


def main() -> int:
    """Make the merge that the input describes."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    out = os.fdopen(os.dup(1), "w")
    with redirect_stdout(sys.stderr):
        try:
            _make(asked, out)
        except MergerError as error:
            told = {"failed": [str(problem) for problem in error.problems]}
            print(json.dumps(told), file=out, flush=True)
            return error.exit_code
    return 0


def _end_with_the_worker() -> None:
    sys.stdin.read()
    os._exit(1)


def _make(asked: dict[str, Any], out: TextIO) -> None:
    options = Options(
        to=asked["to"],
        max_memory=asked["memory"],
        max_disk=asked["disk"],
        threads=asked["threads"],
        shard_size=asked["shard_size"],
        cache=False,
        hub_only=True,
        force=asked["force"],
        create_pr=asked["create_pr"],
        read_token=False if asked["is_public"] else asked["token"],
        write_token=asked["token"],
    )
    planned, store = plan(read(Path(RECIPE)), options)
    teller = _Teller(sum(job.nbytes for job in planned.jobs), out)
    for event in run(planned, store, options):
        if isinstance(event, Resumed):
            teller.tell(kept=planned.size * event.shards // event.of)
        console.show(event, teller)
        if isinstance(event, Done):
            where, commit = event.published.where, event.published.commit or ""
            teller.tell(where=where, commit=commit, is_new=event.is_new, doubts=event.doubts)


if __name__ == "__main__":
    sys.exit(main())
