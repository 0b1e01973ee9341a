"""One commit on the Hub, made once whatever becomes of its answer, and the client's errors in words.

Not here: what is committed and when (staging).
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import TypeAlias

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, OIDCError
from huggingface_hub.utils import httpx

from merger.errors import Problem, UploadError
from merger.runtime import lacking
from merger.safety import secrets
from merger.stores.hub import http
from merger.stores.hub.client import cause
from merger.stores.hub.repo import PULLS, Results
from merger.stores.hub.store import NO_ANSWER, no_token

MAIN = "main"
MOVED = 412
_EXPIRED = (401, 403)
_CROSSED = (409, MOVED)

Operation: TypeAlias = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


@dataclass(frozen=True)
class Commit:
    """What is to be committed.

    Args:
        operations: the files that are added, copied and deleted.
        title: the first line; no other commit of the branch has it.
        branch: where.
        parent: the commit that the branch must still be at; None: whatever it is at.
        request: the description of the pull request that is opened in its place; None: none is.
    """

    operations: Sequence[Operation]
    title: str
    branch: str = MAIN
    parent: str | None = None
    request: str | None = None

    @property
    def additions(self) -> list[CommitOperationAdd]:
        """The files that are added."""
        return [operation for operation in self.operations if isinstance(operation, CommitOperationAdd)]


def make_commit(repo: Results, wanted: Commit, gate: Lock | None = None) -> CommitInfo:
    """Commit once: when the answer is lost, the history tells whether it was done before it is tried again.

    Args:
        gate: held while the commit is made: commits of one process to one branch must not cross.

    Raises:
        HfHubHTTPError, httpx.TransportError, RuntimeError: it cannot be made.
        LeakError: a token stands in its message.
    """
    secrets.refuse_tokens({"the commit's message": f"{wanted.title}\n{wanted.request}"})
    tries = 0
    while True:
        try:
            return _try(repo, wanted, gate)
        except (HfHubHTTPError, httpx.TransportError, RuntimeError) as error:
            tries += 1
            if not _may_be_lost(error, wanted.branch):
                raise
            if done := http.patiently(lambda: _find(repo, wanted)):
                return done
            if tries == http.TRIES:
                raise
            time.sleep(http.pause(tries, http.seconds_asked(cause(error))))


def _try(repo: Results, wanted: Commit, gate: Lock | None) -> CommitInfo:
    on_main = wanted.branch == MAIN
    _rewind(wanted.additions)
    if not on_main:  # files travel side by side
        with http.understood():
            repo.api.preupload_lfs_files(repo.repo, wanted.additions, revision=wanted.branch, free_memory=False)
    with gate or nullcontext(), http.understood():
        return repo.api.create_commit(
            repo.repo,
            list(wanted.operations),
            commit_message=wanted.title,
            commit_description=wanted.request,
            revision=wanted.branch,
            parent_commit=wanted.parent,
            create_pr=wanted.request is not None,
        )


def _may_be_lost(failed: Exception, branch: str) -> bool:
    """Whether it is tried again.

    | answer | where | what it means |
    |---|---|---|
    | none, 429, 5xx | anywhere | lost, or too early |
    | 401, 403 to an upload | anywhere | the address to upload to has expired, and is asked for anew |
    | 409, 412 | a staging branch | a part's commit crossed with another's: the Hub lets only one through |
    """
    error = cause(failed)
    mended = _EXPIRED if error is not failed else () if branch == MAIN else _CROSSED
    return http.is_passing(error) or http.status_of(error) in mended


def _find(repo: Results, wanted: Commit) -> CommitInfo | None:
    """The commit that we made, or the pull request; on main the newest: an older one is an earlier merge's."""
    branch, pull = wanted.branch, None
    if wanted.request is not None:
        pull = next((item.num for item in repo.pulls(wanted.title)), None)
        if pull is None:
            return None
        branch = f"{PULLS}{pull}"
    commits = repo.api.list_repo_commits(repo.repo, revision=branch)
    considered = commits[:1] if branch == MAIN else commits
    ours = next((item.commit_id for item in considered if item.title == wanted.title), None)
    if ours is None:
        return None
    return CommitInfo(
        commit_url=f"{repo.page()}/commit/{ours}",
        commit_message=wanted.title,
        commit_description="",
        oid=ours,
        pr_url=None if pull is None else repo.page(pull),
    )


def _rewind(additions: Iterable[CommitOperationAdd]) -> None:
    """The client leaves an open file where an upload of it broke off, and would go on there."""
    for addition in additions:
        if isinstance(addition.path_or_fileobj, io.BufferedIOBase):
            addition.path_or_fileobj.seek(0)


# ---- words ----------------------------------------------------------------------------------------------------------


@contextmanager
def refusals(words: Callable[[Exception], Problem], so_far: str = "") -> Iterator[None]:
    """Turn errors of the client and of its uploads (RuntimeError, OSError) into a sentence and a next step.

    Args:
        words: says what an error means, as `in_words` does.
        so_far: what is done by then.

    Raises:
        UploadError: in place of the client's own.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, OIDCError, httpx.HTTPError) as error:
        told = lacking(error) or UploadError(words(cause(error)))
        (problem,) = told.problems
        raise type(told)(replace(problem, what=so_far + problem.what)) from None


def in_words(error: Exception, repo: str, by_request: bool = False) -> Problem:
    """What an error on the way to a repo means; `by_request`: to a pull request on it."""
    if isinstance(error, OIDCError):
        return no_token(error, repo)
    if isinstance(error, http.UnreadableAnswer):
        return Problem(f"{repo} cannot be written: an answer is none of the Hub's", hint=NO_ANSWER)
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return Problem(f"{repo}: the Hub's client refuses: {error}", hint="change the recipe's publish: block, or --to")
    match http.status_of(error):
        case 401:
            return Problem(f"the Hub does not know our token, so {repo} cannot be written", hint="set HF_TOKEN")
        case 403 | 404 if by_request:
            hint = "to ask for it takes a token that may write, if only to repos of your own"
            return Problem(f"we may not open a pull request on {repo}", hint=hint)
        case 403 | 404:
            hint = "the token needs the right to write there (a fine-grained token: write access to this repo)"
            return Problem(f"we may not write to {repo}", hint=hint)
        case status if status == MOVED:
            hint = "run it again, or set publish.create_pr: true to open a pull request"
            return Problem(f"main of {repo} moved while the merge was made", hint=hint)
        case None:
            return Problem(f"{repo} cannot be written ({type(error).__name__})", hint="check the name and the network")
        case status:
            words = error.server_message if isinstance(error, HfHubHTTPError) else None
            said = f": {words[:300]}" if words else ""
            hint = "try again later" if http.is_passing(error) else "change what it objects to, and run it again"
            return Problem(f"the Hub refuses to write {repo} (HTTP {status}{said})", hint=hint)
