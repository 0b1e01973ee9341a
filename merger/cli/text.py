"""Problems, plans and events as text for a terminal or a log. Not here: what they mean, and reading arguments (cli)."""

from __future__ import annotations

import sys
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from merger.card.facts import PlanSummary
from merger.card.licences import Judgement
from merger.card.relations import Loss, Relation, Relations
from merger.distributed.start import PartMade, PartStarted
from merger.errors import MergerError, Problem, few
from merger.evaluation.budget import evaluation_memory
from merger.evaluation.evaluate import Measured, Measuring
from merger.lock.locked import display_name
from merger.methods.registry import Method, Param
from merger.planning.plan import Plan
from merger.run.pipeline import Result, Resumed
from merger.safety.numbers import size
from merger.safety.text import join_lines, line

if TYPE_CHECKING:
    from tqdm import tqdm

    from merger.run.doctor import Finding
    from merger.run.pipeline import Event
    from merger.stores.ports import Leftover, Published
    from merger.verification.rerender import Recarded

_LOG_SECONDS = 15.0


def format_problems(error: MergerError) -> str:
    """A refusal as the user sees it."""
    return "\n".join(str(problem) for problem in error.problems)


def warning(problem: Problem) -> str:
    """A warning, told from a refusal by its first word."""
    return f"warning: {problem}"


def plan_text(found: PlanSummary) -> str:
    """What will be made of what, what it takes, what is left out, and under which licence."""
    made = [*_models(found), "", *_making(found), "", *_costs(found), *_accounting(found)]
    doubts = [each for doubt in found.doubts for each in ("", f"warning: {doubt}")]
    return join_lines([*made, *_licence(found.licence), *doubts])


def plan_json(found: PlanSummary) -> dict[str, Any]:
    """The same for machines, and each tensor."""
    licence = found.licence
    about = {
        "license": licence.name or None,
        "stated": licence.stated,
        "conflicts": [conflict.what for conflict in licence.conflicts],
        "override": licence.override,
        "notes": licence.notes,
        "asks": {terms.name: [kind.value for kind in terms.asks] for terms in licence.duties},
    }
    return {**found.plan.as_json(), "licence": about, "warnings": found.doubts}


def _licence(found: Judgement) -> list[str]:
    """The result's licence, what it and others ask, and what speaks against it."""
    lines = ["", f"licence {found.name or 'not settled'}{'' if found.stated or not found.name else ' (proposed)'}"]
    width = max((len(terms.name) for terms in found.duties), default=0)
    asked = [(terms.name, ", ".join(kind.value for kind in terms.asks) or "nothing") for terms in found.duties]
    lines += [f"  {licence:{width}}  {asks}" for licence, asks in asked]
    if found.override is not None and found.conflicts:
        lines.append(f"  published all the same: {found.override}")
    warnings = [*(conflict.what for conflict in found.conflicts), *found.notes]
    return [*lines, *(f"warning: {what}" for what in warnings)]


def _models(found: PlanSummary) -> list[str]:
    lines = ["models"]
    width = max(len(display_name(model)) for model in found.plan.locked.models)
    for model in found.models:
        if isinstance(model, int):
            lines.append(f"  and {model} more like them")
            continue
        commit = model.located.commit[:12] if model.located.commit else "local folder"
        held = f"{len(model.checkpoint.tensors)} tensors, {size(model.checkpoint.nbytes)}"
        lines.append(f"  {display_name(model):{width}}  {commit}  {model.licence or 'licence not stated'}  {held}")
    return lines


def _making(found: PlanSummary) -> list[str]:
    planned, dtypes = found.plan, ", ".join(found.dtypes)
    methods = ", ".join(f"{name} {count}" for name, count in found.methods.items())
    stages = ", ".join(f"{stage.name} ({len(stage.jobs)} tensors)" for stage in planned.locked.stages)
    return [
        *([f"by way  of {stages}, none of which is stored"] if stages else []),
        f"makes   {len(planned.jobs)} tensors ({methods}), {planned.entries:,} numbers in {dtypes}",
        *([_safetensors(planned)] if planned.locked.recipe.publish.safetensors else []),
        *(f"gguf    {file}, {size(nbytes)}" for file, nbytes in planned.gguf.items()),
        *([f"tokens  {found.tokens}"] if found.tokens else []),
        *(f"note    {note}" for note in planned.notes),
        f"plan    {planned.hash[:16]}, seed {planned.seed}",
    ]


def _safetensors(planned: Plan) -> str:
    count, nbytes = len(planned.shards), size(planned.size - sum(planned.gguf.values()))
    beside = f"config and {len(planned.texts.taken)} side files from {display_name(planned.locked.config_model)}"
    return f"files   {count} of safetensors, {nbytes}; {beside}"


