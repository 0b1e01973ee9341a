"""Several stores behind one: each model comes from the first store that has it."""

from __future__ import annotations

from collections.abc import Sequence

from merger.stores.ports import Located, Reader, Store, Ticket


class Library:
    """The stores in the order they are asked; the last one answers for whatever no other has."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores
        self._of: dict[Located, Store] = {}

    def has(self, path: str) -> bool:
        """Somebody answers for every path."""
        return True

    def locate(self, path: str, revision: str | None) -> Located:
        """Find a model in its store."""
        store = next((store for store in self._stores[:-1] if store.has(path)), self._stores[-1])
        located = store.locate(path, revision)
        self._of[located] = store
        return located

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read from the model's store."""
        return self._of[model].fetch(model, file, start, stop)

    def reader(self, tickets: Sequence[Ticket], budget: int) -> Reader:
        """One reader over the readers of all stores that the tickets need, which share the budget."""
        stores = list(dict.fromkeys(self._of[ticket.model] for ticket in tickets))
        return _Readers(self._of, stores, tickets, budget // max(1, len(stores)))


class _Readers:
    """Sends each ticket to its own store's reader."""

    def __init__(self, of: dict[Located, Store], stores: list[Store], tickets: Sequence[Ticket], budget: int) -> None:
        shares: dict[Store, list[Ticket]] = {store: [] for store in stores}
        self._place: list[tuple[Store, int]] = []
        for ticket in tickets:
            share = shares[of[ticket.model]]
            self._place.append((of[ticket.model], len(share)))
            share.append(ticket)
        self._readers = {store: store.reader(share, budget) for store, share in shares.items()}

    def read(self, ticket: int, offset: int, out: memoryview) -> None:
        store, number = self._place[ticket]
        self._readers[store].read(number, offset, out)

    def repeatable(self, ticket: int) -> bool:
        store, number = self._place[ticket]
        return self._readers[store].repeatable(number)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
