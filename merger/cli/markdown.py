"""Plans, problems and results as Markdown, for comments and job summaries. Not here: text for terminals (cli.text)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from merger.card.escape import code, fence, link_address, prose
from merger.card.facts import PlanSummary
from merger.card.licences import Judgement
from merger.card.relations import parameters
from merger.errors import Problem, few
from merger.lock.locked import LockedModel, display_name
from merger.methods.registry import methods
from merger.models.side_files import PICTURES
from merger.planning.plan import Plan
from merger.run.pipeline import Result
from merger.safety.numbers import size
from merger.safety.text import line, visible

IN_BYTES_A_SECOND, OUT_BYTES_A_SECOND = 100_000_000, 50_000_000
"""What the estimate of time takes the Hub to send and to accept: a guess at a runner's luck, and told as one."""

_PICTURE = re.compile(rf"^!\[.*\]\({PICTURES}.*\)\n", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A\s*---\n.*?\n---\n", re.DOTALL)


def sentence(text: str) -> str:
    """A sentence of ours with others' names in it; an @ in them calls nobody."""
    return prose(text.replace("@", "@\u200b"))


def plan_section(found: PlanSummary) -> str:
    """What will be made, of what, and what that takes."""
    return "\n\n".join([_tables(found), *_warnings(found), *_notes(found)])


def folded_plan(found: PlanSummary, changed: str = "") -> str:
    """A line that says it all, what is likely not meant, what another plan has otherwise, and the rest folded away.

    Args:
        changed: what it has otherwise than another plan.
    """
    tables = fold("The plan", "\n\n".join([_tables(found), *_notes(found)]))
    return "\n\n".join(part for part in (_line(found), *_warnings(found), changed, tables) if part)


def _line(found: PlanSummary) -> str:
    planned = found.plan
    names = ", ".join(_link(model) for model in planned.locked.merged)
    methods = ", ".join(f"`{name}`" for name in found.methods)
    doubts = len(_warnings(found))
    licence = code(found.licence.name) if found.licence.name else "licence not settled"
    told = f"{doubts} warning{'s' if doubts > 1 else ''}" if doubts else "no warning"
    to = f" to {code(found.to)}" if found.to else ""
    return f"{methods} of {names}{to}: {size(planned.size)}, {licence}, about {_minutes(planned)} min, {told}."


def changes_section(found: PlanSummary, before: PlanSummary) -> str:
    """What a plan has otherwise than what the same recipe made before."""
    now, then = map(_all_facts, (found, before))
    same = ("plan", "time")  # a name, and what follows from another row
    rows = [
        (name, then.get(name, "none"), now.get(name, "none"))
        for name in dict.fromkeys([*now, *then])
        if name not in same and now.get(name) != then.get(name)
    ]
    if rows:
        return "**Changed:**\n\n" + "\n".join(_table(("", "before", "with this change"), rows))
    return f"**Changed:** {'nothing' if found.plan.hash == before.plan.hash else 'the seed'} of what is made."


def _all_facts(found: PlanSummary) -> dict[str, str]:
    """All that a reader may want to compare, by name."""
    models = {name: ", ".join(told) for name, *told in map(_row, found.plan.locked.models)}
    in_force = [(each, owner) for each in parameters(found.plan, methods()) for owner in each.owners]
    own = {f"`{each.name}`{f' of {code(owner)}' if owner else ''}": each.course(owner) for each, owner in in_force}
    return {**models, **own, **dict(_facts(found))}


def fold(title: str, text: str) -> str:
    """Text that opens at a click."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _tables(found: PlanSummary) -> str:
    models = _table(("model", "commit", "licence", "size"), _models(found))
    first, *facts = _facts(found)  # a head without words would be an empty row
    return "\n".join([*models, "", *_table(first, facts)])


def _models(found: PlanSummary) -> list[tuple[str, ...]]:
    return [(f"and {model} more like them", "", "", "") if isinstance(model, int) else _row(model)
            for model in found.models]  # fmt: skip


def _row(model: LockedModel) -> tuple[str, ...]:
    licence = code(model.licence) if model.licence else "not stated"
    return _link(model), _commit(model), licence, size(model.checkpoint.nbytes)


def _link(model: LockedModel) -> str:
    name = code(display_name(model))
    return f"[{name}]({_page(model.located.where)})" if model.located.commit else name


def _commit(model: LockedModel) -> str:
    commit = model.located.commit
    return f"[`{commit[:12]}`]({_page(f'{model.located.where}/tree/{commit}')})" if commit else "local folder"


def _page(path: str) -> str:
    """Where a page of the Hub is."""
    from merger.stores.hub.store import hub_page  # a plan without the Hub does without its client

    return link_address(hub_page(path))


def _facts(found: PlanSummary) -> list[tuple[str, str]]:
    planned, dtypes = found.plan, ", ".join(found.dtypes)
    files = f"{len(planned.files)} file{'s' if len(planned.files) > 1 else ''}"
    return [
        ("method", ", ".join(f"`{name}` ({count} tensors)" for name, count in found.methods.items())),
        ("result", f"{planned.entries:,} numbers in {dtypes}; {size(planned.size)} in {files}"),
        *([("tokens", sentence(found.tokens))] if found.tokens else []),
        ("licence", _licence(found.licence)),
        ("goes to", code(found.to) if found.to else "not said yet"),
        ("reads", size(planned.read_bytes)),
        ("memory", f"{size(planned.peak_memory)} at most"),
        ("disk", found.disk),
        ("time", f"about {_minutes(planned)} min, if the Hub sends 100 MB and takes 50 MB a second"),
        ("plan", f"`{planned.hash[:16]}`"),
    ]


def _licence(found: Judgement) -> str:
    asks = dict.fromkeys(kind.value for terms in found.duties for kind in terms.asks)
    told = "stated" if found.stated else "proposed, as the strictest that fits"
    return (f"{code(found.name)} ({told})" if found.name else "not settled") + (
        f"; the parents' licences ask: {', '.join(asks)}" if asks else ""
    )


def _minutes(planned: Plan) -> int:
    return 1 + int((planned.read_bytes / IN_BYTES_A_SECOND + planned.size / OUT_BYTES_A_SECOND) / 60)


def _warnings(found: PlanSummary) -> list[str]:
    """What has to be seen before all else."""
    licence = found.licence
    notes = [f"**Warning:** {sentence(doubt)}" for doubt in found.doubts]
    against = [*(each.what for each in licence.conflicts), *licence.notes]
    notes += [f"**Licence:** {sentence(what)}" for what in against]
    if licence.override is not None and licence.conflicts:
        notes.append(f"**Published all the same:** {sentence(licence.override)}")
    return notes


def _notes(found: PlanSummary) -> list[str]:
    notes = [f"**Note:** {sentence(note)}" for note in found.plan.notes]
    if found.left_out:
        counts = Counter[str]()
        for (_, why), names in found.left_out.items():
            counts[why] += len(names)
        told = "; ".join(f"{count} tensors: {sentence(why)}" for why, count in counts.items())
        notes.append(f"**Left out:** {told}")
    if found.left_beside:
        told = "; ".join(f"{code(few(names))}: {sentence(why)}" for why, names in found.left_beside.items())
        notes.append(f"**Files left out:** {told}")
    return notes


def problems_section(title: str, problems: Sequence[Problem]) -> str:
    """Errors or warnings, word by word."""
    return f"**{title}**\n\n" + fence("\n".join(str(problem) for problem in problems), "text")


def result_section(result: Result, repo: str | None = None) -> str:
    """What has become of it, what stands at the top of the card, and the rest of the card folded away.

    Args:
        repo: where it went on the Hub; None: to a folder.
    """
    if result.part is not None:
        return f"Part {result.part} is made: {len(result.shards)} of {result.of} files. `mode: publish` ends it."
    commit = f" at commit `{result.commit}`" if result.commit else ""
    told = "Published" if result.is_new else "Nothing to do: it is already there"
    doubts = "".join(f"\n\n**Warning:** {sentence(doubt)}" for doubt in result.doubts)
    said = f"{told}: {line(result.where)}{commit}{doubts}"
    if not result.card:
        return said
    place = f"{repo}/resolve/{result.commit}" if repo and result.commit else None
    head, _, rest = card_preview(result.card, place).partition("\n## ")
    shown = "\n".join(f"> {each}" for each in head.strip().split("\n"))
    return f"{said}\n\n{shown}\n\n" + fold("The card", f"## {rest.strip()}")


def search_section(facts: Mapping[str, Any], ended: str, trials: str, pictures: Mapping[str, str]) -> str:
    """What a search has found so far.

    Args:
        facts: as `SearchFacts` has them.
        ended: why this run of it came to its end.
        trials: all of them as CSV; empty: they are told elsewhere.
        pictures: what each shows, by its address.
    """
    told = [f"{sentence(ended)}. {sentence(facts['sentence'])}"]
    for head, rows in ((("number", "searched", "found"), facts["numbers"]), (facts["columns"], facts["rows"])):
        if rows:
            told.append("\n".join(_table([*map(code, head)], [[*map(code, row)] for row in rows])))
    told += [f"- {sentence(each)}" for each in facts["told"]]
    shown = [f"![{sentence(alt)}]({link_address(page)})" for page, alt in pictures.items()]
    return "\n\n".join([*told, *shown, *([fold("All trials", fence(trials, "csv"))] if trials else [])])


def card_preview(card: str, place: str | None = None) -> str:
    """A card for another page than the Hub's: its links lead there, and it calls nobody.

    Args:
        place: where its pictures lie on the Hub; None: nowhere yet.
    """
    text = visible(_FRONT_MATTER.sub("", card)).replace("&#64;", "&#64;\u200b").replace("](/", f"]({_page('')}")
    return text.replace(f"({PICTURES}", f"({_page(f'{place}/{PICTURES}')}") if place else _PICTURE.sub("", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
