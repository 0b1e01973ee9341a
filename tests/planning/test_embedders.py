"""Pipelines of sentence-transformers, saved by its own classes: the tensors of each module are merged; it loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calls import Command, called
from loopback import LoopbackHub
from places import ROOT
from safetensors.torch import load
from thorough import THOROUGH, thorough_only

from merger.card.render import render
from merger.methods.registry import methods
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

from .test_beside import DENSE, embedder, recipe

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[CLS]", *(f"w{number}" for number in range(59))]
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
         "max_position_embeddings": 32}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bert(folder: Path, head: str = "", **config: Any) -> str:
    """A small BERT with its tokenizer, drawn at random."""
    import transformers

    (folder / "vocab.txt").parent.mkdir(parents=True, exist_ok=True)
    getattr(transformers, f"Bert{head or 'Model'}")(transformers.BertConfig(**SHAPE, **config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(WORDS)) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def dense(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as of

    steps = [of.Transformer(bert(folder)), of.Pooling(16, pooling_mode="cls"), of.Dense(16, 8), of.LayerNorm(8),
             of.Normalize()]  # fmt: skip
    return SentenceTransformer(modules=steps, device="cpu")


def words(folder: Path) -> Any:
    from tokenizers import Tokenizer

    bert(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def static(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return SentenceTransformer(modules=[StaticEmbedding(words(folder), embedding_dim=8)], device="cpu")


def splade(folder: Path) -> Any:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    return SparseEncoder(modules=[MLMTransformer(bert(folder, "ForMaskedLM")), SpladePooling()], device="cpu")


def routed(folder: Path) -> Any:
    """Queries by a weight for each word, documents by a model in a folder of its own."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseStaticEmbedding, SpladePooling

    document = MLMTransformer(bert(folder, "ForMaskedLM"))
    query = SparseStaticEmbedding(tokenizer=document.tokenizer, weight=torch.rand(64))
    router = Router.for_query_document(query_modules=[query], document_modules=[document, SpladePooling()])
    return SparseEncoder(modules=[router], device="cpu")


def reranker(folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(bert(folder, "ForSequenceClassification", num_labels=1), device="cpu")


def colbert(folder: Path) -> Any:
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.sentence_transformer import modules as of

    steps = [of.Transformer(bert(folder)), of.Dense(16, 4, bias=False, module_input_name="token_embeddings"),
             of.Normalize(module_input_name="token_embeddings")]  # fmt: skip
    return MultiVectorEncoder(modules=steps, device="cpu")


def clip(folder: Path) -> Any:
    """As models for texts and pictures were published: all of it in a folder of its own."""
    import transformers
    from sentence_transformers import SentenceTransformer

    inside, side = folder / "0_CLIPModel", {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16,
                                            "intermediate_size": 24}  # fmt: skip
    inside.mkdir(parents=True)
    text = {**side, "vocab_size": 64, "eos_token_id": 4, "max_position_embeddings": 32}
    vision = {**side, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(inside)
    (inside / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(
        ["w", "w</w>", "<unk>", "<|startoftext|>", "<|endoftext|>"])}))  # fmt: skip
    (inside / "merges.txt").write_text("#version: 0.2\n")
    words = transformers.CLIPTokenizer(str(inside / "vocab.json"), str(inside / "merges.txt"))
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    transformers.CLIPProcessor(pictures, words).save_pretrained(inside)
    step = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (folder / "modules.json").write_text(json.dumps([step]))
    return SentenceTransformer(str(folder), device="cpu")


KINDS: dict[str, Callable[[Path], Any]] = {
    "a step of each kind": dense, "words alone": static, "sparse": splade, "two routes": routed, "a reranker": reranker,
    "a vector a token": colbert, "texts and pictures": clip,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS if THOROUGH else ["words alone"])
