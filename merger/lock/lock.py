"""Recipe + Store -> LockedRecipe: every model pinned to a commit, its headers and config read, no tensor byte.

Not here: what is made of them (jobs).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import yaml

from merger.errors import MissingError, ModelError, Problem, RecipeError
from merger.lock import read
from merger.lock.adapted import with_adapter
from merger.lock.checkpoints import with_means
from merger.lock.locked import LockedModel, LockedRecipe
from merger.lock.matched import with_names_of
from merger.lock.statistics import read_statistics
from merger.models import chat, vocabulary
from merger.models.checkpoint import STEM, Checkpoint, TensorInfo, is_single, read_header, read_metadata
from merger.models.formats.pickled import is_pickled
from merger.models.formats.quantised import Unpacked, unpack_checkpoint
from merger.models.gguf import tokens as gguf
from merger.models.gguf.header import find_gguf
from merger.models.lora import adapter as adapters
from merger.models.lora import pipeline as pipelines
from merger.models.mixtures import are_fused, split, split_as_published
from merger.models.plain_yaml import load_yaml
from merger.models.side_files import LOCK_NAME, module_of, pipeline, tokenizer_files
from merger.recipe.blocks.tokenizer import AUTO
from merger.recipe.model import Measure, ModelRef, Recipe
from merger.safety import limits
from merger.stores.ports import Kept, Located, Store

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Pin:
    """What a lock says of a model on the Hub: its commit, and the name its repo went by, if it was renamed."""

    commit: str
    now: str | None = None


def pins(text: str, path: str) -> dict[str, Pin]:
    """The commits by model that a lock file names, such as lies beside every result.

    Raises:
        RecipeError: it is no lock file.
    """
    try:
        models = load_yaml(text, limits.LOCK)["models"]
        names = {str(item["model"]): (item["commit"], item.get("now")) for item in models if item["commit"]}
        return {name: Pin(str(commit), now if now is None else str(now)) for name, (commit, now) in names.items()}
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        hint = "take the merger.lock.yaml of a result, or remove it"
        raise RecipeError(Problem(f"{path} is no lock file", hint=hint)) from None


def lock(
    recipe: Recipe,
    store: Store,
    pinned: Mapping[str, Pin] | None = None,
    pickles: bool = False,
    tensors: limits.Limit = limits.ALL_TENSORS,
    named: Collection[str] = (),
    measured: Mapping[ModelRef, Kept] | None = None,
) -> LockedRecipe:
    """Find and read every model of the recipe.

    Args:
        pinned: the commits to take, by model as the recipe writes it; the others are taken as they are now.
        pickles: of models without safetensors, look into files that torch.save wrote.
        tensors: how many all headers together may tell of.
        named: the models that a lock lists, where there is more than `pinned`: no other checkpoints are taken.
        measured: those statistics that are measured on the way.

    Raises:
        RecipeError: no mean can be made of the checkpoints that the recipe asks for.
        ModelError: with every model that cannot be read.
    """
    recipe = with_means(recipe, store, named or pinned or ())
    # Two pools: a model waits for its headers, which wait for nobody.
    with ThreadPoolExecutor(read.REQUESTS_AT_ONCE) as models, ThreadPoolExecutor(read.REQUESTS_AT_ONCE) as headers:
        alone = recipe.lora is not None
        fetching = _Fetching(store, headers, pinned or {}, pickles, limits.Tally(tensors), alone, measured or {})
        fetch = fetching.adapter if recipe.merges_adapters else fetching.model
        merged = list(models.map(partial(_attempt, fetch), recipe.models))
        known = list(models.map(partial(_attempt, fetching.statistics), recipe.statistics))
        loras = _collect(models.map(partial(_attempt, fetching.adapter), recipe.adapters), [*merged, *known])
    found = _in_one_layout(_collect(merged), bool(recipe.publish.gguf))
    by_ref = {lora.ref: lora for lora in loras}

    speaks = None if recipe.lora else recipe.config_model

    def changed(model: LockedModel) -> LockedModel:
        files = model.located.files
        if model.ref == speaks and find_gguf(files) and not tokenizer_files(files):
            hint = "take for base_model the model that it was made from"
            raise ModelError(Problem("its header holds no tokenizer that tokenizer.json can be made of", hint=hint))
        lora = None if model.ref.adapter is None else by_ref.get(model.ref.adapter)
        return model if lora is None else with_adapter(model, lora)

    grown = _collect([_attempt(changed, model) for model in found])
    like = next(model for model in grown if model.ref == recipe.names_model)
    alike = [with_names_of(like, model) for model in grown]
    return LockedRecipe(recipe, (*_with_texts(recipe, alike, loras, store), *_collect(known)))


_Content = Callable[[Located, str], object]
_Found = TypeVar("_Found")
_Attempt = tuple[_Found | None, tuple[Problem, ...]]


def _attempt(make: Callable[[Any], _Found], of: Any) -> _Attempt[_Found]:
    """What is made of a model, or of what names it; or the problems, at the place where the recipe names it."""
    try:
        return make(of), ()
    except ModelError as error:
        ref = getattr(of, "ref", of)
        named = ((problem, problem.at or ref.at, problem.where or f"models[{ref}]") for problem in error.problems)
        return None, tuple(replace(problem, at=at, where=where) for problem, at, where in named)


def _collect(attempts: Iterable[_Attempt[_Found]], others: Iterable[_Attempt[Any]] = ()) -> tuple[_Found, ...]:
    """What was found.

    Raises:
        ModelError: with every problem of these attempts and of the others.
    """
    tried = list(attempts)
    if problems := [problem for _, told in (*others, *tried) for problem in told]:
        raise ModelError(problems)
    return tuple(found for found, _ in tried if found is not None)


def _in_one_layout(models: Sequence[LockedModel], each: bool) -> tuple[LockedModel, ...]:
    """The models with a tensor for each expert, where some have one and others have all of a layer's in one.

    Args:
        each: or where that is wanted (llama.cpp has gates and ups by themselves).
    """
    fused = [model for model in models if are_fused(model.checkpoint.tensors) and not model.quantised]
    like = next((model.checkpoint.tensors for model in models if model not in fused and model.has_experts), None)
    if like is None and not each:
        return tuple(models)

    def parted(model: LockedModel) -> LockedModel:
        held, kind = model.checkpoint.tensors, str(model.checkpoint.config.get("model_type"))
        tensors = split_as_published(held, kind) if like is None else split(held, like)
        return replace(model, checkpoint=replace(model.checkpoint, tensors=tensors))

    return tuple(parted(model) if model in fused else model for model in models)


def _with_texts(
    recipe: Recipe, merged: Sequence[LockedModel], loras: Sequence[LockedModel], store: Store
) -> tuple[LockedModel, ...]:
    """Models and adapters with those texts of their tokenizers that the plan needs; what is equal is fetched once.

    Raises:
        ModelError: with every file that cannot be read.
    """
    content = cache(partial(_content, store))
    wanted = set(_token_files(recipe, merged, content)) if recipe.lora is None else set()
    models = (*merged, *loras)
    speaking = {model.ref for one in merged for model in (one, one.tokenizer_model)}
    held = [_texts_of(model, wanted) if model.ref in speaking else [] for model in models]
    places = {
        content(model.located, name): (model, name) for model, files in zip(models, held, strict=True) for name in files
    }
    size = sum(model.located.files[name].size for model, name in places.values())
    if problem := limits.excess(limits.TOKENIZERS.what, size, limits.TOKENIZERS):
        raise ModelError(problem)

    def fetch(place: tuple[LockedModel, str]) -> _Attempt[bytes]:
        return _attempt(lambda model: store.fetch(model.located, place[1]), place[0])

    with ThreadPoolExecutor(read.REQUESTS_AT_ONCE) as pool:
        texts = dict(zip(places, _collect(pool.map(fetch, places.values())), strict=True))
    found = [
        replace(model, texts={name: texts[content(model.located, name)] for name in files})
        for model, files in zip(models, held, strict=True)
    ]
    by_ref = {lora.ref: lora for lora in found[len(merged) :]}
    return tuple(replace(model, adapter=by_ref[model.adapter.ref]) if model.adapter else model for model in found)


def _texts_of(model: LockedModel, wanted: Container[str]) -> list[str]:
    """Its files of these names, but for those that would tell its vocabulary only if there were no better ones."""
    files = model.located.files
    idle = set(vocabulary.FILES).difference(vocabulary.told_by(files))
    return [name for name in files if name in wanted and name not in idle]


def _token_files(recipe: Recipe, models: Sequence[LockedModel], content: _Content) -> Iterator[str]:
    """The names of the files that decide which tokens mean what; none where the models' are known to be equal."""
    for document in recipe.documents:
        # what a stage's files hold is made of what its models' do
        mine = [model for model in models if recipe.stages or model.ref in document.merged]
        yield from _of_document(document, mine, content)


