"""The licence of a merge: what the recipe states, else the strictest that fits its parents; and what speaks against it.

No legal advice, and no guessing: a parent whose terms are not known leaves the licence open. Not here: what each
licence asks (terms), and reading the parents' cards (lock.lock).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merger.card.terms import ALIASES, HUB_NAMES, TERMS, Kind, Terms
from merger.errors import MismatchError, Problem, RecipeError, few
from merger.lock.locked import LockedModel, display_name
from merger.models.licence import LICENCES, is_notice, licence_files
from merger.planning.plan import Plan
from merger.recipe.model import ModelRef, Publish
from merger.stores.ports import Content, Located, bytes_of, sha256_of

UNSTATED = "not stated"
_NAMELESS = (UNSTATED, "other", "unknown")
_PASSED_ON = (Kind.SHARE_ALIKE, Kind.SAME_TERMS, Kind.NON_COMMERCIAL)
"""What holds of the result too: a licence that asks none of it leaves the choice of the result's free."""


@dataclass(frozen=True)
class Licence:
    """A licence as somebody names it, and the terms that are known under that name; none where the name is unknown."""

    name: str
    terms: tuple[Terms, ...] = ()
    link: str | None = None

    def asks(self, *kinds: Kind) -> bool:
        """Whether one of its terms asks one of these."""
        return any(kind in terms.asks for terms in self.terms for kind in kinds)


@dataclass(frozen=True)
class Conflict:
    """Why a parent does not allow the licence of the result."""

    parent: ModelRef
    what: str


@dataclass(frozen=True)
class Judgement:
    """What licence a merge has, why, and what its publisher has to know.

    Args:
        licences: those of the result, all of which hold at once; none where it is not settled.
        stated: whether the recipe says so, and it is no proposal.
        conflicts: why parents do not allow it.
        notes: what the publisher should decide or do, in sentences.
        duties: the terms of the parents' licences, each once, the strictest last.
        override: why it is published all the same, in the recipe's words.
    """

    licences: tuple[Licence, ...]
    stated: bool
    conflicts: tuple[Conflict, ...]
    notes: tuple[str, ...]
    duties: tuple[Terms, ...]
    override: str | None

    @property
    def name(self) -> str:
        """The licence in words; empty where it is not settled."""
        return _names(self.licences)


def judge(planned: Plan, name: str | None = None) -> Judgement:
    """The licence of what is planned.

    Args:
        name: what it is called, for licences that ask something of that; None: as the recipe says.
    """
    publish, models = planned.locked.recipe.publish, planned.locked.parents
    parents = [licence_of(model) for model in models]
    result = stated_licences(publish) or propose_licences(parents)
    duties = sorted({terms for licence in parents for terms in licence.terms}, key=_strictness)
    return Judgement(
        licences=result,
        stated=publish.license is not None,
        conflicts=tuple(Conflict(model.ref, what) for model in models for what in _conflicts(model, result)),
        notes=(*_open(models, result), *_naming(duties, (name or publish.repo or "").split("/")[-1])),
        duties=tuple(duties),
        override=publish.license_override,
    )


def refuse_licences(planned: Plan, published: bool) -> None:
    """Refuse a licence that the parents do not allow, and to publish what no licence fits, unless the recipe says why.

    Args:
        published: whether it goes to the Hub: in a folder of one's own, what no licence fits may lie.

    Raises:
        RecipeError: the recipe states a licence that a parent does not allow.
        MismatchError: no licence fits the parents.
    """
    publish, found = planned.locked.recipe.publish, judge(planned)
    if not found.conflicts or found.override is not None:
        return
    reason = "say why it may be so with publish.license_override, for the card"
    if found.stated:
        fitting = propose_licences([licence_of(model) for model in planned.locked.parents])
        fits = fitting and not any(_conflicts(model, fitting) for model in planned.locked.parents)
        hint = f"leave it out, for {_names(fitting)} fits; or {reason}" if fits else f"leave the model out; or {reason}"
        raise RecipeError(
            Problem(conflict.what, publish.license_at, "publish.license", hint) for conflict in found.conflicts
        )
    if published:
        hint, refused = f"leave it out; or name a license under publish: and {reason}", found.conflicts
        raise MismatchError(Problem(each.what, each.parent.at, f"models[{each.parent}]", hint) for each in refused)


# ---- whose licence it is --------------------------------------------------------------------------------------------


