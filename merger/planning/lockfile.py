"""The lock file, merger.lock.yaml: all that it takes to make a merge again, and to tell whether it is the same.

Text to Lock and back, and whether models and a plan are still those that it holds. Not here: what goes into the lock
of a run (card.facts), and the commits alone that a lock file beside a recipe pins (lock.pins).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from merger.errors import Problem, RecipeError, VerificationError
from merger.lock.formats import FORMAT, FormatChange, since
from merger.lock.lock import Pin
from merger.lock.locked import LockedModel, LockedRecipe
from merger.lock.parents import (
    Checksum,
    Parent,
    changed_files,
    list_files,
    need_kind,
    need_within,
    read_files,
    read_parent,
)
from merger.models.plain_yaml import load_yaml
from merger.planning.plan import Plan
from merger.runtime import PACKAGE, install_command
from merger.safety import numbers
from merger.safety.limits import LOCK
from merger.stores.ports import FileInfo


@dataclass(frozen=True)
class Lock:
    """What a lock file says.

    Args:
        plan: the plan's hash.
        identity: the plan's identity.
        seed: for methods that draw random numbers.
        shard_bytes: the largest size of a shard's tensors.
        made_with: the versions of what made it.
        recipe: the recipe's text.
        models: its models, in the order of its first mention of each.
        output: the files that were written but for the card, its pictures and this lock, the shards first.
        format: by whose meaning of a recipe it was planned.
        gguf: the types of its GGUF files.
    """

    plan: str
    identity: str
    seed: int
    shard_bytes: int
    made_with: Mapping[str, str]
    recipe: str
    models: tuple[Parent, ...]
    output: Mapping[str, FileInfo]
    format: int = FORMAT
    gguf: tuple[str, ...] = ()

    @property
    def pins(self) -> dict[str, Pin]:
        """The commits by model."""
        return {parent.model: Pin(parent.commit, parent.now) for parent in self.models if parent.commit}

    @property
    def names(self) -> list[str]:
        """The models, as it calls them."""
        return [parent.model for parent in self.models]

    def text(self) -> str:
        """As YAML."""
        content: dict[str, Any] = {
            "format": self.format,
            "plan": self.plan,
            "identity": self.identity,
            "seed": self.seed,
            "shard_size": self.shard_bytes,
            **({"gguf": list(self.gguf)} if self.gguf else {}),
            "made_with": dict(self.made_with),
            "models": [parent.encode() for parent in self.models],
            "output": list_files(self.output),
            "recipe": _Block(self.recipe),
        }
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Block(str):
    """Text over several lines, written as such; or quoted, if it has ends of line that YAML would change."""


class _Dumper(yaml.SafeDumper):
    """Plain data, and blocks."""


def _block(dumper: _Dumper, text: _Block) -> yaml.ScalarNode:
    is_plain = "\n".join(text.splitlines()) == text.removesuffix("\n")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if is_plain else '"')


_Dumper.add_representer(_Block, _block)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_lock(text: str, path: str) -> Lock:
    """What the text of a lock file says.

    Raises:
        RecipeError: it is no lock file, or one from before they held a recipe.
        VerificationError: a later version wrote it.
    """
    try:
        content = load_yaml(text, LOCK)
        if "recipe" not in content and "made_with" in content:
            hint = "run the recipe itself, with this file beside it: mine.lock.yaml beside mine.yaml"
            raise RecipeError(Problem(f"{path} holds no recipe: an earlier version of merger wrote it", hint=hint))
        if (format := need_kind(int, content["format"])) > FORMAT:
            what = f"{path} is of format {format}, and merger {version(PACKAGE)} knows {FORMAT} at most"
            raise VerificationError(Problem(what, hint=_install(need_kind(str, content["made_with"][PACKAGE]))))
        return Lock(
            plan=need_kind(str, content["plan"]),
            identity=need_kind(str, content["identity"]),
            seed=need_within(numbers.GIVEN_SEED, content["seed"]),
            shard_bytes=need_within(numbers.BYTES, content["shard_size"]),
            made_with={need_kind(str, name): need_kind(str, number) for name, number in content["made_with"].items()},
            recipe=need_kind(str, content["recipe"]),
            models=tuple(read_parent(item) for item in need_kind(list, content["models"])),
            output=read_files(content["output"]),
            format=format,
            gguf=tuple(need_kind(str, kind) for kind in need_kind(list, content.get("gguf", []))),
        )
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        hint = "take the merger.lock.yaml of a result"
        raise RecipeError(Problem(f"{path} is no lock file", hint=hint)) from None


def _install(number: str) -> str:
    return f"use the version that made it: {install_command(version=number)}"


# ---- is it still the same? ------------------------------------------------------------------------------------------


def changed_models(locked: LockedRecipe, held: Lock, checksum: Checksum) -> list[Problem]:
    """What is no longer as the lock says it was when the merge was made.

    Args:
        locked: the lock's recipe, its models at the lock's commits.
        checksum: finds out the SHA-256 of a file in a folder by reading it; None: only sizes are compared there.
    """
    if len(locked.models) != len(held.models):
        hint = "somebody changed the lock after the merge was made: take the one that was published with it"
        return [Problem("the lock lists other models than its recipe names", hint=hint)]
    return [
        problem
        for model, parent in zip(locked.models, held.models, strict=True)
        for problem in _find_changes(model, parent, checksum)
    ]


def _find_changes(model: LockedModel, parent: Parent, checksum: Checksum) -> list[Problem]:
    """In what a model is another one than its lock says.

    A commit of the Hub pins its files, so there only what the Hub tells without being asked is compared.
    """
    located, at = model.located, model.ref.at
    if (located.commit is None) != (parent.commit is None):
        here = "a folder" if located.commit is None else "on the Hub"
        return [Problem(f"{parent.model} is {here} now, and was not then", at, hint="run it where its models are")]
    hint = "was the lock changed after the merge? Take the one that was published with it"
    if located.commit is None:
        hint = f"bring back the model as it was: {model.ref.path}"
    at_commit = f" at commit {located.commit}" if located.commit else ""
    others = changed_files(located, parent.files, checksum)
    return [Problem(f"{parent.model}{at_commit}: {name} {what}", at, hint=hint) for name, what in others.items()]


def other_meaning(planned: Plan | None, held: Lock) -> list[Problem]:
    """That an earlier version made the merge, and this one plans another of the same recipe.

    Args:
        planned: the plan made anew; None: there can be none any more.
    """
    same = planned is not None and planned.hash == held.plan
    return [] if same else _tell_changes(since(held.format), held)


def other_numbers(planned: Plan, held: Lock) -> list[Problem]:
    """That an earlier version made the merge, and the same plan comes out with other numbers now."""
    jobs = (*planned.jobs, *(made.job for made in planned.stages))
    made = {(job.method, job.name, job.shape) for job in jobs}
    return _tell_changes([each for each in since(held.format) if any(each.touches(*tensor) for tensor in made)], held)


def _tell_changes(changes: Sequence[FormatChange], held: Lock) -> list[Problem]:
    if not changes:
        return []
    then = held.made_with.get(PACKAGE, "an unknown version")
    what = (
        f"merger {then} made it (format {held.format}), and {version(PACKAGE)} makes another merge of the same recipe"
    )
    return [Problem(f"{what}: {'; '.join(change.what for change in changes)}", hint=_install(then))]


def other_plan(planned: Plan, held: Lock) -> list[Problem]:
    """That the lock's recipe, commits, seed and shard size no longer make the plan that the lock names."""
    if planned.hash == held.plan:
        return []
    what = (
        f"the lock names the plan {held.plan[:16]}, but its recipe, commits, seed and shard size make the plan "
        f"{planned.hash[:16]}"
    )
    hint = "one of them was changed in the lock after the merge was made"
    then, now = held.made_with.get(PACKAGE, "an unknown version"), version(PACKAGE)
    if then != now:
        hint += f", or merger plans otherwise now: it was {then} that made it, and this is {now}"
    return [Problem(what, hint=hint)]