def _costs(found: PlanSummary) -> list[str]:
    planned = found.plan
    return [
        f"reads   {size(planned.read_bytes)}",
        f"memory  {size(planned.peak_memory)} at most, with {planned.threads} threads",
        f"disk    {found.disk}",
        *_measuring(planned),
        *(f"{'        ' if place else 'first   '}{told}" for place, told in enumerate(search_facts(planned))),
    ]


def _measuring(planned: Plan) -> list[str]:
    """What the result is tried on, and what that takes."""
    wanted = planned.locked.recipe.evaluate
    if wanted is None:
        return []
    tried = ", ".join([*(f"perplexity of {text.text}" for text in wanted.perplexity), *wanted.tasks])
    whose = "the merge and its parents" if wanted.parents else "the merge"
    return [f"then    measures {whose}: {tried}; about {size(evaluation_memory(planned))} of memory"]


def search_memory(planned: Plan) -> int:
    """About how many bytes a search of the plan's recipe holds at once."""
    from merger.searching.candidates import trial_memory
    from merger.searching.objectives import batch_tokens

    vocabulary = planned.config.get("vocab_size")
    return trial_memory(planned, batch_tokens(vocabulary if isinstance(vocabulary, int) else 0))


def search_facts(planned: Plan) -> list[str]:
    """What is searched before all of that, by what it is judged, and what a candidate takes."""
    searched = planned.locked.recipe.search
    if searched is None:
        return []
    judged, open_ = ", ".join(objective.label for objective in searched.objectives), searched.variables
    return [
        f"{searched.trials} candidates ({searched.sampler}), judged by {judged}",
        f"{len(open_)} number{'s' if len(open_) > 1 else ''}: {', '.join(open_)}",
        f"each makes up to {size(planned.nbytes)} in memory; about {size(search_memory(planned))} in all",
    ]


def _accounting(found: PlanSummary) -> Iterator[str]:
    """Copied and left-out tensors and files by reason, so that nothing is lost in silence."""
    base = display_name(found.plan.locked.config_owner)
    left = {f"{model}: {why}": names for (model, why), names in found.left_out.items()}
    left |= {f"{base}: {why}": names for why, names in found.left_beside.items()}
    for title, groups in (("copied", found.copied), ("left out", left)):
        yield from ["", title] if groups else []
        yield from (f"  {few(names)}: {why}" for why, names in groups.items())


def finding_text(found: Finding) -> str:
    """One thing that `merger doctor` looked at, with the next step below where something is lacking."""
    return join_lines([f"{found.what:10} {found.found}", *([f"{'':10}   {found.hint}"] if found.hint else [])])


def relations_text(related: Relations) -> str:
    """How the parents relate."""
    return join_lines(["", "parents", *(_relation_text(row) for row in (*related.overall, *related.layers))])


def _relation_text(row: Relation) -> str:
    cosine = "none" if row.cosine is None else f"{row.cosine:.2f}"
    sizes = ", ".join(f"{norm:.2f}" for norm in row.norms)
    return f"  {row.where}: cosine {cosine}, opposite signs {row.opposition:.0%}, sizes {sizes}"


# ---- methods --------------------------------------------------------------------------------------------------------


def methods_text(table: Sequence[Method], start: Container[str]) -> str:
    """A line for each method, with a star for those with which to begin."""
    width = max(len(method.name) for method in table)
    return "\n".join(
        f"{'★' if method.name in start else ' '} {method.name:{width}}  {method.summary}" for method in table
    )


def method_text(method: Method) -> str:
    """All about one method: what it computes, its parameters, its paper."""
    lines = [
        f"{method.title} ({method.name})",
        "",
        method.description,
        "",
        f"models: {models_text(method)}",
        "",
        "parameters:",
    ]
    lines += [_param(param) for param in method.params] or ["  none"]
    if method.paper:
        paper = method.paper
        lines += ["", f"{paper.by} ({paper.year}), {paper.title}", paper.url]
    return "\n".join(lines)


def models_text(method: Method) -> str:
    """How many models a method takes, and what the base model is to it."""
    least, most = method.models
    count = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    return count + _BASES[method.base]


_BASES = {
    "unused": "",
    "first": ", one of them the base_model",
    "subtracted": " and a base_model",
    "optional": ", and a base_model if wanted",
    "included": ", the base_model being one more",
}


