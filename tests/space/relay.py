"""What stands before a Space on the Hub: https under its own name, and the request passed on with its Host.

Each connection carries one request, so that the proxy need not know where a body ends.
"""

from __future__ import annotations

import asyncio
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
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()

    def close(self) -> None:
        """End, with all that is open."""
        self._end.set()
        self._thread.join()

    async def _serve(self) -> None:
        async with await asyncio.start_server(self._pass_on, sock=self._listens, ssl=self._context):
            await asyncio.to_thread(self._end.wait)

    async def _pass_on(self, browser: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        open_ends = [answers]
        try:
            head = await browser.readuntil(b"\r\n\r\n")
            space, asks = await asyncio.open_connection("127.0.0.1", self._to)
            open_ends.append(asks)
            asks.write(_marked(head))
            await asyncio.wait([asyncio.create_task(_pump(*way)) for way in ((browser, asks), (space, answers))])
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # an end is gone
        finally:
            for end in open_ends:
                end.transport.abort()


def _marked(head: bytes) -> bytes:
    first, *lines = head.split(b"\r\n")
    kept = [line for line in lines if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([first, b"X-Forwarded-Proto: https", b"Connection: close", *kept])


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """All that comes, until either end is gone: then so is the other."""
    with suppress(OSError):
        while part := await source.read(_BYTES):
            target.write(part)
            await target.drain()
        await target.drain()
    target.close()


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
