"""The recipes that both programs are given, and what each of them makes of one.

Not here: mergekit's environment (mergekit_env), the checkpoints (models), and what is compared (parity, precision).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mergekit_env
import models
import yaml
from torch import Tensor

from merger.planning.plan import Plan
from merger.run.options import Options
from merger.run.pipeline import merge
from merger.run.prepare import plan, read_recipe

ZOO = [Path(__file__).resolve().parents[1] / "examples" / "zoo" / name for name in ("base", "kjv", "python")]

GRADIENT = [0.2, 0.9, 0.5]
FILTERED = [{"filter": "mlp", "value": [0.3, 0.8]}, {"filter": "self_attn", "value": 0.6}, {"value": 0.4}]
MODELS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "weighted": [{"weight": FILTERED}, {"weight": GRADIENT}],
    "sparse": [{"weight": FILTERED, "density": 0.6}, {"weight": GRADIENT, "density": [0.3, 0.8]}],
    "single": [{"weight": 1.0, "density": 0.6}],
    "plain": [{}, {}],
    "one": [{}],
}
"""What stands with each fine-tune: gradients over the layers and numbers by filter."""

_BASES = ("linear", "nuslerp", "multislerp", "karcher", "passthrough")


@dataclass(frozen=True)
class Setup:
    """How a method is compared.

    Args:
        method: the merge method.
        models: which of `MODELS`.
        settings: the method's own.
        base: whether a base model is named; None: where the method needs one.
        kinds: what is merged.
    """

    method: str
    models: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: bool | None = None
    kinds: Sequence[str] = ("tiny", "zoo")

    def recipe(self, parents: Sequence[Path], dtype: str | None) -> dict[str, Any]:
        """The recipe, parents[0] being the base; without a dtype the output has the base's."""
        listed = [
            {"model": str(parent), "parameters": dict(own)} if own else {"model": str(parent)}
            for parent, own in zip(parents[1:], MODELS[self.models], strict=False)
        ]
        named = self.method not in _BASES if self.base is None else self.base
        parts = {
            "base_model": str(parents[0]) if named else None,
            "parameters": dict(self.settings) or None,
            "dtype": dtype,
        }
        return {"merge_method": self.method, "models": listed} | {key: part for key, part in parts.items() if part}

    @property
    def told(self) -> str:
        """The settings in a table."""
        own = [f"{name}: {str(value).lower()}" for name, value in self.settings.items() if not isinstance(value, list)]
        return ", ".join(["base_model"] * bool(self.base) + own)


FIELD: Sequence[Setup] = (
    Setup("linear", "weighted"),
    Setup("slerp", "one", {"t": FILTERED}),
    Setup("nuslerp", "weighted"),
    Setup("multislerp", "weighted"),
    Setup("karcher", "plain"),
    Setup("task_arithmetic", "weighted", {"lambda": 0.9}),
    Setup("ties", "sparse", {"lambda": 0.9}),
    Setup("breadcrumbs", "sparse", {"gamma": 0.05}),
    Setup("breadcrumbs_ties", "sparse", {"gamma": 0.05}),
    Setup("sce", "plain", {"select_topk": 0.5}),
    Setup("ram", "plain"),
    Setup("ramplus_tl", "plain"),
    Setup("model_stock", "plain"),
    Setup("nearswap", "one", {"t": 0.001}),
    Setup("arcee_fusion", "one", kinds=("tiny", "tiny x 100", "zoo")),
    Setup("passthrough", "one", {"scale": GRADIENT}),
)
"""The deterministic methods that recipes of the field name."""

RANDOM: Sequence[Setup] = (
    Setup("dare_linear", "sparse"),
    Setup("dare_ties", "sparse"),
    Setup("della_linear", "sparse", {"epsilon": 0.1}),
    Setup("della", "sparse", {"epsilon": 0.1, "normalize": False}),
)
"""Those that draw numbers."""

FURTHER: Sequence[Setup] = (
    Setup("linear", "weighted", {"normalize": False}, kinds=("tiny",)),
    Setup("nuslerp", "weighted", base=True, kinds=("tiny",)),
    Setup("nuslerp", "weighted", {"nuslerp_flatten": False}, kinds=("tiny",)),
    Setup("nuslerp", "weighted", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, kinds=("tiny",)),
    Setup("multislerp", "weighted", base=True, kinds=("tiny",)),
    Setup("multislerp", "weighted", {"normalize_weights": False}, kinds=("tiny",)),
    Setup("karcher", "plain", {"max_iter": 2}, base=True, kinds=("tiny",)),
    Setup("task_arithmetic", "weighted", {"normalize": True}, kinds=("tiny",)),
    Setup("ties", "sparse", {"normalize": False, "rescale": True}, kinds=("tiny",)),
    Setup("breadcrumbs", "sparse", {"gamma": 0.05, "normalize": True, "rescale": True}, kinds=("tiny",)),
    Setup("breadcrumbs_ties", "sparse", {"gamma": 0.05, "normalize": True, "rescale": True}, kinds=("tiny",)),
    Setup("sce", "plain", kinds=("tiny",)),
    Setup("ramplus_tl", "plain", {"r": 0.5, "alpha": 1.5, "epsilon": 0.0005}, kinds=("tiny",)),
    Setup("model_stock", "plain", {"filter_wise": True}, kinds=("tiny",)),
)
"""The field's methods once more, with other settings."""

NEWER: Sequence[Setup] = (
    Setup("consensus_ta", "weighted", {"lambda": 0.9}),
    Setup("consensus_ties", "sparse"),
    Setup("emr", "weighted"),
    Setup("expo", "one", {"alpha": 0.3}),
    Setup("iso_c", "weighted"),
    Setup("iso_cts", "weighted"),
    Setup("knots", "sparse"),
    Setup("magmax", "weighted"),
    Setup("pcb", "weighted", {"density": 0.3}),
    Setup("subspace_boosting", "weighted"),
    Setup("svc", "weighted"),
    Setup("tsvm", "weighted"),
)
"""Methods that mergekit does not have."""


def ours(made: Mapping[str, Any], folder: Path, seed: int = 0) -> tuple[Plan, dict[str, Tensor]]:
    """What we make of a recipe, and by which plan.

    Raises:
        MergerError: the recipe or the models are refused.
    """
    options = Options(to=str(folder / "ours"), seed=seed, force=True)
    planned, store = plan(read_recipe(_written(made, folder)), options)
    merge(planned, store, options)
    return planned, models.read(folder / "ours")


def theirs(made: Mapping[str, Any], folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """What mergekit makes of it.

    Raises:
        RuntimeError: it fails.
    """
    mergekit_env.merge(_written(made, folder), folder / "theirs", seed)
    return models.read(folder / "theirs")


def _written(made: Mapping[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(made), sort_keys=False))
    return path
