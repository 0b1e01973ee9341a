"""What llama.cpp has to know of a model: its architecture's settings, and how its tensors are called and turned there.

Names and keys are those of the package `gguf`. Not here: the tokenizer (tokens).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from merger.errors import Problem, RecipeError
from merger.models.gguf.layout import KINDS, GgufTensor, Value
from merger.runtime import install_command

Config = Mapping[str, Any]
_Settings = dict[str, Value]
_ORIGINAL = "original_max_position_embeddings"
_ROPE = {"rope_theta", "rope_type", "type", "factor", _ORIGINAL}


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
    """

    title: str
    arch: str
    act: str = "silu"
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    paired: bool = False
    norm: float = 0.0
    window: int = 0
    largest: int = 0


_LLAMA = GgufFamily("Llama", "llama", rope=("default", "linear", "llama3", "yarn"), paired=True)
_GEMMA = "gelu_pytorch_tanh"
FAMILIES: Mapping[str, GgufFamily] = {
    "LlamaForCausalLM": replace(_LLAMA, title="Llama 2 and 3"),
    "MistralForCausalLM": replace(_LLAMA, title="Mistral"),
    "Qwen2ForCausalLM": GgufFamily("Qwen 2 and 2.5", "qwen2"),
    "Qwen3ForCausalLM": GgufFamily("Qwen 3", "qwen3"),
    "Gemma2ForCausalLM": GgufFamily("Gemma 2", "gemma2", _GEMMA, ("default",), norm=1.0, window=2, largest=46),
    "Gemma3ForCausalLM": GgufFamily("Gemma 3", "gemma3", _GEMMA, ("default", "linear"), norm=1.0, window=6, largest=62),
    "Phi3ForCausalLM": GgufFamily("Phi-3", "phi3", rope=("default", "longrope")),
}  # fmt: skip
"""By the name in `architectures` of config.json."""


