"""GGUF files as models of a merge: every number, name, config and token of them, and what is refused.

Not here: GGUF files that are written (test_gguf).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from calls import Command, called
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import _type_traits, dequantize, quantize
from ggufs import FAMILIES, TEXT, model, of_bytes, of_pieces, recipe
from loopback import LoopbackHub
from merging import merged
from numpy.typing import NDArray
from safetensors.torch import load_file
from thorough import thorough_only
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from merger.errors import MergerError, ModelError, RecipeError
from merger.evaluation.evaluate import prepare_measuring
from merger.models.gguf.header import find_gguf, read_gguf_header
from merger.models.gguf.layout import encode
from merger.models.gguf.tokenizer import tokenizer_of
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe
from merger.verification.verify import Extent, verify

KINDS = [GGMLQuantizationType.F32, GGMLQuantizationType.F16, *_type_traits]
SIDE, HEADS, HEAD, ROWS = 256, 4, 8, 33
Bytes = NDArray[np.uint8]


def alone(path: Path | str, dtype: str = "bfloat16") -> str:
    return f"merge_method: passthrough\ndtype: {dtype}\nmodels: [{{model: {path}}}]\n"


# ---- numbers --------------------------------------------------------------------------------------------------------


def finite(draw: np.random.Generator, kind: GGMLQuantizationType, rows: int) -> Bytes:
    """Random bytes, drawn anew where they are no numbers."""
    together, nbytes = GGML_QUANT_SIZES[kind]
    found = draw.integers(0, 256, (rows * SIDE // together, nbytes), np.uint8)
    with np.errstate(all="ignore"):
        while len(wrong := np.flatnonzero(~(abs(dequantize(found, kind)) < 1e30).all(1))):
            found[wrong] = draw.integers(0, 256, (len(wrong), nbytes), np.uint8)
    return found.reshape(rows, -1)


@pytest.fixture(scope="module")
def of_every_type(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Bytes], dict[str, torch.Tensor]]:
    """A file with a layer of each type that `gguf` reads, written by `gguf`; its bytes, and what is read of it."""
    folder, draw = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(len(KINDS))
    writer.add_embedding_length(SIDE)
    writer.add_head_count(HEADS)
    writer.add_feed_forward_length(SIDE)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(ROWS)])
    writer.add_token_scores([0.0] * ROWS)
    writer.add_token_types([3] * ROWS)
    stored = {"token_embd.weight": (GGMLQuantizationType.Q4_K, finite(draw, GGMLQuantizationType.Q4_K, ROWS))}
    for layer, kind in enumerate(KINDS):
        stored[f"blk.{layer}.attn_q.weight"] = kind, finite(draw, kind, HEADS * HEAD)
        stored[f"blk.{layer}.ffn_down.weight"] = kind, finite(draw, kind, 9)
    for name, (kind, numbers) in stored.items():
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    merged(alone(folder / "model.gguf", "float32"), folder / "out")
    return {name: numbers for name, (_, numbers) in stored.items()}, load_file(folder / "out/model.safetensors")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_type_is_read_as_gguf_reads_it(
    of_every_type: tuple[dict[str, Bytes], dict[str, torch.Tensor]], kind: GGMLQuantizationType
) -> None:
    """Bit for bit; the rows of q and k, which llama.cpp has in pairs, where transformers has them."""
    stored, found = of_every_type
    layer = KINDS.index(kind)
    down = dequantize(stored[f"blk.{layer}.ffn_down.weight"], kind)
    np.testing.assert_array_equal(found[f"model.layers.{layer}.mlp.down_proj.weight"].numpy(), down)
    turned = dequantize(stored[f"blk.{layer}.attn_q.weight"], kind).reshape(HEADS, -1, 2, SIDE)
    q = found[f"model.layers.{layer}.self_attn.q_proj.weight"].numpy()
    np.testing.assert_array_equal(q, turned.swapaxes(1, 2).reshape(-1, SIDE))


# ---- models ---------------------------------------------------------------------------------------------------------

QUICK = ("Llama", "Gemma3", "Qwen2Moe", "Phi3")
ORACLE: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": False}, "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 128}, "Gemma2": {},
    "Gemma3": {}, "Phi3": {}, "Qwen3Moe": {"moe_intermediate_size": 768},
}  # fmt: skip
"""Sizes that transformers reads of a GGUF file, or takes for granted."""


def in_gguf(folder: Path, family: str, *kinds: str, pieces: bool = False, **more: Any) -> Path:
    """A small model, its file in the first of these types beside others."""
    made = model(folder / "one", family, of_pieces() if pieces else of_bytes(), **more)
    merged(recipe(made, *kinds), folder / "out")
    return folder / f"out/model-{kinds[0]}.gguf"


@pytest.mark.parametrize("family", [pytest.param(of, marks=() if of in QUICK else thorough_only) for of in FAMILIES])
def test_a_model_comes_back_from_its_gguf_file(tmp_path: Path, family: str) -> None:
    """Each tensor under its name, bit for bit, and a config with which transformers computes the same."""
    merged(alone(in_gguf(tmp_path, family, "F32")), tmp_path / "back")
    own, back = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "back"))
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)
    ids = torch.arange(64)[None]
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("one", "back"))
    assert torch.equal(first, second)


def test_a_file_is_read_as_another_writer_lays_it_out(tmp_path: Path) -> None:
    """As llama.cpp's own converter: by `gguf`, the gate of the shared expert without its axis of one row."""
    path, again = in_gguf(tmp_path, "Qwen2Moe", "Q8_0"), tmp_path / "again.gguf"
    reader = GGUFReader(path)
    writer = GGUFWriter(again, "qwen2moe")
    writer.add_custom_alignment(64)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for tensor in reversed(reader.tensors):
        is_gate = "ffn_gate_inp_shexp" in tensor.name
        writer.add_tensor(tensor.name, tensor.data.squeeze() if is_gate else tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    results = [tmp_path / name for name in ("one-way", "other")]
    for source, to in zip((path, again), results, strict=True):
        merged(alone(source), to)
    first, second = (load_file(folder / "model.safetensors") for folder in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (results[0] / "tokenizer.json").read_bytes() == (results[1] / "tokenizer.json").read_bytes()


@thorough_only
@pytest.mark.parametrize("family", ORACLE)
def test_transformers_reads_the_same(tmp_path: Path, family: str) -> None:
    """Of a file in few bits, in all that it reads itself."""
    path = in_gguf(tmp_path, family, "Q8_0", **ORACLE[family])
    merged(alone(path, "float32"), tmp_path / "back")
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("pieces", [False, True])
def test_its_tokenizer_cuts_texts_as_the_models(tmp_path: Path, pieces: bool) -> None:
    """Of bytes, and of pieces; what begins a text, special tokens and chat template come along."""
    merged(alone(in_gguf(tmp_path, "Llama", "F32", pieces=pieces)), tmp_path / "back")
    own, back = (Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("one", "back"))
    for text in (TEXT, "  the dog\n\n 12", "<s>h\u00e9llo</s> the", "\u4f60"):
        assert own.encode(text).ids == back.encode(text).ids, text
    assert {token: number for token, number in back.get_vocab().items() if "[PAD" not in token} == own.get_vocab()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert loaded(TEXT).input_ids == own.encode(TEXT).ids
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
    assert loaded.chat_template == "{{ messages }}"


def test_gguf_and_safetensors_of_one_model_are_merged(tmp_path: Path) -> None:
    """In parts, too; config and tokenizer are the base's, and the plan says what carries an error."""
    made = model(tmp_path / "one", "Qwen2")
    merged(recipe(made, "Q4_0"), tmp_path / "out", shard_size=60_000)
    merged(recipe(made, "Q8_0"), tmp_path / "whole")
    part = min((tmp_path / "out").glob("*.gguf"))
    assert part.name.startswith("model-Q4_0-00001-of-0000")
    text = "merge_method: linear\nbase_model: {0}\nmodels: [{{model: {0}}}, {{model: {1}}}, {{model: {2}}}]\n"
    planned = merged(text.format(made, part, tmp_path / "whole/model-Q8_0.gguf"), tmp_path / "merge", card=True)
    (told,) = (note for note in planned.notes if "few bits" in note)
    assert f"{part.name} (GGUF Q4_0, GGUF Q8_0)" in told or f"{part.name} (GGUF Q8_0, GGUF Q4_0)" in told
    own, found = (load_file(folder / "model.safetensors") for folder in (made, tmp_path / "merge"))
    name = "model.layers.1.mlp.up_proj.weight"
    few = [rounded(own[name], kind) for kind in ("Q4_0", "Q8_0")]
    expected = torch.stack([own[name].float(), *few]).double().mean(0).bfloat16()
    assert (found[name].float() - expected.float()).abs().max() <= expected.abs().max() / 128
    assert (tmp_path / "merge/config.json").read_text() == (made / "config.json").read_text()
    assert json.loads((tmp_path / "merge/tokenizer.json").read_text()) == json.loads(of_bytes().to_str())
    assert verify(str(tmp_path / "merge"), Options(threads=1), Extent(everything=True)).passed


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    number = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(x.float().numpy(), number), number))


