"""What a card says of a mixture of experts, in place of a merge method. Not here: the card (render)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from merger.card.lineage import shown
from merger.plan.plan import Plan
from merger.recipe.mixture import METHOD
from merger.recipe.model import Expert, Mixture

TITLE = "Mixture of experts"
_ROUTERS = {
    "hidden": "computed from the experts' prompts: the hidden state of each prompt's last token, as {base} makes it",
    "hidden_avg": "computed from the experts' prompts: the mean hidden state of each prompt, as {base} makes it",
    "cheap_embed": "computed from the experts' prompts: the mean of their tokens' embeddings in {base}",
    "random": "drawn by chance, from a normal distribution: it knows nothing until it is trained",
    "uniform_random": "drawn by chance, from a uniform distribution: it knows nothing until it is trained",
}
_ROUTERS["hidden_last"] = _ROUTERS["hidden"]


@dataclass(frozen=True)
class Told:
    """What the card's template asks of a method, in plain text."""

    name: str
    title: str
    summary: str
    explanation: str
    paper: None = None


def told(planned: Plan, mixture: Mixture) -> Told:
    """The mixture in sentences: its experts, its router, and what is the base model's."""
    base = shown(planned.locked.donor)
    per_token = planned.config["num_experts_per_tok"]
    sentences = [
        f"Each layer has {len(mixture.experts)} experts: the MLPs of {_named(planned, mixture.experts)}.",
        *(f"Every token also goes through the MLPs of {_name(planned, one)}." for one in mixture.shared_experts),
        f"A router sends each token through {per_token} of them; everything else is that of {base}.",
        f"The router was {_ROUTERS[mixture.gate_mode].format(base=base)}.",
        *(change for one in (*mixture.experts, *mixture.shared_experts) for change in _changes(planned, one)),
    ]
    return Told(METHOD, TITLE, sentences[0], " ".join(sentences))


def _named(planned: Plan, experts: tuple[Expert, ...]) -> str:
    counts = Counter(_name(planned, expert) for expert in experts)
    return ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in counts.items())


def _name(planned: Plan, expert: Expert) -> str:
    return shown(planned.locked.model(expert.source_model))


def _changes(planned: Plan, expert: Expert) -> Iterator[str]:
    if expert.noise_scale:
        yield f"To the MLPs of {_name(planned, expert)} noise of deviation {expert.noise_scale:g} was added."
    if expert.residual_scale != 1:
        yield f"The output of the MLPs of {_name(planned, expert)} was multiplied by {expert.residual_scale:g}."
