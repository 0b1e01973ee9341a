"""The card's metadata, built as data: what the Hub reads off a card's front matter, by the Hub's own rules.

Not here: the licence (licences), and words for people (render).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from merger.card.facts import MixtureFacts
from merger.methods.registry import Method
from merger.models.config import is_diffusion
from merger.models.side_files import COLBERT
from merger.planning.plan import Plan
from merger.safety.names import is_repo

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_DATASET = re.compile(r"[\w-][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
GGUF = "gguf"
"""The Hub's word for what loads files of that kind."""

_BARE = re.compile(r"[A-Za-z][\w./+-]*", re.ASCII)
_ENDINGS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
}
_RERANKING = "ForSequenceClassification"
_TASKS = {
    "SentenceTransformer": "sentence-similarity",
    "SparseEncoder": "feature-extraction",
    "CrossEncoder": "text-ranking",
    "MultiVectorEncoder": "sentence-similarity",
    COLBERT: "sentence-similarity",
}
SENTENCE_TRANSFORMERS = "sentence-transformers"

PROMPTS = {
    "ar": ("كان يا ما كان", "احكِ لي قصة قصيرة."),
    "code": ("def fibonacci(n):", "Write a Python function that reverses a list."),
    "de": ("Es war einmal", "Erzähl mir eine kurze Geschichte."),
    "en": ("Once upon a time", "Tell me a short story."),
    "es": ("Érase una vez", "Cuéntame un cuento corto."),
    "fr": ("Il était une fois", "Raconte-moi une courte histoire."),
    "hi": ("एक समय की बात है", "मुझे एक छोटी कहानी सुनाओ।"),
    "it": ("C'era una volta", "Raccontami una breve storia."),
    "ja": ("昔々あるところに", "短い物語を話してください。"),
    "ko": ("옛날 옛적에", "짧은 이야기를 들려주세요."),
    "nl": ("Er was eens", "Vertel me een kort verhaal."),
    "pl": ("Dawno, dawno temu", "Opowiedz mi krótką historię."),
    "pt": ("Era uma vez", "Conte-me uma história curta."),
    "ru": ("Жили-были", "Расскажи мне короткую историю."),
    "tr": ("Bir varmış bir yokmuş", "Bana kısa bir hikâye anlat."),
    "vi": ("Ngày xửa ngày xưa", "Hãy kể cho tôi một câu chuyện ngắn."),
    "zh": ("从前", "请给我讲一个短故事。"),
}
"""By language what the card's example goes on from, and what it asks a model that chats."""


def metadata(
    planned: Plan, used: Sequence[Method | MixtureFacts], licence: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """What the front matter says, in the order in which it says it; a key without a value is left out.

    Args:
        used: the methods that made it.
        licence: ``license`` and, where it has no identifier on the Hub, ``license_name`` and ``license_link``.
        extra: keys that only a finished merge has, such as ``model-index``.
    """
    models = planned.locked.parents
    config_model = planned.locked.config_model.card
    parents = list(dict.fromkeys(model.located.where for model in models if model.located.commit is not None))
    tags = ["merge", "merger", *(method.name for method in used)]
    found = {
        **licence,
        "library_name": _fitting(config_model.get("library_name"), _SLUG) or library(planned),
        "pipeline_tag": _fitting(config_model.get("pipeline_tag"), _SLUG) or task(planned),
        "language": _union((model.card.get("language") for model in models), _LANGUAGE),
        "datasets": _union((model.card.get("datasets") for model in models), _DATASET),
        "tags": tags,
        "base_model": parents,
        "base_model_relation": "merge" if parents else None,
        **(_of_adapter(planned, used) if planned.locked.recipe.lora is not None else {}),
        **({} if planned.locked.recipe.publish.safetensors else _of_gguf(planned, tags, parents)),
        **extra,
    }
    return {key: value for key, value in found.items() if value}


def _of_adapter(planned: Plan, used: Sequence[Method | MixtureFacts]) -> dict[str, Any]:
    """What it says of a LoRA adapter: the model that it belongs to is its base, whatever it was made of."""
    lora, config = planned.locked.recipe.lora, planned.config
    base = config.get("base_model_name_or_path")
    on_hub = isinstance(base, str) and is_repo(base)
    made = ["merge", "merger", *(method.name for method in used)] if lora and not lora.extracted else ["merger"]
    return {
        "library_name": "peft",
        "pipeline_tag": "text-generation" if config.get("task_type") == "CAUSAL_LM" else None,
        "tags": [*made, "lora"],
        "base_model": base if on_hub else None,
        "base_model_relation": "adapter" if on_hub else None,
    }


def _of_gguf(planned: Plan, tags: Sequence[str], parents: Sequence[str]) -> dict[str, Any]:
    """What it says of GGUF files alone: a model that is only brought into that form is the one that was quantised."""
    if not planned.locked.recipe.is_conversion:
        return {"library_name": GGUF, "tags": [GGUF, *tags]}
    relation = "quantized" if parents else None
    return {"library_name": GGUF, "tags": [GGUF, "merger"], "base_model_relation": relation}


def front_matter(data: Mapping[str, Any]) -> str:
    """The metadata as YAML between its dashes; any reader of YAML gets back what went in."""
    made = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)
    assert yaml.safe_load(made) == data, "the card's metadata changes on its way through YAML"
    return f"---\n{made}---\n"


class _Dumper(yaml.SafeDumper):
    """Quotes all text that some version of YAML reads as something else: no, 1e5, 0o7, 12:30."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = _BARE.fullmatch(value) and yaml.safe_load(value) == value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def library(planned: Plan) -> str | None:
    """What loads the result; None for tensors without a config."""
    config = planned.config
    if "peft_type" in config:
        return "peft"
    if (name := embedder(planned)) is not None:
        return "PyLate" if name == COLBERT else SENTENCE_TRANSFORMERS
    if not config:
        return None
    return "diffusers" if is_diffusion(config) else "transformers"


def embedder(planned: Plan) -> str | None:
    """The class that loads the result with its pipeline; None: it has none."""
    model = planned.locked.config_owner
    is_reranker = model.card.get("library_name") == SENTENCE_TRANSFORMERS and head_class(planned.config) == _RERANKING
    return model.embeds or ("CrossEncoder" if is_reranker else None)


def task(planned: Plan) -> str | None:
    """The Hub's word for what models of this kind are for, where their class tells."""
    return _TASKS.get(embedder(planned) or "") or _ENDINGS.get(head_class(planned.config) or "")


def head_class(config: Mapping[str, Any]) -> str | None:
    """What kind of head the result has, as transformers names it: the end of its class, such as ForCausalLM."""
    architectures = config.get("architectures") or [""]
    return next((end for end in _ENDINGS if str(architectures[0]).endswith(end)), None)


def _fitting(value: object, allowed: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and allowed.fullmatch(value) else None


def _union(values: Iterable[object], allowed: re.Pattern[str]) -> list[str]:
    """Every fitting word once, in the models' order."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    words = [_fitting(word, allowed) for found in lists for word in found]
    return list(dict.fromkeys(word for word in words if word))
