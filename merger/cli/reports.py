"""What came of comparisons, as text and as data: verify and diff; what measuring takes. Not here: progress (text)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from merger.errors import few
from merger.lock.locked import display_name
from merger.models.checkpoint import TensorInfo
from merger.runtime import PACKAGE
from merger.safety.numbers import size
from merger.safety.text import join_lines
from merger.statistics.plan import Measurement, estimate_seconds
from merger.verification.diff import Contrast, Side, TensorDiff
from merger.verification.sample import Mismatch
from merger.verification.verify import Report

_ROWS_SHOWN = 20
_MINUTES = 180

# ---- measure --------------------------------------------------------------------------------------------------------


def measurement_text(planned: Measurement, disk: int) -> str:
    """What will be measured of a model, and what that takes; `disk`: at the destination."""
    sequences, length = planned.tokens.shape
    model = planned.locked.models[0]
    at = f" at commit {model.located.commit[:12]}" if model.located.commit else ""
    seconds = estimate_seconds(planned)
    lines = [
        f"model   {display_name(planned.locked.config_model)}{at}, {len(planned.layers)} layers",
        f"data    {planned.data}: {sequences * length:,} tokens in {sequences:,} sequences of {length:,}",
        f"makes   {planned.kind}, {sum(len(shard.tensors) for shard in planned.shards)} tensors in "
        f"{len(planned.shards)} files, {size(planned.size)}",
        f"reads   {size(planned.read_bytes)}",
        f"memory  {size(planned.peak_memory)} at most, with {planned.threads} threads",
        f"disk    {size(disk)} for the files, and {size(planned.spool)} for hidden states on the way",
        f"time    about {seconds:,.0f} s" if seconds < _MINUTES else f"time    about {seconds / 60:,.0f} minutes",
    ]
    return join_lines([*lines, *(f"note    {note}" for note in planned.notes)])


# ---- verify ---------------------------------------------------------------------------------------------------------


def report_text(report: Report) -> str:
    """What of a merge was compared, and what is not as promised."""
    at = f" at commit {report.commit[:12]}" if report.commit else ""
    share = report.read / max(1, report.of)
    lines = [
        f"{report.model}{at}: made with merger {report.made_with.get(PACKAGE, '(unknown)')}, plan {report.plan[:16]}",
        f"compared  {_compared_line(report)}",
        f"read      {size(report.read)} of models and result, {share:.1%} of what --all reads",
    ]
    if report.left_out:
        lines.append(f"left out  {few(report.left_out)}: too many bytes for a sample (see --tensors and --all)")
    lines += [each for problem in report.problems for each in str(problem).splitlines()]
    lines += [
        *map(_difference_text, report.differences),
        *(f"note: {each}" for each in (*report.notes, *report.doubts)),
    ]
    return join_lines([*lines, _verdict(report)])


def _compared_line(report: Report) -> str:
    numbers = sum(piece.stop - piece.start for piece in report.compared)
    tensors = len({piece.tensor for piece in report.compared})
    drawn = "" if report.seed is None else f" (a sample, seed {report.seed})"
    return f"{numbers:,} of {report.entries:,} numbers, in {tensors} of {report.tensors} tensors{drawn}"


def _difference_text(found: Mismatch) -> str:
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


# ---- diff -----------------------------------------------------------------------------------------------------------


def contrast_text(found: Contrast) -> str:
    """What only one of the two has; and of what both have the most different tensors, and the layers."""
    lines = [f"A  {_side(found.one)}", f"B  {_side(found.other)}"]
    if found.same:
        return join_lines([*lines, f"the same: all {len(found.tensors)} tensors, bit for bit"])
    for side, names in (("A", found.only_one), ("B", found.only_other)):
        lines += [f"only in {side}: {len(names)} tensors, {few(names)}"] if names else []
    lines += [f"two shapes: {name} is {_shape(one)} in A, {_shape(other)} in B" for name, one, other in found.shapes]
    lines += [f"NOT THE SAME: {found.differing} of {len(found.tensors)} tensors that both have differ"]
    others = [row for row in found.tensors if row.distance.differing or len(set(row.dtypes)) > 1]
    more = f", the first {_ROWS_SHOWN} of {len(others)}" if len(others) > _ROWS_SHOWN else ""
    lines += ["", *_table(f"tensor{more}", others[:_ROWS_SHOWN])]
    return join_lines([*lines, "", *_table("layer", [row for row in found.layers if row.distance.differing])])


def _side(side: Side) -> str:
    at = f" at commit {side.located.commit[:12]}" if side.located.commit else ""
    return f"{side.located.name}{at}: {len(side.tensors)} tensors"


def _shape(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _table(title: str, rows: Sequence[TensorDiff]) -> Iterator[str]:
    width = max(len(title), *(len(row.name) for row in rows), 0)
    if rows:
        yield f"{title:{width}}  relative   max abs    cosine     differ"
    for row in rows:
        far = row.distance
        numbers = "  ".join(f"{_number(value):9}" for value in (far.relative, far.largest, far.cosine))
        kinds = "" if len(set(row.dtypes)) < 2 else f"  {' in A, '.join(row.dtypes)} in B"
        yield f"{row.name:{width}}  {numbers}  {far.differing / max(1, far.entries):.2%}{kinds}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def contrast_json(found: Contrast) -> dict[str, Any]:
    """The same for machines; null where a number is none or not finite."""
    return {
        "same": found.same,
        "a": {"model": found.one.located.name, "commit": found.one.located.commit, "only": found.only_one},
        "b": {"model": found.other.located.name, "commit": found.other.located.commit, "only": found.only_other},
        "shapes": [{"tensor": name, "a": _shape(one), "b": _shape(other)} for name, one, other in found.shapes],
        "tensors": [{"tensor": row.name, "dtypes": row.dtypes, **_numbers(row)} for row in found.tensors],
        "layers": [{"layer": row.name, **_numbers(row)} for row in found.layers],
    }


def _numbers(row: TensorDiff) -> dict[str, float | None]:
    far = row.distance
    values = {"relative": far.relative, "max_abs": far.largest, "cosine": far.cosine}
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
    return {**finite, "differing": far.differing, "entries": far.entries}
