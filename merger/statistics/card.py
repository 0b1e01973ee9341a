"""The card of statistics: what they are, of what, and how a recipe names them. Not here: the cards of merges (card)."""

from __future__ import annotations

import yaml

from merger.card.escape import code, fence, prose
from merger.lock.locked import LockedModel
from merger.lock.statistics import Statistics
from merger.methods.registry import Statistic, named_method
from merger.models.side_files import LOCK_NAME

_WORDS: dict[Statistic, str] = {
    "fisher": "The diagonal of the empirical Fisher information: for each entry the squared gradient of a sequence's "
    "log-likelihood, by predicted token, in the mean over sequences.",
    "gram": "Gram matrices: for the inputs X of each linear layer XᵀX, in the mean over tokens. Layers that are fed "
    "the same (q, k and v; gate and up) share one, under the first's name.",
    "activations": "For each input of each linear layer its mean magnitude over tokens. Layers that are fed the same "
    "(q, k and v; gate and up) share them, under the first's name.",
}
_METHODS: dict[Statistic, str] = {"fisher": "fisher", "gram": "regmean", "activations": "aim"}


def statistics_card(said: Statistics, name: str, model: LockedModel) -> str:
    """The text of README.md.

    Args:
        said: what the lock says.
        name: ``owner/name``, or the folder's last part.
        model: what was measured.
    """
    measured, on_hub = said.models[0].model, model.located.commit is not None
    front = {
        **({"base_model": [model.located.name]} if on_hub else {}),
        **({"license": model.licence} if model.licence else {}),
        "tags": ["merger", "statistics", said.kind],
    }
    method = named_method(_METHODS[said.kind])
    base = {"base_model": measured} if method.of_base else {}
    recipe = yaml.safe_dump({"models": [{"model": measured, "statistics": name}], **base}, sort_keys=False)
    facts = {
        "model": " + ".join(code(parent.model) for parent in said.models),
        "commit": ", ".join(code(parent.commit) for parent in said.models if parent.commit),
        "data": code(said.data),
        "tokens": f"{said.tokens:,}, in sequences of {said.length:,}",
        "SHA-256 of the tokens' ids": code(said.digest),
        "seed": str(said.seed),
        "fed by the layers of the merge": code(said.merge) if said.merge else "",
    }
    first, *rows = [f"| {what} | {fact} |" for what, fact in facts.items() if fact]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
            f"# {prose(name)}",
            "",
            f"{_WORDS[said.kind]} Measured by merger; `{LOCK_NAME}` holds all that it takes to do it again.",
            "",
            first,
            "|---|---|",
            *rows,
            "",
            f"In a recipe, for `merge_method: {method.name}`:",
            "",
            fence(recipe, "yaml"),
            "",
        ]
    )
