"""The bot: it merges the merge.yaml of a repo when it changes, and answers comments that ask for a plan or a merge.

The Hub tells of both by a webhook. What a webhook says is only taken for where to look: who wrote what is then read
from the Hub itself. The bot reads models without any token, and writes into a repo only for those who might do so
themselves. Not here: planning and queueing (desk), and what was asked before (asks).
"""

from __future__ import annotations

import hmac
import logging
import re
import tempfile
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from huggingface_hub import DiscussionComment, HfApi, WebhookPayload
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from pydantic import ValidationError

from merger import console, markdown
from merger.errors import MergerError, Problem, RecipeError
from merger.safety.names import is_repo
from space import rules
from space.asks import Ask, Asks
from space.jobs import How, Job
from space.keeper import Token

if TYPE_CHECKING:
    from space.desk import Desk, Planned

ROUTE = "/bot/webhook"
FILE = "merge.yaml"
MARK = "@"
"""Before the name of whoever asked: the owner of a job of the bot's, whom nobody can sign in as."""

_MOST_BYTES = 1 << 20
_PAUSE = 1.0
_TRIES = 10
_BLOCK = re.compile(r"^```ya?ml[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_FOLLOWS = "What becomes of it will be said here."

log = logging.getLogger("space.bot")


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
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BYTES:
                return JSONResponse({"error": f"a webhook has {_MOST_BYTES:,} bytes at most"}, 413)
        try:
            ask = asked(WebhookPayload.model_validate_json(body))
        except ValidationError:
            return JSONResponse({"error": "this is no webhook of the Hub's, version 3"}, 400)
        if ask is None:
            return JSONResponse({"state": "nothing to do"})
        is_new = self._asks.add(ask)
        self._wake.set()
        return JSONResponse({"state": "heard" if is_new else "known already"})

    # ---- answering ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._is_stopping:
            self._wake.clear()
            for ask in self._asks.open():
                self._step_safely(ask)
            self._wake.wait(_PAUSE)

    def _step_safely(self, ask: Ask) -> None:
        """A step that fails for the Hub's sake is taken again, some times; then who asked can ask again."""
        try:
            self._step(ask)
        except (HfHubHTTPError, httpx.HTTPError) as error:
            log.warning("%s: the Hub refused (%s)", ask.repo, type(error).__name__)
            now = self._asks.get(ask.key)
            self._asks.change(now, tries=now.tries + 1, state="over" if now.tries == _TRIES else now.state)
        except Exception:
            log.exception("%s: a bug of ours", ask.repo)
            self._asks.change(self._asks.get(ask.key), state="over")

    def _step(self, ask: Ask) -> None:
        if ask.state == "job":
            self._follow(ask)
        elif ask.comment:
            self._answer(ask)
        else:
            self._merge_file(ask)

    def _answer(self, ask: Ask) -> None:
        """What a comment asks for, if it asks us."""
        comment = self._comment(ask)
        verb = None if comment is None else command(comment.content, self.name)
        if comment is None or verb is None:
            self._asks.change(ask, state="over")
            return
        try:
            text = block(comment.content)
            planned = self._plan(text, ask.repo)
            if verb == "plan":
                self._say(ask, plan_words(planned, ask.repo))
                self._asks.change(ask, state="over")
                return
            create_pr = not self._may_write(comment.author, ask.repo)
            self._queue(ask, comment.author, text, planned, create_pr=create_pr)
        except MergerError as error:
            self._say(ask, markdown.problems_section("Not merged", error.problems))
            self._asks.change(ask, state="over")

    def _comment(self, ask: Ask) -> DiscussionComment | None:
        """The comment as the Hub has it now; None if it is gone, or somebody else had a hand in it, or it is ours."""
        assert ask.num is not None
        num = ask.num
        events = self._api.get_discussion_details(ask.repo, num).events
        found = next((event for event in events if event.id == ask.comment), None)
        if not isinstance(found, DiscussionComment) or found.hidden or found.author == self.name:
            return None
        return None if found.edited and found.last_edited_by != found.author else found

    def _merge_file(self, ask: Ask) -> None:
        """A commit to main that changed merge.yaml: it is merged into its repo, or the problems become a discussion."""
        text = self._file(ask.repo, ask.new)
        made = self._api.list_repo_commits(ask.repo, revision=ask.new)[0]
        if text is None or self.name in made.authors or text == self._file(ask.repo, ask.old):
            self._asks.change(ask, state="over")
            return
        try:
            planned = self._plan(text, ask.repo)
            self._queue(ask, made.authors[0], text, planned, force=True)
        except MergerError as error:
            words = markdown.problems_section(f"{FILE} of {ask.new[:12]} is not merged", error.problems)
            self._open(ask, words)
            self._asks.change(self._asks.get(ask.key), state="over")

    def _file(self, repo: str, commit: str) -> str | None:
        """The text of merge.yaml at a commit; None where there is none."""
        if not commit:
            return None
        found = self._api.get_paths_info(repo, [FILE], revision=commit)
        if not found:
            return None
        if getattr(found[0], "size", 0) > rules.MOST_BYTES:
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
        except HfHubHTTPError:
            return set()

    def _queue(
        self, ask: Ask, author: str, text: str, planned: Planned, create_pr: bool = False, force: bool = False
    ) -> None:
        how = How(is_public=True, create_pr=create_pr, force=force)
        job = self._desk.submit(MARK + author, self._token, text, ask.repo, how)
        ask = self._asks.change(ask, state="job", job=job.id)
        words = f"{plan_words(planned, ask.repo)}\n\n{place_words(self._desk.keeper.ahead(job))} {_FOLLOWS}"
        if ask.num is None:
            self._open(ask, words)
        else:
            self._say(ask, words)

    def _follow(self, ask: Ask) -> None:
        """Say what has become of a merge, where there is news."""
        job = self._desk.keeper.store.get(ask.job)
        if job is None or job.is_over:
            self._say(ask, result_words(job))
            self._asks.change(ask, state="over")
        elif job.state == "running" and not ask.is_begun:
            self._say(ask, f"The merge has begun: {console.size(job.total)} to make.")
            self._asks.change(ask, is_begun=True)

    def _say(self, ask: Ask, words: str) -> None:
        if ask.num is not None:
            num = ask.num
            self._api.comment_discussion(ask.repo, num, words)

    def _open(self, ask: Ask, words: str) -> None:
        title = f"{FILE} at {ask.new[:12]}"
        made = self._api.create_discussion(ask.repo, title, description=words)
        self._asks.change(ask, num=made.num)


def asked(payload: WebhookPayload) -> Ask | None:
    """The event, if it is one that may ask for something."""
    repo, scope = payload.repo.name, payload.event.scope
    if payload.repo.type != "model" or not is_repo(repo):
        return None
    comment = payload.comment
    if payload.discussion is not None and comment is not None and payload.event.action == "create":
        return Ask(f"{repo}/{payload.discussion.num}/{comment.id}", repo, payload.discussion.num, comment.id)
    if scope.startswith("repo"):
        for moved in payload.updatedRefs or ():
            if moved.ref == "refs/heads/main" and moved.newSha:
                return Ask(f"{repo}@{moved.newSha}", repo, old=moved.oldSha or "", new=moved.newSha)
    return None


def command(text: str, name: str) -> str | None:
    """``plan`` or ``merge``, if a line of the text outside its code blocks says ``@name plan`` or ``@name merge``.

    >>> command("Please\\n@mergebot plan\\n", "mergebot")
    'plan'
    """
    said = re.compile(rf"^@{re.escape(name)}[ \t]+(plan|merge)[ \t]*$", re.MULTILINE)
    found = said.search(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return found[1] if found else None


def block(text: str) -> str:
    """The recipe in the text's one YAML block.

    Raises:
        RecipeError: there is none, or several.
    """
    found = _BLOCK.findall(text)
    if len(found) != 1:
        what = "there is no YAML block" if not found else f"there are {len(found)} YAML blocks"
        raise RecipeError(Problem(f"{what} in the comment", hint="put one recipe between ```yaml and ```"))
    return str(found[0])


def plan_words(planned: Planned, repo: str) -> str:
    """A plan as a comment."""
    words = markdown.plan_section(planned.plan, f"hf://{repo}")
    warnings = planned.recipe.warnings
    return f"{words}\n\n{markdown.problems_section('Warnings', warnings)}" if warnings else words


def place_words(ahead: int) -> str:
    """Where a job stands in the queue."""
    return "The merge begins now." if ahead == 0 else f"The merge is queued; {ahead} come before it."


def result_words(job: Job | None) -> str:
    """What has become of a job."""
    if job is None:
        return "The merge is lost: please ask again."
    if job.state == "done":
        told = "Published" if job.is_new else "Nothing to do: it is already there"
        return f"{told}: {job.where}" + (f" at commit `{job.commit}`" if job.commit else "")
    return markdown.problems_section(f"The merge has {job.state}", [Problem(said) for said in job.problems])
