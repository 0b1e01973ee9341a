"""Recipe + Store -> LockedRecipe: every model pinned to a commit, its headers and config read, no tensor byte.

Not here: what is made of them (jobs).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from threading import Lock
from typing import Any

import yaml

from merger.errors import MissingError, ModelError, Problem, RecipeError
from merger.lock.adapted import with_adapter
from merger.lock.checkpoints import with_means
from merger.lock.locked import LockedModel, LockedRecipe, stated_licence
from merger.lock.matched import with_names_of
from merger.models import chat, vocabulary
from merger.models.checkpoint import (
    STEM,
    SUFFIX,
    Checkpoint,
    TensorInfo,
    gather,
    header_length,
    index_name,
    is_single,
    read_header,
    stem,
    weight_files,
    weight_map,
)
from merger.models.formats.pickled import SINGLE as PICKLED
from merger.models.formats.pickled import is_pickled, pickled_tensors
from merger.models.formats.quantised import unpack_checkpoint
from merger.models.gguf import tokens as gguf
from merger.models.licence import TITLE_BYTES, licence_text, recognise_licence
from merger.models.lora import adapter as adapters
from merger.models.mixtures import are_fused, split
from merger.models.plain_yaml import load_yaml
from merger.models.side_files import (
    COLBERT,
    EMBEDDERS,
    MODULES,
    PIPELINE_CONFIG,
    is_modular,
    module_of,
    module_weights,
    pipeline,
    read_beside,
)
from merger.recipe.blocks.tokenizer import AUTO
from merger.recipe.model import ModelRef, Recipe
from merger.safety import limits
from merger.safety.paths import POINTER, remedy
from merger.stores.ports import PIECE_BYTES, Located, Store

GENERATION = "generation_config.json"
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
_REQUESTS_AT_ONCE = 8
_ONE_FOLDER = Lock()
"""A disk answers at once: threads that parse its headers side by side only take each other's turns."""


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
        return {str(item["model"]): _pin(item["commit"], item.get("now")) for item in models if item["commit"]}
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        hint = "take the merger.lock.yaml of a result, or remove it"
        raise RecipeError(Problem(f"{path} is no lock file", hint=hint)) from None


def _pin(commit: object, now: object) -> Pin:
    return Pin(str(commit), None if now is None else str(now))


def lock(
    recipe: Recipe,
    store: Store,
    pinned: Mapping[str, Pin] | None = None,
    pickles: bool = False,
    tensors: limits.Limit = limits.ALL_TENSORS,
    named: Collection[str] = (),
) -> LockedRecipe:
    """Find and read every model of the recipe.

    Args:
        recipe: the recipe.
        store: where its models are.
        pinned: the commits to take, by model as the recipe writes it; the others are taken as they are now.
        pickles: of models without safetensors, look into files that torch.save wrote.
        tensors: how many all headers together may tell of.
        named: the models that a lock lists, where there is more than `pinned`: no other checkpoints are taken.

    Raises:
        RecipeError: no mean can be made of the checkpoints that the recipe asks for.
        ModelError: with every model that cannot be read.
    """
    recipe = with_means(recipe, store, named or pinned or ())
    # Two pools: a model waits for its headers, which wait for nobody.
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as models, ThreadPoolExecutor(_REQUESTS_AT_ONCE) as headers:
        alone = recipe.lora is not None
        fetching = _Fetching(store, headers, pinned or {}, pickles, limits.Tally(tensors), alone)
        fetch = fetching.adapter if recipe.merges_adapters else fetching.model
        merged = list(models.map(lambda ref: _attempt(ref, fetch), recipe.models))
        loras = _collect(models.map(lambda ref: _attempt(ref, fetching.adapter), recipe.adapters), merged)
    found = _in_one_layout(_collect(merged))
    by_ref = {lora.ref: lora for lora in loras}
    changed = _collect(_attempt_with(model, by_ref) for model in found)
    like = next(model for model in changed if model.ref == recipe.names_model)
    alike = [with_names_of(like, model) for model in changed]
    return LockedRecipe(recipe, _with_texts(recipe, alike, loras, store))


_Content = Callable[[Located, str], object]
_Attempt = tuple[LockedModel | None, tuple[Problem, ...]]


