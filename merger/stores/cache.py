"""Models on the Hub of which files lie in the cache on this disk: those are read there, not downloaded again.

Only whole files that Hugging Face's cache keeps under the SHA-256 that was locked. Nothing is written to the cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from merger.stores.folder import FolderStore
from merger.stores.library import readers
from merger.stores.ports import Located, Reader, Store, Ticket


class CachedStore:
    """The Hub, and before it the cache.

    Args:
        hub: where models and all other files come from.
    """

    def __init__(self, hub: Store) -> None:
        self._hub = hub
        self._disk = FolderStore()

    def has(self, path: str) -> bool:
        """What the Hub has."""
        return self._hub.has(path)

    def locate(self, path: str, revision: str | None) -> Located:
        """Ask the Hub: only it knows which commit a name means now."""
        return self._hub.locate(path, revision)

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """From the disk if the file is there."""
        cached = _cached(model, file)
        if cached is None:
            return self._hub.fetch(model, file, start, stop)
        return self._disk.fetch(cached, file, start, stop)

    def reader(self, tickets: Sequence[Ticket], budget: int) -> Reader:
        """A reader of the disk for what is there, one of the Hub for the rest."""
        files = {(ticket.model, ticket.file): _cached(ticket.model, ticket.file) for ticket in tickets}
        found = [files[ticket.model, ticket.file] for ticket in tickets]
        placed = [
            (self._hub, ticket) if cached is None else (self._disk, replace(ticket, model=cached))
            for ticket, cached in zip(tickets, found, strict=True)
        ]
        return readers(placed, budget)


def _cached(model: Located, file: str) -> Located | None:
    """The model as a folder of the cache, if this file of it lies there; a link's target is named by its SHA-256."""
    info = model.files[file]
    path = try_to_load_from_cache(model.where, model.inside + file, revision=model.commit)
    if info.sha256 is None or not isinstance(path, str):
        return None
    real = Path(os.path.realpath(path))
    is_locked = real.name == info.sha256 and real.stat().st_size == info.size
    return replace(model, where=path.removesuffix(file)) if is_locked else None
