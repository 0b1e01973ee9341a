"""GitHub's side of a job: its event and the files that changed, the log's commands, outputs and summary, the REST API.

Not here: what is merged (line), and how a plan reads (cli.markdown).
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar
from urllib.parse import quote

from merger.errors import MergerError, Problem
from merger.safety.environment import public
from merger.safety.limits import EVENT, GITHUB, parse_json, read_limited
from merger.safety.numbers import size
from merger.safety.secrets import refuse_tokens, sieve
from merger.safety.text import visible
from merger.stores.hub.http import PASSING, again

if TYPE_CHECKING:
    from requests import Response

_OURS = ("", "push", "merge_group", "schedule", "workflow_dispatch", "repository_dispatch", "release", "create")
"""Events that need a right to write, without a name what is started by hand. Whatever GitHub adds is none of them."""

_NO_COMMIT = re.compile(r"^0*$")
_COMMIT = re.compile(r"^[0-9a-f]{40,64}$")
_ENDS = re.compile(r"^([0-9a-f]{40,64}|refs/[^\0]+)\.{2,3}[0-9a-f]{40,64}$")
_SECONDS = 30
_MOST_FILES = 300
"""A comparison by GitHub names no more files than these."""

_PIECE_BYTES = 64 << 10
COMMENT_CHARACTERS = 65_000
T = TypeVar("T")
SUMMARY_CHARACTERS = 250_000
"""GitHub takes a million bytes."""


class GitHubError(MergerError):
    """GitHub does not let us do it; exit code 1, since no kind of merge is at fault."""


# ---- the event ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """What started the job.

    Args:
        name: such as ``push``.
        payload: what GitHub tells of it.
    """

    name: str
    payload: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Event:
        """The event of this job; outside GitHub one without a name."""
        path = environment.get("GITHUB_EVENT_PATH")
        payload = parse_json(read_limited(Path(path), EVENT, GitHubError)) if path and os.path.isfile(path) else {}
        return cls(environment.get("GITHUB_EVENT_NAME", ""), payload)

    @property
    def pull(self) -> int | None:
        """The pull request's number."""
        number = self._told("pull_request", "number") if self.name.startswith("pull_request") else None
        return number if isinstance(number, int) else None

    @property
    def is_ours(self) -> bool:
        """Whether only those who may write to the repository can start it, with what is in the repository."""
        return self.name in _OURS

    @property
    def is_foreign(self) -> bool:
        """Whether its recipes may be of somebody who may not write here: of a fork, or of nobody knows where."""
        if self.is_ours:
            return False
        head = self._told("pull_request", "head", "repo", "full_name") or self._told(
            "workflow_run", "head_repository", "full_name"
        )
        return head is None or head != self._told("repository", "full_name")

    def _told(self, *keys: str) -> Any:
        """What the payload has there; None where it has nothing."""
        found: Any = self.payload
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def changed(self, root: Path, api: GitHubApi) -> set[str] | None:
        """The files that a push or a pull request added or changed, from the top of the repository; None: all count.

        Raises:
            GitHubError: neither git nor GitHub can tell.
        """
        if self.pull is not None:
            number, pull = self.pull, self.payload["pull_request"]
            found = _by_git(root, f"{pull['base']['sha']}...{pull['head']['sha']}")
            return found if found is not None else _ask_changed(lambda: api.files_of(number))
        before, after = str(self.payload.get("before", "")), str(self.payload.get("after", ""))
        if self.payload.get("deleted"):
            return set()
        if not _NO_COMMIT.match(before):
            found = _by_git(root, f"{before}..{after}")
            return found if found is not None else _ask_changed(lambda: api.compared(before, after))
        main = str(self.payload.get("repository", {}).get("default_branch", ""))
        if not main or self.payload.get("ref") == f"refs/heads/{main}":
            return None
        found = _by_git(root, f"refs/remotes/origin/{main}...{after}")
        return found if found is not None else _ask_changed(lambda: api.compared(main, after))

    def before(self, name: str, root: Path, api: GitHubApi) -> str | None:
        """A file as a pull request found it; None where it had none.

        Raises:
            GitHubError: neither git nor GitHub can tell.
        """
        base = str(self.payload["pull_request"]["base"]["sha"])
        if _COMMIT.match(base) and _git(root, "cat-file", "-e", base) is not None:
            found = _git(root, "show", f"{base}:{name}")
        else:
            found = api.file_at(name, base)
        return None if found is None else found.decode("utf-8", "replace")


