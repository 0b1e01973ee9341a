"""Connections that tensors come over, urllib3's, with the environment's proxies and the TLS roots of the Hub's client;
and how long and how often anything on the Hub is waited for and asked again.

The Hub's own client is for questions: it hands bytes on in small pieces, several times copied, and with eight
connections at once took two to seven times as long for the same gigabyte. Not here: which bytes, and what to do when
they do not come (ranges).
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from ssl import SSLContext
from traceback import walk_tb
from typing import TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, httpx, parse_ratelimit_headers
from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Timeout, make_headers

from merger.runtime import in_our_process
from merger.safety import secrets
from merger.stores.hub.client import MALFORMED, make_client

# ---- asking again ---------------------------------------------------------------------------------------------------


TIMEOUT_SECONDS = 30.0
"""How long a connection may stand still while bytes travel."""

ANSWER_SECONDS = 150.0
"""How long an answer may take to begin: the Hub gives a commit a minute, the end of a large upload may take longer."""

TRIES = 4
LONGEST_PAUSE_SECONDS = 300.0
TOO_MANY = 429
PASSING = frozenset({408, TOO_MANY, 500, 502, 503, 504})
"""Answers that another try may mend."""

T = TypeVar("T")


def again(ask: Callable[[], T], asked: Callable[[Exception], float | None]) -> T:
    """The answer of a call that may be made several times without harm.

    Args:
        asked: how many seconds the server asked us to wait, by what it raised; None: another try mends nothing.

    Raises:
        Exception: as the last try did.
    """
    for tries in range(1, TRIES):
        try:
            return ask()
        except Exception as error:
            seconds = asked(error)
            if seconds is None:
                raise
        time.sleep(pause(tries, seconds))
    return ask()


def pause(tries: int, asked: float) -> float:
    """Seconds until the next try: twice as long each time, spread so that many workers do not come back at once."""
    return max(min(asked, LONGEST_PAUSE_SECONDS), min(30.0, 0.25 * 2.0**tries) * random.uniform(0.5, 1.0))


class UnreadableAnswer(httpx.TransportError):
    """An answer that says all is well, and is none that the Hub or GitHub gives: a proxy's page, JSON without a value.

    As good as no answer: another try may mend it.
    """


@contextmanager
def understood() -> Iterator[None]:
    """Around calls of the Hub's client, which takes it for granted that every answer is what it should be.

    Raises:
        UnreadableAnswer: it stumbled over one that is not.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
        is_the_clients = any(name.partition(".")[0] == "huggingface_hub" for name in frames)
        said = not isinstance(error, ValueError) or isinstance(error, _NO_TEXT) or MALFORMED.search(str(error))
        if is_the_clients and said:
            raise UnreadableAnswer(type(error).__name__) from None
        raise  # a fault of ours, or what the client refuses by itself


_NO_TEXT = (json.JSONDecodeError, UnicodeDecodeError)


def headers_now(token: str | bool | None) -> dict[str, str]:
    """The headers that tell the Hub who asks, for one request: a token of trusted publishing is renewed each hour.

    A token that the client finds or renews by itself is one in use, from now on.

    Raises:
        OIDCError, HTTPError: it could not be renewed.
    """
    with understood():
        headers: dict[str, str] = build_hf_headers(token=token)
    if not isinstance(token, str):
        secrets.watch_for(headers.get("authorization", "").removeprefix("Bearer "))
    return headers


def patiently(ask: Callable[[], T]) -> T:
    """The answer of a call that may be made several times without harm.

    Raises:
        HfHubHTTPError, TransportError: as the last try did.
    """

    def understand() -> T:
        with understood():
            return ask()

    return again(understand, _worth)


def _worth(error: Exception) -> float | None:
    is_known = isinstance(error, HfHubHTTPError | httpx.TransportError)
    return seconds_asked(error) if is_known and is_passing(error) else None


def is_passing(error: Exception) -> bool:
    """Whether another try may mend it: no answer at all, or one that speaks of trouble."""
    status = status_of(error)
    return status is None or status in PASSING


def status_of(error: Exception) -> int | None:
    """The HTTP status of the answer; None where there was none."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return None if response is None else int(response.status_code)


def seconds_asked(error: Exception) -> float:
    """How many seconds the server asked us to wait."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return 0.0 if response is None else asked_pause(response.status_code, response.headers)


def asked_pause(status: int, headers: Mapping[str, str]) -> float:
    """How many seconds an answer asks us to wait, in one of the two ways it may say so."""
    after = headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(headers) if status == TOO_MANY else None
    return float(after) if after.isdecimal() else float(limit.reset_in_seconds) if limit else 0.0


def _bound_request(request: httpx.Request) -> None:
    """Some calls ask to wait for ever in so many words, so that a client's own timeout would not do."""
    if request.extensions.get("timeout", {}).get("read") is None:
        request.extensions["timeout"] = httpx.Timeout(TIMEOUT_SECONDS, read=ANSWER_SECONDS).as_dict()


@in_our_process
def _bound_the_client() -> None:
    """No call of the Hub's client waits for ever."""
    set_client_factory(lambda: make_client(_bound_request))


# ---- connections ----------------------------------------------------------------------------------------------------


CHUNK_BYTES = 1 << 20


class Connections:
    """Open connections, kept for the next request to the same host.

    Args:
        each: how many to one host may be kept.
    """

    def __init__(self, each: int) -> None:
        self._each = each
        self._lock = threading.Lock()
        self._pools: dict[str | None, PoolManager] = {}

    @contextmanager
    def get(self, address: str, headers: Mapping[str, str]) -> Iterator[BaseHTTPResponse]:
        """The answer to one GET, its body not read yet; not redirected, not asked again.

        Raises:
            urllib3.exceptions.HTTPError: no answer, or not in time.
        """
        pool = self._pool(_proxy(address))
        answer = pool.request(
            "GET",
            address,
            headers=headers,
            timeout=Timeout(connect=TIMEOUT_SECONDS, read=TIMEOUT_SECONDS),
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        try:
            yield answer
        finally:
            answer.close()  # one that was read to its end has given its connection back before

    def _pool(self, proxy: str | None) -> PoolManager:
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = _through(proxy, self._each)
            return self._pools[proxy]


def chunks(answer: BaseHTTPResponse) -> Iterator[bytes]:
    """The body as it comes, up to a MiB at a time; what came before it breaks off is handed out."""
    while chunk := answer.read1(CHUNK_BYTES):
        yield chunk


def _proxy(address: str) -> str | None:
    """The proxy that the environment names for an address."""
    parts = urlsplit(address)
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    named = getproxies()
    return named.get(parts.scheme) or named.get("all")


def _through(proxy: str | None, each: int) -> PoolManager:
    if proxy is None:
        return PoolManager(maxsize=each, ssl_context=_tls())
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy.startswith("socks"):
        from urllib3.contrib.socks import SOCKSProxyManager  # needs PySocks, as the Hub's client needs socksio

        return SOCKSProxyManager(proxy, maxsize=each, ssl_context=_tls())
    parts = urlsplit(proxy)
    known = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
    return ProxyManager(
        proxy, maxsize=each, ssl_context=_tls(), proxy_headers=make_headers(proxy_basic_auth=known) if known else None
    )


@cache
def _tls() -> SSLContext:
    return httpx.create_ssl_context()
