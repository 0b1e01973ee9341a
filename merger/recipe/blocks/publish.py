"""The language's part about where the result goes and in which form: the `publish:` block.

    publish := {repo: owner/name, private: true, create_pr: true, license: LICENCE, license_name: NAME,
                license_link: ADDRESS, license_override: REASON, gguf: [TYPE], safetensors: false, fp8: block,
                template: FILE}

Not here: what licences allow (card.licences), and which models have a GGUF form (models.gguf).
"""

from __future__ import annotations

from merger.recipe.model import Publish
from merger.recipe.values import Fields, Value
from merger.safety import names, numbers

PUBLISH = (
    "repo", "private", "license", "license_name", "license_link", "license_override", "create_pr", "gguf",
    "safetensors", "fp8", "template",
)  # fmt: skip
FP8 = ("block", "channel")
GGUF = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "MXFP4")


def publish_block(fields: Fields) -> Publish:
    """What stands behind `publish`; all that it may leave out, where nothing does."""
    place = fields.get("publish")
    keys = place.fields("a map with the key repo", PUBLISH) if place else None
    if place is None or keys is None:
        return Publish()
    repo, license, gguf, template = (keys.get(key) for key in ("repo", "license", "gguf", "template"))
    measured, fp8, written = fields.get("evaluate"), keys.get("fp8"), _safetensors(keys)
    if measured is not None and (fp8 or not written):
        why = "publish.fp8 changes them" if fp8 else "publish.safetensors is false"
        what = f"what is measured is read as safetensors, and {why}"
        measured.error(what, "leave one of them out", measured.key)
    return Publish(
        repo=_repo(repo) if repo else None,
        private=keys.flag("private"),
        license=keys.text("license", "a licence such as apache-2.0"),
        license_name=_with_other(keys, "license_name", "a name such as my-license-1.0"),
        license_link=_with_other(keys, "license_link", "an address that begins with https://, or LICENSE"),
        license_override=keys.text("license_override", "a sentence for the card"),
        create_pr=keys.flag("create_pr"),
        gguf=_gguf(gguf) if gguf else (),
        safetensors=written,
        fp8=_fp8(fp8, written) if fp8 else None,
        template=keys.text("template", "a file, a folder or hf://owner/name/path"),
        at=place.key,
        license_at=license.at if license else None,
        gguf_at=gguf.key if gguf else None,
        fp8_at=fp8.key if fp8 else None,
        template_at=template.at if template else None,
    )


def _gguf(place: Value) -> tuple[str, ...]:
    what = f"a list of types such as [Q8_0], of {', '.join(GGUF)}"
    found = [(each, each.text(what)) for each in place.items(what)]
    for each, text in found:
        if text is not None and text.upper() not in GGUF:
            each.error(f"{text!r} is no type of GGUF that is written", f"write {what}")
    return tuple(dict.fromkeys(text.upper() for _, text in found if text is not None))


def parse_kinds(text: str) -> tuple[str, ...]:
    """The types of GGUF files that a text lists with commas between.

    Raises:
        ValueError: one of them is none; in a sentence.
    """
    kinds = tuple(dict.fromkeys(kind.strip().upper() for kind in text.split(",")))
    if not set(kinds) <= set(GGUF):
        raise ValueError(f"{numbers.quoted_short(text)} names no types of GGUF; write for example Q8_0,BF16")
    return kinds


def _fp8(place: Value, written: bool) -> str | None:
    """How many entries share a scale."""
    text = place.text(" or ".join(FP8))
    if text is not None and text not in FP8:
        place.error(f"{text!r} is not what may have a scale", f"write {' or '.join(FP8)}")
    if not written:
        place.error("fp8 is a form of safetensors, which are not written", "leave safetensors: false out", place.key)
    return text


def _safetensors(keys: Fields) -> bool:
    """Whether they are written; what has no other form takes them."""
    place = keys.get("safetensors")
    if place is None or place.flag() is not False:
        return True
    if keys.get("gguf") is None:
        place.error("nothing would be published", "write gguf: [Q8_0] beside it, or leave safetensors out", place.key)
    return False


def _with_other(fields: Fields, key: str, what: str) -> str | None:
    """A key that goes with a licence which the Hub has no identifier for."""
    place, license = fields.get(key), fields.get("license")
    if place and not (license and license.holds("other")):
        place.error(f"{key} goes with license: other", f"write license: other, or leave {key} out", place.key)
    return fields.text(key, what)


def _repo(place: Value) -> str | None:
    text = place.text("owner/name")
    if text is None:
        return None
    name = names.parse_repo(text)
    if names.is_repo(name):
        return name
    place.error(f"{text!r} is no repo's name on the Hub", names.HINT)
    return None
