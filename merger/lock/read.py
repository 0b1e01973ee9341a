"""What a model's files say of it, read once each: headers, config, card, licence, the steps of its pipeline.

Not here: which models a recipe takes, and at which commit (lock).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

from merger.errors import ModelError, Problem
from merger.lock.locked import stated_licence
from merger.models import checkpoint, side_files
from merger.models.formats.pickled import SINGLE as PICKLED
from merger.models.formats.pickled import is_pickled, pickled_tensors
from merger.models.formats.quantised import Unpacked
from merger.models.gguf.header import GgufHeader, find_gguf, read_gguf_header
from merger.models.gguf.source import restore_model
from merger.models.gguf.tokenizer import tokenizer_of
from merger.models.licence import TITLE_BYTES, licence_text, recognise_licence
from merger.models.lora import adapter as adapters
from merger.models.lora.pipeline import USUAL
from merger.models.plain_yaml import load_yaml
from merger.safety import limits
from merger.safety.paths import POINTER, remedy
from merger.stores.ports import PIECE_BYTES, FileInfo, Located, Store

REQUESTS_AT_ONCE = 8
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
_ONE_FOLDER = Lock()
"""A disk answers at once: threads that parse its headers side by side only take each other's turns."""


def tensor_stem(located: Located, pickles: bool = False) -> str:
    """What the names of its safetensors begin with: of a single file the name itself."""
    if side_files.is_modular(located.files, pickles):
        return checkpoint.STEM
    alone = checkpoint.is_single(located.name)
    return located.name.rpartition("/")[2].removesuffix(checkpoint.SUFFIX) if alone else checkpoint.stem(located.files)


def tensors_of(
    located: Located, store: Store, pool: ThreadPoolExecutor, pickles: bool = False, *tallies: limits.Tally
) -> dict[str, checkpoint.TensorInfo]:
    """A model's tensors by name, by the headers of its files.

    Args:
        pool: reads headers.
        pickles: where it has no safetensors, look into files that torch.save wrote.
        tallies: what else counts its tensors.

    Raises:
        ModelError: it has no files that can be read.
    """
    if find_gguf(located.files):
        hint = "name it as a model of a recipe, or bring it into safetensors: merger convert"
        raise ModelError(Problem("is GGUF, which is read only to be merged", hint=hint))
    counted = limits.Tally(limits.MODEL_TENSORS), *tallies
    each = pool.map if located.commit else map
    own = () if side_files.is_modular(located.files, pickles) else ("",)
    with nullcontext() if located.commit else _ONE_FOLDER:
        tensors = checkpoint.gather(
            [
                _tensors_in_folder(located, store, each, folder, pickles, *counted)
                for folder in (*own, *side_files.steps_with_tensors(located.files, pickles))
            ],
            None,
        )
    if not tensors:
        raise ModelError(Problem("its files hold no tensor", hint="the model is incomplete: download it again"))
    return tensors


def _tensors_in_folder(
    located: Located,
    store: Store,
    each: Callable[..., Iterable[Any]],
    folder: str,
    pickles: bool,
    *tallies: limits.Tally,
) -> tuple[checkpoint.TensorInfo, ...]:
    """The tensors of a model beside config.json, or of one step of a pipeline, by the index there if there is one."""
    within = [name.removeprefix(folder) for name in located.files if name.startswith(folder)]
    pickled = pickles and is_pickled(within)
    begins = partial(checkpoint.stem, within) if folder else partial(tensor_stem, located, pickles)
    alone = PICKLED if pickled else begins() + checkpoint.SUFFIX
    single, name = folder + alone, folder + checkpoint.index_name(alone)
    text = store.fetch(located, name).decode("utf-8", "replace") if name in located.files else None
    mapped = checkpoint.weight_map(text, single) if text is not None else {}
    index = {folder + tensor: folder + file for tensor, file in mapped.items()} or None
    read = partial(_pickled_in if pickled else tensors_in, located, store)
    headers = each(lambda file: read(file, *tallies), checkpoint.weight_files(located.files, index, single))
    return tuple(checkpoint.gather(headers, index, single).values())


