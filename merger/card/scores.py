"""Scores in the card: a table for people, and `model-index` for the Hub. Not here: the measuring (engine)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merger.plan.scores import Score

_NAME_LENGTH = 100


def told(scores: Sequence[Score], name: str) -> dict[str, Any]:
    """The card's parts `evaluation` and `metadata` for a merge of this name; nothing without scores."""
    if not scores:
        return {}
    models = list(dict.fromkeys(score.model for score in scores))
    found = {(score.task, score.metric, score.model): score for score in scores}
    kinds = dict.fromkeys((score.task, score.metric) for score in scores)
    rows = [[_what(found, kind, models), *(_cell(found.get((*kind, model))) for model in models)] for kind in kinds]
    columns = ["measured", *("this model" if model is None else model for model in models)]
    note = f"Measured before it was published: {'; '.join(_notes(scores))}."
    index = _index([score for score in scores if score.model is None], name)
    return {
        "evaluation": {"columns": columns, "rows": rows, "note": note},
        "metadata": {"model-index": index},
    }


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
    told: dict[tuple[str, str], dict[str, None]] = {}
    for score in scores:
        told.setdefault((score.task, score.detail), {})[score.model or "this model"] = None
    several = {task for task, _ in told if sum(other == task for other, _ in told) > 1}
    whose = {key: f" of {', '.join(models)}" if key[0] in several else "" for key, models in told.items()}
    return tuple(f"{task}{whose[task, detail]}: {detail}" for task, detail in told)


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
    return [{"name": name.rsplit("/", 1)[-1], "results": list(results.values())}]
