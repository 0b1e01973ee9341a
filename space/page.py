"""The page: form and recipe side by side, plan and merge below them, and the merges of whoever is signed in.

It decides nothing: what a control does is a function of the recipe's text (form), what a button does is the service's.
Not here: the look of lists and figures (views), and what programs may call (api).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from merger.card.escape import code
from merger.cli import markdown
from merger.errors import MergerError, Problem
from merger.methods.registry import Param, methods
from space import form, hub, views
from space import texts as elsewhere
from space.api import offer
from space.form import Form, ShownSetting
from space.texts import FIRST, examples
from space.work import admission as rules
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
        self._bind_buttons()
        self._bind_jobs()

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
        text = examples()[FIRST]
        shown = form.read_form(text) or Form()
        self.shown = gr.State(shown)
        titles = [(method.title, name) for name, method in methods().items()]
        self.example = gr.Dropdown(
            list(examples()), value=FIRST, label="Start from", info="A recipe to begin with.", elem_id="example"
        )
        self.method = gr.Dropdown(
            titles, value=shown.method, label="Method", info=_summary(shown.method), elem_id="method"
        )
        self.models = gr.Dropdown(
            shown.models,
            value=shown.models,
            multiselect=True,
            allow_custom_value=True,
            label="Models",
            info="Type a part of a name to search the Hub, or owner/name@revision.",
            elem_id="models",
        )
        self.base = gr.Dropdown(
            ["", shown.base],
            value=shown.base,
            allow_custom_value=True,
            label="Base model",
            info="What the others were made from, for methods that need it.",
            elem_id="base",
        )
        gr.render(inputs=[self.shown])(self._parameters)
        with gr.Group():
            self.repo = gr.Textbox(
                shown.repo, label="Publish to", info="owner/name of a new repo on the Hub.", max_lines=1, elem_id="repo"
            )
            self.private = gr.Checkbox(shown.private, label="Private", elem_id="private")

    def _lay_out_recipe(self) -> None:
        self.text = gr.Code(
            examples()[FIRST],
            language="yaml",
            label="Recipe",
            elem_id="recipe",
            lines=12,
            max_lines=32,
            interactive=True,
            wrap_lines=True,
        )
        self.problems = gr.HTML(views.problem_list(rules.check(examples()[FIRST])), elem_id="problems")

    def _lay_out_plan(self) -> None:
        with gr.Column(visible=False, elem_id="planned") as self.planned:
            gr.Markdown("## Plan")
            self.table = gr.Markdown(elem_id="table")
            self.lineage = gr.HTML(elem_id="lineage")
            with gr.Accordion("Preview of the model card", open=False):
                self.card = gr.Markdown(elem_id="card", latex_delimiters=[])
        with gr.Column(visible=False, elem_id="elsewhere") as self.elsewhere:
            gr.Markdown(elsewhere.STEPS)
            gr.Code(
                elsewhere.workflow(),
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
        value = setting or ShownSetting({"": (float(form.starting(param)),)})
        name = f"{param.name} of {model}" if model else param.name
        with gr.Group(elem_classes=["control"]):
            if not value.is_simple:
                gr.HTML(f"<p><b>{param.name}</b> is given by filters, in the text.</p>{views.curves(value, name)}")
            elif len(value.numbers) > 1:
                self._gradient(param, value, row, name)
            else:
                self._number(param, value.numbers[0], row)

    def _number(self, param: Param, value: float, row: int | None) -> None:
        turned = partial(self._turned, param=param, row=row)
        about: dict[str, Any] = {"label": param.name, "info": param.description, "interactive": True}
        about |= _kept("number", param, row)
        control: gr.Checkbox | gr.Number | gr.Slider
        if param.kind == "bool":
            control = gr.Checkbox(bool(value), **about)
        elif param.kind == "float" and 0 < abs(value) < _STEP:
            control = gr.Number(value, minimum=param.range.least, maximum=param.range.most, **about)
        else:
            low, high = _range(param, value)
            control = gr.Slider(low, high, value, step=1 if param.kind == "int" else _STEP, **about)
        key = _kept("turned", param, row)["key"]
        _on(control.input, turned, [self.text, control], [self.text, self.problems], key=key)
        if param.kind == "float":
            kept = _kept("vary", param, row)
            vary = gr.Button(f"Vary {param.name} by layer", size="sm", elem_classes=["vary"], **kept)
            varied = partial(self._varied, param=param, row=row)
            _on(vary.click, varied, [self.text, control], self._all, key=(*kept["key"], "click"))

    def _gradient(self, param: Param, value: ShownSetting, row: int | None, name: str) -> None:
        words = ", ".join(f"{number:g}" for number in value.numbers)
        info = f"{param.description} Numbers from the first layer to the last, as many as you like."
        kept = partial(_kept, param=param, row=row)
        line = gr.Textbox(words, label=param.name, info=info, max_lines=1, interactive=True, **kept("line"))
        curve = gr.HTML(views.curves(value, name), **kept("curve"))
        bent = partial(self._bent, param=param, row=row, name=name)
        _on(line.input, bent, [self.text, line], [self.text, self.problems, curve], key=kept("bent")["key"])
        same = gr.Button("The same for all layers", size="sm", elem_classes=["vary"], **kept("same"))
        evened = partial(self._evened, param=param, row=row)
        _on(same.click, evened, [self.text, line], self._all, key=kept("evened")["key"])

    # ---- the form and the text ---------------------------------------------------------------------------------------

    @property
    def _all(self) -> list[Any]:
        """Whatever a change of the text may show in."""
        return [
            self.text, self.problems, self.shown, self.method, self.models, self.base, self.repo, self.private
        ]  # fmt: skip

    def _bind_form(self) -> None:
        _on(self.text.input, self._typed, [self.text], self._all)
        _on(self.example.input, self._begun, [self.example, self.text], self._all)
        _on(self.method.input, self._with_method, [self.text, self.method], self._all)
        _on(
            self.models.input,
            lambda text, names: _shown(form.with_models(text, names)),
            [self.text, self.models],
            self._all,
        )
        _on(
            self.base.input,
            lambda text, name: _shown(form.with_text(text, "base_model", name or "")),
            [self.text, self.base],
            self._all,
        )
        for box in (self.models, self.base):  # of "always_last" the page sends the first words typed again
            how = {"trigger_mode": "multiple", "concurrency_limit": None, "show_progress": "hidden"}
            _on(box.key_up, self._search, [box], [box], **how)
        for key, control in (("repo", self.repo), ("private", self.private)):
            changed = partial(self._to, key=key)
            _on(control.input, changed, [self.text, control], [self.text, self.problems])

    def _typed(self, text: str) -> list[Any]:
        return [gr.skip(), *_shown(text)[1:]]

    def _begun(self, title: str, text: str, profile: Profile) -> list[Any]:
        return _shown(_with_destination(examples().get(title, text), profile))

    def _with_method(self, text: str, name: str) -> list[Any]:
        return _shown(form.with_method(text, methods()[name], methods()))

    def _to(self, text: str, value: str | bool, key: str) -> list[Any]:
        text = form.with_publish(text, key, value)
        return [text, views.problem_list(rules.check(text))]

    def _turned(self, text: str, value: float, param: Param, row: int | None) -> list[Any]:
        text = form.with_value(text, row, param, [value])
        return [text, views.problem_list(rules.check(text))]

    def _varied(self, text: str, value: float, param: Param, row: int | None) -> list[Any]:
        return _shown(form.with_value(text, row, param, [value, value]))

    def _evened(self, text: str, words: str, param: Param, row: int | None) -> list[Any]:
        return _shown(form.with_value(text, row, param, _numbers(words)[:1] or [float(form.starting(param))]))

    def _bent(self, text: str, words: str, param: Param, row: int | None, name: str) -> list[Any]:
        numbers = _numbers(words)
        if not numbers:
            told = "<p class='fine'>Write numbers with commas between them, such as 0, 0.5, 1.</p>"
            return [gr.skip(), gr.skip(), told]
        text = form.with_value(text, row, param, numbers)
        drawn = views.curves(ShownSetting({"": tuple(numbers)}), name)
        return [text, views.problem_list(rules.check(text)), drawn]

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
        shown = [self.refused, self.planned, self.table, self.lineage, self.card, self.elsewhere]
        _on(self.plan.click, self._plan, [self.text], shown, concurrency_id="hub", concurrency_limit=_AT_ONCE)
        merged = [*shown, *self._of_jobs]
        _on(self.merge.click, self._merge, [self.text], merged, concurrency_id="hub", concurrency_limit=_AT_ONCE)

    def _plan(self, text: str, session: Session) -> list[Any]:
        try:
            return _plan_shown(self.service.plan(text, session.token if session else None))
        except MergerError as error:
            return _refused(error)

    def _merge(self, text: str, profile: Profile, session: Session) -> list[Any]:
        if profile is None or session is None:
            problem = Problem("nobody is signed in, so there is nobody to publish for", hint=_SIGN_IN)
            return [*_refused(MergerError(problem)), *_nothing(7)]
        try:
            job = self.service.submit(profile.username, Token(session.token, session.expires_at), text)
        except MergerError as error:
            return [*_refused(error), *_nothing(7)]
        gone = [gr.update(visible=False), *_nothing(4), gr.update(visible=False)]
        return [*gone, *self._listed(profile.username, job.id)]

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def _bind_jobs(self) -> None:
        parts = self._of_jobs
        _on(self.blocks.load, self._arrived, [self.text], [*self._all, *parts])
        self.blocks.load(None, js=_LIVE)
        _on(self.timer.tick, self._ticked, [self.jobs], parts, show_progress="hidden")
        _on(self.jobs.input, self._ticked, [self.jobs], parts, show_progress="hidden")
        _on(self.cancel.click, self._cancelled, [self.jobs], parts)
        _on(self.again.click, self._taken, [self.jobs, self.text], self._all)

    @property
    def _of_jobs(self) -> list[Any]:
        """Whatever a change of a job may show in."""
        return [self.jobs, self.job, self.log_box, self.log, self.job_buttons, self.cancel, self.timer]

    def _arrived(self, text: str, profile: Profile, session: Session) -> list[Any]:
        if profile is None or session is None:
            return _nothing(len(self._all) + 7)
        self.service.queue.register_token(profile.username, Token(session.token, session.expires_at))
        return [*_shown(_with_destination(text, profile)), *self._listed(profile.username, None)]

    def _ticked(self, chosen: str | None, profile: Profile, session: Session) -> list[Any]:
        if profile is None or session is None:
            return [
                gr.update(visible=False),
                views.jobs_hint(signed_in=False),
                gr.update(visible=False),
                gr.skip(),
                *[gr.update(visible=False)] * 2,
                gr.Timer(active=False),
            ]
        self.service.queue.register_token(profile.username, Token(session.token, session.expires_at))
        return self._listed(profile.username, chosen)

    def _cancelled(self, chosen: str | None, profile: Profile) -> list[Any]:
        if profile is None:
            return _nothing(7)
        try:
            self.service.queue.cancel(profile.username, chosen or "")
        except MergerError as error:
            raise gr.Error(str(error.problems[0].what)) from None
        return self._listed(profile.username, chosen)

    def _taken(self, chosen: str | None, text: str, profile: Profile) -> list[Any]:
        mine = self.service.queue.jobs.of(profile.username) if profile else []
        return _shown(next((job.recipe for job in mine if job.id == chosen), text))

    def _listed(self, owner: str, chosen: str | None) -> list[Any]:
        """Somebody's jobs, the newest first, and one of them in full."""
        mine = list(reversed(self.service.queue.jobs.of(owner)))
        if not mine:
            return [gr.skip(), views.jobs_hint(signed_in=True), *_nothing(5)]
        shown = next((job for job in mine if job.id == chosen), mine[0])
        return [
            gr.update(choices=[(views.label(job), job.id) for job in mine], value=shown.id, visible=True),
            views.job(shown, self.service.queue.ahead(shown)),
            gr.update(visible=bool(shown.log)),
            views.log(shown),
            gr.update(visible=True),
            gr.update(visible=not shown.is_over),
            gr.Timer(active=any(not job.is_over for job in mine)),
        ]


