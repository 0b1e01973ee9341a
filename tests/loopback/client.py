"""A second Python whose environment names the loopback Hub, to run the real client in.

huggingface_hub reads HF_ENDPOINT and its like when it is imported, and a test process may have imported it long before.
Not a mock: the functions run as they are, in a child that imports the client afresh.
"""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client as connected
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import forks
from waiting import HANGS_SECONDS


class ClientError(Exception):
    """What a function raised in the child: `kinds` are the names of its class and all above it, `status` is HTTP's."""

    def __init__(self, message: str, kinds: tuple[str, ...], status: int | None) -> None:
        super().__init__(message, kinds, status)
        self.message, self.kinds, self.status = message, kinds, status

    def __str__(self) -> str:
        return self.message


class Client:
    """Calls functions in the child. They must be plain functions of a module, with values that can be pickled."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._one_at_a_time = threading.Lock()
        with tempfile.TemporaryDirectory() as folder, Listener(str(Path(folder) / "desk")) as listener:
            line = [sys.executable, "-m", "loopback.client", str(listener.address)]
            self._process = forks.start(line, env={**os.environ, **environment})
            self._desk: Connection[Any, Any] = listener.accept()
        self._end = threading.Thread(target=self._process.communicate)  # whatever it says, nobody waits for a reader
        self._end.start()
        self._desk.send(sys.path)

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = HANGS_SECONDS) -> Any:
        """Run the function in the child; raises ClientError for what it raises."""
        with self._one_at_a_time:
            self._desk.send((function, args))
            if not self._desk.poll(timeout):
                raise TimeoutError(f"{function.__name__} is still at work after {timeout} s")
            answer = self._desk.recv()
        if isinstance(answer, ClientError):
            raise answer
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._desk.close()
        self._end.join()


def main(address: str) -> None:
    """In the child: answer until nobody can ask any more."""
    with connected(address) as desk:
        sys.path[:] = desk.recv()
        while True:
            try:
                function, args = desk.recv()
            except EOFError:
                return
            desk.send(_called(function, args))


def _called(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except Exception as error:  # an HfHubHTTPError holds a response, which cannot be pickled
        kinds = tuple(kind.__name__ for kind in type(error).__mro__)
        status = getattr(getattr(error, "response", None), "status_code", None)
        return ClientError(str(error), kinds, status)


if __name__ == "__main__":
    from loopback import client

    client.main(sys.argv[1])
