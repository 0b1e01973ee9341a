"""LoRA adapters of diffusion pipelines, as diffusers and kohya's scripts save them, and which modules they change.

One file may hold parts for several of a pipeline's models, of which one is merged at a time; names are those of the
model's files, those with `_` for each point, or those of the model as it was published first. Not here: what PEFT saves
beside adapter_config.json (adapter), and whether the parts fit (changes).
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merger.errors import ModelError, Problem
from merger.models.checkpoint import TensorInfo
from merger.models.config import is_diffusion
from merger.models.lora.adapter import (
    DAMAGED,
    MERGE_FIRST,
    SHOWN,
    Adapter,
    config_problems,
    dims,
    read_module,
    read_strengths,
)
from merger.models.lora.modules import AdaptedModule

USUAL = "pytorch_lora_weights.safetensors"
"""How diffusers calls the file; others are called by what they draw."""

ALPHA = ".alpha"
SAID = "lora_adapter_metadata"
"""Where diffusers writes the settings of each model, in the file's header."""

_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
_DRAWING = ("transformer", "unet")
_OF_KOHYA = {"lora_unet": "unet", "lora_transformer": "transformer", "lora_te": _TEXT[0], "lora_te1": _TEXT[0],
             "lora_te2": _TEXT[1], "lora_te3": _TEXT[2], "diffusion_model": "transformer"}  # fmt: skip
_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.default)?\.weight$"
)
_OLD = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(?=down|up)")
_MODEL = re.compile(
    r"^(lora_unet|lora_transformer|lora_te[123]?)_|^(text_encoder(?:_[23])?|transformer|unet|diffusion_model)\."
)
_OTHERS = {
    "lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT",
    "lora_mid": "LoRA with a core tensor (lora_mid)", ".diff": "whole differences (diff)", "on_input": "IA3",
}  # fmt: skip


def holds_lora(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether some of a file's tensors are of an adapter, read or not, and not of one that PEFT saved with a config."""
    names = [_OLD.sub(_new_name, name) for name in tensors if not name.startswith("base_model.")]
    return any(_PART.match(name) or any(key in name for key in _OTHERS) for name in names)


def read_pipeline(tensors: Mapping[str, TensorInfo], alphas: Mapping[str, bytes], said: Mapping[str, str]) -> Adapter:
    """The adapter that a file holds for the models of a pipeline; its modules go by the names that the file has.

    Args:
        tensors: the file's tensors by name.
        alphas: the bytes of those whose names end with `ALPHA`: numbers that the products are multiplied by.
        said: the texts in the file's header.

    Raises:
        ModelError: it is no LoRA, of a kind that is not built, or damaged.
    """
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _PART.match(_OLD.sub(_new_name, name))
        if match:
            parts[match["module"]]["lora_A" if match["part"].endswith(("A", "down")) else "lora_B"] = tensor
        elif name not in alphas:
            kind = next((of for key, of in _OTHERS.items() if key in name), None)
            what = f"is an adapter by {kind}" if kind else f"holds {name}"
            raise ModelError(Problem(f"{what}; LoRA is the only kind that is built", hint=MERGE_FIRST))
    models = {name: _model_of(name) for name in parts}
    numbers = {name.removesuffix(ALPHA): _number(tensors[name], raw) for name, raw in alphas.items()}
    strengths = _strengths(parts, models, numbers, said)
    found = {name: _module(name, held, *strengths[name]) for name, held in parts.items()}
    problems = [module for module in found.values() if isinstance(module, Problem)]
    if problems or not found:
        raise ModelError(problems[:SHOWN] or [Problem("holds no LoRA", hint=DAMAGED)])
    whose = {one.name: f"it changes the pipeline's {models[name]}" for name, of in parts.items() for one in of.values()}
    aside = {**whose, **dict.fromkeys(alphas, "a number by which a product is multiplied")}
    modules = {name: module for name, module in found.items() if isinstance(module, AdaptedModule)}
    return Adapter(None, modules, {}, aside=aside, pipeline=models)


def _new_name(match: re.Match[str]) -> str:
    return f".to_{match[1]}{'.0' if match[1] == 'out' else ''}.lora."


def _model_of(name: str) -> str:
    """Which of a pipeline's models a module is of; what draws, where it does not say."""
    match = _MODEL.match(name)
    called = (match[1] or match[2]) if match else _DRAWING[0]
    return _OF_KOHYA.get(called, called)


def _number(tensor: TensorInfo, raw: bytes) -> float:
    """A tensor's only number."""
    form = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}.get(tensor.dtype)
    raw, form = (b"\0\0" + raw, "<f") if tensor.dtype == "BF16" else (raw, form)
    if form is None or tensor.entries != 1 or not abs(number := struct.unpack(form, raw)[0]) < 1e6:
        raise ModelError(Problem(f"{tensor.name} holds no number of a usual size", hint=DAMAGED))
    return float(number)