def test_a_file_is_brought_into_safetensors_or_another_type(tmp_path: Path) -> None:
    """By the command; the lock names the file, and nothing that was made of it."""
    path = in_gguf(tmp_path, "Qwen3", "F16", "Q8_0")
    path.with_name("model-Q8_0.gguf").rename(tmp_path / "model.gguf")
    for more in ([], ["--gguf", "Q4_0"]):
        to = str(tmp_path / f"to{len(more)}")
        done = called(["convert", str(tmp_path / "model.gguf"), *more, "--to", to, "--quiet"])
        assert (done.code, done.err) == (0, "")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "to0")
    assert found.dtype == torch.bfloat16
    lock = yaml.safe_load((tmp_path / "to0/merger.lock.yaml").read_text())
    assert [file["file"] for file in lock["models"][0]["files"]] == ["model.gguf"]
    assert r"(GGUF Q8\_0)" in (tmp_path / "to0/README.md").read_text()
    assert GGUFReader(tmp_path / "to2/model-Q4_0.gguf").tensors


# ---- repos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [
    "org/both/m-Q8_0.gguf", *(pytest.param(place, marks=thorough_only) for place in ("org/one", "org/deep/Q8_0")),
])  # fmt: skip
def test_a_model_is_read_from_the_hub(place: str, tmp_path: Path, hub: LoopbackHub, command: Command) -> None:
    """A repo or folder of one file is that, of several one is named; the lock has it, and its licence is the card's."""
    path = in_gguf(tmp_path, "Llama", "Q8_0")
    beside = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}", "mmproj-F16.gguf": b"GGUF"}
    hub.add_model("org/one", {"m-Q8_0.gguf": path.read_bytes(), **beside})
    hub.add_model("org/both", {f"m-{kind}.gguf": path.read_bytes() for kind in ("BF16", "Q8_0")})
    hub.add_model("org/deep", {"Q8_0/m.gguf": path.read_bytes()})
    (tmp_path / "mine.yaml").write_text(alone(place))
    done = command("run", "mine.yaml", "--to", "there", "--quiet", cwd=tmp_path, hub=hub)
    assert done.returncode == 0, done.stderr
    merged(alone(path), tmp_path / "here")
    assert (tmp_path / "there/model.safetensors").read_bytes() == (tmp_path / "here/model.safetensors").read_bytes()
    assert f"model: {place}" in (tmp_path / "there/merger.lock.yaml").read_text()
    assert ("license: mit" in (tmp_path / "there/README.md").read_text()) == (place == "org/one")


