"""From a recipe's file, or a lock file, to a plan: all that is decided before a tensor is read. Not here: the run."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from merger.card.licences import refuse_licences
from merger.card.render import rehearse
from merger.card.templates import own_templates
from merger.errors import MismatchError, ModelError, Problem, RecipeError, Span, VerificationError
from merger.evaluation.evaluate import check_evaluation, check_memory
from merger.lock.lock import Pin, lock, pins
from merger.lock.locked import LockedRecipe
from merger.methods.registry import methods
from merger.planning.lockfile import Lock, changed_models, other_meaning, other_numbers, other_plan, read_lock
from merger.planning.plan import Plan, make_plan
from merger.recipe.blocks.evaluate import named_files, without_files
from merger.recipe.model import ModelRef, Recipe
from merger.recipe.parse import parse
from merger.run.extras import MEASURING, refuse_missing
from merger.run.options import Options, budget_of, stated_destination
from merger.runtime import refusal
from merger.safety import limits
from merger.safety.names import hub_path
from merger.safety.paths import ANYWHERE, read_named
from merger.stores.folder import FolderStore
from merger.stores.kept import is_kept
from merger.stores.ports import Kept, Store
from merger.stores.resolve import Library, stores

LOCK_SUFFIX = ".lock.yaml"
_SUFFIXES = (".yaml", ".yml")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe's file, or the recipe in a lock file, and check all that can be known without its models.

    Raises:
        RecipeError: with every problem of the file.
    """
    text = _text(path)
    if is_lock(path):
        return recipe_of(read_lock(text, str(path)), str(path))
    return parse_text(text, str(path))


def any_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """The recipe of a file, or of a mapping as its YAML would be.

    Raises:
        RecipeError: with every problem of it.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_text(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True), "recipe")
    return read_recipe(Path(os.path.expanduser(recipe)))


def options_for(options: Options | None, to: str | None) -> Options:
    """The options with a destination, if one is named."""
    chosen = options or Options()
    return chosen if to is None else replace(chosen, to=to)


def named_recipes(name: str, folder: str = ".") -> list[str]:
    """The recipes that a word names: a file, whatever it is; those in and below a folder; those that fit a pattern.

    Args:
        name: relative to the folder.
        folder: where it is looked for.

    Returns:
        Their names, relative to the folder. A word that can be nothing but a file's name is that name.
    """
    place = os.path.join(folder, name)
    if os.path.isfile(place) or not (os.path.isdir(place) or glob.has_magic(name)):
        return [name]
    pattern = os.path.join(glob.escape(name), "**", "*") if os.path.isdir(place) else name
    fitting = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    return [each for each in fitting if each.endswith(_SUFFIXES) and not each.endswith(LOCK_SUFFIX)]


def parse_text(text: str, name: str) -> Recipe:
    """The same for a recipe that stands in no file; positions in errors begin with `name`.

    Raises:
        RecipeError: with every problem of the text.
    """
    return parse(text, name, methods())


def _text(path: Path) -> str:
    try:
        return limits.read_limited_text(path, limits.LOCK if is_lock(path) else limits.RECIPE, RecipeError)
    except OSError as error:
        raise refusal(f"{path}: cannot be read", error, RecipeError) from None
    except UnicodeDecodeError:
        raise RecipeError(Problem(f"{path}: cannot be read (it is not UTF-8 text)")) from None


def extraction_recipe(settings: Mapping[str, Any], dtype: str | None = None, license: str | None = None) -> Recipe:
    """The recipe that takes what a fine-tune changed, as an adapter of its base.

    Args:
        settings: what stands under ``extract_lora:``; None for what is not given.
        dtype: the adapter's, in place of the fine-tune's.

    Raises:
        RecipeError: with every problem of these settings.
    """
    content: dict[str, Any] = {
        "extract_lora": {key: value for key, value in settings.items() if value not in (None, False)}
    }
    content |= {"dtype": dtype} if dtype else {}
    content |= {"publish": {"license": license}} if license else {}
    return parse(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "extract-lora", methods())


def conversion_recipe(model: str, kinds: Sequence[str], license: str | None = None) -> Recipe:
    """The recipe that brings a model into GGUF as it is, or with no types into safetensors.

    Raises:
        RecipeError: with every problem of these settings.
    """
    publish = {"gguf": list(kinds), "safetensors": False} if kinds else {}
    publish |= {"license": license} if license else {}
    content = {"merge_method": "passthrough", "models": [{"model": model}], **({"publish": publish} if publish else {})}
    return parse(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "convert", methods())


def is_lock(path: Path) -> bool:
    """Whether a file is a lock file, by its name."""
    return path.name.endswith(LOCK_SUFFIX)


def recipe_of(held: Lock, path: str) -> Recipe:
    """The recipe that stands in a lock file; its positions count from the recipe's own first line.

    Of the machine it names its models' folders alone. Templates and files to measure on lie where the lock was made;
    here the same path may be anything, and what is read of it would be published.

    Raises:
        RecipeError: with every problem of the recipe.
    """
    recipe = parse(held.recipe, f"{path} (recipe)", methods())
    publish, evaluate, notes = replace(recipe.publish, gguf=held.gguf), recipe.evaluate, list[Problem]()
    if publish.template is not None and hub_path(publish.template) is None:
        notes.append(_left_out(publish.template, publish.template_at, "publish.template"))
        publish = replace(publish, template=None, left_out=publish.template)
    if evaluate is not None:
        notes += [_left_out(*named) for named in named_files(evaluate)]
        evaluate = without_files(evaluate)
    warnings = (*recipe.warnings, *notes)
    return replace(recipe, path=path, publish=publish, evaluate=evaluate, warnings=warnings)


def _left_out(name: str, at: Span | None, where: str) -> Problem:
    what = f"{name!r} is left out: a lock names nothing of the machine but the folders of its models"
    return Problem(what, at, where, "run the recipe in place of its lock; merger card is given templates by --template")


def plan(recipe: Recipe, options: Options, held: Mapping[str, Pin] | None = None) -> tuple[Plan, Library]:
    """Pin the recipe's models and decide what will be made; no tensor's byte is read.

    A lock file beside the recipe, of mine.yaml mine.lock.yaml, says at which commits. A recipe that was read from a
    lock file is planned as it was then, or refused.

    Args:
        held: the commits in place of those of the lock file beside the recipe.

    Raises:
        ModelError, RecipeError, MismatchError, BudgetError, VerificationError: as the steps do.
    """
    recipe = with_gguf(recipe, options)
    refuse_missing(recipe, options.device, but=() if options.part is None else MEASURING)
    check_evaluation(recipe, options.root)
    path = Path(recipe.path)
    if is_lock(path) and path.is_file():
        written = read_lock(_text(path), recipe.path)
        options = replace(options, measured=kept_of(recipe, written))
        store = stores_of(recipe, options, options.root)
        planned = _plan_as_locked(written, recipe, store, options)
    else:
        store = stores_of(recipe, options, options.root)
        pinned = pins_beside(recipe, options) if held is None else held
        locked = lock(recipe, store, pinned, options.allow_pickle, options.tensors, measured=options.measured)
        planned = make_plan(locked, methods(), budget_of(recipe, options), options.seed)
    refuse_licences(planned, published=hub_path(stated_destination(recipe, options)) is not None)
    if options.part is None:
        check_memory(planned, options.max_memory)
    return with_templates(planned, store, options.root), store


def stores_of(recipe: Recipe, options: Options, root: Path | None) -> Library:
    """Where the recipe's models are, and its templates, if they are on the Hub; `root` as in `stores`."""
    template = recipe.publish.template or ""
    paths = [*(ref.path for ref in recipe.references), *([template] if hub_path(template) else [])]
    return stores(paths, options.cache, options.read_token, root, [*options.measured.values()])


