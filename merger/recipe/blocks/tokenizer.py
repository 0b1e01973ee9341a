"""The language's part about tokens: the `tokenizer:` block, `tokenizer_source` and `chat_template`.

    tokenizer     := {source: union | base | reference, rows: base, tokens: {TOKEN: row}, pad_to_multiple_of: 8,
                      missing: omp, k: 9}
    row           := {source: reference | {kind: zero} | {kind: model_token, model: reference, token | token_id}, force}
    chat_template := auto | NAME | Jinja text

Not here: what the models' tokenizers hold (plan).
"""

from __future__ import annotations

import re

from merger.recipe import spans
from merger.recipe.model import ChatTemplate, ModelRef, Tokenizer, TokenOf, TokenRow
from merger.recipe.references import reference
from merger.recipe.values import Fields, Value, nearest
from merger.safety.numbers import TOKENS, Range, quoted_short

TOKENIZER = ("source", "tokens", "rows", "pad_to_multiple_of", "missing", "k")
ROW = ("source", "force")
ROW_SOURCE = ("kind", "model", "token", "token_id")
KINDS = ("zero", "model_token")
UNION, BASE = "union", "base"
MISSING = ("mean", "zero", "subword", "omp")
"""How a token gets its row that none of the merged models has."""

ROWS = ("tokens", BASE)
"""How many rows there are at least: one for each token, or as many as the base model has."""

AUTO = "auto"
CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""The chat templates that are built in: templates/chat."""

MAX_PADDING = 1 << 20
MAX_ATOMS = 1 << 10

_OLD = "model:"
"""What stands before a model's name in sources of old releases of mergekit."""

_A_SOURCE = "union, base or a model such as org/name"
_A_ROW_SOURCE = "a model, {kind: zero} or {kind: model_token, model: org/name, token: TOKEN}"
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers' own
_A_NUMBER_OF_ROWS = "write rows: base for as many as the base model has; else there is a row for each token"
_A_WAY = "how a token gets its row that none of the merged models has: mean, zero, subword or omp"


def tokenizer(fields: Fields) -> Tokenizer | None:
    """What stands behind `tokenizer` or `tokenizer_source`; None where neither does."""
    block, legacy = fields.get("tokenizer"), fields.get("tokenizer_source")
    if block and legacy:
        what = "tokenizer and tokenizer_source exclude each other"
        fields.place.error(what, "write tokenizer: {source: ...} alone", legacy.key)
    if block:
        return _block(block)
    return Tokenizer(_source(legacy), at=legacy.key) if legacy else None


def _block(place: Value) -> Tokenizer:
    fields = place.fields("a map with the key source", TOKENIZER, in_place="write tokenizer: {{source: {}}}")
    if fields is None:
        return Tokenizer(at=place.key)
    source, tokens, missing, rows = (fields.get(key) for key in ("source", "tokens", "missing", "rows"))
    way = _word(missing, MISSING, _A_WAY) if missing else MISSING[0]
    if (k := fields.get("k")) and way != "omp":
        k.warn("k has no effect without missing: omp", "take it out", k.key)
    return Tokenizer(
        source=_source(source) if source else UNION,
        tokens=_rows(tokens) if tokens else (),
        pad_to_multiple_of=_count(fields, "pad_to_multiple_of", 1, MAX_PADDING),
        missing=way,
        k=_count(fields, "k", 64, MAX_ATOMS),
        rows=_word(rows, ROWS, _A_NUMBER_OF_ROWS) if rows else ROWS[0],
        at=place.key,
    )


def _source(place: Value) -> ModelRef | str:
    name = place.node.value if isinstance(place.node, spans.Scalar) else None
    if name in (UNION, BASE):
        return str(name)
    if isinstance(name, str) and name.startswith(_OLD):
        place.error(
            f"{name!r} begins with {_OLD!r}", f"take it out: write {name.removeprefix(_OLD).strip() or _A_SOURCE}"
        )
        return UNION
    meant = nearest(name, (UNION, BASE), cutoff=0.7) if isinstance(name, str) and "/" not in name else None
    if meant:
        place.error(f"{name!r} is neither union nor base nor a model's name", f"did you mean {meant!r}?")
        return meant
    if not isinstance(place.node, spans.Mapping) and not isinstance(name, str):
        place.expected(_A_SOURCE, f"write {_A_SOURCE}")
        return UNION
    return reference(place)