def _strengths(
    parts: Mapping[str, Mapping[str, TensorInfo]],
    models: Mapping[str, str],
    numbers: Mapping[str, float],
    said: Mapping[str, str],
) -> Mapping[str, tuple[int, float]]:
    """The rank and the scale of each module: alpha / rank as its alpha, else as the header, else as 1."""
    ranks = {name: held["lora_A"].shape[0] if "lora_A" in held else 0 for name, held in parts.items()}
    found = {name: (rank, numbers.get(name, rank) / max(1, rank)) for name, rank in ranks.items()}
    try:
        settings: Any = json.loads(said.get(SAID, "{}"))
        for model in dict.fromkeys(models.values()):
            start = f"{model}."
            own = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
            config = {"peft_type": "LORA", **own}
            if own and (problems := list(config_problems(config))):
                raise ModelError(problems[:SHOWN])
            names = [name for name in parts if own and models[name] == model and name not in numbers]
            short = {name: name.removeprefix(start) for name in names}
            of = read_strengths(config, list(short.values())) if names else {}
            found |= {name: of[of_model] for name, of_model in short.items()}
    except (ValueError, AttributeError, RecursionError):
        raise ModelError(Problem(f"the header's {SAID} cannot be read", hint=DAMAGED)) from None
    return found


def _module(name: str, held: Mapping[str, TensorInfo], rank: int, scale: float) -> AdaptedModule | Problem:
    if held.keys() != {"lora_A", "lora_B"}:
        return Problem(f"{next(iter(held.values())).name} is one of a pair that is not there", hint=DAMAGED)
    shapes = [held[part].shape for part in ("lora_A", "lora_B")]
    if [shapes[0][:1], shapes[1][1:2]] != [(rank,), (rank,)]:
        told = f"lora_A is {dims(shapes[0])} and lora_B {dims(shapes[1])}, where the rank should be {rank}"
        return Problem(f"{name}: {told}", hint=DAMAGED)
    return read_module(name, held, rank, scale, {})


# ---- one model of the pipeline --------------------------------------------------------------------------------------


def of_model(adapter: Adapter, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], called: str) -> Adapter:
    """What an adapter has for one model, by the names of that one's modules.

    Args:
        adapter: any; PEFT's is of one model as it is.
        tensors: the model's tensors by name.
        config: its config.json.
        called: its name, whose last part tells which of a pipeline's text encoders it is.

    Raises:
        ModelError: it has nothing for the model, or it is not told which one it is.
    """
    if not adapter.pipeline:
        return adapter
    folder = called.rpartition("/")[2]
    mine = _DRAWING if is_diffusion(config) else (folder,)
    modules = [module for name, module in adapter.modules.items() if adapter.pipeline[name] in mine]
    if not modules:
        told = ", ".join(dict.fromkeys(adapter.pipeline.values()))
        hint = f"name the folder of the pipeline that it is for: .../{told.partition(',')[0]}"
        raise ModelError(Problem(f"the adapter is of a pipeline's {told}, and this is {folder}", hint=hint))
    ours = {name.removesuffix(".weight").replace(".", "_"): name for name in tensors if name.endswith(".weight")}
    placed = [one for module in modules for one in _placed(module, ours, tensors, config)]
    if len(by_name := {one.name: one for one in placed}) < len(placed):
        twice = next(one.name for one in placed if by_name[one.name] is not one)
        raise ModelError(Problem(f"two parts of the adapter change {twice}", hint=DAMAGED))
    return replace(adapter, modules=by_name)


