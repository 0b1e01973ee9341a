"""The tokenizer and chat template of a model as a GGUF file holds them: tokens, merges or scores, special ids.

Read from tokenizer.json, which must be a BPE: of bytes (`gpt2` there), or one made from SentencePiece (`llama` there).
Not here: the model (families).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merger.errors import Problem, RecipeError
from merger.models import chat
from merger.models.gguf.layout import Value
from merger.models.tokenizer_files import BYTES, SPACES, spelling, tokenizer_steps
from merger.safety.limits import parse_json

FILES = ("tokenizer.json", chat.SETTINGS, chat.JINJA, chat.PROCESSOR)
"""The files that this is read from."""

NORMAL, UNKNOWN, CONTROL, USERS, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
_LOWEST = -1e6

_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS: Mapping[str, str] = {
    "": "gpt-2",
    _CASES + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CASES + r"\p{N}" + _REST: "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""What llama.cpp calls the ways in which text is cut before its bytes are joined, by their pattern."""


def describe_tokens(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata of a tokenizer, by llama.cpp's keys.

    Args:
        files: those of `FILES` that the result has.

    Raises:
        RecipeError: llama.cpp would read text otherwise.
    """
    try:
        tokenizer = parse_json(files["tokenizer.json"])
        said = parse_json(files.get(chat.SETTINGS, b"{}"))
        found = _Tokens(tokenizer, said, config).metadata()
    except KeyError as error:
        raise _refusal(f"there is no {error.args[0]} in its tokenizer") from None
    except (ValueError, TypeError, AttributeError):
        raise _refusal("its tokenizer's files are damaged") from None
    template = chat.template({name: text for name, text in files.items() if name in chat.FILES})
    return found if template is None else {**found, "tokenizer.chat_template": template}


def _refusal(what: str) -> RecipeError:
    hint = "convert_hf_to_gguf.py of llama.cpp may know how: run it on the published model"
    return RecipeError(Problem(f"no GGUF is made of this model: {what}", hint=hint))


class _Tokens:
    """A tokenizer.json, with what tokenizer_config.json and config.json say beside it."""

    def __init__(self, tokenizer: Mapping[str, Any], said: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._tokenizer, self._said, self._config = tokenizer, said, config
        self._model = tokenizer["model"]
        self._vocabulary: Mapping[str, int] = self._model["vocab"]
        self._added: Sequence[Mapping[str, Any]] = tokenizer.get("added_tokens") or ()
        self._ids = {**self._vocabulary, **{each["content"]: int(each["id"]) for each in self._added}}
        self._merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in self._model["merges"]]

    def metadata(self) -> dict[str, Value]:
        spelled = spelling(self._tokenizer)
        if self._model.get("type", "BPE") != "BPE" or spelled not in (BYTES, SPACES):
            raise _refusal("its tokenizer is neither a BPE of bytes nor made from SentencePiece")
        tokens, kinds = self._listed()
        named = {"tokens": tokens, "token_type": kinds, **self._special_ids(), **self._begun()}
        own = self._of_bytes() if spelled == BYTES else self._of_pieces(tokens, kinds)
        return {f"tokenizer.ggml.{key}": value for key, value in {**own, **named}.items()}

    def _listed(self) -> tuple[list[str], list[int]]:
        """The tokens by their ids and their kinds; rows of the embeddings without a token have one that is not used."""
        rows = max(int(self._config["vocab_size"]), *(number + 1 for number in self._ids.values()))
        tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
        for token, number in self._vocabulary.items():
            is_byte = len(token) == len("<0x00>") and token.startswith("<0x") and self._model.get("byte_fallback")
            tokens[number], kinds[number] = token, BYTE if is_byte else NORMAL
        for each in self._added:
            tokens[each["id"]], kinds[each["id"]] = each["content"], CONTROL if each.get("special") else USERS
        if (unknown := self._model.get("unk_token")) in self._ids:
            kinds[self._ids[unknown]] = UNKNOWN
        return tokens, kinds

    # ---- how text is cut ---------------------------------------------------------------------------------------------

    def _of_bytes(self) -> dict[str, Value]:
        steps = tokenizer_steps(self._tokenizer.get("pre_tokenizer"))
        patterns = [step["pattern"].get("Regex", "?") for step in steps if step.get("type") == "Split"]
        cut = [step for step in steps if step.get("type") == "ByteLevel" and step.get("use_regex", True)]
        others = [step["type"] for step in steps if step.get("type") not in ("Split", "ByteLevel")]
        pattern = "".join([*patterns, *others, *(["ByteLevel"] if patterns and cut else [])])
        if pattern not in SPLITS or not (patterns or cut):
            raise _refusal(f"llama.cpp has no name for how its tokenizer cuts text: {pattern!r}")
        return {"model": "gpt2", "pre": SPLITS[pattern], "merges": [" ".join(pair) for pair in self._merges]}

    def _of_pieces(self, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Value]:
        """By scores, of which the higher one is joined first: the ranks of the merges, counted down."""
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(self._merges):
            ranks.setdefault("".join(pair), rank)
        self._check_joins(ranks, kinds)
        scores = [float(-ranks[token]) if token in ranks else _LOWEST for token in tokens]
        steps = [step for key in ("normalizer", "pre_tokenizer") for step in tokenizer_steps(self._tokenizer.get(key))]
        begins = any(step.get("prepend") == SPACE or _prepends(step) for step in steps)
        return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": begins}

    def _check_joins(self, ranks: Mapping[str, int], kinds: Sequence[int]) -> None:
        """llama.cpp joins any two pieces that are a piece together: so must the merges."""
        pairs = {(one, other) for one, other in self._merges}
        plain = {token for token, number in self._vocabulary.items() if kinds[number] == NORMAL}
        for token in plain.intersection(ranks):
            for place in range(1, len(token)):
                one, other = token[:place], token[place:]
                if one in plain and other in plain and (one, other) not in pairs:
                    raise _refusal(f"its merges are not SentencePiece's: {one} and {other} are not joined")

    # ---- what stands at the ends -------------------------------------------------------------------------------------

    def _special_ids(self) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token, number = self._said.get(f"{key}_token"), self._config.get(f"{key}_token_id")
            token = token.get("content") if isinstance(token, dict) else token
            number = self._ids.get(token, number[0] if isinstance(number, list) and number else number)
            if isinstance(number, int) and number >= 0:
                found[f"{name}_token_id"] = number
        return found

    def _begun(self) -> dict[str, Value]:
        """Whether a token is put before and after a text, as the template says; else tokenizer_config.json."""
        steps = [
            step
            for step in tokenizer_steps(self._tokenizer.get("post_processor"))
            if step.get("type") == "TemplateProcessing"
        ]
        if not steps:
            return {f"add_{end}_token": bool(self._said.get(f"add_{end}_token", False)) for end in ("bos", "eos")}
        single = steps[0]["single"]
        return {"add_bos_token": "SpecialToken" in single[0], "add_eos_token": "SpecialToken" in single[-1]}


def _prepends(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Metaspace" and (
        step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    )
