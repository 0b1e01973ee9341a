"""What the server saw (the log) and what it was told to do wrong (the faults). It does not touch sockets or state."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from waiting import HANGS_SECONDS


@dataclass(frozen=True)
class Request:
    """One request and its answer. `path` is as it came (still %-quoted); `user` is a name, never a token.

    `status` is None when the connection was dropped; `sent` and `received` count bytes of the bodies.
    """

    method: str
    path: str
    query: str = ""
    range: str | None = None
    authorization: bool = False
    host: str = "hub"
    status: int | None = None
    sent: int = 0
    received: int = 0
    user: str | None = None


class Journal:
    """The finished requests, in the order in which they began: a client may ask again before an answer is filed."""

    def __init__(self) -> None:
        self._entries: list[list[Request]] = []
        self._at_work: dict[int, list[Request]] = {}
        self._changed = threading.Condition()

    @contextmanager
    def in_flight(self) -> Iterator[list[Request]]:
        """Mark a request as begun; it is filed in the list that this gives, which keeps its place in the log."""
        place: list[Request] = []
        with self._changed:
            self._entries.append(place)
            self._at_work[threading.get_ident()] = place
        try:
            yield place
        finally:
            with self._changed:
                del self._at_work[threading.get_ident()]
                self._changed.notify_all()

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Mark this thread's request as one that a test holds up: nobody waits for its entry meanwhile."""
        with self._changed:
            place = self._at_work.pop(threading.get_ident())
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._at_work[threading.get_ident()] = place

    def read(self) -> list[Request]:
        """The log. A client holds its answer a moment before the entry is written: wait for those."""
        with self._changed:
            self._settle()
            return [request for place in self._entries for request in place]

    def clear(self) -> None:
        """Forget all of it, stragglers included."""
        with self._changed:
            self._settle()
            self._entries.clear()

    def _settle(self) -> None:
        now = {id(place) for thread, place in self._at_work.items() if thread != threading.get_ident()}
        self._changed.wait_for(lambda: now.isdisjoint(map(id, self._at_work.values())), HANGS_SECONDS)


@dataclass
class Fault:
    """One scripted fault. `left` counts down; a test may look at it to see that the fault did happen.

    `spoil` makes another answer of the true one, or none; `stall` is waited for before the connection is dropped.
    """

    match: Callable[[Request], bool]
    status: int | None = 503
    left: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    after_handling: bool = False
    cut_body_at: int | None = None
    spoil: Callable[[Any], Any] | None = None
    stall: threading.Event | None = None

    @property
    def handles(self) -> bool:
        """Whether the request is still carried out."""
        return self.after_handling or self.cut_body_at is not None or self.spoil is not None

    def wait(self) -> None:
        """Say nothing until the test has seen enough."""
        if self.stall is not None:
            self.stall.wait(HANGS_SECONDS)


class Faults:
    """The faults still to come, first scripted first taken."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        """Script one."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget those not used up, and hold nobody up any more."""
        with self._lock:
            for fault in self._faults:
                if fault.stall is not None:
                    fault.stall.set()
            self._faults.clear()

    def take(self, request: Request) -> Fault | None:
        """The fault for this request, counted; None for nearly all of them."""
        with self._lock:
            for fault in self._faults:
                if fault.left > 0 and fault.match(request):
                    fault.left -= 1
                    return fault
        return None
