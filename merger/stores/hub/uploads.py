"""How the bytes of shards travel to the Hub: from files, by Xet or by LFS, or by Xet as they are made, without a file.

Not here: what is committed, and where (staging).
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from merger.errors import Problem, UploadError, VerificationError
from merger.models.formats.safetensors import Outlet, WrittenShard
from merger.runtime import in_our_process
from merger.stores.hub.http import headers_now
from merger.stores.scratch import Scratch

_SECONDS = 60.0
_XET_BYTES = 512 << 20  # up to 425 MB more than without were seen
_UNKNOWN_ROUTE = (404, 405, 501)
_SAMPLE = 512
_SET_BY_US = frozenset({"path_or_fileobj", "upload_info", "_upload_mode", "_should_ignore", "_is_uploaded"})


@in_our_process
def _bound_uploads() -> None:
    """What concerns uploads alone."""
    # Each one under way holds 64 MB: with hf_xet's own limit of 64 of them no plan of the memory could be kept.
    os.environ.setdefault("HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY", "4")
    # We hand over open files on purpose where the Hub has no Xet: the client's advice against it is not for the user.
    advice = logging.getLogger("huggingface_hub._commit_api")
    advice.addFilter(lambda record: "binary IO buffer" not in record.getMessage())


class Sending(Protocol):
    """One way for shards and small files to travel."""

    at_once: int
    """How many shards may be on their way."""

    def open(self, name: str) -> Outlet:
        """A place for the bytes of a shard."""

    def shard(self, shard: WrittenShard) -> CommitOperationAdd:
        """What a commit takes to add the shard that was written there."""

    def small(self, name: str, content: bytes) -> CommitOperationAdd:
        """What a commit takes to add a small file."""

    def file(self, name: str, path: Path) -> CommitOperationAdd:
        """What a commit takes to add a file of this disk."""

    def committed(self, name: str) -> None:
        """The shard is on the Hub: keep nothing of it."""

    def close(self) -> None:
        """Give up whatever is not committed."""


@dataclass(frozen=True)
class Target:
    """The repo that things are sent to; `by_request`: in a pull request, for which nobody needs the right to write."""

    api: HfApi
    repo: str
    by_request: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """With the token, so only for the Hub itself."""
        return headers_now(self.api.token)

    @property
    def xet_token_url(self) -> str:
        """Where the Hub gives out the right to write to its Xet storage."""
        place = f"{self.api.endpoint}/api/models/{self.repo}/xet-write-token/main"
        return f"{place}?create_pr=1" if self.by_request else place

    def has_xet(self) -> bool:
        """Whether this client and this Hub both speak Xet. The client itself never asks, and fails where it is wrong.

        Raises:
            HfHubHTTPError: the Hub refuses to answer.
        """
        if not _client_has_xet():
            return False
        answer = get_session().get(self.xet_token_url, headers=self.headers, timeout=_SECONDS)
        if answer.status_code in _UNKNOWN_ROUTE:
            return False
        hf_raise_for_status(answer)
        return "X-Xet-Cas-Url" in answer.headers


class Files:
    """Shards lie in a temporary folder until they are uploaded.

    Args:
        scratch: that folder.
        by_xet: where it is not to be used, a client that would is kept from it.
    """

    def __init__(self, scratch: Scratch, by_xet: bool = False) -> None:
        self._scratch, self._by_xet = scratch, by_xet
        # Xet has connections enough for one shard, and two would hold twice its memory. By LFS each has one connection.
        self.at_once = 1 if by_xet else 2
        self._reading: dict[str, io.BufferedReader] = {}

    def open(self, name: str) -> Outlet:
        """A file."""
        return self._path(name).open("wb", buffering=0)

    def _path(self, name: str) -> Path:
        return self._scratch.folder() / name

    def shard(self, shard: WrittenShard) -> CommitOperationAdd:
        """Its file by name, or open: what is open the client sends by LFS."""
        path = self._path(shard.name)
        file = path.open("rb")
        sample = file.read(_SAMPLE)
        file.seek(0)
        self._reading[shard.name] = file
        return _addition(shard, sample, str(path) if self._by_xet else file)

    def small(self, name: str, content: bytes) -> CommitOperationAdd:
        """A large tokenizer counts as a large file too."""
        return CommitOperationAdd(name, content if self._by_xet else io.BytesIO(content))

    def file(self, name: str, path: Path) -> CommitOperationAdd:
        """By name, or open, as a shard."""
        if self._by_xet:
            return CommitOperationAdd(name, str(path))
        self._reading[name] = path.open("rb")
        return CommitOperationAdd(name, self._reading[name])

    def committed(self, name: str) -> None:
        """Free the disk."""
        self._reading.pop(name).close()
        self._path(name).unlink()

    def close(self) -> None:
        """The folder is the session's to remove."""
        for file in self._reading.values():
            file.close()


