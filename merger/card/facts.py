"""What card, lock and all surfaces say of a merge, as facts: a plan's summary, mixture, scores, the lock's content.

No path of the machine that made it stands in them, but for those in the recipe's own text. Not here: the card for
people (render), and how a lock file is written and read (planning.lockfile).
"""

from __future__ import annotations

import math
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from typing import Any, TypeVar

import yaml

from merger.card.licences import Judgement, judge
from merger.evaluation.budget import Score
from merger.lock.locked import LockedModel, display_name
from merger.lock.parents import Checksum, Parent
from merger.models import vocabulary
from merger.models.checkpoint import SUFFIX, index_name
from merger.models.licence import licence_files
from merger.models.lora.adapter import CONFIG as ADAPTER_CONFIG
from merger.models.side_files import CARD_NAME, EVALUATED_NAME
from merger.planning.lockfile import Lock
from merger.planning.plan import Plan
from merger.recipe.blocks.mixture import METHOD
from merger.recipe.model import Expert, Mixture
from merger.runtime import PACKAGE
from merger.safety.names import HUB, hub_path, is_repo
from merger.safety.numbers import size
from merger.stores.ports import FileInfo

_Key = TypeVar("_Key")
_Row = TypeVar("_Row")
_ALIKE = 8


def fold_alike(rows: Sequence[_Row], kind: Callable[[_Row], object]) -> list[_Row | int]:
    """Rows to show: of more than eight neighbours of a kind the ends, and between them how many more there are."""
    found = list[_Row | int]()
    for _, run in groupby(rows, kind):
        alike = list(run)
        found += alike if len(alike) <= _ALIKE else [alike[0], len(alike) - 2, alike[-1]]
    return found


@dataclass(frozen=True)
class PlanSummary:
    """What a person wants to know of a plan, beside the numbers that it holds; each found out when first asked for.

    Args:
        plan: the plan.
        to: where its result goes; None: that is not said yet.
        looked: what a sample of the tensors said against it, where one was read.
    """

    plan: Plan
    to: str | None = None
    looked: tuple[str, ...] = ()

    @cached_property
    def methods(self) -> Mapping[str, int]:
        """How many tensors each method makes; copying is among them."""
        return Counter(job.kind for job in self.plan.jobs)

    @cached_property
    def models(self) -> Sequence[LockedModel | int]:
        """Those that are read; of the many checkpoints of a run the ends, and how many are between them."""
        return fold_alike(self.plan.locked.models, lambda model: (model.licence, model.located.commit is None))

    @property
    def disk(self) -> str:
        """What it takes where its result goes; in a folder and on the Hub as long as that is not said."""
        folder, hub = (size(self.plan.disk(staged=staged)) for staged in (False, True))
        if self.to is None:
            return f"{folder} for a folder, {hub} for the Hub"
        return folder if hub_path(self.to) is None else hub

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Those of the result."""
        return tuple(dict.fromkeys(job.dtype for job in self.plan.jobs))

    @cached_property
    def copied(self) -> Mapping[str, Sequence[str]]:
        """The tensors that are copied although the recipe names a method, by reason."""
        return _group((job.why, job.name) for job in self.plan.jobs if job.why is not None)

    @cached_property
    def left_out(self) -> Mapping[tuple[str, str], Sequence[str]]:
        """The tensors that nothing is made of, by model and reason."""
        names = [display_name(model) for model in self.plan.locked.models]
        return _group(((names[each.model], each.why), each.tensor) for each in self.plan.left_out)

    @cached_property
    def left_beside(self) -> Mapping[str, Sequence[str]]:
        """The base's files beside its tensors that the result lacks, by reason."""
        return _group((why, name) for name, why in self.plan.left_beside.items())

    @cached_property
    def licence(self) -> Judgement:
        """The result's licence."""
        return judge(self.plan, hub_path(self.to or ""))

    @cached_property
    def context(self) -> int | None:
        """How many tokens the result looks back on, as its config says."""
        config = self.plan.config
        told = (part.get(key) for part in (config, config.get("text_config") or {}) for key in _CONTEXT)
        return next((count for count in told if isinstance(count, int)), None)

    @cached_property
    def doubts(self) -> tuple[str, ...]:
        """Sentences on what is likely not meant."""
        located = [model.located for model in self.plan.locked.models]
        moved = dict.fromkeys(f"{each.moved} is now {each.where}" for each in located if each.moved)
        found = [*moved, *_same_models(self.plan), *_strange_adapters(self.plan), *self.plan.doubts, *self.looked]
        return (*found, *exposed_models(self.plan, self.to))

    @cached_property
    def tokens(self) -> str | None:
        """How many rows there are, whose tokenizer it is, and how many of its model's are gone; None: as they were."""
        tokens = self.plan.tokens
        if tokens is None:
            return None
        of = display_name(self.plan.locked.numbered(tokens.source))
        more = f" and {tokens.new:,} tokens more" if tokens.new else ""
        cut = f"; {tokens.cut:,} rows of {of} behind its last token are left out (rows: base keeps them)"
        return f"{tokens.rows:,} rows: the tokenizer of {of}{more}{cut if tokens.cut else ''}"


