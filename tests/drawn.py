"""What is drawn for tests of properties: recipes, options and model folders that are broken in every way.

A sound one is taken and changed in a few places, so that what is drawn gets past the first look. No tests here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import vocabularies
import yaml
from hypothesis import strategies as st

from merger.methods.registry import Method, methods


@dataclass(frozen=True)
class Raw:
    """Text that stands in a file as it is."""

    text: str


@dataclass(frozen=True)
class Trial:
    """A command, and the files that it finds: those of the recipe, and of the model ``m``, beside sound ones."""

    arguments: tuple[str, ...]
    files: Mapping[str, bytes] = field(repr=False)


NUMBERS = (
    0, 1, -1, 2, 0.5, -0.5, 1e-30, 1e6, -1e6, 1000001, 2**31, 2**63, 2**64, -(2**63), 1e38, 1e39, 1e308, 5e-324,
    Raw("9" * 400), Raw("9" * 5000), Raw("-" + "9" * 5000), Raw("1e400"), Raw("-1e400"), Raw("1e-400"),
    Raw("0." + "1" * 5000),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "m", "./m", "./b", "org/none", "a/../b", "é", "\u202e", "\U0001f600", "\u2028", "x" * 3000, "nan",
    "1", "0.5", "true", "*", ".", "..", "/", "~", "a@b", "a+b", "a@b+c@d", "hf://", "model", "{{", "{% for %}",
    "[", "(", "\\", "a\nb",
)  # fmt: skip
ODD = (*NUMBERS, *TEXTS, None, True, False, Raw("[]"), Raw("{}"), Raw("[" * 60 + "]" * 60), Raw("[[1, 2], [3]]"))
YAML_ONLY = (
    Raw(".nan"), Raw(".inf"), Raw("-.INF"), Raw("1:30"), Raw("2024-01-02"), Raw("0x1F"), Raw("1_000"), Raw("&x [*x]"),
    Raw("*nothing"), Raw("!!python/object:os.system {}"), Raw("!!int maybe"), Raw("!!binary aGk="), Raw("? a"),
    Raw('"\\0"'), Raw('"\\ud800"'), Raw("2024-13-45"), Raw("<<"), Raw("{<<: {a: 1}}"), Raw("{? [a] : b}"), Raw("!x y"),
    Raw("&n [1, 2]"), Raw("{a: 1, a: 2}"), Raw("{1: 2}"), Raw("- a"), Raw("\t1"),
)  # fmt: skip
JSON_ONLY = (
    Raw("NaN"), Raw("-Infinity"), Raw('"\\ud800"'), Raw('{"a": 1, "a": 2}'), Raw("[" * 3000 + "]" * 3000), Raw("tru"),
)  # fmt: skip
IN_YAML, IN_JSON = st.sampled_from((*ODD, *YAML_ONLY)), st.sampled_from((*ODD, *JSON_ONLY))


# ---- trees ----------------------------------------------------------------------------------------------------------


@dataclass
class Map:
    """A map whose keys may stand twice."""

    pairs: list[tuple[Any, Any]]


def tree(value: Any) -> Any:
    """Plain data as a tree that can be changed in place."""
    if isinstance(value, Mapping):
        return Map([(key, tree(of)) for key, of in value.items()])
    return [tree(item) for item in value] if isinstance(value, list | tuple) else value


def text(value: Any) -> str:
    """A tree as JSON, which is YAML too."""
    if isinstance(value, Map):
        return "{" + ", ".join(f"{text(key)}: {text(of)}" for key, of in value.pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text, value)) + "]"
    return value.text if isinstance(value, Raw) else json.dumps(value)


def places(value: Any) -> list[tuple[Any, int]]:
    """Each container with each of its places, depth first."""
    items = [of for _, of in value.pairs] if isinstance(value, Map) else value if isinstance(value, list) else []
    return [found for number, of in enumerate(items) for found in ((value, number), *places(of))]


@st.composite
def changed(draw: st.DrawFn, value: Any, odd: st.SearchStrategy[Any], keys: Sequence[str], most: int = 3) -> Any:
    """A tree with a few of its places changed."""
    found = tree(value)
    for _ in range(draw(st.integers(0, most))):
        if where := places(found):
            _change(draw, *draw(st.sampled_from(where)), odd, keys)
    return found


def _change(draw: st.DrawFn, held: Any, number: int, odd: st.SearchStrategy[Any], keys: Sequence[str]) -> None:
    items = held.pairs if isinstance(held, Map) else held
    now = items[number][1] if isinstance(held, Map) else items[number]
    what = draw(st.sampled_from(("odd", "odd", "odd", "gone", "twice", "listed", "mapped", "renamed", "added")))
    new = {"odd": draw(odd), "listed": [now], "mapped": Map([(draw(st.sampled_from(keys)), now)])}.get(what, now)
    key = (
        draw(st.sampled_from(keys))
        if what in ("renamed", "added")
        else items[number][0]
        if isinstance(held, Map)
        else ""
    )
    if what == "gone":
        del items[number]
    elif what in ("twice", "added"):
        items.append((key, draw(odd)) if isinstance(held, Map) else draw(odd))
    else:
        items[number] = (key, new) if isinstance(held, Map) else new


# ---- recipes --------------------------------------------------------------------------------------------------------

KEYS = (
    "merge_method", "models", "slices", "modules", "adapters", "tensors", "base_model", "parameters", "dtype",
    "out_dtype", "seed", "allow_non_finite", "tokenizer", "tokenizer_source", "chat_template", "publish", "lora",
    "extract_lora", "experts", "gate_mode", "name", "model", "layer_range", "sources", "weight", "density", "filter",
    "value", "rank", "alpha", "path", "revision", "source", "tokens", "kind", "token_id", "k", "pad_to_multiple_of",
    "default", "model.layers", "<s>", "residual_scale", "noise_scale", "evaluate", "limit", "private", "template",
)  # fmt: skip
FORMS: tuple[Any, ...] = tuple(yaml.safe_load_all("""
{merge_method: linear, models: [{model: ./m}, {model: ./b, parameters: {weight: 0.5}}], dtype: float16}
---
merge_method: passthrough
slices: [{sources: [{model: ./m, layer_range: [0, 2]}]}, {sources: [{model: ./b, layer_range: [0, 1]}]}]
---
{merge_method: slerp, base_model: ./m, models: [{model: ./b}], seed: 3,
 parameters: {t: [{filter: mlp, value: [0, 0.5, 1]}, {value: 0.3}]}}
