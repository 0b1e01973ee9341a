"""The merges and searches of whoever is signed in, one of them in full, and what starts and ends a search.

Not here: how a job is told of (views), a merge's own page (merge_page), and what starts a merge (planned).
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from merger.cli.text import search_facts
from merger.errors import MergerError, Problem
from space.page import views
from space.page.controls import Updates, on
from space.page.editor import Editor, Profile, Session
from space.work.job_table import QueuedMerge
from space.work.queue import MergeQueue, Token
from space.work.service import Service

_SECONDS = 1.0
_SIGN_IN = "sign in with the button at the top: a search belongs to whoever began it"
_TAKE = "Take the best"
_HOW = """\
<p>Leave numbers of the recipe open, and say at its end by what they are judged:</p>
<pre tabindex="0" class="log">models:
  - model: owner/name
    parameters: {weight: {search: [0, 1.2], start: 0.5}}
search:
  trials: 40
  objectives: [{loss: search.txt}]
  report: [{loss: report.txt}]</pre>
<p>A text of yours goes into the boxes below; or name a data set, <code>hf://datasets/owner/name@commit/file</code>.
Candidates are made in memory and nothing is published. What is found goes into the recipe above, and is then merged
like any other.</p>
"""


class Merges:
    """The list, and what can be done with the job that is chosen in it.

    Args:
        queue: where they are.
        editor: where a job's recipe is shown.
    """

    kind, stop, prefix = "merges", "Cancel this merge", ""

    def __init__(self, queue: MergeQueue, editor: Editor) -> None:
        self._queue, self._editor = queue, editor

    def lay_out(self) -> None:
        """List, job, log and buttons."""
        gr.Markdown(f"## Your {self.kind}", elem_id=self.kind)
        self.jobs = gr.Radio([], label="Which one to look at", visible=False, elem_id=f"{self.prefix}jobs")
        self.job = gr.HTML(views.jobs_hint(False, self.kind), elem_id=f"{self.prefix}job")
        with gr.Accordion("Log", visible=False, elem_id=f"{self.prefix}log") as self.log_box:
            self.log = gr.HTML()
        with gr.Row(visible=False) as self.buttons:
            self.again = gr.Button("Show its recipe", size="sm", elem_id=f"{self.prefix}again")
            self.cancel = gr.Button(self.stop, size="sm", variant="stop", elem_id=f"{self.prefix}cancel")
        self.timer = gr.Timer(_SECONDS, active=False)
        self.parts = [self.jobs, self.job, self.log_box, self.log, self.buttons, self.cancel, self.timer]

    def bind(self) -> None:
        """Let it be up to date, and do what the buttons say."""
        editor = self._editor
        on(self.timer.tick, self.refresh, [self.jobs], self.parts, show_progress="hidden")
        on(self.jobs.input, self.refresh, [self.jobs], self.parts, show_progress="hidden")
        on(self.cancel.click, self._end, [self.jobs], [*editor.parts, *self.parts])
        on(self.again.click, self._show_recipe, [self.jobs, editor.text], editor.parts)

    def refresh(self, chosen: str | None, profile: Profile, session: Session) -> Updates:
        """How it is now; their jobs that waited for them go on."""
        if profile is None or session is None:
            hidden: Updates = {part: gr.update(visible=False) for part in (self.jobs, self.log_box, self.buttons)}
            return {**hidden, self.job: views.jobs_hint(False, self.kind), self.timer: gr.Timer(active=False)}
        self._queue.register_token(profile.username, token_of(session))
        return self.show(profile.username, chosen)

    def show(self, owner: str, chosen: str | None) -> Updates:
        """Somebody's jobs, the newest first, and one of them in full."""
        mine = self._of(owner)
        if not mine:
            return {self.job: views.jobs_hint(True, self.kind)}
        shown = next((job for job in mine if job.id == chosen), mine[0])
        choices = [(views.label(job), job.id) for job in mine]
        return {
            self.jobs: gr.update(choices=choices, value=shown.id, visible=True),
            self.job: views.job(shown, self._queue.ahead(shown)) + self._beside(shown),
            self.log_box: gr.update(visible=bool(shown.log)),
            self.log: views.log(shown),
            self.buttons: gr.update(visible=True),
            self.cancel: gr.update(
                visible=bool(shown.found) or not shown.is_over, value=_TAKE if shown.is_over else self.stop
            ),
            self.timer: gr.Timer(active=any(not job.is_over for job in mine)),
        }

    def _of(self, owner: str) -> list[QueuedMerge]:
        return [job for job in reversed(self._queue.jobs.of(owner)) if job.is_search == (self.kind == "searches")]

    def _beside(self, job: QueuedMerge) -> str:
        return views.link(job)

    def _end(self, chosen: str | None, profile: Profile) -> Updates:
        """End the job, unless it is over; what a search has found goes into the editor."""
        if profile is None:
            return dict(gr.skip())
        try:
            job = self._queue.cancel(profile.username, chosen or "")
        except MergerError as error:
            raise gr.Error(views.as_sentence(error.problems[0].what)) from None
        return {**(self._editor.show(job.found) if job.found else {}), **self.show(profile.username, chosen)}

    def _show_recipe(self, chosen: str | None, text: str, profile: Profile) -> Updates:
        mine = self._queue.jobs.of(profile.username) if profile else []
        return self._editor.show(next((job.recipe for job in mine if job.id == chosen), text))


