"""How much of what others wrote is read whole: one table, and what holds it. Not here: what files mean (checkpoints).

A store looks up how much of a file it may read whole by the file's name (`of`), so that no caller can forget it. Ranges
of a file are as long as their caller says.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import IO, Any

from merger.errors import MergerError, Problem
from merger.safety.numbers import DOWN, UP, size

MAX_DEPTH = 64
"""How deep lists and maps of JSON or YAML may stand in each other; real files have fewer than ten levels."""

_PIECE_BYTES = 1 << 20
MAX_DIGITS = 40
"""Of a whole number in JSON; tokenizers write 1e30 where there is no limit to a text."""


@dataclass(frozen=True)
class Limit:
    """A row of the table.

    Args:
        what: what is read.
        most: how much of it.
        why: how much real ones have, or what more would cost.
        unit: in what that is counted.
        values: how many values may stand in it, where it is JSON or YAML; None: as many as its bytes hold.
        files: what matches the names of those files of a model that are meant; None: no file of a model.
    """

    what: str
    most: int
    why: str
    unit: str = "bytes"
    values: int | None = None
    files: re.Pattern[str] | None = None


def _names(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*/)?({pattern})", re.IGNORECASE | re.DOTALL)


CONFIG = Limit(
    "config.json, adapter_config.json, generation_config.json, processor_config.json and their like", 5_000_000,
    "most have kilobytes; the labels of 21,000 classes take 2 MB", values=500_000, files=_names(r"[^/]*config\.json"),
)  # fmt: skip
INDEX = Limit(
    "the index of a model's shards (*.index.json)", 64_000_000,
    "DeepSeek V3's has 9 MB", values=1_500_000, files=_names(r"[^/]*\.index\.json"),
)  # fmt: skip
TOKENIZER = Limit(
    "a tokenizer's file that is looked into (tokenizer.json, vocab.json, tokenizer.model and their like)", 120_000_000,
    "Gemma's tokenizer.json has 33 MB", values=8_000_000,
    files=_names(
        r"(tokenizer|tekken|vocab|added_tokens|special_tokens_map)(_config)?\.(json|txt)|merges\.txt"
        r"|[^/]*\.(tiktoken|spm|model)(\.v\d+)?"
    ),
)  # fmt: skip
TOKENIZERS = Limit(
    "the tokenizers of all models of a recipe that are looked into, what is equal counted once", 500_000_000,
    "they are held side by side while the result's is made",
)  # fmt: skip
CHAT = Limit("a chat template", 1_000_000, "the longest have 30 kB; none is rendered",
             files=_names(r"chat_template\.(jinja|json)|[^/]*\.jinja"))  # fmt: skip
LICENCE = Limit("a licence or a notice that is passed on", 1_000_000, "the longest have 100 kB",
                files=_names(r"(licen[cs]e|copying|use_policy|notice)([-_.][^/]*)?|licences/.*"))  # fmt: skip
SIDE = Limit("any other file that is passed on as it is", 120_000_000, "it is copied in pieces, never held whole")
SIDES = Limit("the files that are passed on beside the tensors, together", 500_000_000, "a tokenizer's have 60 MB")
TEMPLATE = Limit("a recipe's own templates for the card, all together", 1_000_000,
                 "ours have 20 kB; they are filled in by a process of its own with 3 s and 192 MB",
                 files=_names(r"[^/]*\.j2"))  # fmt: skip
TEMPLATES = Limit("the files of a folder of templates", 100, "ours are fewer than 20", "files")
CARD = Limit("the card of a parent or an ancestor (README.md)", 1_000_000,
             "of a longer one nothing is known; scores of many tasks take 0.5 MB", values=50_000,
             files=_names(r"readme\.md"))  # fmt: skip
RECORD = Limit("an ancestor's record of its merge (its lock, mergekit_config.yml)", 1_000_000,
               "of a longer one nothing is known", values=60_000, files=_names(r"mergekit_config\.yml"))  # fmt: skip
LOCK = Limit("a lock", 16_000_000, "one line for each file: that of 16 models of 160 shards has 0.5 MB",
             values=300_000, files=_names(r"[^/]*\.lock\.yaml"))  # fmt: skip
MEASURED = Limit("merger.measured.json, merger.evaluation.json", 64_000_000,
                 "up to 700 bytes a tensor that is merged of three", values=6_000_000,
                 files=_names(r"merger\.(measured|evaluation)\.json"))  # fmt: skip
OTHER = Limit("any other file of a model that is looked into", 1_000_000, "recipe.yaml and what is yet to come")
_TENSOR_BYTES = 400
_TENSORS = f"tensors (of {_TENSOR_BYTES} bytes each in the header)"
HEADER = Limit("the header of a safetensors file", 100_000_000, "safetensors' own limit")
GGUF_HEADER = Limit("the header of a GGUF file", 100_000_000, "nearly all of it is the tokenizer, some megabytes",
                    values=3_000_000)  # fmt: skip
MODEL_TENSORS = Limit("the headers of a model's files together", 300_000,
                      "DeepSeek V3 has 92,000 and Kimi K2 139,000", _TENSORS)  # fmt: skip
ALL_TENSORS = Limit("the headers of all models of a recipe", 600_000, "each takes 2 kB in the plan", _TENSORS)
SPACE_TENSORS = Limit(
    "the same in the Space, where many plan at once", 200_000, "half a gigabyte of its page", _TENSORS
)
TENSOR_NAME = Limit("a tensor's name", 1_000, "the longest have 150", "characters")
STATE = Limit("what bitsandbytes writes of a tensor (quant_state)", 4_000, "the longest have 300 bytes", values=200)
RECIPE = Limit("a recipe", 1_000_000, "the longest have 20 kB", values=20_000)
DOCUMENTS = Limit("the documents of a recipe", 50, "each is a stage; six are the most that were seen", "documents")
CHECKPOINTS = Limit("the checkpoints of which a model is the mean", 1_000, "each is asked for; Pythia's runs have 154",
                    "checkpoints")  # fmt: skip
EXPRESSION = Limit("a regular expression (include, exclude, rank_pattern, alpha_pattern)", 1_000,
                   "it is tried in a process of its own, of 3 s", "characters")  # fmt: skip
EXPRESSIONS = Limit("the regular expressions of an adapter", 10_000, "PEFT writes one for each module", "expressions")
TEXT = Limit("a text whose perplexity is measured", 200_000_000, "WikiText's test part has 1.3 MB")
EVENT = Limit("the event of a workflow", 30_000_000, "GitHub cuts them at 25 MB")
GITHUB = Limit("an answer of GitHub's API", 30_000_000, "100 comments of 65,536 characters")
BODY = Limit("the body of a request to the Space: form, API, upload, webhook", 1_000_000,
             "a recipe there has 64 kB at most; counted as it comes, before anything of it is parsed")  # fmt: skip

TABLE = (
    CONFIG, INDEX, HEADER, GGUF_HEADER, MODEL_TENSORS, ALL_TENSORS, SPACE_TENSORS, TENSOR_NAME, STATE, TOKENIZER,
    TOKENIZERS, CHAT, LICENCE, SIDE, SIDES,
    CARD, RECORD, LOCK, MEASURED, OTHER, TEMPLATE, TEMPLATES, RECIPE, DOCUMENTS, CHECKPOINTS, EXPRESSION, EXPRESSIONS,
    TEXT, EVENT, GITHUB, BODY,
)  # fmt: skip
"""All of them, as docs/security.md shows them."""

_FIRST = (INDEX, CHAT, LICENCE, MEASURED, LOCK, CARD, RECORD, TEMPLATE, TOKENIZER, CONFIG)
"""Where a name matches two, the first counts."""


def of(file: str) -> Limit:
    """How much of a model's file may be read whole, by its name.

    >>> of("tokenizer.json") is TOKENIZER, of("text_encoder/config.json") is CONFIG, of("pictures/a.svg") is OTHER
    (True, True, True)
    """
    return next((limit for limit in _FIRST if limit.files and limit.files.fullmatch(file)), OTHER)


def excess(name: str, number: int, limit: Limit) -> Problem | None:
    """What is wrong with something of so many bytes, or whatever the limit counts; None: nothing."""
    if number <= limit.most:
        return None
    has, most = f"{number:,} {limit.unit}", f"{limit.most:,}"
    if limit.unit == "bytes":
        has, most = size(number, UP), size(limit.most, DOWN)
    what = f"{name} has {has}, and at most {most} are read"
    return Problem(what, hint=f"is it the right file? {limit.what}: {limit.why}")


def read_limited(path: Path, limit: Limit, kind: type[MergerError]) -> bytes:
    """A file of this machine, whatever its size says while it is read.

    Raises:
        kind: it is too large.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        data = b"" if length > limit.most else read_from(file, limit)
    if problem := excess(str(path), max(length, len(data)), limit):
        raise kind(problem)
    return data


