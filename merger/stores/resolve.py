"""Where models are that somebody names: folders and the Hub behind one store, which is asked for each.

What was read whole is remembered. Not here: what is in them (folder, hub).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from merger.errors import MissingError, ModelError
from merger.safety.names import parse_name
from merger.safety.paths import ANYWHERE
from merger.stores.folder import FolderStore
from merger.stores.kept import KeptStore
from merger.stores.ports import Content, Kept, Located, Reader, Store, Ticket, readers, take_files

_HASHED_AT_ONCE = 16 << 20


def stores(
    paths: Sequence[str],
    cache: bool,
    token: str | bool | None,
    root: Path | None = ANYWHERE,
    kept: Sequence[Kept] = (),
) -> Library:
    """Where models with these paths come from: folders first, then the Hub, if one of them is no folder.

    Args:
        paths: folders or repo ids.
        cache: read files where Hugging Face's cache on this disk has them; without a token none, for what lies there
            may have been let in by one.
        token: the reader's token; None takes the environment's, False none.
        root: inside of which folders may lie, by whose words they are named (safety.paths).
        kept: statistics that are measured on the way.
    """
    folders, measured = FolderStore(root), [KeptStore(kept)] if kept else []
    if all(folders.has(path) for path in paths):
        return Library([*measured, folders])
    # The Hub's client takes a while to import: not for recipes that need no Hub.
    from merger.stores.hub.store import CachedStore, HubStore

    hub = HubStore(token)
    remote = CachedStore(hub) if cache and token is not False else hub
    return Library([*measured, folders, remote], looked_here=root is not None)


def find(target: str, token: str | bool | None = None) -> tuple[Library, Located]:
    """The model that a user names: a folder, ``owner/name[@revision]``, that after ``hf://``, or a page's address.

    Of a repo on the Hub nothing is read from the cache: what is there now is what somebody wants to know.

    Raises:
        ModelError: there is no such model or revision, or it may not be read.
    """
    path = parse_name(target)
    if target == path and FolderStore().has(path):
        store = stores([path], False, token)
        return store, store.locate(path, None)
    name, _, revision = path.partition("@")
    from merger.stores.hub.store import HubStore

    store = Library([HubStore(token)])
    return store, store.locate(name, revision or None)


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
        store = self._asked(path)
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

    def names(self, path: str, of_folders: bool) -> list[str]:
        return self._asked(path).names(path, of_folders)

    def _asked(self, path: str) -> Store:
        return next((store for store in self._stores[:-1] if store.has(path)), self._stores[-1])

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read from the model's store, or what was made of its other files."""
        if (made := model.files[file].made) is not None:
            return made[start:stop]
        data = self._of[model].fetch(model, file, start, stop)
        if start == 0 and len(data) == model.files[file].size:
            self._checksums[_content(model, file)] = hashlib.sha256(data).hexdigest()
        return data

    def taken(self, files: Sequence[tuple[Located, str]]) -> list[Content]:
        """What some files hold that go into a result as they are.

        Raises:
            ModelError: one of them cannot be read.
        """
        return take_files(files, self, self.checksum)

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
    return model.files[file].oid or (model, file)
