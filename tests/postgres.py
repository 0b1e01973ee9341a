"""A real PostgreSQL for as long as tests take, or the reason why there is none. No tests here."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

PATH = os.pathsep.join([os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])


class Postgres:
    """A server whose socket lies in a folder and which listens nowhere else; it runs as no administrator."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._names = folder, itertools.count()
        user = "postgres" if os.geteuid() == 0 else None
        if user is not None:
            shutil.chown(folder, user)
        self._call = partial(subprocess.run, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        self._data = ("-D", folder / "data")
        self._call([_place("initdb"), *self._data, "--auth=trust", "--username=postgres", "--no-sync"])
        options = f"-c listen_addresses= -c fsync=off -k {folder}"
        self._call([_place("pg_ctl"), *self._data, "-w", "-l", folder / "log", "-o", options, "start"])

    def database(self) -> str:
        """The address of a database with nothing in it."""
        name = f"study{next(self._names)}"
        self._call([_place("createdb"), "-h", self.folder, "-U", "postgres", name])
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def asked(self, address: str, question: str) -> int:
        """The number that a database answers."""
        import psycopg

        with psycopg.connect(address) as there:
            (number,) = there.execute(question).fetchone() or (0,)
        return int(number)

    def stop(self) -> None:
        """End it at once."""
        self._call([_place("pg_ctl"), *self._data, "-m", "immediate", "stop"])


@contextmanager
def running() -> Iterator[Postgres]:
    """Start one and stop it; who asks is skipped where there is none."""
    if None in map(_place, ("initdb", "pg_ctl", "createdb")) or find_spec("psycopg") is None:
        pytest.skip("PostgreSQL and its driver are not here: apt-get install postgresql; pip install -e '.[postgres]'")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def _place(name: str) -> str | None:
    return shutil.which(name, path=PATH)
