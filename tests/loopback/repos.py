"""The Hub's state: users, repos, branches, commits, trees. No HTTP, no JSON, and no rights (see rights.py).

A tree is a flat mapping of path to Entry and every commit holds its own, so a read needs no walk. Git's objects are not
kept; only their names (sha1) are computed, the way git does, because the client compares them.
"""

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .blobs import Blob, Blobs, chunks_of

LFS_THRESHOLD = 10_000_000
# What a fresh repo's .gitattributes names; a file smaller than the threshold is LFS all the same.
# fmt: off
LFS_SUFFIXES = (
    ".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gguf", ".gz", ".h5", ".joblib", ".mlmodel", ".model",
    ".msgpack", ".npy", ".npz", ".onnx", ".ot", ".parquet", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".rar",
    ".safetensors", ".tar", ".tflite", ".tgz", ".wasm", ".xz", ".zip", ".zst",
)
# fmt: on
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
BAD_REF = re.compile(r"\.\.|//|@\{|[\x00-\x20~^:?*\[\\\x7f]|^[/.-]|[/.]$|\.lock$")


class HubError(Exception):
    """A refusal: what the server will answer. `code` is the X-Error-Code that the client's exception hangs on."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class User:
    """Who a token belongs to.

    `repo`: the one repo that a trusted publisher's token is good for; `only_made`: it may write only to repos that the
    application made which the user signed in to.
    """

    name: str
    token: str = field(repr=False)
    role: str = "write"
    orgs: tuple[str, ...] = ()
    repo: str = ""
    only_made: bool = False

    @property
    def namespaces(self) -> tuple[str, ...]:
        """The names this user may create repos under."""
        return (self.name, *self.orgs)


@dataclass(frozen=True)
class Entry:
    """One file of a tree. `oid` is git's name for what git would hold: the file, or the pointer to an LFS object."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer file."""
        return len(pointer(self.sha256, self.size))


