"""What stands before a Space on the Hub: https under its own name, and the request passed on with its Host.

Each connection carries one request, so that the proxy need not know where a body ends.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

_BYTES = 65_536


class Relay:
    """A port that speaks TLS, and passes on to another that does not.

    Args:
        port: of the Space.
        name: what the certificate is made out to.
        folder: for the certificate.
    """

    def __init__(self, port: int, name: str, folder: Path) -> None:
        self._to = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(_certificate(name, folder))
        self._listens = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listens.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listens.close()

    def _serve(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                threading.Thread(target=self._pass_on, args=(self._listens.accept()[0],), daemon=True).start()

    def _pass_on(self, plain: socket.socket) -> None:
        with suppress(OSError), self._context.wrap_socket(plain, server_side=True) as browser:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (part := browser.recv(_BYTES)):
                    return
                head += part
            with socket.create_connection(("127.0.0.1", self._to)) as space:
                space.sendall(_marked(head))
                threading.Thread(target=_pump, args=(browser, space), daemon=True).start()
                _pump(space, browser)


def _marked(head: bytes) -> bytes:
    first, *lines = head.split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([first, b"X-Forwarded-Proto: https", b"Connection: close", *kept])


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(_BYTES):
            target.sendall(part)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _certificate(name: str, folder: Path) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(who, who, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    parts = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "certificate.pem"
    path.write_bytes(parts + made.public_bytes(serialization.Encoding.PEM))
    return path