@thorough_only
@pytest.mark.parametrize(("place", "told"), [
    ("org/both", "holds several GGUF files (a.gguf, b.gguf)"), ("org/deep", "name the folder that is meant: .../Q8_0"),
    ("org/both/c.gguf", "there is no 'c.gguf' in org/both"),
])  # fmt: skip
def test_what_is_no_one_file_of_a_repo_is_refused(
    place: str, told: str, tmp_path: Path, hub: LoopbackHub, command: Command
) -> None:
    """With the names that there are."""
    hub.add_model("org/both", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    hub.add_model("org/deep", {"Q8_0/m.gguf": b"GGUF"})
    (tmp_path / "mine.yaml").write_text(alone(place))
    done = command("plan", "mine.yaml", cwd=tmp_path, hub=hub)
    assert (done.returncode, told in done.stderr) == (3, True), done.stderr


@pytest.mark.parametrize(("files", "expected"), [
    (["a.gguf", "README.md", "mmproj-a.gguf", "a.imatrix.gguf"], ["a.gguf"]),
    (["b-00002-of-00002.gguf", "b-00001-of-00002.gguf"], ["b-00001-of-00002.gguf", "b-00002-of-00002.gguf"]),
    (["a.gguf", "model.safetensors"], []), (["a.gguf", "pytorch_model.bin"], []), (["q/a.gguf"], []),
    (["b-00001-of-00002.gguf"], "has 1 of 2 parts"), (["a.gguf", "b.gguf"], "several GGUF files"),
    (["a-00001-of-00001.gguf", "b.gguf"], "several GGUF files"),
])  # fmt: skip
def test_the_files_of_a_model_are_found(files: list[str], expected: list[str] | str) -> None:
    """Those of language models; safetensors and pickles beside them are what the model is."""
    if isinstance(expected, list):
        assert find_gguf(files) == expected
        return
    with pytest.raises(ModelError, match=expected):
        find_gguf(files)


# ---- what is refused ------------------------------------------------------------------------------------------------

Pairs = dict[str, Any]
Tensors = list[tuple[str, tuple[int, ...], int, int]]


def header(
    said: Pairs, tensors: Tensors, magic: bytes = b"GGUF", version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    """The first bytes of a file; by its tensors' names their sides, the columns first, types and places."""
    there, entries = counts or (len(tensors), len(said))
    found = magic + struct.pack("<IQQ", version, there, entries)
    found += b"".join(encode(key, value) for key, value in said.items())
    for name, sides, kind, place in tensors:
        found += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
        found += struct.pack("<IQ", kind, place)
    return found + bytes(-len(found) % 32)


SAID: Pairs = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 32, "llama.context_length": 64,
    "llama.attention.head_count": 2, "llama.feed_forward_length": 32, "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
EMBEDDING = ("token_embd.weight", (32, 4), 0, 0)
BAD: dict[str, tuple[bytes, str]] = {
    "no GGUF": (header(SAID, [EMBEDDING], b"GGML"), "it is no GGUF file"),
    "empty": (b"", "cut short"),
    "version 1": (header(SAID, [EMBEDDING], version=1), "of version 1, and 2 and 3 are read"),
    "big-endian": (header(SAID, [EMBEDDING], version=3 << 24), "it is big-endian"),
    "torn": (header(SAID, [EMBEDDING])[:150], "cut short"),
    "entries beyond the file": (header(SAID, [EMBEDDING], counts=(1, 1 << 40)), "more than 3,000,000 values"),
    "tensors beyond the file": (header(SAID, [EMBEDDING], counts=(1000, len(SAID))), "it promises 1,000 values"),
    "a list beyond the file": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2_000_000), "cut short"),
    "a text beyond the file": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50) + bytes(9), "cut short"),
    "a list of lists": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + bytes(40), "of type 9"),
    "a value of no type": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77), "of type 77"),
    "a type nobody knows": (header(SAID, [("token_embd.weight", (32, 4), 99, 0)]), "of type 99"),
    "a type of whole numbers": (header(SAID, [("token_embd.weight", (32, 4), 26, 0)]), "of type 26"),
    "a row of half a block": (header(SAID, [("token_embd.weight", (33, 4), 8, 0)]), "has 32 numbers a block"),
    "no rows": (header(SAID, [("token_embd.weight", (32, 0), 0, 0)]), "has 1 numbers a block"),
    "nine dimensions": (header(SAID, [("token_embd.weight", (1,) * 9, 0, 0)]), "has 9 dimensions"),
    "beyond the end": (header(SAID, [("token_embd.weight", (32, 4), 0, 544)]), "reaches beyond the file's end"),
    "of all memory": (header(SAID, [("token_embd.weight", (1 << 60, 1 << 60), 0, 0)]), "reaches beyond"),
    "one in another": (header(SAID, [EMBEDDING, ("output.weight", (32, 4), 8, 480)]), "reaches into"),
    "aligned to nothing": (header({**SAID, "general.alignment": 0}, [EMBEDDING]), "aligned to 0"),
    "a tensor twice": (header(SAID, [EMBEDDING, ("token_embd.weight", (32, 4), 8, 512)]), "stands twice"),
    "an entry twice": (header(SAID, [EMBEDDING]).replace(b"context_length", b"context_lengtj", 1)
                       .replace(b"embedding_length", b"embedding_lengtk"), "no llama.embedding_length"),
    "no architecture": (header({}, [EMBEDDING]), "has no general.architecture"),
    "another architecture": (header({"general.architecture": "mamba"}, [EMBEDDING]), "of the architecture 'mamba'"),
    "too many layers": (header({**SAID, "llama.block_count": 10**9}, [EMBEDDING]), "1,000,000,000 layers of 1"),
    "a number without end": (header({**SAID, "llama.rope.freq_base": float("inf")}, [EMBEDDING]), "freq_base is inf"),
    "no heads": (header({**SAID, "llama.attention.head_count": 0}, [EMBEDDING]), "head_count is 0"),
    "sizes that are no numbers": (header({**SAID, "llama.embedding_length": "x"}, [EMBEDDING]), "length is x"),
    "no embedding": (header(SAID, [("output.weight", (32, 4), 8, 0)]), "has no token_embd.weight"),
    "a tensor nobody knows": (header(SAID, [EMBEDDING, ("blk.0.odd.weight", (32, 4), 8, 512)]), "'blk.0.odd.weight'"),
    "positions scaled otherwise": (header({**SAID, "llama.rope.scaling.type": "odd"}, [EMBEDDING]), "scaled by odd"),
    "one of several parts": (header({**SAID, "split.count": 3}, [EMBEDDING]), "is one of 3 parts, and 1 are there"),
    "no tokenizer": (header(SAID, [EMBEDDING]), "holds no tokenizer"),
}  # fmt: skip
"""What stands before a kilobyte of numbers, and what is said of it."""


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path: Path, case: str) -> None:
    """At its place in the recipe, with a sentence; before anything is believed that it says."""
    first, sentence = BAD[case]
    (tmp_path / "bad.gguf").write_bytes(first + (bytes(1024) if len(first) % 32 == 0 and first else b""))
    with pytest.raises(MergerError) as refused:
        merged(alone(tmp_path / "bad.gguf"), tmp_path / "out")
    (problem,) = refused.value.problems
    assert sentence in problem.what
    assert problem.at is not None
    assert problem.hint


