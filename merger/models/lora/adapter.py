"""What a LoRA adapter's files hold: names, ranks, scales and places, but no bytes.

Follows PEFT's files: adapter_config.json, and adapter_model.safetensors with names such as
``base_model.model.<module>.lora_A.weight``; and MLX's. Not here: fetching them (lock.lock), where they belong in a
model (changes), and the sum (engine.inputs.readers).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merger.errors import ModelError, Problem
from merger.models.architecture import is_embedding, is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.models.lora.modules import (
    MOST_ENDS,
    AdaptedModule,
    AdaptedParameters,
    Targets,
    by_end,
    of_parameters,
    targeted,
)
from merger.models.tokenizer_files import TokenRows, rows_of, token_rows
from merger.safety.apart import BeyondError
from merger.safety.expressions import compiles, first
from merger.safety.limits import EXPRESSIONS, excess
from merger.safety.numbers import ANY, RANK, Range

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
OF_MLX = "adapters.safetensors"
"""MLX's, whose matrices are transposed and named otherwise."""

_PREFIX = re.compile(r"^base_model\.model\.")
_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_bias)"
    r"(\.weight)?$"
)
_WRAPPED = re.compile(r"\.((token_adapter\.)?base_layer|modules_to_save(\.default)?)(?=\.)")
_UNTRAINED = re.compile(r"\.original_module\.")
"""What PEFT keeps beside a module that is trained as a whole: the model's own, as it was."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_NOT_BUILT = {
    "layer_replication": "it repeats layers of its model",
    "use_qalora": "it groups a quantised model's inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "it takes singular values away from its model",
    "arrow_config": "it routes between adapters while it runs",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "megatron_config": "its layers are Megatron's",
}
KERNELS = (4, 5)
"""How many sides the kernels have that are taken for matrices."""

SHOWN = 3
MERGE_FIRST = "merge it into its model with PEFT's merge_and_unload, and name the folder of the result"
DAMAGED = "the adapter is incomplete or damaged: download it again, or ask its author"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter by itself.

    Args:
        model: the model that it was trained on, as its config names it.
        modules: what it holds for the modules of its model, by their names.
        parameters: what it holds for parameters that PEFT was told by name.
        pipeline: of which of a pipeline's models each module is, by its name; nothing, where all are of one.
        whole: the tensors that it holds whole, in place of its model's, by the names that these have there.
        tokens: the single rows that it holds, in place of its model's, by the names of the tensors that have them.
        transposed: whether its config says that matrices have their inputs first.
        tied: whether a head that it holds whole is its embedding once more.
        aside: why some of its tensors are not read, by their names in its file.
    """

    model: str | None
    modules: Mapping[str, AdaptedModule] = field(repr=False)
    whole: Mapping[str, TensorInfo] = field(repr=False)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict, repr=False)
    transposed: bool = False
    tied: bool = False
    aside: Mapping[str, str] = field(default_factory=dict, repr=False)
    parameters: Sequence[AdaptedParameters] = field(default=(), repr=False)
    pipeline: Mapping[str, str] = field(default_factory=dict, repr=False)