def _collect(attempts: Iterable[_Attempt], others: Iterable[_Attempt] = ()) -> tuple[LockedModel, ...]:
    """The models that were found.

    Raises:
        ModelError: with every problem of these attempts and of the others.
    """
    tried = list(attempts)
    if problems := [problem for _, told in (*others, *tried) for problem in told]:
        raise ModelError(problems)
    return tuple(model for model, _ in tried if model is not None)


def _in_one_layout(models: Sequence[LockedModel]) -> tuple[LockedModel, ...]:
    """The models with a tensor for each expert, where some have one and others have all of a layer's in one."""
    fused = [model for model in models if are_fused(model.checkpoint.tensors) and not model.quantised]
    like = next((model.checkpoint.tensors for model in models if model not in fused and model.has_experts), None)
    if like is None:
        return tuple(models)
    split_up = {id(model): replace(model.checkpoint, tensors=split(model.checkpoint.tensors, like)) for model in fused}
    return tuple(replace(model, checkpoint=split_up.get(id(model), model.checkpoint)) for model in models)


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
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        fetched = dict(
            zip(places, pool.map(lambda place: _text(place[0], place[1], store), places.values()), strict=True)
        )
    problems = [text for text in fetched.values() if isinstance(text, Problem)]
    if problems:
        raise ModelError(problems)
    texts = {key: text for key, text in fetched.items() if not isinstance(text, Problem)}
    found = [
        replace(model, texts={name: texts[content(model.located, name)] for name in files})
        for model, files in zip(models, held, strict=True)
    ]
    read = {lora.ref: lora for lora in found[len(merged) :]}
    return tuple(replace(model, adapter=read[model.adapter.ref]) if model.adapter else model for model in found)


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


def _text(model: LockedModel, name: str, store: Store) -> bytes | Problem:
    try:
        return store.fetch(model.located, name)
    except ModelError as error:
        return _at(error.problems[0], model.ref)


def _attempt(ref: ModelRef, fetch: Callable[[ModelRef], LockedModel]) -> _Attempt:
    """The model, or its problems at the place where the recipe names it."""
    try:
        return fetch(ref), ()
    except ModelError as error:
        return None, tuple(_at(problem, ref) for problem in error.problems)


def _attempt_with(model: LockedModel, loras: Mapping[ModelRef, LockedModel]) -> _Attempt:
    """The model with what its adapter makes of it, if it has one that could be read."""
    lora = loras.get(model.ref.adapter) if model.ref.adapter is not None else None
    try:
        return model if lora is None else with_adapter(model, lora), ()
    except ModelError as error:
        return None, tuple(_at(problem, model.ref) for problem in error.problems)


def _at(problem: Problem, ref: ModelRef) -> Problem:
    return replace(problem, at=problem.at or ref.at, where=problem.where or f"models[{ref}]")


@dataclass(frozen=True)
class _Fetching:
    """Reads what is needed of models and adapters; `pinned`: the commits to take; `pickles`: see `lock`.

    `tally` counts the tensors of all of them; `alone`: without what follows after a model in its pipeline.
    """

    store: Store
    pool: ThreadPoolExecutor
    pinned: Mapping[str, Pin]
    pickles: bool
    tally: limits.Tally
    alone: bool

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
        located, store = self._located(ref), self.store
        alone = is_single(located.name)
        config = {} if alone else _config(located, store, self.pickles)
        _refuse_barred(located, config)
        stored = tensors_of(located, store, self.pool, self.pickles, self.tally)
        if self.alone:
            stored = {name: tensor for name, tensor in stored.items() if not module_of(name)}
        found = unpack_checkpoint(
            stored, config, lambda small: self.pool.map(partial(_bytes_of, located, store), small)
        )
        begins = STEM if alone or (self.pickles and is_pickled(located.files)) else _stem(located)
        checkpoint = Checkpoint(found.tensors, found.config, begins)
        card, licence = _read_licence(located, store)
        steps = {name: _contents(located, name, store) for name in pipeline(located.files)}
        return LockedModel(
            ref,
            located,
            checkpoint,
            card,
            quantised=found.quantised,
            aside=found.aside,
            licence_file=licence,
            pipeline=steps,
            embeds=_embeds(located, store),
        )

    def adapter(self, ref: ModelRef) -> LockedModel:
        located = self._located(ref)
        _check_adapter_files(located)
        config = _json(located, adapters.CONFIG, self.store)
        _refuse_barred(located, {})
        file, read = adapters.TENSORS, adapters.read_adapter
        if file not in located.files:
            file, read = adapters.OF_MLX, adapters.read_mlx
        tensors = {tensor.name: tensor for tensor in tensors_in(located, self.store, file, self.tally)}
        lora = read(config, tensors)
        card, licence = _read_licence(located, self.store)
        return LockedModel(ref, located, Checkpoint(tensors, config), card, lora=lora, licence_file=licence)


