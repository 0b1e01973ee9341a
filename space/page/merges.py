"""The merges of whoever is signed in, and one of them in full.

Not here: how a merge is told of (views), and its own page (merge_page).
"""

from __future__ import annotations

import gradio as gr

from merger.errors import MergerError
from space.page import views
from space.page.controls import Updates, on
from space.page.editor import Editor, Profile, Session
from space.work.queue import MergeQueue, Token

_SECONDS = 1.0


class Merges:
    """The list, and what can be done with the merge that is chosen in it.

    Args:
        queue: where they are.
        editor: where a merge's recipe is shown.
    """

    def __init__(self, queue: MergeQueue, editor: Editor) -> None:
        self._queue, self._editor = queue, editor

    def lay_out(self) -> None:
        """List, merge, log and buttons."""
        gr.Markdown("## Your merges", elem_id="merges")
        self.jobs = gr.Radio([], label="Which one to look at", visible=False, elem_id="jobs")
        self.job = gr.HTML(views.jobs_hint(signed_in=False), elem_id="job")
        with gr.Accordion("Log", visible=False, elem_id="log") as self.log_box:
            self.log = gr.HTML()
        with gr.Row(visible=False) as self.buttons:
            self.again = gr.Button("Show its recipe", size="sm", elem_id="again")
            self.cancel = gr.Button("Cancel this merge", size="sm", variant="stop", elem_id="cancel")
        self.timer = gr.Timer(_SECONDS, active=False)
        self.parts = [self.jobs, self.job, self.log_box, self.log, self.buttons, self.cancel, self.timer]

    def bind(self) -> None:
        """Let it be up to date, and do what the buttons say."""
        on(self.timer.tick, self.refresh, [self.jobs], self.parts, show_progress="hidden")
        on(self.jobs.input, self.refresh, [self.jobs], self.parts, show_progress="hidden")
        on(self.cancel.click, self._cancel, [self.jobs], self.parts)
        on(self.again.click, self._show_recipe, [self.jobs, self._editor.text], self._editor.parts)

    def refresh(self, chosen: str | None, profile: Profile, session: Session) -> Updates:
        """How it is now; their jobs that waited for them go on."""
        if profile is None or session is None:
            hidden: Updates = {part: gr.update(visible=False) for part in (self.jobs, self.log_box, self.buttons)}
            return {**hidden, self.job: views.jobs_hint(signed_in=False), self.timer: gr.Timer(active=False)}
        self._queue.register_token(profile.username, token_of(session))
        return self.show(profile.username, chosen)

    def show(self, owner: str, chosen: str | None) -> Updates:
        """Somebody's jobs, the newest first, and one of them in full."""
        mine = list(reversed(self._queue.jobs.of(owner)))
        if not mine:
            return {self.job: views.jobs_hint(signed_in=True)}
        shown = next((job for job in mine if job.id == chosen), mine[0])
        choices = [(views.label(job), job.id) for job in mine]
        return {
            self.jobs: gr.update(choices=choices, value=shown.id, visible=True),
            self.job: views.job(shown, self._queue.ahead(shown)) + views.link(shown),
            self.log_box: gr.update(visible=bool(shown.log)),
            self.log: views.log(shown),
            self.buttons: gr.update(visible=True),
            self.cancel: gr.update(visible=not shown.is_over),
            self.timer: gr.Timer(active=any(not job.is_over for job in mine)),
        }

    def _cancel(self, chosen: str | None, profile: Profile) -> Updates:
        if profile is None:
            return dict(gr.skip())
        try:
            self._queue.cancel(profile.username, chosen or "")
        except MergerError as error:
            raise gr.Error(str(error.problems[0].what)) from None
        return self.show(profile.username, chosen)

    def _show_recipe(self, chosen: str | None, text: str, profile: Profile) -> Updates:
        mine = self._queue.jobs.of(profile.username) if profile else []
        return self._editor.show(next((job.recipe for job in mine if job.id == chosen), text))


def token_of(session: gr.OAuthToken) -> Token:
    """What is signed in with."""
    return Token(session.token, session.expires_at)
