"""What llama.cpp has to know of a model: its architecture's settings, and how its tensors are called and turned there.

Names and keys are those of the package `gguf`. Not here: the tokenizer (tokens).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merger.errors import Problem, RecipeError
from merger.models.gguf.layout import KINDS, GgufTensor, Value

Config = Mapping[str, Any]
_Settings = dict[str, Value]


@dataclass(frozen=True)
class GgufFamily:
    """A class of transformers as llama.cpp knows it.

    Args:
        title: for people.
        arch: what it is called there.
        act: the only activation that it has there.
        rope: which ways to scale positions it knows there.
        paired: whether the rows of q and k are rotated in pairs, so that they have to stand in pairs.
        norm: what is added to the scales of norms.
        window: every so many layers one sees all tokens, where the others see a window; 0: it is not made so.
        largest: the number of layers of the one size whose scale of attention is another one.
        mixture: whether it has experts.
        normed: whether the shares of a token's experts are brought to a sum of 1 there; None: they always are.
    """

    title: str
    arch: str
    act: str = "silu"
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    paired: bool = False
    norm: float = 0.0
    window: int = 0
    largest: int = 0
    mixture: bool = False
    normed: bool | None = None


_LLAMA = GgufFamily("Llama", "llama", rope=("default", "linear", "llama3", "yarn"), paired=True)
_GEMMA = "gelu_pytorch_tanh"
FAMILIES: Mapping[str, GgufFamily] = {
    "LlamaForCausalLM": replace(_LLAMA, title="Llama 2 and 3"),
    "MistralForCausalLM": replace(_LLAMA, title="Mistral"),
    "Qwen2ForCausalLM": GgufFamily("Qwen 2 and 2.5", "qwen2"),
    "Qwen3ForCausalLM": GgufFamily("Qwen 3", "qwen3"),
    "Gemma2ForCausalLM": GgufFamily("Gemma 2", "gemma2", _GEMMA, ("default",), norm=1.0, window=2, largest=46),
    "Gemma3ForCausalLM": GgufFamily("Gemma 3", "gemma3", _GEMMA, ("default", "linear"), norm=1.0, window=6, largest=62),
    "MixtralForCausalLM": replace(_LLAMA, title="Mixtral", mixture=True),
    "Qwen2MoeForCausalLM": GgufFamily("Qwen 2 MoE", "qwen2moe", mixture=True, normed=False),
    "Qwen3MoeForCausalLM": GgufFamily("Qwen 3 MoE", "qwen3moe", mixture=True, normed=True),
    "Phi3ForCausalLM": GgufFamily("Phi-3", "phi3", rope=("default", "longrope")),
}  # fmt: skip
"""By the name in `architectures` of config.json."""


# ---- positions ------------------------------------------------------------------------------------------------------

_ORIGINAL = "original_max_position_embeddings"
_ROPE = {"rope_theta", "rope_type", "type", "factor", _ORIGINAL}
_KNOWN_ROPE: Mapping[str, set[str]] = {
    "default": {"partial_rotary_factor"},
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "longrope": {"long_factor", "short_factor", "partial_rotary_factor"},
}


class Rope:
    """How positions are turned.

    Args:
        config: the model's config.json.
        head: how many entries a head has.
    """

    def __init__(self, config: Config, head: int) -> None:
        self._config, self._head = config, head
        said: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}  # since and before version 5
        found: Config = said.get("full_attention", said)
        own = ("rope_theta", "partial_rotary_factor")
        more = {key: config[key] for key in own if key in config and key not in found}
        self._said = {key: value for key, value in {**found, **more}.items() if value is not None}
        self.way = str(self._said.get("rope_type") or self._said.get("type") or "default")

    @property
    def unknown(self) -> set[str]:
        """The settings that are not understood."""
        return set(self._said) - _ROPE - _KNOWN_ROPE.get(self.way, set())

    @property
    def _first_length(self) -> int:
        """How many tokens the model saw before its positions were scaled."""
        config = self._config
        return int(self._said.get(_ORIGINAL) or config.get(_ORIGINAL) or config["max_position_embeddings"])

    def settings(self, keys: Any, family: GgufFamily) -> _Settings:
        """What llama.cpp has to know of it, by `gguf.Keys.Rope`."""
        rope = self._said
        turned = int(self._head * float(rope.get("partial_rotary_factor") or 1))
        found: _Settings = {keys.DIMENSION_COUNT: turned, keys.FREQ_BASE: float(rope.get("rope_theta") or 10000.0)}
        if family.window == _PATTERN_OF_GEMMA_3:
            local = (self._config.get("rope_parameters") or {}).get("sliding_attention") or {}
            theta = local.get("rope_theta") or self._config.get("rope_local_base_freq") or 10000.0
            found[keys.FREQ_BASE_SWA] = float(theta)
        if self.way in ("linear", "yarn"):
            found |= {keys.SCALING_TYPE: self.way, keys.SCALING_FACTOR: float(rope["factor"])}
        if self.way == "yarn" or family.arch == "phi3":
            found[keys.SCALING_ORIG_CTX_LEN] = self._first_length
        if self.way == "longrope":
            found[keys.SCALING_ATTN_FACTOR] = _long_scale(self._config["max_position_embeddings"], self._first_length)
        return found

    def tensors(self) -> tuple[GgufTensor, ...]:
        """Tensors that transformers computes of config.json and llama.cpp reads."""
        if self.way == "llama3":
            return (_of_numbers("rope_freqs.weight", llama3_factors(self._said, self._head, self._first_length)),)
        if self.way == "longrope":
            ways = ("long", "short")
            return tuple(_of_numbers(f"rope_factors_{way}.weight", self._said[f"{way}_factor"]) for way in ways)
        return ()


def _of_numbers(name: str, numbers: Any) -> GgufTensor:
    return GgufTensor(name, "F32", (len(numbers),), data=struct.pack(f"<{len(numbers)}f", *numbers))


def llama3_factors(rope: Config, head: int, first: int) -> list[float]:
    """By what each frequency is divided, as Llama 3.1 scales them: those of many turns not at all."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = [first / (2 * math.pi * float(rope["rope_theta"]) ** (place / head)) for place in range(0, head, 2)]
    shares = [min(max((each - low) / (high - low), 0.0), 1.0) for each in turns]
    return [1 / ((1 - share) / factor + share) for share in shares]


