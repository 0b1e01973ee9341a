"""Plan and merge: the two buttons, what is answered to them, and the choice where a repo holds a model already.

Not here: the recipe (editor), and what becomes of a merge (merges).
"""

from __future__ import annotations

import gradio as gr

from merger.card.escape import code
from merger.cli import markdown
from merger.errors import MergerError, OccupiedError, Problem
from space import hub
from space.page import form, texts, views
from space.page.controls import Updates, on
from space.page.editor import Editor, Profile, Session
from space.page.merges import Merges, token_of
from space.work.admission import TooBigError
from space.work.job_table import DEFAULT, How
from space.work.service import Planned, Service

_AT_ONCE = 4
_SIGN_IN = "sign in with the button at the top: the Space can then make repos for you, and touches no other"
_NEW = "Publish under a new name"
_ONTO = {
    "Open a pull request on it": How(create_pr=True, force=True),
    "Replace it by a new commit; what was there stays in the repo's history": How(force=True),
}


class Plans:
    """What is planned, and what stands in its way.

    Args:
        service: what plans and queues.
        editor: the recipe.
        merges: where a merge is followed.
    """

    def __init__(self, service: Service, editor: Editor, merges: Merges) -> None:
        self._service, self._editor, self._merges = service, editor, merges

    def lay_out(self) -> None:
        """Buttons, refusal and choice; the plan; and what to do with what is too big."""
        self.refused = gr.HTML(elem_id="refused", visible=False)
        label = "That repo holds a model: what shall happen to it?"
        info = "Signed in here, you let the Space write to the repos that it made for you, and to no others."
        self.onto = gr.Radio([_NEW, *_ONTO], label=label, info=info, visible=False, elem_id="onto")
        with gr.Row(elem_id="buttons"):
            self.plan = gr.Button("Plan", variant="secondary", elem_id="plan")
            self.merge = gr.Button("Merge and publish", variant="primary", elem_id="merge")
        with gr.Column(visible=False, elem_id="planned") as self.planned:
            gr.Markdown("## Plan")
            self.lineage = gr.HTML(elem_id="lineage")
            self.table = gr.Markdown(elem_id="table")
            with gr.Accordion("Preview of the model card", open=False):
                self.card = gr.Markdown(elem_id="card", latex_delimiters=[])
        with gr.Column(visible=False, elem_id="too-big") as self.too_big:
            gr.Markdown(texts.STEPS)
            gr.Code(
                texts.workflow(),
                language="yaml",
                label=".github/workflows/merge.yml",
                max_lines=16,
                buttons=["copy"],
                show_line_numbers=False,  # measured while it is hidden, they would stand beside the wrong lines
                wrap_lines=True,
            )

    @property
    def gone(self) -> Updates:
        """What becomes of all this once the recipe is another: what was refused may be right now."""
        hidden: Updates = {part: gr.update(visible=False) for part in (self.refused, self.too_big)}
        return {
            **hidden,
            self.onto: gr.update(visible=False, value=None),
            self.planned: gr.update(elem_classes=["of-before"]),
        }

    def bind(self) -> None:
        """Let the buttons do what they say."""
        shown = [*self.gone, self.table, self.lineage, self.card]
        how = {"concurrency_id": "hub", "concurrency_limit": _AT_ONCE}
        text = self._editor.text
        on(self.plan.click, self._plan, [text], shown, **how)
        on(self.merge.click, self._merge, [text, self.onto], [*shown, *self._merges.parts], **how)
        on(self.onto.input, self._rename, [self.onto, text], self._editor.parts)

    def refuse(self, error: MergerError) -> Updates:
        """Why something was not done, and what can be chosen."""
        is_choice = isinstance(error, OccupiedError)
        return {
            **({} if is_choice else {self.planned: gr.update(visible=False)}),
            self.refused: gr.update(value=views.refusal_html(error.problems), visible=True),
            self.onto: gr.update(visible=is_choice, value=None),
            self.too_big: gr.update(visible=isinstance(error, TooBigError)),
        }

    def _plan(self, text: str, profile: Profile, session: Session) -> Updates:
        shown: Updates = {}
        try:
            found = self._service.plan(text, session.token if session else None)
            shown = self._show(found)
            if session is not None and (to := found.recipe.publish.repo) is not None:
                self._service.refuse_loss(found, session.token, to)
        except MergerError as error:
            return {**shown, **self.refuse(error)}
        return shown

    def _merge(self, text: str, onto: str | None, profile: Profile, session: Session) -> Updates:
        try:
            if profile is None or session is None:
                raise MergerError(Problem("nobody is signed in, so there is nobody to publish for", hint=_SIGN_IN))
            how = _ONTO.get(onto or "", DEFAULT)
            job = self._service.submit(profile.username, token_of(session), text, how=how)
        except MergerError as error:
            return self.refuse(error)
        return {**self._quiet(), **self._merges.show(profile.username, job.id)}

    def _show(self, found: Planned) -> Updates:
        notes = "".join(f"\n\n**Warning:** {code(str(note))}" for note in found.recipe.warnings)
        files = found.card()
        return {
            **self._quiet(),
            self.planned: gr.update(visible=True, elem_classes=[]),
            self.table: texts.for_the_page(markdown.plan_section(found.summary())) + notes,
            self.lineage: views.lineage(files, [str(model) for model in found.recipe.models]),
            self.card: views.card_text(files),
        }

    def _quiet(self) -> Updates:
        return {part: how for part, how in self.gone.items() if part is not self.planned}

    def _rename(self, onto: str, text: str, session: Session) -> Updates:
        """A name that is free, where that is what was chosen."""
        shown = form.read_form(text)
        if onto != _NEW or shown is None:
            return {self._editor.text: gr.skip()}
        name = hub.free_name(shown.repo, session.token if session else None)
        return self._editor.show(form.with_publish(text, "repo", name))
