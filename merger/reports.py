"""What came of comparisons, as text for a terminal and as data: verify. Not here: progress and problems (console)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from merger.console import few, size
from merger.plan.lockfile import OURS
from merger.plan.proof import Difference
from merger.verify import Report


def report_text(report: Report) -> str:
    """What of a merge was compared, and what is not as promised."""
    at = f" at commit {report.commit[:12]}" if report.commit else ""
    share = report.read / max(1, report.of)
    lines = [
        f"{report.model}{at}: made with merger {report.made_with.get(OURS, '(unknown)')}, plan {report.plan[:16]}",
        f"compared  {_compared(report)}",
        f"read      {size(report.read)} of models and result, {share:.1%} of what --all reads",
    ]
    if report.left_out:
        lines.append(f"left out  {few(report.left_out)}: too many bytes for a sample (see --tensors and --all)")
    lines += [*map(str, report.problems), *map(_difference_text, report.differences)]
    lines += [f"note: {doubt}" for doubt in report.doubts]
    return "\n".join([*lines, _verdict(report)])


def _compared(report: Report) -> str:
    numbers = sum(piece.stop - piece.start for piece in report.compared)
    tensors = len({piece.tensor for piece in report.compared})
    drawn = "" if report.seed is None else f" (a sample, seed {report.seed})"
    return f"{numbers:,} of {report.entries:,} numbers, in {tensors} of {report.tensors} tensors{drawn}"


def _difference_text(found: Difference) -> str:
    return (
        f"{found.file}: tensor {found.tensor} is another one: entry {found.entry} is {found.found}, made again it is "
        f"{found.expected} ({found.count:,} of {found.compared:,} compared entries differ)"
    )


def _verdict(report: Report) -> str:
    if report.passed:
        return "the same: all that was compared"
    differ = len(report.differences)
    return (
        f"NOT THE SAME: {differ} of the tensors that were compared differ" if differ else "NOT AS PROMISED: see above"
    )


def report_json(report: Report) -> dict[str, Any]:
    """The same for machines."""
    return {"passed": report.passed, **asdict(report)}
