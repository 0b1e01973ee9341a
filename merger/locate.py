"""Where models are that somebody names: folders and the Hub behind one Library. Not here: what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merger.safety.names import named
from merger.safety.paths import ANYWHERE
from merger.stores.folder import FolderStore
from merger.stores.library import Library
from merger.stores.ports import Located

HUB = "hf://"


def stores(paths: Sequence[str], cache: bool, token: str | bool | None, root: Path | None = ANYWHERE) -> Library:
    """Where models with these paths come from: folders first, then the Hub, if one of them is no folder.

    Args:
        paths: folders or repo ids.
        cache: read files where Hugging Face's cache on this disk has them; without a token none, for what lies there
            may have been let in by one.
        token: the reader's token; None takes the environment's, False none.
        root: inside of which folders may lie, by whose words they are named (safety.paths).
    """
    folders = FolderStore(root)
    if all(folders.has(path) for path in paths):
        return Library([folders])
    # The Hub's client takes a while to import: not for recipes that need no Hub.
    from merger.stores.cache import CachedStore
    from merger.stores.hub import HubStore

    hub = HubStore(token)
    remote = CachedStore(hub) if cache and token is not False else hub
    return Library([folders, remote], looked_here=root is not None)


def find(target: str, token: str | bool | None = None) -> tuple[Library, Located]:
    """The model that a user names: a folder, ``owner/name[@revision]``, that after ``hf://``, or a page's address.

    Of a repo on the Hub nothing is read from the cache: what is there now is what somebody wants to know.

    Raises:
        ModelError: there is no such model or revision, or it may not be read.
    """
    path = named(target)
    if target == path and FolderStore().has(path):
        store = stores([path], False, token)
        return store, store.locate(path, None)
    name, _, revision = path.partition("@")
    from merger.stores.hub import HubStore

    store = Library([HubStore(token)])
    return store, store.locate(name, revision or None)