def kept_of(recipe: Recipe, held: Lock) -> dict[ModelRef, Kept]:
    """What was measured on the way of a merge, as its lock calls it: it is not measured again."""
    named = zip(reversed(recipe.statistics), reversed(held.names), strict=False)
    return {ref: Kept(name) for ref, name in named if ref in recipe.measures and is_kept(name)}


def with_templates(planned: Plan, store: Store, root: Path | None = ANYWHERE) -> Plan:
    """The plan with the recipe's own templates for the card, which are tried; see `own_templates`."""
    templates = own_templates(planned.locked.recipe.publish, store, FolderStore(root))
    tried = replace(planned, locked=replace(planned.locked, templates=templates))
    rehearse(tried, methods())
    return tried


def with_gguf(recipe: Recipe, options: Options) -> Recipe:
    """The recipe with the types of GGUF files that the options name, if they do.

    Raises:
        RecipeError: a stream, which has room for one file at a time, is asked for with several.
    """
    made = replace(recipe, publish=replace(recipe.publish, gguf=options.gguf)) if options.gguf else recipe
    if options.stream and len(made.publish.gguf) + made.publish.safetensors > 1:
        what = "--stream sends one file at a time, and GGUF files are made beside others"
        raise RecipeError(Problem(what, made.publish.gguf_at, "publish.gguf", "leave out --stream, or gguf"))
    return made


def _plan_as_locked(held: Lock, recipe: Recipe, store: Library, options: Options) -> Plan:
    for word, said, was in (("seed", options.seed, held.seed), ("shard-size", options.shard_size, held.shard_bytes)):
        if said not in (None, was):
            what = f"--{word} {said} makes another merge than the lock's, which has {was}"
            raise RecipeError(Problem(what, hint=f"leave out --{word}, or run the recipe in place of its lock"))
    locked = lock(recipe, store, held.pins, options.allow_pickle, options.tensors, held.names, options.measured)
    if changed := changed_models(locked, held, store.checksum):
        raise ModelError(changed)
    planned = planned_again(held, locked, options)
    if other := other_plan(planned, held) or other_numbers(planned, held):
        raise VerificationError(other)
    return planned


def planned_again(held: Lock, locked: LockedRecipe, options: Options) -> Plan:
    """The plan of a lock's recipe, with the lock's seed, shard size and format.

    Raises:
        RecipeError, MismatchError, BudgetError: as the plan does.
        VerificationError: an earlier version made it, and the recipe means something else by now.
    """
    budget = replace(budget_of(locked.recipe, options), shard_bytes=held.shard_bytes)
    try:
        planned = make_plan(locked, methods(), budget, held.seed, held.format)
    except (RecipeError, MismatchError):
        if earlier := other_meaning(None, held):
            raise VerificationError(earlier) from None
        raise
    if earlier := other_meaning(planned, held):
        raise VerificationError(earlier)
    return planned


def lock_path(recipe: Path) -> Path:
    """Where the lock file of a recipe lies, if it has one."""
    return recipe.with_suffix(LOCK_SUFFIX)


def pins_beside(recipe: Recipe, options: Options) -> dict[str, Pin]:
    """The commits by model that the lock file beside a recipe says, if it has one.

    Raises:
        RecipeError: it is no lock file, or may not be read.
    """
    path = lock_path(Path(recipe.path))
    if not os.path.lexists(path):
        return {}
    try:
        return pins(
            read_named(str(path), options.root or path.parent, limits.LOCK).decode("utf-8", "replace"), str(path)
        )
    except ModelError as error:
        raise RecipeError(error.problems) from None
