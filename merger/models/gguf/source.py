"""A model as its GGUF files have it: the config that transformers would have, and its tensors under their names there.

What families' GGUF files are written by is read backwards (families). Not here: what stands in a file (header), the
numbers that its types stand for (formats.gguf), and the tokenizer.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from merger.errors import ModelError, Problem, RecipeError
from merger.models.checkpoint import TensorInfo
from merger.models.config import stated_dtype
from merger.models.formats.gguf import form_of_kind
from merger.models.formats.packed import PackedTensor
from merger.models.formats.quantised import Unpacked
from merger.models.gguf.families import FAMILIES, GgufFamily, GgufModel, llama3_factors
from merger.models.gguf.header import GgufHeader, PlacedTensor
from merger.models.gguf.layout import GgufTensor

Config = dict[str, Any]
Numbers = Callable[[str], list[float]]
"""The numbers of a small tensor in F32, by its name."""

_MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that say what config.json does."""

_CLOSE, _MOST_LAYERS = 1e-5, 1000
_HINT = "merge the model that it was made from, which its card names"


def restore_model(
    headers: Mapping[str, GgufHeader],
    numbers: Callable[[str, PlacedTensor], bytes],
    count: Callable[[str, int], None],
) -> Unpacked:
    """The model of some files.

    Args:
        headers: what stands in each, by name, in their order; the first one's metadata are the model's.
        numbers: reads a small tensor of a file.
        count: is told of each file how many tensors more there are in transformers, before they are made.

    Raises:
        ModelError: it is of another architecture, or its files do not tell enough, or say what is not known here.
    """
    placed = {tensor.name: (file, tensor) for file, header in headers.items() for tensor in header.tensors}
    said = next(iter(headers.values())).metadata
    if len(placed) < sum(len(header.tensors) for header in headers.values()):
        raise _refusal("holds tensors of one name in several of its files")
    if said.get("split.count", len(headers)) not in (len(headers), 0):
        raise _refusal(f"is one of {said['split.count']} parts, and {len(headers)} are there")

    def factors(name: str) -> list[float]:
        file, tensor = placed[name]
        if tensor.kind != "F32":
            raise _refusal(f"has {name} in {tensor.kind}")
        return list(struct.unpack(f"<{math.prod(tensor.shape)}f", numbers(file, tensor)))

    try:
        config = _Described(said, {name: tensor for name, (_, tensor) in placed.items()}, factors).config()
        model = GgufModel(config)
    except KeyError as error:
        raise _refusal(f"has no {error.args[0]} in its header") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise _refusal(f"says in its header what no model has ({error})") from None
    except RecipeError as error:
        raise ModelError([replace(problem, hint=_HINT) for problem in error.problems]) from None
    for file, tensor in placed.values():
        count(file, tensor.shape[0] - 1 if len(tensor.shape) > 2 else 0)
    return _unpack(model, config, placed)


def _refusal(what: str) -> ModelError:
    return ModelError(Problem(what, hint=_HINT))


# ---- config ---------------------------------------------------------------------------------------------------------