def _bytes_of(located: Located, store: Store, tensor: TensorInfo) -> bytes:
    return store.fetch(located, tensor.file, tensor.start, tensor.stop)


def _contents(located: Located, name: str, store: Store) -> frozenset[str]:
    """Names of what a file holds: those that its store tells, else its SHA-256 and git's, for which it is read."""
    info = located.files[name]
    told = frozenset(each for each in (info.sha256, info.oid) if each)
    if told or info.size > limits.SIDE.most:
        return told
    ours, gits = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % info.size, usedforsecurity=False)
    for start in range(0, info.size, PIECE_BYTES):
        piece = store.fetch(located, name, start, min(start + PIECE_BYTES, info.size))
        ours.update(piece)
        gits.update(piece)
    return frozenset((ours.hexdigest(), gits.hexdigest()))


def _refuse_barred(located: Located, config: Mapping[str, Any]) -> None:
    """What a merge would publish of a model, or read for its card, must be the model's own."""
    barred = {name: located.files[name].barred for name in read_beside(located.files, config)}
    if problems := [Problem(f"{name} {why}", hint=remedy(why)) for name, why in barred.items() if why]:
        raise ModelError(problems)


def _check_adapter_files(located: Located) -> None:
    if adapters.CONFIG not in located.files:
        hint = "is it a LoRA adapter as PEFT saves it?"
        raise ModelError(Problem(f"has no {adapters.CONFIG}", hint=hint))
    if not {adapters.TENSORS, adapters.OF_MLX} & located.files.keys():
        pickled = adapters.PICKLED in located.files
        what = f"has no {adapters.TENSORS}" + (f", only {adapters.PICKLED}" if pickled else "")
        hint = "such files can run code when they are read: load it with PEFT and save it with save_pretrained"
        raise ModelError(Problem(what, hint=hint if pickled else "the adapter is incomplete: download it again"))


def _embeds(located: Located, store: Store) -> str | None:
    """The class that loads it with its pipeline; None where it has none."""
    if MODULES not in located.files:
        return None
    if b'"pylate.' in store.fetch(located, MODULES):
        return COLBERT
    said = _json(located, PIPELINE_CONFIG, store).get("model_type") if PIPELINE_CONFIG in located.files else None
    return said if said in EMBEDDERS else EMBEDDERS[0]


def _read_licence(located: Located, store: Store) -> tuple[Mapping[str, Any], str | None]:
    """The metadata of its card; and where that names no licence, which one the file beside it is."""
    card = _card(located, store)
    return card, None if stated_licence(card) else _licence_file(located, store)


def _licence_file(located: Located, store: Store) -> str | None:
    file = licence_text(located.files)
    if file is None:
        return None
    opening = store.fetch(located, file, 0, min(located.files[file].size, TITLE_BYTES))
    return recognise_licence(opening.decode("utf-8", "replace"))


def _stem(located: Located) -> str:
    """What the names of its safetensors begin with: of a single file the name itself."""
    if is_modular(located.files):
        return STEM
    alone = is_single(located.name)
    return located.name.rpartition("/")[2].removesuffix(SUFFIX) if alone else stem(located.files)


def _config(located: Located, store: Store, pickles: bool) -> Mapping[str, Any]:
    if "config.json" in located.files:
        return _json(located, "config.json", store)
    if MODULES in located.files:  # a pipeline of which no step is a model of transformers
        return {}
    if adapters.CONFIG in located.files:
        hint = f"add it to its model: org/model+{located.name}; or list adapters under adapters: to merge them"
        raise ModelError(Problem("is a LoRA adapter, not a model", hint=hint))
    if not (pickles and is_pickled(located.files)):
        stem(located.files)  # what else is missing is told first
    hint = "to merge tensors without a config, name their file: .../model.safetensors"
    raise ModelError(Problem("has no config.json", hint=hint))


def _json(located: Located, file: str, store: Store) -> Mapping[str, Any]:
    try:
        content = limits.parse_json(store.fetch(located, file), limits.of(file))
    except ValueError as error:
        raise ModelError(Problem(f"{file} is no JSON ({error})", hint="download the model again")) from None
    if not isinstance(content, dict):
        raise ModelError(Problem(f"{file} is no JSON object", hint="download the model again"))
    return content