def _of_document(recipe: Recipe, merged: list[LockedModel], content: _Content) -> Iterator[str]:
    speaking = [model.tokenizer_model.located for model in merged]
    told = [{name: content(located, name) for name in vocabulary.told_by(located.files)} for located in speaking]
    if recipe.tokenizer is not None:
        yield from (*vocabulary.FILES, GENERATION)
    elif any(files != told[0] for files in told):
        yield from vocabulary.FILES
    if recipe.publish.gguf:
        yield from gguf.FILES
    if recipe.chat_template is not None and recipe.chat_template.text == AUTO:
        yield from chat.FILES


def _content(store: Store, located: Located, name: str) -> object:
    """What is the same for files of the same content; where the store tells nothing of that, the file is read."""
    info = located.files[name]
    known = info.sha256 or info.oid
    if known or info.barred or info.size > limits.of(name).most:
        return known or (located, name)
    try:
        return hashlib.sha256(store.fetch(located, name)).hexdigest()
    except ModelError:  # is told where it is read
        return located, name


@dataclass(frozen=True)
class _Fetching:
    """Reads what is needed of models and adapters; `pinned`: the commits to take; `pickles`: see `lock`.

    `tally` counts the tensors of all of them; `alone`: without what follows after a model in its pipeline; `measured`:
    see `lock`.
    """

    store: Store
    pool: ThreadPoolExecutor
    pinned: Mapping[str, Pin]
    pickles: bool
    tally: limits.Tally
    alone: bool
    measured: Mapping[ModelRef, Kept]

    def _located(self, ref: ModelRef) -> Located:
        pin = self.pinned.get(str(ref))
        if pin is None:
            return self.store.locate(ref.path, ref.revision)
        try:
            return self.store.locate(ref.path, pin.commit)
        except MissingError:
            # The Hub sends on from a former name only until somebody else takes it.
            if pin.now is None:
                raise
            former = "/".join(ref.path.split("/")[:2])
            return replace(self.store.locate(pin.now, pin.commit), moved=former)

    def model(self, ref: ModelRef) -> LockedModel:
        store = self.store
        located, found = self._read(self._located(ref))
        renamed = is_single(located.name) or (self.pickles and is_pickled(located.files)) or find_gguf(located.files)
        begins = STEM if renamed else read.tensor_stem(located, self.pickles)
        checkpoint = Checkpoint(found.tensors, found.config, begins)
        card, licence = read.read_licence(located, store)
        steps = {name: read.content_names(located, name, store) for name in pipeline(located.files)}
        return LockedModel(
            ref,
            located,
            checkpoint,
            card,
            quantised=found.quantised,
            aside=found.aside,
            licence_file=licence,
            pipeline=steps,
            embeds=read.embedder_class(located, store),
        )

    def _read(self, located: Located) -> tuple[Located, Unpacked]:
        """Its tensors and its config, as if it had never been quantised."""
        store = self.store
        if files := find_gguf(located.files):
            located, found = read.read_gguf(located, files, store, self.pool, self.tally)
            read.refuse_barred(located, found.config)
            return located, found
        config = {} if is_single(located.name) else read.read_config(located, store, self.pickles)
        read.refuse_barred(located, config)
        stored = read.tensors_of(located, store, self.pool, self.pickles, self.tally)
        if self.alone:
            stored = {name: tensor for name, tensor in stored.items() if not module_of(name)}
        fetch = partial(_bytes_of, located, store)
        return located, unpack_checkpoint(stored, config, lambda small: self.pool.map(fetch, small))

    def adapter(self, ref: ModelRef) -> LockedModel:
        located = self._located(ref)
        file = read.adapter_file(located)
        read.refuse_barred(located, {})
        config = read.read_json(located, adapters.CONFIG, self.store) if adapters.CONFIG in located.files else {}
        header = read.header_in(located, self.store, file, self.tally)
        tensors = {tensor.name: tensor for tensor in read_header(header, file, located.files[file].size)}
        if adapters.CONFIG in located.files:
            lora = (adapters.read_mlx if file == adapters.OF_MLX else adapters.read_adapter)(config, tensors)
        elif not pipelines.holds_lora(tensors):
            raise read.without_config(read.OF_PEFT)
        else:
            numbers = {name: tensor for name, tensor in tensors.items() if name.endswith(pipelines.ALPHA)}
            fetched = self.pool.map(partial(_bytes_of, located, self.store), numbers.values())
            lora = pipelines.read_pipeline(tensors, dict(zip(numbers, fetched, strict=True)), read_metadata(header))
        card, licence = read.read_licence(located, self.store)
        return LockedModel(ref, located, Checkpoint(tensors, config), card, lora=lora, licence_file=licence)

    def statistics(self, ref: ModelRef) -> LockedModel:
        kept = self.measured.get(ref)
        if isinstance(ref, Measure) and kept is None:
            what = "is measured on the way where somebody runs a recipe of their own, and not here"
            raise ModelError(Problem(what, hint="make it with merger measure, and write statistics: org/name"))
        located = self._located(ref) if kept is None else self.store.locate(kept.name, None)
        if LOCK_NAME not in located.files:
            hint = "make it with merger measure"
            raise ModelError(Problem(f"has no {LOCK_NAME} that says what was measured", hint=hint))
        said = read_statistics(self.store.fetch(located, LOCK_NAME).decode("utf-8", "replace"))
        tensors = read.tensors_of(located, self.store, self.pool, False, self.tally)
        return LockedModel(ref, located, Checkpoint(tensors, {}), statistics=said)


def _bytes_of(located: Located, store: Store, tensor: TensorInfo) -> bytes:
    return store.fetch(located, tensor.file, tensor.start, tensor.stop)
