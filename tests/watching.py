"""The processes of a test, looked at whenever a loopback Hub is asked: environments and arguments. No tests."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loopback import LoopbackHub, Request


@dataclass(frozen=True)
class Process:
    """One that was there: its number, the program's name, arguments and first environment, as others may read them."""

    number: int
    program: str
    line: bytes
    environ: bytes


@dataclass
class Watch:
    """All processes whose environment speaks of a folder, since others of this machine are not ours to judge.

    Args:
        folder: that folder.
        others: programs that only start ours, and hold what they were given.
    """

    folder: Path
    others: Collection[str] = ()
    seen: set[Process] = field(default_factory=set)

    def look(self, request: Request | None = None) -> bool:
        """Note who is there; to a Hub it is a fault that is none."""
        for place in Path("/proc").glob("[0-9]*"):
            try:
                program = Path(os.readlink(place / "exe")).name
                line, environ = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
            except OSError:
                continue  # it has just ended
            if os.fsencode(self.folder) in environ and program not in self.others:
                self.seen.add(Process(int(place.name), program, line, environ))
        return False

    def holders(self, *tokens: str) -> list[bytes]:
        """The arguments of those that show one of these tokens."""
        wanted = [token.encode() for token in tokens if token]
        return [each.line for each in self.seen if any(token in each.line + each.environ for token in wanted)]


@contextmanager
def watching(hub: LoopbackHub, folder: Path, *others: str) -> Iterator[Watch]:
    """Look at each request to the Hub while this lasts."""
    watch = Watch(folder, others)
    fault = hub.fail(watch.look)
    yield watch
    fault.left = 0