_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


def _group(pairs: Iterable[tuple[_Key, str]]) -> dict[_Key, list[str]]:
    """The names by reason, both as they come."""
    groups: dict[_Key, list[str]] = {}
    for why, name in pairs:
        groups.setdefault(why, []).append(name)
    return groups


# ---- doubts ---------------------------------------------------------------------------------------------------------


def exposed_models(planned: Plan, to: str | None) -> list[str]:
    """Sentences about private models of which all will read who may read the result.

    Args:
        to: where it goes; None: that is not said yet, and may be the Hub.
    """
    if planned.locked.recipe.publish.private or hub_path(to or HUB) is None:
        return []
    models = planned.locked.models
    found = [each for model in models for each in (model, model.adapter) if each is not None and each.located.private]
    what = "is private, and the result is public, unless its repo is there already and private: card and lock tell its"
    keep = "write publish: {private: true} for a private result"
    names = dict.fromkeys(model.located.name for model in found)
    return [f"{name} {what} name, commit, licence and checksums; {keep}" for name in names]


def _same_models(planned: Plan) -> list[str]:
    """Models of the recipe that are one and the same."""
    found: dict[object, str] = {}
    doubts = []
    for model in planned.locked.parents:
        files = {tensor.file: model.located.files[tensor.file].sha256 for tensor in model.checkpoint.tensors.values()}
        known = None not in files.values()
        own: object = frozenset(files.values()) if known else (model.located.where, model.located.commit)
        identity = (own, None if model.adapter is None else model.adapter.located)
        if identity in found:
            doubts.append(f"{found[identity]} and {model.name} are the same model")
        found.setdefault(identity, model.name)
    return doubts


def _strange_adapters(planned: Plan) -> list[str]:
    """Adapters that are added to another model than the one that they name as theirs, or merged with strangers."""
    if planned.locked.recipe.merges_adapters:
        trained = dict.fromkeys(model.lora.model for model in planned.locked.models if model.lora is not None)
        on = [name for name in trained if name is not None]
        return [f"the adapters were trained on different models: {', '.join(on)}"] if len(on) > 1 else []
    found: dict[str, None] = {}
    for model in planned.locked.models:
        named = model.adapter.lora.model if model.adapter is not None and model.adapter.lora is not None else None
        if model.adapter is not None and named and not _means(named, model):
            what = f"{model.adapter.name} was trained on {named}, and the recipe adds it to {model.located.name}"
            found[what] = None
    return list(found)


def _means(named: str, model: LockedModel) -> bool:
    """Whether an adapter's config speaks of this model: by its repo id, or where either is a folder, its last part."""
    on_hub = model.located.commit is not None and is_repo(named)
    theirs, ours = named.lower().rstrip("/"), (model.ref.path if on_hub else model.located.name).lower()
    return theirs == ours if on_hub else theirs.split("/")[-1] == ours.split("/")[-1]


# ---- the lock file --------------------------------------------------------------------------------------------------


_MADE_WITH = (PACKAGE, "numpy", "numba", "huggingface_hub")
_HASHED_FOLDERS = 1_000_000_000
"""Up to so many bytes of models in folders are read once more for their SHA-256, in a second; of more it is unknown."""