def _on(event: Any, function: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any], **how: Any) -> None:
    """What happens at an event of the page; no program may call it, and of several in a row the last one counts."""
    how = {"show_progress": "minimal", "trigger_mode": "always_last", "queue": True, **how}
    event(function, list(inputs), list(outputs), api_visibility=_PRIVATE, **how)


def _numbers(words: str) -> list[float]:
    try:
        return form.numbers_of(words)
    except ValueError:
        return []


def _kept(part: str, param: Param, row: int | None) -> dict[str, Any]:
    """What makes a control the same one when all are made anew, but for its value: else a click on the way is lost."""
    return {"key": (part, param.name, row), "preserved_by_key": []}


def _nothing(count: int) -> list[Any]:
    return [gr.skip() for _ in range(count)]


def _shown(text: str) -> list[Any]:
    """A text in all that shows it; the form stays as it is while the text is no YAML."""
    told = [text, views.problem_list(rules.check(text))]
    shown = form.read_form(text)
    if shown is None:
        return [*told, *_nothing(6)]
    names = list(dict.fromkeys([*shown.models, shown.base]))
    return [
        *told,
        shown,
        gr.update(value=shown.method if shown.method in methods() else None, info=_summary(shown.method)),
        gr.update(choices=names, value=shown.models),
        gr.update(choices=names, value=shown.base),
        shown.repo,
        shown.private,
    ]


