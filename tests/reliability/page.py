"""docs/reliability.md, written from the rows that the tests try by `python tests/reliability/page.py`.

Not here: trying them (trial), and comparing the page with the rows (tests/run/test_reliability.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reliability.rows import BYTES, DISK, KILLED, ROWS, TROUBLE, Row
from reliability.scene import ROOT

PAGE = ROOT / "docs" / "reliability.md"

HEAD = """\
# When something goes wrong

Written from `tests/reliability` by `make tables`; `tests/run/test_reliability.py` tries it.

A run makes the result file by file. On the way to the Hub each finished file is uploaded and put on a branch of its
own, `merge-staging/...`; on the way to a folder it lies in `FOLDER.merging` beside the destination. Only when all files
are there does the result appear: on the Hub by one commit on main, which copies the files on the server; in a folder
when it gets its name. Until then main, or the folder, is as it was.

So there is one thing to do after any trouble: **give the same command again**. It finds what is finished, on any
machine, makes what is missing, and ends with the bytes of a run that nothing had disturbed: shards, config, tokenizer
and card. What is finished is neither made nor uploaded again. If the result is there already, the command says so. In
the end no staging branch, no work folder and no temporary file is left, not even of the run that was killed (its
temporary files go if the second run is on the same machine).

Passing trouble needs no second command: a run asks again after a pause, as long as the server wishes (`Retry-After`, up
to five minutes). No request waits for ever: half a minute without a byte while tensors are read, two and a half minutes
for any other answer. `merger status DEST` shows what is left of unfinished runs, `merger clean DEST --yes` removes it.

In every case below, besides what its line says, the test looks at this: the destination after the trouble is as before
or whole; the second run finishes; each file has the SHA-256 of an undisturbed run; main has exactly one commit more; no
file that was staged is uploaded again; nothing is left over; no traceback, token or signed address is printed. The runs
are the real command over real HTTP against a Hub on the loopback interface, in four files, by TIES, which reads each
tensor twice. The test suite tries some cases of each line, `make reliability` all of them.
"""

FOOT = """
## The Space is killed, or twenty come at once

Killed by SIGKILL in the middle of a merge and started again, the Space has the job, which goes on when its owner is
back and publishes the bytes of an undisturbed run. Of twenty users who submit at the same moment each is served or told
their place, none sees another's, and nothing is lost: on two cores with two workers all had submitted within 3 s, and
their merges of tiny models were done within 18 to 23 s (five runs); page, fork server and workers together took 1.05 GB
at most, where limit and plans allow 3.2 GB. tests/space tries both (`test_twenty_at_once` prints its figures).

## Not covered

- **The real Hub.** The loopback Hub does what the real one's documentation says, and has no Xet.
- **Loss of power.** Files are not forced to the disk one by one. A shard in a folder is gone on from only if its
  SHA-256 is right, but the notes and small files beside it are taken as they are.
- **A connection that trickles.** One that brings a byte now and then is waited for.
- **Somebody else at work.** If main moves during a run, it refuses to publish (exit code 6) and says what to do; that,
  and two runs at one destination, have tests of their own.
- **Python's own trial.** Its `tempfile` writes a few bytes to see whether it can. A run killed right then leaves them.
- **The moment between two renames.** The folder that `--force` replaces is moved aside just before the new one gets its
  name. A run killed right there leaves nothing under that name; the same command then puts the new one there.
"""


def text(rows: Sequence[Row]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *killed(rows), *trouble(rows), *spoilt(rows), *disk(rows)]) + FOOT


def killed(rows: Iterable[Row]) -> list[str]:
    """Where a run is killed, and how it goes on."""
    mine = [(row.what, row.tried, row.again) for row in rows if row.table == KILLED]
    told = "By SIGKILL, so that it cannot say or do anything."
    return ["## The run is killed", "", told, "", table(("when", "tried at", "the same command again"), mine), ""]


def trouble(rows: Iterable[Row]) -> list[str]:
    """What is said when the Hub does not answer."""
    mine = [(row.what, *outcome(row)) for row in rows if row.table == TROUBLE]
    told = """\
Each request answers 500, 503 or 429, or ends without an answer, or stands still. **Once**, or if what was asked is done
and only the answer is lost: the run asks again and finishes. A commit whose answer is lost is looked for in the history
before it is made again. **For good**, the run ends:"""
    head = ("when", "exit code", "what it says", "the same command again")
    return ["## The Hub is in trouble", "", told, "", table(head, mine), ""]


def spoilt(rows: Iterable[Row]) -> list[str]:
    """What is said when other bytes come than those asked for."""
    mine = [(row.what, *outcome(row)) for row in rows if row.table == BYTES]
    told = "While tensors are read. **Once**: the run asks again and finishes. **For good**, it ends:"
    head = ("what comes", "exit code", "what it says", "the same command again")
    return ["## The bytes are not the right ones", "", told, "", table(head, mine), ""]


def disk(rows: Iterable[Row]) -> list[str]:
    """What is said when a disk is full."""
    mine = [(row.what, *outcome(row)) for row in rows if row.table == DISK]
    told = "Somebody else fills a disk of 1 MiB; before the second run there is room again."
    head = ("the disk of", "exit code", "what it says", "the same command again")
    return ["## A disk is full", "", told, "", table(head, mine), ""]


def outcome(row: Row) -> tuple[str, str, str]:
    """A row's exit code, sentences and what follows."""
    said = " *or* ".join(f"`{words}`" for words in row.says) or "nothing: the run finishes"
    return str(row.code), said, row.again if row.code else "is not needed"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    PAGE.write_text(text(ROWS), "utf-8")
