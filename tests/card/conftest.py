"""Templates rendered in the tests' own process, where the process is not what is tested."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import pytest


@pytest.fixture
def rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's template is filled in here: without bounds, and without starting a Python."""

    def call(function: str, argument: Any, bounds: object) -> Any:
        module, name = function.split(":")
        return json.loads(json.dumps(getattr(import_module(module), name)(argument)))

    monkeypatch.setattr("merger.card.templates.call", call)
