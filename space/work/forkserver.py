"""A process with all imports done, which forks a worker for each job.

Importing torch takes longer than a small merge; a worker that is forked has it at once. The process gets no secret of
the Space's: a token goes from the queue to a worker directly, by a socket that ends with either of them. The standard
library's fork server takes no environment of its own: it inherits this process's, in which a secret may have any name.
Not here: what a worker does (worker).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from merger.card.pictures import canvas
from merger.run.pipeline import warm
from merger.runtime import take_over
from space.work import worker

_ROOT = Path(__file__).resolve().parents[2]
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "OMP_NUM_THREADS")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_MOST_BYTES = 4096


class ForkServer:
    """The queue's side of it.

    Args:
        folder: the process's own; it is empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None

    def start(self) -> None:
        """Start the process, unless it is there."""
        with self._lock:
            self._connect()

    def fork(self, folder: Path) -> socket.socket:
        """A new worker in a folder; it ends when the socket does."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                self._order(folder, theirs)
            except OSError:  # somebody has killed it: another one then, or the error
                self._end()
                self._order(folder, theirs)
        return ours

    def close(self) -> None:
        """End the process. Workers end with their own sockets."""
        with self._lock:
            self._end()

    def _order(self, folder: Path, theirs: socket.socket) -> None:
        orders = self._connect()
        socket.send_fds(orders, [os.fsencode(folder)], [theirs.fileno()])
        if not orders.recv(1):
            raise ConnectionError("the fork server is gone")

    def _connect(self) -> socket.socket:
        if self._orders is None:
            self._orders, theirs = socket.socketpair()
            with theirs:
                line = [sys.executable, "-P", "-m", "space.work.forkserver"]
                self._process = subprocess.Popen(
                    line, cwd=self._folder, env=_environment(self._folder), stdin=theirs.fileno()
                )
        return self._orders

    def _end(self) -> None:
        if self._orders is not None and self._process is not None:
            self._orders.close()
            self._process.wait()
            self._orders = self._process = None


def _environment(folder: Path) -> Mapping[str, str]:
    """What is told of this process's environment: no secret, and no place outside its own folder."""
    hub = {name: value for name, value in os.environ.items() if name.startswith("HF_") and "TOKEN" not in name}
    named = {name: os.environ[name] for name in (*_PASSED_ON, *_PROXIES) if name in os.environ}
    own = {"HF_HOME": str(folder), "TMPDIR": str(folder), "HOME": str(folder), "PYTHONPATH": str(_ROOT)}
    return {**hub, **named, **own}


def main() -> None:
    """Fork a worker for each folder and socket that come in, until none can come any more."""
    take_over()
    warm()
    canvas.warm_fonts()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: the queue sees their sockets end
    with socket.socket(fileno=os.dup(0)) as orders:
        while True:
            folder, sockets, _, _ = socket.recv_fds(orders, _MOST_BYTES, 1)
            if not folder:
                return
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                orders.close()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                worker.run_job(socket.socket(fileno=sockets[0]), Path(os.fsdecode(folder)))
            os.close(sockets[0])
            orders.sendall(b".")


if __name__ == "__main__":
    main()