def read_adapter(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Adapter:
    """The adapter that these files hold.

    Args:
        config: adapter_config.json.
        tensors: the tensors of adapter_model.safetensors by name.

    Raises:
        ModelError: it is no LoRA adapter, of a kind that is not built, or damaged; with every problem that was found.
    """
    problems = list(config_problems(config))
    if problems:
        raise ModelError(problems)
    parts, whole, aside = _split_parts(tensors)
    targets = by_end(config.get("target_parameters") or ())
    try:
        pairs, of_modules = of_parameters(parts, targets)
        strengths = read_strengths(config, [*parts, *(one for name in pairs for one in targeted(name, targets))])
    except ValueError as error:
        raise ModelError(Problem(str(error), hint=DAMAGED)) from None
    modules: dict[str, AdaptedModule] = {}
    for name, found in of_modules.items():
        module = read_module(name, found, *strengths[name], config)
        if isinstance(module, Problem):
            problems.append(module)
        else:
            modules[name] = module
    tokens: Mapping[str, TokenRows] = {}
    try:
        tokens = token_rows(tensors, config)
    except ValueError as error:
        problems.append(Problem(f"{CONFIG}: {error}", hint=DAMAGED))
    if not parts and not whole and not tokens:
        problems.append(Problem(f"{TENSORS} holds no tensor", hint=DAMAGED))
    if problems:
        raise ModelError(problems[:SHOWN])
    named = config.get("base_model_name_or_path")
    model = named if isinstance(named, str) else None
    transposed = config.get("fan_in_fan_out") is True
    adapted = [_read_parameters(name, held, strengths, targets, config) for name, held in pairs.items()]
    return Adapter(model, modules, whole, tokens, transposed, _copies_head(config, parts), aside, adapted)


def _copies_head(config: Mapping[str, Any], modules: Iterable[str]) -> bool:
    """Whether a head that is held whole is a tied model's embedding: so PEFT was told, or it trained neither."""
    saved = config.get("modules_to_save")
    trained = [f"{name}.weight" for name in (*(saved if isinstance(saved, list) else ()), *modules)]
    return config.get("ensure_weight_tying") is True or not any(is_embedding(n) or is_head(n) for n in trained)


def config_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    kind = config.get("peft_type")
    if kind != "LORA":
        said = f"is a {kind} adapter" if isinstance(kind, str) else f"{CONFIG} names no peft_type"
        yield Problem(f"{said}; LoRA is the only kind that is built", hint=MERGE_FIRST)
        return
    for key, why in _NOT_BUILT.items():
        if config.get(key):
            yield Problem(f"{CONFIG} has {key}: {why}, which is not built", hint=MERGE_FIRST)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        what = (
            f"{CONFIG} has init_lora_weights: {start}, with which PEFT changes the model too, not only by the adapter"
        )
        hint = "convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...) writes a plain adapter"
        yield Problem(what, hint=hint)
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        yield Problem(f"{CONFIG}: target_parameters is no list of names", hint=DAMAGED)
    elif len(by_end(targets)) > MOST_ENDS:
        what = f"{CONFIG}: target_parameters end with {len(by_end(targets)):,} names, and the limit is {MOST_ENDS}"
        yield Problem(what, hint=DAMAGED)
    elif targets and config.get("use_dora"):
        yield Problem(f"{CONFIG} has use_dora and target_parameters: DoRA of parameters is not built", hint=MERGE_FIRST)
    yield from _number_problems(config)


def _number_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_number(rank, RANK) or not isinstance(rank, int):
        yield Problem(f"{CONFIG} has r: {_show_value(rank)}, which is no rank from {RANK}", hint=DAMAGED)
    if not _is_number(alpha, ANY):
        yield Problem(f"{CONFIG} has lora_alpha: {_show_value(alpha)}, which is no number from {ANY}", hint=DAMAGED)
    for key, within in (("rank_pattern", RANK), ("alpha_pattern", ANY)):
        patterns = config.get(key) or {}
        sound = isinstance(patterns, Mapping) and all(_is_number(value, within) for value in patterns.values())
        if sound and (problem := excess(f"{CONFIG}: {key}", len(patterns), EXPRESSIONS)):
            yield problem
        elif not sound or any(compiles(pattern) for pattern in patterns):
            yield Problem(f"{CONFIG}: {key} is no map of regular expressions to numbers", hint=DAMAGED)


def _is_number(value: Any, within: Range) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and within.holds(value)


def _show_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_Parts = dict[str, dict[str, TensorInfo]]


def _split_parts(tensors: Mapping[str, TensorInfo]) -> tuple[_Parts, dict[str, TensorInfo], dict[str, str]]:
    """The tensors of each module by what they are to it, those that stand for whole tensors, and why some do not."""
    parts: _Parts = defaultdict(dict)
    whole: dict[str, TensorInfo] = {}
    aside: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: _WRAPPED.search(name) is not None):
        own = _PREFIX.sub("", name)
        match, stands_for = _PART.match(own.replace(".lora_B.bias", ".lora_bias")), _WRAPPED.sub("", own)
        if match is not None:
            parts[match["module"]][match["part"]] = tensors[name]
        elif rows_of(name) is not None:
            continue
        elif _UNTRAINED.search(own):
            aside[name] = "the model's own, which PEFT saves beside what it trained in its place"
        elif stands_for in whole:
            aside[name] = "the adapter holds it under another name, too"
        else:
            whole[stands_for] = tensors[name]
    return parts, whole, aside


