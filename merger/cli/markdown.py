"""Plans, problems and results as Markdown, for comments and job summaries. Not here: text for terminals (cli.text)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from merger.card.escape import code, escape_text, fence
from merger.card.facts import PlanSummary
from merger.card.licences import Judgement
from merger.cli.text import size
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


def plan_section(found: PlanSummary) -> str:
    """What will be made, of what, and what that takes."""
    return "\n".join([*_models(found.plan), "", *_costs(found), *_notes(found)])


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


def _costs(found: PlanSummary) -> list[str]:
    planned, dtypes = found.plan, ", ".join(found.dtypes)
    rows = [
        ("method", ", ".join(f"`{name}` ({count} tensors)" for name, count in found.methods.items())),
        ("result", f"{planned.entries:,} numbers in {dtypes}; {size(planned.size)} in {len(planned.shards)} files"),
        *([("tokens", _sentence(found.tokens))] if found.tokens else []),
        ("licence", _licence(found.licence)),
        ("goes to", code(found.to) if found.to else "not said yet"),
        ("reads", size(planned.read_bytes)),
        ("memory", f"{size(planned.peak_memory)} at most"),
        ("disk", f"{size(planned.disk(staged=True))} for the Hub, {size(planned.disk(staged=False))} for a folder"),
        ("time", f"about {_minutes(planned)} min, if the Hub sends 100 MB and takes 50 MB a second"),
        ("plan", f"`{planned.hash[:16]}`"),
    ]
    return _table(("", ""), rows)


def _licence(found: Judgement) -> str:
    """The result's, and what the parents' ask."""
    asks = dict.fromkeys(kind.value for terms in found.duties for kind in terms.asks)
    told = "stated" if found.stated else "proposed, as the strictest that fits"
    return (f"{code(found.name)} ({told})" if found.name else "not settled") + (
        f"; the parents' licences ask: {', '.join(asks)}" if asks else ""
    )


def _minutes(planned: Plan) -> int:
    return 1 + int((planned.read_bytes / IN_BYTES_A_SECOND + planned.size / OUT_BYTES_A_SECOND) / 60)


def _notes(found: PlanSummary) -> list[str]:
    licence = found.licence
    notes = [f"**Warning:** {_sentence(doubt)}" for doubt in found.doubts]
    against = [*(each.what for each in licence.conflicts), *licence.notes]
    notes += [f"**Licence:** {_sentence(what)}" for what in against]
    if licence.override is not None and licence.conflicts:
        notes.append(f"**Published all the same:** {_sentence(licence.override)}")
    notes += [f"**Note:** {_sentence(note)}" for note in found.plan.notes]
    if found.left_out:
        counts = Counter[str]()
        for (_, why), names in found.left_out.items():
            counts[why] += len(names)
        told = "; ".join(f"{count} tensors: {_sentence(why)}" for why, count in counts.items())
        notes.append(f"**Left out:** {told}")
    if found.left_beside:
        told = "; ".join(f"{code(few(names))}: {_sentence(why)}" for why, names in found.left_beside.items())
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