---
merge_method: linear
modules:
  model.layers: {slices: [{sources: [{model: ./m, layer_range: [0, 1]}]}]}
  default: {models: [{model: ./b}]}
---
merge_method: ties
base_model: ./a
models: [{model: ./m}, {model: {model: {path: ./b}}}]
tokenizer:
  {source: union, tokens: {<s>: {source: {kind: model_token, model: ./b, token_id: 3}}}, pad_to_multiple_of: 8,
   missing: omp, k: 4}
---
{merge_method: linear, models: [{model: ./m}, {model: ./b}], tokenizer_source: ./m, chat_template: chatml,
 tensors: [{filter: mlp, model: ./b}], publish: {repo: me/x, license: other, license_name: x, private: true}}
---
{base_model: ./m, gate_mode: random, experts_per_token: 1, dtype: bfloat16,
 experts: [{source_model: ./m, noise_scale: 0.1}, {source_model: ./b, residual_scale: 0.5}]}
---
{base_model: ./m, gate_mode: cheap_embed, architecture: mixtral,
 experts: [{source_model: ./m, positive_prompts: [the]}, {source_model: ./b, positive_prompts: [and]}]}
---
extract_lora: {model: ./m, base_model: ./b, rank: 2, alpha: 4, include: mlp, embeddings: true}
---
{merge_method: ties, adapters: [{model: ./l}, {model: ./l}], lora: {rank: 2, alpha: 1.5, core: false}}
---
{merge_method: linear, models: [{model: ./m+./l}, {model: ./b}]}
---
{merge_method: nuslerp, models: [{model: ./m, parameters: {weight: [0, 1]}}, {model: ./b, parameters: {weight: 1}}],
 evaluate: {perplexity: {text: r.yaml, window: 16, stride: 8, limit: 100}, tasks: [x], limit: 3}}