def test_a_tokenizer_that_is_not_known_is_taken_from_another(tmp_path: Path) -> None:
    """The base's, or that which the recipe names."""
    made = model(tmp_path / "one", "Llama")
    merged(recipe(made, "F32"), tmp_path / "out")
    path = tmp_path / "out/model-F32.gguf"
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"qwenX"))
    with pytest.raises(ModelError, match="holds no tokenizer"):
        merged(alone(path), tmp_path / "no")
    merged(f"{alone(path)}base_model: {made}\n", tmp_path / "base")
    assert (tmp_path / "base/tokenizer.json").exists()


WORDS: Pairs = {
    "general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.token_type": [1, 1, 3], "tokenizer.ggml.merges": ["a b"],
}  # fmt: skip


@pytest.mark.parametrize("wrong", [
    {"model": "bert"}, {"pre": "qwenX"}, {"pre": ["gpt-2"]}, {"tokens": ["a" * 2000, "b", "ab"]}, {"token_type": [1]},
    {"tokens": 7}, {"merges": [7]}, {"merges": 7}, {"bos_token_id": 99, "add_bos_token": True}, {"tokens": []},
    {"tokens": ["a" * 900] * 12_000, "token_type": [1] * 12_000}, {"model": "llama", "merges": []},
], ids=" ".join)  # fmt: skip
def test_a_tokenizer_is_made_of_sound_metadata_alone(wrong: Pairs) -> None:
    """Of others there is none, whatever is wrong with them."""
    assert set(tokenizer_of(WORDS)) == {"tokenizer.json", "tokenizer_config.json"}
    assert tokenizer_of(WORDS | {f"tokenizer.ggml.{key}": value for key, value in wrong.items()}) == {}