def lock_file(planned: Plan, output: Mapping[str, FileInfo], checksum: Checksum) -> str:
    """The text of the lock file: inputs with commits and checksums, seed, plan, versions, recipe, and what came out.

    Args:
        output: the files that were written.
        checksum: finds out the SHA-256 of a model's file, if need be by reading it; None: it is not known.
    """
    models = planned.locked.models
    folders = [model for model in models if model.located.commit is None]
    in_folders = sum(model.located.files[name].size for model in folders for name in _read(planned, model))
    used = (*_MADE_WITH, *(["torch"] if "torch" in sys.modules else []))
    unhashed = folders if in_folders > _HASHED_FOLDERS else []
    return Lock(
        plan=planned.hash,
        identity=planned.identity,
        format=planned.format,
        seed=planned.seed,
        shard_bytes=planned.shard_bytes,
        made_with={"python": platform.python_version()} | dict(zip(used, map(version, used), strict=True)),
        recipe=planned.locked.recipe.text,
        models=tuple(_parent(planned, model, None if model in unhashed else checksum) for model in models),
        output=output,
        gguf=planned.locked.recipe.publish.gguf,
    ).text()


def _read(planned: Plan, model: LockedModel) -> list[str]:
    """The files of a model that are read for the merge."""
    tensors = {tensor.file for tensor in model.checkpoint.tensors.values()}
    taken = [name for name, number in planned.texts.taken.items() if planned.locked.models[number] is model]
    index = (index_name(model.checkpoint.stem + SUFFIX),) if len(tensors) > 1 else ()
    licences = licence_files(model.located.files)
    looked_at = model.located.commit is None and model.lora is None and planned.locked.recipe.lora is None
    told = vocabulary.told_by(model.located.files) if looked_at else ()
    wanted = {*tensors, *model.texts, *told, *taken, *index, *licences, "config.json", ADAPTER_CONFIG, CARD_NAME}
    return sorted(name for name in wanted & model.located.files.keys() if model.located.files[name].made is None)


def _parent(planned: Plan, model: LockedModel, checksum: Checksum) -> Parent:
    located = model.located
    known = checksum or (lambda model, file: None)
    files = {name: FileInfo(located.files[name].size, known(located, name)) for name in _read(planned, model)}
    now, measured = located.name if located.moved else None, model.statistics
    on = {} if measured is None else {"statistics": measured.kind, **measured.measured_on}
    return Parent(display_name(model), located.commit, model.licence, files, now, on)


# ---- mixtures -------------------------------------------------------------------------------------------------------


TITLE = "Mixture of experts"
_ROUTERS = {
    "hidden": "computed from prompts: the hidden state of the last token of each, as {base} makes it",
    "hidden_avg": "computed from prompts: the mean hidden state of each, as {base} makes it",
    "cheap_embed": "computed from prompts: the mean embedding of their tokens in {base}",
    "random": "drawn by chance, from a normal distribution: it knows nothing until it is trained",
    "uniform_random": "drawn by chance, from a uniform distribution: it knows nothing until it is trained",
}
_ROUTERS["hidden_last"] = _ROUTERS["hidden"]


@dataclass(frozen=True)
class MixtureFacts:
    """What the card's template asks of a method, in plain text."""

    name: str
    title: str
    summary: str
    explanation: str
    formula: None = None
    paper: None = None


def mixture_facts(planned: Plan, mixture: Mixture) -> MixtureFacts:
    """The mixture in sentences: its experts, its router, and what is the base model's."""
    base = display_name(planned.locked.config_model)
    per_token = next(planned.config[key] for key in ("num_experts_per_tok", "top_k_experts") if key in planned.config)
    counts = Counter(_name(planned, expert) for expert in mixture.experts)
    named = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in counts.items())
    sentences = [
        f"Each layer has {len(mixture.experts)} experts: the MLPs of {named}.",
        *(f"Every token also goes through the MLPs of {_name(planned, one)}." for one in mixture.shared_experts),
        f"A router sends each token through {per_token} of them; everything else is that of {base}.",
        f"The router was {_ROUTERS[mixture.gate_mode].format(base=base)}.",
        *(change for one in (*mixture.experts, *mixture.shared_experts) for change in _changes(planned, one)),
    ]
    return MixtureFacts(METHOD, TITLE, sentences[0], " ".join(sentences))


def _name(planned: Plan, expert: Expert) -> str:
    return display_name(planned.locked.model(expert.source_model))


def _changes(planned: Plan, expert: Expert) -> Iterator[str]:
    if expert.noise_scale:
        yield f"To the MLPs of {_name(planned, expert)} noise of deviation {expert.noise_scale:g} was added."
    if expert.residual_scale != 1:
        yield f"The output of the MLPs of {_name(planned, expert)} was multiplied by {expert.residual_scale:g}."


# ---- scores ---------------------------------------------------------------------------------------------------------


_NAME_LENGTH = 100
_HUB_PAGES = "https://huggingface.co"


