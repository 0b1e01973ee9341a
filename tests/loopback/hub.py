"""LoopbackHub: the two servers, and the handles by which a test sets the scene and looks at what came of it.

The protocol itself is in the other rooms; a new endpoint is a function there and a line in its `routes`.
"""

import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from waiting import HANGS_SECONDS

from . import api, commits, discussions, lfs, xet
from .jobs import Jobs
from .journal import Fault, Request
from .openid import OpenId
from .repos import Commit, Discussion, Entry, HubError, Repo, User, World
from .server import Origin
from .wire import Answer, Context, Pace

Files = Mapping[str, bytes | Path]


class LoopbackHub:
    """A Hub on two free ports of 127.0.0.1. Repos are named as on the web: `org/name`, or `datasets/org/name`."""

    def __init__(self, root: Path | None = None) -> None:
        self._own_root = root is None
        self.root = Path(tempfile.mkdtemp(prefix="loopback-hub-")) if root is None else Path(root)
        self.world = World(self.root)
        self.context = Context(self.world, self.root)
        self.jobs = Jobs()
        self.openid = OpenId()
        plain = [*api.routes(), *commits.routes(), *discussions.routes(), *lfs.routes()]
        tables = [*plain, *xet.routes(), *self.openid.routes(), *self.jobs.routes()]
        self._hub = Origin(self.context, "hub", tables)
        self._cdn = Origin(self.context, "cdn", lfs.cdn_routes())
        self.context.url, self.context.cdn = self._hub.url, self._cdn.url
        self._hub.start()
        self._cdn.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop both servers; a folder that the Hub made itself goes with it."""
        self.clear_faults()
        self.jobs.close()
        self._hub.stop()
        self._cdn.stop()
        if self._own_root:
            shutil.rmtree(self.root, ignore_errors=True)

    @property
    def url(self) -> str:
        """The endpoint: what HF_ENDPOINT has to say."""
        return self.context.url

    @property
    def cdn_url(self) -> str:
        """The second origin, where the large files lie."""
        return self.context.cdn

    def env(self, home: Path, token: str = "") -> dict[str, str]:
        """The environment in which the real client talks to this Hub and to nothing else, with an empty cache."""
        off = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        patient = dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"), str(round(HANGS_SECONDS)))
        return {"HF_ENDPOINT": self.url, "HF_HOME": os.fspath(home), "HF_TOKEN": token, **direct, **off, **patient}

    # The scene

    def add_user(self, name: str, token: str, role: str = "write", orgs: Iterable[str] = ()) -> User:
        """A user, by one token; call it again for a second token of the same user. The role is read or write."""
        user = User(name, token, role, tuple(orgs))
        with self.world.lock:
            self.world.users[token] = user
        return user

    def add_model(
        self,
        repo: str,
        files: Files | Path,
        private: bool = False,
        gated: bool | str = False,
        owner: str | None = None,
    ) -> str:
        """A repo with one commit on main, whose sha is returned. `owner` may write to it beside its namespace."""
        entries = self.world.store(_files(files))
        made = Repo(repo, owner or repo.split("/")[-2], private, "auto" if gated is True else gated)
        with self.world.lock:
            self.world.create(made)
            return made.write("refs/heads/main", entries, "initial commit", "", made.owner).sha

    def commit(
        self,
        repo: str,
        files: Files | Path,
        message: str = "a later commit",
        revision: str = "main",
        description: str = "",
        delete: Iterable[str] = (),
    ) -> str:
        """A commit made behind everyone's back; returns its sha."""
        entries, gone = self.world.store(_files(files)), set(delete)
        with self.world.lock:
            found = self._repo(repo)
            tree = {path: entry for path, entry in found.resolve(revision).tree.items() if path not in gone}
            return found.write(str(found.ref(revision)), {**tree, **entries}, message, description, found.owner).sha

    def branch(self, repo: str, name: str, start: str = "main") -> None:
        """Make a branch."""
        with self.world.lock:
            found = self._repo(repo)
            found.point(f"refs/heads/{name}", found.resolve(start).sha)

    def rename(self, repo: str, new: str) -> None:
        """Give a repo another name; its former one leads there until a repo takes it, also by another renaming."""
        with self.world.lock:
            found = self.world.repos.pop(repo)
            found.key = new
            self.world.create(found)
            self.world.renamed[repo] = new

    def grant(self, repo: str, user: str) -> None:
        """Let a user see the files of a gated repo."""
        with self.world.lock:
            self._repo(repo).granted.add(user)

    def trust(self, repo: str, repository: str) -> None:
        """Let the jobs of a repository of GitHub's write to a repo."""
        with self.world.lock:
            self.world.publishers[repo] = repository

    def expire_publishers(self) -> None:
        """End the hour of every token that a CI job was given so far."""
        with self.world.lock:
            self.world.users = {token: user for token, user in self.world.users.items() if not user.repo}

    def ask(self, repo: str, author: str, title: str, files: Files, text: str = "") -> int:
        """A pull request that somebody opened behind everyone's back; returns its number."""
        with self.world.lock:
            found = self._repo(repo)
            made = discussions.open_pull_request(found, author, title, text, found.resolve("main").sha)
        if files:
            self.commit(repo, files, title, revision=made.ref)
        return made.num

    # What came of it

    def exists(self, repo: str) -> bool:
        """Whether there is such a repo."""
        with self.world.lock:
            return repo in self.world.repos

    def tree(self, repo: str, revision: str = "main") -> dict[str, Entry]:
        """Each file's sha256, size, git oid and whether it is LFS, without its bytes."""
        with self.world.lock:
            return dict(self._repo(repo).resolve(revision).tree)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Every file's bytes."""
        tree = self.tree(repo, revision).items()
        return {path: self.world.blobs.path(entry.sha256).read_bytes() for path, entry in tree}

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        """One file's bytes."""
        return self.blob_path(repo, path, revision).read_bytes()

    def blob_path(self, repo: str, path: str, revision: str = "main") -> Path:
        """Where one file's bytes lie on disk; for files too large to read whole. Do not write there."""
        with self.world.lock:
            return self.world.blobs.path(self._repo(repo).entry(revision, path)[1].sha256)

    def head(self, repo: str, revision: str = "main") -> str:
        """The commit a revision points at."""
        with self.world.lock:
            return self._repo(repo).resolve(revision).sha

    def branches(self, repo: str) -> dict[str, str]:
        """Branch -> commit."""
        with self.world.lock:
            return self._repo(repo).named("refs/heads/")

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """The history, newest first; each has sha, parent, title, message, author, date, files (changed) and tree."""
        with self.world.lock:
            return self._repo(repo).log(revision)

    def discussions(self, repo: str) -> list[Discussion]:
        """Discussions and pull requests in the order of their numbers, as they are now."""
        with self.world.lock:
            return [replace(item, events=list(item.events)) for item in self._repo(repo).discussions.values()]

    @property
    def log(self) -> list[Request]:
        """The requests that are finished, on both origins. Not for use inside a fault's `match`: it would wait."""
        return self.context.journal.read()

    def clear_log(self) -> None:
        """Begin a new log."""
        self.context.journal.clear()

    # What goes wrong

    def fail(
        self,
        match: Callable[[Request], bool],
        status: int | None = 503,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        after_handling: bool = False,
        cut_body_at: int | None = None,
        spoil: Callable[[Answer], Answer | None] | None = None,
        stall: threading.Event | None = None,
    ) -> Fault:
        """Script a fault for the next `times` requests that match, before `status`, `sent` and `received` are known.

        Without more, the request is refused unhandled with `status`, or the connection is dropped when that is None.
        `after_handling` does the work first and then loses the answer; `cut_body_at` sends the true headers and only
        so many bytes of the body; `spoil` does the work and sends what it makes of the answer, or nothing. Where the
        connection is dropped, it first stands still until `stall` is set.
        """
        fault = Fault(match, status, times, dict(headers or {}), after_handling, cut_body_at, spoil, stall)
        return self.context.faults.add(fault)

    def clear_faults(self) -> None:
        """Behave again."""
        self.context.faults.clear()

    def latency(self, seconds: float) -> None:
        """Wait so long before each request is looked at."""
        self.context.latency = seconds

    def rate(self, bytes_a_second: float | None) -> None:
        """How fast all connections together carry the bodies of files, each way apart; None: as fast as they can."""
        self.context.down, self.context.up = Pace(bytes_a_second), Pace(bytes_a_second)

    def url_lifetime(self, seconds: float) -> None:
        """How long the signed URLs of the second origin work from now on; 3600 at first, as on the Hub."""
        self.context.url_lifetime = seconds

    def expire_urls(self) -> None:
        """Make every signed URL that is out answer 403."""
        self.context.secret = secrets.token_bytes(16)

    def xet(self, storage: Path | None) -> None:
        """Take uploads by Xet into this folder, whose bytes the Hub cannot give out; None: have no Xet, as at first."""
        self.context.xet = storage

    def _repo(self, key: str) -> Repo:
        if key not in self.world.repos:
            raise HubError(404, f"no repo {key}", "RepoNotFound")
        return self.world.repos[key]


def _files(files: Files | Path) -> Files:
    if not isinstance(files, Path):
        return files
    return {path.relative_to(files).as_posix(): path for path in sorted(files.rglob("*")) if path.is_file()}
