"""What programs may call, by gradio_client or as MCP tools: methods, check, plan, and with a token merge, job, cancel.

A token comes in the header ``Authorization: Bearer hf_…`` of each call and is no input. Not here: the page's events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Any, ParamSpec

import gradio as gr

from merger.cli.text import method_text, plan_text
from merger.errors import MergerError, Problem
from merger.methods import registry
from space import hub
from space.work import admission
from space.work.job_table import JobError, QueuedMerge
from space.work.queue import Token
from space.work.service import Service

P = ParamSpec("P")
_HEADERS = ("authorization", "x-hf-authorization")


def offer(service: Service) -> None:
    """Add the functions to the page that is being made."""
    api = Api(service)
    for function in (api.methods, api.check, api.plan, api.merge, api.job, api.cancel):
        gr.api(function, api_name=function.__name__)  # type: ignore[attr-defined]


def _answers(call: Callable[P, dict[str, Any]]) -> Callable[P, dict[str, Any]]:
    """The function, of which a refusal is an answer too."""

    @wraps(call)
    def answer(*given: P.args, **named: P.kwargs) -> dict[str, Any]:
        try:
            return call(*given, **named)
        except MergerError as error:
            return {"ok": False, "exit_code": error.exit_code, "problems": list(map(_plain, error.problems))}

    return answer


class Api:
    """The functions; each answers with plain data, and a refusal is an answer too."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @_answers
    def methods(self, name: str = "") -> dict[str, Any]:
        """List the merge methods, or tell all about one of them.

        Args:
            name: a method's name; empty for the list.
        """
        if not name:
            return {method.name: method.summary for method in registry.methods().values()}
        if (found := registry.methods().get(name)) is None:
            raise MergerError(Problem(f"there is no method {name!r}"))
        return {"text": method_text(found)}

    def check(self, recipe: str) -> dict[str, Any]:
        """Find what is wrong with a recipe, without looking at its models.

        Args:
            recipe: the recipe's YAML text.
        """
        checked = admission.check(recipe)
        warnings = [_plain(warning) for warning in checked.warnings]
        return {"ok": not checked.problems, "problems": list(map(_plain, checked.problems)), "warnings": warnings}

    @_answers
    def plan(self, recipe: str, request: gr.Request) -> dict[str, Any]:
        """Tell what a recipe makes and what that takes, without reading any tensor.

        Args:
            recipe: the recipe's YAML text; its models are read with the caller's token where one is sent.
        """
        found = self._service.plan(recipe, _token(request))
        about = found.plan.as_json()
        kept = ("hash", "models", "seed", "peak_memory", "disk", "read_bytes", "size")
        return {"ok": True, **{name: about[name] for name in kept}, "text": plan_text(found.summary())}

    @_answers
    def merge(self, recipe: str, to: str, request: gr.Request) -> dict[str, Any]:
        """Queue a merge that is published on the Hub as the caller; needs a token in the header Authorization.

        Args:
            recipe: the recipe's YAML text.
            to: owner/name of the repo for the result; empty for the recipe's publish.repo.
        """
        owner, token = _caller(request)
        return self._about(self._service.submit(owner, token, recipe, to or None))

    @_answers
    def job(self, id: str, request: gr.Request) -> dict[str, Any]:
        """Tell how far one of the caller's merges is; needs a token in the header Authorization.

        Args:
            id: the job's id, as merge answered it.
        """
        owner, token = _caller(request)
        self._service.queue.register_token(owner, token)
        return self._about(self._service.queue.job(owner, id))

    @_answers
    def cancel(self, id: str, request: gr.Request) -> dict[str, Any]:
        """Stop one of the caller's merges; needs a token in the header Authorization.

        Args:
            id: the job's id, as merge answered it.
        """
        owner, _ = _caller(request)
        return self._about(self._service.queue.cancel(owner, id))

    def _about(self, job: QueuedMerge) -> dict[str, Any]:
        kept = ("id", "to", "state", "total", "made", "log", "problems", "where", "commit")
        about = asdict(job)
        return {"ok": True, **{name: about[name] for name in kept}, "ahead": self._service.queue.ahead(job)}


def _token(request: gr.Request) -> str | None:
    given = next((found for name in _HEADERS if (found := request.headers.get(name))), "")
    return given.removeprefix("Bearer ").strip() or None


def _caller(request: gr.Request) -> tuple[str, Token]:
    token = _token(request)
    if token is None:
        raise JobError(Problem("there is no token", hint="send one of yours in the header Authorization: Bearer hf_…"))
    owner, reach = hub.owner_of(token)
    return owner, Token(token, reach=reach)


def _plain(problem: Problem) -> dict[str, Any]:
    """A problem as data; without the recipe's name, for a map with a path is a file to the client."""
    place = {"line": problem.at.line, "column": problem.at.column} if problem.at else {}
    return {"what": problem.what, "where": problem.where, "hint": problem.hint, **place}
