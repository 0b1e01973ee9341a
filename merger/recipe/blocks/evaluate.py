"""The language's part about measuring the result: the `evaluate:` block.

    evaluate   := {perplexity: perplexity | [perplexity], tasks: [TASK], limit: 100, parents: true, dtype: bfloat16}
    perplexity := {text: FILE | hf://[datasets/]owner/name[@revision]/FILE, window: 512, stride: 256, limit: 100000}

Not here: the measuring (engine), and whether the texts are there (evaluation).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from merger.errors import Span
from merger.recipe import spans
from merger.recipe.model import Evaluate, Perplexity
from merger.recipe.values import Fields, Value, nearest
from merger.safety.numbers import Range

EVALUATE = ("perplexity", "tasks", "limit", "parents", "dtype")
PERPLEXITY = ("text", "window", "stride", "limit")
PERPLEXITY_AT = "evaluate.perplexity"
DTYPES = ("float32", "bfloat16")
HUB_FILE = re.compile(r"hf://(?P<datasets>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?/(?P<file>.+)")
MAX_WINDOW = 1 << 17
LIMIT = Range(1, 10**8)

_A_TEXT = "a file, or hf://owner/name/file on the Hub, hf://datasets/owner/name/file of a data set"
_A_TASK = "the name of a task of lm-evaluation-harness, or the YAML file of one"


def evaluate(fields: Fields) -> Evaluate | None:
    """What stands behind `evaluate`; None where nothing does."""
    place = fields.get("evaluate")
    keys = place.fields("a map with the keys perplexity or tasks", EVALUATE) if place else None
    if place is None or keys is None:
        return None
    perplexity, tasks = keys.get("perplexity"), keys.get("tasks")
    if not perplexity and not tasks:
        place.error("nothing to measure", "write perplexity: {text: FILE}, or tasks: [NAME]", place.key)
    return Evaluate(
        perplexity=_perplexities(perplexity) if perplexity else (),
        tasks=_tasks(tasks) if tasks else (),
        limit=_count(keys, "limit", LIMIT),
        parents=keys.flag("parents"),
        dtype=_dtype(keys.get("dtype")),
        at=place.key,
    )


def named_files(wanted: Evaluate) -> Iterator[tuple[str, Span | None, str]]:
    """The files of the machine that the block names: each with its place in the recipe, and the words for that."""
    yield from ((task, wanted.at, "evaluate.tasks") for task in wanted.tasks if _is_file(task))
    texts = [text for text in wanted.perplexity if not HUB_FILE.fullmatch(text.text)]
    yield from ((text.text, text.at, PERPLEXITY_AT) for text in texts)


def without_files(wanted: Evaluate) -> Evaluate | None:
    """The block without them; None where nothing is left of it."""
    texts = tuple(text for text in wanted.perplexity if HUB_FILE.fullmatch(text.text))
    tasks = tuple(task for task in wanted.tasks if not _is_file(task))
    return replace(wanted, perplexity=texts, tasks=tasks) if texts or tasks else None


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _perplexities(place: Value) -> tuple[Perplexity, ...]:
    single = not isinstance(place.node, spans.Sequence)
    found = [_perplexity(item) for item in ([place] if single else place.items("a list of texts, each with - text:"))]
    return tuple(one for one in found if one is not None)


def _perplexity(place: Value) -> Perplexity | None:
    fields = place.fields("a map with the key text", PERPLEXITY, in_place="write {{text: {}}}")
    text = fields.need("text", f"name {_A_TEXT}") if fields else None
    if fields is None or text is None:
        return None
    window = _count(fields, "window", Range(2, MAX_WINDOW)) or Perplexity.window
    stride = _count(fields, "stride", Range(1, window - 1)) or max(1, window // 2)
    limit = _count(fields, "limit", LIMIT) or Perplexity.limit
    named = _text(text)
    return Perplexity(named, window, stride, limit, text.at) if named else None


def _text(place: Value) -> str | None:
    named = place.text(_A_TEXT)
    if named is not None and named.startswith("hf:") and not HUB_FILE.fullmatch(named):
        place.error(f"{named!r} names no file on the Hub", f"write {_A_TEXT}")
        return None
    return named


def _tasks(place: Value) -> tuple[str, ...]:
    names: list[str] = []
    for item in place.items(f"a list, each {_A_TASK}"):
        name = item.text(_A_TASK)
        if name in names:
            item.warn(f"{name} is listed twice", "take one of them out")
        elif name is not None:
            names.append(name)
    return tuple(names)


def _count(fields: Fields, key: str, within: Range) -> int | None:
    return fields.whole(key, within, f"any whole number from {within} will do")


def _dtype(place: Value | None) -> str:
    text = place.text(f"one of {', '.join(DTYPES)}") if place else None
    if place is None or text is None or text in DTYPES:
        return text or DTYPES[0]
    place.error(f"{text!r} is no dtype that is measured in", f"write {nearest(text, DTYPES) or ' or '.join(DTYPES)}")
    return DTYPES[0]
