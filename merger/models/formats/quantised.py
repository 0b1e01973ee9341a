"""Checkpoints that hold their tensors in few bits: what is needed to have them back, or why they cannot be had.

Numbers of eight bits beside which scales lie (fp8 by blocks, rows or whole tensors, and symmetric int8) are read as
what they stand for: stored number times scale. So are the packed formats of FORMATS; others are refused. Nothing is
ever merged as it is stored. Not here: the packed formats (fours, integers, bitsandbytes), and reading (engine).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merger.errors import ModelError, Problem
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.models.config import Config, quantisation, stated_dtype, without_quantisation
from merger.models.formats import bitsandbytes, fours, integers
from merger.models.formats.gguf import gguf_format
from merger.models.formats.packed import PackedFormat, PackedTensor, Parts
from merger.safety.limits import STATE, parse_json

Fetch = Callable[[Sequence[TensorInfo]], Iterable[bytes]]

FORMATS: Mapping[str, PackedFormat] = {
    form.name: form for form in (*fours.FORMATS, *integers.FORMATS, *bitsandbytes.FORMATS)
}
"""The packed formats that are read, in the order in which they are tried."""


def format_of(form: str) -> PackedFormat:
    """The format of this name; a type of GGUF where no other is called so."""
    return FORMATS[form] if form in FORMATS else gguf_format(form)


SCALED = ("F8_E4M3", "F8_E5M2", "I8")
"""The dtypes of stored numbers that a scale turns into what they stand for."""

_SCALES = ("_scale_inv", "_scale")
"""What follows the name of a scaled tensor in that of its scales: factors both, whatever the first one is called."""

_ASIDE = ("input_scale", "activation_scale", "output_scale", "input_global_scale", "k_scale", "v_scale", "q_scale")
"""Scales of what flows through a quantised model: a model whose tensors are read back has no use for them."""

_ZERO = "_zero_point"
_PACKED = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "weight_packed": "packed numbers", "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes", "SCB": "bitsandbytes", "codebooks": "AQLM", "W_q": "HQQ",
    "pre_quant_scale": "ModelOpt with scaled inputs", "bitmask": "sparse bit masks",
}  # fmt: skip
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4", "aqlm": "AQLM", "hqq": "HQQ"}
_READABLE = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_USUAL_BLOCK = (128, 128)


@dataclass(frozen=True)
class Scaled:
    """A tensor that is stored as numbers and scales.

    Args:
        numbers: the stored numbers.
        scales: what they are multiplied by: each scale stands for a block of them.
        block: how many rows and columns such a block has.
    """

    numbers: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]

    @property
    def form(self) -> str:
        """What readers know it by."""
        return f"{self.numbers.dtype} with scales"


@dataclass(frozen=True)
class Unpacked:
    """A checkpoint as it would be had it never been quantised.

    Args:
        tensors: its tensors; of one that is scaled dtype and shape are those of what it stands for.
        config: its config, which no longer says that it is quantised.
        quantised: the tensors that are stored as numbers and scales, or packed, by name.
        aside: the names of stored tensors that only a quantised model has a use for.
    """

    tensors: Mapping[str, TensorInfo]
    config: Config
    quantised: Mapping[str, Scaled | PackedTensor] = field(default_factory=dict)
    aside: tuple[str, ...] = ()


def unpack_checkpoint(tensors: Mapping[str, TensorInfo], config: Config, fetch: Fetch) -> Unpacked:
    """The checkpoint without its quantisation.

    Args:
        tensors: its tensors as they are stored.
        config: its config.
        fetch: reads small ones that say how others are stored.

    Raises:
        ModelError: its tensors are stored in a way that is not read here.
    """
    said, dtype = quantisation(config), stated_dtype(config)
    if said and said.get("transform_config"):
        raise _refusal("a method that rotates weights (transform_config)", _HINT)
    packed = dict(_find_packed(tensors, said or {}, fetch))
    parts = {part.name for found in packed.values() for part in found.parts.values()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    _refuse_packed(rest, said, packed)
    scaled = dict(_find_scaled(rest, said))
    if not packed and not scaled and said is None:
        return Unpacked(tensors, config)
    scales = {of.scales.name for of in scaled.values()}
    aside = tuple(name for name in rest if name not in scales and name.rpartition(".")[2] in _ASIDE)
    codes = {found.codes.name: replace(found.codes, name=name, shape=found.shape) for name, found in packed.items()}
    gone = {*parts, *scales, *aside} - codes.keys()
    kept = [codes.get(name, tensor) for name, tensor in tensors.items() if name not in gone]
    stored: Mapping[str, Scaled | PackedTensor] = {**scaled, **packed}
    named = {each.name: replace(each, dtype=dtype) if each.name in stored else each for each in kept}
    return Unpacked(named, without_quantisation(config), stored, aside)


def _find_packed(
    tensors: Mapping[str, TensorInfo], said: Mapping[str, Any], fetch: Fetch
) -> Iterator[tuple[str, PackedTensor]]:
    """The tensors that are stored in several, as the first format reads them that knows their shapes.

    Raises:
        ModelError: the names are those of a format, and none knows the shapes.
    """
    found, unread = dict[str, PackedTensor](), dict[str, Mapping[str, TensorInfo]]()
    for form in FORMATS.values():
        grouped = dict(_group(form, tensors, said))
        states = _states(form, grouped, fetch)
        for name, parts in grouped.items():
            described = form.describe(parts, {**said, "state": states.get(name, {})})
            if described is None:
                unread.setdefault(name, parts)
            elif name not in found:
                found[name] = PackedTensor(form.name, parts, *described)
                if name in tensors and tensors[name] not in parts.values():
                    raise ModelError(Problem(f"holds {name} twice: as it is, and in {form.name}", hint=_HINT))
    for name in unread.keys() - found.keys():
        raise _unread(name, unread[name])
    return iter(found.items())


def _group(
    form: PackedFormat, tensors: Mapping[str, TensorInfo], said: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """By the name of the tensor that they are together the stored ones by role."""
    ending = form.endings[form.mark]
    if form.methods and said.get("quant_method") not in form.methods:
        return
    for stem in (name.removesuffix(ending) for name in tensors if name.endswith(ending)):
        parts = {role: tensors[stem + end] for role, end in form.endings.items() if stem + end in tensors}
        if not form.endings.keys() - parts.keys() - set(form.optional):
            yield stem + form.tensor, parts


def _states(form: PackedFormat, grouped: Mapping[str, Parts], fetch: Fetch) -> Mapping[str, Mapping[str, Any]]:
    """What tensors that hold JSON say, by the names of those that they speak of; of others nothing."""
    said = {name: parts[form.state] for name, parts in grouped.items() if form.state in parts}
    small = {name: part for name, part in said.items() if part.nbytes <= STATE.most}
    found = dict(zip(small, map(_state, fetch(list(small.values()))), strict=True))
    return {name: state for name, state in found.items() if isinstance(state, dict)}


def _state(text: bytes) -> Any:
    try:
        return parse_json(text, STATE)
    except ValueError:
        return None


def _unread(name: str, parts: Mapping[str, TensorInfo]) -> ModelError:
    first, *others = ((role, f"{list(part.shape)} of {part.dtype}") for role, part in parts.items())
    told = " and ".join(f"{role} {what}" for role, what in others)
    return ModelError(Problem(f"stores {name} as {first[1]} with {told}, which is not read here", hint=_HINT))


def _refuse_packed(
    tensors: Mapping[str, TensorInfo], said: Mapping[str, Any] | None, packed: Mapping[str, PackedTensor]
) -> None:
    """Refuse what no format reads, beside the tensors that one does."""
    method = "" if said is None else str(said.get("quant_method", ""))
    known = next((_PACKED[last] for name in tensors if (last := name.rpartition(".")[2]) in _PACKED), None)
    if any(name + _ZERO in tensors for name in (*tensors, *packed)):
        raise _refusal("a method with zero points", _HINT)
    if any(name.endswith("_scale_2") for name in tensors):
        raise _refusal(str((said or {}).get("quant_algo") or "NVFP4"), _HINT)
    if any(name.endswith(".scales") and f"{name[:-7]}.biases" in tensors for name in tensors):
        raise _refusal("MLX", _HINT)
    if known is not None or (said is not None and not packed and method not in _READABLE):
        raise _refusal(_NAMES.get(method) or known or method or "an unnamed method", _HINT)


_HINT = "merge the model that it was quantised from, in bfloat16, float16 or float32, and quantise the result"


def _refusal(method: str, hint: str) -> ModelError:
    return ModelError(
        Problem(f"is quantised by {method}; its stored numbers must not be merged as they are", hint=hint)
    )


def _find_scaled(tensors: Mapping[str, TensorInfo], said: Mapping[str, Any] | None) -> Iterator[tuple[str, Scaled]]:
    for name, tensor in tensors.items():
        if tensor.dtype not in SCALED:
            continue
        scales = next((tensors[name + end] for end in _SCALES if name + end in tensors), None)
        if scales is not None:
            yield name, Scaled(tensor, scales, _block(tensor, scales, said or {}))
        elif said is not None:
            what = f"stores {name} as {tensor.dtype} without scales beside it"
            raise ModelError(Problem(what, hint=_HINT))


def _block(tensor: TensorInfo, scales: TensorInfo, said: Mapping[str, Any]) -> tuple[int, int]:
    """How many rows and columns of a tensor share a scale.

    Raises:
        ModelError: the shapes of numbers and scales do not fit each other.
    """
    if len(tensor.shape) == 2 and len(scales.shape) <= 2 and scales.dtype in (*FLOATS, "F8_E8M0"):
        counts = (*scales.shape, 1, 1)[:2]
        sides = zip(tensor.shape, counts, _stated_block(said), strict=True)
        down, across = (_share(side, count, stated) for side, count, stated in sides)
        if down and across:
            return down, across
    raise _unread(tensor.name, {"numbers": tensor, "scales": scales})


def _share(side: int, count: int, stated: int) -> int:
    """How many of a side's rows, or columns, one of `count` scales stands for; 0 where they do not fit."""
    if count in (1, side):
        return max(1, side) if count == 1 else 1
    return stated if -(-side // stated) == count else 0


def _stated_block(said: Mapping[str, Any]) -> tuple[int, int]:
    """The block that the config gives, under either of the keys that are in use."""
    groups = said.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    found = [said.get("weight_block_size"), *(part.get("block_structure") for part in weights if part)]
    pairs = [tuple(pair) for pair in found if isinstance(pair, list) and len(pair) == 2]
    return next((pair for pair in pairs if all(type(side) is int and side > 0 for side in pair)), _USUAL_BLOCK)