def _ask_changed(ask: Callable[[], set[str] | None]) -> set[str] | None:
    """What GitHub says: a clone of actions/checkout holds one commit only."""
    try:
        return ask()
    except GitHubError as error:
        hint = "let actions/checkout fetch the history (fetch-depth: 0), or give a github-token that may read"
        why = error.problems[0].what
        raise GitHubError(Problem(f"neither git nor GitHub can tell which files changed: {why}", hint=hint)) from None


def _by_git(root: Path, ends: str) -> set[str] | None:
    """What differs between two commits (``..``), or since they parted (``...``); None where the clone lacks one."""
    if not _ENDS.match(ends):
        return None
    told = _git(root, "diff", "--name-only", "-z", "--diff-filter=d", ends, "--")
    return None if told is None else {os.fsdecode(name) for name in told.split(b"\0") if name}


def _git(root: Path, *words: str) -> bytes | None:
    """What git prints; None where it fails."""
    line = ["git", "-C", str(root), *words]
    try:
        return subprocess.run(line, env=public(), capture_output=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


# ---- the log, the outputs, the summary ------------------------------------------------------------------------------


class Log:
    """The job's log. Commands are what goes through `command`; what is printed inside `text` is taken for none."""

    def __init__(self, stream: TextIO) -> None:
        self._masks, self._stream = stream, sieve(stream)
        self._word = ""

    def command(self, name: str, message: str = "", **properties: object) -> None:
        """Tell GitHub something, such as an error at a line of a file."""
        self._tell(self._stream, name, message, properties)

    def _tell(self, stream: TextIO, name: str, message: str, properties: Mapping[str, object]) -> None:
        told = ",".join(f"{key}={_property(str(value))}" for key, value in properties.items() if value is not None)
        line = f"::{name}{' ' + told if told else ''}::{_data(message)}"
        if self._word:
            line = f"::{self._word}::\n{line}\n::stop-commands::{self._word}"
        print(line, file=stream, flush=True)

    def mask(self, token: str) -> None:
        """Let GitHub blot this out of the log wherever it stands."""
        if token:
            self._tell(self._masks, "add-mask", token, {})

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        """What is printed inside folds away under the title."""
        self.command("group", title)
        yield
        self.command("endgroup")

    @contextmanager
    def text(self) -> Iterator[None]:
        """Inside, a line is a line whatever it says; after an exception, for good: a traceback may say anything."""
        word = secrets.token_hex(16)
        self.command("stop-commands", word)
        self._word = word
        yield
        self._word = ""
        self.command(word)


def _data(text: str) -> str:
    return visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def write_outputs(path: str | None, values: Mapping[str, str]) -> None:
    """Set the step's outputs; no value can end its own and begin another."""
    lines = []
    for name, value in values.items():
        end = f"end-{secrets.token_hex(16)}"
        lines += [f"{name}<<{end}", value, end]
    _append(path, "\n".join(lines) + "\n", "the step's outputs")


def write_summary(path: str | None, text: str) -> None:
    """Add to the job's summary, as much as GitHub takes."""
    _append(path, cut_at_line(text, SUMMARY_CHARACTERS) + "\n", "the job's summary")


def _append(path: str | None, text: str, called: str) -> None:
    refuse_tokens({called: text})
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)


