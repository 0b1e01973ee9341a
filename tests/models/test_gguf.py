"""GGUF files beside a merge: what gguf reads of them, what is refused, and that llama.cpp computes the same.

Not here: the bits of rounded blocks (test_steps).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
import transformers
import yaml
from calls import Command, called
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from ggufs import FAMILIES, TEXT, model, of_bytes, of_pieces, recipe
from loopback import LoopbackHub
from merging import merged
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from merger.errors import RecipeError
from merger.models.gguf.families import llama3_factors
from merger.planning.lockfile import read_lock
from merger.planning.shards import Part
from merger.recipe.blocks.publish import GGUF
from merger.run.options import Options
from merger.verification.verify import Extent, verify


def tensors(*paths: Path) -> dict[str, Any]:
    return {tensor.name: tensor for path in paths for tensor in GGUFReader(path).tensors}


def said(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def test_beside_eight_bits_a_gguf_file_is_made_of_all(tmp_path: Path) -> None:
    """Its tensors are those that lie beside a result in all bits."""
    text = recipe(model(tmp_path / "one", "Llama"), "Q8_0", "Q4_0")
    merged(text, tmp_path / "plain")
    planned = merged(text.replace("{gguf", "{fp8: block, gguf"), tmp_path / "eight")
    assert len(planned.gguf) == 2
    for file in planned.gguf:
        here, there = (tensors(tmp_path / of / file) for of in ("eight", "plain"))
        assert here.keys() == there.keys()
        assert all(np.array_equal(here[name].data, there[name].data) for name in here)


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_reads_what_is_written(tmp_path: Path, family: str) -> None:
    """Names, shapes and each number of a family's tensors: the result's, as llama.cpp wants them."""
    made = model(tmp_path / "one", family)
    planned = merged(recipe(made, "F32", "Q8_0"), tmp_path / "out")
    found = {kind: tensors(tmp_path / "out" / f"model-{kind}.gguf") for kind in ("F32", "Q8_0")}
    result = load_file(tmp_path / "out" / "model.safetensors")
    written = [tensor for tensor in planned.shards[0].beside[0].tensors if tensor.sources]
    assert sorted(source for tensor in written for source in tensor.sources) == sorted(result)
    assert set(found["F32"]) - {tensor.name for tensor in written} <= {
        "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight",
    }  # fmt: skip
    config = json.loads((made / "config.json").read_text())
    for tensor in written:
        parts = [result[source].float() for source in tensor.sources]
        x = torch.stack(parts) if "_exps." in tensor.name else parts[0]
        part = tensor.sources[0].split(".")[-2]
        if family in ("Llama", "Mistral", "Mixtral") and part in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
            size = len(x) // heads
            x = x[
                [
                    head * size + half * size // 2 + place
                    for head in range(heads)
                    for place in range(size // 2)
                    for half in (0, 1)
                ]
            ]
        if family.startswith("Gemma") and part.endswith("norm"):
            x = x + 1
        np.testing.assert_array_equal(found["F32"][tensor.name].data, x.numpy())
        other = found["Q8_0"][tensor.name]
        assert (
            other.tensor_type == GGMLQuantizationType["Q8_0" if x.ndim > 1 and "gate_inp" not in tensor.name else "F32"]
        )
        np.testing.assert_array_equal(other.data, quantize(x.numpy(), other.tensor_type))


def test_the_metadata_is_the_configs_and_the_tokenizers(tmp_path: Path) -> None:
    """Sizes, positions, tokens with their kinds, merges, special ids, chat template; the lock has the file."""
    made = model(tmp_path / "one", "Llama")
    merged(recipe(made, "BF16"), tmp_path / "out", card=True)
    found = said(tmp_path / "out" / "model-BF16.gguf")
    expected = {
        "general.architecture": "llama", "general.file_type": 32, "llama.block_count": 2, "llama.context_length": 256,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 5e5,
        "llama.rope.dimension_count": 16, "llama.vocab_size": 200, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    kept = json.loads(of_bytes().to_str())["model"]
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[: len(kept["vocab"])] == sorted(kept["vocab"], key=kept["vocab"].__getitem__)
    assert tokens[len(kept["vocab"]) :] == [f"[PAD{number}]" for number in range(len(kept["vocab"]), 200)]
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in kept["merges"]]
    held = read_lock((tmp_path / "out" / "merger.lock.yaml").read_text(), "lock")
    assert held.gguf == ("BF16",)
    assert held.output["model-BF16.gguf"].size == (tmp_path / "out" / "model-BF16.gguf").stat().st_size
    assert verify(str(tmp_path / "out"), Options(threads=1), Extent(everything=True)).passed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-cli" in card
    assert "`llama-quantize model-BF16.gguf Q4_K_M`" in card


def test_several_shards_are_parts_of_one_gguf(tmp_path: Path) -> None:
    """Each is made with its shard; the first has the metadata, all count the tensors of all."""
    made = model(tmp_path / "one", "Qwen3")
    planned = merged(recipe(made, "Q4_0"), tmp_path / "out", shard_size=60_000)
    parts = sorted((tmp_path / "out").glob("*.gguf"))
    count = len(planned.shards)
    assert [part.name for part in parts] == [f"model-Q4_0-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    assert len(parts) > 2
    found, whole = [said(part) for part in parts], tensors(*parts)
    assert [each["split.no"] for each in found] == list(range(count))
    assert {each["split.tensors.count"] for each in found} == {len(whole)}
    assert len(found[0]) > 30 > len(found[1])
    assert whole["token_embd.weight"].tensor_type == GGMLQuantizationType.Q8_0
    assert whole["blk.0.ffn_up.weight"].tensor_type == GGMLQuantizationType.Q4_0


def test_the_experts_of_a_layer_are_one_tensor_of_one_part(tmp_path: Path) -> None:
    """Whatever the size of the shards, in the order of their numbers; the safetensors beside are the model's own."""
    made = model(tmp_path / "one", "Qwen3Moe", num_experts=12)
    planned = merged(recipe(made, "Q4_0"), tmp_path / "out", shard_size=30_000)
    parts = sorted((tmp_path / "out").glob("*.gguf"))
    whole = tensors(*parts)
    assert len(parts) > 4
    assert whole["blk.1.ffn_down_exps.weight"].shape.tolist() == [32, 64, 12]
    assert said(parts[0])["qwen3moe.expert_count"] == 12
    assert sum(len(tensor.sources) for shard in planned.shards for tensor in shard.beside[0].tensors) == len(
        planned.jobs
    )
    result = {name: x for path in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(path).items()}
    own = load_file(made / "model.safetensors")
    assert result.keys() == own.keys()
    assert all(torch.equal(result[name], own[name]) for name in own)