def _summary(name: str) -> str:
    method = methods().get(name)
    return method.summary if method else "None of the methods is named in the recipe."


def _with_destination(text: str, profile: Profile) -> str:
    """Whoever is signed in publishes under their own name, unless the recipe says otherwise."""
    shown = form.read_form(text)
    if profile is None or shown is None or shown.repo:
        return text
    return form.with_publish(text, "repo", form.suggested(shown, profile.username))


def _plan_shown(found: Planned) -> list[Any]:
    notes = "".join(f"\n\n**Warning:** {code(str(note))}" for note in found.recipe.warnings)
    table = markdown.plan_section(found.plan, found.to) + notes
    files = found.card()
    shown = [table, views.lineage(files, [str(model) for model in found.recipe.models]), _card(files)]
    return [gr.update(visible=False), gr.update(visible=True), *shown, gr.update(visible=False)]


def _card(files: Mapping[str, bytes]) -> str:
    """A card as the Hub shows it: its front matter apart, and its pictures in it."""
    text = files["README.md"].decode()
    for name, content in files.items():
        text = text.replace(f"({name})", f"({views.data_url(content)})")
    parts = text.split("---\n", 2)
    return f"```yaml\n{parts[1]}```\n\n{parts[2]}" if len(parts) == 3 and not parts[0].strip() else text


def _refused(error: MergerError) -> list[Any]:
    told = gr.update(value=views.refusal(error.problems), visible=True)
    return [told, gr.update(visible=False), *_nothing(3), gr.update(visible=isinstance(error, TooBigError))]


def _range(param: Param, value: float) -> tuple[float, float]:
    """Where a slider begins and ends: the parameter's bounds, else what is usual."""
    low, high = (param.bounds.low, param.bounds.high) if param.bounds else (None, None)
    least = min(0.0 if value >= 0 else -2.0, value) if low is None else min(low, value)
    most = max(2.0, 2 * value) if high is None else max(high, value)
    return least, most