def tensors_of(
    located: Located, store: Store, pool: ThreadPoolExecutor, pickles: bool = False, *tallies: limits.Tally
) -> dict[str, TensorInfo]:
    """A model's tensors by name, by the headers of its files.

    Args:
        located: the model.
        store: where it is.
        pool: reads headers.
        pickles: where it has no safetensors, look into files that torch.save wrote.
        tallies: what else counts its tensors.

    Raises:
        ModelError: it has no files that can be read.
    """
    pickled = pickles and is_pickled(located.files)
    single = PICKLED if pickled else _stem(located) + SUFFIX
    name = index_name(single)
    text = store.fetch(located, name).decode("utf-8", "replace") if name in located.files else None
    index = None if text is None else weight_map(text, single)
    files = () if is_modular(located.files) else weight_files(located.files, index, single)
    counted = limits.Tally(limits.MODEL_TENSORS), *tallies
    read = partial(_pickled_in if pickled else tensors_in, located, store)
    with nullcontext() if located.commit else _ONE_FOLDER:
        headers = (pool.map if located.commit else map)(lambda file: read(file, *counted), files)
        modules = [tensors_in(located, store, file, *counted) for file in _modules(located)]
        tensors = gather((*headers, *modules), index, single)
    if not tensors:
        raise ModelError(Problem("its files hold no tensor", hint="the model is incomplete: download it again"))
    return tensors


def _modules(located: Located) -> list[str]:
    return [file for file in module_weights(located.files) if file.endswith(SUFFIX)]


def _pickled_in(located: Located, store: Store, file: str, *tallies: limits.Tally) -> tuple[TensorInfo, ...]:
    if located.files[file].barred == POINTER:
        raise ModelError(Problem(f"{file} {POINTER}", hint=remedy(POINTER)))
    size = located.files[file].size
    # a pool of its own: where each tensor is takes a request, and this one's pool waits for them
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        found = pickled_tensors(file, size, lambda start, stop: store.fetch(located, file, start, stop), pool.map)
    _count(tallies, file, len(found))
    return found


def tensors_in(located: Located, store: Store, file: str, *tallies: limits.Tally) -> tuple[TensorInfo, ...]:
    """The tensors of one safetensors file, by its header, in the order of their places.

    Those in a folder of a pipeline have its name before theirs.

    Args:
        located: the model.
        store: where it is.
        file: the file.
        tallies: what counts the tensors, before anything is made of them.

    Raises:
        ModelError: it cannot be read, is damaged, or holds too many tensors.
    """
    if located.files[file].barred == POINTER:
        raise ModelError(Problem(f"{file} {POINTER}", hint=remedy(POINTER)))
    size = located.files[file].size
    length = header_length(store.fetch(located, file, 0, min(8, size)), file, size)
    tallies = tallies or (limits.Tally(limits.MODEL_TENSORS),)
    _count(tallies, file, by_length := limits.count_tensors(length))
    raw = store.fetch(located, file, 8, 8 + length)
    _count(tallies, file, limits.count_tensors(length, raw) - by_length)
    found, folder = read_header(raw, file, size), file[: file.rfind("/") + 1]
    is_module = file in module_weights(located.files)
    return tuple(replace(tensor, name=f"{folder}{tensor.name}") for tensor in found) if is_module else found


def _count(tallies: Iterable[limits.Tally], file: str, tensors: int) -> None:
    for tally in tallies:
        if problem := tally.add(file, tensors):
            raise ModelError(problem)


def _card(located: Located, store: Store) -> Mapping[str, Any]:
    """The front matter of README.md; a card that cannot be read counts as none: it is no reason to refuse a model.

    All that is no list and no map is text: YAML 1.1 would take the language no for false, and the licence 1.10 for 1.1.
    """
    info = located.files.get("README.md")
    if info is None or info.size > limits.CARD.most:
        return {}
    text = store.fetch(located, "README.md").decode("utf-8", "replace").replace("\r\n", "\n")
    front = _FRONT_MATTER.match(text)
    if front is None:
        return {}
    try:
        metadata = load_yaml(front[1], limits.CARD, only_text=True)
    except Exception:  # on strange input the YAML library raises whatever it comes across, not only its own errors
        return {}
    return metadata if isinstance(metadata, dict) else {}
