"""What a merge was made of, for machines: the lock file that lies beside the result.

No path of the machine that made it stands in it. Not here: the card for people (render).
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import yaml

from merger.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from merger.checkpoints.shard import Written
from merger.plan.lock import LockedModel
from merger.plan.plan import FORMAT, Plan

_MADE_WITH = ("hub-merger", "torch", "numpy")


def shown(model: LockedModel) -> str:
    """A model's name for readers: as the recipe writes it on the Hub, of a folder its last part."""
    own = str(replace(model.ref, adapter=None)) if model.located.commit else model.located.name
    return own if model.adapter is None else f"{own}+{shown(model.adapter)}"


def lock_file(planned: Plan, shards: tuple[Written, ...]) -> str:
    """The text of the lock file: inputs with commits and checksums, seed, plan, versions, and what came out."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "plan": planned.hash,
        "identity": planned.identity,
        "seed": planned.seed,
        "made_with": {package: version(package) for package in _MADE_WITH},
        "models": [_model(model) for model in planned.locked.models],
        "output": [{"file": shard.name, "size": shard.size, "sha256": shard.sha256} for shard in shards],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _model(model: LockedModel) -> dict[str, Any]:
    tensors = {tensor.file for tensor in model.checkpoint.tensors.values()}
    files = {
        name: info
        for name, info in model.located.files.items()
        if name in tensors or name in ("config.json", ADAPTER_CONFIG)
    }
    return {
        "model": shown(model),
        "commit": model.located.commit,
        "licence": model.licence,
        "files": [
            {"file": name, "size": info.size} | ({"sha256": info.sha256} if info.sha256 else {})
            for name, info in sorted(files.items())
        ],
    }
