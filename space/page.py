"""The page: form and recipe side by side, plan and merge below them, and the merges of whoever is signed in.

It decides nothing: what a control does is a function of the recipe's text (form), what a button does is the service's.
Not here: the look of lists and figures (views), and what programs may call (api).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from merger.card.escape import code
from merger.cli import markdown
from merger.errors import MergerError, Problem
from merger.methods.registry import Param, methods
from space import form, hub, texts, views
from space.api import offer
from space.form import Form, ShownSetting
from space.texts import FIRST, examples
from space.work import admission
from space.work.admission import TooBigError
from space.work.queue import Token
from space.work.service import Planned, Service

CSS = (Path(__file__).parent / "page.css").read_text("utf-8")
_PRIVATE = "private"
_SECONDS = 1.0
_PAUSE = 0.3
_AT_ONCE = 4
_STEP = 0.01
_LIVE = "() => document.getElementById('problems').setAttribute('aria-live', 'polite')"
_SIGN_IN = "sign in with the button at the top: the Space can then make repos for you, and touches no other"

Profile = gr.OAuthProfile | None
Session = gr.OAuthToken | None
Updates = dict[Any, Any]
"""What an event of the page changes, by component."""


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
            event.api_visibility = _PRIVATE
    return blocks  # type: ignore[no-any-return]


class Page:
    """Its parts, and what they do."""

    def __init__(self, blocks: gr.Blocks, service: Service, with_login: bool) -> None:
        self.blocks, self.service = blocks, service
        self._typed_last: dict[str, str] = {}
        self._lay_out(with_login)
        self._bind_form()
        self._bind_jobs()
        self._bind_buttons()

    # ---- parts -------------------------------------------------------------------------------------------------------

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
                self._lay_out_form()
            with gr.Column(scale=6, min_width=300):
                self._lay_out_recipe()
                with gr.Row(elem_id="buttons"):
                    self.plan = gr.Button("Plan", variant="secondary", elem_id="plan")
                    self.merge = gr.Button("Merge and publish", variant="primary", elem_id="merge")
                self.refused = gr.HTML(elem_id="refused", visible=False)
                self._lay_out_jobs()
                self._lay_out_plan()

    def _lay_out_form(self) -> None:
        shown = form.read_form(examples()[FIRST]) or Form()
        self.shown = gr.State(shown)
        titles = [(method.title, name) for name, method in methods().items()]
        self.example = _dropdown("example", "Start from", "A recipe to begin with.", list(examples()), FIRST)
        self.method = _dropdown("method", "Method", _summary(shown.method), titles, shown.method)
        info = "Type a part of a name to search the Hub, or owner/name@revision."
        free = {"allow_custom_value": True}
        self.models = _dropdown("models", "Models", info, shown.models, shown.models, multiselect=True, **free)
        info = "What the others were made from, for methods that need it."
        self.base = _dropdown("base", "Base model", info, ["", shown.base], shown.base, **free)
        gr.render(inputs=[self.shown])(self._parameters)
        with gr.Group():
            info = "owner/name of a new repo on the Hub."
            self.repo = gr.Textbox(shown.repo, label="Publish to", info=info, max_lines=1, elem_id="repo")
            self.private = gr.Checkbox(shown.private, label="Private", elem_id="private")

    def _lay_out_recipe(self) -> None:
        text = examples()[FIRST]
        look: dict[str, Any] = {"lines": 12, "max_lines": 32, "interactive": True, "wrap_lines": True}
        self.text = gr.Code(text, language="yaml", label="Recipe", elem_id="recipe", **look)
        self.problems = gr.HTML(views.problem_list(admission.check(text)), elem_id="problems")

    def _lay_out_plan(self) -> None:
        with gr.Column(visible=False, elem_id="planned") as self.planned:
            gr.Markdown("## Plan")
            self.table = gr.Markdown(elem_id="table")
            self.lineage = gr.HTML(elem_id="lineage")
            with gr.Accordion("Preview of the model card", open=False):
                self.card = gr.Markdown(elem_id="card", latex_delimiters=[])
        with gr.Column(visible=False, elem_id="too-big") as self.too_big:
            gr.Markdown(texts.STEPS)
            gr.Code(
                texts.workflow(),
                language="yaml",
                label=".github/workflows/merge.yml",
                max_lines=16,
                show_line_numbers=False,  # measured while it is hidden, they would stand beside the wrong lines
                wrap_lines=True,
            )

    def _lay_out_jobs(self) -> None:
        gr.Markdown("## Your merges", elem_id="merges")
        self.jobs = gr.Radio([], label="Which one to look at", visible=False, elem_id="jobs")
        self.job = gr.HTML(views.jobs_hint(signed_in=False), elem_id="job")
        with gr.Accordion("Log", visible=False, elem_id="log") as self.log_box:
            self.log = gr.HTML()
        with gr.Row(visible=False) as self.job_buttons:
            self.again = gr.Button("Show its recipe", size="sm", elem_id="again")
            self.cancel = gr.Button("Cancel this merge", size="sm", variant="stop", elem_id="cancel")
        self.timer = gr.Timer(_SECONDS, active=False)

    def _parameters(self, shown: Form) -> None:
        """The method's parameters: those of each model, and those of all."""
        method = methods().get(shown.method)
        if method is None:
            return
        if not shown.is_simple:
            gr.Markdown("This recipe is made of slices or modules: its parameters stand in the text.")
            return
        for number, row in enumerate(shown.rows):
            own = [param for param in method.params if param.per_model]
            if own and not (method.subtracts_base and row.model == shown.base):
                with gr.Accordion(row.model, open=len(shown.rows) <= 3):
                    for param in own:
                        setting = row.settings.get(param.name) or shown.settings.get(param.name)
                        self._control(param, setting, number, row.model)
        for param in method.params:
            if not param.per_model:
                self._control(param, shown.settings.get(param.name), None, "")

    def _control(self, param: Param, setting: ShownSetting | None, row: int | None, model: str) -> None:
        """A slider or a box, and the curve where the value is one over the layers."""
        value = setting or ShownSetting({"": (float(form.start_value(param)),)})
        name = f"{param.name} of {model}" if model else param.name
        with gr.Group(elem_classes=["control"]):
            if not value.is_simple:
                gr.HTML(f"<p><b>{param.name}</b> is given by filters, in the text.</p>{views.curves(value, name)}")
            elif len(value.numbers) > 1:
                self._gradient(param, value, row, name)
            else:
                self._number(param, value.numbers[0], row)

    def _number(self, param: Param, value: float, row: int | None) -> None:
        key = (param.name, row)
        about: dict[str, Any] = {"label": param.name, "info": param.description, "interactive": True}
        about |= _keep("number", *key)
        control: gr.Checkbox | gr.Number | gr.Slider
        if param.kind == "bool":
            control = gr.Checkbox(bool(value), **about)
        elif param.kind == "float" and 0 < abs(value) < _STEP:
            control = gr.Number(value, minimum=param.range.least, maximum=param.range.most, **about)
        else:
            low, high = form.slider_range(param, value)
            control = gr.Slider(low, high, value, step=1 if param.kind == "int" else _STEP, **about)

        def turn(text: str, number: float, points: int = 1) -> str:
            return form.with_value(text, row, param, points * [number])

        self._on_edit(control.input, control, turn, in_form=False, key=("turn", *key))
        if param.kind == "float":
            title = f"Vary {param.name} by layer"
            button = gr.Button(title, size="sm", elem_classes=["vary"], **_keep("vary", *key))
            self._on_edit(button.click, control, partial(turn, points=2), key=("vary", *key, "click"))

    def _gradient(self, param: Param, value: ShownSetting, row: int | None, name: str) -> None:
        key = (param.name, row)
        words = ", ".join(f"{number:g}" for number in value.numbers)
        info = f"{param.description} Numbers from the first layer to the last, as many as you like."
        line = gr.Textbox(words, label=param.name, info=info, max_lines=1, interactive=True, **_keep("line", *key))
        curve = gr.HTML(views.curves(value, name), **_keep("curve", *key))
        bend = partial(self._bend, param=param, row=row, name=name, curve=curve)
        _on(line.input, bend, [self.text, line], [*self._text_parts, curve], key=("bend", *key))
        same = gr.Button("The same for all layers", size="sm", elem_classes=["vary"], **_keep("same", *key))

        def level(text: str, words: str) -> str:
            return form.with_value(text, row, param, form.parse_numbers(words)[:1] or [form.start_value(param)])

        self._on_edit(same.click, line, level, key=("level", *key))

    # ---- the form and the text ---------------------------------------------------------------------------------------

    def _bind_form(self) -> None:
        self._text_parts = [self.text, self.problems]
        self._form_parts = [*self._text_parts, self.shown, self.method, self.models, self.base, self.repo, self.private]
        _on(self.text.input, self._read_text, [self.text], self._form_parts)
        _on(self.example.input, self._load_example, [self.example, self.text], self._form_parts)
        self._on_edit(
            self.method.input, self.method, lambda text, name: form.with_method(text, methods()[name], methods())
        )
        self._on_edit(self.models.input, self.models, form.with_models)
        self._on_edit(self.base.input, self.base, lambda text, name: form.with_text(text, "base_model", name or ""))
        self._on_edit(
            self.repo.input, self.repo, lambda text, name: form.with_publish(text, "repo", name), in_form=False
        )
        self._on_edit(
            self.private.input, self.private, lambda text, on: form.with_publish(text, "private", on), in_form=False
        )
        for box in (self.models, self.base):  # of "always_last" the page sends the first words typed again
            how = {"trigger_mode": "multiple", "concurrency_limit": None, "show_progress": "hidden"}
            _on(box.key_up, self._search, [box], [box], **how)

    def _on_edit(
        self, event: Any, control: Any, edit: Callable[[str, Any], str], in_form: bool = True, **how: Any
    ) -> None:
        """A control changes the text; the form is brought up to date with it, unless it shows the change already."""
        show, parts = (self._show, self._form_parts) if in_form else (self._check, self._text_parts)
        _on(event, lambda text, value: show(edit(text, value)), [self.text, control], parts, **how)

    def _check(self, text: str) -> Updates:
        return {self.text: text, self.problems: views.problem_list(admission.check(text))}

    def _show(self, text: str) -> Updates:
        """A text in all that shows it; the form stays as it is while the text is no YAML."""
        updates, shown = self._check(text), form.read_form(text)
        if shown is None:
            return updates
        names = list(dict.fromkeys([*shown.models, shown.base]))
        known = shown.method if shown.method in methods() else None
        return updates | {
            self.shown: shown,
            self.method: gr.update(value=known, info=_summary(shown.method)),
            self.models: gr.update(choices=names, value=shown.models),
            self.base: gr.update(choices=names, value=shown.base),
            self.repo: shown.repo,
            self.private: shown.private,
        }

    def _read_text(self, text: str) -> Updates:
        return {**self._show(text), self.text: gr.skip()}

    def _load_example(self, title: str, text: str, profile: Profile) -> Updates:
        chosen = examples().get(title, text)
        return self._show(form.with_destination(chosen, profile.username) if profile else chosen)

    def _bend(self, text: str, words: str, param: Param, row: int | None, name: str, curve: gr.HTML) -> Updates:
        numbers = form.parse_numbers(words)
        if not numbers:
            return {curve: "<p class='fine'>Write numbers with commas between them, such as 0, 0.5, 1.</p>"}
        drawn = views.curves(ShownSetting({"": tuple(numbers)}), name)
        return {**self._check(form.with_value(text, row, param, numbers)), curve: drawn}

    async def _search(self, key: gr.KeyUpData, chosen: list[str] | str, session: Session, request: gr.Request) -> Any:
        """Models whose names hold what is being typed; asked for once the typing pauses."""
        typist, words = f"{request.session_hash}", key.input_value
        self._typed_last[typist] = words
        await asyncio.sleep(_PAUSE)
        if self._typed_last.get(typist) != words:
            return gr.skip()
        self._typed_last.pop(typist)
        found = await asyncio.to_thread(hub.search, words, session.token if session else None)
        kept = chosen if isinstance(chosen, list) else [chosen or ""]
        return gr.update(choices=list(dict.fromkeys([*kept, *found])))

    # ---- the buttons -------------------------------------------------------------------------------------------------

    def _bind_buttons(self) -> None:
        shown = [self.refused, self.planned, self.table, self.lineage, self.card, self.too_big]
        how = {"concurrency_id": "hub", "concurrency_limit": _AT_ONCE}
        _on(self.plan.click, self._plan, [self.text], shown, **how)
        _on(self.merge.click, self._merge, [self.text], [*shown, *self._job_parts], **how)

    def _plan(self, text: str, session: Session) -> Updates:
        try:
            return self._show_plan(self.service.plan(text, session.token if session else None))
        except MergerError as error:
            return self._show_refusal(error)

    def _merge(self, text: str, profile: Profile, session: Session) -> Updates:
        try:
            if profile is None or session is None:
                raise MergerError(Problem("nobody is signed in, so there is nobody to publish for", hint=_SIGN_IN))
            job = self.service.submit(profile.username, _token(session), text)
        except MergerError as error:
            return self._show_refusal(error)
        return {**_hide(self.refused, self.too_big), **self._show_jobs(profile.username, job.id)}

    def _show_plan(self, found: Planned) -> Updates:
        notes = "".join(f"\n\n**Warning:** {code(str(note))}" for note in found.recipe.warnings)
        files = found.card()
        return {
            **_hide(self.refused, self.too_big),
            self.planned: gr.update(visible=True),
            self.table: markdown.plan_section(found.summary()) + notes,
            self.lineage: views.lineage(files, [str(model) for model in found.recipe.models]),
            self.card: views.card_text(files),
        }

    def _show_refusal(self, error: MergerError) -> Updates:
        return {
            **_hide(self.planned),
            self.refused: gr.update(value=views.refusal_html(error.problems), visible=True),
            self.too_big: gr.update(visible=isinstance(error, TooBigError)),
        }

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def _bind_jobs(self) -> None:
        shown = [self.jobs, self.job, self.log_box, self.log, self.job_buttons, self.cancel, self.timer]
        self._job_parts = shown
        _on(self.blocks.load, self._load, [self.text], [*self._form_parts, *shown])
        self.blocks.load(None, js=_LIVE)
        _on(self.timer.tick, self._refresh, [self.jobs], shown, show_progress="hidden")
        _on(self.jobs.input, self._refresh, [self.jobs], shown, show_progress="hidden")
        _on(self.cancel.click, self._cancel, [self.jobs], shown)
        _on(self.again.click, self._show_recipe, [self.jobs, self.text], self._form_parts)

    def _load(self, text: str, profile: Profile, session: Session) -> Updates:
        if profile is None or session is None:
            return dict(gr.skip())
        return {**self._show(form.with_destination(text, profile.username)), **self._refresh(None, profile, session)}

    def _refresh(self, chosen: str | None, profile: Profile, session: Session) -> Updates:
        if profile is None or session is None:
            hidden = _hide(self.jobs, self.log_box, self.job_buttons)
            return {**hidden, self.job: views.jobs_hint(signed_in=False), self.timer: gr.Timer(active=False)}
        self.service.queue.register_token(profile.username, _token(session))
        return self._show_jobs(profile.username, chosen)

    def _cancel(self, chosen: str | None, profile: Profile) -> Updates:
        if profile is None:
            return dict(gr.skip())
        try:
            self.service.queue.cancel(profile.username, chosen or "")
        except MergerError as error:
            raise gr.Error(str(error.problems[0].what)) from None
        return self._show_jobs(profile.username, chosen)

    def _show_recipe(self, chosen: str | None, text: str, profile: Profile) -> Updates:
        mine = self.service.queue.jobs.of(profile.username) if profile else []
        return self._show(next((job.recipe for job in mine if job.id == chosen), text))

    def _show_jobs(self, owner: str, chosen: str | None) -> Updates:
        """Somebody's jobs, the newest first, and one of them in full."""
        mine = list(reversed(self.service.queue.jobs.of(owner)))
        if not mine:
            return {self.job: views.jobs_hint(signed_in=True)}
        shown = next((job for job in mine if job.id == chosen), mine[0])
        choices = [(views.label(job), job.id) for job in mine]
        return {
            self.jobs: gr.update(choices=choices, value=shown.id, visible=True),
            self.job: views.job(shown, self.service.queue.ahead(shown)),
            self.log_box: gr.update(visible=bool(shown.log)),
            self.log: views.log(shown),
            self.job_buttons: gr.update(visible=True),
            self.cancel: gr.update(visible=not shown.is_over),
            self.timer: gr.Timer(active=any(not job.is_over for job in mine)),
        }


def _on(event: Any, function: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any], **how: Any) -> None:
    """What happens at an event of the page; no program may call it, and of several in a row the last one counts."""
    how = {"show_progress": "minimal", "trigger_mode": "always_last", "queue": True, **how}
    event(function, list(inputs), list(outputs), api_visibility=_PRIVATE, **how)


def _dropdown(id: str, label: str, info: str, choices: Sequence[Any], value: Any, **how: Any) -> gr.Dropdown:
    return gr.Dropdown(choices, value=value, label=label, info=info, elem_id=id, **how)


def _hide(*parts: Any) -> Updates:
    return {part: gr.update(visible=False) for part in parts}


def _token(session: gr.OAuthToken) -> Token:
    return Token(session.token, session.expires_at)


def _keep(*key: Any) -> dict[str, Any]:
    """What makes a control the same one when all are made anew, but for its value: else a click on the way is lost."""
    return {"key": key, "preserved_by_key": []}


def _summary(name: str) -> str:
    method = methods().get(name)
    return method.summary if method else "None of the methods is named in the recipe."
