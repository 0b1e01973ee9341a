"""Recipe + Store -> LockedRecipe: every model pinned to a commit, its headers and config read, no tensor byte.

Not here: what is made of them (jobs).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import yaml

from merger.checkpoints import adapter as adapters
from merger.checkpoints import chat, vocab
from merger.checkpoints.adapter import Adapter, Change
from merger.checkpoints.architecture import Architecture, is_embedding, is_head, never_by_token
from merger.checkpoints.checkpoint import (
    FLOATS,
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
)
from merger.checkpoints.config import is_tied, untied, with_vocabulary
from merger.checkpoints.experts import are_fused, split
from merger.checkpoints.licence_file import MOST_BYTES, licence_text, recognised
from merger.checkpoints.pickled import SINGLE as PICKLED
from merger.checkpoints.pickled import is_pickled
from merger.checkpoints.pickled import tensors as pickled_tensors
from merger.checkpoints.quantised import Scaled, unpacked
from merger.checkpoints.sidefiles import tokenizer_files
from merger.errors import ModelError, Problem, RecipeError
from merger.plan.sources import Added, Dequantised, LowRank, Made, Source, Stored
from merger.recipe.model import ModelRef, Recipe
from merger.recipe.tokenizer import AUTO
from merger.stores.ports import FileInfo, Located, Store

if TYPE_CHECKING:
    from merger.plan.jobs import Job, Making
    from merger.plan.texts import Texts

GENERATION = "generation_config.json"
_CARD_BYTES = 1 << 20
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
_TEXT_BYTES = 200 << 20
_REQUESTS_AT_ONCE = 8
_OTHER_ADAPTER = "take the model that it was trained on, or merge both with PEFT's merge_and_unload and name the result"


@dataclass(frozen=True)
class LockedModel:
    """A model of the recipe as it was found.

    Args:
        ref: what the recipe says.
        located: where it is, at which commit, with which files.
        checkpoint: its tensors' names, shapes, dtypes and places, and its config.json.
        card: the metadata of its own model card, empty where there is none.
        texts: of its tokenizer's files those that the plan needs, by name.
        scaled: the tensors that are stored as numbers and scales, by name.
        aside: the names of stored tensors that only a quantised model has a use for.
        lora: what its files hold, of a LoRA adapter; its config is adapter_config.json.
        adapter: the LoRA adapter that is added to it.
        changes: what that makes of its tensors, by their names.
        brought: the names of tensors that are in the adapter alone.
        licence_file: which licence the file beside it is, where its card names none.
    """

    ref: ModelRef
    located: Located
    checkpoint: Checkpoint = field(repr=False)
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    texts: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    scaled: Mapping[str, Scaled] = field(default_factory=dict, repr=False)
    aside: tuple[str, ...] = field(default=(), repr=False)
    lora: Adapter | None = field(default=None, repr=False)
    adapter: LockedModel | None = field(default=None, repr=False)
    changes: Mapping[str, Change] = field(default_factory=dict, repr=False)
    brought: tuple[str, ...] = ()
    licence_file: str | None = None

    @cached_property
    def architecture(self) -> Architecture:
        """What the tensors' names tell."""
        return Architecture(self.checkpoint.tensors)

    @cached_property
    def by_layer(self) -> Mapping[tuple[str | None, int | None], list[TensorInfo]]:
        """The tensors of each layer of each stack, under (None, None) those outside; in the order of their places."""
        found: dict[tuple[str | None, int | None], list[TensorInfo]] = {}
        for tensor in self.checkpoint.tensors.values():
            place = self.architecture.place(tensor.name)
            found.setdefault((place.stack, place.layer), []).append(tensor)
        return found

    def layer(self, stack: str | None, layer: int | None) -> list[TensorInfo]:
        """The tensors of a layer, or with (None, None) those outside all stacks."""
        return self.by_layer.get((stack, layer), [])

    @cached_property
    def dtypes(self) -> Mapping[tuple[str | None, str], str]:
        """The dtype of each role in each stack, under None of the tensors outside."""
        places = [(tensor, self.architecture.place(tensor.name)) for tensor in self.checkpoint.tensors.values()]
        return {(place.stack, place.role): tensor.dtype for tensor, place in places}

    @cached_property
    def head(self) -> TensorInfo | None:
        """The tensor that makes logits over the vocabulary, where the checkpoint holds exactly one."""
        return self._only(is_head)

    @cached_property
    def embedding(self) -> TensorInfo | None:
        """The tensor with a row for each token, where the checkpoint holds exactly one."""
        return self._only(is_embedding)

    def _only(self, wanted: Callable[[str], bool]) -> TensorInfo | None:
        found = [tensor for tensor in self.layer(None, None) if wanted(tensor.name)]
        return found[0] if len(found) == 1 else None

    @cached_property
    def token_rows(self) -> int | None:
        """How many rows its embeddings have, one a token; None where it has none, or of different numbers."""
        loose = self.layer(None, None)
        found = {tensor.shape[0] for tensor in loose if is_embedding(tensor.name) and len(tensor.shape) == 2}
        return found.pop() if len(found) == 1 else None

    def by_token(self, tensor: TensorInfo) -> bool:
        """Whether a tensor has a row for each token: an embedding, a head, or what else goes with them."""
        loose = self.architecture.place(tensor.name).stack is None and tensor.dtype in FLOATS
        if not loose or tensor.shape[:1] != (self.token_rows,):
            return False
        named = is_embedding(tensor.name) or is_head(tensor.name)
        return named or (not self._as_wide_as_long and not never_by_token(tensor.name))

    def across_tokens(self, tensor: TensorInfo) -> bool:
        """Whether a tensor is one row with an entry for each token, as BART's final_logits_bias is."""
        loose = self.architecture.place(tensor.name).stack is None
        return loose and tensor.shape == (1, self.token_rows) and not self._as_wide_as_long

    @property
    def _as_wide_as_long(self) -> bool:
        """Whether rows are as long as there are many, so that a shape does not tell what has one for each token."""
        return self.token_rows in {one.shape[1] for one in (self.embedding, self.head) if one is not None}

    @property
    def speaker(self) -> LockedModel:
        """In whose files its tokenizer lies: in its adapter's, if that has one and holds the embedding whole."""
        whole = (name for name, change in self.changes.items() if change.whole is not None)
        if self.adapter is None or not any(is_embedding(name) for name in whole):
            return self
        return self.adapter if tokenizer_files(self.adapter.located.files) else self

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(".experts." in name for name in self.checkpoint.tensors)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding: its config says so, and the embedding is what its files hold."""
        return is_tied(self.checkpoint.config) and any(is_embedding(tensor.name) for tensor in self.layer(None, None))

    def is_tied_head(self, name: str) -> bool:
        """Whether a tensor is the head of a model whose head is the embedding, so that nothing reads it."""
        return self.head is not None and name == self.head.name and self.is_tied

    @property
    def name(self) -> str:
        """The name for readers: repo id, or the folder's last part; with that of its adapter."""
        return self.located.name if self.adapter is None else f"{self.located.name}+{self.adapter.name}"

    @property
    def licence(self) -> str | None:
        """The licence by the name that its card gives it, else as the file LICENSE beside it is known."""
        return stated_licence(self.card) or self.licence_file