def _addition(shard: WrittenShard, sample: bytes, source: str | bytes | io.BufferedReader) -> CommitOperationAdd:
    """What the client would make of it, without reading all of it once more for a checksum that is known."""
    addition = CommitOperationAdd(shard.name, b"\0")
    addition.upload_info = type(addition.upload_info)(shard.size, sample, sha256=bytes.fromhex(shard.sha256))
    addition.path_or_fileobj = source
    return addition


Refusals = Callable[[], AbstractContextManager[None]]


class Streams:
    """Shards go to Xet's storage as they are made; no file of theirs is ever on this disk.

    Args:
        to: the repo.
        refusals: turns what goes wrong into a sentence.
    """

    at_once = 1

    def __init__(self, to: Target, refusals: Refusals) -> None:
        self._to, self._refusals = to, refusals
        self._open: dict[str, Stream] = {}
        self._xet: Any = None

    def open(self, name: str) -> Outlet:
        """A stream, with a token of its own: they last an hour."""
        with self._refusals():
            headers = self._to.headers
            commit = self._session().new_upload_commit(
                token_refresh_url=self._to.xet_token_url,
                token_refresh_headers=headers,
                custom_headers={key: value for key, value in headers.items() if key.lower() != "authorization"},
            )
            self._open[name] = Stream(commit, commit.start_upload_stream(name=name), self._refusals)
        return self._open[name]

    def _session(self) -> Any:
        if self._xet is None:
            from hf_xet import XetSession  # type: ignore[import-untyped]

            self._xet = XetSession()
        return self._xet

    def shard(self, shard: WrittenShard) -> CommitOperationAdd:
        """End its stream, and describe what was sent as the client describes what it has uploaded itself."""
        stream = self._open[shard.name]
        if stream.finish() != (shard.size, shard.sha256):
            what = f"{shard.name}: what arrived on the Hub is not what was sent"
            raise VerificationError(Problem(what, hint="run it again: finished files are not made again"))
        addition = _addition(shard, stream.sample, b"")
        addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
        return addition

    def small(self, name: str, content: bytes) -> CommitOperationAdd:
        """As it is."""
        return CommitOperationAdd(name, content)

    def file(self, name: str, path: Path) -> CommitOperationAdd:
        """By name."""
        return CommitOperationAdd(name, str(path))

    def committed(self, name: str) -> None:
        """Forget it."""
        del self._open[name]

    def close(self) -> None:
        """Break off what is under way."""
        for stream in self._open.values():
            stream.abort()
        self._open.clear()


class Stream:
    """A shard under way to Xet's storage."""

    def __init__(self, commit: Any, stream: Any, refusals: Refusals) -> None:
        self._commit, self._stream, self._refusals = commit, stream, refusals
        self.sample = b""

    def write(self, data: memoryview, /) -> int:
        """Send them; waits while too many are under way."""
        with self._refusals():
            self._stream.write(bytes(data))
        self.sample += bytes(data[: _SAMPLE - len(self.sample)])
        return len(data)

    def close(self) -> None:
        """Whether it is whole, `finish` says: until then it is nothing on the Hub."""

    def finish(self) -> tuple[int, str]:
        """Wait until all of it has arrived: its size and SHA-256 as Xet has counted them."""
        info = self._stream.finish().xet_info
        self._commit.wait_to_finish()
        return info.file_size, info.sha256

    def abort(self) -> None:
        """Let go of it; after `finish` there is nothing to let go."""
        for under_way in (self._stream, self._commit):
            with suppress(Exception):
                under_way.abort()


def streams(to: Target, refusals: Refusals) -> Streams:
    """The way without files, if the Hub has one.

    Raises:
        UploadError: it has not.
        HfHubHTTPError: the Hub refuses to answer.
    """
    if not to.has_xet():
        hint = "leave out --stream: each file is then on disk until it is sent"
        raise _no_streams("this Hub has no Xet storage", hint)
    return Streams(to, refusals)


def plain_uploads(to: Target, scratch: Scratch) -> Files:
    """The way that every Hub has."""
    return Files(scratch, by_xet=to.has_xet())


def upload_memory() -> int:
    """The bytes that the client may hold of what it sends: much with Xet; LFS sends a file in small pieces."""
    return _XET_BYTES if _client_has_xet() else 0


def _client_has_xet() -> bool:
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def refuse_no_streams() -> None:
    """What this machine alone can know: an addition that is uploaded already is nothing the client offers to make.

    Raises:
        UploadError: it has no client for it.
    """
    if not _client_has_xet():
        raise _no_streams("Xet is switched off or not installed", "unset HF_HUB_DISABLE_XET, or leave out --stream")
    if missing := _SET_BY_US - {field.name for field in fields(CommitOperationAdd)}:
        version = huggingface_hub.__version__
        what = f"huggingface_hub {version} knows nothing of {', '.join(sorted(missing))}"
        raise _no_streams(what, "leave out --stream, or install huggingface_hub 2.4")


def _no_streams(why: str, hint: str) -> UploadError:
    return UploadError(Problem(f"--stream cannot be kept: {why}", hint=hint))