@pytest.mark.filterwarnings("ignore")
def test_the_merge_of_a_pipeline_is_one_of_its_modules(kind: str, here: Path) -> None:
    """The class that saved the parents loads it; each tensor is the mean of theirs, and it embeds."""
    models = []
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        models.append(KINDS[kind](here / f"of-{name}"))
        if kind == "texts and pictures":
            (here / f"of-{name}").rename(here / name)
        else:
            models[-1].save_pretrained(str(here / name), create_model_card=False)
    said = called(["run", str(recipe(here, "one", "two")), "--to", "./out"])
    assert said.code == 0, said.err
    assert "differs" not in said.err
    found = type(models[0])("./out", device="cpu")
    made, *parents = (model.state_dict() for model in (found, *models))
    assert made.keys() == parents[0].keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (parents[0][name] + parents[1][name]) / 2, atol=1e-7, rtol=1e-6)
    if kind == "a reranker":
        assert found.predict([("w1 w2", "w3")]).shape == (1,)
    else:
        assert len(found.encode(["w1 w2 w3", "w4"])) == 2
    card = (here / "out/README.md").read_text()
    assert f"model = {type(found).__name__}(" in card
    assert "library_name: sentence-transformers\n" in card
    assert called(["verify", "./out", "--all"]).code == 0


def in_pickles(folder: Path, parts: int) -> None:
    """The same tensors in a file of torch's, or in several with an index."""
    file = folder / "model.safetensors"
    held = list(load(file.read_bytes()).items())
    file.unlink()
    if parts == 1:
        torch.save(dict(held), folder / "pytorch_model.bin")
        return
    files = {f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin": dict(held[part::parts]) for part in range(parts)}
    for name, each in files.items():
        torch.save(each, folder / name)
    weight_map = {tensor: name for name, each in files.items() for tensor in each}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("folders", "parts"), [(["2_Dense"], 1), (["", "2_Dense"], 1), (["0_CLIPModel"], 1), (["0_CLIPModel"], 3)], ids=str
)
def test_steps_in_pickles_merge_as_the_same_in_safetensors(folders: list[str], parts: int, here: Path) -> None:
    """When asked; with the model itself in one or in safetensors, or without a model; also in several files."""
    for seed, name in enumerate(("one", "two")):
        if "2_Dense" in folders:
            embedder(here / name, seed, seed)
        else:
            torch.manual_seed(seed)
            clip(here / name)
    asked = str(recipe(here, "one", "two"))
    assert called(["run", asked, "--to", "./plain"]).code == 0
    for name in ("one", "two"):
        for folder in folders:
            in_pickles(here / name / folder, parts)
    said = called(["run", asked, "--to", "./out", "--allow-pickle"])
    assert (said.code, "pytorch_model.bin" in said.err) == (0, False), said.err
    made, plain = ({file.name for file in (here / name).glob("*/*")} for name in ("out", "plain"))
    assert made == plain
    for file in (here / "plain").rglob("*.safetensors"):
        found = load((here / "out" / file.relative_to(here / "plain")).read_bytes())
        expected = load(file.read_bytes())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


PYLATE = ROOT / ".venv-pylate" / "bin" / "python"
BY_PYLATE = """
import sys
import torch
from pylate import models
if sys.argv[1] == "save":
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        models.ColBERT(f"of-{name}", embedding_size=8, device="cpu").save_pretrained(name)
else:
    print(*(vectors.shape[1] for vectors in models.ColBERT("out", device="cpu").encode(["w1 w2", "w3"], is_query=True)))
"""


@pytest.mark.skipif(not PYLATE.exists(), reason="PyLate has an environment of its own: make oracles")
def test_the_merge_of_pylates_models_is_one_of_its_models(here: Path) -> None:
    """In an environment of its own, for it asks for older versions of what we ask for."""

    def ask(what: str) -> str:
        line = [PYLATE, "-c", BY_PYLATE, what]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(line, env=offline, check=True, stdout=subprocess.PIPE, text=True).stdout

    for name in ("one", "two"):
        bert(here / f"of-{name}")
    ask("save")
    assert called(["run", str(recipe(here, "one", "two")), "--to", "./out"]).code == 0
    one, two, made = (load((here / name / "1_Dense/model.safetensors").read_bytes()) for name in ("one", "two", "out"))
    assert made.keys() == {"linear.weight"}
    torch.testing.assert_close(made["linear.weight"], (one["linear.weight"] + two["linear.weight"]) / 2)
    assert ask("load").split() == ["8", "8"]
    assert "model = models.ColBERT(" in (here / "out/README.md").read_text()


