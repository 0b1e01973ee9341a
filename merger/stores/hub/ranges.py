"""Bytes of remote files by range: resolved once, retried, checked.

A file's address on the Hub answers with another there, if its repo was renamed, and then with a signed address
elsewhere, good for about an hour; ranges are asked there, without the token. Not here: what the Hub knows about a
model (store), and reading ahead (reading).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status, httpx
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, ProtocolError, TimeoutError

from merger import runtime
from merger.errors import ModelError, Problem
from merger.stores.hub import http
from merger.stores.hub.http import PASSING, Connections, asked_pause, chunks, pause
from merger.stores.ports import Located

TRIES = 6
CONNECTIONS = 8
_REASON_BYTES = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_HOPS = 20  # as many as the Hub's client follows


class RangeClient:
    """Asks for byte ranges of files on the Hub.

    Args:
        token: the reader's token, True for the one of the environment, False for none.
    """

    def __init__(self, token: str | bool | None = None) -> None:
        self._token = token
        self._addresses: dict[_Key, _Address] = {}
        self._connections = Connections(CONNECTIONS)

    def fill(self, model: Located, file: str, start: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from `start` on; what arrived before a failure is kept.

        Raises:
            ModelError: the bytes did not come after several tries.
            HfHubHTTPError: the Hub refuses the file.
        """
        done, tries = 0, 0
        while done < len(out):
            try:
                for chunk in self._stream(model, file, start + done, start + len(out)):
                    out[done : done + len(chunk)] = chunk
                    done += len(chunk)
            except _Astray as error:
                what = f"{model.name}: {file} cannot be read: the Hub {error}"
                raise ModelError(Problem(what, hint="try again later, and check HF_ENDPOINT")) from None
            except (HTTPError, httpx.TransportError, _TryAgain) as error:
                tries += 1
                if tries == TRIES:
                    what = f"{model.name}: {file} could not be read after {TRIES} tries ({_in_words(error)})"
                    hint = "the Hub or the network is in trouble: run it again"
                    raise runtime.lacking(error) or ModelError(Problem(what, hint=hint)) from None
                time.sleep(pause(tries, error.seconds if isinstance(error, _TryAgain) else 0.0))

    def _stream(self, model: Located, file: str, start: int, stop: int) -> Iterator[bytes]:
        """The answer to one request, in chunks; anything but exactly the range asked for is an error."""
        key = (model.where, model.commit, model.inside + file)
        while True:
            address = self._address(key, model.files[file].sha256)
            headers = self._headers(address) | {"Range": f"bytes={start}-{stop - 1}"}
            with self._connections.get(address.url, headers) as answer:
                if (further := address.further(answer.status, answer.headers)) is not None:
                    self._addresses[key] = further
                    continue
                if address.is_foreign and answer.status in (401, 403):
                    self._addresses.pop(key, None)
                    raise _TryAgain("the signed address expired")
                _check(_as_response(answer, address.url), start, stop, model.files[file].size)
                got = 0
                for chunk in chunks(answer):
                    got += len(chunk)
                    if got > stop - start:
                        raise _TryAgain("the answer is longer than the range")
                    yield chunk
                if got < stop - start:
                    raise _TryAgain("the answer was cut short")
                return

    def _address(self, key: _Key, sha256: str | None) -> _Address:
        """Where the file's bytes are: the last address on the Hub, or the first that is elsewhere."""
        known = self._addresses.get(key)  # once: another thread may forget it at any moment
        if known is None:
            where, commit, file = key
            known = _Address(hf_hub_url(where, file, revision=commit, endpoint=constants.ENDPOINT))
            further: _Address | None = known
            while further is not None and not further.is_foreign:
                known, further = further, self._looked(further, sha256)
            known = self._addresses[key] = further or known
        return known

    def _looked(self, address: _Address, sha256: str | None) -> _Address | None:
        """Where an address on the Hub leads on to."""
        answer = get_session().request(
            "HEAD",
            address.url,
            headers=self._headers(address),
            timeout=http.TIMEOUT_SECONDS,
            follow_redirects=False,
        )
        _raise_for(answer)
        _check_identity(answer, sha256)
        return address.further(answer.status_code, answer.headers)

    def _headers(self, address: _Address) -> dict[str, str]:
        try:
            who = {} if address.is_foreign else http.headers_now(self._token)
        except HfHubHTTPError as error:
            if not http.is_passing(error):
                raise
            raise _TryAgain(f"HTTP {http.status_of(error)} for a new token", http.seconds_asked(error)) from None
        return who | {"Accept-Encoding": "identity"}


