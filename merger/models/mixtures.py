"""Layouts of mixtures of experts: which dense models each is made of, its tensors' names on disk, its config.json; and
experts in one tensor taken for many.

The names are those that transformers' save_pretrained writes and llama.cpp and vLLM read: one tensor an expert and
matrix. Not here: which model gives which tensor (planning.makers.moe).
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merger.models.checkpoint import ITEM_BYTES, TensorInfo

Config = Mapping[str, Any]

STACK = "model.layers"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
MATRICES = (GATE, UP, DOWN)
"""The roles of a dense layer's MLP, in the order in which an expert's tensors are written."""

ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
BIASES = {f"self_attn.{name}_proj.bias": f"self_attn.{name}_proj.weight" for name in "qkv"}
"""Roles of biases, and of the tensors they belong to."""

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
OF_EXPERTS, OF_WIDTH = "experts", "width"
Matrices = Mapping[str, tuple[str, ...]]
"""Roles of tensors, and which of a dense layer's matrices each is made of, one behind the other."""


def _named(role: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Matrices:
    """One tensor for each matrix."""
    return {role.replace("{matrix}", name): (of,) for name, of in zip((gate, up, down), MATRICES, strict=True)}


_EXPERTS = _named("mlp.experts.{number}.{matrix}.weight")


@dataclass(frozen=True)
class MixtureSizes:
    """What a mixture's config has to state.

    Args:
        experts: how many there are in each layer.
        per_token: how many of them each token goes through.
        middle: how many rows an expert's gate has.
        shared: the same of the shared expert, 0 where there is none.
    """

    experts: int
    per_token: int
    middle: int
    shared: int


@dataclass(frozen=True, eq=False)
class Layout:
    """A mixture's architecture.

    Args:
        name: its name in recipes.
        made_of: the model_types of the dense models that become one.
        roles: the roles of a layer's tensors that are taken from the base model; None: of all but the MLP's.
        runs: whether prompts can be run through its dense models layer by layer.
        zeros: whether biases that the base model lacks are written as zeros.
        router: the role of the tensor with a row for each expert.
        experts: the roles of the experts' tensors, and of which matrices each is made: of one expert where there is a
            place for its number, else of all, one behind the other.
        shared: the same of the shared expert; empty: it has none.
        shared_router: the role of the tensor with the shared expert's row; None: every token goes through it in full.
        keeps_mlp: whether the base model's MLP is the shared expert where the recipe names none.
        vectors: roles of vectors that no dense model has: of which of the base model's each is a copy, or else how many
            ones it is, as many as there are experts or as a state is wide.
        edits: the config of the mixture from the base model's, whose defaults are written out.
    """

    name: str
    made_of: tuple[str, ...]
    roles: tuple[str, ...] | None
    router: str
    experts: Matrices
    edits: Callable[[dict[str, Any], MixtureSizes], dict[str, Any]]
    shared: Matrices = field(default_factory=dict)
    shared_router: str | None = None
    keeps_mlp: bool = False
    vectors: Mapping[str, str] = field(default_factory=dict)
    zeros: bool = False
    runs: bool = True

    def config(self, base: Config, sizes: MixtureSizes) -> dict[str, Any]:
        """The config.json of a mixture whose base model has the config `base`.

        Raises:
            ValueError: the layout cannot say something that `base` says; what, in a sentence.
        """
        return self.edits(_written_out(base), sizes)


# ---- config.json ----------------------------------------------------------------------------------------------------

_DEFAULTS: Mapping[str, Config] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096,
                "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "use_sliding_window": False, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "use_sliding_window": False, "num_key_value_heads": 32,
              "head_dim": 128},
    "granite": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "olmo2": {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 50279, "pad_token_id": 1,
              "rms_norm_eps": 1e-5},
}  # fmt: skip
"""What a dense model's config means where it says nothing: the mixtures' classes have other defaults."""

_ROPE_BASE = 10000.0


