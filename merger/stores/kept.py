"""Statistics that are measured on the way: kept in a folder of this user's, under names of what decides their numbers.

Of what is not measured yet the beginnings of its files are known, which is all that a plan reads. Not here: measuring
(statistics), and whose recipes may have it done (run.options).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from merger.errors import MissingError, Problem
from merger.models.side_files import CARD_NAME
from merger.stores.folder import FolderStore
from merger.stores.ports import FileInfo, Kept, Located

_NAME = re.compile(r"[a-z]+-[0-9a-f]{16}")


def kept_folder(name: str) -> Path:
    """Where statistics of that name lie, once they are measured."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "merger" / "statistics" / name


def is_kept(name: str) -> bool:
    """Whether statistics may be called so that were measured on the way."""
    return _NAME.fullmatch(name) is not None


class KeptStore(FolderStore):
    """Those that one recipe is made with; no words of anybody lead to others."""

    def __init__(self, kept: Iterable[Kept]) -> None:
        super().__init__()
        self._kept = {each.name: each for each in kept}

    def has(self, path: str) -> bool:
        """One of these, by its name."""
        return path in self._kept

    def locate(self, path: str, revision: str | None) -> Located:
        """Its files; when they were written says nothing, for the name says what they hold."""
        folder = Path(self._kept[path].folder or kept_folder(path))
        sizes = {name: size for name, (size, _) in self._kept[path].heads.items()}
        if not sizes and not folder.is_dir():
            what = f"{path} was measured on the way of this merge, and is not kept here"
            raise MissingError(Problem(what, hint="run its recipe, which measures it again"))
        found = super().locate(str(folder), None).files if not sizes else {}
        sizes |= {name: info.size for name, info in found.items() if name != CARD_NAME}
        return Located(path, str(folder), None, {name: FileInfo(size) for name, size in sizes.items()})

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """What is known of a beginning, else from the disk."""
        size, head = self._kept[model.name].heads.get(file, (0, b""))
        end = size if stop is None else stop
        return head[start:end] if 0 < end <= len(head) else super().fetch(model, file, start, stop)