"""))  # fmt: skip


@st.composite
def of_a_method(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe of any method, whose parameters have any values."""
    method: Method = draw(st.sampled_from(sorted(methods().values(), key=lambda found: found.name)))
    value = st.one_of(IN_YAML, st.floats(-2, 2), st.lists(st.one_of(st.floats(0, 1), IN_YAML), max_size=3))
    given = {param.name: draw(value) for param in method.params if param.required or draw(st.booleans())}
    count = max(method.models[0] - (method.base in ("first", "included")), 1)
    count = min(max(count, draw(st.integers(1, 3))), method.models[1] or 3)
    listed = [{"model": name} for name in ("./m", "./b", "./a")[:count]]
    base = {"base_model": "./a"} if method.takes_base else {}
    return {"merge_method": method.name, **base, "models": listed, "parameters": given}


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """The text of a recipe, now and then of several documents, or with a wound that no tree has."""
    documents = draw(
        st.lists(
            st.one_of(st.sampled_from(FORMS), of_a_method()), min_size=1, max_size=draw(st.sampled_from((1, 1, 1, 3)))
        )
    )
    named = [{**of, "name": f"s{number}"} for number, of in enumerate(documents[:-1])]
    told = "\n---\n".join(text(draw(changed(of, IN_YAML, KEYS))) for of in (*named, documents[-1]))
    wound = draw(st.sampled_from((None, None, None, None, "cut", "in", "before", "bytes")))
    place = draw(st.integers(0, len(told)))
    if wound == "cut":
        told = told[:place]
    elif wound == "in":
        told = (
            told[:place]
            + draw(
                st.sampled_from(("\t", "\x00", "\x07", "\u2028", "}", "*a", "&a ", "|", ">", "%", "'", "\n", "\ufeff"))
            )
            + told[place:]
        )
    elif wound == "before":
        told = draw(st.sampled_from(("\ufeff", "%YAML 1.2\n---\n", "---\n---\n", "# x\n", "...\n", "!!map "))) + told
    return told.encode("utf-8", "surrogatepass") + (b"\xff\xfe" if wound == "bytes" else b"")


# ---- options --------------------------------------------------------------------------------------------------------

SIZES = ("1", "1GB", "600MB", "0", "-1", "9" * 400, "9" * 5000, "nan", "1e9", "4 GiB", "0.5KB", "", "9999999TB", "x")
COUNTS = ("1", "2", "0", "-1", "4097", "9" * 400, "9" * 5000, "1.0", "x", "", "²", " 3", "0x2", "nan")
OPTIONS = {
    "--max-memory": SIZES, "--max-disk": SIZES, "--shard-size": SIZES, "--threads": COUNTS, "--seed": COUNTS,
    "--part": ("1/1", "1/2", "2/1", "0/0", "1/" + "9" * 400, "x", ""),
    "--to": ("out", "m", "r.yaml", "", "hf://", "hf://a/b/c", "a\n"),
    "--no-cache": (), "--allow-pickle": (), "--json": (), "--force": (), "--quiet": (), "--stream": (),
}  # fmt: skip
MEANS = ("--max-memory", "--threads", "--no-cache", "--json")


@st.composite
def options(draw: st.DrawFn, known: Sequence[str] = tuple(OPTIONS)) -> list[str]:
    """A few options, mostly with values that nobody means."""
    names = draw(st.lists(st.sampled_from(known), max_size=2, unique=True))
    return [f"{name}={draw(st.sampled_from(OPTIONS[name]))}" if OPTIONS[name] else name for name in names]


# ---- model folders --------------------------------------------------------------------------------------------------

CONFIG_KEYS = (
    *tiny.CONFIG, "num_hidden_layers", "torch_dtype", "dtype", "text_config", "vision_config", "layer_types",
    "quantization_config", "rope_scaling", "auto_map", "_class_name", "tie_word_embeddings", "max_window_layers",
    "sliding_window_pattern", "first_k_dense_replace", "mlp_only_layers", "pad_token_id", "num_experts", "weight_map",
    "peft_type", "rank_pattern", "alpha_pattern", "modules_to_save", "target_modules", "use_dora", "added_tokens",
    "added_tokens_decoder", "model", "vocab", "merges", "type", "content", "id", "__metadata__", "shape",
    "data_offsets",
)  # fmt: skip


@cache
def sound(root: Path) -> dict[str, bytes]:
    """The files of a sound model ``m`` and an adapter ``l``, which are made here, beside the models ``a`` and ``b``."""
    more = {"layer_types": ["full_attention"] * 2, "rope_scaling": {"type": "linear", "factor": 2}}
    for seed, name in enumerate(("a", "b", "m")):
        vocabularies.model(root / name, seed, **more)
    tiny.lora(root / "l", root / "a", rank=2)
    generation = {"bos_token_id": 0, "eos_token_id": [1, 2], "suppress_tokens": [3]}
    (root / "m" / "generation_config.json").write_text(json.dumps(generation))
    (root / "m" / "tokenizer.model").write_bytes(vocabularies.sentencepiece())
    return {f"{name}/{file.name}": file.read_bytes() for name in ("m", "l") for file in (root / name).iterdir()}