def test_what_reads_a_models_files_itself_refuses_gguf(tmp_path: Path) -> None:
    """The command that compares two models, and the scoring of parents."""
    path = in_gguf(tmp_path, "Qwen2", "Q8_0")
    done = called(["diff", str(path), str(tmp_path / "one")])
    assert (done.code, "is GGUF, which is read only to be merged" in done.err) == (3, True)
    (tmp_path / "t.txt").write_text(TEXT * 9)
    text = f"{alone(path)}evaluate: {{perplexity: [{{text: {tmp_path}/t.txt}}], parents: true}}\n"
    (tmp_path / "r.yaml").write_text(text)
    planned, _ = plan(read_recipe(tmp_path / "r.yaml"), Options(threads=1))
    with pytest.raises(RecipeError, match="a parent in GGUF is not measured"):
        prepare_measuring(planned, "cpu", None)


def test_a_header_is_read_in_few_pieces_and_no_further(tmp_path: Path) -> None:
    """Of a file of any size; each piece twice as long as what is there."""
    said = {**SAID, "tokenizer.ggml.tokens": ["token"] * 200_000}
    first, asked = header(said, [EMBEDDING]), list[tuple[int, int]]()

    def fetch(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return (first + bytes(1 << 23))[start:stop]

    found = read_gguf_header("m.gguf", len(first) + (1 << 40), fetch, lambda count: None)
    assert len(found.metadata["tokenizer.ggml.tokens"]) == 200_000
    assert asked == [(0, 1 << 20), (1 << 20, 2 << 20), (2 << 20, 4 << 20)]
