"""The files that parents' licences ask to be passed on: NOTICE, and the texts of licences that are not the donor's.

Not here: the donor's own licence files, which are taken over like its tokenizer (checkpoints.sidefiles).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from merger.card.licences import judge
from merger.checkpoints.licence_file import LICENCES, is_notice, licence_files
from merger.plan.locked import LockedModel
from merger.plan.plan import Plan
from merger.stores.content import bytes_of, sha256_of
from merger.stores.ports import Content, Located

NOTICE = "NOTICE"


def passed_on(planned: Plan, take: Callable[[Sequence[tuple[Located, str]]], list[Content]]) -> dict[str, Content]:
    """The files by name; none where no parent brings any and no licence asks for one.

    Args:
        planned: the merge.
        take: what parents' files hold.

    Raises:
        ModelError: one of them cannot be read.
    """
    models = planned.locked.models
    found = [(model, name) for model in models for name in licence_files(model.located.files)]
    contents = take([(model.located, name) for model, name in found])
    held = [(model, name, content) for (model, name), content in zip(found, contents, strict=True)]
    notices = [_text(content) for _, name, content in held if is_notice(name)]
    asked = [terms.notice for terms in judge(planned).duties if terms.notice]
    missing = [sentence for sentence in asked if not any(sentence in notice for notice in notices)]
    text = "\n\n".join(dict.fromkeys([*notices, *missing]))
    donors = {
        sha256_of(content) for model, name, content in held if planned.texts.taken.get(name) == models.index(model)
    }
    files: dict[str, Content] = {_place(model, name): content for model, name, content in _others(held, donors)}
    return files | ({NOTICE: f"{text}\n".encode()} if text else {})


def _text(content: Content) -> str:
    return bytes_of(content).decode("utf-8", "replace").strip()


_Held = tuple[LockedModel, str, Content]


def _others(held: list[_Held], known: set[str]) -> Iterator[_Held]:
    """Each text once that is not among the known."""
    for model, name, content in held:
        if not is_notice(name) and (sha256 := sha256_of(content)) not in known:
            known.add(sha256)
            yield model, name, content


def _place(model: LockedModel, name: str) -> str:
    """Where it stands; a parent that is a merge itself has such places already."""
    if name.startswith(LICENCES):
        return name
    return f"{LICENCES}{re.sub(r'[^A-Za-z0-9._-]+', '--', model.name).strip('.-')}.{name}"
