"""Several stores behind one: each model comes from the first store that has it. What was read whole is remembered."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from merger.errors import MissingError, ModelError
from merger.stores.content import taken
from merger.stores.ports import Content, Located, Reader, Store, Ticket

_HASHED_AT_ONCE = 16 << 20


class Library:
    """The stores in the order they are asked; the last one answers for whatever no other has.

    Args:
        stores: the stores.
        looked_here: whether one before the last looked for a folder: a refusal says that there is none either.
    """

    def __init__(self, stores: Sequence[Store], looked_here: bool = False) -> None:
        self._stores, self._looked_here = stores, looked_here
        self._of: dict[Located, Store] = {}
        self._checksums: dict[object, str] = {}

    def has(self, path: str) -> bool:
        """Somebody answers for every path."""
        return True

    def locate(self, path: str, revision: str | None) -> Located:
        """Find a model in its store."""
        store = next((store for store in self._stores[:-1] if store.has(path)), self._stores[-1])
        try:
            located = store.locate(path, revision)
        except ModelError as error:
            unsure = (isinstance(error, MissingError) and revision is None) or "/" not in path
            if self._looked_here and unsure and store is self._stores[-1]:
                nor = f"there is no folder {path!r} here, and"
                raise type(error)(
                    [replace(problem, what=f"{nor} {problem.what}") for problem in error.problems]
                ) from None
            raise
        self._of[located] = store
        return located

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read from the model's store."""
        data = self._of[model].fetch(model, file, start, stop)
        if start == 0 and len(data) == model.files[file].size:
            self._checksums[_content(model, file)] = hashlib.sha256(data).hexdigest()
        return data

    def taken(self, files: Sequence[tuple[Located, str]]) -> list[Content]:
        """What some files hold that go into a result as they are.

        Raises:
            ModelError: one of them cannot be read.
        """
        return taken(files, self, self.checksum)

    def checksum(self, model: Located, file: str) -> str:
        """The SHA-256 of a file; it is read for that if neither its store tells nor somebody has read it whole.

        Raises:
            ModelError: it cannot be read.
        """
        return model.files[file].sha256 or self._checksums.get(_content(model, file)) or self._hashed(model, file)

    def _hashed(self, model: Located, file: str) -> str:
        found = hashlib.sha256()
        for start in range(0, model.files[file].size, _HASHED_AT_ONCE):
            found.update(self.fetch(model, file, start, min(start + _HASHED_AT_ONCE, model.files[file].size)))
        return found.hexdigest()

    def reader(self, tickets: Sequence[Ticket], budget: int) -> Reader:
        """One reader over the readers of all stores that the tickets need."""
        return readers([(self._of[ticket.model], ticket) for ticket in tickets], budget)


def _content(model: Located, file: str) -> object:
    """What is the same for files of the same content, as far as the store tells."""
    return model.files[file].oid or (model, file)


def readers(placed: Sequence[tuple[Store, Ticket]], budget: int) -> Reader:
    """One reader of tickets that each have their own store; the stores share the budget."""
    shares: dict[Store, list[Ticket]] = {store: [] for store, _ in placed}
    places: list[tuple[Store, int]] = []
    for store, ticket in placed:
        places.append((store, len(shares[store])))
        shares[store].append(ticket)
    share = budget // max(1, len(shares))
    return _Readers({store: store.reader(tickets, share) for store, tickets in shares.items()}, places)


class _Readers:
    """Sends each ticket to its own store's reader."""

    def __init__(self, readers: dict[Store, Reader], places: Sequence[tuple[Store, int]]) -> None:
        self._readers, self._places = readers, places

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        store, number = self._places[ticket]
        self._readers[store].read(number, offset, out)

    def repeatable(self, ticket: int) -> bool:
        store, number = self._places[ticket]
        return self._readers[store].repeatable(number)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