def licence_of(model: LockedModel) -> Licence:
    """A parent's licence, as its card states it, else as the file beside it is known."""
    if model.licence is None:
        return Licence(UNSTATED)
    link = model.card.get("license_link")
    return _find_licence(model.licence, link if isinstance(link, str) else None)


def stated_licences(publish: Publish) -> tuple[Licence, ...]:
    """What the recipe says, a licence for each part of ``a AND b``; nothing where it leaves it to us."""
    if publish.license is None:
        return ()
    is_other = publish.license.strip().lower() == "other"
    name = publish.license_name if is_other and publish.license_name else publish.license
    return _parts(_find_licence(name, publish.license_link))


def _parts(licence: Licence) -> tuple[Licence, ...]:
    """A licence for each part of ``a AND b``, and for the part of ``a OR b`` that is taken."""
    return tuple(Licence(terms.name, (terms,), licence.link) for terms in licence.terms) or (licence,)


def _find_licence(text: str, link: str | None = None) -> Licence:
    """What is known under a name, which may be an expression of SPDX."""
    flat = " ".join(text.split())
    known = _find_terms(flat)
    return Licence(known.name, (known,), link) if known else Licence(flat, _expression(flat), link)


def _find_terms(name: str) -> Terms | None:
    slug = re.sub(r"[\s_]+", "-", name.lower())
    return TERMS.get(ALIASES.get(slug, slug))


def _expression(text: str) -> tuple[Terms, ...]:
    """Of alternatives, the one that asks least; nothing where a part is not known."""
    if not re.search(r"\s(and|or|with)\s", text, re.IGNORECASE):
        return ()
    from license_expression import ExpressionError, Licensing  # takes a while; few cards hold an expression

    try:
        return _terms_in(Licensing().parse(text))
    except ExpressionError:
        return ()


def _terms_in(part: object) -> tuple[Terms, ...]:
    parts = [_terms_in(argument) for argument in getattr(part, "args", ())]
    if not parts:
        known = _find_terms(str(getattr(part, "license_symbol", part)))
        return (known,) if known else ()
    if "or" in str(getattr(part, "operator", "")).lower():
        return min((terms for terms in parts if terms), key=lambda terms: max(map(_strictness, terms)), default=())
    return tuple(dict.fromkeys(terms for found in parts for terms in found)) if all(parts) else ()


# ---- what fits ------------------------------------------------------------------------------------------------------


def propose_licences(parents: Sequence[Licence]) -> tuple[Licence, ...]:
    """The strictest of the parents' licences, and beside it those whose terms it does not pass on.

    None where a parent's licence is not known, unless all have that one; none where nothing may be published.
    """
    different = list({part.name: part for licence in parents for part in _parts(licence)}.values())
    if len(different) == 1 and different[0].name not in _NAMELESS and not different[0].asks(Kind.NO_DERIVATIVES):
        return (different[0],)
    if any(not licence.terms or licence.asks(Kind.NO_DERIVATIVES) for licence in different):
        return ()
    different.sort(key=lambda licence: max(map(_strictness, licence.terms)))
    kept = [licence for licence in different if licence.asks(*_PASSED_ON)] or different[-1:]
    for licence in list(kept):
        others = [other for other in kept if other != licence]
        if others and not list(_against(licence, others)):
            kept.remove(licence)
    return tuple(reversed(kept))


def _strictness(terms: Terms) -> int:
    return list(TERMS).index(terms.name)


def _names(licences: Sequence[Licence]) -> str:
    return " and ".join(licence.name for licence in licences)


def _conflicts(model: LockedModel, result: Sequence[Licence]) -> list[str]:
    licence = licence_of(model)
    return [f"{display_name(model)} ({licence.name}) {why}" for why in _against(licence, result)]


def _against(parent: Licence, result: Sequence[Licence]) -> Iterator[str]:
    """What in a parent's terms does not allow the result's licence."""
    for terms in parent.terms:
        if Kind.NO_DERIVATIVES in terms.asks:
            yield "does not allow to publish what is made of it"
        elif not result:
            continue
        elif Kind.SHARE_ALIKE in terms.asks:
            yield from _against_alike(terms, result)
        elif Kind.SAME_TERMS in terms.asks and not _covers(result, terms):
            yield f"asks that its terms are passed on, and {_names(result)} does not"
        elif Kind.NON_COMMERCIAL in terms.asks and not any(each.asks(Kind.NON_COMMERCIAL) for each in result):
            yield f"allows no commercial use, and {_names(result)} does"