class _Described:
    """What a header says of a model.

    Args:
        said: the metadata.
        tensors: by their names in llama.cpp.
        numbers: see `Numbers`.
    """

    def __init__(self, said: Mapping[str, Any], tensors: Mapping[str, PlacedTensor], numbers: Numbers) -> None:
        self._said, self._tensors, self._numbers = said, tensors, numbers
        self._arch = str(said["general.architecture"])

    def _get(self, key: str, *default: Any) -> Any:
        key = f"{self._arch}.{key}"
        return self._said.get(key, *default) if default else self._said[key]

    def _count(self, key: str, *default: int) -> int:
        """A whole number, which is the same for all layers."""
        found = self._get(key, *default)
        if type(found) is list and len(set(found)) == 1:
            found = found[0]
        if type(found) is not int or not 0 < found < 1 << 31:
            raise ValueError(f"{self._arch}.{key} is {str(found)[:60]}")
        return found

    def _number(self, key: str, *default: float) -> float:
        """A number above zero."""
        found = float(self._get(key, *default))
        if not 0 < found < math.inf:
            raise ValueError(f"{self._arch}.{key} is {found}")
        return found

    def _family(self) -> tuple[str, GgufFamily]:
        mixture = bool(self._get("expert_count", 0))
        for name, family in FAMILIES.items():
            if (family.arch, family.mixture) == (self._arch, mixture):
                return name, family
        titles = ", ".join(dict.fromkeys(f"{family.title} ({family.arch})" for family in FAMILIES.values()))
        what = f"is GGUF of the architecture {self._arch[:60]!r}, which is not read"
        raise ModelError(Problem(what, hint=f"read are {titles}; of others merge the model that it was made from"))

    def config(self) -> Config:
        """As transformers has it."""
        named, family = self._family()
        layers, hidden = self._count("block_count"), self._count("embedding_length")
        heads = self._count("attention.head_count")
        if layers > min(len(self._tensors), _MOST_LAYERS):
            raise ValueError(f"{layers:,} layers of {len(self._tensors):,} tensors")
        head = self._count("attention.key_length", hidden // heads)
        if self._count("attention.value_length", head) != head:
            raise ValueError("keys and values are of different sizes")
        found: Config = {
            "architectures": [named],
            "model_type": named.removesuffix("ForCausalLM").lower() if family.paired else _MODEL_TYPES.get(
                self._arch, self._arch),
            "hidden_act": family.act,
            "vocab_size": self._tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head,
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": self._dtype(),
        }  # fmt: skip
        return found | self._own(named, family) | self._mixture(family) | self._rope(family, head) | self._ends()

    def _dtype(self) -> str:
        """That of its matrices, if all are in float32 or all in float16; else what models are made in."""
        kinds = {each.kind for name, each in self._tensors.items() if len(each.shape) > 1 and "_inp" not in name}
        return "float32" if kinds == {"F32"} else "float16" if kinds == {"F16"} else "bfloat16"

    def _own(self, named: str, family: GgufFamily) -> Config:
        """What only some families say."""
        found: Config = {}
        if named == "LlamaForCausalLM":
            found["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        if family.window:
            scale = self._count("attention.key_length")
            if self._count("block_count") == family.largest:
                scale = self._count("embedding_length") // self._count("attention.head_count")
            found |= {"hidden_activation": family.act, "query_pre_attn_scalar": scale}
        if window := self._get("attention.sliding_window", 0):
            found["sliding_window"] = int(window)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if family.window:
                found[key] = self._number(key) if self._get(key, None) is not None else None
        return found

    def _mixture(self, family: GgufFamily) -> Config:
        if not family.mixture:
            return {}
        found: Config = {"num_experts_per_tok": self._count("expert_used_count")}
        if family.arch == "llama":
            return found | {"num_local_experts": self._count("expert_count")}
        found |= {"num_experts": self._count("expert_count"), "norm_topk_prob": bool(family.normed)}
        found["moe_intermediate_size"] = self._tensors["blk.0.ffn_gate_exps.weight"].shape[-2]
        if shared := self._tensors.get("blk.0.ffn_gate_shexp.weight"):
            found["shared_expert_intermediate_size"] = shared.shape[0]
        return found

    def _rope(self, family: GgufFamily, head: int) -> Config:
        """How positions are turned, in the words of all versions of transformers."""
        found: Config = {"rope_theta": self._number("rope.freq_base", 10000.0)}
        if family.arch == "gemma3":
            found["rope_local_base_freq"] = self._number("rope.freq_base_swa", 10000.0)
        turned = self._count("rope.dimension_count", head)
        if turned != head:
            found["partial_rotary_factor"] = turned / head
        way = self._get("rope.scaling.type", "none")
        scaling: Config = {}
        if _FACTORS[0] in self._tensors:
            scaling = self._llama3(found["rope_theta"], head)
        elif _FACTORS[1] in self._tensors:
            first = self._count("rope.scaling.original_context_length")
            scaling = {"rope_type": "longrope"} | {
                f"{end}_factor": self._numbers(f"rope_factors_{end}.weight") for end in ("long", "short")
            }
            found["original_max_position_embeddings"] = first
        elif way in ("linear", "yarn"):
            scaling = {"rope_type": way, "factor": self._number("rope.scaling.factor")}
            if way == "yarn":
                scaling["original_max_position_embeddings"] = self._count("rope.scaling.original_context_length")
        elif way != "none":
            raise ValueError(f"positions scaled by {str(way)[:60]}")
        return found | ({"rope_scaling": scaling} if scaling else {})

    def _llama3(self, theta: float, head: int) -> Config:
        """The scaling of Llama 3.1 and later ones, whose files say by what each frequency is divided: 1 those of four
        turns and more, all of it those of fewer than one; between, that tells of how many tokens the turns are."""
        stored = self._numbers(_FACTORS[0])
        factor = float(round(max(stored), 3))
        kept = [(1 / each - 1 / factor) / (1 - 1 / factor) for each in stored]
        known = next((place for place, share in enumerate(kept) if _CLOSE < share < 1 - _CLOSE), None)
        first = 8192
        if known is not None:
            first = round((1 + 3 * kept[known]) * 2 * math.pi * theta ** (2 * known / head))
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        made = llama3_factors({**scaling, "rope_theta": theta}, head, first)
        if len(made) != len(stored) or any(abs(a / b - 1) > _CLOSE for a, b in zip(made, stored, strict=True)):
            raise ValueError(f"{_FACTORS[0]} are not those of Llama 3")
        return {**scaling, "original_max_position_embeddings": first}

    def _ends(self) -> Config:
        keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        ids = {key: self._said.get(f"tokenizer.ggml.{name}_token_id") for key, name in keys.items()}
        return {key: number if type(number) is int else None for key, number in ids.items()}


# ---- tensors --------------------------------------------------------------------------------------------------------


def _unpack(model: GgufModel, config: Config, placed: Mapping[str, tuple[str, PlacedTensor]]) -> Unpacked:
    names, dtype = model.names(), stated_dtype(config)
    tensors, packed = dict[str, TensorInfo](), dict[str, PackedTensor]()
    for there, (file, found) in placed.items():
        if there in _FACTORS:
            continue
        if there not in names:
            raise _refusal(f"holds {there[:60]!r}, which is not known of {model.family.title}")
        for name, each in _split(names[there], found):
            turned = model.tensor(name, each.shape, "F32")
            assert turned is not None, "named by llama.cpp"
            tensors[name], as_stored = _stored(name, each, file, dtype, turned)
            if as_stored is not None:
                packed[name] = as_stored
    return Unpacked(tensors, config, packed)


def _split(name: str, found: PlacedTensor) -> Iterator[tuple[str, PlacedTensor]]:
    """The tensors of transformers that a tensor is: one, or one for each expert."""
    if ".experts." not in name:
        is_row = name.endswith("shared_expert_gate.weight") and len(found.shape) == 1
        yield name, replace(found, shape=(1, *found.shape)) if is_row else found
        return
    count, size = found.shape[0], (found.stop - found.start) // found.shape[0]
    if len(found.shape) != 3:
        raise _refusal(f"holds {found.name[:60]!r} as {list(found.shape)}, which are no matrices of experts")
    for number in range(count):
        start = found.start + number * size
        own = re.sub(r"\.experts\.", f".experts.{number}.", name)
        yield own, replace(found, shape=found.shape[1:], start=start, stop=start + size)


def _stored(
    name: str, found: PlacedTensor, file: str, dtype: str, turned: GgufTensor
) -> tuple[TensorInfo, PackedTensor | None]:
    """The tensor as it would be stored; and how it is, where its bytes are not those."""
    info = TensorInfo(name, dtype, found.shape, file, found.start, found.stop)
    if found.kind == dtype and not turned.head_rows and not turned.added:
        return info, None
    rows = found.shape if len(found.shape) == 1 else found.shape[:-1]
    codes = replace(info, dtype="U8", shape=(*rows, info.nbytes // math.prod(rows)))
    settings = {"head_rows": turned.head_rows, "added": -turned.added}
    return info, PackedTensor(form_of_kind(found.kind), {"codes": codes}, found.shape, settings)
