"""What the page shows, as HTML: problems at their lines, curves over the layers, merges and how far they are.

Every word of others is escaped. Not here: plans and results, which are Markdown (merger.cli.markdown).
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from huggingface_hub import constants
from markdown_it import MarkdownIt

from merger.errors import Problem
from merger.safety.names import HUB
from merger.safety.numbers import size
from merger.safety.text import join_lines
from space.page.form import ShownSetting
from space.page.texts import for_the_page
from space.work.admission import CheckedRecipe
from space.work.job_table import QueuedMerge

MERGES = "/merges/"
"""Below it, each merge has a page by its id."""

_WORD = re.compile(r"^\s*[a-z](?=[a-z]*[ ,;])", re.MULTILINE)
_WIDTH, _HEIGHT, _EDGE = 240, 64, 8
_WORDS = {
    "queued": "waits its turn",
    "running": "at work",
    "waiting": "waits for you",
    "done": "published",
    "failed": "failed",
    "cancelled": "cancelled",
}
_SEARCHING = {**_WORDS, "running": "tries candidates", "done": "has ended", "cancelled": "was stopped"}


def problem_list(checked: CheckedRecipe) -> str:
    """What is wrong with a recipe, line by line, and marks at those lines of the editor."""
    if not checked.problems and not checked.warnings:
        return '<p class="fine">No problem found in the recipe itself. Plan looks at its models.</p>'
    found = [("error", problem) for problem in checked.problems] + [("warning", note) for note in checked.warnings]
    lines = {problem.at.line: kind for kind, problem in reversed(found) if problem.at}
    marks = "".join(
        f"#recipe .cm-content > .cm-line:nth-of-type({line}) {{ box-shadow: inset 3px 0 var(--{kind}); "
        f"background: var(--{kind}-soft); }}"
        for line, kind in lines.items()
    )
    return f"<style>{marks}</style>{_list(found)}"


def as_text(words: str) -> str:
    """Words of others as text of a page, with the lines that they have."""
    return html.escape(join_lines(words.split("\n")))


def as_sentence(words: str) -> str:
    """Words of a problem for the page: they begin as a sentence does, unless that is a name or a number."""
    return _WORD.sub(lambda found: found[0].upper(), for_the_page(words))


def markdown_html(text: str) -> str:
    """Markdown as HTML; tags in it are text."""
    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))


def refusal_html(found: Sequence[Problem]) -> str:
    """Why something was not done."""
    return f'<div role="alert">{_list([("error", problem) for problem in found])}</div>'


def _list(found: Sequence[tuple[str, Problem]]) -> str:
    return f'<ul class="problems">{"".join(_problem(kind, problem) for kind, problem in found)}</ul>'


def _problem(kind: str, problem: Problem) -> str:
    place = f'<span class="place">line {problem.at.line}</span> ' if problem.at else ""
    where = f"<code>{as_text(problem.where)}:</code> " if problem.where else ""
    hint = f'<div class="hint">{as_text(as_sentence(problem.hint))}</div>' if problem.hint else ""
    what = where + as_text(as_sentence(problem.what))
    return f'<li class="{kind}"><span class="kind">{kind}</span> {place}{what}{hint}</li>'


# ---- curves ---------------------------------------------------------------------------------------------------------


def curves(setting: ShownSetting, name: str, scale: tuple[float, float, float] | None = None) -> str:
    """A parameter's values from the first layer to the last, one line for each filter.

    Args:
        setting: the values.
        name: the parameter's.
        scale: the least value, the largest and the step between two, where the points of the one line can be moved.
    """
    drawn = [(label, [y for y in line if math.isfinite(y)]) for label, line in setting.curves.items()]
    drawn = [(label, line) for label, line in drawn if line]
    values = [y for _, line in drawn for y in line]
    if not values:
        return ""
    least, most, step = scale or (0.0, 1.0, 0.0)
    low, high = min(least, *values), max(most, *values)
    lines = "".join(_line(line, low, high, number) for number, (_, line) in enumerate(drawn))
    told = "; ".join(f"{label or 'all'}: {', '.join(f'{y:g}' for y in line)}" for label, line in drawn)
    rest = "the rest" if len(drawn) > 1 else "all tensors"
    key = "".join(
        f'<span class="curve c{number % 4}">{as_text(label or rest)}</span>' for number, (label, _) in enumerate(drawn)
    )
    if scale:
        lines += _points(values, low, high, name)
    about = {"low": low, "high": high, "step": step, "top": _EDGE, "height": _HEIGHT - 2 * _EDGE}
    return (
        f'<figure class="curves"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="{"group" if scale else "img"}" '
        f'aria-label="{as_text(name)} from the first layer to the last; {as_text(told)}" '
        f"data-scale='{json.dumps(about)}'>"
        f'<line x1="{_EDGE}" x2="{_WIDTH - _EDGE}" y1="{_y(0, low, high)}" y2="{_y(0, low, high)}" class="zero"/>'
        f"{lines}</svg><figcaption>first layer <span>{key}</span> last layer</figcaption></figure>"
    )


def _line(values: Sequence[float], low: float, high: float, number: int) -> str:
    points = list(values) * 2 if len(values) == 1 else list(values)
    path = " ".join(f"{_x(at, len(points))},{_y(y, low, high)}" for at, y in enumerate(points))
    return f'<polyline points="{path}" class="c{number % 4}"/>'


def _points(values: Sequence[float], low: float, high: float, name: str) -> str:
    """Sliders, as those who hear the page know them."""
    return "".join(
        f'<circle cx="{_x(at, len(values))}" cy="{_y(y, low, high)}" r="4" tabindex="0" role="slider" '
        f'aria-orientation="vertical" aria-label="{as_text(name)}, point {at + 1} of {len(values)}" '
        f'aria-valuemin="{low:g}" aria-valuemax="{high:g}" aria-valuenow="{y:g}"/>'
        for at, y in enumerate(values)
    )


def _x(at: int, count: int) -> str:
    return f"{_EDGE + (_WIDTH - 2 * _EDGE) / (count - 1) * at:.1f}"


def _y(value: float, low: float, high: float) -> str:
    return f"{_HEIGHT - _EDGE - (value - low) / (high - low) * (_HEIGHT - 2 * _EDGE):.1f}"


# ---- pictures ------------------------------------------------------------------------------------------------------


def data_url(png: bytes) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def lineage(files: Mapping[str, bytes], models: Sequence[str]) -> str:
    """The card's picture of where the merge comes from, if it has one."""
    png = files.get("pictures/lineage.png")
    alt = as_text(f"Lineage of the merge: made of {', '.join(models)}")
    return "" if png is None else f'<img class="picture" src="{data_url(png)}" alt="{alt}">'


