"""The recipe's `evaluate:` block, carried out: the models' files are laid out, and each is measured by itself.

It comes after the merge and before anything is published. Not here: the measuring (engine), and what a card says of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merger.errors import BudgetError, EvaluationError, ModelError, Problem, RecipeError, Span
from merger.evaluation.budget import Score, evaluation_memory
from merger.lock.locked import LockedModel, display_name
from merger.models.checkpoint import index_name
from merger.models.gguf.header import find_gguf
from merger.models.side_files import side_files
from merger.planning.plan import Plan
from merger.recipe.blocks.evaluate import HUB_FILE, PERPLEXITY_AT, named_files
from merger.recipe.model import Evaluate, Perplexity, Recipe
from merger.safety.limits import TEXT
from merger.safety.numbers import DOWN, UP, size
from merger.safety.paths import ANYWHERE, read_named, regular
from merger.stores.ports import Content, Session, Ticket, write
from merger.stores.resolve import Library
from merger.stores.scratch import Scratch, sweep

if TYPE_CHECKING:
    from merger.evaluation.process import Text, Wanted

_READ_AHEAD_BYTES = 64 << 20
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Measuring:
    """A model is being measured: None is the merge."""

    model: str | None


@dataclass(frozen=True)
class Measured:
    """A model was measured."""

    scores: tuple[Score, ...]


def check_evaluation(recipe: Recipe, root: Path | None = ANYWHERE) -> None:
    """Find what is wrong with the block without reading a model.

    Args:
        recipe: the recipe.
        root: inside of which the files that it names have to lie (safety.paths).

    Raises:
        RecipeError: a file that it names is not there, or may not be read.
    """
    if recipe.evaluate is None:
        return
    if problems := [problem for named in named_files(recipe.evaluate) for problem in _unread(*named, root)]:
        raise RecipeError(problems)


def _unread(path: str, at: Span | None, where: str, root: Path | None) -> Iterator[Problem]:
    try:
        regular(path, root)
    except ModelError as error:
        yield from (replace(problem, at=at, where=where) for problem in error.problems)


def check_memory(planned: Plan, allowed: int | None) -> None:
    """Refuse a result that is too large to be measured here.

    Raises:
        BudgetError: it is.
    """
    needed, wanted = evaluation_memory(planned), planned.locked.recipe.evaluate
    if wanted is None or allowed is None or needed <= allowed:
        return
    smaller = "write dtype: bfloat16 under it, or " if wanted.dtype == "float32" else ""
    what = f"measuring the result needs about {size(needed, UP)} of memory, and {size(allowed, DOWN)} are allowed"
    raise BudgetError(Problem(what, wanted.at, "evaluate", f"{smaller}take it out and measure on a larger machine"))


def disk(planned: Plan, staged: bool) -> int:
    """The bytes of disk that copies of the models take while one of them is measured.

    Args:
        planned: the merge.
        staged: whether the merge itself has to be copied from where it was sent.
    """
    wanted = planned.locked.recipe.evaluate
    if wanted is None:
        return 0
    copied = [planned.size] if staged else []
    if wanted.parents:
        copied += [model.checkpoint.nbytes for model in planned.locked.merged if model.located.commit is not None]
    return max(copied, default=0)


def prepare_measuring(
    planned: Plan, device: str, token: str | bool | None, root: Path | None = ANYWHERE
) -> Wanted | None:
    """All that measuring takes, at hand before the merge is begun; None where nothing is measured.

    Args:
        planned: the merge.
        device: where models are run.
        token: the reader's, for texts on the Hub.
        root: inside of which texts and tasks of this machine have to lie (safety.paths).

    Raises:
        RecipeError: a text or a task is not there.
        ModelError: a text on the Hub cannot be read.
        EvaluationError: what measures cannot be asked.
    """
    wanted = planned.locked.recipe.evaluate
    if wanted is None:
        return None
    check_evaluation(planned.locked.recipe, root)
    if packed := [model.name for model in planned.locked.merged if wanted.parents and find_gguf(model.located.files)]:
        what = f"{', '.join(packed)}: a parent in GGUF is not measured"
        raise RecipeError(Problem(what, wanted.at, "evaluate.parents", "write parents: false"))
    from merger.evaluation.process import Wanted, unknown_tasks

    if unknown := unknown_tasks(wanted.tasks) if wanted.tasks else []:
        what = f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}"
        raise RecipeError(
            Problem(what, wanted.at, "evaluate.tasks", "see lm_eval ls tasks, or name the YAML file of one")
        )
    names = _names([text.text for text in wanted.perplexity])
    texts = tuple(_text(text, name, token, root) for text, name in zip(wanted.perplexity, names, strict=True))
    return Wanted(texts, wanted.tasks, wanted.limit, wanted.dtype, device, planned.threads)


def _names(texts: Sequence[str]) -> list[str]:
    """What they are called: of a file as little of its path as tells it from the others, of the Hub's the repo too."""
    hub = [HUB_FILE.fullmatch(text) for text in texts]
    parts = [(*found["repo"].split("/"), *found["file"].split("/")) if found else Path(text).parts
             for found, text in zip(hub, texts, strict=True)]  # fmt: skip
    whole = [len(one) if found else 1 for found, one in zip(hub, parts, strict=True)]
    for more in range(max(map(len, parts), default=0)):
        names = ["/".join(one[-least - more :]) for one, least in zip(parts, whole, strict=True)]
        if len(set(names)) == len(names):
            return names
    return list(texts)


