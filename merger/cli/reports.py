"""What came of comparisons and searches, as text and as data: verify, diff, search; what measuring takes.

Not here: the progress of a merge (text).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.errors import few
from merger.lock.locked import display_name
from merger.models.checkpoint import TensorInfo
from merger.recipe.searched import Searched
from merger.runtime import PACKAGE
from merger.safety.numbers import size
from merger.safety.text import join_lines, line
from merger.statistics.plan import Measurement, estimate_seconds
from merger.verification.diff import Contrast, Side, TensorDiff
from merger.verification.sample import Mismatch
from merger.verification.verify import Report

if TYPE_CHECKING:
    from tqdm import tqdm

    from merger.searching.search import Event, Study
    from merger.searching.trials import Trial

_ROWS_SHOWN = 20
_LOG_SECONDS = 15.0
_MINUTES = 180

# ---- measure --------------------------------------------------------------------------------------------------------


def measurement_text(planned: Measurement, disk: int) -> str:
    """What will be measured of a model, and what that takes; `disk`: at the destination."""
    sequences, length = planned.tokens.shape
    model = planned.locked.models[0]
    at = f" at commit {model.located.commit[:12]}" if model.located.commit else ""
    seconds = estimate_seconds(planned)
    more = f" in blocks of {planned.blocks}" if planned.blocks else ""
    more += " fed by the merge's own layers" if planned.merge else ""
    lines = [
        f"model   {display_name(planned.locked.config_model)}{at}, {len(planned.layers)} layers",
        f"data    {planned.data}: {sequences * length:,} tokens in {sequences:,} sequences of {length:,}",
        f"makes   {planned.kind}{more}, {sum(len(shard.tensors) for shard in planned.shards)} tensors in "
        f"{len(planned.shards)} files, {size(planned.size)}",
        f"reads   {size(planned.read_bytes)}",
        f"memory  {size(planned.peak_memory)} at most, with {planned.threads} threads",
        f"disk    {size(disk)} for the files, and {size(planned.spool)} for hidden states on the way",
        f"time    about {seconds:,.0f} s" if seconds < _MINUTES else f"time    about {seconds / 60:,.0f} minutes",
    ]
    return join_lines([*lines, *(f"note    {note}" for note in planned.notes)])


def measurement_json(planned: Measurement) -> dict[str, Any]:
    """The same for machines."""
    return {
        "model": display_name(planned.locked.config_model), "kind": planned.kind, "data": planned.data,
        "tokens": planned.tokens.size, "size": planned.size, "spool": planned.spool,
        "peak_memory": planned.peak_memory, "seconds": round(estimate_seconds(planned), 1),
    }  # fmt: skip


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


# ---- search ---------------------------------------------------------------------------------------------------------


class Trials:
    """How far a search is: a line for each trial that is the best so far, and how many are done.

    Args:
        searched: what is searched.
    """

    def __init__(self, searched: Searched) -> None:
        self._searched, self._done, self._told = searched, 0, time.monotonic()
        self._bar: tqdm[Any] | None = None

    def show(self, event: Event) -> None:
        """Tell of one event."""
        from merger.searching.search import Reporting, Searching, Tried

        if isinstance(event, Searching):
            self._begin(len(event.work.trials()), event.arithmetic)
        elif isinstance(event, Tried):
            self._tried(event.trial, event.is_best)
        elif isinstance(event, Reporting):
            self._end()
            self._say(f"scoring {event.model} on what no trial has seen")

    def _begin(self, done: int, arithmetic: str) -> None:
        searched, self._done = self._searched, done
        goes_on = f"{f', of which {done} are done' if done else ''}; scored in {arithmetic}"
        names, scores = ", ".join(searched.variables), ", ".join(each.label for each in searched.objectives)
        self._say(
            f"searching {len(searched.variables)} numbers by {searched.sampler}, {searched.trials} trials{goes_on}"
        )
        self._say(f"{'trial':>6}  {scores}  {names}")
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=searched.trials, initial=done, unit="trial", file=sys.stderr, dynamic_ncols=True)

    def _tried(self, trial: Trial, is_best: bool) -> None:
        self._done += 1
        if is_best:
            self._say(trial_line(trial, self._searched))
        if self._bar is not None:
            self._bar.update(1)
        elif time.monotonic() - self._told >= _LOG_SECONDS:
            self._told = time.monotonic()
            self._say(f"{self._done} of {self._searched.trials} trials, {trial.seconds:.1f} s for the last one")

    def _say(self, words: str) -> None:
        if self._bar is not None:
            self._bar.write(line(words), file=sys.stderr)
        else:
            print(line(words), file=sys.stderr, flush=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def trial_line(trial: Trial, searched: Searched) -> str:
    """One trial in a row: its number, scores and values."""
    scores = ", ".join(f"{score:.5g}" for score in trial.scores)
    return f"{trial.number:6}  {scores}  {', '.join(map(str, searched.settle(trial.drawn).values()))}"


def study_text(study: Study, written: Sequence[Path]) -> str:
    """What was found, how it does on what no trial has seen, and where it lies."""
    from merger.searching.search import NOISE

    states = [trial.state for trial in study.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    lines = ["", f"{study.why}: {counts}; best is trial {study.best[0].number}"]
    width = max(map(len, study.values))
    lines += [f"  {name:{width}}  {value}" for name, value in study.values.items()]
    told = [told for row in study.report for told in row.told()]
    lines += [f"warning: {each}" if each.endswith(NOISE) else each for each in told]
    if not study.report:
        lines.append("warning: without report: in the recipe nothing tells how it does on what no trial has seen")
    return join_lines([*lines, *(f"wrote {path}" for path in written)])


def study_json(study: Study, written: Sequence[Path]) -> dict[str, Any]:
    """The same for machines."""
    return {
        "why": study.why,
        "trials": len(study.trials),
        "best": [{**asdict(trial), "values": study.aims.searched.settle(trial.drawn)} for trial in study.best],
        "report": {row.objective: {name: score.value for name, score in row.scores.items()} for row in study.report},
        "told": [told for row in study.report for told in row.told()],
        "importance": dict(study.importance),
        "files": [str(path) for path in written],
    }