def _param(param: Param) -> str:
    default = "required" if param.required else f"default {str(param.default).lower()}"
    scope = "a number for each model" if param.per_model else param.kind
    bounds = f", {param.bounds}" if param.bounds else ""
    return f"  {param.name} ({scope}{bounds}, {default}): {param.description}"


# ---- progress -------------------------------------------------------------------------------------------------------


class Progress:
    """How far a run is: a bar with bytes and time left on a terminal, a line now and then in a log.

    Args:
        total: the bytes that will be made.
        stream: where it is shown; None: standard error as it is now.
        doing: what is done with them, in a word.
    """

    def __init__(self, total: int, stream: TextIO | None = None, doing: str = "merging") -> None:
        stream = stream or sys.stderr
        self._total, self._stream, self._doing = total, stream, doing
        self._made = 0
        self._start = self._told = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=doing, file=stream, dynamic_ncols=True)

    def add(self, nbytes: int) -> None:
        """Some more bytes are made."""
        self._made += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif time.monotonic() - self._told >= _LOG_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        passed = self._told - self._start
        left = passed * (self._total - self._made) / max(1, self._made)
        share = self._made / max(1, self._total)
        print(
            f"{self._doing}: {size(self._made)} of {size(self._total)} ({share:.0%}), {left:.0f} s left",
            file=self._stream,
            flush=True,
        )

    def say(self, line: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def show(event: Event | PartStarted | PartMade, progress: Progress) -> None:
    """Tell of one event of a run."""
    from merger.engine.execute import BytesWritten

    if isinstance(event, (BytesWritten, PartMade)):
        progress.add(event.nbytes)
    for words in event_words(event):
        progress.say(line(words))


def event_words(event: Event | PartStarted | PartMade) -> Iterator[str]:
    """The lines that an event is worth."""
    from merger.engine.execute import ShardDone

    if isinstance(event, PartStarted):
        yield f"part {event.part} is started: {event.where}"
    elif isinstance(event, PartMade):
        yield f"part {event.part} is made: {size(event.nbytes)} by {event.where}"
    elif isinstance(event, Measuring):
        yield f"measuring {event.model or 'the merge'}"
    elif isinstance(event, Measured):
        yield from (f"  {score.task}: {score.metric} {score.value:.4g}" for score in event.scores)
    elif isinstance(event, Resumed):
        yield f"{event.shards} of {event.of} files are there from an earlier run or another part"
    elif isinstance(event, ShardDone):
        yield f"made {event.shard.name} ({size(event.shard.size)}, sha256 {event.shard.sha256[:12]})"


def file_done(event: Event) -> bool:
    """Whether a file of the result has just been finished: a run may be left here, and nothing is lost."""
    from merger.engine.execute import ShardDone

    return isinstance(event, ShardDone)


# ---- the end --------------------------------------------------------------------------------------------------------


def result_text(result: Result) -> str:
    """What has become of it."""
    doubts = [f"warning: {doubt}" for doubt in result.doubts]
    if result.part is not None:
        files = f"{len(result.shards)} of {result.of} files"
        return join_lines([*doubts, f"part {result.part} is there: {files}; after all parts: merger publish"])
    commit = f" at commit {result.commit[:12]}" if result.commit else ""
    what = "merged into" if result.is_new else "nothing to do: it is already"
    return join_lines([*doubts, *_losses(result.losses), f"{what} {result.where}{commit}"])


def _losses(losses: Sequence[Loss]) -> list[str]:
    lines = [f"  {loss.where}: {loss.error:.2%}" for loss in losses]
    return ["left out of the matrices, as a share of their norm", *lines] if lines else []


def as_json(result: Result) -> dict[str, Any]:
    """The same for machines."""
    if result.part is not None:
        return {"part": str(result.part), "shards": len(result.shards), "of": result.of, "doubts": result.doubts}
    return {
        "new": result.is_new,
        "shards": [asdict(shard) for shard in result.shards],
        "doubts": result.doubts,
        "losses": {loss.where: loss.error for loss in result.losses},
        "where": result.where,
        "commit": result.commit,
    }


def card_result_text(made: Recarded, kept: Published | None) -> str:
    """What has become of a card."""
    if kept is None:
        return line(f"nothing to do: the card of {made.merge.located.name} is the same")
    return line(f"wrote the card of {kept.where}{f' at commit {kept.commit[:12]}' if kept.commit else ''}")


def leftovers_text(to: str, found: Sequence[Leftover]) -> str:
    """What is there of unfinished runs."""
    lines = [
        f"{item.where}: {item.shards} finished files, {size(item.nbytes)}{', a run is at work' if item.busy else ''}"
        for item in found
    ]
    return join_lines(lines or [f"{to}: no unfinished run"])