# ---- GGUF alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name, of in FAMILIES.items() if "num_experts_per_tok" in of])
def test_experts_that_are_stored_in_one_tensor_are_written_as_others(tmp_path: Path, family: str) -> None:
    """As transformers has them in memory: what is written is what the published layout gives, whatever its order."""
    for name in ("fused", "published"):
        merged(recipe(model(tmp_path / name, family, fused=name == "fused"), "Q8_0"), tmp_path / f"of-{name}")
    assert any(name.endswith(".experts.gate_up_proj") for name in load_file(tmp_path / "fused/model.safetensors"))
    found, expected = (tensors(tmp_path / f"of-{name}/model-Q8_0.gguf") for name in ("fused", "published"))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].data, expected[name].data) for name in expected)
    assert said(tmp_path / "of-fused/model-Q8_0.gguf") == said(tmp_path / "of-published/model-Q8_0.gguf")
    stored, other = (load_file(tmp_path / f"of-{name}/model.safetensors") for name in ("fused", "published"))
    assert stored.keys() == other.keys()
    assert all(torch.equal(stored[name], other[name]) for name in other)


def test_a_model_is_converted_and_nothing_else_is_written(tmp_path: Path) -> None:
    """The files are those that a merge has beside it; card and lock say what it is, and verify makes it again."""
    made, out = model(tmp_path / "Some-1.5B", "Qwen2"), tmp_path / "out"
    assert called(["convert", str(made), "--gguf", "q8_0,MXFP4", "--to", str(out), "--quiet"]).code == 0
    merged(recipe(made, "Q8_0", "MXFP4"), tmp_path / "beside")
    for kind in ("Q8_0", "MXFP4"):
        here, there = tensors(out / f"Some-1.5B-{kind}.gguf"), tensors(tmp_path / "beside" / f"model-{kind}.gguf")
        assert here.keys() == there.keys()
        assert all(np.array_equal(here[name].data, there[name].data) for name in here)
    assert {file.name for file in out.iterdir()} == {
        "README.md", "recipe.yaml", "merger.lock.yaml", "merger.measured.json", "pictures",
        "Some-1.5B-Q8_0.gguf", "Some-1.5B-MXFP4.gguf",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["tags"]) == ("gguf", ["gguf", "merger"])
    assert "Some-1.5B in GGUF, as llama.cpp reads it" in card
    assert "llama-cli -m Some-1.5B-Q8_0.gguf" in card
    assert not re.search(r"from_pretrained|passthrough|1 file\.|a sample", card.partition("<summary>The recipe")[0])
    again = called(["run", str(out / "merger.lock.yaml"), "--to", str(tmp_path / "again"), "--quiet"])
    assert (again.code, again.err) == (0, "")
    proven = called(["verify", str(out), "--json"]).report
    assert (proven["passed"], len({each["tensor"] for each in proven["compared"]})) == (True, proven["tensors"])
    data = (out / "Some-1.5B-MXFP4.gguf").read_bytes()
    (out / "Some-1.5B-MXFP4.gguf").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    spoiled = called(["verify", str(out)])
    assert spoiled.code == 7
    assert "Some-1.5B-MXFP4.gguf is another file" in spoiled.out


