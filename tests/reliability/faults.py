"""What may go wrong, and where: the steps of a run as the Hub sees them, and ways to spoil one or to kill a run there.

Not here: what is expected of a run then (rows).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from loopback import Request
from loopback.wire import Answer, FilePart

from reliability.scene import Scene, fill

LOOKED_UP, CONFIG, LOCATED, READ, SIDE = "a parent is looked up", "its config is read", \
    "the address of its tensors is asked for", "its tensors are read", "its tokenizer is read"  # fmt: skip
CREATED, SEEN, BRANCH, BRANCH_SEEN = "the repo is created", "the repo is looked at", "the staging branch is made", \
    "the staging branch is looked at"  # fmt: skip
ANNOUNCED, UPLOADED, VERIFIED, STAGED = "an upload is announced", "a file is uploaded", "an upload is confirmed", \
    "a file is put on the staging branch"  # fmt: skip
SHOWN, PREPARED, PUBLISHED, CHECKED, REMOVED = "the card is shown to the Hub", "the one commit is prepared", \
    "the one commit is made", "the result is checked", "the staging branch is removed"  # fmt: skip

STEPS = {
    LOOKED_UP: r"GET hub /api/models/org/(base|one|two)",
    CONFIG: r"(HEAD|GET) hub /org/\w+/resolve/\w+/config\.json",
    LOCATED: r"HEAD hub /org/\w+/resolve/\w+/model\.safetensors",
    READ: r"GET cdn .*",
    CREATED: r"POST hub /api/repos/create",
    SEEN: r"GET hub /api/models/org/merged(/commits/main|/refs)?",
    BRANCH: r"POST hub .*/branch/.*",
    BRANCH_SEEN: r"GET hub .*/(commits|revision)/merge-staging.*",
    ANNOUNCED: r"POST hub .*(/preupload/merge-staging.*|/lfs/objects/batch)",
    UPLOADED: r"PUT cdn .*",
    VERIFIED: r"POST hub .*/objects/verify",
    STAGED: r"POST hub .*/commit/merge-staging.*",
    SIDE: r"(HEAD|GET) hub /org/\w+/resolve/\w+/tokenizer_config\.json",
    SHOWN: r"POST hub .*/validate-yaml",
    PREPARED: r"POST hub .*(/preupload/main|/paths-info/.*)",
    PUBLISHED: r"POST hub .*/commit/main",
    CHECKED: r"GET hub /api/models/org/merged/revision/[0-9a-f]{40}",
    REMOVED: r"DELETE hub .*/branch/.*",
}

FOREVER = 10**6
Fault = Callable[[Scene, Callable[[Request], bool], int], threading.Event | None]
"""Spoils so many of the requests that match; what stalls goes on when the event is set."""


def step_of(request: Request) -> str:
    """Which step of a run a request belongs to."""
    line = f"{request.method} {request.host} {request.path}"
    return next((step for step, pattern in STEPS.items() if re.fullmatch(pattern, line)), f"something new: {line}")


def at(step: str) -> Callable[[Request], bool]:
    """Requests of a step."""
    return lambda request: step_of(request) == step


def nth(match: Callable[[Request], bool], number: int) -> Callable[[Request], bool]:
    """The `number`-th (from 0) of the requests that match."""
    seen = count()
    return lambda request: match(request) and next(seen) == number


# ---- ways for a request to go wrong ---------------------------------------------------------------------------------


def status(code: int, **headers: str) -> Fault:
    """Another answer than the true one, which does nothing."""

    def fault(scene: Scene, match: Callable[[Request], bool], times: int) -> None:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        scene.hub.fail(match, status=code, times=times, headers=named)

    return fault


def dropped(scene: Scene, match: Callable[[Request], bool], times: int) -> None:
    """The connection ends before anything is done."""
    scene.hub.fail(match, status=None, times=times)


def lost(scene: Scene, match: Callable[[Request], bool], times: int) -> None:
    """All is done, and the connection ends before the answer."""
    scene.hub.fail(match, status=None, times=times, after_handling=True)


def stalled(scene: Scene, match: Callable[[Request], bool], times: int) -> threading.Event:
    """The connection stands still, and nothing comes."""
    over = threading.Event()
    scene.hub.fail(match, status=None, times=times, stall=over)
    return over


def stalled_within(scene: Scene, match: Callable[[Request], bool], times: int) -> threading.Event:
    """The same in the middle of the answer."""
    over = threading.Event()
    scene.hub.fail(match, times=times, cut_body_at=5, stall=over)
    return over


def cut(scene: Scene, match: Callable[[Request], bool], times: int) -> None:
    """The connection ends in the middle of the answer."""
    scene.hub.fail(match, times=times, cut_body_at=5)


def spoilt(spoil: Callable[[Answer, FilePart], Answer]) -> Fault:
    """An answer of bytes that is not the one asked for."""

    def of(answer: Answer) -> Answer:
        return spoil(answer, answer.body) if isinstance(answer.body, FilePart) else answer

    def fault(scene: Scene, match: Callable[[Request], bool], times: int) -> None:
        scene.hub.fail(match, times=times, spoil=of)

    return fault


def shorter(answer: Answer, part: FilePart) -> Answer:
    """A byte less than was asked for."""
    return replace(answer, body=replace(part, length=part.length - 1))


def longer(answer: Answer, part: FilePart) -> Answer:
    """A byte more than was asked for."""
    start = max(part.start - 1, 0)
    return replace(answer, body=FilePart(part.path, start, part.start + part.length + (start == part.start) - start))


def whole(answer: Answer, part: FilePart) -> Answer:
    """The file in place of the range."""
    headers = {key: value for key, value in answer.headers.items() if key != "Content-Range"}
    return Answer(200, headers, FilePart(part.path, 0, part.path.stat().st_size))


def another(answer: Answer, part: FilePart) -> Answer:
    """Another range than the one asked for."""
    size = part.path.stat().st_size
    return replace(answer, headers={**answer.headers, "Content-Range": f"bytes 1-{part.length}/{size}"})


# ---- ways for a run to end ------------------------------------------------------------------------------------------


def killed_before(scene: Scene, match: Callable[[Request], bool], times: int) -> None:
    """The run is killed when it has sent a request, which comes to nothing."""
    scene.hub.fail(lambda request: match(request) and scene.nursery.kill() is None, status=None, times=times)


def killed_after(scene: Scene, match: Callable[[Request], bool], times: int) -> None:
    """The run is killed when a request has been carried out."""

    def kill(answer: Any) -> None:
        scene.nursery.kill()

    scene.hub.fail(match, times=times, spoil=kill)


def disk_filled(place: Path, left: int) -> Fault:
    """Next to nothing more can be written once the request is carried out."""

    def filled(answer: Answer) -> Answer:
        fill(place, left)
        return answer

    def fault(scene: Scene, match: Callable[[Request], bool], times: int) -> None:
        scene.hub.fail(match, times=times, spoil=filled)

    return fault
