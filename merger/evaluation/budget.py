"""What was measured of a model's use, and the memory that measuring takes. Not here: the measuring (engine)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from merger.planning.plan import Plan
from merger.safety.limits import MEASURED, parse_json
from merger.safety.names import is_repo

_MERGING_BYTES, LOADING_BYTES, _HARNESS_BYTES = 420 << 20, 700 << 20, 500 << 20
"""What this process keeps, what torch and transformers take beside a model, and lm-evaluation-harness."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_LOGITS = 3
"""How many tables of a float32 for each token of the window and of the vocabulary there are at once."""

_TASK_WINDOW = 2048


@dataclass(frozen=True)
class Score:
    """A number that says how good a model is at something.

    Args:
        model: the parent's name; None for the merge.
        task: what it was tried on, such as ``arc_easy`` or the name of a text.
        metric: what the number is, such as ``acc`` or ``perplexity``.
        value: the number.
        error: its standard error, where that is known.
        higher: whether a higher number is better.
        detail: how it was tried, for who wants to do it again.
        dataset: the data set's name on the Hub, else what is told in place of it.
    """

    model: str | None
    task: str
    metric: str
    value: float
    error: float | None
    higher: bool
    detail: str
    dataset: str

    @property
    def is_of_hub(self) -> bool:
        """Whether it was tried on a data set of the Hub: of texts the data set is only a name."""
        return "lm-evaluation-harness" in self.detail and is_repo(self.dataset) and "/" in self.dataset


def scores_text(scores: Iterable[Score]) -> str:
    """Them as text that lies beside a result."""
    return json.dumps([asdict(score) for score in scores], indent=2) + "\n"


def read_scores(text: str) -> tuple[Score, ...]:
    """What such a text says.

    Raises:
        ValueError, TypeError: it is none.
    """
    return tuple(Score(**item) for item in parse_json(text, MEASURED))


def evaluation_memory(planned: Plan) -> int:
    """About how many bytes it takes to measure the plan's result; 0 where nothing is measured.

    A process of its own holds the whole model, in the dtype that the recipe names.
    """
    wanted = planned.locked.recipe.evaluate
    if wanted is None:
        return 0
    longest = max((text.window for text in wanted.perplexity), default=0)
    running = running_bytes(planned.config, longest, bool(wanted.tasks))
    return _MERGING_BYTES + LOADING_BYTES + planned.entries * _ITEM_BYTES[wanted.dtype] + running


def running_bytes(config: Mapping[str, Any], tokens: int, tasks: bool) -> int:
    """About how many bytes it takes to run a model: most of it is what is said of the next token.

    Args:
        config: the model's.
        tokens: how many are run at once.
        tasks: whether lm-evaluation-harness does, too, with a request of its own length.
    """
    vocabulary, (held, longest) = config.get("vocab_size"), (_HARNESS_BYTES, _TASK_WINDOW) if tasks else (0, 0)
    return held + _LOGITS * 4 * max(tokens, longest) * (vocabulary if isinstance(vocabulary, int) else 0)