def _word(place: Value, known: tuple[str, ...], hint: str) -> str:
    text = place.text(f"one of {', '.join(known)}")
    if text is None or text in known:
        return text or known[0]
    near = nearest(text, known, cutoff=0.6)
    place.error(f"{text!r} is none of {', '.join(known)}", f"did you mean {near!r}?" if near else hint)
    return near or known[0]


def _count(fields: Fields, key: str, default: int, most: int) -> int:
    within = Range(1, most)
    return fields.whole(key, within, f"write a whole number from {within}, such as {max(default, 64)}") or default


def _rows(place: Value) -> tuple[TokenRow, ...]:
    entries = place.entries("a map from tokens to where their rows come from")
    return tuple(_row(token, entry) for token, entry in (entries or {}).items())


def _row(token: str, place: Value) -> TokenRow:
    if not token:
        place.error("a token must have text", "name a token such as <|im_start|>", place.key)
    if place.empty:
        return TokenRow(token, at=place.key)
    if isinstance(place.node, spans.Scalar):
        place.expected("a map with the key source", f"write source: {_A_ROW_SOURCE}")
        return TokenRow(token, at=place.key)
    fields = place.fields("a map with the key source", ROW)
    source, force = (fields.get("source"), fields.get("force")) if fields else (None, None)
    if force and force.flag() and not source:
        place.error("force needs a source", f"name what replaces the token's row: {_A_ROW_SOURCE}", force.key)
    found = _row_source(source) if source else None
    return TokenRow(token, found, bool(force and force.flag()), place.key)


def _row_source(place: Value) -> TokenOf | str | None:
    keys = [entry.key for entry in place.node.entries] if isinstance(place.node, spans.Mapping) else []
    is_row = any(nearest(key, ("kind", "token", "token_id")) for key in keys)
    if not is_row:
        return TokenOf(reference(place))
    fields = place.fields(_A_ROW_SOURCE, ROW_SOURCE)
    kind = fields.need("kind", "write kind: zero, or kind: model_token") if fields else None
    if fields is None or kind is None:
        return None
    if _word(kind, KINDS, f"write {_A_ROW_SOURCE}") != KINDS[0]:
        return _token_of(fields)
    for key in ROW_SOURCE[1:]:
        if unused := fields.get(key):
            unused.warn(f"{key} has no effect beside kind: zero", "take it out", unused.key)
    return KINDS[0]


def _token_of(fields: Fields) -> TokenOf | None:
    model = fields.need("model", "name the model whose token it is: model: org/name")
    token, numbered = fields.get("token"), fields.get("token_id")
    if (token is None) == (numbered is None):
        what = "token and token_id exclude each other" if token else "missing token or token_id"
        fields.place.error(what, "write token: TOKEN, or token_id: NUMBER")
        return None
    found = fields.whole("token_id", TOKENS, "write a token's id: they are counted from 0")
    text = fields.text("token", "a token")
    return TokenOf(reference(model), text, found) if model and (text is not None or found is not None) else None


def chat_template(fields: Fields) -> ChatTemplate | None:
    """What stands behind `chat_template`: a name that is known, or text that Jinja can read."""
    place = fields.get("chat_template")
    known = (AUTO, *CHAT_TEMPLATES)
    if place is None or place.holds(""):
        return None
    text = place.text(f"one of {', '.join(known)}, or Jinja text")
    if text is None:
        return None
    if text not in known and "{" not in text:
        near = nearest(text, known, cutoff=0.6)
        hint = f"did you mean {near!r}?" if near else f"known here: {', '.join(known)}; other text must be Jinja"
        place.error(f"there is no chat template {quoted_short(text)}", hint)
    elif text not in known:
        _check_jinja(place, text)
    return ChatTemplate(text, place.at)


def _check_jinja(place: Value, text: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError  # takes longer to import than a recipe to read

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except TemplateSyntaxError as error:
        place.error(f"the chat template is no Jinja: line {error.lineno}: {error.message}", "mend that line of it")