def count_tensors(length: int, header: bytes = b"") -> int:
    """As how many tensors a header counts: by its length alone, or by what may come of it."""
    lists, parts = header.count(b"[") // 2, header.count(b",") // 8
    return max(length // _TENSOR_BYTES, header.count(b"{"), lists, parts)


def read_from(file: IO[bytes], limit: Limit) -> bytes:
    """The rest of a file, but no more of it than a byte beyond the limit."""
    data = bytearray()
    # piece by piece: memory is taken for as much as is asked for
    while piece := file.read(min(_PIECE_BYTES, limit.most + 1 - len(data))):
        data += piece
    return bytes(data)


def read_limited_text(path: Path, limit: Limit, kind: type[MergerError], errors: str = "strict") -> str:
    """The same as text, with every end of line as one.

    Raises:
        kind, OSError: as `read` does.
        UnicodeDecodeError: it is no UTF-8.
    """
    return io.StringIO(read_limited(path, limit, kind).decode("utf-8", errors), newline=None).read()


class Tally:
    """What several files use up together of a limit; threads may share it."""

    def __init__(self, limit: Limit) -> None:
        self._limit, self._so_far, self._lock = limit, 0, Lock()

    def add(self, name: str, number: int) -> Problem | None:
        """Count so many more; what is wrong if that is too much."""
        with self._lock:
            self._so_far += number
            return excess(name, self._so_far, self._limit)


def parse_json(text: bytes | str, limit: Limit | None = None, **how: Any) -> Any:
    """JSON of a stranger's: of so many values, so deep, with numbers so long.

    Args:
        limit: whose `values` count, if it has any.
        how: what else json.loads shall do.

    Raises:
        ValueError: it is none, or goes beyond.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if limit is not None and limit.values is not None and (found := sum(map(data.count, _BETWEEN))) > limit.values:
        raise ValueError(f"about {found:,} values stand in it, and at most {limit.values:,} are read")
    try:
        value = json.loads(text, parse_int=_whole, **how)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if not _is_flat(value):
        raise ValueError(_TOO_DEEP)
    return value


_BETWEEN = (b",", b":", b"[", b"{")
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits stands in it")
    return int(digits)


def _is_flat(value: Any) -> bool:
    """Level by level: a million values take a twentieth of a second."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for inner in chain.from_iterable(map(_inside, level)) if type(inner) in _NESTED]
        if not level:
            return True
    return False


_NESTED = frozenset((dict, list))


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if type(value) is dict else value if type(value) is list else ()
