"""Connections for tensors keep to what the environment says of proxies and TLS, over real sockets."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from urllib3.exceptions import HTTPError, SSLError

from merger.stores.hub import http as connections
from merger.stores.hub.http import Connections, chunks

BODY = bytes(range(256)) * 10
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Answering(BaseHTTPRequestHandler):
    """Answers everything with the same bytes, and tells the server what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))  # type: ignore[attr-defined]
        self.send_response(206)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *values: object) -> None:
        """Nothing: tests look at what was seen."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.seen: list[tuple[str, dict[str, str]]] = []

    def handle_error(self, request: object, address: object) -> None:
        """A client that breaks off is what a test wants."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, and an environment that names no proxy."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def got(address: str) -> bytes:
    with Connections(2).get(address, {"Range": "bytes=0-2559"}) as answer:
        return b"".join(chunks(answer))


def test_a_proxy_of_the_environment_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its user and password, which stand in its address, and with nothing else changed."""
    monkeypatch.setenv("http_proxy", f"http://me:s%20cret@127.0.0.1:{server.server_port}")
    assert got("http://far.example/file") == BODY
    [(path, headers)] = server.seen
    assert path == "http://far.example/file"
    assert headers["range"] == "bytes=0-2559"
    assert headers["proxy-authorization"] == "Basic " + b64encode(b"me:s cret").decode()


@pytest.mark.parametrize("name", ["all_proxy", "ALL_PROXY", "HTTP_PROXY"])
def test_its_other_names(server: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And an address without a scheme."""
    monkeypatch.setenv(name, f"127.0.0.1:{server.server_port}")
    assert (got("http://far.example/file"), len(server.seen)) == (BODY, 1)


def test_a_host_may_be_left_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """no_proxy: such a host is asked itself."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert got(f"http://127.0.0.1:{server.server_port}/file") == BODY
    assert server.seen[0][0] == "/file"


def test_a_proxy_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is an error, not a reason to go round it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(HTTPError):
        got(f"http://far.example:{server.server_port}/file")
    assert server.seen == []


@pytest.fixture
def secured(server: Server, tmp_path: Path) -> Path:
    """The server over TLS; its own certificate, which nobody knows."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([]), datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    path.write_bytes(certificate.public_bytes(pem))
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, private)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return path


@pytest.mark.parametrize("named", [True, False])
def test_the_roots_are_those_of_the_hubs_client(
    server: Server, secured: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """SSL_CERT_FILE counts here as it does there; without it nobody vouches for the server."""
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if named:
        monkeypatch.setenv("SSL_CERT_FILE", str(secured))
    connections._tls.cache_clear()
    address = f"https://127.0.0.1:{server.server_port}/file"
    try:
        if named:
            assert got(address) == BODY
        else:
            with pytest.raises(SSLError):
                got(address)
    finally:
        connections._tls.cache_clear()
