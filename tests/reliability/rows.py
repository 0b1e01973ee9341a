"""The table: what is made to go wrong, where, what is seen of it, and what the same command does next.

A row's words are the claim, its cases the evidence: `trial` tries them. Not here: how a fault is made (faults), and
what must hold in every case (trial).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from loopback import Request

from reliability import faults
from reliability.faults import FOREVER, Fault, at, nth
from reliability.scene import ACROSS, FOLDER, HUB, REPLACE, REPO, Scene

KILLED, TROUBLE, BYTES, DISK = "killed", "trouble", "bytes", "disk"
"""The four tables of the page."""

ALL = "makes all of it"
ON = "makes the files that are not finished yet"
PUBLISHES = "makes no file again, and publishes"
THERE = "says that it is there already"
ANEW = "makes it anew, as `--force` says"
NOT_NEEDED = "need not be given"

SIGKILL = -9
NO_ANSWER_SECONDS = 1.0
"""Our patience in cases without an answer, in place of half a minute."""


@dataclass(frozen=True)
class Case:
    """One run to be disturbed.

    Args:
        name: what the case is called in a complaint.
        to: where the run goes.
        set_up: makes the trouble; returns what must be called before it is looked at what came of it.
        once: the run mends it by itself.
        timeout: the run's patience, if that matters.
        dies_at: before which change of the file system the run kills itself.
        small_disk: what lies on a disk of its own: the temporary files, or the destination.
    """

    name: str
    to: str
    set_up: Callable[[Scene], Callable[[], None]]
    once: bool = False
    timeout: float | None = None
    dies_at: int | None = None
    small_disk: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of a table. In `says`, an ellipsis stands for whatever differs from case to case."""

    table: str
    what: str
    tried: str
    code: int
    says: tuple[str, ...]
    again: str
    cases: Callable[[Scene, bool], Iterator[Case]]


# ---- killed ---------------------------------------------------------------------------------------------------------


def rows_killed() -> Iterator[Row]:
    """By SIGKILL: the run has no chance to say or do anything."""
    each = "each request, before and after it is carried out"
    early = (faults.LOOKED_UP, faults.CONFIG, faults.LOCATED, faults.CREATED, faults.SEEN, faults.BRANCH,
             faults.BRANCH_SEEN)  # fmt: skip
    uploads = (faults.ANNOUNCED, faults.UPLOADED, faults.VERIFIED, faults.STAGED, faults.SIDE)

    def row(what: str, tried: str, again: str, cases: Callable[[Scene, bool], Iterator[Case]]) -> Row:
        return Row(KILLED, what, tried, SIGKILL, (), again, cases)

    yield row("Hub to Hub, while the models and the repo are looked up", each, ALL, partial(_kills_early, early))
    yield row("Hub to Hub, while tensors are read", each, ON, partial(_kills, (faults.READ,)))
    yield row("Hub to Hub, while files are uploaded and staged", each, ON, partial(_kills, uploads))
    yield row("Hub to Hub, while the one commit is prepared, and just before it", each, PUBLISHES, _kills_before_end)
    yield row("Hub to Hub, after the one commit", each, THERE, _kills_after_end)
    written = "each block of a file, and each change among the temporary files"
    yield row("Hub to Hub, in the middle of a file", written, ON, partial(_dies, HUB, _PROBED, _UPLOADED))
    changed = "each block of a file, and each change of a file's or a folder's name"
    yield row("folder to folder, until the result has its name", changed, ON, partial(_dies, FOLDER, None, _NAMED))
    yield row("folder to folder, afterwards", changed, THERE, partial(_dies, FOLDER, _NAMED, None))
    yield row("over another model with `--force`, until the new one has its name", changed, ON,
              partial(_dies, REPLACE, None, _NAMED))  # fmt: skip
    yield row("over another model with `--force`, afterwards", changed, ANEW, partial(_dies, REPLACE, _NAMED, None))


_UPLOADED, _NAMED = r"os\.remove .*\.safetensors", r"os\.rename out\.merging/new"
"""The last change of the file system before the one commit, and the one that gives a folder its name."""

_PROBED = r"os\.remove \.\./temporary/\w{8}$"
"""Python's tempfile has seen that it can write there: what it leaves if it is killed at that is out of our hands."""


def _kills(steps: tuple[str, ...], scene: Scene, thorough: bool) -> Iterator[Case]:
    """At each request of some steps; for a quick look, in turn before the first of a step and after another's last."""
    log = [faults.step_of(request) for request in scene.undisturbed(HUB)[0].log]
    for place, step in enumerate(steps):
        last = log.count(step) - 1
        for number in range(last + 1):
            if thorough or (number == 0 and place % 4 == 0):
                yield _kill(step, number, faults.killed_before)
            if thorough or (number == last and place % 4 == 2):
                yield _kill(step, number, faults.killed_after)


