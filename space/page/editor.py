"""Form and recipe, side by side: what is turned changes the text, and what is typed into the text moves the form.

What a control does is a function of the recipe's text (form). Not here: what is made of the recipe (planned, merges).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from merger.methods.registry import methods
from space import hub
from space.page import form, views
from space.page.controls import Controls, Updates, on
from space.page.form import Form
from space.page.texts import FIRST, examples, family_sentence, method_choices
from space.work import admission

_PAUSE = 0.3
_COPY = "Copy a link to this recipe"
_KEEP = f"""
text => {{
  try {{ if (window.isRecipeOpen) localStorage.setItem('merger-recipe', text) }} catch {{ }}
  return {_COPY!r};
}}
"""
"""So that it is there after a reload, and after signing in; a browser that keeps nothing says so by an error."""

OPEN = """
(text, from) => {
  const asked = new URLSearchParams(location.search);
  if (asked.has('recipe') || asked.has('from')) history.replaceState(null, '', location.pathname);
  try { text = localStorage.getItem('merger-recipe') ?? text } catch { }
  return [asked.get('recipe') ?? text, asked.get('from') ?? ''];
}
"""
"""The recipe of the page's address, once; else the one that was here last."""

OPENED = "() => { window.isRecipeOpen = true }"
"""From now on what stands there is kept."""

_LINK = """
async text => {
  const link = location.origin + location.pathname + '?recipe=' + encodeURIComponent(text);
  try { await navigator.clipboard.writeText(link) } catch { prompt('The link to this recipe', link) }
  return 'The link is copied';
}
"""

Profile = gr.OAuthProfile | None
Session = gr.OAuthToken | None


class Editor:
    """The components of form and text, and how they follow each other."""

    def __init__(self) -> None:
        self._typed_last: dict[str, str] = {}

    def lay_out_form(self) -> None:
        """The form."""
        shown = form.read_form(examples()[FIRST]) or Form()
        self.shown = gr.State(shown)
        self.example = _dropdown("example", "Start from", "Each of these runs as it stands.", list(examples()), FIRST)
        self.method = _dropdown(
            "method", "Method (★: start here)", _about(shown.method), method_choices(), shown.method
        )
        info = "Type a part of a name to search the Hub, or owner/name@revision."
        free = {"allow_custom_value": True}
        self.models = _dropdown("models", "Models", info, shown.models, shown.models, multiselect=True, **free)
        info = "What the others were made from, for methods that need it."
        self.base = _dropdown("base", "Base model", info, ["", shown.base], shown.base, **free)
        gr.render(inputs=[self.shown])(self._render_controls)
        with gr.Group():
            info = "owner/name of a repo on the Hub, which is made if there is none."
            self.repo = gr.Textbox(shown.repo, label="Publish to", info=info, max_lines=1, elem_id="repo")
            self.private = gr.Checkbox(shown.private, label="Private", elem_id="private")

    def lay_out_text(self) -> None:
        """The recipe, and what is wrong with it."""
        text = examples()[FIRST]
        look: dict[str, Any] = {"lines": 12, "max_lines": 32, "wrap_lines": True, "buttons": ["copy"]}
        self.text = gr.Code(text, language="yaml", label="Recipe", elem_id="recipe", interactive=True, **look)
        self.problems = gr.HTML(views.problem_list(admission.check(text)), elem_id="problems")
        self.link = gr.Button(_COPY, size="sm", elem_id="link")

    def bind(self, answers: Updates) -> None:
        """Let text and form follow each other.

        Args:
            answers: what becomes of the components that answer to the text as it was, once it changes.
        """
        self._answers = answers
        self._text_parts = [self.text, self.problems, *answers]
        self.parts = [*self._text_parts, self.shown, self.method, self.models, self.base, self.repo, self.private]
        self._controls = Controls(self.text, self._text_parts, self._check, self._on_edit)
        self.text.change(None, [self.text], [self.link], js=_KEEP, api_visibility="private")
        self.link.click(None, [self.text], [self.link], js=_LINK, api_visibility="private")
        on(self.text.input, self._read_text, [self.text], self.parts)
        on(self.example.input, self._load_example, [self.example, self.text], self.parts)
        self._on_edit(self.method.input, self.method, _with_method)
        self._on_edit(self.models.input, self.models, _with_models)
        self._on_edit(self.base.input, self.base, lambda text, name: form.with_text(text, "base_model", name or ""))
        for key, field in (("repo", self.repo), ("private", self.private)):
            self._on_edit(field.input, field, lambda text, value, key=key: form.with_publish(text, key, value), False)
        for box in (self.models, self.base):  # of "always_last" the page sends the first words typed again
            how = {"trigger_mode": "multiple", "concurrency_limit": None, "show_progress": "hidden"}
            on(box.key_up, self._search, [box], [box], **how)

    def show(self, text: str) -> Updates:
        """A text in all that shows it; the form stays as it is while the text is no YAML."""
        updates, shown = self._check(text), form.read_form(text)
        if shown is None:
            return updates
        names = list(dict.fromkeys([*shown.models, shown.base]))
        known = shown.method if shown.method in methods() else None
        return updates | {
            self.shown: shown,
            self.method: gr.update(value=known, info=_about(shown.method)),
            self.models: gr.update(choices=names, value=shown.models),
            self.base: gr.update(choices=names, value=shown.base),
            self.repo: shown.repo,
            self.private: shown.private,
        }

    def _render_controls(self, shown: Form) -> None:
        self._controls.render(shown)

    def _on_edit(self, event: Any, control: Any, edit: Callable[..., str], in_form: bool = True, **how: Any) -> None:
        """A control changes the text; the form is brought up to date with it, unless it shows the change already."""
        show, parts = (self.show, self.parts) if in_form else (self._check, self._text_parts)
        on(event, lambda text, value: show(edit(text, value)), [self.text, control], parts, **how)

    def _check(self, text: str) -> Updates:
        return {self.text: text, self.problems: views.problem_list(admission.check(text)), **self._answers}

    def _read_text(self, text: str) -> Updates:
        return {**self.show(text), self.text: gr.skip()}

    def _load_example(self, title: str, text: str, profile: Profile) -> Updates:
        chosen = examples().get(title, text)
        return self.show(form.with_destination(chosen, profile.username) if profile else chosen)

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


def _with_method(text: str, name: str) -> str:
    return _named(text, form.with_method(text, methods()[name], methods()))


def _with_models(text: str, names: Sequence[str]) -> str:
    return _named(text, form.with_models(text, names))


def _named(before: str, after: str) -> str:
    """With the name that was suggested following what the recipe has become."""
    shown = form.read_form(after)
    owner = shown.repo.partition("/")[0] if shown else ""
    return form.with_destination(after, owner, before) if owner else after


def _dropdown(id: str, label: str, info: str, choices: Sequence[Any], value: Any, **how: Any) -> gr.Dropdown:
    return gr.Dropdown(choices, value=value, label=label, info=info, elem_id=id, **how)


def _about(name: str) -> str:
    method = methods().get(name)
    return f"{family_sentence(method)} {method.summary}" if method else "The recipe names no method that there is here."
