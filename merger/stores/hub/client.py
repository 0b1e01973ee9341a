"""What we take of huggingface_hub and hf_xet that they do not document: no other room does.

tests/stores/test_client.py holds each name and says what to do when one changes; pyproject.toml asks for the versions
that it ran with. Not here: what they do document.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from importlib.util import find_spec
from io import BufferedReader
from typing import Any

from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory

from merger.models.formats.safetensors import WrittenShard
from merger.runtime import in_our_process

MALFORMED = re.compile("improperly formatted|Malformed response|Invalid (server response|etag)")
"""What the client says of answers that it does look at; its other ValueErrors are of what it is asked to do."""

SAMPLE = 512
"""So many bytes of a file's beginning let the Hub tell text from binary."""

_SET_BY_US = frozenset({"path_or_fileobj", "upload_info", "_upload_mode", "_should_ignore", "_is_uploaded"})
_ADVICE = "binary IO buffer"

Refusals = Callable[[], AbstractContextManager[None]]


# ---- requests and the log -------------------------------------------------------------------------------------------


def make_client(hook: Callable[[httpx.Request], None]) -> httpx.Client:
    """The client as it is by itself, with one more look at each request."""
    client = default_client_factory()
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], hook]}
    return client


def _clean(record: logging.LogRecord) -> bool:
    """Take signatures from addresses; and where the Hub has no Xet we hand over open files on purpose, unadvised."""
    record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), ()
    return _ADVICE not in record.msg


@in_our_process
def _clean_the_log() -> None:
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_clean)


def cause(error: Exception) -> Exception:
    """What went wrong: the client wraps the error of an upload in a RuntimeError."""
    inner = error.__cause__
    wrapped = isinstance(error, RuntimeError) and isinstance(inner, (HfHubHTTPError, httpx.HTTPError))
    return inner if wrapped and isinstance(inner, Exception) else error


# ---- additions to a commit ------------------------------------------------------------------------------------------


def describe(shard: WrittenShard, sample: bytes, source: str | bytes | BufferedReader) -> CommitOperationAdd:
    """What the client would make of a shard, without reading all of it once more for a checksum that is known.

    What is open it sends by LFS.
    """
    addition = CommitOperationAdd(shard.name, b"\0")
    addition.upload_info = type(addition.upload_info)(shard.size, sample, sha256=bytes.fromhex(shard.sha256))
    addition.path_or_fileobj = source
    return addition


def describe_sent(shard: WrittenShard, sample: bytes) -> CommitOperationAdd:
    """What it makes of a shard that it has sent itself."""
    addition = describe(shard, sample, b"")
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
    return addition


def unknown_to_it() -> list[str]:
    """What this client's additions lack of that."""
    return sorted(_SET_BY_US - {field.name for field in fields(CommitOperationAdd)})


# ---- Xet ------------------------------------------------------------------------------------------------------------


@in_our_process
def _bound_xet() -> None:
    # Each one under way holds 64 MB: with hf_xet's own limit of 64 of them no plan of the memory could be kept.
    os.environ.setdefault("HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY", "4")


def speaks_xet() -> bool:
    """Whether this client does."""
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def xet_session() -> Any:
    """Its connections."""
    from hf_xet import XetSession  # type: ignore[import-untyped]

    return XetSession()


class Stream:
    """A shard under way to Xet's storage.

    Args:
        session: `xet_session`.
        name: what it is called in Xet's own log.
        token_url: where the Hub gives out the right to write; it lasts an hour.
        headers: with the token, for the Hub alone.
        refusals: turns what goes wrong into a sentence.
    """

    def __init__(self, session: Any, name: str, token_url: str, headers: Mapping[str, str], refusals: Refusals) -> None:
        self._commit = session.new_upload_commit(
            token_refresh_url=token_url,
            token_refresh_headers=headers,
            custom_headers={key: value for key, value in headers.items() if key.lower() != "authorization"},
        )
        self._stream = self._commit.start_upload_stream(name=name)
        self._refusals = refusals
        self.sample = b""

    def write(self, data: memoryview, /) -> int:
        """Send them; waits while too many are under way."""
        with self._refusals():
            self._stream.write(bytes(data))
        self.sample += bytes(data[: SAMPLE - len(self.sample)])
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
