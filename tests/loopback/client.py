"""A second Python whose environment names the loopback Hub, to run the real client in.

huggingface_hub reads HF_ENDPOINT and its like when it is imported, and a test process may have imported it long before.
Not a mock: the functions run as they are, in a child that imports the client afresh.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any, Self

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
        context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's imports
        settings = dict(environment)
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(settings,))

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = HANGS_SECONDS) -> Any:
        """Run the function in the child; raises ClientError for what it raises."""
        return self._pool.submit(_call, function, args).result(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)


def _begin(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except Exception as error:  # an HfHubHTTPError holds a response, which cannot be pickled
        kinds = tuple(kind.__name__ for kind in type(error).__mro__)
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise ClientError(str(error), kinds, status) from None