def _text(wanted: Perplexity, name: str, token: str | bool | None, root: Path | None) -> Text:
    """The beginning of a text."""
    from merger.evaluation.process import Text

    text = read_source(wanted.text, wanted.at, PERPLEXITY_AT, token, root)[: wanted.limit]
    digest = f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Text(name, text, digest, wanted.window, wanted.stride)


def read_source(name: str, at: Span | None, where: str, token: str | bool | None, root: Path | None) -> str:
    """The text of a file of this machine, or of one on the Hub, as `HUB_FILE` has them.

    Args:
        name: the file.
        at, where: where a recipe names it.
        token: the reader's, for the Hub.
        root: inside of which files of this machine have to lie (safety.paths).

    Raises:
        RecipeError: it is not there, may not be read, or is no text.
        ModelError: it cannot be read on the Hub.
    """
    found = HUB_FILE.fullmatch(name)
    try:
        return (_of_hub(found, token) if found else read_named(name, root, TEXT)).decode("utf-8")
    except UnicodeDecodeError:
        what = f"{name!r} is not UTF-8 text"
        raise RecipeError(Problem(what, at, where, "save it as UTF-8, or name another")) from None
    except ModelError as error:
        told = [replace(problem, at=at, where=where) for problem in error.problems]
        raise (ModelError(told) if found else RecipeError(told)) from None


def _of_hub(named: re.Match[str], token: str | bool | None) -> bytes:
    from merger.stores.hub.store import hub_file

    return hub_file(named["repo"], named["file"], named["revision"], bool(named["datasets"]), token)


def measure(
    wanted: Wanted,
    planned: Plan,
    files: Mapping[str, Content],
    store: Library,
    session: Session,
    on_event: Callable[[Measuring | Measured], object],
) -> tuple[Score, ...]:
    """Measure the merge, then its parents if the recipe says so.

    Args:
        wanted: what is measured.
        planned: the merge.
        files: its small files by name.
        store: where its parents are.
        session: where its shards are.
        on_event: is told of each model.

    Raises:
        EvaluationError: a model cannot be measured; the merge waits.
    """
    evaluate = planned.locked.recipe.evaluate
    assert evaluate is not None, "something is measured only where the recipe says so"
    found: list[Score] = []

    def try_out(folder: Path, model: str | None) -> None:
        on_event(Measuring(model))
        scores = _score(folder, model, wanted, evaluate)
        on_event(Measured(scores))
        found.extend(scores)

    with temporary_folder() as folder:
        session.export(folder)
        write_files(folder, files)
        try_out(folder, None)
    for model in planned.locked.merged if evaluate.parents else ():
        if model.ref.adapter is not None:
            continue  # its files are those of the model without it
        if model.located.commit is None:
            try_out(Path(model.located.where), display_name(model))
            continue
        with temporary_folder() as folder:
            _copy(model, store, folder)
            try_out(folder, display_name(model))
    return tuple(found)


def write_files(folder: Path, files: Mapping[str, Content]) -> None:
    """Put small files into a folder.

    Raises:
        ModelError: one of them cannot be read.
    """
    for name, content in files.items():
        write(content, folder, name)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder, which the next run removes if this one is killed."""
    sweep()
    scratch = Scratch()
    try:
        yield scratch.folder()
    finally:
        scratch.close()


def _score(folder: Path, model: str | None, wanted: Wanted, asked: Evaluate) -> tuple[Score, ...]:
    from merger.evaluation.process import score_model

    try:
        return score_model(folder, model, wanted)
    except EvaluationError as error:
        (problem,) = error.problems
        what = f"{model or 'the merge'} cannot be measured: {problem.what}"
        waits = "the merge is made and waits: the same command goes on from there, or without evaluate: publishes it"
        hint = f"{problem.hint}; {waits}" if problem.hint else waits
        raise EvaluationError(Problem(what, asked.at, "evaluate", hint)) from None


def _copy(model: LockedModel, store: Library, folder: Path) -> None:
    """A parent's files from afar: its tensors, and what transformers needs beside them."""
    located, config = model.located, model.checkpoint.config
    weights = sorted({tensor.file for tensor in model.checkpoint.tensors.values()})
    small = [name for name in ("config.json", index_name(model.checkpoint.stem)) if name in located.files]
    beside = [*small, *side_files(located.files, config)]
    write_files(folder, dict(zip(beside, store.taken([(located, name) for name in beside]), strict=True)))
    tickets = [Ticket(located, name, 0, located.files[name].size) for name in weights]
    with closing(store.reader(tickets, _READ_AHEAD_BYTES)) as reader:
        for number, ticket in enumerate(tickets):
            with (folder / ticket.file).open("wb", buffering=0) as file:
                for start in range(0, ticket.stop, _PIECE_BYTES):
                    part = bytearray(min(_PIECE_BYTES, ticket.stop - start))
                    reader.read(number, start, memoryview(part))
                    file.write(part)
