"""Connections that tensors come over: urllib3's, with the environment's proxies and the TLS roots of the Hub's client.

The Hub's own client is for questions: it hands bytes on in small pieces, several times copied, and with eight
connections at once took two to seven times as long for the same gigabyte. Not here: which bytes, and what to do when
they do not come (ranges).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from ssl import SSLContext
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub.utils import httpx
from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Timeout, make_headers

from merger.stores import patience

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
            timeout=Timeout(connect=patience.TIMEOUT_SECONDS, read=patience.TIMEOUT_SECONDS),
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
