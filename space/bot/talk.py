"""What the bot reads on the Hub, and says there: who wrote what, merge.yaml at a commit, and who may write where.

Not here: what is done about it (bot), and what a comment asks for (comments).
"""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

from huggingface_hub import DiscussionComment, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from merger.errors import Problem, RecipeError
from space.bot.webhook_events import WebhookEvent
from space.work import admission

FILE = "merge.yaml"
MARK = "@"
"""Before the name of whoever asked: the owner of a job of the bot's, whom nobody can sign in as."""

_NOBODY = "deleted"
"""What the Hub's client calls an author who is gone."""

_SERVER_FAULT = 500


class Talk:
    """The Hub, as far as the bot asks it.

    Args:
        token: the bot's own.
    """

    def __init__(self, token: str) -> None:
        self._api = HfApi(token=token)

    @cached_property
    def name(self) -> str:
        """The bot's name on the Hub."""
        return str(self._api.whoami()["name"])

    def comment(self, event: WebhookEvent) -> DiscussionComment | None:
        """The comment as the Hub has it now; None if it is gone, or somebody else had a hand in it, or it is ours."""
        assert event.num is not None
        talk = self._api.get_discussion_details(event.repo, event.num).events
        found = next((said for said in talk if said.id == event.comment), None)
        if not isinstance(found, DiscussionComment) or found.hidden or found.author in (self.name, _NOBODY):
            return None
        return None if found.edited and found.last_edited_by != found.author else found

    def head(self, repo: str) -> tuple[str, str] | None:
        """The commit that made merge.yaml what it is on main, and its text; None where there is none."""
        commit = self.main(repo)
        found = self._api.get_paths_info(repo, [FILE], revision=commit, expand=True)
        last = found[0].last_commit if found else None
        text = self.file(repo, commit) if last is not None else None
        return None if text is None or last is None else (last.oid, text)

    def main(self, repo: str) -> str:
        """The commit that main stands at."""
        return self._api.model_info(repo, revision="main").sha or ""

    def file(self, repo: str, commit: str) -> str | None:
        """The text of merge.yaml at a commit; None where there is none."""
        if not commit:
            return None
        try:
            found = self._api.get_paths_info(repo, [FILE], revision=commit)
        except RevisionNotFoundError:  # it was pushed away
            return None
        if not found or not isinstance(found[0], RepoFile):
            return None
        if found[0].size > admission.MOST_BYTES:
            return " " * (admission.MOST_BYTES + 1)  # refused by its size, like any other text
        with tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(repo, FILE, revision=commit, local_dir=folder)
            return Path(path).read_text("utf-8", "replace")

    def authors(self, repo: str, commit: str) -> list[str]:
        """Who made a commit."""
        return list(self._api.list_repo_commits(repo, revision=commit)[0].authors)

    def may_write(self, author: str, repo: str) -> bool:
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

    def say(self, repo: str, num: int | None, title: str, words: str) -> int:
        """Say something in a discussion, or in one that is opened for it; its number."""
        if num is None:
            return int(self._api.create_discussion(repo, title, description=words).num)
        self._api.comment_discussion(repo, num, words)
        return num