@dataclass(frozen=True)
class Commit:
    """A commit and its whole tree. `files` are the paths it added, changed or removed."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: datetime
    files: tuple[str, ...]
    tree: Mapping[str, Entry] = field(repr=False)


@dataclass
class Discussion:
    """A discussion, or a pull request when `fork` names the commit it started from."""

    num: int
    title: str
    author: str
    status: str
    created: datetime
    base: str = "refs/heads/main"
    fork: str | None = None
    merged: str | None = None
    events: list[dict[str, object]] = field(default_factory=list)

    @property
    def ref(self) -> str:
        """The git reference of a pull request's changes."""
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """One repo. `key` is its path on the web: `org/name` for a model, `datasets/org/name` for a dataset."""

    key: str
    owner: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    history: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # LFS objects are the repo's own: another repo's do not count
    xet: dict[str, int] = field(default_factory=dict)  # objects in Xet's storage, and the size they are said to have
    made_by_app: bool = False  # by one that users sign in to
    discussions: dict[int, Discussion] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`org/name`, whatever the type."""
        return "/".join(self.key.split("/")[-2:])

    @property
    def type(self) -> str:
        """model, dataset, space or kernel."""
        return "model" if self.key.count("/") == 1 else self.key.split("/")[0].removesuffix("s")

    def ref(self, revision: str) -> str | None:
        """The full name of the branch, tag or pull request that is called so."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        """A branch, a tag, a full reference or a commit (7 hex digits or more) as a commit."""
        if name := self.ref(revision):
            return self.history[self.refs[name]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for sha, commit in self.history.items():
                if sha.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def entry(self, revision: str, path: str) -> tuple[Commit, Entry]:
        """A file; the 404 carries the commit, since the client files the absence under it."""
        commit = self.resolve(revision)
        if path not in commit.tree:
            headers = {"X-Repo-Commit": commit.sha}
            raise HubError(404, f"Entry not found: {path}", "EntryNotFound", headers)
        return commit, commit.tree[path]

    def log(self, revision: str) -> list[Commit]:
        """The commits behind a revision, newest first."""
        found, sha = [], self.resolve(revision).sha
        while sha:
            found.append(self.history[sha])
            sha = self.history[sha].parent or ""
        return found

    def named(self, prefix: str) -> dict[str, str]:
        """References below a prefix, by their short name."""
        return {name.removeprefix(prefix): sha for name, sha in self.refs.items() if name.startswith(prefix)}

    def point(self, ref: str, sha: str) -> None:
        """Create a branch or a tag."""
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        if BAD_REF.search(ref):
            raise HubError(400, f"Invalid reference name: {ref}")
        self.refs[ref] = sha

    def unpoint(self, ref: str) -> None:
        """Delete a branch or a tag; its commits stay, as they do on the Hub until it collects garbage."""
        if ref == "refs/heads/main":
            raise HubError(403, "Cannot delete the default branch")
        if self.refs.pop(ref, None) is None:
            raise HubError(404, f"Reference does not exist: {ref}", "RevisionNotFound")

    def write(self, ref: str, tree: Mapping[str, Entry], title: str, message: str, author: str) -> Commit:
        """Put one commit with this tree on top of a reference."""
        parent = self.history.get(self.refs.get(ref, ""))
        before = parent.tree if parent else {}
        files = tuple(sorted(path for path in {*before, *tree} if before.get(path) != tree.get(path)))
        above = parent.sha if parent else None
        sha = _sha1(repr((self.key, len(self.history), above, title, message, sorted(tree.items()))).encode())
        commit = Commit(sha, above, title, message, author, datetime.now(UTC), files, dict(tree))
        self.history[sha], self.refs[ref] = commit, sha
        self.lfs.update(entry.sha256 for entry in tree.values() if entry.lfs)
        return commit


class World:
    """Everything the server knows, behind one lock. Hold `lock` around any use of a Repo."""

    def __init__(self, root: Path) -> None:
        self.lock = threading.RLock()
        self.blobs = Blobs(root / "blobs")
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}  # former keys, and the key to which the Hub sends on from there
        self.publishers: dict[str, str] = {}  # by repo, the repository of GitHub's whose jobs may write to it

    def create(self, repo: Repo) -> Repo:
        """Add a repo that has no commit yet; whoever takes a former name ends the sending on."""
        self.renamed.pop(repo.key, None)
        self.repos[repo.key] = repo
        return repo

    def store(self, files: Mapping[str, bytes | Path]) -> dict[str, Entry]:
        """Store files and say how a tree names them. Slow for large files: call it without the lock."""
        return {path: self.entry(path, self._put(content)) for path, content in files.items()}

    def entry(self, path: str, blob: Blob) -> Entry:
        """How a tree names stored bytes at this path."""
        with self.blobs.path(blob.sha256).open("rb") as file:
            lfs = is_lfs(path, blob.size, file.read(512))
        return lfs_entry(blob) if lfs else self.regular_entry(blob)

    def regular_entry(self, blob: Blob) -> Entry:
        """An entry that git itself holds."""
        return Entry(blob.sha256, blob.size, git_oid(self.blobs.path(blob.sha256).read_bytes()), lfs=False)

    def _put(self, content: bytes | Path) -> Blob:
        return self.blobs.put(chunks_of(content) if isinstance(content, Path) else [content])


def lfs_entry(blob: Blob) -> Entry:
    """An entry that git holds as a pointer."""
    return Entry(blob.sha256, blob.size, git_oid(pointer(blob.sha256, blob.size)), lfs=True)


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """The Hub's choice: by name, by size, or because the sample is binary. Empty files never are."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_THRESHOLD or b"\0" in sample)


def pointer(sha256: str, size: int) -> bytes:
    """The text that git holds in place of an LFS object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    """Git's name for a file."""
    return _sha1(b"blob %d\0%s" % (len(content), content))


def folder_oid(entries: Iterable[tuple[str, Entry]]) -> str:
    """A name for a folder: it changes when anything below does. Not git's, which nobody compares."""
    return _sha1(repr(sorted((path, entry.oid) for path, entry in entries)).encode())


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