def card_text(files: Mapping[str, bytes]) -> str:
    """A card as the Hub shows it: its front matter apart, its pictures in it, and its links as they lead there."""
    text = files["README.md"].decode().replace("](/", f"]({constants.ENDPOINT}/")
    for name, content in files.items():
        text = text.replace(f"({name})", f"({data_url(content)})")
    parts = text.split("---\n", 2)
    return f"```yaml\n{parts[1]}```\n\n{parts[2]}" if len(parts) == 3 and not parts[0].strip() else text


# ---- jobs -----------------------------------------------------------------------------------------------------------


def label(job: QueuedMerge) -> str:
    """A job in a list."""
    if job.is_search:
        return f"{datetime.fromtimestamp(job.created, UTC):%Y-%m-%d %H:%M} UTC: {_SEARCHING[job.state]}"
    return f"{job.to.removeprefix(HUB)}: {_WORDS[job.state]}"


def job(found: QueuedMerge, ahead: int, heading: str = "p") -> str:
    """All about one job, under a heading of that rank."""
    share = 1.0 if found.state == "done" else min(1.0, found.made / max(1, found.total))
    parts = [f'<{heading} class="state {found.state}">{_state(found, ahead)}</{heading}>']
    if not found.is_over or found.made:
        parts.append(
            f'<progress max="100" value="{100 * share:.0f}" aria-label="share of the job that is done">'
            f"</progress><p class='figures'>{_figures(found, share)}</p>"
        )
    if found.problems:
        parts.append(
            "".join(f'<pre class="failure">{as_text(as_sentence(problem))}</pre>' for problem in found.problems)
        )
    parts.append(f'<p class="figures">{_dates(found)}</p>')
    return f'<article class="job">{"".join(parts)}</article>'


def link(found: QueuedMerge) -> str:
    """The way to a job's own page."""
    words = "This merge has a page of its own, for whoever you send the link to"
    return f'<p><a href="{MERGES}{found.id}" target="_blank" rel="noopener">{words}</a></p>'