def test_a_merge_is_published_as_gguf_alone(tmp_path: Path) -> None:
    """Made in several parts, it goes on from those that are there."""
    made = [model(tmp_path / name, "Llama") for name in ("one", "two")]
    models = ", ".join(f"{{model: {folder}, parameters: {{weight: 1}}}}" for folder in made)
    text = f"merge_method: linear\nmodels: [{models}]\npublish: {{safetensors: false, gguf: [Q5_0]}}\n"
    for part in (Part(1, 2), Part(2, 2)):
        merged(text, tmp_path / "out", shard_size=60_000, part=part)
    planned = merged(text, tmp_path / "out", shard_size=60_000, publish_only=True, card=True)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert set(planned.files) == {name for name in files if name.endswith(".gguf")}
    assert len(planned.files) > 2
    assert not {"config.json", "tokenizer.json", "model.safetensors.index.json"} & files
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert front["tags"] == ["gguf", "merge", "merger", "linear"]


@pytest.mark.parametrize(
    ("family", "more", "what"),
    [
        ("Llama", {"architectures": ["OlmoForCausalLM"]}, "no GGUF is made of OlmoForCausalLM"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "positions scaled by dynamic"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("Gemma3", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar"),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("Qwen3Moe", {"norm_topk_prob": False}, "another norm_topk_prob"),
        ("Qwen3Moe", {"mlp_only_layers": [0]}, "layers without experts"),
        ("Qwen3Moe", {"num_local_experts": 5}, "4 of 5 experts together"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, more: dict[str, Any], what: str
) -> None:
    """By the plan, with the families that are written."""
    made = model(tmp_path / "one", family)
    config = json.loads((made / "config.json").read_text()) | more
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=what) as refused:
        merged(recipe(made, "Q8_0"), tmp_path / "out")
    assert "Qwen 2 and 2.5, Qwen 3, Gemma 2" in str(refused.value.problems[0].hint)
    assert refused.value.problems[0].where == "publish.gguf"


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path: Path) -> None:
    """One whose way to cut text has no name there, and one whose merges are not SentencePiece's."""
    made = model(tmp_path / "one", "Llama")
    kept = json.loads((made / "tokenizer.json").read_text())
    kept["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "a+"}
    (made / "tokenizer.json").write_text(json.dumps(kept))
    with pytest.raises(RecipeError, match="no name for how its tokenizer cuts text"):
        merged(recipe(made, "Q8_0"), tmp_path / "out")
    kept = json.loads(of_pieces().to_str())
    kept["model"]["merges"].remove(["t", "he"])
    (made / "tokenizer.json").write_text(json.dumps(kept))
    with pytest.raises(RecipeError, match="are not joined"):
        merged(recipe(made, "Q8_0"), tmp_path / "out")


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def run_llama(path: Path, prompt: str, count: int) -> list[tuple[int, dict[int, float]]]:
    """What llama.cpp continues a text with: each token, and the logarithms of the likeliest ones' chances."""
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make oracles")
    parameters = llama.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = str(path), 256, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = llama.Server(parameters)
    asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": 5, "ignore_eos": True}
    request = Request(f"{server.listening_address}/completion", json.dumps(asked).encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request) as answer:
        steps = json.load(answer)["completion_probabilities"]
    return [(step["id"], {top["id"]: top["logprob"] for top in step["top_logprobs"]}) for step in steps]


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_continues_a_text_as_transformers_does(tmp_path: Path, family: str, pieces: bool) -> None:
    """From the text itself, token for token, and with the same chances; of experts that are in one tensor, too."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make oracles")
    tokenizer = of_pieces() if pieces else of_bytes()
    made = model(tmp_path / "one", family, tokenizer, fused=pieces)
    merged(recipe(made, "F32"), tmp_path / "out")
    found = run_llama(tmp_path / "out" / "model-F32.gguf", TEXT, 12)
    same_as_transformers(found, tmp_path / "out", tokenizer, 2e-2)


def same_as_transformers(
    found: list[tuple[int, dict[int, float]]], folder: Path, tokenizer: Tokenizer, error: float
) -> None:
    """Each token is the likeliest one, as far as the error lets it be told, and chances differ no more."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.encode(TEXT).ids
    with torch.no_grad():
        for token, tops in found:
            chances = loaded(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert chances[token] >= chances.index_fill(0, torch.tensor(1), -torch.inf).max() - error
            for number, chance in tops.items():
                assert chance == pytest.approx(float(chances[number]), abs=error)
            ids.append(token)


@pytest.mark.parametrize("kind", [kind for kind in GGUF if kind != "F32"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_llama_cpp_continues_a_text_from_every_type_and_from_parts(tmp_path: Path, family: str, kind: str) -> None:
    """As transformers does with what `gguf` reads of the rounded tensors; llama.cpp rounds activations besides.

    Every expert has its share, for which ones are chosen would be another question where activations are rounded.
    """
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make oracles")
    made, out = model(tmp_path / "one", family, num_experts_per_tok=4), tmp_path / "out"
    planned = merged(recipe(made, kind), out, shard_size=60_000)
    files = [file for shard in planned.shards for file in shard.beside]
    found = run_llama(out / files[0].name, TEXT, 12)
    kinds = {source: tensor.kind for file in files for tensor in file.tensors for source in tensor.sources}
    for path in out.glob("*.safetensors"):
        save_file({name: rounded(x, kinds[name]) for name, x in load_file(path).items()}, path, {"format": "pt"})
    same_as_transformers(found, out, of_bytes(), 0.1)


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of a tensor in a type of GGUF."""
    number = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(x.float().numpy(), number), number))


def test_every_type_is_a_type_of_recipes(tmp_path: Path) -> None:
    """The recipe's words, the plan's and the steps' are the same ones."""
    from merger.methods.steps.dtypes import BLOCKS
    from merger.models.gguf.layout import KINDS

    assert set(GGUF) == set(KINDS) == set(BLOCKS)
    assert {kind: (each.together, each.nbytes) for kind, each in KINDS.items()} == BLOCKS
    assert {kind: GGMLQuantizationType[kind].value for kind in KINDS} == {kind: KINDS[kind].number for kind in KINDS}


def test_they_are_published_in_the_one_commit(tmp_path: Path, hub: LoopbackHub, command: Command) -> None:
    """With the shards, and found there by the same command; no branch stays."""
    folder = model(tmp_path / "one", "Llama")
    hub.add_model("org/one", {file.name: file.read_bytes() for file in folder.iterdir()})
    text = "merge_method: linear\nmodels: [{model: org/one, parameters: {weight: 1}}]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    line = ["run", "recipe.yaml", "--to", "hf://org/merged", "--gguf", "Q8_0", "--quiet"]
    done = command(*line, cwd=tmp_path, hub=hub)
    assert done.returncode == 0, done.stderr
    held = hub.read("org/merged", "model-Q8_0.gguf")
    (tmp_path / "held.gguf").write_bytes(held)
    assert "output.weight" in tensors(tmp_path / "held.gguf")
    commits = len(hub.commits("org/merged"))
    assert command(*line, cwd=tmp_path, hub=hub).returncode == 0
    assert len(hub.commits("org/merged")) == commits
    line[:2], line[3] = ["convert", "org/one"], "hf://org/one-GGUF"
    hub.xet(tmp_path / "storage")
    done = command(*line, "--stream", "--max-disk", "1kB", cwd=tmp_path, hub=hub, env={"HF_HUB_DISABLE_XET": "0"})
    hub.xet(None)
    assert done.returncode == 0, done.stderr
    assert {name for name in hub.tree("org/one-GGUF") if name.endswith((".gguf", ".json"))} == {
        "one-Q8_0.gguf", "merger.measured.json",
    }  # fmt: skip
    front = yaml.safe_load(hub.read("org/one-GGUF", "README.md").decode().split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == (["org/one"], "quantized")
    line[:2], line[3] = ["run", "recipe.yaml"], "hf://org/merged"
    refused = command(*line, "--stream", cwd=tmp_path, hub=hub)
    assert (refused.returncode, "one file at a time" in refused.stderr) == (2, True)


def test_llama_3s_scaled_frequencies_are_those_of_transformers() -> None:
    """What llama.cpp divides each frequency by gives what transformers computes from the same config."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / np.array(llama3_factors(rope, 128, 8192)), expected.numpy(), rtol=1e-5)
