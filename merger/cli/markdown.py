"""Plans, problems and results as Markdown, for comments and job summaries. Not here: text for terminals (cli.text)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from merger.card.escape import code, escape_text, fence
from merger.card.facts import vocabulary_facts
from merger.card.licences import judge
from merger.cli.text import plan_doubts, size
from merger.errors import Problem, few
from merger.lock.locked import display_name
from merger.planning.plan import Plan
from merger.run.pipeline import Result
from merger.safety.text import line, visible

IN_BYTES_A_SECOND, OUT_BYTES_A_SECOND = 100_000_000, 50_000_000
"""What the estimate of time takes the Hub to send and to accept: a guess at a runner's luck, and told as one."""

_FRONT_MATTER = re.compile(r"\A\s*---\n.*?\n---\n", re.DOTALL)
_END_OF_HEAD = re.compile(r"\n## (?:Lineage|Method)\n")


def _sentence(text: str) -> str:
    """A sentence of ours with others' names in it; an @ in them calls nobody."""
    return escape_text(text.replace("@", "@\u200b"))


def plan_section(planned: Plan, destination: str | None) -> str:
    """What will be made, of what, and what that takes."""
    return "\n".join([*_models(planned), "", *_costs(planned, destination), *_notes(planned, destination)])


def _models(planned: Plan) -> list[str]:
    rows = [
        (
            code(display_name(model)),
            f"`{model.located.commit[:12]}`" if model.located.commit else "local folder",
            code(model.licence) if model.licence else "not stated",
            size(model.checkpoint.nbytes),
        )
        for model in planned.locked.models
    ]
    return _table(("model", "commit", "licence", "size"), rows)


def _costs(planned: Plan, destination: str | None) -> list[str]:
    used = Counter(job.kind for job in planned.jobs)
    dtypes = ", ".join(dict.fromkeys(job.dtype for job in planned.jobs))
    rows = [
        ("method", ", ".join(f"`{name}` ({count} tensors)" for name, count in used.items())),
        ("result", f"{planned.entries:,} numbers in {dtypes}; {size(planned.size)} in {len(planned.shards)} files"),
        *([("tokens", _sentence(tokens))] if (tokens := vocabulary_facts(planned)) else []),
        ("licence", _licence(planned)),
        ("goes to", code(destination) if destination else "not said yet"),
        ("reads", size(planned.read_bytes)),
        ("memory", f"{size(planned.peak_memory)} at most"),
        ("disk", f"{size(planned.disk(staged=True))} for the Hub, {size(planned.disk(staged=False))} for a folder"),
        ("time", f"about {_minutes(planned)} min, if the Hub sends 100 MB and takes 50 MB a second"),
        ("plan", f"`{planned.hash[:16]}`"),
    ]
    return _table(("", ""), rows)


def _licence(planned: Plan) -> str:
    """The result's, and what the parents' ask."""
    found = judge(planned)
    asks = dict.fromkeys(kind.value for terms in found.duties for kind in terms.asks)
    told = "stated" if found.stated else "proposed, as the strictest that fits"
    return (f"{code(found.name)} ({told})" if found.name else "not settled") + (
        f"; the parents' licences ask: {', '.join(asks)}" if asks else ""
    )


def _minutes(planned: Plan) -> int:
    return 1 + int((planned.read_bytes / IN_BYTES_A_SECOND + planned.size / OUT_BYTES_A_SECOND) / 60)


def _notes(planned: Plan, to: str | None) -> list[str]:
    notes = [f"**Warning:** {_sentence(doubt)}" for doubt in plan_doubts(planned, to)]
    found = judge(planned)
    notes += [f"**Licence:** {_sentence(what)}" for what in (*(each.what for each in found.conflicts), *found.notes)]
    if found.override is not None and found.conflicts:
        notes.append(f"**Published all the same:** {_sentence(found.override)}")
    notes += [f"**Note:** {_sentence(note)}" for note in planned.notes]
    if planned.left_out:
        why = Counter(item.why for item in planned.left_out)
        told = "; ".join(f"{count} tensors: {_sentence(reason)}" for reason, count in why.items())
        notes.append(f"**Left out:** {told}")
    if planned.left_beside:
        reasons = Counter(planned.left_beside.values())
        told = "; ".join(
            f"{code(few([name for name, why in planned.left_beside.items() if why == reason]))}: {_sentence(reason)}"
            for reason in reasons
        )
        notes.append(f"**Files left out:** {told}")
    return [line for note in notes for line in ("", note)]


def problems_section(title: str, problems: Sequence[Problem]) -> str:
    """Errors or warnings, word by word."""
    return f"**{title}**\n\n" + fence("\n".join(str(problem) for problem in problems), "text")


def result_section(result: Result) -> str:
    """What has become of it, and what stands at the top of the card."""
    if result.part is not None:
        return f"Part {result.part} is made: {len(result.shards)} of {result.of} files. `mode: publish` ends it."
    commit = f" at commit `{result.commit}`" if result.commit else ""
    told = "Published" if result.is_new else "Nothing to do: it is already there"
    doubts = "".join(f"\n\n**Warning:** {_sentence(doubt)}" for doubt in result.doubts)
    return f"{told}: {line(result.where)}{commit}{doubts}{_quote(_head(result.card))}"


def _head(card: str) -> str:
    """The card from its title to where the lineage or the method begins."""
    return _END_OF_HEAD.split(_FRONT_MATTER.sub("", card))[0].strip()


def _quote(text: str) -> str:
    return "\n\n" + "\n".join(f"> {each}" for each in visible(text).split("\n")) if text else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