def _against_alike(terms: Terms, result: Sequence[Licence]) -> Iterator[str]:
    if not _covers(result, terms):
        yield f"is to be passed on under its own licence, and {_names(result)} is another"
        return
    more = [each for each in result if not _covers([each], terms) and each.asks(*_PASSED_ON)]
    if more:
        yield f"allows no further restrictions, and {_names(more)} adds some"


def _covers(result: Sequence[Licence], wanted: Terms) -> bool:
    """Whether to publish under these licences passes those terms on."""
    return any(wanted.name in (terms.name, *terms.covers) for licence in result for terms in licence.terms)


def _open(models: Sequence[LockedModel], result: Sequence[Licence]) -> Iterator[str]:
    unknown = [f"{display_name(model)} ({licence_of(model).name})" for model in models if not licence_of(model).terms]
    if not result and unknown:
        yield (f"the licence is not settled: what {few(unknown)} asks is not known here; "
               "state the result's with publish: {license: ...}")  # fmt: skip
    elif unknown and not (len(result) == 1 and all(licence_of(model).name == result[0].name for model in models)):
        yield f"what {few(unknown)} asks is not known here: see for yourself"


def _naming(duties: Sequence[Terms], title: str) -> Iterator[str]:
    """What is wrong with the result's name by the terms that ask something of it."""
    plain = re.sub(r"[^a-z0-9]", "", title.lower())
    for terms in duties:
        if title and terms.begins and not plain.startswith(terms.begins.lower().replace(" ", "")):
            yield f"the {terms.title} asks that the result's name begins with {terms.begins}: {title} does not"


# ---- for the card's metadata ----------------------------------------------------------------------------------------

_LINK = re.compile(r"https://[^\s\"'<>()\[\]\\]+|LICEN[CS]E(\.md|\.txt)?")


def keys(licences: Sequence[Licence]) -> dict[str, Any]:
    """The licence as the front matter states it: the Hub's identifiers, or other with a name and a link."""
    names = [licence.name.lower() for licence in licences]
    if not names:
        return {}
    if all(name in HUB_NAMES for name in names):
        return {"license": names[0] if len(names) == 1 else names}
    links = [*(licence.link for licence in licences), *(terms.url for each in licences for terms in each.terms)]
    link = next((link for link in links if link and _LINK.fullmatch(link)), None)
    slug = re.sub(r"[^a-z0-9.]+", "-", "-and-".join(names))[:96].strip("-.") or "unnamed"
    return {"license": "other", "license_name": slug} | ({"license_link": link} if link else {})


# ---- notices --------------------------------------------------------------------------------------------------------


NOTICE = "NOTICE"


def licence_notices(
    planned: Plan, take: Callable[[Sequence[tuple[Located, str]]], list[Content]]
) -> dict[str, Content]:
    """The files by name; none where no parent brings any and no licence asks for one.

    Args:
        take: what parents' files hold.

    Raises:
        ModelError: one of them cannot be read.
    """
    models = planned.locked.parents
    found = [(model, name) for model in models for name in licence_files(model.located.files)]
    contents = take([(model.located, name) for model, name in found])
    held = [(model, name, content) for (model, name), content in zip(found, contents, strict=True)]
    notices = [bytes_of(content).decode("utf-8", "replace").strip() for _, name, content in held if is_notice(name)]
    asked = [terms.notice for terms in judge(planned).duties if terms.notice]
    missing = [sentence for sentence in asked if not any(sentence in notice for notice in notices)]
    text = "\n\n".join(dict.fromkeys([*notices, *missing]))
    own = {sha256_of(content) for model, name, content in held if planned.texts.taken.get(name) == models.index(model)}
    files: dict[str, Content] = {_place(model, name): content for model, name, content in _others(held, own)}
    return files | ({NOTICE: f"{text}\n".encode()} if text else {})


_Held = tuple[LockedModel, str, Content]


def _others(held: list[_Held], known: set[str]) -> Iterator[_Held]:
    """Each text once that is not among the known."""
    for model, name, content in held:
        if not is_notice(name) and (sha256 := sha256_of(content)) not in known:
            known.add(sha256)
            yield model, name, content


def _place(model: LockedModel, name: str) -> str:
    if name.startswith(LICENCES):
        return name
    return f"{LICENCES}{re.sub(r'[^A-Za-z0-9._-]+', '--', model.name).strip('.-')}.{name}"
