"""The bot: it merges the merge.yaml of a repo when it changes, and answers comments that ask for a plan or a merge.

The Hub tells of both by a webhook. What a webhook says is only taken for where to look: who wrote what is then read
from the Hub itself. The bot reads models without any token, and writes into a repo only for those who might do so
themselves. Not here: planning and queueing (work.service), reading comments (comments) and the Hub (talk), and what was
asked before (webhook_events).
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from huggingface_hub import WebhookPayload
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from pydantic import ValidationError

from merger.cli import markdown
from merger.errors import MergerError, Problem, RecipeError
from merger.safety import secrets
from merger.safety.numbers import size
from space.bot.comments import command, recipe_block
from space.bot.talk import FILE, MARK, Talk
from space.bot.webhook_events import WebhookEvent, WebhookEvents, commit_event, parse_event
from space.work.job_table import How, JobError, QueuedMerge
from space.work.queue import Token

if TYPE_CHECKING:
    from space.work.service import Planned, Service

ROUTE = "/bot/webhook"
_PAUSE = 1.0
_TRIES = 10
_LATER = 60.0
"""Seconds until what the queue has no room for is tried again."""

_FOLLOWS = "What becomes of it will be said here."
_MOVED = "There is a newer commit on main: it is looked at again."
_AGAIN = "It is tried again by itself."

log = logging.getLogger("space.bot.bot")


class Bot:
    """Hears webhooks and answers them, in a thread of its own.

    Args:
        service: what plans and queues.
        token: the bot's own, which may write into the repos that it works in, and comment.
        secret: what the Hub sends with every webhook of ours.
    """

    def __init__(self, service: Service, token: str, secret: str) -> None:
        self._service, self._token, self._secret = service, Token(token), secret
        self._talk = Talk(token)
        self._events = WebhookEvents(service.queue.records)
        self._wake, self._is_stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="bot", daemon=True)

    @classmethod
    def of(cls, service: Service, environment: Mapping[str, str]) -> Bot | None:
        """The bot of MERGER_BOT_TOKEN and MERGER_BOT_SECRET; None where they are not set.

        Raises:
            ValueError: only one of them is.
        """
        token, secret = environment.get("MERGER_BOT_TOKEN"), environment.get("MERGER_BOT_SECRET")
        if bool(token) != bool(secret):
            raise ValueError("the bot needs both MERGER_BOT_TOKEN and MERGER_BOT_SECRET")
        return cls(service, token, secret) if token and secret else None

    def start(self) -> None:
        """Begin to answer; what was under way when an earlier process ended goes on at once."""
        for owner in {job.owner for job in self._service.queue.jobs.open() if job.owner.startswith(MARK)}:
            self._service.queue.register_token(owner, self._token)
        self._thread.start()

    def stop(self) -> None:
        """End; what is open is answered by the next process."""
        self._is_stopping = True
        self._wake.set()

    # ---- hearing -----------------------------------------------------------------------------------------------------

    def offer(self, app: FastAPI) -> None:
        """Add the webhook's route."""
        app.post(ROUTE)(self._webhook)

    async def _webhook(self, request: Request) -> JSONResponse:
        given = request.headers.get("X-Webhook-Secret", "")
        if not hmac.compare_digest(given.encode(), self._secret.encode()):
            log.warning("a webhook without our secret was refused")
            return JSONResponse({"error": "this is not the secret of our webhook"}, 403)
        status, told = self.hear(await request.body())
        return JSONResponse(told, status)

    def hear(self, body: bytes) -> tuple[int, dict[str, str]]:
        """Take note of a webhook of ours; the answer's status and content."""
        try:
            event = parse_event(WebhookPayload.model_validate_json(body))
        except ValidationError:
            return 400, {"error": "this is no webhook of the Hub's, version 3"}
        if event is None:
            return 200, {"state": "nothing to do"}
        is_new = self._events.add(event)
        self._wake.set()
        return 200, {"state": "heard" if is_new else "known already"}

    # ---- answering ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            self.turn()
            self._wake.wait(_PAUSE)

    def turn(self) -> None:
        """One step with all that is open."""
        for event in self._events.open():
            self._step_safely(event)

    def _step_safely(self, event: WebhookEvent) -> None:
        """A step that fails for the Hub's sake is taken again, some times; then it is said, and can be asked again."""
        try:
            self._step(event)
        except (HfHubHTTPError, httpx.HTTPError) as error:
            log.warning("%s: the Hub refused (%s)", event.repo, type(error).__name__)
            now = self._events.get(event.key)
            if now.tries < _TRIES:
                self._events.change(now, tries=now.tries + 1)
            else:
                self._give_up(now, "The Hub has refused it too often: please ask again later.")
        except Exception as error:
            log.exception("%s: a bug of ours", event.repo)
            words = f"This has failed for a fault of ours ({type(error).__name__}): please report it, and ask again."
            now = self._events.get(event.key)
            if event.state == "job" or now.state != "job":  # else it was just queued: its end is said later
                self._give_up(now, words)

    def _give_up(self, event: WebhookEvent, words: str) -> None:
        self._events.change(event, state="over")
        if event.is_meant:
            try:
                self._close(event, words)
            except Exception:
                log.exception("%s: nobody could be told", event.repo)

    def _step(self, event: WebhookEvent) -> None:
        if event.state == "job":
            self._follow(event)
        elif event.state == "waits" and (time.time() < event.again or self._events.is_busy(event.repo)):
            return
        elif event.comment:
            self._answer(event)
        elif not self._events.is_busy(event.repo):
            self._merge_file(event)

    def _answer(self, event: WebhookEvent) -> None:
        """What a comment asks for, if it asks us."""
        comment = self._talk.comment(event)
        try:
            verb = None if comment is None else command(comment.content, self._talk.name)
            if comment is None or verb is None:
                self._close(event)
                return
            event = self._events.change(event, is_meant=True)
            text = recipe_block(comment.content)
            planned = self._plan(text, event.repo)
            if verb == "plan":
                self._close(event, plan_words(planned, event.repo))
                return
            create_pr = not self._talk.may_write(comment.author, event.repo)
            if self._events.is_busy(event.repo):
                self._put_off(event, [Problem(f"another merge into {event.repo} is under way")])
            else:
                self._queue(event, comment.author, text, planned, create_pr=create_pr)
        except JobError as error:
            self._put_off(event, error.problems, _LATER)
        except MergerError as error:
            self._close(event, markdown.problems_section("Not merged", error.problems))

    def _merge_file(self, event: WebhookEvent) -> None:
        """A commit to main since which merge.yaml is another: what main has now is merged, once, or refused."""
        head = self._talk.head(event.repo)
        commit, text = head or ("", "")
        if head is None or text == self._talk.file(event.repo, event.old):
            self._close(event)
            return
        if commit != event.new:  # that commit is dealt with in the place of all before it, or was already
            self._events.add(commit_event(event.repo, event.old, commit))
            self._close(event, f"A newer {FILE} is merged in its place." if event.num else "")
            return
        authors = self._talk.authors(event.repo, commit)
        if self._talk.name in authors:
            self._close(event)
            return
        event = self._events.change(event, is_meant=True)
        try:
            author = next((name for name in authors if name), event.repo.split("/")[0])  # who may write committed it
            self._queue(event, author, text, self._plan(text, event.repo), force=True)
        except JobError as error:
            self._put_off(event, error.problems, _LATER)
        except MergerError as error:
            self._close(event, markdown.problems_section(f"{FILE} of {event.new[:12]} is not merged", error.problems))

    def _plan(self, text: str, repo: str) -> Planned:
        planned = self._service.plan(text, None)
        said = planned.recipe.publish.repo
        if said not in (None, repo):
            what = f"the recipe publishes to {said}, and this is {repo}"
            raise RecipeError(Problem(what, planned.recipe.publish.at, hint="the bot writes only where it is asked"))
        return planned

    def _queue(
        self,
        event: WebhookEvent,
        author: str,
        text: str,
        planned: Planned,
        create_pr: bool = False,
        force: bool = False,
    ) -> None:
        main, words = self._talk.main(event.repo), plan_words(planned, event.repo)
        how = How(is_public=True, create_pr=create_pr, force=force)
        job = self._service.submit(MARK + author, self._token, text, event.repo, how)
        event = self._events.change(event, state="job", job=job.id, main=main, is_begun=False)
        place = place_words(self._service.queue.ahead(job))
        self._say(event, f"{words}\n\n{place} {_FOLLOWS}")

    def _put_off(self, event: WebhookEvent, problems: Sequence[Problem], seconds: float = 0.0) -> None:
        """Wait for a while, and until the merge under way in its repo is over; that is said once."""
        if event.state == "new":
            event = self._say(event, f"{markdown.problems_section('Not yet', problems)}\n\n{_AGAIN}")
        self._events.change(event, state="waits", again=time.time() + seconds)

    def _follow(self, event: WebhookEvent) -> None:
        """Say what has become of a merge, where there is news."""
        job = self._service.queue.jobs.get(event.job)
        if job is not None and job.state == "failed" and self._talk.main(event.repo) != event.main:
            event = self._say(event, f"{result_words(job)}\n\n{_MOVED}")
            self._events.change(event, state="waits", again=0.0)
        elif job is None or job.is_over:
            self._close(event, result_words(job))
        elif job.state == "running" and not event.is_begun:
            event = self._say(event, f"The merge has begun: {size(job.total)} to make.")
            self._events.change(event, is_begun=True)

    def _say(self, event: WebhookEvent, words: str) -> WebhookEvent:
        """Say something where it was asked; of a commit, in a discussion that is opened about it."""
        secrets.refuse_tokens({"what the bot would say": words})
        num = self._talk.say(event.repo, event.num, f"{FILE} at {event.new[:12]}", words)
        return event if event.num is not None else self._events.change(event, num=num)

    def _close(self, event: WebhookEvent, words: str = "") -> None:
        event = self._say(event, words) if words else event
        self._events.change(event, state="over")


def plan_words(planned: Planned, repo: str) -> str:
    """A plan as a comment."""
    words = markdown.plan_section(planned.summary(repo))
    warnings = planned.recipe.warnings
    return f"{words}\n\n{markdown.problems_section('Warnings', warnings)}" if warnings else words


def place_words(ahead: int) -> str:
    """Where a job stands in the queue."""
    return "The merge begins now." if ahead == 0 else f"The merge is queued; {ahead} come before it."


def result_words(job: QueuedMerge | None) -> str:
    """What has become of a job."""
    if job is None:
        return "The merge is lost: please ask again."
    if job.state == "done":
        told = "Published" if job.is_new else "Nothing to do: it is already there"
        return f"{told}: {job.where}" + (f" at commit `{job.commit}`" if job.commit else "")
    return markdown.problems_section(f"The merge has {job.state}", [Problem(said) for said in job.problems])