def _long_scale(length: int, first: int) -> float:
    """By what longrope makes attention larger."""
    return math.sqrt(1 + math.log(length / first) / math.log(first)) if length > first else 1.0


# ---- the model ------------------------------------------------------------------------------------------------------


class GgufModel:
    """A model as a GGUF file has it.

    Args:
        config: its config.json.

    Raises:
        RecipeError: no GGUF is made of such a model.
    """

    def __init__(self, config: Config) -> None:
        import gguf  # an extra: run.extras asks for it

        self._config = config
        named = next(iter(config.get("architectures") or [""]))
        if named not in FAMILIES:
            raise _refusal(f"no GGUF is made of {named or 'a model without architectures'}")
        self.family = FAMILIES[named]
        self._gguf = gguf
        self._layers = int(config["num_hidden_layers"])
        heads = int(config["num_attention_heads"])
        self._heads = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}
        self._head = int(config.get("head_dim") or config["hidden_size"] // heads)
        self._count = int(config.get("num_local_experts") or config.get("num_experts") or 0)
        self.rope = Rope(config, self._head)
        self._check()
        arch = next(key for key, name in self._gguf.MODEL_ARCH_NAMES.items() if name == self.family.arch)
        self._names = self._gguf.get_tensor_name_map(arch, self._layers)

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """That llama.cpp computes what transformers does."""
        config, family = self._config, self.family
        act = config.get("hidden_activation") or config.get("hidden_act") or family.act
        way, unknown = self.rope.way, self.rope.unknown
        wrong = {
            f"hidden_act {act}": act != family.act,
            f"positions scaled by {way}": way not in family.rope,
            f"rope settings {sorted(unknown)}": way in family.rope and unknown,
            "use_sliding_window": config.get("use_sliding_window"),
            "query_pre_attn_scalar other than its heads' size": family.window and not self._usual_scale(),
            "layer_types in another order": family.window and not self._usual_layers(),
            "use_bidirectional_attention": config.get("use_bidirectional_attention"),
            "layers without experts": config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1,
            "another norm_topk_prob": family.normed not in (None, bool(config.get("norm_topk_prob"))),
        }
        if said := [what for what, is_so in wrong.items() if is_so]:
            raise _refusal(f"no GGUF is made of {family.title} with {', '.join(said)}")

    def _usual_scale(self) -> bool:
        config = self._config
        usual = self._head if self._layers != self.family.largest else config["hidden_size"] // self._heads["q_proj"]
        return int(config.get("query_pre_attn_scalar") or usual) == usual

    def _usual_layers(self) -> bool:
        every = self.family.window
        usual = ["sliding_attention" if number % every else "full_attention" for number in range(1, self._layers + 1)]
        return list(self._config.get("layer_types") or usual) == usual

    # ---- metadata ----------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Value]:
        """What llama.cpp has to know of the architecture, by its keys."""
        of, arch = self._gguf.Keys, self.family.arch
        found = self._sizes(of) | self.rope.settings(of.Rope, self.family) | self._attention(of) | self._experts(of)
        return {of.General.ARCHITECTURE: arch, **{key.format(arch=arch): value for key, value in found.items()}}

    def _sizes(self, of: Any) -> _Settings:
        config = self._config
        length = int(config["max_position_embeddings"])
        if self.family.paired and config.get("sliding_window"):  # there it sees all: up to here that is the same
            length = min(length, int(config["sliding_window"]))
        return {
            of.LLM.CONTEXT_LENGTH: length,
            of.LLM.EMBEDDING_LENGTH: int(config["hidden_size"]),
            of.LLM.BLOCK_COUNT: self._layers,
            of.LLM.FEED_FORWARD_LENGTH: int(config["intermediate_size"]),
            of.LLM.VOCAB_SIZE: int(config["vocab_size"]),
        }

    def _experts(self, of: Any) -> _Settings:
        named = {
            of.LLM.EXPERT_USED_COUNT: "num_experts_per_tok",
            of.LLM.EXPERT_FEED_FORWARD_LENGTH: "moe_intermediate_size",
            of.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: "shared_expert_intermediate_size",
        }
        found = {key: int(self._config[name]) for key, name in named.items() if self._config.get(name)}
        return {of.LLM.EXPERT_COUNT: self._count, **found} if self.family.mixture else {}

    def _attention(self, of: Any) -> _Settings:
        config = self._config
        found: _Settings = {
            of.Attention.HEAD_COUNT: self._heads["q_proj"],
            of.Attention.HEAD_COUNT_KV: self._heads["k_proj"],
            of.Attention.KEY_LENGTH: self._head,
            of.Attention.VALUE_LENGTH: self._head,
            of.Attention.LAYERNORM_RMS_EPS: float(config.get("rms_norm_eps", 1e-6)),
        }
        if self.family.window or self.family.arch == "phi3":
            found[of.Attention.SLIDING_WINDOW] = int(config.get("sliding_window") or 0)
        for key, name in ((of.LLM.ATTN_LOGIT_SOFTCAPPING, "attn_logit_softcapping"),
                          (of.LLM.FINAL_LOGIT_SOFTCAPPING, "final_logit_softcapping")):  # fmt: skip
            if config.get(name):
                found[key] = float(config[name])
        return found

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def tensor(self, name: str, shape: tuple[int, ...], kind: str) -> GgufTensor | None:
        """A tensor of the result as a file has it that mostly has this type; None where llama.cpp has no use for it.

        One of several experts is a part of a tensor that begins with their number: see `stack`.

        Raises:
            RecipeError: llama.cpp knows no such tensor of this architecture.
        """
        if name.endswith("rotary_emb.inv_freq") or (self.family.norm and name == "lm_head.weight"):
            return None
        stack, _ = stack_of(name)
        found = self._names.get_name(key=stack, try_suffixes=(".weight", ".bias"))
        if found is None or (stack == name and ".experts." in name):
            raise _refusal(f"no GGUF is made of {self.family.title} with a tensor {name}")
        heads = next((count for part, count in self._heads.items() if f".{part}." in name), 0)
        return GgufTensor(
            found,
            _kind_of(found, shape, kind),
            shape,
            (name,),
            head_rows=shape[0] // heads if self.family.paired and heads else 0,
            added=self.family.norm if name.endswith("norm.weight") else 0.0,
        )

    def names(self) -> dict[str, str]:
        """What its tensors are called, by llama.cpp's names; all experts of a layer are one, as `stack_of` has them."""
        own = _OWN.get(self.family.arch) or [f"mlp.{part}" for part in _MIXTURE]
        layers = [f"model.layers.{layer}.{part}" for layer in range(self._layers) for part in (*_LAYER, *own)]
        each = [f"{name}.{end}" for name in (*_OUTSIDE, *layers) for end in ("weight", "bias")]
        found = {self._names.get_name(key=name, try_suffixes=(".weight", ".bias")): name for name in each}
        return {there: name for there, name in found.items() if there is not None}

    def stack(self, parts: Sequence[GgufTensor]) -> GgufTensor:
        """Tensors of one name that follow each other: one tensor, or those of all experts of a layer.

        Raises:
            RecipeError: there are fewer or more experts than config.json says.
        """
        first = parts[0]
        if stack_of(first.sources[0])[0] == first.sources[0]:
            return first
        if len(parts) != self._count:
            raise _refusal(f"no GGUF is made of {len(parts)} of {self._count} experts together: {first.name}")
        names = tuple(part.sources[0] for part in parts)
        return replace(first, shape=(len(parts), *first.shape), sources=names)


def stack_of(name: str) -> tuple[str, int]:
    """The name under which all experts of a layer have a tensor together, and its place there; of others their own.

    >>> stack_of("model.layers.0.mlp.experts.7.up_proj.weight")
    ('model.layers.0.mlp.experts.up_proj.weight', 7)
    """
    found = _EXPERT.fullmatch(name)
    return (f"{found[1]}.{found[3]}", int(found[2])) if found else (name, 0)


_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
_LAYER = (
    *(f"{end}_layernorm" for end in ("input", "post_attention", "pre_feedforward", "post_feedforward")),
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
_MIXTURE = ("gate", "shared_expert_gate", *(f"{of}.{part}_proj" for of in ("experts", "shared_expert")
                                            for part in ("gate", "up", "down")))  # fmt: skip
_OWN: Mapping[str, tuple[str, ...]] = {
    "llama": tuple(f"block_sparse_moe.{part}" for part in ("gate", "experts.w1", "experts.w2", "experts.w3")),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
}
"""The modules of layers, all experts having one together; by architecture those that others call `mlp.` and _MIXTURE.
"""

_EXPERT = re.compile(r"(.*\.experts)\.([0-9]+)\.(.*)")
_PATTERN_OF_GEMMA_3 = 6


def _refusal(what: str) -> RecipeError:
    titles = ", ".join(dict.fromkeys(family.title for family in FAMILIES.values()))
    hint = f"it is made of {titles}; convert_hf_to_gguf.py of llama.cpp knows more: run it on the published model"
    return RecipeError(Problem(what, hint=hint))


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Vectors and routers have all bits; embeddings and head of a file in few bits eight; what has no blocks 16."""
    if len(shape) < 2 or not name.endswith(".weight") or "ffn_gate_inp" in name:
        return "F32"
    if kind in ("Q4_0", "Q5_0", "MXFP4") and name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    return kind if shape[-1] % KINDS[kind].together == 0 else "F16"
