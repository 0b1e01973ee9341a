"""Plans, problems and results as Markdown, for comments and job summaries. Not here: text for terminals (console)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from merger.card.licences import licence_note
from merger.card.lineage import shown
from merger.card.relations import same_models, strange_adapters
from merger.card.render import escaped, fenced
from merger.console import size
from merger.errors import Problem
from merger.plan.plan import Plan
from merger.run import Done, PartDone

IN_BYTES_A_SECOND, OUT_BYTES_A_SECOND = 100_000_000, 50_000_000
"""What the estimate of time takes the Hub to send and to accept: a guess at a runner's luck, and told as one."""

_FRONT_MATTER = re.compile(r"\A\s*---\n.*?\n---\n", re.DOTALL)


def code(text: str) -> str:
    """Words of others in a cell or a line: no Markdown, no mention, no HTML comes of them.

    >>> code("a`b|c")
    '`` a`b\\\\|c ``'
    """
    flat = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", flat)), default=0) + 1)
    return f"{fence} {flat} {fence}" if "`" in flat else f"`{flat}`"


def _told(text: str) -> str:
    """A sentence of ours with others' names in it; an @ in them calls nobody."""
    return escaped(text).replace("@", "@\u200b")


def plan_section(planned: Plan, destination: str | None) -> str:
    """What will be made, of what, and what that takes."""
    return "\n".join([*_models(planned), "", *_costs(planned, destination), *_notes(planned)])


def _models(planned: Plan) -> list[str]:
    rows = [
        (
            code(shown(model)),
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
        ("goes to", code(destination) if destination else "not said yet"),
        ("reads", size(planned.read_bytes)),
        ("memory", f"{size(planned.peak_memory)} at most"),
        ("disk", f"{size(planned.disk(staged=True))} for the Hub, {size(planned.disk(staged=False))} for a folder"),
        ("time", f"about {_minutes(planned)} min, if the Hub sends 100 MB and takes 50 MB a second"),
        ("plan", f"`{planned.hash[:16]}`"),
    ]
    return _table(("", ""), rows)


def _minutes(planned: Plan) -> int:
    return 1 + int((planned.read_bytes / IN_BYTES_A_SECOND + planned.size / OUT_BYTES_A_SECOND) / 60)


def _notes(planned: Plan) -> list[str]:
    notes = [f"**Warning:** {_told(doubt)}" for doubt in (*same_models(planned), *strange_adapters(planned))]
    if note := licence_note(planned):
        notes.append(f"**Licence:** {_told(note)}")
    if planned.left_out:
        why = Counter(item.why for item in planned.left_out)
        told = "; ".join(f"{count} tensors: {_told(reason)}" for reason, count in why.items())
        notes.append(f"**Left out:** {told}")
    return [line for note in notes for line in ("", note)]


def problems_section(title: str, problems: Sequence[Problem]) -> str:
    """Errors or warnings, word by word."""
    return f"**{title}**\n\n" + fenced("\n".join(str(problem) for problem in problems), "text")


def result_section(done: Done | PartDone) -> str:
    """What has become of it, and what stands at the top of the card."""
    if isinstance(done, PartDone):
        return f"Part {done.part} is made: {done.shards} of {done.of} files. `mode: publish` ends it."
    commit = f" at commit `{done.published.commit}`" if done.published.commit else ""
    told = "Published" if done.is_new else "Nothing to do: it is already there"
    doubts = "".join(f"\n\n**Warning:** {_told(doubt)}" for doubt in done.doubts)
    return f"{told}: {done.published.where}{commit}{doubts}{_quoted(_head(done.card))}"


def _head(card: str) -> str:
    """The card from its title to its second section."""
    return _FRONT_MATTER.sub("", card).partition("\n## Method")[0].strip()


def _quoted(text: str) -> str:
    return "\n\n" + "\n".join(f"> {line}" for line in text.splitlines()) if text else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