_Key = tuple[str, str | None, str]
"""A file: its repo, commit and name there."""


@dataclass(frozen=True)
class _Address:
    """Where bytes may be, after so many others that led there.

    `is_foreign`: another origin than the Hub's was on the way, and from there on nobody sees the token.
    """

    url: str
    is_foreign: bool = False
    hops: int = 0

    def further(self, status: int, headers: Mapping[str, str]) -> _Address | None:
        """Where an answer sends us; None: here is the right place.

        Raises:
            _Astray: it must not be gone there.
        """
        location = headers.get("Location")
        if status not in _REDIRECTS or location is None:
            return None
        if self.hops == _MOST_HOPS:
            raise _Astray(f"sends us on from place to place, {_MOST_HOPS} times by now")
        try:
            here, there = httpx.URL(self.url), httpx.URL(self.url).join(location)
        except httpx.InvalidURL:
            raise _Astray("sends us to what is no address") from None
        if there.scheme not in ("https", here.scheme) or not there.host:
            raise _Astray(f"sends us from {here.scheme} to {there.scheme}, where others could read along")
        return _Address(str(there), self.is_foreign or _origin(here) != _origin(there), self.hops + 1)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


class _Astray(Exception):
    """A redirect that is not followed, and why, in words that go on from "the Hub"."""


class _TryAgain(Exception):
    """An answer that another try may mend; `seconds` is how long the server asked us to wait."""

    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds


def _raise_for(answer: httpx.Response) -> None:
    if answer.status_code in PASSING:
        raise _TryAgain(f"HTTP {answer.status_code}", asked_pause(answer.status_code, answer.headers))
    hf_raise_for_status(answer)


def _check_identity(answer: httpx.Response, sha256: str | None) -> None:
    """The Hub tells a large file's SHA-256 with its address; it must be the locked one."""
    told = answer.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
    if sha256 and told and told != sha256:
        raise _TryAgain("the Hub offers another file than the locked one")


def _as_response(answer: BaseHTTPResponse, address: str) -> httpx.Response:
    """What an answer says of itself, as the Hub's client would have it; the body only of a refusal."""
    why = answer.read(_REASON_BYTES) if answer.status >= 400 else b""
    request = httpx.Request("GET", address)
    return httpx.Response(answer.status, headers=dict(answer.headers), content=why, request=request)


def _check(answer: httpx.Response, start: int, stop: int, size: int) -> None:
    whole = (start, stop) == (0, size) and answer.headers.get("Content-Length") == str(size)
    if answer.status_code < 300 and answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _TryAgain("the answer is compressed")
    if answer.status_code == HTTPStatus.OK and whole:
        return  # a server may ignore a range; here that is the same bytes
    if answer.status_code != HTTPStatus.PARTIAL_CONTENT:
        if answer.status_code >= 400:
            _raise_for(answer)
        raise _TryAgain(f"HTTP {answer.status_code} in place of a part of the file")
    told, _, total = answer.headers.get("Content-Range", "").partition("/")
    if told != f"bytes {start}-{stop - 1}":
        raise _TryAgain("another range than the one asked for")
    if total != str(size):
        raise _TryAgain(f"the file has {total or 'an unknown number of'} bytes there, the locked one {size}")


def _in_words(error: Exception) -> str:
    """What went wrong, without the address: a signed address is as good as a token."""
    if isinstance(error, ProtocolError):
        return "the connection broke off"
    if isinstance(error, TimeoutError):
        return "the connection stood still"
    if isinstance(error, http.UnreadableAnswer):
        return "an answer that is none of the Hub's"
    return str(error) if isinstance(error, _TryAgain) else type(error).__name__