def score_facts(scores: Sequence[Score], name: str) -> dict[str, Any]:
    """The card's parts `evaluation` and `metadata` for a merge of this name; nothing without scores."""
    if not scores:
        return {}
    models = list(dict.fromkeys(score.model for score in scores))
    found = {(score.task, score.metric, score.model): score for score in scores}
    kinds = dict.fromkeys((score.task, score.metric) for score in scores)
    rows = [[_what(found, kind, models), *(_cell(found.get((*kind, model))) for model in models)] for kind in kinds]
    columns = ["measured", *("this model" if model is None else model for model in models)]
    note = f"Measured before it was published: {'; '.join(_notes(scores))}."
    return {
        "evaluation": {"columns": columns, "rows": rows, "note": note, "verdict": _verdict(scores)},
        "metadata": {"model-index": _index([score for score in scores if score.model is None], name)},
    }


def _verdict(scores: Sequence[Score]) -> list[str]:
    """Sentences: for each test how the merge does beside the best of its parents."""
    parents = [score for score in scores if score.model is not None]
    return [
        _compared(mine, [each for each in parents if (each.task, each.metric) == (mine.task, mine.metric)])
        for mine in _headlines(scores)
    ]


def _headlines(scores: Sequence[Score]) -> list[Score]:
    """One score of the merge for each test: the last, which of several is the one that other tokens do not change."""
    return list({score.task: score for score in scores if score.model is None}.values())


def _compared(mine: Score, parents: Sequence[Score]) -> str:
    told = f"{mine.task}: {mine.metric} {_cell(mine)}"
    way = f"{'higher' if mine.higher else 'lower'} is better"
    if not parents:
        return f"Measured on {told} ({way}); its parents were not."
    best = (max if mine.higher else min)(parents, key=lambda score: score.value)
    ahead = (mine.value - best.value) * (1 if mine.higher else -1)
    if abs(ahead) <= 2 * math.hypot(mine.error or 0, best.error or 0):
        word = "As good as its best parent"
    else:
        word = f"{'Better' if ahead > 0 else 'Worse'} than its best parent by {abs(ahead):.2g}"
    return f"{word} on {told}, of {best.model} {_cell(best)} ({way})."


def eval_results(scores: Sequence[Score], repo: str | None) -> str | None:
    """What the Hub reads of scores on its own data sets (``.eval_results/*.yaml``); None where there is none.

    Args:
        repo: where the merge lies on the Hub, with the file that says how; None: in a folder.
    """
    source = {"source": {"url": f"{_HUB_PAGES}/{repo}/blob/main/{EVALUATED_NAME}", "name": "Merger"}} if repo else {}
    found = [
        {
            "dataset": {"id": score.dataset, "task_id": score.task},
            "value": score.value,
            **source,
            "notes": f"{score.metric}; {score.detail}",
        }
        for score in _headlines(scores)
        if score.is_of_hub
    ]
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True) if found else None


def _what(found: Mapping[tuple[str, str, str | None], Score], kind: tuple[str, str], models: list[str | None]) -> str:
    score = next(found[*kind, model] for model in models if (*kind, model) in found)
    return f"{score.task}: {score.metric} ({'higher' if score.higher else 'lower'} is better)"


def _cell(score: Score | None) -> str:
    """A number with as many digits as it is worth looking at."""
    if score is None:
        return "none"
    return f"{score.value:.4g}" if score.error is None else f"{score.value:.3f} ± {score.error:.3f}"


def _notes(scores: Sequence[Score]) -> tuple[str, ...]:
    """How each task was tried; said once for all models with which it was tried in the same way."""
    score_facts: dict[tuple[str, str], dict[str, None]] = {}
    for score in scores:
        score_facts.setdefault((score.task, score.detail), {})[score.model or "this model"] = None
    several = {task for task, _ in score_facts if sum(other == task for other, _ in score_facts) > 1}
    whose = {key: f" of {', '.join(models)}" if key[0] in several else "" for key, models in score_facts.items()}
    return tuple(f"{task}{whose[task, detail]}: {detail}" for task, detail in score_facts)


def _index(scores: Sequence[Score], name: str) -> list[dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for score in scores:
        entry = {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": {"type": score.dataset[:_NAME_LENGTH], "name": score.task[:_NAME_LENGTH]},
            "metrics": [],
        }
        metric = {"type": score.metric, "value": score.value, "name": score.metric}
        results.setdefault(score.task, entry)["metrics"].append(metric)
    return [{"name": name.rsplit("/", 1)[-1], "results": list(results.values())}] if results else []