def test_folders_of_a_pipeline_are_made_anew_and_resumed(here: Path) -> None:
    """What a run leaves behind in them is gone, what it has finished stays."""
    from safetensors.torch import save_file

    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        for folder in ("0_WordEmbeddings", "1_LSTM"):
            (here / name / folder).mkdir(parents=True)
            save_file({"weight": torch.randn(3, 2)}, here / name / folder / "model.safetensors")
        (here / name / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "0_WordEmbeddings"}]))
    path = str(recipe(here, "one", "two"))
    assert called(["run", path, "--to", "./out", "--part", "1/2"]).code == 0
    (here / "out.merging/new/0_WordEmbeddings").mkdir(exist_ok=True)
    (here / "out.merging/new/0_WordEmbeddings/left").write_text("behind")
    assert called(["run", path, "--to", "./out"]).code == 0
    assert sorted(each.name for each in (here / "out").glob("[01]_*/*")) == ["model.safetensors"] * 2
    assert not (here / "out/config.json").exists()


def test_words_and_dimensions_that_differ_are_refused(here: Path) -> None:
    """A row of a step's table must be the same word's in both, and as long."""
    from safetensors.torch import save_file

    for name in ("one", "two"):
        folder = here / name / "0_StaticEmbedding"
        folder.mkdir(parents=True)
        save_file({"embedding.weight": torch.randn(3, 2)}, folder / "model.safetensors")
        (folder / "tokenizer.json").write_text(json.dumps({"of": name}))
        (here / name / "modules.json").write_text("[]")
    path = str(recipe(here, "one", "two"))
    said = called(["plan", path])
    assert said.code == 4
    assert "0_StaticEmbedding/tokenizer.json differs from that of one" in said.err
    shutil.copy(here / "one/0_StaticEmbedding/tokenizer.json", here / "two/0_StaticEmbedding/tokenizer.json")
    assert called(["plan", path]).code == 0
    save_file({"embedding.weight": torch.randn(3, 4)}, here / "two/0_StaticEmbedding/model.safetensors")
    said = called(["plan", path])
    assert said.code == 4
    assert "0_StaticEmbedding/embedding.weight is 3x2 in one, but 3x4 in two" in said.err


NAMED = {
    "a pipeline": ({}, b"[]", "sentence-transformers", "sentence-similarity", "model = SentenceTransformer("),
    "its own word": ({"model_type": "SparseEncoder"}, b"[]", "sentence-transformers", "feature-extraction",
                     "model = SparseEncoder("),
    "a word nobody knows": ({"model_type": "os.system"}, b"[]", "sentence-transformers", "sentence-similarity",
                            "model = SentenceTransformer("),
    "PyLate's": ({"query_length": 32}, b'[{"type": "pylate.models.Dense.Dense"}]', "PyLate", "sentence-similarity",
                 "model = models.ColBERT("),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_the_card_names_what_loads_it(case: str, here: Path) -> None:
    """Library, task and the lines that use it."""
    config, modules, library, task, line = NAMED[case]
    tiny.model(here / "one")
    (here / "one/modules.json").write_bytes(modules)
    (here / "one/config_sentence_transformers.json").write_text(json.dumps(config))
    planned, _ = plan(read_recipe(recipe(here, "one")), Options())
    card = render(planned, methods(), "org/out")
    assert f"library_name: {library}\npipeline_tag: {task}\n" in card
    assert line in card


@thorough_only
def test_a_pipeline_is_published_in_one_commit(
    here: Path,
    hub: LoopbackHub,
    command: Command,
) -> None:
    """Each module's file in its folder, and what lay there of an older one is gone."""
    for seed, name in enumerate(("one", "two")):
        embedder(here / name, seed, seed)
        hub.add_model(f"org/{name}", here / name)
    hub.add_model("org/out", {"2_Dense/model.safetensors": b"old", "3_Old/model.safetensors": b"older"})
    path = recipe(here, "one", "two")
    path.write_text(path.read_text().replace("./", "org/"))
    done = command("run", str(path), "--to", "hf://org/out", "--force", cwd=here, hub=hub)
    assert done.returncode == 0, done.stderr
    files = hub.files("org/out")
    assert [name for name in files if name.endswith("safetensors")] == [DENSE, "model.safetensors"]
    held = [files[DENSE], *((here / name / DENSE).read_bytes() for name in ("one", "two"))]
    found, *parents = map(load, held)
    assert all(torch.equal(found[name], (parents[0][name] + parents[1][name]) / 2) for name in found)
    assert command("verify", "hf://org/out", "--all", cwd=here, hub=hub).returncode == 0
