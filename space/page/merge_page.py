"""A page for each merge, at an address that nobody can guess: how far it is, and what became of it.

It is plain HTML, brings itself up to date, and changes nothing. Not here: what a merge's owner may do (merges).
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from merger.cli import markdown
from merger.safety.names import HUB
from space.entry.door import page
from space.page import views
from space.page.views import as_text
from space.work.job_table import QueuedMerge
from space.work.queue import MergeQueue

_CSS = (Path(__file__).parent / "page.css").read_text("utf-8")
_GONE = "There is no such merge here: the newest twenty of each user are kept."
_USE = re.compile(r"^## Use it\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
_FOLD = re.compile(r"</?details>|<summary>(.*)</summary>")
_LOOKS = """
:root { color-scheme: light dark; --border-color-primary: #d0d7de; --ground: #fff; --ink: #1f2328; }
.dark { --border-color-primary: #444c56; --ground: #0d1117; --ink: #e6edf3; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 760px; margin: 0 auto; padding: 1rem; }
a { color: var(--c0); }
pre { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .6rem .8rem; }
details > summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
table { display: block; max-width: 100%; overflow-x: auto; border-collapse: collapse; }
td, th { border: 1px solid var(--border-color-primary); padding: .25rem .6rem; text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
article.job h1.state { font-size: 1.6rem; line-height: 1.3; font-weight: 400; margin: 1rem 0; }
"""
_SCRIPT = """
document.documentElement.classList.toggle('dark', matchMedia('(prefers-color-scheme: dark)').matches);
const parts = ['state', 'log', 'use'];
const look = async () => {
  if (!document.querySelector('[data-open]')) return;
  try {
    const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), 'text/html');
    for (const id of parts) {
      const old = document.getElementById(id), now = page.getElementById(id);
      if (old && now && old.outerHTML !== now.outerHTML) old.replaceWith(now);
    }
  } catch { }
  setTimeout(look, 2000);
};
addEventListener('DOMContentLoaded', look);
"""


def offer_pages(app: FastAPI, queue: MergeQueue) -> None:
    """Add the pages to the web application."""

    @app.get(views.MERGES + "{id}")
    def show(id: str) -> Response:
        job = queue.jobs.get(id)
        if job is None or job.is_search:  # which is its owner's alone
            return page(404, _GONE, {"To the Space": "/"})
        return _answer(job, queue.ahead(job))


def _answer(job: QueuedMerge, ahead: int) -> Response:
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; script-src 'nonce-{nonce}'"
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{as_text(views.label(job))}</title><style>{_CSS}{_LOOKS}</style>"
        f'<script nonce="{nonce}">{_SCRIPT}</script></head>'
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(f"{head}<body>{_body(job, ahead)}</body></html>", headers=headers)


def _body(job: QueuedMerge, ahead: int) -> str:
    is_open = "" if job.is_over else " data-open"
    again = f'<a href="/?recipe={quote(job.recipe, safe="")}">Open this recipe in the Space</a>'
    return (
        f'<main><div id="state" aria-live="polite"{is_open}>{views.job(job, ahead, "h1")}</div>'
        f'<div id="use">{_use(job)}{_card(job)}</div>'
        f'<h2>Log</h2><div id="log">{views.log(job)}</div>'
        f'<h2>Recipe</h2><pre tabindex="0">{as_text(job.recipe)}</pre><p>{again}</p></main>'
    )


def _use(job: QueuedMerge) -> str:
    """How the result is loaded, once it is there: as its card says, and by a chat where it knows how to."""
    told = _USE.search(markdown.card_preview(job.card))
    if told is None or job.state != "done" or job.how.create_pr:
        return ""
    chat = "apply_chat_template" in told[0]
    way = f"In a terminal:\n\n```bash\ntransformers chat {job.to.removeprefix(HUB)}\n```\n" if chat else ""
    return views.markdown_html(f"{told[0]}\n{way}").replace("<pre>", '<pre tabindex="0">')


def _card(job: QueuedMerge) -> str:
    """The model card without its pictures; what is folded in it stands under a heading."""
    text = _FOLD.sub(lambda found: f"#### {found[1]}" if found[1] else "", markdown.card_preview(job.card))
    return f"<details><summary>Its model card</summary>{views.markdown_html(text)}</details>" if job.card else ""
