"""A case, tried: the disturbed run, a look at the destination, the same command again, and what must hold then.

Not here: the cases (rows), and the page that tells of them (page).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from reliability.rows import ALL, PUBLISHES, TEMPORARY, THERE, Case, Row
from reliability.scene import HUB, REPLACE, TOKEN, Ran, Scene, State

NO_DISK = "this process may not mount a small disk"


def tried(scene: Scene, row: Row, case: Case) -> list[str]:
    """What is wrong with how a case went; [NO_DISK] where it cannot be tried."""
    good = scene.undisturbed(case.to)[1]
    scene.reset(case.to)
    place = scene.temporary if case.small_disk == TEMPORARY else scene.folder
    if case.small_disk is not None and not scene.mount(place):
        return [NO_DISK]
    try:
        before = scene.state(case.to)
        over = case.set_up(scene)
        first = scene.run(case.to, case.timeout, case.dies_at)
        over()
        scene.hub.clear_faults()
        between = scene.state(case.to)
        (place / "filler").unlink(missing_ok=True)
        second = None if case.once else scene.run(case.to)
        printed = "".join(ran.out + ran.err for ran in (first, second) if ran)
        complaints = [f"{words} is printed" for words in ("Traceback", "Signature", TOKEN) if words in printed]
        complaints += [*_first(row, case, first), *_between(row, case, before, between, good)]
        complaints += _end(case, between, second or first, second is not None, scene.state(case.to), good)
        return [f"{case.name}: {complaint}" for complaint in complaints]
    finally:
        scene.unmount()


def _first(row: Row, case: Case, first: Ran) -> Iterator[str]:
    """The run that was disturbed."""
    code = 0 if case.once else row.code
    if first.code != code:
        yield f"it ended with {first.code}, not {code}: {first.err[-400:]}"
    if not case.once and row.says and not any(re.search(_pattern(words), first.err) for words in row.says):
        yield f"it does not say {' or '.join(row.says)}: {first.err[-400:]}"


def _pattern(words: str) -> str:
    return re.escape(words).replace("…", ".+")


def _between(row: Row, case: Case, before: State, between: State, good: State) -> Iterator[str]:
    """The destination after it."""
    as_before, is_whole = between.files == before.files, between.files == good.files
    moved_aside = case.to == REPLACE and not between.files and "out.merging" in between.leftovers
    if not (as_before or is_whole or moved_aside):
        yield f"the destination is half-written: {sorted(between.files)}"
    if (case.once or row.again == THERE) != is_whole and case.to != REPLACE:
        yield f"the destination is {'' if is_whole else 'not '}finished"
    if row.again == ALL and between.waiting and not case.once:
        yield f"some files are finished: {sorted(between.waiting)}"
    if row.again == PUBLISHES and len(between.waiting) != _shards(good) and not case.once:
        yield f"not all files are finished: {sorted(between.waiting)}"


def _shards(good: State) -> int:
    return sum(name.endswith(".safetensors") for name in good.files)


def _end(case: Case, between: State, last: Ran, is_second: bool, end: State, good: State) -> Iterator[str]:
    """The run that finishes it, and what there is in the end."""
    if last.code != 0:
        yield f"the same command again ends with {last.code}: {last.err[-400:]}"
    for name in good.files | end.files:
        if good.files.get(name) != end.files.get(name):
            yield f"{name} is not that of an undisturbed run"
    if end.commits != 1:
        yield f"it was published {end.commits} times"
    if end.leftovers:
        yield f"there is left: {end.leftovers}"
    if is_second:
        yield from _work_done(case, between, last, good)


def _work_done(case: Case, between: State, second: Ran, good: State) -> Iterator[str]:
    """Only what is not finished is made, and nothing that is staged goes up again."""
    is_there = between.files == good.files and case.to != REPLACE
    wanted = 0 if is_there else _shards(good) - len(between.waiting)
    if len(second.made) != wanted:
        yield f"the same command made {second.made} again, with {sorted(between.waiting)} finished"
    uploads = [request.path for request in second.log if request.method == "PUT"]
    if case.to == HUB and any(sha256 in path for sha256 in between.waiting.values() for path in uploads):
        yield "it uploaded a file again that was on the staging branch"