class Searches(Merges):
    """The searches, and what begins one: the texts, and two buttons.

    Args:
        service: what plans and queues.
        editor: where the recipe with open numbers stands, and the found one is put.
    """

    kind, stop, prefix = "searches", "Stop and take the best", "search-"

    def __init__(self, service: Service, editor: Editor) -> None:
        super().__init__(service.queue, editor)
        self._service = service

    def lay_out(self) -> None:
        """How it is written, texts, buttons; and the searches."""
        limits = self._queue.limits
        gr.HTML(_HOW)
        look: dict[str, Any] = {"lines": 3, "max_lines": 8}
        self.text = gr.Textbox(label="search.txt", info="What candidates are judged by.", elem_id="search-text", **look)
        info = "What no candidate sees: the found recipe, the one before and its models are compared on it."
        self.report = gr.Textbox(label="report.txt", info=info, elem_id="report-text", **look)
        self.refused = gr.HTML(visible=False, elem_id="search-refused")
        with gr.Row():
            self.plan = gr.Button("Plan the search", elem_id="search-plan")
            self.begin = gr.Button("Search", variant="primary", elem_id="search-begin")
        self.planned = gr.HTML(visible=False, elem_id="search-planned")
        told = f"Up to {limits.trials} candidates and {limits.minutes} minutes, one search at a time for each user."
        gr.HTML(f'<p class="fine">{told} It goes on when the page is closed.</p>')
        super().lay_out()

    @property
    def gone(self) -> Updates:
        """What becomes of what was told of a recipe once it is another."""
        return {part: gr.update(visible=False) for part in (self.refused, self.planned)}

    def bind(self) -> None:
        """Let the buttons do what they say, too."""
        super().bind()
        how = {"concurrency_id": "hub"}
        on(self.plan.click, self._plan, [self._editor.text], list(self.gone), **how)
        texts = [self.text, self.report]
        on(self.begin.click, self._begin, [self._editor.text, *texts], [*self.gone, *self.parts], **how)

    def _beside(self, job: QueuedMerge) -> str:
        return views.course(job)

    def _plan(self, text: str, session: Session) -> Updates:
        try:
            facts = search_facts(self._service.plan(text, session.token if session else None).plan)
            if not facts:
                raise MergerError(Problem("this recipe leaves no number open", hint="write one as it is shown above"))
        except MergerError as error:
            return self._refuse(error)
        return {**self.gone, self.planned: gr.update(value=views.fact_list(facts), visible=True)}

    def _begin(self, text: str, judged: str, report: str, profile: Profile, session: Session) -> Updates:
        try:
            if profile is None or session is None:
                raise MergerError(Problem("nobody is signed in", hint=_SIGN_IN))
            texts = {"search.txt": judged, "report.txt": report}
            job = self._service.search(profile.username, token_of(session), text, texts)
        except MergerError as error:
            return self._refuse(error)
        return {**self.gone, **self.show(profile.username, job.id)}

    def _refuse(self, error: MergerError) -> Updates:
        return {**self.gone, self.refused: gr.update(value=views.refusal_html(error.problems), visible=True)}


def token_of(session: gr.OAuthToken) -> Token:
    """What is signed in with."""
    return Token(session.token, session.expires_at)