@dataclass(frozen=True)
class StageModel(LockedModel):
    """What a stage of the recipe makes, as a model of the documents after it: its tensors are in no file.

    `located` is where the files come from that are taken over: those of its own donor.

    Args:
        locked: the stage's document.
        making: how its tensors are made.
        small: which small files it would have.
        seed: for methods that draw random numbers.
    """

    locked: LockedRecipe = field(kw_only=True, repr=False)
    making: Making = field(kw_only=True, repr=False)
    small: Texts = field(kw_only=True, repr=False)
    seed: int = field(kw_only=True)

    @cached_property
    def jobs(self) -> Mapping[str, Job]:
        """How each tensor is made."""
        return {job.name: job for job in self.making.jobs}

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.ref.path


@dataclass(frozen=True)
class LockedRecipe:
    """A recipe and its models, in the order of ``recipe.models``; then the adapters that are added to them.

    After them its stages count, once it is known what they make.

    Args:
        recipe: the recipe.
        models: its models and adapters.
        stages: what its documents make before the last.
        templates: its own templates for the card, by name, once they are read (templates).
    """

    recipe: Recipe
    models: tuple[LockedModel, ...]
    stages: tuple[StageModel, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def index(self, ref: ModelRef) -> int:
        """The number of a model, or, counted on, of a stage."""
        return next(number for number, model in enumerate(self.all) if model.ref == ref)

    @property
    def all(self) -> tuple[LockedModel, ...]:
        """The models, and the stages after them."""
        return (*self.models, *self.stages)

    def numbered(self, number: int) -> LockedModel:
        """The model or stage of that number."""
        return self.all[number]

    def model(self, ref: ModelRef) -> LockedModel:
        """The model or stage that a reference means."""
        return self.numbered(self.index(ref))

    @property
    def own(self) -> tuple[int, ...]:
        """The numbers of the models and stages of this document."""
        return tuple(self.index(ref) for ref in self.recipe.parents)

    def source(self, number: int, tensor: TensorInfo) -> Source:
        """Where the entries of a tensor of the model or stage of that number come from, as its adapter changes them."""
        model = self.numbered(number)
        if model.adapter is None or (change := model.changes.get(tensor.name)) is None:
            return self._stored(number, tensor)
        adapter = self.index(model.adapter.ref)
        source = self._stored(number, tensor) if change.whole is None else Stored(adapter, change.whole)
        if (low := change.low_rank) is not None:
            lengths = None if low.magnitude is None else Stored(adapter, low.magnitude)
            source = LowRank(source, Stored(adapter, low.a), Stored(adapter, low.b), low.scale, change.turned, lengths)
        return source if change.added is None else Added(source, Stored(adapter, change.added), change.scale)

    def _stored(self, number: int, tensor: TensorInfo) -> Source:
        """The same without an adapter."""
        model, owner = self.numbered(number), self.owner(number)
        if (scaled := model.scaled.get(tensor.name)) is not None:
            numbers, scales = Stored(owner, scaled.numbers), Stored(owner, scaled.scales)
            return Dequantised(numbers, scales, scaled.block, tensor.dtype)
        if not isinstance(model, StageModel):
            return Stored(owner, tensor)
        job = model.jobs[tensor.name]
        passed = job.passed
        return passed if isinstance(passed, Stored | Made) else Made(number, tensor.name, model.seed, job)

    @property
    def merged(self) -> tuple[LockedModel, ...]:
        """The models that are merged, without the adapters that are added to some of them."""
        return tuple(model for model in self.models if model.lora is None or self.recipe.merges_adapters)

    def owner(self, number: int) -> int:
        """The number of the first model with the same files: one that is named with several adapters is read once."""
        here = self.numbered(number)
        if isinstance(here, StageModel):
            return number
        return next(first for first, model in enumerate(self.models) if model.located == here.located)

    @property
    def donor(self) -> LockedModel:
        """The model or stage whose config the result takes."""
        return self.model(self.recipe.donor)

    @property
    def holder(self) -> LockedModel:
        """The model in whose files that config lies: the donor, or the donor of the stage that is the donor."""
        donor = self.donor
        return donor.locked.holder if isinstance(donor, StageModel) else donor


def pins(text: str, path: str) -> dict[str, str]:
    """The commits by model that a lock file names, such as lies beside every result.

    Raises:
        RecipeError: it is no lock file.
    """
    try:
        models = yaml.safe_load(text)["models"]
        return {str(item["model"]): str(item["commit"]) for item in models if item["commit"]}
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        hint = "take the merger.lock.yaml of a result, or remove it"
        raise RecipeError(Problem(f"{path} is no lock file", hint=hint)) from None


def lock(recipe: Recipe, store: Store, pinned: Mapping[str, str] | None = None, pickles: bool = False) -> LockedRecipe:
    """Find and read every model of the recipe.

    Args:
        recipe: the recipe.
        store: where its models are.
        pinned: the commits to take, by model as the recipe writes it; the others are taken as they are now.
        pickles: of models without safetensors, look into files that torch.save wrote.

    Raises:
        ModelError: with every model that cannot be read.
    """
    # Two pools: a model waits for its headers, which wait for nobody.
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as models, ThreadPoolExecutor(_REQUESTS_AT_ONCE) as headers:
        fetching = _Fetching(store, headers, pinned or {}, pickles)
        fetch = fetching.adapter if recipe.merges_adapters else fetching.model
        merged = list(models.map(lambda ref: _attempt(ref, fetch), recipe.models))
        loras = _found(models.map(lambda ref: _attempt(ref, fetching.adapter), recipe.adapters), merged)
    found = _in_one_layout(_found(merged))
    by_ref = {lora.ref: lora for lora in loras}
    changed = _found(_attempt_with(model, by_ref) for model in found)
    return LockedRecipe(recipe, _with_texts(recipe, changed, loras, store))


_Attempt = tuple[LockedModel | None, tuple[Problem, ...]]


def _found(attempts: Iterable[_Attempt], others: Iterable[_Attempt] = ()) -> tuple[LockedModel, ...]:
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
    fused = [model for model in models if are_fused(model.checkpoint.tensors)]
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
    wanted = set(_wanted(recipe, merged)) if recipe.lora is None else set()
    models = (*merged, *loras)
    speaking = {model.ref for one in merged for model in (one, one.speaker)}
    held = [_texts_of(model, wanted) if model.ref in speaking else {} for model in models]
    places = {
        _content(info, number, name): (models[number], name)
        for number, files in enumerate(held)
        for name, info in files.items()
    }
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        fetched = dict(
            zip(places, pool.map(lambda place: _text(place[0], place[1], store), places.values()), strict=True)
        )
    problems = [text for text in fetched.values() if isinstance(text, Problem)]
    if problems:
        raise ModelError(problems)
    texts = {key: text for key, text in fetched.items() if not isinstance(text, Problem)}
    found = [
        replace(model, texts={name: texts[_content(info, number, name)] for name, info in held[number].items()})
        for number, model in enumerate(models)
    ]
    read = {lora.ref: lora for lora in found[len(merged) :]}
    return tuple(replace(model, adapter=read[model.adapter.ref]) if model.adapter else model for model in found)


def _texts_of(model: LockedModel, wanted: Container[str]) -> Mapping[str, FileInfo]:
    """Its files of these names, but for those that would tell its vocabulary only if there were no better ones."""
    files = model.located.files
    idle = set(vocab.FILES).difference(vocab.told_by(files))
    return {name: info for name, info in files.items() if name in wanted and name not in idle}


def _wanted(recipe: Recipe, models: Sequence[LockedModel]) -> Iterator[str]:
    """The names of the files that decide which tokens mean what; none where the models' are known to be equal."""
    for document in recipe.documents:
        # what a stage's files hold is made of what its models' do
        yield from _of_document(document, [model for model in models if recipe.stages or model.ref in document.merged])


def _of_document(recipe: Recipe, merged: list[LockedModel]) -> Iterator[str]:
    told = [
        {name: _content(files[name], number, name) for name in vocab.told_by(files)}
        for number, files in enumerate(model.speaker.located.files for model in merged)
    ]
    if recipe.tokenizer is not None:
        yield from (*vocab.FILES, GENERATION)
    elif any(files != told[0] for files in told):
        yield from vocab.FILES
    if recipe.chat_template is not None and recipe.chat_template.text == AUTO:
        yield from chat.FILES


def _content(info: FileInfo, model: int, name: str) -> object:
    """What is the same for files of the same content, as far as the store tells."""
    return info.sha256 or info.oid or (model, name)


def _text(model: LockedModel, name: str, store: Store) -> bytes | Problem:
    if model.located.files[name].size > _TEXT_BYTES:
        what = f"{name} has {model.located.files[name].size:,} bytes, which is more than a tokenizer takes"
        return _at(Problem(what, hint="is it the right file? download the model again"), model.ref)
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
    if lora is None or lora.lora is None:
        return model, ()
    held = model.checkpoint
    try:
        changes = adapters.changes(lora.lora, held.tensors, held.config)
        return _with_rows(replace(model, adapter=lora, changes=changes)), ()
    except ModelError as error:
        return None, tuple(_at(problem, model.ref) for problem in error.problems)


def _with_rows(model: LockedModel) -> LockedModel:
    """The model with the head, and with as many rows for its tokens, as its adapter has for it.

    Raises:
        ModelError: not all that has a row for each token has the same number, or no tokenizer tells the new ones.
    """
    held = model.checkpoint
    whole = {name: change.whole for name, change in model.changes.items() if change.whole is not None}
    like = {name: tensor for name in whole if (tensor := held.tensors.get(name) or model.embedding) is not None}
    new = {name: replace(tensor, name=name, shape=whole[name].shape) for name, tensor in like.items()}
    if all(held.tensors.get(name) == tensor for name, tensor in new.items()):
        return model
    brought = tuple(name for name in new if name not in held.tensors)
    config = untied(held.config) if any(is_head(name) for name in new) and model.is_tied else held.config
    grown = replace(model, checkpoint=Checkpoint({**held.tensors, **new}, config, held.stem), brought=brought)
    _check_rows(model, grown)
    config = with_vocabulary(config, model.token_rows or 0, grown.token_rows or 0)
    return replace(grown, checkpoint=replace(grown.checkpoint, config=config))


def _check_rows(model: LockedModel, grown: LockedModel) -> None:
    """See `_with_rows`; `grown` is the model with what its adapter has."""
    tensors = [tensor for tensor in model.checkpoint.tensors.values() if model.by_token(tensor)]
    names = [*(tensor.name for tensor in tensors), *grown.brought]
    rows = {name: grown.checkpoint.tensors[name].shape[0] for name in names if not grown.is_tied_head(name)}
    if len(set(rows.values())) > 1:
        told = " and ".join(f"{count:,} rows in {name}" for name, count in rows.items())
        raise ModelError(Problem(f"with the adapter there are {told}: not one for each token", hint=_OTHER_ADAPTER))
    if grown.token_rows != model.token_rows and grown.speaker is grown:
        what = f"the adapter's embedding has {grown.token_rows:,} rows, the model's {model.token_rows:,}"
        hint = "put the tokenizer with which it was trained into the adapter's folder"
        raise ModelError(Problem(f"{what}, and no tokenizer beside the adapter tells its tokens", hint=hint))


def _at(problem: Problem, ref: ModelRef) -> Problem:
    return replace(problem, at=problem.at or ref.at, where=problem.where or f"models[{ref}]")


@dataclass(frozen=True)
class _Fetching:
    """Reads what is needed of models and adapters; `pinned`: the commits to take; `pickles`: see `lock`."""

    store: Store
    pool: ThreadPoolExecutor
    pinned: Mapping[str, str]
    pickles: bool

    def _located(self, ref: ModelRef) -> Located:
        return self.store.locate(ref.path, self.pinned.get(str(ref)) or ref.revision)

    def model(self, ref: ModelRef) -> LockedModel:
        located, store = self._located(ref), self.store
        alone = is_single(located.name)
        config = {} if alone else _config(located, store, self.pickles)
        found = unpacked(tensors_of(located, store, self.pool, self.pickles), config)
        begins = STEM if alone or (self.pickles and is_pickled(located.files)) else _stem(located)
        checkpoint = Checkpoint(found.tensors, found.config, begins)
        card, licence = _licensed(located, store)
        return LockedModel(ref, located, checkpoint, card, scaled=found.scaled, aside=found.aside, licence_file=licence)

    def adapter(self, ref: ModelRef) -> LockedModel:
        located = self._located(ref)
        _check_adapter_files(located)
        config = _json(located, adapters.CONFIG, self.store)
        tensors = {tensor.name: tensor for tensor in tensors_in(located, self.store, adapters.TENSORS)}
        lora = adapters.read_adapter(config, tensors)
        card, licence = _licensed(located, self.store)
        return LockedModel(ref, located, Checkpoint(tensors, config), card, lora=lora, licence_file=licence)


def _check_adapter_files(located: Located) -> None:
    if adapters.CONFIG not in located.files:
        hint = "is it a LoRA adapter as PEFT saves it?"
        raise ModelError(Problem(f"has no {adapters.CONFIG}", hint=hint))
    if adapters.TENSORS not in located.files:
        pickled = adapters.PICKLED in located.files
        what = f"has no {adapters.TENSORS}" + (f", only {adapters.PICKLED}" if pickled else "")
        hint = "such files can run code when they are read: load it with PEFT and save it with save_pretrained"
        raise ModelError(Problem(what, hint=hint if pickled else "the adapter is incomplete: download it again"))


def _licensed(located: Located, store: Store) -> tuple[Mapping[str, Any], str | None]:
    """The metadata of its card; and where that names no licence, which one the file beside it is."""
    card = _card(located, store)
    return card, None if stated_licence(card) else _licence_file(located, store)


def stated_licence(card: Mapping[str, Any]) -> str | None:
    """The name that a card gives to the licence; of several, all. None: it gives none."""
    stated = card.get("license")
    names = [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]
    if [name.strip().lower() for name in names] == ["other"] and isinstance(card.get("license_name"), str):
        names = [card["license_name"]]
    return " AND ".join(" ".join(name.split()) for name in names) or None


def _licence_file(located: Located, store: Store) -> str | None:
    file = licence_text(located.files)
    if file is None or located.files[file].size > MOST_BYTES:
        return None
    return recognised(store.fetch(located, file).decode("utf-8", "replace"))


def _stem(located: Located) -> str:
    """What the names of its safetensors begin with: of a single file the name itself."""
    alone = is_single(located.name)
    return located.name.rpartition("/")[2].removesuffix(SUFFIX) if alone else stem(located.files)


def _config(located: Located, store: Store, pickles: bool) -> Mapping[str, Any]:
    if "config.json" in located.files:
        return _json(located, "config.json", store)
    if adapters.CONFIG in located.files:
        hint = f"add it to its model: org/model+{located.name}; or list adapters under adapters: to merge them"
        raise ModelError(Problem("is a LoRA adapter, not a model", hint=hint))
    if not (pickles and is_pickled(located.files)):
        stem(located.files)  # what else is missing is told first
    hint = "to merge tensors without a config, name their file: .../model.safetensors"
    raise ModelError(Problem("has no config.json", hint=hint))


def _json(located: Located, file: str, store: Store) -> Mapping[str, Any]:
    try:
        content = json.loads(store.fetch(located, file))
    except (ValueError, RecursionError) as error:
        raise ModelError(Problem(f"{file} is no JSON ({error})", hint="download the model again")) from None
    if not isinstance(content, dict):
        raise ModelError(Problem(f"{file} is no JSON object", hint="download the model again"))
    return content


def tensors_of(
    located: Located, store: Store, pool: ThreadPoolExecutor, pickles: bool = False
) -> dict[str, TensorInfo]:
    """A model's tensors by name, by the headers of its files.

    Args:
        located: the model.
        store: where it is.
        pool: reads headers.
        pickles: where it has no safetensors, look into files that torch.save wrote.

    Raises:
        ModelError: it has no files that can be read.
    """
    pickled = pickles and is_pickled(located.files)
    single = PICKLED if pickled else _stem(located) + SUFFIX
    name = index_name(single)
    index = store.fetch(located, name).decode("utf-8", "replace") if name in located.files else None
    files = weight_files(located.files, index, single)
    read = partial(_pickled_in, located, store) if pickled else partial(tensors_in, located, store)
    tensors = gather(pool.map(read, files), index, single)
    if not tensors:
        raise ModelError(Problem("its files hold no tensor", hint="the model is incomplete: download it again"))
    return tensors


def _pickled_in(located: Located, store: Store, file: str) -> tuple[TensorInfo, ...]:
    size = located.files[file].size
    # a pool of its own: where each tensor is takes a request, and this one's pool waits for them
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return pickled_tensors(file, size, lambda start, stop: store.fetch(located, file, start, stop), pool.map)


def tensors_in(located: Located, store: Store, file: str) -> tuple[TensorInfo, ...]:
    """The tensors of one safetensors file, by its header, in the order of their places.

    Raises:
        ModelError: it cannot be read, or is damaged.
    """
    size = located.files[file].size
    length = header_length(store.fetch(located, file, 0, min(8, size)), file, size)
    return read_header(store.fetch(located, file, 8, 8 + length), file, size)


def _card(located: Located, store: Store) -> Mapping[str, Any]:
    """The front matter of README.md; a card that cannot be read counts as none: it is no reason to refuse a model.

    All that is no list and no map is text: YAML 1.1 would take the language no for false, and the licence 1.10 for 1.1.
    """
    info = located.files.get("README.md")
    if info is None or info.size > _CARD_BYTES:
        return {}
    text = store.fetch(located, "README.md").decode("utf-8", "replace").replace("\r\n", "\n")
    front = _FRONT_MATTER.match(text)
    if front is None:
        return {}
    try:
        metadata = yaml.load(front[1], yaml.BaseLoader)
    except Exception:  # on strange input the YAML library raises whatever it comes across, not only its own errors
        return {}
    return metadata if isinstance(metadata, dict) else {}
