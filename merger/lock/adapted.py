"""A model with the LoRA adapter that is added to it, which may have been trained after the model was given more tokens.

Not here: what the adapter's files hold (models.adapter), and finding them (lock).
"""

from __future__ import annotations

from dataclasses import replace

from merger.errors import ModelError, Problem
from merger.lock.locked import LockedModel
from merger.models.architecture import is_head
from merger.models.checkpoint import Checkpoint, TensorInfo
from merger.models.config import with_vocabulary, without_tie
from merger.models.lora.changes import changes
from merger.models.lora.pipeline import of_model

_OTHER_ADAPTER = "take the model that it was trained on, or merge both with PEFT's merge_and_unload and name the result"


def with_adapter(model: LockedModel, adapter: LockedModel) -> LockedModel:
    """The model with what the adapter makes of it.

    Raises:
        ModelError: they do not fit each other.
    """
    assert adapter.lora is not None
    held = model.checkpoint
    lora = of_model(adapter.lora, held.tensors, held.config, model.located.name)
    found = changes(lora, held.tensors, held.config)
    stored = next((name for name, change in found.items() if change.tokens and name in model.quantised), None)
    if stored is not None:
        raise ModelError(Problem(f"it has single rows of {stored}, which is quantised", hint=_OTHER_ADAPTER))
    return _with_rows(replace(model, adapter=adapter, changes=found))


def _with_rows(model: LockedModel) -> LockedModel:
    """The model with the head, and with as many rows for its tokens, as its adapter has for it.

    Raises:
        ModelError: not all that has a row for each token has the same number, or no tokenizer tells the new ones.
    """
    held, heads = model.checkpoint, [name for name in model.changes if model.is_tied and is_head(name)]
    whole = {name: change.whole for name, change in model.changes.items() if change.whole is not None}
    like = {name: of for name in dict.fromkeys((*whole, *heads)) if (of := _like(model, name)) is not None}
    new = {name: replace(of, name=name, shape=whole.get(name, of).shape) for name, of in like.items()}
    stored = {name: model.quantised[of.name] for name, of in like.items() if of.name in model.quantised}
    brought = tuple(name for name in new if name not in held.tensors)
    config = without_tie(held.config) if heads else held.config
    checkpoint = Checkpoint({**held.tensors, **new}, config, held.stem)
    grown = replace(model, checkpoint=checkpoint, quantised={**model.quantised, **stored}, brought=brought)
    _check_rows(model, grown)
    if grown.token_rows == model.token_rows:
        return grown
    sized = with_vocabulary(config, model.token_rows or 0, grown.token_rows or 0)
    return replace(grown, checkpoint=replace(grown.checkpoint, config=sized))


def _like(model: LockedModel, name: str) -> TensorInfo | None:
    """What the model has in the place of a tensor that its adapter changes: of a head that is the embedding, that."""
    own = model.checkpoint.tensors.get(name)
    return model.embedding if own is None or (model.is_tied and is_head(name)) else own


def _check_rows(model: LockedModel, grown: LockedModel) -> None:
    """See `_with_rows`; `grown` is the model with what its adapter has."""
    tensors = [tensor for tensor in model.checkpoint.tensors.values() if model.by_token(tensor)]
    names = [*(tensor.name for tensor in tensors), *grown.brought]
    rows = {name: grown.checkpoint.tensors[name].shape[0] for name in names if not grown.is_tied_head(name)}
    if len(set(rows.values())) > 1:
        told = " and ".join(f"{count:,} rows in {name}" for name, count in rows.items())
        raise ModelError(Problem(f"with the adapter there are {told}: not one for each token", hint=_OTHER_ADAPTER))
    if grown.token_rows != model.token_rows and grown.tokenizer_model is grown:
        what = f"the adapter's embedding has {grown.token_rows:,} rows, the model's {model.token_rows:,}"
        hint = "put the tokenizer with which it was trained into the adapter's folder"
        raise ModelError(Problem(f"{what}, and no tokenizer beside the adapter tells its tokens", hint=hint))
