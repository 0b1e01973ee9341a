"""What a merge was made of, for machines: the lock file that lies beside the result.

No path of the machine that made it stands in it, but for those in the recipe's own text. Not here: the card for people
(render), and how a lock file is written and read (plan.lockfile).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version

from merger.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from merger.checkpoints.checkpoint import SUFFIX, index_name
from merger.checkpoints.licence_file import licence_files
from merger.checkpoints.sidefiles import CARD_NAME
from merger.plan.locked import LockedModel
from merger.plan.lockfile import OURS, Lock, Parent
from merger.plan.plan import Plan
from merger.stores.ports import FileInfo, Located

Checksum = Callable[[Located, str], str | None]
_MADE_WITH = (OURS, "torch", "numpy", "huggingface_hub")
_HASHED_FOLDERS = 1_000_000_000
"""Up to so many bytes of models in folders are read once more for their SHA-256, in a second; of more it is unknown."""


def shown(model: LockedModel) -> str:
    """A model's name for readers: as the recipe writes it on the Hub, of a folder its last part, of a stage its own."""
    if model.adapter is not None:
        return f"{shown(replace(model, ref=replace(model.ref, adapter=None), adapter=None))}+{shown(model.adapter)}"
    return str(model.ref) if model.located.commit else model.name


def lock_file(planned: Plan, output: Mapping[str, FileInfo], checksum: Checksum) -> str:
    """The text of the lock file: inputs with commits and checksums, seed, plan, versions, recipe, and what came out.

    Args:
        planned: what was made.
        output: the files that were written.
        checksum: finds out the SHA-256 of a model's file, if need be by reading it; None: it is not known.
    """
    models = planned.locked.models
    folders = [model for model in models if model.located.commit is None]
    in_folders = sum(model.located.files[name].size for model in folders for name in _read(planned, model))
    unhashed = folders if in_folders > _HASHED_FOLDERS else []
    return Lock(
        plan=planned.hash,
        identity=planned.identity,
        format=planned.format,
        seed=planned.seed,
        shard_bytes=planned.shard_bytes,
        made_with={"python": platform.python_version(), **{package: version(package) for package in _MADE_WITH}},
        recipe=planned.locked.recipe.text,
        models=tuple(_parent(planned, model, _unknown if model in unhashed else checksum) for model in models),
        output=output,
    ).text()


def _unknown(model: Located, file: str) -> None:
    """For a checksum that it would take too long to find out."""


def _read(planned: Plan, model: LockedModel) -> list[str]:
    """The files of a model that are read for the merge."""
    tensors = {tensor.file for tensor in model.checkpoint.tensors.values()}
    taken = [name for name, number in planned.texts.taken.items() if planned.locked.models[number] is model]
    index = (index_name(model.checkpoint.stem + SUFFIX),) if len(tensors) > 1 else ()
    licences = licence_files(model.located.files)
    wanted = {*tensors, *model.texts, *taken, *index, *licences, "config.json", ADAPTER_CONFIG, CARD_NAME}
    return sorted(wanted & model.located.files.keys())


def _parent(planned: Plan, model: LockedModel, checksum: Checksum) -> Parent:
    located = model.located
    files = {name: FileInfo(located.files[name].size, checksum(located, name)) for name in _read(planned, model)}
    return Parent(shown(model), located.commit, model.licence, files, located.name if located.moved else None)