def _written_out(base: Config) -> dict[str, Any]:
    """The base model's config with the defaults of its class."""
    common = {
        "num_key_value_heads": base.get("num_attention_heads"),
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    defaults = _DEFAULTS.get(base["model_type"])
    if defaults is None:  # the mixture is of the same class
        return copy.deepcopy(dict(base))
    found = copy.deepcopy({**common, **defaults, **base})
    if "rope_theta" not in found and "rope_theta" not in (found.get("rope_parameters") or {}):
        found["rope_theta"] = _ROPE_BASE
    found.pop("auto_map", None)
    return found


def _mixtral(config: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    return config | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": sizes.middle,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "output_router_logits": False,
    }


def _qwen(config: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    return config | {
        "intermediate_size": sizes.middle,
        "moe_intermediate_size": sizes.middle,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
    }


def _qwen2_moe(config: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    """The kinds of the layers are written out: left to itself, its class finds others than the dense one's."""
    windowed = config.get("use_sliding_window", config.get("sliding_window") is not None)
    first = config.get("max_window_layers", 28) if config["model_type"] == "qwen2" else 0
    layers = range(config["num_hidden_layers"])
    kinds = ["sliding_attention" if windowed and layer >= first else "full_attention" for layer in layers]
    return _qwen(config, sizes) | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": sizes.shared,
        "qkv_bias": True,
        "use_sliding_window": windowed,
        "layer_types": config.get("layer_types") or kinds,
    }


def _qwen3_moe(config: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    if config["use_sliding_window"]:
        raise ValueError("its config has use_sliding_window, which Qwen3 MoE cannot say of single layers")
    return _qwen(config, sizes) | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base"
_DEEPSEEK_ROPES = ("default", "linear", "dynamic")


def _deepseek(config: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    """For the code that DeepSeek published with its first mixture: rope as it was written then, no window."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config["sliding_window"] is not None:
        raise ValueError(f"its config has a sliding_window of {config['sliding_window']}, and DeepSeek MoE has none")
    if (config.get("head_dim") or width // heads) != width // heads:
        raise ValueError(f"its heads have {config['head_dim']} entries; in DeepSeek MoE they have hidden size / heads")
    if sizes.shared % sizes.middle:
        raise ValueError(f"its shared expert is {sizes.shared} wide, no multiple of the experts' {sizes.middle}")
    rope = {**(config.pop("rope_scaling", None) or {}), **(config.pop("rope_parameters", None) or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _DEEPSEEK_ROPES:
        raise ValueError(f"its positions are turned by {kind}, and DeepSeek MoE knows {', '.join(_DEEPSEEK_ROPES)}")
    return config | {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {
            "AutoConfig": f"{_DEEPSEEK_CODE}--configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_DEEPSEEK_CODE}--modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_DEEPSEEK_CODE}--modeling_deepseek.DeepseekForCausalLM",
        },
        "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": rope["factor"]},
        "moe_intermediate_size": sizes.middle,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": sizes.shared // sizes.middle or None,
        "num_experts_per_tok": sizes.per_token,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
    }


def _granite(config: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    shared = {"shared_intermediate_size": sizes.shared} if sizes.shared else {}
    kind = "GraniteMoeShared" if shared else "GraniteMoe"
    return config | shared | {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "intermediate_size": sizes.middle,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "output_router_logits": False,
    }  # fmt: skip


def _flex_olmo(config: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    return config | {
        "architectures": ["FlexOlmoForCausalLM"],
        "model_type": "flex_olmo",
        "intermediate_size": sizes.middle,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "norm_topk_prob": True,
        "output_router_logits": False,
    }


def _gemma4(config: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    """The dense one's class, which has experts beside the MLP where its config says so."""
    if config.get("enable_moe_block"):
        raise ValueError("it is a mixture itself")
    return config | {
        "enable_moe_block": True,
        "intermediate_size": sizes.shared,
        "moe_intermediate_size": sizes.middle,
        "num_experts": sizes.experts,
        "top_k_experts": sizes.per_token,
    }


# ---- the layouts ----------------------------------------------------------------------------------------------------

LAYOUTS = (
    Layout(
        name="Mixtral",
        made_of=("llama", "mistral"),
        roles=(*_NORMS, *ATTENTION),
        router="block_sparse_moe.gate.weight",
        experts=_named("block_sparse_moe.experts.{number}.{matrix}.weight", "w1", "w3", "w2"),
        edits=_mixtral,
    ),
    Layout(
        name="DeepSeek MoE",
        made_of=("llama", "mistral"),
        roles=(*_NORMS, *ATTENTION),
        router="mlp.gate.weight",
        experts=_EXPERTS,
        edits=_deepseek,
        shared=_named("mlp.shared_experts.{matrix}.weight"),
    ),
    Layout(
        name="Qwen MoE",
        made_of=("llama", "mistral", "qwen2"),
        roles=(*_NORMS, *ATTENTION, *BIASES),
        router="mlp.gate.weight",
        experts=_EXPERTS,
        edits=_qwen2_moe,
        shared=_named("mlp.shared_expert.{matrix}.weight"),
        shared_router="mlp.shared_expert_gate.weight",
        zeros=True,
    ),
    Layout(
        name="Qwen3 MoE",
        made_of=("qwen3",),
        roles=(*_NORMS, *ATTENTION, *_QK_NORMS),
        router="mlp.gate.weight",
        experts=_EXPERTS,
        edits=_qwen3_moe,
    ),
    Layout(
        name="Granite MoE",
        made_of=("granite",),
        roles=(*_NORMS, *ATTENTION),
        router="block_sparse_moe.router.layer.weight",
        experts={
            "block_sparse_moe.input_linear.weight": (GATE, UP),
            "block_sparse_moe.output_linear.weight": (DOWN,),
        },
        edits=_granite,
        shared={"shared_mlp.input_linear.weight": (GATE, UP), "shared_mlp.output_linear.weight": (DOWN,)},
    ),
    Layout(
        name="FlexOlmo",
        made_of=("olmo2",),
        roles=(_NORMS[1], "post_feedforward_layernorm.weight", *ATTENTION, *_QK_NORMS),
        router="mlp.gate.weight",
        experts=_EXPERTS,
        edits=_flex_olmo,
    ),
    Layout(
        name="Gemma 4 MoE",
        made_of=("gemma4_text",),
        roles=None,
        router="router.proj.weight",
        experts={"experts.gate_up_proj": (GATE, UP), "experts.down_proj": (DOWN,)},
        edits=_gemma4,
        shared=_named("mlp.{matrix}.weight"),
        keeps_mlp=True,
        runs=False,
        vectors={
            "pre_feedforward_layernorm_2.weight": "pre_feedforward_layernorm.weight",
            "post_feedforward_layernorm_1.weight": OF_WIDTH,
            "post_feedforward_layernorm_2.weight": OF_WIDTH,
            "router.scale": OF_WIDTH,
            "router.per_expert_scale": OF_EXPERTS,
        },
    ),
)
"""In the order in which they are tried."""


# ---- experts --------------------------------------------------------------------------------------------------------


Tensors = Mapping[str, TensorInfo]

_FUSED = re.compile(r"^(?P<block>.+)\.experts\.(?P<role>gate_up_proj|down_proj)$")
_ROUTER = re.compile(r"^(?P<block>.+)\.(gate|router)\.weight$")


@dataclass(frozen=True)
class _Style:
    """How a kind of model names the tensors of one expert, and the block that they are in (None: as in memory)."""

    gate: str
    up: str
    down: str
    block: str | None = None


_STYLES = (_Style("gate_proj", "up_proj", "down_proj"), _Style("w1", "w3", "w2", "block_sparse_moe"))
_ONE = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>0|[1-9][0-9]{0,4})\.(?P<matrix>[^.]+)\.weight$")
_STACK_BY_OTHER_NAME = re.compile(
    r"^(?P<block>.+?)\.(experts\.)?((?P<first>input_linear|fc1)|output_linear|fc2)\.weight$"
)
_IN_BLOCK = re.compile(r"^(?P<layer>.+?\.\d+)\.(?P<block>[^.]+)\.(?P<rest>experts\.[^.\d][^.]*|(gate|router)\.weight)$")


def are_fused(tensors: Tensors) -> bool:
    """Whether all experts of a layer are in one tensor, gate and up as halves of one."""
    return any(_FUSED.match(name) for name in tensors)


def split(tensors: Tensors, like: Tensors) -> Tensors:
    """The tensors with one for each expert, under the names that another model of that kind has for them.

    They stay as they are where that model's are in one tensor too, or have other shapes.
    """
    style = next((style for style in _STYLES if any(_first(name, style) for name in like)), None)
    return tensors if style is None or not _alike(tensors, like, style) else _split(tensors, style)


def split_as_published(tensors: Tensors, kind: str) -> Tensors:
    """The tensors with one for each expert, under the names with which a `model_type` is published."""
    return _split(tensors, _STYLES[kind == "mixtral"])


def _split(tensors: Tensors, style: _Style) -> Tensors:
    blocks = {match["block"] for name in tensors if (match := _FUSED.match(name))}
    found = [part for tensor in tensors.values() for part in _parts(tensor, blocks, style)]
    return {tensor.name: tensor for tensor in found}


def _first(name: str, style: _Style) -> bool:
    return name.endswith(f".experts.0.{style.gate}.weight")


def _alike(tensors: Tensors, like: Tensors, style: _Style) -> bool:
    """Whether a fused tensor's halves have the shape that the other model's gates have."""
    gate = next(tensor for name, tensor in like.items() if _first(name, style))
    fused = next(tensor for name, tensor in tensors.items() if name.endswith(".experts.gate_up_proj"))
    return len(fused.shape) == 3 and (fused.shape[1], fused.shape[2]) == (2 * gate.shape[0], gate.shape[1])


def _parts(tensor: TensorInfo, blocks: set[str], style: _Style) -> Iterator[TensorInfo]:
    match, router = _FUSED.match(tensor.name), _ROUTER.match(tensor.name)
    if match is None:
        routes = router is not None and router["block"] in blocks and style.block is not None
        name = f"{_block(router['block'], style)}.gate.weight" if router is not None and routes else tensor.name
        yield replace(tensor, name=name)
        return
    experts, rows, columns = tensor.shape
    roles = (style.gate, style.up) if match["role"] == "gate_up_proj" else (style.down,)
    shape = (rows // len(roles), columns)
    for number in range(experts * len(roles)):
        expert, role = divmod(number, len(roles))
        name = f"{_block(match['block'], style)}.experts.{expert}.{roles[role]}.weight"
        size = math.prod(shape) * ITEM_BYTES[tensor.dtype]
        start = tensor.start + number * size
        yield TensorInfo(name, tensor.dtype, shape, tensor.file, start, start + size)


def _block(block: str, style: _Style) -> str:
    return block if style.block is None else f"{block.rpartition('.')[0]}.{style.block}"


def join(tensors: Tensors) -> Mapping[str, list[tuple[TensorInfo, ...]]]:
    """Tensors of experts by the names of those that transformers has in memory in their place.

    Of each expert those are given whose rows follow each other there: gate and up; or one tensor of all. Where an
    expert lacks a tensor, or has one of another shape, none are given.
    """
    held: dict[str, dict[str, dict[int, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    stacks: dict[str, list[tuple[TensorInfo, ...]]] = {}
    for name, tensor in tensors.items():
        if match := _ONE.match(name):
            held[match["experts"]][match["matrix"]][int(match["number"])] = tensor
        elif (match := _STACK_BY_OTHER_NAME.match(name)) and len(tensor.shape) == 3:
            stacks[f"{match['block']}.experts.{'gate_up' if match['first'] else 'down'}_proj"] = [(tensor,)]
    return stacks | {
        f"{experts}.{name}": parts
        for experts, matrices in held.items()
        for name, roles in _together(matrices)
        if (parts := _for_each([matrices[role] for role in roles]))
    }


def _together(matrices: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What experts with these matrices have in memory, and of which of them it is made."""
    style = next((one for one in _STYLES if {one.gate, one.up, one.down} <= set(matrices)), None)
    if style is not None:
        yield "gate_up_proj", (style.gate, style.up)
        yield "down_proj", (style.down,)
        return
    yield from ((matrix, (matrix,)) for matrix in matrices)


def _for_each(matrices: Sequence[Mapping[int, TensorInfo]]) -> list[tuple[TensorInfo, ...]]:
    """One of each of these matrices for each expert; none where they differ."""
    numbers = range(len(matrices[0]))
    alike = all(sorted(of) == list(numbers) and len({one.shape for one in of.values()}) == 1 for of in matrices)
    flat = alike and {len(of[0].shape) for of in matrices} == {2} and len({of[0].shape[1] for of in matrices}) == 1
    return [tuple(of[number] for of in matrices) for number in numbers] if flat else []


def without_blocks(names: Iterable[str]) -> Mapping[str, str]:
    """Names of experts and routers without the word for what is around them, which differs: mlp, feed_forward.

    >>> without_blocks(["model.layers.0.mlp.experts.down_proj", "model.norm.weight"])
    {'model.layers.0.mlp.experts.down_proj': 'model.layers.0.experts.down_proj'}
    """
    found = {name: match for name in names if (match := _IN_BLOCK.match(name))}
    return {name: f"{match['layer']}.{match['rest']}" for name, match in found.items()}