def read_gguf(
    located: Located, files: Iterable[str], store: Store, pool: ThreadPoolExecutor, *tallies: limits.Tally
) -> tuple[Located, Unpacked]:
    """A model of GGUF files, and what its config.json and tokenizer would be, which then count as its files.

    Raises:
        ModelError: one of them cannot be read, or is of a model that is not.
    """

    counted = limits.Tally(limits.MODEL_TENSORS), *tallies

    def header(file: str) -> GgufHeader:
        _refuse_pointer(located, file)
        fetch = partial(store.fetch, located, file)
        return read_gguf_header(file, located.files[file].size, fetch, partial(_count, counted, file))

    headers = dict(zip(files, pool.map(header, files), strict=True))
    count = partial(_count, counted)
    found = restore_model(headers, lambda file, each: store.fetch(located, file, each.start, each.stop), count)
    made = {"config.json": json.dumps(found.config, indent=2).encode()}
    made |= tokenizer_of(next(iter(headers.values())).metadata)
    told = {name: FileInfo(len(text), hashlib.sha256(text).hexdigest(), made=text) for name, text in made.items()}
    return replace(located, files={**located.files, **told}), found


def _refuse_pointer(located: Located, file: str) -> None:
    if located.files[file].barred == POINTER:
        raise ModelError(Problem(f"{file} {POINTER}", hint=remedy(POINTER)))


def _pickled_in(located: Located, store: Store, file: str, *tallies: limits.Tally) -> tuple[checkpoint.TensorInfo, ...]:
    _refuse_pointer(located, file)
    size = located.files[file].size
    # a pool of its own: where each tensor is takes a request, and this one's pool waits for them
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        found = pickled_tensors(file, size, lambda start, stop: store.fetch(located, file, start, stop), pool.map)
    _count(tallies, file, len(found))
    return _in_folder(located, file, found)


def tensors_in(located: Located, store: Store, file: str, *tallies: limits.Tally) -> tuple[checkpoint.TensorInfo, ...]:
    """The tensors of one safetensors file, by its header, in the order of their places.

    Those in a folder of a pipeline have its name before theirs.

    Raises:
        ModelError: as `header_in` says.
    """
    found = checkpoint.read_header(header_in(located, store, file, *tallies), file, located.files[file].size)
    return _in_folder(located, file, found)


def _in_folder(
    located: Located, file: str, found: Iterable[checkpoint.TensorInfo]
) -> tuple[checkpoint.TensorInfo, ...]:
    folder = side_files.module_of(file) if side_files.MODULES in located.files else ""
    return tuple(replace(tensor, name=f"{folder}/{tensor.name}" if folder else tensor.name) for tensor in found)


def header_in(located: Located, store: Store, file: str, *tallies: limits.Tally) -> bytes:
    """The header of one safetensors file.

    Args:
        tallies: what counts its tensors, before anything is made of them.

    Raises:
        ModelError: it cannot be read, is damaged, or tells of too many tensors.
    """
    _refuse_pointer(located, file)
    size = located.files[file].size
    length = checkpoint.header_length(store.fetch(located, file, 0, min(8, size)), file, size)
    tallies = tallies or (limits.Tally(limits.MODEL_TENSORS),)
    _count(tallies, file, by_length := limits.count_tensors(length))
    raw = store.fetch(located, file, 8, 8 + length)
    _count(tallies, file, limits.count_tensors(length, raw) - by_length)
    return raw


def _count(tallies: Iterable[limits.Tally], file: str, tensors: int) -> None:
    for tally in tallies:
        if problem := tally.add(file, tensors):
            raise ModelError(problem)


