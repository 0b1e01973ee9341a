"""The small files beside the tensors: which model each is taken from, and what is written into them anew.

Not here: config.json (unused_tensors), the card and the lock file (card).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from merger.errors import ModelError, Problem, few
from merger.lock.lock import GENERATION
from merger.models import chat
from merger.models.config import renumber_tokens
from merger.models.licence import licence_files
from merger.models.side_files import left_beside, side_files, tokenizer_files
from merger.planning.stage_model import StagedRecipe, StageModel, Texts
from merger.planning.tokens import Tokens
from merger.recipe.blocks.tokenizer import AUTO, CHAT_TEMPLATES
from merger.safety.limits import CONFIG, LICENCE, SIDE, SIDES, excess, parse_json
from merger.stores.ports import FileInfo


def texts(locked: StagedRecipe, tokens: Tokens | None) -> Texts:
    """Which small files the result has.

    Raises:
        ModelError: a file cannot be read that has to be changed.
    """
    small = _small(locked, locked.index(locked.config_model.ref))
    if tokens is not None:
        theirs = _small(locked, tokens.source)
        small = Texts(
            _speaking(small.taken, theirs.taken),
            theirs.added if tokens.added is None else tokens.added,
            theirs.template,
            _generation(locked, tokens) or small.generation,
        )
    template = _template(locked)
    return small if template is None else replace(small, template=template)


def beside_adapter(locked: StagedRecipe, tokenizer_model: int | None) -> Texts:
    """The small files of a result that is an adapter: the tokenizer of the model of that number, if it needs one."""
    files = () if tokenizer_model is None else tokenizer_files(locked.numbered(tokenizer_model).located.files)
    return Texts({} if tokenizer_model is None else dict.fromkeys(files, tokenizer_model))


def passed_files(locked: StagedRecipe, small: Texts) -> list[FileInfo]:
    """The files of models that the result will have: those that are taken over, and all models' licences.

    Raises:
        ModelError: one of them, or all together, are larger than is passed on.
    """
    models = locked.parents
    licences = [(number, name) for number, model in enumerate(models) for name in licence_files(model.located.files)]
    places = dict.fromkeys([*licences, *((number, name) for name, number in small.taken.items())])
    for number, name in places:
        model, limit = models[number], LICENCE if name in licence_files((name,)) else SIDE
        if problem := excess(name, model.located.files[name].size, limit):
            raise ModelError(replace(problem, at=model.ref.at, where=f"models[{model.ref}]"))
    found = [models[number].located.files[name] for number, name in places]
    if problem := excess(SIDES.what, sum(info.size for info in found), SIDES):
        raise ModelError(problem)
    return found


def left_out_files(locked: StagedRecipe, small: Texts) -> dict[str, str]:
    """The files of the base that a model made of it lacks, each with the reason; an adapter or a GGUF has none."""
    is_model = locked.recipe.lora is None and locked.recipe.publish.safetensors
    owner = locked.config_owner
    read = {tensor.file for tensor in owner.checkpoint.tensors.values()}
    return left_beside(owner.located.files, {*small.taken, *read}) if is_model else {}


def other_pipelines(locked: StagedRecipe) -> list[str]:
    """Sentences on files of sentence-transformers that are the base's own, and other ones in other models."""
    base = locked.config_owner
    if locked.recipe.lora is not None or not any(model.pipeline for model in locked.merged):
        return []
    others = {name: [model.name for model in locked.merged if model.pipeline and model.differs_in(name, base)]
              for model in locked.merged for name in model.pipeline}  # fmt: skip
    told = "it lies in none of the result's folders" if not base.pipeline else f"the result has what {base.name} has"
    return [f"{name} differs in {few(names)}: {told}" for name, names in sorted(others.items()) if names]


def _small(locked: StagedRecipe, number: int) -> Texts:
    model = locked.numbered(number)
    if isinstance(model, StageModel):
        return model.small
    own = dict.fromkeys(side_files(model.located.files, model.checkpoint.config), number)
    if model.tokenizer_model is model:
        return Texts(own)
    tokenizer_model = model.tokenizer_model
    return Texts(
        _speaking(own, dict.fromkeys(side_files(tokenizer_model.located.files, {}), locked.index(tokenizer_model.ref)))
    )


def _speaking(taken: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """The files with the tokenizer and the chat template of others in place of their own."""
    kept = {name: number for name, number in taken.items() if name not in tokenizer_files(taken)}
    return dict(sorted((kept | {name: others[name] for name in tokenizer_files(others)}).items()))


def _template(locked: StagedRecipe) -> str | None:
    """The chat template that the recipe asks for; "auto" is the one that most models have, first the config model's."""
    asked = locked.recipe.chat_template
    if asked is None:
        return None
    if asked.text in CHAT_TEMPLATES:
        return chat.built_in(asked.text)
    if asked.text != AUTO:
        return asked.text
    own = [locked.numbered(number) for number in locked.own]
    models = [locked.config_model, *(model for model in own if model is not locked.config_model)]
    held = [chat.template(model.tokenizer_model.texts) for model in models if model.ref in locked.recipe.merged]
    most = Counter(text for text in held if text is not None).most_common(1)
    return most[0][0] if most else None


def _generation(locked: StagedRecipe, tokens: Tokens) -> str | None:
    """The config model's generation_config.json with the result's ids, if it has one and they are other ones."""
    text = locked.config_model.texts.get(GENERATION)
    if text is None or tokens.follow is None:
        return None
    source = locked.numbered(tokens.source)
    try:
        own = parse_json(text, CONFIG)
        theirs = parse_json(source.texts.get(GENERATION, b"{}"), CONFIG)
        found, _ = renumber_tokens(own, tokens.follow, {**source.checkpoint.config, **theirs})
    except (ValueError, AttributeError, TypeError):
        what = f"{GENERATION} of {locked.config_model.name} or {source.name} is damaged"
        hint = "download the model again, or take the file out"
        raise ModelError(
            Problem(what, locked.config_model.ref.at, f"models[{locked.config_model.ref}]", hint)
        ) from None
    return json.dumps(found, indent=2) + "\n"