def log(found: QueuedMerge) -> str:
    """What a job has said."""
    lines = as_text("\n".join(found.log))
    return f'<pre class="log" tabindex="0">{lines}</pre>'


def course(found: QueuedMerge) -> str:
    """A search's best so far over its trials, what matters in it, what was found, and that it can be taken."""
    alt, known = "Score of each candidate, and the best so far", found.outcome
    drawn = f'<img class="picture" src="data:image/png;base64,{found.picture}" alt="{alt}">' if found.picture else ""
    parts = [drawn, _importance(known.get("importance", {})), markdown_html(known.get("told", ""))]
    if table := known.get("table"):
        held = base64.b64encode(table.encode()).decode()
        parts.append(f'<p><a href="data:text/csv;base64,{held}" download="trials.csv">All candidates as CSV</a></p>')
    if found.found:
        words = "Take it with the button below: it goes into the recipe, and can then be merged."
        parts.append(f'<p class="fine">{words}</p>')
    return "".join(parts)


def _importance(shares: Mapping[str, float]) -> str:
    """A bar for each number, the longest first."""
    rows = "".join(
        f'<li>{as_text(name)} <span class="figures">{share:.0%}</span>'
        f'<progress max="1" value="{share:.3f}" aria-label="share of {as_text(name)}"></progress></li>'
        for name, share in shares.items()
    )
    told = "How much each number matters among the best candidates (PED-ANOVA):"
    return f'<p class="fine">{told}</p><ul class="shares">{rows}</ul>' if rows else ""


def fact_list(facts: Sequence[str]) -> str:
    """Sentences one below the other."""
    return f"<ul>{''.join(f'<li>{as_text(fact)}</li>' for fact in facts)}</ul>"


def _state(found: QueuedMerge, ahead: int) -> str:
    if found.is_search:
        again = " The Space was started anew: it goes on while you are signed in."
        more = f": {_place(ahead)}." if found.state == "queued" else again if found.state == "waiting" else "."
        return f"<b>The search</b> {_SEARCHING[found.state]}{more}"
    repo = as_text(found.to.removeprefix(HUB))
    match found.state:
        case "queued":
            return f"<b>{repo}</b> waits its turn: {_place(ahead)}."
        case "running":
            return f"<b>{repo}</b> is being made."
        case "waiting":
            return f"<b>{repo}</b> waits for you: the Space was started anew. It goes on while you are signed in."
        case "done":
            told = "is published" if found.is_new else "was there already"
            where = as_text(found.where)
            return f'<b>{repo}</b> {told}: <a href="{where}" target="_blank" rel="noopener">open it on the Hub</a>'
        case "failed":
            return f"<b>{repo}</b> was not made."
        case _:
            return (
                f"<b>{repo}</b> was cancelled. Its finished files wait on the Hub: submitted again, it goes on there."
            )


def _place(ahead: int) -> str:
    return "it is next" if ahead == 0 else f"{ahead} merge{'' if ahead == 1 else 's'} before it"


def _figures(found: QueuedMerge, share: float) -> str:
    now = time.time()
    told = [f"{share:.0%}", f"{size(found.made)} of {size(found.total)}"]
    if found.is_search:
        told = [f"{found.made} of {found.total} candidates"]
    elif found.state == "running" and found.made > found.kept:
        told.append(f"{size(found.speed(now))}/s")
    if (left := found.seconds_left(now)) is not None:
        told.append(f"{left:.0f} s left" if left < 90 else f"{math.ceil(left / 60)} min left")
    return " · ".join(told)


def _dates(found: QueuedMerge) -> str:
    moments = {"asked for": found.created, "begun": found.started, "ended": found.ended}
    told = [f"<span>{word} {_moment(at)}</span>" for word, at in moments.items() if at]
    if found.ended and found.started:
        told.append(f"took {found.ended - found.started:.0f} s")
    return " · ".join(told)


def _moment(seconds: float) -> str:
    at = datetime.fromtimestamp(seconds, UTC)
    return f'<time datetime="{at:%Y-%m-%dT%H:%M:%SZ}">{at:%Y-%m-%d %H:%M} UTC</time>'


def jobs_hint(signed_in: bool, kind: str = "merges") -> str:
    """What stands where no job of a kind is."""
    doing = "publish a merge" if kind == "merges" else "search"
    told = f"You have no {kind} here yet." if signed_in else f"Sign in to {doing}, and to see those you have here."
    return f'<p class="fine">{told}</p>'