def cut_at_line(text: str, most: int) -> str:
    """The text, cut at a line where it is too long, and saying so."""
    if len(text) <= most:
        return text
    whole_lines = text[:most].rpartition("\n")[0] or text[:most]
    return whole_lines + "\n\n(the rest is in the job's log)"


# ---- the REST API ---------------------------------------------------------------------------------------------------


class GitHubApi:
    """GitHub's REST API for one repository.

    Args:
        url: where the API is.
        repository: ``owner/name``.
        token: the job's token, empty for none.
    """

    def __init__(self, url: str, repository: str, token: str) -> None:
        self._url, self._repository, self._token = url.rstrip("/"), repository, token
        self._root = self._url.removesuffix("/v3")  # GitHub's own servers have both APIs at one address

    def compared(self, base: str, head: str) -> set[str] | None:
        """The files that changed from where two revisions parted to the second; None if they are too many to tell."""
        ends = f"{quote(base, safe='')}...{quote(head, safe='')}"

        def compare() -> set[str] | None:
            files = self._ask("GET", f"compare/{ends}?per_page=1").json()["files"]
            return None if len(files) >= _MOST_FILES else _still_there(files)

        return _patiently(compare)

    def files_of(self, pull: int) -> set[str]:
        """The files that a pull request adds or changes."""
        return _patiently(lambda: _still_there(self._pages(f"pulls/{pull}/files")))

    def keep_comment(self, pull: int, marker: str, body: str, only_update: bool = False) -> None:
        """Write our comment of the pull request, which begins with the marker, or write it anew where it is.

        A comment of anybody else is theirs, whatever it begins with.

        Args:
            marker: a line that readers do not see.
            only_update: leave it be if there is none yet.
        """
        _patiently(lambda: self._kept(pull, marker, body, only_update))

    def _kept(self, pull: int, marker: str, body: str, only_update: bool) -> None:
        content = {"body": cut_at_line(f"{marker}\n{body}", COMMENT_CHARACTERS)}
        there = self._pages(f"issues/{pull}/comments")
        marked = [item for item in there if str(item.get("body")).startswith(marker)]
        me = self._me() if marked else None
        known = next((item["id"] for item in marked if (item.get("user") or {}).get("login") == me), None)
        if known is not None:
            self._ask("PATCH", f"issues/comments/{known}", content)
        elif not only_update:
            self._ask("POST", f"issues/{pull}/comments", content)

    def _me(self) -> str:
        """Whose the token is; the REST API tells that to people's tokens alone.

        Raises:
            GitHubError: GitHub does not say.
        """
        told = self._ask("POST", f"{self._root}/graphql", {"query": "{viewer{login}}"}).json()
        try:
            return str(told["data"]["viewer"]["login"])
        except (LookupError, TypeError):
            raise GitHubError(Problem("GitHub does not say whose the github-token is", hint=_AGAIN)) from None

    def _pages(self, path: str) -> Iterator[Mapping[str, Any]]:
        page: str | None = f"{path}?per_page=100"
        while page:
            answer = self._ask("GET", page)
            yield from answer.json()
            page = answer.links.get("next", {}).get("url")

    def commit_file(self, path: str, content: bytes, message: str, branch: str) -> None:
        """Commit one file to a branch, unless it stands there already."""
        refuse_tokens({path: content})
        _patiently(lambda: self._committed(path, content, message, branch))

    def make_branch(self, branch: str, commit: str) -> None:
        """Let there be such a branch; one that is not there yet begins at the commit."""
        _patiently(lambda: self._begun(branch, commit))

    def _begun(self, branch: str, commit: str) -> None:
        if self._ask("GET", f"git/ref/heads/{quote(branch)}", allowed=404).status_code == 404:
            self._ask("POST", "git/refs", {"ref": f"refs/heads/{branch}", "sha": commit})

    def open_pull(self, branch: str, base: str, title: str, body: str) -> str:
        """Open a pull request, unless there is one; returns its page."""
        return _patiently(lambda: self._opened(branch, base, title, body))

    def _opened(self, branch: str, base: str, title: str, body: str) -> str:
        head = quote(f"{self._repository.split('/')[0]}:{branch}", safe="")
        there = self._ask("GET", f"pulls?head={head}&base={quote(base, safe='')}").json()
        told = {"head": branch, "base": base, "title": title, "body": cut_at_line(body, COMMENT_CHARACTERS)}
        return str((there[0] if there else self._ask("POST", "pulls", told).json())["html_url"])

    def file_at(self, path: str, revision: str) -> bytes | None:
        """A file's content at a revision; None where there is none."""
        return _patiently(lambda: self._content(path, revision)[0])

    def _content(self, path: str, revision: str) -> tuple[bytes | None, str | None]:
        """The same, and what GitHub knows it by."""
        there = self._ask("GET", f"contents/{quote(path)}?ref={quote(revision, safe='')}", allowed=404)
        if there.status_code == 404:
            return None, None
        told = there.json()
        if told.get("encoding") == "none":  # more than a million bytes
            told |= {"content": self._ask("GET", f"git/blobs/{told['sha']}").json()["content"]}
        return base64.b64decode(told.get("content", "")), told["sha"]

    def _committed(self, path: str, content: bytes, message: str, branch: str) -> None:
        known, sha = self._content(path, branch)
        if known != content:
            told = {"message": message, "branch": branch, "content": base64.b64encode(content).decode()}
            self._ask("PUT", f"contents/{quote(path)}", told | ({"sha": sha} if sha else {}))

    def _ask(self, method: str, path: str, content: object = None, allowed: int = 200) -> Response:
        import requests  # only where GitHub is asked at all

        refuse_tokens({f"what GitHub would be told ({method} {path.split('?')[0]})": json.dumps(content)})
        address = path if path.startswith(f"{self._root}/") else f"{self._url}/repos/{self._repository}/{path}"
        headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        said = f"{method} {path.split('?')[0]}"
        try:
            answer = requests.request(method, address, json=content, headers=headers, timeout=_SECONDS, stream=True)
            _read(answer)
        except requests.RequestException as error:
            raise _Passing(Problem(f"GitHub cannot be reached ({type(error).__name__})", hint=_AGAIN)) from None
        if answer.status_code in PASSING:
            raise _Passing(Problem(f"GitHub is in trouble with {said} (HTTP {answer.status_code})", hint=_AGAIN))
        if not answer.ok and answer.status_code != allowed:
            raise GitHubError(Problem(f"GitHub refuses {said} (HTTP {answer.status_code})"))
        answer.json()  # a page with status 200 has done nothing that it was asked to
        return answer