def read_config(located: Located, store: Store, pickles: bool) -> Mapping[str, Any]:
    """config.json, if the model has one or need not have one.

    Raises:
        ModelError: it has none, or is no model.
    """
    if "config.json" in located.files:
        return read_json(located, "config.json", store)
    if side_files.MODULES in located.files:  # a pipeline of which no step is a model of transformers
        return {}
    if adapters.CONFIG in located.files:
        hint = f"add it to its model: org/model+{located.name}; or list adapters under adapters: to merge them"
        raise ModelError(Problem("is a LoRA adapter, not a model", hint=hint))
    if not (pickles and is_pickled(located.files)):
        checkpoint.stem(located.files)  # what else is missing is told first
    hint = "to merge tensors without a config, name their file: .../model.safetensors"
    raise ModelError(Problem("has no config.json", hint=hint))


def read_json(located: Located, file: str, store: Store) -> Mapping[str, Any]:
    """A file that holds a JSON object.

    Raises:
        ModelError: it is not.
    """
    try:
        content = limits.parse_json(store.fetch(located, file), limits.of(file))
    except ValueError as error:
        raise ModelError(Problem(f"{file} is no JSON ({error})", hint="download the model again")) from None
    if not isinstance(content, dict):
        raise ModelError(Problem(f"{file} is no JSON object", hint="download the model again"))
    return content


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


def read_licence(located: Located, store: Store) -> tuple[Mapping[str, Any], str | None]:
    """The metadata of its card; and where that names no licence, which one the file beside it is."""
    card = _card(located, store)
    return card, None if stated_licence(card) else _licence_file(located, store)


def _licence_file(located: Located, store: Store) -> str | None:
    file = licence_text(located.files)
    if file is None:
        return None
    opening = store.fetch(located, file, 0, min(located.files[file].size, TITLE_BYTES))
    return recognise_licence(opening.decode("utf-8", "replace"))


def embedder_class(located: Located, store: Store) -> str | None:
    """The class that loads it with its pipeline; None where it has none."""
    if side_files.MODULES not in located.files:
        return None
    if b'"pylate.' in store.fetch(located, side_files.MODULES):
        return side_files.COLBERT
    said = (
        read_json(located, side_files.PIPELINE_CONFIG, store).get("model_type")
        if side_files.PIPELINE_CONFIG in located.files
        else None
    )
    return said if said in side_files.EMBEDDERS else side_files.EMBEDDERS[0]


def content_names(located: Located, name: str, store: Store) -> frozenset[str]:
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


def refuse_barred(located: Located, config: Mapping[str, Any]) -> None:
    """What a merge would publish of a model, or read for its card, must be the model's own."""
    barred = {name: located.files[name].barred for name in side_files.read_beside(located.files, config)}
    if problems := [Problem(f"{name} {why}", hint=remedy(why)) for name, why in barred.items() if why]:
        raise ModelError(problems)


def adapter_file(located: Located) -> str:
    """The file of an adapter: PEFT's, MLX's, or beside no config that of a diffusion pipeline's.

    Raises:
        ModelError: it has none, or several.
    """
    there = [name for name in located.files if name.endswith(checkpoint.SUFFIX) and "/" not in name]
    if adapters.CONFIG not in located.files:
        if USUAL in there or len(there) == 1:
            return USUAL if USUAL in there else there[0]
        raise without_config(f"of several files name the one that is meant: .../{there[0]}" if there else OF_PEFT)
    if found := next((name for name in (adapters.TENSORS, adapters.OF_MLX) if name in there), None):
        return found
    pickled = adapters.PICKLED in located.files
    what = f"has no {adapters.TENSORS}" + (f", only {adapters.PICKLED}" if pickled else "")
    hint = "such files can run code when they are read: load it with PEFT and save it with save_pretrained"
    raise ModelError(Problem(what, hint=hint if pickled else "the adapter is incomplete: download it again"))


OF_PEFT = "is it a LoRA adapter as PEFT saves it?"


def without_config(hint: str) -> ModelError:
    """That it is no adapter of PEFT's, nor another that is read."""
    return ModelError(Problem(f"has no {adapters.CONFIG}", hint=hint))