def _kills_early(steps: tuple[str, ...], scene: Scene, thorough: bool) -> Iterator[Case]:
    """The card is shown twice: before the first tensor is read, and before the one commit."""
    yield from _kills(steps, scene, thorough)
    yield _kill(faults.SHOWN, 0, faults.killed_after)


def _kills_before_end(scene: Scene, thorough: bool) -> Iterator[Case]:
    yield _kill(faults.SHOWN, 1, faults.killed_before)
    yield from _kills((faults.PREPARED,), scene, thorough)
    yield _kill(faults.PUBLISHED, 0, faults.killed_before)


def _kills_after_end(scene: Scene, thorough: bool) -> Iterator[Case]:
    yield _kill(faults.PUBLISHED, 0, faults.killed_after)
    yield from _kills((faults.CHECKED, faults.REMOVED), scene, thorough)
    yield from _dies(HUB, _UPLOADED, None, scene, thorough)


def _kill(step: str, number: int, fault: Fault) -> Case:
    return Case(f"{fault.__name__}: {step}, {number}", HUB, _fault(fault, nth(at(step), number), 1))


def _dies(to: str, after: str | None, until: str | None, scene: Scene, thorough: bool) -> Iterator[Case]:
    """At each change of the file system from one on up to another; for a quick look at some of them."""
    changes = scene.undisturbed(to)[0].changes
    first = 0 if after is None else _last(changes, after) + 1
    last = len(changes) if until is None else _last(changes, until) + 1
    step = 1 if thorough else max(1, (last - first) // 2)
    for number in sorted({*range(first, last, step), last - 1}):
        yield Case(f"killed at {to}'s change {number}: {changes[number]}", to, _nothing, dies_at=number)


def _last(changes: Sequence[str], pattern: str) -> int:
    return max(number for number, change in enumerate(changes) if re.match(pattern, change))


# ---- the Hub in trouble ---------------------------------------------------------------------------------------------

_ANSWERS: dict[str, Fault] = {
    "503": faults.status(503),
    "500": faults.status(500),
    "429": faults.status(429, Retry_After="1"),
    "dropped": faults.dropped,
    "stalled": faults.stalled,
}
_FAILS = ("the Hub refuses to write org/merged (HTTP …)", "org/merged cannot be written (…)")
_LATE = ("http…/org/merged is made (commit …), but what follows went wrong: …",)
_READS = "could not be read after 6 tries (…)"
_AGAIN = {faults.SIDE: ON, faults.SHOWN: PUBLISHES, faults.PREPARED: PUBLISHES, faults.PUBLISHED: PUBLISHES}


def rows_trouble() -> Iterator[Row]:
    """Each step answers 500, 503 or 429, or not at all: once, so that the run mends it, and for good."""
    unread = "the Hub does not answer for org/one (HTTP …)", "the Hub cannot be reached for org/one (…)"
    reads = {faults.LOOKED_UP: unread, faults.CONFIG: (f"org/one: config.json {_READS}",),
             faults.LOCATED: (f"org/one: model.safetensors {_READS}",),
             faults.READ: (f"org/one: model.safetensors {_READS}",),
             faults.SIDE: (f"org/base: tokenizer_config.json {_READS}",)}  # fmt: skip
    for step in faults.STEPS:
        late = step in (faults.CHECKED, faults.REMOVED)
        code, says = (3, reads[step]) if step in reads else (6, _LATE if late else _FAILS)
        if step == faults.VERIFIED:
            code, says = 0, ()  # an upload that nobody confirms is found to be there when it is tried again
        again = THERE if late or not code else _AGAIN.get(step, ALL)
        yield Row(TROUBLE, step, "", code, says, again, partial(_trouble, step))


def _trouble(step: str, scene: Scene, thorough: bool) -> Iterator[Case]:
    place = list(faults.STEPS).index(step)
    for name, fault in {**_ANSWERS, "answer lost": faults.lost}.items():
        if thorough or name in ("answer lost", list(_ANSWERS)[place % len(_ANSWERS)]):
            patience = NO_ANSWER_SECONDS if name == "stalled" else None
            yield Case(f"{name} once: {step}", HUB, _fault(fault, at(step), 1), once=True, timeout=patience)
    for name, fault in _ANSWERS.items():
        if name == "503" or thorough:
            patience = NO_ANSWER_SECONDS if name == "stalled" else None
            yield Case(f"{name} for good: {step}", HUB, _fault(fault, at(step), FOREVER), timeout=patience)


# ---- bytes that are not the right ones ------------------------------------------------------------------------------


def rows_bytes() -> Iterator[Row]:
    """What may be wrong with an answer that brings bytes, and with an address that is good for a while."""

    def row(what: str, why: str, fault: Fault, patience: float | None = None) -> Row:
        says = (f"org/one: model.safetensors could not be read after 6 tries ({why})",)
        return Row(BYTES, what, "", 3, says, ALL, partial(_bytes, fault, patience))

    yield row("the answer ends in the middle", "the connection broke off", faults.cut)
    yield row(
        "the answer stands still in the middle", "the connection stood still", faults.stalled_within, NO_ANSWER_SECONDS
    )
    yield row("the answer is shorter than the range", "the answer was cut short", faults.spoilt(faults.shorter))
    yield row("the answer is longer than the range", "the answer is longer than the range",
              faults.spoilt(faults.longer))  # fmt: skip
    yield row("the whole file comes in place of the range (200 for 206)", "HTTP 200 in place of a part of the file",
              faults.spoilt(faults.whole))  # fmt: skip
    yield row("another range comes (`Content-Range`)", "another range than the one asked for",
              faults.spoilt(faults.another))  # fmt: skip
    yield row("the signed address has expired (403)", "the signed address expired", faults.status(403))
    says = ("we may not write to org/merged",)
    yield Row(BYTES, "the signed address for an upload has expired (403)", "", 6, says, ALL, _expired_upload)


def _bytes(fault: Fault, patience: float | None, scene: Scene, thorough: bool) -> Iterator[Case]:
    def tensors(request: Request) -> bool:
        """Not the headers, which are read before the repo is made."""
        return at(faults.READ)(request) and "/org/one/" in request.path and scene.hub.exists(REPO)

    yield Case("once", HUB, _fault(fault, tensors, 1), once=True, timeout=patience)
    yield Case("for good", HUB, _fault(fault, tensors, FOREVER), timeout=patience)


def _expired_upload(scene: Scene, thorough: bool) -> Iterator[Case]:
    yield Case("once", HUB, _fault(faults.status(403), at(faults.UPLOADED), 1), once=True)
    yield Case("for good", HUB, _fault(faults.status(403), at(faults.UPLOADED), FOREVER))


# ---- a full disk ----------------------------------------------------------------------------------------------------

TEMPORARY, DESTINATION = "temporary", "folder"
_TOO_LITTLE = 4096
"""What is left where a disk is full from the start: enough for Python to take it for a place for temporary files."""


def rows_disk() -> Iterator[Row]:
    """A disk of a megabyte that somebody else fills; the second run has room again."""

    def row(what: str, says: str | tuple[str, ...], again: str, to: str, disk: str, step: str, left: int = 0) -> Row:
        words = (says,) if isinstance(says, str) else says
        return Row(DISK, what, "", 5, words, again, partial(_full, to, disk, step, left))

    full, whole = "… cannot be written (No space left on device)", "cannot write to the destination … (No space left on"
    yield row("temporary files, from the start", "the work needs … of disk, and … are free in …", ALL,
              HUB, TEMPORARY, faults.LOOKED_UP, _TOO_LITTLE)  # fmt: skip
    yield row("the destination, from the start", "the result needs … of disk, and … are free where 'out' shall lie",
              ALL, ACROSS, DESTINATION, faults.LOOKED_UP, _TOO_LITTLE)  # fmt: skip
    # Whether a shard or the note of the one before it meets the full disk first is a matter of moments.
    yield row(
        "the destination, while tensors are read", (f"{whole} device)", full), ALL, ACROSS, DESTINATION, faults.READ
    )
    yield row("the destination, when config, card and tokenizer are written", f"{whole} device)", PUBLISHES,
              ACROSS, DESTINATION, faults.SIDE)  # fmt: skip


def _full(to: str, disk: str, step: str, left: int, scene: Scene, thorough: bool) -> Iterator[Case]:
    """From the last request of a step on."""
    log = [faults.step_of(request) for request in scene.undisturbed(to)[0].log]
    last = nth(at(step), log.count(step) - 1)
    place = scene.temporary if disk == TEMPORARY else scene.folder
    fault = faults.disk_filled(place, left)
    yield Case(f"{disk} full after the last request when {step}", to, _fault(fault, last, 1), small_disk=disk)


# ---- how trouble is made --------------------------------------------------------------------------------------------


def _fault(fault: Fault, match: Callable[[Request], bool], times: int) -> Callable[[Scene], Callable[[], None]]:
    def set_up(scene: Scene) -> Callable[[], None]:
        standing_still = fault(scene, match, times)
        return _over if standing_still is None else standing_still.set

    return set_up


def _nothing(scene: Scene) -> Callable[[], None]:
    return _over


def _over() -> None:
    pass


ROWS = (*rows_killed(), *rows_trouble(), *rows_bytes(), *rows_disk())
