"""The bot: it merges the merge.yaml of a repo when it changes, and answers comments that ask for a plan or a merge.

The Hub tells of both by a webhook. What a webhook says is only taken for where to look: who wrote what is then read
from the Hub itself. The bot reads models without any token, and writes into a repo only for those who might do so
themselves. Not here: planning and queueing (desk), reading comments (comments), and what was asked before (asks).
"""

from __future__ import annotations

import hmac
import logging
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from huggingface_hub import DiscussionComment, GitCommitInfo, HfApi, RepoFile, WebhookPayload
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from pydantic import ValidationError

from merger.cli import markdown
from merger.cli import text as console
from merger.errors import MergerError, Problem, RecipeError
from merger.safety import secrets
from merger.safety.names import is_repo
from space.bot.comments import command, recipe_block
from space.bot.webhook_events import Ask, Asks
from space.work import admission as rules
from space.work.job_table import How, JobError, QueuedMerge
from space.work.queue import Token

if TYPE_CHECKING:
    from space.work.service import Desk, Planned

ROUTE = "/bot/webhook"
FILE = "merge.yaml"
MARK = "@"
"""Before the name of whoever asked: the owner of a job of the bot's, whom nobody can sign in as."""

_PAUSE = 1.0
_TRIES = 10
_LATER = 60.0
"""Seconds until what the queue has no room for is tried again."""