WOUNDS = ("json", "json", "json", "json", "header", "header", "gone", "bytes", "added")
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model.safetensors"}}
CONTENTS = (b"", b"\xff", b"null", b"[]", b"3", b'"x"', b"{}", b"[" * 5000, b'{"a": ' * 5000)
ADDED = ("README.md", "LICENSE", "adapter_config.json", "special_tokens_map.json", "model.safetensors.index.json")
CARDS = (
    b"---\nlicense: [1, {a: b}]\nbase_model: 3\ntags: null\nlanguage: {a: 1}\n---\n", b"---\nlicense: mit\n---\n",
    b"---\n- a\n---", b"---\nlicense: 2024-01-02\nlicense_name: [x]\nbase_model: [./a, {b: c}]\n---\n", b"\xff\x00",
    b"{}",
    b"---\nlicense: " + b"[" * 2000 + b"\n---\n", b"---\n" + b"9" * 5000 + b": 1\n---\n", b"x" * 5000,
)  # fmt: skip


@st.composite
def folders(draw: st.DrawFn, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a model and an adapter, some of them wounded, gone or of another kind."""
    found = dict(files)
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(WOUNDS))
        if what == "json":
            name = draw(st.sampled_from([name for name in files if name.endswith(".json")]))
            found[name] = text(draw(changed(json.loads(files[name]), IN_JSON, CONFIG_KEYS))).encode()
        elif what == "header":
            name = draw(st.sampled_from([name for name in files if name.endswith(".safetensors")]))
            found[name] = draw(checkpoints(files[name]))
        elif what == "gone":
            found.pop(draw(st.sampled_from(sorted(files))), None)
        elif what == "bytes":
            name = draw(st.sampled_from(sorted(files)))
            found[name] = draw(st.sampled_from((*CONTENTS, files[name][:-1], files[name] + b"x")))
        else:
            index = text(draw(changed(INDEX, IN_JSON, CONFIG_KEYS))).encode()
            found[f"m/{draw(st.sampled_from(ADDED))}"] = draw(st.sampled_from((*CARDS, index)))
    return found


@st.composite
def checkpoints(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file whose header, or length, or data is not what it should be."""
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    told = text(draw(changed(header, IN_JSON, CONFIG_KEYS, most=2))).encode()
    told = draw(st.sampled_from((told, told, told, told, told + b" ", b" " + told, b"\xef\xbb\xbf" + told, told[:-1])))
    size = draw(st.sampled_from((len(told),) * 8 + (0, len(told) + 1, 2**63, 2**64 - 1, 10**8 + 1)))
    data = draw(st.sampled_from((data, data, data, data, data + b"\0", data[:-1], b"")))
    return struct.pack("<Q", size) + told + data


# ---- trials ---------------------------------------------------------------------------------------------------------


@st.composite
def trials(draw: st.DrawFn, files: Mapping[str, bytes]) -> Trial:
    """A command on what was drawn: any recipe of sound models, a sound recipe of any model, or both unsound."""
    kind = draw(st.sampled_from(("recipe", "recipe", "model", "model", "model", "both")))
    recipe = text(tree(draw(st.sampled_from(FORMS)))).encode() if kind == "model" else draw(recipes())
    held = {"r.yaml": recipe, **(files if kind == "recipe" else draw(folders(files)))}
    run = ["run", "r.yaml", "--to=out", "--quiet", "--threads=1"]
    lines: tuple[list[str], ...] = (
        ["plan", "r.yaml"],
        ["plan", "r.yaml", "--look", *draw(options(tuple(OPTIONS)[:5]))],
        run,
        run,
        [*run, *draw(options())],
        ["extract-lora", "m", "b", f"--rank={draw(st.sampled_from(COUNTS))}", "--to=out", "--quiet"],
        ["diff", "m", "b", "--threads=1"],
        ["verify", "m", *draw(options(MEANS))],
        ["card", "m", "--print"],
        ["status", "m"],
        ["check", "r.yaml"],
        ["methods", draw(st.sampled_from(("ties", "tise", "", "é")))],
    )  # fmt: skip
    if b"evaluate" in recipe:  # to measure takes half a minute
        lines = (lines[0], lines[-2])
    return Trial(tuple(draw(st.sampled_from(lines[: 7 if kind == "model" else None]))), held)
