"""The files that parents' licences ask to be passed on: NOTICE, and the texts of licences that are not the donor's.

Not here: the donor's own licence files, which are taken over like its tokenizer (checkpoints.sidefiles).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from merger.card.licences import judge
from merger.checkpoints.licence_file import LICENCES, is_notice, licence_files
from merger.plan.locked import LockedModel
from merger.plan.plan import Plan
from merger.stores.ports import Located

NOTICE = "NOTICE"


def passed_on(planned: Plan, fetch: Callable[[Located, str], bytes]) -> dict[str, bytes]:
    """The files by name; none where no parent brings any and no licence asks for one.

    Args:
        planned: the merge.
        fetch: reads a parent's file.

    Raises:
        ModelError: one of them cannot be read.
    """
    models = planned.locked.models
    held = [
        (model, name, fetch(model.located, name)) for model in models for name in licence_files(model.located.files)
    ]
    notices = [content.decode("utf-8", "replace").strip() for _, name, content in held if is_notice(name)]
    asked = [terms.notice for terms in judge(planned).duties if terms.notice]
    missing = [sentence for sentence in asked if not any(sentence in notice for notice in notices)]
    text = "\n\n".join(dict.fromkeys([*notices, *missing]))
    donors = {content for model, name, content in held if planned.texts.taken.get(name) == models.index(model)}
    files = {_place(model, name): content for model, name, content in _others(held, donors)}
    return files | ({NOTICE: f"{text}\n".encode()} if text else {})


_Held = tuple[LockedModel, str, bytes]


def _others(held: list[_Held], known: set[bytes]) -> Iterator[_Held]:
    """Each text once that is not among the known."""
    for model, name, content in held:
        if not is_notice(name) and content not in known:
            known.add(content)
            yield model, name, content


def _place(model: LockedModel, name: str) -> str:
    """Where it stands; a parent that is a merge itself has such places already."""
    if name.startswith(LICENCES):
        return name
    return f"{LICENCES}{re.sub(r'[^A-Za-z0-9._-]+', '--', model.name).strip('.-')}.{name}"