_MOST_NUM = 1 << 31
_SHA = re.compile(r"(?!0+$)[0-9a-f]{40}(?:[0-9a-f]{24})?", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_NOBODY = "deleted"
"""What the Hub's client calls an author who is gone."""

_FOLLOWS = "What becomes of it will be said here."
_MOVED = "There is a newer commit on main: it is looked at again."
_AGAIN = "It is tried again by itself."
_SERVER_FAULT = 500

log = logging.getLogger("space.bot.bot")


class Bot:
    """Hears webhooks and answers them, in a thread of its own.

    Args:
        desk: what plans and queues.
        token: the bot's own, which may write into the repos that it works in, and comment.
        secret: what the Hub sends with every webhook of ours.
    """

    def __init__(self, desk: Desk, token: str, secret: str) -> None:
        self._desk, self._token, self._secret = desk, Token(token), secret
        self._api = HfApi(token=token)
        self._asks = Asks(desk.keeper.storage)
        self._wake, self._is_stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="bot", daemon=True)

    @classmethod
    def of(cls, desk: Desk, environment: Mapping[str, str]) -> Bot | None:
        """The bot of MERGER_BOT_TOKEN and MERGER_BOT_SECRET; None where they are not set.

        Raises:
            ValueError: only one of them is.
        """
        token, secret = environment.get("MERGER_BOT_TOKEN"), environment.get("MERGER_BOT_SECRET")
        if bool(token) != bool(secret):
            raise ValueError("the bot needs both MERGER_BOT_TOKEN and MERGER_BOT_SECRET")
        return cls(desk, token, secret) if token and secret else None

    @cached_property
    def name(self) -> str:
        """The bot's name on the Hub."""
        return str(self._api.whoami()["name"])

    def start(self) -> None:
        """Begin to answer; what was under way when an earlier process ended goes on at once."""
        for owner in {job.owner for job in self._desk.keeper.store.all() if job.owner.startswith(MARK)}:
            self._desk.keeper.welcome(owner, self._token)
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
            ask = parse_event(WebhookPayload.model_validate_json(body))
        except ValidationError:
            return 400, {"error": "this is no webhook of the Hub's, version 3"}
        if ask is None:
            return 200, {"state": "nothing to do"}
        is_new = self._asks.add(ask)
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
        for ask in self._asks.open():
            self._step_safely(ask)

    def _step_safely(self, ask: Ask) -> None:
        """A step that fails for the Hub's sake is taken again, some times; then it is said, and can be asked again."""
        try:
            self._step(ask)
        except (HfHubHTTPError, httpx.HTTPError) as error:
            log.warning("%s: the Hub refused (%s)", ask.repo, type(error).__name__)
            now = self._asks.get(ask.key)
            if now.tries < _TRIES:
                self._asks.change(now, tries=now.tries + 1)
            else:
                self._give_up(now, "The Hub has refused it too often: please ask again later.")
        except Exception as error:
            log.exception("%s: a bug of ours", ask.repo)
            words = f"This has failed for a fault of ours ({type(error).__name__}): please report it, and ask again."
            now = self._asks.get(ask.key)
            if ask.state == "job" or now.state != "job":  # else it was just queued: what becomes of it is said later
                self._give_up(now, words)

    def _give_up(self, ask: Ask, words: str) -> None:
        """Say so where it was asked, if that much can be done."""
        self._asks.change(ask, state="over")
        if ask.is_meant:
            try:
                self._close(ask, words)
            except Exception:
                log.exception("%s: nobody could be told", ask.repo)

    def _step(self, ask: Ask) -> None:
        if ask.state == "job":
            self._follow(ask)
        elif ask.state == "waits" and (time.time() < ask.again or self._asks.is_busy(ask.repo)):
            return
        elif ask.comment:
            self._answer(ask)
        elif not self._asks.is_busy(ask.repo):
            self._merge_file(ask)

    def _answer(self, ask: Ask) -> None:
        """What a comment asks for, if it asks us."""
        comment = self._comment(ask)
        try:
            verb = None if comment is None else command(comment.content, self.name)
            if comment is None or verb is None:
                self._close(ask)
                return
            ask = self._asks.change(ask, is_meant=True)
            text = recipe_block(comment.content)
            planned = self._plan(text, ask.repo)
            if verb == "plan":
                self._close(ask, plan_words(planned, ask.repo))
                return
            create_pr = not self._may_write(comment.author, ask.repo)
            if self._asks.is_busy(ask.repo):
                self._put_off(ask, [Problem(f"another merge into {ask.repo} is under way")])
            else:
                self._queue(ask, comment.author, text, planned, create_pr=create_pr)
        except JobError as error:
            self._put_off(ask, error.problems, _LATER)
        except MergerError as error:
            self._close(ask, markdown.problems_section("Not merged", error.problems))

    def _comment(self, ask: Ask) -> DiscussionComment | None:
        """The comment as the Hub has it now; None if it is gone, or somebody else had a hand in it, or it is ours."""
        assert ask.num is not None
        num = ask.num
        events = self._api.get_discussion_details(ask.repo, num).events
        found = next((event for event in events if event.id == ask.comment), None)
        if not isinstance(found, DiscussionComment) or found.hidden or found.author in (self.name, _NOBODY):
            return None
        return None if found.edited and found.last_edited_by != found.author else found

    def _merge_file(self, ask: Ask) -> None:
        """A commit to main since which merge.yaml is another: what main has now is merged, once, or refused."""
        head = self._head(ask.repo)
        if head is None or head.text == self._file(ask.repo, ask.old):
            self._close(ask)
            return
        if head.changed != ask.new:  # that commit is dealt with in the place of all before it, or was already
            self._asks.add(_of_commit(ask.repo, ask.old, head.changed))
            self._close(ask, f"A newer {FILE} is merged in its place." if ask.num else "")
            return
        made = self._api.list_repo_commits(ask.repo, revision=head.changed)[0]
        if self.name in made.authors:
            self._close(ask)
            return
        ask = self._asks.change(ask, is_meant=True)
        try:
            self._queue(ask, _author(made, ask.repo), head.text, self._plan(head.text, ask.repo), force=True)
        except JobError as error:
            self._put_off(ask, error.problems, _LATER)
        except MergerError as error:
            self._close(ask, markdown.problems_section(f"{FILE} of {ask.new[:12]} is not merged", error.problems))

    def _head(self, repo: str) -> _Head | None:
        """merge.yaml as main has it now; None where it has none."""
        commit = self._main(repo)
        found = self._api.get_paths_info(repo, [FILE], revision=commit, expand=True)
        last = found[0].last_commit if found else None
        text = self._file(repo, commit) if last is not None else None
        return None if text is None or last is None else _Head(last.oid, text)

    def _main(self, repo: str) -> str:
        return self._api.model_info(repo, revision="main").sha or ""

    def _file(self, repo: str, commit: str) -> str | None:
        """The text of merge.yaml at a commit; None where there is none."""
        if not commit:
            return None
        try:
            found = self._api.get_paths_info(repo, [FILE], revision=commit)
        except RevisionNotFoundError:  # it was pushed away
            return None
        if not found or not isinstance(found[0], RepoFile):
            return None
        if found[0].size > rules.MOST_BYTES:
            return " " * (rules.MOST_BYTES + 1)  # refused by its size, like any other text
        with tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(repo, FILE, revision=commit, local_dir=folder)
            return Path(path).read_text("utf-8", "replace")

    def _plan(self, text: str, repo: str) -> Planned:
        planned = self._desk.plan(text, None)
        said = planned.recipe.publish.repo
        if said not in (None, repo):
            what = f"the recipe publishes to {said}, and this is {repo}"
            raise RecipeError(Problem(what, planned.recipe.publish.at, hint="the bot writes only where it is asked"))
        return planned

    def _may_write(self, author: str, repo: str) -> bool:
        """Whether somebody may write to main themselves: their own repo. Others of its organisation open pull requests.

        Raises:
            RecipeError: they are neither.
        """
        namespace = repo.split("/")[0]
        if author == namespace:
            return True
        if author not in self._members(namespace):
            hint = f"{MARK}{self.name} plan is for everybody"
            raise RecipeError(Problem(f"only who may write to {repo} can have it merged here", hint=hint))
        return False

    def _members(self, namespace: str) -> set[str]:
        try:
            return {member.username for member in self._api.list_organization_members(namespace)}
        except HfHubHTTPError as error:
            if error.response.status_code >= _SERVER_FAULT:
                raise
            return set()  # it is no organisation, or none that tells

    def _queue(
        self, ask: Ask, author: str, text: str, planned: Planned, create_pr: bool = False, force: bool = False
    ) -> None:
        main = self._main(ask.repo)
        how = How(is_public=True, create_pr=create_pr, force=force)
        job = self._desk.submit(MARK + author, self._token, text, ask.repo, how)
        ask = self._asks.change(ask, state="job", job=job.id, main=main, is_begun=False)
        self._say(ask, f"{plan_words(planned, ask.repo)}\n\n{place_words(self._desk.keeper.ahead(job))} {_FOLLOWS}")

    def _put_off(self, ask: Ask, problems: Sequence[Problem], seconds: float = 0.0) -> None:
        """Wait for a while, and until the merge under way in its repo is over; that is said once."""
        if ask.state == "new":
            ask = self._say(ask, f"{markdown.problems_section('Not yet', problems)}\n\n{_AGAIN}")
        self._asks.change(ask, state="waits", again=time.time() + seconds)

    def _follow(self, ask: Ask) -> None:
        """Say what has become of a merge, where there is news."""
        job = self._desk.keeper.store.get(ask.job)
        if job is not None and job.state == "failed" and self._main(ask.repo) != ask.main:
            ask = self._say(ask, f"{result_words(job)}\n\n{_MOVED}")
            self._asks.change(ask, state="waits", again=0.0)
        elif job is None or job.is_over:
            self._close(ask, result_words(job))
        elif job.state == "running" and not ask.is_begun:
            ask = self._say(ask, f"The merge has begun: {console.size(job.total)} to make.")
            self._asks.change(ask, is_begun=True)

    def _close(self, ask: Ask, words: str = "") -> None:
        """The end of it, with what there is to say."""
        ask = self._say(ask, words) if words else ask
        self._asks.change(ask, state="over")

    def _say(self, ask: Ask, words: str) -> Ask:
        """Say something where it was asked; of a commit, in a discussion that is opened about it."""
        secrets.refuse_tokens({"what the bot would say": words})
        if ask.num is not None:
            self._api.comment_discussion(ask.repo, ask.num, words)
            return ask
        made = self._api.create_discussion(ask.repo, f"{FILE} at {ask.new[:12]}", description=words)
        return self._asks.change(ask, num=made.num)