def load_gguf() -> ModuleType:
    """The package that knows llama.cpp's names.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise RecipeError(Problem("GGUF needs the package gguf", hint=install_command("gguf"))) from None
    return gguf


class GgufModel:
    """A model as a GGUF file has it.

    Args:
        config: its config.json.

    Raises:
        RecipeError: no GGUF is made of such a model, or the package gguf is not installed.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        named = next(iter(config.get("architectures") or [""]))
        if named not in FAMILIES:
            raise _refusal(f"no GGUF is made of {named or 'a model without architectures'}")
        self.family = FAMILIES[named]
        self._gguf = load_gguf()
        self._layers = int(config["num_hidden_layers"])
        heads = int(config["num_attention_heads"])
        self._heads = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}
        self._head = int(config.get("head_dim") or config["hidden_size"] // heads)
        self._rope = _rope_of(config)
        self._way = str(self._rope.get("rope_type") or self._rope.get("type") or "default")
        self._check()
        arch = next(key for key, name in self._gguf.MODEL_ARCH_NAMES.items() if name == self.family.arch)
        self._names = self._gguf.get_tensor_name_map(arch, self._layers)

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """That llama.cpp computes what transformers does."""
        config, family = self._config, self.family
        act = config.get("hidden_activation") or config.get("hidden_act") or family.act
        known = _ROPE | _KNOWN_ROPE.get(self._way, set())
        wrong = {
            f"hidden_act {act}": act != family.act,
            f"positions scaled by {self._way}": self._way not in family.rope,
            f"rope settings {sorted(set(self._rope) - known)}": self._way in family.rope and set(self._rope) - known,
            "use_sliding_window": config.get("use_sliding_window"),
            "query_pre_attn_scalar other than its heads' size": family.window and not self._usual_scale(),
            "layer_types in another order": family.window and not self._usual_layers(),
            "use_bidirectional_attention": config.get("use_bidirectional_attention"),
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
        found = self._sizes(of) | self._positions(of) | self._attention(of)
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

    def _positions(self, of: Any) -> _Settings:
        rope, ours = self._rope, of.Rope
        turned = int(self._head * float(rope.get("partial_rotary_factor") or 1))
        found: _Settings = {ours.DIMENSION_COUNT: turned, ours.FREQ_BASE: float(rope.get("rope_theta") or 10000.0)}
        if self.family.window == _PATTERN_OF_GEMMA_3:
            found[ours.FREQ_BASE_SWA] = _local_theta(self._config)
        if self._way in ("linear", "yarn"):
            found |= {ours.SCALING_TYPE: self._way, ours.SCALING_FACTOR: float(rope["factor"])}
        if self._way == "yarn":
            found[ours.SCALING_ORIG_CTX_LEN] = self._first_length
        if self.family.arch == "phi3":
            found[ours.SCALING_ORIG_CTX_LEN] = self._first_length
        if self._way == "longrope":
            found[ours.SCALING_ATTN_FACTOR] = _long_scale(self._config["max_position_embeddings"], self._first_length)
        return found

    @property
    def _first_length(self) -> int:
        """How many tokens it saw before its positions were scaled."""
        config = self._config
        return int(self._rope.get(_ORIGINAL) or config.get(_ORIGINAL) or config["max_position_embeddings"])

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def tensor(self, name: str, shape: tuple[int, ...], kind: str) -> GgufTensor | None:
        """A tensor of the result as a file has it that mostly has this type; None where llama.cpp has no use for it.

        Raises:
            RecipeError: llama.cpp knows no such tensor of this architecture.
        """
        if name.endswith("rotary_emb.inv_freq") or (self.family.norm and name == "lm_head.weight"):
            return None
        found = self._names.get_name(key=name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _refusal(f"no GGUF is made of {self.family.title} with a tensor {name}")
        heads = next((count for part, count in self._heads.items() if f".{part}." in name), 0)
        return GgufTensor(
            found,
            _kind_of(found, shape, kind),
            shape,
            name,
            head_rows=shape[0] // heads if self.family.paired and heads else 0,
            added=self.family.norm if name.endswith("norm.weight") else 0.0,
        )

    def more_tensors(self) -> tuple[GgufTensor, ...]:
        """Tensors that transformers computes of config.json and llama.cpp reads."""
        if self._way == "llama3":
            return (_of_numbers("rope_freqs.weight", _llama3_factors(self._rope, self._head, self._first_length)),)
        if self._way == "longrope":
            ways = ("long", "short")
            return tuple(_of_numbers(f"rope_factors_{way}.weight", self._rope[f"{way}_factor"]) for way in ways)
        return ()


_PATTERN_OF_GEMMA_3 = 6
_KNOWN_ROPE: Mapping[str, set[str]] = {
    "default": {"partial_rotary_factor"},
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "longrope": {"long_factor", "short_factor", "partial_rotary_factor"},
}


def _refusal(what: str) -> RecipeError:
    titles = ", ".join(dict.fromkeys(family.title for family in FAMILIES.values()))
    hint = f"it is made of {titles}; convert_hf_to_gguf.py of llama.cpp knows more: run it on the published model"
    return RecipeError(Problem(what, hint=hint))


def _rope_of(config: Config) -> Config:
    """How positions are turned, as transformers writes it since version 5 and as it did before."""
    said: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found: Config = said.get("full_attention", said)
    more = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config and key not in found}
    return {key: value for key, value in {**found, **more}.items() if value is not None}


def _local_theta(config: Config) -> float:
    """Of the layers of Gemma 3 that see a window."""
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return float(local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Vectors keep all their bits; embeddings and head of a file in few bits have eight; what has no blocks, 16."""
    if len(shape) < 2 or not name.endswith(".weight"):
        return "F32"
    if kind in ("Q4_0", "Q5_0") and name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    return kind if shape[-1] % KINDS[kind].together == 0 else "F16"


def _of_numbers(name: str, numbers: Any) -> GgufTensor:
    return GgufTensor(name, "F32", (len(numbers),), data=struct.pack(f"<{len(numbers)}f", *numbers))


def _llama3_factors(rope: Config, head: int, first: int) -> list[float]:
    """By what each frequency is divided, as Llama 3.1 scales them: those of many turns not at all."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = [first / (2 * math.pi * float(rope["rope_theta"]) ** (place / head)) for place in range(0, head, 2)]
    shares = [min(max((each - low) / (high - low), 0.0), 1.0) for each in turns]
    return [1 / ((1 - share) / factor + share) for share in shares]


def _long_scale(length: int, first: int) -> float:
    """By what longrope makes attention larger."""
    return math.sqrt(1 + math.log(length / first) / math.log(first)) if length > first else 1.0
