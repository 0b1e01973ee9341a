"""The page: form and recipe side by side, below them plan and merge, or search, and the jobs of who is signed in.

It decides nothing: what a control does is a function of the recipe's text (form), what a button does is the service's.
Not here: its parts (editor, planned, merges), the page of one merge (merge_page), and what programs may call (api).
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from merger.errors import MergerError
from space import hub
from space.api import offer
from space.page import form
from space.page.controls import PRIVATE, Updates, on
from space.page.editor import OPEN, OPENED, Editor, Profile, Session
from space.page.merges import Merges, Searches
from space.page.planned import Plans
from space.page.texts import FIRST, examples
from space.work.service import Service

CSS = (Path(__file__).parent / "page.css").read_text("utf-8")
_LIVE = "() => document.getElementById('problems').setAttribute('aria-live', 'polite')"


def build(service: Service, with_login: bool) -> gr.Blocks:
    """The page, and with it what programs may call.

    Args:
        service: what plans and queues.
        with_login: whether there is somebody to sign in with: in a Space.
    """
    with gr.Blocks(title="Merger", analytics_enabled=False, fill_width=True) as blocks:
        Page(blocks, service, with_login)
        offer(service)  # here: who opens the blocks a second time has their events twice
    for event in blocks.fns.values():  # the button's own question would be offered as a tool
        if event.api_name == "_check_login_status":
            event.api_visibility = PRIVATE
    return blocks  # type: ignore[no-any-return]


class Page:
    """Its parts, where they stand, and what happens when it is opened."""

    def __init__(self, blocks: gr.Blocks, service: Service, with_login: bool) -> None:
        self.editor = Editor()
        self.merges = Merges(service.queue, self.editor)
        self.plans = Plans(service, self.editor, self.merges)
        self.searches = Searches(service, self.editor)
        self._lay_out(with_login)
        self.editor.bind({**self.plans.gone, **self.searches.gone})
        self.merges.bind()
        self.searches.bind()
        self.plans.bind()
        shown = [*self.editor.parts, *self.merges.parts, *self.searches.parts]
        opened = on(blocks.load, self._load, [self.editor.text, self.asked], shown, js=OPEN)
        opened.then(None, js=OPENED, api_visibility=PRIVATE)
        blocks.load(None, js=_LIVE)

    def _lay_out(self, with_login: bool) -> None:
        with gr.Row(elem_id="top", equal_height=True):
            gr.Markdown("# Merger\nMerge models of the Hub, tensor by tensor, and publish the result in one commit.")
            with gr.Column(scale=0, min_width=270):
                if with_login:
                    gr.LoginButton(size="md")
                else:
                    gr.Markdown("Signing in works in a Space on the Hub. Here you can plan.")
        with gr.Row(elem_id="bench"):
            with gr.Column(scale=5, min_width=300):
                self.editor.lay_out_form()
            with gr.Column(scale=6, min_width=300):
                self.editor.lay_out_text()
                with gr.Tabs(elem_id="tabs"):
                    with gr.Tab("Merge"):
                        self.plans.lay_out()
                        self.merges.lay_out()
                    with gr.Tab("Search"):
                        self.searches.lay_out()
        self.asked = gr.Textbox(visible=False)

    def _load(self, text: str, asked: str, profile: Profile, session: Session) -> Updates:
        """The recipe of a repo that is asked for, else the one that was here last; and the visitor's merges."""
        refused: Updates = {}
        try:
            if asked:  # but for where it went
                text = form.with_publish(hub.published_recipe(asked, session.token if session else None), "repo", "")
        except MergerError as error:
            refused = self.plans.refuse(error)
        if profile is None or session is None:
            return {**self.editor.show(text), **refused} if text != examples()[FIRST] or refused else dict(gr.skip())
        text = form.with_destination(text, profile.username)
        mine = self.merges.refresh(None, profile, session) | self.searches.refresh(None, profile, session)
        return {**self.editor.show(text), **mine, **refused}
