"""How the bytes of shards travel to the Hub: from files, by Xet or by LFS, or by Xet as they are made, without a file.

Not here: what is committed, and where (staging).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import get_session, hf_raise_for_status

from merger.errors import Problem, UploadError, VerificationError
from merger.models.formats.safetensors import Outlet, WrittenShard
from merger.safety import secrets
from merger.stores.hub import client
from merger.stores.hub.http import headers_now, patiently
from merger.stores.ports import Content, in_folder, write
from merger.stores.scratch import Scratch

_SECONDS = 60.0
_COPIES = "copies"
_XET_BYTES = 512 << 20  # up to 425 MB more than without were seen
_UNKNOWN_ROUTE = (404, 405, 501)


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
        if not client.speaks_xet():
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
        return in_folder(self._scratch.folder(), name).open("wb", buffering=0)

    def _path(self, name: str) -> Path:
        return self._scratch.folder() / name

    def shard(self, shard: WrittenShard) -> CommitOperationAdd:
        """Its file by name, or open: what is open the client sends by LFS."""
        path = self._path(shard.name)
        file = path.open("rb")
        sample = file.read(client.SAMPLE)
        file.seek(0)
        self._reading[shard.name] = file
        return client.describe(shard, sample, str(path) if self._by_xet else file)

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
        self._reading.pop(name).close()
        self._path(name).unlink()

    def close(self) -> None:
        """The folder is the session's to remove."""
        for file in self._reading.values():
            file.close()


class Streams:
    """Shards go to Xet's storage as they are made; no file of theirs is ever on this disk.

    Args:
        to: the repo.
        refusals: turns what goes wrong into a sentence.
    """

    at_once = 1

    def __init__(self, to: Target, refusals: client.Refusals) -> None:
        self._to, self._refusals = to, refusals
        self._open: dict[str, client.Stream] = {}

    def open(self, name: str) -> Outlet:
        """A stream, with a token of its own: they last an hour."""
        with self._refusals():
            to, session = self._to, self._session
            self._open[name] = client.Stream(session, name, to.xet_token_url, to.headers, self._refusals)
        return self._open[name]

    @cached_property
    def _session(self) -> Any:
        return client.xet_session()

    def shard(self, shard: WrittenShard) -> CommitOperationAdd:
        """End its stream, and describe what was sent as the client describes what it has uploaded itself."""
        stream = self._open[shard.name]
        if stream.finish() != (shard.size, shard.sha256):
            what = f"{shard.name}: what arrived on the Hub is not what was sent"
            raise VerificationError(Problem(what, hint="run it again: finished files are not made again"))
        return client.describe_sent(shard, stream.sample)

    def small(self, name: str, content: bytes) -> CommitOperationAdd:
        return CommitOperationAdd(name, content)

    def file(self, name: str, path: Path) -> CommitOperationAdd:
        return CommitOperationAdd(name, str(path))

    def committed(self, name: str) -> None:
        del self._open[name]

    def close(self) -> None:
        """Break off what is under way."""
        for stream in self._open.values():
            stream.abort()
        self._open.clear()


def streams(to: Target, refusals: client.Refusals) -> Streams:
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
    return _XET_BYTES if client.speaks_xet() else 0


def refuse_no_streams() -> None:
    """What this machine alone can know: an addition that is uploaded already is nothing the client offers to make.

    Raises:
        UploadError: it has no client for it.
    """
    if not client.speaks_xet():
        raise _no_streams("Xet is switched off or not installed", "unset HF_HUB_DISABLE_XET, or leave out --stream")
    if missing := client.unknown_to_it():
        what = f"huggingface_hub {huggingface_hub.__version__} knows nothing of {', '.join(missing)}"
        raise _no_streams(what, "leave out --stream, or install huggingface_hub 2.4")


def _no_streams(why: str, hint: str) -> UploadError:
    return UploadError(Problem(f"--stream cannot be kept: {why}", hint=hint))


class Uploads:
    """Files on their way to a repo while others are made.

    Args:
        to: the repo.
        stream: send shards as they are made.
        refusals: turns what goes wrong into a sentence.

    Raises:
        UploadError: shards cannot be sent so.
    """

    def __init__(self, to: Target, stream: bool, refusals: client.Refusals) -> None:
        self._api, self._refusals, self._scratch = to.api, refusals, Scratch()
        self.sending: Sending = patiently(lambda: streams(to, refusals) if stream else plain_uploads(to, self._scratch))
        self._pool = ThreadPoolExecutor(self.sending.at_once, thread_name_prefix="upload")
        self._under_way: set[Future[None]] = set()

    def add(self, name: str, content: Content) -> CommitOperationAdd:
        """What a commit takes to add a small file: the one place where such files leave.

        What is copied lies on this disk until the commit is made.

        Raises:
            LeakError: a token stands in it.
        """
        headers_now(self._api.token)  # by now the client may have renewed its token
        if isinstance(content, bytes):
            secrets.refuse_tokens({name: content})
            return self.sending.small(name, content)
        copies = self._scratch.folder() / _COPIES
        write(content, copies, name)
        return self.sending.file(name, copies / name)

    def begin(self, upload: Callable[[], None]) -> None:
        """Have it done as soon as there is a way free."""
        self._under_way.add(self._pool.submit(upload))

    def settle(self, but: int = 0) -> None:
        """Wait until all but so many are over, and tell of one that failed."""
        while True:
            patience = None if len(self._under_way) > but else 0
            over, self._under_way = wait(self._under_way, patience, FIRST_COMPLETED)
            if not over:
                return
            with self._refusals():
                for upload in over:
                    upload.result()

    def close(self) -> None:
        """Begin no other, end those under way, and keep nothing on this disk."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.sending.close()
        self._scratch.close()