def _read(answer: Response) -> None:
    body = bytearray()
    for piece in answer.iter_content(_PIECE_BYTES):
        body += piece
        if len(body) > GITHUB.most:
            answer.close()
            raise GitHubError(Problem(f"GitHub's answer has more than {size(GITHUB.most)}", hint=_AGAIN))
    answer._content = bytes(body)  # what requests itself does with a body that it reads whole


class _Passing(GitHubError):
    """Another try may mend it."""


def _patiently(ask: Callable[[], T]) -> T:
    """What GitHub says, after as many tries as the Hub is given; `ask` looks first at what an earlier try has done.

    Raises:
        GitHubError: it refuses, or its answer is none of its own.
    """
    try:
        return again(ask, lambda error: 0.0 if isinstance(error, (_Passing, *_STRANGE)) else None)
    except _STRANGE as error:
        what = f"an answer is none of GitHub's ({type(error).__name__})"
        raise GitHubError(Problem(what, hint="does a proxy of the network answer in its place?")) from None


_STRANGE = (ValueError, LookupError, TypeError, AttributeError)
"""What reading a page of HTML in place of JSON ends in, or JSON that lacks a value."""


def _still_there(files: Iterable[Mapping[str, Any]]) -> set[str]:
    return {str(item["filename"]) for item in files if item.get("status") != "removed"}


_AGAIN = "run the job again"