def _read_parameters(
    name: str,
    held: Sequence[Mapping[str, TensorInfo]],
    strengths: Mapping[str, tuple[int, float]],
    targets: Targets,
    config: Mapping[str, Any],
) -> AdaptedParameters:
    """What is held for a module's parameters; it may be the module itself that is meant, if that has one pair."""
    alone = read_module(name, held[0], *strengths[name], config) if len(held) == 1 else None
    return AdaptedParameters(
        name,
        tuple((pair["lora_A"], pair["lora_B"]) for pair in held),
        {one: strengths[one] for one in targeted(name, targets)},
        alone if isinstance(alone, AdaptedModule) else None,
    )


def read_module(
    name: str, parts: Mapping[str, TensorInfo], rank: int, scale: float, config: Mapping[str, Any]
) -> AdaptedModule | Problem:
    """A module's tensors, if they belong together."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    lacking = [part for part in (first, second) if part not in parts]
    if lacking:
        return Problem(f"{name} has {', '.join(parts)}, but no {lacking[0]}", hint=DAMAGED)
    a, b = (_as_matrix(parts[part]) for part in (first, second))
    if len(a.shape) != 2 or len(b.shape) != 2:
        what = f"{name} is a convolution: its {first} has the shape {dims(a.shape)}"
        return Problem(f"{what}, and only matrices are built", hint=MERGE_FIRST)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        what = f"{name}: {CONFIG} says rank {rank}, but {first} is {dims(a.shape)} and {second} is {dims(b.shape)}"
        return Problem(what, hint=DAMAGED)
    odd = next((part for part in parts.values() if part.dtype not in FLOATS), None)
    if odd is not None:
        return Problem(f"{odd.name} is stored as {odd.dtype}, which is not read", hint=MERGE_FIRST)
    bias, magnitude, kernel = parts.get("lora_bias"), parts.get("lora_magnitude_vector"), parts[first].shape[2:]
    module = AdaptedModule(name, a, b, rank, scale, embedding, bias, magnitude, kernel=kernel)
    return _lengths(module, config) or module


def _as_matrix(tensor: TensorInfo) -> TensorInfo:
    """Of kernels of pictures and films their first side against all others, as they lie there."""
    shape = tensor.shape
    return replace(tensor, shape=(shape[0], math.prod(shape[1:]))) if len(shape) in KERNELS else tensor


def _lengths(module: AdaptedModule, config: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the vectors that go with the matrices."""
    for vector, told in ((module.bias, "lora_B.bias"), (module.magnitude, "lora_magnitude_vector")):
        if vector is not None and vector.entries != module.outputs:
            what = f"{module.name}: {told} has {vector.entries:,} numbers, and lora_B {module.outputs:,} rows"
            return Problem(what, hint=DAMAGED)
    if bool(config.get("use_dora")) != (module.magnitude is not None):
        has = "has" if module.magnitude is not None else "has no"
        what = f"{module.name} {has} lora_magnitude_vector, but {CONFIG} says use_dora: {bool(config.get('use_dora'))}"
        return Problem(what, hint=DAMAGED)
    if module.magnitude is not None and module.embedding:
        return Problem(f"{module.name} is an embedding with DoRA, which is not built", hint=MERGE_FIRST)
    return None


