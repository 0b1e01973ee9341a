"""The Space's process: the queue with its workers, and the server of page and API. `python -m space` starts it.

Settings are environment variables, as Spaces have them: ``MERGER_SPACE_DATA`` is the folder for the queue, others
are in limits. Not here: what the page shows (page) and what programs may call (api).
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI
from huggingface_hub import constants

from merger.runtime import take_over
from merger.safety import secrets
from space.bot.bot import Bot
from space.entry import sessions
from space.entry.body_limit import BodyLimit
from space.entry.door import Door, own_origins
from space.page import merge_page
from space.page.page import CSS, build
from space.work.admission import Limits
from space.work.queue import MergeQueue
from space.work.service import Service

_FONTS = ["system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]
_MOST_WAITING = 200
_AT_ONCE = 8
_UPLOAD_BYTES = 1
"""Nothing here takes a file, and gradio's way to send one is open to everybody."""


def folder() -> Path:
    """Where the queue's file lies: what is set, else a Space's storage where it has some, else a folder here."""
    given = os.environ.get("MERGER_SPACE_DATA")
    storage = Path("/data")
    has_storage = storage.is_dir() and os.access(storage, os.W_OK)
    return Path(given) if given else storage / "merger" if has_storage else Path("data")


def make_app(service: Service, bot: Bot | None = None) -> FastAPI:
    """Page, API and the bot's webhook as one web application."""
    own, with_login = own_origins(os.environ), "OAUTH_CLIENT_ID" in os.environ
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit)
    if bot is not None:
        bot.offer(app)
    merge_page.offer_pages(app, service.queue)  # before the page, which takes all other addresses
    blocks = build(service, with_login)
    blocks.queue(max_size=_MOST_WAITING, default_concurrency_limit=_AT_ONCE)
    blocks.space_id = None  # else the page loads the Space's header, and its fonts, from two other servers
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        ssr_mode=False,
        mcp_server=True,
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=_UPLOAD_BYTES,
        footer_links=["api", "settings"],
        theme=_theme(),
        css=CSS,
    )
    if with_login:
        sessions.install(app, is_framed=bool(own))
    app.add_middleware(Door, own=own, hub=constants.ENDPOINT)  # the last one, for it stands before all others
    return app


def _theme() -> gr.themes.Base:
    """The plain one; its main button's blue is too light for white words on it."""
    look = gr.themes.Base(primary_hue="blue", font=_FONTS, font_mono=_MONO)
    fill, hover = "*primary_700", "*primary_800"
    return look.set(
        button_primary_background_fill=fill,
        button_primary_background_fill_dark=fill,
        button_primary_background_fill_hover=hover,
        button_primary_background_fill_hover_dark=hover,
    )


def main() -> None:
    """Serve until the process is ended. No token gets into its log, nor to a process that is started from here."""
    take_over()
    sys.stdout, sys.stderr = (secrets.sieve(stream, ends=False) for stream in (sys.stdout, sys.stderr))
    at = folder().resolve()
    at.mkdir(parents=True, exist_ok=True)
    queue = MergeQueue(at, Limits.here(at))
    service = Service(queue)
    bot = Bot.of(service, os.environ)
    host = "0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1"
    with ExitStack() as ends:
        queue.start()
        ends.callback(queue.stop)
        if bot is not None:
            bot.start()
            ends.callback(bot.stop)
        app = make_app(service, bot)
        secrets.take_out()
        uvicorn.run(
            app,
            host=os.environ.get("GRADIO_SERVER_NAME", host),
            port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
            log_level="warning",
            proxy_headers=True,
            forwarded_allow_ips="*",
        )