@dataclass(frozen=True)
class _Head:
    """merge.yaml on main.

    Args:
        changed: the commit that made it what it is.
        text: the file's.
    """

    changed: str
    text: str


def _of_commit(repo: str, old: str, new: str) -> Ask:
    return Ask(f"{repo}@{new}", repo, old=old, new=new)


def _author(made: GitCommitInfo, repo: str) -> str:
    """Whose merge it is: who may write to main has committed it, so where nobody is named, the repo's owner's."""
    return next((name for name in made.authors if name), repo.split("/")[0])


def parse_event(payload: WebhookPayload) -> Ask | None:
    """The event, if it is one that may ask for something."""
    repo, scope = payload.repo.name, payload.event.scope
    if payload.repo.type != "model" or not is_repo(repo):
        return None
    comment, talk = payload.comment, payload.discussion
    if talk is not None and comment is not None and payload.event.action == "create":
        is_one = 0 < talk.num < _MOST_NUM and _ID.fullmatch(comment.id)
        return Ask(f"{repo}/{talk.num}/{comment.id}", repo, talk.num, comment.id) if is_one else None
    if scope.startswith("repo"):
        for moved in payload.updatedRefs or ():
            old, new = moved.oldSha or "", moved.newSha or ""
            if moved.ref == "refs/heads/main" and _SHA.fullmatch(new):
                return _of_commit(repo, old if _SHA.fullmatch(old) else "", new)
    return None


def plan_words(planned: Planned, repo: str) -> str:
    """A plan as a comment."""
    words = markdown.plan_section(planned.plan, f"hf://{repo}")
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