def _placed(
    module: AdaptedModule, ours: Mapping[str, str], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Iterator[AdaptedModule]:
    """The module under the model's own name; one that is several there, as those, each with its rows of B."""
    called = _MODEL.sub("", module.name)
    ways = _spellings(called.replace(".", "_"), int(config.get("layers_per_block") or 2))
    names = next(([ours[one] for one in way] for way in ways if all(one in ours for one in way)), [])
    first = 0
    for name in names:
        last = module.outputs if len(names) == 1 else first + tensors[name].shape[0]
        if last > module.outputs or (name == names[-1] and last < module.outputs):
            what = f"{module.b.name} has {module.outputs:,} rows, and not those of {' and '.join(names)}"
            raise ModelError(Problem(what, hint=DAMAGED))
        yield replace(module, name=name.removesuffix(".weight"), b=module.b.rows(first, last))
        first = last
    if not names:
        yield replace(module, name=called)


def _spellings(name: str, layers: int) -> Iterator[Sequence[str]]:
    """What a module with `_` for each point may be called in diffusers: its own name, or those of what it was once."""
    yield [name]
    if (match := _SGM.match(name)) is not None:
        yield [_of_sgm(match["side"], int(match["block"]), match["inner"], match["rest"], layers)]
    for pattern, several in _PUBLISHED:
        if re.fullmatch(pattern, name):
            yield [re.sub(pattern, one, name) for one in several]


_SGM = re.compile(r"(?P<side>input_blocks|middle_block|output_blocks)_(?P<block>\d+)_(?:(?P<inner>\d)_)?(?P<rest>.+)")
_INNER = ("resnets", "attentions", "upsamplers")
_IN_RESNET = {"in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
              "skip_connection": "conv_shortcut"}  # fmt: skip


def _of_sgm(side: str, block: int, inner: str | None, rest: str, layers: int) -> str:
    """A module of the UNet as Stable Diffusion was published: blocks are counted through all levels there."""
    rest = _IN_RESNET.get(rest, rest)
    if side == "middle_block":
        part = ("resnets_0", "attentions_0", "resnets_1")[min(block, 2)]
        return f"mid_block_{part}_{rest}"
    level, layer = divmod(block - (side == "input_blocks"), layers + 1)
    if side == "input_blocks":
        place = "downsamplers_0" if rest == "op" else f"{_INNER[int(inner or 0)]}_{layer}"
        return f"down_blocks_{level}_{place}_{'conv' if rest == 'op' else rest}"
    kind = _INNER[min(int(inner or 0), 2)]
    return f"up_blocks_{level}_{kind}_{layer if kind != 'upsamplers' else 0}_{rest}"


_PUBLISHED: Sequence[tuple[str, Sequence[str]]] = (
    (r"input_blocks_0_0", ["conv_in"]),
    (r"out_2", ["conv_out"]),
    (r"time_embed_0", ["time_embedding_linear_1"]),
    (r"time_embed_2", ["time_embedding_linear_2"]),
    (r"label_emb_0_0", ["add_embedding_linear_1"]),
    (r"label_emb_0_2", ["add_embedding_linear_2"]),
    (r"double_blocks_(\d+)_img_attn_qkv", [rf"transformer_blocks_\1_attn_to_{of}" for of in "qkv"]),
    (r"double_blocks_(\d+)_txt_attn_qkv", [rf"transformer_blocks_\1_attn_add_{of}_proj" for of in "qkv"]),
    (r"double_blocks_(\d+)_img_attn_proj", [r"transformer_blocks_\1_attn_to_out_0"]),
    (r"double_blocks_(\d+)_txt_attn_proj", [r"transformer_blocks_\1_attn_to_add_out"]),
    (r"double_blocks_(\d+)_img_mlp_0", [r"transformer_blocks_\1_ff_net_0_proj"]),
    (r"double_blocks_(\d+)_img_mlp_2", [r"transformer_blocks_\1_ff_net_2"]),
    (r"double_blocks_(\d+)_txt_mlp_0", [r"transformer_blocks_\1_ff_context_net_0_proj"]),
    (r"double_blocks_(\d+)_txt_mlp_2", [r"transformer_blocks_\1_ff_context_net_2"]),
    (r"double_blocks_(\d+)_img_mod_lin", [r"transformer_blocks_\1_norm1_linear"]),
    (r"double_blocks_(\d+)_txt_mod_lin", [r"transformer_blocks_\1_norm1_context_linear"]),
    (r"single_blocks_(\d+)_linear1", [*(rf"single_transformer_blocks_\1_attn_to_{of}" for of in "qkv"),
                                      r"single_transformer_blocks_\1_proj_mlp"]),
    (r"single_blocks_(\d+)_linear2", [r"single_transformer_blocks_\1_proj_out"]),
    (r"single_blocks_(\d+)_modulation_lin", [r"single_transformer_blocks_\1_norm_linear"]),
)  # fmt: skip
"""Of Stable Diffusion XL and Flux; what turns rows round besides (Flux's last layer) has no place."""
