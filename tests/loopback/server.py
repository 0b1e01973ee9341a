"""Sockets: a connection's requests read, their routes found, their answers sent, faults and log included.

Nothing here knows what the Hub's answers mean. Handling and sending are two steps, so that a fault can let the work be
done and then spoil the answer.
"""

import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from waiting import HANGS_SECONDS

from .blobs import CHUNK
from .journal import Fault
from .repos import HubError
from .rights import authenticate
from .wire import Answer, Body, Context, Exchange, FilePart, Loaded, Pace, Route, moved, refusal


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each small answer waits 40 ms for the client's delayed ACK
    server: "Origin"

    def do_any(self) -> None:
        """Take one request from its headers to its entry in the log."""
        context = self.server.context
        body = Body(self.rfile, self.headers, context.up if self.server.side == "cdn" else Pace())  # type: ignore[arg-type]
        x = Exchange(self.command, self.path, self.headers, body, self.server.side)  # type: ignore[arg-type]
        with context.journal.in_flight() as place:
            time.sleep(context.latency)
            status, sent = self._exchange(x)
            place.append(x.request(status, sent))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_any

    def _exchange(self, x: Exchange) -> tuple[int | None, int]:
        fault = self.server.context.faults.take(x.request())
        try:
            answer = self._answer(x, fault)
            if answer is None:
                self._hang_up(fault)
                return None, 0
            x.body.drain()
        except ConnectionError:
            self.close_connection = True
            return None, 0
        return answer.status, self._send(x, answer, fault)

    def _answer(self, x: Exchange, fault: Fault | None) -> Answer | None:
        answer = self.server.dispatch(x) if fault is None or fault.handles else None
        if fault is None or fault.cut_body_at is not None:
            return answer
        if fault.spoil is not None:
            with self.server.context.journal.held_up():
                spoilt: Answer | None = fault.spoil(answer)
            return spoilt
        if fault.status is None:
            return None
        scripted = refusal(HubError(fault.status, _phrase(fault.status)))
        return Answer(scripted.status, {**scripted.headers, **fault.headers}, scripted.body)

    def _send(self, x: Exchange, answer: Answer, fault: Fault | None) -> int:
        cut = fault.cut_body_at if fault else None
        length = 0 if x.method == "HEAD" else answer.length if cut is None else min(cut, answer.length)
        try:
            if isinstance(answer.body, bytes):
                self.wfile.write(_head(answer) + answer.body[:length])  # one packet for most answers
                return length
            self.wfile.write(_head(answer))
            return _send_file(self.connection, answer.body, length, self.server.context.down)
        except OSError:
            self.close_connection = True
            return 0
        finally:
            if cut is not None:
                self._hang_up(fault)

    def _hang_up(self, fault: Fault | None) -> None:
        if fault is not None:
            with self.server.context.journal.held_up():
                fault.wait()
        self.close_connection = True
        _shut(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: there is a log."""


def _head(answer: Answer) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}"]
    lines += [f"{key}: {value}" for key, value in answer.headers.items()]
    lines += [f"Content-Length: {answer.length}", f"X-Request-Id: {uuid.uuid4().hex}", "", ""]
    return "\r\n".join(lines).encode("latin-1", "replace")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else "Scripted"


def _send_file(connection: socket.socket, part: FilePart, length: int, pace: Pace) -> int:
    if not length:
        return 0
    step = CHUNK if pace.is_limited else length
    with part.path.open("rb") as file:
        with suppress(OSError):  # the client has had enough; where the file stands says how much it took
            for start in range(0, length, step):
                size = min(step, length - start)
                pace.passed(size)
                connection.sendfile(file, part.start + start, size)
        return max(file.tell() - part.start, 0)


class Origin(ThreadingHTTPServer):
    """A listening port: the Hub itself or the place where its large files lie."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, context: Context, side: str, routes: Iterable[Route]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.context, self.side, self.routes = context, side, tuple(routes)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._open: set[Any] = set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port and every connection, idle ones included, and wait for their threads to let go."""
        self.shutdown()
        self._thread.join()
        with self._changed:
            for connection in self._open:
                _shut(connection)
            self._changed.wait_for(lambda: not self._open, timeout=HANGS_SECONDS)
        self.server_close()

    def dispatch(self, x: Exchange) -> Answer:
        """Find the route and run it. A bug of ours is a 501: the client would retry a 500 for half a minute."""
        try:
            if self.side == "hub":
                x.user = authenticate(self.context.world, x.headers.get("Authorization"))
            return self._run(self._find(x), x)
        except HubError as error:
            return refusal(error)
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return refusal(HubError(501, f"the loopback Hub has a bug: {traceback.format_exc(limit=-1)}"))

    def _find(self, x: Exchange) -> Route:
        for route in self.routes:
            if (args := route.match(x.method, x.path)) is not None:
                x.args = args
                return route
        raise HubError(404, f"the loopback Hub has no {x.method} {x.path}")

    def _run(self, route: Route, x: Exchange) -> Answer:
        if self.side == "hub" and (there := moved(self.context.world, x)) is not None:
            return there
        if not route.locked:
            return route.handle(self.context, x)
        x.body = Loaded(x.body)
        with self.context.world.lock:
            return route.handle(self.context, x)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, so that stop() can end it."""
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection once its thread has closed it."""
        super().shutdown_request(request)
        with self._changed:
            self._open.discard(request)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else is a bug and shows."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        connection.shutdown(socket.SHUT_RDWR)
