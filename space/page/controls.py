"""The controls of a method's parameters: those of each model, and those of all.

They are made anew with each recipe that has others. Not here: the rest of the form, and the text (editor).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from merger.methods.registry import Param, methods
from space.page import form, views
from space.page.form import Form, ShownSetting

PRIVATE = "private"
_STEP = 0.01
_CURVES = (Path(__file__).parent / "curves.js").read_text("utf-8")

Updates = dict[Any, Any]
"""What an event of the page changes, by component."""


def on(event: Any, function: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any], **how: Any) -> Any:
    """What happens at an event of the page; no program may call it, and of several in a row the last one counts."""
    how = {"show_progress": "minimal", "trigger_mode": "always_last", "queue": True, **how}
    return event(function, list(inputs), list(outputs), api_visibility=PRIVATE, **how)


class Controls:
    """Sliders, boxes and curves.

    Args:
        text: the recipe.
        parts: the components that `check` brings up to date.
        check: what changes on the page with the text.
        on_edit: has a component's event change the text; and the form with it, unless it is told ``in_form=False``.
    """

    def __init__(
        self, text: gr.Code, parts: Sequence[Any], check: Callable[[str], Updates], on_edit: Callable[..., None]
    ) -> None:
        self._text, self._parts, self._check, self._on_edit = text, parts, check, on_edit

    def render(self, shown: Form) -> None:
        """Those of the method in a recipe."""
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
                how = "given by filters" if value.curves else "left open for a search"
                gr.HTML(f"<p><b>{param.name}</b> is {how}, in the text.</p>{views.curves(value, name)}")
            elif len(value.numbers) > 1:
                self._gradient(param, value, row, name)
            else:
                self._number(param, value.numbers[0], row)

    def _number(self, param: Param, value: float, row: int | None) -> None:
        key = (param.name, row)
        about: dict[str, Any] = {"label": param.name, "info": _sentence(param), "interactive": True}
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
        info = f"{_sentence(param)} Numbers from the first layer to the last, as many as you like."
        how: dict[str, Any] = {"max_lines": 1, "interactive": True, "elem_classes": ["line"], **_keep("line", *key)}
        line = gr.Textbox(words, label=param.name, info=info, **how)
        curve = gr.HTML(_curve(value, name, param), js_on_load=_CURVES, **_keep("curve", *key))
        bend = partial(self._bend, param=param, row=row, name=name, curve=curve)
        on(line.input, bend, [self._text, line], [*self._parts, curve], key=("bend", *key))

        def drag(text: str, moved: gr.EventData) -> Updates:
            words = str(getattr(moved, "numbers", ""))
            return {**bend(text, words), line: words}

        on(curve.input, drag, [self._text], [*self._parts, curve, line], key=("drag", *key))
        same = gr.Button("The same for all layers", size="sm", elem_classes=["vary"], **_keep("same", *key))

        def level(text: str, words: str) -> str:
            return form.with_value(text, row, param, form.parse_numbers(words)[:1] or [form.start_value(param)])

        self._on_edit(same.click, line, level, key=("level", *key))

    def _bend(self, text: str, words: str, param: Param, row: int | None, name: str, curve: gr.HTML) -> Updates:
        numbers = form.parse_numbers(words)
        if not numbers:
            return {curve: "<p class='fine'>Write numbers with commas between them, such as 0, 0.5, 1.</p>"}
        drawn = _curve(ShownSetting({"": tuple(numbers)}), name, param)
        return {**self._check(form.with_value(text, row, param, numbers)), curve: drawn}


def _sentence(param: Param) -> str:
    return param.description[:1].upper() + param.description[1:]


def _curve(value: ShownSetting, name: str, param: Param) -> str:
    """As it can be dragged."""
    return views.curves(value, name, (*form.slider_range(param, 0.0), 1 if param.kind == "int" else _STEP))


def _keep(*key: Any) -> dict[str, Any]:
    """What makes a control the same one when all are made anew, but for its value: else a click on the way is lost."""
    return {"key": key, "preserved_by_key": []}
