"""A model with the LoRA adapter that is added to it, which may have been trained after the model was given more tokens.

Not here: what the adapter's files hold (models.adapter), and finding them (lock).
"""

from __future__ import annotations

from dataclasses import replace

from merger.errors import ModelError, Problem
from merger.lock.locked import LockedModel
from merger.models.architecture import is_head
from merger.models.checkpoint import Checkpoint
from merger.models.config import untied, with_vocabulary
from merger.models.lora.changes import changes

_OTHER_ADAPTER = "take the model that it was trained on, or merge both with PEFT's merge_and_unload and name the result"


def with_adapter(model: LockedModel, adapter: LockedModel) -> LockedModel:
    """The model with what the adapter makes of it.

    Raises:
        ModelError: they do not fit each other.
    """
    assert adapter.lora is not None
    held = model.checkpoint
    found = changes(adapter.lora, held.tensors, held.config)
    scaled = next((name for name, change in found.items() if change.tokens and name in model.scaled), None)
    if scaled is not None:
        raise ModelError(Problem(f"it has single rows of {scaled}, which is quantised", hint=_OTHER_ADAPTER))
    return _with_rows(replace(model, adapter=adapter, changes=found))


def _with_rows(model: LockedModel) -> LockedModel:
    """The model with the head, and with as many rows for its tokens, as its adapter has for it.

    Raises:
        ModelError: not all that has a row for each token has the same number, or no tokenizer tells the new ones.
    """
    held = model.checkpoint
    whole = {name: change.whole for name, change in model.changes.items() if change.whole is not None}
    like = {name: tensor for name in whole if (tensor := held.tensors.get(name) or model.embedding) is not None}
    new = {name: replace(tensor, name=name, shape=whole[name].shape) for name, tensor in like.items()}
    config = untied(held.config) if any(is_head(name) for name in new) and model.is_tied else held.config
    brought = tuple(name for name in new if name not in held.tensors)
    grown = replace(model, checkpoint=Checkpoint({**held.tensors, **new}, config, held.stem), brought=brought)
    _check_rows(model, grown)
    if grown.token_rows == model.token_rows:
        return grown
    sized = with_vocabulary(config, model.token_rows or 0, grown.token_rows or 0)
    return replace(grown, checkpoint=replace(grown.checkpoint, config=sized))


def _check_rows(model: LockedModel, grown: LockedModel) -> None:
    """See `_with_rows`; `grown` is the model with what its adapter has."""
    tensors = [tensor for tensor in model.checkpoint.tensors.values() if model.by_token(tensor)]
    names = [*(tensor.name for tensor in tensors), *grown.brought]
    rows = {name: grown.checkpoint.tensors[name].shape[0] for name in names if not grown.is_tied_head(name)}
    if len(set(rows.values())) > 1:
        told = " and ".join(f"{count:,} rows in {name}" for name, count in rows.items())
        raise ModelError(Problem(f"with the adapter there are {told}: not one for each token", hint=_OTHER_ADAPTER))
    if grown.token_rows != model.token_rows and grown.speaker is grown:
        what = f"the adapter's embedding has {grown.token_rows:,} rows, the model's {model.token_rows:,}"
        hint = "put the tokenizer with which it was trained into the adapter's folder"
        raise ModelError(Problem(f"{what}, and no tokenizer beside the adapter tells its tokens", hint=hint))