def read_strengths(config: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, tuple[int, float]]:
    """The rank and the scale of each module, or parameter.

    Raises:
        ValueError: the config's regular expressions take too long to try.
    """
    try:
        ranks = _by_pattern(config, "rank_pattern", names, config.get("r", 8))
        alphas = _by_pattern(config, "alpha_pattern", names, config.get("lora_alpha", 8))
    except BeyondError as error:
        raise ValueError(f"{CONFIG}: to try its regular expressions {error}") from None
    divisor = math.sqrt if config.get("use_rslora") else float
    return {name: (int(ranks[name]), alphas[name] / divisor(int(ranks[name]))) for name in names}


def _by_pattern(config: Mapping[str, Any], key: str, modules: Sequence[str], otherwise: float) -> Mapping[str, float]:
    """The modules' numbers: of the first pattern that the end of a name matches, as in PEFT."""
    patterns: Mapping[str, float] = config.get(key) or {}
    values = list(patterns.values())
    found = first(list(patterns), modules, at_end=True)
    return {name: otherwise if place is None else values[place] for name, place in zip(modules, found, strict=True)}


# ---- MLX ------------------------------------------------------------------------------------------------------------

_FUSE_FIRST = "merge it into its model with mlx_lm.fuse (--dequantize), and name the folder of the result"
_MLX_PART = re.compile(r"^(?P<module>.+)\.(?P<part>lora_a|lora_b)$")


def read_mlx(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Adapter:
    """The adapter that files of MLX hold: x lora_a lora_b is added to what a module makes of x, times the scale.

    Args:
        config: adapter_config.json.
        tensors: the tensors of adapters.safetensors by name.

    Raises:
        ModelError: it is no LoRA, of a kind that is not built, or damaged; with every problem that was found.
    """
    kind, given = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    scale: Any = given.get("scale") if isinstance(given, Mapping) else None
    if kind != "lora":
        what = f"is a fine-tune of MLX by {_show_value(kind)}; LoRA is the only kind that is built"
        raise ModelError(Problem(what, hint=_FUSE_FIRST))
    if not _is_number(scale, ANY) or not tensors:
        what = f"{OF_MLX} holds no tensor" if not tensors else f"{CONFIG} has no lora_parameters with a number as scale"
        raise ModelError(Problem(what, hint=DAMAGED))
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name in sorted(tensors):
        match = _MLX_PART.match(name)
        parts[match["module"] if match else name][match["part"] if match else ""] = tensors[name]
    modules = {name: _of_mlx(name, held, float(scale)) for name, held in parts.items()}
    if problems := [problem for problem in modules.values() if isinstance(problem, Problem)]:
        raise ModelError(problems[:SHOWN])
    named = config.get("model")
    model = named if isinstance(named, str) else None
    return Adapter(model, {name: one for name, one in modules.items() if isinstance(one, AdaptedModule)}, {})


def _of_mlx(name: str, parts: Mapping[str, TensorInfo], scale: float) -> AdaptedModule | Problem:
    """A module's two matrices as PEFT has them: the other way round."""
    if parts.keys() != {"lora_a", "lora_b"}:
        first = next(iter(parts.values())).name
        return Problem(f"{first} is not one of a pair lora_a and lora_b, which alone are read of MLX", hint=DAMAGED)
    a, b = parts["lora_a"], parts["lora_b"]
    odd = next((one for one in (a, b) if len(one.shape) != 2 or one.dtype not in FLOATS), None)
    if odd is not None:
        what = f"{odd.name} is {dims(odd.shape)} of {odd.dtype}, and only matrices of floats are read of MLX"
        return Problem(what, hint=_FUSE_FIRST)
    if a.shape[1] != b.shape[0]:
        return Problem(f"{name}: lora_a is {dims(a.shape)} and lora_b is {dims(b.shape)}", hint=DAMAGED)
    a, b = replace(a, shape=a.shape[::-1]), replace(b, shape=b.shape[::-1])
    return AdaptedModule(name, a, b, a.shape[0], scale, is_embedding(f"{name}.weight"), transposed=True)


def dims(shape: Sequence[int]) -> str:
    """A shape as people write it."""
    return "x".join(map(str, shape)) or "a single number"
